"""Step times, waits, slow processes, throughput."""

from ptm import timing


def test_step_time_is_a_median_between_marks_without_pauses():
    now = [0.0]
    timer = timing.StepTimer(window=3, clock=lambda: now[0])

    def mark(step, at):
        now[0] = at
        timer.mark(step)

    mark(1, 100.0)
    assert timer.step_time is None
    mark(11, 120.0)
    assert timer.step_time == 2.0
    timer.pause()
    mark(12, 1000.0)
    assert timer.step_time == 2.0
    mark(13, 1004.0)
    mark(14, 1009.0)
    assert timer.step_time == 4.0
    mark(15, 1015.0)
    assert timer.step_time == 5.0


def test_waits():
    """The wait for data is a mean over steps, the wait of the devices a share of the steps that followed another one."""

    class Loss:
        def __init__(self, ready: bool):
            self.is_ready = lambda: ready

    now = iter((0.0, 3.0, 4.0, 10.0, 11.0, 11.0, 20.0, 20.5, 21.0, 30.0, 30.0, 33.0))
    waits = timing.Waits(clock=lambda: next(now))
    assert waits.take() == {}
    for before in (None, Loss(True), Loss(False)):
        waits.start()
        waits.batch()
        waits.dispatch(before)
    assert waits.take() == {"data_seconds": 1.5, "host_seconds": 2.0, "devices_waited": 0.5}
    waits.start()
    waits.batch()
    waits.dispatch(None)
    assert waits.take() == {"data_seconds": 0.0, "host_seconds": 3.0}


def test_a_slow_process_is_named_once():
    """When it was the slow one in three rows on end, and again after it was not; never for what is short beside a step."""
    peers, names = timing.Peers(), ("a", "b", "c")
    told = [peers.look(names, (0.1, seconds, 0.2), 1.0)[1] for seconds in (0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9)]
    told += [peers.look(names, seconds, 1.0)[1] for seconds in ((0.0, 0.0, 0.0), (0.1, 0.9, 0.2))]  # a row without a batch says nothing
    assert [row for row, line in enumerate(told) if line] == [5, 11]
    assert told[5] == "Process 1 (b) keeps the others waiting: its host takes 900 ms for a batch, the others' 150 ms (median), a step 1.0 s."
    assert peers.look(names, (0.1, 0.9, 0.2), 1.0)[0] == {"slowest_process": 1, "slowest_host_seconds": 0.9}
    quick = timing.Peers()
    assert [quick.look(names, seconds, 1.0)[1] for seconds in [(0.01, 0.4, 0.02)] * 5 + [(0.5, 0.9, 0.6)] * 5] == [None] * 10
    assert timing.Peers().look(("a",), (3.0,), 1.0) == ({}, None)


def test_throughput_and_peaks():
    row = timing.throughput(0.5, tokens=1000, forward_flops=1e12, device_kind="NVIDIA H100 80GB HBM3", devices=2)
    assert row == {"step_time": 0.5, "tokens_per_second": 2000.0, "model_flops_per_second": 6e12, "mfu": 6e12 / (2 * 989e12)}
    assert "mfu" not in timing.throughput(0.5, tokens=1, forward_flops=1, device_kind="cpu", devices=1)
    kinds = ["TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "NVIDIA A100-SXM4-40GB", "NVIDIA H200", "NVIDIA H100 PCIe", "cpu"]
    assert [timing.peak_flops(kind) for kind in kinds] == [197e12, 459e12, 459e12, 918e12, 312e12, 989e12, None, None]


def test_memory_counts_bytes():
    assert timing.memory()["host_peak_bytes"] > 10_000_000

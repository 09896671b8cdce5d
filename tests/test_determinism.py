"""One switch: the same run twice gives the same bits. What it does on GPUs is asked of XLA, and needs one to be seen."""

import json
import os
import subprocess
import sys

import pytest
import runs

from ptm import hosts
from ptm import run as run_lib
from ptm.fields import ConfigError

FLAG = run_lib.DETERMINISTIC


def test_the_switch_is_a_flag_that_comes_in_time(monkeypatch):
    """Before devices are opened it joins other flags, once; afterwards it is refused where it matters."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    monkeypatch.setattr(hosts, "started", lambda: False)
    for _ in range(2):
        run_lib.use_deterministic_kernels()
        assert os.environ["XLA_FLAGS"] == f"--xla_other=1 {FLAG}"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    with pytest.raises(ConfigError, match="environment has XLA_FLAGS=--xla_gpu_deterministic_ops=false; take that out"):
        run_lib.use_deterministic_kernels()
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(hosts, "started", lambda: True)
    run_lib.use_deterministic_kernels()  # a CPU needs nothing
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match=f"comes too late: this process uses its GPUs already. Start it with XLA_FLAGS={FLAG}"):
        run_lib.use_deterministic_kernels()


def test_the_switch_is_written_down(tmp_path):
    options = runs.tiny("concat", text=runs.corpus(tmp_path / "corpus.txt"), train__steps=2, compute__deterministic=True)
    assert runs.run(options, tmp_path / "run") == 0  # a CPU needs nothing, also when its devices are open
    session = json.loads((tmp_path / "run/env.json").read_text())["history"][-1]
    assert session["deterministic"] is True and session["xla_flags"] == os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.faults if kind in ("concat", "spans") else pytest.mark.slow) for kind in ("concat", "mlm", "spans", "memory")])
def test_the_same_run_in_two_processes(kind, tmp_path, record_property):
    """Parameters, optimizer, data state and metrics.jsonl, bit for bit; without the compile cache, so that each compiles for itself."""
    text = runs.corpus(tmp_path / "corpus.txt")
    for name in ("a", "b"):
        process = runs.child(kind, tmp_path / name, text, "--config.compute.deterministic=true", "--config.compute.cache=None")
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert FLAG in json.loads((tmp_path / name / "env.json").read_text())["history"][-1]["xla_flags"]
    runs.assert_same(tmp_path / "a", tmp_path / "b", 14)
    record_property("fault", f"12. the same run twice: {kind}")
    record_property("tried", 1)
    record_property("lost", 0)


@pytest.mark.faults
def test_xla_reads_flags_that_are_set_by_then():
    """The command line has loaded JAX by then, but opened no device: XLA still refuses a flag that it does not know."""
    code = (
        "import os, jax; from ptm import train, hosts, run; assert not hosts.started(); run.use_deterministic_kernels();"
        "os.environ['XLA_FLAGS'] += ' --xla_no_such_flag=1'; print(jax.devices(), jax.jit(lambda x: x + 1)(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode != 0 and "xla_no_such_flag" in done.stderr and "xla_gpu_deterministic_ops" not in done.stderr.split("Unknown flag")[-1]

"""What the folder of a study says: the states and figures of its runs, who is at one; which arms end at a rung, which a search asks for."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from made_studies import LOSS, TESTS, TUNED, attempt, begin, elsewhere, finish, made, refusal, rows

from ptm import lock, log
from ptm.study import Arm, Halving, Search, Stage, attempts, choice, folder, halving, log_uniform, search, summary

pytestmark = pytest.mark.usefixtures("study_text")


def test_states(tmp_path):
    made(tmp_path, stages=TUNED, seeds=(0, 1, 2, 3))
    pretrain, tune = (lambda arm, seed: f"{arm}/seed{seed}/pretrain"), (lambda arm, seed: f"{arm}/seed{seed}/tune")
    finish(tmp_path, pretrain("low", 0))
    attempt(tmp_path, pretrain("low", 1), 1, 75)
    begin(tmp_path, pretrain("low", 2))
    attempt(tmp_path, pretrain("low", 3), None)
    attempt(tmp_path, pretrain("high", 0), 75, 1)
    elsewhere(tmp_path, pretrain("high", 1))
    elsewhere(tmp_path, pretrain("high", 2), time.time() - 2 * lock.FRESH)
    begin(tmp_path, pretrain("high", 3))
    path = tmp_path / pretrain("high", 3) / "config.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.02', '"learning_rate": 0.03'))
    found = {run: folder.state(tmp_path, run).name for run in folder.read(tmp_path).runs}
    assert found == {
        pretrain("low", 0): "finished", pretrain("low", 1): "cut", pretrain("low", 2): "cut", pretrain("low", 3): "cut",
        pretrain("high", 0): "failed", pretrain("high", 1): "running", pretrain("high", 2): "cut", pretrain("high", 3): "stale",
        tune("low", 0): "ready", tune("low", 1): "waiting", tune("low", 2): "waiting", tune("low", 3): "waiting",
        **{tune("high", seed): "waiting" for seed in range(4)},
    }  # fmt: skip
    failed = folder.state(tmp_path, pretrain("high", 0))
    assert (failed.error, len(failed.attempts), failed.step) == ("it broke", 2, None)
    assert folder.state(tmp_path, pretrain("low", 0)).step == 14 and folder.state(tmp_path, pretrain("low", 1)).error is None
    assert folder.changes(tmp_path, pretrain("high", 3)) == {"optimizer.learning_rate": (0.03, 0.02)}
    assert "no run 'low/seed0/pretrian'" in (told := refusal(folder.state, tmp_path, "low/seed0/pretrian")) and "Did you mean 'low/seed0/pretrain'?" in told


def test_a_folder_that_was_moved(tmp_path):
    """Its runs keep what they hold: the path of the model that they began from."""
    made(tmp_path / "old", stages=TUNED)
    finish(tmp_path / "old", "low/seed0/pretrain")
    begin(tmp_path / "old", "low/seed0/tune")
    (tmp_path / "old").rename(tmp_path / "new")
    assert folder.state(tmp_path / "new", "low/seed0/tune").name == "cut" and not folder.changes(tmp_path / "new", "low/seed0/tune")
    assert folder.placed(tmp_path / "new", "low/seed0/tune")["init"] == f"ckpt:{tmp_path}/old/low/seed0/pretrain@14"
    assert folder.placed(tmp_path / "new", "high/seed0/tune")["init"] == f"ckpt:{tmp_path}/new/high/seed0/pretrain@14"
    assert made(tmp_path / "new", stages=TUNED).runs["low/seed0/tune"].needs == "low/seed0/pretrain"


def test_figures_are_those_of_metrics_jsonl(tmp_path):
    made(tmp_path)
    run = "low/seed0/pretrain"
    assert folder.final_metrics(tmp_path, run) == {} and folder.curve(tmp_path, run, "loss") == []
    rows(tmp_path, run, {2: {"loss": 4.0}, 7: {"validation/loss": 3.0, "validation/tokens": 8}, 14: {"validation/loss": float("nan"), "other/loss": 1.0}})
    with open(tmp_path / run / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "validation/lo')  # torn by a crash
    final = folder.final_metrics(tmp_path, run)
    assert final.keys() == {"validation/loss", "validation/tokens"} and final["validation/tokens"] == 8, "of the run's own evals alone"
    assert folder.curve(tmp_path, run, "validation/loss")[0] == (7, 3.0) and folder.state(tmp_path, run).step == 14
    assert folder.value_at(tmp_path, run, "validation/loss", 7) == 3.0 and folder.value_at(tmp_path, run, "validation/loss", 14) is None
    log.truncate(str(tmp_path / run / "metrics.jsonl"), 7)  # as a resume from step 7 does
    assert folder.curve(tmp_path, run, "validation/loss") == [(7, 3.0)] and folder.final_metrics(tmp_path, run) == {
        "validation/loss": 3.0,
        "validation/tokens": 8,
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_record(content, tmp_path):
    (tmp_path / "study.json").write_text(content)
    assert "study.json" in refusal(folder.read, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"attempts": 3}'])
def test_damaged_attempts(content, tmp_path):
    made(tmp_path)
    begin(tmp_path, "low/seed0/pretrain")
    (tmp_path / "low/seed0/pretrain/run.json").write_text(content)
    assert "run.json is damaged" in refusal(folder.state, tmp_path, "low/seed0/pretrain")


def test_a_record_that_was_lost_is_made_again(tmp_path):
    """As its message says: runs that are there are found again."""
    record = made(tmp_path)
    finish(tmp_path, "low/seed0/pretrain")
    begin(tmp_path, "high/seed0/pretrain")
    (tmp_path / "study.json").unlink()
    assert made(tmp_path).runs == record.runs
    assert [folder.state(tmp_path, run).name for run in record.runs] == ["finished", "cut", "ready", "ready"]


def test_a_run_of_other_data_is_stale(tmp_path):
    """Though the study has forgotten it: its env.json tells what it was begun on."""
    record = made(tmp_path)
    for run, data in (("low/seed0/pretrain", "other"), ("high/seed0/pretrain", record.runs["high/seed0/pretrain"].fingerprints["data"])):
        finish(tmp_path, run)
        (tmp_path / run / "env.json").write_text(json.dumps({"fingerprints": {"data": data, "tokenizer": "t"}, "history": []}))
    assert [folder.state(tmp_path, run).name for run in record.runs][:2] == ["stale", "finished"]
    assert folder.changes(tmp_path, "low/seed0/pretrain") == {"data": ("other", record.runs["low/seed0/pretrain"].fingerprints["data"])}


def test_what_is_no_study(tmp_path):
    assert "is no study" in refusal(folder.read, tmp_path)


def test_one_process_holds_a_run(tmp_path):
    """Until the process ends the run is running; one that is killed leaves an attempt without an end."""
    made(tmp_path)
    run = "low/seed0/pretrain"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ptm.study import attempts\n"
        "with attempts.hold(Path(sys.argv[1]), identity='x', git={}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert folder.state(tmp_path, run).name == "running"
    finally:
        other.kill()
        other.wait()
    state = folder.state(tmp_path, run)
    assert (state.name, len(state.attempts), state.attempts[0]["end"]) == ("cut", 1, None)
    with attempts.hold(tmp_path / run, identity="x", git={"commit": "c", "dirty": False}) as mine:
        assert folder.state(tmp_path, run).name == "running"
        mine.end(1, error="it broke")
    state = folder.state(tmp_path, run)
    assert (state.name, state.error, len(state.attempts)) == ("failed", "it broke", 2)


# Halving.


def test_halving_by_hand(tmp_path):
    """Four arms, two rungs, a half goes on: by the mean over the seeds; the base stays whatever it does, an arm without a figure under one of them is last."""
    arms = tuple(Arm(name, {"optimizer.learning_rate": rate}) for name, rate in (("base", 0.01), ("a", 0.02), ("b", 0.03), ("c", 0.04)))
    stages = (Stage("pretrain", recipe=f"{TESTS}/runs.py:concat", overrides={"evals.validation.every": 2}), TUNED[1])
    record = made(tmp_path, arms=arms, base="base", stages=stages, halving=Halving(metric=LOSS, rungs=(4, 8), keep=0.5))
    pretrain = [run for run in record.runs if run.endswith("pretrain")]

    def reach(step: int, losses: dict[str, tuple[float, float]]) -> None:
        for arm, pair in losses.items():
            for seed, value in enumerate(pair):
                rows(tmp_path, f"{arm}/seed{seed}/pretrain", {4: {"validation/loss": value}} | ({8: {"validation/loss": value}} if step == 8 else {}))
                (tmp_path / f"{arm}/seed{seed}/pretrain" / "ckpt" / str(step)).mkdir(parents=True, exist_ok=True)
                attempt(tmp_path, f"{arm}/seed{seed}/pretrain", 0)

    assert {halving.limit(tmp_path, record, run) for run in pretrain} == {4} and halving.limit(tmp_path, record, "a/seed0/tune") is None
    assert halving.at_limit(tmp_path, record, "a/seed0/tune"), "what comes after the rungs waits for them"
    reach(4, {"base": (9.0, 9.0), "a": (2.0, 3.0), "b": (1.0, 5.0)})
    assert halving.decide(tmp_path, record, lost=()) is None, "not before all have come"
    reach(4, {"c": (2.0, 2.0)})
    assert folder.state(tmp_path, "a/seed0/pretrain").name == "ready"
    first = halving.decide(tmp_path, record, lost=())
    assert first == {"step": 4, "values": {"base": 9.0, "a": 2.5, "b": 3.0, "c": 2.0}, "kept": ["base", "a", "c"], "stopped": ["b"]}
    assert {run for run in record.runs if folder.state(tmp_path, run).name == "stopped"} == {
        f"b/seed{seed}/{stage}" for seed in (0, 1) for stage in ("pretrain", "tune")
    }
    reach(8, {"base": (9.0, 9.0), "a": (float("nan"), 0.1)})
    second = halving.decide(tmp_path, record, lost={"c/seed0/pretrain", "c/seed1/pretrain"})
    assert second["values"] == {"base": 9.0, "a": None, "c": None} and second["stopped"] == ["c"], "two of three go on; of those without a figure the first"
    assert halving.decide(tmp_path, record, lost=()) is None and halving.limit(tmp_path, record, "a/seed0/pretrain") is None
    assert not halving.at_limit(tmp_path, record, "a/seed0/tune")


# The search.


def test_trials_are_arms(tmp_path):
    space = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}
    options = {"search": Search(space=space, trials=3, metric=LOSS)}
    assert made(tmp_path, **options).search == folder.SearchRecord(
        metric=LOSS, trials=3, space={"optimizer.learning_rate": "log_uniform(0.0001, 0.01)"}, asked={}
    )
    record = made(tmp_path, **options, asked={0: {"optimizer.learning_rate": 0.005}})
    assert record.arms[2].name == "trial 0" and record.runs["trial_0/seed1/pretrain"].config["optimizer.learning_rate"] == 0.005
    assert dataclasses.replace(made(tmp_path, **options), made=record.made) == record, "trials are remembered"


def test_optuna_asks_and_is_told(tmp_path):
    """Trials that were asked for and lost are asked for again; values are means over the seeds; a trial whose runs are lost fails."""
    optuna = pytest.importorskip("optuna", reason="needs the extra search")
    space = {
        "optimizer.learning_rate": log_uniform(1e-4, 1e-2),
        "optimizer.name": choice(["adamw", "lamb"]),
        "optimizer.no_decay": choice([(".*/bias",), (".*/scale", ".*/bias")]),
    }
    options = {"search": Search(space=space, trials=3, metric=LOSS)}
    record = made(tmp_path, **options)
    number, values = search.ask(tmp_path, record, space)
    assert number == 0 and 1e-4 <= values["optimizer.learning_rate"] <= 1e-2 and values["optimizer.name"] in ("adamw", "lamb")
    assert search.ask(tmp_path, record, space) == (0, values), "as if killed before it was recorded"
    record = made(tmp_path, **options, asked={0: values})
    search.tell(tmp_path, record, lost=frozenset())
    for seed, loss in enumerate((2.0, 3.0)):
        finish(tmp_path, f"trial_0/seed{seed}/pretrain", loss)
    search.tell(tmp_path, record, lost=frozenset())
    number, more = search.ask(tmp_path, record, space)
    assert number == 1 and more != values
    record = made(tmp_path, **options, asked={0: values, number: more})
    search.tell(tmp_path, record, lost=frozenset(f"trial_1/seed{seed}/pretrain" for seed in (0, 1)))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / search.JOURNAL)))
    trials = optuna.load_study(study_name="made", storage=storage).trials
    assert [(trial.state.name, trial.value) for trial in trials] == [("COMPLETE", 2.5), ("FAIL", None)]
    assert "best of 1 trial: trial 0" in summary.outcome(tmp_path, record, {})
    other = {**space, "optimizer.name": choice(["adafactor", "lion"])}
    assert "holds trials of another space" in refusal(search.ask, tmp_path, record, other)

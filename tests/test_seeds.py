"""Several seeds of one run: what is run and skipped, the statistics, failures and interruptions."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from ptm import cli, describe, labels, seeds, train
from ptm.config import Checkpoint, Data, Tokenizer, base
from ptm.fields import ConfigError
from ptm.models import gpt
from ptm.objectives import classify

SHORT = {"train__steps": 3, "checkpoint__every": 3, "evals__validation__every": 3, "train__ema_decay": None, "log__norms": "false", "train__microbatches": 1}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(autouse=True)
def no_sample(monkeypatch):
    monkeypatch.setattr(describe, "sample", lambda *_: "")


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of the folders that `train` was called for."""
    folders, original = [], train.train

    def recording(config, *, workdir, **options):
        folders.append(Path(workdir).name)
        return original(config, workdir=workdir, **options)

    monkeypatch.setattr(train, "train", recording)
    return folders


def test_the_summary_by_hand():
    """Values 1, 2, 3: mean 2, deviation 1, and t(2) = 4.3027 times 1 / sqrt(3) around the mean; a metric that one seed lacks counts the others."""
    rows = [{"metrics": {"a/x": 1.0, "a/y": 5.0}}, {"metrics": {"a/x": 2.0}}, {"metrics": {"a/x": 3.0}}]
    found = seeds.summarize(rows)
    assert found["a/x"]["n"] == 3 and found["a/x"]["mean"] == 2.0 and found["a/x"]["sd"] == 1.0
    assert found["a/x"]["ci95"] == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-5)
    assert found["a/y"] == {"n": 1, "mean": 5.0, "sd": None, "ci95": None}


def test_seeds_that_diverged_are_left_out():
    rows = [{"seed": seed, "state": "finished", "metrics": {"a/x": value, "a/y": float("inf")}} for seed, value in enumerate((1.0, float("nan"), 3.0))]
    found = seeds.summarize(rows)
    assert (found["a/x"]["n"], found["a/x"]["mean"]) == (2, 2.0) and found["a/y"] == {"n": 0, "mean": None, "sd": None, "ci95": None}
    assert "nan" in seeds.table({"rows": rows, "metrics": found})


def test_interval_of_the_mean():
    """By hand: mean 2, sd 1, t(2) = 4.3027 for 95 %."""
    found = seeds.summarize([{"metrics": {"x": value}} for value in (1.0, 2.0, 3.0)])["x"]
    assert (found["mean"], found["sd"]) == (2.0, 1.0)
    assert found["ci95"] == pytest.approx([2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5], abs=1e-4)


def test_runs_a_summary_and_what_is_finished(text, tmp_path, started, capsys):
    config, devices = runs.tiny("concat", text=text, seed=5, **SHORT), jax.devices()[:1]
    with runs.at_batch(5, runs.stop):  # in the second seed
        assert seeds.run(config, count=2, workdir=tmp_path, devices=devices) == 75
    assert started == ["seed5", "seed6"] and not (tmp_path / "seeds.json").exists()
    assert seeds.run(config, count=2, workdir=tmp_path, devices=devices) == 0
    assert started == ["seed5", "seed6", "seed6"]
    summary = json.loads((tmp_path / "seeds.json").read_text())
    rows = summary["rows"]
    assert [(row["seed"], row["state"], Path(row["workdir"]).name) for row in rows] == [(5, "finished", "seed5"), (6, "finished", "seed6")]
    losses = [row["metrics"]["validation/loss"] for row in rows]
    assert len(set(losses)) == 2
    for seed, loss in zip((5, 6), losses):
        last = [json.loads(line) for line in runs.metrics(tmp_path / f"seed{seed}").splitlines()][-1]
        assert last["step"] == 3 and last["validation/loss"] == loss
        assert json.loads((tmp_path / f"seed{seed}" / "config.json").read_text())["seed"] == seed
    entry = summary["metrics"]["validation/loss"]
    assert entry["n"] == 2 and entry["mean"] == pytest.approx(np.mean(losses)) and entry["sd"] == pytest.approx(np.std(losses, ddof=1))
    capsys.readouterr()
    assert seeds.run(config, count=2, workdir=tmp_path, devices=devices) == 0 and len(started) == 3
    out = capsys.readouterr().out
    assert f"Seed 5 is finished: {tmp_path / 'seed5'}." in out and "2 of 2 seeds finished" in out
    line = next(line.split() for line in out.splitlines() if line.startswith("  validation/loss"))
    assert line[1] == f"{np.mean(losses):.4f}" and line[-2:] == [f"{loss:.4f}" for loss in losses]
    assert "validation/tokens" not in out and "validation/tokens" in json.loads((tmp_path / "seeds.json").read_text())["metrics"]
    with pytest.raises(ConfigError, match=r"seed5 holds a run with another config.*\n  optimizer.b1"):
        seeds.run(runs.tiny("concat", text=text, seed=5, optimizer__b1=0.5, **SHORT), count=2, workdir=tmp_path, devices=devices)


@pytest.mark.parametrize("error", [FloatingPointError("stopped at step 2: loss nan"), RuntimeError("out of memory")])
def test_a_failed_seed_does_not_hide_the_others(error, text, tmp_path, monkeypatch, capsys):
    finished = {0: 2.0, 2: 4.0, 3: "nan"}

    def pretended(config, *, workdir, **options):
        if config.seed not in finished:
            raise error
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": 3, "validation/loss": finished[config.seed]}) + "\n")
        return 0

    monkeypatch.setattr(train, "train", pretended)
    assert seeds.run(runs.tiny("concat", text=text, **SHORT), count=4, workdir=tmp_path) == 1
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert summary["rows"][3]["metrics"] == {"validation/loss": "nan"}, "as strict JSON"
    assert [row["state"] for row in summary["rows"]] == ["finished", "failed", "finished", "finished"] and str(error) in summary["rows"][1]["error"]
    assert summary["metrics"]["validation/loss"] == {
        "n": 2,
        "mean": 3.0,
        "sd": pytest.approx(2**0.5),
        "ci95": pytest.approx([3 - 12.7062, 3 + 12.7062], abs=1e-3),
    }
    out = capsys.readouterr().out
    assert "3 of 4 seeds finished" in out and f"seed 1 failed: {summary['rows'][1]['error']}" in out


def test_labels_are_taken_from_the_data_once(tmp_path, monkeypatch):
    """All seeds have the names of the data; a run that is continued under the same command fits what its folder holds."""
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "".join(f"line {n}\t{'no' if n % 3 else 'yes'}\n" for n in range(9)))
    config = base(
        model=gpt.Config(num_layers=1, width=8, num_heads=1, max_length=16), objective=classify.Config(), tokenizer=Tokenizer(kind="bytes"),
        data=Data(source=(f"tsv:{data}",), columns=("text=text", "label=label"), length=16), checkpoint=Checkpoint(keep_best=0),
    )  # fmt: skip
    taken, original = [], labels.filled
    monkeypatch.setattr(labels, "filled", lambda *given: taken.append(given) or original(*given))
    monkeypatch.setattr(train, "last_evals", lambda *_: {})
    given = []
    monkeypatch.setattr(train, "train", lambda config, **_: given.append(config) or 0)
    assert seeds.run(config, count=2, workdir=tmp_path / "runs") == 0
    assert [(one.seed, one.objective.labels) for one in given] == [(0, ("no", "yes")), (1, ("no", "yes"))] and len(taken) == 1


def test_the_flag(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PTM_TEST_TEXT", str(text))
    calls = {}
    monkeypatch.setattr(seeds, "run", lambda config, **given: calls.update(given, seed=config.seed) or 0)
    command = ["train", f"--config={runs.__file__}:concat", f"--workdir={tmp_path}", "--config.seed=3"]
    assert cli.main([*command, "--seeds=4"]) == 0
    assert calls == {"count": 4, "workdir": str(tmp_path), "allow_change": (), "seed": 3}
    monkeypatch.undo()
    monkeypatch.setenv("PTM_TEST_TEXT", str(text))
    assert cli.main([*command, "--seeds=0"]) == 2 and "--seeds=0; allowed: 1 or more" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert cli.main([*command, "--seeds=2"]) == 2 and "is the workdir of one run" in capsys.readouterr().err

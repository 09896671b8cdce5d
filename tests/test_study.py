"""Studies: the language, what is resolved and refused before anything runs, identity and sharing, the states of made-up folders, the loop of the runner."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from ptm import cli, log
from ptm.fields import ConfigError
from ptm.study import (
    Arm,
    Halving,
    Metric,
    Ordering,
    Published,
    Search,
    Stage,
    Study,
    attempts,
    chain,
    checks,
    choice,
    folder,
    grid,
    halving,
    identity,
    integers,
    log_uniform,
    prepare,
    resolution,
    runner,
    sample,
    search,
    summary,
    uniform,
    zipped,
)

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
LOSS = "pretrain:validation/loss"


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory) -> Path:
    made = runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTM_TEST_TEXT", str(made))
        yield made


def study(**changes: Any) -> Study:
    """Two arms that differ in the rate of learning, two seeds; `changes` are fields."""
    fields = {
        "claim": "A higher rate is better.", "paper": "Nobody 2020, table 1", "stages": (Stage("pretrain", recipe=f"{HERE.parent}/runs.py:concat"),),
        "arms": (Arm("low"), Arm("high", {"optimizer.learning_rate": 0.02})), "base": "low", "differs": ("optimizer.*",), "seeds": (0, 1),
        "metrics": (Metric(LOSS, higher=False),),
    }  # fmt: skip
    return Study(**fields | changes)


TUNED = (Stage("pretrain", recipe=f"{HERE.parent}/runs.py:concat"), Stage("tune", recipe=f"{HERE.parent}/runs.py:window", after="pretrain", overrides={"train.steps": 4}))


def made(root: Path, *, overrides: dict[str, str] | None = None, write: bool = True, asked: dict | None = None, name: str = "made.py", **changes: Any) -> folder.Record:
    """What `prepare` makes of a study in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolution, "load", lambda spec: checks.check(study(**changes), file=spec.partition(":")[0]))
        return resolution.prepare(name, workdir=root, overrides=overrides or {}, write=write, asked=asked)


def refusal(call: Any, *words: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*words, **options)
    return str(caught.value)


def begin(root: Path, run: str) -> None:
    """Lets a run look begun: its workdir holds the config of the study, as training writes it."""
    (root / run).mkdir(parents=True, exist_ok=True)
    (root / run / "config.json").write_text(json.dumps(identity.unflatten(folder.placed(root, run))))


def rows(root: Path, run: str, values: dict[int, dict[str, float]]) -> None:
    (root / run).mkdir(parents=True, exist_ok=True)
    (root / run / "metrics.jsonl").write_text("".join(log.row(step, cells) + "\n" for step, cells in values.items()))


def finish(root: Path, run: str, loss: float = 1.0) -> None:
    steps = folder.read(root).runs[run].steps
    begin(root, run)
    rows(root, run, {1: {"loss": 5.0}, steps: {"validation/loss": loss, "validation/tokens": 9.0}})
    (root / run / "ckpt" / str(steps)).mkdir(parents=True, exist_ok=True)


def attempt(root: Path, run: str, *codes: int | None, host: str | None = None) -> None:
    entries = [
        {"start": 10.0, "end": None if code is None else 20.0, "exit_code": code, "error": None if code in (None, 0, 75) else "it broke", "git": {}, "host": host or socket.gethostname(), "pid": 1}
        for code in codes
    ]  # fmt: skip
    attempts.write(root / run, identity="x", attempts=entries)


# The language.


def test_arms_are_combined():
    made = grid({"objective.rate": [0.15, 0.5], "data.length": [128, 512]})
    assert [arm.name for arm in made] == ["rate=0.15,length=128", "rate=0.15,length=512", "rate=0.5,length=128", "rate=0.5,length=512"]
    assert made[1].overrides == {"objective.rate": 0.15, "data.length": 512}
    side = zipped({"objective.rate": [0.15, 0.5], "tune:data.length": [128, 512]})
    assert [arm.overrides for arm in side] == [{"objective.rate": 0.15, "tune:data.length": 128}, {"objective.rate": 0.5, "tune:data.length": 512}]
    both = chain(made, [Arm("own", {"objective.rate": 0.15, "data.length": 128})], [Arm("words", recipes={"pretrain": "x.py"})], side)
    assert [arm.name for arm in both[4:]] == ["words", "rate=0.15,length=128", "rate=0.5,length=512"], "an arm that overrides the same comes once"


def test_names_of_arms_tell_keys_apart():
    assert [arm.name for arm in grid({"model.dropout": [0.1], "objective.dropout": [0.2]})] == ["model.dropout=0.1,objective.dropout=0.2"]
    assert [arm.name for arm in grid({"optimizer.learning_rate": [1e-3], "tune:optimizer.learning_rate": [True]})] == ["optimizer.learning_rate=0.001,tune.optimizer.learning_rate=true"]
    assert grid({"objective.labels": [("a", "b")]})[0].name == "labels=a+b"


def test_samples_are_drawn_within_their_bounds_and_again_the_same():
    space = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2), "model.width": integers(1, 3), "model.dropout": uniform(0.1, 0.2), "optimizer.name": choice(["adamw", "lamb"])}
    arms = sample(space, count=60, seed=1)
    rates = [arm.overrides["optimizer.learning_rate"] for arm in arms]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates) and 15 < sum(rate < 1e-3 for rate in rates) < 45
    assert {arm.overrides["model.width"] for arm in arms} == {1, 2, 3} and {arm.overrides["optimizer.name"] for arm in arms} == {"adamw", "lamb"}
    assert all(0.1 <= arm.overrides["model.dropout"] <= 0.2 for arm in arms)
    assert sample(space, count=60, seed=1) == arms != sample(space, count=60, seed=2)
    fewer = sample({"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}, count=60, seed=1)
    assert [arm.overrides["optimizer.learning_rate"] for arm in fewer] == rates, "one key more changes none of the others"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: grid({"objective.rate": 0.5}), "no list of values; write [0.5]"),
        (lambda: grid({}), "makes no arm"),
        (lambda: grid({"objective.rate": []}), "makes no arm"),
        (lambda: zipped({"a.b": [1, 2], "c.d": [1]}), "a.b 2, c.d 1"),
        (lambda: log_uniform(0, 1), "above 0"),
        (lambda: uniform(2, 1), "the first must be below"),
        (lambda: integers(0.5, 2), "not between integers"),
        (lambda: choice("adamw"), "no list of values"),
        (lambda: choice([]), "no value to choose from"),
        (lambda: sample({"a.b": [1]}, count=1, seed=0), "no distribution"),
        (lambda: sample({"a.b": uniform(0, 1)}, count=0, seed=0), "1 or more arms"),
    ],
)
def test_combinators_refuse(call, told):
    assert told in refusal(call)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"claim": " "}, ["claim=' '", "not empty"]),
        ({"arms": ()}, ["arms is empty"]),
        ({"arms": "low"}, ["arms='low' is no list"]),
        ({"seeds": (0, True)}, ["seeds[1]=True is a bool; allowed: int"]),
        ({"seeds": (0, 0)}, ["seeds has 0 twice"]),
        ({"seeds": (-1,)}, ["-1 is out of range"]),
        ({"base": "lo"}, ["base='lo' is not there", "'low', 'high'", "Did you mean 'low'?"]),
        ({"arms": (Arm("low"), Arm("low"))}, ["arms (names) has 'low' twice"]),
        ({"arms": (Arm("low", {"seed": 1}),)}, ["arms[0].overrides set seed", "`seeds`"]),
        ({"arms": (Arm("low", {"pretran:train.steps": 1}),)}, ["the stage of arms[0].overrides['pretran:train.steps']='pretran'", "Did you mean 'pretrain'?"]),
        ({"arms": (Arm("low", recipes={"tune": "x.py"}),)}, ["arms[0].recipes='tune' is not there"]),
        ({"arms": (Arm("low", {"tune:init": "scratch"}),), "stages": TUNED}, ["overrides['tune:init']", "the study's to set"]),
        ({"stages": (Stage("a b", recipe="x.py"),)}, ["stages[0].name='a b'"]),
        ({"stages": (Stage("a", recipe="x.py", after="b"),)}, ["stages[0].after='b' is not there"]),
        ({"metrics": (Metric("validation/loss", higher=False),)}, ["metrics[0].name='validation/loss'; allowed: 'STAGE:EVAL/METRIC'"]),
        ({"metrics": (Metric("tune:validation/loss", higher=False),)}, ["the stage of metrics[0].name"]),
        ({"metrics": (Metric(LOSS, higher="no"),)}, ["metrics[0].higher='no'"]),
        ({"metrics": (Metric(LOSS, higher=False, scale=0.0),)}, ["metrics[0].scale=0.0"]),
        ({"published": (Published("lw", LOSS, 1.0),)}, ["published[0].arm='lw'", "Did you mean 'low'?"]),
        ({"published": (Published("low", LOSS, float("nan")),)}, ["published[0]: value=nan"]),
        ({"orderings": (Ordering(better="low", worse="low", metric=LOSS),)}, ["orderings[0] compares 'low' with itself"]),
        ({"orderings": (Ordering(better="low", worse="high", metric=LOSS, relation="<"),)}, ["orderings[0].relation='<'", "'>', '~'"]),
        ({"halving": Halving(metric=LOSS, rungs=(7, 3))}, ["halving.rungs=(7, 3)", "ascending"]),
        ({"halving": Halving(metric=LOSS, rungs=(7,), keep=1.0)}, ["halving.keep=1.0"]),
        ({"search": Search(space={}, trials=1, metric=LOSS)}, ["search.space is empty"]),
        ({"search": Search(space={"a.b": 3}, trials=1, metric=LOSS)}, ["search.space['a.b']=3 is no distribution"]),
        ({"search": Search(space={"a.b": uniform(0, 1)}, trials=0, metric=LOSS)}, ["search.trials=0"]),
        (
            {"halving": Halving(metric=LOSS, rungs=(7,)), "search": Search(space={"a.b": uniform(0, 1)}, trials=1, metric=LOSS)},
            ["exclude each other"],
        ),
    ],
)
def test_a_study_is_refused_by_its_field(changes, told):
    message = refusal(checks.check, study(**changes), file="x.py")
    assert message.startswith("study 'x.py': ") and all(words in message for words in told), message


def test_study_files(tmp_path):
    path = tmp_path / "one.py"
    assert "no study" in refusal(resolution.load, str(path))
    for content, told in (
        ("x = 1\n", "has no function get_study(argument)"),
        ("def get_study(argument):\n    return 3\n", "returned a int; it must return a ptm.study.Study"),
        ("import ptm.studies\n", "line 1: No module named 'ptm.studies'"),
        ("from ptm.study import Study\n\ndef get_study(argument):\n    return Study(claims='x')\n", "line 4: Study.__init__() got an unexpected keyword argument 'claims'"),
        ("def get_study(argument):\n    return grid({})\n", "line 2: name 'grid' is not defined"),
    ):
        path.write_text(content)
        assert told in refusal(resolution.load, str(path))


def test_the_study_for_newcomers_resolves():
    """As it is in the repository, from another folder than the checkout's too."""
    loaded = resolution.load(f"{ROOT}/experiments/quickstart.py")
    assert (len(loaded.arms), loaded.seeds) == (2, (0, 1, 2))
    record = prepare(f"{ROOT}/experiments/quickstart.py", workdir="nowhere", write=False)
    assert [arm.difference for arm in record.arms] == [{}, {"pretrain:model.prenorm": [True, False]}] and len(record.runs) == 6
    assert not Path("nowhere").exists()


# Resolution.


def test_what_is_recorded(tmp_path):
    record = made(tmp_path, seeds=(3, 4), stages=TUNED, overrides={"tune.train.steps": "5"})
    assert list(record.runs) == [
        "low/seed3/pretrain", "high/seed3/pretrain", "low/seed3/tune", "high/seed3/tune", "low/seed4/pretrain", "high/seed4/pretrain", "low/seed4/tune", "high/seed4/tune",
    ], "stage by stage within a seed, seed after seed"  # fmt: skip
    assert [arm.difference for arm in record.arms] == [{}, {"pretrain:optimizer.learning_rate": [0.01, 0.02]}]
    assert record.arms[1].runs == {seed: {stage: f"high/seed{seed}/{stage}" for stage in ("pretrain", "tune")} for seed in (3, 4)}
    first, second = record.runs["high/seed4/pretrain"], record.runs["high/seed4/tune"]
    assert (first.config["seed"], first.config["optimizer.learning_rate"], first.config["init"], first.needs) == (4, 0.02, "scratch", None)
    assert (second.config["init"], second.config["tokenizer.path"]) == ("ckpt:$STUDY/high/seed4/pretrain@14", "$STUDY/high/seed4/pretrain/tokenizer")
    assert (second.needs, second.steps, second.tokens, first.tokens) == ("high/seed4/pretrain", 5, 5 * 16 * 16, 14 * 16 * 16)
    assert second.config["optimizer.learning_rate"] == 0.01, "an arm's key is of the first stage alone"
    assert first.fingerprints["data"] and len(first.identity) == 64 and record.overrides == {"tune.train.steps": "5"}
    assert folder.read(tmp_path) == record, "what is returned is what is read"
    placed = folder.placed(tmp_path, "high/seed4/tune")
    assert placed["init"] == f"ckpt:{tmp_path}/high/seed4/pretrain@14"
    before = (tmp_path / "study.json").stat().st_mtime_ns
    assert made(tmp_path, seeds=(3, 4), stages=TUNED, overrides={"tune.train.steps": "5"}).runs == record.runs
    assert (tmp_path / "study.json").stat().st_mtime_ns == before, "what has not changed is not written again"


def test_later_stages_have_the_model_and_tokenizer_of_the_first(tmp_path):
    arms = (Arm("low"), Arm("wide", {"model.width": 32}), Arm("dropped", {"tune:model.dropout": 0.0}))
    record = made(tmp_path, stages=TUNED, arms=arms, differs=("model.width", "tune:model.dropout"), write=False)
    assert record.runs["wide/seed0/tune"].config["model.width"] == 32
    assert record.arms[1].difference == {"pretrain:model.width": [16, 32]}, "what is inherited is no difference of the later stage"
    assert record.arms[2].difference == {"tune:model.dropout": [0.1, 0.0]}


def test_arms_may_differ_where_it_is_declared_alone(tmp_path):
    arms = (Arm("low"), Arm("high", {"optimizer.learning_rate": 0.02, "train.steps": 15, "data.length": 8}))
    told = refusal(made, tmp_path, arms=arms, differs=("optimizer.*", "data.length"))
    assert "arm 'high', pretrain:train.steps: 14 -> 15" in told and "data.length: 16" not in told and not (tmp_path / "study.json").exists()
    made(tmp_path, arms=arms, differs=("optimizer.*", "data.*", "pretrain:train.steps"), write=False)
    assert "'optimiser.*', which no key of stage 'pretrain' matches" in (told := refusal(made, tmp_path, differs=("optimiser.*",))) and "Did you mean 'optimizer.*'?" in told
    assert "Did you mean 'optimizer.learning_rate'?" in refusal(made, tmp_path, differs=("optimizer.learning_rat",))


def test_a_recipe_of_an_arm(tmp_path):
    """Another objective of the same family, and what follows from it, must be declared."""
    arms = (Arm("low"), Arm("spans", recipes={"pretrain": f"{HERE.parent}/runs.py:window"}))
    told = refusal(made, tmp_path, arms=arms, differs=("optimizer.*",))
    assert "pretrain:data.packing: default -> window" in told and "pretrain:data.holdout_by" in told
    assert made(tmp_path, arms=arms, differs=("data.*",), write=False).arms[1].difference["pretrain:data.packing"] == ["default", "window"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arms": (Arm("low"), Arm("high", {"optimizer.learning_rat": 1}))}, ["arm 'high', stage 'pretrain': unknown key optimizer.learning_rat.", "Did you mean 'optimizer.learning_rate'?"]),
        ({"arms": (Arm("low"), Arm("high", {"optimizer.learning_rate": "fast"}))}, ["optimizer.learning_rate=fast cannot be read"]),
        ({"arms": (Arm("low"), Arm("high", {"train.steps": 0})), "differs": ("train.*",)}, ["train.steps=0 is out of range"]),
        ({"stages": (Stage("pretrain", recipe="configs/nothing.py"),)}, ["no recipe 'configs/nothing.py'"]),
        ({"metrics": (Metric("pretrain:validaton/loss", higher=False),)}, ["arm 'low' has no eval 'validaton' in stage 'pretrain'", "Did you mean 'validation'?"]),
        ({"halving": Halving(metric=LOSS, rungs=(6,))}, ["halving.rungs has 6", "every 7 steps", "multiples of 7 below 14"]),
        ({"halving": Halving(metric=LOSS, rungs=(7, 14))}, ["halving.rungs has 14"]),
        ({"search": Search(space={"train.batch_size": integers(1, 8)}, trials=1, metric=LOSS)}, ["arm 'of the search'", "train.batch_size"]),
        ({"overrides": {"train.steps": "3"}}, ["--config.train.steps: overrides of a study begin with a stage", "stages: pretrain"]),
        ({"overrides": {"pretrain.seed": "3"}}, ["the seeds of a study are those of its file"]),
        ({"overrides": {"pretrain.train.step": "3"}}, ["unknown key --config.pretrain.train.step.", "Did you mean 'train.steps'?"]),
    ],
)
def test_nothing_that_is_wrong_is_begun(changes, told, tmp_path):
    message = refusal(made, tmp_path / "new", **changes)
    assert all(words in message for words in told), message
    assert not (tmp_path / "new").exists()


def test_data_that_is_not_here(tmp_path, monkeypatch):
    """A dry run tells what it can; the study itself is refused."""
    monkeypatch.setenv("PTM_TEST_TEXT", str(tmp_path / "gone.txt"))
    record = made(tmp_path / "new", write=False)
    assert len(record.runs) == 4 and "gone.txt" in record.notes[0] and "cannot be run here" in record.notes[0]
    assert "gone.txt" in refusal(made, tmp_path / "new") and not (tmp_path / "new").exists()


# Identity.


def test_runs_that_are_the_same_are_made_once(tmp_path):
    arms = (Arm("low"), Arm("again", {"optimizer.learning_rate": 0.01}), Arm("later", {"tune:optimizer.learning_rate": 0.5}))
    record = made(tmp_path, stages=TUNED, arms=arms, differs=("optimizer.*", "tune:optimizer.*"), seeds=(0,))
    assert list(record.runs) == ["low/seed0/pretrain", "low/seed0/tune", "later/seed0/tune"]
    assert record.arms[2].runs == {0: {"pretrain": "low/seed0/pretrain", "tune": "later/seed0/tune"}}
    assert record.users["low/seed0/pretrain"] == ("low", "again", "later") and record.users["low/seed0/tune"] == ("low", "again")
    assert record.notes == ("The arms 'low', 'again' are the same: their runs are made once.",)


def test_identity_is_of_config_data_and_parent():
    flat = {"seed": 0, "init": "ckpt:$STUDY/a/seed0/pretrain@4", "train.steps": 3}
    same = identity.of(flat, {"data": "d"}, parent="p")
    assert identity.of(flat | {"init": "ckpt:$STUDY/b/seed0/pretrain@4"}, {"data": "d"}, parent="p") == same, "names are none of it"
    others = [identity.of(flat | {"seed": 1}, {"data": "d"}, parent="p"), identity.of(flat, {"data": "e"}, parent="p"), identity.of(flat, {"data": "d"}, parent="q")]
    assert len({same, *others}) == 4


def test_other_data_is_another_run(tmp_path, monkeypatch, text):
    record = made(tmp_path)
    begin(tmp_path, "low/seed0/pretrain")
    changed = tmp_path / "corpus.txt"
    changed.write_text(text.read_text() + "one more line\n")
    monkeypatch.setenv("PTM_TEST_TEXT", str(changed))
    assert "low/seed0/pretrain was begun, and is another run now" in (told := refusal(made, tmp_path)) and "data: '" in told and "data.source" in told
    assert folder.read(tmp_path) == record


def test_folders_of_arms():
    found = identity.folders(["15 %", "50 %", "a/b c", "../x", "%", "A_B_C", "x" * 200], taken=("study.json",))
    assert list(found.values()) == ["15", "50", "a_b_c", "x", "arm", "A_B_C-2", "x" * 80]


def test_a_changed_file_on_an_existing_folder(tmp_path):
    record = made(tmp_path)
    for run in ("low/seed0/pretrain", "high/seed0/pretrain"):
        begin(tmp_path, run)
    more = (Arm("low"), Arm("highest", {"optimizer.learning_rate": 0.5}), Arm("renamed", {"optimizer.learning_rate": 0.02}))
    added = made(tmp_path, arms=more, seeds=(0, 1, 2))
    assert added.arms[2].runs[0] == {"pretrain": "high/seed0/pretrain"}, "a run that was begun keeps its folder, whatever its arm is called"
    assert set(record.runs) < set(added.runs) and len(added.runs) == 9
    changed = (Arm("low"), Arm("high", {"optimizer.learning_rate": 0.03}))
    told = refusal(made, tmp_path, arms=changed)
    assert "high/seed0/pretrain was begun, and is another run now" in told and "optimizer.learning_rate: 0.02 -> 0.03" in told
    assert folder.read(tmp_path) == added, "what is refused changes nothing"
    fewer = made(tmp_path, arms=(Arm("low"),))
    assert "high/seed0/pretrain" in fewer.notes[0] and "belong to the study no more" in fewer.notes[0]
    assert "holds the study made, not other" in refusal(made, tmp_path, name="other.py")


def test_what_has_not_begun_may_change(tmp_path):
    made(tmp_path)
    begin(tmp_path, "low/seed0/pretrain")
    record = made(tmp_path, arms=(Arm("low"), Arm("high", {"optimizer.learning_rate": 0.03})))
    assert record.runs["high/seed0/pretrain"].config["optimizer.learning_rate"] == 0.03


def test_a_folder_of_an_earlier_version(tmp_path):
    """A key that was declared since stands at its default: nothing is another run for that."""
    made(tmp_path)
    begin(tmp_path, "low/seed0/pretrain")
    stored = json.loads((tmp_path / "study.json").read_text())
    for run in stored["runs"].values():
        del run["config"]["train.max_skips"]
        run["identity"] = "of that version"
    (tmp_path / "study.json").write_text(json.dumps(stored))
    record = made(tmp_path)
    assert list(record.runs) == list(stored["runs"]) and folder.state(tmp_path, "low/seed0/pretrain").name == "cut"


def test_the_folder_of_a_run_is_no_study(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "is the workdir of one run" in refusal(made, tmp_path)


# The folder.


def test_states(tmp_path):
    made(tmp_path, stages=TUNED, seeds=(0, 1, 2, 3))
    pretrain, tune = (lambda arm, seed: f"{arm}/seed{seed}/pretrain"), (lambda arm, seed: f"{arm}/seed{seed}/tune")
    finish(tmp_path, pretrain("low", 0))
    attempt(tmp_path, pretrain("low", 1), 1, 75)
    begin(tmp_path, pretrain("low", 2))
    attempt(tmp_path, pretrain("low", 3), None)
    attempt(tmp_path, pretrain("high", 0), 75, 1)
    attempt(tmp_path, pretrain("high", 1), None, host="elsewhere")
    (tmp_path / pretrain("high", 1) / attempts.ALIVE).touch()
    attempt(tmp_path, pretrain("high", 2), None, host="elsewhere")
    (tmp_path / pretrain("high", 2) / attempts.ALIVE).touch()
    os.utime(tmp_path / pretrain("high", 2) / attempts.ALIVE, (time.time() - 2 * attempts.FRESH,) * 2)
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
    assert folder.curve(tmp_path, run, "validation/loss") == [(7, 3.0)] and folder.final_metrics(tmp_path, run) == {"validation/loss": 3.0, "validation/tokens": 8}


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_record(content, tmp_path):
    (tmp_path / "study.json").write_text(content)
    assert "study.json" in refusal(folder.read, tmp_path)


def test_what_is_no_study(tmp_path):
    assert "is no study" in refusal(folder.read, tmp_path)


def test_one_process_holds_a_run(tmp_path):
    """A lock ends with its process, even one that is killed; until then the run is running, and nobody else may have it."""
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
        with pytest.MonkeyPatch.context() as patch, pytest.raises(attempts.Busy, match="being run by another process"):
            patch.setattr(attempts, "TRIES", 2)
            with attempts.hold(tmp_path / run, identity="x", git={}):
                pass
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


def test_signs_of_life_of_another_host(tmp_path, monkeypatch):
    """Where locks do not reach, an attempt that is open and touched of late is waited for, and refused if it stays so."""
    attempt(tmp_path, "a", None, host="elsewhere")
    (tmp_path / "a" / attempts.ALIVE).touch()
    monkeypatch.setattr(attempts, "BEAT", -attempts.FRESH)  # no patience
    with pytest.raises(attempts.Busy, match="process 1 of elsewhere"), attempts.hold(tmp_path / "a", identity="x", git={}):
        pass
    os.utime(tmp_path / "a" / attempts.ALIVE, (0, 0))
    monkeypatch.setattr(attempts, "BEAT", 20.0)
    with attempts.hold(tmp_path / "a", identity="x", git={}):
        assert len(attempts.read(tmp_path / "a")["attempts"]) == 2


# Halving.


def test_halving_by_hand(tmp_path):
    """Four arms, two rungs, a half goes on: by the mean over the seeds; the base stays whatever it does, an arm without a figure is last."""
    arms = tuple(Arm(name, {"optimizer.learning_rate": rate}) for name, rate in (("base", 0.01), ("a", 0.02), ("b", 0.03), ("c", 0.04)))
    stages = (Stage("pretrain", recipe=f"{HERE.parent}/runs.py:concat", overrides={"evals.validation.every": 2}), TUNED[1])
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
    assert {run for run in record.runs if folder.state(tmp_path, run).name == "stopped"} == {f"b/seed{seed}/{stage}" for seed in (0, 1) for stage in ("pretrain", "tune")}
    reach(8, {"base": (9.0, 9.0), "a": (float("nan"), float("nan"))})
    second = halving.decide(tmp_path, record, lost={"c/seed0/pretrain", "c/seed1/pretrain"})
    assert second["values"] == {"base": 9.0, "a": None, "c": None} and second["stopped"] == ["c"], "two of three go on; of those without a figure the first"
    assert halving.decide(tmp_path, record, lost=()) is None and halving.limit(tmp_path, record, "a/seed0/pretrain") is None
    assert not halving.at_limit(tmp_path, record, "a/seed0/tune")


# The search.


def test_trials_are_arms(tmp_path):
    space = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}
    options = {"search": Search(space=space, trials=3, metric=LOSS)}
    assert made(tmp_path, **options).search == folder.SearchRecord(metric=LOSS, trials=3, space={"optimizer.learning_rate": "log_uniform(0.0001, 0.01)"}, asked={})
    record = made(tmp_path, **options, asked={0: {"optimizer.learning_rate": 0.005}})
    assert record.arms[2].name == "trial 0" and record.runs["trial_0/seed1/pretrain"].config["optimizer.learning_rate"] == 0.005
    assert made(tmp_path, **options) == record, "trials are remembered"


def test_optuna_asks_and_is_told(tmp_path):
    """Trials that were asked for and lost are asked for again; values are means over the seeds; a trial whose runs are lost fails."""
    optuna = pytest.importorskip("optuna", reason="needs the extra search")
    space = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2), "optimizer.name": choice(["adamw", "lamb"]), "optimizer.no_decay": choice([(".*/bias",), (".*/scale", ".*/bias")])}
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


# What a person sees, and the loop.


def test_the_plan(tmp_path):
    record = made(tmp_path, stages=TUNED, orderings=(Ordering(better="low", worse="high", metric=LOSS),))
    states = {run: folder.state(tmp_path, run) for run in record.runs}
    page = summary.plan(record, states)
    for words in (
        "Study made: A higher rate is better.", "Nobody 2020, table 1", "from the final checkpoint of pretrain", "low   the base",
        "high  pretrain:optimizer.learning_rate 0.01 -> 0.02", "8 runs (2 arms, 2 stages, seeds 0, 1)", f"to do: {4 * (14 + 4) * 256:,} tokens",
        "not known before a run of stage pretrain is finished",
    ):  # fmt: skip
        assert words in page, words
    for run in states:
        if run.endswith("seed0/pretrain") or run == "low/seed0/tune":
            finish(tmp_path, run)
            attempt(tmp_path, run, 0)  # ten seconds
    page = summary.plan(record, {run: folder.state(tmp_path, run) for run in record.runs})
    assert "; 3 done" in page and "to do: " in page and f"one run after the other: {log.duration(2 * 10 + 3 * 10)}" in page


def test_versions_of_the_code():
    def state(*commits: str) -> folder.State:
        return folder.State("finished", 1, [{"git": {"commit": commit * 40, "dirty": False}} if commit else {"git": {}} for commit in commits], None)

    record = dataclasses.make_dataclass("Record", ["runs"])({"x": None, "y": None})
    clean, dirty = {"commit": "a" * 40, "dirty": False}, {"commit": "a" * 40, "dirty": True}
    assert summary.mix(record, {"x": state("a", "a"), "y": state("")}, current=clean) is None
    assert summary.mix(record, {"x": state("a"), "y": state("a")}, current={}) is None
    assert "aaaaaaaaaaaa (1 run, this one); bbbbbbbbbbbb (2 runs)" in summary.mix(record, {"x": state("b"), "y": state("b", "a")}, current=clean)
    assert "not committed" in summary.mix(record, {"x": state(), "y": state()}, current=dirty)


class Fake:
    """In the place of the child processes: notes which runs were started, and what each start ends with."""

    def __init__(self, root: Path, ends: dict[str, list[int]] | None = None) -> None:
        self.root, self.ends, self.started, self.pid = root, ends or {}, [], 1

    def __call__(self, command: list[str], **_: Any) -> "Fake":
        self.run = command[-1].removeprefix("--run=")
        self.started.append(self.run)
        return self

    def wait(self) -> int:
        code = self.ends[self.run].pop(0) if self.ends.get(self.run) else 0
        if code == 0:
            finish(self.root, self.run)
        if code >= 0:
            found = attempts.read(self.root / self.run)["attempts"]
            attempt(self.root, self.run, *(entry["exit_code"] for entry in found), code)
        return code


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Runs a study with made-up children; gives the exit code and the runs that were started."""

    def go(ends: dict[str, list[int]] | None = None, *, retries: int = 1, same_code: bool = False, **changes: Any) -> tuple[int, list[str]]:
        fake = Fake(tmp_path, ends)
        monkeypatch.setattr(resolution, "load", lambda spec: checks.check(study(**changes), file=spec))
        monkeypatch.setattr(runner.subprocess, "Popen", fake)
        monkeypatch.setattr(runner.describe, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
        return runner.run("made.py", workdir=tmp_path, overrides={}, same_code=same_code, retries=retries), fake.started

    return go


def test_finished_runs_are_skipped_and_cut_ones_go_on(loop, tmp_path, capsys):
    code, started = loop({"high/seed0/pretrain": [75]})
    assert (code, started) == (75, ["low/seed0/pretrain", "high/seed0/pretrain"])
    code, started = loop()
    assert (code, started) == (0, ["high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain"])
    assert "goes on after step" in capsys.readouterr().out
    assert loop() == (0, [])
    assert "4 of 4 runs finished." in capsys.readouterr().out


def test_what_failed_is_tried_again_at_the_end_up_to_a_limit(loop, capsys):
    code, started = loop({"low/seed0/pretrain": [1, 0], "high/seed0/pretrain": [1, 1, 1]})
    assert code == 1 and started == ["low/seed0/pretrain", "high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain", "low/seed0/pretrain", "high/seed0/pretrain"]
    assert "3 of 4 runs finished, 1 failed." in (told := capsys.readouterr().out) and "high/seed0/pretrain failed 2 times: it broke" in told
    assert loop() == (1, []), "not more often than that"
    assert loop(retries=2) == (0, ["high/seed0/pretrain"])


def test_what_is_refused_is_not_tried_again_at_once(loop):
    assert loop({"low/seed0/pretrain": [2, 2]}, retries=3)[1].count("low/seed0/pretrain") == 1


def test_interrupted_by_others(loop):
    """A run that ends with 75 though this process was not asked to stop ends the study with 75 too: whoever asked it meant the machine."""
    assert loop({"low/seed0/pretrain": [75]}) == (75, ["low/seed0/pretrain"])


def test_a_child_that_is_killed_is_noted(loop, tmp_path):
    code, started = loop({"low/seed0/pretrain": [-signal.SIGKILL, -signal.SIGKILL]}, seeds=(0,), stages=TUNED)
    assert code == 1 and started.count("low/seed0/pretrain") == 2 and "low/seed0/tune" not in started and "high/seed0/tune" in started
    state = folder.state(tmp_path, "low/seed0/pretrain")
    assert [(one["exit_code"], one["error"]) for one in state.attempts] == [(137, "ended by SIGKILL")] * 2
    assert folder.state(tmp_path, "low/seed0/tune").name == "waiting"


def test_a_run_of_another_process_is_waited_for(loop, tmp_path, monkeypatch, capsys):
    """The runner takes what is left, and goes on with the other one when its process is gone."""
    loop({"low/seed0/pretrain": [75]})
    (tmp_path / "low/seed0/pretrain" / attempts.ALIVE).touch()
    attempt(tmp_path, "low/seed0/pretrain", None, host="elsewhere")
    monkeypatch.setattr(runner.time, "sleep", lambda _: os.utime(tmp_path / "low/seed0/pretrain" / attempts.ALIVE, (0, 0)))
    code, started = loop()
    assert (code, started) == (0, ["high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain", "low/seed0/pretrain"])
    assert "Waiting for low/seed0/pretrain: another process is at work there." in capsys.readouterr().out


def test_a_signal_during_the_last_run_that_still_ends(loop):
    """Nothing is left: that is no interruption. Before the last one it is, and nothing more is started."""

    class Signalled(Fake):
        def wait(self) -> int:
            if self.run == last:
                signal.raise_signal(signal.SIGTERM)
            return super().wait()

        def send_signal(self, number: int) -> None:
            self.passed = number

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Fake", Signalled)
        last = "high/seed0/pretrain"
        assert loop() == (75, ["low/seed0/pretrain", "high/seed0/pretrain"])
        last = "high/seed1/pretrain"
        assert loop() == (0, ["low/seed1/pretrain", "high/seed1/pretrain"])


def test_a_run_that_another_runner_has_claimed_is_left_alone(loop, tmp_path, monkeypatch):
    """Between its start and its lock a run looks ready; a claim tells."""
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(attempts.claimed(tmp_path / "low/seed0/pretrain"))
        monkeypatch.setattr(runner.time, "sleep", lambda _: stack.close())
        code, started = loop()
    assert (code, started) == (0, ["high/seed0/pretrain", "low/seed1/pretrain", "high/seed1/pretrain", "low/seed0/pretrain"])
    with attempts.claimed(tmp_path / "x") as first, attempts.claimed(tmp_path / "x") as second:
        assert (first, second) == (True, False)


def test_a_process_that_finds_its_run_taken_is_no_interruption(loop, tmp_path):
    """A launcher's process may have the run: its child ends with 75 and notes nothing, and the study goes on."""

    class Taken(Fake):
        def wait(self) -> int:
            if self.started == ["low/seed0/pretrain"]:
                return 75
            return super().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Fake", Taken)
        code, started = loop()
    assert code == 0 and started[:2] == ["low/seed0/pretrain"] * 2


def test_a_workdir_of_another_config_is_refused(loop, tmp_path):
    loop({"low/seed0/pretrain": [75]})
    begin(tmp_path, "high/seed0/pretrain")
    path = tmp_path / "high/seed0/pretrain/config.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.02', '"learning_rate": 0.5'))
    assert "high/seed0/pretrain holds a run of another config" in (told := refusal(loop)) and "optimizer.learning_rate: 0.5 -> 0.02" in told


def test_a_mix_of_versions_is_warned_of_or_refused(loop, tmp_path, capsys):
    loop({"low/seed0/pretrain": [75]})
    found = attempts.read(tmp_path / "low/seed0/pretrain")["attempts"]
    attempts.write(tmp_path / "low/seed0/pretrain", identity="x", attempts=[{**found[0], "git": {"commit": "b" * 40, "dirty": False}}])
    assert "different versions of the code" in refusal(loop, same_code=True)
    assert loop()[0] == 0 and "warning: the runs of this study are made by different versions of the code" in capsys.readouterr().err


def test_hopeless_arms_end_at_a_rung(loop, tmp_path):
    """Each run is started to the rung, then the better ones to their end."""
    arms = tuple(Arm(name, {"optimizer.learning_rate": rate}) for name, rate in (("low", 0.01), ("bad", 0.02), ("good", 0.03)))
    losses = {"low": 2.0, "bad": 3.0, "good": 1.0}
    options = {"arms": arms, "seeds": (0,), "halving": Halving(metric=LOSS, rungs=(7,), keep=1 / 3)}

    class Rungs(Fake):
        def wait(self) -> int:
            until = halving.limit(tmp_path, folder.read(tmp_path), self.run)
            if until is None:
                return super().wait()
            rows(tmp_path, self.run, {until: {"validation/loss": losses[self.run.partition("/")[0]]}})
            (tmp_path / self.run / "ckpt" / str(until)).mkdir(parents=True)
            attempt(tmp_path, self.run, 0)
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Fake", Rungs)
        code, started = loop(**options)
    assert code == 0 and started == [f"{arm}/seed0/pretrain" for arm in ("low", "bad", "good", "low", "good")]
    assert folder.state(tmp_path, "bad/seed0/pretrain").name == "stopped"


# The command line.

STUDY = f"{HERE.parent}/studies.py"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "`ptm study` needs FILE.py[:WORDS]"),
        ([STUDY], "needs --workdir=DIR"),
        ([f"{STUDY}x", "--workdir=DIR"], "Did you mean 'studies.py'?"),
        ([STUDY, "--workdir=DIR", "--retries=-1"], "--retries=-1"),
        ([STUDY, "--workdir=DIR", "--dryrun"], "Did you mean '--dry_run'?"),
        ([STUDY, "--workdir=DIR", "more"], "unknown argument 'more' of `ptm study`"),
        ([STUDY, "--workdir=DIR", "--processes=2"], "give --run"),
        ([STUDY, "--workdir=DIR", "--dry_run", "--run=x"], "leave --run out"),
        ([STUDY, "--workdir=DIR", "--config.train.steps=3"], "--config.STAGE.SECTION.KEY=VALUE"),
    ],
)
def test_wrong_usage(words, told, tmp_path, capsys, monkeypatch):
    assert cli.main(["study", *(word.replace("DIR", str(tmp_path / "new")) for word in words)]) == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("ptm: ") and not (tmp_path / "new").exists(), err


def test_a_dry_run_makes_nothing(tmp_path, capsys):
    assert cli.main(["study", STUDY, f"--workdir={tmp_path / 'new'}", "--dry_run"]) == 0
    assert "8 runs" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_one_run_wants_the_words_of_its_study_and_its_parent(tmp_path, capsys):
    root = tmp_path / "new"
    prepare(STUDY, workdir=root)
    one = ["study", STUDY, f"--workdir={root}"]
    assert cli.main([*one, "--run=low/seed0/tune"]) == 2 and "which is not finished; run that one first" in capsys.readouterr().err
    assert cli.main([*one, "--run=low/seed0/pretrain", "--config.pretrain.train.steps=3"]) == 2 and "--run wants the same words" in capsys.readouterr().err
    assert cli.main([*one, "--run=low/seed9/pretrain"]) == 2 and "has no run 'low/seed9/pretrain'" in capsys.readouterr().err
    finish(root, "low/seed0/pretrain")
    assert cli.main([*one, "--run=low/seed0/pretrain"]) == 0 and "is finished" in capsys.readouterr().out


# Whole studies.


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "ptm.cli", "study", STUDY, f"--workdir={root}", *words]


def environment(text: Path) -> dict[str, str]:
    return os.environ | {"PTM_TEST_TEXT": str(text), "JAX_NUM_CPU_DEVICES": "1"}


def everything(root: Path) -> dict[str, str]:
    """What a study measured: the rows of all its runs."""
    return {run: (root / run / "metrics.jsonl").read_text() for run in folder.read(root).runs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> Path:
    """A study of two stages, two arms and two seeds that ran without an interruption."""
    root = tmp_path_factory.mktemp("whole")
    subprocess.run(command(root), env=environment(text), check=True)
    return root


@pytest.mark.runs
def test_a_study_from_end_to_end(whole, text):
    record = folder.read(whole)
    assert [folder.state(whole, run).name for run in record.runs] == ["finished"] * 8
    for run in record.runs:
        assert json.loads((whole / run / "config.json").read_text()) == json.loads(json.dumps(identity.unflatten(folder.placed(whole, run)))), "what ran is what was recorded"
        assert len(folder.state(whole, run).attempts) == 1
    assert folder.curve(whole, "low/seed0/tune", "validation/loss")[0][1] < folder.curve(whole, "low/seed0/pretrain", "validation/loss")[0][1], "it began where the first stage ended"
    final = {run: folder.final_metrics(whole, run)["validation/loss"] for run in record.runs}
    assert len(set(final.values())) == 8
    again = subprocess.run(command(whole), env=environment(text), capture_output=True, text=True, check=True)
    assert "8 of 8 runs finished" in again.stdout and "Run " not in again.stdout


@pytest.mark.runs
def test_a_study_is_checked_without_a_device(text, tmp_path):
    """A login node has none: to resolve and record a study asks for none."""
    env = environment(text) | {"JAX_PLATFORMS": "nothing"}
    subprocess.run(command(tmp_path, "--dry_run"), env=env, check=True)
    code = f"from ptm.study import prepare; prepare({STUDY!r}, workdir={str(tmp_path / 'new')!r})"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert len(folder.read(tmp_path / "new").runs) == 8


@pytest.mark.runs
def test_sigterm_is_passed_on(whole, text, tmp_path):
    """The runner ends with 75 once its run has saved, and the same command ends as if nothing had happened."""
    process = subprocess.Popen(command(tmp_path), env=environment(text), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("First step done"):
            process.send_signal(signal.SIGTERM)
            break
    out = process.stdout.read()
    assert process.wait() == 75 and "SIGTERM: finishing the step and saving." in out and "start the same command again" in out
    states = [folder.state(tmp_path, run) for run in folder.read(tmp_path).runs]
    assert [state.name for state in states].count("cut") == 1 and states[0].attempts[-1]["exit_code"] == 75
    subprocess.run(command(tmp_path), env=environment(text), check=True)
    assert everything(tmp_path) == everything(whole)


@pytest.mark.runs
def test_two_runners_share_the_work(whole, text, tmp_path):
    both = [subprocess.Popen(command(tmp_path), env=environment(text), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert everything(tmp_path) == everything(whole)
    assert all(len(folder.state(tmp_path, run).attempts) == 1 for run in folder.read(tmp_path).runs)
    assert all("Run " in out for out in outs)


@pytest.mark.runs
def test_a_rung_changes_nothing_of_those_that_go_on(text, tmp_path, whole):
    subprocess.run([*command(tmp_path)[:4], f"{STUDY}:halving", f"--workdir={tmp_path}"], env=environment(text), check=True)
    states = {run: folder.state(tmp_path, run) for run in folder.read(tmp_path).runs}
    stopped = {run for run, state in states.items() if state.name == "stopped"}
    assert len(stopped) == 4 and all(run.startswith("high/") for run in stopped), "the base stays, whichever is better"
    for run in set(states) - stopped:
        assert (tmp_path / run / "metrics.jsonl").read_text() == (whole / run / "metrics.jsonl").read_text()
    assert all(states[run].step == 6 for run in stopped if run.endswith("pretrain"))


@pytest.mark.runs
def test_a_search_goes_on(text, tmp_path):
    pytest.importorskip("optuna", reason="needs the extra search")
    words = [*command(tmp_path)[:4], f"{STUDY}:search", f"--workdir={tmp_path}"]
    out = subprocess.run(words, env=environment(text), check=True, capture_output=True, text=True).stdout
    record = folder.read(tmp_path)
    assert "best of 2 trials" in out and len(record.search.asked) == 2 and all(folder.is_finished(tmp_path, run) for run in record.runs)
    assert "best of 2 trials" in subprocess.run(words, env=environment(text), check=True, capture_output=True, text=True).stdout


@pytest.mark.faults
def test_killed_at_random_moments(whole, text, tmp_path):
    """SIGKILL to the runner and its run, five times, ends with exactly the figures of a study that nothing interrupted."""
    rng = random.Random(1)
    for _ in range(5):
        process = subprocess.Popen(command(tmp_path), env=environment(text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):  # it is killed while it works
            process.wait(timeout=rng.uniform(5, 12))
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
        for pid in (process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    attempts_before = [attempt for run in folder.read(tmp_path).runs for attempt in folder.state(tmp_path, run).attempts]
    assert any(attempt["end"] is None for attempt in attempts_before), "a kill hit a run"
    subprocess.run(command(tmp_path), env=environment(text), check=True)
    assert everything(tmp_path) == everything(whole)
    for run in folder.read(tmp_path).runs:
        for step, _ in folder.curve(tmp_path, run, "validation/loss"):
            assert [at for at, _ in folder.curve(tmp_path, run, "validation/loss")].count(step) == 1, "an evaluation stays with its step, once"

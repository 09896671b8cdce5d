"""What a study file says: arms and their combinators, the checks of its fields, files that are refused."""

from pathlib import Path

import pytest
from made_studies import LOSS, TESTS, TUNED, refusal, study

from ptm.study import (
    Arm,
    Halving,
    Metric,
    Ordering,
    Published,
    Search,
    Stage,
    chain,
    checks,
    choice,
    grid,
    integers,
    log_uniform,
    prepare,
    resolution,
    sample,
    uniform,
    zipped,
)


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
    assert [arm.name for arm in grid({"optimizer.learning_rate": [1e-3], "tune:optimizer.learning_rate": [True]})] == [
        "optimizer.learning_rate=0.001,tune.optimizer.learning_rate=true"
    ]
    assert grid({"objective.labels": [("a", "b")]})[0].name == "labels=a+b"


def test_samples_are_drawn_within_their_bounds_and_again_the_same():
    space = {
        "optimizer.learning_rate": log_uniform(1e-4, 1e-2),
        "model.width": integers(1, 3),
        "model.dropout": uniform(0.1, 0.2),
        "optimizer.name": choice(["adamw", "lamb"]),
    }
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
            {"search": Search(space={"a.b": uniform(0, 1)}, trials=1, metric=LOSS), "arms": (Arm("low"), Arm("trial 0", {"train.steps": 3}))},
            ["arms: 'trial 0' is what a trial of the search is called"],
        ),
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
        (
            "from ptm.study import Study\n\ndef get_study(argument):\n    return Study(claims='x')\n",
            "line 4: Study.__init__() got an unexpected keyword argument 'claims'",
        ),
        ("def get_study(argument):\n    return grid({})\n", "line 2: name 'grid' is not defined"),
    ):
        path.write_text(content)
        assert told in refusal(resolution.load, str(path))


def test_the_study_for_newcomers_resolves():
    """As it is in the repository, from another folder than the checkout's too."""
    loaded = resolution.load(f"{TESTS.parent}/experiments/quickstart.py")
    assert (len(loaded.arms), loaded.seeds) == (2, (0, 1, 2))
    record = prepare(f"{TESTS.parent}/experiments/quickstart.py", workdir="nowhere", write=False)
    assert [arm.difference for arm in record.arms] == [{}, {"pretrain:model.prenorm": [True, False]}] and len(record.runs) == 6
    assert not Path("nowhere").exists()

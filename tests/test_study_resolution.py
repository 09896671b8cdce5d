"""From a study file to study.json: what is resolved and refused before anything runs, what a run is, and which runs are the same."""

import json

import pytest
from made_studies import LOSS, TESTS, TUNED, begin, made, refusal

from ptm.study import Arm, Halving, Metric, Search, Stage, folder, identity, integers

pytestmark = pytest.mark.usefixtures("study_text")


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
    assert (
        "'optimiser.*', which no key of stage 'pretrain' matches" in (told := refusal(made, tmp_path, differs=("optimiser.*",)))
        and "Did you mean 'optimizer.*'?" in told
    )
    assert "Did you mean 'optimizer.learning_rate'?" in refusal(made, tmp_path, differs=("optimizer.learning_rat",))


def test_a_recipe_of_an_arm(tmp_path):
    """Another objective of the same family, and what follows from it, must be declared."""
    arms = (Arm("low"), Arm("spans", recipes={"pretrain": f"{TESTS}/runs.py:window"}))
    told = refusal(made, tmp_path, arms=arms, differs=("optimizer.*",))
    assert "pretrain:data.packing: default -> window" in told and "pretrain:data.holdout_by" in told
    assert made(tmp_path, arms=arms, differs=("data.*",), write=False).arms[1].difference["pretrain:data.packing"] == ["default", "window"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"arms": (Arm("low"), Arm("high", {"optimizer.learning_rat": 1}))},
            ["arm 'high', stage 'pretrain': unknown key optimizer.learning_rat.", "Did you mean 'optimizer.learning_rate'?"],
        ),
        ({"arms": (Arm("low"), Arm("high", {"optimizer.learning_rate": "fast"}))}, ["optimizer.learning_rate=fast cannot be read"]),
        ({"arms": (Arm("low"), Arm("high", {"train.steps": 0})), "differs": ("train.*",)}, ["train.steps=0 is out of range"]),
        ({"stages": (Stage("pretrain", recipe="configs/nothing.py"),)}, ["no recipe 'configs/nothing.py'"]),
        (
            {"metrics": (Metric("pretrain:validaton/loss", higher=False),)},
            ["arm 'low' has no eval 'validaton' in stage 'pretrain'", "Did you mean 'validation'?"],
        ),
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
    others = [
        identity.of(flat | {"seed": 1}, {"data": "d"}, parent="p"),
        identity.of(flat, {"data": "e"}, parent="p"),
        identity.of(flat, {"data": "d"}, parent="q"),
    ]
    assert len({same, *others}) == 4


def test_other_data_is_another_run(tmp_path, monkeypatch, study_text):
    record = made(tmp_path)
    begin(tmp_path, "low/seed0/pretrain")
    changed = tmp_path / "corpus.txt"
    changed.write_text(study_text.read_text() + "one more line\n")
    monkeypatch.setenv("PTM_TEST_TEXT", str(changed))
    assert "low/seed0/pretrain was begun, and is another run now" in (told := refusal(made, tmp_path)) and "data: '" in told and "data.source" in told
    assert folder.read(tmp_path) == record


def test_folders_of_arms():
    found = identity.folders(["15 %", "50 %", "a/b c", "../x", "%", "A_B_C", "x" * 200], taken=("study.json",))
    assert list(found.values()) == ["15", "50", "a_b_c", "x", "arm", "A_B_C-2", "x" * 80]
    assert list(identity.folders(["launch", "Report.html"], taken=folder.OWN).values()) == ["launch-2", "Report.html-2"]


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

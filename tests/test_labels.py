"""Labels that come from the data: what is found, in which order, what is refused, and that a run keeps them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import runs

from ptm import config, convert, hf, labels, registry, specs, text, weights
from ptm import run as run_lib
from ptm.config import Checkpoint, Data, Log, Optimizer, Tokenizer, Train
from ptm.data.documents import Corpus
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.objectives import choose, classify, mixture, mlm, regress, tag

COLUMNS = {"classify": ("text=text", "label=label"), "tag": ("text=text", "words=words", "tags=tags")}
TINY = {"num_layers": 1, "width": 16, "num_heads": 2, "max_length": 32, "dropout": 0.0, "attention_dropout": 0.0}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def made(source, objective, *, columns=COLUMNS["classify"], **changes):
    cfg = config.base(
        model=bert.BertConfig(**TINY), objective=objective, evals={"validation": loss.Config(every=2)}, train=Train(steps=2, batch_size=4),
        data=Data(**{"source": (source,), "columns": columns, "length": 32, "holdout": 0.2, "streams": 2} | changes),
        tokenizer=Tokenizer(kind="bytes"), optimizer=Optimizer(learning_rate=1e-3), checkpoint=Checkpoint(every=2), log=Log(writers=()),
    )  # fmt: skip
    return registry.resolve(cfg)


def texts(*names, repeat=1):
    return [{"text": f"text {n} {name}", "label": name} for n in range(repeat) for name in names]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, 1.5], ("1.5", "9", "10")),
        ([True, False], ("False", "True")),
        (["O", "B", "A"], ("O", "A", "B")),
        (["10", "9", "x"], ("10", "9", "x")),
    ],
)
def test_order_of_labels(names, expected, tmp_path):
    assert labels.filled(made(written(tmp_path / "a.jsonl", texts(*names)), classify.Config())).objective.labels == expected


def test_labels_of_held_out_records_count_but_not_their_numbers(tmp_path):
    """Balanced weights are in inverse proportion to the examples that are trained on, 1 on average over them."""
    source = written(tmp_path / "a.jsonl", [*texts("a", repeat=60), *texts("b", repeat=20)])
    filled = labels.filled(made(source, classify.Config(class_weights=("balanced",)))).objective
    given = dict(entry.split("=") for entry in filled.class_weights)
    train = Corpus(made(source, classify.Config()).data, split="train")
    kept = [found[1]["label"] for n in range(80) if (found := train.record(0, n))]
    assert 40 < len(kept) < 80
    for name in ("a", "b"):
        assert float(given[name]) == pytest.approx(len(kept) / (2 * kept.count(name)), rel=1e-5)
    assert filled.labels == ("a", "b")


def test_labels_of_a_validation_source_are_not_learned(tmp_path):
    source, other = written(tmp_path / "a.jsonl", texts("a", "b")), written(tmp_path / "b.jsonl", texts("a", "c"))
    assert labels.filled(made(source, classify.Config(), validation_source=(other,))).objective.labels == ("a", "b")


def test_tags_are_those_after_conversion(tmp_path):
    rows = [{"text": "a b c", "words": ["a", "b", "c"], "tags": tags} for tags in (["I-X", "I-X", "O"], ["I-Y", "I-X", "O"])]
    source = written(tmp_path / "a.jsonl", rows)
    assert labels.filled(made(source, tag.Config(), columns=COLUMNS["tag"])).objective.labels == ("O", "B-X", "B-Y", "I-X")
    assert labels.filled(made(source, tag.Config(scheme="as_given"), columns=COLUMNS["tag"])).objective.labels == ("O", "I-X", "I-Y")


def test_what_is_given_stays(tmp_path):
    nowhere = "jsonl:/nowhere/*.jsonl"
    for objective in (classify.Config(labels=("b", "a")), mlm.Config(), regress.Config(), choose.Config()):
        asked = made(nowhere, objective)
        assert labels.filled(asked) is asked
    source = written(tmp_path / "a.jsonl", texts("a", "b", "b", "b"))
    filled = labels.filled(made(source, classify.Config(labels=("b", "a", "c"), class_weights=("balanced",)), holdout=0.0)).objective
    assert filled.labels == ("b", "a", "c") and filled.class_weights == ("b=0.666667", "a=2"), "c has no example to be weighed"


def test_parts_of_a_mixture_are_filled(tmp_path):
    source = written(tmp_path / "a.jsonl", texts("a", "b"))
    asked = made(source, mixture.Config(parts={"kind": classify.Config(), "text": mlm.Config()}))
    filled = labels.filled(asked).objective
    assert filled.parts["kind"].labels == ("a", "b") and filled.parts["text"] is asked.objective.parts["text"]


REFUSED = {
    "no column": (
        [{"text": "a"}],
        {"columns": ("text=text",)},
        ["learns from the fields text, label", "maps no label", "data.columns=text=COLUMN,label=COLUMN"],
    ),
    "one label": (texts("a", "a"), {}, ["one label 'a'", "nothing to tell apart"]),
    "no label": (texts(None, ""), {}, ["none of 2 records", "has a label", "--config.objective.labels"]),
    "texts": (
        [{"text": f"t {n}", "label": f"text number {n}"} for n in range(1100)],
        {},
        ["more than 1,000 different labels", "'text number 0'", "column of text"],
    ),
    "a list": (texts(["a"]), {}, ["the label of record a.jsonl:1 is ['a'], a list"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_data(case, tmp_path):
    rows, changes, parts = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        labels.filled(made(written(tmp_path / "a.jsonl", rows), classify.Config(), **changes))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_objectives_that_need_columns_say_so_before_training(tmp_path):
    """Where labels are given or there are none, too; a map for another source does not count."""
    source = written(tmp_path / "a.jsonl", texts("1", "2"))
    for objective, columns, lacking in (
        (classify.Config(labels=("1", "2")), ("text=text",), "maps no label"),
        (regress.Config(), ("text=text", "1:label=label"), "maps no label for jsonl:"),
        (choose.Config(max_choices=2), ("text=text", "label=label"), "maps no choices"),
    ):
        cfg = made(source, objective, columns=columns, validation_source=(source, source))
        with pytest.raises(ConfigError, match=lacking):
            run_lib.setup(cfg, devices=jax.devices()[:1]).loader()


def test_a_run_keeps_its_labels(tmp_path, monkeypatch):
    """config.json has them, resumes and checkpoints go without the data, conversion keeps them; a head of another size begins afresh."""
    source = written(tmp_path / "a.jsonl", texts("good", "bad", repeat=10))
    cfg, workdir = made(source, classify.Config(class_weights=("balanced",))), tmp_path / "run"
    assert runs.run(cfg, workdir) == 0
    kept = json.loads((workdir / "config.json").read_text())["objective"]
    assert kept["labels"] == ["bad", "good"] and len(kept["class_weights"]) == 2
    monkeypatch.setattr(labels, "_scan", None)  # would fail if it were called
    again = labels.filled(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=4)), workdir).objective
    assert again.labels == ("bad", "good") and list(again.class_weights) == kept["class_weights"]
    assert weights.reopen(f"ckpt:{workdir}", devices=jax.devices()[:1]).config.objective == again
    monkeypatch.undo()
    convert.convert(f"ckpt:{workdir}", f"hf:{tmp_path / 'out'}")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    imported = hf.read(tmp_path / "out")
    assert specs._objective_of(imported, text.make("bytes")) == classify.Config(labels=("bad", "good"))
    with pytest.raises(ConfigError, match="objective.labels: .'bad', 'good'. -> .'x', 'y'."):
        runs.run(made(source, classify.Config(labels=("x", "y"), class_weights=("balanced",))), workdir)
    other = made(written(tmp_path / "b.jsonl", texts("a", "b", "c", repeat=5)), classify.Config())
    this = run_lib.setup(dataclasses.replace(other, init=f"ckpt:{workdir}"), devices=jax.devices()[:1])
    params, told = weights.start(this)
    assert "initialised afresh: classify_head" in told and "classify_head has 2 outputs there, 3 here." in told
    assert np.shape(params["classify_head"]["labels"]["kernel"]) == (16, 3)


def test_an_unknown_label_stops_the_evaluation_by_name(tmp_path):
    source, other = written(tmp_path / "a.jsonl", texts("good", "bad", repeat=5)), written(tmp_path / "b.jsonl", texts("good", "godo"))
    with pytest.raises(ConfigError, match="record b.jsonl:2 has the label 'godo', which is not one of objective.labels: bad, good. Did you mean 'good'?"):
        runs.run(made(source, classify.Config(), validation_source=(other,)), tmp_path / "run")


def test_two_parts_cannot_have_one_head(tmp_path):
    source = written(tmp_path / "a.jsonl", texts("0.5", "1", repeat=5))
    cfg = made(source, mixture.Config(parts={"kind": classify.Config(), "score": regress.Config(), "text": mlm.Config()}))
    with pytest.raises(ConfigError, match="parts kind, score of objective.parts all need the head classify.*seq2seq"):
        run_lib.setup(cfg, devices=jax.devices()[:1])


@pytest.mark.slow
def test_parts_with_heads_of_their_own_train_together(tmp_path):
    """Kinds of texts and tags of their words, learned by one model from the same records."""
    rows = [{"text": f"a b {n}", "words": ["a", "b"], "tags": ["S-X", "O"] if n % 2 else ["O", "O"], "label": "ab"[n % 2]} for n in range(20)]
    parts = {"kind": classify.Config(), "names": tag.Config(), "text": mlm.Config()}
    cfg = made(written(tmp_path / "a.jsonl", rows), mixture.Config(parts=parts), columns=("text=text", "words=words", "tags=tags", "label=label"))
    run = run_lib.setup(cfg, devices=jax.devices()[:1])
    assert {branch.name: branch.objective.heads[-1] for branch in run.branches} == {"kind": "classify:2", "names": "tag:2", "text": "mlm"}
    assert {"classify_head", "tag_head", "mlm_head"} <= run.abstract_params.keys()
    assert runs.run(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=3)), tmp_path / "run") == 0
    last = json.loads(runs.metrics(tmp_path / "run").splitlines()[-1])
    assert {"validation/kind/accuracy", "validation/names/accuracy", "validation/text/loss"} <= last.keys()

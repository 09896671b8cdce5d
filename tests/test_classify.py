"""Classification: what models read, which position speaks for a text, packed rows, weights of classes, and GPT's auxiliary language modelling."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tasks
import zoo

from ptm import config, state, text
from ptm.config import Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import bert, gpt
from ptm.nn.stack import Output
from ptm.objectives import classify, rows
from ptm.objectives.protocol import Task

CHARS = text.make("chars", texts=["good bad film a so"], specials=True)
LABELS = ("bad", "good")


def build(kind="encoder", summary="first", **options):
    return tasks.build("classify", CHARS, kind=kind, summary=summary, **{"labels": LABELS, **options})


def document(content, **columns):
    return Document("d", CHARS.encode(content), columns)


def example(objective, content, **columns):
    (made,) = tasks.examples(objective, document(content, **columns))
    return made


def shown(made, name="tokens_BL"):
    return "".join(CHARS.pieces(made[name]))


def label_at(made):
    """(position of the mark, label there); all else is unmarked and has none."""
    (at,) = np.flatnonzero(made["mark_BL"])
    assert (np.delete(made["label_BL"], at) == rows.UNKNOWN).all()
    return int(at), int(made["label_BL"][at])


def test_golden_encoder():
    made = example(build(), "so good", pair="a film", label="good")
    assert shown(made) == "<cls>so good<sep>a film<sep>"
    assert made["types_BL"].tolist() == [0] * 9 + [1] * 7
    assert label_at(made) == (0, 1)


def test_golden_encoder_that_ends_with_its_summary():
    made = example(build(summary="last"), "so good", label="bad")
    assert shown(made) == "so good<sep><cls>" and label_at(made) == (8, 0)
    made = example(build(summary="last", num_types=3), "so good", pair="a film", label="bad")
    assert shown(made) == "so good<sep>a film<sep><cls>" and made["types_BL"].tolist() == [0] * 8 + [1] * 7 + [2]


def test_types_stay_within_the_model():
    """A model of one segment type, such as RoBERTa, tells the texts of a pair apart by what stands between them alone."""
    assert example(build(num_types=1), "so good", pair="a film", label="good")["types_BL"].tolist() == [0] * 16


def test_golden_roberta():
    """Where cls and sep are the beginning and the end of texts, two of them part a pair."""

    class Roberta(zoo.Vocabulary):
        bos_id, cls_id, eos_id, sep_id = 5, 5, 6, 6

    objective = tasks.build("classify", Roberta(), num_types=1, labels=LABELS)
    (made,) = tasks.examples(objective, Document("d", np.array([10, 11]), {"pair": "12 13", "label": "bad"}))
    assert made["tokens_BL"].tolist() == [5, 10, 11, 6, 6, 12, 13, 6]


def test_golden_decoder():
    made = example(build("decoder", "last", lm_coefficient=0.5), "so good", label="good")
    assert shown(made) == "<s>so good</s>" and label_at(made) == (8, 1)
    assert shown({"tokens_BL": made["targets_BL"][made["weights_BL"] > 0]}) == "so good</s>"
    assert "weights_BL" not in build("decoder", "last").fields


@pytest.mark.parametrize(("kind", "pooling", "at"), [("encoder", "last", 8), ("encoder", "mean", 0), ("decoder", "mean", 0), ("decoder", "default", 8)])
def test_pooling_moves_the_mark(kind, pooling, at):
    summary = "first" if kind == "encoder" else "last"
    assert label_at(example(build(kind, summary, pooling=pooling), "so good", label="bad"))[0] == at


def test_shortened_takes_from_the_longest():
    texts = [np.arange(9), np.arange(4), np.arange(2)]
    assert [len(part) for part in rows.shortened(texts, 15)] == [9, 4, 2]
    assert [len(part) for part in rows.shortened(texts, 10)] == [4, 4, 2]
    assert sorted(len(part) for part in rows.shortened(texts, 5)) == [1, 2, 2]


def test_cutting_is_told_once(caplog):
    objective = build(length=8)
    with caplog.at_level(logging.WARNING):
        assert shown(example(objective, "so good film", label="bad")) == "<cls>so goo<sep>"
        example(objective, "so good film", label="bad")
    assert [record.getMessage() for record in caplog.records] == [
        "texts that are longer than data.length=8 are cut for objective classify, d the first of them."
    ]


def test_a_record_without_label_is_no_example_of_any():
    """As `ptm predict` has them, and rows that were never labelled."""
    for columns in ({}, {"label": None}, {"label": ""}):
        assert label_at(example(build(), "so good", **columns))[1] == rows.UNKNOWN
        assert build().reference(document("so good", **columns)) is None


@pytest.mark.parametrize(("value", "name"), [(1, "1"), (True, "True"), (2.0, "2"), (0.5, "0.5"), ("yes", "yes")])
def test_names_of_labels(value, name):
    assert rows.label_name(value, record="d") == name


def test_refused_records():
    with pytest.raises(ConfigError, match="record d has the label 'god', which is not one of objective.labels: bad, good. Did you mean 'good'?"):
        example(build(), "so good", label="god")
    with pytest.raises(ConfigError, match=r"the label of record d is \['good'\], a list; allowed: text or a number"):
        example(build(), "so good", label=["good"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_coefficient": 0.5}, "lm_coefficient=0.5 models language left to right"),
        ({"length": 4}, "length=4 leaves no room for 2 texts.*5 or more"),
        ({"packing": "concat"}, "packing=concat cuts or joins texts; allowed with classify: default, first_fit, none"),
        ({"labels": ()}, "objective.labels is to be taken from the training data first"),
        ({"class_weights": ("balanced",)}, "objective.class_weights is to be taken from the training data first"),
        ({"kind": "decoder", "summary": "last", "pooling": "first"}, "pooling=first reads what a decoder knows before the text"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("one",)}, "two or more different names, or none"),
        ({"labels": ("a", "a")}, "two or more different names"),
        ({"labels": ("good", "bad"), "class_weights": ("god=2",)}, "'god=2'; allowed: NAME=WEIGHT with NAME one of good, bad.*Did you mean 'good'"),
        ({"class_weights": ("2",)}, "'2'; allowed: NAME=WEIGHT; or the one word balanced"),
        ({"class_weights": ("a=x",)}, "objective.class_weights: a=x cannot be read"),
        ({"class_weights": ("a=-1",)}, "a=-1 is no weight"),
        ({"labels": ("a", "b"), "class_weights": ("a=0", "b=0")}, "leaves nothing to learn from"),
    ],
)
def test_refused_configs(options, message):
    with pytest.raises(ConfigError, match=message):
        classify.Config(**options).check("objective")
    classify.Config().check("objective")


def test_finish_lists_the_texts_of_a_row():
    """S follows from the longest row, L is that of the row itself, which may be shorter."""
    objective = build(length=48)
    assert objective.lengths == {"L": 48, "S": 6} and objective.max_segments == 6
    docs = [document(content, label=label) for content, label in (("so", "good"), ("a film", "bad"), ("bad", None))]
    batch, _ = tasks.rows(objective, docs, packing="first_fit", count=1, length=24)
    assert shown({"tokens_BL": batch["tokens_BL"][0][:17]}) == "<cls>so<sep><cls>a film<sep><cls>bad<sep>"
    assert batch["index_BS"].tolist() == [[0, 4, 12, 24, 24, 24]] and batch["label_BS"].tolist() == [[1, 0, -1, -1, -1, -1]]
    assert "mark_BL" not in batch and "label_BL" not in batch


CASES = {
    "bert": ("bert", {"class_weights": ("1=3",)}),
    "xlnet": ("xlnet", {}),
    "gpt with language modelling": ("gpt1", {"lm_coefficient": 0.5, "label_smoothing": 0.1}),
    "mean": ("bert", {"pooling": "mean"}),
    "max": ("gpt1", {"pooling": "max"}),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in ("xlnet", "max") else ()) for case in CASES])
def test_packed_rows_equal_one_text_a_row(case):
    family, options = CASES[case]
    tasks.assert_packed_is_alone("classify", family, **options)


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_no_text_of_a_row_knows_of_another(pooling):
    """Other tokens in one text change its own logits alone."""
    objective, model, params = tasks.on_zoo("classify", "bert", pooling=pooling)
    batch, used = tasks.rows(objective, tasks.documents(), packing="first_fit", count=8)
    run = zoo.jit(lambda batch: objective.outputs(model, params, batch)["logits"])
    second = batch["segments_BL"] == 2
    before, after = run(batch), run(batch | {"tokens_BL": jnp.where(second, (batch["tokens_BL"] + 1) % zoo.VOCAB, batch["tokens_BL"])})
    changed = np.any(np.asarray(before) != np.asarray(after), axis=2)
    expected = np.zeros_like(changed)
    expected[:, 1] = np.any(second, axis=1)
    np.testing.assert_array_equal(changed, expected)
    assert changed.any()


class Table:
    """A model whose head gives the hidden state, which is a row of its one parameter chosen by the token."""

    def hidden(self, params, batch, *, mask, head, train, rng):
        return Output(hidden_BLD=params[batch["tokens_BL"]])

    def logits(self, params, hidden, *, head, train, rng):
        return hidden[..., : int(head.partition(":")[2])]


def test_loss_by_hand():
    """Weights of classes multiply terms and W alike, smoothing mixes in the mean over labels, accuracy counts texts."""
    objective = tasks.build(
        "classify", zoo.Vocabulary(), length=40, labels=("a", "b", "c"), class_weights=("b=2.5", "c=0.25"), label_smoothing=0.1, pooling="last"
    )  # fmt: skip
    names = ["a", "b", "b", "c", None]
    docs = [Document(f"d{n}", np.array([8 + n]), {} if name is None else {"label": name}) for n, name in enumerate(names)]
    batch, _ = tasks.rows(objective, docs, packing="first_fit", count=2)
    table = np.random.default_rng(0).standard_normal((zoo.VOCAB, 3)).astype(np.float32)
    totals, aux, _ = objective.loss(Table(), jnp.asarray(table), batch, rng=None, carry=None, train=True)
    logits = table[zoo.Vocabulary.sep_id].astype(np.float64)  # the last token of each text
    log_probs = logits - np.log(np.exp(logits).sum())
    cost = {name: -0.9 * log_probs["abc".index(name)] - 0.1 * log_probs.mean() for name in "abc"}
    weights = {"a": 1.0, "b": 2.5, "c": 0.25}
    np.testing.assert_allclose(totals["label"], sum(weights[name] * cost[name] for name in names[:-1]), rtol=1e-5)
    assert float(objective.weights(batch)["label"]) == 6.25
    np.testing.assert_allclose(aux.ratios["accuracy"], [names.count("abc"[int(logits.argmax())]), 4])


def test_answers_are_names_with_probabilities():
    objective = build()
    assert isinstance(objective, Task) and objective.metrics == ("accuracy",) and build(metrics=("matthews",)).metrics == ("matthews",)
    answer = objective.answer(document("so"), [{"logits": np.log(np.array([[0.75, 0.25], [0.0, 1.0]]) + 1e-30)}])
    assert answer["prediction"] == "bad" and json.loads(json.dumps(answer))["probabilities"] == pytest.approx({"bad": 0.75, "good": 0.25})
    assert objective.reference(document("so", label="good")) == "good"


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_only_the_summary_of_real_rows_counts(family):
    """Weights are real texts; the loss does not change with padding."""
    made = zoo.objective("classify", family)
    batch, longer = zoo.batch("classify", family), zoo.batch("classify", family, extra_length=6)
    assert float(made.weights(batch)["label"]) == float(np.sum(np.asarray(batch["label_BS"]) >= 0)) == 8
    model, params = zoo.model(family, heads=made.heads), zoo.params(family, heads=made.heads)
    run = zoo.jit(lambda batch: made.loss(model, params, batch, rng=None, carry=None, train=False)[0]["label"])
    np.testing.assert_allclose(run(longer), run(batch), rtol=1e-5)


def test_auxiliary_language_modelling_is_the_causal_loss():
    """GPT's fine-tuning loss is that of the label plus the coefficient times that of the text."""
    options = {"lm_coefficient": 0.5}
    made = zoo.objective("classify", "gpt1", **options)
    batch, model, params = zoo.batch("classify", "gpt1", **options), zoo.model("gpt1", heads=made.heads), zoo.params("gpt1", heads=made.heads)

    @zoo.jit
    def parts(params, batch):
        whole = state.gradients(model, made, params, batch, microbatches=1, rng=None, carry=None, train=False)[0]
        causal = zoo.objective("causal", "gpt1")
        totals, weights = causal.loss(model, params, batch, rng=None, carry=None, train=False)[0], causal.weights(batch)
        label = made.loss(model, params, batch, rng=None, carry=None, train=False)[0]["label"] / made.weights(batch)["label"]
        return whole, label, totals["tokens"] / weights["tokens"]

    whole, label, tokens = parts(params, batch)
    np.testing.assert_allclose(whole, label + 0.5 * tokens, rtol=1e-6)
    halves = [
        zoo.jit(lambda params, batch, n=n: state.gradients(model, made, params, batch, microbatches=n, rng=None, carry=None, train=False)[1])(params, batch)
        for n in (1, 4)
    ]  # fmt: skip
    zoo.assert_equal_gradients(halves[1], halves[0])


def test_dropout_of_the_head_is_drawn_anew_and_only_in_training():
    objective = tasks.build("classify", zoo.Vocabulary(), length=16, labels=LABELS)
    seen = []

    class Listening(Table):
        def logits(self, params, hidden, *, head, train, rng):
            seen.append((train, None if rng is None else jax.random.key_data(rng).tolist()))
            return super().logits(params, hidden, head=head, train=train, rng=rng)

    batch, _ = tasks.rows(objective, [Document("d", np.array([8]), {"label": "bad"})], packing="none", count=1)
    table = jnp.zeros((zoo.VOCAB, 2))
    for rng, train in ((jax.random.key(0), True), (jax.random.key(1), True), (None, False)):
        objective.loss(Listening(), table, batch, rng=rng, carry=None, train=train)
    assert [train for train, _ in seen] == [True, True, False] and seen[0][1] != seen[1][1] and seen[2][1] is None


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt1", marks=pytest.mark.slow)])
def test_it_learns_to_tell_two_kinds_of_text_apart(family, tmp_path):
    """Labels are those of the data; texts share rows."""
    rng = np.random.default_rng(0)
    lines = [
        (label, " ".join(rng.choice(words, 4))) for _ in range(200) for label, words in (("pos", ["good", "fine", "nice"]), ("neg", ["bad", "poor", "dull"]))
    ]
    (tmp_path / "rows.tsv").write_text("label\tsentence\n" + "".join(f"{label}\t{content}\n" for label, content in lines))
    shape = {"num_layers": 2, "width": 32, "num_heads": 2, "max_length": 64, "dropout": 0.0, "attention_dropout": 0.0}
    cfg = config.base(
        model=bert.BertConfig(**shape) if family == "bert" else gpt.Config(**shape, prenorm=False),
        objective=classify.Config(lm_coefficient=0.0 if family == "bert" else 0.5, class_weights=("balanced",)),
        evals={"validation": loss.Config(every=60)},
        train=Train(steps=60, batch_size=8),
        data=Data(source=(f"tsv:{tmp_path}/rows.tsv",), columns=("text=sentence", "label=label"), length=64, holdout=0.1),
        tokenizer=Tokenizer(kind="bytes"), optimizer=Optimizer(learning_rate=3e-3), schedule=Schedule(warmup_steps=5), log=Log(writers=()),
    )  # fmt: skip
    assert runs.run(cfg, tmp_path / "run") == 0
    seen = [json.loads(line) for line in runs.metrics(tmp_path / "run").splitlines()]
    assert seen[-1]["validation/accuracy"] > 0.95
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["objective"]
    assert kept["labels"] == ["neg", "pos"] and [entry.partition("=")[0] for entry in kept["class_weights"]] == ["neg", "pos"]

"""Regression on texts, and the choice among candidates by scores: examples, losses by hand, packed rows, answers."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tasks
import zoo

from ptm import text
from ptm.data.batch import Document
from ptm.fields import ConfigError
from ptm.nn.stack import Output
from ptm.objectives import choose, regress
from ptm.objectives.protocol import Task

CHARS = text.make("chars", texts=["The man fell. why because it rained or so, ok?"], specials=True)


def document(content="it rained", **columns):
    return Document("d", CHARS.encode(content), columns)


class Scores:
    """A model whose head gives what its parameter has for the position's token."""

    def hidden(self, params, batch, *, mask, head, train, rng):
        return Output(hidden_BLD=params[batch["tokens_BL"]][..., None])

    def logits(self, params, hidden, *, head, train, rng):
        assert head == "classify:1"
        return hidden


# Regression.


def test_golden_regression():
    (made,) = tasks.examples(tasks.build("regress", CHARS, length=32), document(pair="it fell", label="3.5"))
    assert "".join(CHARS.pieces(made["tokens_BL"])) == "<cls>it rained<sep>it fell<sep>"
    assert made["label_BL"][0] == np.float32(3.5) and np.isnan(made["label_BL"][1:]).all() and made["mark_BL"].tolist() == [1] + [0] * 18


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("much", "'much'; allowed with objective regress: numbers"),
        (math.inf, "'inf'; allowed"),
        ([1], r"'\[1\]'; allowed"),
        (7, "7.0; allowed by objective.low and objective.high: 0.0 to 5.0"),
    ],
)
def test_refused_numbers(label, message):
    with pytest.raises(ConfigError, match=f"record d has the label {message}"):
        tasks.examples(tasks.build("regress", CHARS, low=0.0, high=5.0), document(label=label))


@pytest.mark.parametrize("options", [{"low": 1.0}, {"high": 1.0}, {"low": 2.0, "high": 1.0}])
def test_refused_ranges(options):
    with pytest.raises(ConfigError, match="two numbers, low below high, or None for both"):
        regress.Config(**options).check("objective")
    regress.Config(low=0.0, high=5.0).check("objective")


@pytest.mark.parametrize("bounds", [{}, {"low": 0.0, "high": 5.0}])
def test_squared_error_by_hand(bounds):
    """The mean over the texts that have a number, in the range that was asked for; answers are what the loss compares."""
    objective = tasks.build("regress", zoo.Vocabulary(), length=40, pooling="last", kind="decoder", summary="last", **bounds)
    values = [0.5, 4.0, None, 2.0]
    docs = [Document(f"d{n}", np.array([9]), {} if value is None else {"label": value}) for n, value in enumerate(values)]
    batch, used = tasks.rows(objective, docs, packing="first_fit", count=2)
    table = jnp.linspace(-2, 3, zoo.VOCAB)
    raw = float(table[zoo.Vocabulary.eos_id])
    predicted = 5 / (1 + math.exp(-raw)) if bounds else raw
    totals, aux, _ = objective.loss(Scores(), table, batch, rng=None, carry=None, train=True)
    known = [value for value in values if value is not None]
    np.testing.assert_allclose(totals["label"], sum((predicted - value) ** 2 for value in known), rtol=1e-5)
    np.testing.assert_allclose(aux.ratios["absolute_error"], [sum(abs(predicted - value) for value in known), 3], rtol=1e-5)
    assert float(objective.weights(batch)["label"]) == 3 and used == 1
    answer = objective.answer(docs[0], [{"logits": np.asarray(objective.outputs(Scores(), table, batch)["logits"])[0]}])
    assert json.loads(json.dumps(answer)) == {"prediction": pytest.approx(predicted, rel=1e-6)} and objective.reference(docs[1]) == 4.0
    assert objective.metrics == ("pearson", "spearman") and isinstance(objective, Task) and objective.reference(docs[2]) is None


@pytest.mark.slow
def test_packed_regression_equals_one_text_a_row():
    tasks.assert_packed_is_alone("regress", "bert", low=-1.0, high=2.0)


# Multiple choice.


def build(**options):
    return tasks.build("choose", CHARS, **{"length": 96, **options})


def parts(made):
    """The candidates of an example as text, with their marks and whether each is right."""
    cuts = np.flatnonzero(np.diff(made["choice_BL"])) + 1
    found = []
    for tokens, mark, right in zip(*(np.split(made[name], cuts) for name in ("tokens_BL", "mark_BL", "right_BL"))):
        (at,) = np.flatnonzero(mark)
        found.append(("".join(CHARS.pieces(tokens)), int(at), int(right[at])))
    return found


def test_golden_choice():
    doc = document("The man fell.", pair="why?", choices=["it rained", "so"], label=1)
    (made,) = tasks.examples(build(), doc)
    assert parts(made) == [("<cls>The man fell.<sep>why? it rained<sep>", 0, 0), ("<cls>The man fell.<sep>why? so<sep>", 0, 1)]
    assert made["types_BL"].tolist() == [0] * 15 + [1] * 15 + [0] * 15 + [1] * 8
    (made,) = tasks.examples(build(kind="decoder", summary="last"), document("ok", choices=["so", "or"]))
    assert parts(made) == [("<s>ok<sep>so</s>", 6, -1), ("<s>ok<sep>or</s>", 6, -1)] and "types_BL" not in made


def test_finish_makes_a_segment_of_each_candidate():
    """Records of two and three choices in one row: each candidate has positions of its own, and is known by its record."""
    docs = [document("ok", choices=["so", "or"], label=0), document("it", choices=["so", "or", "ok"], label=2)]
    objective = build(length=64)
    assert objective.lengths == {"L": 64, "S": 8} and objective.max_segments == 2
    batch, used = tasks.rows(objective, docs, packing="first_fit", count=1)
    sizes = [7] * 5
    assert used == 1 and batch["segments_BL"].tolist() == [[n + 1 for n, size in enumerate(sizes) for _ in range(size)] + [0] * 29]
    assert batch["positions_BL"].tolist() == [[*range(7)] * 5 + [0] * 29]
    assert batch["index_BS"].tolist() == [[0, 7, 14, 21, 28, 64, 64, 64]] and batch["record_BS"].tolist() == [[1, 1, 2, 2, 2, 0, 0, 0]]
    assert batch["right_BS"].tolist() == [[1, 0, 0, 0, 1, -1, -1, -1]] and not {"choice_BL", "mark_BL", "right_BL"} & batch.keys()


def test_long_candidates_share_the_row():
    """The longest lose, down to equal parts; short ones stay whole."""
    (made,) = tasks.examples(build(length=40), document("it rained " * 5, choices=["so", "because it rained"], label=0))
    assert len(made["tokens_BL"]) == 40 and [part.count("<sep>") for part, _, _ in parts(made)] == [2, 2]
    assert parts(made)[0][0].endswith("<sep>so<sep>")
    (made,) = tasks.examples(build(length=40), document("it rained, or it rained so", choices=["", "so"], label=0))
    assert [len(piece) for piece in np.split(made["tokens_BL"], [20])] == [20, 20]


@pytest.mark.parametrize(
    ("label", "first", "place"), [(0, 0, 0), ("1", 0, 1), (2, 1, 1), ("B", 0, 1), ("so", 0, 0), (1.0, 0, 1), ("", 0, None), (None, 0, None)]
)
def test_labels_are_numbers_letters_or_texts(label, first, place):
    assert build(first_number=first).reference(document("ok", choices=["so", "or"], label=label)) == place


def test_a_text_that_is_a_choice_is_no_number():
    assert build().reference(document("1+1?", choices=["2", "1", "0"], label="0")) == 2
    assert build().reference(document("1+1?", choices=["2", "1", "0"], label=0)) == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"choices": "so or"}, "has so or as its field choices; allowed: a list of texts"),
        ({}, "has None as its field choices"),
        ({"choices": ["so"]}, "has 1 choices; allowed: 2 to objective.max_choices=4"),
        ({"choices": ["so"] * 5}, "has 5 choices; allowed: 2 to"),
        ({"choices": ["so", "or"], "label": 2}, "the label '2'; allowed: a number from 0 to 1"),
        ({"choices": ["so", "or"], "label": "C"}, "the label 'C'; allowed"),
        ({"choices": ["so", "or"], "label": [1]}, r"the label '\[1\]'; allowed"),
    ],
)
def test_refused_choices(columns, message):
    with pytest.raises(ConfigError, match=f"record d .*{message}"):
        tasks.examples(build(), document("ok", **columns))


def test_a_row_without_room_for_the_choices_is_refused():
    with pytest.raises(ConfigError, match="data.length=16 leaves no room for 4 choices in a row; allowed: 20 or more"):
        build(length=16)


def test_choice_by_hand():
    """Softmax within each record; a record without label counts for nothing; equal scores are no hit."""
    objective = tasks.build("choose", zoo.Vocabulary(), kind="decoder", summary="last", length=64, max_choices=3)

    class ByChoice(Scores):
        """A score that depends on the last token of the candidate, which stands before its end."""

        def hidden(self, params, batch, *, mask, head, train, rng):
            before = jnp.roll(batch["tokens_BL"], 1, axis=1)
            return super().hidden(params, {"tokens_BL": before}, mask=mask, head=head, train=train, rng=rng)

    records = [(["10", "11"], 0), (["12", "13", "14"], 2), (["15", "16"], None), (["17", "17"], 1)]
    docs = [Document(f"d{n}", np.array([9]), {"choices": choices, "label": label}) for n, (choices, label) in enumerate(records)]
    batch, used = tasks.rows(objective, docs, packing="first_fit", count=2)
    table = jnp.asarray(np.random.default_rng(1).standard_normal(zoo.VOCAB).astype(np.float32))
    totals, aux, _ = objective.loss(ByChoice(), table, batch, rng=None, carry=None, train=True)
    nll, hits = 0.0, 0
    for choices, label in records:
        scores = np.array([float(table[int(choice)]) for choice in choices])
        if label is not None:
            nll += np.log(np.exp(scores).sum()) - scores[label]
            hits += int(scores[label] > np.delete(scores, label).max())
    np.testing.assert_allclose(totals["label"], nll, rtol=1e-5)
    np.testing.assert_allclose(aux.ratios["accuracy"], [hits, 3])
    assert float(objective.weights(batch)["label"]) == 3 and used == 2
    alone, _ = tasks.rows(objective, docs[1:2], packing="none", count=1)
    answer = objective.answer(docs[1], [{"logits": np.asarray(objective.outputs(ByChoice(), table, alone)["logits"])[0]}])
    best = int(np.argmax([float(table[n]) for n in (12, 13, 14)]))
    assert json.loads(json.dumps(answer))["prediction"] == best and answer["choice"] == docs[1].columns["choices"][best]
    assert sum(answer["probabilities"]) == pytest.approx(1) and len(answer["probabilities"]) == 3 and isinstance(objective, Task)


@pytest.mark.parametrize(
    ("family", "options"), [pytest.param("bert", {}, id="bert"), pytest.param("gpt1", {"lm_coefficient": 0.5}, id="gpt", marks=pytest.mark.slow)]
)
def test_packed_choices_equal_one_record_a_row(family, options):
    tasks.assert_packed_is_alone("choose", family, length=64, **options)


def test_choose_needs_two_choices():
    assert choose.Config().lengths(8) == {"L": 8, "S": 4}

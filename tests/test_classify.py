"""Classification: what encoders and decoders read, which position speaks for a row, and GPT's auxiliary language modelling."""

import json
import types

import numpy as np
import pytest
import runs
import zoo

from ptm import config, state, text
from ptm.config import Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document, keyed_rng
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import bert, gpt
from ptm.objectives import OBJECTIVES, classify

CHARS = text.make("chars", texts=["good bad film a so"], specials=True)


def build(kind="encoder", summary="first", length=16, num_types=2, **options):
    about = types.SimpleNamespace(kind=kind, summary=summary, name="x", num_types=num_types)
    return OBJECTIVES["classify"].build(
        classify.Config(**{"labels": ("bad", "good"), **options}), tokenizer=CHARS, length=length, packing="default", model_config=about
    )  # fmt: skip


def example(objective, content, **columns):
    (made,) = objective.features(Document("d", CHARS.encode(content), columns), rng=keyed_rng(0), draw=None)
    return made


def shown(made, name="tokens_BL"):
    return "".join(CHARS.pieces(made[name]))


def test_golden_encoder():
    made = example(build(), "so good", pair="a film", label="good")
    assert shown(made) == "<cls>so good<sep>a film<sep>"
    assert made["types_BL"].tolist() == [0] * 9 + [1] * 7
    assert made["label_B"] == 1


def test_golden_encoder_that_ends_with_its_summary():
    made = example(build(summary="last"), "so good", label="bad")
    assert shown(made) == "so good<sep><cls>" and made["label_B"] == 0
    made = example(build(summary="last", num_types=3), "so good", pair="a film", label="bad")
    assert shown(made) == "so good<sep>a film<sep><cls>" and made["types_BL"].tolist() == [0] * 8 + [1] * 7 + [2]


def test_types_stay_within_the_model():
    """A model of one segment type, such as RoBERTa, tells the texts of a pair apart by what stands between them alone."""
    assert example(build(num_types=1), "so good", pair="a film", label="good")["types_BL"].tolist() == [0] * 16


def test_golden_decoder():
    made = example(build("decoder", "last", lm_coefficient=0.5), "so good", label="good")
    assert shown(made) == "<s>so good</s>"
    assert shown({"tokens_BL": made["targets_BL"][made["weights_BL"] > 0]}) == "so good</s>"


def test_shortened_takes_from_the_longest():
    texts = [np.arange(9), np.arange(4), np.arange(2)]
    assert [len(part) for part in classify.shortened(texts, 15)] == [9, 4, 2]
    assert [len(part) for part in classify.shortened(texts, 10)] == [4, 4, 2]
    assert sorted(len(part) for part in classify.shortened(texts, 5)) == [1, 2, 2]


@pytest.mark.parametrize(
    ("columns", "parts"), [({}, ["no field label", "data.columns"]), ({"label": "fine"}, ["'fine'", "objective.labels=bad,good"])]
)
def test_refused_records(columns, parts):
    with pytest.raises(ConfigError) as error:
        example(build(), "so good", **columns)
    assert all(part in str(error.value) for part in parts)


def test_refused_options():
    with pytest.raises(ConfigError, match="lm_coefficient"):
        build(lm_coefficient=0.5)
    with pytest.raises(ConfigError, match="5 or more"):
        build(length=4)
    with pytest.raises(ConfigError, match="two or more"):
        classify.Config(labels=("one",)).check("objective")


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_only_the_summary_of_real_rows_counts(family):
    """Weights are real rows; the logits do not change with padding, and come from the first or the last real position."""
    made = zoo.objective("classify", family)
    batch, longer = zoo.batch("classify", family), zoo.batch("classify", family, extra_length=6)
    assert float(made.weights(batch)["label"]) == float(np.sum(np.asarray(batch["label_B"]) >= 0)) > 0
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
    halves = [state.gradients(model, made, params, batch, microbatches=n, rng=None, carry=None, train=False)[1] for n in (1, 4)]
    zoo.assert_equal_gradients(halves[1], halves[0])


@pytest.mark.parametrize("family", ["bert", "gpt1"])
def test_it_learns_to_tell_two_kinds_of_text_apart(family, tmp_path):
    rng = np.random.default_rng(0)
    rows = [(label, " ".join(rng.choice(words, 4))) for _ in range(200) for label, words in (("pos", ["good", "fine", "nice"]), ("neg", ["bad", "poor", "dull"]))]
    (tmp_path / "rows.tsv").write_text("label\tsentence\n" + "".join(f"{label}\t{content}\n" for label, content in rows))
    shape = {"num_layers": 2, "width": 32, "num_heads": 2, "max_length": 32, "dropout": 0.0, "attention_dropout": 0.0}
    cfg = config.base(
        model=bert.BertConfig(**shape) if family == "bert" else gpt.Config(**shape, prenorm=False),
        objective=classify.Config(labels=("neg", "pos"), lm_coefficient=0.0 if family == "bert" else 0.5),
        evals={"validation": loss.Config(every=60)},
        train=Train(steps=60, batch_size=16),
        data=Data(source=(f"tsv:{tmp_path}/rows.tsv",), columns=("text=sentence", "label=label"), length=32, holdout=0.1),
        tokenizer=Tokenizer(kind="bytes"), optimizer=Optimizer(learning_rate=3e-3), schedule=Schedule(warmup_steps=5), log=Log(writers=()),
    )  # fmt: skip
    assert runs.run(cfg, tmp_path / "run") == 0
    rows = [json.loads(line) for line in runs.metrics(tmp_path / "run").splitlines()]
    assert rows[-1]["validation/accuracy"] > 0.95

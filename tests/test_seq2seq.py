"""Text to text: what encoder-decoders and decoders read and are asked for, smoothed targets, and the answers that are generated."""

import contextlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import config, state, text
from ptm import run as run_lib
from ptm.config import Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document, keyed_rng
from ptm.fields import ConfigError
from ptm.models import gpt, t5
from ptm.nn.losses import cross_entropy_and, uniform_nats
from ptm.objectives import OBJECTIVES, seq2seq

CHARS = text.make("chars", texts=["so good gut en: abcdefgh"], specials=True)


def build(kind="encoder_decoder", length=12, tokenizer=CHARS, packing="default", model_config=None, **options):
    about = model_config or types.SimpleNamespace(kind=kind, summary="last", name="x")
    return OBJECTIVES["seq2seq"].build(
        seq2seq.Config(**{"input_length": 16, **options}), tokenizer=tokenizer, length=length, packing=packing, model_config=about
    )  # fmt: skip


def document(content="so good", target="gut", tokenizer=CHARS):
    return Document("d1", tokenizer.encode(content), {} if target is None else {"target": target})


def example(objective, *args, **columns):
    (made,) = objective.features(document(*args, **columns), rng=keyed_rng(0), draw=None)
    return made


def shown(ids):
    return "".join(CHARS.pieces(ids))


def asked(made):
    return shown(made["targets_BL"][made["weights_BL"] > 0])


# --- golden examples ---


def test_golden_encoder_decoder():
    made = example(build(prefix="en: "))
    assert shown(made["inputs_BI"]) == "en: so good</s>"
    assert shown(made["tokens_BL"]) == "<pad>gut" and shown(made["targets_BL"]) == asked(made) == "gut</s>"
    assert made["truncated_BL"].tolist() == [0, 0, 0, 0] and "prefix_BL" not in made


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_golden_decoder(mask):
    objective = build("decoder", length=32, prefix="en: ", mask=mask)
    made = example(objective)
    assert shown(made["tokens_BL"]) == "<s>en: so good<sep>gut" and shown(made["targets_BL"]) == "en: so good<sep>gut</s>"
    assert asked(made) == "gut</s>" and made["prefix_BL"].tolist() == [1] * 13 + [0] * 3 and objective.mask == mask
    assert asked(example(build("decoder", length=32, counted="all"))) == "so good<sep>gut</s>"


def test_golden_encoder_decoder_of_two_models(tmp_path):
    """BERT's vocabulary, which has neither bos nor eos: cls begins, sep ends."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "so", "good", "gut"]) + "\n")
    tokenizer = text.make("wordpiece", path=str(tmp_path), lowercase=True)
    objective = build(tokenizer=tokenizer, model_config=types.SimpleNamespace(kind="encoder_decoder", name="x", parts={}))
    (made,) = objective.features(document(tokenizer=tokenizer), rng=keyed_rng(0), draw=None)
    rows = [" ".join(tokenizer.pieces(made[name])) for name in ("inputs_BI", "tokens_BL", "targets_BL")]
    assert rows == ["[CLS] so good [SEP]", "[CLS] gut", "gut [SEP]"]
    assert objective.answer(document(tokenizer=tokenizer), [{"tokens": np.array([7, 3, 5]), "score": 0.0}])["prediction"] == "gut"


def test_without_a_target_the_question_is_the_same():
    made = example(build(), target=None)
    assert shown(made["inputs_BI"]) == "so good</s>" and shown(made["tokens_BL"]) == "<pad>" and not made["weights_BL"].any()
    made = example(build("decoder", length=32), target=None)
    assert shown(made["tokens_BL"]) == "<s>so good<sep>" and made["prefix_BL"].all() and not made["weights_BL"].any()


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder"])
def test_long_texts_are_cut_at_their_end_and_counted(kind, caplog):
    """The question is the same whatever the target; the share of cut examples is reported, and the log names the first."""
    length = 8 if kind == "encoder_decoder" else 16
    objective = build(kind, length=length, prefix="en: ", max_new_tokens=4)
    made, other, none = (example(objective, "abcdefgh" * 3, target) for target in ("gut gut gut gut", "gut", None))
    if kind == "encoder_decoder":
        assert shown(made["inputs_BI"]) == shown(other["inputs_BI"]) == shown(none["inputs_BI"]) == "en: abcdefghabc</s>"
        assert asked(made) == "gut gut</s>" and asked(other) == "gut</s>"
    else:
        assert [shown(given["tokens_BL"][given["prefix_BL"] > 0]) for given in (made, other, none)] == ["<s>en: abcdef<sep>"] * 3
        assert asked(made) == "gut </s>" and asked(other) == "gut</s>" and len(made["tokens_BL"]) == length
    assert [int(given["truncated_BL"].sum()) for given in (made, other, none, example(objective, "so", "gut"))] == [1, 1, 1, 0]
    assert caplog.text.count("cut at their end") == 1 and "the input of d1 has 24 tokens" in caplog.text
    assert objective.answer(document("abcdefgh" * 3), [{"tokens": CHARS.encode("gut"), "score": 0.0}])["truncated"]
    for content, target, what in (("abcdefgh" * 3, "gut", "input"), ("so", "gut gut gut gut gut", "target")):
        with pytest.raises(ConfigError, match=f"the {what} of record d1 has .* tokens"):
            example(build(kind, length=length, truncate=False), content, target)


def test_answers_end_at_the_end_token_and_references_suit_the_metrics():
    objective = build()
    generated = np.concatenate([CHARS.encode("gut"), [CHARS.eos_id], CHARS.encode("so")])
    assert objective.answer(document(), [{"tokens": generated, "score": np.float32(-1.5)}]) == {"prediction": "gut", "score": -1.5, "truncated": False}
    assert objective.reference(document()) == "gut" and objective.reference(document(target=None)) is None
    assert objective.reference(document(target=["gut", "so"])) == ["gut", "so"] and asked(example(objective, target=["gut", "so"])) == "gut</s>"
    assert build(metrics=("squad",)).reference(document()) == ["gut"] and objective.reference(document(target=3.8)) == "3.8"


def test_refused():
    for kind, options, parts in (
        ("decoder", {"max_new_tokens": 9}, "max_new_tokens=9 does not fit data.length=12.*1 to 8"),
        ("encoder_decoder", {"max_new_tokens": 13}, "1 to 12"),
        ("encoder_decoder", {"prefix": "good good good good"}, "inputs have 16 tokens"),
        ("encoder_decoder", {"packing": "concat"}, "data.packing=concat"),
    ):
        with pytest.raises(ConfigError, match=parts):
            build(kind, **options)
    for target in ([], ["gut", 3], {"en": "gut"}):
        with pytest.raises(ConfigError, match="the target of record d1"):
            example(build(), target=target)
    with pytest.raises(ConfigError, match="blue.*Did you mean 'bleu'"):
        seq2seq.Config(metrics=("blue",)).check("objective")
    with pytest.raises(ConfigError, match="counted=all"):
        seq2seq.Config(mask="prefix", counted="all").check("objective")


# --- the loss ---


@pytest.mark.parametrize("chunk", [1000, 6])
def test_smoothed_targets(chunk):
    """(1 - s) * tokens + s * smoothing is the cross entropy against targets of which s is spread over all pieces."""
    rng = np.random.default_rng(0)
    logits, targets, weights = rng.normal(0, 3, (2, 5, 7)), rng.integers(0, 7, (2, 5)), rng.integers(0, 2, (2, 5)).astype(float)
    sums, nats = zoo.jit(
        lambda logits: cross_entropy_and(lambda x: x, logits, jnp.asarray(targets), jnp.asarray(weights, jnp.float32), chunk=chunk, read=uniform_nats)
    )(jnp.asarray(logits, jnp.float32))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = 0.9 * np.eye(7)[targets] + 0.1 / 7
    expected = -(smooth * log_probs).sum(-1)
    np.testing.assert_allclose(0.9 * sums.nll + 0.1 * jnp.sum(nats * weights), (expected * weights).sum(), rtol=1e-5)


def test_smoothing_is_a_term_beside_the_likelihood():
    plain, smooth = (zoo.objective("seq2seq", "t5", label_smoothing=share) for share in (0.0, 0.1))
    assert plain.coefficients == {"tokens": 1.0} and smooth.coefficients == {"tokens": 0.9, "smoothing": 0.1}
    batch, model, params = zoo.batch("seq2seq", "t5"), zoo.model("t5"), zoo.params("t5")

    @zoo.jit
    def both(params, batch):
        (first, aux, _), (second, _, _) = (made.loss(model, params, batch, rng=None, carry=None, train=False) for made in (plain, smooth))
        return first, second, aux, state.weighted_sum(smooth, second, smooth.weights(batch))

    first, second, aux, whole = both(params, batch)
    weight = float(jnp.sum(batch["weights_BL"]))
    np.testing.assert_allclose(second["tokens"], first["tokens"], rtol=1e-6)
    np.testing.assert_allclose(whole, (0.9 * second["tokens"] + 0.1 * second["smoothing"]) / weight, rtol=1e-5)
    assert aux.ratios["truncated_share"] == (0, 8)


@pytest.mark.parametrize("family", ["t5", "gpt"])
def test_packed_rows_are_the_same_as_single_ones(family):
    made = zoo.objective("seq2seq", family)
    docs = zoo.examples("seq2seq", family, 4, length=4)
    model, params = zoo.model(family, heads=made.heads), zoo.params(family, heads=made.heads)
    packed, single = (
        zoo.stack([made.finish(zoo.row(content, made.lengths, made.fields)) for content in contents])
        for contents in ([docs[:2], docs[2:], [], []], [[doc] for doc in docs])
    )

    @zoo.jit
    def step(params, batch):
        return jax.value_and_grad(lambda params: made.loss(model, params, batch, rng=None, carry=None, train=False)[0]["tokens"])(params)

    (loss, grads), (expected, expected_grads) = step(params, packed), step(params, single)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    zoo.assert_equal_gradients(grads, expected_grads)


# --- answers ---


@pytest.mark.parametrize(("family", "mask"), [("t5", "causal"), ("gpt", "causal"), ("gpt", "prefix")])
def test_answers_are_those_of_the_most_likely_tokens_one_by_one(family, mask):
    """Generating from ragged questions, whose rows hold their targets too, equals asking the whole model for one more token each time, up to an end."""
    made = zoo.objective("seq2seq", family, mask=mask)
    docs = [document for length in (3, 7, 5) for document in zoo.documents(1, length=length, seed=length)]
    contents = [list(made.features(doc, rng=keyed_rng(0), draw=None)) for doc in docs]
    batch = zoo.stack([made.finish(zoo.row(content, made.lengths, made.fields)) for content in contents])
    model, params = zoo.model(family, heads=made.heads), zoo.params(family, heads=made.heads)
    found = np.asarray(zoo.jit(lambda params, batch: made.outputs(model, params, batch))(params, batch)["tokens"])
    assert found.shape == (3, made.new_tokens)

    @zoo.jit
    def most_likely(params, batch):
        hidden_BLD = model.hidden(params, batch, mask=made.mask, head="lm").hidden_BLD
        return jnp.argmax(model.logits(params, hidden_BLD, head="lm"), axis=-1)

    whole = {name: np.array(values) for name, values in batch.items() if name != "truncated_B"}
    given = np.ones(3, int) if made.paired else whole["prefix_BL"].sum(axis=1)
    for row, size in enumerate(given):
        whole["tokens_BL"][row, size:] = 0
        if made.paired:
            whole["tokens_BL"][row, 0] = zoo.Vocabulary.pad_id
    for turn in range(made.new_tokens):
        for row, size in enumerate(given):
            whole["segments_BL"][row] = np.arange(len(whole["segments_BL"][row])) < size + turn
            whole["positions_BL"][row] = np.arange(len(whole["segments_BL"][row]))
        guesses = np.asarray(most_likely(params, whole))
        for row, size in enumerate(given):
            token = guesses[row, size + turn - 1]
            ended = zoo.Vocabulary.eos_id in found[row, :turn]
            assert ended or token == found[row, turn], (row, turn)
            if size + turn < whole["tokens_BL"].shape[1]:
                whole["tokens_BL"][row, size + turn] = token
    assert len({tuple(tokens) for tokens in found.tolist()}) > 1


@pytest.mark.parametrize("family", ["t5", "gpt"])
def test_it_learns_to_write_what_is_asked_for(family, tmp_path):
    """One batch is overfit, and what is generated is the data's."""
    pairs = [(f"{a}{b}", f"{b}{a}{b}") for a in "abcd" for b in "wxyz"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"source": a, "wanted": b}) + "\n" for a, b in pairs))
    shape = {"num_layers": 2, "width": 32, "num_heads": 2, "dropout": 0.0}
    model = t5.Config(**shape, head_dim=16, mlp_width=64) if family == "t5" else gpt.Config(**shape, max_length=24, attention_dropout=0.0)
    run = run_lib.setup(
        config.base(
            model=model, objective=seq2seq.Config(input_length=12, prefix="say ", max_new_tokens=6, metrics=("exact_match",)),
            train=Train(steps=120, batch_size=16), schedule=Schedule(name="constant", warmup_steps=5),
            optimizer=Optimizer(learning_rate=1e-2 if family == "t5" else 5e-3),
            data=Data(source=(f"jsonl:{tmp_path}/pairs.jsonl",), columns=("text=source", "target=wanted"), length=24, packing="none", holdout=0.0),
            tokenizer=Tokenizer(kind="bytes"), log=Log(writers=()),
        ),
        devices=jax.devices()[:1],
    )  # fmt: skip
    with contextlib.closing(run.loader()) as loader:
        batch = run.to_device(next(loader), batch_size=16, rows=list(range(16)))
    values = run.init_state(run.init_params())
    for _ in range(120):
        values, metrics = run.train_step(values, batch)
    assert float(metrics["loss"]) < 0.05
    objective = run.objective
    docs = [Document(a, run.tokenizer.encode(a), {"target": b}) for a, b in pairs]
    contents = [list(objective.features(doc, rng=keyed_rng(0), draw=None)) for doc in docs]
    rows = zoo.stack([objective.finish(zoo.row(content, objective.lengths, objective.fields)) for content in contents])
    found = jax.device_get(zoo.jit(lambda params, batch: objective.outputs(run.model, params, batch))(values["params"], rows))
    answers = [objective.answer(doc, [{name: value[number] for name, value in found.items()}]) for number, doc in enumerate(docs)]
    assert [answer["prediction"] for answer in answers] == [objective.reference(doc) for doc in docs]
    assert all(-0.5 < answer["score"] < 0 for answer in answers)

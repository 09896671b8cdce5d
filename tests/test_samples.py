"""What a person reads of a run: rows of the first batch, text that goes on where the objective leaves off, and the summary's units."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import config, describe, samples
from ptm import run as run_lib
from ptm.config import Data, Log, Tokenizer, Train
from ptm.evals import loss
from ptm.generate.options import Options
from ptm.generate.search import generate
from ptm.models import bert, gpt, xlnet
from ptm.objectives import causal, classify, denoising, mlm, pairs, permutation, prefix

GPT = gpt.Config(**runs.SHAPE | {"vocab_size": None}, max_length=48)
BERT = bert.BertConfig(**runs.SHAPE | {"vocab_size": None}, max_length=48)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Lines of words with a label, which objectives without labels read as text alone."""
    path = tmp_path_factory.mktemp("corpus") / "lines.tsv"
    text = runs.corpus(path.with_suffix(".txt")).read_text().splitlines()
    path.write_text("sentence\tlabel\n" + "".join(f"{line}\t{number % 2}\n" for number, line in enumerate(text)))
    return f"tsv:{path}"


def made(source: str, model, objective) -> run_lib.Run:
    cfg = config.base(
        model=model, objective=objective, evals={"validation": loss.Config()}, train=Train(batch_size=8), log=Log(writers=()),
        data=Data(source=(source,), columns=("text=sentence", "label=label"), length=48), tokenizer=Tokenizer(kind="bytes", sentinels=8),
    )  # fmt: skip
    return run_lib.setup(cfg, devices=jax.devices()[:1])


def first_batch(run: run_lib.Run) -> dict[str, np.ndarray]:
    with contextlib.closing(run.loader()) as loader:
        return next(loader)


def numbers(shown: str, name: str) -> list[int]:
    return [int(number) for line in re.findall(rf"^ +{name} +([\d ]+)$", shown, flags=re.MULTILINE) for number in line.split()]


@pytest.mark.parametrize(
    ("model", "objective", "fields", "labels"),
    [
        (BERT, pairs.Config(), ["types_BL"], ["pair_label_B"]),
        (BERT, classify.Config(), ["types_BL"], ["label_BS"]),
        (GPT, prefix.Config(), ["prefix_BL"], []),
        (xlnet.Config(**runs.SHAPE | {"vocab_size": None}), permutation.Config(memory_length=8), ["rank_BL", "reversed_BL"], ["start_B"]),
    ],
    ids=["pairs", "classify", "prefix", "permutation"],
)
def test_show_batch_shows_all_that_the_model_is_told(source, model, objective, fields, labels):
    run = made(source, model, objective)
    batch, shown = first_batch(run), samples.show_batch(run, 1)
    real = batch["segments_BL"][0] > 0
    for name in fields:
        assert numbers(shown, name.removesuffix("_BL")) == batch[name][0][real].tolist() and real.any()
    for name in labels:
        values = batch[name][0][batch["index_BS"][0] < len(real)] if name.endswith("_BS") else [batch[name][0]]
        assert numbers(shown, name.rpartition("_")[0]) == list(values)


@pytest.mark.parametrize("objective", [prefix.Config(share=0.5), denoising.Config(variant="drop_tokens", mask="causal")], ids=["prefix", "causal_denoising"])
def test_the_prompt_is_what_the_objective_gives(source, objective, monkeypatch):
    """A decoder that was trained on input and target in one row goes on after an input of a row, whole, under the mask of its training."""
    run, prompts = made(source, GPT, objective), []

    def remember(run, params, prompt, *, new_tokens, temperature):
        prompts.append(prompt)
        return np.zeros((len(prompt["tokens_BL"]), new_tokens), np.int32)

    monkeypatch.setattr(samples, "_generate", remember)
    shown, batch = samples.sample(run, None), samples._first_rows(run)
    tokens, targets, weights = (batch[name][0][batch["segments_BL"][0] == 1] for name in ("tokens_BL", "targets_BL", "weights_BL"))
    given = tokens[: len(tokens) - int(weights.sum()) + 1]
    assert len(given) > 4 and targets[len(given) - 1] == [*tokens, None][len(given)]
    np.testing.assert_array_equal(prompts[0]["tokens_BL"][0], given)
    assert ("prefix_BL" in prompts[0]) == ("prefix_BL" in batch) and np.all(prompts[0].get("prefix_BL", 1) == 1)
    assert run.tokenizer.decode(given).strip() in shown


def test_generation_sees_the_prompt_as_in_training():
    """Greedy tokens under the prefix mask are the likeliest ones of the whole row, computed without a cache; the causal mask gives others."""
    model, params = zoo.model("gpt", heads=("lm",)), zoo.params("gpt", heads=("lm",))
    prompt = jnp.asarray(np.random.default_rng(0).integers(8, 40, (4, 6)), jnp.int32)
    batch = {"tokens_BL": prompt, "segments_BL": jnp.ones_like(prompt), "positions_BL": jnp.broadcast_to(jnp.arange(6), prompt.shape)}
    ends = {"eos_id": None, "pad_id": None, "vocab_size": zoo.VOCAB}
    go_on = functools.partial(generate, model, params, options=Options(), new_tokens=4, **ends, rng=jax.random.key(0))
    made_BN = go_on({**batch, "prefix_BL": jnp.ones_like(prompt)})[0][:, 0]
    whole = jnp.concatenate([prompt, made_BN], axis=1)
    row = {
        "tokens_BL": whole, "segments_BL": jnp.ones_like(whole), "positions_BL": jnp.broadcast_to(jnp.arange(10), whole.shape),
        "prefix_BL": jnp.broadcast_to(jnp.arange(10) < 6, whole.shape).astype(jnp.int32),
    }  # fmt: skip
    logits_BLV = zoo.jit(lambda row: model.logits(params, model.hidden(params, row, mask="prefix").hidden_BLD, head="lm"))(row)
    np.testing.assert_array_equal(jnp.argmax(logits_BLV, axis=-1)[:, 5:9], made_BN)
    assert not np.array_equal(go_on(batch)[0][:, 0], made_BN)


@pytest.mark.parametrize("model", [BERT, GPT], ids=["encoder", "decoder"])
def test_classification_has_nothing_to_sample(source, model):
    run = made(source, model, classify.Config())
    assert samples.sample(run, None) == ""


@pytest.mark.parametrize(
    ("model", "objective", "lines"),
    [
        (GPT, causal.Config(), ["validation loss           1.5000 nats a predicted token"]),
        (GPT, causal.Config(z_loss=0.1), ["validation loss           1.5000", "validation loss/tokens    1.2500 nats a predicted token"]),
        (BERT, mlm.Config(), ["validation loss           1.5000 nats a predicted token"]),
        (BERT, pairs.Config(), ["validation loss           1.5000", "validation loss/tokens    1.2500 nats a predicted token"]),
        (BERT, classify.Config(), ["validation loss           1.5000"]),
    ],
    ids=["causal", "z", "mlm", "pairs", "classify"],
)
def test_only_the_term_of_tokens_is_in_nats_a_token(source, model, objective, lines, monkeypatch):
    monkeypatch.setattr(describe, "sample", lambda run, params: "")
    run = made(source, model, objective)
    terms = run.objective.coefficients
    evals = {"validation/loss": 1.5, **({f"validation/loss/{term}": 1.25 for term in terms} if len(terms) > 1 else {})}
    shown = [line.strip() for line in describe.summary(run, None, evals, 1.0).splitlines()]
    assert [line for line in shown if line.startswith("validation")] == lines

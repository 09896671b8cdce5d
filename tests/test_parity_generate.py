"""Our generation against the reference library's, token for token: the same parameters, prompts and options.

Needs torch and transformers (`pip install -e .[parity]`; pytest -m parity). Two tokens whose scores are as good as equal may change places by rounding;
such ties are told apart from errors by the reference's own scores, counted and printed.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import numpy as np
import pytest
from test_parity import CASES, reference

from ptm import hf
from ptm.generate import processors
from ptm.generate.options import Options
from ptm.generate.search import generate
from ptm.hf import transfer

pytestmark = pytest.mark.parity
PAD, NEW, ROWS = 0, 14, 6
LONGER = {"gpt2": {"n_positions": 48}, "llama": {"max_position_embeddings": 48}, "mistral": {"max_position_embeddings": 48}, "t5": {}, "t5_1.1": {}}
TIE = 1e-3  # nats between two candidates that rounding may exchange
OPTIONS = {
    "greedy": Options(),
    "greedy_penalty": Options(repetition_penalty=1.7),
    "greedy_ngram": Options(no_repeat_ngram=2),
    "greedy_unigram": Options(no_repeat_ngram=1, min_new_tokens=4),
    "beams": Options(beams=4),
    "beams_sum": Options(beams=4, length_penalty=0.0, n_best=4),
    "beams_long": Options(beams=4, length_penalty=2.0, n_best=2),
    "beams_short": Options(beams=4, length_penalty=-1.0, early_stopping=True, n_best=4),
    "beams_early": Options(beams=4, early_stopping=True, min_new_tokens=3),
    "beams_penalty": Options(beams=4, repetition_penalty=1.3, no_repeat_ngram=3),
    "beams_two": Options(beams=2, n_best=2),
}
BY_ROW = ("greedy_penalty", "greedy_ngram", "greedy_unigram", "beams_penalty")  # the reference takes padding for a part of the text


def lively(model: Any) -> None:
    """Random models with tied embeddings repeat one token; not where the last norm turns half of the directions round."""
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith("wte.weight"):
            parameter.sub_(parameter.mean(0)).div_(parameter.norm(dim=1, keepdim=True))
        if name.endswith("ln_f.bias"):
            parameter.zero_()
        if name.endswith(("ln_f.weight", "decoder.final_layer_norm.weight")):
            parameter.copy_(3 * torch.randn_like(parameter))


LIVELY = {"gpt2": {"prepare": lively, "scale": 20.0}, "t5": {"prepare": lively}}


@functools.cache
def models(name: str) -> tuple[Any, Any, Any]:
    """(the reference's model, ours, our parameters)"""
    import tempfile
    from pathlib import Path

    case = CASES[name]
    theirs = reference(dataclasses.replace(case, options=case.options | LONGER[name], **(LIVELY[name] if name in LIVELY else {})))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        imported = hf.read(Path(folder))
    return theirs, transfer.model(imported.config, imported.heads), jax.tree.map(jax.numpy.asarray, imported.params)


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of ragged prompts, padded on the left; no token is PAD."""
    rng = np.random.default_rng(3)
    lengths = np.array([9, 1, 5, 7, 9, 3])
    tokens = rng.integers(2, 61, (ROWS, 9))
    return np.where(np.arange(9) >= 9 - lengths[:, None], tokens, PAD).astype(np.int32), lengths


def batch_of(paired: bool) -> dict[str, np.ndarray]:
    tokens, lengths = prompts()
    real = (np.arange(9) >= 9 - lengths[:, None]).astype(np.int32)
    if not paired:
        return {"tokens_BL": tokens, "segments_BL": real, "positions_BL": np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)}
    turned = np.stack([np.roll(x, size) for x, size in zip(tokens, lengths)])
    ones = np.ones((ROWS, 1), np.int32)
    positions = np.tile(np.arange(9, dtype=np.int32), (ROWS, 1))
    inputs = {"inputs_BI": turned, "input_segments_BI": (turned != PAD).astype(np.int32), "input_positions_BI": positions}
    return {**inputs, "tokens_BL": PAD * ones, "segments_BL": ones, "positions_BL": 0 * ones}


def their_texts(model: Any, options: Options, eos: int | None, rows: slice, *, padded: bool) -> types.SimpleNamespace:
    """Texts [B, n_best, NEW], PAD behind their ends, scores, and the reference's own distributions; padding is cut off unless `padded`."""
    import torch

    paired = model.config.is_encoder_decoder
    batch = batch_of(paired)
    names = ("inputs_BI", "input_segments_BI") if paired else ("tokens_BL", "segments_BL")
    ids, mask = (torch.from_numpy(batch[name][rows].astype(np.int64)) for name in names)
    if not padded:
        ids = ids[:, mask[0] > 0]
        mask = torch.ones_like(ids)
    o = options
    beams = {"length_penalty": o.length_penalty, "early_stopping": o.early_stopping} if o.beams > 1 else {}
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=o.min_new_tokens, do_sample=False, num_beams=o.beams, **beams,
        num_return_sequences=o.n_best, repetition_penalty=o.repetition_penalty, no_repeat_ngram_size=o.no_repeat_ngram or 0, eos_token_id=eos,
        pad_token_id=PAD, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    made = out.sequences[:, 1 if paired else ids.shape[1] :].numpy()
    texts = np.full((len(made), NEW), PAD)
    for n, text in enumerate(made):
        ends = np.flatnonzero(text == eos) if eos is not None else []
        size = ends[0] + 1 if len(ends) else len(text)
        texts[n, :size] = text[:size]
    scores = out.sequences_scores.numpy().reshape(-1, o.n_best) if o.beams > 1 else None
    return types.SimpleNamespace(texts=texts.reshape(-1, o.n_best, NEW), scores=scores, steps=np.stack([step.numpy() for step in out.scores], axis=1))


@functools.cache
def an_end(name: str) -> int:
    """A token at which the greedy texts of a model end at different lengths, some of them early, some not at all."""
    texts = their_texts(models(name)[0], Options(), None, slice(None), padded=True).texts[:, 0]
    lengths = {token: [int(np.argmax(text == token)) if token in text else NEW for text in texts] for token in np.unique(texts) if token > 1}
    return int(max(lengths, key=lambda token: (len(set(lengths[token])), NEW in lengths[token], -token)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LONGER)
def test_same_texts(name, options):
    pytest.importorskip("torch", reason="needs the extra parity")
    pytest.importorskip("transformers", reason="needs the extra parity")
    (theirs, model, params), o, eos = models(name), OPTIONS[options], an_end(name)
    ours, scores = generate(
        model, params, batch_of(model.config.kind == "encoder_decoder"), options=o, new_tokens=NEW, eos_id=eos, pad_id=PAD, vocab_size=61,
        rng=jax.random.key(0),
    )  # fmt: skip
    ours = np.asarray(ours)
    parts = [slice(n, n + 1) for n in range(ROWS)] if options in BY_ROW else [slice(None)]
    found = [their_texts(theirs, o, eos, part, padded=options not in BY_ROW) for part in parts]
    expected = np.concatenate([part.texts for part in found])
    wrong = {n for n in range(ROWS) if not np.array_equal(ours[n], expected[n])}
    ties = {n for n in wrong if _tied(found, n, ours[n], expected[n], scores[n])}
    print(f"{name} {options}: {len(ties)} of {ROWS} prompts differ by a tie, {len(wrong - ties)} otherwise")
    assert wrong == ties and len(ties) <= 1, [(ours[n], expected[n]) for n in sorted(wrong - ties)]
    if o.beams > 1:
        right = sorted(set(range(ROWS)) - wrong)
        np.testing.assert_allclose(np.asarray(scores)[right], np.concatenate([part.scores for part in found])[right], rtol=1e-4, atol=1e-4)
    assert len({tuple(text) for text in expected[:, 0]}) > 2 and np.mean([len(set(text)) for text in expected[:, 0]]) > 2, "it needs different texts"


def _tied(found: list[Any], n: int, ours: np.ndarray, expected: np.ndarray, scores: Any) -> bool:
    """Whether another choice of row `n` is one among equals: of greedy search at the first token that differs, of beams by the scores of the texts."""
    part, row = (found[n], 0) if len(found) > 1 else (found[0], n)
    if part.scores is not None:
        return bool(np.all(np.abs(np.asarray(scores) - part.scores[row]) < TIE))
    first = int(np.argmax(ours[0] != expected[0]))
    return part.steps[row, first, expected[0, first]] - part.steps[row, first, ours[0, first]] < TIE


@pytest.mark.parametrize("name", LONGER)
def test_the_best_two_logits_differ(name):
    """What makes the comparison one: hardly a step of greedy search, over all prompts, is a tie."""
    pytest.importorskip("torch", reason="needs the extra parity")
    steps = their_texts(models(name)[0], Options(), None, slice(None), padded=True).steps
    best = np.sort(steps, axis=-1)
    ties = best[..., -1] - best[..., -2] < TIE
    print(f"{name}: {int(ties.sum())} of {ties.size} steps are ties")
    assert ties.mean() < 0.02


def test_same_processors():
    """Each processor on random logits and histories, and all in a row."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    library = pytest.importorskip("transformers", reason="needs the extra parity").generation.logits_process
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (16, 200)).astype(np.float32)
    history = rng.integers(0, 12, (16, 30)).astype(np.int32)
    real = np.ones_like(history, bool)

    def check(theirs: list[Any], ours: Any) -> None:
        expected = torch.from_numpy(logits.copy())
        for processor in theirs:
            expected = processor(torch.from_numpy(history.astype(np.int64)), expected)
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected.numpy()))
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)

    for penalty in (0.5, 1.3):
        check([library.RepetitionPenaltyLogitsProcessor(penalty)], processors.penalise_repetition(logits, history, real, penalty=penalty))
    for size in (1, 2, 3, 30, 31, 32):
        check([library.NoRepeatNGramLogitsProcessor(size)], processors.ban_ngrams(logits, history, real, count=30, size=size))
    for k in (1, 7, 500):
        check([library.TopKLogitsWarper(k)], processors.keep_top_k(logits, k=k))
    for p in (0.05, 0.5, 0.9, 0.999):
        check([library.TopPLogitsWarper(p)], processors.keep_top_p(logits, p=p))
    for p in (0.01, 0.3, 1.0):
        check([library.MinPLogitsWarper(p)], processors.keep_min_p(logits, p=p))
    for made in (3, 9):
        forbidden = library.MinNewTokensLengthLogitsProcessor(30 - made, 5, torch.tensor([4]))
        check([forbidden], processors.forbid(logits, token=4, when=np.bool_(made < 5)))
    everything = Options(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, no_repeat_ngram=2, min_new_tokens=5)
    in_a_row = [
        library.RepetitionPenaltyLogitsProcessor(1.2), library.NoRepeatNGramLogitsProcessor(2),
        library.MinNewTokensLengthLogitsProcessor(28, 5, torch.tensor([4])), library.TemperatureLogitsWarper(0.7), library.TopKLogitsWarper(40),
        library.TopPLogitsWarper(0.9), library.MinPLogitsWarper(0.02),
    ]  # fmt: skip
    check(in_a_row, processors.process(logits, everything, history_BT=history, valid_BT=real, count=30, made=2, eos_id=4))

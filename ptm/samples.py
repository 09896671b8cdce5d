"""What a model has learned, for a person to read: text that goes on, blanks and spans that are filled."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.data import pipeline
from ptm.generate.options import Options
from ptm.generate.search import generate
from ptm.run import Run

ROWS = 3
SHOWN = ("tokens_BL", "targets_BL", "weights_BL", "segments_BL", "positions_BL")  # fields that are shown as words; all others as numbers


def sample(run: Run, params: Any) -> str:
    """Lines that show the model at its own objective, on text of the validation split (of the training split for a run without evals).

    Empty where there is nothing to show: an encoder that was not trained to fill blanks, classification. All processes of a run must call it.
    """
    objective = run.objective
    if run.model.config.kind == "encoder_decoder":
        return _filled_spans(run, params)
    if run.model.config.kind == "decoder":
        return _continuation(run, params) if "lm" in objective.heads else ""
    return _filled_blanks(run, params) if objective.mask == "full" and objective.heads[0] == "mlm" else ""


def _first_rows(run: Run) -> dict[str, np.ndarray]:
    """ROWS rows, or more where the devices split a batch into more: the same on all processes."""
    shape, config = run.layout.mesh.shape, run.config
    parts = shape["data"] * shape["fsdp"]
    rows = -(-ROWS // parts) * parts
    if not config.evals:
        with contextlib.closing(run.loader(rows=range)) as loader:
            batch = next(loader)
        return {name: np.resize(values, (rows, *values.shape[1:])) for name, values in batch.items()}
    return next(pipeline.validation_batches(config.data, featurizer=run.objective, tokenizer=run.tokenizer, seed=config.seed, batch_size=rows))


def _generate(run: Run, params: Any, prompt: dict[str, np.ndarray], *, new_tokens: int, temperature: float) -> np.ndarray:
    tokenizer, options = run.tokenizer, Options(temperature=temperature)
    ends = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "vocab_size": tokenizer.vocab_size}
    made = jax.jit(functools.partial(generate, run.model, options=options, new_tokens=new_tokens, **ends), out_shardings=run.layout.replicated())
    return np.asarray(made(params, prompt, rng=jax.random.key(run.config.seed))[0][:, 0])


def _first_segment(batch: dict[str, np.ndarray], row: int, name: str = "segments_BL") -> slice:
    return slice(0, int((batch[name][row] == 1).sum()))


def _cut(ids: np.ndarray, end: int | None) -> np.ndarray:
    ends = np.flatnonzero(ids == end) if end is not None else []
    return ids[: ends[0]] if len(ends) else ids


def _pieces(run: Run, ids: np.ndarray) -> list[str]:
    """Pieces of a vocabulary, line breaks and other control characters spelt out."""
    return ["".join(c if c.isprintable() else repr(c)[1:-1] for c in piece) for piece in run.tokenizer.pieces(ids)]


def _readable(text: str) -> str:
    """Indented; what a terminal would obey instead of show, such as escape sequences, is replaced."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "    " + shown.strip().replace("\n", "\n    ")


def _continuation(run: Run, params: Any) -> str:
    """The first text of a row goes on after what the objective gives of it; of causal language modelling, which gives nothing, after a quarter of a row."""
    batch = _first_rows(run)
    part = _first_segment(batch, 0)
    tokens, given = batch["tokens_BL"][0][part], int(np.argmax(batch["weights_BL"][0][part] > 0)) + 1
    if given == 1 and run.objective.mask == "causal":
        given = max(1, min(len(tokens), run.config.data.length // 4))
    prompt = np.tile(tokens[:given], (len(batch["tokens_BL"]), 1))
    inputs = {"tokens_BL": prompt, "segments_BL": np.ones_like(prompt), "positions_BL": np.broadcast_to(np.arange(given, dtype=np.int32), prompt.shape)}
    if run.objective.mask == "prefix":
        inputs["prefix_BL"] = np.ones_like(prompt)
    ids = _generate(run, params, inputs, new_tokens=max(1, run.config.data.length - given), temperature=0.8)
    text = run.tokenizer.decode(_cut(ids[0], run.tokenizer.eos_id))
    return f"  prompt:\n{_readable(run.tokenizer.decode(prompt[0]))}\n  generated (temperature 0.8):\n{_readable(text)}"


def _filled_blanks(run: Run, params: Any) -> str:
    batch = _first_rows(run)

    def guess(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        hidden_BLD = run.model.hidden(params, batch, mask=run.objective.mask, head=run.objective.heads[0]).hidden_BLD
        logits_BLV = run.model.logits(params, hidden_BLD, head=run.objective.heads[0])
        return jnp.argmax(logits_BLV[..., : run.tokenizer.vocab_size], axis=-1)

    guesses_BL = np.asarray(jax.jit(guess, out_shardings=run.layout.replicated())(params, batch))
    lines = []
    for row in range(ROWS):
        part = _first_segment(batch, row)
        pieces = _pieces(run, batch["tokens_BL"][row][part])
        for index in np.flatnonzero(batch["weights_BL"][row][part]):
            truth, guessed = _pieces(run, (batch["targets_BL"][row][index], guesses_BL[row][index]))
            pieces[index] = f"[{truth}]" if guessed == truth else f"[{guessed}, not {truth}]"
        lines.append(_readable(" ".join(pieces[:48])))
    return "  filled blanks (in brackets; wrong ones with the true piece):\n" + "\n".join(lines)


def _filled_spans(run: Run, params: Any) -> str:
    batch = _first_rows(run)
    start = np.full((len(batch["tokens_BL"]), 1), run.tokenizer.pad_id, np.int32)
    prompt = {
        "inputs_BI": batch["inputs_BI"], "input_segments_BI": np.int32(batch["input_segments_BI"] == 1),
        "tokens_BL": start, "segments_BL": np.ones_like(start), "positions_BL": np.zeros_like(start),
    }  # fmt: skip
    ids = _generate(run, params, prompt, new_tokens=run.config.data.length, temperature=0.0)
    lines = []
    for row in range(ROWS):
        inputs, targets = batch["inputs_BI"][row][_first_segment(batch, row, "input_segments_BI")], batch["targets_BL"][row][_first_segment(batch, row)]
        shown = {"input": inputs, "target": targets, "filled": ids[row]}
        texts = {name: run.tokenizer.decode(_cut(value, run.tokenizer.eos_id)) for name, value in shown.items()}
        lines += [_readable(f"{name}: {' '.join(text.split())[:300]}") for name, text in texts.items()]
    return "  filled spans (greedy):\n" + "\n".join(lines)


def show_batch(run: Run, rows: int) -> str:
    """The first `rows` rows of the first training batch, decoded: pieces by segment, what is predicted, padding, and all that else the model is told."""
    run = run.at(0)
    with contextlib.closing(run.loader()) as loader:
        batch = next(loader)
    return "\n\n".join(_show_row(run, {name: value[row] for name, value in batch.items()}, row) for row in range(min(rows, len(batch["tokens_BL"]))))


def _show_row(run: Run, row: dict[str, np.ndarray], number: int) -> str:
    lines = [f"row {number}", *(f"  {name.removesuffix('_B')} {value:g}" for name, value in row.items() if name.endswith("_B"))]
    if "index_BS" in row:  # what is said of the texts of the row
        texts = row["index_BS"] < len(row["segments_BL"])
        lines += [f"  {name.removesuffix('_BS')} {' '.join(map(str, row[name][texts]))}" for name in row if name.endswith("_BS") and name != "index_BS"]
    others = [name for name in row if name.endswith("_BL") and name not in SHOWN]
    for name, segments in (("inputs_BI", "input_segments_BI"), ("tokens_BL", "segments_BL")):
        if name not in row:
            continue
        length, real = len(row[segments]), int((row[segments] > 0).sum())
        lines.append(f"  {name}: {real} of {length} positions, {length - real} padding, {int(row[segments].max())} segments")
        for segment in range(1, int(row[segments].max()) + 1):
            here = row[segments] == segment
            pieces = _pieces(run, row[name][here])
            lines.append(f"    segment {segment}, positions {row[segments.replace('segments', 'positions')][here].min()}..{row[segments.replace('segments', 'positions')][here].max()}")
            lines.append(f"      tokens   {' '.join(pieces)}")
            if name == "inputs_BI":
                continue
            lines += [f"      {other.removesuffix('_BL'):<8} {' '.join(map(str, row[other][here]))}" for other in others]
            if "targets_BL" in row:
                targets, weights = _pieces(run, row["targets_BL"][here]), row["weights_BL"][here]
                lines.append(f"      targets  {' '.join(piece if weight else '.' for piece, weight in zip(targets, weights))}")
                lines.append(f"      predicted positions {int((weights > 0).sum())} of {len(weights)}, attention {run.objective.mask}")
    return "\n".join(lines)

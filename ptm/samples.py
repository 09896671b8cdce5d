"""What a model has learned, for a person to read: text that goes on, blanks and spans that are filled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptm.generate.sampling import generate
from ptm.run import Run


def sample(run: Run, params: Any) -> str:
    """Lines that show the model at its own objective, on text of the validation split."""
    batch = jax.tree.map(np.asarray, jax.device_get(next(run.validation(run.config.train.batch_size))))
    if run.model.config.kind == "encoder_decoder":
        return _filled_spans(run, params, batch)
    return _filled_blanks(run, params, batch) if "target_index_BS" in batch else _continuation(run, params, batch)


def _first_segment(batch: dict[str, np.ndarray], row: int, name: str = "segments_BL") -> slice:
    return slice(0, int((batch[name][row] == 1).sum()))


def _cut(ids: np.ndarray, end: int | None) -> np.ndarray:
    ends = np.flatnonzero(ids == end) if end is not None else []
    return ids[: ends[0]] if len(ends) else ids


def _readable(text: str) -> str:
    return "    " + text.strip().replace("\n", "\n    ")


def _continuation(run: Run, params: Any, batch: dict[str, np.ndarray]) -> str:
    tokens = batch["tokens_BL"][0][_first_segment(batch, 0)]
    prompt = tokens[: max(1, min(len(tokens), run.config.data.length // 4))][None]
    new_tokens = run.config.data.length - prompt.shape[1]
    inputs = {"tokens_BL": prompt, "segments_BL": np.ones_like(prompt), "positions_BL": np.arange(prompt.shape[1])[None]}
    ids = generate(
        run.model, params, jax.tree.map(jnp.asarray, inputs), new_tokens=new_tokens, vocab_size=run.tokenizer.vocab_size, temperature=0.8,
        rng=jax.random.key(run.config.seed),
    )  # fmt: skip
    text = run.tokenizer.decode(_cut(np.asarray(ids[0]), run.tokenizer.eos_id))
    return f"  prompt from the validation split:\n{_readable(run.tokenizer.decode(prompt[0]))}\n  generated (temperature 0.8):\n{_readable(text)}"


def _filled_blanks(run: Run, params: Any, batch: dict[str, np.ndarray], rows: int = 3) -> str:
    hidden = run.model.hidden(params, jax.tree.map(jnp.asarray, batch), mask=run.objective.mask).hidden_BLD
    lines = []
    for row in range(min(rows, len(hidden))):
        part = _first_segment(batch, row)
        pieces = run.tokenizer.pieces(batch["tokens_BL"][row][part])
        for index in np.flatnonzero(batch["weights_BL"][row][part]):
            logits = run.model.logits(params, hidden[row, index][None, None], head="mlm")[0, 0]
            guess = int(jnp.argmax(logits[: run.tokenizer.vocab_size]))
            truth = int(batch["targets_BL"][row][index])
            names = run.tokenizer.pieces(np.asarray([guess, truth]))
            pieces[index] = f"[{names[0]}]" if guess == truth else f"[{names[0]}, not {names[1]}]"
        lines.append(_readable(" ".join(pieces[:48])))
    return "  filled blanks (in brackets; wrong ones with the true piece):\n" + "\n".join(lines)


def _filled_spans(run: Run, params: Any, batch: dict[str, np.ndarray], rows: int = 3) -> str:
    lines = []
    for row in range(min(rows, len(batch["tokens_BL"]))):
        inputs = batch["inputs_BI"][row][_first_segment(batch, row, "input_segments_BI")][None]
        targets = batch["targets_BL"][row][_first_segment(batch, row)]
        start = np.full((1, 1), run.tokenizer.pad_id, np.int32)
        prompt = {
            "inputs_BI": inputs, "input_segments_BI": np.ones_like(inputs), "tokens_BL": start, "segments_BL": np.ones_like(start),
            "positions_BL": np.zeros_like(start),
        }  # fmt: skip
        ids = generate(
            run.model, params, jax.tree.map(jnp.asarray, prompt), new_tokens=len(targets), vocab_size=run.tokenizer.vocab_size, temperature=0.0,
            rng=jax.random.key(0),
        )  # fmt: skip
        shown = {"input": inputs[0], "target": targets, "filled": np.asarray(ids[0])}
        lines += [f"    {name}: {run.tokenizer.decode(_cut(value, run.tokenizer.eos_id))[:300].strip()}" for name, value in shown.items()]
    return "  filled spans (greedy):\n" + "\n".join(lines)


def show_batch(run: Run, rows: int) -> str:
    """The first `rows` rows of the first training batch, decoded: pieces by segment, what is predicted, padding."""
    loader = run.loader()
    batch = next(loader)
    loader.close()
    return "\n\n".join(_show_row(run, {name: value[row] for name, value in batch.items()}, row) for row in range(min(rows, len(batch["tokens_BL"]))))


def _show_row(run: Run, row: dict[str, np.ndarray], number: int) -> str:
    lines = [f"row {number}"]
    for name, segments in (("inputs_BI", "input_segments_BI"), ("tokens_BL", "segments_BL")):
        if name not in row:
            continue
        length, real = len(row[segments]), int((row[segments] > 0).sum())
        lines.append(f"  {name}: {real} of {length} positions, {length - real} padding, {int(row[segments].max())} segments")
        for segment in range(1, int(row[segments].max()) + 1):
            here = row[segments] == segment
            pieces = run.tokenizer.pieces(row[name][here])
            lines.append(f"    segment {segment}, positions {row[segments.replace('segments', 'positions')][here].min()}..{row[segments.replace('segments', 'positions')][here].max()}")
            lines.append(f"      tokens   {' '.join(pieces)}")
            if name == "tokens_BL":
                targets, weights = run.tokenizer.pieces(row["targets_BL"][here]), row["weights_BL"][here]
                lines.append(f"      targets  {' '.join(piece if weight else '.' for piece, weight in zip(targets, weights))}")
                lines.append(f"      predicted positions {int((weights > 0).sum())} of {len(weights)}, attention {run.objective.mask}")
    return "\n".join(lines)

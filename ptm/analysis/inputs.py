"""Texts as a model reads them, with its special tokens, in batches of few lengths."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ptm.fields import ConfigError
from ptm.models import Model

SHORTEST = 16  # tokens; lengths of batches are this times powers of 2, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Row:
    """A text, or two, between special tokens; `body` are the indices of the tokens of the first text.

    `inputs_I` is what an encoder-decoder's encoder reads, tokens_L then what its decoder does.
    """

    tokens_L: np.ndarray
    types_L: np.ndarray
    body: slice
    inputs_I: np.ndarray | None = None


def framed(tokenizer: Any, config: Any, ids: np.ndarray, second: np.ndarray | None = None) -> Row:
    """A text as a family reads it: cls text sep (second sep), with the cls last where the family has its summary there; bos (or eos) text for decoders.

    For encoder-decoders the first text is the encoder's, with an eos, and the second one, behind the padding piece, the decoder's. Special tokens that
    the vocabulary has not are left out.
    """

    def piece(token: int | None) -> list[int]:
        return [] if token is None else [token]

    if config.kind == "encoder_decoder":
        if tokenizer.pad_id is None:
            raise ConfigError(f"the tokenizer has no padding piece, with which a decoder of {config.name} begins.")
        inputs_I = np.concatenate([ids, piece(tokenizer.eos_id)]).astype(np.int32)
        tokens_L = np.concatenate([[tokenizer.pad_id], [] if second is None else second]).astype(np.int32)
        return Row(tokens_L, np.zeros(len(tokens_L), np.int32), slice(1, len(tokens_L)), inputs_I)
    if config.kind == "decoder":
        start = piece(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
        parts = [start, ids] if second is None else [start, ids, piece(tokenizer.sep_id), second]
        types = [0] * len(parts)
        first = 1
    else:
        sep, cls = piece(tokenizer.sep_id), piece(tokenizer.cls_id)
        parts, types = [ids, sep], [0, 0]
        if second is not None:
            parts, types = [*parts, second, sep], [*types, 1, 1]
        last = config.summary == "last"
        parts, types = ([*parts, cls], [*types, 2]) if last else ([cls, *parts], [0, *types])
        first = 0 if last else 1
    at = sum(map(len, parts[:first]))
    most = config.num_types - 1 if hasattr(config, "num_types") else 0
    types_L = np.minimum(np.repeat(np.array(types, np.int32), list(map(len, parts))), most)
    return Row(np.concatenate(parts).astype(np.int32), types_L.astype(np.int32), slice(at, at + len(ids)))


def length_of(row: Row) -> int:
    """Tokens of a row, of an encoder-decoder those of its longer side."""
    return max(len(row.tokens_L), 0 if row.inputs_I is None else len(row.inputs_I))


def fits(row: Row, config: Any) -> bool:
    """Whether a family's model can read a row."""
    return config.max_length is None or length_of(row) <= config.max_length


def mask_of(model: Model, trained: str) -> str:
    """The mask that a model is looked at under: causal for decoders, and for encoders that were `trained` so; else full."""
    return "causal" if model.config.kind != "encoder" or trained == "causal" else "full"


def rows_at_once(model: Model, wanted: int) -> int:
    """`wanted` rows, or as many more as the devices share equally."""
    shape = model.module.context.layout.mesh.shape
    parts = shape["data"] * shape["fsdp"]
    return -(-wanted // parts) * parts


def batch_of(rows: Sequence[Row], config: Any, *, count: int) -> dict[str, np.ndarray]:
    """`count` rows, those that are not given being padding, of the smallest length of SHORTEST x 2**n that holds them."""
    batch = _side([row.tokens_L for row in rows], count, ("tokens_BL", "segments_BL", "positions_BL"))
    if config.kind == "encoder_decoder":
        return batch | _side([row.inputs_I for row in rows], count, ("inputs_BI", "input_segments_BI", "input_positions_BI"))
    if hasattr(config, "num_types"):
        batch["types_BL"] = _padded([row.types_L for row in rows], count)
    return batch


def _padded(arrays: Sequence[np.ndarray], count: int) -> np.ndarray:
    out = np.zeros((count, padded_length(max(map(len, arrays)))), np.int32)
    for n, array in enumerate(arrays):
        out[n, : len(array)] = array
    return out


def _side(arrays: Sequence[np.ndarray], count: int, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
    return {
        names[0]: _padded(arrays, count), names[1]: _padded([np.ones(len(array)) for array in arrays], count),
        names[2]: _padded([np.arange(len(array)) for array in arrays], count),
    }  # fmt: skip


def padded_length(length: int) -> int:
    """The smallest SHORTEST x 2**n that is `length` or more."""
    size = SHORTEST
    while size < length:
        size *= 2
    return size


def batches(rows: Sequence[Row], config: Any, *, count: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(which rows, their batch): rows of like length together, `count` at once."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        key = (padded_length(len(row.tokens_L)), 0 if row.inputs_I is None else padded_length(len(row.inputs_I)))
        by_length.setdefault(key, []).append(number)
    for _, numbers in sorted(by_length.items()):
        for start in range(0, len(numbers), count):
            part = numbers[start : start + count]
            yield part, batch_of([rows[number] for number in part], config, count=count)

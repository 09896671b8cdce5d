"""The contract between objectives and the pipeline: what a document is, what a row is made of, and how host randomness is keyed.

Field names end in their dimensions: `B` rows, `L` positions of a row, `S` selected positions, `I` positions of an encoder's row.
`weights_BL` is the only loss mask; padding is segment 0, real segments count from 1.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

SOURCE = "source_BLG"  # beside the fields of an objective, where there are several sources: which of the G each position is from, one-hot, int8
Example = dict[str, np.ndarray]
Draw = Callable[[np.random.Generator], "Document"]


@dataclasses.dataclass(frozen=True)
class Document:
    """A tokenized document: its stable id, its token ids (int32, no special tokens), the other fields of its record, and its source's place in the config."""

    id: str
    tokens_L: np.ndarray
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: int = 0


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: its type, the value of padding, and the tokenizer's ids or plain numbers (for showing it)."""

    dtype: Any = np.int32
    pad: int | float = 0
    is_tokens: bool = False


class Featurizer(Protocol):
    """The host half of an objective, all that the pipeline knows of it. Must be pure: the same arguments give the same examples."""

    lengths: dict[str, int]  # sizes of the dimensions that rows have: {"L": 128}, {"L": 114, "I": 512}, {"L": 128, "S": 25}
    fields: dict[str, Field]  # fields that `features` yields, without segments and positions: {"tokens_BL": Field(is_tokens=True), ...}
    packing: str  # default packing: concat, first_fit or none
    raw_length: int | None  # documents are cut into pieces of so many tokens before `features`; None = whole documents
    max_segments: int | None  # the most examples that a row may hold; None = as many as fit
    visits: int | None  # the randomness of a document repeats after so many epochs: 1 = static masking; None = fresh each epoch

    def features(self, doc: Document, *, rng: np.random.Generator, draw: Draw) -> Iterator[Example]:
        """Examples of one document, each field a one-dimensional array (or a scalar) named as in `fields` and no longer than its row."""
        ...

    def finish(self, row: Example) -> Example:
        """A packed row with segments and positions, made ready for the device (selected positions, say); pure."""
        ...


def reads_records(featurizer: Featurizer) -> bool:
    """Whether it names the fields of records that it needs besides their text (objectives.protocol.Task): such a record is read whole or not at all."""
    return hasattr(featurizer, "columns")


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, such as (seed, record id, visit): not on host, batch or order."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

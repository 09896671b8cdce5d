"""Counts of a preparation: plain names with whole numbers, whose sums are the same in whatever order parts are added."""

from collections import Counter
from collections.abc import Iterable, Mapping

from ptm.prepare import words
from ptm.prepare.stages import Document

Counts = Mapping[str, int]


def of_read(document: Document, rule: str | None) -> dict[str, int]:
    """Counts of a document that was read, with the rule that removed it, or None."""
    size = 0 if document.text is None else len(document.text.encode())
    return {"read/documents": 1, "read/bytes": size, **of_removed(rule)}


def of_removed(rule: str | None, *, count: int = 1) -> dict[str, int]:
    """Counts of documents that a rule removes; of None, nothing."""
    return {f"removed/{rule}": count} if rule and count else {}


def of_kept(text: str, split: str, tokens: int | None) -> dict[str, int]:
    """Counts of a document of the data set; `tokens` is None where there is no tokenizer."""
    size, script = len(text.encode()), words.script(text)
    counts = {f"{split}/documents": 1, f"{split}/bytes": size, f"{split}/characters": len(text)}
    if tokens is not None:
        counts[f"{split}/tokens"] = tokens
    return {**counts, f"script/{script}/documents": 1, f"script/{script}/bytes": size, f"length/{len(text).bit_length()}": 1}


def total(parts: Iterable[Counts]) -> dict[str, int]:
    """The sum of counts, in the order of their names."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update(part)
    return dict(sorted(found.items()))

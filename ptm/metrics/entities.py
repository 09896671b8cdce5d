"""Entities of tagged words, counted as seqeval does it: an entity is right if its type and all its words are."""

from collections import Counter
from collections.abc import Sequence

from ptm.fields import ConfigError
from ptm.metrics.labels import scores

Entity = tuple[str, int, int]  # type, first word, one past the last


def _split(tag: str) -> tuple[str, str]:
    """(B, I, E, S or O; type) of a tag such as B-PER; one without a type has the type '_'."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind or "_"


def entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of a sentence in the lenient reading of conlleval (Tjong Kim Sang and De Meulder 2003): IOB1, IOB2, IOE and IOBES alike.

    An entity begins at B or S, at I or E after none or after one of another type, and ends where the next one begins, after E or S, and at O.
    """
    found: set[Entity] = set()
    kind, start = None, 0
    for n, tag in enumerate([*tags, "O"]):
        prefix, type_ = _split(tag)
        inside = prefix in ("B", "I", "E", "S")
        if kind is not None and (not inside or prefix in ("B", "S") or type_ != kind):
            found.add((kind, start, n))
            kind = None
        if inside and kind is None:
            kind, start = type_, n
        if prefix in ("E", "S") and kind is not None:
            found.add((kind, start, n + 1))
            kind = None
    return found


def strict_entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of a sentence in strict IOB2: one begins at B and goes on through I of its type; an I elsewhere is none. Raises ConfigError for other tags."""
    found: set[Entity] = set()
    kind, start = None, 0
    for n, tag in enumerate([*tags, "O"]):
        prefix, type_ = _split(tag)
        if prefix not in ("B", "I", "O"):
            raise ConfigError(f"tag '{tag}' is not of IOB2, which has B-TYPE, I-TYPE and O; use entity_f1 without :iob2 for other schemes.")
        if kind is not None and not (prefix == "I" and type_ == kind):
            found.add((kind, start, n))
            kind = None
        if prefix == "B":
            kind, start = type_, n
    return found


READINGS = {None: entities, "iob2": strict_entities}


def entity_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, option: str | None = None) -> dict[str, float]:
    """{precision, recall, f1} over all entities and f1/TYPE of each type; `option` iob2 reads tags strictly, else seqeval's default.

    Raises ConfigError where a sentence has another number of tags than its reference.
    """
    if option not in READINGS:
        raise ConfigError(f"metric entity_f1:{option}; allowed: entity_f1 (lenient) and entity_f1:iob2 (strict).")
    hits, predicted, true = Counter(), Counter(), Counter()
    for number, (ours, theirs) in enumerate(zip(predictions, references)):
        if len(ours) != len(theirs):
            raise ConfigError(f"entity_f1: sentence {number} has {len(ours)} predicted tags and {len(theirs)} true ones.")
        found, there = READINGS[option](ours), READINGS[option](theirs)
        for counter, these in ((hits, found & there), (predicted, found), (true, there)):
            counter.update(kind for kind, _, _ in these)
    overall = dict(zip(("precision", "recall", "f1"), scores(hits.total(), predicted.total(), true.total())))
    return overall | {f"f1/{kind}": scores(hits[kind], predicted[kind], true[kind])[2] for kind in sorted({*predicted, *true})}

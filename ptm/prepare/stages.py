"""The stages of a preparation as pure functions over plain records; `local` and clusters call the same ones, so that their records are equal.

    read       the documents of a unit of work                                         (reading)
    examine    normalise; filters; contamination: the text that stays, or the rule that removes it
    exact      of equal `digest`s the smallest key stays
    near       of those, a record goes when a smaller key shares a band and is similar  (sketch)
    finish     split and shard by hashes, token ids: the record that is written

A key (source, file, place) orders records as their sources have them.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ptm import text as tokenizers
from ptm.fields import ConfigError
from ptm.prepare import filters
from ptm.prepare.contamination import Index
from ptm.prepare.options import Options

SPLITS = ("train", "validation")
SPLIT_KEY = b"ptm prepare split"
SHARD_KEY = b"ptm prepare shard"
CONTAMINATED, EXACT, NEAR, BAD, EMPTY = "contaminated", "exact", "near", "bad", "empty"
NOTHING_LEFT = "no document is left. `--dry_run=1000` counts what each rule removes of the first thousand."


class Key(NamedTuple):
    """Where a record stands: the number of its source, of the file among the sorted ones of the source, and its line (or number) in it. Tuples compare."""

    source: int
    file: int
    place: int


class Document(NamedTuple):
    """A record as it was read; `text` is None for one that cannot be used, and `problem` says why ('empty' is a rule, not a fault)."""

    key: Key
    id: str
    text: str | None
    problem: str = ""


class Examined(NamedTuple):
    """A document that stays, with its normalised text; or the `rule` that removed it, and no text."""

    text: str | None
    rule: str | None


def normalise(text: str, options: Options) -> str:
    """The text in the Unicode form that is asked for, with line ends as \\n."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if options.unicode == "none" or text.isascii() else unicodedata.normalize(options.unicode, text)


def examine(text: str, options: Options, index: Index | None) -> Examined:
    """What filters and evaluation sets say of a document; rules of the latter are contaminated:NAME."""
    text = normalise(text, options)
    rule = filters.verdict(text, options)
    if rule is None and index is not None and (name := index.found(text, options.eval_share)):
        rule = f"{CONTAMINATED}:{name}"
    return Examined(None, rule) if rule else Examined(text, None)


def judge(document: Document, options: Options, index: Index | None) -> Examined:
    """`examine` of a document that was read; the rule of one that could not be is `empty` or `bad`."""
    if document.text is None:
        return Examined(None, EMPTY if document.problem == EMPTY else BAD)
    return examine(document.text, options, index)


def require_few(bad: Sequence[Sequence[str]], options: Options) -> None:
    """Raises ConfigError for more bad records, (id, reason) each, than the options allow."""
    if len(bad) > options.max_bad_records:
        shown = "; ".join(f"{id}: {reason}" for id, reason in bad[:5])
        raise ConfigError(
            f"more than --max_bad_records={options.max_bad_records} records cannot be read: {shown}{'; ...' if len(bad) > 5 else ''}."
            " Mend the source, or raise --max_bad_records."
        )


def digest(text: str) -> bytes:
    """16 bytes that stand for a text; documents with equal ones are exact duplicates."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split(text: str, options: Options) -> str:
    """The split of a document, which depends on its text and the seed alone."""
    key = SPLIT_KEY + options.seed.to_bytes(8, "little")
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big") / 2**64
    return SPLITS[place < options.validation]


def shards(size: int, options: Options) -> int:
    """The number of shards of a split of so many bytes of UTF-8 text."""
    return max(1, -(-size // options.shard_bytes))


def shard_hash(id: str) -> int:
    """64 bits that say where a record goes, whatever the number of shards."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8, key=SHARD_KEY).digest(), "big")


def shard(id: str, count: int) -> int:
    """The shard of a record among `count`; within a shard records stand in the order of their keys."""
    return shard_hash(id) % count


@functools.lru_cache(maxsize=2)
def tokenizer(spec: str | None) -> Any:
    """The tokenizer KIND[:PATH], or None. Raises ConfigError."""
    if spec is None:
        return None
    kind, _, path = spec.partition(":")
    if not path and tokenizers.needs_files(kind):
        raise ConfigError(f"--tokenizer={spec}: kind '{kind}' has a vocabulary; give --tokenizer={kind}:PATH.")
    return tokenizers.make(kind, path=path or None)


def token_type(vocabulary: Any) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds all ids of a tokenizer."""
    return np.uint16 if vocabulary.vocab_size <= 1 << 16 else np.uint32


def finish(id: str, text: str, options: Options) -> dict[str, Any]:
    """The record that is written: `id`, `text` and `tokens` (uint16 or uint32, without special tokens), as the options say."""
    record: dict[str, Any] = {"id": id, "text": text} if options.keep_ids else {"text": text}
    vocabulary = tokenizer(options.tokenizer)
    if vocabulary is not None:
        record["tokens"] = np.asarray(vocabulary.encode(text)).astype(token_type(vocabulary))
    return record

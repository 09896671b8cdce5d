"""A tokenizer.json of the tokenizers library, read as it is."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Pipeline

from ptm.fields import ConfigError
from ptm.text.base import MOST_PIECES, Tokenizer, spelled_offsets, text_of
from ptm.text.bpe import readable, spelled_bytes
from ptm.text.sentencepiece import SPACE
from ptm.text.wordpiece import join_punctuation, library_ids, library_offsets, word_text


class FileTokenizer(Tokenizer):
    """tokenizer.json, whose pieces are spelled as WordPiece, as GPT-2's bytes or as sentencepiece spells them.

    Its own lower-casing and normalisation apply. Special pieces written out in a text are not looked for, but a unigram model that
    holds them among its pieces may still give them.
    """

    kind = "file"
    files_needed = ("tokenizer.json",)

    def __init__(self, files: dict[str, bytes], *, lowercase: bool = False, sentinels: int = 0):
        """Raises ConfigError if the file is damaged or if it cannot be told how its pieces spell text."""
        try:
            pipeline = Pipeline.from_str(text_of(files["tokenizer.json"], what="tokenizer.json"))
            first = pipeline.encode("a", add_special_tokens=False).tokens[:1]
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"tokenizer.json is not a file of the tokenizers library ({error}).") from None
        pipeline.no_padding()
        pipeline.no_truncation()
        pipeline.encode_special_tokens = True
        self._pipeline = pipeline
        content = json.loads(pipeline.to_str())
        size = max(pipeline.get_vocab().values(), default=-1) + 1
        if not 0 < size <= MOST_PIECES:
            raise ConfigError(f"tokenizer.json has ids up to {size - 1}; allowed: 1 to {MOST_PIECES} pieces.")
        unknown = content["model"].get("unk_token")
        if unknown is not None and unknown not in content["model"]["vocab"]:
            raise ConfigError(f"tokenizer.json has unk_token={unknown!r}, which is none of its pieces; add it to them, or name the one that stands for unknown words.")
        names = [pipeline.id_to_token(i) or "" for i in range(size)]
        added = {token["id"] for token in content["added_tokens"]}
        controls = [token["id"] for token in content["added_tokens"] if token["special"]]
        mark, prefix = None, False
        if content["model"]["type"] in ("WordPiece", "WordLevel"):
            mark, prefix = content["model"].get("continuing_subword_prefix", ""), True
            texts = [word_text(name.removeprefix(mark), continues=mark != "" and name.startswith(mark)) for name in names]
        elif "ByteLevel" in _types(content["pre_tokenizer"]) | _types(content["decoder"]):
            texts = [name.encode() if i in added else spelled_bytes(name) for i, name in enumerate(names)]
            names = [name if i in added else readable(name) for i, name in enumerate(names)]
        elif any(name.startswith(SPACE) for name in names):
            texts = [bytes([int(name[3:5], 16)]) if _is_byte(name) else name.replace(SPACE, " ").encode() for name in names]
            prefix = "".join(first).startswith(SPACE)
        else:
            raise ConfigError(
                "tokenizer.json: cannot tell how its pieces spell text; allowed: WordPiece or WordLevel models, byte-level BPE, pieces with '▁' for a space."
            )
        super().__init__(
            files=files, lowercase=lowercase, sentinels=sentinels, names=names, texts=texts, controls=controls, strip_prefix=prefix,
            normalizer=None if mark is None else pipeline.normalizer,
        )  # fmt: skip
        self.keeps_spaces = mark is None
        self._starts = None if mark is None else np.array([mark == "" or not name.startswith(mark) for name in self._names])

    def _of_library(self, encode: Callable[[Pipeline, str], Any], text: str) -> Any:
        try:
            return encode(self._pipeline, text)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"tokenizer.json cannot encode {text[:40]!r} ({error}); give its model a piece for what it does not know.") from None

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a text, without the special pieces that the file's post-processor would add."""
        return self._of_library(library_ids, text)

    def _encode_with_offsets(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Ids and where they stand, as the library follows them through the file's own normalisation."""
        ids, starts, ends = self._of_library(library_offsets, text)
        turns = np.flatnonzero(np.diff(starts, prepend=-1) | np.diff(ends, prepend=-1))
        for first, last in itertools.pairwise([*turns, len(ids)]):
            # Bytes of several characters without a piece all have the place of these together.
            where, widths = text[starts[first] : ends[first]], self.token_bytes[ids[first:last]]
            if last > first + 1 and widths.sum() == len(where.encode()):
                starts[first:last], ends[first:last] = np.add(spelled_offsets(where, widths), starts[first])
        return ids, starts, ends

    def decode(self, ids: Iterable[int]) -> str:
        """Text as the kind of the model has it: exact for byte-level BPE, words joined by spaces for WordPiece."""
        text = super().decode(ids)
        return text if self._starts is None else join_punctuation(text)

    def word_starts(self, ids: Iterable[int]) -> np.ndarray:
        """Which of `ids` begin a word, as for the kind of the model."""
        return super().word_starts(ids) if self._starts is None else self._starts[self._checked(ids)]


def _types(node: dict | list | None) -> set[str]:
    """Names of all components within a part of tokenizer.json."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*map(_types, node.values()))


def _is_byte(name: str) -> bool:
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", name) is not None

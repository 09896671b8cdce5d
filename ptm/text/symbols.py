"""Vocabularies without a model: the 256 bytes, and the characters of a text."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from ptm.fields import ConfigError
from ptm.text.base import SPECIALS, Tokenizer, json_of


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes at ids 3 to 258 after <pad> </s> <unk>, as ByT5 has them (Xue et al. 2022, section 3.1), other special pieces behind."""

    kind = "bytes"
    files_needed = ()
    space_leads = False
    _first = 3

    def __init__(self, files: dict[str, bytes], *, lowercase: bool = False, sentinels: int = 0):
        """`files` is empty: all is known."""
        symbols = [bytes([b]) for b in range(256)]
        names = [symbol.decode("utf-8", "backslashreplace") for symbol in symbols]
        names = [*SPECIALS[: self._first], *names, *SPECIALS[self._first :]]
        texts = [b""] * self._first + symbols + [b""] * (len(SPECIALS) - self._first)
        super().__init__(files=files, lowercase=lowercase, sentinels=sentinels, names=names, texts=texts)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, algorithm: str, lowercase: bool, specials: bool) -> dict[str, bytes]:
        """No files: bytes need no training."""
        return {}

    def _encode(self, text: str) -> np.ndarray:
        """One id a byte."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first


class CharTokenizer(Tokenizer):
    """The distinct characters of a text in the order of their code points; special pieces, where asked for, follow them."""

    kind = "chars"
    files_needed = ("chars.json",)
    space_leads = False

    def __init__(self, files: dict[str, bytes], *, lowercase: bool = False, sentinels: int = 0):
        """`chars.json` is the list of pieces; those of several characters are special."""
        names = json_of(files["chars.json"], what="chars.json")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
            raise ConfigError("chars.json must hold a list of distinct strings: one character each, or the name of a special piece.")
        unknown = [name for name in names if len(name) > 1 and name not in SPECIALS]
        if unknown:
            raise ConfigError(f"chars.json holds {unknown[0]!r}; allowed: single characters and {', '.join(SPECIALS)}.")
        super().__init__(files=files, lowercase=lowercase, sentinels=sentinels, names=names, texts=[name.encode() for name in names])
        self._ids = {name: i for i, name in enumerate(names) if len(name) == 1}

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, algorithm: str, lowercase: bool, specials: bool) -> dict[str, bytes]:
        """The characters of `texts`, however many; `specials` adds pad, eos, unk, bos, mask, cls and sep behind them."""
        chars = sorted(set().union(*texts))
        if not chars:
            raise ConfigError("no text to take characters from.")
        return {"chars.json": json.dumps([*chars, *(SPECIALS if specials else ())]).encode()}

    def _encode(self, text: str) -> np.ndarray:
        """One id a character. Raises ConfigError on a character that is not known if the vocabulary has no <unk>."""
        try:
            ids = [self._ids[char] for char in text] if self.unk_id is None else [self._ids.get(char, self.unk_id) for char in text]
        except KeyError as error:
            char = error.args[0]
            raise ConfigError(
                f"character {char!r} (U+{ord(char):04X}) is not among the {len(self._ids)} of this vocabulary, which has no <unk>. "
                "Build it from text that holds all characters, or with special pieces."
            ) from None
        return np.array(ids, np.int32)

    def _encode_with_offsets(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """One character an id; <unk> stands for one too."""
        return self._encode(text), np.arange(len(text)), np.arange(len(text)) + 1

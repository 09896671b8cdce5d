"""Byte-level BPE as GPT-2 and RoBERTa use it (Radford et al. 2019, section 2.2)."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer as Pipeline
from tokenizers import models, pre_tokenizers, trainers

from ptm.fields import ConfigError
from ptm.text.base import SPECIALS, Tokenizer, json_of, refuse_large, refuse_small, text_of
from ptm.text.wordpiece import library_ids

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# GPT-2 spells each byte as one printable character: printable Latin-1 as itself, the others from U+0100 on.
SPELLING = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


def spelled_bytes(name: str) -> bytes:
    """Bytes of a piece in GPT-2's spelling; a piece that is not spelled so (an added one) is its own text."""
    return bytes(SPELLING[char] for char in name) if SPELLING.keys() >= set(name) else name.encode()


def readable(name: str) -> str:
    """A piece in GPT-2's spelling as the text that it stands for, bytes that are no text as \\xNN."""
    return spelled_bytes(name).decode("utf-8", "backslashreplace")


class BpeTokenizer(Tokenizer):
    """vocab.json and merges.txt; every text round-trips."""

    kind = "bpe"
    files_needed = ("vocab.json", "merges.txt")

    def __init__(self, files: dict[str, bytes], *, lowercase: bool = False, sentinels: int = 0):
        """The files of a published or trained vocabulary. Raises ConfigError where one does not go with the other."""
        vocab = json_of(files["vocab.json"], what="vocab.json")
        if not isinstance(vocab, dict) or set(map(type, vocab.values())) != {int} or set(vocab.values()) != set(range(len(vocab))):
            raise ConfigError("vocab.json must map each piece to its id, the ids being 0, 1, 2, ... without gaps.")
        missing = sorted(SPELLING.keys() - vocab.keys())
        if missing:
            raise ConfigError(f"vocab.json lacks {len(missing)} of the 256 byte pieces ({missing[0]!r}, ...); it is no byte-level BPE vocabulary.")
        names = sorted(vocab, key=vocab.__getitem__)
        texts = [spelled_bytes(name) for name in names]
        super().__init__(files=files, lowercase=lowercase, sentinels=sentinels, names=[readable(name) for name in names], texts=texts)
        lines = text_of(files["merges.txt"], what="merges.txt").replace("\r\n", "\n").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        try:
            self._pipeline = _pipeline(models.BPE(vocab=vocab, merges=merges))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"merges.txt does not go with vocab.json: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, algorithm: str, lowercase: bool, specials: bool) -> dict[str, bytes]:
        """Special pieces, the 256 bytes in their spelling's order, then merges by frequency."""
        refuse_small(vocab_size, smallest=len(SPECIALS) + 256)
        pipeline = _pipeline(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=sorted(SPELLING), show_progress=False)
        pipeline.train_from_iterator(_not_empty(texts), trainer)
        model = json.loads(pipeline.to_str())["model"]
        refuse_large(vocab_size, largest=len(model["vocab"]))
        return {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
            "merges.txt": ("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])).encode(),
        }

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a text as the reference gives them, without a space put before it."""
        return library_ids(self._pipeline, text)


def _pipeline(model: models.BPE) -> Pipeline:
    pipeline = Pipeline(model)
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # letters apart from signs, so no text merges into a special piece
    return pipeline


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ConfigError("no text to train a vocabulary on.")

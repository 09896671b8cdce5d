"""A vocabulary of a given size that nothing was read or trained for: shapes and special pieces, where no text will pass (`ptm plan`)."""

import numpy as np

from ptm.text.base import SPECIALS, Tokenizer


class StandIn(Tokenizer):
    """All special pieces, then pieces without meaning, one byte of text each in the sums; each character of a text is one of them."""

    kind = "stand_in"
    files_needed = ()

    def __init__(self, files: dict[str, bytes] | None = None, *, vocab_size: int, lowercase: bool = False, sentinels: int = 0):
        """`vocab_size` counts the special pieces, but not the sentinels, as the kinds that are trained do."""
        names = [*SPECIALS, *(f"piece{n}" for n in range(max(1, vocab_size - len(SPECIALS))))]
        texts = [b"" if name in SPECIALS else b"x" for name in names]
        super().__init__(files=files or {}, lowercase=lowercase, sentinels=sentinels, names=names, texts=texts)

    def _encode(self, text: str) -> np.ndarray:
        ordinary = self.vocab_size - len(self.sentinels) - len(SPECIALS)
        return np.array([len(SPECIALS) + ord(character) % ordinary for character in text], np.int32)

"""Pieces that were added to a vocabulary: where they stand in a text, which is looked for before the vocabulary's own kind sees the text."""

from collections.abc import Sequence

import numpy as np
from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Pipeline

from ptm.fields import ConfigError
from ptm.text.boundaries import is_cjk

REST = ""  # what is no added piece, in the eyes of the library


class Added:
    """Pieces in the order of their ids, from `first_id` on, and the bytes that each stands for.

    The longest piece at the leftmost place counts. Where `words` is set, as in kinds that put a space before each word, a piece is a whole word or
    several, with that space among its bytes, but not if it begins with a Chinese character. Text and pieces go through `normalizer` (lower-casing, say)
    before they are compared.
    """

    def __init__(self, pieces: Sequence[str], *, first_id: int, words: bool, normalizer: normalizers.Normalizer | None) -> None:
        for piece in pieces:
            if not piece or piece.isspace() or words and piece != piece.strip():
                allowed = "text that begins and ends with a word" if words else "text"
                raise ConfigError(f"the added piece {piece!r} can be no piece of this vocabulary; allowed: {allowed}.")
        self.pieces = [piece if normalizer is None else normalizer.normalize_str(piece) for piece in pieces]
        if "" in self.pieces:
            raise ConfigError(f"the added piece {pieces[self.pieces.index('')]!r} is nothing once it is normalised; take it out of the list.")
        whole = [words and not is_cjk(np.array([ord(piece[0])]))[0] for piece in self.pieces]
        self.texts = [b" " * word + piece.encode() for word, piece in zip(whole, self.pieces)]
        self._first_id = first_id
        # A model that knows nothing: all between two added pieces is one unknown word.
        self._pipeline = Pipeline(models.WordLevel({REST: 0}, unk_token=REST))
        if normalizer is not None:
            self._pipeline.normalizer = normalizer
        self._pipeline.add_tokens([AddedToken(piece, single_word=word, normalized=normalizer is not None) for word, piece in zip(whole, self.pieces)])

    def split(self, text: str) -> list[tuple[str | int, int, int]]:
        """A text as (part, start, end): ids of added pieces and the texts between them, none of which is empty, and where they stand in it."""
        parts: list[tuple[str | int, int, int]] = []
        end = 0
        found = self._pipeline.encode(text)
        for number, (start, stop) in zip(found.ids, found.offsets):
            if number:
                parts += [(text[end:start], end, start), (self._first_id + number - 1, start, stop)]
                end = stop
        return [part for part in [*parts, (text[end:], end, len(text))] if part[0] != ""]

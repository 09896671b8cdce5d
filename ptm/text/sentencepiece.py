"""SentencePiece models (Kudo and Richardson 2018): published ones as their model's authors use them, and lossless ones trained here."""

import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece
from tokenizers import normalizers

from ptm.fields import ConfigError
from ptm.text.base import SPECIALS, Tokenizer, refuse_large, refuse_small, spelled_offsets

SPACE = "▁"
CHUNK = 4096  # characters of one training sentence; the trainer's longest, in bytes, follows from it
PROBE = "  \ta\n\u00a0é ﬁ "  # comes back unchanged from a model that normalises nothing


class Traced(NamedTuple):
    """Characters that were made of a text, and the characters text[start:end] that each was made of."""

    chars: str
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, text: str) -> "Traced":
        """A text as it is."""
        return cls(text, np.arange(len(text)), np.arange(len(text)) + 1)

    def each(self, parts: Sequence[str]) -> "Traced":
        """The characters with `parts` in their places, one a character, of any length."""
        counts = [len(part) for part in parts]
        return Traced("".join(parts), np.repeat(self.starts, counts), np.repeat(self.ends, counts))

    def lower(self) -> "Traced":
        """Lower-cased as str.lower does it, which looks around before it chooses one of the two small sigmas."""
        return self.each([char.lower() for char in self.chars])._replace(chars=self.chars.lower())

    def cleaned(self) -> "Traced":
        """What `_clean` makes of the characters."""
        kept = [n for n, char in enumerate(self.chars) if not char.isspace() or n and not self.chars[n - 1].isspace()]
        traced = Traced("".join(" " if self.chars[n].isspace() else self.chars[n] for n in kept), self.starts[kept], self.ends[kept])
        if traced.chars.endswith(" "):
            traced = Traced(traced.chars[:-1], traced.starts[:-1], traced.ends[:-1])
        for quotes in ("``", "''"):
            traced = traced._quoted(quotes)
        parts = [unicodedata.normalize("NFKD", char) for char in traced.chars]
        return traced.each(["".join(c for c in part if not unicodedata.combining(c)) for part in parts])

    def _quoted(self, quotes: str) -> "Traced":
        firsts = np.array([match.start() for match in re.finditer(quotes, self.chars)], int)
        kept = np.setdiff1d(np.arange(len(self.chars)), firsts + 1)
        ends = self.ends.copy()
        ends[firsts] = self.ends[firsts + 1]
        return Traced(self.chars.replace(quotes, '"'), self.starts[kept], ends[kept])

    def places(self, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places among these characters as places in the text that they were made of."""
        begun = np.append(self.starts, self.ends[-1:] if len(self.ends) else 0)
        return begun[starts], np.where(ends > starts, self.ends[ends - 1] if len(self.ends) else 0, begun[starts])


class SentencePieceTokenizer(Tokenizer):
    """A .model file. Models trained here round-trip every text; special pieces are control symbols, which no text gives."""

    kind = "sentencepiece"
    files_needed = ("spiece.model",)
    can_lowercase = True

    def __init__(self, files: dict[str, bytes], *, lowercase: bool = False, sentinels: int = 0):
        """`lowercase` lower-cases text before the model sees it; ALBERT's and XLNet's models are known by their pieces and get their own preprocessing."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=files["spiece.model"])
            model, size = self._model, self._model.get_piece_size()
            names = [model.id_to_piece(i) for i in range(size)]
            texts = [bytes([int(names[i][3:5], 16)]) if model.is_byte(i) else names[i].replace(SPACE, " ").encode() for i in range(size)]
            controls = [i for i in range(size) if model.is_control(i) or model.is_unknown(i)]
            prefix = model.encode("a", out_type=str)[0].startswith(SPACE)
        except (RuntimeError, ValueError, IndexError) as error:  # also of pieces that are no text or no byte, and of a model that gives none
            raise ConfigError(f"the sentencepiece model cannot be read ({error}); is it the right file?") from None
        known = {names[i] for i in controls}
        albert, xlnet = {"[CLS]", "[SEP]", "[MASK]"} <= known, {"<cls>", "<sep>", "<eod>"} <= known
        super().__init__(
            files=files, lowercase=lowercase, sentinels=sentinels, names=names, texts=texts, controls=controls, strip_prefix=prefix,
            normalizer=normalizers.Lowercase() if lowercase or albert else None,
        )  # fmt: skip
        self._cleans, self._lowercases = albert or xlnet, lowercase or albert
        # In the model's eyes U+2581 is a space; a lossless model spells it in bytes instead.
        lossless = model.is_byte(model.piece_to_id("<0x00>")) and not prefix and self.decode(model.encode(PROBE)) == PROBE
        self._space_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()] if lossless else None

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, algorithm: str, lowercase: bool, specials: bool) -> dict[str, bytes]:
        """A unigram or BPE model of exactly `vocab_size` pieces, among them the special ones and the 256 bytes."""
        model = io.BytesIO()
        pad, eos, unk, bos, *controls = SPECIALS
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts, lowercase=lowercase),
                model_writer=model,
                model_type=algorithm,
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * CHUNK,
                pad_id=0, pad_piece=pad, eos_id=1, eos_piece=eos, unk_id=2, unk_piece=unk, bos_id=3, bos_piece=bos,
                control_symbols=controls,
                num_threads=16,  # part of the result: each thread's sums are added in its order
                minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            if found := re.search(r"set it to a value <= (\d+)", str(error)):
                refuse_large(vocab_size, largest=int(found[1]))
            if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
                refuse_small(vocab_size, smallest=int(found[1]))
            raise ConfigError(f"sentencepiece could not train a vocabulary of {vocab_size} pieces on this text: {error}") from None
        return {"spiece.model": model.getvalue()}

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a text; published models' own user-defined symbols are found in it, as their reference does."""
        if self._cleans:
            text = _clean(text)
        if self._lowercases:
            text = text.lower()
        if self._cleans:
            return np.array(self._split_numbers(text), np.int32)
        if self._space_ids is None or SPACE not in text:
            return np.array(self._model.encode(text), np.int32)
        first, *rest = [self._model.encode(part) for part in text.split(SPACE)]
        return np.array(first + [i for part in rest for i in self._space_ids + part], np.int32)

    def _encode_with_offsets(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Ids and where they stand; characters that are one unknown piece have its place together."""
        traced = Traced.of(text)
        if self._cleans:
            traced = traced.cleaned()
        if self._lowercases:
            traced = traced.lower()
        if self._space_ids is not None:
            ids = self._encode(text)
            return ids, *traced.places(*spelled_offsets(traced.chars, self.token_bytes[ids]))
        found = self._model.encode(traced.chars, return_type="offset_mapping")
        ids, pieces, places = found["ids"], found["pieces"], np.array(found["offsets"], np.int32).reshape(-1, 2)
        # The model gives a character's place to the last of its bytes or letters alone: here to all of them.
        for token in reversed(range(len(ids) - 1)):
            if places[token, 0] == places[token, 1] and pieces[token] != SPACE:
                places[token, 1] = places[token + 1, 1]
        spelled = np.cumsum([1 if self._model.is_byte(i) else len(_letters(piece).encode()) for i, piece in zip(ids, pieces)])
        for token, (_, end) in enumerate(places):
            if end < len(traced.chars) and len(unicodedata.normalize("NFKC", traced.chars[end])) > 1:
                places[token, 1] += len(_letters(self._model.normalize(traced.chars[:end])).encode()) < spelled[token]
        if self._cleans:
            numbers = list(map(self._number, pieces))
            ids = [self._model.piece_to_id(part) for parts in numbers for part in parts]
            places = np.array([place for parts, (start, end) in zip(numbers, places) for place in _shared(parts, start, end)], np.int32).reshape(-1, 2)
        return ids, *traced.places(*places.T)

    def _split_numbers(self, text: str) -> list[int]:
        """Ids with the comma after a digit as a piece of its own, as ALBERT's and XLNet's `encode_pieces` give them."""
        return [self._model.piece_to_id(part) for piece in self._model.encode(text, out_type=str) for part in self._number(piece)]

    def _number(self, piece: str) -> list[str]:
        """The pieces that a piece becomes if it is a number with a comma behind it; else the piece."""
        if len(piece) < 2 or piece[-1] != "," or not piece[-2].isdigit():
            return [piece]
        parts = self._model.encode(piece[:-1].replace(SPACE, ""), out_type=str)
        if not piece.startswith(SPACE) and parts[0].startswith(SPACE):
            parts = [part for part in (parts[0][1:], *parts[1:]) if part]
        return [*parts, ","]


def _letters(piece: str) -> str:
    return piece.replace(SPACE, "")


def _shared(parts: Sequence[str], start: int, end: int) -> list[tuple[int, int]]:
    """The places of pieces that share one, each as long as its letters, from the end on; the first has what is left."""
    places = []
    for part in reversed(parts[1:]):
        before = max(start, end - len(_letters(part)))
        places.append((before, end))
        end = before
    return [(start, end), *reversed(places)]


def _clean(text: str) -> str:
    """Preprocessing of ALBERT's and XLNet's published code: single spaces, plain double quotes, no accents."""
    text = " ".join(text.split()).replace("``", '"').replace("''", '"')
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def _sentences(texts: Iterable[str], *, lowercase: bool) -> Iterator[str]:
    """Texts cut to what the trainer takes: it skips longer sentences without an error."""
    empty = True
    for text in texts:
        text = text.lower() if lowercase else text
        for start in range(0, len(text), CHUNK):
            empty = False
            yield text[start : start + CHUNK]
    if empty:
        raise ConfigError("no text to train a vocabulary on.")

"""What every tokenizer is: ids of its special pieces, the bytes that each id stands for, and the way to disk and back.

A kind says how its vocabulary files turn into pieces and how text turns into ids; all else follows here from one table, the UTF-8
bytes that each id stands for, so that decoding, word starts and bits per byte agree with each other by construction.
"""

import abc
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from ptm import untrusted
from ptm.fields import ConfigError
from ptm.text import boundaries
from ptm.text.added import Added

META = "meta.json"
ADDED = "added.json"
FORMAT = 1
# Published names of each role, in order of preference.
ROLES = {
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<s>",),
    "eos": ("</s>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
}
# Special pieces of a vocabulary that is made here, in the order of their ids; pad, eos, unk as in T5 and ByT5.
SPECIALS = ("<pad>", "</s>", "<unk>", "<s>", "<mask>", "<cls>", "<sep>")
SENTINEL = re.compile(r"<extra_id_([0-9]{1,7})>")
MOST_PIECES = 1 << 23  # of a vocabulary; published ones have up to 2**18
UNSEEN = "\N{REPLACEMENT CHARACTER}".encode()  # what a sentence holds where its text is not known
WHITESPACE = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)


class Tokenizer(abc.ABC):
    """Text to ids and back.

    `pad_id`, `bos_id`, `eos_id`, `unk_id`, `mask_id`, `cls_id`, `sep_id` are None where the vocabulary has no such piece (with <s>
    and <mask> but no classifier piece, as in RoBERTa, <s> and </s> are also cls and sep). `sentinels` are the ids of <extra_id_0>,
    <extra_id_1>, ...; those that are added to a vocabulary follow it in T5's order, <extra_id_0> last. `special_ids` are all
    ids that stand for no text. `token_bytes` (int32 [vocab_size]) is the length in UTF-8 bytes of the text that an id stands for: 0 for
    special ids, the space before a word counts 1, so that for lossless kinds (bytes, chars, bpe, sentencepiece trained here) the sum
    over a text is its length; published sentencepiece models count one space before the text, WordPiece one before each word that is
    not Chinese. `fingerprint` is the sha256 of all that determines ids: kind, options, vocabulary files.

    A vocabulary can be `extended`: the added pieces, `num_added` of them, come behind all others and are found in a text before the kind sees it.
    """

    kind: ClassVar[str]
    files_needed: ClassVar[tuple[str, ...]]  # names of the vocabulary files in a folder
    can_lowercase: ClassVar[bool] = False
    space_leads: ClassVar[bool] = True  # a word's first token holds the space before it; else that space ends the word before
    keeps_spaces: bool = True  # white space is part of the text that ids stand for; else each word and sign has one space

    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    sentinels: tuple[int, ...]
    special_ids: frozenset[int]
    token_bytes: np.ndarray
    fingerprint: str
    lowercase: bool
    num_added: int

    def __init__(
        self,
        *,
        files: dict[str, bytes],
        lowercase: bool,
        sentinels: int,
        names: Sequence[str],
        texts: Sequence[bytes],
        controls: Iterable[int] = (),
        strip_prefix: bool = False,
        normalizer: Any = None,
    ):
        """`names` and `texts` hold each id's readable name and bytes; `controls` are more ids without text.

        `strip_prefix`: decoding drops the first space; `normalizer` is that of `Added`.
        """
        self.lowercase = lowercase
        self._files, self._options = dict(files), {"lowercase": lowercase, "sentinels": sentinels}
        self._names, self._strip_prefix = list(names), strip_prefix
        ids = {name: i for i, name in reversed(list(enumerate(self._names)))}
        self.sentinels = self._find_sentinels(sentinels)
        role_ids = {role: next((ids[name] for name in known if name in ids), None) for role, known in ROLES.items()}
        if role_ids["cls"] is None and role_ids["bos"] is not None and role_ids["mask"] is not None:
            role_ids["cls"], role_ids["sep"] = role_ids["bos"], role_ids["eos"]
        self.pad_id, self.bos_id, self.eos_id = role_ids["pad"], role_ids["bos"], role_ids["eos"]
        self.unk_id, self.mask_id = role_ids["unk"], role_ids["mask"]
        self.cls_id, self.sep_id = role_ids["cls"], role_ids["sep"]
        self.special_ids = frozenset(i for i in role_ids.values() if i is not None) | frozenset(self.sentinels) | frozenset(controls)
        self._texts = [*texts, *[b""] * (len(self._names) - len(texts))]
        self._added = self._find_added(normalizer)
        self.num_added, self.vocab_size = len(self._added.pieces), len(self._names)
        self._shown = list(self._texts)
        named = {self.unk_id, self.mask_id, *self.sentinels}
        for i in self.special_ids:
            self._shown[i] = (self._texts[i] or self._names[i].encode()) if i in named else b""
            self._texts[i] = b""
        self.token_bytes = np.array([len(text) for text in self._texts], np.int32)
        self._splits = np.zeros(self.vocab_size, bool)  # ids that are a word of their own
        self._splits[list(self.special_ids - {self.unk_id})] = True
        self.fingerprint = fingerprint_of(**self._identity())

    def _find_sentinels(self, wanted: int) -> tuple[int, ...]:
        if not 0 <= wanted <= MOST_PIECES:
            raise ConfigError(f"sentinels={wanted}; allowed: 0 to {MOST_PIECES}.")
        found = sorted((int(match[1]), i) for i, name in enumerate(self._names) if (match := SENTINEL.fullmatch(name)))
        if not found:
            self._names += [f"<extra_id_{n}>" for n in reversed(range(wanted))]
            return tuple(len(self._names) - 1 - n for n in range(wanted))
        if wanted not in (0, len(found)):
            raise ConfigError(f"sentinels={wanted}, but this vocabulary holds {len(found)} pieces <extra_id_N> of its own; give that number or 0.")
        return tuple(i for _, i in found)

    def _identity(self) -> dict:
        return {"kind": self.kind, "options": self._options, "hashes": {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}}

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if array.ndim != 1 or array.size and not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"ids have shape {array.shape} and type {array.dtype}; allowed: one row of integers.")
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(f"ids run from {array.min()} to {array.max()}; allowed: 0 to {self.vocab_size - 1}.")
        return array.astype(np.int64)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, algorithm: str, lowercase: bool, specials: bool) -> dict[str, bytes]:
        """Vocabulary files made from `texts`, the same each time. Raises ConfigError where `vocab_size` does not fit the text."""
        raise ConfigError(f"tokenizer kind '{cls.kind}' cannot be trained; give path=, a folder that holds {', '.join(cls.files_needed)}.")

    def _find_added(self, normalizer: Any) -> Added:
        """The pieces that extensions added, given the ids behind all others."""
        groups = json_of(self._files[ADDED], what=ADDED) if ADDED in self._files else []
        if not isinstance(groups, list) or not all(isinstance(group, list) and all(isinstance(piece, str) for piece in group) for group in groups):
            raise ConfigError(f"{ADDED} must hold a list of lists of pieces; it is damaged.")
        added = Added([piece for group in groups for piece in group], first_id=len(self._names), words=self._strip_prefix, normalizer=normalizer)
        known = {text: name for name, text in zip(self._names, self._texts) if text}
        for piece, text in zip(added.pieces, added.texts):
            if text in known:
                raise ConfigError(f"the added piece {piece!r} is in the vocabulary already, as {known[text]!r}; take it out of the list.")
            known[text] = piece
        self._names += added.pieces
        self._texts += added.texts
        return added

    def extended(self, pieces: Sequence[str]) -> "Tokenizer":
        """This tokenizer with more pieces. Raises ConfigError for a piece that is there already or that no text can hold."""
        groups = [*(json.loads(self._files[ADDED]) if ADDED in self._files else []), list(pieces)]
        return type(self)({**self._files, ADDED: json.dumps(groups, ensure_ascii=False).encode()}, **self._options)

    def earlier(self) -> "Tokenizer | None":
        """This tokenizer without its last extension; None if there is none."""
        if ADDED not in self._files:
            return None
        groups = json.loads(self._files[ADDED])[:-1]
        files = {name: data for name, data in self._files.items() if name != ADDED}
        return type(self)({**files, **({ADDED: json.dumps(groups, ensure_ascii=False).encode()} if groups else {})}, **self._options)

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of a text, none added before or after it; the name of a special piece written out in the text is plain text.

        What stands between added pieces is encoded as a text of its own.
        """
        if not self.num_added:
            return self._encode(text)
        parts = [part for part, _, _ in self._added.split(text)]
        return np.concatenate([self._encode(part) if isinstance(part, str) else [part] for part in parts] or [[]]).astype(np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, starts, ends): the ids of `encode`, and the characters text[start:end] of the text as it was given that each stands for (int32).

        Neither starts nor ends ever step back. A token that spells a part of a character has the whole of it, one that spells nothing of the text (a space
        put before it, say) an empty place. What a tokenizer drops, such as spaces between words, belongs to no token, but accents written as characters of
        their own belong to the token of their letter.
        """
        parts = self._added.split(text) if self.num_added else [(text, 0, len(text))]
        ids, starts, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for part, start, end in parts:
            found = self._encode_with_offsets(part) if isinstance(part, str) else ([part], [0], [end - start])
            ids.append(np.asarray(found[0], np.int32))
            starts.append(np.asarray(found[1], np.int32) + start)
            ends.append(np.asarray(found[2], np.int32) + start)
        starts, ends = np.concatenate(starts), np.concatenate(ends)
        if not text.isascii():
            following, given = np.append(starts[1:], len(text)), np.append(ends, -1)
            for token in reversed(np.flatnonzero(ends > starts)):
                if given[token] == given[token + 1]:
                    ends[token] = ends[token + 1]
                while ends[token] < following[token] and unicodedata.combining(text[ends[token]]):
                    ends[token] += 1
        return np.concatenate(ids), starts, ends

    def _encode_with_offsets(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """(ids, starts, ends) of a text without added pieces; here of kinds whose tokens spell the text byte by byte."""
        ids = self._encode(text)
        return ids, *spelled_offsets(text, self.token_bytes[ids])

    def encode_words(self, words: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each word of a text, those that it has in the running text (boundaries.running_text); none for a word that the tokenizer drops.

        All together they are the ids of that text, unless a piece spans two words, as sentencepiece has them in Chinese: here none does.
        """
        spaces = boundaries.spaces_before(words)
        if not self.keeps_spaces:
            return [self.encode(word) for word in words]
        if self._strip_prefix:  # a space is put before each text anyway
            return [self.encode(word) if space or n == 0 else self._without_space(word) for n, (space, word) in enumerate(zip(spaces, words))]
        if self.space_leads:
            return [self.encode(" " * space + word) for space, word in zip(spaces, words)]
        return [self.encode(word + " " * space) for space, word in zip([*spaces[1:], False], words)]

    def _without_space(self, word: str) -> np.ndarray:
        """Ids of a word with its first piece but for the space that was put before it, where there is such a piece."""
        ids = self.encode(word)
        first = self._texts[ids[0]] if len(ids) else b""
        if not first.startswith(b" "):
            return ids
        bare = self._ids_of_texts[first[1:]] if first[1:] in self._ids_of_texts else ids[0]
        return ids[1:] if first == b" " else np.append(np.int32(bare), ids[1:])

    @functools.cached_property
    def _ids_of_texts(self) -> dict[bytes, int]:
        return {text: i for i, text in enumerate(self._texts) if text}

    @abc.abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Ids (int32) of a text without added pieces."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: mask, unk and sentinels by their names, other special ids as nothing, bytes that are not UTF-8 as U+FFFD."""
        text = b"".join([self._shown[i] for i in self._checked(ids)]).decode("utf-8", "replace")
        return text[1:] if self._strip_prefix and text.startswith(" ") else text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id in readable form, for people: the vocabulary's spelling, or the text where that spells bytes."""
        return [self._names[i] for i in self._checked(ids)]

    def word_starts(self, ids: Iterable[int]) -> np.ndarray:
        """Which of `ids` begin a word (bool, as long as `ids`).

        A word begins at the first token, after a line break or tab, at each Chinese character and after it, at a special id and after it, and with the
        space before it (bytes and chars: after the space, which ends the word before).
        """
        ids = self._checked(ids)
        widths = self.token_bytes[ids]
        first_bytes = np.cumsum(widths) - widths
        text = b"".join([self._texts[i] for i in ids])
        at_byte = np.zeros(len(text) + 1, bool)
        # Code points, not tokens: one character may be spread over several tokens.
        chars, char_widths = boundaries.code_points(text)
        if chars.size:
            at_byte[np.cumsum(char_widths) - char_widths] = self._word_starts_of(chars)
        starts = at_byte[first_bytes] & (widths > 0) | self._splits[ids]
        starts[1:] |= self._splits[ids[:-1]]
        starts[:1] = True
        return starts

    def _word_starts_of(self, chars: np.ndarray) -> np.ndarray:
        cjk, space = boundaries.is_cjk(chars), np.isin(chars, WHITESPACE)
        after_cjk, after_space = np.r_[False, cjk[:-1]], np.r_[False, space[:-1]]
        if self.space_leads:
            after_break = after_space & (np.r_[0, chars[:-1]] != ord(" "))
            return cjk | after_cjk | space | after_break
        return ~space & (cjk | after_cjk | after_space)

    def segmented_word_starts(self, ids: Iterable[int], *, words: Sequence[str]) -> np.ndarray | None:
        """`word_starts` of a text whose words are known: one that holds Chinese characters is a word as a whole. None where `words` are not the text's."""
        ids = self._checked(ids)
        inside = boundaries.inside_words([self._texts[i] for i in ids], words)
        if inside is None:
            return None
        inside[:1] = False  # where a text is cut in a word, its rest is one
        return self.word_starts(ids) & ~inside

    def sentence_starts(self, ids: Iterable[int]) -> np.ndarray:
        """Which of `ids` begin a sentence (bool, as long as `ids`), the first one among them; rules in `ptm.text.boundaries.sentence_starts`.

        White space belongs to the sentence before, but the space before a sentence's first word to its first token where the two are one piece. The
        next sentence begins after a piece that holds the end of one and the beginning of another.
        """
        ids = self._checked(ids)
        if not ids.size:
            return np.zeros(0, bool)
        texts = [self._texts[i] or UNSEEN for i in ids]
        data = b"".join(texts)
        chars, char_widths = boundaries.code_points(data)
        sentence_of_char = np.zeros(chars.size, int)
        sentence_of_char[boundaries.sentence_starts(data.decode("utf-8", "surrogateescape"), keeps_spaces=self.keeps_spaces)] = 1
        sentence_of_char = np.where(np.isin(chars, WHITESPACE), 0, np.cumsum(sentence_of_char))
        # A token is of the sentence of its first character that is no space; one of spaces alone is of the sentence before.
        sentence_of_byte = np.repeat(sentence_of_char, char_widths)
        visible = np.append(np.flatnonzero(sentence_of_byte), len(data))
        ends = np.cumsum([len(text) for text in texts])
        first = visible[np.searchsorted(visible, np.r_[0, ends[:-1]])]
        sentences = np.where(first < ends, np.append(sentence_of_byte, 0)[first], 1)
        return np.diff(np.maximum.accumulate(sentences), prepend=0) > 0

    def save(self, folder: str) -> None:
        """Writes the vocabulary files and, last, `meta.json`; `ptm.text.load` reads them back."""
        os.makedirs(folder, exist_ok=True)
        for name, data in self._files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        meta = {"format": FORMAT, **self._identity(), "fingerprint": self.fingerprint}
        with open(os.path.join(folder, META), "w", encoding="utf-8", newline="\n") as file:
            json.dump(meta, file, indent=1, sort_keys=True)
            file.write("\n")


def fingerprint_of(*, kind: str, options: dict, hashes: dict[str, str]) -> str:
    """sha256 over what determines ids: the kind, its options and the sha256 of each vocabulary file by its name."""
    return hashlib.sha256(json.dumps([kind, options, hashes], sort_keys=True).encode()).hexdigest()


def spelled_offsets(text: str, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) in characters of consecutive pieces of a text, whose UTF-8 bytes have these `widths`."""
    _, char_widths = boundaries.code_points(text.encode())
    char_of_byte = np.repeat(np.arange(len(text)), char_widths)
    last = np.cumsum(widths)
    assert not widths.size or last[-1] == char_of_byte.size, "pieces spell the text"
    return char_of_byte[last - widths], char_of_byte[last - 1] + 1


def text_of(data: bytes, *, what: str) -> str:
    """UTF-8 text of a vocabulary file with line breaks as they are (some vocabularies hold unusual line separators)."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text ({error}); is it the right file?") from None


def json_of(data: bytes, *, what: str) -> object:
    """Content of a JSON vocabulary file."""
    text = text_of(data, what=what)
    try:
        content = untrusted.json_of(text)
        if "\\u" in text:  # half of a pair of escapes is no text
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except ValueError as error:
        raise ConfigError(f"{what} is not JSON ({error}); is it the right file?") from None


def refuse_large(vocab_size: int, *, largest: int) -> None:
    """Raises ConfigError if the training text gave fewer pieces than asked for."""
    if largest < vocab_size:
        raise ConfigError(f"tokenizer.vocab_size={vocab_size} is more than this text gives; allowed: at most {largest}. Lower it or train on more text.")


def refuse_small(vocab_size: int, *, smallest: int) -> None:
    """Raises ConfigError if special pieces and single symbols alone are more than `vocab_size`."""
    if vocab_size < smallest:
        raise ConfigError(f"tokenizer.vocab_size={vocab_size} is too small: special pieces and single symbols of this text need {smallest}.")

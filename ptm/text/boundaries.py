"""Where sentences begin in a text, and where words that are known otherwise, such as a segmenter's, stand among its tokens."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Ideographs as BERT's tokenizer lists them, and the punctuation and full-width forms that are set among them.
CJK = (
    (0x3001, 0x303F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF01, 0xFF65), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
BREAKS = "\n\r\v\f\x85\u2028\u2029"
CLOSING = re.escape("”’»)]}」』）】》〉")
# The end of a sentence with the quotes and brackets that it closes: in text with its spaces, and in text with a space before every word and sign.
ENDS = {
    True: re.compile(rf"""(?P<latin>[.!?]+)[{CLOSING}"']*(?=\s)|[。！？｡]+[.!?]*[{CLOSING}"']*|(?P<breaks>[{BREAKS}]\s*)"""),
    False: re.compile(rf"(?P<latin>[.!?](?: ?[.!?])*)(?: ?[{CLOSING}])*|[。！？｡]+(?: ?[.!?])*(?: ?[{CLOSING}])*"),
}
# A period after these, or after a single letter ("J. Smith", "e.g."), belongs to the word.
ABBREVIATION = re.compile(r"(?:^|[\W_])(?:[^\W\d_]|al|capt|cf|col|dr|eq|fig|gen|jr|lt|mr|mrs|ms|mt|prof|rev|sgt|sr|st|vs) ?$", re.IGNORECASE)
SPACES = re.compile(r"\s*")
BEFORE = 8  # characters that an abbreviation and what stands before it may take


def is_cjk(code_points: np.ndarray) -> np.ndarray:
    """Which code points are Chinese characters or stand among them."""
    return np.any([(code_points >= low) & (code_points <= high) for low, high in CJK], axis=0)


@functools.lru_cache(maxsize=1 << 16)
def _is_chinese(char: str) -> bool:
    return bool(is_cjk(np.array([ord(char)]))[0])


def spaces_before(words: Sequence[str]) -> list[bool]:
    """Before which words of a text a space stands: all but the first, those beside Chinese characters, and those beside an empty word."""
    return [bool(a and b) and not (_is_chinese(a[-1]) or _is_chinese(b[0])) for a, b in itertools.pairwise(["", *words])]


def running_text(words: Sequence[str]) -> str:
    """The text that words make."""
    return "".join(" " * space + word for space, word in zip(spaces_before(words), words))


def code_points(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Characters of UTF-8 bytes, as numbers, and the bytes that each takes; a stray byte is one surrogate of width 1."""
    chars = np.frombuffer(data.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), "<u4")
    stray = (chars >= 0xDC80) & (chars <= 0xDCFF)
    return chars, np.where(stray, 1, 1 + (chars >= 0x80) + (chars >= 0x800) + (chars >= 0x10000))


def sentence_starts(text: str, *, keeps_spaces: bool) -> list[int]:
    """Where the sentences of a text begin, ascending, the first at its first character.

    One ends after . ! ? and what they close, if white space follows; after 。！？ and what they close; at an empty line; and at a line break, but not
    in the middle of a sentence. In a text that has capitals, a sentence does not begin with a small letter, so neither "Mr. X", "e.g. this" or
    '"Go!" he said' nor lines of one width are torn apart. Without `keeps_spaces` each word and sign has a space before it: straight quotes then open
    and close by turns, and a period between digits is part of a number.
    """
    if not keeps_spaces:
        turns = itertools.cycle("“”")
        text = re.sub('"', lambda _: next(turns), text)
    has_capitals = text != text.lower()
    starts = [0]
    for match in ENDS[keeps_spaces].finditer(text):
        after = SPACES.match(text, match.end()).end()
        if after == len(text):
            break
        goes_on = has_capitals and text[after].islower()
        if match["latin"]:
            ends = not goes_on and not (match["latin"] == "." and _is_part_of_word(text, starts[-1], match.start(), after, keeps_spaces))
        elif keeps_spaces and match["breaks"]:
            ends = not goes_on or len(match["breaks"].rstrip(" \t").splitlines()) > 1
        else:
            ends = True
        if ends and after > starts[-1] and not text[starts[-1] : after].isspace():
            starts.append(after)
    return starts


def _is_part_of_word(text: str, begin: int, period: int, after: int, keeps_spaces: bool) -> bool:
    """Whether a period abbreviates a word, numbers the sentence that it stands in ("1. First"), or stands within a number whose spaces are lost."""
    if ABBREVIATION.search(text[max(begin, period - BEFORE) : period]):
        return True
    before = text[begin:period].strip()
    return before.isdigit() or not keeps_spaces and text[after].isdigit() and before[-1:].isdigit()


@functools.lru_cache(maxsize=1 << 16)
def _canonical(char: str) -> str:
    """What of a character survives every tokenizer: no case, accent, width, space or control character."""
    parts = unicodedata.normalize("NFKD", char).lower()
    return "".join(part for part in parts if not part.isspace() and unicodedata.category(part)[0] not in "MC")


def inside_words(texts: Sequence[bytes], words: Sequence[str]) -> np.ndarray | None:
    """Which tokens begin inside of a word with Chinese characters (bool [len(texts)]); None where `words` are not those of the text.

    `texts` are the bytes of the tokens, empty where they are not known; such a token stands for one character or more, wherever the text that follows
    is found next. Letters are compared without case, accents and width, and without spaces. The tokens may be a part of the text: its beginning, or
    one whose characters before the first unknown token stand in it once.
    """
    spelled = ["".join(map(_canonical, word)) for word in words]
    whole, sizes = "".join(spelled), np.array([len(word) for word in spelled], int)
    inner = np.repeat([bool(is_cjk(np.array([*map(ord, word)], np.uint32)).any()) for word in words], sizes)
    inner[(np.cumsum(sizes) - sizes)[sizes > 0]] = False

    data, widths = b"".join(texts), np.array([len(text) for text in texts], int)
    _, char_widths = code_points(data)
    tokens = np.searchsorted(np.cumsum(widths), np.cumsum(char_widths) - char_widths, side="right").tolist()
    unknown = np.cumsum(widths == 0)
    runs, seen = [(0, [], [])], 0  # unknown tokens before, canonical characters, the token of each
    for char, token in zip(data.decode("utf-8", "surrogateescape"), tokens, strict=True):
        if unknown[token] > seen:
            runs.append((int(unknown[token]) - seen, [], []))
            seen = int(unknown[token])
        part = _canonical(char)
        runs[-1][1].append(part)
        runs[-1][2].extend([token] * len(part))
    runs.append((int(sum(widths == 0)) - seen, [], []))

    inside, unseen, at = np.zeros(len(texts), bool), iter(np.flatnonzero(widths == 0)), 0
    for number, (missing, parts, owners) in enumerate(runs):
        text = "".join(parts)
        found = whole.find(text, at + missing) if missing or whole.startswith(text, at) else _only(whole, text) if number == 0 else -1
        if found < 0:
            return None
        for offset, token in enumerate(itertools.islice(unseen, missing)):
            inside[token] = found - at == missing and inner[at + offset]  # one character each; else nobody knows
        for place in reversed(range(len(text))):
            inside[owners[place]] = inner[found + place]  # of a token's characters the first counts
        at = found + len(text)
    return inside


def _only(whole: str, text: str) -> int:
    return whole.find(text) if whole.count(text) == 1 else -1

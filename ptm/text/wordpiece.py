"""WordPiece vocabularies as BERT uses them (Devlin et al. 2019)."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer as Pipeline
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ptm.fields import ConfigError
from ptm.text.base import Tokenizer, refuse_large, refuse_small, text_of
from ptm.text.boundaries import is_cjk

PREFIX = "##"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COVERAGE = 0.9995  # share of the training text's characters that get a piece; words with other characters are [UNK]
# Spaces that decoding takes out around English punctuation, as the published decoder does.
JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def word_text(name: str, *, continues: bool) -> bytes:
    """Bytes that a piece (without its prefix) stands for: a word's are those with the space before it, but before Chinese characters is none."""
    bare = continues or not name or is_cjk(np.array([ord(name[0])]))[0]
    return name.encode() if bare else b" " + name.encode()


def library_ids(pipeline: Pipeline, text: str) -> np.ndarray:
    """Ids (int32) of a text as the tokenizers library has them; a fifth faster than `encode`, which follows characters too."""
    return np.array(pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)


def library_offsets(pipeline: Pipeline, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(ids, starts, ends) of a text as the tokenizers library has them."""
    found = pipeline.encode(text, add_special_tokens=False)
    offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
    return found.ids, offsets[:, 0], offsets[:, 1]


def join_punctuation(text: str) -> str:
    """Decoded words with punctuation set against the word before it."""
    for mark in JOINED:
        text = text.replace(mark, mark.strip())
    return text


class WordPieceTokenizer(Tokenizer):
    """vocab.txt, one piece a line. Not lossless: spaces and, with `lowercase`, case and accents are lost."""

    kind = "wordpiece"
    files_needed = ("vocab.txt",)
    can_lowercase = True
    keeps_spaces = False

    def __init__(self, files: dict[str, bytes], *, lowercase: bool = False, sentinels: int = 0):
        """`lowercase` also strips accents. Raises ConfigError if the vocabulary's case does not go with it."""
        names = text_of(files["vocab.txt"], what="vocab.txt").replace("\r\n", "\n").removesuffix("\n").split("\n")
        if len(set(names)) != len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ConfigError(f"vocab.txt holds {twice!r} twice; it is damaged.")
        if "[UNK]" not in names:
            raise ConfigError("vocab.txt holds no piece [UNK]; a WordPiece vocabulary of BERT holds " + " ".join(SPECIALS) + ".")
        letters = [name.removeprefix(PREFIX) for name in names if name.removeprefix(PREFIX).isalpha()]
        if not lowercase and any(name.upper() != name for name in letters) and all(name.lower() == name for name in letters):
            raise ConfigError("vocab.txt holds no upper-case piece, so cased text would become [UNK]; set tokenizer.lowercase=true.")
        texts = [word_text(name.removeprefix(PREFIX), continues=name.startswith(PREFIX)) for name in names]
        super().__init__(
            files=files, lowercase=lowercase, sentinels=sentinels, names=names, texts=texts, strip_prefix=True,
            normalizer=_normalizer(lowercase, chinese=False),
        )  # fmt: skip
        self._starts = np.array([not name.startswith(PREFIX) for name in self._names])
        model = models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]", max_input_chars_per_word=100)
        self._pipeline = _pipeline(model, lowercase=lowercase)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, algorithm: str, lowercase: bool, specials: bool) -> dict[str, bytes]:
        """BERT's five special pieces, the text's characters in their order, then merges by frequency."""
        pipeline = _pipeline(models.WordPiece(unk_token="[UNK]"), lowercase=lowercase)
        words = Counter()
        for text in texts:
            words.update(word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str(text)))
        alphabet = _alphabet(words)
        kept = set(alphabet)
        refuse_small(vocab_size, smallest=len(SPECIALS) + len(alphabet))
        # The trainer numbers continuing characters in the order of a hash table; named beforehand, all have one order.
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*SPECIALS, *alphabet], continuing_subword_prefix=PREFIX, show_progress=False)
        pipeline.train_from_iterator((" ".join([word] * count) for word, count in words.items() if kept.issuperset(_characters(word))), trainer)
        vocab = pipeline.get_vocab()
        refuse_large(vocab_size, largest=len(vocab))
        return {"vocab.txt": "".join(name + "\n" for name in sorted(vocab, key=vocab.__getitem__)).encode()}

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a text as the reference gives them, without [CLS] and [SEP]."""
        return library_ids(self._pipeline, text)

    def _encode_with_offsets(self, text: str) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Ids and where they stand; [UNK] has a whole word."""
        return library_offsets(self._pipeline, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Words joined by spaces, punctuation and Chinese characters without; special ids as for other kinds."""
        return join_punctuation(super().decode(ids))

    def word_starts(self, ids: Iterable[int]) -> np.ndarray:
        """Which of `ids` do not continue a word, that is, carry no '##'."""
        return self._starts[self._checked(ids)]


def _normalizer(lowercase: bool, *, chinese: bool) -> normalizers.Normalizer:
    """Strips accents if it lower-cases; `chinese` puts spaces around Chinese characters."""
    return normalizers.BertNormalizer(lowercase=lowercase, handle_chinese_chars=chinese)


def _pipeline(model: models.WordPiece, *, lowercase: bool) -> Pipeline:
    pipeline = Pipeline(model)
    pipeline.normalizer = _normalizer(lowercase, chinese=True)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return pipeline


def _characters(word: str) -> list[str]:
    return [word[0], *(PREFIX + char for char in word[1:])]


def _alphabet(words: Counter) -> list[str]:
    """Characters, first and continuing apart, that cover COVERAGE of the text; each that continues is there as a first one too."""
    counts = Counter()
    for word, count in words.items():
        for char in _characters(word):
            counts[char] += count
    if not counts:
        raise ConfigError("no text to train a vocabulary on.")
    left, kept = COVERAGE * counts.total(), set()
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= 0:
            break
        kept |= {char, char.removeprefix(PREFIX)}
        left -= count
    return sorted(kept)

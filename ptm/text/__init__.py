"""Tokenizers: `make` builds one from a published vocabulary or from text, `load` reads what `save` wrote."""

import hashlib
import os
from collections.abc import Iterable

from ptm import untrusted
from ptm.fields import ConfigError, lookup
from ptm.text.base import ADDED, FORMAT, META, Tokenizer, fingerprint_of, json_of, text_of
from ptm.text.bpe import BpeTokenizer
from ptm.text.library import FileTokenizer
from ptm.text.sentencepiece import SentencePieceTokenizer
from ptm.text.stand_in import StandIn
from ptm.text.symbols import ByteTokenizer, CharTokenizer
from ptm.text.wordpiece import WordPieceTokenizer

# The tokenizers library warns, and may hang, when a process that used its threads forks; set the variable to have them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "wordpiece": WordPieceTokenizer,
    "bpe": BpeTokenizer,
    "file": FileTokenizer,
}
OPTIONS = {"lowercase": bool, "sentinels": int}  # that every kind takes
ALGORITHMS = ("unigram", "bpe")

__all__ = ["ALGORITHMS", "TOKENIZERS", "StandIn", "Tokenizer", "load", "make", "needs_files"]


def make(
    kind: str,
    *,
    path: str | None = None,
    texts: Iterable[str] | None = None,
    vocab_size: int = 4096,
    algorithm: str = "unigram",
    lowercase: bool = False,
    sentinels: int = 0,
    specials: bool = False,
    extra: str | None = None,
) -> Tokenizer:
    """A tokenizer from the vocabulary at `path` (its file, its folder or what `save` wrote), or trained on `texts` if `path` is None.

    `vocab_size` counts pieces of a trained vocabulary, special ones and bytes included; `sentinels` come on top of it. `algorithm` is the
    model of a trained sentencepiece vocabulary. `specials` gives special pieces to chars, which has none else unless it has sentinels;
    the other kinds always have theirs. `extra` is a file of pieces that extend the vocabulary, one a line. Raises ConfigError on anything that
    is missing, damaged or does not apply.
    """
    pieces = None if extra is None else read_pieces(extra)
    cls = lookup(TOKENIZERS, kind, "tokenizer kind")
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"tokenizer.algorithm={algorithm!r} is not allowed; allowed: {', '.join(ALGORITHMS)}.")
    if lowercase and not cls.can_lowercase:
        able = [name for name, other in TOKENIZERS.items() if other.can_lowercase]
        raise ConfigError(f"tokenizer.lowercase does not apply to kind '{kind}'; allowed: {', '.join(able)}.")
    if path is not None and os.path.isfile(os.path.join(path, META)):
        made = _saved(path, kind=kind, lowercase=lowercase, sentinels=sentinels)
    elif path is not None:
        made = cls(_published(path, cls=cls), lowercase=lowercase, sentinels=sentinels)
    elif texts is None and cls.files_needed:
        raise ConfigError(f"tokenizer kind '{kind}' needs path= (a folder that holds {', '.join(cls.files_needed)}) or texts= to train on.")
    else:
        files = cls.train(texts or (), vocab_size=vocab_size, algorithm=algorithm, lowercase=lowercase, specials=specials or sentinels > 0)
        made = cls(files, lowercase=lowercase, sentinels=sentinels)
    return made if pieces is None else made.extended(pieces)


def read_pieces(path: str) -> list[str]:
    """The pieces in a file, one a line as it is, spaces included; empty lines do not count. Raises ConfigError if there are none."""
    if not os.path.isfile(path):
        raise ConfigError(f"tokenizer.extra={path} is no file; give a text file with one new piece a line.")
    pieces = [line for line in text_of(_read(path), what=path).replace("\r\n", "\n").split("\n") if line]
    if not pieces:
        raise ConfigError(f"tokenizer.extra={path} is empty; give a text file with one new piece a line.")
    return pieces


def needs_files(kind: str) -> bool:
    """Whether a kind has a vocabulary that a folder may hold."""
    return bool(lookup(TOKENIZERS, kind, "tokenizer kind").files_needed)


def load(folder: str) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`. Raises ConfigError if something is missing, unknown or damaged."""
    where = os.path.join(folder, META)
    if not os.path.isfile(where):
        raise ConfigError(f"no tokenizer in '{folder}': it must hold {META} and the vocabulary files that Tokenizer.save writes.")
    meta = json_of(_read(where), what=where)
    keys = {"format", "kind", "options", "hashes", "fingerprint"}
    if not isinstance(meta, dict) or set(meta) != keys:
        raise ConfigError(f"{where} must hold exactly the keys {', '.join(sorted(keys))}; it is damaged or not a tokenizer's.")
    if meta["format"] != FORMAT:
        raise ConfigError(f"{where} has format {meta['format']}; this version reads {FORMAT}.")
    options, hashes = meta["options"], meta["hashes"]
    typed = isinstance(meta["kind"], str) and isinstance(hashes, dict) and isinstance(options, dict)
    if not typed or {key: type(value) for key, value in options.items()} != OPTIONS:
        raise ConfigError(f"{where} is damaged: a tokenizer has a kind, hashes by file, and the options {', '.join(OPTIONS)}.")
    if meta["fingerprint"] != fingerprint_of(kind=meta["kind"], options=meta["options"], hashes=meta["hashes"]):
        raise ConfigError(f"{where} was changed: its fingerprint is not that of its content. Restore it or build the tokenizer anew.")
    cls = lookup(TOKENIZERS, meta["kind"], "tokenizer kind")
    files = _published(folder, cls=cls) if cls.files_needed else {}
    if ADDED in hashes:
        files[ADDED] = _read(os.path.join(folder, ADDED))
    for name, data in files.items():
        if name not in hashes or hashlib.sha256(data).hexdigest() != hashes[name]:
            raise ConfigError(f"{os.path.join(folder, name)} is not the file that was saved (its sha256 differs); restore it or build the tokenizer anew.")
    return cls(files, **options)


def _saved(folder: str, *, kind: str, lowercase: bool, sentinels: int) -> Tokenizer:
    tokenizer = load(folder)
    if tokenizer.kind != kind:
        raise ConfigError(f"'{folder}' holds a tokenizer of kind '{tokenizer.kind}', not '{kind}'; set tokenizer.kind={tokenizer.kind}.")
    if sentinels not in (0, len(tokenizer.sentinels)):
        raise ConfigError(f"tokenizer.sentinels={sentinels}, but the tokenizer in '{folder}' has {len(tokenizer.sentinels)}; give that number or 0.")
    if lowercase and not tokenizer.lowercase:
        raise ConfigError(f"tokenizer.lowercase=true, but the tokenizer in '{folder}' keeps case; set it to false or build another one.")
    return tokenizer


def _read(path: str) -> bytes:
    try:
        return untrusted.read_bytes(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it.") from None


def _published(path: str, *, cls: type[Tokenizer]) -> dict[str, bytes]:
    """Vocabulary files of a kind by their names; `path` is their folder or one of them."""
    if not cls.files_needed:
        raise ConfigError(f"tokenizer kind '{cls.kind}' has no vocabulary to read; leave out path='{path}'.")
    wanted = f"a folder of kind '{cls.kind}' must hold {' and '.join(cls.files_needed)}"
    if os.path.isfile(path) and len(cls.files_needed) == 1:
        return {cls.files_needed[0]: _read(path)}
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    if not os.path.isdir(folder or "."):
        raise ConfigError(f"no file or folder '{path}'; {wanted}.")
    names = sorted(os.listdir(folder or "."))
    missing = [name for name in cls.files_needed if name not in names]
    if missing:
        raise ConfigError(f"'{folder}' holds no {missing[0]}; {wanted}. It holds: {', '.join(names[:10]) or 'nothing'}.")
    return {name: _read(os.path.join(folder, name)) for name in cls.files_needed}

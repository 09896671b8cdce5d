"""The options of `ptm prepare`, which are its flags. Light: a mistake on the command line must not wait for what reads files."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ptm import fields, sections
from ptm.fields import ConfigError, field

FORMS = ("none", "NFC", "NFKC")
SCRIPTS = (
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "ethiopic", "georgian", "greek", "gujarati", "gurmukhi", "han", "hangul", "hebrew", "kana",
    "kannada", "khmer", "lao", "latin", "malayalam", "myanmar", "sinhala", "tamil", "telugu", "thai", "tibetan",
)  # fmt: skip
NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
VERSION = re.compile(r"(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})")
MEBIBYTE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is made: every key but `output` and `max_bad_records` decides about records, and is held against that of a preparation that goes on."""

    source: tuple[str, ...] = field(doc="What is read, FORMAT:PATH,... as in data.source; a path may be a pattern, and of text and jsonl a URL.")
    output: str = field(doc="Folder in which NAME/VERSION is made.")
    name: str = field("corpus", doc="Name of the data set: lower-case letters, digits and _.")
    version: str = field("1.0.0", doc="Its version, three numbers; another one is another folder.")
    columns: tuple[str, ...] = field(
        ("text=text",), doc="Map of fields to columns, as in data.columns; N:text=COLUMN for source N. Only the field text is kept."
    )
    document: str = field("line", choices=("line", "paragraph", "file"), doc="What one document of a text source is; a paragraph ends at an empty line.")
    max_bad_records: int = field(100, low=0, unit="records", doc="Records that cannot be read are named and skipped; one more than this stops the preparation.")

    unicode: str = field("NFC", choices=FORMS, doc="Normalisation form of the text (Unicode Standard Annex 15).")
    min_characters: int | None = field(50, low=0, unit="characters", doc="Shorter documents go; None = none do.")
    max_characters: int | None = field(5_000_000, low=1, unit="characters", doc="Longer documents go; None = none do.")
    max_duplicate_lines: float | None = field(
        0.3, low=0.0, high=1.0, doc="Largest share of lines that repeat an earlier one (Rae et al. 2021, table A1); None = any."
    )
    max_duplicate_line_characters: float | None = field(0.2, low=0.0, high=1.0, doc="The same, of characters in such lines; None = any.")
    max_top_ngrams: tuple[float, ...] | None = field(
        (0.2, 0.18, 0.16), low=0.0, high=1.0, doc="Largest shares of characters in the commonest 2-gram, 3-gram, ... of words (ibid.); None = any."
    )
    min_word_length: float | None = field(3.0, low=0.0, unit="characters", doc="Least mean length of words (Rae et al. 2021, A1.1); None = any.")
    max_word_length: float | None = field(10.0, low=0.0, unit="characters", doc="Greatest mean length of words (ibid.); None = any.")
    max_symbols: float | None = field(0.1, low=0.0, doc="Most hash signs, and most ellipses, for each word (ibid.); None = any.")
    min_letters: float | None = field(0.6, low=0.0, high=1.0, doc="Least share of letters and marks among the characters that are seen; None = any.")
    scripts: tuple[str, ...] = field((), choices=SCRIPTS, doc="Scripts that the letters of a document are to have; none = any.")
    min_script_share: float = field(0.8, low=0.0, high=1.0, doc="Least share of letters in these scripts.")

    exact: bool = field(True, doc="Of documents with the same text keep the first.")
    near: bool = field(True, doc="Of documents with nearly the same text remove those behind the first (MinHash, Broder 1997).")
    near_ngram: int = field(
        5, low=1, high=100, unit="words", doc="Length of the n-grams that documents are compared by; characters count where words have no spaces."
    )
    near_bands: int = field(20, low=1, high=1000, doc="Bands of the signature: documents with an equal band are compared.")
    near_rows: int = field(6, low=1, high=1000, doc="Hashes of a band.")
    near_threshold: float = field(0.8, low=0.0, high=1.0, doc="Least Jaccard similarity of the sets of n-grams, which is computed exactly.")

    evals: tuple[str, ...] = field((), doc="Evaluation sets whose examples must not be in the corpus, NAME=FORMAT:PATH,...")
    eval_columns: tuple[str, ...] = field(("text=text",), doc="Their text, as `columns`; N:text={question} {answer} for set N.")
    eval_ngram: int = field(13, low=1, high=100, unit="words", doc="Length of the n-grams that are looked for (Brown et al. 2020, appendix C).")
    eval_share: float = field(0.5, low=0.0, high=1.0, doc="A document goes that holds so large a share of the n-grams of an example, and one at least.")

    validation: float = field(0.01, low=0.0, high=0.5, doc="Share of documents in the split `validation`, by a hash of their text; 0 = no such split.")
    seed: int = field(0, low=0, doc="Seed of this hash.")
    tokenizer: str | None = field(
        None,
        doc="KIND[:PATH] as tokenizer.kind and tokenizer.path: records also get their token ids, which --config.data.columns=text=text,tokens=tokens takes. None = text alone.",
    )
    keep_ids: bool = field(True, doc="Keep the ids of records, which say where they come from.")
    shard_bytes: int = field(256 * MEBIBYTE, low=1, unit="bytes", doc="Text of a shard, about.")

    def check(self, where: str) -> None:
        if not self.source:
            raise ConfigError("`ptm prepare` needs --source=FORMAT:PATH,..., such as --source=text:corpus/*.txt.")
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"--name={self.name!r}; allowed: a lower-case letter, then lower-case letters, digits and _, at most 100.")
        if not VERSION.fullmatch(self.version):
            raise ConfigError(f"--version={self.version!r}; allowed: three numbers such as 1.0.0.")
        sections.column_entries(self.columns)
        sections.column_entries(self.eval_columns)
        self.eval_sets()

    def eval_sets(self) -> dict[str, str]:
        """{name: FORMAT:PATH} of the evaluation sets. Raises ConfigError for an entry of another form, and for a name given twice."""
        sets: dict[str, str] = {}
        for entry in self.evals:
            found = re.fullmatch(r"([A-Za-z0-9_.-]{1,100})=(\w+:.*)", entry, re.DOTALL)
            if found is None or found[1] in sets:
                raise ConfigError(f"--evals={fields.unparse(self.evals)}: '{entry}' is not of the form NAME=FORMAT:PATH with a name of its own.")
            sets[found[1]] = found[2]
        return sets

    def identity(self) -> dict[str, Any]:
        """What decides about records, ready for JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in ("output", "max_bad_records")}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """'key: OLD -> NEW' of the options that differ between two identities."""
    shown = [(key, *(fields.unparse(side[key]) if key in side else "none" for side in (before, now))) for key in sorted({*before, *now})]
    return [f"{key}: {old} -> {new}" for key, old, new in shown if old != new]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How it is made, which decides about no record."""

    processes: int | None = field(None, low=1, doc="Processes of this machine; None = as many as it has cores for this one.")
    dry_run: int | None = field(None, low=1, unit="documents", doc="Count what the rules remove of so many first documents of each source, and stop.")


def flags() -> dict[str, tuple[bool, str]]:
    """Name of each flag -> whether it is true or false, and what it means."""
    shown = {}
    for f in (*dataclasses.fields(Options), *dataclasses.fields(Running)):
        default = "" if f.default is dataclasses.MISSING else f" Default: {fields.unparse(f.default) or 'none'}."
        shown[f.name] = (isinstance(f.default, bool), f.metadata["doc"] + default)
    return shown


def parse(given: Mapping[str, str]) -> tuple[Options, Running]:
    """Checked options from the texts of flags. Raises ConfigError."""
    for key, form in (("source", "FORMAT:PATH,..., such as --source=text:corpus/*.txt"), ("output", "DIR, the folder that the data set is made in")):
        if not given.get(key):
            raise ConfigError(f"`ptm prepare` needs --{key}={form}.")
    made = []
    for cls in (Options, Running):
        hints = fields.annotations(cls)
        made.append(cls(**{name: fields.parse(text, hints[name], f"--{name}") for name, text in given.items() if name in hints}))
        fields.check(made[-1], "")
    return made[0], made[1]

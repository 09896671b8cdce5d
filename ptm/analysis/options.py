"""The options of `ptm analyze`, which are its flags. Light: a mistake on the command line must not wait for JAX."""

import dataclasses
from typing import Any

from ptm import fields
from ptm.fields import ConfigError, field

SUITES = ("crows_pairs", "winobias", "stereoset")
# Options of some analyses alone; all others are of all.
BELONGS = {
    "text": ("attention",), "pair": ("attention",), "target": ("attention",), "shown": ("attention",), "columns": ("probe",), "validation": ("probe",),
    "holdout": ("probe",), "pool": ("probe",), "l2": ("probe",), "seed": ("probe",), "suite": ("bias",), "limit": ("probe", "bias"),
}  # fmt: skip


VALUES = {"columns": "FIELD=COLUMN,...", "pictures": "yes|no", "output": "DIR", "input": "PATH", "validation": "FORMAT:PATH"}  # shown in the help


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to look at, and how."""

    what: str = field(doc="What to look at.", choices=("attention", "probe", "bias"))
    output: str = field(doc="Folder that is written; it must not be there yet, or be empty.")
    text: str | None = field(None, doc="A text to look at.")
    pair: str | None = field(None, doc="A second text behind it, for models of pairs.")
    target: str | None = field(None, doc="The text that the decoder of an encoder-decoder reads.")
    input: str | None = field(
        None, doc="attention: a file, one text a line, or .jsonl with text, pair, target; probe: FORMAT:PATH, as data.source; bias: the suite's file or folder."
    )
    shown: int = field(8, low=1, unit="texts", doc="Texts on the page and as pictures; figures are of all texts.")
    columns: tuple[str, ...] = field(
        ("text=text", "label=label"), doc="Fields by columns: text and label (and pair), or text, words and tags for a probe of words."
    )
    validation: str | None = field(None, doc="FORMAT:PATH of the texts that the probe is tested on; without it a part of the input is held out.")
    holdout: float = field(0.2, low=0.01, high=0.5, doc="Share of the input that is held out for the test.")
    pool: str = field("mean", choices=("mean", "cls"), doc="A text is the mean of its tokens, or the position that stands for a row.")
    l2: float = field(1e-3, low=0.0, doc="Weight of half the squared norm of the probe's kernel.")
    seed: int = field(0, low=0, doc="Seed of the control task, and of what --limit draws.")
    suite: str | None = field(None, choices=SUITES, doc="The suite.")
    limit: int | None = field(
        None, low=1, doc="Most texts of each part of a probe, drawn at random, or examples of a suite, spread evenly over it. None = all."
    )
    pictures: bool = field(True, doc="Write PNG files too (needs matplotlib).")

    def check(self, where: str) -> None:
        for name, default in defaults().items():
            if name in BELONGS and self.what not in BELONGS[name] and getattr(self, name) != default:
                raise ConfigError(f"--{name} belongs to --what={' or '.join(BELONGS[name])}, not to --what={self.what}; leave it out.")
        if self.what == "attention" and (self.text is None) == (self.input is None):
            raise ConfigError("--what=attention needs one of --text=TEXT and --input=FILE.")
        if self.what != "attention" and self.input is None:
            what = "FORMAT:PATH, such as tsv:train.tsv" if self.what == "probe" else "PATH, the suite's file or folder"
            raise ConfigError(f"--what={self.what} needs --input={what}.")
        if self.what == "bias" and self.suite is None:
            raise ConfigError(f"--what=bias needs --suite=NAME, one of {', '.join(SUITES)}.")


def defaults() -> dict[str, Any]:
    """The default of every option; those that must be given are not among them."""
    return {f.name: f.default for f in dataclasses.fields(Options) if f.default is not dataclasses.MISSING}


def flags() -> dict[str, tuple[str, str]]:
    """Name of every option -> what its values are, and what it means."""
    known, shown = defaults(), {}
    for f in dataclasses.fields(Options):
        choices, default = f.metadata["choices"], known[f.name] if f.name in known else None
        values = "|".join(choices) if choices else VALUES[f.name] if f.name in VALUES else f.name.upper()
        only = f"{' and '.join(BELONGS[f.name])}: " if f.name in BELONGS else ""
        shown[f.name] = values, f"{only}{f.metadata['doc']}{'' if default is None else f' Default: {fields.unparse(default)}.'}"
    return shown


def parse(given: dict[str, str]) -> Options:
    """Options from the texts of flags. Raises ConfigError for values that cannot be, and for options that do not go together."""
    for f in dataclasses.fields(Options):
        if f.default is dataclasses.MISSING and f.name not in given:
            choices = f.metadata["choices"]
            raise ConfigError(f"`ptm analyze` needs --{f.name}={'|'.join(choices) if choices else 'DIR'}: {f.metadata['doc']}")
    hints = fields.annotations(Options)
    plain = {name: value if fields.strip_null(hints[name]) is str else fields.parse(value, hints[name], f"--{name}") for name, value in given.items()}
    options = Options(**plain)
    fields.check(options, "")
    return options

"""The options of `ptm report`. Light: a mistake on the command line must not wait for JAX."""

import dataclasses

from ptm import fields
from ptm.fields import ConfigError, field

FORMATS = {"terminal": None, "html": "report.html", "md": "report.md", "tex": "report.tex", "csv": "report-TABLE.csv", "png": "report-CURVES.png"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is reported on, and how it is written."""

    words: tuple[str, ...] = field(doc="Workdirs of runs, folders of `ptm train --seeds`, or the folder of one study.")
    compare: bool = field(False, doc="What differs between two runs: config, code, data, environment, results.")
    output: str | None = field(None, doc="Folder that the files are written to. Default: that of the run or study.")
    formats: tuple[str, ...] | None = field(None, choices=tuple(FORMATS), doc=f"Some of {','.join(FORMATS)}. Default: terminal,html; of several runs terminal.")

    def check(self, where: str) -> None:
        if not self.words:
            raise ConfigError("`ptm report` needs the WORKDIR of a run, several of them, or the folder of a study; `ptm report --compare A B` tells two runs apart.")
        if self.compare and len(self.words) != 2:
            raise ConfigError(f"--compare needs two workdirs, such as `ptm report --compare runs/a runs/b`; got {len(self.words)}.")
        if self.formats is not None and not self.formats:
            raise ConfigError(f"--formats names none; allowed: {', '.join(FORMATS)}.")


def flags() -> dict[str, tuple[bool, str]]:
    """Name of each flag -> whether it is a switch, and what it is."""
    return {f.name: (f.default is False, f.metadata["doc"]) for f in dataclasses.fields(Options) if f.name != "words"}


def parse(words: list[str], given: dict[str, str]) -> Options:
    """Checked options from the words and the texts of flags. Raises ConfigError."""
    hints = fields.annotations(Options)
    options = Options(words=tuple(words), **{name: fields.parse(text, hints[name], f"--{name}") for name, text in given.items()})
    fields.check(options, "")
    return options

"""What the files of a run's workdir say. Nothing else of a run is read."""

import dataclasses
import functools
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import config as config_lib
from ptm import log, untrusted
from ptm import run as run_lib
from ptm.fields import ConfigError
from ptm.train import COUNTS

SHOWN = 8  # answers of an eval
BOOKKEEPING = ("rows", "epoch")  # of the training: what every run counts
UNITS = {"tokens": "tokens_per_second", "model FLOPs": "model_flops_per_second"}  # what a step is worth -> the rate that says so


@dataclasses.dataclass(frozen=True)
class Files:
    """A run as its workdir tells it: the config with every key, env.json, the rows of its logs."""

    path: Path
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]

    @functools.cached_property
    def flat(self) -> dict[str, Any]:
        """Dotted key of the config -> value."""
        return config_lib.flatten(self.config)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config["train"]["steps"]

    @property
    def step(self) -> int:
        """The step of its last row."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def finished(self) -> bool:
        """Whether its last checkpoint is there."""
        return (self.path / "ckpt" / str(self.steps)).is_dir()

    @property
    def state(self) -> str:
        """How far it is, in words."""
        return f"finished, {self.steps:,} steps" if self.finished else f"at step {self.step:,} of {self.steps:,}"

    def _of_evals(self, key: str) -> bool:
        return key.split("/")[0] in self.config["evals"] and "/" in key

    @property
    def finals(self) -> dict[str, float]:
        """The last value of each metric of its evals."""
        values = {key: value for row in self.metrics for key, value in row.items() if self._of_evals(key)}
        return {key: value for key, value in values.items() if key.rpartition("/")[2] not in COUNTS}

    @functools.cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> its values by step, losses first, then what evals give; without what never changes, and without counts."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self.metrics:
            for key, value in row.items():
                if key not in ("step", *BOOKKEEPING) and key.rpartition("/")[2] not in COUNTS:
                    found.setdefault(key, []).append((row["step"], value))
        varied = {key: points for key, points in found.items() if len({value for _, value in points}) > 1}
        return dict(sorted(varied.items(), key=lambda item: (item[0].rpartition("/")[2] != "loss", not self._of_evals(item[0]))))

    def timed(self, key: str) -> list[tuple[int, float]]:
        """Values of timing.jsonl by step."""
        return [(row["step"], row[key]) for row in self.timing if key in row]

    def median(self, key: str) -> float | None:
        """Median of a value of timing.jsonl over its rows; None if it has none."""
        values = [value for _, value in self.timed(key)]
        return statistics.median(values) if values else None

    @functools.cached_property
    def units(self) -> dict[str, float]:
        """What a step is: tokens, model FLOPs, seconds of training (median)."""
        seconds = self.median("step_time")
        if seconds is None:
            return {}
        last = next(row for row in reversed(self.timing) if "step_time" in row)
        return {name: last[key] * last["step_time"] for name, key in UNITS.items() if key in last} | {"seconds": seconds}

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its starts, the first one first."""
        return self.env["history"]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of its data, its tokenizer, and its teacher if there is one."""
        return self.env["fingerprints"]

    @functools.cached_property
    def parameters(self) -> list[list[str]]:
        """The rows of params.txt, its header first."""
        return table_cells(_text(self.path / "params.txt"))

    @property
    def size(self) -> int | None:
        """Number of parameters."""
        total = self.parameters[-1] if self.parameters else []
        count = total[2].replace(",", "") if len(total) > 2 and total[0] == "total" else ""
        return int(count) if count.isdigit() else None

    def samples(self) -> dict[str, tuple[int, list[dict[str, Any]]]]:
        """Eval -> the newest step whose answers are stored, and the first of them."""
        newest: dict[str, tuple[int, Path]] = {}
        for path in sorted((self.path / "predictions").glob("*.jsonl")):
            if found := re.fullmatch(r"(.+)-(\d+)\.jsonl", path.name):
                newest[found[1]] = max(newest.setdefault(found[1], (int(found[2]), path)), (int(found[2]), path))
        return {name: (step, _first_rows(path)) for name, (step, path) in newest.items()}


def read(path: str | Path) -> Files:
    """The files of a run. Raises ConfigError for a folder that is none, and for files that are damaged."""
    path = Path(path)
    config = run_lib.read_config(path)
    return Files(path, config, _env(path / "env.json"), log.read(str(path / log.METRICS)), log.read(str(path / log.TIMING)))


def _env(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"fingerprints": {}, "history": []}
    try:
        found = untrusted.read_json(path)
        return {"fingerprints": dict(found["fingerprints"]), "history": list(found["history"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); move it away to report without it.") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _first_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = untrusted.json_of(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
            if len(rows) == SHOWN:
                break
    return rows


def table_cells(text: str) -> list[list[str]]:
    """Cells of a text table whose columns are aligned and two spaces apart."""
    lines = text.splitlines()
    width = max(map(len, lines), default=0)
    lines = [line.ljust(width) for line in lines]
    blank = "".join(" " if all(line[n] == " " for line in lines) else "x" for n in range(width))
    spans = [match.span() for match in re.finditer(r"x(?:x| (?=x))*", blank)]
    return [[line[start:end].strip() for start, end in spans] for line in lines]


def code(history: list[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """The versions of the code of some starts, (commit, whether it had changes) each once; an unknown one is ('unknown', True)."""
    states = [entry["git"] if "git" in entry else {} for entry in history]
    return list(dict.fromkeys((state["commit"], state["dirty"]) if "commit" in state else ("unknown", True) for state in states))


def code_shown(version: tuple[str, bool]) -> str:
    """A version of the code as a reader sees it."""
    return f"{version[0][:12]}{' with changes' if version[1] and version[0] != 'unknown' else ''}"

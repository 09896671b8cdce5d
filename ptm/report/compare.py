"""`ptm report --compare A B`: what differs between two runs."""

import json
from typing import Any

from ptm import config as config_lib
from ptm import fields
from ptm.report import reading
from ptm.report.document import NOTHING, Cell, Document, Note, Table, document, note, number, table, words
from ptm.report.reading import Files
from ptm.report.runs import environment, names_of, throughput, together

SAME = "the same"


def report(first: Files, second: Files) -> Document:
    """Config, code, data, environment and results of two runs, told apart."""
    names = names_of([first, second])
    if names[0] == names[1]:
        names = [f"{names[0]} (A)", f"{names[1]} (B)"]
    runs = dict(zip(names, (first, second)))
    blocks = {
        "Config": _config(first, second, names),
        "Code": _code(first, second, names),
        "Data": _data(first, second, names),
        "Environment": _machines(first, second, names),
        "Results": [*_rows(first, second), *_results(first, second, names)],
    }
    said = [f"{name.lower()} {'differ' if name == 'Results' else 'differs'}" for name, found in blocks.items() if any(_differs(block) for block in found)]
    rest = {"Curves": together({name: run.curves for name, run in runs.items()}, runs), "Throughput": throughput(runs), "Starts": environment(runs)}
    about = f"{', '.join(said)}." if said else "Nothing differs: config, code, data, environment and results are the same."
    return document(f"{names[0]} and {names[1]}", about[0].upper() + about[1:], blocks | rest)


def _differs(block: Any) -> bool:
    return isinstance(block, Table) or block.tone == "warning"


def _pair(name: str, values: tuple[Any, Any]) -> tuple[Cell, Cell, Cell]:
    return (words(name), *(NOTHING if value is None else words(fields.unparse(value)) for value in values))


def _config(first: Files, second: Files, names: list[str]) -> list[Table | Note]:
    rows = [_pair(key, pair) for key, pair in config_lib.diff(first.config, second.config).items()]
    return [table("config", "Config keys that differ", ("key", *names), rows)] if rows else [note(f"The configs are {SAME}.")]


def _code(first: Files, second: Files, names: list[str]) -> list[Table | Note]:
    versions = [reading.code(run.history) for run in (first, second)]
    known = not any(dirty for found in versions for _, dirty in found)
    if versions[0] == versions[1] and all(versions):
        commit = ", then ".join(map(reading.code_shown, versions[0]))
        more = "" if known else " It had changes that are in no commit, or is unknown, so the two may differ all the same."
        return [note(f"The code is {SAME}: {commit}.{more}", "" if known else "warning")]
    shown = [", then ".join(map(reading.code_shown, found)) or "unknown" for found in versions]
    return [table("code", "Versions of the code", ("what", *names), [_pair("commit", tuple(shown))])]


def _data(first: Files, second: Files, names: list[str]) -> list[Table | Note]:
    kinds = list(dict.fromkeys([*first.fingerprints, *second.fingerprints]))
    pairs = {kind: tuple(run.fingerprints[kind] if kind in run.fingerprints else None for run in (first, second)) for kind in kinds}
    rows = [_pair(kind, pair) for kind, pair in pairs.items() if pair[0] != pair[1]]
    if not kinds:
        return [note("No run has written fingerprints of its data.", "warning")]
    return [table("data", "Fingerprints that differ", ("of", *names), rows)] if rows else [note(f"Fingerprints of {' and '.join(kinds)} are {SAME}.")]


def _machines(first: Files, second: Files, names: list[str]) -> list[Table | Note]:
    """What the last start of each ran on."""
    if not (first.history and second.history):
        return [note("One of the runs has not written what it ran on.", "warning")]
    sides = [_machine(run.history[-1]) for run in (first, second)]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = {key: tuple(side[key] if key in side else None for side in sides) for key in keys}
    rows = [_pair(key, pair) for key, pair in pairs.items() if pair[0] != pair[1]]
    return [table("machines", "What differs in the environment", ("what", *names), rows)] if rows else [note(f"Versions, devices and mesh are {SAME}.")]


def _machine(entry: dict[str, Any]) -> dict[str, Any]:
    told = {"python": entry["python"], "devices": f"{entry['devices']['count']} x {entry['devices']['kind']}", "processes": entry["devices"]["processes"]}
    told |= {f"mesh.{axis}": size for axis, size in entry["mesh"].items()} | {
        package: number for package, number in entry["versions"].items() if package != "ptm"
    }
    return told | ({"remat": entry["remat"]} if "remat" in entry else {})


def _rows(first: Files, second: Files) -> list[Note]:
    """Where the deterministic rows of two runs part."""
    lines = [[(row["step"], json.dumps(row, sort_keys=True)) for row in run.metrics] for run in (first, second)]
    if not all(lines):
        return [note("One of the runs has no metrics yet.", "warning")]
    parted = next((pair for pair in zip(*lines) if pair[0][1] != pair[1][1]), None)
    if parted is None:
        longer = len(lines[0]) != len(lines[1])
        shared = min(len(side) for side in lines)
        return [
            note(f"The first {shared:,} rows of metrics are equal to the last bit{', and one run has more' if longer else ''}.", "warning" if longer else "")
        ]
    return [note(f"The rows of metrics are different from step {min(parted[0][0], parted[1][0]):,} on.", "warning")]


def _results(first: Files, second: Files, names: list[str]) -> list[Table]:
    rows = []
    for key in dict.fromkeys([*first.finals, *second.finals]):
        values = [run.finals[key] if key in run.finals else None for run in (first, second)]
        if repr(values[0]) != repr(values[1]):  # nan is nan here
            gap = None if None in values else values[1] - values[0]
            rows.append((words(key), *map(number, values), number(gap, sign=True)))
    columns = ("metric", *names, f"{names[1]} - {names[0]}")
    return [table("results", "Metrics of the last evaluation that differ", columns, rows, note="Of one run each: what differs may be chance.")] if rows else []

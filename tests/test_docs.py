"""The documents: links lead somewhere, what they quote is what the code says, and tests and figures that they name are there."""

import ast
import functools
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import conftest
import yaml

from ptm import config, fields, registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SUITES = ("slow", "faults", "runs", "parity", "hosts", "slurm", "browser", "plan", "docs", "beam")
LEAST = 14  # characters of a message that the code must say literally


def loaded(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


links = loaded("links")


@functools.cache
def pages() -> dict[str, str]:
    """Every Markdown file of the repository by its path there."""
    found = [path for folder in (".", "docs", "experiments", "benchmarks") for path in ROOT.glob(f"{folder}/{'**/' if folder == 'docs' else ''}*.md")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


# Links.


def broken(page: str, text: str) -> list[str]:
    """Links of a page to files or headings that are not there."""
    wrong = []
    for target in links.targets(text):
        if links.outward(target):
            continue
        path, _, name = target.partition("#")
        led = ROOT / os.path.normpath(Path(page).parent / path) if path else ROOT / page
        if path and (not led.exists() or not led.resolve().is_relative_to(ROOT.resolve())):
            wrong.append(f"{page}: {target} is not there")
        elif name and name not in links.anchors(text if led == ROOT / page else led.read_text(encoding="utf-8")):
            wrong.append(f"{page}: {target} has no such heading")
    return wrong


def test_links_lead_somewhere():
    assert {"README.md", "docs/design.md", "experiments/README.md"} <= pages().keys()
    assert not [line for page, text in pages().items() for line in broken(page, text)]


def test_broken_links_are_found():
    text = "# A head: `x`!\n[a](docs/none.md) ![b](setup.cfg) [c](#a-head-x) [d](#other) [e](docs/design.md#1-tree) [f](docs/design.md#2) [g](https://x.y)\n`[h](no)`\n```\n[i](no)\n```\n"
    assert [line.split(" ")[1] for line in broken("page.md", text)] == ["docs/none.md", "#other", "docs/design.md#2"]
    assert links.rewritten(text, str.upper).count("NO") == 1 and "`[h](no)`" in links.rewritten(text, str.upper), "code stays as it is"


def test_links_of_other_forms():
    text = '[x]: there/x.md\n<img alt="p" src="a.png" width="3"> <a href="b.html">b</a> [`code`](c.md "title")'
    assert links.targets(text) == ["there/x.md", "a.png", "b.html", "c.md"]


def test_lists_begin_after_an_empty_line():
    """Git hosts do without it, the site does not."""
    item, wrong = re.compile(r" *([-*+]|\d+\.) "), []
    for page, text in pages().items():
        first = ""  # line of the paragraph, list or table
        for number, line in enumerate(links.CODE.sub(lambda code: "\n" * code.group().count("\n"), text).split("\n"), 1):
            if item.match(line) and first and not item.match(first) and not first.startswith(("#", "|", " ")):
                wrong.append(f"{page}:{number}")
            first = "" if not line.strip() else first or line
    assert not wrong


# The site.


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def places(entry):
        return [entry] if isinstance(entry, str) else [place for part in (entry.values() if isinstance(entry, dict) else entry) for place in places(part)]

    named = places(site["nav"])
    assert len(named) == len(set(named))
    written = {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")}
    made = {
        "index.md",
        "zh/index.md",
        "repository/experiments/README.md",
        "notebooks/quickstart.md",
        *(name for name in named if name.startswith("reference/")),
    }
    assert set(named) - made == written
    assert site["theme"]["font"] is False and not re.search(r"https?://", json.dumps(site)), "nothing is fetched"


def test_the_reference_holds_what_is_declared():
    reference = loaded("reference")
    made = reference.pages()
    for name, cls in config.SECTIONS.items():
        section = made["reference/config.md"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` ", section, re.MULTILINE) == list(fields.annotations(cls))
    for kind, page in (("model", "families"), ("objective", "objectives"), ("eval", "evals")):
        for name, cls in registry.REGISTRIES[kind].items():
            section = made[f"reference/{page}.md"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
            assert re.findall(r"^\| `(\w+)` ", section, re.MULTILINE) == list(fields.annotations(cls)), name
    for row in (
        "| `steps` | `1000` | Optimizer steps of the whole run. | int, 1 or more steps |",
        "| `mode` | `min` | Whether a smaller or a larger metric is better. | `min`, `max` |",
        "| `ema_decay` | `None` | Decay per step of an exponential moving average of the parameters; None keeps none. | float or None, 0.0 to 1.0 |",
    ):
        assert row in made["reference/config.md"]
    rows = [line for text in made.values() for line in text.split("\n") if line.startswith("| ")]
    empty = [row for row in rows if re.search(r"\| *\| *$|\|  \|", row)]
    assert not empty, "every entry says what it is"
    assert "--print_config" in made["reference/commands.md"] and "## python -m launch.slurm" in made["reference/commands.md"]
    assert sys.executable not in made["reference/commands.md"] and str(ROOT) not in "".join(made.values())


def test_text_in_a_table_keeps_its_signs():
    reference = loaded("reference")
    assert reference.escaped("a|b *c* [d] <e> `f|g_h`\n i_j") == r"a\|b \*c\* \[d\] &lt;e> `f\|g_h` i\_j"


# What is quoted.


def literals(*folders: str) -> list[list[str]]:
    """The strings of the code, each as the parts between what is put into it."""
    found: list[list[str]] = []
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        module = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(module) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(module):
            if isinstance(node, ast.JoinedStr):
                parts = [""]
                for part in node.values:
                    if isinstance(part, ast.Constant):
                        parts[-1] += part.value
                    else:
                        parts.append("")
                found.append([*parts[:-1], parts[-1].rstrip()])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found.append([node.value])
    return [parts for parts in found if sum(map(len, parts)) >= LEAST]


def said_by(message: str, strings: list[list[str]]) -> bool:
    """Whether one of the strings, with something put into it, is the message."""
    flat = " ".join(message.split())
    return any(
        re.fullmatch(".*".join(re.escape(" ".join(f"|{part}|".split())[1:-1]) for part in parts), flat)
        for parts in strings
        if all(part.strip() in flat for part in parts)
    )


def test_messages_are_those_of_the_code():
    text, strings = pages()["docs/troubleshooting.md"], literals("ptm", "launch")
    quoted = re.findall(r"^```output\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(quoted) >= 30
    assert not [message for message in quoted if not said_by(message, strings)]
    assert not said_by(quoted[0].replace("unknown key", "strange key"), strings)


@functools.cache
def suites(file: str) -> dict[str, set[str]]:
    """The tests of a file, each with the suites that it is in."""
    module = ast.parse((ROOT / file).read_text(encoding="utf-8"))

    def marks(node: ast.AST) -> set[str]:
        found = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and part.attr in SUITES}
        return found.union(*(named[part.id] for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in named))

    named: dict[str, set[str]] = {}
    for node in module.body:
        if isinstance(node, ast.Assign):
            named[ast.unparse(node.targets[0])] = marks(node.value)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("test_"):
            named[node.name] = marks(node)  # a decorator
    whole = named["pytestmark"] if "pytestmark" in named else set()
    runs = {entry.partition("::")[2].partition("[")[0] for entry in conftest.RUNS if entry.startswith(Path(file).name)}
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: whole | set().union(*map(marks, node.decorator_list)) | ({"runs"} if node.name in runs else set()) for node in functions}


def test_tests_that_are_named_are_there():
    """With the suites that they are in, some of their cases at least."""
    rows = re.findall(r"^\| .* \| (`tests/.*`) \| (.*?) ?\|$", pages()["docs/invariants.md"], re.MULTILINE)
    assert len(rows) >= 40
    for tests, suite in rows:
        for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", tests):
            assert name in suites(file), f"{file}::{name}"
            assert set(re.findall(r"`(\w+)`", suite)) <= suites(file)[name], f"{file}::{name} is in {suites(file)[name]}"
            assert suite or not suites(file)[name] & {"faults", "parity", "hosts", "docs", "browser", "beam"}, f"{file}::{name} is in {suites(file)[name]}"


# Figures.


def test_figures_are_those_of_the_results():
    text = pages()["docs/models.md"]
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/small_tasks.jsonl").read_text().splitlines()]
    found = {(row["task"], row["start"]): row for row in rows}  # the newest of each
    for task in {task for task, _ in found}:
        cells = []
        for start in ("pretrained", "scratch"):
            row = found[task, start]
            scale = 1 if task == "cmrc2018" else 100
            cells.append(f"{scale * row['mean']:.1f} ({scale * row['ci95'][0]:.1f} to {scale * row['ci95'][1]:.1f})")
        assert f"| {task} | {row['metric']} | {cells[0]} | {cells[1]} | {row['n']} |" in text
    (row,) = map(json.loads, (ROOT / "benchmarks/results/sentence_tasks.jsonl").read_text().splitlines())
    for word in ("nsp", "sop"):
        trained = row[f"trained_on_{word}"]
        assert f"| {word.upper()} | {100 * trained['nsp']['accuracy']:.1f} | {100 * trained['sop']['accuracy']:.1f} |" in text
    studies = pages()["experiments/README.md"]
    for name in ("MLM + NSP", "MLM", "left to right", "left to right + BiLSTM"):
        line = next(line for line in studies.split("\n") if line.startswith(f"| {name} |"))
        assert line in text


# The notebook.


def test_the_notebook_is_stored_without_outputs():
    book = json.loads((DOCS / "notebooks/quickstart.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not (DOCS / "notebooks/quickstart.ipynb").read_text().count("/home/")

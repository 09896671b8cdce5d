"""The documents: links lead somewhere, what they quote is what the code says, and tests and figures that they name are there."""

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SUITES = ("slow", "faults", "runs", "parity", "hosts", "slurm", "browser", "plan", "docs")
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

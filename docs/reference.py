"""The reference, made of what the code declares: config keys, the entries of all tables, commands with their flags. The site has it as pages (docs/hooks.py).

python docs/reference.py FOLDER    # the same pages as Markdown files
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from launch import command, kubernetes, local, slurm, tpu_pod
from ptm import cli, fields, flags, sections
from ptm.data.sources import SOURCES
from ptm.evals import EVALS
from ptm.log import WRITERS
from ptm.metrics import METRICS
from ptm.models import MODELS
from ptm.objectives import OBJECTIVES
from ptm.optim import OPTIMIZERS, SCHEDULES
from ptm.predict import records, tasks
from ptm.text import TOKENIZERS

ROOT = Path(__file__).parent.parent
MARKS = re.compile(r"([\\*_\[\]#|])")


def escaped(text: str) -> str:
    """Text as Markdown shows it in a cell of a table: only what stands between backticks keeps its meaning, which is code."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:
        parts = ["'".join(parts)]
    return "`".join(part.replace("|", r"\|") if number % 2 else MARKS.sub(r"\\\1", part).replace("<", "&lt;") for number, part in enumerate(parts))


def code(value: Any) -> str:
    """A value as the command line takes it."""
    text = fields.unparse(value)
    return f"`{text}`".replace("|", r"\|") if text else "(empty)"


def said(documented: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return escaped((inspect.getdoc(documented) or "").partition("\n\n")[0])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), ["---"] * len(list(head)), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def allowed(annotation: Any, meta: Mapping[str, Any]) -> str:
    """Type, choices, range and unit of a key."""
    if "table" in meta:
        return f"sections by name, each of an entry of {meta['table']}s"
    if meta["choices"]:
        kind = "some of " if fields.type_name(annotation).startswith("tuple") else ""
        return kind + ", ".join(code(choice) for choice in meta["choices"]) + (" or None" if fields.nullable(annotation) else "")
    parts = [fields.type_name(annotation)]
    if meta["low"] is not None or meta["high"] is not None:
        parts.append(fields.span(meta["low"], meta["high"]))
    return escaped(", ".join(parts) + (f" {meta['unit']}" if meta["unit"] else ""))


def keys(cls: type, names: Iterable[str] | None = None) -> str:
    """The table of the keys of a config dataclass."""
    hints, rows = fields.annotations(cls), []
    for f in dataclasses.fields(cls):
        if f.metadata and (names is None or f.name in names):
            default = "(none)" if "table" in f.metadata else "(required)" if f.default is dataclasses.MISSING else code(f.default)
            rows.append((f"`{f.name}`", default, escaped(f.metadata["doc"]), allowed(hints[f.name], f.metadata)))
    return table(("key", "default", "meaning", "allowed"), rows) if rows else "No keys."


def entries(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each of the project's tables: names, and the first words of what is said of them."""
    return "\n\n".join(
        f"## {title}\n\n" + table(("name", "what it is"), [(f"`{name}`", said(entry)) for name, entry in found.items()]) for title, found in tables.items()
    )


def config() -> str:
    """The run-level sections."""
    parts = [
        "# Config: the sections of a run",
        "Every key of `ptm.config.base()`, as `--config.SECTION.KEY=VALUE` on the command line. Beside these a config has a [model](families.md), an "
        "[objective](objectives.md) and [evals](evals.md) with keys of their own. `ptm train --config=... --print_config` shows all keys of one run with their values.",
        "## Top level\n\n" + keys(sections.Config, sections.TOP_LEVEL),
    ]
    return "\n\n".join([*parts, *(f"## {name}\n\n{said(cls)}\n\n{keys(cls)}" for name, cls in sections.SECTIONS.items())])


def families() -> str:
    parts = [
        "# Model families",
        "The section `model` of a config, by the family that the recipe chooses. Sizes are published shapes: overrides of the defaults.",
    ]
    for name, family in MODELS.items():
        text = f"{said(sys.modules[family.config.__module__])}\n\n{said(family.config)} Kind: {family.config.kind.replace('_', '-')}.\n\n{keys(family.config)}"
        sizes = ", ".join(f"`{size}`" for size in family.sizes)
        parts.append(f"## {name}\n\n{text}" + (f"\n\nSizes: {sizes}." if sizes else ""))
    return "\n\n".join(parts)


def objectives() -> str:
    parts = [
        "# Objectives",
        "The section `objective` of a config, by the objective that the recipe chooses: what a model is pretrained on, and the tasks of fine-tuning.",
    ]
    for name, entry in OBJECTIVES.items():
        kinds = ", ".join(kind.replace("_", "-") for kind in entry.build.kinds) if hasattr(entry.build, "kinds") else "those of its parts"
        parts.append(f"## {name}\n\n{said(sys.modules[entry.config.__module__])}\n\n{said(entry.config)}\n\nModels: {kinds}.\n\n{keys(entry.config)}")
    return "\n\n".join(parts)


def evals() -> str:
    parts = ["# Evals", "The sections `evals.NAME` of a config, by the kind of eval. `ptm evaluate --evals=KIND` measures one that the run does not have."]
    return "\n\n".join([*parts, *(f"## {name}\n\n{said(module)}\n\n{keys(module.Config)}" for name, module in EVALS.items())])


def others() -> str:
    """What is named in a config or on the command line and has no keys of its own."""
    recipes = [
        (
            f"[`{path.relative_to(ROOT)}`](../../{path.relative_to(ROOT)})",
            escaped((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]),
        )
        for path in sorted((ROOT / "configs").rglob("*.py"))
    ]
    tables = {
        "Optimizers: `optimizer.name`": OPTIMIZERS, "Schedules: `schedule.name`": SCHEDULES, "Tokenizers: `tokenizer.kind`": TOKENIZERS,
        "Formats of sources: `data.source`": SOURCES, "Metrics: `evals.NAME.metrics`": METRICS, "Log writers: `log.writers`": WRITERS,
        "Tasks: `ptm predict --task`": {name: entry.build or records.Records for name, entry in tasks.TASKS.items()},
    }  # fmt: skip
    return "\n\n".join(["# Recipes, optimizers, data and more", "## Recipes: `--config`\n\n" + table(("file", "what it is"), recipes), entries(tables)])


def _help(main: Callable[[list[str]], int], *words: str) -> str:
    """What --help prints, 100 columns wide, whatever Python it is printed by."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), mock.patch.dict(os.environ, COLUMNS="100"):
        main([*words, "--help"])
    return f"```text\n{out.getvalue().strip().replace(sys.executable, 'python')}\n```"


def commands() -> str:
    parts = ["# Commands", "What `--help` of each command prints. Keys of a config are no flags: `--config.SECTION.KEY=VALUE`, see [config](config.md)."]
    parts += [f"## ptm {name}\n\n{_help(cli.main, name)}" for name in flags.parsers()[1]]
    parts += [f"## python -m {module.__name__}\n\n{_help(functools.partial(command.main, module.LAUNCHER))}" for module in (local, slurm, kubernetes, tpu_pod)]
    return "\n\n".join(parts)


def pages() -> dict[str, str]:
    """The Markdown of each page of the reference, by its place in docs/."""
    return {f"reference/{page.__name__}.md": page() + "\n" for page in (config, families, objectives, evals, others, commands)}


if __name__ == "__main__":
    for name, text in pages().items():
        target = Path(sys.argv[1], name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

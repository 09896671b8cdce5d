"""The data card of a data set, made from its manifest: what it was made from, what each rule removed, what is in it (cf. Gebru et al. 2021)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import atomic, fields
from ptm.prepare import stages
from ptm.prepare.filters import FILTERS
from ptm.report import page, text
from ptm.report.document import Document, Table, document, note, number, table, words

BAD_SHOWN = 20
MEANT = {
    stages.BAD: "cannot be read",
    stages.EMPTY: "no text",
    stages.EXACT: "the text of an earlier document",
    stages.NEAR: "nearly the text of an earlier document",
}


def card(manifest: Mapping[str, Any]) -> Document:
    """The card of a data set."""
    options, counts = manifest["options"], manifest["counts"]
    splits = [split for split in stages.SPLITS if counts.get(f"{split}/documents")]
    kept = sum(counts[f"{split}/documents"] for split in splits)
    about = (
        f"{counts.get('read/documents', 0):,} documents were read and {kept:,} kept. Read it with --config.data.source=tfds:DIR"
        f"{' and --config.data.validation_source=tfds:DIR/validation' if len(splits) > 1 else ''}, where DIR is this folder."
    )
    content = [_splits(counts, splits), _scripts(counts), _lengths(counts)]
    origins = [
        table("sources", "Sources", ("source", "fingerprint"), [(words(entry["source"]), words(entry["fingerprint"])) for entry in manifest["sources"]]),
        *([note(f"Token ids are those of {options['tokenizer']}, fingerprint {manifest['tokenizer']}.")] if manifest["tokenizer"] else []),
    ]
    removed = [_rules(counts, options), *_evals(manifest)]
    if manifest["bad"]:
        rows = [(words(id), words(reason)) for id, reason in manifest["bad"][:BAD_SHOWN]]
        more = f"The first {BAD_SHOWN} of {len(manifest['bad'])}; manifest.json has all." if len(manifest["bad"]) > BAD_SHOWN else ""
        removed.append(table("bad", "Records that cannot be read", ("record", "reason"), rows, note=more))
    settings = [(words(f"--{key}"), words(fields.unparse(value))) for key, value in options.items()]
    return document(
        f"{options['name']} {options['version']}",
        about,
        {
            "What it holds": content,
            "What was removed": removed,
            "What it was made from": origins,
            "Options": [table("options", "Options of ptm prepare", ("option", "value"), settings, long=True)],
        },
    )


def _splits(counts: Mapping[str, int], splits: list[str]) -> Table:
    kinds = [kind for kind in ("documents", "bytes", "characters", "tokens") if any(f"{split}/{kind}" in counts for split in splits)]
    rows = [(words(split), *(number(counts.get(f"{split}/{kind}", 0)) for kind in kinds)) for split in splits]
    return table("splits", "Splits", ("split", *kinds), rows, note="Bytes are those of the text in UTF-8.")


def _scripts(counts: Mapping[str, int]) -> Table:
    names = sorted({key.split("/")[1] for key in counts if key.startswith("script/")}, key=lambda name: (-counts[f"script/{name}/bytes"], name))
    rows = [(words(name), number(counts[f"script/{name}/documents"]), number(counts[f"script/{name}/bytes"])) for name in names]
    return table("scripts", "Languages by script", ("script of most letters", "documents", "bytes"), rows)


def _lengths(counts: Mapping[str, int]) -> Table:
    sizes = sorted(int(key.split("/")[1]) for key in counts if key.startswith("length/"))
    total = sum(counts[f"length/{size}"] for size in sizes)
    rows = []
    for size in range(sizes[0], sizes[-1] + 1) if sizes else ():
        count = counts.get(f"length/{size}", 0)
        rows.append((words(f"{1 << size >> 1:,} to {(1 << size) - 1:,}"), number(count), words("#" * round(40 * count / total))))
    return table("lengths", "Length of documents", ("characters", "documents", "share"), rows)


def _rules(counts: Mapping[str, int], options: Mapping[str, Any]) -> Table:
    read = counts.get("read/documents", 0)
    found = {key.removeprefix("removed/"): count for key, count in counts.items() if key.startswith("removed/")}
    order = [stages.BAD, stages.EMPTY, *FILTERS, *(rule for rule in found if rule.startswith(stages.CONTAMINATED)), stages.EXACT, stages.NEAR]
    rows = []
    for rule in order:
        count = found.get(rule, 0)
        if rule not in FILTERS:
            limit = MEANT.get(rule, "examples of an evaluation set")
        elif count or options[rule] not in (None, [], False):
            limit = fields.unparse(options[rule])
        else:
            continue
        rows.append((words(rule), words(limit), number(count), number(100 * count / read if read else None, decimals=2)))
    return table(
        "rules", "Rules, in the order in which they are tried", ("rule", "limit", "documents removed", "% of those read"), rows,
        note="A document counts for the first rule that removes it.",
    )  # fmt: skip


def _evals(manifest: Mapping[str, Any]) -> list[Table]:
    sets = manifest["evals"]
    rows = [(words(name), number(manifest["counts"].get(f"removed/{stages.CONTAMINATED}:{name}", 0)), number(told["too_short"])) for name, told in sets.items()]
    remark = f"Examples of fewer than {manifest['options']['eval_ngram']} words cannot be looked for."
    return [table("evals", "Evaluation sets", ("set", "documents removed", "examples too short"), rows, note=remark)] if rows else []


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes card.md and card.html into the folder of a data set."""
    made = card(manifest)
    atomic.write(folder / "card.md", text.markdown(made, {}))
    atomic.write(folder / "card.html", page.render(made))

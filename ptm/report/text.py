"""Reports as text: for a terminal, Markdown, LaTeX, and tables as CSV."""

import csv as csv_lib
import io
import re
import unicodedata
from collections.abc import Mapping

from ptm.report.document import Chart, Document, Note, Table, shown

BARS = "▁▂▃▄▅▆▇█"
SPARK = 32  # bars of a curve
WIDEST, LAST = 44, 120  # characters of a terminal's cell, and of the last one of a row
SIGNS = {"warning": "! ", "good": "+ ", "bad": "- "}


# Terminal.


def terminal(document: Document) -> str:
    """The report as a person reads it in a terminal; long tables and curves are left to the page."""
    lines = [document.title, document.about]
    for section in document.sections:
        made = [text for block in section.blocks if (text := _in_terminal(block))]
        if made:
            lines += ["", f"== {section.title}", *made]
    return "\n".join(lines)


def _in_terminal(block: Note | Table | Chart) -> str:
    if isinstance(block, Note):
        return f"  {SIGNS[block.tone] if block.tone in SIGNS else ''}{block.text}"
    if block.long:
        return ""
    if isinstance(block, Table):
        return _aligned(block)
    curves = [(one.name, [point[1] for point in one.points]) for one in block.series if one.points]
    width = max((_width(name) for name, _ in curves), default=0)
    return "\n".join([f"  {block.title}", *(f"    {_padded(name, width)}  {shown(y[0])} {sparkline(y)} {shown(y[-1])}" for name, y in curves)])


def _aligned(table: Table) -> str:
    limits = [*[WIDEST] * (len(table.columns) - 1), LAST]
    lines = [[_cut(text, limit) for text, limit in zip(row, limits)] for row in (table.columns, *([cell.text for cell in row] for row in table.rows))]
    widths = [max(_width(line[n]) for line in lines) for n in range(len(table.columns))]
    right = [table.numeric(n) for n in range(len(table.columns))]
    aligned = ["    " + "  ".join(_padded(cell, width, right=r) for cell, width, r in zip(line, widths, right)).rstrip() for line in lines]
    return "\n".join([f"  {table.title}", *aligned, *([f"    {table.note}"] if table.note else [])])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def sparkline(values: list[float]) -> str:
    """A curve as bars, means over equal parts of it."""
    parts = min(SPARK, len(values))
    bounds = [n * len(values) // parts for n in range(parts + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in zip(bounds, bounds[1:])]
    low, high = min(means), max(means)
    return "".join(BARS[int((len(BARS) - 1) * (value - low) / (high - low) + 0.5) if high > low else 0] for value in means)


# Markdown.


def markdown(document: Document, pictures: Mapping[str, str]) -> str:
    """The report in Markdown; `pictures` are files by the names of charts."""
    lines = [f"# {_marked(document.title)}", "", _marked(document.about)]
    for section in document.sections:
        made = [line for block in section.blocks for line in _in_markdown(block, pictures)]
        if made:
            lines += ["", f"## {section.title}", *made]
    return "\n".join(lines) + "\n"


def _marked(text: str) -> str:
    """Text in which nothing means markup."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", text)


def _in_markdown(block: Note | Table | Chart, pictures: Mapping[str, str]) -> list[str]:
    if isinstance(block, Note):
        return ["", f"{'**Warning:** ' if block.tone == 'warning' else ''}{_marked(block.text)}"]
    if isinstance(block, Chart):
        return ["", f"![{_marked(block.title)}]({pictures[block.name]})"] if block.name in pictures else []
    lines = [block.columns, ["--:" if block.numeric(n) else ":--" for n in range(len(block.columns))]]
    body = [[_marked(cell) for cell in lines[0]], lines[1], *([_marked(cell.text) for cell in row] for row in block.rows)]
    return ["", f"**{_marked(block.title)}**", "", *(f"| {' | '.join(row)} |" for row in body), *(["", _marked(block.note)] if block.note else [])]


# LaTeX.

PARAGRAPH = r">{\raggedright\arraybackslash}p{0.4\linewidth}"  # of long cells
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
COMMANDS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "±": r"$\pm$", "–": "--", "…": r"\dots{}", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "×": r"$\times$",
    "→": r"$\to$", "≥": r"$\geq$", "≤": r"$\leq$", "µ": r"$\mu$", "μ": r"$\mu$", "-": "{-}", "[": "{[}", "]": "{]}", "*": "{*}",  # after \\ a [ or * would be its own
} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip


def escaped(text: str) -> str:
    """Text in which nothing means a command of LaTeX; characters that are not Latin are left to the engine (xelatex, lualatex)."""
    made = "".join(COMMANDS[c] if c in COMMANDS else c for c in text)
    return re.sub(r"(?<!\w)\{-\}(?=\d)", "$-$", made)


def latex(document: Document) -> str:
    """The tables of the report, to be read by \\input; needs the packages array, booktabs, amssymb, graphicx, and [T1]{fontenc}. Wide tables are made smaller."""
    lines = ["% \\usepackage{array,booktabs,amssymb,graphicx} \\usepackage[T1]{fontenc}", f"% {document.title}"]
    for table in document.tables:
        if not table.long:
            lines += ["", *_in_latex(table)]
    return "\n".join(lines) + "\n"


def _in_latex(table: Table) -> list[str]:
    longest = [max((len(row[n].text) for row in table.rows), default=0) for n in range(len(table.columns))]
    columns = "".join("r" if table.numeric(n) else PARAGRAPH if longest[n] > WIDEST else "l" for n in range(len(table.columns)))
    rows = [" & ".join(_bold(cell.text, strong=cell.tone == "strong") for cell in row) + r" \\" for row in table.rows]
    caption = escaped(f"{table.title}. {table.note}".strip())
    head = " & ".join(map(escaped, table.columns)) + r" \\"
    return [
        r"\begin{table}[ht]", r"\centering\small", rf"\caption{{{caption}}}", rf"\label{{tab:{table.name}}}", FITTED, rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head,
        r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}", r"\end{table}",
    ]  # fmt: skip


def _bold(text: str, *, strong: bool) -> str:
    return rf"\textbf{{{escaped(text)}}}" if strong else escaped(text)


# CSV.


def csv(table: Table) -> str:
    """A table with the values of its cells as they are, not as they are shown; a cell without a value is empty, an interval takes two columns. RFC 4180."""
    spans = [table.spans(n) for n in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv_lib.writer(buffer)
    writer.writerow([part for name, two in zip(table.columns, spans) for part in ((f"{name}: low", f"{name}: high") if two else (name,))])
    for row in table.rows:
        writer.writerow([_plain(value) for cell, two in zip(row, spans) for value in ((cell.ends or (None, None)) if two else (cell.value,))])
    return buffer.getvalue()


def _plain(value: float | str | None) -> float | str:
    return "" if value is None else repr(value) if isinstance(value, float) else value

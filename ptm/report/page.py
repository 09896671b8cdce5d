"""A report as one HTML page, which needs nothing but itself."""

from importlib import resources
from typing import Any

from ptm import page
from ptm.report.document import COLOURS, Chart, Document, Note, Table


def render(document: Document) -> str:
    """The page of a report."""
    template = resources.files("ptm.report").joinpath("page.html").read_text(encoding="utf-8")
    sections = [{"title": section.title, "blocks": list(map(_block, section.blocks))} for section in document.sections]
    return page.render(template, title=document.title, data={"about": document.about, "colours": COLOURS, "sections": sections})


def _block(block: Note | Table | Chart) -> dict[str, Any]:
    if isinstance(block, Note):
        return {"kind": "note", "text": block.text, "tone": block.tone}
    shared = {"name": block.name, "title": block.title, "note": block.note, "long": block.long}
    if isinstance(block, Table):
        numeric = [block.numeric(n) for n in range(len(block.columns))]
        rows = [[[cell.text, cell.value, cell.tone] for cell in row] for row in block.rows]
        return {"kind": "table", **shared, "columns": block.columns, "numeric": numeric, "rows": rows}
    series = [{"name": one.name, "points": one.points, "units": dict(one.units), "colour": one.colour} for one in block.series]
    return {"kind": "chart", **shared, "series": series}

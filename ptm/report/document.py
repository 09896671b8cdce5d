"""What a report says, whatever it is written as: sections of notes, tables and curves."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptm.statistics import Comparison

NONE = "–"  # a cell without a value
LONGEST = 600  # characters of a cell
POINTS = 600  # of a curve that is drawn
# Of curves, on light ground and on dark (after Okabe and Ito 2008, for all kinds of colour vision); past these, lines are broken.
COLOURS = (
    ("#0072b2", "#62b8f2"), ("#d55e00", "#ff9e57"), ("#008560", "#3ddbab"), ("#b5488a", "#f2a8cf"), ("#8a6d00", "#ecd94a"), ("#3a3f47", "#d4d8de"), ("#7b3fa0", "#c79af0"),
    ("#2b8fbd", "#a5dcff"),
)  # fmt: skip


def clean(text: Any) -> str:
    """Text with what cannot be printed spelt out, line breaks included: no terminal, table or page takes it for a command."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a reader sees, and the value that it is sorted by and that a CSV file holds; tone: good, bad, faint, strong or nothing.

    `ends` are those of an interval, which a CSV file holds in two columns.
    """

    text: str
    value: float | str | None
    tone: str = ""
    ends: tuple[float | None, float | None] | None = None


def words(text: Any, *, tone: str = "") -> Cell:
    """A cell of any text, cut off where it is long."""
    whole = clean(text)
    cut = whole if len(whole) <= LONGEST else whole[: LONGEST - 1] + "…"
    return Cell(cut, cut, tone)


NOTHING = Cell(NONE, None, "faint")


def number(value: float | None, *, decimals: int | None = None, sign: bool = False, tone: str = "") -> Cell:
    """A cell of a number, to so many decimals, or to four digits."""
    if value is None:
        return NOTHING
    return Cell(shown(value, decimals=decimals, sign=sign), value if math.isfinite(value) else None, tone)


def shown(value: float, *, decimals: int | None = None, sign: bool = False) -> str:
    """A number as a reader sees it."""
    if not math.isfinite(value):
        return str(value)
    plus = "+" if sign else ""
    if isinstance(value, int):
        return f"{value:{plus},}"
    if decimals is not None:
        return f"{value:{plus}.{decimals}f}"
    return f"{value:{plus}.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:{plus}.3e}"


def interval(pair: tuple[float, float] | None, *, decimals: int | None = None, sign: bool = False) -> Cell:
    """A cell of an interval, sorted by its lower end."""
    if pair is None:
        return dataclasses.replace(NOTHING, ends=(None, None))
    return Cell(" to ".join(shown(end, decimals=decimals, sign=sign) for end in pair), pair[0], ends=pair)


def probability(p: float | None) -> Cell:
    """A cell of a p value."""
    return NOTHING if p is None else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def difference(found: Comparison | None, *, decimals: int | None = None) -> tuple[Cell, Cell, Cell, Cell]:
    """Pairs, mean difference, its interval, p."""
    if found is None:
        return number(0), NOTHING, NOTHING, NOTHING
    told = found.difference
    return number(told.n), number(told.mean, decimals=decimals, sign=True), interval(told.interval, decimals=decimals, sign=True), probability(found.p)


def decimals_for(means: Iterable[float], sds: Iterable[float | None]) -> int:
    """Decimals that show two digits of the smallest deviation, or where there is none four digits of the largest mean; 1 to 6."""
    spreads = [sd for sd in sds if sd]
    if spreads:
        return min(6, max(1, 1 - math.floor(math.log10(min(spreads)))))
    largest = max((abs(mean) for mean in means), default=0.0)
    return min(6, max(1, 3 - math.floor(math.log10(largest)))) if largest else 4


@dataclasses.dataclass(frozen=True)
class Note:
    """A sentence; tone: warning, good, bad, faint or nothing."""

    text: str
    tone: str = ""


def note(text: str, tone: str = "") -> Note:
    """A note of any text."""
    return Note(clean(text), tone)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under columns; `name` is that of its file. What is `long` stays out of the terminal and of LaTeX, and is closed on the page."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    long: bool = False

    def numeric(self, n: int) -> bool:
        """Whether column n holds numbers."""
        values = [row[n].value for row in self.rows]
        return any(value is not None for value in values) and not any(isinstance(value, str) for value in values)

    def spans(self, n: int) -> bool:
        """Whether column n holds intervals."""
        return any(row[n].ends is not None for row in self.rows)


def table(name: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, note: str = "", long: bool = False) -> Table:
    """A table; a row must have a cell for each column."""
    made = Table(name, clean(title), tuple(map(clean, columns)), tuple(map(tuple, rows)), clean(note), long)
    assert all(len(row) == len(made.columns) for row in made.rows), name
    return made


Point = tuple[float, float, float | None, float | None]  # step, value, and the band around it, if there is one


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: its points, what a step is in other units, the number of its colour."""

    name: str
    points: tuple[Point, ...]
    units: Mapping[str, float] = dataclasses.field(default_factory=dict)
    colour: int = 0


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over steps; `name` is that of its file. What is `long` is drawn on the page alone, when it is opened."""

    name: str
    title: str
    series: tuple[Series, ...]
    note: str = ""
    long: bool = False


def chart(name: str, title: str, series: Iterable[Series], *, note: str = "", long: bool = False) -> Chart:
    """A chart of any names."""
    return Chart(name, clean(title), tuple(dataclasses.replace(one, name=clean(one.name)) for one in series), clean(note), long)


@dataclasses.dataclass(frozen=True)
class Section:
    """Notes, tables and charts under a title."""

    title: str
    blocks: tuple[Note | Table | Chart, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A whole report; `about` is a line below its title."""

    title: str
    about: str
    sections: tuple[Section, ...]

    @property
    def tables(self) -> list[Table]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Table)]

    @property
    def charts(self) -> list[Chart]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]


def document(title: str, about: str, sections: Mapping[str, Sequence[Note | Table | Chart]]) -> Document:
    """A report of the sections that have something to say."""
    return Document(clean(title), clean(about), tuple(Section(name, tuple(blocks)) for name, blocks in sections.items() if blocks))


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:60] or "x"


def unique(names: Iterable[str]) -> list[str]:
    """Slugs of names, told apart by numbers."""
    taken: dict[str, int] = {}
    out = []
    for name in map(slug, names):
        taken[name] = taken[name] + 1 if name in taken else 1
        out.append(name if taken[name] == 1 else f"{name}-{taken[name]}")
    return out


def thinned(points: Sequence[tuple[float, float]]) -> tuple[Point, ...]:
    """A curve without a band for drawing; values that are not finite are left out."""
    return thinned_band([(x, y, None, None) for x, y in points if math.isfinite(y)])


def thinned_band(points: Sequence[Point]) -> tuple[Point, ...]:
    """A curve for drawing, of at most POINTS points: means over neighbours, the last one as it is."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return tuple(points)
    groups = [points[n : n + size] for n in range(0, len(points) - 1, size)]
    return (*(tuple(None if None in values else sum(values) / len(values) for values in zip(*group)) for group in groups), points[-1])

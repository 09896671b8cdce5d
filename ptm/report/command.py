"""`ptm report`: what a report is of, and the files that it is written to."""

from collections.abc import Callable
from pathlib import Path

from ptm import atomic
from ptm.analysis import pictures
from ptm.fields import ConfigError
from ptm.report import compare, page, runs, study, text
from ptm.report.document import COLOURS, Chart, Document
from ptm.report.options import FORMATS, Options

STUDY = "study.json"
LINES = ("-", "--", ":", "-.")  # one after the other, where colours do not suffice


def report(options: Options) -> tuple[str, list[Path]]:
    """What is to be printed, and the files that were written. Raises ConfigError for folders that hold neither run nor study."""
    made, folder = _document(options)
    output = Path(options.output) if options.output is not None else folder
    formats = options.formats or (("terminal", "html") if output is not None else ("terminal",))
    files = [name for name in formats if name != "terminal"]
    if files and output is None:
        raise ConfigError(f"--formats={','.join(files)} of {'two runs' if options.compare else 'several runs'} needs --output=DIR, the folder for the files.")
    if "png" in files:
        pictures.require()
    if files:
        _make(output)
    # PNG first: Markdown names them.
    written = [path for name in sorted(files, key=lambda name: name != "png") for path in _WRITERS[name](made, output, "png" in files)]
    return text.terminal(made) if "terminal" in formats else "", written


def _document(options: Options) -> tuple[Document, Path | None]:
    """The report, and the folder that it is of, if it is of one."""
    studies = [word for word in options.words if (Path(word) / STUDY).is_file()]
    if options.compare:
        if studies:
            raise ConfigError(f"{studies[0]} is a study; --compare takes two runs, such as {studies[0]}/ARM/seed0/STAGE.")
        both = [runs.found_runs([word]) for word in options.words]
        for word, found in zip(options.words, both):
            if len(found) != 1:
                raise ConfigError(f"{word} holds {len(found)} runs; --compare takes two, such as {found[0].path}.")
        return compare.report(both[0][0], both[1][0]), None
    if not studies:
        return runs.report(runs.found_runs(options.words)), Path(options.words[0]) if len(options.words) == 1 else None
    if len(options.words) > 1:
        raise ConfigError(f"{studies[0]} is a study; a report is of one study, or of several runs. Give one of them.")
    return study.report(studies[0]), Path(studies[0])


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={folder} cannot be made ({error.strerror}); give another folder.") from None


def _whole(path: Path, content: str) -> Path:
    """Writes a file, all of it or nothing."""
    try:
        atomic.write(path, content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give another folder by --output=DIR.") from None
    return path


def _picture(chart: Chart, path: Path) -> Path:
    count = len(COLOURS)
    series = [(one.name, one.points, COLOURS[one.colour % count][0], LINES[one.colour // count % len(LINES)]) for one in chart.series if one.points]
    pictures.curves(path, series, title=chart.title, note=chart.note)
    return path


def _file(kind: str, name: str) -> str:
    return FORMATS[kind].replace("TABLE", name).replace("CURVES", name)


def _pictured(document: Document) -> list[Chart]:
    return [chart for chart in document.charts if not chart.long]


def _markdown(document: Document, folder: Path, pictured: bool) -> list[Path]:
    named = {chart.name: _file("png", chart.name) for chart in _pictured(document)} if pictured else {}
    return [_whole(folder / FORMATS["md"], text.markdown(document, named))]


_WRITERS: dict[str, Callable[[Document, Path, bool], list[Path]]] = {
    "html": lambda document, folder, _: [_whole(folder / FORMATS["html"], page.render(document))],
    "md": _markdown,
    "tex": lambda document, folder, _: [_whole(folder / FORMATS["tex"], text.latex(document))],
    "csv": lambda document, folder, _: [_whole(folder / _file("csv", table.name), text.csv(table)) for table in document.tables],
    "png": lambda document, folder, _: [_picture(chart, folder / _file("png", chart.name)) for chart in _pictured(document)],
}

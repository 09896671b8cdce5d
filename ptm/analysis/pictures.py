"""Pictures as PNG files, made with matplotlib (an extra) and without a display."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptm.fields import ConfigError

WIDEST = 24  # heads or layers, tokens with labels


def _figure(width: float, height: float) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need the package matplotlib: pip install 'ptm[analysis]', or ask for none (--pictures=no, or --formats without png).")
    # A figure without pyplot: no display, no state that outlives it.
    import matplotlib.backends.backend_agg
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(min(width, 40), min(height, 40)), dpi=110, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def require() -> None:
    """Raises ConfigError if pictures cannot be made."""
    _figure(1, 1)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # not a formula


def head_grid(path: Path, maps_NHLT: np.ndarray, *, queries: Sequence[str], keys: Sequence[str], title: str) -> None:
    """A heat map of every head, layers from top to bottom: rows are queries, columns keys, the darkest cell of each map is its largest weight."""
    layers, heads = maps_NHLT.shape[:2]
    labelled = layers * heads == 1 or max(len(queries), len(keys)) <= WIDEST
    cell = 1.1 if layers * heads > 4 else 3.6
    figure = _figure(cell * heads + 1.2, cell * layers * len(queries) / max(1, len(keys)) + 1.0)
    for n, row in enumerate(figure.subplots(layers, heads, squeeze=False)):
        for h, axes in enumerate(row):
            axes.imshow(maps_NHLT[n, h], cmap="Blues", vmin=0, vmax=max(float(maps_NHLT[n, h].max()), 1e-6), aspect="auto", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if labelled and cell > 2:
                axes.set_xticks(range(len(keys)), [_plain(key) for key in keys], rotation=90, fontsize=7)
                axes.set_yticks(range(len(queries)), [_plain(query) for query in queries], fontsize=7)
            if n == 0:
                axes.set_title(f"head {h}", fontsize=8)
            if h == 0:
                axes.set_ylabel(f"layer {n}", fontsize=8)
    figure.suptitle(_plain(title), fontsize=9)
    figure.savefig(path)


def head_figures(path: Path, figures: Mapping[str, np.ndarray], *, titles: Mapping[str, str], title: str) -> None:
    """A table of colours for each figure of heads [N, H], with the values written into it where there is room."""
    figure = _figure(max(4.2, 0.42 * next(iter(figures.values())).shape[1] + 1.8) * min(3, len(figures)), 3.4 * -(-len(figures) // 3))
    grid = figure.subplots(-(-len(figures) // 3), min(3, len(figures)), squeeze=False).ravel()
    for axes in grid[len(figures) :]:
        axes.set_axis_off()
    for axes, (name, values_NH) in zip(grid, figures.items()):
        image = axes.imshow(values_NH, cmap="viridis", aspect="auto")
        axes.set_title(f"{name}\n{titles[name]}", fontsize=7)
        axes.set_xlabel("head", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
        for axis, size in ((axes.yaxis, values_NH.shape[0]), (axes.xaxis, values_NH.shape[1])):
            axis.set_ticks(range(0, size, 1 + size // WIDEST))
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=6)
        if max(values_NH.shape) <= 12:
            middle = (np.nanmin(values_NH) + np.nanmax(values_NH)) / 2
            for (n, h), value in np.ndenumerate(values_NH):
                axes.text(h, n, f"{value:.2f}", ha="center", va="center", fontsize=5, color="black" if value > middle else "white")
    figure.suptitle(_plain(title), fontsize=9)
    figure.savefig(path)


def layer_curves(path: Path, result: Mapping[str, Any], *, title: str) -> None:
    """Accuracy of a probe by layer with its intervals, the majority's share, and the control task where there is one."""
    figure = _figure(6, 3.8)
    axes = figure.subplots()
    accuracy, interval = np.array(result["accuracy"]), np.array(result["interval"])
    layers = np.arange(len(accuracy))
    axes.errorbar(layers, accuracy, yerr=np.abs(interval.T - accuracy), marker="o", capsize=3, label="probe, 95 % interval")
    if "control" in result:
        axes.plot(layers, result["control"], marker="s", linestyle="--", label="control task")
    axes.axhline(result["majority"], color="grey", linewidth=1, label="most frequent label")
    axes.set(xlabel="layer (0 = input)", ylabel="accuracy", xticks=layers if len(layers) <= WIDEST else layers[:: len(layers) // 12])
    axes.set_title(_plain(title), fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path)


def shares(path: Path, parts: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """Shares in percent as bars with their intervals, and the ideal of 50 %."""
    figure = _figure(6, 1.2 + 0.32 * len(parts))
    axes = figure.subplots()
    values = np.array([part["percent"] if "percent" in part else part["ss"] for part in parts.values()])
    interval = np.array([part["interval"] for part in parts.values()])
    places = np.arange(len(parts))[::-1]
    axes.barh(places, values, xerr=np.maximum(np.abs(interval.T - values), 0), height=0.6, color="#4c78a8", ecolor="#333333", capsize=2)
    axes.set_yticks(places, [f"{_plain(name)} ({part['count']})" for name, part in parts.items()], fontsize=8)
    axes.axvline(50, color="black", linewidth=1, linestyle=":")
    axes.set(xlim=(0, 100), xlabel="%")
    axes.set_title(_plain(title), fontsize=9)
    figure.savefig(path)


def curves(path: Path, series: Sequence[tuple[str, Sequence[tuple], str, str]], *, title: str, note: str) -> None:
    """Curves over steps, each (name, points, colour, style of line); points are (step, value, low, high), where low and high bound a band or are None."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for name, points, colour, line in series:
        steps, values, low, high = zip(*points)
        axes.plot(steps, values, color=colour, linestyle=line, linewidth=1.5, label=_plain(name), marker="o" if len(points) < 13 else None, markersize=3)
        if None not in low and len(points) > 1:
            axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.set_xlabel(f"step\n{_plain(note)}" if note else "step", fontsize=8)
    axes.set_title(_plain(title), fontsize=9)
    axes.grid(color="#d9dee5", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path)


def log_log(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, x: str, y: str, title: str) -> None:
    """Panels of lines through points (x, y), both axes logarithmic, x marked where there are points: {panel: {line: points}}."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(3.0 * columns, 2.4 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, lines) in zip(grid, panels.items()):
        for label, points in lines.items():
            axes.loglog(*zip(*sorted(points)), label=_plain(label), marker="o", markersize=3, linewidth=1.2)
        marks = sorted({place for points in lines.values() for place, _ in points})
        axes.set_xticks(marks, [f"{place:.3g}" for place in marks])
        axes.set_xticks([], minor=True)
        axes.set_title(_plain(name), fontsize=8)
        axes.set_xlabel(x, fontsize=7)
        axes.set_ylabel(y, fontsize=7)
        axes.tick_params(labelsize=6, which="both")
        axes.grid(color="#d9dee5", linewidth=0.6)
    grid[0].legend(fontsize=6)
    figure.suptitle(_plain(title), fontsize=9)
    figure.savefig(path)

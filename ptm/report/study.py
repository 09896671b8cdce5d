"""The report of a study."""

import statistics
from pathlib import Path
from typing import Any

from ptm import fields, log
from ptm.report import reading
from ptm.report.document import (
    NOTHING,
    Cell,
    Chart,
    Document,
    Note,
    Series,
    Table,
    chart,
    decimals_for,
    difference,
    document,
    interval,
    note,
    number,
    probability,
    shown,
    table,
    thinned_band,
    unique,
    words,
)
from ptm.report.results import DIFFERS, REPRODUCED, REVERSED, Contrast, Results, counted
from ptm.statistics import ALPHA

TONES = {REPRODUCED: "good", REVERSED: "bad", DIFFERS: "bad"}
METHOD = (
    "Mean, sd (n - 1) and 95 % interval of the mean (Student's t) are over seeds; differences are paired by seed, their p is of a two-sided paired t-test. "
    "p (Holm) is corrected for all {comparisons} comparisons with the base in this report, or for all {orderings} claimed orderings; below {alpha} it counts as a difference. Intervals are not corrected."
)


def report(path: str | Path) -> Document:
    """What a study folder says: arms, verdicts, curves, what is missing. Raises ConfigError for a folder that is none."""
    results = Results(path)
    study = results.study
    done = sum(state.name == "finished" for state in results.states.values())
    about = f"{study.paper}. {done} of {len(results.states)} runs finished, {len(study.arms)} arms, {len(study.seeds)} seeds; base: {study.base}."
    return document(
        study.claim,
        about,
        {
            "Verdict": [*_warnings(results), *_verdicts(results), *(note(text, "faint") for text in study.notes)],
            "Arms": [*_arms(results), *_details(results)],
            "Early stopping": _halving(results),
            "Learning curves": _curves(results),
            "Published": _published(results),
            "Holes": _holes(results),
            "What the arms change": _differences(results),
            "Cost": _cost(results),
            "Values": [_values(results)],
            "Environment": _environment(results),
        },
    )


def _warnings(results: Results) -> list[Note]:
    notes = []
    if len(results.code) > 1:
        versions = "; ".join(f"{reading.code_shown(version)}: {len(runs)} runs, such as {runs[0]}" for version, runs in results.code.items())
        notes.append(
            note(f"The tables mix runs of {len(results.code)} versions of the code. {versions}. What differs between arms may be the code.", "warning")
        )
    if changed := [runs for (_, dirty), runs in results.code.items() if dirty]:
        notes.append(note(f"{sum(map(len, changed))} runs were made with code that is in no commit, or of an unknown version.", "warning"))
    if results.study.search:
        notes.append(
            note(
                "Arms were asked for by a search, which looked at the same metric: the best of them looks better here than it is (repeat it with seeds of its own).",
                "warning",
            )
        )
    if any(rung["stopped"] for rung in results.rungs):
        notes.append(
            note("Early stopping chose among the arms by values of the same seeds: the best of those that went on look better here than they are.", "warning")
        )
    if results.holes:
        counts: dict[str, int] = {}
        for hole in results.holes:
            word = hole.state if hole.state != "finished" else "finished without a value"
            counts[word] = counts[word] + 1 if word in counts else 1
        listed = ", ".join(f"{count} {word}" for word, count in counts.items())
        notes.append(note(f"The tables have holes: {listed}. They are named below, under Holes.", "warning"))
    return notes


def _verdicts(results: Results) -> list[Note | Table]:
    if not results.verdicts:
        return [note("The study claims no ordering.", "faint")]
    rows, notes = [], [note(f"Claimed orderings: {counted(results.verdicts)}.")]
    gaps = [_gap(results, verdict.ordering) for verdict in results.verdicts]
    published = any(gap is not None for gap in gaps)
    for verdict, gap in zip(results.verdicts, gaps):
        ordering, metric = verdict.ordering, results.metrics[verdict.ordering.metric]
        claim = f"{ordering.better} {ordering.relation} {ordering.worse}"
        decimals = _decimals(results, metric.name)
        source = f" ({ordering.source})" if ordering.source else ""
        told = f"{metric.label}: {claim}{source}: {verdict.word}{'; ' + verdict.told if verdict.told else ''}."
        notes.append(note(told, TONES[verdict.word] if verdict.word in TONES else ""))
        ours = difference(verdict.found, decimals=decimals)
        theirs = (number(gap, sign=True, decimals=decimals),) if published else ()
        word = words(verdict.word, tone=TONES[verdict.word] if verdict.word in TONES else "")
        rows.append((words(claim), words(metric.label), words(ordering.source), *theirs, *ours, probability(verdict.corrected), word))
    columns = (
        "claim",
        "metric",
        "source",
        *(("published difference",) if published else ()),
        "pairs",
        "our difference",
        "95 % interval",
        "p",
        "p (Holm)",
        "verdict",
    )
    reads = "Differences are in favour of the claim where they are positive: first arm over second, in the metric's better direction."
    return [*notes, table("verdicts", "Claimed orderings", columns, rows, note=reads), note(_method(results), "faint")]


def _gap(results: Results, ordering: Any) -> float | None:
    """What the paper reports of the first arm over the second, in the metric's better direction; None where it reports not both."""
    known = [results.published(arm, ordering.metric) for arm in (ordering.better, ordering.worse)]
    return None if None in known else (1 if results.metrics[ordering.metric].higher else -1) * (known[0].value - known[1].value)


def _method(results: Results) -> str:
    tested = sum(verdict.corrected is not None for verdict in results.verdicts)
    return METHOD.format(comparisons=results.comparisons, orderings=tested, alpha=ALPHA)


def _decimals(results: Results, metric: str) -> int:
    found = [summary for summary in results.summaries[metric].values() if summary is not None]
    return decimals_for([summary.mean for summary in found], [summary.sd for summary in found])


def _arrow(metric: Any) -> str:
    return "higher is better" if metric.higher else "lower is better"


def _mark(contrast: Contrast) -> tuple[str, str]:
    """What marks a mean that was told from the base's, and its tone."""
    if contrast.corrected is None or contrast.corrected >= ALPHA:
        return "", ""
    return (" ▲", "good") if contrast.better else (" ▼", "bad")


def _arms(results: Results) -> list[Table]:
    """Arms by metrics, as a paper prints them."""
    rows = []
    for arm in results.arms:
        cells = [words(arm, tone="strong" if arm == results.study.base else "")]
        for name in results.metrics:
            summary, decimals = results.summaries[name][arm], _decimals(results, name)
            if summary is None:
                cells.append(NOTHING)
                continue
            mark, tone = ("", "") if arm == results.study.base else _mark(results.contrasts[name][arm])
            spread = "" if summary.sd is None else f" ± {shown(summary.sd, decimals=decimals)}"
            cells.append(Cell(f"{shown(summary.mean, decimals=decimals)}{spread}{mark}", summary.mean, tone))
        rows.append(cells)
    columns = ("arm", *(metric.label for metric in results.metrics.values()))
    directions = "; ".join(f"{metric.label}: {_arrow(metric)}" for metric in results.metrics.values())
    reads = f"Mean ± sd over seeds. ▲ better, ▼ worse than the base, {results.study.base}, after correction (p (Holm) < {ALPHA}); others are not distinguishable from it. {directions}."
    return [table("arms", "Means of all arms", columns, rows, note=reads)]


def _details(results: Results) -> list[Table]:
    made = []
    for file, (name, metric) in zip(unique(f"arms-{metric.label}" for metric in results.metrics.values()), results.metrics.items()):
        decimals, rows = _decimals(results, name), []
        for arm in results.arms:
            summary = results.summaries[name][arm]
            spread = (NOTHING, NOTHING) if summary is None else (number(summary.sd, decimals=decimals), interval(summary.interval, decimals=decimals))
            own = (words(arm), number(summary.n if summary else 0), number(summary and summary.mean, decimals=decimals), *spread)
            if arm == results.study.base:
                rows.append((*own, *[NOTHING] * 5, words("base", tone="strong")))
                continue
            contrast = results.contrasts[name][arm]
            tone = _mark(contrast)[1]
            rows.append((*own, *difference(contrast.found, decimals=decimals), probability(contrast.corrected), words(contrast.told, tone=tone)))
        columns = ("arm", "n", "mean", "sd", "95 % interval", "pairs", "difference to base", "95 % interval of it", "p", "p (Holm)", "in words")
        made.append(table(file, f"{metric.label} ({_arrow(metric)})", columns, rows, note=f"{name}, of the last evaluation of each run."))
    return made


def _halving(results: Results) -> list[Table | Note]:
    """Means of the arms at the rungs, and which went on."""
    halving = results.study.halving
    if halving is None:
        return []
    if not results.rungs:
        return [note(f"The first rung, after step {halving.rungs[0]:,}, is not decided yet.", "faint")]
    metric, stopped = results.metrics[halving.metric], {arm: rung["step"] for rung in results.rungs for arm in rung["stopped"]}
    found = [{arm: metric.scale * value for arm, value in rung["values"].items() if value is not None} for rung in results.rungs]
    decimals = decimals_for([value for values in found for value in values.values()], ())
    rows = []
    for arm in results.arms:
        means = [number(values[arm], decimals=decimals) if arm in values else NOTHING for values in found]
        told = (
            words(f"stopped after step {stopped[arm]:,}", tone="faint")
            if arm in stopped
            else words("went on" + (", as the base" if arm == results.study.base else ""))
        )
        rows.append((words(arm), *means, told))
    columns = ("arm", *(f"after step {rung['step']:,}" for rung in results.rungs), "what became of it")
    reads = f"{metric.label} ({_arrow(metric)}), mean over the seeds that have it; at each rung the best {halving.keep:.0%} of the arms go on, and the base."
    return [table("halving", "Arms at the rungs of early stopping", columns, rows, note=reads)]


def _curves(results: Results) -> list[Chart]:
    wanted = {(metric.name.partition(":")[0], metric.name.partition(":")[2]): (metric.label, metric.scale) for metric in results.metrics.values()}
    wanted |= {(stage.name, "loss"): (f"{stage.name}: loss of the training", 1.0) for stage in results.study.stages if (stage.name, "loss") not in wanted}
    charts = []
    for file, ((stage, key), (label, scale)) in zip(unique(f"{stage}-{key}" for stage, key in wanted), wanted.items()):
        series = []
        for colour, arm in enumerate(results.arms):
            points, seeds = results.curve(arm, stage, key, scale=scale)
            if points:
                series.append(Series(f"{arm} (n = {seeds})", thinned_band(points), _units(results, arm, stage), colour))
        if any(len(one.points) > 1 for one in series):  # one evaluation is no curve
            charts.append(chart(file, label, series, note="Line: mean over seeds; band: one standard deviation to both sides."))
    return charts


def _units(results: Results, arm: str, stage: str) -> dict[str, float]:
    """What a step of a stage is in other units, as the mean over the arm's runs."""
    found = [results.files[run].units for run in _runs(results, arm, stage) if run in results.files and results.files[run].units]
    return {name: statistics.fmean(units[name] for units in found) for name in (found[0] if found else ()) if all(name in units for units in found)}


def _runs(results: Results, arm: str, stage: str) -> list[str]:
    return list(dict.fromkeys(runs[stage] for runs in results.arms[arm].runs.values() if stage in runs))


def _published(results: Results) -> list[Table]:
    rows = []
    for entry in results.study.published:
        metric = results.metrics[entry.metric]
        summary, decimals = results.summaries[entry.metric][entry.arm], _decimals(results, entry.metric)
        theirs = Cell(f"{entry.value:g}" if entry.sd is None else f"{entry.value:g} ± {entry.sd:g}", entry.value)
        ours = (NOTHING, NOTHING, NOTHING)
        if summary is not None:
            ours = (number(summary.mean, decimals=decimals), interval(summary.interval, decimals=decimals))
            ours += (number(summary.mean - entry.value, decimals=decimals, sign=True),)
        rows.append((words(entry.arm), words(metric.label), words(entry.source), theirs, *ours))
    reads = "The published numbers are those of the paper's setting; at another scale of this study their order may be compared, not their values."
    columns = ("arm", "metric", "source", "published", "ours", "95 % interval", "ours - published")
    return [table("published", "Published numbers beside ours", columns, rows, note=reads)] if rows else []


def _holes(results: Results) -> list[Table | Note]:
    if not results.holes:
        return [note("None: every run of the study is finished, and has every metric.", "good")]
    rows = [
        (words(", ".join(hole.arms)), number(hole.seed), words(hole.stage), words(hole.state, tone="bad" if hole.state == "failed" else ""), words(hole.told))
        for hole in results.holes
    ]
    return [table("holes", "What is missing", ("arm", "seed", "stage", "state", "what"), rows)]


def _differences(results: Results) -> list[Table]:
    keys = list(dict.fromkeys(key for arm in results.arms.values() for key in arm.difference))
    if not keys:
        return []
    bases = {key: pair[0] for arm in results.arms.values() for key, pair in arm.difference.items()}
    rows = []
    for name, arm in results.arms.items():
        own = {key: pair[1] for key, pair in arm.difference.items()}
        cells = [words(fields.unparse(own[key] if key in own else bases[key]), tone="strong" if key in own else "faint") for key in keys]
        rows.append((words(name), *cells))
    return [table("differences", "Config keys in which arms differ from the base", ("arm", *keys), rows)]


def _cost(results: Results) -> list[Table]:
    rows = []
    for arm in results.arms:
        for stage in results.study.stages:
            begun = [results.files[run] for run in _runs(results, arm, stage.name) if run in results.files]
            planned = [results.study.runs[run] for run in _runs(results, arm, stage.name)]
            units = _units(results, arm, stage.name)
            about = planned[0]
            size = next((files.size for files in begun if files.size is not None), None)
            whole = {name: value * about.steps for name, value in units.items()}
            flops = Cell(log.count(whole["model FLOPs"]), whole["model FLOPs"]) if "model FLOPs" in whole else NOTHING
            seconds = Cell(log.duration(whole["seconds"]), whole["seconds"]) if "seconds" in whole else NOTHING
            rate = Cell(log.count(units["tokens"] / units["seconds"]), units["tokens"] / units["seconds"]) if {"tokens", "seconds"} <= set(units) else NOTHING
            rows.append((words(arm), words(stage.name), number(size), number(about.steps), number(about.tokens), flops, rate, seconds))
    reads = (
        "Model FLOPs of training as in timing.jsonl; tokens a second and time are medians of the steps, without evaluation and compilation, means over seeds."
    )
    columns = ("arm", "stage", "parameters", "steps", "tokens", "model FLOPs", "tokens/s", "time of the steps")
    return [table("cost", "What a run costs", columns, rows, note=reads)]


def _values(results: Results) -> Table:
    seeds = list(results.study.seeds)
    rows = [
        (words(arm), words(metric.label), *(number(values[seed]) if seed in values else NOTHING for seed in seeds))
        for name, metric in results.metrics.items()
        for arm, values in results.values[name].items()
    ]
    return table("values", "Values by seed", ("arm", "metric", *(f"seed {seed}" for seed in seeds)), rows, long=True)


def _environment(results: Results) -> list[Table]:
    found: dict[tuple, list[str]] = {}
    for run, files in results.files.items():
        for entry in files.history:
            devices = f"{entry['devices']['count']} x {entry['devices']['kind']}"
            [version] = reading.code([entry])
            found.setdefault((reading.code_shown(version), devices, entry["versions"]["jax"], entry["python"]), []).append(run)
    rows = [(*map(words, key), number(len(set(runs)))) for key, runs in found.items()]
    made = [table("environment", "What the runs ran on", ("code", "devices", "jax", "python", "runs"), rows)] if rows else []
    about = {"study file": results.study.file, "argument": results.study.argument, "made": results.study.made, "folder": results.path}
    return [*made, table("study", "The study", ("what", "value"), [(words(name), words(value)) for name, value in about.items() if value])]

"""What a person is shown of a study before its runs and after them. Figures and verdicts are the report's."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ptm import fields, log
from ptm.study import folder
from ptm.study.folder import Record, State

MANY, KEYS = 40, 4  # arms of a list, differences of an arm


def plan(record: Record, states: dict[str, State]) -> str:
    """The study: stages, arms with their differences, number of runs, tokens, time."""
    lines = [f"Study {record.name}{f' ({record.argument})' if record.argument else ''}: {record.claim}", f"  {record.paper}", ""]
    for stage in record.stages:
        lines.append(f"  stage {stage.name}: {stage.recipe}{f', from the final checkpoint of {stage.after}' if stage.after else ''}")
    lines.append("")
    width = max(len(arm.name) for arm in record.arms)
    for arm in record.arms[:MANY]:
        told = [f"{key} {fields.unparse(base)} -> {fields.unparse(own)}" for key, (base, own) in arm.difference.items()] or ["no difference"]
        shown = "the base" if arm.name == record.base else ", ".join(told[:KEYS]) + (", ..." if len(told) > KEYS else "")
        lines.append(f"  {arm.name:<{width}}  {shown}")
    if len(record.arms) > MANY:
        lines.append(f"  and {len(record.arms) - MANY} more")
    lines += ["", *_amounts(record, states)]
    lines += [f"  note: {note}" for note in record.notes]
    return "\n".join(lines)


def _amounts(record: Record, states: dict[str, State]) -> list[str]:
    wanted = len(record.arms) * len(record.seeds) * len(record.stages)
    shared = f" of {wanted}: those that are the same are made once" if len(record.runs) < wanted else ""
    seeds = ", ".join(map(str, record.seeds))
    left = {run: about for run, about in record.runs.items() if states[run].name not in (folder.FINISHED, folder.STOPPED)}
    done = f"; {len(record.runs) - len(left)} done" if len(left) < len(record.runs) else ""
    of = f"{_plural(len(record.arms), 'arm')}, {_plural(len(record.stages), 'stage')}, seeds {seeds}"
    lines = [f"  {_plural(len(record.runs), 'run')}{shared} ({of}){done}"]
    tokens, steps = sum(about.tokens for about in left.values()), sum(about.steps for about in left.values())
    lines.append(f"  to do: {tokens:,} tokens, padding included, in {steps:,} steps; estimated time, one run after the other: {_time(record, states, left)}")
    if record.search is not None:
        lines.append(
            f"  and a search: {_plural(record.search.trials - len(record.search.asked), 'more trial')} of {record.search.trials}, each a run of every stage and seed"
        )
    if record.halving is not None:
        lines.append(f"  at most: after step {', '.join(map(str, record.halving.rungs))} the best {record.halving.keep:.0%} of the arms go on")
    return lines


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _time(record: Record, states: dict[str, State], left: dict[str, Any]) -> str:
    """Of runs like those that are finished: of the same stage, and of the same arm where there are some."""
    seconds = {run: _seconds(states[run]) / record.runs[run].steps for run in record.runs if states[run].name == folder.FINISHED and _seconds(states[run])}
    total = 0.0
    for run, about in left.items():
        like = [rate for other, rate in seconds.items() if record.runs[other].stage == about.stage]
        nearer = [rate for other, rate in seconds.items() if record.runs[other].stage == about.stage and set(record.users[other]) & set(record.users[run])]
        if not like:
            return f"not known before a run of stage {about.stage} is finished"
        total += statistics.fmean(nearer or like) * (about.steps - (states[run].step or 0))
    return log.duration(total)


def _seconds(state: State) -> float:
    """Seconds of the attempts of a run whose end is known; none of those in which the clock was set back."""
    return sum(max(0.0, attempt["end"] - attempt["start"]) for attempt in state.attempts if attempt["end"] is not None)


def outcome(root: Path, record: Record, states: dict[str, State]) -> str:
    """How many runs are in which state, and what went wrong."""
    counts = Counter(state.name for state in states.values())
    lines = [
        "",
        f"{counts[folder.FINISHED]} of {_plural(len(states), 'run')} finished"
        + "".join(f", {n} {name}" for name, n in counts.items() if name != folder.FINISHED)
        + ".",
    ]
    for run, state in states.items():
        if state.name == "failed":
            times = f" {len(state.attempts)} times" if len(state.attempts) > 1 else ""
            lines.append(f"  {run} failed{times}: {state.error}")
    for rung in folder.rungs(root):
        lines.append(f"  after step {rung['step']} these arms were stopped: {', '.join(rung['stopped']) or 'none'}")
    best = _best(root, record)
    return "\n".join(lines + ([best] if best else []) + [f"  written to {root} ({folder.FILE}, and each run in its folder ARM/seedK/STAGE)"])


def _best(root: Path, record: Record) -> str:
    """The best trial of a search."""
    if record.search is None:
        return ""
    metric = next(metric for metric in record.metrics if metric.name == record.search.metric)
    stage, _, key = metric.name.partition(":")
    found = {}
    for number in record.search.asked:
        runs = next(arm.runs for arm in record.arms if arm.name == folder.trial_name(number))
        values = [folder.value_at(root, stages[stage], key, record.runs[stages[stage]].steps) for stages in runs.values()]
        if None not in values and all(folder.is_finished(root, stages[stage]) for stages in runs.values()):
            found[number] = statistics.fmean(values)
    if not found:
        return ""
    number = max(found, key=lambda one: found[one] if metric.higher else -found[one])
    told = ", ".join(f"{key}={fields.unparse(value)}" for key, value in record.search.asked[number].items())
    return f"  best of {_plural(len(found), 'trial')}: {folder.trial_name(number)}, {told}: {metric.label or metric.name} {metric.scale * found[number]:.4g}"


def versions(record: Record, states: dict[str, State], *, current: dict[str, Any]) -> list[tuple[str, int]]:
    """Versions of the code that the attempts of a study ran on, and the one that is here, with the number of runs of each."""
    found: dict[str, set[str]] = {version(current): set()} if current else {}
    for run in record.runs:
        for attempt in states[run].attempts:
            if attempt["git"]:
                found.setdefault(version(attempt["git"]), set()).add(run)
    return [(name, len(runs)) for name, runs in found.items()]


def version(git: dict[str, Any]) -> str:
    """A version as a reader sees it."""
    return f"{git['commit'][:12]}{' with changes that are not committed' if git['dirty'] else ''}"


def mix(record: Record, states: dict[str, State], *, current: dict[str, Any]) -> str | None:
    """What is to be said of the code of a study's runs: several versions, or one that is not committed; None where all is well. What is here counts while runs are left."""
    if all(states[run].name in (folder.FINISHED, folder.STOPPED) for run in record.runs):
        current = {}
    found = versions(record, states, current=current)
    if len(found) > 1:
        told = "; ".join(f"{name} ({_plural(count, 'run')}{', this one' if current and name == version(current) else ''})" for name, count in found)
        return f"the runs of this study are made by different versions of the code, which its tables would compare too: {told}."
    if current and current["dirty"]:
        return f"the code has changes that are not committed, beside {current['commit'][:12]}: what the runs are made by cannot be told later."
    return None

"""Arms that Optuna asks for (extra `search`): a trial is an arm, run under all seeds of the study, and its value the mean of the metric over them.

Optuna's journal lies in the study's folder, so that a search that was interrupted goes on with what it knows.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import fields
from ptm.fields import ConfigError
from ptm.study import folder
from ptm.study.folder import JOURNAL, Record
from ptm.study.language import Distribution


def ask(root: Path, record: Record, space: Mapping[str, Distribution]) -> tuple[int, dict[str, Any]]:
    """The number of a trial that is to be run next, and its overrides: one that was asked for and never recorded, else a new one."""
    study = _open(root, record)
    distributions = {key: _distribution(entry) for key, entry in space.items()}
    lost = [trial for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished() and trial.number not in record.search.asked]
    try:
        trial = lost[0] if lost else study.ask(distributions)
    except ValueError as error:
        raise ConfigError(f"{root / JOURNAL} holds trials of another space ({error}); take a new --workdir for what the study file says now.") from None
    return trial.number, dict(trial.params)


def tell(root: Path, record: Record, *, lost: frozenset[str]) -> None:
    """Tells Optuna of the trials whose runs are all finished, or lost: those never will be."""
    study = _open(root, record)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() or trial.number not in record.search.asked:
            continue
        runs = [run for stages in _arm(record, trial.number).runs.values() for run in stages.values()]
        if all(run in lost or folder.is_finished(root, run) for run in runs):
            value = _value(root, record, trial.number)
            study.tell(trial.number, value, state=None if value is not None else _optuna().trial.TrialState.FAIL)


def _arm(record: Record, number: int) -> folder.ArmRecord:
    return next(arm for arm in record.arms if arm.name == folder.trial_name(number))


def _value(root: Path, record: Record, number: int) -> float | None:
    """The mean of the metric over the seeds; None where a run ended without a finite one."""
    stage, _, metric = record.search.metric.partition(":")
    runs = [stages[stage] for stages in _arm(record, number).runs.values()]
    values = [folder.value_at(root, run, metric, record.runs[run].steps) if folder.is_finished(root, run) else None for run in runs]
    return None if None in values else statistics.fmean(values)


def _distribution(entry: Distribution) -> Any:
    distributions = _optuna().distributions
    if entry.kind == "choice":
        return distributions.CategoricalDistribution([fields.unparse(value) if isinstance(value, list | tuple) else value for value in entry.values])
    if entry.kind == "integers":
        return distributions.IntDistribution(int(entry.low), int(entry.high))
    return distributions.FloatDistribution(entry.low, entry.high, log=entry.kind == "log_uniform")


def _open(root: Path, record: Record) -> Any:
    optuna = _optuna()
    metric = next(metric for metric in record.metrics if metric.name == record.search.metric)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(root / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=record.name, direction="maximize" if metric.higher else "minimize", load_if_exists=True)
    # Another seed for each trial: a sampler is made anew each time, and would draw the same again.
    study.sampler = optuna.samplers.TPESampler(seed=record.seeds[0] + len(study.get_trials(deepcopy=False)))
    return study


def _optuna() -> Any:
    try:
        import optuna  # an extra: only studies that search need it
    except ImportError as error:
        raise ConfigError(f"a study with a search needs the package optuna ({error}): pip install 'ptm[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def require() -> None:
    """Raises ConfigError where Optuna is not installed."""
    _optuna()

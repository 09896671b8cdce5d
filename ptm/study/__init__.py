"""Studies: ablations as records. A study file (`get_study(argument) -> Study`) declares arms, seeds, metrics and claims; its runs are workdirs below one folder.

    language      what a study file says, and the combinators of arms
    checks        what can be seen of a study without its recipes
    resolution    a study file -> the configs of all its runs, checked, named by identity: study.json
    folder        what the folder of a study says: study.json, the states and the figures of its runs; for reports and launchers
    attempts      run.json of a run, the lock of who is at it, its sign of life
    halving       which arms end at a rung
    search        arms that Optuna asks for
    summary       what a person is shown before and after
    runner        `ptm study`: run after run, each in a process of its own
"""

import os
from collections.abc import Mapping

from ptm.study.folder import Record
from ptm.study.language import (
    Arm,
    Halving,
    Metric,
    Ordering,
    Published,
    Search,
    Stage,
    Study,
    chain,
    choice,
    grid,
    integers,
    log_uniform,
    sample,
    uniform,
    zipped,
)

__all__ = [
    "Arm", "Halving", "Metric", "Ordering", "Published", "Record", "Search", "Stage", "Study", "chain", "choice", "grid", "integers", "log_uniform", "prepare",
    "sample", "uniform", "zipped",
]  # fmt: skip


def prepare(spec: str, *, workdir: str | os.PathLike, overrides: Mapping[str, str] | None = None, write: bool = True) -> Record:
    """The record of the study `FILE.py[:WORDS]` in its folder, every run resolved and checked; starts nothing, and asks no device.

    `overrides` are STAGE.SECTION.KEY -> text. With `write` the folder's study.json is written, so that the data must be there; without it
    nothing is made on disk. Raises ConfigError for whatever is refused.
    """
    from ptm.study import resolution  # loads models and data: who reads studies need not wait for it

    return resolution.prepare(spec, workdir=workdir, overrides=overrides or {}, write=write)

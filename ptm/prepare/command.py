"""`ptm prepare`: makes a data set on this machine or by a runner of Apache Beam, or tries its rules on the first documents."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ptm.fields import ConfigError
from ptm.prepare import card, local, manifest, pool, reading, sketch, trial
from ptm.prepare.options import Options, Running
from ptm.report import text

INTERRUPTED = 75


def prepare(options: Options, running: Running, runner: Sequence[str] | None = None) -> tuple[int, str, dict[str, Any]]:
    """The exit code, a page for the terminal and the facts; `runner` are flags of Apache Beam, or None to work on this machine.

    Raises ConfigError; a signal to stop ends it with 75, and the same command goes on.
    """
    if running.dry_run is not None:
        return _try(options, running.dry_run)
    folder = local.target(options) if runner is None else os.path.join(options.output, options.name, options.version)
    try:
        with _stoppable():
            found = _made(options, running, runner)
    except KeyboardInterrupt:
        print("ptm: interrupted. What is finished is kept; start the same command again.", file=sys.stderr)
        return INTERRUPTED, "", {}
    page = text.terminal(card.card(found)) + f"\n\nwritten to {folder}; card.html in it is a page of this."
    return 0, page, {"folder": str(folder), "counts": found["counts"]}


def _made(options: Options, running: Running, runner: Sequence[str] | None) -> dict[str, Any]:
    if runner is None:
        return local.prepare(options, processes=running.processes or len(os.sched_getaffinity(0)))
    if running.processes is not None:
        raise ConfigError("--processes is for this machine; workers of Apache Beam are given by its own flags, such as --direct_num_workers=2 behind --.")
    try:
        from ptm.prepare import builder  # an extra
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "apache_beam":
            raise
        raise ConfigError(
            "flags behind -- are for Apache Beam, which is not installed; install it with: pip install 'ptm[beam]', or leave them out to work on this machine."
        ) from None
    return builder.prepare(options, runner)


def _try(options: Options, limit: int) -> tuple[int, str, dict[str, Any]]:
    """The rules on the first documents of each source, and nothing written."""
    if options.near:
        sketch.require()
    units: dict[int, list[reading.Unit]] = {}
    for unit in reading.units(options):
        units.setdefault(unit.source, []).append(unit)
    read = (itertools.islice((document for unit in found for document in reading.documents(unit, options)), limit) for found in units.values())
    index = trial.index(options)
    short = index.too_short() if index else {}
    _, counts = trial.prepare(itertools.chain.from_iterable(read), options, index)
    made_from = manifest.identity(options)
    page = card.card(manifest.content(made_from, counts=counts, short=short, bad=[], shards={}))
    return 0, text.terminal(page), {"counts": counts}


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT as interruptions: at once, and again between two tasks, since an exception that is raised where an object is finalised is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        pool.stopping.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        pool.stopping.clear()
        for number, handler in before.items():
            signal.signal(number, handler)

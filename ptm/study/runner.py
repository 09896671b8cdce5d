"""`ptm study`: the runs of a study, one after the other, each in a process of its own, so that none takes the others with it.

A run is started as `ptm study FILE --workdir=DIR --run=NAME`, the command that launchers use too. Several runners on one folder share the work: a run
belongs to the process that holds its lock.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ptm import config as config_lib
from ptm import describe, fields, hosts, lock, registry, train
from ptm.data import pipeline
from ptm.fields import ConfigError
from ptm.study import attempts, folder, halving, identity, resolution, search, summary
from ptm.study.folder import FINISHED, STOPPED, Record, State

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, train.INTERRUPTED
OPEN = ("ready", "cut", "failed")  # states of runs that can be started
LOOK = 2.0  # seconds between two looks at runs of others
LONGEST = 1000  # characters of an error that are kept


def plan(spec: str, *, workdir: str | os.PathLike, overrides: Mapping[str, str], same_code: bool) -> int:
    """Resolves and checks a study, says what would be run, and makes nothing. Raises ConfigError for what would be refused."""
    record, root = resolution.prepare(spec, workdir=workdir, overrides=overrides, write=False), Path(workdir)
    here = (root / folder.FILE).is_file()
    known = folder.read(root).runs if here else {}
    states = {
        run: folder.state(root, run) if run in known else State("ready" if about.needs is None else "waiting", None, [], None)
        for run, about in record.runs.items()
    }
    print(summary.plan(record, states), flush=True)
    _check_code(record, states, same_code=same_code)
    return DONE


def run(spec: str, *, workdir: str | os.PathLike, overrides: Mapping[str, str], same_code: bool, retries: int) -> int:
    """Runs what is left of a study; returns the exit code, 0 all finished, 75 interrupted (the same command goes on), 1 some failed.

    A run that fails is tried again, after the others, until it has failed `retries` + 1 times in a row. Raises ConfigError for a study that is refused.
    """
    if retries < 0:
        raise ConfigError(f"--retries={retries}; allowed: 0 or more.")
    root = Path(workdir)
    if resolution.load(spec).search is not None:
        search.require()
    with attempts.locked(root) if root.is_dir() else contextlib.nullcontext():  # a study that is refused makes no folder
        record = resolution.prepare(spec, workdir=root, overrides=overrides)
    states = {name: folder.state(root, name) for name in record.runs}
    if stale := [name for name, state in states.items() if state.name == "stale"]:
        raise ConfigError(_stale(root, stale[0]))
    print(summary.plan(record, states), flush=True)
    _check_code(record, states, same_code=same_code)
    words = [f"--config.{key}={value}" for key, value in overrides.items()] + ["--same_code"] * same_code
    command = [sys.executable, "-m", "ptm.cli", "study", spec, f"--workdir={root}", *words]
    runner = _Runner(spec, root, command=command, overrides=overrides, retries=retries)
    with runner.signals():
        code = runner.all()
    record = folder.read(root)
    states = {name: folder.state(root, name) for name in record.runs}
    print(summary.outcome(root, record, states), flush=True)
    if code == INTERRUPTED:
        print("Interrupted; start the same command again to go on.", flush=True)
        return code
    return DONE if all(state.name in (FINISHED, STOPPED) for state in states.values()) else FAILED


def _stale(root: Path, name: str) -> str:
    changed = [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in folder.changes(root, name).items()]
    return f"{root / name} holds a run of another config than the study's; move it away, or use a new --workdir:\n" + "\n".join(changed[: resolution.SHOWN])


def _check_code(record: Record, states: Mapping[str, State], *, same_code: bool) -> None:
    """Warns of a mix of versions of the code, or refuses it."""
    told = summary.mix(record, dict(states), current=describe.git_state())
    if told and same_code:
        raise ConfigError(f"--same_code: {told} Commit, check out the version of the other runs, or use a new --workdir.")
    if told:
        print(f"ptm: warning: {told}", file=sys.stderr, flush=True)


class _Runner:
    """The loop over the runs of a folder that are left to do."""

    def __init__(self, spec: str, root: Path, *, command: list[str], overrides: Mapping[str, str], retries: int) -> None:
        self._spec, self._root, self._command, self._overrides, self._retries = spec, root, command, overrides, retries
        self._record = folder.read(root)
        self._done: set[str] = set()  # finished: not looked at again
        self._hopeless: set[str] = set()  # refused in this call: the same again would be refused again
        self._stopping = False
        self._child: subprocess.Popen | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT go to the run that is on, which saves and ends; nothing is started after that."""

        def handle(number: int, _: Any) -> None:
            self._stopping = True
            if self._child is not None:
                self._child.send_signal(number)

        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def all(self) -> int:
        """Runs whatever can be run, until nothing is left."""
        waited: list[str] = []
        while not self._stopping:
            self._record = folder.read(self._root)
            states = self._states()
            candidates = self._candidates(states)
            code = self._one_of(candidates)
            if code == INTERRUPTED:
                return code
            if code is not None:
                continue
            if elsewhere := candidates + [name for name, state in states.items() if state.name == "running"]:
                if elsewhere != waited:
                    print(f"Waiting for {', '.join(elsewhere[:3])}{', ...' if len(elsewhere) > 3 else ''}: another process is at work there.", flush=True)
                    waited = elsewhere
                time.sleep(LOOK)
            elif not self._more(states):
                return DONE
        return INTERRUPTED if self._states() or self._record.search is not None else DONE

    def _one_of(self, candidates: list[str]) -> int | None:
        """Runs the first of some runs that no other runner has claimed; its exit code, or None where there is none."""
        for name in candidates:
            with attempts.claimed(self._root / name) as mine:
                state = folder.state(self._root, name)  # another runner may have been at it meanwhile
                if mine and state.name in OPEN:
                    return self._run(name, state)
        return None

    def _states(self) -> dict[str, State]:
        """The states of all runs that are not known to be finished."""
        states = {name: folder.state(self._root, name) for name in self._record.runs if name not in self._done}
        self._done |= {name for name, state in states.items() if state.name in (FINISHED, STOPPED)}
        return {name: state for name, state in states.items() if name not in self._done}

    def _candidates(self, states: Mapping[str, State]) -> list[str]:
        """What can be started, in the study's order; those that failed come last."""
        waiting = [name for name in states if not halving.at_limit(self._root, self._record, name)]
        fresh = [name for name in waiting if states[name].name in ("ready", "cut")]
        return fresh + [name for name in waiting if states[name].name == "failed" and not self._lost(name, states[name])]

    def _lost(self, name: str, state: State) -> bool:
        """Whether a run failed too often, or one that it needs did."""
        if state.name == "failed":
            return name in self._hopeless or attempts.failures(state.attempts) > self._retries
        return state.name == "waiting"  # asked for only when nothing is left that could be run

    def _more(self, states: Mapping[str, State]) -> bool:
        """Decides a rung, or asks for a trial, once nothing can be run; whether that made more to do."""
        lost = frozenset(name for name, state in states.items() if self._lost(name, state))
        with attempts.locked(self._root):
            if decided := halving.decide(self._root, self._record, lost=lost):
                print(f"After step {decided['step']}: {', '.join(decided['kept'])} go on; stopped: {', '.join(decided['stopped']) or 'none'}.", flush=True)
                return True
            return self._record.search is not None and self._ask(lost)

    def _ask(self, lost: frozenset[str]) -> bool:
        self._record = folder.read(self._root)  # another runner may have asked
        search.tell(self._root, self._record, lost=lost)
        asked = self._record.search.asked
        if len(asked) >= self._record.search.trials:
            return False
        number, values = search.ask(self._root, self._record, resolution.load(self._spec).search.space)
        resolution.prepare(self._spec, workdir=self._root, overrides=self._overrides, asked={**asked, number: values})
        print(
            f"{folder.trial_name(number).capitalize()} of {self._record.search.trials}: {', '.join(f'{key}={fields.unparse(value)}' for key, value in values.items())}.",
            flush=True,
        )
        return True

    def _run(self, name: str, state: State) -> int:
        """Starts a run, waits for it, and notes its end where it could not."""
        number, count = list(self._record.runs).index(name) + 1, len(self._record.runs)
        again = {"cut": f", goes on after step {state.step or 0}", "failed": f", failed {attempts.failures(state.attempts)} times, once more"}
        print(f"\nRun {number} of {count}: {name}{again[state.name] if state.name in again else ''}.", flush=True)
        # A group of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
        self._child = child = subprocess.Popen([*self._command, f"--run={name}"], process_group=0)
        if self._stopping:  # a signal came while it was started
            child.send_signal(signal.SIGTERM)
        code = child.wait()
        self._child = None
        code = 128 - code if code < 0 else code
        if self._stopping and code in (128 + signal.SIGTERM, 128 + signal.SIGINT):  # before it could handle them
            code = INTERRUPTED
        if code == USAGE:
            self._hopeless.add(name)
        path = self._root / name
        own = [attempt for attempt in attempts.read(path)["attempts"][len(state.attempts) :] if attempt["pid"] == child.pid]
        if own and own[-1]["end"] is None or not own and code not in (DONE, INTERRUPTED):
            attempts.note(path, pid=child.pid, identity=self._record.runs[name].identity, git=describe.git_state(), exit_code=code, error=_told(code))
        return DONE if code == INTERRUPTED and not own and not self._stopping else code  # another process, not a runner, had it


def _told(code: int) -> str | None:
    if code in (DONE, INTERRUPTED):
        return None
    return f"ended by {signal.Signals(code - 128).name}" if code > 128 else f"ended with {code} before it began"


def run_one(spec: str, *, workdir: str | os.PathLike, name: str, overrides: Mapping[str, str], same_code: bool) -> int:
    """Runs or continues one run of a study, as far as it may go now; returns the exit code as `ptm train` does, 75 also where another process has the run.

    It is run as study.json has it, which is made where there is none. Raises ConfigError for a run that is refused, or whose parent is not finished.
    """
    root = Path(workdir)

    def known() -> bool:
        if not (root / folder.FILE).is_file():
            resolution.prepare(spec, workdir=root, overrides=overrides)
        return True

    hosts.first(known)
    record = folder.read(root)
    about = folder.run_of(root, name)
    file, _, argument = spec.partition(":")
    if (record.name, record.argument, record.overrides) != (Path(file).stem, argument, dict(overrides)):
        given = ", ".join(
            [f"{record.name}{f':{record.argument}' if record.argument else ''}", *(f"--config.{key}={value}" for key, value in record.overrides.items())]
        )
        raise ConfigError(f"{root} holds the study {given}; --run wants the same words. `ptm study` without --run takes up changes.")
    if same_code:
        found = hosts.first(lambda: summary.mix(record, {run: folder.state(root, run) for run in record.runs}, current=describe.git_state()))
        if found:
            raise ConfigError(f"--same_code: {found} Commit, check out the version of the other runs, or use a new --workdir.")
    refused, done, until = hosts.first(lambda: _standing(root, record, name))
    if refused:
        raise ConfigError(refused)
    if done:
        if jax.process_index() == 0:
            print(done, flush=True)
        return DONE
    config = registry.resolve(config_lib.complete(identity.unflatten(folder.placed(root, name)), registry.REGISTRIES))
    for kind, fingerprint in (("data", lambda: pipeline.fingerprint(config.data)), ("tokenizer", lambda: resolution.tokenizer_fingerprint(config))):
        before = about.fingerprints[kind]
        if before is not None and before != (now := fingerprint()):
            raise ConfigError(
                f"the {kind} of {root / name} changed since the study was made: fingerprint {before[:12]} -> {(now or 'none')[:12]}. Restore the files, or start "
                "`ptm study` without --run, which makes it another run if it has not begun."
            )
    with contextlib.ExitStack() as stack:
        held: list[attempts.Attempt] = []

        def take() -> str:
            try:
                held.append(stack.enter_context(attempts.hold(root / name, identity=about.identity, git=describe.git_state())))
            except lock.Busy as error:
                return str(error)
            return ""

        if busy := hosts.first(take):
            print(f"ptm: {busy}", file=sys.stderr, flush=True)
            return INTERRUPTED
        try:
            code = train.train(config, workdir=root / name, until=until)
        except BaseException as error:
            told = str(error) if isinstance(error, ConfigError | FloatingPointError) else f"{type(error).__name__}: {error}"
            for attempt in held:
                attempt.end(_code(error), error=told[:LONGEST])
            raise
        for attempt in held:
            attempt.end(code)
    return code


def _standing(root: Path, record: Record, name: str) -> tuple[str, str, int | None]:
    """Why a run is refused, or why there is nothing to do, and the step that it may go to."""
    if folder.changes(root, name):
        return _stale(root, name), "", None
    if folder.is_finished(root, name):
        return "", f"{root / name} is finished.", None
    if name in folder.stopped(root):
        return "", f"{root / name} was stopped at a rung.", None
    needs = record.runs[name].needs
    if needs and not folder.is_finished(root, needs):
        return f"{name} starts from the final checkpoint of {needs}, which is not finished; run that one first.", "", None
    if halving.at_limit(root, record, name):
        return "", f"{root / name} waits for the other runs at a rung; `ptm study` without --run decides who goes on.", None
    return "", "", halving.limit(root, record, name)


def _code(error: BaseException) -> int:
    return USAGE if isinstance(error, ConfigError) else INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED

"""Several processes as one program: how they join, what they tell each other, and how they end together.

All communication between processes that is not part of a compiled step is in three functions: `initialize` joins them, `gather` gives the values of all to
all, `vote` adds up counts on the devices without waiting. What the host says goes through the key-value store of jax.distributed, which needs no device and
no order of launches; `first` and the checks below are made of `gather`. Where there is one process, all of them return at once.

A process that fails says so in the same store, where a thread of every other one looks: all end with its exit code, whatever they wait for, and process 0
says why. (JAX itself would wait: for the collective, for heartbeats, for the others to shut down.) One that is killed, or hangs as a whole, says nothing: process 0
misses its signs of life in the store, the others miss the answers of process 0, whose store it is, and all end with the code after which launchers start them again.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters, distributed, xla_bridge  # the store, detection without joining, and whether there are devices yet, have no public name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ptm import fields, processes
from ptm.fields import ConfigError
from ptm.processes import Place

USAGE, INTERRUPTED = 2, 75
LOOK = 0.5  # seconds between two looks at whether another process failed
GRACE = 5.0  # seconds in which all processes should have seen that
PATIENCE = 60.0  # seconds after which process 0 says for whom it waits
SHARED = 20.0  # seconds in which a file should be seen by other hosts
BEATS = 10  # signs of life within the time that a process may give none
BACKSTOP = 60  # seconds after that time in which JAX itself ends what is left
GATHERED, ENDED, ALIVE = "ptm/gathered/{}/", "ptm/ended/", "ptm/alive/"
AGAIN = "Start the same command again to go on from the last checkpoint."

_state = distributed.global_state
_numbers = itertools.count()
_left, _ending = threading.Event(), threading.Lock()
_answers = 0  # of the store, to the thread that looks there


def initialize(place: Place) -> None:
    """Joins the processes of a run; does nothing for one that is alone, as far as it is told and JAX detects (SLURM, Open MPI, Kubernetes, TPU).

    Raises ConfigError if it is told too little, or cannot join. Ends the process where others do not come in time.
    """
    if jax.distributed.is_initialized() or place.processes == 1:
        return
    found = _detected(place)
    if found.processes == 1 or (found.coordinator, found.processes, found.process) == (None, None, None):
        return
    missing = [f"--{name}" for name in processes.VARIABLES if getattr(found, name) is None]
    if missing:
        raise ConfigError(f"this is one of several processes, but not all that it must know is given or detected; add {' and '.join(missing)}.")
    fields.check(found, "")
    # Several processes of a host share its accelerators: JAX gives each the one of its number. One alone takes all, where JAX would take the first.
    shared = processes.on_this_host() > 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which asks for a checkpoint
    timer = threading.Timer(place.join_timeout, _not_joined, (found,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            found.coordinator, found.processes, found.process, local_device_ids=None if shared else [], initialization_timeout=place.join_timeout + 60,
            heartbeat_timeout_seconds=place.heartbeat + BACKSTOP,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_advice(found, f"cannot join the others ({str(error).splitlines()[0]})")) from None
    finally:
        timer.cancel()


def started() -> bool:
    """Whether JAX has opened the devices of this process, after which it reads XLA_FLAGS no more."""
    return xla_bridge.backends_are_initialized()


def gather(value: Any) -> list[Any]:
    """The JSON values that all processes give, in their order, on each: nobody returns before all have called. For what is small and rare."""
    if _state.num_processes == 1:
        return [value]
    number, waited, pause = next(_numbers), time.monotonic(), 0.001
    folder = GATHERED.format(number)
    _state.client.key_value_set(f"{folder}{_state.process_id}", json.dumps(value))
    while len(found := _read(folder)) < _state.num_processes:
        time.sleep(pause)
        pause = min(2 * pause, LOOK)
        if _state.process_id == 0 and time.monotonic() - waited > PATIENCE:
            print(f"ptm: waiting for process {', '.join(str(n) for n in range(_state.num_processes) if n not in found)}.", file=sys.stderr, flush=True)
            waited = time.monotonic()
    if _state.process_id == 0 and number:
        _state.client.key_value_delete(GATHERED.format(number - 1))  # all have called again, so all have read it
    return [found[n] for n in range(_state.num_processes)]


def vote(*counts: int) -> Any:
    """Sums of what the processes give, each counted once for each of its devices, the same everywhere: an array to look at later, since nobody waits here."""
    if _state.num_processes == 1:
        return np.asarray(counts, np.int32)
    everywhere, total = _ballot()
    shape = (everywhere.mesh.size, len(counts))
    return total(jax.make_array_from_callback(shape, everywhere, lambda index: np.asarray([counts], np.int32)))


@functools.cache
def _ballot() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.asarray(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec("devices"))
    return everywhere, jax.jit(functools.partial(jnp.sum, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))


def first(function: Callable[[], Any]) -> Any:
    """The JSON value that `function` returns on process 0, on all: what depends on a folder that changes is judged once. The others wait for it."""
    return gather(function() if _state.process_id == 0 else None)[0]


def make_shared(folder: Path) -> None:
    """Makes a folder, which all processes must see. Raises ConfigError where they do not."""

    def mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        if _state.num_processes == 1:
            return ""
        name = f".shared-{secrets.token_hex(8)}"  # never looked for before, so that no file system remembers its absence
        (folder / name).touch()
        return name

    name = first(mark)
    if not name:
        return
    until = time.monotonic() + SHARED
    while not (there := (folder / name).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = [f"{number} ({host})" for number, (seen, host) in enumerate(gather([there, socket.gethostname()])) if not seen]
    if _state.process_id == 0:
        (folder / name).unlink()
    if blind:
        raise ConfigError(
            f"--workdir={folder} is not one folder for all processes: process {', '.join(blind)} does not see what process 0 ({socket.gethostname()}) wrote "
            "there. Give a path on a file system that all hosts share."
        )


def require_equal(**values: str) -> None:
    """Raises ConfigError where what must be the same on all processes is not, naming what."""
    found = gather([socket.gethostname(), values])
    for number, (host, theirs) in enumerate(found):
        if differing := [name for name in values if theirs[name] != found[0][1][name]]:
            raise ConfigError(
                f"process {number} ({host}) has another {' and another '.join(differing)} than process 0 ({found[0][0]}); start all processes with the same command, "
                "the same files and the same versions."
            )


@contextlib.contextmanager
def joined(place: Place, *, told: Callable[[BaseException], tuple[str, int]]) -> Iterator[None]:
    """The body as one of several processes that begin and end together; as it is where this one is alone.

    Process 0 alone prints. An exception in any ends all, with the message and exit code that `told` makes of it.
    """
    before = jax.distributed.is_initialized()
    initialize(place)
    if before or _state.num_processes == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        if _state.process_id:
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silent))
            stack.enter_context(contextlib.redirect_stderr(silent))
            logging.getLogger().setLevel(logging.ERROR)
        signal.signal(signal.SIGTERM, lambda *_: fail("SIGTERM: nothing was begun that is lost. Start the same command again.", INTERRUPTED))
        threading.Thread(target=_watch, args=(place.heartbeat,), name="hosts", daemon=True).start()
        if _state.process_id:
            threading.Thread(target=_guard, args=(place.heartbeat,), name="store", daemon=True).start()
            _instead_of_abort()
        try:
            yield
            gather(None)  # while one works, it can fail, and the others must not have gone
        except BaseException as error:
            fail(*told(error))
        _left.set()
        jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process at once, and all others, with an exit code, unless another one is about to; process 0 says why."""
    if _state.num_processes == 1:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)
    try:
        ending = bool(_read(ENDED))
    except RuntimeError:
        _abandoned("is gone")
    _end(None if ending else _entry(message, code))


def _read(folder: str) -> dict[int, Any]:
    """What processes wrote into a folder of the store, by their numbers."""
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in _state.client.key_value_dir_get(folder)}


class _Silence:
    """For how long a value has not changed, in seconds during which this process ran: one that was stopped itself has not waited."""

    def __init__(self) -> None:
        self._value, self._looked, self.seconds = None, time.monotonic(), 0.0

    def look(self, value: Any) -> float:
        before, self._looked = self._looked, time.monotonic()
        self.seconds = 0.0 if value != self._value else self.seconds + min(self._looked - before, 2 * LOOK)
        self._value = value
        return self.seconds


def _watch(limit: float) -> None:
    """Gives signs of life, and ends this process once another one says that it failed; on process 0 also if one gives no sign of life within the limit."""
    global _answers
    own, silences, beat = [socket.gethostname(), 0], [_Silence() for _ in range(_state.num_processes)], 0.0
    while not _left.wait(LOOK):
        with contextlib.suppress(RuntimeError):  # a store that is gone is for the guard
            if time.monotonic() - beat > limit / BEATS:
                beat, own[1] = time.monotonic(), own[1] + 1
                _state.client.key_value_set(f"{ALIVE}{_state.process_id}", json.dumps(own), allow_overwrite=True)
            if _read(ENDED):
                _end(None)
            _answers += 1
            if _state.process_id == 0:
                signs = _read(ALIVE)
                lost = [number for number, silence in enumerate(silences) if silence.look(signs.get(number)) > limit]
                if lost:
                    who = ", ".join(f"{number} ({signs[number][0]})" if number in signs else str(number) for number in lost)
                    _end(_entry(_missed(f"process {who} has given no sign of life for {limit:.0f} s"), INTERRUPTED, lost=len(lost)))


def _guard(limit: float) -> None:
    """Ends this process if the store has not answered within the limit; the thread that asks it may hang with it."""
    silence = _Silence()
    while not _left.wait(LOOK):
        if silence.look(_answers) > limit:
            _abandoned(f"has not answered for {limit:.0f} s")


def _missed(what: str) -> str:
    return f"ptm: {what}: it was killed, its host is lost, or it hangs (--heartbeat says how long to wait). {AGAIN}"


def _abandoned(what: str) -> NoReturn:
    """Ends this process, whose store is not there, unless it is about to end for a reason that the store gave."""
    _ending.acquire(timeout=GRACE + LOOK)
    print(_missed(f"process 0, at {_state.coordinator_address}, {what}"), file=sys.__stderr__, flush=True)
    os._exit(INTERRUPTED)


def _instead_of_abort() -> None:
    """Where process 0 is gone JAX aborts this one at once, from a thread outside of Python: it ends as if the guard had seen that. Other aborts stay what they are."""
    library = ctypes.CDLL(None)

    def heard(number: int) -> None:
        answers = _answers
        time.sleep(3 * LOOK)
        if _answers == answers and not _left.is_set():
            _abandoned("is gone")
        library.signal(number, ctypes.c_void_p(0))  # and abort() goes on

    _instead_of_abort.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(heard)  # kept as long as the process
    library.signal(signal.SIGABRT, _instead_of_abort.handler)


def _entry(message: str, code: int, *, lost: int = 0) -> dict[str, Any]:
    """Why a process ends all, and how many others can say nothing any more."""
    return {"message": message, "code": code, "host": socket.gethostname(), "lost": lost}


def _end(entry: dict[str, Any] | None) -> NoReturn:
    """Says that this process ends, as all others, and why if it is the reason; leaves when all have said so."""
    if not _ending.acquire(blocking=False):  # another thread is at it, or this one, which a signal interrupted
        time.sleep(2 * GRACE)
        os._exit(1)
    found: dict[int, Any] = {}
    with contextlib.suppress(RuntimeError):
        _state.client.key_value_set(f"{ENDED}{_state.process_id}", json.dumps(entry))
        until = time.monotonic() + GRACE
        while len(found := _read(ENDED)) + sum(each["lost"] for each in found.values() if each) < _state.num_processes and time.monotonic() < until:
            time.sleep(0.02)
    reasons = {number: reason for number, reason in found.items() if reason is not None} or {_state.process_id: entry}
    number, reason = min(reasons.items())
    if reason is None:
        reason = {"message": "ptm: another process ended, and process 0 with it.", "code": 1}
    if _state.process_id == 0 or not found:
        where = "" if len(reasons) > 1 or number == _state.process_id else f"ptm: process {number} ({reason['host']}) failed:\n"
        print(where + reason["message"], file=sys.__stderr__, flush=True)
    if _state.process_id == 0:
        time.sleep(10 * 0.02)  # the store goes with this process: the others read it until all have ended
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(reason["code"])


def _detected(place: Place) -> Place:
    """The place, with what JAX finds of a cluster where something is missing."""
    if None not in (place.coordinator, place.processes, place.process):
        return place
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in every pod it warns of what only those of a Job need
            coordinator, count, number, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                place.coordinator, place.processes, place.process, [], None, place.join_timeout
            )
    except Exception as error:  # of whatever library it asks
        raise ConfigError(
            f"the cluster that this process runs in cannot be asked for its other processes ({type(error).__name__}: {error}). Give --coordinator, --processes and "
            "--process, or --processes=1 for a process that is alone."
        ) from None
    if count is None and processes.INDEXED in os.environ:
        raise ConfigError(
            "this pod is one of an indexed Job of Kubernetes, and JAX cannot ask for the others: pip install 'jax[k8s]', or give --coordinator, --processes and "
            "--process; or --processes=1 for pods that work each for itself."
        )
    return dataclasses.replace(place, coordinator=coordinator, processes=count, process=number)


def _advice(place: Place, what: str) -> str:
    return (
        f"process {place.process} of {place.processes} {what} at {place.coordinator}. Check that all {place.processes} processes were started, each with a --process of its "
        "own from 0 on, that process 0 runs on that host, that the port is free there and open to the others; --join_timeout=SECONDS waits longer."
    )


def _not_joined(place: Place) -> NoReturn:
    print(f"ptm: {_advice(place, f'has waited {place.join_timeout} s for the others')}", file=sys.stderr, flush=True)
    os._exit(USAGE)

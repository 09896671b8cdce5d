"""Checkpoints of a run: saved in the background, sealed with hashes, restored onto any mesh.

A folder holds one folder a step, `<step>/{state,data,meta}/` and `<step>/manifest.json` with the size and sha256 of every file below
the three. Orbax writes the arrays of `state`; `data/stream-00003.json` is the position of one logical stream, written by the process
that owns it; `meta/meta.json` is what the caller says about the run. A step appears by the rename of a finished folder, its manifest
included, so a kill at any moment leaves the earlier steps as they were. Evaluations that a stop cut short are owed: `meta/owed.json` names them, and what they
gave later is in `<step>/evaluated.json`, which the manifest does not know. Paths are those of a POSIX file system that all processes see.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ptm import atomic, fields, hosts, tree, untrusted
from ptm.fields import ConfigError, StorageError
from ptm.saved import EVALUATED, OWED, damage, seal, steps_in, write

WEIGHTS = ("params", "ema")
DELETING = ".deleting"
LEFTOVER = re.compile(rf"\d+({re.escape(ocp.utils.TMP_DIR_SUFFIX)}.*|{re.escape(DELETING)})")
MAX_LINES = 20

# Orbax tells every step of a save at the level INFO of absl's logger, which belongs to the user's own messages, and each error that it raises besides.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno >= logging.WARNING and not record.exc_info)


class CheckpointError(StorageError):
    """A checkpoint could not be written; the message holds the step, the folder and the reason."""


FULL = ("RESOURCE_EXHAUSTED", "No space left on device", "Disk quota exceeded")  # how libraries say so


def _reason(error: Exception) -> str:
    """Why a save failed, in one line: of a library's error, which holds the paths of its temporary files, what is known of it."""
    text = str(error)
    if any(word in text for word in FULL):
        return "No space left on device"
    if "PERMISSION_DENIED" in text or isinstance(error, PermissionError):
        return "Permission denied"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


@dataclasses.dataclass
class _JsonArgs(ocp.args.CheckpointArgs):
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


class _JsonFiles(ocp.AsyncCheckpointHandler):
    """Orbax item of several JSON files (name -> text); every process writes those that it was given."""

    async def async_save(self, directory: Path, args: _JsonArgs) -> list[ocp.future.Future]:
        async def write() -> None:
            self.save(directory, args)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="json_files")]

    def save(self, directory: Path, args: _JsonArgs) -> None:
        for name, text in args.files.items():
            write(directory / name, text)

    def restore(self, directory: Path, args: _JsonArgs | None = None) -> dict[str, Any]:
        return {path.name: untrusted.read_json(path) for path in sorted(directory.glob("*.json"))}


class _Step(ocp.CompositeCheckpointHandler):
    """The items of a step, and their manifest: process 0 finalizes while the folder still has its temporary name."""

    async def async_save(self, directory: Path, args: "_StepArgs") -> list[ocp.future.Future]:
        self._futures = await super().async_save(directory, args)
        return self._futures

    def settle(self) -> None:
        """Waits for what else a failed save was writing: Orbax stops at the first error, and the next save must not meet the rest."""
        for future in self._futures:
            with contextlib.suppress(Exception):
                future.result()

    def finalize(self, directory: Path) -> None:
        super().finalize(directory)
        seal(Path(directory))


class _StepArgs(ocp.args.Composite):
    pass


for _handler, _args in ((_JsonFiles, _JsonArgs), (_Step, _StepArgs)):
    ocp.args.register_with_handler(_handler, for_save=True, for_restore=True)(_args)


def _flat(values: Any) -> dict[str, Any]:
    """Path -> leaf of any pytree; positions in tuples and fields of named tuples are components like the keys of dicts."""
    leaves = jax.tree_util.tree_flatten_with_path(values)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of the state have the same path"
    return flat


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


class Checkpoints:
    """The checkpoints of one folder. Close it, or use it as a context manager: what is still being written is finished there.

    After each commit the newest `keep_latest` and the `keep_best` best by `metric` ('min' or 'max' is better) stay, others are deleted.
    `read_only` never changes the folder. With several processes all of them make the same calls; process 0 alone renames and deletes.
    """

    def __init__(self, folder: str | os.PathLike, *, keep_latest: int, keep_best: int, metric: str, mode: str, read_only: bool = False) -> None:
        if "://" in str(folder):
            raise ConfigError(f"checkpoint folder '{folder}' is not a path of a file system; mount the storage and give the path.")
        if keep_latest < 1 or keep_best < 0 or mode not in ("min", "max"):
            raise ConfigError(f"keep_latest={keep_latest}, keep_best={keep_best}, mode={mode!r}; allowed: at least 1, at least 0, min or max.")
        self.folder = Path(folder).expanduser().absolute()
        self.keep_latest, self.keep_best, self.metric, self.mode, self.read_only = keep_latest, keep_best, metric, mode, read_only
        self._verified: dict[Path, list] = {}
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        if read_only:
            return
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        # Compression would save a few percent of a file of weights and take the cores from the training step.
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        # Folders are made before `save` returns: when that fails in the background, the writers wait for minutes for their folders.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        composite = ocp.CompositeOptions(async_options=options)
        self._step = _Step(composite_options=composite, state=arrays, data=_JsonFiles(), meta=_JsonFiles())
        self._saver = ocp.AsyncCheckpointer(self._step, async_options=options)

    @classmethod
    def reader(cls, folder: str | os.PathLike) -> "Checkpoints":
        """The checkpoints of a folder to read from; `best` goes by the metric that the newest step was saved with."""
        reader = cls(folder, keep_latest=1, keep_best=0, metric="", mode="min", read_only=True)
        for step in reversed(reader.steps()):
            if record := reader._record(step):
                reader.metric, reader.mode = record["metric"], record["mode"]
                break
        return reader

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def save(
        self, step: int, state: Any, *, streams: Mapping[int, Any], meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None, owed: Sequence[str] = ()
    ) -> bool:  # fmt: skip
        """Starts to save a step and returns when the arrays of `state` may be donated or overwritten; waits for the save before it.

        `state` is a pytree of arrays under string keys, `streams` maps the logical streams of this process to their JSON state, `meta`
        is any JSON, `owed` names evals that are still to be made. False says that a valid checkpoint of this step exists and nothing was done; a damaged one is set aside. Raises
        CheckpointError if this save cannot start or the one before it failed.
        """
        assert not self.read_only, "opened with read_only"
        self.wait()
        data = {f"stream-{stream:05d}.json": json.dumps(position) for stream, position in streams.items()}
        record = {"metric": self.metric, "mode": self.mode, "values": {name: float(value) for name, value in (metrics or {}).items()}}
        about = {"meta.json": json.dumps(meta), "metrics.json": json.dumps(record)} | ({Path(OWED).name: json.dumps(list(owed))} if owed else {})
        flat = _flat(state)
        for path, leaf in flat.items():
            assert isinstance(leaf, jax.Array | np.ndarray), f"{path} is a {type(leaf).__name__}, not an array"
        if not hosts.first(lambda: self._make_room(step)):
            return False
        state, about = tree.unflatten(flat), about if jax.process_index() == 0 else {}
        args = _StepArgs(state=ocp.args.PyTreeSave(state), data=_JsonArgs(data), meta=_JsonArgs(about))
        try:
            self._saver.save(self.folder / str(step), args=args)
        except Exception as error:
            raise self._failure(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step,), name="checkpoint")
        self._thread.start()
        return True

    def settle(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds what the evals that were owed at a step gave."""
        if jax.process_index() == 0:
            atomic.write(self.folder / str(step) / EVALUATED, json.dumps({name: float(value) for name, value in metrics.items()}))

    def wait(self) -> None:
        """Returns when no save is in flight. Raises CheckpointError, once, if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finishes the save in flight and ends; raises like `wait`."""
        try:
            self.wait()
        finally:
            if not self.read_only:
                self._saver.close()

    def steps(self) -> list[int]:
        """Committed steps, ascending; whether their files are sound is for `valid` to say."""
        return steps_in(self.folder)

    def valid(self, step: int) -> str | None:
        """None if every file of the step is as it was written, else the reason. Files unchanged since they were last hashed are not hashed again."""
        return damage(self.folder / str(step), self._verified)

    def newest_valid(self) -> int | None:
        """The newest sound step, or None. Damaged ones on the way are renamed to <step>.damaged-<n> (skipped if read_only) with a warning."""
        return next(iter(self.newest(1)), None)

    def newest(self, count: int) -> list[int]:
        """The `count` newest sound steps, newest first, or as many as there are; treats damaged ones like `newest_valid`."""

        def find() -> list[int]:
            candidates = iter(reversed(self.steps()))
            found = (self._first_valid(candidates) for _ in range(count))
            return [step for step in found if step is not None]

        return hosts.first(find)

    def best(self) -> int | None:
        """The sound step with the best `metric` among those that have it (the newer of equals), or None; treats damaged ones like `newest_valid`."""
        return hosts.first(lambda: self._first_valid(self._ranked()))

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that came with a save, and those that were owed; empty if there were none."""
        try:
            later = dict(untrusted.read_json(self.folder / str(step) / EVALUATED))
        except (OSError, ValueError, TypeError):
            later = {}
        return self._record(step).get("values", {}) | later

    def meta(self, step: int) -> Any:
        """The JSON that came with a save."""
        return _JsonFiles().restore(self.folder / str(step) / "meta")["meta.json"]

    def structure(self, step: int) -> dict[str, Any]:
        """Shapes and dtypes of the saved state as nested dicts of jax.ShapeDtypeStruct; positions in tuples are the keys '0', '1', ..."""
        self.require(step)
        saved = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "state").tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)

    def restore(self, step: int, abstract_state: Any, *, cast: bool = False) -> tuple[Any, dict[int, Any], dict[str, Any]]:
        """(state, streams, meta) of a step; `streams` holds those of all processes.

        `abstract_state` is the tree of jax.ShapeDtypeStruct to restore to; its shardings may be of any mesh (none = the first device).
        Raises ConfigError if the step is missing or damaged, or lists the paths, shapes and dtypes that differ; `cast` allows dtypes.
        """
        state = self._read(step, abstract_state, self.structure(step), "", cast)
        streams = {int(name[len("stream-") : -len(".json")]): value for name, value in _JsonFiles().restore(self.folder / str(step) / "data").items()}
        return state, streams, self.meta(step)

    def restore_params(self, step: int, abstract_params: Any, *, which: str = "params", cast: bool = False, subset: bool = False) -> Any:
        """The parameters of a step ('params', or 'ema': their moving average) without the rest of the state; otherwise as `restore`.

        `subset` leaves out parameters of the checkpoint that `abstract_params` does not have.
        """
        fields.lookup(dict.fromkeys(WEIGHTS), which, "kind of weights")
        saved = self.structure(step)
        if which not in saved:
            raise ConfigError(f"checkpoint {self.folder / str(step)} holds no '{which}'; it holds {_listed(saved)}. (train.ema_decay keeps 'ema'.)")
        known = tree.paths(saved[which])
        if subset:
            known = {path: leaf for path, leaf in known.items() if path in _flat(abstract_params)}
        return self._read(step, abstract_params, tree.unflatten(known), which + "/", cast)

    def average(self, steps: Sequence[int], abstract_params: Any, *, which: str = "params", subset: bool = False) -> Any:
        """Mean of the parameters of several steps, summed in float32 with one of them in memory at a time, in the dtypes of `abstract_params`."""
        if not steps:
            raise ConfigError(f"no steps to average; {self.folder} has {_listed(self.steps())}.")
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), abstract_params)
        add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more), donate_argnums=0)
        total = self.restore_params(steps[0], wide, which=which, cast=True, subset=subset)
        for step in steps[1:]:
            total = add(total, self.restore_params(step, wide, which=which, cast=True, subset=subset))
        return jax.tree.map(lambda sum_, leaf: (sum_ / len(steps)).astype(leaf.dtype), total, abstract_params)

    def _read(self, step: int, abstract: Any, saved: dict[str, Any], prefix: str, cast: bool) -> Any:
        wanted, known = _flat(abstract), tree.paths(saved)
        lines = tree.diff(tree.unflatten(wanted), saved).splitlines()
        if not cast:
            both = [path for path in wanted if path in known and wanted[path].dtype != known[path].dtype]
            lines += [f"dtype     {path} expected {wanted[path].dtype}, got {known[path].dtype}" for path in both]
        if lines:
            more = [f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            raise ConfigError(
                f"checkpoint {self.folder / str(step)} does not fit (expected: this run, got: the checkpoint; missing: not in the checkpoint):\n"
                + "\n".join(lines[:MAX_LINES] + more)
                + "\nUse the config that it was saved with."
            )
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        item = tree.unflatten({prefix + path: leaf for path, leaf in wanted.items()})
        args = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding or here, global_shape=leaf.shape, dtype=leaf.dtype), item)
        restore = ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
        values = tree.paths(ocp.PyTreeCheckpointer().restore(self.folder / str(step) / "state", args=restore))
        return jax.tree.unflatten(jax.tree.structure(abstract), [values[prefix + path] for path in wanted])

    def require(self, step: int) -> None:
        """Raises ConfigError unless the step is there and sound."""
        if step not in self.steps():
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are: {_listed(self.steps())}.")
        if reason := hosts.first(lambda: self.valid(step)):
            raise ConfigError(f"checkpoint {self.folder / str(step)} is damaged: {reason}. Other steps: {_listed(s for s in self.steps() if s != step)}.")

    def _record(self, step: int) -> dict[str, Any]:
        try:
            record = untrusted.read_json(self.folder / str(step) / "meta" / "metrics.json")
            return record if {"metric", "mode", "values"} <= set(record) else {}
        except (OSError, ValueError, TypeError):
            return {}

    def _ranked(self) -> list[int]:
        """Steps that have the metric, best first."""
        values = {step: self.metrics(step).get(self.metric, math.nan) for step in self.steps()}
        sign = 1 if self.mode == "min" else -1
        return sorted((step for step, value in values.items() if math.isfinite(value)), key=lambda step: (sign * values[step], -step))

    def _first_valid(self, candidates: Iterable[int]) -> int | None:
        for step in candidates:
            reason = self.valid(step)
            if reason is None:
                return step
            done = "it is skipped" if self.read_only else f"it is kept as {self._set_aside(step).name}"
            warnings.warn(f"checkpoint {self.folder / str(step)} is damaged: {reason}; {done} and an earlier one is looked for.", stacklevel=5)
        return None

    def _set_aside(self, step: int) -> Path:
        number = 1
        while (target := self.folder / f"{step}.damaged-{number}").exists():
            number += 1
        return (self.folder / str(step)).rename(target)

    def _make_room(self, step: int) -> bool:
        """Whether the step is to be written; what is there but not valid is set aside."""
        if not (self.folder / str(step)).exists():
            return True
        reason = self.valid(step)
        if reason is not None:
            target = self._set_aside(step)
            warnings.warn(f"checkpoint {self.folder / str(step)} is damaged: {reason}; it is kept as {target.name} and written anew.", stacklevel=5)
        return reason is not None

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        kept = _listed(self.steps())
        return CheckpointError(
            f"saving step {step} to {self.folder} failed: {_reason(error)}. Steps that are there: {kept}. Mend that, and start the same command again."
        )

    def _finish(self, step: int) -> None:
        try:
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                self._prune(step)
        except Exception as error:
            self._step.settle()
            self._error = self._failure(step, error)
            self._error.__cause__ = error

    def _prune(self, newest: int) -> None:
        # The new name must be on the disk before an old step goes, or a power cut could take both.
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        steps = self.steps()
        keep = {newest, *steps[-self.keep_latest :], *self._ranked()[: self.keep_best]}
        for step in steps:
            if step not in keep:
                # Renamed first: a kill in the middle of the deletion must not leave what looks like a damaged step.
                shutil.rmtree((self.folder / str(step)).rename(self.folder / f"{step}{DELETING}"))

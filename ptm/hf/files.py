"""Directories of the reference library: config.json and safetensors files, read and written. Nothing that a file names is executed.

Only safetensors is read: the other formats of weights need a library of their own or may run code when they are opened.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ptm import untrusted
from ptm.fields import ConfigError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".pkl")
FLOATS = ("F32", "F16", "BF16")  # types whose values float32 holds exactly
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
SHARD_BYTES = 5_000_000_000
MOST_HEADER = 32 << 20  # bytes; 100,000 tensors take about 12 million


class Tensor(NamedTuple):
    """A tensor that lies in a file: the file, its type as safetensors spells it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Directory(NamedTuple):
    """A directory of the reference library: its config.json and its tensors by their names."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """The array of a tensor in the type of its file."""
        with _opened(self.tensors[name].file) as file:
            return file.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ConfigError if it is missing or something else."""
    try:
        content = untrusted.read_json(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); is it the right file?") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as the reference library does: two spaces, sorted keys, a line break at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: str | os.PathLike) -> Directory:
    """Opens a directory: its config and the headers of its safetensors files, no array yet.

    Raises ConfigError if there is no such directory, if its weights are of another format, or if a header says what the file is not.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        around = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())[:20] if folder.parent.is_dir() else []
        raise ConfigError(f"there is no folder '{folder}'. In {folder.parent}: {', '.join(around) or 'none'}.")
    names = sorted(path.name for path in folder.iterdir())
    if CONFIG not in names:
        raise ConfigError(f"'{folder}' holds no {CONFIG}; give a folder that the reference library's save_pretrained wrote. It holds: {_some(names)}.")
    config = read_json(folder / CONFIG)
    if WEIGHTS in names:
        return Directory(folder, config, _header(folder / WEIGHTS))
    if INDEX in names:
        return Directory(folder, config, _indexed(folder))
    if other := [name for name in names if name.endswith(OTHER_WEIGHTS)]:
        raise ConfigError(
            f"'{folder}' holds its weights as {_some(other)}; only safetensors is read. Where the model was made, load it with the reference library "
            "and write it anew with save_pretrained(FOLDER, safe_serialization=True)."
        )
    raise ConfigError(f"'{folder}' holds neither {WEIGHTS} nor {INDEX}; it holds: {_some(names)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file ({error}). Fetch or write it again.") from None


def _check_header(path: Path) -> None:
    """Refuses what the library takes: a header that is too large to be one, and one that gives a name twice.

    The library itself holds the places of tensors to the file (no gaps, no overlaps, nothing outside of it, sizes as type and shape say).
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = file.read(size) if size <= MOST_HEADER else b""
        if size > MOST_HEADER:
            raise ValueError(f"a header of {size:,} bytes, allowed are {MOST_HEADER:,}")
        json.loads(content.decode("utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged or no safetensors file ({error}). Fetch or write it again.") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header gives a name twice")
    return found


def _header(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    with _opened(path) as file:
        names = file.keys()  # no dict: it cannot be iterated over
        parts = {name: file.get_slice(name) for name in names}
        return {name: Tensor(path, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def _indexed(folder: Path) -> dict[str, Tensor]:
    index = read_json(folder / INDEX)
    places = index["weight_map"] if "weight_map" in index else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ConfigError(f"{folder / INDEX} must hold a 'weight_map' from names of tensors to names of files.")
    for place in sorted(set(places.values())):
        if "/" in place or "\\" in place or place in ("", ".", ".."):
            raise ConfigError(f"{folder / INDEX} names the file '{place}'; allowed: files of its own folder, without path separators.")
        if not (folder / place).is_file():
            raise ConfigError(f"{folder / INDEX} names '{place}', which is not there. Fetch all files of the model.")
    headers = {place: _header(folder / place) for place in sorted(set(places.values()))}
    lost = [f"{name} (in {place})" for name, place in places.items() if name not in headers[place]]
    stray = [f"{name} (of {place})" for place, header in headers.items() for name in header if name not in places]
    if lost or stray:
        raise ConfigError(f"{folder / INDEX} does not fit its files. Not there: {_some(lost)}. Not in the index: {_some(stray)}.")
    return {name: headers[place][name] for name, place in places.items()}


@contextlib.contextmanager
def fresh(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    Raises ConfigError if something is there already, or if no folder can be made there.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"'{folder}' is there already and not empty; give another folder, or remove it first.")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"'{folder}' cannot be made ({error.strerror}); give another folder.") from None
    try:
        yield partial
        os.replace(partial, folder)  # an empty folder may be replaced
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and the tensors, as `dtype`, in one file or, beyond `shard_bytes`, in numbered ones with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    shards: list[list[str]] = [[]]
    sizes = {name: array.size * np.dtype(DTYPES[dtype]).itemsize for name, array in tensors.items()}
    room = shard_bytes
    for name in sorted(tensors):
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= sizes[name]
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for file, names in zip(files, shards):
        # The library writes an array's memory as it lies, so views must be made plain first.
        save_file({name: np.ascontiguousarray(tensors[name], DTYPES[dtype]) for name in names}, folder / file, metadata={"format": "pt"})
    if count > 1:
        places = {name: file for file, names in zip(files, shards) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})

"""Parameter trees: nested plain dicts whose leaves are named by a path, the keys joined by '/'.

Every path with a component 'layers' is a stack: its leading dimension counts layers. Works on anything with a shape: arrays of jax
and numpy, abstract arrays, and on any leaves where only paths matter.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ptm.fields import ConfigError


def paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> leaf of a nested dict, in sorted order, which is also the order of jax's leaves; empty dicts vanish. Raises ConfigError for a key with '/'."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        if not isinstance(key, str) or not key or "/" in key:  # files that others wrote may hold any names
            raise ConfigError(f"{key!r} is no component of a parameter's path; allowed is text without '/'.")
        value = tree[key]
        flat |= {f"{key}/{path}": leaf for path, leaf in paths(value).items()} if isinstance(value, Mapping) else {key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `paths` are `flat`; of a part of the paths, the tree without the others."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def map_paths(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `function(path, leaf, *leaves of the other trees at that path)`."""
    rest = [paths(other) for other in others]
    return unflatten({path: function(path, leaf, *(flat[path] for flat in rest)) for path, leaf in paths(tree).items()})


def stacked(path: str) -> bool:
    """Whether the leading dimension of the parameter counts layers."""
    return "layers" in path.split("/")


def matrix_dims(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The dimensions that a kernel or embedding reduces and those that it gives, for each layer; None for any other leaf.

    [D, F] -> (0), (1); [D, H, K] -> (0), (1, 2); a kernel named out, [H, K, D] -> (0, 1), (2); one more in front if stacked.
    """
    *parents, name = path.split("/")
    dims = tuple(range(1 if stacked(path) else 0, ndim))
    if name not in ("kernel", "embedding") or len(dims) < 2:
        return None
    split = len(dims) - 1 if parents and parents[-1] == "out" else 1
    return dims[:split], dims[split:]


def group(path: str) -> str:
    """The readable group that a parameter's norm is logged under: 'decoder/layers/attention', 'decoder/final_norm', 'token_embed'."""
    parts = path.split("/")
    if stacked(path):
        return "/".join(parts[: parts.index("layers") + 2])
    return "/".join(parts[:-1][:2]) or path


def _hint(pattern: str, known: list[str]) -> str:
    inside = [path for path in known if re.search(pattern, path)]
    if inside:
        return f"a pattern must match the whole path; '.*{pattern}.*' would match {len(inside)}, such as {inside[0]}"
    words = re.sub(r"[^\w/]+", "", pattern)
    return "nearest: " + ", ".join(difflib.get_close_matches(words, known, n=3, cutoff=0.0))


def match(patterns: Iterable[str], known: Iterable[str], *, what: str, must_match: bool = True) -> dict[str, bool]:
    """Path -> whether any of the regular expressions matches the whole of it.

    `what` names the patterns in errors (a config key). Raises ConfigError for a pattern that is no regular expression, and, unless
    `must_match` is off, for one that matches no path, naming the nearest paths.
    """
    known = list(known)
    matched = dict.fromkeys(known, False)
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{what}: '{pattern}' is not a regular expression ({error}). Example: .*/mlp/.*") from None
        hits = [path for path in known if expression.fullmatch(path)]
        if must_match and not hits:
            raise ConfigError(f"{what}: '{pattern}' matches none of the {len(known)} parameters; {_hint(pattern, known)}.")
        matched |= dict.fromkeys(hits, True)
    return matched


def size(tree: Mapping[str, Any]) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in paths(tree).values())


def table(tree: Mapping[str, Any], *, columns: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Overview as text: path, shape, size, the caller's columns (title -> path -> value) for every parameter, and a line with the total."""
    columns = columns or {}
    rows = [["parameter", "shape", "size", *columns]]
    for path, leaf in paths(tree).items():
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append([path, shape, f"{math.prod(leaf.shape):,}", *(str(column.get(path, "")) for column in columns.values())])
    rows.append(["total", f"{len(rows) - 1} arrays", f"{size(tree):,}", *("" for _ in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = ("  ".join(cell.rjust(width) if i == 2 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)
    return "\n".join(line.rstrip() for line in aligned) + "\n"


def diff(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """How the paths and shapes of `actual` differ from `expected`, one line a parameter; empty if they do not."""
    want, have = paths(expected), paths(actual)
    lines = [f"missing   {path} {tuple(want[path].shape)}" for path in want if path not in have]
    lines += [f"extra     {path} {tuple(have[path].shape)}" for path in have if path not in want]
    both = [path for path in want if path in have and tuple(want[path].shape) != tuple(have[path].shape)]
    lines += [f"shape     {path} expected {tuple(want[path].shape)}, got {tuple(have[path].shape)}" for path in both]
    return "\n".join(lines)

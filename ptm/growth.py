"""A vocabulary that has grown: the rows of tables that its new pieces begin with, so that pretraining goes on where it was."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ptm import parallel, tree


class Growth(NamedTuple):
    """From which size a vocabulary grew, and what each new piece was before, as ids of the old ones."""

    size: int
    parts: tuple[np.ndarray, ...]

    @property
    def note(self) -> str:
        """What was done, for people."""
        return f"The vocabulary grew from {self.size:,} to {self.size + len(self.parts):,} pieces; a new one begins as the mean of those that it replaces."


def between(tokenizer: Any, fingerprint: str | None) -> Growth | None:
    """How a tokenizer grew out of the one with a fingerprint, by extensions alone, or (None) out of the one without any; None if it did not."""
    old = tokenizer.earlier()
    while old is not None and (old.earlier() is not None if fingerprint is None else old.fingerprint != fingerprint):
        old = old.earlier()
    if old is None:
        return None
    everything = np.arange(old.vocab_size)  # for a piece of which the old tokenizer keeps nothing
    splits = (old.encode(tokenizer.decode([i])) for i in range(old.vocab_size, tokenizer.vocab_size))
    return Growth(old.vocab_size, tuple(ids if len(ids) else everything for ids in splits))


def dimension(path: str) -> int | None:
    """Which dimension of a parameter counts pieces; None if none does."""
    words = parallel.axes_words(path)
    return words.index("vocab") if "vocab" in words else None


def before(wanted: Mapping[str, jax.ShapeDtypeStruct], have: Mapping[str, Sequence[int]]) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract parameters `wanted`, by path, with as many pieces as the shapes `have`, over which they are not split."""

    def as_it_was(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dim = dimension(path)
        if dim is None:
            return leaf
        words = list(leaf.sharding.spec)
        words[dim] = None  # no number of pieces that devices can share
        shape = (*leaf.shape[:dim], have[path][dim], *leaf.shape[dim + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, PartitionSpec(*words)))

    return {path: as_it_was(path, leaf) for path, leaf in wanted.items()}


def shapes(have: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes `have` with as many pieces as `wanted` has."""

    def grown(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = dimension(path) if path in wanted else None
        return shape if dim is None else (*shape[:dim], wanted[path].shape[dim], *shape[dim + 1 :])

    return {path: grown(path, shape) for path, shape in have.items()}


def grow(params: Any, growth: Growth, *, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """Parameters with the tables of `wanted`, placed as these are.

    Old pieces keep their rows, new ones get the mean of their parts' rows (Gee et al. 2022, section 3). Of the rows that pad a table those that were
    there stay, others begin as the mean of all old pieces.
    """
    number = np.repeat(np.arange(len(growth.parts)), [len(part) for part in growth.parts])
    ids = np.concatenate([*growth.parts, []]).astype(np.int32)
    counts = np.array([len(part) for part in growth.parts], np.float32)[:, None]
    grown = growth.size + len(growth.parts)

    def rows(table: jax.Array, size: int) -> jax.Array:
        old, flat = table[: growth.size], table.reshape(len(table), -1)
        sums = jnp.zeros((len(growth.parts), flat.shape[1]), table.dtype).at[number].add(flat[ids])
        means = (sums / counts).reshape(-1, *table.shape[1:])
        new = jnp.broadcast_to(jnp.mean(old, axis=0), (max(0, size - max(grown, len(table))), *table.shape[1:]))
        return jnp.concatenate([old, means, table[grown:], new])[:size]

    def leaf(path: str, value: jax.Array) -> jax.Array:
        dim = dimension(path)
        return value if dim is None else jnp.moveaxis(rows(jnp.moveaxis(value, dim, 0), wanted[path].shape[dim]), 0, dim)

    shardings = tree.map_paths(lambda path, value: wanted[path].sharding, params)
    return jax.jit(lambda params: tree.map_paths(leaf, params), out_shardings=shardings)(params)

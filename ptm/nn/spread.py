"""A function on every device's own part of its arguments: for kernels, which XLA cannot partition."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ptm.nn.masks import Mask
from ptm.parallel import Layout

Words = tuple[str | None, ...]  # of the dimensions of an array, as for `Layout.constrain`


def axes_of(layout: Layout, word: str, size: int) -> tuple[str, ...]:
    """Mesh axes over which a dimension of `size` is split: those of the layout's rules for `word`, or none where its devices cannot share it equally."""
    (entry,) = layout.spec(word)
    axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    parts = shares(layout, axes)
    return () if parts == 1 or size % parts else axes


def shares(layout: Layout, axes: tuple[str, ...]) -> int:
    """Number of parts that mesh axes make of a dimension."""
    return math.prod(layout.mesh.shape[axis] for axis in axes)


def copied(keys: jax.Array, *, heads: int, layout: Layout, axis: int) -> jax.Array:
    """Keys or values in as many copies of each head (dimension `axis`) as it takes to divide them over the devices that share `heads` of queries."""
    parts = shares(layout, axes_of(layout, "heads", heads))
    return jnp.repeat(keys, parts // math.gcd(keys.shape[axis], parts), axis=axis)


def mask_words(mask: Mask) -> Mask:
    """The words of a mask's arrays, in its own form."""
    words = {"query": ("batch", "length"), "key": ("batch", None), "visible": ("batch", "length", None)}
    named = {name: words[name.partition("_")[0]] for name, value in vars(mask).items() if name.endswith(("_BL", "_BT", "_BLT")) and value is not None}
    return mask.replace(**named, offset=())


def bias_words(bias_BHLT: jax.Array | None) -> Words | None:
    """The words of a bias, which rows may share (B = 1)."""
    return None if bias_BHLT is None else ("batch" if bias_BHLT.shape[0] > 1 else None, "heads", "length", None)


def spread(local: Callable[..., Any], operands: tuple, words: tuple, out: Any, *, layout: Layout, sizes: dict[str, int]) -> Any:
    """`local(*operands)`, computed by each device on its part of the operands.

    `words` and `out` are trees of Words for operands and results; `sizes` says how large the dimensions of each word are.
    """
    if layout.mesh.size == 1:
        return local(*operands)
    axes = {word: axes_of(layout, word, size) for word, size in sizes.items()}

    def placed(tree: Any) -> Any:
        def leaf(words: Any) -> bool:
            return isinstance(words, tuple) and all(word is None or isinstance(word, str) for word in words)

        return jax.tree.map(lambda words: PartitionSpec(*(axes[word] if word and axes[word] else None for word in words)), tree, is_leaf=leaf)

    # Kernels do not tell over which axes their results vary.
    return jax.shard_map(local, mesh=layout.mesh, in_specs=placed(words), out_specs=placed(out), check_vma=False)(*operands)

"""Low-rank adaptation (Hu et al. 2021, section 4.1): a matrix W stays as it is, and W + alpha / rank * A B takes its place, where A B is of low rank.

The factors of the kernel at PATH are the parameters `lora/PATH/a` and `lora/PATH/b`, for every layer their own where PATH is a stack. A kernel of
several dimensions counts as one matrix, from all that it contracts to all that it gives: [D, H, K] has the factors [D, R] and [R, H, K], one
that leads from the heads [H, K, D] has [H, K, R] and [R, D].

A model merges the factors into its kernels before it computes, so its cost is that of the model itself, in any family. For the same reason there
is no dropout in front of A, as the authors' code has it: one matrix is applied to all rows. The model's own dropout is as always.
"""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ptm import config, tree

KEY = "lora"  # top-level name of the factors
FACTORS = ("a", "b")


def trained(options: config.Lora, paths: Sequence[str]) -> dict[str, bool]:
    """Path -> whether a parameter is trained: factors, and what the options name. Raises ConfigError for a pattern of the user's that matches nothing."""
    body = [path for path in paths if not path.startswith(KEY + "/")]
    # Defaults fit all families and need not match in each; what a user writes must.
    tree.match([pattern for pattern in options.train if pattern not in config.Lora().train], body, what="lora.train")
    return {**dict.fromkeys(paths, True), **tree.match(options.train, body, what="lora.train", must_match=False)}


def targets(options: config.Lora, params: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> kernel of the matrices that get factors, of arrays or abstract arrays. Raises ConfigError for a pattern that matches none."""
    flat = tree.paths(params)
    whole = trained(options, list(flat))
    kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel") and not whole[path]}
    return {path: kernels[path] for path, chosen in tree.match(options.targets, kernels, what="lora.targets").items() if chosen}


def init(rng: jax.Array, params: Mapping[str, Any], options: config.Lora) -> dict[str, Any]:
    """The factors of fresh or given parameters: A is drawn with variance 1 / fan in, B is 0, so that nothing has moved yet.

    What A a kernel gets does not depend on which others have one.
    """
    made = {}
    for path, kernel in targets(options, params).items():
        inputs, outputs = tree.matrix_dims(path, kernel.ndim)
        layers = kernel.shape[: inputs[0]]
        before, after = (tuple(kernel.shape[dim] for dim in dims) for dims in (inputs, outputs))
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()) >> 1)
        made[f"{path}/a"] = jax.random.normal(key, (*layers, *before, options.rank)) * math.prod(before) ** -0.5
        made[f"{path}/b"] = jnp.zeros((*layers, options.rank, *after))
    return tree.unflatten(made)


def merge(params: Mapping[str, Any], options: config.Lora) -> dict[str, Any]:
    """The parameters without factors that compute the same: kernels with what their factors add, all others as they are."""
    flat = tree.paths(params)
    merged = {path: leaf for path, leaf in flat.items() if not path.startswith(KEY + "/")}
    for path in merged:
        a, b = (f"{KEY}/{path}/{factor}" for factor in FACTORS)
        if a not in flat:
            continue
        product = functools.partial(jnp.tensordot, axes=1)
        change = (jax.vmap(product) if tree.stacked(path) else product)(flat[a], flat[b])
        merged[path] = merged[path] + options.alpha / options.rank * change
    return tree.unflatten(merged)

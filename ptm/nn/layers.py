"""Layers with stacked parameters, looped over or unrolled: the same parameters, the same numbers.

Parameters are stored as [layers, ...], or [groups, ...] where layers share them. Layers may differ in what is static (a window, say):
the loop then runs over the period of their pattern, and what does not fit the period is unrolled before and after it.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ptm.nn.context import Context
from ptm.nn.linear import PRODUCT

MOVES = ("sharding_constraint", "convert_element_type", "slice", "dynamic_slice", "squeeze", "reshape")  # operations that only move or round values


def computed(primitive: Any, *avals: Any, **params: Any) -> bool:
    """The policy that keeps what was computed for the backward pass, but not what was only moved.

    So kernels that were brought together over devices, and keys and values of all positions, are brought together again: kept, those of all layers would be
    a whole copy of the model on each device.
    """
    return primitive.name not in MOVES


POLICIES = {"none": computed, "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT), "full": None}


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which layers share the parameters of some parts of theirs: layer n those of group `groups[n]` (Lan et al. 2020, section 3.1)."""

    groups: tuple[int, ...]
    parts: tuple[str, ...]  # top-level names of a layer's parameters


def period(kinds: Sequence[Hashable]) -> tuple[int, int, int]:
    """(start, length, repeats) of the longest periodic run of `kinds`; of equally long ones that with the shortest period."""
    best = (0, 1, 1)
    for length in range(1, len(kinds) // 2 + 1):
        for start in range(len(kinds) - 2 * length + 1):
            repeats = 1
            while kinds[start + repeats * length : start + (repeats + 1) * length] == kinds[start : start + length]:
                repeats += 1
            if repeats > 1 and length * repeats > best[1] * best[2]:
                best = (start, length, repeats)
    return best


def stacked_params(module: nn.Module, make: Callable[[jax.Array], Any], *, num_layers: int, sharing: Sharing | None) -> Any:
    """The parameters `layers` of a module, each leaf [layers or groups, ...]; `make(rng)` draws those of one layer."""
    if not module.is_initializing():
        return module.get_variable("params", "layers")

    def draw(rng: jax.Array) -> Any:
        drawn = jax.vmap(make)(jax.random.split(rng, num_layers))
        if sharing is None:
            return drawn
        groups = max(sharing.groups) + 1
        return {name: jax.tree.map(lambda leaf: leaf[:groups], part) if name in sharing.parts else part for name, part in drawn.items()}

    return module.param("layers", draw)


def apart(params: Any) -> tuple[Any, ...]:
    """The parameters of each layer, cut out of stacked ones; those that are apart stay as they are."""
    if isinstance(params, tuple):
        return params
    return tuple(jax.tree.map(lambda leaf, n=n: leaf[n], params) for n in range(len(jax.tree.leaves(params)[0])))


def run_apart(
    apply: Callable[..., tuple[Any, Any]], params: Sequence[Any], x: Any, items: Sequence[Any], *, kinds: Sequence[Hashable]
) -> tuple[Any, list[Any]]:
    """`run_layers` one layer after the other, each with parameters and an item of its own; outputs stay apart too.

    So decoding reads each array where it lies and changes a cache in place: a loop over stacked ones copies each layer's part for every token.
    """
    outputs = []
    for n, (kind, own, item) in enumerate(zip(kinds, params, items, strict=True)):
        x, out = apply(kind, own, x, item, n, None)
        outputs.append(out)
    return x, outputs


def run_layers(
    apply: Callable[..., tuple[Any, Any]], params: dict[str, Any], x: Any, items: Any, *, kinds: tuple[Hashable, ...], context: Context,
    sharing: Sharing | None = None, rng: jax.Array | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(x, outputs) after all layers; each is `apply(kind, params, x, item, index, rng) -> (x, output)`.

    `items` (a tree of [layers, ...], or None) and the outputs are stacked. `kinds` has what is static of each layer.
    """
    owner = {name: sharing.groups if sharing and name in sharing.parts else tuple(range(len(kinds))) for name in params}

    def one(kind: Hashable, own: Callable[[Any, Any], Any] = lambda params, index: params) -> Callable:
        def layer(x: Any, params: Any, item: Any, index: jax.Array | int) -> tuple[Any, Any]:
            return apply(kind, own(params, index), x, item, index, None if rng is None else jax.random.fold_in(rng, index))

        if context.remat == "none" and context.layout.mesh.size == 1:
            return layer
        # Inside a loop the compiler cannot merge the recomputation with the first pass, so its guard against that is not needed.
        return jax.checkpoint(layer, policy=POLICIES[context.remat], prevent_cse=not context.scan_layers)

    start, length, repeats = period(kinds) if context.scan_layers else (len(kinds), 1, 0)
    outputs = []

    def unrolled(x: Any, layers: range) -> Any:
        layer_of = {kinds[n]: one(kinds[n]) for n in layers}
        for n in layers:
            own = {name: jax.tree.map(lambda leaf, name=name: leaf[owner[name][n]], part) for name, part in params.items()}
            x, out = layer_of[kinds[n]](x, own, jax.tree.map(lambda item: item[n], items), n)
            outputs.append(jax.tree.map(lambda y: y[None], out))
        return x

    def rolled(x: Any, layers: range) -> Any:
        def split(values: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[layers.start : layers.stop].reshape(repeats, *(length,) * (length > 1), *leaf.shape[1:]), values)

        def at(place: int, values: Any) -> Any:
            return values if length == 1 else jax.tree.map(lambda leaf: leaf[place], values)

        shared = {name: part for name, part in params.items() if sharing and name in sharing.parts}
        groups = jnp.array(sharing.groups if sharing else [0] * len(kinds))

        # A layer's parameters are cut out of its period's inside what the backward pass computes again: kept for it, the cuts would be a copy of them all.
        def of(place: int, own: dict[str, Any], n: jax.Array) -> dict[str, Any]:
            def picked(leaf: jax.Array) -> jax.Array:
                return leaf[0] if len(leaf) == 1 else jax.lax.dynamic_index_in_dim(leaf, groups[n], keepdims=False)

            return {**at(place, own), **{name: jax.tree.map(picked, values) for name, values in shared.items()}}

        period_of = [one(kinds[layers.start + place], functools.partial(of, place)) for place in range(length)]

        def body(x: Any, part: tuple[Any, Any, jax.Array]) -> tuple[Any, Any]:
            own, item, index = part
            made = []
            for place, layer in enumerate(period_of):
                x, out = layer(x, own, at(place, item), index + place)
                made.append(out)
            return x, jax.tree.map(lambda *outs: jnp.stack(outs), *made) if length > 1 else made[0]

        own = {name: part for name, part in params.items() if name not in shared}
        x, out = jax.lax.scan(body, x, (split(own), split(items), jnp.arange(layers.start, layers.stop, length)))
        outputs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), out) if length > 1 else out)
        return x

    stop = start + length * repeats
    x = unrolled(x, range(0, start))
    if repeats:
        x = rolled(x, range(start, stop))
    x = unrolled(x, range(stop, len(kinds)))
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *outputs)

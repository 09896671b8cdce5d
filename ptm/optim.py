"""Optimizers and schedules: `make` turns two config sections into one optax transform that treats stacked layers one by one.

A stacked leaf (a path with a component 'layers') holds N parameters of N layers. Whatever an update rule takes over "a parameter" -
LAMB's trust ratio, Adafactor's factored moments and RMS bounds, Muon's orthogonalisation - is taken for each layer on its own, so a
scanned model trains as an unrolled one does.

The state holds trees of the trainable parameters, cut out of the parameter tree: a state leaf that belongs to a parameter ends in
that parameter's path, has its number of dimensions, and has size 1 where it was reduced (see `map_state`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from ptm import config, fields, tree
from ptm import lora as lora_lib
from ptm.fields import ConfigError

Transform = optax.GradientTransformation
FACTORED_SIZE = 128  # Adafactor keeps full moments of matrices with a smaller side, as its authors do
MUON_RMS = 0.2  # root mean square of Muon's updates, about that of Adam's (Liu et al. 2025, arXiv:2502.16982, section 2.2)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An update rule for one parameter tree.

    `transform` clips, updates moments, decays and scales, in this order; frozen leaves get zero updates (none
    where the gradient leaves them out) and have no state.
    `learning_rate(step)` is the rate of the update that follows `step` finished ones, before layerwise factors.
    `decayed` and `frozen` say for each path whether weight decay applies and whether it stays as it is; `rates` has the factors of
    learning rates, other than 1, that depend on the width.
    """

    transform: Transform
    learning_rate: Callable[[jax.typing.ArrayLike], jax.Array]
    decayed: dict[str, bool]
    frozen: dict[str, bool]
    rates: dict[str, float]


def make(
    optimizer: config.Optimizer, schedule: config.Schedule, *, steps: int, params: Mapping[str, Any], lora: config.Lora | None = None,
    rates: Mapping[str, float] | None = None,
) -> Optimizer:  # fmt: skip
    """The optimizer of a run of `steps` steps for `params`, a tree of arrays or abstract arrays; `rates` are factors of learning rates by path.

    These leave weight decay as it is: the product of rate and decay is the same at all widths (Wang and Aitchison 2024, arXiv:2405.13698).
    What `lora` does not train is frozen too; a gradient need not have what is frozen, and is clipped by the global norm of the rest. Raises ConfigError for an unknown name, a pattern in `freeze`
    or a non-default pattern in `no_decay` that matches nothing, and a warm-up longer than the run.
    """
    flat = tree.paths(params)
    frozen = tree.match(optimizer.freeze, flat, what="optimizer.freeze")
    if lora is not None and lora.rank is not None:
        trained = lora_lib.trained(lora, list(flat))
        frozen = {path: frozen[path] or not trained[path] for path in flat}
    if all(frozen.values()):
        raise ConfigError(f"optimizer.freeze={optimizer.freeze} matches all {len(flat)} parameters; nothing is left to train.")
    # Defaults fit all families and need not match in each; what a user writes must.
    defaults = config.Optimizer().no_decay
    tree.match([pattern for pattern in optimizer.no_decay if pattern not in defaults], flat, what="optimizer.no_decay")
    spared = tree.match(optimizer.no_decay, flat, what="optimizer.no_decay", must_match=False)
    decayed = {path: not spared[path] and not frozen[path] for path in flat}
    factor = schedule_factor(schedule, steps=steps)

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        return optimizer.learning_rate * factor(step)

    decay = optax.stateless(lambda updates, params: tree.map_paths(lambda path, u, p: u + optimizer.weight_decay * p if decayed[path] else u, updates, params))
    rates = dict(rates or {})
    if rates:
        decay = optax.chain(optax.stateless(lambda updates, _: tree.map_paths(lambda path, u: u * rates[path] if path in rates else u, updates)), decay)
    rule = fields.lookup(OPTIMIZERS, optimizer.name, "optimizer.name")
    parts = [rule(optimizer, decay=decay, decayed=decayed), optax.scale_by_learning_rate(learning_rate)]
    if optimizer.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.layerwise_decay != 1.0:
        factors = layer_factors(params, decay=optimizer.layerwise_decay)
        parts.append(optax.stateless(lambda updates, _: tree.map_paths(lambda path, u: u * factors[path], updates)))
    transform = _route(lambda path, _: not frozen[path], optax.chain(*parts), optax.set_to_zero())
    return Optimizer(transform=transform, learning_rate=learning_rate, decayed=decayed, frozen=frozen, rates=rates)


def map_state(function: Callable[[str | None, Any], Any], state: Any, *, params: Mapping[str, Any]) -> Any:
    """The tree of `function(path of the parameter that a leaf of `state` belongs to, leaf)`; the path is None for counters.

    Such a leaf has the parameter's dimensions, each of full size or 1, so it can lie on devices as the parameter does.
    """
    known = tree.paths(params)

    def locate(keys: tuple) -> str | None:
        names = [key.key if isinstance(key, jax.tree_util.DictKey) else "" for key in keys]
        ends = ("/".join(map(str, names[start:])) for start in range(len(names)))
        return next((end for end in ends if end in known), None)

    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(locate(keys), leaf), state)


# Schedules: factor of the peak learning rate at `step` >= warmup_steps.


def constant(step: jax.Array, *, schedule: config.Schedule, steps: int) -> jax.Array:
    """The peak until the end."""
    return jnp.ones_like(step)


def linear(step: jax.Array, *, schedule: config.Schedule, steps: int) -> jax.Array:
    """Linear from the end of the warm-up to final_factor at the last step."""
    return 1 - (1 - schedule.final_factor) * _progress(step, schedule.warmup_steps, steps)


def cosine(step: jax.Array, *, schedule: config.Schedule, steps: int) -> jax.Array:
    """Half a cosine from the end of the warm-up to final_factor at the last step (Loshchilov and Hutter 2017, without restarts)."""
    wave = 0.5 + 0.5 * jnp.cos(jnp.pi * _progress(step, schedule.warmup_steps, steps))
    return schedule.final_factor + (1 - schedule.final_factor) * wave


def rsqrt(step: jax.Array, *, schedule: config.Schedule, steps: int) -> jax.Array:
    """sqrt(warmup / step): the inverse square root of Vaswani et al. 2017, section 5.3, and T5, scaled to 1 at the end of the warm-up.

    Their learning rates are this with the peak set to (width * warmup) ** -0.5 and to warmup ** -0.5.
    """
    return jnp.sqrt(max(schedule.warmup_steps, 1) / jnp.maximum(step, max(schedule.warmup_steps, 1)))


def wsd(step: jax.Array, *, schedule: config.Schedule, steps: int) -> jax.Array:
    """Warm-up, stable, decay: constant, then linear to final_factor over the last decay_share of the run (Hu et al. 2024, section 4)."""
    start = max(steps - round(schedule.decay_share * steps), schedule.warmup_steps)
    return 1 - (1 - schedule.final_factor) * _progress(step, start, steps)


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "rsqrt": rsqrt, "wsd": wsd}


def _progress(step: jax.Array, start: int, end: int) -> jax.Array:
    return jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)


def schedule_factor(schedule: config.Schedule, *, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Step -> factor of the peak learning rate: linear warm-up from 0 at step 0 to 1 at warmup_steps, then the named schedule."""
    after = fields.lookup(SCHEDULES, schedule.name, "schedule.name")
    warmup = schedule.warmup_steps
    if warmup > steps:
        raise ConfigError(f"schedule.warmup_steps={warmup} is longer than the run; allowed: 0 to train.steps={steps}. Lower it or train longer.")

    def factor(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        return jnp.where(step < warmup, step / max(warmup, 1), after(step, schedule=schedule, steps=steps))

    return factor


# Update rules: gradient -> direction, weight decay included, to be scaled by minus the learning rate.


def adamw(options: config.Optimizer, *, decay: Transform, decayed: dict[str, bool]) -> Transform:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return optax.chain(optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps), decay)


def adafactor(options: config.Optimizer, *, decay: Transform, decayed: dict[str, bool]) -> Transform:
    """Adafactor (Shazeer and Stern 2018): factored second moments, updates bounded to RMS 1 and relative to the RMS of the parameter.

    The learning rate is relative to each parameter's RMS (at least 1e-3), as in T5; weight decay is not. The second moment decays by
    1 - step ** -0.8, at most b2 (Zhai et al. 2022, section 3.4; 1 = the original); b1 = 0, as in T5, keeps no first moment; eps is unused.
    """

    def bound(updates: dict, params: dict) -> dict:
        def relative(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
            return update / jnp.maximum(1.0, _rms(path, update)) * jnp.maximum(1e-3, _rms(path, param))

        return tree.map_paths(relative, updates, params)

    momentum = optax.ema(options.b1, debias=False) if options.b1 else optax.identity()
    return optax.chain(_scale_by_factored_rms(options.b2), optax.stateless(bound), momentum, decay)


def lamb(options: config.Optimizer, *, decay: Transform, decayed: dict[str, bool]) -> Transform:
    """LAMB (You et al. 2020): AdamW whose update gets the norm of the parameter, layer by layer.

    As in the authors' code, what is not decayed (biases, norms) keeps the update of Adam.
    """

    def trust(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if not decayed[path]:
            return update
        ratio = _rms(path, param) / _rms(path, update)
        return update * jnp.where((ratio > 0) & jnp.isfinite(ratio), ratio, 1.0)

    return optax.chain(adamw(options, decay=decay, decayed=decayed), optax.stateless(lambda updates, params: tree.map_paths(trust, updates, params)))


def lion(options: config.Optimizer, *, decay: Transform, decayed: dict[str, bool]) -> Transform:
    """Lion (Chen et al. 2023): the sign of b1-interpolated momentum; b2 is the momentum's decay (0.99 there), eps is unused."""
    return optax.chain(optax.scale_by_lion(b1=options.b1, b2=options.b2), decay)


def sgd(options: config.Optimizer, *, decay: Transform, decayed: dict[str, bool]) -> Transform:
    """Gradient descent, with heavy-ball momentum if b1 > 0; b2 and eps are unused."""
    return optax.chain(optax.trace(decay=options.b1) if options.b1 else optax.identity(), decay)


def muon(options: config.Optimizer, *, decay: Transform, decayed: dict[str, bool]) -> Transform:
    """Muon (Jordan 2024): orthogonalised Nesterov momentum for the kernels of the layers, Adam for all else (embeddings, heads, vectors).

    Muon's updates are scaled by 0.2 * sqrt(max(fan in, fan out)) to the RMS of Adam's, so that learning rate and weight decay serve
    both groups alike (Liu et al. 2025). A kernel counts as one matrix for each layer: [D, H*K] for query, key, value, [H*K, D] for out.
    """

    def dimensions(updates: dict) -> dict:
        return tree.map_paths(lambda path, leaf: optax.contrib.MuonDimensionNumbers(*tree.matrix_dims(path, leaf.ndim)), updates)

    def scale(path: str, update: jax.Array) -> jax.Array:
        fans = (np.prod([update.shape[dim] for dim in dims]) for dims in tree.matrix_dims(path, update.ndim))
        return update * (MUON_RMS * float(max(fans)) ** 0.5)

    kernels = optax.chain(
        optax.contrib.scale_by_muon(beta=options.b1, eps=options.eps, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: tree.map_paths(scale, updates)),
    )
    others = optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps)
    return optax.chain(_route(lambda path, leaf: tree.stacked(path) and tree.matrix_dims(path, leaf.ndim) is not None, kernels, others), decay)


ADAM_LIKE = ("adamw", "lion")  # rules whose updates are of one size whatever the gradient's: those that the rates of ptm.mup hold for
OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "lamb": lamb, "lion": lion, "sgd": sgd, "muon": muon}


# Facts about leaves, read from path and shape.


def layer_factors(params: Mapping[str, Any], *, decay: float) -> dict[str, np.ndarray]:
    """Path -> factor of the learning rate, decay ** (distance from the top), in a shape that broadcasts against the leaf.

    Heads and the final norm of the last stack have distance 0, the layers below 1, 2, ..., embeddings one more than the lowest layer.
    A decoder stands on its encoder. (ELECTRA's code leaves one more factor between the heads and the top layer.)
    """
    places = {path: "/" + path.removeprefix(lora_lib.KEY + "/") for path in tree.paths(params)}  # factors learn as what they change
    flat = {places[path]: leaf for path, leaf in tree.paths(params).items()}
    lengths: dict[str, int] = {}
    for path, leaf in flat.items():
        if tree.stacked(path):
            stack = path.partition("/layers/")[0]
            lengths[stack] = max(leaf.shape[0], lengths.get(stack, 0))

    def above(stack: str) -> int:
        parts = stack.split("/")
        sides = ["/".join([*parts[:n], "decoder", ""]) for n, part in enumerate(parts) if part == "encoder"]
        return max((length for side in sides for other, length in lengths.items() if f"{other}/".startswith(side)), default=0)

    deepest = max((above(stack) + length for stack, length in lengths.items()), default=0)

    def distance(path: str, leaf: Any) -> np.ndarray:
        stack = max((stack for stack in lengths if path.startswith(stack + "/")), key=len, default=None)
        lowest, top = (deepest, 0) if stack is None else (above(stack) + lengths[stack], above(stack))
        if tree.stacked(path):
            # Of parameters that layers share, the highest of these counts.
            groups = leaf.shape[0]
            return (lowest + 1 - np.arange(1, groups + 1) * lengths[stack] // groups).reshape(-1, *[1] * (leaf.ndim - 1))
        return np.asarray(lowest + 1 if any("embed" in part for part in path.split("/")) else top)

    return {path: np.float32(decay) ** distance(place, flat[place]).astype(np.float32) for path, place in places.items()}


def _rms(path: str, leaf: jax.Array) -> jax.Array:
    dims = tuple(range(1 if tree.stacked(path) else 0, leaf.ndim))
    return jnp.sqrt(jnp.mean(jnp.square(leaf), axis=dims, keepdims=True))


# Building blocks.


def _route(select: Callable[[str, Any], bool], chosen: Transform, others: Transform) -> Transform:
    """`chosen` for the leaves that `select` picks by path and shape, `others` for the rest; each sees and keeps only its own part."""

    def split(params: Mapping[str, Any]) -> tuple[dict, dict]:
        flat = tree.paths(params)
        picked = {path for path, leaf in flat.items() if select(path, leaf)}
        return tree.unflatten({p: flat[p] for p in flat if p in picked}), tree.unflatten({p: flat[p] for p in flat if p not in picked})

    def init(params: Mapping[str, Any]) -> tuple[Any, Any]:
        mine, rest = split(params)
        return chosen.init(mine), others.init(rest)

    def update(updates: Mapping[str, Any], state: tuple[Any, Any], params: Mapping[str, Any]) -> tuple[dict, tuple[Any, Any]]:
        parts = zip((chosen, others), split(updates), state, split(params), strict=True)
        (mine, mine_state), (rest, rest_state) = (rule.update(part, kept, values) for rule, part, kept, values in parts)
        return tree.unflatten(tree.paths(mine) | tree.paths(rest)), (mine_state, rest_state)

    return optax.GradientTransformation(init, update)


class FactoredState(NamedTuple):
    """Second moments: means over the output and input dimensions of matrices (kept with size 1), and full ones of all other leaves."""

    count: jax.Array
    rows: dict
    columns: dict
    full: dict


def _scale_by_factored_rms(highest_decay: float) -> Transform:
    """Divides by the root of factored second moments, each layer on its own (Adafactor, algorithms 4 and 5)."""

    def factored(path: str, leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        dims = tree.matrix_dims(path, leaf.ndim)
        return dims if dims and min(np.prod([leaf.shape[dim] for dim in side]) for side in dims) >= FACTORED_SIZE else None

    def reduced(leaf: jax.Array, dims: tuple[int, ...]) -> jax.Array:
        return jnp.zeros([1 if dim in dims else size for dim, size in enumerate(leaf.shape)], leaf.dtype)

    def init(params: dict) -> FactoredState:
        flat = tree.paths(params)
        dims = {path: factored(path, leaf) for path, leaf in flat.items()}
        rows = {path: reduced(leaf, dims[path][1]) for path, leaf in flat.items() if dims[path]}
        columns = {path: reduced(leaf, dims[path][0]) for path, leaf in flat.items() if dims[path]}
        full = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if not dims[path]}
        return FactoredState(jnp.zeros([], jnp.int32), tree.unflatten(rows), tree.unflatten(columns), tree.unflatten(full))

    def update(updates: dict, state: FactoredState, params: dict) -> tuple[dict, FactoredState]:
        count = optax.safe_increment(state.count)
        decay = jnp.minimum(1.0 - count.astype(jnp.float32) ** -0.8, highest_decay)
        rows, columns, full = tree.paths(state.rows), tree.paths(state.columns), tree.paths(state.full)
        scaled = {}
        for path, gradient in tree.paths(updates).items():
            square = jnp.square(gradient) + 1e-30
            if path in full:
                full[path] = decay * full[path] + (1 - decay) * square
                scaled[path] = gradient * jax.lax.rsqrt(full[path])
                continue
            inputs, outputs = tree.matrix_dims(path, gradient.ndim)
            rows[path] = decay * rows[path] + (1 - decay) * jnp.mean(square, axis=outputs, keepdims=True)
            columns[path] = decay * columns[path] + (1 - decay) * jnp.mean(square, axis=inputs, keepdims=True)
            share = rows[path] / jnp.mean(rows[path], axis=inputs, keepdims=True)
            scaled[path] = gradient * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns[path])
        return tree.unflatten(scaled), FactoredState(count, tree.unflatten(rows), tree.unflatten(columns), tree.unflatten(full))

    return optax.GradientTransformation(init, update)

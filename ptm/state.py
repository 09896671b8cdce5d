"""The state of training as one plain tree, and the pure functions that move it: one step, one evaluation batch.

A state is a dict with `step` (int32), `params`, `opt_state`, `carry` (memory between batches, its leaves [rows, ...], or absent), and, where the
config asks for them, `ema` (averaged parameters) and `window` (what spikes are judged by). Randomness is fold_in(seed, step) and never stored.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ptm import tree
from ptm.config import Train
from ptm.models import Model
from ptm.objectives.protocol import Aux, Batch, Objective

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def make(params: Any, transform: optax.GradientTransformation, train: Train, carry: Callable[[], Any]) -> State:
    """The state before the first step; `carry()` is the objective's empty memory, or None."""
    state = {"step": jnp.int32(0), "params": params, "opt_state": transform.init(params)}
    if (memory := carry()) is not None:
        state["carry"] = memory
    if train.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.array, params)
    if train.skip_sigma is not None:
        zeros = jnp.zeros((train.skip_window,), jnp.float32)
        state["window"] = {"loss": zeros, "norm": zeros, "count": jnp.int32(0), "skipped": jnp.int32(0), "in_a_row": jnp.int32(0)}
    return state


def safe_ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total / weight, 0 where the weight is 0."""
    return jnp.where(weight != 0, total / jnp.where(weight != 0, weight, 1.0), 0.0)


def weighted_sum(objective: Objective, totals: dict[str, jax.Array], weights: dict[str, jax.Array]) -> jax.Array:
    """The loss: sum over terms of coefficient * total / weight."""
    return sum(c * safe_ratio(totals[term], weights[term]) for term, c in objective.coefficients.items())


def _merge(a: tuple[dict, Aux], b: tuple[dict, Aux]) -> tuple[dict, Aux]:
    """Adds up totals and ratios, keeps the larger maxima."""
    (totals, aux), (more, other) = a, b
    maxima = jax.tree.map(jnp.maximum, aux.maxima, other.maxima)
    return jax.tree.map(jnp.add, totals, more), aux.replace(
        maxima=maxima, **{name: jax.tree.map(jnp.add, getattr(aux, name), getattr(other, name)) for name in ("ratios", "sources")}
    )


def _part(values: Any, frozen: Mapping[str, bool] | None, which: bool) -> Any:
    """The parameters that are frozen or those that are not."""
    return tree.unflatten({path: leaf for path, leaf in tree.paths(values).items() if (frozen is not None and frozen[path]) == which})


def _join(values: Any, others: Any) -> Any:
    return tree.unflatten(tree.paths(others) | tree.paths(values))


def gradients(
    model: Model, objective: Objective, params: Any, batch: Batch, *, microbatches: int, rng: jax.Array | None, carry: Any, train: bool = True,
    frozen: Mapping[str, bool] | None = None,
) -> tuple[jax.Array, Any, tuple[dict[str, jax.Array], dict[str, jax.Array], Aux], Any]:
    """(loss, gradient, (totals, weights, aux), carry) of a whole batch, computed in `microbatches` parts one after the other.

    The weights of the terms are those of the whole batch, and the rows of the carry go with those of the batch, so any number of parts gives
    the same loss, gradient and carry. The gradient leaves out the parameters that are `frozen`, by path: nothing is computed for them alone.
    """
    weights = objective.weights(batch)
    params, fixed = _part(params, frozen, False), _part(params, frozen, True)

    def part_loss(params: Any, part: Batch, rng: jax.Array | None, carry: Any) -> tuple[jax.Array, Any]:
        totals, aux, carry = objective.loss(model, _join(params, fixed), part, rng=rng, carry=carry, train=train)
        return weighted_sum(objective, totals, weights), (totals, aux, carry)

    grad = jax.value_and_grad(part_loss, has_aux=True)
    if microbatches == 1:
        (loss, (totals, aux, carry)), grads = grad(params, batch, rng, carry)
        return loss, grads, (totals, weights, aux), carry

    layout = model.module.context.layout

    def split(x: jax.Array) -> jax.Array:
        # Row r goes to part r % microbatches: every device keeps an equal share of its rows in each part.
        parts = jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)
        return layout.constrain(parts, None, "batch", *(None,) * (parts.ndim - 2))

    def join(parts: jax.Array) -> jax.Array:
        x = jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])
        return layout.constrain(x, "batch", *(None,) * (x.ndim - 1))

    def body(total: Any, item: tuple[jax.Array, Batch, Any]) -> tuple[Any, Any]:
        loss, grads, sums = total
        number, part, carry = item
        part_rng = None if rng is None else jax.random.fold_in(rng, number)
        (part_value, (totals, aux, carry)), part_grads = grad(params, part, part_rng, carry)
        return (loss + part_value, jax.tree.map(jnp.add, grads, part_grads), _merge(sums, (totals, aux))), carry

    parts, carries = jax.tree.map(split, batch), jax.tree.map(split, carry)
    first = jax.tree.map(lambda x: x[0], (parts, carries))
    (loss, (totals, aux, _)), _ = jax.eval_shape(grad, params, first[0], rng, first[1])
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    start_aux = Aux(ratios=zeros(aux.ratios), sources=zeros(aux.sources), maxima=jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf, x.dtype), aux.maxima))
    start = (zeros(loss), zeros(params), (zeros(totals), start_aux))
    (loss, grads, (totals, aux)), carries = jax.lax.scan(body, start, (jnp.arange(microbatches), parts, carries))
    return loss, grads, (totals, weights, aux), jax.tree.map(join, carries)


def _group_norms(values: Any) -> dict[str, jax.Array]:
    squares: dict[str, jax.Array] = {}
    for path, leaf in tree.paths(values).items():
        name = tree.group(path)
        squares[name] = squares.get(name, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def _is_spike(window: dict[str, jax.Array], loss: jax.Array, norm: jax.Array, sigma: float) -> jax.Array:
    """Whether loss or norm lies more than `sigma` deviations above the mean of a full window."""

    def beyond(values: jax.Array, value: jax.Array) -> jax.Array:
        return value > jnp.mean(values) + sigma * jnp.std(values)

    full = window["count"] >= window["loss"].shape[0]
    return full & (beyond(window["loss"], loss) | beyond(window["norm"], norm))


def _slide(window: dict[str, jax.Array], loss: jax.Array, norm: jax.Array) -> dict[str, jax.Array]:
    index = window["count"] % window["loss"].shape[0]
    return window | {"loss": window["loss"].at[index].set(loss), "norm": window["norm"].at[index].set(norm), "count": window["count"] + 1}


def _padding_share(batch: Batch) -> jax.Array:
    segments = [batch[name] for name in ("segments_BL", "input_segments_BI") if name in batch]
    return sum(jnp.sum(s == 0) for s in segments) / sum(s.size for s in segments)


def train_step(
    state: State, batch: Batch, teacher_params: Any = None, *, model: Model, objective: Objective, transform: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array], train: Train, seed: int, norms: bool, frozen: Mapping[str, bool] | None = None, name: str = "",
) -> tuple[State, Metrics]:  # fmt: skip
    """One step: gradient of the batch, update of what is not frozen, metrics. A step whose loss or gradient is not finite, or a spike, changes no parameter.

    `teacher_params` are those of the model's teacher, if it has one: an argument, so that they are no constants of the compiled program.
    Terms and what else the objective reports are named NAME/METRIC where the objective has a `name`, as in a mixture whose branches take turns.
    Metrics are scalars (losses by source not finite where the batch holds nothing of it), among them `skips`, the steps in a row up to this one that were not accepted, and one vector: `group_norms`, the norm of the
    gradient of each parameter group in the order of `group_names`, 0 for what is frozen.
    """
    params, model = state["params"], dataclasses.replace(model, teacher_params=teacher_params)
    rng = jax.random.fold_in(jax.random.key(seed), state["step"])
    loss, grads, (totals, weights, aux), carry = gradients(
        model, objective, params, batch, microbatches=train.microbatches, rng=rng, carry=state.get("carry"), frozen=frozen
    )
    grad_norms = _group_norms(grads)
    grad_norm = jnp.sqrt(sum(jnp.square(norm) for norm in grad_norms.values()))
    accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if train.skip_sigma is not None:
        accepted &= ~_is_spike(state["window"], loss, grad_norm, train.skip_sigma)
    updates, opt_state = transform.update(grads, state["opt_state"], params)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

    new_params = _join(optax.apply_updates(_part(params, frozen, False), updates), params)
    new = {"step": state["step"] + 1, "params": choose(new_params, params), "opt_state": choose(opt_state, state["opt_state"])}
    if "ema" in state:
        moved = jax.tree.map(lambda average, p: average + (1 - train.ema_decay) * (p - average), state["ema"], new["params"])
        new["ema"] = choose(moved, state["ema"])
    if "window" in state:
        slid = choose(_slide(state["window"], loss, grad_norm), state["window"])
        in_a_row = jnp.where(accepted, 0, state["window"]["in_a_row"] + 1)
        new["window"] = slid | {"skipped": state["window"]["skipped"] + ~accepted, "in_a_row": in_a_row}
    if "carry" in state:
        # The rows of a step that is not accepted are not remembered, and the next ones do not follow those before them: they begin without memory.
        new["carry"] = jax.tree.map(lambda leaf: jnp.where(accepted, leaf, jnp.zeros_like(leaf)), carry)

    # The optimizer does not count skipped steps, and its schedule neither.
    counted = state["step"] - (state["window"]["skipped"] if "window" in state else 0)
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate(counted), "padding_share": _padding_share(batch)}
    own = {"loss": loss} if name else {}
    own |= {f"loss/{term}": safe_ratio(totals[term], weights[term]) for term in totals if len(totals) > 1}
    own |= {ratio: safe_ratio(*pair) for ratio, pair in aux.ratios.items()} | aux.maxima
    own |= {ratio: total / weight for ratio, (total, weight) in aux.sources.items()}
    metrics |= {f"{name}/{metric}" if name else metric: value for metric, value in own.items()}
    if norms:
        groups = {"grad_norm": grad_norms, "param_norm": _group_norms(new["params"]), "update_norm": _group_norms(updates)}
        metrics |= {f"{kind}/{name}": norm for kind, table in groups.items() for name, norm in table.items()}
    metrics["skips"] = new["window"]["in_a_row"] if "window" in new else jnp.int32(~accepted)
    metrics["group_norms"] = jnp.stack([grad_norms[group] if group in grad_norms else jnp.float32(0) for group in group_names(params)])
    return new, metrics


def group_names(params: Any) -> list[str]:
    """Parameter groups in the order of the metric `group_norms`."""
    return list(dict.fromkeys(tree.group(path) for path in tree.paths(params)))


def eval_step(params: Any, batch: Batch, teacher_params: Any = None, *, model: Model, objective: Objective) -> tuple[dict, dict, Aux]:
    """(totals, weights, aux) of a batch without dropout: sums, for the caller to add up."""
    model = dataclasses.replace(model, teacher_params=teacher_params)
    totals, aux, _ = objective.loss(model, params, batch, rng=None, carry=None, train=False)
    return totals, objective.weights(batch), aux

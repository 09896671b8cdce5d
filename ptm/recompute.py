"""What a backward pass keeps of the forward pass, known before anything is run, and the recomputation that suits a memory budget."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ptm.fields import ConfigError
from ptm.models import Model
from ptm.objectives.distillation import Distillation
from ptm.objectives.protocol import Batch, Objective

ORDER = ("none", "dots", "full")  # from the fastest to the smallest
_log = logging.getLogger(__name__)


def kept_bytes(model: Model, objective: Objective, params: Any, batch: Batch, *, carry: Any = None) -> int:
    """Bytes that the backward pass of a batch keeps besides parameters and batch, over all devices; of shapes alone, nothing is computed."""

    def pull(params: Any, batch: Batch, carry: Any, rng: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            totals, _, _ = objective.loss(model, params, batch, rng=rng, carry=carry, train=True)
            return sum(totals.values())

        return jax.vjp(loss, params)[1]  # a tree whose leaves are what is kept

    kept = jax.eval_shape(pull, params, batch, carry, jax.eval_shape(lambda: jax.random.key(0)))
    given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((params, batch))}
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept) if (leaf.shape, leaf.dtype) not in given)


def choose(
    make: Callable[[str], Model], objectives: Sequence[Objective], params: Any, shapes: Callable[[Objective, int], Batch], *, rows: int, budget: float, parts: int
) -> str:
    """The first policy of ORDER under which a batch of `rows` rows of each objective keeps at most `budget` GiB on each of `parts` devices that share it.

    `make(policy)` is the model, `shapes(objective, rows)` the batch. Where all keep more, it is the last one, with a warning. Raises ConfigError for distillation.
    """
    if any(isinstance(objective, Distillation) for objective in objectives):
        raise ConfigError("compute.remat=auto cannot weigh a loss that needs a teacher; name a policy: compute.remat=none, dots or full, without remat_budget.")
    most = {}
    for policy in ORDER:
        model = make(policy)
        carries = [jax.eval_shape(functools.partial(objective.init_carry, model, rows)) for objective in objectives]
        kept = [kept_bytes(model, objective, params, shapes(objective, rows), carry=carry) for objective, carry in zip(objectives, carries)]
        most[policy] = max(kept) / parts / 2**30
        if most[policy] <= budget:
            _log.info("compute.remat=%s keeps %.3f GiB a device for the backward pass, within %.3f.", policy, most[policy], budget)
            return policy
    _log.warning(
        "compute.remat_budget=%s GiB is less than any policy keeps for the backward pass of a device (%s GiB): all layers are computed again. For less, more "
        "train.microbatches, a smaller train.batch_size, or more devices.",
        budget, ", ".join(f"{policy} {size:.3f}" for policy, size in most.items()),
    )  # fmt: skip
    return ORDER[-1]

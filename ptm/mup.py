"""The maximal update parametrisation (Yang et al. 2022, "Tensor Programs V", arXiv:2203.03466, table 8): what is best at a narrow width, the learning rate above all, stays so at others.

Which sizes grow is read off two models: this run's, and the same at `mup.base_width`, where the parametrisation is the standard one. With r the factor by which
what a kernel contracts is larger here than there, for Adam-like rules:

    kernel                     initial values   learning rate   multiplier
    to outputs (embed vocab, embed labels), and tied tables as such    1    1    1 / r
    all others                 r ** -1/2        1 / r           1
    tables, biases, norms      1                1               1

A multiplier stands before the map, so that biases of outputs are left alone. Attention logits, which are divided by the root of the head's width, are divided by the root of its
growth once more (definition 4.1). A kernel whose input does not grow (ALBERT's map from the embeddings) has r = 1 and is left alone.
Factors of low-rank adaptation: A, which contracts as its kernel does, learns at the kernel's rate, B at the full one.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax

from ptm import config, fields, lora, models, tree
from ptm.fields import ConfigError
from ptm.nn.context import Context
from ptm.nn.heads import head_names
from ptm.parallel import axes_words

OUTPUTS = {"vocab", "labels"}  # words of what a model gives: dimensions that do not grow
TIED_HEADS = {"lm", "mlm", "restore"}  # those that project on the token table, unless they have a kernel of their own
QUERIES = r".*/(query/(kernel|bias)|(content|position|segment)/bias)"  # all that is added up to a query


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Factors by path, those that are 1 left out: of initial values, of learning rates, and of what maps to outputs read; and that of attention logits."""

    initial: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    multipliers: tuple[tuple[str, float], ...] = ()
    attention: float = 1.0


def at_width(model: Any, width: int, *, heads: int | None = None) -> Any:
    """The config of a model at another width: feed-forward and heads in proportion, or as many `heads` as given, which then are of another size.

    Widths that are no part of it (`embed_width`) stay. Raises ConfigError where that gives no whole numbers.
    """
    ratio = Fraction(width, model.width)
    count = ratio * model.num_heads if heads is None else Fraction(heads)
    factors = {"num_heads": count / model.num_heads, "num_kv_heads": count / model.num_heads, "head_dim": ratio * model.num_heads / count, "mlp_width": ratio}
    known = fields.annotations(type(model))
    sizes = {key: factor * getattr(model, key) for key, factor in factors.items() if key in known and getattr(model, key) is not None}
    for key, size in sizes.items():
        if size.denominator != 1:
            raise ConfigError(
                f"model.{key}={getattr(model, key)} at model.width={model.width} would be {float(size):g} at a width of {width}, no whole number; choose another width."
            )
    made = dataclasses.replace(model, width=width, **{key: int(size) for key, size in sizes.items()})
    fields.check(made, "model")
    return made


def make(
    options: config.Mup, model: Any, *, context: Context, heads: tuple[str, ...], lengths: dict[str, int], lora: config.Lora | None = None
) -> Scaling:  # fmt: skip
    """The factors of a model with its heads; without a base width all are 1. Raises ConfigError where the base is no narrower or wider copy of the model."""
    if options.base_width is None:
        return Scaling()
    if "bilstm" in head_names(heads):
        raise ConfigError(f"mup.base_width={options.base_width} with LSTMs (objective.bilstm), whose rates it does not define; leave one of them out.")
    try:
        base = at_width(model, options.base_width, heads=options.base_heads)
    except ConfigError as error:
        raise ConfigError(f"mup.base_width={options.base_width}, mup.base_heads={options.base_heads}: {error}") from None

    def shapes(made_of: Any) -> dict[str, tuple[int, ...]]:
        made = models.make(made_of, context=context, heads=heads, lora=lora)
        abstract = jax.eval_shape(functools.partial(made.init, lengths=lengths), jax.random.key(0))
        return {path: leaf.shape for path, leaf in tree.paths(abstract).items()}

    here, there = shapes(model), shapes(base)
    if here.keys() != there.keys():
        differing = sorted(here.keys() ^ there.keys())
        raise ConfigError(f"at mup.base_width={options.base_width} the model would have other parameters ({differing[0]}, ...); choose another base.")
    growth = {path: tuple(Fraction(size, other) for size, other in zip(here[path], there[path], strict=True)) for path in here}
    return _scaling(growth, base=base, model=model, heads=heads)


def _scaling(growth: dict[str, tuple[Fraction, ...]], *, base: Any, model: Any, heads: tuple[str, ...]) -> Scaling:
    initial, rates, multipliers = {}, {}, {}
    words = {path: axes_words(path) for path in growth}
    untied = any(path.endswith("/kernel") and found[-1] == "vocab" for path, found in words.items())
    for path, ratios in growth.items():
        if path.startswith(lora.KEY + "/"):
            continue
        if path.endswith("token_embed/embedding") and head_names(heads) & TIED_HEADS and not untied:
            multipliers[path] = 1 / ratios[-1]
        if not path.endswith("/kernel"):
            continue
        inputs, outputs = tree.matrix_dims(path, len(ratios))
        grown = math.prod(ratios[dim] for dim in inputs)
        if {words[path][dim] for dim in outputs} <= OUTPUTS:
            multipliers[path] = 1 / grown
        else:
            initial[path], rates[path] = float(grown) ** -0.5, 1 / grown
    for path in growth:
        kernel, _, factor = path.removeprefix(lora.KEY + "/").rpartition("/")
        if path.startswith(lora.KEY + "/") and factor == "a" and kernel in rates:
            rates[path] = rates[kernel]
    sizes = {ratios[-1] for path, ratios in growth.items() if path.endswith("/query/kernel")}
    if len(sizes) > 1:
        raise ConfigError(
            f"at a width of {base.width} the parts of model {model.name} would have heads of sizes in several proportions; choose another mup.base_width or mup.base_heads."
        )
    told = ({path: float(value) for path, value in found.items() if value != 1} for found in (initial, rates, multipliers))
    initial, rates, multipliers = told
    return Scaling(initial, rates, tuple(multipliers.items()), base.block().scale / float(sizes.pop()) / model.block().scale)


def folded(params: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The parameters that compute the same without multipliers. Raises ConfigError for a tied table's, which also is what the model reads."""
    flat = tree.paths(params)
    for path, factor in context.multipliers:
        if path.endswith("/embedding"):
            raise ConfigError(
                f"mup: logits are {factor:g} times the products with {path}, which the model also reads, so no other parameters compute the same; "
                "models with tie_embeddings=false, and those of tasks, can be converted."
            )
    factors = dict(context.multipliers)
    if context.attention_multiplier != 1.0:
        pattern = r".*/query_rms/scale" if any(path.endswith("/query_rms/scale") for path in flat) else QUERIES
        factors |= {path: context.attention_multiplier for path in flat if re.fullmatch(pattern, path)}
    return tree.unflatten({path: leaf * factors[path] if path in factors else leaf for path, leaf in flat.items()})

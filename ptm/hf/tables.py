"""The language of the families' tables; `ptm.hf.transfer` reads them in both directions.

A family is one table: keys of configs, rules for parameters, and the classes of the reference library with their heads. A rule maps
leaves of ours to a tensor of theirs with an invertible transform, so that what can be imported can be exported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ptm import tree
from ptm.fields import ConfigError

Arrays = tuple[np.ndarray, ...]
Shapes = Sequence[tuple[int, ...]]
BODY = "*."  # begins the name of a tensor of the body; stands for the prefix that a class puts before it

# Names of activations that mean the same function, theirs to ours; the first of several is the one that is written.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip


# --- transforms of parameters ---------------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """How a tensor of theirs becomes leaves of ours, whose shapes are given, and the way back."""

    read: Callable[[np.ndarray, Shapes], Arrays]
    write: Callable[[Arrays], np.ndarray]


def _matrix(kernel: np.ndarray, inputs: int) -> np.ndarray:
    return kernel.reshape(math.prod(kernel.shape[:inputs]), -1)


same = Transform(lambda theirs, shapes: (theirs,), lambda ours: ours[0])
flat = Transform(lambda theirs, shapes: (theirs.reshape(shapes[0]),), lambda ours: ours[0].reshape(-1))


def linear(inputs: int = 1) -> Transform:
    """A matrix (outputs, inputs), as torch's Linear has it, and a kernel whose first `inputs` dimensions are contracted."""
    return Transform(lambda theirs, shapes: (theirs.T.reshape(shapes[0]),), lambda ours: _matrix(ours[0], inputs).T)


def conv(inputs: int = 1) -> Transform:
    """A matrix (inputs, outputs), as GPT's Conv1D has it, and a kernel whose first `inputs` dimensions are contracted."""
    return Transform(lambda theirs, shapes: (theirs.reshape(shapes[0]),), lambda ours: _matrix(ours[0], inputs))


def permuted(*axes: int) -> Transform:
    """Dimension n of ours is dimension `axes[n]` of theirs."""
    return Transform(lambda theirs, shapes: (theirs.transpose(axes),), lambda ours: ours[0].transpose(np.argsort(axes)))


def reshaped(*shape: int) -> Transform:
    """The same numbers in a shape of theirs."""
    return Transform(lambda theirs, shapes: (theirs.reshape(shapes[0]),), lambda ours: ours[0].reshape(shape))


def fused(part: Transform, *, axis: int) -> Transform:
    """Several leaves of ours, each as `part` has it, one after the other along an axis of their tensor."""

    def read(theirs: np.ndarray, shapes: Shapes) -> Arrays:
        sizes = [part.write((blank(shape),)).shape[axis] for shape in shapes]
        pieces = np.split(theirs, np.cumsum(sizes)[:-1], axis=axis)
        return tuple(part.read(piece, [shape])[0] for piece, shape in zip(pieces, shapes))

    return Transform(read, lambda ours: np.concatenate([part.write((leaf,)) for leaf in ours], axis=axis))


def blank(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.int8(0), shape)


# --- rules ----------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """Leaves of ours (a path, or several that share a tensor) and the name of their tensor.

    Where the path has a component `layers`, the rule holds for each layer; their name has fields that `index(layer)` fills: {n} is the
    number of the layer. `absent` maps layers that theirs does not store to the value that ours holds there, unused. `copies` are names that the
    same tensor is written to besides, because the reference asks for them; it does not use them, and neither are they read.
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform = same
    index: Callable[[int], dict[str, int]] = lambda layer: {"n": layer}
    absent: Mapping[int, float] = dataclasses.field(default_factory=dict)
    copies: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def layered(self) -> bool:
        return tree.stacked(self.paths[0])

    def names(self, layers: int, prefix: str) -> dict[int, str]:
        """Names of their tensors by layer; a rule without layers has one, under 0."""
        indices = {layer: self.index(layer) for layer in range(layers) if layer not in self.absent} if self.layered else {0: {}}
        return {layer: named(self.theirs, prefix).format(**index) for layer, index in indices.items()}


def named(name: str, prefix: str) -> str:
    """A name of a rule with the prefix that a class puts before its body."""
    return prefix + name.removeprefix(BODY) if name.startswith(BODY) else name


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """A norm's scale and bias."""
    return [Rule(f"{ours}/scale", f"{theirs}.weight")] + [Rule(f"{ours}/bias", f"{theirs}.bias")] * bias


def dense(ours: str, theirs: str, *, inputs: int = 1, bias: bool = True, kernel: Callable[[int], Transform] = linear) -> list[Rule]:
    """A kernel whose first `inputs` dimensions are contracted, and its bias."""
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", kernel(inputs))] + [Rule(f"{ours}/bias", f"{theirs}.bias", flat)] * bias


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Tensors of theirs that hold nothing of their own: a pattern of names, what they must be, and the check of an array that says so.

    `check(array, read)` may read other tensors, by their names in rules.
    """

    pattern: str
    what: str
    check: Callable[[np.ndarray, Callable[[str], np.ndarray]], bool]


def copy_of(pattern: str, source: str) -> Ignored:
    """A duplicate of another tensor, as tied weights leave it."""
    return Ignored(pattern, f"a copy of {source}", lambda array, read: np.array_equal(array, read(source)))


def numbers(pattern: str) -> Ignored:
    """A buffer that counts 0, 1, 2, ..."""
    return Ignored(pattern, "0, 1, 2, ...", lambda array, read: np.array_equal(array.reshape(-1), np.arange(array.size)))


def causal_mask(pattern: str) -> Ignored:
    """A buffer of ones on and below the diagonal."""
    return Ignored(pattern, "a causal mask", lambda array, read: np.array_equal(array.reshape(array.shape[-2:]), np.tril(np.ones(array.shape[-2:]))))


def mask_value(pattern: str) -> Ignored:
    """A buffer with the large negative number that masked logits are set to."""
    return Ignored(pattern, "one large negative number", lambda array, read: array.size == 1 and float(array.reshape(())) <= -1e4)


# --- configs --------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of our config and a key of theirs, with the default that theirs has where it is left out; `values` maps theirs to ours.

    `write(config)` gives the value where ours leaves it to be worked out. Keys that do not change the function (dropout, initialisation)
    are `free`: a run may differ in them from the directory that it starts from.
    """

    ours: str
    theirs: str
    default: Any = dataclasses.MISSING
    values: Mapping[Any, Any] | None = None
    write: Callable[[Any], Any] | None = None
    free: bool = False

    def read_from(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our key with its value."""
        value = theirs[self.theirs] if self.theirs in theirs else self.default
        if value is dataclasses.MISSING:
            raise ConfigError(f"{self.theirs} is missing")
        if self.values is not None:
            if not isinstance(value, str | int | float | None) or value not in self.values:
                raise ConfigError(f"{self.theirs}={value!r} is not supported; supported: {', '.join(map(str, self.values))}")
            value = self.values[value]
        return {self.ours: value}

    def write_to(self, config: Any) -> dict[str, Any]:
        """Their key with its value."""
        value = self.write(config) if self.write else getattr(config, self.ours)
        if self.values is not None:
            fitting = [theirs for theirs, ours in self.values.items() if ours == value]
            if not fitting:
                raise ConfigError(f"model.{self.ours}={value!r} has no counterpart; there are: {', '.join(map(str, dict.fromkeys(self.values.values())))}")
            value = fitting[0]
        return {self.theirs: value}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A key of theirs that changes the function and of which one value is supported, which is also what is meant where it is left out."""

    theirs: str
    value: Any
    written: bool = False
    free = False

    def read_from(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """No key of ours, or an error that names theirs."""
        if self.theirs in theirs and theirs[self.theirs] != self.value:
            raise ConfigError(f"{self.theirs}={theirs[self.theirs]!r} is not supported; supported: {self.value!r}")
        return {}

    def write_to(self, config: Any) -> dict[str, Any]:
        """Their key, where it is written."""
        return {self.theirs: self.value} if self.written else {}


@dataclasses.dataclass(frozen=True)
class Implied:
    """A key of ours of which a model_type has but one value."""

    ours: str
    value: Any
    free = False

    def read_from(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our key with its value."""
        return {self.ours: self.value}

    def write_to(self, config: Any) -> dict[str, Any]:
        """Nothing, or an error if ours has another value."""
        if getattr(config, self.ours) != self.value:
            raise ConfigError(f"model.{self.ours}={getattr(config, self.ours)!r} has no counterpart; there is: {self.value!r}")
        return {}


@dataclasses.dataclass(frozen=True)
class Joint:
    """Keys that only mean something together: `read(theirs)` gives ours, `write(config)` gives theirs; both may raise ConfigError."""

    read_from: Callable[[Mapping[str, Any]], dict[str, Any]]
    write_to: Callable[[Any], dict[str, Any]]
    free: bool = False


# What no family supports.
ALWAYS = (Fixed("quantization_config", None), Fixed("pruned_heads", {}), Fixed("per_layer_config", None))


# --- families -------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class of the reference library: our heads that it has (without :N), the prefix of its body, and the field of its output for each head."""

    name: str
    heads: tuple[str, ...]
    prefix: str
    outputs: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The table of one `model_type` of theirs, which is our family `name`.

    The first of `architectures` is the class that it is pretrained in. `signs` maps a head (without :N) to the tensor that shows it; the
    first dimension of that tensor is N. `implies` maps a head to another whose parameters it needs. `adjust(source, keys)` may change the
    keys of our config by what tensors are there (a transfer.Source). `aliases` are other names that the reference takes for keys of theirs.
    `writes(config)` says whether a config of ours can be of this model_type. `renames` are patterns of names in old files, and what they are
    called today. `unused(config)` gives names and shapes of tensors that the reference asks for and reads nowhere: they are written as zeros, and
    not read. `tokenizers` maps kinds of tokenizers to the model's own classes.
    """

    model_type: str
    name: str
    keys: tuple[Key | Fixed | Implied | Joint, ...]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rules: Callable[[Any, tuple[str, ...]], list[Rule]]
    architectures: tuple[Architecture, ...]
    signs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    implies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[Ignored, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    unused: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}
    tokenizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adjust: Callable[[Any, dict[str, Any]], None] = lambda source, keys: None
    writes: Callable[[Any], bool] = lambda config: True

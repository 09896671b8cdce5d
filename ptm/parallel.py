"""Meshes and the two tables that decide how every array of a run lies on the devices.

AXES names the dimensions of each parameter in words; RULES maps words to mesh axes, in one column for parameters (and what follows
them: gradients, optimizer state, averages) and one for activations. Model code only names dimensions, through `Layout.constrain`.
Steps run under `jax.jit` with NamedSharding, which is what pjit became; `jax.pmap` is itself jit of shard_map in current JAX.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ptm import config as config_lib
from ptm import fields, tree
from ptm.fields import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Parameter path (whole, without the leading layer dimension of stacked layers) -> words for its dimensions. Exactly one row must match.
AXES: dict[str, str] = {
    r"(.*/)?token_embed/embedding": "vocab embed",
    r"(.*/)?position_embed/embedding": "positions embed",
    r"(.*/)?type_embed/embedding": "types embed",
    r"(.*/)?relative_bias/embedding": "buckets heads",
    r"(.*/)?embed_projection/kernel": "embed_in embed",
    r"(.*/)?embed_projection/bias": "embed",
    r"mask_embed": "embed",
    r".*/(query|position)/kernel": "embed heads head_dim",
    r".*/(query|content|position|segment)/bias": "heads head_dim",
    r".*/(key|value)/kernel": "embed kv_heads head_dim",
    r".*/(key|value)/bias": "kv_heads head_dim",
    r".*/segment/embedding": "types heads head_dim",
    r".*/out/kernel": "heads head_dim embed",
    r".*/out/bias": "embed",
    r".*/(wi|gate)/kernel": "embed mlp",
    r".*/(wi|gate)/bias": "mlp",
    r".*/wo/kernel": "mlp embed",
    r".*/wo/bias": "embed",
    r".*/(query|key)_rms/scale": "head_dim",
    r".*norm/(scale|bias)": "embed",
    r".*dense/kernel|hidden_projection/kernel": "embed embed_out",
    r".*dense/bias|hidden_projection/bias": "embed_out",
    r"(.*/)?lm_head/kernel|(.*/)?mlm_head/decoder/kernel": "embed vocab",
    r"(.*/)?(lm|mlm|restore)_head/bias": "vocab",
    r"(pair|tag|qa)_head/kernel|(classify|tag|qa|rtd)_head/labels/kernel": "embed labels",
    r"bilstm/\w+/(input/kernel|recurrent)": "lstm_in lstm_gates",
    r"bilstm/\w+/input/bias": "lstm_gates",
    r"layer_mix/weights": "states",
    r"layer_mix/scale": "",
    r"(pair|tag|qa)_head/bias|(classify|tag|qa|rtd)_head/labels/bias": "labels",
}

_BATCH = ("data", "fsdp")
_TOKENS = (*_BATCH, "sequence")  # the axes that split tokens
_FULLY = {"embed": ("fsdp", "sequence")}  # over all devices that share the tokens of a replica
_HEADS = {"heads": "tensor", "kv_heads": "tensor"}
_TENSOR = {**_HEADS, "mlp": "tensor", "vocab": "tensor"}
_ACTIVATIONS = {"batch": _BATCH, "length": "sequence", "residual_length": "sequence"}

# Words of activations; whoever names another one meant one of these. `keys` is the length of keys and values, which every query needs to see.
WORDS = ("batch", "length", "keys", "residual_length", "residual", "heads", "kv_heads", "mlp", "vocab")

# Preset -> (parameters, activations): word -> mesh axis or axes. Words that are missing are not split. The residual stream has words of
# its own: replicated over `tensor` it would take most of the memory of a tensor-parallel run. Context parallelism is no preset but the axis
# `sequence` of all of them but dp: lengths are split over it, keys and values are brought together.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp": ({}, {"batch": _BATCH}),
    "fsdp": (_FULLY, _ACTIVATIONS),
    "tp": (_TENSOR, {**_ACTIVATIONS, **_TENSOR, "residual": "tensor"}),
    "fsdp+tp": ({**_FULLY, **_TENSOR}, {**_ACTIVATIONS, **_TENSOR, "residual": "tensor"}),
    "sp": ({**_FULLY, **_TENSOR}, {**_ACTIVATIONS, **_TENSOR, "residual_length": ("sequence", "tensor")}),
}


def _axes_of(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _near(size: int, parts: int) -> str:
    """The multiples of `parts` around a size that is none."""
    return " or ".join(str(near) for near in (size // parts * parts, -(-size // parts) * parts) if near)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and a row of RULES: where parameters and activations lie."""

    mesh: Mesh
    preset: str

    def _parts(self, entry: Any) -> int:
        return math.prod(self.mesh.shape[axis] for axis in _axes_of(entry))

    def _kept(self, path: str, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
        """(word, axes) of each dimension of a parameter. Heads of keys that several devices share, each the reader of a part of a group's queries, stay whole."""
        rules, words = RULES[self.preset][0], axes_words(path)

        def axes(word: str, size: int) -> Any:
            parts = self._parts(rules[word]) if word in rules else 1
            shared = word == "kv_heads" and size < parts and parts % size == 0
            return rules[word] if word in rules and not shared else None

        return [(word, axes(word, size)) for word, size in zip(words, shape, strict=True)]

    def spec(self, *words: str | None) -> PartitionSpec:
        """Where activations with dimensions of these words (WORDS; None = not split) lie, as `jax.shard_map` wants it."""
        assert all(word is None or word in WORDS for word in words), words
        rules = RULES[self.preset][1]
        return PartitionSpec(*(rules[word] if word in rules else None for word in words))

    def fitting(self, shape: tuple[int, ...], *words: str | None) -> PartitionSpec:
        """`spec` for activations of a shape; what devices cannot share equally stays whole.

        Decoding has one position, say. The rows that a run trains on do divide (`check_lengths`).
        """
        assert len(shape) == len(words), (shape, words)
        return PartitionSpec(*(None if size % self._parts(entry) else entry for size, entry in zip(shape, self.spec(*words))))

    def constrain(self, x: jax.Array, *words: str | None) -> jax.Array:
        """`x` with its dimensions split as the activation rules say of `words`, as far as they are `fitting`."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.fitting(x.shape, *words)))

    def batch(self) -> NamedSharding:
        """Sharding of batch arrays: rows over (data, fsdp)."""
        return NamedSharding(self.mesh, PartitionSpec(_BATCH))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """How the parameter at `path` lies. Raises ConfigError where a dimension cannot be split."""
        kept = self._kept(path, shape)
        for size, (word, entry) in zip(shape, kept):
            self._check(f"parameter {path}: dimension '{word}'", size, entry)
        return NamedSharding(self.mesh, PartitionSpec(*(entry for _, entry in kept)))

    def _check(self, what: str, size: int, entry: Any) -> None:
        parts = self._parts(entry)
        if size % parts:
            fits = [n for n in range(1, 2 * parts + 1) if size % n == 0][-4:]
            axes = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in _axes_of(entry) if self.mesh.shape[axis] > 1)
            raise ConfigError(
                f"{what} of size {size} cannot be split over mesh axis {axes}. "
                f"Axis sizes that fit: {fits}; dimension sizes that fit: {_near(size, parts)}."
            )

    def gathered(self, path: str, x: jax.Array) -> jax.Array:
        """The parameter at `path` (below `layers`: of one layer) brought together over the axes that split tokens, for a product or a look-up.

        Left to itself the partitioner may split the product of a batch and a kernel over the same axis twice; with one row a device XLA
        then gives wrong numbers (jax 0.10.2, axes data, fsdp and tensor all above 1). What a table that is split over its width gives when it is
        looked up in would be replicated first. In the type of the product, before, less is moved.
        """
        if self.mesh.size == 1:
            return x
        stored = [entry for _, entry in self._kept(path, x.shape)]
        kept = ([axis for axis in _axes_of(entry) if axis not in _TOKENS] for entry in stored)
        # Said again of what was cut out of stacked layers: else the whole is brought together before the cut, on TPUs in a form that a product must copy.
        x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*stored)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*(tuple(axes) or None for axes in kept))))

    def parameters(self, params: Any) -> Any:
        """The tree of NamedShardings of a parameter tree (arrays or shapes)."""
        return tree.map_paths(lambda path, leaf: self.parameter(path, leaf.shape), params)

    def follow(self, path: str | None, leaf: Any) -> NamedSharding:
        """How a leaf of the training state lies that belongs to the parameter at `path`: like it, but for dimensions that were reduced to 1."""
        if path is None:
            return self.replicated()
        return NamedSharding(self.mesh, PartitionSpec(*(None if size == 1 else entry for size, (_, entry) in zip(leaf.shape, self._kept(path, leaf.shape)))))


def axes_words(path: str) -> tuple[str, ...]:
    """Words of the dimensions of the parameter at `path`; asserts that exactly one row of AXES matches.

    The factors of low-rank adaptation have the words of their kernel, and `rank`.
    """
    if path.startswith("lora/"):
        kernel, _, factor = path.removeprefix("lora/").rpartition("/")
        words = axes_words(kernel)
        inputs, outputs = tree.matrix_dims(kernel, len(words))
        of = {"a": (*(words[dim] for dim in inputs), "rank"), "b": ("rank", *(words[dim] for dim in outputs))}
        return words[: inputs[0]] + of[factor]
    rows = [words for pattern, words in AXES.items() if re.fullmatch(pattern, path)]
    assert len(rows) == 1, f"parameter {path} matches {len(rows)} rows of parallel.AXES; it must match exactly one"
    return (("layers",) if tree.stacked(path) else ()) + tuple(rows[0].split())


def make_layout(mesh: config_lib.Mesh, *, devices: list | None = None) -> Layout:
    """The mesh that a config asks for over `devices` (default: all).

    Raises ConfigError if the sizes do not multiply to their number, if the preset splits nothing over an axis, or if `data` cannot go over the slices.
    """
    columns = fields.lookup(RULES, mesh.preset, "mesh.preset")
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % fixed or not free and fixed != len(devices):
        raise ConfigError(f"mesh sizes {sizes} do not multiply to {len(devices)} devices; set one axis to -1 or change --config.mesh.AXIS.")
    if free:
        sizes[free[0]] = len(devices) // fixed
    used = {axis for rules in columns for entry in rules.values() for axis in _axes_of(entry)}
    for axis in [axis for axis, size in sizes.items() if size > 1 and axis not in used]:
        others = [name for name, column in RULES.items() if any(axis in _axes_of(entry) for rules in column for entry in rules.values())]
        raise ConfigError(
            f"mesh.{axis}={sizes[axis]}, but preset {mesh.preset} splits nothing over it: those devices would all compute the same. "
            f"Set mesh.{axis}=1 or mesh.preset to one of {', '.join(others)}."
        )
    # Auto axes: linen's layers have no way to say how their outputs lie, so the partitioner decides between our constraints.
    return Layout(Mesh(_ordered(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)), mesh.preset)


def _ordered(devices: list, sizes: Mapping[str, int]) -> np.ndarray:
    """The devices as an array of the mesh's shape: those of TPUs so that each axis follows the links between them, and that `data` alone crosses slices."""
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({device.slice_index for device in devices if hasattr(device, "slice_index")})  # a single slice may have no number
    if slices <= 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    assert MESH_AXES[0] == "data"
    if shape[0] % slices:
        raise ConfigError(
            f"mesh.data={shape[0]} cannot be split over {slices} slices of devices; only `data` may cross the slow network between them. "
            f"Sizes that fit: {_near(shape[0], slices)}, the other axes within a slice of {len(devices) // slices} devices."
        )
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def check_lengths(layout: Layout, lengths: Iterable[tuple[str, int]]) -> None:
    """Raises ConfigError unless rows of these lengths, (config key, positions), can be split over the mesh axes that the preset splits lengths over."""
    for key, size in lengths:
        for word in ("length", "residual_length"):
            layout._check(f"{key}={size}: dimension '{word}'", size, layout.spec(word)[0])


def row_parts(layout: Layout) -> int:
    """Devices that the rows of a batch are split over."""
    return int(np.prod([layout.mesh.shape[axis] for axis in _BATCH]))


def length_parts(layout: Layout) -> int:
    """Devices that the length of a row is split over, outside of the residual stream."""
    return layout._parts(layout.spec("length")[0])


def token_parts(layout: Layout) -> int:
    """Devices that the residual stream of a batch is split over."""
    rules = RULES[layout.preset][1]
    return layout._parts(tuple(dict.fromkeys(axis for word in ("batch", "residual_length", "residual") if word in rules for axis in _axes_of(rules[word]))))


def check_batch(layout: Layout, batch_size: int, where: str) -> None:
    """Raises ConfigError unless `batch_size` rows can be split over the mesh's data and fsdp axes."""
    parts = row_parts(layout)
    if batch_size % parts:
        raise ConfigError(
            f"{where}={batch_size} rows cannot be split over mesh axes data x fsdp = {parts} devices; sizes that fit: {_near(batch_size, parts)}. "
            "Change it, or the axes of --config.mesh."
        )


def local_rows(layout: Layout, batch_size: int) -> list[int]:
    """Rows of a global batch that this process must supply, ascending."""
    indices = layout.batch().addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in indices.values() for row in range(*rows.indices(batch_size))})


def to_device(batch: dict[str, np.ndarray], layout: Layout, *, batch_size: int, rows: list[int]) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] from this process's `rows` of a batch."""
    sharding = layout.batch()
    if len(rows) == batch_size:
        return jax.device_put(batch, sharding)
    place = {row: n for n, row in enumerate(rows)}

    def fetch(array: np.ndarray) -> jax.Array:
        def rows_of(index: tuple[slice, ...]) -> np.ndarray:
            return array[[place[row] for row in range(*index[0].indices(batch_size))]]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, rows_of)

    return {name: fetch(array) for name, array in batch.items()}

"""The options of `ptm plan`, and the names of topologies. Light: a mistake on the command line must not wait for JAX."""

import dataclasses
import math
import re

from ptm import fields
from ptm.fields import ConfigError, field

FORMS = "KIND:XxY[xZ] of TPUs such as v5e:4x4 or v5p:4x4x4, N*KIND:... for N slices, gpu:h100xN, cpu:N"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of a kind of accelerator besides what its compiler says; figures of the makers but for `clock`.

    `hbm` is what a program may use, in GiB, and the compiler refuses beyond it (None: it does not say). `clock`, in GHz, turns estimated cycles into
    seconds: peak / width of the matrix units. `links` are the bytes a second that a chip exchanges with its neighbours.
    """

    dims: int
    hbm: float | None
    clock: float | None
    links: float | None
    torus: int | None  # sizes that are multiples of it close a ring
    largest: tuple[int, ...]


CHIPS = {
    "v4": Chip(3, 31.75, None, 300e9, 4, (16, 16, 16)),
    "v5e": Chip(2, 15.75, 1.5, 200e9, 16, (16, 16)),
    "v5p": Chip(3, 95.74, 1.75, 600e9, 4, (16, 16, 24)),
    "v6e": Chip(2, 31.25, None, 448e9, 16, (16, 16)),
    "tpu7x": Chip(3, 94.75, None, 1200e9, 4, (16, 16, 36)),
}
GPUS = {"h100": Chip(1, 79.1, None, 900e9, None, (4096,))}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A topology by its name: `kind` of chip, `shape` of a slice (of GPUs and CPUs their number), number of slices."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        return "cpu" if self.kind == "cpu" else "gpu" if self.kind in GPUS else "tpu"

    @property
    def chip(self) -> Chip | None:
        return None if self.kind == "cpu" else (CHIPS | GPUS)[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        if self.platform != "tpu":
            return f"{'gpu:' + self.kind + 'x' if self.platform == 'gpu' else 'cpu:'}{self.shape[0]}"
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which dimensions are rings: all of a cube of multiples of 4, both of a full 2-D pod; a slice of one has no rings."""
        closed = [bool(self.chip.torus) and size % self.chip.torus == 0 for size in self.shape]
        return (*([all(closed)] * len(self.shape)), *[False] * (3 - len(self.shape)))


def parse_topology(text: str) -> Topology:
    """The topology of a name. Raises ConfigError for one that is of no known form, kind or size."""
    if found := re.fullmatch(r"cpu:([1-9]\d*)", text):
        return Topology("cpu", (int(found[1]),))
    if found := re.fullmatch(r"gpu:([a-z]\w*?)x([1-9]\d*)", text):
        fields.lookup(GPUS, found[1], "kind of GPU of --topology")
        return Topology(found[1], (int(found[2]),))
    found = re.fullmatch(r"(?:([1-9]\d*)\*)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", text)
    if found is None:
        raise ConfigError(f"--topology={text} names no topology; allowed: {FORMS}.")
    chip = fields.lookup(CHIPS, found[2], "kind of TPU of --topology")
    shape = tuple(map(int, found[3].split("x")))
    if len(shape) != chip.dims or any(size > most for size, most in zip(shape, chip.largest)):
        most = "x".join(map(str, chip.largest))
        raise ConfigError(f"--topology={text}: a slice of {found[2]} has {chip.dims} dimensions, at most {most}; give such as {found[2]}:{'x'.join(['4'] * chip.dims)}.")
    if math.prod(shape) > 1 and any(size % 2 for size in shape[:2]):
        raise ConfigError(f"--topology={text}: hosts have 2x2 chips, so the first two sizes are even; or give one chip, {found[2]}:{'x'.join(['1'] * chip.dims)}.")
    return Topology(found[2], shape, int(found[1] or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is planned for, and how much is tried."""

    topology: str = field(doc=f"Devices: {FORMS}.")
    search: bool = field(False, doc="Try meshes, recomputation, batch sizes and attention backends; print the best that fit, with their overrides.")
    tries: int = field(24, low=1, doc="Programs that --search compiles at most.")
    timeout: float = field(900.0, low=1.0, unit="seconds", doc="What compiles longer counts as not planned.")
    compiler: tuple[str, ...] = field((), doc="Options of the compiler, NAME=VALUE,..., such as xla_tpu_enable_async_collective_fusion=true.")

    def check(self, where: str) -> None:
        parse_topology(self.topology)
        for entry in self.compiler:
            if not re.fullmatch(r"\w+=\S+", entry):
                raise ConfigError(f"--compiler={fields.unparse(self.compiler)}: '{entry}' is not of the form NAME=VALUE.")


def flags() -> dict[str, tuple[bool, str]]:
    """Name of each flag -> whether it is a switch, and what it is."""
    return {f.name: (f.default is False, f.metadata["doc"]) for f in dataclasses.fields(Options)}


def parse(given: dict[str, str]) -> Options:
    """Checked options from the texts of flags. Raises ConfigError."""
    hints = fields.annotations(Options)
    options = Options(**{name: fields.parse(text, hints[name], f"--{name}") for name, text in given.items()})
    fields.check(options, "")
    return options

"""The run-level sections of a config, and the resolved `Config` that holds them: every key with its default, unit, range and meaning."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from ptm import fields
from ptm.fields import ConfigError, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length and size of a run."""

    steps: int = field(1000, low=1, unit="steps", doc="Optimizer steps of the whole run.")
    batch_size: int = field(32, low=1, unit="rows", doc="Rows of one optimizer step, over all devices and microbatches.")
    batch_schedule: tuple[str, ...] = field(
        (), doc="Rows of a step from a step on, as STEP=ROWS, the first from step 0, such as 0=16,1000=32; batch_size is the largest of them. Empty = batch_size throughout."
    )
    microbatches: int = field(1, low=1, doc="Parts of a batch computed one after the other; gradients are those of the whole batch.")
    ema_decay: float | None = field(None, low=0.0, high=1.0, doc="Decay per step of an exponential moving average of the parameters; None keeps none.")
    skip_sigma: float | None = field(
        None, low=0.0, doc="Skip steps whose loss or gradient norm is not finite or so far above the window's mean; None = never.", unit="deviations"
    )
    skip_window: int = field(128, low=2, unit="steps", doc="Window of the mean and deviation that skip_sigma refers to.")
    max_skips: int = field(8, low=1, unit="steps", doc="Stop when so many steps in a row were skipped.")
    hang_seconds: float | None = field(
        600.0, low=0.1, unit="seconds", doc="Least time without progress after which the stacks of all threads are written; None = never. Ten times that while compiling."
    )
    hang_factor: float = field(30.0, low=1.0, doc="Times the usual time of a step, an evaluation or a save that must have passed too.")
    hang_exit: bool = field(False, doc="End then, with the exit code of an interrupted run (75), which launchers start again.")

    def check(self, where: str) -> None:
        rows = [rows for _, rows in size_points(self.batch_schedule, key=f"{where}.batch_schedule")]
        if rows and max(rows) != self.batch_size:
            given = f"{where}.batch_size={self.batch_size}, but the most rows of {where}.batch_schedule={fields.unparse(self.batch_schedule)} are {max(rows)}"
            raise ConfigError(f"{given}; set --config.{where}.batch_size={max(rows)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Where token ids come from."""

    kind: str = field("sentencepiece", doc="Entry of ptm.text.TOKENIZERS: bytes, chars, sentencepiece, wordpiece, bpe or file.")
    path: str | None = field(None, doc="Vocabulary file or folder; None builds it from the run's own training data and keeps it in the workdir.")
    vocab_size: int = field(4096, low=1, unit="pieces", doc="Size of a vocabulary that is trained.")
    algorithm: str = field("unigram", choices=("unigram", "bpe"), doc="Model of a sentencepiece vocabulary that is trained.")
    lowercase: bool = field(False, doc="Lower-case the text (wordpiece, and sentencepiece that is trained).")
    train_bytes: int = field(10_000_000, low=1, unit="bytes", doc="Text taken from the training split to train a vocabulary.")
    train_fields: tuple[str, ...] = field(
        ("text", "pair", "context", "target"), doc="Fields of the records whose text trains a vocabulary, as far as data.columns maps them."
    )
    sentinels: int = field(0, low=0, unit="pieces", doc="Sentinels <extra_id_N> for span corruption; a trained vocabulary gets them on top of vocab_size.")
    extra: str | None = field(None, doc="File of pieces that extend the vocabulary, one a line; with init they begin as the mean of the pieces they replace.")


_WEIGHT = r"(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})"
STEP, WEIGHTS, SIZE = re.compile(r"[0-9]{1,12}"), re.compile(f"{_WEIGHT}(?::{_WEIGHT})*"), re.compile(r"[1-9][0-9]{0,8}")
COLUMN_ENTRY = re.compile(r"(?:(\d+):)?([^=:{}|\s]+)=\s*(\S|\S.*\S)\s*", re.DOTALL)


def column_entries(entries: Iterable[str], *, where: str = "data") -> list[tuple[int | None, str, str]]:
    """(number of the source, or None for all; field; column or template) of the entries of `columns`. Raises ConfigError for another form and for two of one field."""
    found = []
    for entry in entries:
        match = COLUMN_ENTRY.fullmatch(entry)
        if match is None:
            raise ConfigError(f"{where}.columns={fields.unparse(entries)}: '{entry}' is not of the form FIELD=COLUMN, such as text=body.")
        number, name, column = match.groups()
        found.append((None if number is None else int(number), name, column))
        if found[-1][:2] in [other[:2] for other in found[:-1]]:
            raise ConfigError(f"{where}.columns={fields.unparse(entries)} maps the field '{name}' twice{f' for source {number}' if number else ''}; keep one entry.")
    return found


def weight_points(entries: Iterable[str], *, where: str = "data") -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(step, weights) of the entries of `weight_schedule`. Raises ConfigError for another form, and for steps that do not rise from 0."""
    return tuple((step, tuple(map(float, values.split(":")))) for step, values in _points(entries, f"{where}.weight_schedule", WEIGHTS, "STEP=W:W:..., such as 500=2:4:4"))


def size_points(entries: Iterable[str], *, key: str) -> tuple[tuple[int, int], ...]:
    """(step, size) of the entries of a schedule of sizes, the key of which is given. Raises ConfigError as `weight_points`."""
    return tuple((step, int(size)) for step, size in _points(entries, key, SIZE, "STEP=SIZE with a size from 1 on, such as 500=64"))


def _points(entries: Iterable[str], key: str, values: re.Pattern, form: str) -> Iterator[tuple[int, str]]:
    given, last = f"{key}={fields.unparse(entries)}", -1
    for entry in entries:
        step, _, value = entry.partition("=")
        if not (STEP.fullmatch(step) and values.fullmatch(value)):
            raise ConfigError(f"{given}: '{entry}' is not of the form {form}.")
        if int(step) <= last or last < 0 < int(step):
            raise ConfigError(f"{given}: '{entry}'; allowed: steps that begin with 0, each larger than the one before it.")
        last = int(step)
        yield last, value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where documents come from and how they become rows."""

    source: tuple[str, ...] = field(
        ("python_docs:",),
        doc="FORMAT:PATH, ...: text, jsonl, json, csv, tsv, parquet, conll, squad, parallel, chat, array_record, tfds, python_docs (what every Python has); of benchmarks"
        " multirc, record, wsc, cluewsc, csl, chid, c3; also .gz and archive.zip/MEMBER.",
    )
    weights: tuple[float, ...] = field((), low=0.0, doc="Share of drawn documents per source, before packing, in blocks of 1,024; empty = all equal. weight_schedule=0=W:W:... keeps closer to them.")
    temperature: float | None = field(
        None, low=0.0, doc="Weights of the sources as their number of records to the power 1/temperature (Conneau et al. 2020, section 3.1); None = `weights`."
    )
    size_limit: int | None = field(
        None, low=1, unit="records", doc="Sources of more records count as so many for `temperature`, the artificial limit of Raffel et al. 2020, section 3.5.2; None = as they are."
    )
    weight_schedule: tuple[str, ...] = field(
        (), doc="Weights from a step on, as STEP=W:W:... with one W for each source, the first from step 0, such as 0=7:2:1,500=2:4:4; in place of `weights`. With it, or with "
        "`max_epochs`, each logical stream keeps every source within a draw of its share at every step."
    )
    weight_change: str = field("step", choices=("step", "linear"), doc="How one entry of weight_schedule becomes the next: at its step, or in a straight line up to it.")
    max_epochs: tuple[float, ...] = field(
        (), low=0.0, high=1e6, unit="epochs", doc="How often a source is drawn at most, one number for all or one for each, 0 = any number of times; then the others get its weight. Empty = any."
    )
    columns: tuple[str, ...] = field(
        ("text=text",), doc="Map of fields to columns, as FIELD=COLUMN or FIELD=a text with {COLUMN} and {COLUMN|0=no|1=yes}, {COLUMN~0.2} rounded; N:FIELD=... for source N; FIELD.0=A,FIELD.1=B make a list."
    )
    document: str = field("line", choices=("line", "paragraph", "file"), doc="What one document of a text source is; a paragraph ends at an empty line.")
    validation_source: tuple[str, ...] = field((), doc="Sources of the validation split; empty holds out a part of `source`.")
    holdout: float = field(0.05, low=0.0, high=0.5, doc="Share held out of `source` for validation.")
    holdout_by: str = field("document", choices=("document", "tail"), doc="Hold out documents by a hash of their text, or the last characters of each.")
    length: int = field(128, low=2, unit="tokens", doc="Length of a row (of the decoder's row for encoder-decoders).")
    length_schedule: tuple[str, ...] = field(
        (), doc="Length of a row from a step on, as STEP=LENGTH, the first from step 0 and each longer than the one before, such as 0=128,90000=512; `length` is the last of "
        "them. Empty = `length` throughout."
    )
    packing: str = field(
        "default", choices=("default", "concat", "first_fit", "window", "none"),
        doc="How examples become rows; default = as the objective wants it, window = a random window of a document at each visit.",
    )  # fmt: skip
    packing_bins: int = field(32, low=1, unit="rows", doc="Rows that first-fit packing keeps open in each stream.")
    max_record_tokens: int = field(65_536, low=2, unit="tokens", doc="Longer documents are split, with ids ID#0, ID#1, ...; not the records of a task.")
    max_bad_records: int = field(100, low=0, unit="records", doc="Records that cannot be read are named and skipped; one more than this stops the run.")
    streams: int | None = field(None, low=1, doc="Logical streams S; divides the batch size, or all of a schedule. None = the greatest common divisor of these and 64.")
    shuffle: bool = field(True, doc="Visit documents in a new random order each epoch.")
    prefetch: int = field(2, low=0, unit="batches", doc="Batches prepared ahead in a background thread; 0 = none.")

    def check(self, where: str) -> None:
        if not self.source:
            raise ConfigError(f"{where}.source is empty; give at least one source such as text:corpus/*.txt.")
        for key, entries in (("source", self.source), ("validation_source", self.validation_source)):
            for entry in entries:
                if ":" not in entry:
                    raise ConfigError(f"{where}.{key}={fields.unparse(entries)}: '{entry}' is not of the form FORMAT:PATH, such as text:corpus/*.txt.")
        if self.weights and (len(self.weights) != len(self.source) or not sum(self.weights)):
            given = f"{where}.weights={fields.unparse(self.weights)}"
            raise ConfigError(f"{given} must hold one weight for each of the {len(self.source)} entries of {where}.source, not all 0.")
        if self.temperature is not None and (self.weights or not self.temperature):
            reason = f"and {where}.weights={fields.unparse(self.weights)} say the same in two ways; give one of them" if self.weights else "is not above 0"
            raise ConfigError(f"{where}.temperature={self.temperature} {reason}.")
        if self.size_limit is not None and self.temperature is None:
            raise ConfigError(f"{where}.size_limit={self.size_limit} without {where}.temperature; set {where}.temperature=1 for shares in proportion to sizes up to the limit.")
        if self.weight_schedule and (self.weights or self.temperature is not None):
            given = f"{where}.weights={fields.unparse(self.weights)}" if self.weights else f"{where}.temperature={self.temperature}"
            raise ConfigError(f"{given} and {where}.weight_schedule={fields.unparse(self.weight_schedule)} say the same in two ways; give one of them.")
        if self.weight_change != "step" and not self.weight_schedule:
            raise ConfigError(f"{where}.weight_change={self.weight_change} without {where}.weight_schedule, whose entries it goes between; give that, or leave it out.")
        for step, weights in weight_points(self.weight_schedule, where=where):
            if len(weights) != len(self.source) or not sum(weights):
                given = f"{where}.weight_schedule={fields.unparse(self.weight_schedule)}: that of step {step}"
                raise ConfigError(f"{given} must hold one weight for each of the {len(self.source)} entries of {where}.source, as 7:2:1, not all 0.")
        lengths = [length for _, length in size_points(self.length_schedule, key=f"{where}.length_schedule")]
        if lengths and (lengths[-1] != self.length or any(later <= length for length, later in itertools.pairwise(lengths))):
            given = f"{where}.length_schedule={fields.unparse(self.length_schedule)} with {where}.length={self.length}"
            raise ConfigError(f"{given}; allowed: lengths that rise up to {where}.length, since what was begun for shorter rows goes on in longer ones.")
        if len(self.max_epochs) not in (0, 1, len(self.source)):
            raise ConfigError(f"{where}.max_epochs={fields.unparse(self.max_epochs)}; allowed: one number, or one for each of the {len(self.source)} entries of {where}.source.")
        count = max(len(self.source), len(self.validation_source))
        for number, _, _ in column_entries(self.columns, where=where):
            if number is not None and number >= count:
                raise ConfigError(f"{where}.columns has an entry for source {number}; there are {count}, numbered from 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Update rule; patterns are regular expressions matched against whole parameter paths such as decoder/layers/mlp/wi/kernel."""

    name: str = field("adamw", doc="Entry of ptm.optim.OPTIMIZERS: adamw, adafactor, lamb, lion, sgd, muon.")
    learning_rate: float = field(1e-3, low=0.0, doc="Peak learning rate.")
    weight_decay: float = field(0.01, low=0.0, doc="Decoupled weight decay, multiplied by the learning rate.")
    no_decay: tuple[str, ...] = field((".*/bias", ".*/scale", ".*norm.*"), doc="Patterns of parameters that are not decayed.")
    b1: float = field(0.9, low=0.0, high=1.0, doc="Decay of the first moment (momentum of sgd and muon).")
    b2: float = field(0.999, low=0.0, high=1.0, doc="Decay of the second moment.")
    eps: float = field(1e-8, low=0.0, doc="Added to the root of the second moment.")
    clip_norm: float | None = field(1.0, low=0.0, doc="Largest global norm of the gradient; None never clips.")
    layerwise_decay: float = field(1.0, low=0.0, high=1.0, doc="Factor of the learning rate from each layer to the one below it (ELECTRA, appendix); 1 = none.")
    freeze: tuple[str, ...] = field((), doc="Patterns of parameters that stay as they are; (?!tag_head|bilstm).* = all but these two.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the steps, as a factor of the peak."""

    name: str = field("cosine", doc="Entry of ptm.optim.SCHEDULES: constant, linear, cosine, rsqrt, wsd.")
    warmup_steps: int = field(0, low=0, unit="steps", doc="Linear warm-up from 0.")
    final_factor: float = field(0.0, low=0.0, high=1.0, doc="Factor of the peak at the last step (linear, cosine, wsd).")
    decay_share: float = field(0.2, low=0.0, high=1.0, doc="Share of the run that wsd decays over.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices and how arrays lie on them; the product of the axes is the number of devices, one axis may be -1."""

    preset: str = field("fsdp+tp", doc="Row of ptm.parallel.RULES: dp, fsdp, tp, fsdp+tp, sp.")
    data: int = field(-1, low=-1, unit="devices", doc="Axis over which only the batch is split; over several slices of TPUs a multiple of their number.")
    fsdp: int = field(1, low=-1, unit="devices", doc="Axis over which the batch and, by the presets fsdp, fsdp+tp and sp, the parameters are split.")
    tensor: int = field(1, low=-1, unit="devices", doc="Axis over which heads, feed-forward and vocabulary are split.")
    sequence: int = field(1, low=-1, unit="devices", doc="Axis over which the length is split (context parallelism), and the parameters as over fsdp.")

    def check(self, where: str) -> None:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "preset"}
        if 0 in sizes.values() or sum(size == -1 for size in sizes.values()) > 1:
            given = ", ".join(f"{where}.{axis}={size}" for axis, size in sizes.items())
            raise ConfigError(f"{given}; allowed: positive numbers, and -1 (the devices that are left) at most once.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same mathematics is computed; nothing here changes what a run means."""

    dtype: str = field("float32", choices=("float32", "bfloat16"), doc="Type of activations; parameters and losses stay float32.")
    logits: str = field(
        "float32", choices=("float32", "bfloat16"), doc="Type in which vocabulary logits are stored, if `dtype` is no wider; the softmax is float32 either way."
    )  # fmt: skip
    attention: str = field(
        "auto", choices=("auto", "xla", "chunked", "cudnn", "splash", "flash"),
        doc="Attention backend: plain, in blocks, of NVIDIA GPUs, of TPUs without and with a bias; auto picks by device, mask and length, and logs why.",
    )  # fmt: skip
    attention_chunk: int = field(512, low=1, unit="tokens", doc="Queries and keys that the chunked backend looks at at once.")
    scan_layers: bool = field(True, doc="Compile one layer and loop, or unroll all layers (slower to compile, often faster to run).")
    remat: str = field(
        "none", choices=("none", "dots", "full", "auto"),
        doc="What the backward pass recomputes of a layer: nothing, all but matrix products, all; auto = as little as remat_budget allows.",
    )  # fmt: skip
    remat_budget: float | None = field(None, low=0.0, unit="GiB", doc="With remat=auto, what a device may keep for the backward pass, by the shapes of the forward pass.")
    loss_chunk: int = field(4096, low=1, unit="tokens", doc="Positions whose vocabulary logits a device holds at once.")
    deterministic: bool = field(
        False, doc="On GPUs, kernels that give the same bits each time, on the same device and versions, and no choice of kernels by their speed: slower. CPUs and TPUs are so anyway."
    )  # fmt: skip
    cache: str | None = field("auto", doc="Folder of the persistent compile cache; auto = in the user's cache folder; None = none.")

    def check(self, where: str) -> None:
        if (self.remat == "auto") != (self.remat_budget is not None):
            raise ConfigError(f"{where}.remat={self.remat} with {where}.remat_budget={self.remat_budget}; set both remat=auto and a budget in GiB, or neither.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept of a run. The last step is always saved."""

    every: int = field(500, low=1, unit="steps", doc="Save each time so many steps are done.")
    keep_latest: int = field(2, low=1, unit="checkpoints", doc="Newest checkpoints that are kept.")
    keep_best: int = field(1, low=0, unit="checkpoints", doc="Best checkpoints by `metric` that are kept besides.")
    metric: str = field("validation/loss", doc="Eval metric that keep_best compares.")
    mode: str = field("min", choices=("min", "max"), doc="Whether a smaller or a larger metric is better.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What is written while a run goes on."""

    every: int = field(10, low=1, unit="steps", doc="Write a row of metrics each time so many steps are done.")
    writers: tuple[str, ...] = field(("tensorboard",), doc="Writers besides metrics.jsonl: entries of ptm.log.WRITERS.")
    norms: bool = field(False, doc="Norms of gradient, parameters and update per parameter group in each row.")
    profile: tuple[int, ...] = field((), low=0, unit="steps", doc="First and last step of a profiler trace; empty = none.")

    def check(self, where: str) -> None:
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            raise ConfigError(f"{where}.profile={fields.unparse(self.profile)}; allowed: two steps FIRST,LAST with FIRST <= LAST, or nothing.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOfInit:
    """Stands for the model in recipes that take it, and its tokenizer, from what `init` names (ptm.specs.adopt)."""

    name: ClassVar[str] = "of_init"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021): matrices of the model move by alpha / rank * A B alone. Patterns are as those of `optimizer`."""

    rank: int | None = field(None, low=1, doc="Rank of the change of a matrix; None trains the matrices themselves.")
    alpha: float = field(16.0, low=0.0, doc="The change is multiplied by alpha / rank.")
    targets: tuple[str, ...] = field((".*/(query|value)/kernel",), doc="Patterns of kernels that move; .* = all but those that `train` trains.")
    train: tuple[str, ...] = field(
        ("(pooler|pair_head|classify_head|tag_head|qa_head|hidden_projection|layer_mix|bilstm)/.*",),
        doc="Patterns of parameters that are trained themselves; all others stay as they are.",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mup:
    """Maximal update parametrisation (Yang et al. 2022, table 8): a learning rate that is best at one width stays so at others."""

    base_width: int | None = field(
        None, low=1, doc="model.width at which it is the standard parametrisation, and rates are tuned; None = standard at all widths."
    )
    base_heads: int | None = field(None, low=1, doc="model.num_heads at that width; None = in proportion to the width, so that heads keep their size.")

    def check(self, where: str) -> None:
        if self.base_heads is not None and self.base_width is None:
            raise ConfigError(f"{where}.base_heads={self.base_heads} without {where}.base_width; set both, or leave both None.")


SECTIONS: dict[str, type] = {
    "train": Train, "data": Data, "tokenizer": Tokenizer, "optimizer": Optimizer, "schedule": Schedule, "lora": Lora, "mup": Mup,
    "mesh": Mesh, "compute": Compute, "checkpoint": Checkpoint, "log": Log,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run, resolved: `model`, `objective` and the values of `evals` are the Config dataclasses of their entries."""

    seed: int = field(0, low=0, high=2**31 - 1, doc="Seed of initialisation, data order, masking and dropout.")
    init: str = field(
        "scratch", doc="Where parameters start: scratch, ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR, hub:ORG/NAME[@REVISION]; scratch:SPEC = fresh ones for SPEC's model. "
        "Of an encoder_decoder also ENCODER+DECODER, each such a spec or scratch; a single one of an encoder or decoder serves both sides."
    )
    model: Any
    objective: Any
    evals: dict[str, Any]
    train: Train
    data: Data
    tokenizer: Tokenizer
    optimizer: Optimizer
    schedule: Schedule
    lora: Lora
    mup: Mup
    mesh: Mesh
    compute: Compute
    checkpoint: Checkpoint
    log: Log


TOP_LEVEL = tuple(f.name for f in dataclasses.fields(Config) if f.metadata)


def init_specs(init: str) -> tuple[str, ...]:
    """The specs that `init` names: one, or that of an encoder-decoder's encoder and that of its decoder."""
    return tuple(re.split(r"\+(?=(?:ckpt|hf|hub):|scratch$)", init))

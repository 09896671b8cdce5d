"""Small models and batches that the invariant tests iterate over: every family with the objectives that can train it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ptm import config, models, parallel
from ptm.data.batch import Document, keyed_rng
from ptm.models import MODELS, bert, gpt, t5
from ptm.nn.context import Context
from ptm.objectives import OBJECTIVES

VOCAB = 48
SMALL = {"num_layers": 2, "width": 32, "num_heads": 4, "vocab_size": VOCAB}
CONFIGS = {
    "gpt": gpt.Config(**SMALL, max_length=64, dropout=0.0, attention_dropout=0.0),
    "bert": bert.BertConfig(**SMALL, max_length=64, dropout=0.0, attention_dropout=0.0),
    "t5": t5.Config(**SMALL, head_dim=8, mlp_width=64, dropout=0.0, num_buckets=8, max_distance=20),
    "t5_1.1": t5.Config(**SMALL, head_dim=8, mlp_width=64, dropout=0.0, num_buckets=8, max_distance=20, gated=True, activation="gelu_tanh", tie_embeddings=False),
}
HOME = {"gpt": "causal", "bert": "mlm", "t5": "span_corruption", "t5_1.1": "span_corruption"}
LENGTH, INPUTS = 16, 24


class Vocabulary:
    """A tokenizer of VOCAB pieces without text: 0..7 are special, 40..47 sentinels, every third piece begins a word."""

    vocab_size = VOCAB
    pad_id, bos_id, eos_id, unk_id, mask_id, cls_id, sep_id = 0, 1, 2, 3, 4, 5, 6
    sentinels = tuple(range(VOCAB - 1, VOCAB - 9, -1))
    special_ids = frozenset(range(8)) | frozenset(sentinels)
    token_bytes = np.where(np.isin(np.arange(VOCAB), list(special_ids)), 0, 3).astype(np.int32)
    fingerprint = "test"

    def word_starts(self, ids):
        return np.asarray(ids) % 3 == 0

    def decode(self, ids):
        return " ".join(map(str, ids))

    def pieces(self, ids):
        return [str(i) for i in ids]


def layout(**mesh) -> parallel.Layout:
    """A layout over as many CPU devices as the mesh sizes multiply to."""
    sizes = {"data": 1, **{name: size for name, size in mesh.items() if name != "preset"}}
    count = int(np.prod(list(sizes.values())))
    return parallel.make_layout(config.Mesh(**{**sizes, "preset": mesh.get("preset", "fsdp+tp")}), devices=jax.devices()[:count])


@functools.cache
def objective(name: str, family: str, **options):
    entry = OBJECTIVES[name]
    if name == "span_corruption":
        options = {"input_length": INPUTS, **options}
    return entry.build(entry.config(**options), tokenizer=Vocabulary(), length=LENGTH, packing="default", model_config=CONFIGS[family])


def model(family: str, *, heads=None, on: parallel.Layout | None = None, changes=(), **context) -> models.Model:
    """A small model of a family; `context` are options of how it computes, `changes` of what it is."""
    heads = heads or objective(HOME[family], family).heads
    made = Context(on or layout(), **context)
    return models.make(dataclasses.replace(CONFIGS[family], **dict(changes)), context=made, heads=heads)


@functools.cache
def params(family: str, heads=None, seed: int = 0, scale: float = 3.0):
    """Parameters drawn at random everywhere: biases and norms too, so that nothing hides behind a zero."""
    made = model(family, heads=heads)
    lengths = {"L": LENGTH, "I": INPUTS} if made.config.kind == "encoder_decoder" else {"L": LENGTH}
    tree = jax.jit(functools.partial(made.init, lengths=lengths))(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(structure, [scale * leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


def documents(count: int, *, length: int = 9, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(f"d{n}", rng.integers(8, 40, length).astype(np.int32)) for n in range(count)]


def row(examples, lengths, fields) -> dict[str, np.ndarray]:
    """One row that packs `examples`, made without the pipeline."""
    out = {}
    for dim, segments, positions in (("L", "segments_BL", "positions_BL"), ("I", "input_segments_BI", "input_positions_BI")):
        if dim not in lengths:
            continue
        names = [name for name in fields if name.endswith("_B" + dim)]
        sizes = [len(example[names[0]]) for example in examples]
        room = lengths[dim]
        assert sum(sizes) <= room, (sizes, room)
        for name in names:
            out[name] = np.full(room, fields[name].pad, fields[name].dtype)
            out[name][: sum(sizes)] = np.concatenate([example[name] for example in examples])
        out[segments] = np.concatenate([np.repeat(np.arange(1, len(sizes) + 1), sizes), np.zeros(room - sum(sizes), int)]).astype(np.int32)
        out[positions] = np.concatenate([*[np.arange(size) for size in sizes], np.zeros(room - sum(sizes), int)]).astype(np.int32)
    return out


def batch(name: str, family: str, *, rows: int = 8, seed: int = 0, per_row: int = 1, length: int = 9, lengths=None) -> dict[str, jax.Array]:
    """A batch of an objective from random documents, `per_row` to a row."""
    made = objective(name, family)
    docs = documents(rows * per_row, length=length, seed=seed)
    examples = [next(iter(made.features(doc, rng=keyed_rng(seed, doc.id, 0), draw=None))) for doc in docs]
    packed = [made.finish(row(examples[r * per_row : (r + 1) * per_row], lengths or made.lengths, made.fields)) for r in range(rows)]
    return {key: jnp.asarray(np.stack([item[key] for item in packed])) for key in packed[0]}


PAIRS = [(family, HOME[family]) for family in CONFIGS]
CROSS = [(family, name) for family in CONFIGS for name, entry in OBJECTIVES.items() if CONFIGS[family].kind in entry.build.kinds]
assert {CONFIGS[family].name for family in CONFIGS} == set(MODELS), "every family has a small config here"

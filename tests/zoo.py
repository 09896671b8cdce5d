"""Small models and batches that the invariant tests iterate over: every family with the objectives that can train it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from ptm import config, models, parallel, state, tree
from ptm.data.batch import Document, keyed_rng
from ptm.models import MODELS, albert, bert, electra, encoder_decoder, gpt, llama, modernbert, t5, xlnet
from ptm.nn.context import Context
from ptm.objectives import OBJECTIVES

VOCAB = 48
SMALL = {"num_layers": 2, "width": 32, "num_heads": 4, "vocab_size": VOCAB}
T5 = {"head_dim": 8, "mlp_width": 64, "dropout": 0.0, "num_buckets": 8, "max_distance": 20}
SIDE = {"num_layers": 2, "width": 32, "num_heads": 4, "max_length": 64, "dropout": 0.0, "attention_dropout": 0.0}
CONFIGS = {
    "gpt": gpt.Config(**SMALL, max_length=64, dropout=0.0, attention_dropout=0.0),
    "gpt1": gpt.Config(**SMALL, max_length=64, dropout=0.0, attention_dropout=0.0, prenorm=False, scale_by_layer=True),
    "bert": bert.BertConfig(**SMALL, max_length=64, dropout=0.0, attention_dropout=0.0),
    "roberta": bert.RobertaConfig(**SMALL, max_length=64, dropout=0.0, attention_dropout=0.0, tie_embeddings=False),
    "llama": llama.Config(
        **SMALL | {"num_layers": 4}, num_kv_heads=2, mlp_width=48, max_length=64, qkv_bias=True, qk_norm=True, rotary_share=0.5, window=4, global_every=2
    ),
    "palm": llama.Config(**SMALL, mlp_width=48, head_dim=4, parallel=True, norm="layer", activation="gelu", gated=False, rotary_original_length=8, rotary_factor=4.0),
    "modernbert": modernbert.Config(**SMALL | {"num_layers": 5}, mlp_width=48, max_length=64, window=4, global_every=2),
    "albert": albert.Config(**SMALL, embed_width=16, max_length=64),
    "electra": electra.Config(**SMALL | {"num_heads": 8}, embed_width=16, max_length=64, generator_fraction=0.5, dropout=0.0, attention_dropout=0.0),
    "xlnet": xlnet.Config(**SMALL, dropout=0.0, attention_dropout=0.0),
    "xlnet_uni": xlnet.Config(**SMALL, dropout=0.0, attention_dropout=0.0, attn_type="uni", clamp_len=5, tie_embeddings=False),
    "t5": t5.Config(**SMALL, **T5),
    "t5_1.1": t5.Config(**SMALL, **T5, gated=True, activation="gelu_tanh", tie_embeddings=False),
    "encoder_decoder": encoder_decoder.Config(parts={"encoder": bert.BertConfig(**SIDE), "decoder": gpt.Config(**SIDE)}, vocab_size=VOCAB),
}
HOME = {"gpt": "causal", "gpt1": "causal", "llama": "causal", "palm": "causal", "modernbert": "mlm", "bert": "mlm", "roberta": "mlm", "albert": "mlm", "electra": "rtd", "xlnet": "permutation", "xlnet_uni": "permutation", "t5": "span_corruption", "t5_1.1": "span_corruption", "encoder_decoder": "span_corruption"}
LENGTH, INPUTS = 16, 24
# A row holds two of the shorter documents of `batch` only without mode tokens.
OPTIONS = {
    "span_corruption": {"input_length": INPUTS}, "prefix": {"input_length": INPUTS}, "denoising": {"input_length": INPUTS},
    "ul2": {"input_length": INPUTS, "mode_tokens": False}, "permutation": {"partial": 2},
    "classify": {"labels": ("0", "1")}, "tag": {"labels": ("O", "B-X", "I-X")}, "choose": {"max_choices": 2},
    "span_qa": {"doc_stride": 2, "max_question": 3}, "seq2seq": {"input_length": INPUTS, "max_new_tokens": 4},
}  # fmt: skip


def _known(option: str, value) -> bool:
    """Whether this version of the compiler has an option; it refuses a whole program for one that it does not know."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# These programs run once. Machine code that is not optimised takes a quarter of the time to compile and leaves the program's graph and shardings as they are.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options={option: value for option, value in QUICK.items() if _known(option, value)})


class Vocabulary:
    """A tokenizer of VOCAB pieces without text: 0..7 are special, 40..47 sentinels, every third piece begins a word, every fifth a sentence."""

    vocab_size = VOCAB
    pad_id, bos_id, eos_id, unk_id, mask_id, cls_id, sep_id = 0, 1, 2, 3, 4, 5, 6
    sentinels = tuple(range(VOCAB - 1, VOCAB - 9, -1))
    special_ids = frozenset(range(8)) | frozenset(sentinels)
    token_bytes = np.where(np.isin(np.arange(VOCAB), list(special_ids)), 0, 3).astype(np.int32)
    fingerprint = "test"

    def word_starts(self, ids):
        return np.asarray(ids) % 3 == 0

    def sentence_starts(self, ids):
        return np.asarray(ids) % 5 == 0

    def segmented_word_starts(self, ids, *, words):
        return self.word_starts(ids)

    def encode(self, text):
        return np.array(text.split(), np.int32)

    def encode_with_offsets(self, text):
        found = [match.span() for match in re.finditer(r"\S+", text)]
        return self.encode(text), np.array([start for start, _ in found], np.int32), np.array([end for _, end in found], np.int32)

    def encode_words(self, words):
        return [self.encode(word) for word in words]

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
    return entry.build(entry.config(**{**OPTIONS.get(name, {}), **options}), tokenizer=Vocabulary(), length=LENGTH, packing="default", model_config=CONFIGS[family])


def model(family: str, *, heads=None, on: parallel.Layout | None = None, changes=(), **context) -> models.Model:
    """A small model of a family; `context` are options of how it computes, `changes` of what it is."""
    heads = heads or objective(HOME[family], family).heads
    made = Context(on or layout(), **context)
    return models.make(dataclasses.replace(CONFIGS[family], **dict(changes)), context=made, heads=heads)


def shapes(name: str, *, heads: tuple[str, ...], **changes):
    """The abstract parameters of a family's config with some keys changed."""
    return _shapes(MODELS[name].config(**changes), heads)


@functools.cache
def _shapes(made_of, heads: tuple[str, ...]):
    made = models.make(made_of, context=Context(layout()), heads=heads)
    lengths = {"L": 8, "I": 8} if made_of.kind == "encoder_decoder" else {"L": 8}
    return jax.eval_shape(functools.partial(made.init, lengths=lengths), jax.random.key(0))


@functools.cache
def params(family: str, heads=None):
    """Parameters drawn at random everywhere: biases and norms too, so that nothing hides behind a zero."""
    made = model(family, heads=heads)
    encoder_decoder = made.config.kind == "encoder_decoder"
    drawn = jit(functools.partial(made.init, lengths={"L": LENGTH, "I": INPUTS} if encoder_decoder else {"L": LENGTH}))(jax.random.key(0))
    # T5 does not scale its attention logits, so its matrices stay as they begin: larger ones would only enlarge rounding.
    scale = 1.0 if encoder_decoder else 3.0
    flat = tree.paths(drawn)
    scales = {path: 1.0 if "_rms/" in path else scale for path in flat}  # both enlarge the logits, on top of the kernels that they normalise
    return tree.unflatten({path: scales[path] * leaf + 0.1 * keyed_rng(path).standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()})


def documents(count: int, *, length: int = 9, seed: int = 0) -> list[Document]:
    """Random documents with the columns of all tasks."""
    rng = np.random.default_rng(seed)
    return [_document(n, rng.integers(8, 40, length).astype(np.int32)) for n in range(count)]


def _document(number: int, tokens_L: np.ndarray) -> Document:
    words = [str(token) for token in tokens_L]
    tags = ["O" if token % 3 else "B-X" for token in tokens_L]
    columns = {"label": str(number % 2), "words": words, "tags": tags, "choices": [" ".join(words[:2]), " ".join(words[2:5])]}
    half = words[: len(words) // 2]
    answers = [{"text": half[-1], "answer_start": len(" ".join(half)) - len(half[-1])}] if number % 3 and half else []
    return Document(f"d{number}", tokens_L, {**columns, "context": " ".join(half), "answers": answers, "target": " ".join(half)})


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
            out[name][: sum(sizes)] = np.concatenate([example[name] for example in examples] or [[]])
        out[segments] = np.concatenate([np.repeat(np.arange(1, len(sizes) + 1), sizes), np.zeros(room - sum(sizes), int)]).astype(np.int32)
        out[positions] = np.concatenate([*[np.arange(size) for size in sizes], np.zeros(room - sum(sizes), int)]).astype(np.int32)
    out |= {name: np.asarray(examples[0][name] if examples else field.pad, field.dtype) for name, field in fields.items() if name.endswith("_B")}
    return out


def stack(rows) -> dict[str, jax.Array]:
    return {key: jnp.asarray(np.stack([item[key] for item in rows])) for key in rows[0]}


def examples(name: str, family: str, count: int, *, length: int, seed: int = 0, **options):
    """The first example of each of `count` random documents."""
    made = objective(name, family, **options)
    docs = documents(count, length=length, seed=seed)
    return [next(iter(made.features(doc, rng=keyed_rng(seed, doc.id, 0), draw=lambda rng: docs[rng.integers(count)]))) for doc in docs]


def batch(name: str, family: str, *, seed: int = 0, extra_rows: int = 0, extra_length: int = 0, **options) -> dict[str, jax.Array]:
    """Eight rows of unequal weight, one of them with two documents (where rows may be shared) and one of padding alone; more padding as asked for."""
    made = objective(name, family, **options)
    lengths = {dim: size + extra_length * (dim != "S") for dim, size in made.lengths.items()}
    long, short = (examples(name, family, 8, length=length, seed=seed, **options) for length in (11, 5))
    sharing = made.packing != "none" and sum(len(example["tokens_BL"]) for example in short[:2]) <= made.lengths["L"]
    contents = [long[:1], short[: 2 if sharing else 1], short[2:3], long[1:2], [], long[2:3], short[3:4], long[3:4]]
    return stack([made.finish(row(content, lengths, made.fields)) for content in [*contents, *[[]] * extra_rows]])


def gradients(family: str, name: str, *, on: parallel.Layout | None = None, microbatches: int = 1, **context):
    """A compiled function (params, batch) -> (loss, gradient) and the parameters to call it with."""
    objective_ = objective(name, family)
    made, start = model(family, heads=objective_.heads, on=on, **context), params(family, heads=objective_.heads)

    def step(params, batch):
        return state.gradients(made, objective_, params, batch, microbatches=microbatches, rng=None, carry=None, train=False)[:2]

    if on is None:
        return jit(step), start
    shardings = on.parameters(start)
    return jit(step, in_shardings=(shardings, on.batch()), out_shardings=(on.replicated(), shardings)), jax.device_put(start, shardings)


@functools.cache
def plain_gradients(family: str, name: str):
    """`gradients` of the scanned model on one device, compiled once for all tests."""
    return gradients(family, name)


@functools.cache
def reference(family: str, name: str):
    """(loss, gradient) of the usual batch: what every other way to compute them is held against."""
    step, start = plain_gradients(family, name)
    return step(start, batch(name, family))


# Parameters whose gradient may be 0 but for the rounding of a sum, which is as large as that of others. A key's bias adds the same to all logits
# of a query, as segment encodings do where all of a text is of one type; rows may ask for opposite changes of a label's bias. Over positions
# a bias adds the same to all.
CANCELLED = {"qa_head/bias": "qa_head/kernel", "key/bias": "key/kernel", "segment/bias": "position/bias", "segment/embedding": "position/bias", "labels/bias": "labels/kernel"}


def assert_equal_gradients(actual, expected, *, layers: int = 2, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` * sqrt(layers) of each tensor's largest entry, at least of a thousandth of the largest of all."""
    expected, actual = tree.paths(expected), tree.paths(actual)
    assert expected.keys() == actual.keys()
    limits = allowed(expected, layers=layers, tolerance=tolerance)
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, atol=limits[path], rtol=0, err_msg=path)


def allowed(gradients: dict[str, jax.Array], *, layers: int = 2, tolerance: float = 1e-5) -> dict[str, float]:
    """How far each of the gradients, by path, may be from itself computed otherwise."""
    sizes = {path: float(jnp.max(jnp.abs(leaf))) for path, leaf in gradients.items()}
    like = {path: next((path.removesuffix(end) + other for end, other in CANCELLED.items() if path.endswith(end)), path) for path in gradients}
    return {path: tolerance * layers**0.5 * max(sizes[like[path]], 1e-3 * max(sizes.values())) for path in gradients}


PAIRS = [(family, HOME[family]) for family in CONFIGS]
NEEDS = {"pairs": "pair", "rtd": "rtd", "permutation": "lm"}  # heads that not every family has
# Without objectives of several parts, and without regression, which differs from classification in its last line.
CROSS = [
    (family, name)
    for family, made in CONFIGS.items()
    for name, entry in OBJECTIVES.items()
    if made.kind in entry.build.kinds and name not in ("mixture", "distillation", "regress") and (name not in NEEDS or NEEDS[name] in made.heads)
]
assert {CONFIGS[family].name for family in CONFIGS} == set(MODELS), "every family has a small config here"

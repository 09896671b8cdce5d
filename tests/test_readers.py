"""What stands between hidden states and a task's head: LSTMs in both directions, and the mixture of layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tasks
import zoo

from ptm import config, parallel, tree
from ptm.data.batch import keyed_rng
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.nn.context import Context
from ptm.nn.readers import BiLSTM, LayerMix, bilstm_flops
from ptm.objectives import tag

WIDTH = 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(params, x_LD):
    """One text read by one LSTM, step by step as the paper has it."""
    out, cell, outputs = np.zeros(WIDTH // 2), np.zeros(WIDTH // 2), []
    for x in x_LD:
        keep, forget, value, show = np.split(x @ params["input"]["kernel"] + params["input"]["bias"] + out @ params["recurrent"], 4)
        cell = sigmoid(forget + 1) * cell + sigmoid(keep) * np.tanh(value)
        out = sigmoid(show) * np.tanh(cell)
        outputs.append(out)
    return np.array(outputs)


@pytest.fixture(scope="module")
def drawn():
    """(module, parameters, hidden states, segments): two layers over rows of several segments and padding."""
    module = BiLSTM(Context(zoo.layout()), WIDTH, 2)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 1, 1, 2, 3, 3, 3, 3, 3]])
    hidden = np.random.default_rng(0).standard_normal((2, 9, WIDTH), np.float32)
    params = zoo.jit(module.init)(jax.random.key(0), hidden, segments)["params"]
    return module, tree.map_paths(lambda path, leaf: leaf + 0.3 * keyed_rng(path).standard_normal(leaf.shape, np.float32), params), hidden, segments


def test_each_segment_is_read_alone_from_both_ends(drawn):
    module, params, hidden, segments = drawn
    actual = zoo.jit(lambda *given: module.apply({"params": params}, *given))(hidden, segments)
    for row in range(2):
        for segment in range(1, int(segments[row].max()) + 1):
            here = np.asarray(segments[row] == segment)
            x = hidden[row][here]
            for n in range(2):
                x = np.concatenate([lstm(params[f"forward_{n}"], x), lstm(params[f"backward_{n}"], x[::-1])[::-1]], axis=1)
            np.testing.assert_allclose(actual[row][here], x, atol=1e-5)
    assert not np.any(actual[np.asarray(segments == 0)]) and np.abs(actual).max() > 0.3


def test_flops_of_the_formula(drawn):
    """Of one row, recurrent products included, by hand: 2 layers x 2 directions x 9 positions x (6 + 3) x 12 products."""
    assert bilstm_flops(width=WIDTH, num_layers=2, length=9) == 2 * 2 * 2 * 9 * (6 + 3) * 12
    with_readers = zoo.model("bert", heads=("bilstm:2", "tag:3")).forward_flops({"L": 9}, 0, heads=("bilstm:2", "tag:3"))
    assert with_readers - zoo.model("bert", heads=("tag:3",)).forward_flops({"L": 9}, 0, heads=("tag:3",)) == bilstm_flops(width=32, num_layers=2, length=9)


def test_the_mixture_of_layers_by_hand():
    states = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) * np.ones((3, 1, 2, 2), np.float32)
    params = {"weights": jnp.log(jnp.array([1.0, 2.0, 5.0])), "scale": jnp.float32(4.0)}
    np.testing.assert_allclose(LayerMix().apply({"params": params}, states), np.full((1, 2, 2), 4 * (0 + 2 + 10) / 8), rtol=1e-6)
    fresh = LayerMix().init(jax.random.key(0), states)["params"]
    np.testing.assert_allclose(LayerMix().apply({"params": fresh}, states), np.ones((1, 2, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("tag", "bert", {"labels": ("O", "B-X"), "bilstm_layers": 1, "layer_mix": True}),
        pytest.param("classify", "gpt", {"labels": ("0", "1"), "bilstm_layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_packed_rows_give_what_texts_alone_give(name, family, options):
    tasks.assert_packed_is_alone(name, family, **options)


@pytest.mark.parametrize("family", ["electra", *(pytest.param(family, marks=pytest.mark.slow) for family in ("xlnet", "albert"))])
def test_every_objective_reads_through(family):
    """The head reads other states where they are asked for, and parameters are those of the readers besides; without them the program has none of this."""
    options = {"doc_stride": 8, "max_question": 8}
    plain, model, params = tasks.on_zoo("span_qa", family, **options)
    objective, refined, more = tasks.on_zoo("span_qa", family, layer_mix=True, bilstm_layers=1, **options)
    assert objective.heads == ("layer_mix", "bilstm:1", "qa") and plain.heads == ("qa",)
    assert set(more) - set(params) == {"layer_mix", "bilstm"}
    refined.module.context.layout.parameters(more)
    batch = {name: jnp.ones((1, 4), jnp.int32) for name in ("tokens_BL", "segments_BL", "positions_BL", "types_BL")}
    through = zoo.jit(lambda params: refined.hidden(params, batch, mask="full", head="qa").hidden_BLD)(more)
    directly = zoo.jit(lambda params: refined.hidden(params, batch, mask="full", head="hidden_projection").hidden_BLD)(more)
    assert through.shape == directly.shape and np.abs(np.asarray(through - directly)).max() > 0.01


def test_a_frozen_feature_extractor(tmp_path):
    """The body stays as it is and costs neither gradient nor moments; the LSTMs and the head learn, on one device as on eight."""
    words, rng = ("red", "green", "run", "sit"), np.random.default_rng(0)
    chosen = [[words[n] for n in rng.integers(0, 4, 5)] for _ in range(64)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(line), "words": line, "tags": ["A" if word in words[:2] else "V" for word in line]}) + "\n" for line in chosen))
    cfg = config.base(
        model=bert.BertConfig(num_layers=1, width=16, num_heads=2, max_length=32, dropout=0.0, attention_dropout=0.0),
        objective=tag.Config(labels=("A", "V"), scheme="as_given", bilstm_layers=1, layer_mix=True),
        train=config.Train(steps=30, batch_size=8), tokenizer=config.Tokenizer(kind="bytes", lowercase=False),
        data=config.Data(source=(f"jsonl:{data}",), columns=("text=text", "words=words", "tags=tags"), length=32, streams=1),
        optimizer=config.Optimizer(learning_rate=1e-2, freeze=("(?!tag_head|bilstm|layer_mix).*",)), checkpoint=config.Checkpoint(every=15, keep_best=0),
        schedule=config.Schedule(name="constant"), log=config.Log(writers=(), every=1),
    )  # fmt: skip
    assert runs.run(cfg, tmp_path / "run") == 0
    first, last = runs.leaves(tmp_path / "run", 15), runs.leaves(tmp_path / "run", 30)
    moved = {path.split("/")[1] for path in last if path.startswith("params/") and np.any(first[path] != last[path])}
    assert moved == {"tag_head", "bilstm", "layer_mix"}
    assert not [path for path in last if path.startswith("opt_state/") and ("encoder" in path or "embed" in path)]
    losses = [row["loss"] for row in map(json.loads, runs.metrics(tmp_path / "run").splitlines()) if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_language_modelling_beside_readers_is_refused():
    with pytest.raises(ConfigError, match="objective.lm_coefficient=0.5 models language with the last hidden states"):
        tasks.build("classify", zoo.Vocabulary(), kind="decoder", summary="last", labels=("0", "1"), lm_coefficient=0.5, layer_mix=True)


def test_readers_are_trained_beside_low_rank_factors():
    assert all(tree.match(config.Lora().train, ["bilstm/forward_0/recurrent", "layer_mix/scale", "tag_head/bias"], what="").values())
    assert parallel.axes_words("bilstm/forward_0/recurrent") == ("lstm_in", "lstm_gates") and parallel.axes_words("layer_mix/scale") == ()

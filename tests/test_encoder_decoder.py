"""Encoder-decoders made of pretrained models: what each side computes, what is shared, and where their parameters start."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import adopt, config, convert, models, optim, registry, train, tree, weights
from ptm import run as run_lib
from ptm.config import Data, Log, Tokenizer, Train
from ptm.data.batch import keyed_rng
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import bert, encoder_decoder, gpt
from ptm.nn.context import Context
from ptm.objectives import causal, mlm, span_corruption

SIDES = {"bert": bert.BertConfig(**zoo.SIDE), "roberta": bert.RobertaConfig(**zoo.SIDE), "gpt": gpt.Config(**zoo.SIDE)}
BYTES = 267  # of the tokenizer of bytes with 8 sentinels


@functools.cache
def made(encoder: str, decoder: str, share: bool = False) -> models.Model:
    options = encoder_decoder.Config(parts={"encoder": SIDES[encoder], "decoder": SIDES[decoder]}, vocab_size=zoo.VOCAB, share=share)
    return models.make(options, context=Context(zoo.layout()), heads=("lm",))


@functools.cache
def params(encoder: str, decoder: str, share: bool = False):
    lengths = {"L": zoo.LENGTH, "I": zoo.INPUTS}
    drawn = jax.eval_shape(functools.partial(made(encoder, decoder, share).init, lengths=lengths), jax.random.key(0))
    return tree.map_paths(lambda path, leaf: ("scale" in path) + 0.2 * keyed_rng(path).standard_normal(leaf.shape, np.float32), drawn)


def batch():
    return zoo.batch("span_corruption", "encoder_decoder")


def plain(family: str) -> models.Model:
    return models.make(dataclasses.replace(SIDES[family], vocab_size=zoo.VOCAB), context=Context(zoo.layout()), heads=(("lm",) if family == "gpt" else ("mlm",)))


def without_cross(side):
    """The parameters of a decoder whose cross-attention is left out."""
    return tree.unflatten({path: leaf for path, leaf in tree.paths(side).items() if "cross_attention" not in path})


def test_positions_begin_anew_with_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 2, 0]])
    assert encoder_decoder.positions_of(segments).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 0, 0]]
    rows = batch()
    real = rows["input_segments_BI"] > 0
    np.testing.assert_array_equal(np.where(real, encoder_decoder.positions_of(rows["input_segments_BI"]), 0), np.where(real, rows["input_positions_BI"], 0))


@pytest.mark.parametrize(("encoder", "decoder", "share"), [("bert", "gpt", False), ("roberta", "roberta", True)])
def test_the_sides_are_the_models_that_they_are_made_of(encoder, decoder, share):
    """Bit for bit the encoder's hidden states; and the decoder's logits, once its cross-attention adds nothing, are those of the model under the causal mask."""
    model, rows = made(encoder, decoder, share), batch()
    values = params(encoder, decoder, share)
    silent = tree.map_paths(lambda path, leaf: 0 * leaf if re.search("cross_attention/out", path) else leaf, values)
    inputs = {"tokens_BL": rows["inputs_BI"], "segments_BL": rows["input_segments_BI"], "positions_BL": encoder_decoder.positions_of(rows["input_segments_BI"])}
    own = without_cross(values["decoder" if share else "encoder"])
    first = zoo.jit(lambda values: model.encode(values, rows).hidden_BLD)(values)
    second = zoo.jit(lambda own: plain(encoder).hidden(own, inputs, mask="full").hidden_BLD)(own)
    np.testing.assert_allclose(first, second, atol=1e-6)
    prenorm = decoder == "gpt"  # a norm behind the silent sublayer normalises once more
    if prenorm:
        alone = without_cross(values["decoder"])
        logits = zoo.jit(lambda values: model.logits(values, model.decode(values, rows, model.encode(values, rows)).hidden_BLD, head="lm"))(silent)
        expected = zoo.jit(lambda own: plain("gpt").logits(own, plain("gpt").hidden(own, rows, mask="causal").hidden_BLD, head="lm"))(alone)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        heard = zoo.jit(lambda values: model.logits(values, model.decode(values, rows, model.encode(values, rows)).hidden_BLD, head="lm"))(values)
        assert np.abs(np.asarray(heard - logits)).max() > 0.1


@pytest.mark.parametrize(("encoder", "decoder", "share"), [("roberta", "bert", False), ("bert", "bert", True)])
def test_decoding_with_a_cache(encoder, decoder, share):
    """Token by token, from the encoder's keys and values alone, the numbers of the full pass; layers cut apart or not."""
    model, values = made(encoder, decoder, share), params(encoder, decoder, share)
    rows = {name: value[:3] for name, value in batch().items()}
    full = zoo.jit(lambda values: model.decode(values, rows, model.encode(values, rows)).hidden_BLD)(values)
    apart = model.for_decoding(values)[1]
    memory = zoo.jit(lambda values: model.memory(values, model.encode(values, rows)))(apart)
    step = zoo.jit(lambda values, part, memory, cache: dataclasses.replace(model.decode(values, part, memory, cache=cache), attention_max=None))
    cache, found = model.empty_cache(rows=3, length=zoo.LENGTH), []
    for n in range(zoo.LENGTH):
        part = {name: value[:, n : n + 1] if name.endswith("_BL") else value for name, value in rows.items()}
        out = step(apart, part, memory, cache)
        cache = out.cache
        found.append(out.hidden_BLD)
    real = np.asarray(rows["segments_BL"] > 0)
    assert real.sum() > 10
    np.testing.assert_allclose(np.concatenate(found, axis=1)[real], full[real], atol=3e-5)


def test_counts():
    """Rothe et al. 2020, table 1: BERTSHARE has 136 million parameters; BERT2BERT, there with one table for both sides, 221 million."""
    vocab, width = 30522, 768
    table = vocab * width

    def count(name: str) -> int:
        return tree.size(zoo.shapes("encoder_decoder", heads=("lm",), vocab_size=vocab, **encoder_decoder.SIZES[name]))

    head = width * width + 3 * width + vocab
    assert count("bertshare") - head == pytest.approx(136e6, rel=0.015)
    assert count("bert2bert") - head - table == pytest.approx(221e6, rel=0.015)


def test_layers_of_both_sides_by_depth():
    """With layerwise rates the encoder stands below the decoder, whatever the sides call their stacks."""
    for sides in (("bert", "gpt"), ("bert", "bert")):
        factors = optim.layer_factors(params(*sides), decay=0.5)
        powers = {path: np.log2(factor).ravel().tolist() for path, factor in factors.items()}
        stack = "decoder/decoder" if sides[1] == "gpt" else "decoder/encoder"
        assert powers[f"{stack}/layers/mlp/wi/kernel"] == [-2, -1] and powers["encoder/encoder/layers/mlp/wi/kernel"] == [-4, -3]
        assert powers["encoder/token_embed/embedding"] == [-5]


def test_what_cannot_be_an_encoder_decoder():
    def check(message: str, **changes) -> None:
        options = {"parts": {"encoder": SIDES["bert"], "decoder": SIDES["gpt"]}, **changes}
        with pytest.raises(ConfigError, match=message):
            encoder_decoder.Config(**options).check("model")

    check("model.parts has encoder; give encoder and decoder in the recipe", parts={"encoder": SIDES["bert"]})
    with pytest.raises(ConfigError, match="model.parts has nothing; give encoder and decoder in the recipe"):
        registry.resolve(config.base(model=encoder_decoder.Config(), objective=span_corruption.Config()))
    check("model.parts.encoder is a gpt; allowed: bert, roberta", parts={"encoder": SIDES["gpt"], "decoder": SIDES["gpt"]})
    check("model.parts.encoder.vocab_size=7; both sides have model.vocab_size", parts={"encoder": dataclasses.replace(SIDES["bert"], vocab_size=7), "decoder": SIDES["gpt"]})
    check("width=16.*must be equal", parts={"encoder": dataclasses.replace(SIDES["bert"], width=16), "decoder": SIDES["gpt"]})
    check("model.share=true needs two equal sides", share=True)


# --- where parameters start -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


SMALL = {"num_layers": 1, "width": 16, "num_heads": 2, "max_length": 48}


def recipe(model, objective, text: Path, **sections):
    cfg = config.base(
        model=model, objective=objective, evals={"validation": loss.Config()}, train=Train(steps=1, batch_size=4),
        data=Data(source=(f"text:{text}",), length=32, streams=4), tokenizer=Tokenizer(kind="bytes", sentinels=8), log=Log(writers=()), **sections,
    )  # fmt: skip
    return cfg


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, text) -> dict[str, str]:
    """Checkpoints of a BERT and a GPT with one tokenizer, and the BERT as a directory of the reference library."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name, model, objective in (("bert", bert.BertConfig(**SMALL), mlm.Config()), ("gpt", gpt.Config(**SMALL), causal.Config())):
        assert runs.run(recipe(model, objective, text), folder / name) == 0
    assert convert.convert(f"ckpt:{folder / 'bert'}", f"hf:{folder / 'hf'}")
    return {"bert": f"ckpt:{folder / 'bert'}", "gpt": f"ckpt:{folder / 'gpt'}", "hf": f"hf:{folder / 'hf'}"}


def paired(text: Path, pretrained: dict[str, str], init: str, *, encoder="bert", decoder="gpt", share: bool = False, **changes):
    sides = {"bert": bert.BertConfig(**SMALL | changes), "gpt": gpt.Config(**SMALL | changes)}
    model = encoder_decoder.Config(parts={"encoder": sides[encoder], "decoder": sides[decoder]}, share=share)
    cfg = recipe(model, span_corruption.Config(input_length=48), text, init=init)
    config.override(cfg, "tokenizer.path", pretrained["bert"].removeprefix("ckpt:") + "/tokenizer", registry.REGISTRIES)
    return cfg


def begun(cfg):
    """(first parameters, what is told, the run)."""
    run = run_lib.setup(cfg, devices=jax.devices()[:1])
    started, told = weights.start(run)
    assert jax.tree.structure(started) == jax.tree.structure(run.abstract_params)
    return tree.paths(started), told, run


def saved(spec: str):
    return tree.paths(weights.read_all(spec, weights.reopen(spec)))


def test_each_side_from_a_checkpoint_of_its_own(text, pretrained):
    found, told, run = begun(paired(text, pretrained, f"{pretrained['bert']}+{pretrained['gpt']}"))
    fresh = tree.paths(run.init_params())
    for side, source in (("encoder", "bert"), ("decoder", "gpt")):
        theirs = saved(pretrained[source])
        own = {path.removeprefix(side + "/"): leaf for path, leaf in found.items() if path.startswith(side)}
        for path, leaf in own.items():
            expected = fresh[f"{side}/{path}"] if "cross_attention" in path else theirs[path]
            np.testing.assert_array_equal(leaf, expected, err_msg=path)
    assert told == (
        f"The encoder: parameters of step 1 from {pretrained['bert']}. The decoder: parameters of step 1 from {pretrained['gpt']}. "
        "Not there, so initialised afresh: decoder/decoder/layers/cross_attention, decoder/decoder/layers/cross_attention_norm."
    )


@pytest.mark.parametrize(
    ("init", "share", "begins"),
    [
        ("{hf}", True, "The encoder and the decoder: parameters from hf:"),
        ("{bert}", False, "The encoder: parameters of step 1 from ckpt:"),
        pytest.param("scratch+{bert}", False, "The decoder: parameters of step 1 from ckpt:", marks=pytest.mark.slow),
    ],
)
def test_a_bert_that_encodes_and_decodes(init, share, begins, text, pretrained):
    """Its MLM head included; from a directory just as from a checkpoint; one spec for both sides, shared or not, or one side alone."""
    theirs = saved(pretrained["bert"])
    found, told, _ = begun(paired(text, pretrained, init.format(**pretrained), decoder="bert", share=share))
    own = {path.removeprefix("decoder/"): leaf for path, leaf in found.items() if path.startswith("decoder/") and "cross_attention" not in path}
    assert set(own) == set(theirs) and "mlm_head/bias" in own
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert told.startswith(begins) and "initialised afresh" in told and "decoder/encoder/layers/cross_attention" in told
    assert share == ("encoder/token_embed/embedding" not in found)
    if not share:
        assert np.array_equal(found["encoder/token_embed/embedding"], theirs["token_embed/embedding"]) == (init == "{bert}")


def test_a_recipe_without_a_model_gets_both_sides(text, pretrained):
    """Of two specs it becomes an encoder-decoder of their models, with the first one's tokenizer, and starts from both."""
    cfg = recipe(config.ModelOfInit(), span_corruption.Config(input_length=48), text, init=f"{pretrained['bert']}+{pretrained['gpt']}")
    adopt.adopt(cfg)
    model = registry.resolve(cfg).model
    assert model.parts == {"encoder": bert.BertConfig(**SMALL), "decoder": gpt.Config(**SMALL)} and model.vocab_size is None
    assert begun(cfg)[1].startswith("The encoder: parameters of step 1 from ckpt:")


def test_a_warm_run_trains_and_goes_on_elsewhere(text, pretrained, tmp_path):
    """Trained, saved, and the start of another run: then whole, cross-attention too."""
    cfg = paired(text, pretrained, f"{pretrained['bert']}+{pretrained['gpt']}")
    assert runs.run(cfg, tmp_path / "run") == 0
    found, told, _ = begun(paired(text, pretrained, f"ckpt:{tmp_path / 'run'}"))
    for path, leaf in saved(f"ckpt:{tmp_path / 'run'}").items():
        np.testing.assert_array_equal(found[path], leaf)
    assert told == f"Parameters of step 1 from ckpt:{tmp_path / 'run'}."
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["parts"]["decoder"]["name"] == "gpt" and registry.resolve(stored) == registry.resolve(cfg)


def test_what_cannot_start_is_refused(text, pretrained, tmp_path):
    both = f"{pretrained['bert']}+{pretrained['gpt']}"
    with pytest.raises(ConfigError, match=r"of which the encoder is to be made: checkpoint .* does not fit(.|\n)*shape +position_embed/embedding"):
        begun(paired(text, pretrained, both, max_length=64))
    with pytest.raises(ConfigError, match="of which the decoder is to be made: .* holds a model bert, but the run's is gpt"):
        begun(paired(text, pretrained, f"{pretrained['bert']}+{pretrained['hf']}"))
    other = paired(text, pretrained, both)
    config.override(other, "tokenizer.path", "None", registry.REGISTRIES)
    config.override(other, "tokenizer.sentinels", "9", registry.REGISTRIES)
    with pytest.raises(ConfigError, match="of which the encoder is to be made: .* was made with another tokenizer"):
        begun(other)
    with pytest.raises(ConfigError, match=r"names 2 models, but a model encoder_decoder without model.share has two sides"):
        registry.resolve(paired(text, pretrained, both, decoder="bert", share=True))
    with pytest.raises(ConfigError, match="names 2 models, .* this is gpt"):
        registry.resolve(recipe(gpt.Config(**SMALL), causal.Config(), text, init=both))
    with pytest.raises(ConfigError, match="there is no folder"):
        train.train(paired(text, pretrained, f"{pretrained['bert']}+ckpt:{tmp_path / 'none'}"), workdir=tmp_path / "run", devices=jax.devices()[:1])

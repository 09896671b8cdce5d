"""Conversion from and to the reference library without it: numbers that it gave, both directions, and what is refused."""

import dataclasses
import importlib.util
import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import zoo
from safetensors.numpy import load_file, save_file

import ptm
from ptm import cli, config, convert, hf, specs, text, tree, weights
from ptm import run as run_lib
from ptm.fields import ConfigError
from ptm.hf import check, files, tables, transfer, vocabulary
from ptm.models import bert, gpt
from ptm.objectives import causal, mlm
from ptm.text import export
from ptm.text.library import FileTokenizer

GOLDEN = Path(__file__).parent / "data" / "hf"
GOLDENS = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer of 263 pieces, which needs no text to train on."""
    folder = tmp_path_factory.mktemp("bytes")
    text.make("bytes").save(str(folder))
    return folder


def changed(golden: str, folder: Path, *, config=None, tensors=None, without=(), rename=None) -> Path:
    """A copy of a golden directory with keys of its config and tensors changed, added, taken away or called otherwise."""
    shutil.copytree(GOLDEN / golden, folder)
    content = json.loads((folder / files.CONFIG).read_text()) | (config or {})
    (folder / files.CONFIG).write_text(json.dumps(content))
    stored = {name: value for name, value in load_file(folder / files.WEIGHTS).items() if name not in without} | (tensors or {})
    save_file({(rename or str)(name): np.ascontiguousarray(value) for name, value in stored.items()}, folder / files.WEIGHTS)
    return folder


def same(actual, expected) -> None:
    ours, theirs = tree.paths(actual), tree.paths(expected)
    assert list(ours) == list(theirs)
    for path in theirs:
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(theirs[path]), err_msg=path)


# --- numbers of the reference -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name):
    """Logits and hidden states that the reference gave for these parameters (written by tests/test_parity.py)."""
    imported = hf.read(GOLDEN / name)
    batch, lengths = check.inputs(imported.config)
    expected = dict(np.load(GOLDEN / name / "outputs.npz"))
    actual = check.ours(transfer.model(imported.config, imported.heads), imported.params, batch)
    assert len(expected) > 3 and set(expected) <= set(actual)
    assert not [difference for difference in check.differences(actual, expected, lengths) if difference.exceeds]


@pytest.mark.parametrize("name", GOLDENS)
def test_back_to_the_same_bits(name, tmp_path):
    imported = hf.read(GOLDEN / name)
    exported = transfer.write(imported.family, imported.config, imported.heads, imported.params)
    files.write(tmp_path, exported.config, exported.tensors, dtype="bfloat16")
    before, after = load_file(GOLDEN / name / files.WEIGHTS), load_file(tmp_path / files.WEIGHTS)
    assert set(before) == set(after)
    for tensor in before:
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
    again = hf.read(tmp_path)
    assert again.heads == imported.heads
    theirs = [transfer.write_config(which.family, which.config, which.heads) for which in (imported, again)]
    assert theirs[0] == theirs[1]


def test_a_table_by_eye():
    """GPT-2's first matrix: query, key and value lie side by side, each by heads."""
    imported = hf.read(GOLDEN / "gpt2")
    fused = load_file(GOLDEN / "gpt2" / files.WEIGHTS)["transformer.h.1.attn.c_attn.weight"].astype(np.float32)
    kernel_DHK = imported.params["decoder"]["layers"]["attention"]["key"]["kernel"][1]
    assert imported.config.num_heads == 3 and kernel_DHK.shape == (24, 3, 8)
    np.testing.assert_array_equal(kernel_DHK[5, 2], fused[5, 24 + 16 : 24 + 24])


@pytest.mark.parametrize("family", ["gpt", "bert", "t5", "t5_1.1"])
def test_there_and_back(family, tmp_path):
    """Ours to theirs to ours, for parameters of our own."""
    params = zoo.params(family)
    heads = zoo.objective(zoo.HOME[family], family).heads
    exported = transfer.write(hf.family_of(zoo.CONFIGS[family]), zoo.CONFIGS[family], heads, params)
    files.write(tmp_path, exported.config, exported.tensors)
    imported = hf.read(tmp_path)
    assert imported.heads == heads and exported.notes == imported.notes == []
    same(imported.params, params)


TRANSFORMS = {
    "same": (tables.same, [(4, 3)]),
    "flat": (tables.flat, [(4, 3)]),
    "linear": (tables.linear(), [(6, 2, 3)]),
    "linear of two inputs": (tables.linear(2), [(2, 3, 6)]),
    "conv": (tables.conv(), [(6, 2, 3)]),
    "permuted": (tables.permuted(1, 2, 0), [(2, 3, 4)]),
    "reshaped": (tables.reshaped(6, 1, 2), [(3, 4)]),
    "fused": (tables.fused(tables.linear(), axis=0), [(6, 4, 2), (6, 1, 2), (6, 3, 2)]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_invertible(name):
    transform, shapes = TRANSFORMS[name]
    rng = np.random.default_rng(0)
    ours = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    theirs = transform.write(ours)
    for leaf, back in zip(ours, transform.read(theirs, shapes), strict=True):
        np.testing.assert_array_equal(back, leaf)
    np.testing.assert_array_equal(transform.write(transform.read(theirs, shapes)), theirs)


# --- directories ------------------------------------------------------------------------------------------------------------------------


def test_forms_of_a_directory(tmp_path):
    """Prefixes, old names, buffers and copies make no difference; half precision is read exactly."""
    params = hf.read(GOLDEN / "gpt2").params
    table = load_file(GOLDEN / "gpt2" / files.WEIGHTS)["transformer.wte.weight"]
    mask = np.tril(np.ones((1, 1, 16, 16), np.float32))
    extra = {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": np.float32(-1e4).reshape(1), "lm_head.weight": table}
    for name, folder in {
        "with buffers": changed("gpt2", tmp_path / "buffers", tensors=extra),
        "without a prefix": changed("gpt2", tmp_path / "bare", tensors=extra, rename=lambda name: name.removeprefix("transformer.")),
        "without architectures": changed("gpt2", tmp_path / "unnamed", config={"architectures": None, "auto_map": {"AutoModel": "evil.Model"}}),
    }.items():
        imported = hf.read(folder)
        assert imported.heads == ("lm",), name
        assert ("auto_map" in " ".join(imported.notes)) == (name == "without architectures")
        same(imported.params, params)

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    positions = {"bert.embeddings.position_ids": np.arange(16)[None], "cls.predictions.decoder.bias": load_file(GOLDEN / "bert" / files.WEIGHTS)["cls.predictions.bias"]}
    imported = hf.read(changed("bert", tmp_path / "old", tensors=positions, rename=old))
    same(imported.params, hf.read(GOLDEN / "bert").params)
    assert imported.heads == ("mlm", "pooled", "pair")


@pytest.mark.parametrize("dtype", files.DTYPES)
def test_types_and_shards(dtype, tmp_path):
    imported = hf.read(GOLDEN / "bert")
    exported = transfer.write(imported.family, imported.config, imported.heads, imported.params)
    files.write(tmp_path, exported.config, exported.tensors, dtype=dtype, shard_bytes=10_000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all(path.stat().st_size < 14_000 for path in tmp_path.glob("*.safetensors"))
    again = tree.paths(hf.read(tmp_path).params)
    for path, leaf in tree.paths(imported.params).items():
        assert again[path].dtype == np.float32
        np.testing.assert_array_equal(again[path], leaf.astype(files.DTYPES[dtype]).astype(np.float32))


def test_one_error_lists_everything(tmp_path):
    stored = load_file(GOLDEN / "bert_types" / files.WEIGHTS)
    word = stored["bert.embeddings.word_embeddings.weight"]
    folder = changed(
        "bert_types", tmp_path / "bad", without=("bert.encoder.layer.1.output.dense.bias",),
        tensors={
            "bert.encoder.layer.0.output.dense.weight": stored["bert.encoder.layer.0.output.dense.weight"][:, :-1],
            "bert.encoder.layer.0.output.dense.bias": np.zeros(24, np.int32),
            "bert.encoder.layer.2.output.dense.bias": np.zeros(24, np.float32),
            "cls.predictions.decoder.weight": word + np.float32(1).astype(word.dtype),
            "bert.embeddings.position_ids": np.arange(16)[None] + 1,
        },
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        hf.read(folder)
    for expected in (
        "missing    bert.encoder.layer.1.output.dense.bias (24,)",
        "shape      bert.encoder.layer.0.output.dense.weight expected (24, 40), got (24, 39)",
        "dtype      bert.encoder.layer.0.output.dense.bias is I32",
        "left over  bert.encoder.layer.2.output.dense.bias (24,)",
        "left over  cls.predictions.decoder.weight (53, 24) is not a copy of *.embeddings.word_embeddings.weight",
        "left over  bert.embeddings.position_ids (1, 16) is not 0, 1, 2, ...",
    ):
        assert expected in str(error.value), str(error.value)
    options = {"position_embedding_type": "relative_key", "hidden_act": "gelu_10", "is_decoder": True, "quantization_config": {"bits": 4}}
    with pytest.raises(ConfigError) as error:
        hf.read(changed("bert", tmp_path / "options", config=options | {"torchscript": True, "a_new_key": 1}))
    for key, value in options.items():
        assert f"{key}={value!r}" in str(error.value)
    assert "torchscript" not in str(error.value) and "a_new_key" not in str(error.value)


def _pooled(folder: Path, pooling: str) -> Path:
    """ModernBERT with a head for classification of two labels."""
    tensors = {"classifier.weight": np.ones((2, 24), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    config = {"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": pooling}
    return changed("modernbert", folder, config=config, tensors=tensors, without=("decoder.bias",))


REFUSED = {
    "unknown family": (lambda folder: changed("gpt2", folder, config={"model_type": "gptt2"}), "Did you mean 'gpt2'"),
    "no family": (lambda folder: changed("gpt2", folder, config={"model_type": None}), "unknown model_type .*None"),
    "a list for a number": (lambda folder: changed("gpt2", folder, config={"n_embd": [24]}), "model.width"),
    "a width that heads do not divide": (lambda folder: changed("gpt2", folder, config={"n_head": 5}), "num_heads=5"),
    "T5 that should be tied": (
        lambda folder: changed("t5_1.1", folder, config={"scale_decoder_outputs": True}), "lm_head.weight differs from shared.weight",
    ),
    "two names of a key": (lambda folder: changed("gpt2", folder, config={"num_attention_heads": 4}), "n_head=3 and num_attention_heads=4 mean the same"),
    "layers that differ": (lambda folder: changed("gpt2", folder, config={"per_layer_config": {"0": {}}}), "per_layer_config="),
    "two names of a tensor": (
        lambda folder: changed("bert", folder, tensors={"bert.embeddings.LayerNorm.gamma": np.ones(24, np.float32)}), "a tensor under two names",
    ),
    "an activation that contradicts": (lambda folder: changed("t5_1.1", folder, config={"dense_act_fn": "relu"}), "dense_act_fn='relu' contradict"),
    "a gate that contradicts": (lambda folder: changed("t5", folder, config={"is_gated_act": True}), "is_gated_act=True contradict"),
    "stretched by nothing": (lambda folder: changed("llama", folder, config={"rope_parameters": {"rope_type": "linear"}}), "rope_type linear lacks factor"),
    "a stretch that is newer": (lambda folder: changed("llama", folder, config={"rope_scaling": {"type": "yarn", "factor": 2.0}}), "rope_type='yarn'"),
    "a part of a head turns": (lambda folder: changed("llama", folder, config={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    "positions by kind of layer": (
        lambda folder: changed("llama", folder, config={"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}), "full_attention of rope_parameters",
    ),
    "positions of all layers": (lambda folder: changed("modernbert", folder, config={"rope_parameters": {"rope_theta": 5.0}}), "has rope_theta"),
    "too few kinds of layers": (
        lambda folder: changed("qwen3", folder, config={"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]}),
        "names 1 layers",
    ),
    "a word for a table": (lambda folder: changed("llama", folder, config={"rope_parameters": "default"}), "has another form"),
    "a mean for the first": (lambda folder: _pooled(folder, "mean"), "classifier_pooling='mean' is not supported"),
    "an activation in a list": (lambda folder: changed("gpt2", folder, config={"activation_function": ["relu"]}), "activation_function="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_configs(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        hf.read(make(tmp_path / "x"))


def test_other_spellings(tmp_path):
    """Names that the reference takes too, and a scaling that counts before the parameters; what is averaged matters to classification alone."""
    spelled = changed("gpt2", tmp_path / "gpt2", config={"num_attention_heads": 3})
    content = json.loads((spelled / files.CONFIG).read_text())
    content.pop("n_head")
    (spelled / files.CONFIG).write_text(json.dumps(content))
    assert hf.read(spelled).config == hf.read(GOLDEN / "gpt2").config
    older = changed("llama", tmp_path / "llama", config={"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 7.0})
    assert (hf.read(older).config.rotary_factor, hf.read(older).config.rotary_theta) == (3.0, 7.0)
    assert hf.read(_pooled(tmp_path / "first", "cls")).heads == ("classify:2",)
    assert hf.read(changed("modernbert", tmp_path / "mean", config={"classifier_pooling": "mean"})).heads == ("mlm",)


def test_dropout_is_written_everywhere():
    """The reference would take its own default for what is left out."""
    for golden, keys in {"gpt2": ("resid_pdrop", "embd_pdrop"), "modernbert": ("mlp_dropout", "embedding_dropout", "classifier_dropout")}.items():
        imported = hf.read(GOLDEN / golden)
        config = dataclasses.replace(imported.config, dropout=0.25)
        written = transfer.write_config(imported.family, config, imported.heads)
        assert [written[key] for key in keys] == [0.25] * len(keys)
        assert transfer.read_config(imported.family, written)[0].dropout == 0.25


def test_refused_files(tmp_path):
    def folder(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / name))

    content = (GOLDEN / "gpt2" / files.WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little")
    lie = content[8 : 8 + header].replace(b"[16,24]", b"[17,24]", 1)
    assert lie != content[8 : 8 + header]
    damaged = {
        "truncated": content[:-10], "empty": b"", "short header": content[:20], "endless header": b"\xff" * 8 + content[8:],
        "not json": content[:8] + b"x" * header + content[8 + header :], "lying": content[:8] + lie + content[8 + header :],
    }  # fmt: skip
    for name, data in damaged.items():
        (folder(name) / files.WEIGHTS).write_bytes(data)
        with pytest.raises(ConfigError, match="damaged or no safetensors"):
            hf.read(tmp_path / name)
    for suffix in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.pt"):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        (folder("other") / files.WEIGHTS).rename(tmp_path / "other" / suffix)
        with pytest.raises(ConfigError, match=f"{suffix}; only safetensors is read.*safe_serialization=True"):
            hf.read(tmp_path / "other")
    index = folder("index")
    (index / files.WEIGHTS).rename(index / "a.safetensors")
    tensors = list(load_file(index / "a.safetensors"))
    for places, message in {
        "../a.safetensors": "without path separators",
        "/etc/passwd": "without path separators",
        "..\\a.safetensors": "without path separators",
        "b.safetensors": "names 'b.safetensors', which is not there",
    }.items():
        files.write_json(index / files.INDEX, {"weight_map": dict.fromkeys(tensors, places)})
        with pytest.raises(ConfigError, match=message):
            hf.read(index)
    files.write_json(index / files.INDEX, {"weight_map": dict.fromkeys([*tensors[1:], "more"], "a.safetensors")})
    with pytest.raises(ConfigError, match="Not there: more.*Not in the index"):
        hf.read(index)
    files.write_json(index / files.INDEX, {"weight_map": dict.fromkeys(tensors, "a.safetensors")})
    assert hf.read(index).heads == ("lm",)
    (folder("config") / files.CONFIG).write_text("[]")
    (folder("deep") / files.CONFIG).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        hf.read(tmp_path / "deep")
    with pytest.raises(ConfigError, match="JSON object"):
        hf.read(tmp_path / "config")
    with pytest.raises(ConfigError, match="no folder .*gpt3"):
        hf.read(tmp_path / "gpt3")
    with pytest.raises(ConfigError, match="holds no config.json"):
        hf.read(GOLDEN)


def test_what_has_no_counterpart(tmp_path):
    config = zoo.CONFIGS["gpt"]
    wrong = type(config)(num_layers=1, width=8, num_heads=2, vocab_size=11, max_length=4, use_bias=False)
    with pytest.raises(ConfigError, match="model.use_bias=False has no counterpart; there is: True"):
        transfer.write(hf.family_of(wrong), wrong, ("lm",), {})
    with pytest.raises(ConfigError, match=r"shape +decoder/final_norm/bias expected \(32,\), got None"):
        transfer.write(hf.family_of(config), config, ("lm",), tree.unflatten({k: v for k, v in tree.paths(zoo.params("gpt")).items() if k != "decoder/final_norm/bias"}))
    with pytest.raises(ConfigError, match=r"left over +decoder/more"):
        transfer.write(hf.family_of(config), config, ("lm",), {**zoo.params("gpt"), "decoder": {**zoo.params("gpt")["decoder"], "more": np.zeros(1)}})


# --- the command, loading, and starting from a directory ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory, byte_tokenizer) -> Path:
    """A workdir of the golden BERT with all three heads, made by the command line, with a vocabulary that bytes fit into."""
    folder = tmp_path_factory.mktemp("converted")
    tensors = load_file(GOLDEN / "bert" / files.WEIGHTS)
    rng = np.random.default_rng(0)
    tensors |= {
        "bert.embeddings.word_embeddings.weight": rng.standard_normal((264, 24)).astype(np.float32), "cls.predictions.bias": rng.standard_normal(264).astype(np.float32),
    }  # fmt: skip
    changed("bert", folder / "bert", config={"vocab_size": 264}, tensors=tensors)
    assert cli.main(["convert", f"--from=hf:{folder}/bert", f"--to=ckpt:{folder}/run", f"--tokenizer={byte_tokenizer}"]) == 0
    return folder


def test_convert_both_ways(converted, capsys):
    before = hf.read(converted / "bert")
    assert sorted(path.name for path in converted.iterdir() if path.is_dir()) == ["bert", "run"]
    run, params = ptm.load(f"ckpt:{converted}/run")
    assert run.config.data.length == 16 and run.model.config == before.config
    same({name: params[name] for name in ("encoder", "token_embed", "mlm_head")}, {name: before.params[name] for name in ("encoder", "token_embed", "mlm_head")})
    assert cli.main(["convert", f"--from=ckpt:{converted}/run@0", f"--to=hf:{converted}/back", "--dtype=float32"]) == 0
    assert "BertForPreTraining" in capsys.readouterr().out
    after = hf.read(converted / "back")
    assert after.heads == before.heads
    same(after.params, before.params)
    config = json.loads((converted / "back" / files.CONFIG).read_text())
    assert config["architectures"] == ["BertForPreTraining"] and config["model_type"] == "bert" and config["pad_token_id"] == 0
    names = {path.name for path in (converted / "back").iterdir()}
    assert names == {files.CONFIG, files.WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for target in ("back", "run"):
        kind = "ckpt" if target == "run" else "hf"
        source = f"hf:{converted}/bert" if target == "run" else f"ckpt:{converted}/run"
        assert cli.main(["convert", f"--from={source}", f"--to={kind}:{converted}/{target}"]) == cli.USAGE
        assert "not empty" in capsys.readouterr().err


def test_what_lies_beside_a_target_stays(converted, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["convert", f"--from=ckpt:{converted}/run", f"--to=hf:{tmp_path}/out"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial", "file"}
    assert cli.main(["convert", f"--from=ckpt:{converted}/run", f"--to=hf:{tmp_path}/file/out"]) == cli.USAGE
    assert "cannot be made (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "objective", "told"),
    [
        (bert.RobertaConfig, mlm.Config(), ["id 1 for padding when it counts positions, but here that is '</s>'"]),
        (bert.BertConfig, causal.Config(), ["The run attends under the mask causal, the reference's bert under full"]),
        (bert.BertConfig, mlm.Config(), []),
        (gpt.Config, causal.Config(), []),
    ],
)
def test_what_the_reference_does_otherwise_is_told(model, objective, told, tmp_path):
    cfg = config.base(model=model(num_layers=1, width=8, num_heads=2, max_length=16), objective=objective, tokenizer=config.Tokenizer(kind="bytes"))
    cfg.data.length = 16
    notes = convert.reminders(run_lib.setup(cfg, devices=jax.devices()[:1]))
    assert len(notes) == len(told) and all(part in note for part, note in zip(told, notes))


def test_evaluate_a_converted_model(converted, capsys):
    config = json.loads((converted / "run" / "config.json").read_text())
    config["evals"]["validation"]["batches"] = 1
    (converted / "run" / "config.json").write_text(json.dumps(config))
    assert cli.main(["evaluate", f"--workdir={converted}/run"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["step"] == 0 and np.isfinite(metrics["validation/loss"])


MISTAKES = {
    "both ways to a checkpoint": (["--from=ckpt:a", "--to=ckpt:b"], "allowed: from hf:DIR"),
    "no target": (["--from=hf:a"], "needs --from=SPEC and --to=SPEC"),
    "a type for a checkpoint": (["--from=hf:a", "--to=ckpt:b", "--dtype=bfloat16"], "--dtype=bfloat16 is for"),
    "a tokenizer for a directory": (["--from=ckpt:a", "--to=hf:b", "--tokenizer=c"], "--tokenizer=c is for"),
    "a wrong type": (["--from=ckpt:RUN", "--to=hf:b", "--dtype=int8"], "allowed: float32, float16, bfloat16"),
    "no directory": (["--from=hf:nowhere", "--to=ckpt:b"], "no folder 'nowhere'"),
    "no tokenizer": (["--from=hf:GOLDEN", "--to=ckpt:b"], "holds no tokenizer"),
    "a tokenizer too large": (["--from=hf:GOLDEN", "--to=ckpt:b", "--tokenizer=BYTES"], "has 263 pieces, more than the model's 61"),
    "hub without a name": (["--from=hub:a b", "--to=ckpt:b"], "hub:ORG/NAME"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, converted, byte_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[name]
    places = {"RUN": converted / "run", "GOLDEN": GOLDEN / "gpt2", "BYTES": byte_tokenizer}
    for word, place in places.items():
        words = [item.replace(word, str(place)) for item in words]
    assert cli.main(["convert", *words]) == cli.USAGE
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_check_needs_the_reference(monkeypatch):
    imported = hf.read(GOLDEN / "gpt2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the extra parity .*pip install -e '\.\[parity\]'"):
        check.compare(imported.family, transfer.model(imported.config, imported.heads), imported.params, GOLDEN / "gpt2")


def test_check_tells_differences(converted, monkeypatch, capsys):
    def compare(*_, **__):
        return [check.Difference("state 0", 1e-6, 2e-5), check.Difference("lm", float("nan"), 2e-5)]

    monkeypatch.setattr(check, "compare", compare)
    assert cli.main(["convert", f"--from=ckpt:{converted}/run", f"--to=hf:{converted}/checked", "--check"]) == cli.FAILED
    out = capsys.readouterr().out.splitlines()
    assert [line.endswith("EXCEEDED") for line in out[:2]] == [False, True]


def test_hub(converted, monkeypatch, tmp_path):
    """What is fetched, and from where; the package is an extra."""
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(converted / "bert")

    found = importlib.util.find_spec
    fake = types.SimpleNamespace(snapshot_download=snapshot_download, errors=types.SimpleNamespace(HfHubHTTPError=OSError))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake if name == "huggingface_hub" else found(name))
    assert specs.fetch("hub:someone/bert@v1.0") == converted / "bert"
    assert asked["name"] == "someone/bert" and asked["revision"] == "v1.0"
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".h5")) or pattern == "*" for pattern in asked["allow_patterns"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ptm\[hub\]'"):
        specs.fetch("hub:someone/bert")


def start(tmp_path, spec: str, **changes):
    changes = {"init": spec, "model__width": 24, "model__num_heads": 3, "model__mlp_width": 40, "model__max_length": 16, "data__length": 16} | changes
    changes = {"model__vocab_size": 264, "model__norm_eps": 1e-12, "model__activation": "gelu"} | changes
    return runs.tiny("mlm", text=runs.corpus(tmp_path / "text.txt"), **changes)


def test_init_from_a_directory(converted, tmp_path):
    """The body and the heads that are there; a run starts from them."""
    before = hf.read(converted / "bert")
    run = run_lib.setup(start(tmp_path, f"hf:{converted}/bert"), devices=jax.devices()[:2])
    params, told = weights.start(run)
    assert "pooler" not in params and "afresh" not in told
    same(params, {name: leaves for name, leaves in before.params.items() if name in params})
    assert params["token_embed"]["embedding"].sharding == run.abstract_params["token_embed"]["embedding"].sharding
    shutil.copytree(converted / "bert", tmp_path / "body")
    stored = {name: value for name, value in load_file(converted / "bert" / files.WEIGHTS).items() if not name.startswith("cls.")}
    save_file(stored, tmp_path / "body" / files.WEIGHTS)
    for spec in (f"hf:{tmp_path}/body", f"ckpt:{converted}/run"):
        params, told = weights.start(run_lib.setup(start(tmp_path, spec), devices=jax.devices()[:1]))
        assert ("initialised afresh: mlm_head." in told) == spec.startswith("hf:"), told
        same(params["encoder"], before.params["encoder"])


def test_train_from_a_directory(converted, tmp_path, capsys):
    spec = f"hf:{converted}/bert"
    assert runs.run(start(tmp_path, spec, train__steps=1, train__microbatches=1, schedule__warmup_steps=0, log__norms=False), tmp_path / "run") == 0
    assert f"Parameters from {spec}." in capsys.readouterr().err
    assert cli.main(["convert", f"--from=ckpt:{tmp_path}/run@ema", f"--to=hf:{tmp_path}/ema"]) == 0
    averages = {path.removeprefix("ema/"): leaf for path, leaf in runs.leaves(tmp_path / "run", 1).items() if path.startswith("ema/")}
    exported = hf.read(tmp_path / "ema")
    assert exported.heads == ("mlm",)
    same(exported.params, tree.unflatten(averages))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__activation": "relu"}, "--config.model.activation=gelu"),
        ({"model__num_heads": 4}, "--config.model.num_heads=3"),
        ({"model__vocab_size": 300}, "--config.model.vocab_size=264"),
        ({"model__max_length": 20}, "--config.model.max_length=16"),
    ],
)
def test_init_of_another_function(converted, tmp_path, changes, message):
    run = run_lib.setup(start(tmp_path, f"hf:{converted}/bert", **changes), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=message):
        weights.start(run)


def test_init_with_another_tokenizer(converted, tmp_path):
    """Ids that stand for other text are refused; a directory without a tokenizer cannot be compared."""
    shutil.copytree(converted / "bert", tmp_path / "bert")
    text.make("bytes").save(str(tmp_path / "bert"))
    params, _ = weights.start(run_lib.setup(start(tmp_path, f"hf:{tmp_path}/bert"), devices=jax.devices()[:1]))
    same(params["encoder"], hf.read(tmp_path / "bert").params["encoder"])
    words = text.make("wordpiece", texts=LINES, vocab_size=110, lowercase=True)
    words.save(str(tmp_path / "words"))
    run = run_lib.setup(start(tmp_path, f"hf:{tmp_path}/bert", tokenizer__kind="wordpiece", tokenizer__path=tmp_path / "words"), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=f"(?s)has another tokenizer than this run.*--config.tokenizer.kind=bytes --config.tokenizer.path={tmp_path}/bert"):
        weights.start(run)
    assert weights.check_pieces("hf:x", converted / "bert", words) is None
    words.save(str(tmp_path / "grown"))
    assert weights.check_pieces("hf:x", tmp_path / "grown", words.extended(["quick brown"])) is None


def test_init_of_another_family(converted, tmp_path):
    run = run_lib.setup(runs.tiny("concat", text=runs.corpus(tmp_path / "text.txt"), init=f"hf:{converted}/bert"), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="holds a model bert, but the run's is gpt"):
        weights.start(run)
    with pytest.raises(ConfigError, match="no folder"):
        runs.run(runs.tiny("concat", text=tmp_path / "text.txt", init="hf:nowhere"), tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- tokenizers ---------------------------------------------------------------------------------------------------------------------------


LINES = ["The quick brown fox jumps over the lazy dog.", "  it doesn't, (or does it) 3.14!", "Größe naïve", "every small model must learn"] * 20


@pytest.mark.parametrize(
    "options",
    [{"kind": "bytes"}, {"kind": "bytes", "sentinels": 5}, {"kind": "chars", "specials": True}, {"kind": "sentencepiece", "vocab_size": 310, "sentinels": 4}],
)
def test_tokenizers_made_here(options, tmp_path):
    """What the reference has in another form only is written as tokenizer.json, with the same ids."""
    tokenizer = text.make(texts=LINES, **options)
    assert vocabulary.write(tokenizer, tmp_path, classes={"sentencepiece": "T5Tokenizer"}, max_length=32) == []
    assert vocabulary.find(tmp_path)["kind"] == "file"
    read = text.make(**vocabulary.find(tmp_path))
    assert isinstance(read, FileTokenizer) and read.vocab_size == tokenizer.vocab_size
    assert (read.pad_id, read.eos_id, read.mask_id, read.sentinels) == (tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.sentinels)
    for line in {*LINES, "unseen: 中"}:
        np.testing.assert_array_equal(read.encode(line), tokenizer.encode(line))
    settings = files.read_json(tmp_path / vocabulary.SETTINGS)
    assert settings["tokenizer_class"] == vocabulary.ANY and settings["model_max_length"] == 32 and settings["pad_token"] == "<pad>"


def test_a_tokenizer_without_counterpart(tmp_path):
    tokenizer = text.make("sentencepiece", texts=LINES, vocab_size=310, algorithm="bpe")
    assert export.library_files(tokenizer) is None
    assert "left out" in vocabulary.write(tokenizer, tmp_path, classes={}, max_length=None)[0] and not list(tmp_path.iterdir())


def test_published_kinds(tmp_path):
    """Files of published kinds go there and back; the class that is named decides how they are read."""
    for kind, options in {"wordpiece": {"lowercase": True, "vocab_size": 110}, "bpe": {"vocab_size": 300}}.items():
        tokenizer = text.make(kind, texts=LINES, **options)
        folder = tmp_path / kind
        folder.mkdir()
        assert vocabulary.write(tokenizer, folder, classes={}, max_length=None) == []
        found = vocabulary.find(folder)
        assert found["kind"] == kind and found["lowercase"] == tokenizer.lowercase
        for line in LINES[:4]:
            np.testing.assert_array_equal(text.make(**found).encode(line), tokenizer.encode(line))
    settings = files.read_json(tmp_path / "wordpiece" / vocabulary.SETTINGS)
    assert settings["tokenizer_class"] == "BertTokenizer" and settings["do_lower_case"] is True and settings["mask_token"] == "[MASK]"
    files.write_json(tmp_path / "wordpiece" / vocabulary.SETTINGS, settings | {"strip_accents": False})
    with pytest.raises(ConfigError, match="strip_accents"):
        vocabulary.find(tmp_path / "wordpiece")
    shutil.copy(Path(_library_json(tmp_path)), tmp_path / "wordpiece" / vocabulary.LIBRARY)
    assert vocabulary.find(tmp_path / "wordpiece")["kind"] == "file"
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        vocabulary.find(GOLDEN / "gpt2")


def _library_json(tmp_path: Path) -> Path:
    (tmp_path / vocabulary.LIBRARY).write_bytes(export.library_files(text.make("bytes"))[vocabulary.LIBRARY])
    return tmp_path / vocabulary.LIBRARY


def test_published_t5(tmp_path):
    """A sentencepiece model that puts a space before the text is written as it is, with the number of its sentinels."""
    import sentencepiece

    with open(tmp_path / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2
        )
    tokenizer = text.make("sentencepiece", path=str(tmp_path), sentinels=7)
    (tmp_path / "out").mkdir()
    assert vocabulary.write(tokenizer, tmp_path / "out", classes={"sentencepiece": "T5Tokenizer"}, max_length=None) == []
    assert files.read_json(tmp_path / "out" / vocabulary.SETTINGS)["extra_ids"] == 7
    found = vocabulary.find(tmp_path / "out")
    assert found["kind"] == "sentencepiece" and found["sentinels"] == 7
    assert text.make(**found).fingerprint == tokenizer.fingerprint

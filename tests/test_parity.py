"""Our models against the reference library's: the same parameters must give the same numbers, in both directions.

Needs torch and transformers (`pip install -e .[parity]`; pytest -m parity). To add a family, add its cases. `python tests/test_parity.py
[NAMES]` writes what tests/test_hf.py holds our models to where the reference is not installed.
"""

import dataclasses
import functools
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import hf, text, tree
from ptm.hf import check, files, tables, transfer, vocabulary
from ptm.nn.heads import split_head

GOLDEN = Path(__file__).parent / "data" / "hf"
UNTIED = "so we will NOT tie them"  # of T5 1.1 the reference always says this, of its own saved models too


def untie(model: Any) -> None:
    """T5 1.1 as it was published: the reference makes its head a second name of the table."""
    import torch

    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * model.config.d_model**-0.5)


def same_bias(model: Any) -> None:
    """An untied BERT or RoBERTa has two biases, of which it uses one."""
    head = model.cls.predictions if hasattr(model, "cls") else model.lm_head
    head.bias.data.copy_(head.decoder.bias.data)


def unpooled(model: Any) -> None:
    """An encoder-decoder has a pooler that nothing reads; ours has none, and writes zeros."""
    for parameter in model.encoder.pooler.parameters():
        parameter.zero_()


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of the reference, the name and the options of its config, and what we find in a directory of it.

    `scale` multiplies the initial parameters, `prepare` changes the random model. `golden` cases are kept for tests without the reference.
    `warns` is what the reference says on loading.
    """

    model: str
    config: str
    options: dict[str, Any]
    model_type: str
    heads: tuple[str, ...]
    scale: float = 3.0
    prepare: Callable[[Any], None] = lambda model: None
    golden: bool = False
    warns: str | None = None
    written: str | None = None  # the class that we write, where it is another with the same tensors


GPT2 = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
BERT = {
    "vocab_size": 61, "max_position_embeddings": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
}  # fmt: skip
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}
T5 |= {"relative_attention_max_distance": 12}
ALBERT = BERT | {"embedding_size": 8, "num_hidden_layers": 3}
ELECTRA = BERT | {"embedding_size": 8}
XLNET = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 40}
ROBERTA = BERT | {"max_position_embeddings": 18, "type_vocab_size": 1}
MODERNBERT = BERT | {
    "num_hidden_layers": 5, "local_attention": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
LLAMA = BERT | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0
}  # fmt: skip


def sides(encoder: str, decoder: str) -> dict[str, Any]:
    """The options of an encoder-decoder of two model types."""
    known = {"bert": BERT | {"pad_token_id": None}, "roberta": ROBERTA, "gpt2": GPT2}
    parts = {"encoder": {**known[encoder], "model_type": encoder}, "decoder": {**known[decoder], "model_type": decoder, "is_decoder": True, "add_cross_attention": True}}
    return {**parts, "decoder_start_token_id": 0, "pad_token_id": 0}


CASES = {
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT2, "gpt2", ("lm",), golden=True),
    "gpt2_by_layer": Case(
        "GPT2LMHeadModel", "GPT2Config", GPT2 | {"n_inner": 20, "scale_attn_by_inverse_layer_idx": True}, "gpt2", ("lm",), golden=True
    ),
    "gpt2_untied": Case(
        "GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "scale_attn_weights": False}, "gpt2", ("lm",)
    ),
    "gpt2_classify": Case("GPT2ForSequenceClassification", "GPT2Config", GPT2 | {"num_labels": 3}, "gpt2", ("classify:3",)),
    "gpt2_tag": Case("GPT2ForTokenClassification", "GPT2Config", GPT2 | {"num_labels": 5}, "gpt2", ("tag:5",)),
    "gpt2_qa": Case("GPT2ForQuestionAnswering", "GPT2Config", GPT2, "gpt2", ("qa",)),
    "gpt2_body": Case("GPT2Model", "GPT2Config", GPT2, "gpt2", ()),
    "gpt": Case("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2, "openai-gpt", ("lm",), golden=True),
    "gpt_classify": Case("OpenAIGPTForSequenceClassification", "OpenAIGPTConfig", GPT2 | {"afn": "silu", "num_labels": 3}, "openai-gpt", ("classify:3",)),
    "bert": Case("BertForPreTraining", "BertConfig", BERT, "bert", ("mlm", "pooled", "pair"), golden=True),
    "bert_mlm": Case("BertForMaskedLM", "BertConfig", BERT, "bert", ("mlm",)),
    "bert_types": Case("BertForMaskedLM", "BertConfig", BERT | {"type_vocab_size": 3, "hidden_act": "relu", "vocab_size": 53}, "bert", ("mlm",), golden=True),
    "bert_untied": Case("BertForMaskedLM", "BertConfig", BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}, "bert", ("mlm",), prepare=same_bias),
    "bert_next": Case("BertForNextSentencePrediction", "BertConfig", BERT, "bert", ("pooled", "pair")),
    "bert_classify": Case("BertForSequenceClassification", "BertConfig", BERT | {"num_labels": 3}, "bert", ("pooled", "classify:3")),
    "bert_tag": Case("BertForTokenClassification", "BertConfig", BERT | {"num_labels": 5}, "bert", ("tag:5",)),
    "bert_qa": Case("BertForQuestionAnswering", "BertConfig", BERT, "bert", ("qa",)),
    "bert_body": Case("BertModel", "BertConfig", BERT, "bert", ("pooled",)),
    "albert": Case("AlbertForPreTraining", "AlbertConfig", ALBERT, "albert", ("mlm", "pooled", "pair"), golden=True),
    "albert_groups": Case(
        "AlbertForMaskedLM", "AlbertConfig",
        ALBERT | {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "hidden_act": "relu", "type_vocab_size": 3}, "albert", ("mlm",), golden=True,
    ),
    "albert_square": Case("AlbertForMaskedLM", "AlbertConfig", ALBERT | {"num_hidden_groups": 3, "embedding_size": 24}, "albert", ("mlm",)),
    "albert_classify": Case("AlbertForSequenceClassification", "AlbertConfig", ALBERT | {"num_labels": 3}, "albert", ("pooled", "classify:3")),
    "albert_tag": Case("AlbertForTokenClassification", "AlbertConfig", ALBERT | {"num_labels": 5}, "albert", ("tag:5",)),
    "albert_qa": Case("AlbertForQuestionAnswering", "AlbertConfig", ALBERT, "albert", ("qa",)),
    "albert_body": Case("AlbertModel", "AlbertConfig", ALBERT, "albert", ("pooled",)),
    "electra": Case("ElectraForPreTraining", "ElectraConfig", ELECTRA, "electra", ("rtd",), golden=True),
    "electra_square": Case("ElectraForPreTraining", "ElectraConfig", ELECTRA | {"embedding_size": 24, "hidden_act": "relu"}, "electra", ("rtd",)),
    "electra_generator": Case("ElectraForMaskedLM", "ElectraConfig", ELECTRA | {"type_vocab_size": 3}, "electra", ("mlm",), golden=True),
    "electra_classify": Case("ElectraForSequenceClassification", "ElectraConfig", ELECTRA | {"num_labels": 3}, "electra", ("classify:3",)),
    "electra_tag": Case("ElectraForTokenClassification", "ElectraConfig", ELECTRA | {"num_labels": 5}, "electra", ("tag:5",)),
    "electra_qa": Case("ElectraForQuestionAnswering", "ElectraConfig", ELECTRA, "electra", ("qa",)),
    "electra_body": Case("ElectraModel", "ElectraConfig", ELECTRA, "electra", ()),
    "xlnet": Case("XLNetLMHeadModel", "XLNetConfig", XLNET, "xlnet", ("lm",), golden=True),
    "xlnet_uni": Case(
        "XLNetLMHeadModel", "XLNetConfig", XLNET | {"attn_type": "uni", "clamp_len": 5, "ff_activation": "relu", "n_head": 2}, "xlnet", ("lm",), golden=True
    ),
    "xlnet_untied": Case(
        "XLNetLMHeadModel", "XLNetConfig", XLNET | {"tie_word_embeddings": False, "clamp_len": 3, "ff_activation": "gelu_new"}, "xlnet", ("lm",)
    ),
    "xlnet_classify": Case("XLNetForSequenceClassification", "XLNetConfig", XLNET | {"num_labels": 3}, "xlnet", ("classify:3",)),
    "xlnet_tag": Case("XLNetForTokenClassification", "XLNetConfig", XLNET | {"num_labels": 5}, "xlnet", ("tag:5",)),
    "xlnet_qa": Case("XLNetForQuestionAnsweringSimple", "XLNetConfig", XLNET, "xlnet", ("qa",)),
    "xlnet_body": Case("XLNetModel", "XLNetConfig", XLNET, "xlnet", ()),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", ROBERTA, "roberta", ("mlm",), golden=True),
    "roberta_untied": Case(
        "RobertaForMaskedLM", "RobertaConfig", ROBERTA | {"tie_word_embeddings": False, "hidden_act": "relu"}, "roberta", ("mlm",), prepare=same_bias
    ),
    "roberta_types": Case("RobertaModel", "RobertaConfig", ROBERTA | {"type_vocab_size": 2}, "roberta", ("pooled",)),
    "roberta_classify": Case("RobertaForSequenceClassification", "RobertaConfig", ROBERTA | {"num_labels": 3}, "roberta", ("classify:3",)),
    "roberta_tag": Case("RobertaForTokenClassification", "RobertaConfig", ROBERTA | {"num_labels": 5}, "roberta", ("tag:5",)),
    "roberta_qa": Case("RobertaForQuestionAnswering", "RobertaConfig", ROBERTA, "roberta", ("qa",)),
    "xlm_roberta": Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", ROBERTA, "xlm-roberta", ("mlm",), written="RobertaForMaskedLM"),
    "modernbert": Case("ModernBertForMaskedLM", "ModernBertConfig", MODERNBERT, "modernbert", ("mlm",), golden=True),
    "modernbert_biased": Case(
        "ModernBertForMaskedLM", "ModernBertConfig",
        MODERNBERT | {
            "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "tie_word_embeddings": False,
            "global_attn_every_n_layers": 2, "hidden_activation": "gelu_pytorch_tanh",
        }, "modernbert", ("mlm",),
    ),
    "modernbert_classify": Case("ModernBertForSequenceClassification", "ModernBertConfig", MODERNBERT | {"num_labels": 3}, "modernbert", ("classify:3",)),
    "modernbert_tag": Case("ModernBertForTokenClassification", "ModernBertConfig", MODERNBERT | {"num_labels": 5}, "modernbert", ("tag:5",)),
    "modernbert_qa": Case("ModernBertForQuestionAnswering", "ModernBertConfig", MODERNBERT, "modernbert", ("qa",)),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", LLAMA, "llama", ("lm",), golden=True),
    "llama_biased": Case("LlamaForCausalLM", "LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}, "llama", ("lm",)),
    "llama_stretched": Case("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LLAMA3}, "llama", ("lm",)),
    "llama_linear": Case(
        "LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}, "llama", ("lm",)
    ),
    "llama_classify": Case("LlamaForSequenceClassification", "LlamaConfig", LLAMA | {"num_labels": 3}, "llama", ("classify:3",)),
    "llama_tag": Case("LlamaForTokenClassification", "LlamaConfig", LLAMA | {"num_labels": 5}, "llama", ("tag:5",)),
    "llama_qa": Case("LlamaForQuestionAnswering", "LlamaConfig", LLAMA, "llama", ("qa",)),
    "mistral": Case("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 4}, "mistral", ("lm",)),
    "qwen2": Case(
        "Qwen2ForCausalLM", "Qwen2Config",
        LLAMA | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True}, "qwen2", ("lm",),
    ),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}, "qwen3", ("lm",), golden=True),
    "qwen3_biased": Case("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}, "qwen3", ("lm",)),
    "t5": Case("T5ForConditionalGeneration", "T5Config", T5, "t5", ("lm",), scale=1.5, golden=True),
    "t5_1.1": Case(
        "T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "t5", ("lm",), scale=1.5,
        prepare=untie, golden=True, warns=UNTIED,
    ),
    "t5_odd": Case(
        "T5ForConditionalGeneration", "T5Config", T5 | {"d_kv": 5, "num_decoder_layers": 3, "feed_forward_proj": "gated-silu"}, "t5", ("lm",), scale=1.5
    ),
    "t5_classify": Case("T5ForSequenceClassification", "T5Config", T5 | {"num_labels": 3}, "t5", ("classify:3",), scale=1.5),
    "t5_qa": Case("T5ForQuestionAnswering", "T5Config", T5, "t5", ("qa",), scale=1.5),
    "bert2bert": Case("EncoderDecoderModel", "EncoderDecoderConfig", sides("bert", "bert"), "encoder-decoder", ("lm",), prepare=unpooled, golden=True),
    "roberta2gpt": Case("EncoderDecoderModel", "EncoderDecoderConfig", sides("roberta", "gpt2"), "encoder-decoder", ("lm",), prepare=unpooled),
    "bert2roberta": Case("EncoderDecoderModel", "EncoderDecoderConfig", sides("bert", "roberta"), "encoder-decoder", ("lm",), prepare=unpooled),
    "mt5": Case("MT5ForConditionalGeneration", "MT5Config", T5, "mt5", ("lm",), scale=1.5, prepare=untie, warns=UNTIED, written="T5ForConditionalGeneration"),
}  # fmt: skip


def reference(case: Case) -> Any:
    """A model of the reference whose every parameter is random: matrices as they begin times `scale`, biases and norms around where they begin."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(case.scale if parameter.ndim > 1 else 1.0).add_(0.1 * torch.randn_like(parameter) * (1.0 if parameter.ndim == 1 else 0.3))
        case.prepare(model)
    return model


def architecture_of(case: Case) -> tables.Architecture:
    return transfer.architecture_for(hf.FAMILIES[case.model_type], case.heads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (model of the reference, its directory, what we read of that)"""
    pytest.importorskip("torch", reason="needs the extra parity")
    pytest.importorskip("transformers", reason="needs the extra parity")

    @functools.cache
    def make(name: str) -> tuple[Any, Path, hf.Imported]:
        folder, model = tmp_path_factory.mktemp("hf") / name, reference(CASES[name])
        model.save_pretrained(folder)
        return model, folder, hf.read(folder)

    return make


pytestmark = pytest.mark.parity
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_same_numbers(saved, name):
    """Logits of all heads and every hidden state at real positions of padded rows."""
    case, (model, _, imported) = CASES[name], saved(name)
    assert imported.heads == case.heads and imported.family.model_type == case.model_type
    batch, lengths = check.inputs(imported.config, seed=1)
    assert len(set(lengths)) > 2
    expected = check.theirs(model, architecture_of(case), imported.config, batch)
    actual = check.ours(transfer.model(imported.config, imported.heads), imported.params, batch)
    assert set(expected) <= set(actual)
    assert {split_head(head)[0] for head in case.heads} - {"pooled"} <= set(expected)
    wrong = [difference for difference in check.differences(actual, expected, lengths) if difference.exceeds]
    assert not wrong
    assert max(np.std(value) for value in expected.values()) > 0.3, "the comparison needs numbers of some size"


@each_case
def test_same_gradients(saved, name, tmp_path):
    """The gradient of one scalar of all outputs; the reference's comes to us as a directory of tensors, through the same table."""
    import torch
    from safetensors.numpy import load_file, save_file

    case, (model, folder, imported) = CASES[name], saved(name)
    batch, lengths = check.inputs(imported.config, seed=2)
    architecture, ours = architecture_of(case), transfer.model(imported.config, imported.heads)
    rng = np.random.default_rng(0)
    shapes = {key: value.shape for key, value in check.theirs(model, architecture, imported.config, batch).items()}
    factors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    for key, value in factors.items():
        if key not in check.OF_ROWS:
            value[np.arange(value.shape[1]) >= lengths[:, None]] = 0  # positions of padding have other numbers

    gradient = jax.jit(jax.grad(lambda params: sum(jnp.sum(value * factors[key]) for key, value in check.outputs(ours, params, batch).items() if key in factors)))
    model.zero_grad()
    total = sum((value * torch.from_numpy(factors[key])).sum() for key, value in check.reference_outputs(model, architecture, imported.config, batch).items())
    total.backward()
    names = load_file(folder / files.WEIGHTS)
    gradients = {key: value.grad.numpy() for key, value in model.named_parameters(remove_duplicate=False) if key in names and value.grad is not None}
    gradients |= {key: np.zeros_like(value) for key, value in names.items() if key not in gradients}
    (tmp_path / files.CONFIG).write_text((folder / files.CONFIG).read_text())
    save_file(gradients, tmp_path / files.WEIGHTS)
    expected, actual = tree.paths(hf.read(tmp_path).params), tree.paths(gradient(imported.params))
    for rule in imported.family.rules(imported.config, imported.heads):
        for path in rule.paths:
            expected[path][list(rule.absent)] = 0  # what theirs does not have
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in expected.values()))
    errors = {path: np.linalg.norm(actual[path] - leaf) / max(np.linalg.norm(leaf), 1e-3 * whole) for path, leaf in expected.items()}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


@each_case
def test_there_and_back(saved, name, tmp_path, caplog):
    """What we write has the same bits under the same names; the reference loads it, says nothing, and computes the same."""
    import transformers

    case, (model, folder, imported) = CASES[name], saved(name)
    family = hf.family_of(imported.config)
    exported = transfer.write(family, imported.config, imported.heads, imported.params)
    assert exported.architecture.name == (case.written or case.model) and exported.notes == []
    ids = {key: value for key, value in model.config.to_dict().items() if key.endswith("_token_id")}
    files.write(tmp_path / "out", {**ids, "dtype": "float32", **exported.config}, exported.tensors)
    before, after = files.read(folder), files.read(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    for tensor in before.tensors:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        again, info = getattr(transformers, exported.architecture.name).from_pretrained(tmp_path / "out", output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    # Where the variable CI is set the reference's logger propagates, and each message comes twice.
    said = list(dict.fromkeys(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING))
    assert [case.warns in message for message in said] == [True] if case.warns else not said, said
    batch, _ = check.inputs(imported.config)
    old, new = (check.theirs(which.eval(), architecture_of(case), imported.config, batch) for which in (model, again))
    for key in old:
        np.testing.assert_allclose(new[key], old[key], rtol=0, atol=1e-6 * max(1, np.max(np.abs(old[key]))))  # its kernels go by the alignment of memory


LOSSES = {"gpt": "causal", "bert": "mlm", "albert": "mlm", "t5": "span_corruption", "t5_1.1": "span_corruption"}


@pytest.mark.parametrize("family", LOSSES)
def test_same_training_step(family, tmp_path):
    """Loss and gradient norm of a batch of the objective: the reference is given the same tokens and labels."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    pytest.importorskip("transformers", reason="needs the extra parity")
    objective = zoo.objective(LOSSES[family], family)
    step, params = zoo.gradients(family, LOSSES[family])
    batch = {name: value[jnp.array([0, 2, 3, 5, 6, 7])] for name, value in zoo.batch(LOSSES[family], family).items()}  # rows that hold one document
    loss, gradient = step(params, batch)
    table = hf.family_of(zoo.CONFIGS[family])
    exported = transfer.write(table, zoo.CONFIGS[family], objective.heads, params)
    files.write(tmp_path / "out", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **exported.config}, exported.tensors)
    model = check.load_reference(tmp_path / "out", exported.architecture)
    given = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
    labels = torch.where(given["weights_BL"] > 0, given["targets_BL"].long(), -100)
    if "inputs_BI" in given:
        sides = {"input_ids": given["inputs_BI"].long(), "attention_mask": given["input_segments_BI"].long(), "decoder_input_ids": given["tokens_BL"].long()}
    else:
        sides = {"input_ids": given["tokens_BL"].long(), "attention_mask": given["segments_BL"].long()}
    logits = model(**sides).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    norm = np.sqrt(sum(float(parameter.grad.square().sum()) for parameter in model.parameters() if parameter.grad is not None))
    assert abs(float(loss) - expected.item()) < 1e-5 * expected.item()
    ours = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradient)))
    assert abs(ours - norm) < 1e-4 * norm


LINES = ("The quick brown fox, isn't it?", " Größe  naïve 3.14", "中文 and more", "every small model must learn to guess", "tab\tnew\nline")
TEXTS = [*LINES, *(" ".join(runs.WORDS[n:] + runs.WORDS[:n]) for n in range(len(runs.WORDS)))] * 5
TOKENIZERS = {
    "bytes": {"kind": "bytes", "sentinels": 3},
    "chars": {"kind": "chars", "specials": True},
    "wordpiece": {"kind": "wordpiece", "vocab_size": 100, "lowercase": True},
    "bpe": {"kind": "bpe", "vocab_size": 280, "sentinels": 2},
    "sentencepiece": {"kind": "sentencepiece", "vocab_size": 320, "sentinels": 4},
    "published t5": {"kind": "sentencepiece", "sentinels": 5},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_tokenizer(name, tmp_path, caplog):
    """The reference loads what we write, says nothing, and gives the same ids, for special pieces too."""
    import sentencepiece

    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    options = dict(TOKENIZERS[name])
    if name == "published t5":  # with a space before the text and T5's special pieces
        with open(tmp_path / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=66, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2
            )
        options["path"] = str(tmp_path)
    tokenizer = text.make(texts=TEXTS, **options)
    (tmp_path / "out").mkdir()
    assert vocabulary.write(tokenizer, tmp_path / "out", classes={"sentencepiece": "T5Tokenizer"}, max_length=64) == []
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(again) == tokenizer.vocab_size
    for role in vocabulary.ROLES:
        if getattr(tokenizer, f"{role}_id") is not None:
            assert getattr(again, f"{role}_token_id") == getattr(tokenizer, f"{role}_id"), role
    for n, sentinel in enumerate(tokenizer.sentinels):
        assert again.convert_tokens_to_ids(f"<extra_id_{n}>") == sentinel
    for line in LINES:
        np.testing.assert_array_equal(again(line, add_special_tokens=False)["input_ids"], tokenizer.encode(line))


def write_goldens(*names: str) -> None:
    """Directories of the golden cases (or of those named) in bfloat16, each with the reference's outputs for `check.inputs` in outputs.npz."""
    import torch

    for name in names or [name for name, case in CASES.items() if case.golden]:
        case = CASES[name]
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        model = reference(case).to(torch.bfloat16)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = hf.read(folder).config
        # Of the model as it is read back: in the one that was rounded, so were buffers that no file holds, such as rotary frequencies.
        again = check.load_reference(folder, architecture_of(case))
        outputs = check.theirs(again, architecture_of(case), config, check.inputs(config)[0])
        np.savez_compressed(folder / "outputs.npz", **{key: value.astype(np.float32) for key, value in outputs.items()})


if __name__ == "__main__":
    write_goldens(*sys.argv[1:])

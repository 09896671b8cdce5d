"""BERT (model_type bert): torch's Linear matrices are (outputs, inputs); old files call a norm's scale gamma and its bias beta."""

from typing import Any

from ptm.hf.tables import ACTIVATIONS, BODY, Architecture, Family, Fixed, Key, Rule, copy_of, dense, norm, numbers
from ptm.nn.heads import head_names

LAYER, THEIRS = "encoder/layers", BODY + "encoder.layer.{n}"


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the body and of the heads `mlm`, `pooled`, `pair`, `classify:N`, `tag:N`, `qa`."""
    found = [
        Rule("token_embed/embedding", BODY + "embeddings.word_embeddings.weight"),
        Rule("position_embed/embedding", BODY + "embeddings.position_embeddings.weight"),
        Rule("type_embed/embedding", BODY + "embeddings.token_type_embeddings.weight"),
        *norm("embed_norm", BODY + "embeddings.LayerNorm"),
        *dense(f"{LAYER}/attention/query", f"{THEIRS}.attention.self.query"),
        *dense(f"{LAYER}/attention/key", f"{THEIRS}.attention.self.key"),
        *dense(f"{LAYER}/attention/value", f"{THEIRS}.attention.self.value"),
        *dense(f"{LAYER}/attention/out", f"{THEIRS}.attention.output.dense", inputs=2),
        *norm(f"{LAYER}/attention_norm", f"{THEIRS}.attention.output.LayerNorm"),
        *dense(f"{LAYER}/mlp/wi", f"{THEIRS}.intermediate.dense"),
        *dense(f"{LAYER}/mlp/wo", f"{THEIRS}.output.dense"),
        *norm(f"{LAYER}/mlp_norm", f"{THEIRS}.output.LayerNorm"),
    ]
    kinds = head_names(heads)
    if "mlm" in kinds:
        found += dense("mlm_head/dense", "cls.predictions.transform.dense")
        found += norm("mlm_head/norm", "cls.predictions.transform.LayerNorm")
        if config.tie_embeddings:
            found += [Rule("mlm_head/bias", "cls.predictions.bias")]
        else:
            found += [Rule("mlm_head/bias", "cls.predictions.decoder.bias", copies=("cls.predictions.bias",))]
            found += dense("mlm_head/decoder", "cls.predictions.decoder", bias=False)
    if kinds & {"pooled", "pair", "classify"}:
        found += dense("pooler/dense", BODY + "pooler.dense")
    if "pair" in kinds:
        found += dense("pair_head", "cls.seq_relationship")
    if "classify" in kinds:
        found += dense("classify_head/labels", "classifier")
    if "tag" in kinds:
        found += dense("tag_head", "classifier")
    if "qa" in kinds:
        found += dense("qa_head", "qa_outputs")
    return found


BERT = Family(
    model_type="bert",
    name="bert",
    keys=(
        Key("vocab_size", "vocab_size", 30522),
        Key("max_length", "max_position_embeddings", 512),
        Key("width", "hidden_size", 768),
        Key("num_layers", "num_hidden_layers", 12),
        Key("num_heads", "num_attention_heads", 12),
        Key("mlp_width", "intermediate_size", 3072, write=lambda config: config.mlp_width or 4 * config.width),
        Key("num_types", "type_vocab_size", 2),
        Key("activation", "hidden_act", "gelu", ACTIVATIONS),
        Key("tie_embeddings", "tie_word_embeddings", True),
        Key("norm_eps", "layer_norm_eps", 1e-12),
        Key("dropout", "hidden_dropout_prob", 0.1, free=True),
        Key("attention_dropout", "attention_probs_dropout_prob", 0.1, free=True),
        Key("init_std", "initializer_range", 0.02, free=True),
        Fixed("position_embedding_type", "absolute"),
        Fixed("is_decoder", False),
        Fixed("add_cross_attention", False),
    ),
    rules=rules,
    architectures=(
        Architecture("BertForPreTraining", ("mlm", "pooled", "pair"), "bert.", {"mlm": "prediction_logits", "pair": "seq_relationship_logits"}),
        Architecture("BertForMaskedLM", ("mlm",), "bert.", {"mlm": "logits"}),
        Architecture("BertForNextSentencePrediction", ("pooled", "pair"), "bert.", {"pair": "logits"}),
        Architecture("BertForSequenceClassification", ("pooled", "classify"), "bert.", {"classify": "logits"}),
        Architecture("BertForTokenClassification", ("tag",), "bert.", {"tag": "logits"}),
        Architecture("BertForQuestionAnswering", ("qa",), "bert.", {"qa": "start_logits end_logits"}),
        Architecture("BertModel", ("pooled",), "", {"pooled": "pooler_output"}),
        Architecture("BertModel", (), "", {}),
    ),
    signs={
        "mlm": "cls.predictions.transform.dense.weight", "pooled": BODY + "pooler.dense.weight", "pair": "cls.seq_relationship.weight",
        "classify": "classifier.weight", "tag": "classifier.weight", "qa": "qa_outputs.weight",
    },
    implies={"pair": "pooled", "classify": "pooled"},
    ignored=(
        copy_of(r"cls\.predictions\.decoder\.weight", BODY + "embeddings.word_embeddings.weight"),
        copy_of(r"cls\.predictions\.decoder\.bias", "cls.predictions.bias"),
        numbers(BODY + r"embeddings\.position_ids"),
    ),
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)

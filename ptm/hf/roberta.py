"""RoBERTa and XLM-R (model_types roberta, xlm-roberta): BERT's body; positions begin after that of the padding piece, id 1."""

from typing import Any

from ptm.hf import bert
from ptm.hf.tables import BODY, Architecture, Family, Fixed, Joint, Key, Rule, copy_of, dense, norm, numbers
from ptm.models.bert import RobertaConfig
from ptm.nn.heads import head_names

OFFSET = RobertaConfig.position_offset


def rules(config: Any, heads: tuple[str, ...]) -> list[Rule]:
    """Parameters of the body and of the heads `mlm`, `pooled`, `classify:N`, `tag:N`, `qa`."""
    kinds = head_names(heads)
    found = bert.rules(config, tuple(kinds & {"pooled", "tag", "qa"}))
    if "mlm" in kinds:
        found += dense("mlm_head/dense", "lm_head.dense") + norm("mlm_head/norm", "lm_head.layer_norm")
        if config.tie_embeddings:
            found += [Rule("mlm_head/bias", "lm_head.bias")]
        else:
            found += [Rule("mlm_head/bias", "lm_head.decoder.bias", copies=("lm_head.bias",))]
            found += dense("mlm_head/decoder", "lm_head.decoder", bias=False)
    if "classify" in kinds:
        found += dense("classify_head/dense", "classifier.dense") + dense("classify_head/labels", "classifier.out_proj")
    return found


def _family(model_type: str, prefix: str) -> Family:
    return Family(
        model_type=model_type,
        name="roberta",
        keys=(
            Joint(
                lambda theirs: {"max_length": theirs.get("max_position_embeddings", 512) - OFFSET},
                lambda config: {"max_position_embeddings": config.max_length + OFFSET},
            ),
            Fixed("pad_token_id", OFFSET - 1, written=True),
            *(key for key in bert.BERT.keys if getattr(key, "theirs", "") not in ("max_position_embeddings", "vocab_size")),
            Key("vocab_size", "vocab_size", 50265),
        ),
        rules=rules,
        architectures=(
            Architecture(f"{prefix}ForMaskedLM", ("mlm",), "roberta.", {"mlm": "logits"}),
            Architecture(f"{prefix}ForSequenceClassification", ("classify",), "roberta.", {"classify": "logits"}),
            Architecture(f"{prefix}ForTokenClassification", ("tag",), "roberta.", {"tag": "logits"}),
            Architecture(f"{prefix}ForQuestionAnswering", ("qa",), "roberta.", {"qa": "start_logits end_logits"}),
            Architecture(f"{prefix}Model", ("pooled",), "", {"pooled": "pooler_output"}),
            Architecture(f"{prefix}Model", (), "", {}),
        ),
        signs={
            "mlm": "lm_head.dense.weight", "pooled": BODY + "pooler.dense.weight", "classify": "classifier.out_proj.weight", "tag": "classifier.weight",
            "qa": "qa_outputs.weight",
        },
        ignored=(
            copy_of(r"lm_head\.decoder\.weight", BODY + "embeddings.word_embeddings.weight"),
            copy_of(r"lm_head\.decoder\.bias", "lm_head.bias"),
            numbers(BODY + r"embeddings\.position_ids"),
        ),
        writes=lambda config: model_type == "roberta",
    )  # fmt: skip


ROBERTA, XLM_ROBERTA = _family("roberta", "Roberta"), _family("xlm-roberta", "XLMRoberta")

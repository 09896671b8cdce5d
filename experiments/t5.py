"""T5's comparisons (Raffel et al. 2020, section 3): architecture and objective, ways to corrupt, how much of a text, in spans of which length.

    ptm study experiments/t5.py:rate,tiny --workdir=runs/t5-rate

rate (default): table 6. 10, 15, 25 and 50 % of the tokens, chosen one by one, neighbours becoming one sentinel. Claimed: 50 % is worse, the others alike.
spans: table 7. Tokens one by one, and spans of 2, 3, 5, 10 on average. Claimed: spans of 2 to 5 are as good or better, 10 worse than 3.
architecture: table 2. Encoder-decoder, one of half the layers, and decoders of 12 layers with the causal or the prefix mask, by denoising and by (prefix) language modelling.
    Claimed: the encoder-decoder is best, the prefix LM next, the LM last; denoising is better than language modelling. The arm that shares parameters
    between encoder and decoder has no model here. The decoders are GPT's: learned positions, layer norm.
objective: tables 4 and 5. Prefix LM, BERT-style, deshuffling, MASS-style, replaced spans, dropped tokens. Claimed: all that denoise are alike,
    deshuffling is worse.

Encoder's rows are full in all arms, as in the paper: more corruption makes longer targets. Published are averages of GLUE and SuperGLUE tasks (baseline 83.28 and 71.36,
standard deviations 0.235 and 0.416), and of rate and spans on GLUE: 10 % 82.82, 15 % 83.28, 25 % 83.00, 50 % 81.27; one by one 83.28, 2 83.54, 3 83.49, 5 83.40, 10 82.85. No
single metric of a study is such an average, so no published figure stands beside ours; the claims are held to SST-2 and MNLI (`full`), SST-2 and RTE (`small`), SST-2
(`tiny`), each put into words. `full`: 2**19 steps of 128 rows on $PTM_CORPUS, then 2**18 on a task. At `tiny`, two minutes of pretraining, a text-to-text model learns
little more than the labels' words and which words go with them: expect "not distinguishable".
"""

import itertools

from ptm import recipe
from ptm.objectives import denoising
from ptm.study import Arm, Metric, Ordering, Stage, Study

TASKS = {"full": ("sst2", "mnli"), "small": ("sst2", "rte"), "tiny": ("sst2",)}
LABELS = {"sst2": "SST-2", "mnli": "MNLI-m", "rte": "RTE"}
INPUTS = {"full": 512, "small": 128, "tiny": 64}  # positions of the encoder
SENTINELS = {"full": 400, "small": 100, "tiny": 50}  # of all arms, for tokens chosen one by one at a half
RATES = (0.1, 0.15, 0.25, 0.5)
SPANS = (2.0, 3.0, 5.0, 10.0)
ONE_BY_ONE = "one by one"
ANSWER = 16  # positions of a decoder's row for the answer to a task
VARIANTS = {
    "replaced spans": "iid_spans", "BERT-style": "bert_style", "MASS-style": "mass_style", "dropped tokens": "drop_tokens", "deshuffling": "deshuffling",
    "prefix LM": "prefix_lm",
}  # fmt: skip


def get_study(argument: str = "") -> Study:
    """The study of `rate` (default), `spans`, `architecture` or `objective` at `full` (default), `small` or `tiny`."""
    words = recipe.words(argument, recipes=tuple(STUDIES), scales=("full", "small", "tiny"))
    scale = words.scale or "full"
    metrics = [Metric(f"{task}:{task}/accuracy", higher=True, scale=100.0, label=f"{LABELS[task]} accuracy") for task in TASKS[scale]]
    return STUDIES[words.recipe](scale, metrics)


def _stages(scale: str) -> tuple[Stage, ...]:
    base = {"objective.variant": "iid_spans", "tokenizer.sentinels": SENTINELS[scale], "data.length": _rows(scale, variant="iid_spans")[1]}
    pretrain = Stage("pretrain", recipe=f"experiments/recipes.py:t5,denoising,{scale}", overrides=base)
    return (pretrain, *(Stage(task, recipe=f"experiments/recipes.py:{task},text,{scale}", after="pretrain") for task in TASKS[scale]))


def _rows(scale: str, **options: object) -> tuple[int, int]:
    """Longest input that fits the encoder, and the longest target beside it."""
    made = denoising.Config(input_length=INPUTS[scale], **options)
    fitting = itertools.takewhile(lambda lengths: lengths[0] <= INPUTS[scale], map(made.example_lengths, range(2, 4 * INPUTS[scale])))
    return list(fitting)[-1]


def _rate(scale: str, metrics: list[Metric]) -> Study:
    arms = {rate: f"{rate:.0%}".replace("%", " %") for rate in RATES}
    claimed = [(arms[0.15], arms[0.5], ">"), (arms[0.1], arms[0.15], "~"), (arms[0.25], arms[0.15], "~")]
    return Study(
        claim="Corrupting half of the tokens is worse than 15 %; 10 and 25 % are as good.",
        paper="Raffel et al. 2020, table 6, section 3.3.3",
        stages=_stages(scale),
        arms=[Arm(name, {"objective.rate": rate, "data.length": _rows(scale, variant="iid_spans", rate=rate)[1]}) for rate, name in arms.items()],
        base=arms[0.15],
        differs=("objective.rate", "data.length"),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=_orderings(metrics, claimed, "table 6"),
    )


def _spans(scale: str, metrics: list[Metric]) -> Study:
    arms = {span: f"spans of {span:.0f}" for span in SPANS}
    claimed = [(arms[3.0], arms[10.0], ">"), (arms[2.0], arms[3.0], "~"), (arms[5.0], arms[3.0], "~"), (arms[3.0], ONE_BY_ONE, ">")]
    varied = [Arm(name, {"objective.variant": "replace_spans", "objective.mean_span": span, "data.length": _rows(scale, mean_span=span)[1]}) for span, name in arms.items()]
    return Study(
        claim="Spans of two to five tokens are as good as tokens chosen one by one or better, and spans of ten are worse.",
        paper="Raffel et al. 2020, table 7, section 3.3.4",
        stages=_stages(scale),
        arms=[Arm(ONE_BY_ONE), *varied],
        base=ONE_BY_ONE,
        differs=("objective.variant", "objective.mean_span", "data.length"),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=_orderings(metrics, claimed, "table 7"),
    )


def _objective(scale: str, metrics: list[Metric]) -> Study:
    base = "replaced spans"
    claimed = [(base, "deshuffling", ">"), (base, "prefix LM", ">"), *((other, base, "~") for other in ("BERT-style", "MASS-style", "dropped tokens"))]
    arms = [Arm(name, {"objective.variant": variant, "data.length": _rows(scale, variant=variant)[1]}) for name, variant in VARIANTS.items()]
    return Study(
        claim="Ways to denoise are alike; putting shuffled tokens in order is worse, and so is continuing a text.",
        paper="Raffel et al. 2020, tables 4 and 5, sections 3.3.1 and 3.3.2",
        stages=_stages(scale),
        arms=arms,
        base=base,
        differs=("objective.variant", "data.length"),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=_orderings(metrics, claimed, "tables 4 and 5"),
    )


def _architecture(scale: str, metrics: list[Metric]) -> Study:
    layers = {"full": 12, "small": 6, "tiny": 2}[scale]
    width = _rows(scale, variant="prefix_lm")[1]
    tasks = {f"{task}:data.length": INPUTS[scale] + ANSWER for task in TASKS[scale]}
    both = sum(_rows(scale, variant="iid_spans"))
    arms = []
    for word, changes in (
        ("denoising", {"objective.variant": "iid_spans"}),
        ("language modelling", {"objective.variant": "prefix_lm"}),
    ):
        target = _rows(scale, **{key.removeprefix("objective."): value for key, value in changes.items()})[1]
        arms += [
            Arm(f"encoder-decoder, {word}", {**changes, "data.length": target}),
            Arm(f"half the layers, {word}", {**changes, "data.length": target, "model.num_layers": layers // 2}),
        ]
        for name, mask in (("LM", "causal"), ("prefix LM", "prefix")):
            one_row = {**changes, "data.length": both if word == "denoising" else width, "objective.mask": mask}
            masks = {f"{task}:objective.mask": mask for task in TASKS[scale]}
            answers = {f"{task}:objective.max_new_tokens": ANSWER for task in TASKS[scale]}
            arms.append(Arm(f"{name}, {word}", one_row | tasks | masks | answers, recipes={"pretrain": f"experiments/recipes.py:t5_decoder,denoising,{scale}"}))
    order = ("encoder-decoder", "prefix LM", "LM")
    claimed = [(f"{better}, {word}", f"{worse}, {word}", ">") for word in ("denoising", "language modelling") for better, worse in itertools.pairwise(order)]
    claimed += [(f"encoder-decoder, {word}", f"half the layers, {word}", ">") for word in ("denoising", "language modelling")]
    claimed += [(f"{name}, denoising", f"{name}, language modelling", ">") for name in order]
    return Study(
        claim="Encoder-decoders are better than prefix LMs, these better than LMs, and denoising is better than language modelling.",
        paper="Raffel et al. 2020, table 2, section 3.2",
        stages=_stages(scale),
        arms=arms,
        base="encoder-decoder, denoising",
        differs=("objective.*", "model.*", "data.length", *(f"{task}:{key}" for task in TASKS[scale] for key in ("data.length", "objective.mask", "objective.max_new_tokens"))),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=_orderings(metrics, claimed, "section 3.2"),
    )


def _orderings(metrics: list[Metric], claimed: list[tuple[str, str, str]], source: str) -> list[Ordering]:
    return [
        Ordering(better=better, worse=worse, metric=metric.name, relation=relation, source=f"{source}, of the averages of GLUE and SuperGLUE")
        for metric in metrics for better, worse, relation in claimed
    ]  # fmt: skip


STUDIES = {"rate": _rate, "spans": _spans, "architecture": _architecture, "objective": _objective}

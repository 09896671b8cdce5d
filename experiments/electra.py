"""ELECTRA's ablations (Clark et al. 2020): what of replaced-token detection is worth it, what the two models share, how large the generator is.

    ptm study experiments/electra.py:arms,tiny --workdir=runs/electra-arms

arms (default): table 5. Detection at all tokens (ELECTRA), at the chosen ones only, restoring what was replaced at all tokens or at the chosen ones, and BERT's
    masking. All get the compute of ELECTRA's run: steps are in inverse proportion to the FLOPs of a step, of generator and main model, counted by the models'
    own formulas. Claimed: ELECTRA > all-tokens MLM > replace MLM = ELECTRA 15 % > BERT; losses at all tokens are most of the gain. Published: GLUE 85.0, 84.3, 82.4,
    82.4, 82.2, an average of eight tasks that is not measured here.
tying: section 3.2, the generator as large as the discriminator. Claimed: shared token tables are better than none, all shared is hardly better still (83.6, 84.3, 84.4).
generator: section 3.2 and figure 3. Claimed: the best generator has a quarter to a half of the discriminator's size.

Scales: `full` is ELECTRA-base on $PTM_CORPUS, in `tying` and `generator` with the 500,000 steps of section 3.2, with SST-2, MNLI and QNLI of $PTM_GLUE. (Whether all
arms of table 5 had equal steps or equal compute the paper leaves open; equal compute is the stricter question.) `small` and `tiny` pretrain smaller
models on the text of $PTM_DATA and have SST-2, at `small` RTE. At `tiny` (two minutes of a core) the
discriminator does not yet find what is replaced, so that nothing of the paper's differences can be seen (experiments/README.md).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptm import recipe, registry
from ptm.models import bert
from ptm.objectives import mlm, rtd
from ptm.study import Arm, Metric, Ordering, Stage, Study

RECIPES = Path(__file__).resolve().parent / "recipes.py"
TASKS = {"full": ("sst2", "mnli", "qnli"), "small": ("sst2", "rte"), "tiny": ("sst2",)}
LABELS = {"sst2": "SST-2", "mnli": "MNLI-m", "qnli": "QNLI", "rte": "RTE"}
ELECTRA, FIFTEEN, ALL_TOKENS, REPLACE, BERT = "ELECTRA", "ELECTRA 15 %", "all-tokens MLM", "replace MLM", "BERT"
ARMS = {ELECTRA: "electra", ALL_TOKENS: "all_tokens_mlm", REPLACE: "replace_mlm", FIFTEEN: "fifteen"}
FRACTIONS = {"full": (1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1.0), "small": (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0), "tiny": (1 / 4, 1 / 2, 3 / 4, 1.0)}
SHORTER = {"train.steps": 500_000}  # of section 3.2


def get_study(argument: str = "") -> Study:
    """The study of `arms` (default), `tying` or `generator` at `full` (default), `small` or `tiny`."""
    words = recipe.words(argument, recipes=tuple(STUDIES), scales=("full", "small", "tiny"))
    scale = words.scale or "full"
    metrics = [Metric(f"{task}:{task}/accuracy", higher=True, scale=100.0, label=f"{LABELS[task]} accuracy") for task in TASKS[scale]]
    return STUDIES[words.recipe](scale, metrics)


def _stages(scale: str, overrides: Mapping[str, Any]) -> tuple[Stage, ...]:
    pretrain = Stage("pretrain", recipe=f"experiments/recipes.py:electra,{scale}", overrides=overrides)
    tuning = {"optimizer.layerwise_decay": 0.8} if scale == "full" else {}
    return (pretrain, *(Stage(task, recipe=f"experiments/recipes.py:{task},{scale}", after="pretrain", overrides=tuning) for task in TASKS[scale]))


def _flops(scale: str, objective: rtd.Config | mlm.Config) -> float:
    """FLOPs of a row's forward pass, of the generator too, as ptm.timing counts them."""
    made = registry.resolve(recipe.load(f"{RECIPES}:electra,{scale}"))
    size = {"vocab_size": made.tokenizer.vocab_size}
    lengths = objective.lengths(made.data.length)
    if isinstance(objective, rtd.Config):
        model = dataclasses.replace(made.model, **size)
        return model.forward_flops(lengths, lengths["S"], objective.heads)
    shape = {key: getattr(made.model, key) for key in ("num_layers", "width", "num_heads", "max_length")}
    return bert.BertConfig(**shape, **size).forward_flops(lengths, lengths["S"])


def _arms(scale: str, metrics: list[Metric]) -> Study:
    made = registry.resolve(recipe.load(f"{RECIPES}:electra,{scale}"))
    rate, steps = made.objective.rate, made.train.steps
    whole = _flops(scale, rtd.Config(rate=rate))

    def lasting(objective: rtd.Config | mlm.Config) -> dict[str, Any]:
        count = round(steps * whole / _flops(scale, objective))
        return {"train.steps": count, "schedule.warmup_steps": round(made.schedule.warmup_steps * count / steps), "evals.validation.every": count // 4}

    arms = [Arm(name, {"objective.arm": arm, **lasting(rtd.Config(arm=arm, rate=rate))}) for name, arm in ARMS.items()]
    arms.append(Arm(BERT, lasting(mlm.Config(rate=rate)), recipes={"pretrain": f"experiments/recipes.py:masked,{scale}"}))
    claimed = ((ELECTRA, ALL_TOKENS, ">"), (ALL_TOKENS, REPLACE, ">"), (REPLACE, FIFTEEN, "~"), (REPLACE, BERT, ">"), (ELECTRA, BERT, ">"), (ELECTRA, FIFTEEN, ">"))
    return Study(
        claim="At equal compute detecting replaced tokens is better than masking, and losses at all tokens are most of the gain.",
        paper="Clark et al. 2020, table 5, section 3.4",
        stages=_stages(scale, {}),
        arms=arms,
        base=ELECTRA,
        differs=("objective.*", "model.*", "train.steps", "schedule.warmup_steps", "evals.validation.every"),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=[
            Ordering(better=better, worse=worse, metric=metric.name, relation=relation, source="table 5, of the GLUE average")
            for metric in metrics for better, worse, relation in claimed
        ],
    )  # fmt: skip


def _tying(scale: str, metrics: list[Metric]) -> Study:
    shown = {"none": "nothing shared", "tokens": "token tables shared", "all": "all shared"}
    claimed = (("tokens", "none", ">"), ("all", "tokens", "~"))
    return Study(
        claim="Sharing the table of tokens between generator and discriminator helps; sharing all of the encoder adds little.",
        paper="Clark et al. 2020, section 3.2",
        stages=_stages(scale, {"model.generator_fraction": 1.0, **(SHORTER if scale == "full" else {})}),
        arms=[Arm(name, {"model.tie_embeddings": tied}) for tied, name in shown.items()],
        base=shown["none"],
        differs=("model.tie_embeddings",),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=[
            Ordering(better=shown[better], worse=shown[worse], metric=metric.name, relation=relation, source="section 3.2, of the GLUE average")
            for metric in metrics for better, worse, relation in claimed
        ],
    )  # fmt: skip


def _generator(scale: str, metrics: list[Metric]) -> Study:
    arms = {fraction: f"generator {fraction:.2g}" for fraction in FRACTIONS[scale]}
    best = [fraction for fraction in arms if 0.25 <= fraction <= 0.5]
    return Study(
        claim="Generators of a quarter to a half of the discriminator's size are better than as large ones.",
        paper="Clark et al. 2020, section 3.2, figure 3",
        stages=_stages(scale, SHORTER if scale == "full" else {}),
        arms=[Arm(name, {"model.generator_fraction": fraction}) for fraction, name in arms.items()],
        base=arms[best[-1]],
        differs=("model.generator_fraction",),
        seeds=(0, 1, 2),
        metrics=metrics,
        orderings=[Ordering(better=arms[size], worse=arms[1.0], metric=metric.name, source="figure 3, of the GLUE average") for metric in metrics for size in best],
    )


STUDIES = {"arms": _arms, "tying": _tying, "generator": _generator}

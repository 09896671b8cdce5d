"""ALBERT's ablations (Lan et al. 2020): the sentence objective, what layers share, and the width of embeddings.

    ptm study experiments/albert.py:objective,tiny --workdir=runs/albert-objective

objective (default): table 5. No sentence task, next sentence prediction (NSP), sentence order prediction (SOP). Each pretrained model is asked both
    questions: the stages `nsp` and `sop` train the pooler and a head for pairs on its frozen layers. (The paper does not say how it measured models on the
    question that they were not trained on.) Claimed: NSP does not teach order, its model stays at chance on SOP; SOP teaches much of what NSP asks; downstream SOP is
    better than both.
sharing: table 4, at embeddings of 128 and as wide as the layers. Claimed: sharing the feed-forward is what costs, sharing attention next to nothing.
embedding: table 3. Claimed: with shared layers 128 is enough, without sharing wider is better.

Scales: `full` is the published recipe on $PTM_CORPUS (experiments/recipes.py says where the tasks are), the frozen stages 10,000 steps of 64 pairs.
`small` and `tiny` pretrain smaller models on the texts of $PTM_DATA that have neighbouring sentences: a novel, articles, e-mails. Widths of
embeddings go down with the model: 1/12, 1/6, 1/3 and 1 of its width, as 64, 128, 256 and 768 are of 768. SST-2 and (at `small`) RTE are what is left of the five downstream
tasks; their average and RACE are not measured at any scale. At `tiny`, two minutes of pretraining, one sees whether the questions can be told
apart at all, and no effect of any of this on SST-2; what sharing costs is seen in the loss of pretraining, which the paper does not print.
"""

from ptm import recipe
from ptm.study import Arm, Metric, Ordering, Published, Stage, Study

SOURCE = "Lan et al. 2020, table"
NSP, SOP = "nsp:validation/pair_accuracy", "sop:validation/pair_accuracy"
LOSS = "pretrain:validation/loss/tokens"
TASKS = {"full": ("squad1", "squad2", "mnli", "sst2"), "small": ("sst2", "rte"), "tiny": ("sst2",)}
METRICS = {
    "squad1": Metric("squad1:dev/f1", higher=True, label="SQuAD 1.1 F1"),
    "squad2": Metric("squad2:dev/f1", higher=True, label="SQuAD 2.0 F1"),
    **{task: Metric(f"{task}:{task}/accuracy", higher=True, scale=100.0, label=label) for task, label in (("mnli", "MNLI"), ("sst2", "SST-2"), ("rte", "RTE"))},
}
# Table 5: NSP, SOP, SQuAD 1.1 F1, SQuAD 2.0 F1, MNLI, SST-2.
OBJECTIVES = {
    "none": (52.4, 53.3, 88.6, 78.1, 81.5, 89.9), "NSP": (90.5, 52.0, 88.4, 77.2, 81.6, 91.1), "SOP": (78.9, 86.5, 89.3, 80.0, 82.0, 90.3),
}  # fmt: skip
# Table 3, embeddings of 128: SQuAD 1.1 F1, SQuAD 2.0 F1, MNLI, SST-2. Of other rows only the average is at hand.
SHARED_128 = {"all": (89.3, 80.0, 81.6, 90.3), "none": (89.9, 80.3, 83.7, 91.5)}
WIDTHS = (64, 128, 256, 768)  # of embeddings, of a model of 768
SIZES = {"full": 768, "small": 384, "tiny": 192}


def get_study(argument: str = "") -> Study:
    """The study of `objective` (default), `sharing` or `embedding` at `full` (default), `small` or `tiny`."""
    words = recipe.words(argument, recipes=tuple(STUDIES), scales=("full", "small", "tiny"))
    return STUDIES[words.recipe](words.scale or "full")


def _pretraining(scale: str) -> Stage:
    if scale == "full":
        return Stage("pretrain", recipe="experiments/recipes.py:albert")
    overrides = {"model.width": SIZES[scale], "model.embed_width": SIZES[scale] // 6, "model.num_heads": 6}
    return Stage("pretrain", recipe=f"experiments/recipes.py:albert,sop,documents,{scale}", overrides=overrides)


def _asked(task: str, scale: str) -> Stage:
    """The stage that trains the head of a sentence task on frozen layers."""
    steps = {"full": 10_000, "small": 3000, "tiny": 400}[scale]
    overrides = {
        "objective.task": task, "optimizer.name": "adamw", "optimizer.learning_rate": 1e-3, "optimizer.freeze": ("(?!pooler|pair_head).*",),
        "train.steps": steps, "train.batch_size": 64, "train.microbatches": 1, "schedule.warmup_steps": steps // 10, "evals.validation.every": steps,
    }  # fmt: skip
    return Stage(task, recipe=_pretraining(scale).recipe, after="pretrain", overrides=overrides)


def _tasks(scale: str) -> tuple[Stage, ...]:
    return tuple(Stage(task, recipe=f"experiments/recipes.py:{task},{scale}", after="pretrain") for task in TASKS[scale])


def _published(arm: str, values: tuple[float, ...], scale: str, number: int, *, asked: tuple[str, ...] = ()) -> list[Published]:
    names = [*asked, *(METRICS[task].name if task in TASKS[scale] else "" for task in TASKS["full"])]
    return [Published(arm, name, value, source=f"{SOURCE} {number}") for name, value in zip(names, values, strict=True) if name]


def _objective(scale: str) -> Study:
    tasks = [METRICS[task] for task in TASKS[scale]]
    return Study(
        claim="Sentence order prediction teaches what next sentence prediction asks, not the other way round, and is better downstream.",
        paper=f"{SOURCE} 5, section 4.6",
        stages=(_pretraining(scale), _asked("nsp", scale), _asked("sop", scale), *_tasks(scale)),
        arms=(Arm("SOP"), Arm("NSP", {"objective.task": "nsp"}), Arm("none", {"objective.task": "none"})),
        base="SOP",
        differs=("objective.task",),
        seeds=(0, 1, 2),
        metrics=(
            Metric(NSP, higher=True, scale=100.0, label="NSP accuracy of a head on frozen layers"),
            Metric(SOP, higher=True, scale=100.0, label="SOP accuracy of a head on frozen layers"), *tasks,
        ),
        published=[entry for arm, values in OBJECTIVES.items() for entry in _published(arm, values, scale, 5, asked=(NSP, SOP))],
        orderings=(
            Ordering(better="NSP", worse="none", metric=SOP, relation="~", source="section 4.6: no better than chance on SOP"),
            Ordering(better="SOP", worse="NSP", metric=SOP, source="section 4.6"),
            Ordering(better="SOP", worse="none", metric=NSP, source="section 4.6: better than chance on NSP"),
            Ordering(better="NSP", worse="SOP", metric=NSP, source="table 5"),
            *(Ordering(better="SOP", worse=other, metric=metric.name, source="section 4.6, of the average") for metric in tasks for other in ("NSP", "none")),
        ),
    )  # fmt: skip


def _sharing(scale: str) -> Study:
    shown = {"all": "all shared", "attention": "attention shared", "mlp": "feed-forward shared", "none": "nothing shared"}
    width = SIZES[scale]
    metrics = (Metric(LOSS, higher=False, label="MLM loss, nats a token"), *(METRICS[task] for task in TASKS[scale]))

    def name(share: str, wide: bool) -> str:
        return f"{shown[share]}, E {width if wide else width // 6}"

    arms = [Arm(name(share, wide), {"model.share": share, "model.embed_width": width if wide else width // 6}) for wide in (False, True) for share in shown]
    return Study(
        claim="Sharing the feed-forward of all layers is what costs accuracy; sharing attention costs next to none.",
        paper=f"{SOURCE} 4, section 4.5",
        stages=(_pretraining(scale), *_tasks(scale)),
        arms=arms,
        base=name("all", False),
        differs=("model.share", "model.embed_width"),
        seeds=(0, 1, 2),
        metrics=metrics,
        published=[entry for share, values in SHARED_128.items() for entry in _published(name(share, False), values, scale, 3)],
        orderings=[
            ordering
            for metric in metrics
            for wide in (False, True)
            for ordering in (
                Ordering(better=name("attention", wide), worse=name("mlp", wide), metric=metric.name, source="section 4.5, of the average"),
                Ordering(better=name("none", wide), worse=name("mlp", wide), metric=metric.name, source="section 4.5, of the average"),
                Ordering(better=name("none", wide), worse=name("all", wide), metric=metric.name, source="section 4.5, of the average"),
            )
        ],
    )


def _embedding(scale: str) -> Study:
    widths = [SIZES[scale] * width // 768 for width in WIDTHS]
    metrics = (Metric(LOSS, higher=False, label="MLM loss, nats a token"), *(METRICS[task] for task in TASKS[scale]))

    def name(share: str, width: int) -> str:
        return f"{share} shared, E {width}"

    best = widths[1]
    return Study(
        claim="With shared layers an embedding of a sixth of the width is enough; without sharing a wider one is better.",
        paper=f"{SOURCE} 3, section 4.4",
        stages=(_pretraining(scale), *_tasks(scale)),
        arms=[Arm(name(share, width), {"model.share": share, "model.embed_width": width}) for share in ("all", "none") for width in widths],
        base=name("all", best),
        differs=("model.share", "model.embed_width"),
        seeds=(0, 1, 2),
        metrics=metrics,
        published=[entry for share, values in SHARED_128.items() for entry in _published(name(share, best), values, scale, 3)],
        orderings=[
            ordering
            for metric in metrics
            for ordering in (
                *(Ordering(better=name("all", best), worse=name("all", width), metric=metric.name, source="section 4.4, of the average") for width in widths if width != best),
                *(Ordering(better=name("none", wide), worse=name("none", narrow), metric=metric.name, source="section 4.4, of the average") for narrow, wide in zip(widths, widths[1:])),
            )
        ],
    )


STUDIES = {"objective": _objective, "sharing": _sharing, "embedding": _embedding}

"""BERT's ablations (Devlin et al. 2019): which pretraining task, and what becomes of the tokens that are chosen.

    ptm study experiments/bert.py:tasks,tiny --workdir=runs/bert-tasks

tasks (default): table 5. MLM with next sentence prediction, MLM alone, a left-to-right model, and that one under a BiLSTM; the left-to-right model is a decoder of
    BERT's shape, in fine-tuning too, as in section 5.1. Claimed: no pair task costs a little, left to right more, most where tokens are labelled; a BiLSTM
    repairs that and not the sentences. (Liu et al. 2019, table 2, find that the pair task does not help: experiments/roberta.py:formats.)
masking: table 8. Shares of chosen tokens that become [MASK], stay, become a random token; entities by fine-tuning and from frozen features.
    Claimed: fine-tuning hardly minds, [MASK] alone is worse where features are read, random tokens alone are worse throughout.

Scales: `full` is the published recipe with its two phases, of lengths 128 and 512, on $PTM_CORPUS, with GLUE, SQuAD and CoNLL-2003 (experiments/recipes.py says where).
`small` and `tiny` have one phase, other tasks, and less of everything: SST-2, RTE (at `small`) and the entities of Wikigold in place of SQuAD as the task that labels
tokens, and text that neighbours each other (no single sentences) where pairs are made of it. At `tiny`, two minutes of pretraining, one cannot see what
pairs teach (RTE stays at chance, so it is left out), nor differences within a point: 872 dev sentences have a standard error of 1.3 points.
Frozen features are the weighted layers under two layers of BiLSTM; the paper concatenates the last four.
"""

from ptm import recipe
from ptm.study import Arm, Metric, Ordering, Published, Stage, Study

SOURCE = "Devlin et al. 2019, table"
ACCURACY = {"mnli": "MNLI-m", "qnli": "QNLI", "mrpc": "MRPC", "sst2": "SST-2", "rte": "RTE"}
METRICS = {
    **{task: Metric(f"{task}:{task}/accuracy", higher=True, scale=100.0, label=f"{label} accuracy") for task, label in ACCURACY.items()},
    "squad1": Metric("squad1:dev/f1", higher=True, label="SQuAD 1.1 F1"),
    "ner": Metric("ner:dev/f1", higher=True, scale=100.0, label="entities F1, fine-tuned"),
    "features": Metric("features:dev/f1", higher=True, scale=100.0, label="entities F1, frozen features"),
}
SEEDS = {"full": (0, 1, 2), "small": (0, 1, 2), "tiny": (0, 1, 2, 3, 4)}
BIDIRECTIONAL, NO_PAIRS, LEFT, LEFT_BILSTM = "MLM + NSP", "MLM", "left to right", "left to right + BiLSTM"
# Table 5, in the order of TASKS["full"]; table 8: shares of [MASK], random tokens; MNLI-m, entities fine-tuned and from features.
TASKS = {"full": ("mnli", "qnli", "mrpc", "sst2", "squad1"), "small": ("sst2", "rte", "ner"), "tiny": ("sst2", "ner")}
TABLE_5 = {
    BIDIRECTIONAL: (84.4, 88.4, 86.7, 92.7, 88.5), NO_PAIRS: (83.9, 84.9, 86.5, 92.6, 87.9), LEFT: (82.1, 84.3, 77.5, 92.1, 77.8),
    LEFT_BILSTM: (82.1, 84.1, 75.7, 91.6, 84.9),
}  # fmt: skip
MASKING = {"full": ("mnli", "ner", "features"), "small": ("sst2", "ner", "features"), "tiny": ("sst2", "ner", "features")}
TABLE_8 = {
    "80/10/10": (0.8, 0.1, (84.2, 95.4, 94.9)), "100/0/0": (1.0, 0.0, (84.3, 94.9, 94.0)), "80/0/20": (0.8, 0.2, (84.1, 95.2, 94.6)),
    "80/20/0": (0.8, 0.0, (84.4, 95.2, 94.7)), "0/20/80": (0.0, 0.8, (83.7, 94.8, 94.6)), "0/0/100": (0.0, 1.0, (83.6, 94.9, 94.6)),
}  # fmt: skip


def get_study(argument: str = "") -> Study:
    """The study of `tasks` (default) or `masking` at `full` (default), `small` or `tiny`."""
    words = recipe.words(argument, recipes=("tasks", "masking"), scales=("full", "small", "tiny"))
    return (_tasks if words.recipe == "tasks" else _masking)(words.scale or "full")


def _pretraining(scale: str, recipe_of: str) -> dict[str, str]:
    """Stage -> recipe; the published run has two phases."""
    if scale == "full":
        return {"pretrain": f"experiments/recipes.py:{recipe_of}", "pretrain_512": f"experiments/recipes.py:{recipe_of}_512"}
    return {"pretrain": f"experiments/recipes.py:{recipe_of},{scale}"}


def _stages(scale: str, pretraining: dict[str, str], tasks: tuple[str, ...]) -> tuple[Stage, ...]:
    last = list(pretraining)[-1]
    made = [Stage(name, recipe=spec, after=before) for (name, spec), before in zip(pretraining.items(), (None, "pretrain"))]
    for task in tasks:
        frozen = {"objective.layer_mix": True, "objective.bilstm_layers": 2, "optimizer.freeze": ("(?!tag_head|bilstm|layer_mix).*",), "optimizer.learning_rate": 1e-3}
        spec = f"experiments/recipes.py:{'ner' if task == 'features' else task},{scale}"
        made.append(Stage(task, recipe=spec, after=last, overrides=frozen if task == "features" else {}))
    return tuple(made)


def _tasks(scale: str) -> Study:
    tasks = TASKS[scale]
    pairs = _pretraining(scale, "bert" if scale == "full" else "bert,nsp,documents")
    left = _pretraining(scale, "ltr" if scale == "full" else "ltr,documents")
    bilstm = {f"{task}:objective.bilstm_layers": 1 for task in tasks}
    lost = tasks[-1]  # the task that labels tokens
    metrics = [METRICS[task] for task in tasks]
    claimed = [
        *(Ordering(better=BIDIRECTIONAL, worse=NO_PAIRS, metric=metric.name, source="section 5.1") for metric in metrics if "ner" not in metric.name),
        *(Ordering(better=NO_PAIRS, worse=LEFT, metric=metric.name, source="section 5.1") for metric in metrics),
        Ordering(better=LEFT_BILSTM, worse=LEFT, metric=METRICS[lost].name, source="section 5.1, of SQuAD"),
        Ordering(better=NO_PAIRS, worse=LEFT_BILSTM, metric=METRICS[lost].name, source="section 5.1, of SQuAD"),
    ]
    return Study(
        claim="Pretraining in both directions is better than left to right, most of all where tokens are labelled, and next sentence prediction helps.",
        paper=f"{SOURCE} 5",
        stages=_stages(scale, pairs, tasks),
        arms=(
            Arm(BIDIRECTIONAL), Arm(NO_PAIRS, {f"{stage}:objective.task": "none" for stage in pairs}), Arm(LEFT, recipes=left),
            Arm(LEFT_BILSTM, bilstm, recipes=left),
        ),
        base=BIDIRECTIONAL,
        differs=(*(f"{stage}:{section}.*" for stage in pairs for section in ("model", "objective")), *bilstm),
        seeds=SEEDS[scale],
        metrics=metrics,
        published=_published(TABLE_5, TASKS["full"], tasks, f"{SOURCE} 5"),
        orderings=claimed,
    )  # fmt: skip


def _masking(scale: str) -> Study:
    tasks = MASKING[scale]
    pretraining = _pretraining(scale, "bert" if scale == "full" else "bert,mlm")
    name = {task: METRICS[task].name for task in tasks}
    usual = "80/10/10"
    claimed = [
        *(Ordering(better=usual, worse=random, metric=name[tasks[0]], source="appendix C.2, of MNLI") for random in ("0/20/80", "0/0/100")),
        *(Ordering(better=usual, worse=other, metric=name[tasks[0]], relation="~", source="appendix C.2, of MNLI") for other in ("100/0/0", "80/0/20", "80/20/0")),
        Ordering(better=usual, worse="100/0/0", metric=name["features"], source="appendix C.2"),
    ]
    return Study(
        claim="Fine-tuning hardly minds how chosen tokens are replaced; [MASK] alone is worse where frozen features are read, random tokens alone are worse.",
        paper=f"{SOURCE} 8",
        stages=_stages(scale, pretraining, tasks),
        arms=[
            Arm(shares, {f"{stage}:objective.{key}": value for stage in pretraining for key, value in (("mask_share", mask), ("random_share", random))})
            for shares, (mask, random, _) in TABLE_8.items()
        ],
        base=usual,
        differs=tuple(f"{stage}:objective.{key}" for stage in pretraining for key in ("mask_share", "random_share")),
        seeds=SEEDS[scale],
        metrics=[METRICS[task] for task in tasks],
        published=_published({shares: row for shares, (*_, row) in TABLE_8.items()}, MASKING["full"], tasks, f"{SOURCE} 8"),
        orderings=claimed,
    )


def _published(table: dict[str, tuple[float, ...]], columns: tuple[str, ...], tasks: tuple[str, ...], source: str) -> list[Published]:
    """The figures of a table for the tasks that a study has."""
    rows = [(arm, task, value) for arm, row in table.items() for task, value in zip(columns, row, strict=True)]
    return [Published(arm, METRICS[task].name, value, source=source) for arm, task, value in rows if task in tasks]

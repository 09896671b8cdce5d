"""RoBERTa's choices (Liu et al. 2019): static or dynamic masking, what a row holds, the size of a batch.

    ptm study experiments/roberta.py:masking,tiny --workdir=runs/roberta-masking

masking (default): table 1. BERT with ten maskings of each document for the whole run (static) or a new one at each visit (dynamic). Claimed: as good or slightly
    better. Only where the text is seen more than ten times do the two differ.
formats: table 2. Segment pairs and sentence pairs with next sentence prediction, full sentences and sentences of one document without. Claimed:
    single sentences are worse, doing without pairs is as good or better, one document is slightly better than several.
batch: table 3. Batches of 256, 2K and 8K rows at the same number of passes over the data, each with the paper's rate. Claimed, by perplexity: 2K < 8K < 256.

Scales: `full` is BERT-base at length 512 throughout (section 4: no short rows, no phase of short rows), 1,000,000 steps of 256, with SQuAD, MNLI and SST-2; RACE is not measured.
The paper's sentence pairs have larger batches, so that steps have as many tokens: here they have not, and are padded. `small` and `tiny` have SST-2, RTE
(`small`), and the loss on held out text, which is where static masking shows first: they read 8 MB of text. Their batches are 1, 4 and 16 times
16 rows (`tiny`) or 64, rates in the ratio of the paper's, and static masking is one masking, since a tiny run does not see the text ten times. At `tiny` no
effect on SST-2 can be seen; formats differ in how many tokens are masked a step, so their losses are of different rows and are not compared.
"""

from ptm import recipe
from ptm.study import Arm, Metric, Ordering, Published, Stage, Study

SOURCE = "Liu et al. 2019, table"
LOSS = Metric("pretrain:validation/loss", higher=False, label="MLM loss on held out text, nats a token")
PERPLEXITY = Metric("pretrain:validation/perplexity", higher=False, label="perplexity on held out text")
METRICS = {
    "squad1": Metric("squad1:dev/f1", higher=True, label="SQuAD 1.1 F1"),
    "squad2": Metric("squad2:dev/f1", higher=True, label="SQuAD 2.0 F1"),
    **{task: Metric(f"{task}:{task}/accuracy", higher=True, scale=100.0, label=label) for task, label in (("mnli", "MNLI-m"), ("sst2", "SST-2"), ("rte", "RTE"))},
}
TASKS = {"small": ("sst2", "rte"), "tiny": ("sst2",)}
MASKING = {"static": (78.3, 84.3, 92.5), "dynamic": (78.7, 84.0, 92.9)}  # SQuAD 2.0 F1, MNLI-m, SST-2; medians of 5 seeds
SEGMENTS, SENTENCES, FULL, DOCUMENT = "segment pairs + NSP", "sentence pairs + NSP", "full sentences", "sentences of a document"
# Task and format of the objective; SQuAD 1.1 F1, SQuAD 2.0 F1, MNLI-m, SST-2.
FORMATS = {
    SEGMENTS: ("nsp", "segment_pair", (90.4, 78.7, 84.0, 92.9)), SENTENCES: ("nsp", "sentence_pair", (88.7, 76.2, 82.9, 92.1)),
    FULL: ("none", "full_sentences", (90.4, 79.1, 84.7, 92.5)), DOCUMENT: ("none", "doc_sentences", (90.6, 79.7, 84.7, 92.7)),
}  # fmt: skip
# Rows, rate, steps at 32 passes; perplexity, MNLI-m, SST-2.
BATCHES = {"256": (256, 1e-4, 1_000_000, (3.99, 84.7, 92.5)), "2K": (2048, 7e-4, 125_000, (3.68, 85.2, 93.1)), "8K": (8192, 1e-3, 31_000, (3.77, 84.4, 93.2))}
SMALLER = {"256": 1, "2K": 4, "8K": 16}  # times the rows of the scale
RATES = {"small": 2.5e-4, "tiny": 1e-3}  # of the smallest batch
ROWS = {"small": (64, 20_000), "tiny": (16, 2000)}


def get_study(argument: str = "") -> Study:
    """The study of `masking` (default), `formats` or `batch` at `full` (default), `small` or `tiny`."""
    words = recipe.words(argument, recipes=tuple(STUDIES), scales=("full", "small", "tiny"))
    return STUDIES[words.recipe](words.scale or "full")


def _stages(scale: str, tasks: tuple[str, ...], name: str, overrides: dict[str, object]) -> tuple[Stage, ...]:
    pretrain = Stage("pretrain", recipe=f"experiments/recipes.py:{name}{'' if scale == 'full' else f',{scale}'}", overrides=overrides)
    return (pretrain, *(Stage(task, recipe=f"experiments/recipes.py:{task},{scale}", after="pretrain") for task in tasks))


def _bert(scale: str, *, pairs: bool) -> tuple[str, dict[str, object]]:
    """Recipe and overrides of BERT as section 4 of the paper trains it."""
    if scale == "full":
        whole = {"data.length": 512, "train.steps": 1_000_000, "schedule.final_factor": 0.0, "objective.short_prob": 0.0}
        return "bert", whole
    return "bert,nsp,documents" if pairs else "bert,mlm", {"objective.short_prob": 0.0} if pairs else {}


def _published(table: int, rows: dict[str, tuple[float, ...]], columns: tuple[str, ...], tasks: tuple[str, ...]) -> list[Published]:
    return [
        Published(arm, METRICS[task].name, value, source=f"{SOURCE} {table}")
        for arm, row in rows.items() for task, value in zip(columns, row, strict=True) if task in tasks
    ]  # fmt: skip


def _masking(scale: str) -> Study:
    columns = ("squad2", "mnli", "sst2")
    tasks = TASKS[scale] if scale in TASKS else columns
    name, overrides = _bert(scale, pairs=False)
    static = 10 if scale == "full" else 1
    metrics = [METRICS[task] for task in tasks] + ([] if scale == "full" else [LOSS])
    return Study(
        claim="A new masking at each visit is as good as, or slightly better than, ten fixed ones.",
        paper=f"{SOURCE} 1, section 4.1",
        stages=_stages(scale, tasks, name, overrides),
        arms=(Arm("static", {"objective.visits": static}), Arm("dynamic", {"objective.visits": None})),
        base="static",
        differs=("objective.visits",),
        seeds=(0, 1, 2, 3, 4),
        metrics=metrics,
        published=_published(1, MASKING, columns, tasks),
        orderings=[Ordering(better="dynamic", worse="static", metric=metric.name, relation=">" if metric is LOSS else "~", source="section 4.1") for metric in metrics],
    )


def _formats(scale: str) -> Study:
    columns = ("squad1", "squad2", "mnli", "sst2")
    tasks = TASKS[scale] if scale in TASKS else columns
    name, overrides = _bert(scale, pairs=True)
    claimed = ((DOCUMENT, FULL), (FULL, SEGMENTS), (SEGMENTS, SENTENCES))
    return Study(
        claim="Whole sentences without a pair task are as good as segment pairs or better, and single sentences in pairs are worse.",
        paper=f"{SOURCE} 2, section 4.2",
        stages=_stages(scale, tasks, name, overrides),
        arms=[Arm(arm, {"objective.task": task, "objective.format": form}) for arm, (task, form, _) in FORMATS.items()],
        base=SEGMENTS,
        differs=("objective.task", "objective.format"),
        seeds=(0, 1, 2, 3, 4),
        metrics=[METRICS[task] for task in tasks],
        published=_published(2, {arm: row for arm, (*_, row) in FORMATS.items()}, columns, tasks),
        orderings=[Ordering(better=better, worse=worse, metric=METRICS[task].name, source="section 4.2") for task in tasks for better, worse in claimed],
    )


def _batch(scale: str) -> Study:
    columns = ("mnli", "sst2")
    tasks = TASKS[scale] if scale in TASKS else columns
    rows = {arm: row[1:] for arm, (*_, row) in BATCHES.items()}
    published = [Published(arm, PERPLEXITY.name, row[0], source=f"{SOURCE} 3") for arm, (*_, row) in BATCHES.items()] if scale == "full" else []
    return Study(
        claim="At equal passes over the data batches of 2K rows are better than of 8K, and these better than of 256.",
        paper=f"{SOURCE} 3, section 4.3",
        stages=_stages(scale, tasks, "roberta", {} if scale == "full" else {"optimizer.b2": 0.98}),
        arms=[Arm(arm, _sizes(arm, scale)) for arm in BATCHES],
        base="256",
        differs=("train.*", "optimizer.learning_rate", "schedule.warmup_steps", "evals.validation.every", "checkpoint.every"),
        seeds=(0, 1, 2),
        metrics=[PERPLEXITY, *(METRICS[task] for task in tasks)],
        published=published + _published(3, rows, columns, tasks),
        orderings=[Ordering(better=better, worse=worse, metric=PERPLEXITY.name, source="table 3, 32 passes") for better, worse in (("2K", "8K"), ("8K", "256"))],
    )


def _sizes(arm: str, scale: str) -> dict[str, object]:
    rows, rate, steps, _ = BATCHES[arm]
    if scale != "full":
        (least, most), times, rate = ROWS[scale], SMALLER[arm], RATES[scale] * (rate / 1e-4) ** 0.5
        rows, steps = least * times, most // times
    every = max(1, steps // 10)
    return {
        "train.batch_size": rows, "train.steps": steps, "train.microbatches": max(1, rows // 1024) if scale == "full" else 1, "optimizer.learning_rate": rate,
        "schedule.warmup_steps": steps * 6 // 100, "evals.validation.every": every, "checkpoint.every": every,
    }  # fmt: skip


STUDIES = {"masking": _masking, "formats": _formats, "batch": _batch}

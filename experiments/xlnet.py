"""XLNet's ablations (Yang et al. 2019, table 6): permutation language modelling, and what it is made of.

    ptm study experiments/xlnet.py:tiny --workdir=runs/xlnet

Arms: BERT; denoising by XLNet's own network (masked tokens, relative positions); XLNet with one of K=7 or K=6 tokens predicted; and K=6 without memory, with
single tokens for spans, and with documents read forwards alone. Claimed: XLNet > denoising > BERT; memory, spans and both directions each help, K=6 and K=7 are alike.
The paper's denoising arm has Transformer-XL's memory, which masked language modelling has not here, so no published figure stands beside it; the arm
with next sentence prediction is left out, since the permutation objective has no pairs, and so is RACE.

Scales: `full` is BERT-base's shape, batch and steps at length 512 on $PTM_CORPUS, SQuAD 2.0, MNLI and SST-2. `small` and `tiny` read the texts of $PTM_DATA that run on
from row to row, with memory of three quarters of a row, and have SST-2, at `small` RTE. At `tiny` nothing of this can be seen in SST-2 but whether
pretraining helped at all; memory is of use for tasks with long texts, of which none is here.
"""

from ptm import recipe
from ptm.study import Arm, Metric, Ordering, Published, Stage, Study

SOURCE = "Yang et al. 2019, table 6"
COLUMNS = ("squad2", "mnli", "sst2")  # F1, matched, dev
TASKS = {"full": COLUMNS, "small": ("sst2", "rte"), "tiny": ("sst2",)}
METRICS = {
    "squad2": Metric("squad2:dev/f1", higher=True, label="SQuAD 2.0 F1"),
    **{task: Metric(f"{task}:{task}/accuracy", higher=True, scale=100.0, label=label) for task, label in (("mnli", "MNLI-m"), ("sst2", "SST-2"), ("rte", "RTE"))},
}
MEMORY = {"full": 384, "small": 96, "tiny": 48}
BERT, DENOISING, XLNET, XLNET_6 = "BERT", "XLNet's network, masked", "XLNet, K=7", "XLNet, K=6"
TABLE = {
    BERT: (76.30, 84.34, 92.78), XLNET: (81.33, 85.84, 92.66), XLNET_6: (80.98, 85.63, 93.35), "K=6, no memory": (80.15, 85.32, 92.78),
    "K=6, no spans": (80.61, 85.49, 93.12), "K=6, forwards alone": (80.65, 85.31, 92.66),
}  # fmt: skip
PARTS = {
    XLNET_6: {}, "K=6, no memory": {"objective.memory_length": 0}, "K=6, no spans": {"objective.unit": "token"},
    "K=6, forwards alone": {"objective.bidirectional": False},
}  # fmt: skip


def get_study(argument: str = "") -> Study:
    """The study at `full` (default), `small` or `tiny`."""
    scale = recipe.words(argument, recipes=("table6",), scales=tuple(TASKS)).scale or "full"
    tasks = TASKS[scale]
    words = "" if scale == "full" else f",documents,{scale}"
    rows = {"data.streams": 256} if scale == "full" else {}  # of a batch, so that memory goes on in the same row
    like = {"train.steps": 1_000_000, "data.length": 512, "evals.validation.batch_size": 256, "schedule.final_factor": 0.0} if scale == "full" else {}
    remembered = {"objective.memory_length": MEMORY[scale]}
    permuted = [Arm(XLNET, {"objective.partial": 7, **remembered, **rows})]
    permuted += [Arm(name, {"objective.partial": 6, **remembered, **rows, **changes}) for name, changes in PARTS.items()]
    masked = "experiments/recipes.py:xlnet_masked" + words
    metrics = [METRICS[task] for task in tasks]
    claimed = [(XLNET, DENOISING, ">"), (DENOISING, BERT, ">"), (XLNET, XLNET_6, "~"), *((XLNET_6, name, ">") for name in PARTS if name != XLNET_6)]
    return Study(
        claim="Permutation language modelling is better than masking, and its memory, its spans and its two directions each help.",
        paper=SOURCE,
        stages=(
            Stage("pretrain", recipe=f"experiments/recipes.py:xlnet{words}"),
            *(Stage(task, recipe=f"experiments/recipes.py:{task},{scale}", after="pretrain") for task in tasks),
        ),
        arms=(*permuted, Arm(DENOISING, recipes={"pretrain": masked}), Arm(BERT, like, recipes={"pretrain": f"experiments/recipes.py:bert{',mlm' if words else ''}{words}"})),
        base=XLNET,
        differs=("objective.*", "model.*", "data.streams", "tokenizer.*", "optimizer.*"),
        seeds=(0, 1, 2),
        metrics=metrics,
        published=[
            Published(arm, METRICS[task].name, value, source=SOURCE) for arm, row in TABLE.items() for task, value in zip(COLUMNS, row, strict=True) if task in tasks
        ],
        orderings=[
            Ordering(better=better, worse=worse, metric=metric.name, relation=relation, source="section 3.4") for metric in metrics for better, worse, relation in claimed
        ],
    )

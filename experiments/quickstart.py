"""A first study: does it matter where the layer norms of a Transformer stand? Two arms, three seeds, text that every Python carries: nothing is downloaded.

    ptm study experiments/quickstart.py --workdir=runs/study --dry_run     # what would be run
    ptm study experiments/quickstart.py --workdir=runs/study               # minutes on 2 cores; started again it goes on
    ptm report runs/study

Xiong et al. 2020 (On Layer Normalization in the Transformer Architecture, section 4) find that with norms inside the residual branches, as in GPT-2, a
model trains well at rates, and without a long warm-up, that one with norms after each residual, as in GPT, does not stand. Here: small decoders on
bytes, the same rate and warm-up for both. It shows the ordering at that rate alone: at 5e-4 in place of 3e-3
(--config.pretrain.optimizer.learning_rate=5e-4, seed 0) the post-norm arm ends at 3.11 nats a byte instead of 3.29.

Measured on one core of a 2-core machine, all six runs in less than 3 minutes: pre-norm 2.81, 3.04, 2.82, post-norm 3.29, 3.33, 3.28.
"""

from ptm import recipe
from ptm.study import Arm, Metric, Ordering, Stage, Study


def get_study(argument: str = "") -> Study:
    """The study; `tiny` makes its six runs a smoke test of seconds each."""
    words = recipe.words(argument, recipes=("full", "small", "tiny"))
    shape = {"model.num_layers": 3, "model.width": 128, "model.num_heads": 4, "tokenizer.kind": "bytes", "data.length": 96}
    length = {"train.steps": 200, "train.batch_size": 16, "schedule.warmup_steps": 5, "evals.validation.every": 50, "checkpoint.every": 100, "log.every": 10}
    scaled = {} if words.recipe == "tiny" else {**shape, **length, "optimizer.learning_rate": 3e-3, "evals.validation.batches": 20}
    return Study(
        claim="At a high rate with hardly any warm-up, norms inside the residual branches train to a lower loss than norms after them.",
        paper="Xiong et al. 2020, section 4",
        stages=(Stage("pretrain", recipe=f"configs/quickstart.py:gpt{',tiny' if words.recipe == 'tiny' else ''}", overrides=scaled),),
        arms=(Arm("pre-norm"), Arm("post-norm", {"model.prenorm": False})),
        base="pre-norm",
        differs=("model.prenorm",),
        seeds=(0, 1, 2),
        metrics=(Metric("pretrain:validation/loss", higher=False, label="validation loss, nats a byte"),),
        orderings=(Ordering(better="pre-norm", worse="post-norm", metric="pretrain:validation/loss", source="section 4.2"),),
    )

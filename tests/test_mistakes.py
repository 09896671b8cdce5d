"""Mistakes in what a person asks for: each is refused at once, with the key, what was given and what is allowed, and nothing is begun."""

import time

import pytest
from ledger import tell

from ptm import cli

GPT, BERT, T5, XLNET, TEXT = (
    f"configs/{name}" for name in ("quickstart.py:gpt,tiny", "quickstart.py:bert,tiny", "quickstart.py:t5,tiny", "quickstart.py:xlnet,tiny", "finetune/text.py")
)

MISTAKES = [  # recipe, overrides (without --config.), what the message must hold
    # Names.
    (GPT, "train.stpes=5", "train.stpes", "Did you mean 'train.steps'"),
    (GPT, "trian.steps=5", "trian.steps", "Did you mean 'train.steps'"),
    (GPT, "model.num_head=4", "model.num_head", "Did you mean 'model.num_heads'"),
    (GPT, "evals.validation.evry=3", "evals.validation.evry", "Did you mean 'evals.validation.every'"),
    (GPT, "evals.test.every=3", "evals.test.every", "evals.validation.every"),
    (BERT, "objective.rates=0.1", "objective.rates", "Did you mean 'objective.rate'"),
    (BERT, "objective.name=mlmm", "objective.name", "Choose it in the recipe"),
    (BERT, "model.name=brt", "model.name", "Choose it in the recipe"),
    (GPT, "train=3", "train is a section", "train.steps"),
    (GPT, "optimizer.name=adam", "'adam'", "Known: adafactor, adamw", "Did you mean 'adamw'"),
    (GPT, "schedule.name=cosin", "'cosin'", "Known: constant, cosine"),
    (GPT, "tokenizer.kind=worpiece", "'worpiece'", "Did you mean 'wordpiece'"),
    (GPT, "log.writers=tensorbord", "'tensorbord'", "Did you mean 'tensorboard'"),
    (GPT, "mesh.preset=fsdp2", "'fsdp2'", "Known: dp, fsdp"),
    (GPT, "model.activation=gelo", "model.activation=gelo", "allowed: relu, gelu"),
    (GPT, "compute.remat=some", "compute.remat=some", "allowed: none, dots, full, auto"),
    (GPT, "compute.dtype=float8", "compute.dtype=float8", "allowed: float32, bfloat16"),
    (GPT, "compute.attention=flash3", "compute.attention=flash3", "allowed: auto, xla"),
    (GPT, "checkpoint.mode=lowest", "checkpoint.mode=lowest", "allowed: min, max"),
    (GPT, "checkpoint.metric=valid/loss", "checkpoint.metric=valid/loss", "one of: validation"),
    (GPT, "data.packing=firstfit", "data.packing=firstfit", "Did you mean 'first_fit'"),
    (GPT, "data.document=page", "data.document=page", "allowed: line, paragraph, file"),
    (GPT, "tokenizer.algorithm=wordpiece", "tokenizer.algorithm=wordpiece", "allowed: unigram, bpe"),
    ("configs/quikstart.py", "", "configs/quikstart.py", "Did you mean 'quickstart.py'"),
    ("configs/quickstart.py:bret", "", "'bret'", "Recipes: gpt", "Did you mean 'bert'"),
    ("configs/quickstart.py:gpt,mlmm", "", "'mlmm'", "Objectives: causal", "Did you mean 'mlm'"),
    ("configs/quickstart.py:gpt,tiny,tiny2", "", "'tiny2'", "Scales: tiny"),
    # Types.
    (GPT, "train.steps=five", "train.steps=five", "allowed: int"),
    (GPT, "train.steps=1.5", "train.steps=1.5", "allowed: int"),
    (GPT, "train.steps=", "train.steps=", "allowed: int"),
    (GPT, "train.steps", "--config.train.steps has no value"),
    (GPT, "optimizer.learning_rate=fast", "optimizer.learning_rate=fast", "allowed: float"),
    (GPT, "optimizer.weight_decay=nan", "optimizer.weight_decay=nan", "finite"),
    (GPT, "seed=x", "seed=x", "allowed: int"),
    # Ranges.
    (GPT, "train.steps=-1", "train.steps=-1", "1 or more steps"),
    (GPT, "train.batch_size=0", "train.batch_size=0", "1 or more rows"),
    (GPT, "train.ema_decay=1.5", "train.ema_decay=1.5", "0.0 to 1.0"),
    (GPT, "train.skip_window=1", "train.skip_window=1", "2 or more"),
    (GPT, "model.num_layers=0", "model.num_layers=0", "1 to 4096"),
    (GPT, "model.dropout=2", "model.dropout=2", "0.0 to 1.0"),
    (GPT, "optimizer.learning_rate=-1", "optimizer.learning_rate=-1", "0.0 or more"),
    (GPT, "data.length=0", "data.length=0", "2 or more tokens"),
    (GPT, "data.holdout=2", "data.holdout=2", "0.0 to 0.5"),
    (GPT, "checkpoint.every=0", "checkpoint.every=0", "1 or more steps"),
    (GPT, "checkpoint.keep_latest=0", "checkpoint.keep_latest=0", "1 or more checkpoints"),
    (GPT, "evals.validation.batch_size=0", "evals.validation.batch_size=0", "1 or more rows"),
    (GPT, "seed=-5", "seed=-5", "0 to 2147483647"),
    (BERT, "objective.rate=1.5", "objective.rate=1.5", "0.0 to 1.0"),
    (BERT, "lora.rank=-1", "lora.rank=-1", "1 or more"),
    (T5, "objective.mean_span=0", "objective.mean_span=0", "1.0 or more"),
    (XLNET, "objective.memory_length=-3", "objective.memory_length=-3", "0 or more"),
    (XLNET, "objective.partial=0", "objective.partial=0", "2 or more"),
    # What does not fit together.
    (GPT, "train.microbatches=3", "train.microbatches=3", "train.batch_size=8", "allowed: 1, 2, 4, 8"),
    (GPT, "data.streams=3", "data.streams=3", "train.batch_size=8", "allowed: 1, 2, 4, 8"),
    (GPT, "model.width=100 model.num_heads=3", "model.num_heads=3", "model.width=100", "that fit"),
    (GPT, "schedule.warmup_steps=100000", "schedule.warmup_steps=100000", "allowed: 0 to 19"),
    (GPT, "data.length=100000", "data.length=100000", "model.max_length=32"),
    (GPT, "data.weights=1,2,3", "data.weights=1.0,2.0,3.0", "data.source"),
    (GPT, "data.weight_schedule=0=1:2", "data.weight_schedule=0=1:2", "one weight for each of the 1"),
    (GPT, "data.weight_schedule=0=1,5", "'5' is not of the form STEP=W:W"),
    (GPT, "data.weight_schedule=5=1", "'5=1'", "steps that begin with 0"),
    (GPT, "data.weight_schedule=0=1 data.weights=1", "say the same in two ways"),
    (GPT, "data.max_epochs=1,2", "data.max_epochs=1.0,2.0", "one number"),
    (GPT, "data.max_epochs=-1", "data.max_epochs=-1.0", "0.0 to 1000000.0"),
    (GPT, "data.max_epochs=1e308", "data.max_epochs=1e+308", "0.0 to 1000000.0"),
    (GPT, "data.weight_change=linear", "data.weight_change=linear", "data.weight_schedule"),
    (GPT, "train.batch_schedule=0=8,12=4", "train.batch_schedule=0=8,12=4 at step 12", "mesh"),
    (GPT, "train.batch_schedule=0=4,10=16", "train.batch_size=8", "--config.train.batch_size=16"),
    (GPT, "train.batch_schedule=0=4,10=8 train.microbatches=8", "train.microbatches=8 does not divide 4 rows, train.batch_schedule", "allowed: 1, 2, 4"),
    (GPT, "train.batch_schedule=0=0,5=8", "'0=0' is not of the form STEP=SIZE"),
    (GPT, "data.length_schedule=0=16,5=8,9=32", "data.length_schedule=0=16,5=8,9=32", "lengths that rise"),
    (GPT, "data.length_schedule=0=16", "with data.length=32", "lengths that rise up to data.length"),
    (XLNET, "data.length_schedule=0=16,5=32 objective.memory_length=8", "data.length_schedule", "objective.memory_length=8"),
    (GPT, "data.size_limit=100", "data.size_limit=100", "data.temperature=1"),
    (GPT, "log.profile=5", "log.profile=5", "FIRST,LAST"),
    (GPT, "mesh.fsdp=3", "'fsdp': 3", "--config.mesh.AXIS"),
    (T5, "tokenizer.sentinels=1", "1 sentinels", "--config.tokenizer.sentinels=2"),
    # What is not there.
    (GPT, "data.source=text:/nowhere/*.txt", "text:/nowhere/*.txt", "matches no file"),
    (GPT, "data.source=/nowhere", "data.source=/nowhere", "FORMAT:PATH"),
    (GPT, "data.source=txt:corpus.txt", "'txt'", "Did you mean 'text'"),
    (GPT, "data.columns=text", "data.columns=text", "FIELD=COLUMN"),
    (GPT, "tokenizer.kind=file", "tokenizer kind 'file'", "give path="),
    (GPT, "tokenizer.path=/nowhere/vocab", "path='/nowhere/vocab'", "leave out"),
    (GPT, "init=ckpt:/nowhere", "there is no folder '/nowhere'"),
    (GPT, "init=hf:/nowhere", "there is no folder '/nowhere'"),
    (GPT, "init=somewhere", "init=somewhere", "allowed: scratch, ckpt:DIR"),
    (GPT, "optimizer.freeze=nosuch", "optimizer.freeze: 'nosuch'", "nearest: "),
    (GPT, "optimizer.freeze=(", "optimizer.freeze: '('", "is not a regular expression", "Example"),
    (TEXT, "", "--config.init=ckpt:DIR"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """What the first run of a process imports."""
    cli.main(["train", f"--config={GPT}", f"--workdir={tmp_path_factory.mktemp('first')}", "--config.mesh.fsdp=3"])


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"), [(recipe, words, told) for recipe, words, *told in MISTAKES], ids=[f"{m[0].partition(':')[2]} {m[1]}" for m in MISTAKES]
)
def test_a_mistake_is_told(recipe, overrides, told, tmp_path, capsys, record_property):
    tell(record_property, "7. wrong configs")
    begun = time.process_time()
    code = cli.main(["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *(f"--config.{word}" for word in overrides.split())])
    took, error = time.process_time() - begun, capsys.readouterr().err
    assert code == 2 and error.startswith("ptm: ") and error.count("\n") == 1, error
    assert all(part in error for part in told), error
    assert not (tmp_path / "run/ckpt").exists() and not (tmp_path / "run/metrics.jsonl").exists()
    assert took < 2, f"{took:.1f} s of CPU"

"""Named entities: CoNLL-2003 (Tjong Kim Sang and De Meulder 2003), Wikigold (Balasuriya et al. 2009), Chinese MSRA (Levow 2006), or your own.

    PTM_NER=DIR ptm train --config=configs/finetune/ner.py:conll2003 --config.init=hf:DIR --workdir=runs/conll2003
    PTM_DATA=DIR ptm train --config=configs/finetune/ner.py:wikigold --config.init=hf:DIR --workdir=runs/wikigold
    ptm train --config=configs/finetune/ner.py --config.init=hf:DIR --config.data.source=conll:train.txt --config.data.validation_source=conll:dev.txt ...

Words: conll2003 (default), of PTM_NER the files eng.train and eng.testa; wikigold, $PTM_DATA/tag/wikigold, a tenth of its sentences held out; chinese, of
PTM_NER msra_train_bio.txt and msra_test_bio.txt, a character and its tag a line; tiny, a smoke run on invented sentences. Tags may be in IOB1, IOB2,
IOBES or BILOU. Another file is answered too by an eval of its own: `ptm evaluate` with --config.evals.dev.source=conll:eng.testb.

Rate 5e-5, 3 epochs (wikigold 10), 32 sentences a step, warm-up over 10 % (Devlin et al. 2019, A.3 and section 5.3). Entity F1 by seqeval's rules.
Published: BERT-base 96.4 on CoNLL-2003 dev, which reads the sentence's document around it, as this does not; MSRA 95.4 (test). Not run at these sizes here.
"""

import os
from pathlib import Path

from ptm import config, recipe
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Train
from ptm.evals import task
from ptm.models import bert
from ptm.objectives import tag

MINIATURES = Path(__file__).resolve().parents[2] / "tests/data/tasks/ner"
LENGTH = 128
SENTENCES = 32  # of a step
# Files of training and validation (none: a part is held out), sentences, mean tokens, epochs.
SETS = {
    "conll2003": ("$PTM_NER/eng.train", "$PTM_NER/eng.testa", 14_041, 22, 3),
    "wikigold": ("$PTM_DATA/tag/wikigold/wikigold.conll.txt", "", 1526, 28, 10),
    "chinese": ("$PTM_NER/msra_train_bio.txt", "$PTM_NER/msra_test_bio.txt", 46_364, 49, 3),
}


def get_config(argument: str = ""):
    """The config of a set (default conll2003); `tiny` makes it a smoke run."""
    chosen, _, scale = recipe.words(argument, recipes=tuple(SETS))
    train, dev, sentences, tokens, epochs = SETS[chosen]
    if scale:
        train, dev = (str(MINIATURES / os.path.basename(file)) if file else file for file in (train, dev))
    rows = max(1, round(SENTENCES * tokens / LENGTH))
    epoch = max(1, round(sentences * tokens / (rows * LENGTH)))
    cfg = config.base(
        objective=tag.Config(),
        evals={"dev": task.Config(every=epoch)},
        train=Train(steps=epochs * epoch, batch_size=rows),
        data=Data(
            source=(os.path.expandvars(f"conll:{train}"),), validation_source=(os.path.expandvars(f"conll:{dev}"),) if dev else (),
            holdout=0.5 if scale else 0.1, columns=("text=text", "words=words", "tags=tags"), length=LENGTH,
        ),
        optimizer=Optimizer(learning_rate=5e-5, weight_decay=0.01, eps=1e-6),
        schedule=Schedule(name="linear", warmup_steps=epochs * epoch // 10),
        checkpoint=Checkpoint(every=epoch, metric="dev/f1", mode="max"),
        log=Log(every=20),
    )  # fmt: skip
    return recipe.tiny(cfg, model=bert.BertConfig(max_length=LENGTH, dropout=0.0, attention_dropout=0.0), length=LENGTH) if scale else cfg

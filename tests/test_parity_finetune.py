"""Fine-tuning beside the reference library: the same parameters, texts and hyperparameters must give the same 50 losses, and nearly the same model.

Needs torch and transformers (`pip install -e .[parity]`; pytest -m parity). Ours is the run's own compiled step on the batches of its own loader; the reference
starts from what `ptm convert` writes, reads one text a row, padded, whatever ours packs, and takes its own classes, losses and schedule, with torch's AdamW.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import runs

from ptm import config, convert, hf, tree
from ptm import run as run_lib
from ptm.config import Data, Optimizer, Schedule, Tokenizer, Train
from ptm.models import bert, gpt, t5
from ptm.objectives import causal, classify, seq2seq, span_qa, tag

pytestmark = pytest.mark.parity
STEPS, ROWS, LENGTH = 50, 8, 64
TOLERANCE = 1e-3  # of a loss
IGNORED = -100  # the reference's label of what is not counted
SHAPE = {"num_layers": 2, "width": 64, "num_heads": 4, "dropout": 0.0, "init_std": 0.05}
BERT = bert.BertConfig(**SHAPE, attention_dropout=0.0, max_length=LENGTH)
GPT2 = gpt.Config(**SHAPE, attention_dropout=0.0, max_length=LENGTH + 1)  # the reference reads the last target too
T5 = t5.Config(num_layers=2, width=64, num_heads=4, head_dim=16, mlp_width=128, dropout=0.0)


def records(count: int) -> list[dict[str, Any]]:
    """Records with the fields of all tasks, of unequal length, whose answers follow from their words."""
    rng, found = random.Random(0), []
    for _ in range(count):
        words, others = (rng.choices(runs.WORDS, k=rng.randint(1, 5)) for _ in range(2))
        context = " ".join(rng.choices(runs.WORDS, k=rng.randint(4, 12)))
        asked = rng.choice(context.split())
        found.append({
            "text": " ".join(words), "pair": " ".join(others), "label": "long" if len(words) > len(others) else "short", "words": words,
            "tags": ["B-LONG" if len(word) > 3 else "O" for word in words], "target": " ".join(word[:2] for word in words),
            "question": asked, "context": context,
            "answers": [{"text": asked, "answer_start": f" {context} ".index(f" {asked} ")}] if rng.random() < 0.8 else [],
        })  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """A task of ours, the columns that it reads, and the loss of the reference's `model` on the texts of a batch."""

    model: Any
    objective: Any
    columns: tuple[str, ...]
    loss: Callable[[Any, list[dict[str, np.ndarray]]], Any]


def padded(texts: list[dict[str, np.ndarray]], name: str, pad: int = 0) -> Any:
    """One field of the texts as a tensor of rows."""
    import torch

    rows = [torch.from_numpy(text[name].astype(np.int64)) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def real(texts: list[dict[str, np.ndarray]], name: str) -> Any:
    """The attention mask that goes with a field."""
    return padded([{name: np.ones(len(text[name]))} for text in texts], name)


def sides(texts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What an encoder reads."""
    return {"input_ids": padded(texts, "tokens"), "attention_mask": real(texts, "tokens"), "token_type_ids": padded(texts, "types")}


def classify_loss(model: Any, texts: list[dict[str, np.ndarray]]) -> Any:
    return model(**sides(texts), labels=padded(texts, "label")[:, 0]).loss


def tag_loss(model: Any, texts: list[dict[str, np.ndarray]]) -> Any:
    labels = padded(texts, "label", IGNORED)
    return model(**sides(texts), labels=labels.masked_fill(labels < 0, IGNORED)).loss


def causal_loss(model: Any, texts: list[dict[str, np.ndarray]]) -> Any:
    """The reference moves labels by one position itself."""
    whole = [{"whole": np.append(text["tokens"], text["targets"][-1])} for text in texts]
    return model(padded(whole, "whole"), attention_mask=real(whole, "whole"), labels=padded(whole, "whole", IGNORED)).loss


def seq2seq_loss(model: Any, texts: list[dict[str, np.ndarray]]) -> Any:
    inputs = {"input_ids": padded(texts, "inputs"), "attention_mask": real(texts, "inputs")}
    return model(**inputs, decoder_input_ids=padded(texts, "tokens"), labels=padded(texts, "targets", IGNORED)).loss


def span_loss(model: Any, texts: list[dict[str, np.ndarray]]) -> Any:
    """As the reference's own, but that its softmax goes over the padding of a row too."""
    import torch

    asked = [text for text in texts if text["start"].any()]
    out, seen = model(**sides(asked)), real(asked, "tokens") > 0
    losses = [
        torch.nn.functional.cross_entropy(out[f"{name}_logits"].masked_fill(~seen, -torch.inf), padded(asked, name).argmax(dim=1)) for name in ("start", "end")
    ]
    return sum(losses) / 2


CASES = {
    "bert_classify": Case(BERT, classify.Config(labels=("long", "short")), ("text=text", "pair=pair", "label=label"), classify_loss),
    "bert_tag": Case(BERT, tag.Config(labels=("O", "B-LONG", "I-LONG")), ("text=text", "words=words", "tags=tags"), tag_loss),
    "bert_span_qa": Case(BERT, span_qa.Config(max_question=12, doc_stride=32), ("text=question", "context=context", "answers=answers"), span_loss),
    "gpt2_causal": Case(GPT2, causal.Config(), ("text=context",), causal_loss),
    "t5_seq2seq": Case(T5, seq2seq.Config(input_length=LENGTH), ("text=text", "target=target"), seq2seq_loss),
}


def texts_of(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The texts of packed rows one by one: their fields without dimensions, and of what is said of a text as a whole one value."""
    found = []
    for row in range(len(batch["segments_BL"])):
        fields = {name: value[row] for name, value in batch.items()}
        for segment in range(1, fields["segments_BL"].max() + 1):
            sides = {"_BL": fields["segments_BL"] == segment, "_BI": fields["input_segments_BI"] == segment if "input_segments_BI" in fields else None}
            text = {name[:-3]: value[sides[name[-3:]]] for name, value in fields.items() if name[-3:] in sides}
            if "index_BS" in fields:
                own = np.isin(fields["index_BS"], np.flatnonzero(sides["_BL"]))
                text |= {name[:-3]: value[own] for name, value in fields.items() if name.endswith("_BS")}
            found.append(text)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(600)), encoding="utf-8")
    return f"jsonl:{path}"


def exported(run: run_lib.Run, params: Any, folder: Any) -> Any:
    """The reference's model of a run's parameters, as `ptm convert` writes them."""
    import torch
    import transformers

    workdir = folder / "run"
    (workdir / "config.json").write_text(json.dumps(config.to_dict(run.config)))
    with run_lib.open_checkpoints(run, workdir / "ckpt") as checkpoints:
        checkpoints.save(0, {"params": params}, streams={}, meta={"step": 0, "tokenizer": run.tokenizer.fingerprint})
    assert convert.convert(f"ckpt:{workdir}", f"hf:{folder}/before")
    (name,) = json.loads((folder / "before/config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder / "before", dtype=torch.float32).train()


@pytest.mark.parametrize(("name", "packing"), [*((name, "default") for name in CASES), ("bert_classify", "none")])
def test_same_fine_tuning(name, packing, source, tmp_path):
    """Each of 50 losses within 1e-3, and parameters that differ by little of what they have moved."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    case, options = CASES[name], Optimizer(learning_rate=1e-3, weight_decay=0.1, eps=1e-6)
    (tmp_path / "run").mkdir()
    cfg = config.base(
        model=case.model, objective=case.objective, evals={}, train=Train(steps=STEPS, batch_size=ROWS),
        data=Data(source=(source,), columns=case.columns, length=LENGTH, packing=packing, holdout=0.0, validation_source=(source,)),
        tokenizer=Tokenizer(kind="bytes"), optimizer=options, schedule=Schedule(name="linear", warmup_steps=5),
    )  # fmt: skip
    run = run_lib.setup(cfg, workdir=tmp_path / "run", devices=jax.devices()[:1])
    params = run.init_params()
    model = exported(run, params, tmp_path)

    spared = re.compile("|".join(options.no_decay))
    assert all(run.optimizer.decayed[path] == (spared.fullmatch(path) is None) for path in tree.paths(params))
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.b1, options.b2), eps=options.eps)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, STEPS)

    state, ours, theirs, counts, clipped = run.init_state(params), [], [], [], 0
    loader = run.loader()
    for _ in range(STEPS):
        batch = next(loader)
        state, metrics = run.train_step(state, run.to_device(batch, batch_size=ROWS, rows=list(range(ROWS))))
        texts = texts_of(batch)
        optimizer.zero_grad()
        loss = case.loss(model, texts)
        loss.backward()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm).item() > options.clip_norm
        optimizer.step()
        schedule.step()
        ours.append(float(metrics["loss"]))
        theirs.append(loss.item())
        counts.append(len(texts))
    loader.close()

    model.save_pretrained(tmp_path / "after")
    expected, actual, start = (tree.paths(jax.device_get(x)) for x in (hf.read(tmp_path / "after").params, state["params"], params))
    compared = {path: leaf for path, leaf in expected.items() if not path.endswith("key/bias")}  # which changes no weight of attention
    differing = {path: np.linalg.norm(actual[path] - leaf) for path, leaf in compared.items()}
    moved = np.sqrt(sum(np.sum(np.square(leaf - start[path])) for path, leaf in expected.items()))
    largest, share = max(abs(a - b) for a, b in zip(ours, theirs)), np.sqrt(sum(value**2 for value in differing.values())) / moved
    worst = max(np.max(np.abs(actual[path] - expected[path])) for path in differing)
    print(
        f"{name} {packing}: {np.mean(counts):.1f} texts in {ROWS} rows, loss {theirs[0]:.4f} -> {theirs[-1]:.4f}, largest difference {largest:.1e}; "
        f"parameters: largest {worst:.1e}, of the distance moved {share:.1e}; {clipped} steps clipped"
    )
    assert largest < TOLERANCE and share < 1e-2
    assert np.mean(theirs[-5:]) < 0.9 * theirs[0] and clipped > 0, "there is something to learn, and gradients to clip"
    assert set(counts) == {ROWS} if packing == "none" else np.mean(counts) > 1.3 * ROWS

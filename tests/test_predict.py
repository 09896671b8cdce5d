"""`ptm predict`: every task against the functions below it, and lines that are good, bad or late."""

import dataclasses
import functools
import io
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import cli, config, text
from ptm import run as run_lib
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document
from ptm.evals import scoring
from ptm.fields import ConfigError
from ptm.generate import text as generation
from ptm.models import bert, electra, gpt, t5
from ptm.objectives import causal, choose, classify, mlm, regress, rtd, seq2seq, span_corruption, span_qa, tag
from ptm.predict import lines, options, tasks

SHAPE = {"num_layers": 1, "width": 16, "num_heads": 2}
PLAIN = {"dropout": 0.0, "attention_dropout": 0.0}
BERT = bert.BertConfig(**SHAPE, **PLAIN, max_length=64)
GPT = gpt.Config(**SHAPE, **PLAIN, max_length=96)
T5 = t5.Config(**SHAPE, head_dim=8, mlp_width=32, num_buckets=8, max_distance=20, dropout=0.0)
COLUMNS = {
    "tag": ("text=text", "words=words", "tags=tags"), "span_qa": ("text=question", "context=context", "answers=answers"), "regress": ("text=text", "label=label"),
    "choose": ("text=text", "choices.0=a", "choices.1=b", "label=label"), "answer": ("text=text", "target=target"), "reply": ("text=text", "target=reply"),
    "nli": ("text=premise: {premise}", "pair=hypothesis", "label={gold|0=no|1=yes}"),
}  # fmt: skip
KINDS = {
    "gpt": (GPT, causal.Config()),
    "bert": (BERT, mlm.Config()),
    "electra": (electra.Config(**SHAPE, **PLAIN, max_length=64, embed_width=8, generator_fraction=0.5), rtd.Config()),
    "t5": (T5, span_corruption.Config(input_length=64)),
    "nli": (BERT, classify.Config(labels=("no", "yes"))),
    "regress": (BERT, regress.Config()),
    "choose": (BERT, choose.Config(max_choices=2)),
    "tag": (BERT, tag.Config(labels=("O", "B-PER", "I-PER"))),
    "span_qa": (BERT, span_qa.Config(doc_stride=16, max_question=16)),
    "answer": (T5, seq2seq.Config(input_length=32, max_new_tokens=6, prefix="say: ")),
    "reply": (GPT, seq2seq.Config(max_new_tokens=6)),
}


@functools.cache
def loaded(model: str, **tokenizer):
    """(run, parameters) of an untrained model whose parameters are so large that its answers depend on what it reads."""
    shape, objective = KINDS[model]
    made = Tokenizer(**tokenizer) if tokenizer else Tokenizer(kind="bytes", sentinels=8 if model == "t5" else 0)
    cfg = config.base(
        model=shape, objective=objective, train=Train(batch_size=2), tokenizer=made,
        data=Data(length=96 if shape is GPT else 64, columns=COLUMNS[model] if model in COLUMNS else ("text=text",)),
    )  # fmt: skip
    run = run_lib.setup(cfg, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding), run.abstract_params)
    return dataclasses.replace(run, workdir=Path("runs/x")), params


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Answers to records, or to bytes, through the whole path but for the reading of a checkpoint."""

    def answers(model, task, given, *, batch_size=4, columns=(), **given_options):
        run, params = loaded(model) if isinstance(model, str) else model
        monkeypatch.setattr(tasks.weights, "load", lambda spec, devices: (run, params))
        sink = io.BytesIO()
        chosen = dataclasses.replace(options.parse(task, {}), **given_options)
        if isinstance(given, str):
            count, failed = tasks.predict("x", task=task, source=given, sink=sink, options=chosen, batch_size=batch_size, columns=columns)
        else:
            content = given if isinstance(given, bytes) else "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in given).encode()
            (tmp_path / "input").write_bytes(content)
            with open(tmp_path / "input", "rb") as source:
                count, failed = tasks.predict("x", task=task, source=source, sink=sink, options=chosen, batch_size=batch_size)
        found = [json.loads(line) for line in sink.getvalue().decode().splitlines()]
        assert count == len(found) and failed == sum("error" in answer for answer in found)
        return found

    return answers


TEXTS = ("a", "the small model", "which every word must learn to guess", "text " * 9, "Grüße, 世界", "x y z")


# Lines.


def read(*parts: bytes) -> list[list[lines.Line]]:
    """The lines of a pipe that a writer fills with one part after the other."""
    reader, writer = os.pipe()

    def write() -> None:
        with open(writer, "wb", buffering=0) as file:
            for part in parts:
                file.write(part)

    thread = threading.Thread(target=write)
    thread.start()
    with open(reader, "rb") as file:
        found = list(lines.arrived(file))
    thread.join()
    return found


def test_lines_are_the_same_in_whatever_parts_they_arrive():
    content = b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}\r\n' + '{"text": "世界"}\n'.encode() + b'{"n": 1}'
    expected = [(1, {"text": "a"}), (4, {"text": "b"}), (5, {"text": "世界"}), (6, {"n": 1})]
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(content)), rng.randint(0, 6)))
        parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)])]
        assert [(line.number, line.record) for chunk in read(*parts) for line in chunk if line.error is None] == expected
    assert read() == read(b"\n \n") == []


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(lines, "LARGEST", 100)
    assert len(read(b'{"text": "' + b"x" * 80 + b'"}\n')) == 1
    with pytest.raises(ConfigError, match="line 2 of the input is longer"):
        read(b"{}\n" + b"x" * 200)


BAD = {
    b"no json": "not JSON in UTF-8",
    b'{"text": "a"': "not JSON in UTF-8",
    b'{"text": "\xff\xfe"}': "not JSON in UTF-8",
    b'{"text": "\\ud800"}': "surrogates not allowed",
    b'{"text": NaN}': "NaN is no number",
    b"[" * 100_000: "not JSON in UTF-8",
    b'["a"]': "a list, not an object",
    b"null": "null, not an object",
    b'{"words": "a"}': "no field 'text'; it has: words",
    b"{}": "no field 'text'; it has: none",
    b'{"text": 3}': "field 'text' is '3', not text",
    b'{"text": null}': "not text",
    b'{"text": "  "}': "not text",
    b'{"text": "a", "id": 1e999}': "not finite",
}


def test_bad_lines_are_told_by_number_and_the_others_answered(ask, capsys):
    good = b'{"text": "a model", "id": ["x", 1]}'
    content = b"\n".join(line for bad in BAD for line in (good, bad))
    found = ask("gpt", "score", content)
    assert [answer["line"] for answer in found] == list(range(1, 1 + 2 * len(BAD)))
    for answer, message in zip(found[1::2], BAD.values(), strict=True):
        assert message in answer["error"] and set(answer) <= {"line", "id", "error"}
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in told] == [f"line {n}" for n in range(2, 1 + 2 * len(BAD), 2)]
    assert len({json.dumps(answer | {"line": 0}) for answer in found[::2]}) == 1 and found[0]["id"] == ["x", 1]


# Tasks on text.


def test_score_is_that_of_scoring(ask):
    run, params = loaded("gpt")
    expected = list(scoring.log_likelihoods(run, params, [*TEXTS, ("the small", " model")], batch_size=4))
    found = ask("gpt", "score", [*({"text": t} for t in TEXTS), {"context": "the small", "continuation": " model"}], pieces=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["log_likelihood"] == pytest.approx(theirs.total, abs=1e-5) and ours["tokens"] == len(theirs.tokens) == len(ours["pieces"])
        assert ours["log_probs"] == pytest.approx(theirs.log_probs.tolist(), abs=1e-5) and ours["per_token"] == pytest.approx(theirs.total / len(theirs.tokens), abs=1e-5)
        assert ours["greedy"] == bool(theirs.greedy.all())
    assert found[-1]["pieces"] == list(" model") or found[-1]["tokens"] == 6


def test_score_of_encoders_and_encoder_decoders(ask):
    run, params = loaded("bert")
    (expected,) = scoring.log_likelihoods(run, params, ["a model"], batch_size=4)
    (by_word,) = scoring.log_likelihoods(run, params, ["a model"], batch_size=4, by_word=True)
    assert ask("bert", "score", [{"text": "a model"}])[0]["log_likelihood"] == pytest.approx(expected.total, abs=1e-5)
    assert ask("bert", "score", [{"text": "a model"}], by_word=True)[0]["log_likelihood"] == pytest.approx(by_word.total, abs=1e-5) != pytest.approx(expected.total)
    found = ask("t5", "score", [{"text": "alone"}, {"context": "a", "continuation": "b"}, {"context": "a", "continuation": "b" * 65}, {"continuation": "b"}])
    assert "give both" in found[0]["error"] and found[1]["tokens"] == 1 and "Give it in parts" in found[2]["error"] and "no field 'context'" in found[3]["error"]


SETTINGS = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}  # one program for all that generate
PROMPTS = ("a", "the sm", "which e", "every word mu")


def test_generate_is_complete(ask):
    run, params = loaded("gpt")
    expected = list(generation.complete(run.model, params, run.tokenizer, PROMPTS, options=options.Generate(**SETTINGS), batch_size=4))
    found = ask("gpt", "generate", [{"text": t, "id": n} for n, t in enumerate(PROMPTS)], **SETTINGS)
    assert found == [{"line": n + 1, "id": n, "text": made.text, "ended": made.ended} for n, (made,) in enumerate(expected)]
    assert len({answer["text"] for answer in found}) > 1
    whole = found[0]["text"]
    at = whole[len(whole) // 2]
    cut = ask("gpt", "generate", [{"text": t} for t in PROMPTS], **SETTINGS, stop=(at,))[0]
    assert cut["text"] == whole[: whole.index(at)] and cut["ended"] == "stop"
    assert options.parse("generate", {"stop": r"\n\n,a b"}).stop == ("\n\n", "a b")


@pytest.fixture
def spoken(monkeypatch):
    """Prompts as they are written down, by number; what is said to each, instead of what a model would say, is a plain text model's, which goes on with the next turn."""
    asked, said = {}, generation.Completion(" Fine.\nuser: And you?", [1, 2], -1.0, "length")

    def complete(self, rows, *, batch_size):
        for row in rows:
            asked[row.number] = row.tokens
            places = [at for stop in self.options.stop if (at := said.text.find(stop)) >= 0]
            yield [said._replace(text=said.text[: min(places)], ended="stop") if places else said] * self.options.n_best

    monkeypatch.setattr(generation.Writer, "complete", complete)
    return asked


def test_a_reply_ends_at_the_next_turn(ask, spoken):
    """Texts of the same input do not end there."""
    tokenizer = loaded("gpt")[0].tokenizer
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How are you?"}]
    found = ask("gpt", "generate", [{"messages": talk}, {"text": "user:"}, {"messages": talk[1:]}], max_new_tokens=24)
    assert [answer["text"] for answer in found] == ["Fine.", " Fine.\nuser: And you?", "Fine."]
    assert [tokenizer.decode(spoken[n]) for n in range(3)] == ["system: Be kind.\nuser: How are you?\nassistant:", "user:", "user: How are you?\nassistant:"]
    bad = [{"messages": []}, {"messages": "hello"}, {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 3}]}]
    for answer, message in zip(ask("gpt", "generate", bad, max_new_tokens=8), ["at least one", "a list of turns", "a turn is", "a turn is"], strict=True):
        assert message in answer["error"]


def test_what_is_told_of_a_text(ask, spoken):
    one = {"text": " Fine.\nuser: And you?", "ended": "length", "token_ids": [1, 2], "score": -1.0}
    assert ask("gpt", "generate", [{"text": "a"}], **SETTINGS, token_ids=True) == [{"line": 1, **one}]
    assert ask("gpt", "generate", [{"text": "a"}], **SETTINGS, n_best=2, token_ids=True) == [{"line": 1, "texts": [one, one]}]
    found = ask("gpt", "generate", [{"text": "x" * 90}, {"text": "x"}], **SETTINGS)
    assert "prompt 1 has 90 tokens; 83 fit" in found[0]["error"] and "too_long=cut" in found[0]["error"] and "text" in found[1]
    assert "text" in ask("gpt", "generate", [{"text": "x" * 90}], **SETTINGS, too_long="cut")[0] and len(spoken[0]) == 84


@pytest.mark.parametrize("kind", ["answer", "reply"])
def test_prompts_are_written_as_text_to_text_was_trained(ask, spoken, kind):
    """With the prefix and the frame of the objective."""
    run, _ = loaded(kind)
    ask(kind, "generate", [{"text": "a b"}], max_new_tokens=6)
    (example,) = run.objective.features(Document("x", run.tokenizer.encode("a b")), rng=None, draw=None)
    expected = example["inputs_BI"] if kind == "answer" else example["tokens_BL"]
    assert spoken[0].tolist() == expected.tolist() and (kind == "reply" or run.tokenizer.decode(spoken[0]) == "say: a b")


WORDPIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] Paris is the capital of france . 巴 黎 是 法 国 的 首 都 ##s"


@functools.cache
def vocabulary(kind: str, folder: Path) -> str:
    """Files of a small vocabulary: wordpiece of WORDPIECES, or byte-level BPE with <mask> and the piece ' capital'."""
    if kind == "wordpiece":
        (folder / "vocab.txt").write_text("\n".join(WORDPIECES.split()) + "\n", encoding="utf-8")
        return str(folder)
    made = text.make("bpe", texts=[" capital"] * 50, vocab_size=256 + 7 + 7)
    made.save(str(folder / "bpe"))
    return str(folder / "bpe")


def forced(model: str, piece: str, **tokenizer):
    """A model that fills blanks with one piece."""
    run, params = loaded(model, **tokenizer)
    (number,) = [i for i in range(run.tokenizer.vocab_size) if run.tokenizer.pieces([i])[0] == piece]
    head = params["mlm_head"]
    bias = next(name for name in head if name.endswith("bias") and head[name].shape == (run.model.config.vocab_size,))
    return run, {**params, "mlm_head": {**head, bias: head[bias].at[number].add(100.0)}}


def test_fill_mask_in_words(ask, tmp_path):
    path = vocabulary("wordpiece", tmp_path)
    english = ask(forced("bert", "capital", kind="wordpiece", path=path), "fill-mask", [{"text": "Paris is the [MASK] of france.", "id": "p"}], top_k=1)
    assert english == [{"line": 1, "id": "p", "blanks": [[{"piece": "capital", "probability": 1.0}]], "text": "Paris is the capital of france."}]
    (chinese,) = ask(forced("bert", "国", kind="wordpiece", path=path), "fill-mask", [{"text": "巴黎是法[MASK]的首都"}], top_k=2)
    assert chinese["text"] == "巴黎是法国的首都" and [found["piece"] for found in chinese["blanks"][0]][0] == "国"
    ending = ask(forced("electra", "##s", kind="wordpiece", path=path), "fill-mask", [{"text": "the capital _"}, {"text": "_"}], blank="_", top_k=1)
    assert [answer["text"] for answer in ending] == ["the capitals", "s"], "of ELECTRA the generator fills blanks"


def test_a_blank_of_marked_words_takes_its_space_along(ask, tmp_path):
    """As in RoBERTa's vocabulary, where words hold the space before them."""
    made = forced("bert", " capital", kind="bpe", path=vocabulary("bpe", tmp_path))
    texts = ["the <mask> of", "the [MASK] of", "the<mask> of", "<mask>", "un<mask>ed <mask>"]
    assert [answer["text"] for answer in ask(made, "fill-mask", [{"text": t} for t in texts])] == [
        "the capital of", "the capital of", "the capital of", " capital", "un capitaled capital"
    ]  # fmt: skip


def test_fill_mask_is_the_softmax_of_the_head(ask):
    run, params = loaded("bert")
    ids = [run.tokenizer.cls_id, *run.tokenizer.encode("the"), run.tokenizer.mask_id, *run.tokenizer.encode(" m"), run.tokenizer.mask_id, run.tokenizer.sep_id]
    row = {"tokens_BL": jnp.array([ids]), "segments_BL": jnp.ones((1, len(ids)), jnp.int32), "positions_BL": jnp.arange(len(ids))[None]}
    logits = zoo.jit(lambda params, row: run.model.logits(params, run.model.hidden(params, row, mask="full").hidden_BLD, head="mlm"))(params, row)
    probs = np.asarray(jax.nn.softmax(logits[0, :, : run.tokenizer.vocab_size]))[[4, 7]]
    found = ask("bert", "fill-mask", [{"text": f"the{'x' * 40} [MASK]"}, {"text": "the [MASK] m[MASK]"}, {"text": "none"}, {"text": "[MASK]" * 63}], top_k=3)
    for blank, row in zip(found[1]["blanks"], probs, strict=True):
        best = np.argsort(-row)[:3]
        assert [one["piece"] for one in blank] == run.tokenizer.pieces(best)
        assert [one["probability"] for one in blank] == pytest.approx(row[best].tolist(), abs=2e-6)
    assert "no blank; write [MASK] or <mask>" in found[2]["error"] and "65 tokens" in found[3]["error"]


def states(kind: str, given: str) -> np.ndarray:
    """Last hidden states of one text by itself, [L, D]."""
    run, params = loaded(kind)
    t = run.tokenizer
    before, behind = {"bert": (t.cls_id, t.sep_id), "electra": (t.cls_id, t.sep_id), "gpt": (t.bos_id, t.eos_id), "t5": (None, t.eos_id)}[kind]
    ids = [*([] if before is None else [before]), *t.encode(given), behind]
    names = ("inputs_BI", "input_segments_BI", "input_positions_BI") if kind == "t5" else ("tokens_BL", "segments_BL", "positions_BL")
    row = dict(zip(names, (jnp.array([ids]), jnp.ones((1, len(ids)), jnp.int32), jnp.arange(len(ids))[None])))
    part = {"part": "discriminator"} if kind == "electra" else {}
    hidden = functools.partial(run.model.hidden, mask="causal" if kind == "gpt" else "full", **part)
    return np.asarray(zoo.jit(run.model.encode if kind == "t5" else hidden)(params, row).hidden_BLD[0])


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("gpt", "last"), ("t5", "mean"), ("electra", "cls")])
def test_embed_is_the_pooled_hidden_states(ask, kind, pooling):
    """In batches of texts of several lengths as of one text by itself; of ELECTRA the discriminator's."""
    given = ["the small", "small the"]
    found = ask(kind, "embed", [{"text": t} for t in (given[0], "y" * 30, given[1], "z" * 99)], pooling=pooling)
    for answer, one in zip(found[::2], given):
        hidden_LD = states(kind, one)
        expected = {"mean": hidden_LD.mean(0), "cls": hidden_LD[0], "last": hidden_LD[-1]}[pooling]
        np.testing.assert_allclose(answer["embedding"], expected, atol=3e-6, rtol=1e-5)
        assert answer["tokens"] == len(one) and not answer["truncated"]
    assert found[3]["truncated"] and found[3]["tokens"] == 99
    if pooling == "mean" and kind == "bert":
        unit = ask(kind, "embed", [{"text": given[0]}], normalize=True)[0]["embedding"]
        np.testing.assert_allclose(unit, np.array(found[0]["embedding"]) / np.linalg.norm(found[0]["embedding"]), atol=2e-6)


def test_numbers_that_are_not_finite_are_an_error(ask):
    run, params = loaded("gpt")
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    assert "not finite" in ask((run, broken), "embed", [{"text": "a"}])[0]["error"]


# Fine-tuned models.


def test_records_by_fields_or_columns_with_and_without_what_is_asked_for(ask):
    """Templates are applied; a truth that is there changes nothing, not even one that the labels do not know."""
    records = [{"premise": "it rains", "hypothesis": "wet", "id": 7}, {"premise": "it rains", "pair": "wet", "gold": 1}, {"premise": "it rains", "hypothesis": "wet", "gold": -1}]
    found = ask("nli", "classify", [*records, {"premise": "it rains"}, {"hypothesis": "wet"}])
    assert found[0] == {"line": 1, "id": 7, **{k: v for k, v in found[1].items() if k != "line"}} and found[1] | {"line": 3} == found[2]
    assert found[0]["prediction"] in ("no", "yes") and sum(found[0]["probabilities"].values()) == pytest.approx(1)
    assert "no column 'hypothesis'" in found[3]["error"] and "no column 'premise'" in found[4]["error"]
    run, params = loaded("nli")
    plain = dataclasses.replace(run, config=dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, columns=("text=text", "pair=pair"))))
    assert ask((plain, params), "classify", [{"text": "premise: it rains", "pair": "wet"}])[0]["probabilities"] == pytest.approx(found[0]["probabilities"])


def test_a_directory_says_nothing_of_its_records(ask):
    """Its model reads a pair where there is one."""
    run, params = loaded("nli")
    directory = dataclasses.replace(run, workdir=None, config=dataclasses.replace(run.config, data=Data(length=64)))
    alone, pair, other = ask((directory, params), "classify", [{"text": "it rains"}, {"text": "it rains", "pair": "wet"}, {"text": "it rains", "pair": "dry"}])
    assert len({json.dumps(answer["probabilities"]) for answer in (alone, pair, other)}) == 3


def test_answers_of_other_tasks(ask):
    assert isinstance(ask("regress", "classify", [{"text": "warm"}])[0]["prediction"], float)
    chosen = ask("choose", "classify", [{"text": "what?", "a": "tea", "b": "a mat"}, {"text": "what?", "a": "tea"}])
    assert chosen[0]["choice"] == ("tea", "a mat")[chosen[0]["prediction"]] and "error" in chosen[1]
    by_text, by_words, by_both, none = ask(
        "tag", "tag", [{"text": "Anna Holm sings ."}, {"words": ["Anna", "Holm", "sings", "."]}, {"text": "x", "words": "Anna Holm sings ."}, {"tags": ["O"]}]
    )
    assert len(by_text["prediction"]) == 4 and set(by_text["prediction"]) <= {"O", "B-PER", "I-PER"}
    assert by_text["prediction"] == by_words["prediction"] == by_both["prediction"] and "error" in none
    context = "The cat sat on the mat."
    (found,) = ask("span_qa", "answer", [{"question": "Who sat?", "context": context}])
    assert found["prediction"] in context


def test_a_batch_of_several_lengths_is_one_by_one(ask):
    records = [{"text": "word " * n} for n in (9, 1, 5, 2, 6, 8)]
    together = ask("tag", "tag", records)
    assert [answer["line"] for answer in together] == list(range(1, 7))
    for record, answer in zip(records, together, strict=True):
        assert ask("tag", "tag", [record])[0]["prediction"] == answer["prediction"]


def test_records_of_a_source(ask, tmp_path):
    """Formats as in data.source, without the label; other columns by name; what has no id of its own is called as the source calls it."""
    (tmp_path / "dev.tsv").write_text("premise\thypothesis\nit rains\twet\n\tdry\nsun\tdry\n", encoding="utf-8")
    found = ask("nli", "classify", f"tsv:{tmp_path}/dev.tsv")
    assert [(answer["line"], answer["id"]) for answer in found] == [(1, "dev.tsv:2"), (2, "dev.tsv:3"), (3, "dev.tsv:4")]
    assert found[0]["probabilities"] == ask("nli", "classify", [{"premise": "it rains", "hypothesis": "wet"}])[0]["probabilities"]
    (tmp_path / "x.jsonl").write_text('{"body": "the small model", "id": 5}\n{"body": 3}\n', encoding="utf-8")
    by_column = ask("gpt", "score", f"jsonl:{tmp_path}/x.jsonl", columns=("text=body",))
    assert by_column[0] == {**ask("gpt", "score", [{"text": "the small model"}])[0], "id": 5} and "not text" in by_column[1]["error"]
    tagged = ask("tag", "tag", f"jsonl:{tmp_path}/x.jsonl", columns=("text=body",))
    assert len(tagged[0]["prediction"]) == 3 and "not text" in tagged[1]["error"]
    with pytest.raises(ConfigError, match="maps text to column 'text', which .* does not have; it has: body"):
        ask("gpt", "score", f"jsonl:{tmp_path}/x.jsonl")


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("gpt", "fill-mask", "needs an encoder with the head mlm"), ("t5", "fill-mask", "needs an encoder"), ("nli", "fill-mask", "this is bert with classify:2"),
        ("bert", "generate", "encoder"), ("nli", "score", "needs a language model"), ("electra", "score", "take another family"),
        ("gpt", "classify", r"needs a run of objective classify or regress or choose; x is one of causal, for --task=generate\|embed\|score"),
        ("bert", "tag", r"is one of mlm, for --task=fill-mask\|embed\|score"), ("nli", "answer", r"for --task=classify\|embed"), ("tag", "classify", r"for --task=tag\|embed"),
    ],
)  # fmt: skip
def test_tasks_that_a_model_cannot_do(ask, kind, task, message):
    with pytest.raises(ConfigError, match=message):
        ask(kind, task, [], **({"max_new_tokens": 8} if task == "generate" else {}))


# The command.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A classifier that has learned its six reviews, trained in some seconds."""
    folder = tmp_path_factory.mktemp("trained")
    table = Path(__file__).parent / "data/tasks/own/reviews.tsv"
    cfg = config.base(
        model=BERT, objective=classify.Config(), train=Train(steps=30, batch_size=4), tokenizer=Tokenizer(kind="bytes"), optimizer=Optimizer(learning_rate=1e-2),
        data=Data(source=(f"tsv:{table}",), validation_source=(f"tsv:{table}",), columns=("text=text", "label=label"), length=64, streams=4),
        schedule=Schedule(name="constant"), checkpoint=Checkpoint(every=30), log=Log(every=30, writers=()),
    )  # fmt: skip
    assert runs.run(cfg, folder / "run") == 0
    (folder / "in.jsonl").write_text('{"text": "great soup", "id": "a"}\n{"text": 5}\n{"text": "never again"}\n', encoding="utf-8")
    return folder


def test_the_command_in_words(trained, capsysbinary):
    """What a user sees: lines on stdout, what is wrong on stderr."""
    assert cli.main(["predict", f"--model=ckpt:{trained}/run", "--task=classify", f"--input={trained}/in.jsonl"]) == 0
    captured = capsysbinary.readouterr()
    good, bad, never = map(json.loads, captured.out.splitlines())
    assert list(good) == ["line", "id", "prediction", "probabilities"] and (good["id"], good["prediction"]) == ("a", "good") and good["probabilities"]["good"] > 0.9
    assert bad == {"line": 2, "error": "column 'text' is int, not text"} and (never["line"], never["prediction"]) == (3, "bad")
    assert captured.err.decode() == "ptm: line 2: column 'text' is int, not text\nptm: 3 lines answered, 1 of them with an error.\n"
    table = Path(__file__).parent / "data/tasks/own/reviews.tsv"
    assert cli.main(["predict", f"--model=ckpt:{trained}/run", "--task=classify", f"--input=tsv:{table}", f"--output={trained}/out.jsonl"]) == 0
    found = [json.loads(line) for line in (trained / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(answer["id"], answer["prediction"]) for answer in found] == [(f"reviews.tsv:{n + 2}", label) for n, label in enumerate(["good", "bad"] * 3)]


def test_output_is_written_whole_or_not_at_all(trained, monkeypatch, capsys):
    argv = ["predict", f"--model=ckpt:{trained}/run", "--task=embed", f"--input={trained}/in.jsonl", f"--output={trained}/kept.jsonl"]
    (trained / "kept.jsonl").write_text("old\n")
    before = sorted(trained.iterdir())

    def crash(chunk, answer):
        yield {"line": 1, "embedding": []}
        raise runs.Crash

    with monkeypatch.context() as patch, pytest.raises(runs.Crash):
        patch.setattr(tasks, "answered", crash)
        cli.main(argv)
    assert sorted(trained.iterdir()) == before and (trained / "kept.jsonl").read_text() == "old\n"
    assert cli.main([*argv[:2], "--task=tag", *argv[3:]]) == 2 and sorted(trained.iterdir()) == before
    assert cli.main(argv) == 0 and sorted(trained.iterdir()) == before and len((trained / "kept.jsonl").read_text().splitlines()) == 3
    assert cli.main([*argv[:-1], "--output=/dev/null"]) == 0
    capsys.readouterr()
    for output, message in ((trained, "Is a directory"), (trained / "no/x", "No such file")):
        assert cli.main([*argv[:-1], f"--output={output}"]) == 2 and message in capsys.readouterr().err


MISTAKES = {
    "no model": (["--task=score"], ["needs --model=SPEC and --task=NAME"]),
    "no task": (["--model=ckpt:x"], ["one of generate, fill-mask, classify"]),
    "unknown task": (["--model=ckpt:x", "--task=fill_mask"], ["unknown task 'fill_mask'", "Did you mean 'fill-mask'?"]),
    "option of another task": (["--model=ckpt:x", "--task=embed", "--top_k=3"], ["--top_k is no option of --task=embed; allowed: --pooling, --normalize"]),
    "option of no task": (["--model=ckpt:x", "--task=embed", "--poolin=cls"], ["'--poolin=cls'", "Did you mean '--pooling=cls'?"]),
    "options for none": (["--model=ckpt:x", "--task=classify", "--top_k=3"], ["no option of --task=classify; allowed: none"]),
    "value that is none": (["--model=ckpt:x", "--task=embed", "--pooling=max"], ["pooling=max", "mean, cls, last"]),
    "value that is no number": (["--model=ckpt:x", "--task=generate", "--temperature=hot"], ["--temperature=hot", "allowed: float"]),
    "values that contradict": (["--model=ckpt:x", "--task=generate", "--top_k=3"], ["temperature"]),
    "empty stop": (["--model=ckpt:x", "--task=generate", "--stop="], ["--stop=''", "holds no text"]),
    "empty blank": (["--model=ckpt:x", "--task=fill-mask", "--blank= "], ["--blank=' ' is empty"]),
    "no rows": (["--model=ckpt:x", "--task=score", "--batch_size=0", "--input=python_docs:"], ["--batch_size=0; allowed: 1 or more"]),
    "no such file": (["--model=ckpt:x", "--task=score", "--input=nowhere.jsonl"], ["'nowhere.jsonl' cannot be read (No such file or directory)"]),
    "columns of lines": (["--model=ckpt:x", "--task=score", "--columns=text=a"], ["--columns=text=a is for --input=FORMAT:PATH"]),
    "no such model": (["--model=ckpt:nowhere", "--task=score", "--input=python_docs:"], ["there is no folder 'nowhere'"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, capsys):
    argv, messages = MISTAKES[name]
    assert cli.main(["predict", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for message in messages:
        assert message in captured.err


def test_every_option_has_a_flag_and_every_flag_a_meaning():
    flags = options.flags()
    assert set(flags) == {f.name for cls in options.TASKS.values() for f in dataclasses.fields(cls)}
    assert all(doc.count("Default:") >= 1 for _, doc in flags.values()) and "generate:" in flags["top_k"][1] and "fill-mask:" in flags["top_k"][1]
    assert options.parse("embed", {"normalize": "true"}).normalize and options.parse("fill-mask", {"top_k": "3"}).top_k == 3


@pytest.mark.slow
def test_answers_come_while_the_pipe_stays_open(trained):
    """A person, or a program, asks, reads the answer and asks again; a reader that goes away ends it without a traceback."""
    command = [sys.executable, "-m", "ptm.cli", "predict", f"--model=ckpt:{trained}/run", "--task=classify", "--batch_size=2"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for number, (question, expected) in enumerate([("great soup", "good"), ("never again", "bad"), ("great soup", "good")], 1):
            child.stdin.write(json.dumps({"text": question}).encode() + b"\n")
            child.stdin.flush()
            answer = json.loads(child.stdout.readline())
            assert (answer["line"], answer["prediction"]) == (number, expected)
        child.stdin.write(b'{"text": "')
        child.stdin.flush()
        child.stdin.write(b'great soup"}')
        child.stdin.close()
        assert json.loads(child.stdout.readline())["prediction"] == "good"
        assert child.wait() == 0 and child.stderr.read() == b"ptm: 4 lines answered.\n"
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        child.stdin.write(b'{"text": "great soup"}\n' * 4)
        child.stdin.close()
        assert child.wait() == 0 and b"Traceback" not in child.stderr.read()

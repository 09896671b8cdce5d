"""Extractive question answering: windows of a context, the places of answers in them, and answers made of what a model says of all windows."""

import contextlib
import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import config, text
from ptm import run as run_lib
from ptm.config import Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document, keyed_rng
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.objectives import OBJECTIVES, span_qa

CHARS = text.make("chars", texts=["who where? Tim ate a pie in Rome, ."], specials=True)
CONTEXT = "Tim ate a pie in Rome."


def build(kind="encoder", summary="first", tokenizer=CHARS, length=18, num_types=3, packing="default", **options):
    about = types.SimpleNamespace(kind=kind, summary=summary, name="x", num_types=num_types)
    return OBJECTIVES["span_qa"].build(
        span_qa.Config(**{"doc_stride": 8, "max_question": 5, **options}), tokenizer=tokenizer, length=length, packing=packing, model_config=about
    )  # fmt: skip


def document(question="who", answers=None, context=CONTEXT, tokenizer=CHARS):
    columns = {"context": context} | ({} if answers is None else {"answers": [{"text": answer, "answer_start": start} for answer, start in answers]})
    return Document("q1", tokenizer.encode(question), columns)


def examples(objective, doc):
    return list(objective.features(doc, rng=keyed_rng(0), draw=None))


def shown(example, tokenizer=CHARS):
    """Pieces of a row, with brackets around what is right."""
    pieces = zip(tokenizer.pieces(example["tokens_BL"]), example["start_BL"], example["end_BL"])
    return "".join("[" * start + piece + "]" * end for piece, start, end in pieces)


# --- golden examples ---


def test_golden_windows():
    """Rows of 18 hold 12 characters of the context beside 'who', a window begins every 8; where the answer is not whole, cls is right."""
    made = examples(build(), document(answers=[("pie", 10)]))
    assert list(map(shown, made)) == ["[<cls>]who<sep>Tim ate a pi<sep>", "<cls>who<sep>a [pie] in Rom<sep>", "[<cls>]who<sep> Rome.<sep>"]
    assert made[1]["types_BL"].tolist() == [0] * 5 + [1] * 13


def test_golden_windows_of_a_model_that_ends_with_its_summary():
    made = examples(build(summary="last"), document(answers=[("pie", 10)]))
    assert list(map(shown, made)) == ["who<sep>Tim ate a pi<sep>[<cls>]", "who<sep>a [pie] in Rom<sep><cls>", "who<sep> Rome.<sep>[<cls>]"]
    assert made[2]["types_BL"].tolist() == [0] * 4 + [1] * 7 + [2]


def test_golden_windows_of_a_decoder():
    made = examples(build("decoder", "last"), document(answers=[("pie", 10)]))
    assert list(map(shown, made)) == ["<s>who<sep>Tim ate a pi[</s>]", "<s>who<sep>a [pie] in Rom</s>", "<s>who<sep> Rome.[</s>]"]
    assert "types_BL" not in made[0]


def test_long_questions_are_cut_and_short_contexts_are_one_window(caplog):
    (made,) = examples(build(), document("who where?", [("a", 0)], context="a pie"))
    assert shown(made) == "<cls>who w<sep>[a] pie<sep>" and "max_question=5 tokens are cut, q1 the first" in caplog.text


MISFIT = "its answer 'ham' is not in its context"
TARGETS = {  # answers -> the row of a context that fits into one, and what is told
    "exact": ([("ate a", 4)], "<cls>who<sep>Tim [ate a] pie in Rome.<sep>", ""),
    "spaces": ([(" pie ", 9)], "<cls>who<sep>Tim ate a [pie] in Rome.<sep>", ""),
    "nearest": ([("e", 11)], "<cls>who<sep>Tim ate a pi[e] in Rome.<sep>", ""),
    "second": ([("ham", 0), ("Tim", 0)], "<cls>who<sep>[Tim] ate a pie in Rome.<sep>", ""),
    "none": ([], "[<cls>]who<sep>Tim ate a pie in Rome.<sep>", ""),
    "absent": ([("ham", 3)], "<cls>who<sep>Tim ate a pie in Rome.<sep>", MISFIT),
    "unknown": (None, "<cls>who<sep>Tim ate a pie in Rome.<sep>", ""),
}


@pytest.mark.parametrize("name", list(TARGETS))
def test_what_is_right(name, caplog):
    answers, expected, told = TARGETS[name]
    (made,) = examples(build(length=40), document(answers=answers))
    assert shown(made) == expected
    assert (told in caplog.text) if told else not caplog.text


def test_lists_side_by_side_are_answers_too():
    doc = document()
    doc.columns["answers"] = {"text": ["pie", "a pie"], "answer_start": [10, 8]}
    (made,) = examples(build(length=40), doc)
    assert shown(made) == "<cls>who<sep>Tim ate a [pie] in Rome.<sep>"
    assert build().reference(doc) == ["pie", "a pie"] and build().reference(document(answers=[])) == [] and build().reference(document()) is None


def test_an_answer_within_a_word_takes_the_fewest_pieces_that_hold_it(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "in", "ox", "##ford", "##shire", "ate"]) + "\n")
    tokenizer = text.make("wordpiece", path=str(tmp_path), lowercase=True)
    (made,) = examples(build(tokenizer=tokenizer), document(answers=[("ford", 5)], context="in Oxfordshire ate", tokenizer=tokenizer))
    assert shown(made, tokenizer) == "[CLS]who[SEP]inox[##ford]##shireate[SEP]"
    (made,) = examples(build(tokenizer=tokenizer), document(answers=[("for", 5)], context="in Oxfordshire ate", tokenizer=tokenizer))
    assert shown(made, tokenizer) == "[CLS]who[SEP]inox[##ford]##shireate[SEP]"


def test_refused():
    with pytest.raises(ConfigError, match="data.length=18 leaves 10 tokens .*doc_stride=11"):
        build(doc_stride=11)
    with pytest.raises(ConfigError, match="data.packing=concat"):
        build(packing="concat")
    with pytest.raises(ConfigError, match="Known: .*squad"):
        span_qa.Config(metrics=("squat",)).check("objective")
    with pytest.raises(ConfigError, match="record q1 has no text in its field context"):
        examples(build(), Document("q1", CHARS.encode("who"), {}))
    for answers in ("pie", [{"text": "pie"}], ["pie"], 3):
        doc = document()
        doc.columns["answers"] = answers
        with pytest.raises(ConfigError, match="the field answers of record q1"):
            examples(build(), doc)


# --- answers ---


def said(objective, doc, *, right=(), null=0.0):
    """Outputs of a model that gives every (window, first character, last character, logit) its half at either end, and cls `null`."""
    outputs = []
    for number, window in enumerate(objective.read(doc).windows):
        start, end = np.full((2, len(window.framed.tokens_L)), -9.0)
        start[window.null] = end[window.null] = null / 2
        for where, first, last, logit in right:
            if where == number:
                start[window.at + first - window.first] = end[window.at + last - window.first] = logit / 2
        outputs.append({"start": start, "end": end})
    return outputs


def test_the_best_answer_over_all_windows():
    objective, doc = build(n_best=3), document()
    answer = objective.answer(doc, said(objective, doc, right=[(0, 0, 2, 3.0), (1, 10, 12, 5.0), (1, 14, 15, 1.0), (2, 17, 20, 4.0)]))
    assert (answer["prediction"], answer["score"], answer["null_score"]) == ("pie", 5.0, 0.0)
    found = [(entry["text"], entry["score"], entry["start"], entry["end"]) for entry in answer["n_best"]]
    assert found == [("pie", 5.0, 10, 13), ("Rome", 4.0, 17, 21), ("Tim", 3.0, 0, 3)]
    shares = np.exp([5.0, 4.0, 3.0])
    np.testing.assert_allclose([entry["probability"] for entry in answer["n_best"]], shares / shares.sum())
    json.dumps(answer, allow_nan=False)


def test_a_place_read_twice_counts_by_its_best_window_and_equal_texts_once():
    objective, doc = build(n_best=3, max_answer=3), document()
    outputs = said(objective, doc, right=[(0, 8, 8, 2.0), (1, 8, 8, 3.0), (0, 4, 4, 1.0)])  # the a of "a pie" in two windows, and the one of "ate"
    answer = objective.answer(doc, outputs)
    assert [(entry["text"], entry["score"], entry["start"]) for entry in answer["n_best"][:1]] == [("a", 3.0, 8)]
    assert [entry["text"] for entry in answer["n_best"]].count("a") == 1 and len(answer["n_best"]) == 3


@pytest.mark.parametrize(("threshold", "prediction"), [(None, "pie"), (3.0, "pie"), (1.0, ""), (-5.0, "")])
def test_no_answer(threshold, prediction):
    """The null score is the least of all windows; beyond the threshold it wins."""
    objective, doc = build(null_threshold=threshold), document()
    outputs = said(objective, doc, right=[(1, 10, 12, 5.0)], null=7.0)
    outputs[0]["start"][0] += 2.0  # one window is surer that there is nothing
    answer = objective.answer(doc, outputs)
    assert (answer["prediction"], answer["null_score"]) == (prediction, 7.0)
    assert answer["score"] == (5.0 if prediction else 7.0)
    assert sum(entry["probability"] for entry in answer["n_best"]) == pytest.approx(1)
    assert ("" in [entry["text"] for entry in answer["n_best"]]) == (threshold is not None)
    assert len({entry["text"] for entry in answer["n_best"]}) == len(answer["n_best"])


def test_a_context_without_tokens_is_answered_with_nothing():
    objective = build()
    for context in ("", "  "):
        doc = document(context=context)
        answer = objective.answer(doc, said(objective, doc))
        assert answer["prediction"] == "" and answer["n_best"][0]["probability"] == 1


def test_answers_are_no_longer_than_asked():
    objective, doc = build(length=40, max_answer=4), document()
    answer = objective.answer(doc, said(objective, doc, right=[(0, 0, 21, 9.0), (0, 4, 6, 1.0)]))
    assert answer["prediction"] == "ate" and all(entry["end"] - entry["start"] <= 4 for entry in answer["n_best"])


def test_best_spans_are_those_of_an_exhaustive_search():
    rng = np.random.default_rng(0)
    for size, longest in ((1, 3), (7, 3), (12, 30)):
        start, end = rng.integers(-50, 50, (2, size)).astype(float)
        pairs = [(start[i] + end[j], i, j) for i in range(size) for j in range(i, min(size, i + longest))]
        found = span_qa.best_spans(start, end, count=6, longest=longest)
        assert [score for score, _, _ in found] == sorted((score for score, _, _ in pairs), reverse=True)[:6]
        assert set(found) <= set(pairs)
    assert span_qa.best_spans(np.zeros(0), np.zeros(0), count=6, longest=3) == []


# --- real data ---

SHARES = {"cmrc2018": ("bert_chinese", True), "xquad_zh": ("bert_chinese", True), "xquad_en": ("bert_uncased", True), "xquad_gpt2": ("gpt2", False)}


@pytest.mark.parametrize("name", list(SHARES))
def test_gold_places_give_the_gold_answers(name):
    """The marks of the features, taken for logits, are answered with the text of the answer: exactly, or up to the bounds of its pieces."""
    if "PTM_DATA" not in os.environ:
        pytest.skip("PTM_DATA is not set: no question answering data")
    folder, (vocabulary, wordpiece) = os.environ["PTM_DATA"], SHARES[name]
    tokenizer = text.make("wordpiece" if wordpiece else "bpe", path=f"{folder}/vocab/{vocabulary}", **({"lowercase": True} if wordpiece else {}))
    objective = build(*(() if wordpiece else ("decoder", "last")), tokenizer=tokenizer, length=384, doc_stride=128, max_question=64, max_answer=384, n_best=1)
    exact, near, total = 0, 0, 0
    for question, context, answer in _questions(folder, name)[::8]:
        if not context.startswith(answer["text"], answer["answer_start"]):
            continue
        total += 1
        doc = Document("q", tokenizer.encode(question), {"context": context, "answers": [answer]})
        outputs = [{"start": 9.0 * made["start_BL"], "end": 9.0 * made["end_BL"]} for made in examples(objective, doc)]
        found = objective.answer(doc, outputs)["n_best"][0]
        exact += found["text"] == answer["text"].strip()
        near += found["start"] <= answer["answer_start"] and found["end"] >= answer["answer_start"] + len(answer["text"].strip())
        assert found["text"] == context[found["start"] : found["end"]]
    assert total > 120 and near == total and exact > (0.99 if wordpiece else 0.97) * total, (exact, near, total)


def _questions(folder, name):
    path = {"cmrc2018": "qa/cmrc2018", "xquad_zh": "qa/xquad", "xquad_en": "qa/xquad", "xquad_gpt2": "qa/xquad"}[name]
    wanted = {"cmrc2018": "trial", "xquad_zh": "zh", "xquad_en": "en", "xquad_gpt2": "en"}[name]
    (file,) = [file for file in os.listdir(f"{folder}/{path}") if wanted in file and file.endswith("json")]
    with open(f"{folder}/{path}/{file}", encoding="utf-8") as stream:
        articles = json.load(stream)["data"]
    return [(qa["question"], part["context"], qa["answers"][0]) for article in articles for part in article["paragraphs"] for qa in part["qas"]]


# --- the loss ---


def test_scores_are_those_of_a_softmax_within_each_segment():
    rng = np.random.default_rng(0)
    logits, segments = rng.normal(0, 3, 9).astype(np.float32), np.array([1, 1, 1, 2, 2, 3, 3, 0, 0])
    marks = np.array([0, 1, 0, 0, 1, 0, 0, 0, 0])
    logits[4] = 9.0
    nats, hits = zoo.jit(span_qa.score_segments)(jnp.asarray(logits), jnp.asarray(marks), jnp.asarray(segments))
    expected = sum(np.log(np.exp(logits[segments == n]).sum()) - logits[at] for n, at in ((1, 1), (2, 4)))
    np.testing.assert_allclose(np.sum(nats * marks), expected, rtol=1e-5)
    assert hits[2] == 1 and hits[3] == hits[0] == 0


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_packed_rows_are_the_same_as_single_ones(family):
    """Loss and gradients of windows that share rows are those of rows of one window each."""
    made = zoo.objective("span_qa", family, doc_stride=1)
    docs = [example for doc in zoo.documents(8, length=5) for example in examples(made, doc)][:4]
    lengths, fields = made.lengths, made.fields
    packed = [docs[:2], docs[2:], [], []]
    single = [[doc] for doc in docs]
    model, params = zoo.model(family, heads=made.heads), zoo.params(family, heads=made.heads)

    @zoo.jit
    def step(params, batch):
        def loss(params):
            totals, aux, _ = made.loss(model, params, batch, rng=None, carry=None, train=False)
            return totals["span"], aux

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, aux), grads = step(params, zoo.stack([zoo.row(content, lengths, fields) for content in packed]))
    (expected, expected_aux), expected_grads = step(params, zoo.stack([zoo.row(content, lengths, fields) for content in single]))
    assert float(expected) > 0
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(aux.ratios["accuracy"], expected_aux.ratios["accuracy"])
    zoo.assert_equal_gradients(grads, expected_grads)


def test_it_learns_where_answers_are(tmp_path):
    """One batch of windows is overfit, and the answers made of the model are those of the data, unanswerable questions included."""
    places, foods = ["Rome", "Oslo", "Lima", "Bern"], ["pie", "rice", "soup", "figs"]
    questions = []
    for number, (place, food) in enumerate(zip(places, foods)):
        context = f"Tim ate {food} in {place}."
        for question, answer in (("what", food), ("where", place), ("who", None)):
            answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
            questions.append({"question": question, "context": context, "answers": answers, "id": f"{number}{question}"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    shape = {"num_layers": 2, "width": 32, "num_heads": 2, "max_length": 64, "dropout": 0.0, "attention_dropout": 0.0}
    run = run_lib.setup(
        config.base(
            model=bert.BertConfig(**shape), objective=span_qa.Config(doc_stride=16, max_question=8, null_threshold=0.0),
            train=Train(steps=100, batch_size=12), optimizer=Optimizer(learning_rate=3e-3), schedule=Schedule(name="constant", warmup_steps=5),
            data=Data(
                source=(f"jsonl:{tmp_path}/train.jsonl",), columns=("text=question", "context=context", "answers=answers"), length=48, packing="none",
                holdout=0.0,
            ),
            tokenizer=Tokenizer(kind="bytes"), log=Log(writers=()),
        ),
        devices=jax.devices()[:1],
    )  # fmt: skip
    with contextlib.closing(run.loader()) as loader:
        batch = run.to_device(next(loader), batch_size=12, rows=list(range(12)))
    values, losses = run.init_state(run.init_params()), []
    for _ in range(100):
        values, metrics = run.train_step(values, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5 and losses[-1] < 0.05, (losses[0], losses[-1])
    objective = run.objective
    docs = [Document(row["id"], run.tokenizer.encode(row["question"]), {"context": row["context"], "answers": row["answers"]}) for row in questions]
    rows = zoo.stack([zoo.row(examples(objective, doc), objective.lengths, objective.fields) for doc in docs])
    found = jax.device_get(zoo.jit(lambda params, batch: objective.outputs(run.model, params, batch))(values["params"], rows))
    for number, doc in enumerate(docs):
        answer = objective.answer(doc, [{name: value[number] for name, value in found.items()}])
        assert [answer["prediction"]] == (objective.reference(doc) or [""])

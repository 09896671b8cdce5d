"""Token classification: words and their first pieces, schemes of tags, windows of long texts, and answers."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import runs
import tasks
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import pre_tokenizers

from ptm import config, text
from ptm.config import Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.metrics.entities import entities
from ptm.models import bert
from ptm.objectives import tag
from ptm.objectives.protocol import Task
from ptm.text import boundaries

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "mad", "cap", "##sule", "market", "##s", "of", "tokyo", "."]
LABELS = ("O", "B-LOC", "B-ORG", "I-ORG")
SENTENCE = (["The", "Mad", "Capsule", "Markets", "of", "Tokyo", "."], ["I-ORG", "I-ORG", "I-ORG", "I-ORG", "O", "I-LOC", "O"])


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return text.make("wordpiece", path=str(path), lowercase=True)


def document(words, tags=None):
    return Document("d", np.array([5], np.int32), {"words": list(words), **({} if tags is None else {"tags": list(tags)})})


def shown(tokenizer, objective, made):
    """Pieces with the label and the word that are asked for there."""
    names = objective.config.labels
    return " ".join(
        piece + (f"/{word}:{names[label] if label >= 0 else '?'}" if word >= 0 else "")
        for piece, label, word in zip(tokenizer.pieces(made["tokens_BL"]), made["label_BL"], made["word_BL"])
    )


# Frames and first pieces.


def test_golden_encoder(wordpiece):
    objective = tasks.build("tag", wordpiece, length=32, labels=LABELS)
    (made,) = tasks.examples(objective, document(*SENTENCE))
    assert shown(wordpiece, objective, made) == ("[CLS] the/0:B-ORG mad/1:I-ORG cap/2:I-ORG ##sule market/3:I-ORG ##s of/4:O tokyo/5:B-LOC ./6:O [SEP]")
    assert made["types_BL"].tolist() == [0] * 11 and objective.reference(document(*SENTENCE)) == ["B-ORG", "I-ORG", "I-ORG", "I-ORG", "O", "B-LOC", "O"]


def test_golden_encoder_that_ends_with_its_summary(wordpiece):
    objective = tasks.build("tag", wordpiece, summary="last", num_types=3, length=32, labels=LABELS)
    (made,) = tasks.examples(objective, document(["Tokyo", "."], ["B-LOC", "O"]))
    assert shown(wordpiece, objective, made) == "tokyo/0:B-LOC ./1:O [SEP] [CLS]" and made["types_BL"].tolist() == [0, 0, 0, 2]


def test_golden_decoder_of_bytes():
    bytes_ = text.make("bytes")
    objective = tasks.build("tag", bytes_, kind="decoder", summary="last", length=32, labels=("O", "B-LOC"))
    (made,) = tasks.examples(objective, document(["in", "Rio"], ["O", "S-LOC"]))
    assert [bytes_.decode([t]) for t in made["tokens_BL"][1:-1]] == list("in Rio") and objective.mask == "causal" and "types_BL" not in made
    assert np.flatnonzero(made["label_BL"] >= 0).tolist() == [1, 4] and made["label_BL"][[1, 4]].tolist() == [0, 1]


def test_words_that_tokenizers_drop_are_unknown(wordpiece):
    objective = tasks.build("tag", wordpiece, length=32, labels=LABELS)
    (made,) = tasks.examples(objective, document(["the", "\u200b", "", "."], ["O", "B-LOC", "O", "O"]))
    assert shown(wordpiece, objective, made) == "[CLS] the/0:O [UNK]/1:B-LOC [UNK]/2:O ./3:O [SEP]"


def test_without_tags_words_are_asked_for_all_the_same(wordpiece):
    objective = tasks.build("tag", wordpiece, length=32, labels=LABELS)
    (made,) = tasks.examples(objective, document(["Tokyo", "."]))
    assert shown(wordpiece, objective, made) == "[CLS] tokyo/0:? ./1:? [SEP]" and objective.reference(document(["Tokyo", "."])) is None
    assert not tasks.examples(objective, document([], []))


RUNNING = ["The", "cat's", "12", "mats", ",", "(", "U.S.", ")", "'s", "naïve", "中国", "人", "said", "2008", "年", "。", "ok"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One of each kind, trained on a few sentences, and a tokenizer.json of two kinds."""
    lines = [boundaries.running_text(RUNNING), "the cat said that the mats were 12 in 2008 , and so on ( ok ) ."] * 30
    made = {kind: text.make(kind, texts=lines, vocab_size=300) for kind in ("bytes", "chars", "sentencepiece", "bpe")}
    made["wordpiece"] = text.make("wordpiece", texts=lines, vocab_size=80)
    for name, marked in (("bpe", "leading"), ("wordpiece", "file")):
        folder = tmp_path_factory.mktemp(marked)
        pipeline = made[name]._pipeline
        if name == "bpe":
            pipeline = Pipeline.from_str(pipeline.to_str())
            pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        pipeline.save(str(folder / "tokenizer.json"))
        made[f"file of {name}"] = text.make("file", path=str(folder))
    return made


def test_words_have_the_ids_of_running_text(tokenizers):
    """Of all kinds that set words apart; sentencepiece joins Chinese ones, which are kept apart here."""
    assert boundaries.running_text(RUNNING) == "The cat's 12 mats , ( U.S. ) 's naïve中国人said 2008年。ok"
    for kind, tokenizer in tokenizers.items():
        words = [word for word in RUNNING if word.isascii()] if kind == "sentencepiece" else RUNNING
        made = tokenizer.encode_words(words)
        assert len(made) == len(words) and all(len(ids) for ids in made)
        whole = tokenizer.encode(boundaries.running_text(words))
        if kind in ("bpe", "file of bpe"):  # letters of all scripts are one word to it, so that Chinese ones merge with those beside them
            words = [word for word in RUNNING if word.isascii()]
            made, whole = tokenizer.encode_words(words), tokenizer.encode(boundaries.running_text(words))
        np.testing.assert_array_equal(np.concatenate(made), whole, err_msg=kind)


def published(name):
    """The folder of a published vocabulary, or its one file where this has another name than ours."""
    folder = Path(os.environ["PTM_DATA"]) / "vocab" / name
    models = [path for path in folder.iterdir() if path.suffix == ".model"]
    return str(models[0] if models else folder)


@pytest.mark.parametrize(
    ("kind", "path", "options"),
    [("sentencepiece", "albert", {}), ("sentencepiece", "xlnet", {}), ("bpe", "roberta", {}), ("wordpiece", "bert_chinese", {"lowercase": True})],
)
def test_words_have_the_ids_of_running_text_in_published_vocabularies(kind, path, options):
    if "PTM_DATA" not in os.environ:
        pytest.skip("set PTM_DATA to the folder of real data: published vocabularies are not part of the repository")
    tokenizer = text.make(kind, path=published(path), **options)
    words = [word for word in RUNNING if word.isascii()] if kind != "wordpiece" else RUNNING
    made = tokenizer.encode_words(words)
    np.testing.assert_array_equal(np.concatenate(made), tokenizer.encode(boundaries.running_text(words)))
    if kind == "sentencepiece":
        assert tokenizer.pieces(tokenizer.encode_words(["中", "a"])[1])[0] == "a", "no space where the text has none"


# Schemes.

SCHEMES = {  # Paris | New York Mets | Berlin beside Rome: what each scheme writes, and IOB2
    "IOB1": "I-LOC O I-ORG I-ORG I-ORG O I-LOC B-LOC",
    "IOB2": "B-LOC O B-ORG I-ORG I-ORG O B-LOC B-LOC",
    "IOE1": "I-LOC O I-ORG I-ORG I-ORG O E-LOC I-LOC",
    "IOE2": "E-LOC O I-ORG I-ORG E-ORG O E-LOC E-LOC",
    "IOBES": "S-LOC O B-ORG I-ORG E-ORG O S-LOC S-LOC",
    "BILOU": "U-LOC O B-ORG I-ORG L-ORG O U-LOC U-LOC",
}


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme_becomes_iob2(scheme):
    assert " ".join(tag.iob2(SCHEMES[scheme].split(), record="d")) == SCHEMES["IOB2"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("I-A I-B", "B-A B-B"), ("B-A I-B I-B", "B-A B-B I-B"), ("O I-A O I-A", "O B-A O B-A"), ("B I O I", "B I O B"), ("B-A-b I-A-b", "B-A-b I-A-b")],
)
def test_iob2_of_changes_of_type(given, expected):
    assert tag.iob2(given.split(), record="d") == expected.split()


@settings(max_examples=200, deadline=None)
@given(tags=st.lists(st.sampled_from(["O", "B-A", "I-A", "E-A", "S-A", "I-B", "B-B", "E-B"]), max_size=12))
def test_iob2_keeps_the_entities_that_the_metric_sees(tags):
    converted = tag.iob2(tags, record="d")
    assert entities(converted) == entities(tags) and tag.iob2(converted, record="d") == converted
    assert {name[0] for name in converted} <= {"B", "I", "O"}


def test_tags_as_given_stay(wordpiece):
    objective = tasks.build("tag", wordpiece, length=16, labels=("DT", "NN"), scheme="as_given")
    assert objective.reference(document(["the", "market"], ["DT", "NN"])) == ["DT", "NN"] and objective.metrics == ("accuracy",)
    assert objective.answer(document(["the"]), [{"word": np.array([-1, 0]), "tag": np.array([0, 1])}]) == {"prediction": ["NN"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "record d has 2 words and 1 tags"),
        ({"words": ["a"], "tags": ["NN"]}, "the tag 'NN'; allowed with objective.scheme=bio.*objective.scheme=as_given"),
        ({"words": ["a"], "tags": ["B-PER"]}, "the tag 'B-PER', which is not one of objective.labels: O, B-LOC, B-ORG, I-ORG"),
        ({"words": ["a"], "tags": [None]}, "no tag for its word 1, 'a'"),
        ({"words": [1], "tags": ["O"]}, "words that are no text"),
        ({"words": 3, "tags": ["O"]}, "has 3 as its field words; allowed: a list"),
        ({"tags": ["O"]}, "record d has no field words; map it"),
    ],
)
def test_refused_records(columns, message, wordpiece):
    with pytest.raises(ConfigError, match=message):
        tasks.examples(tasks.build("tag", wordpiece, length=32, labels=LABELS), Document("d", np.array([5]), columns))


def test_words_and_tags_may_be_set_apart_by_spaces(wordpiece):
    doc = Document("d", np.array([5]), {"words": "the market", "tags": "O I-LOC"})
    assert tasks.build("tag", wordpiece, length=32, labels=LABELS).reference(doc) == ["O", "B-LOC"]


# Windows.


def check_windows(sizes, room, overlap):
    made = list(tag.windows(sizes, room=room, overlap=overlap))
    assert [n for window in made for n in range(window.begin, window.end)] == list(range(len(sizes))), "each word is tagged in one window"
    for window in made:
        assert window.first <= window.begin < window.end <= window.last and sum(sizes[window.first : window.last]) <= room
    for one, other in zip(made, made[1:]):
        assert one.first < other.first and one.last < other.last and sum(sizes[other.first : one.last]) <= overlap
        assert sum(sizes[one.first : one.last + 1]) > room, "no window could be longer"
    return made


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_windows_hold_every_word_once(data):
    room = data.draw(st.integers(1, 20))
    sizes = data.draw(st.lists(st.integers(1, room), max_size=40))
    check_windows(sizes, room, data.draw(st.integers(0, room // 2)))


def test_windows_give_context_on_both_sides():
    assert check_windows([1] * 10, 10, 4) == [(0, 10, 0, 10)]
    assert check_windows([1] * 20, 10, 4) == [(0, 10, 0, 8), (6, 16, 8, 14), (12, 20, 14, 20)]


def test_long_texts_lose_no_word(wordpiece, caplog):
    """Windows overlap; a word that alone is longer than a row is cut, which is told."""
    objective = tasks.build("tag", wordpiece, length=8, labels=LABELS, overlap=2)
    words, tags = zip(*[(f"market{'s' * (n % 2)}", LABELS[n % 4]) for n in range(23)])
    made = tasks.examples(objective, document(words, tags))
    assert len(made) > 3 and all(len(example["tokens_BL"]) <= 8 for example in made)
    found = sorted((int(w), int(lab)) for example in made for w, lab in zip(example["word_BL"], example["label_BL"]) if w >= 0)
    names = tag.iob2(tags, record="d")
    assert found == [(n, LABELS.index(name)) for n, name in enumerate(names)] and not caplog.records
    outputs = [{"word": example["word_BL"], "tag": np.maximum(example["label_BL"], 0)} for example in made]
    assert objective.answer(document(words), outputs)["prediction"] == names
    with caplog.at_level(logging.WARNING):
        (cut,) = tasks.examples(tasks.build("tag", text.make("bytes"), kind="decoder", summary="last", length=6, labels=LABELS), document(["abcdefgh"]))
    assert len(cut["tokens_BL"]) == 6 and "one of d with 8 tokens the first" in caplog.text


# Answers and losses.


def test_answers_are_tags_and_entities(wordpiece):
    objective = tasks.build("tag", wordpiece, length=32, labels=LABELS)
    assert isinstance(objective, Task) and objective.metrics == ("entity_f1",)
    doc = document(*SENTENCE)
    (made,) = tasks.examples(objective, doc)
    answer = objective.answer(doc, [{"word": made["word_BL"], "tag": np.maximum(made["label_BL"], 0)}])
    assert answer["prediction"] == objective.reference(doc)
    assert json.loads(json.dumps(answer))["entities"] == [
        {"type": "ORG", "start": 0, "end": 4, "text": "The Mad Capsule Markets"}, {"type": "LOC", "start": 5, "end": 6, "text": "Tokyo"}
    ]  # fmt: skip
    chinese = objective.answer(document(["东", "京"]), [{"word": np.array([0, 1]), "tag": np.array([1, 0])}])
    assert chinese["entities"] == [{"type": "LOC", "start": 0, "end": 1, "text": "东"}]


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt", marks=pytest.mark.slow)])
def test_packed_rows_equal_one_text_a_row(family):
    tasks.assert_packed_is_alone("tag", family, class_weights=("B-X=2",))


def test_outputs_give_what_the_loss_counts():
    objective, model, params = tasks.on_zoo("tag", "bert")
    docs = tasks.documents()
    batch, used = tasks.rows(objective, docs, packing="none", count=16)
    outputs = zoo.jit(lambda batch: objective.outputs(model, params, batch))(batch)
    hits, words = zoo.jit(lambda batch: objective.loss(model, params, batch, rng=None, carry=None, train=False)[1].ratios["accuracy"])(batch)
    answers = [objective.answer(doc, [{name: np.asarray(value[n]) for name, value in outputs.items()}]) for n, doc in enumerate(docs)]
    pairs = [(ours, theirs) for answer, doc in zip(answers, docs) for ours, theirs in zip(answer["prediction"], objective.reference(doc) or [])]
    assert (float(hits), float(words)) == (sum(ours == theirs for ours, theirs in pairs), len(pairs)) and len(docs) == used


@pytest.mark.slow
def test_it_learns_names(tmp_path):
    """Words of capitals are names, and none follows another: learned from IOB1 tags, labels from the data, texts in shared rows."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(240):
        names = (rng.random(6) < 0.6) & (np.arange(6) % 2 == rng.integers(2))
        words = ["".join(rng.choice(list("ABCDE" if name else "abcde"), 3)) for name in names]
        lines.append({"text": " ".join(words), "words": words, "tags": ["I-N" if name else "O" for name in names]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = config.base(
        model=bert.BertConfig(num_layers=2, width=32, num_heads=2, max_length=64, dropout=0.0, attention_dropout=0.0), objective=tag.Config(),
        evals={"validation": loss.Config(every=60)}, train=Train(steps=60, batch_size=8),
        data=Data(source=(f"jsonl:{tmp_path}/rows.jsonl",), columns=("text=text", "words=words", "tags=tags"), length=64, holdout=0.1),
        tokenizer=Tokenizer(kind="bytes"), optimizer=Optimizer(learning_rate=3e-3), schedule=Schedule(warmup_steps=5), log=Log(writers=()),
    )  # fmt: skip
    assert runs.run(cfg, tmp_path / "run") == 0
    seen = [json.loads(line) for line in runs.metrics(tmp_path / "run").splitlines()]
    assert seen[-1]["validation/accuracy"] > 0.95
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"]["labels"] == ["O", "B-N"]

"""Metrics: values worked by hand and published examples; with the extra parity, the libraries' values on random answers."""

import importlib.util
import random
from pathlib import Path

import pytest

from ptm import metrics
from ptm.fields import ConfigError
from ptm.metrics import METRICS, entities, measure, spans

TRUTH = ["1", "1", "0", "1", "0", "0"]
GUESS = ["1", "0", "0", "1", "1", "0"]


def test_labels_by_hand():
    """Two hits of three guesses and of three positives; Matthews of the table ((2, 1), (1, 2)) is (2*2 - 1*1) / 9."""
    found = measure(["accuracy", "f1_binary", "f1_macro", "f1_micro", "matthews"], GUESS, TRUTH)
    assert found == pytest.approx({"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "f1_macro": 2 / 3, "f1_micro": 4 / 6, "matthews": 1 / 3})


def test_labels_without_a_denominator_give_zero():
    """All of one label: no correlation, and an F1 of 0 where the positive label is neither guessed nor true."""
    assert measure(["matthews", "f1_binary"], ["0", "0"], ["0", "0"]) == {"matthews": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert measure(["pearson", "spearman"], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert measure(["f1_macro"], ["a", "a"], ["a", "b"])["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)


def test_the_positive_label_must_be_known():
    with pytest.raises(ConfigError, match="which label is the positive one of no, yes; write f1_binary:LABEL"):
        measure(["f1_binary"], ["yes"], ["no"])
    assert measure(["f1_binary:yes"], ["yes", "yes"], ["no", "yes"])["f1"] == pytest.approx(2 / 3)


def test_correlations_by_hand():
    """Ranks with ties are shared: (1, 2.5, 2.5, 4) beside (1, 2, 3, 4)."""
    found = measure(["pearson", "spearman"], [1.0, 2.0, 2.0, 10.0], [1.0, 2.0, 3.0, 4.0])
    assert found["spearman"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert found["pearson"] == pytest.approx(13.5 / (52.75 * 5) ** 0.5)
    assert measure(["mean_squared_error"], [1.0, 3.0], [2.0, 1.0]) == {"mean_squared_error": 2.5}


def test_exact_match_of_texts():
    assert measure(["exact_match"], ["not  entailment ", "Yes", "b"], ["not entailment", "yes", ["a", "b"]]) == {"exact_match": pytest.approx(2 / 3)}


SENTENCE = ["B-PER", "I-PER", "O", "I-LOC", "I-LOC", "B-LOC", "E-LOC", "S-ORG", "I-ORG", "O"]


def test_entities_of_a_sentence():
    """Lenient: an entity may begin with I, ends at E and S, and B begins a new one. Strict: only B and what follows it of its type."""
    assert entities.entities(SENTENCE) == {("PER", 0, 2), ("LOC", 3, 5), ("LOC", 5, 7), ("ORG", 7, 8), ("ORG", 8, 9)}
    assert entities.strict_entities(["B-PER", "I-PER", "I-LOC", "O", "I-PER", "B-LOC", "B-LOC"]) == {("PER", 0, 2), ("LOC", 5, 6), ("LOC", 6, 7)}


def test_entity_f1_by_hand():
    """seqeval's own example: of two true entities one is found in its place, another is a word too long: F1 1/2."""
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    guess = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = measure(["entity_f1"], guess, truth)
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "f1/MISC": 0.0, "f1/PER": 1.0}
    assert measure(["entity_f1"], [["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    with pytest.raises(ConfigError, match="sentence 0 has 1 predicted tags and 2 true ones"):
        measure(["entity_f1"], [["O"]], [["O", "O"]])
    with pytest.raises(ConfigError, match="'E-PER' is not of IOB2"):
        measure(["entity_f1:iob2"], [["E-PER"]], [["O"]])


def test_squad_of_version_1():
    """'The Cat, sat!' is 'cat sat'; two of three words in common give 2 * 2 / (3 + 3)."""
    assert spans.normalized("The Cat, a  sat-down!") == "cat satdown"
    found = measure(["squad"], ["The Cat, sat!", "in the old town"], [["a cat sat", "dog"], ["an old town hall", "x"]])
    assert found == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 4 / 6) / 2)}


def test_squad_of_version_2():
    """No answer is right where there is none, and wrong elsewhere; each kind of question has its own figures."""
    found = measure(["squad"], ["", "Paris", "", "the"], [[], [], ["Paris"], ["Rome"]])
    assert found == {
        "exact_match": 25.0, "f1": 25.0, "has_answer_exact_match": 0.0, "has_answer_f1": 0.0, "no_answer_exact_match": 50.0, "no_answer_f1": 50.0
    }  # fmt: skip


def test_cmrc_by_hand():
    """Characters are units and other words whole; F1 is of the longest run in common, here 北京 of 北京市 and 在北京的: 2 * 2 / (3 + 4)."""
    assert spans.chinese_units("在2018年，用“GPT-2 Large”模型, 约1,000次.") == ["在", "2018", "年", "用", "gpt2", "large", "模", "型", ",", "约", "1,000", "次", "."]
    assert spans.longest_run("abcde", "xbcdyabc") == 3
    found = measure(["cmrc"], ["在北京的", "《红楼梦》", "完全不同"], [["北京市", "上海"], ["红楼梦"], ["答案"]])
    assert found == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(100 * (4 / 7 + 1 + 0) / 3)}


def test_written_text_by_hand():
    """The published example of BLEU's modified precision (Papineni et al. 2002, section 2.1), and ROUGE-L's (Lin 2004, section 3.2): three and two words in order."""
    assert measure(["bleu"], ["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100)
    assert measure(["bleu"], ["the " * 7], [["the cat is on the mat", "there is a cat on the mat"]])["bleu"] < 10
    found = measure(["rouge"], ["police kill the gunman", "the gunman kill police"], ["police killed the gunman"] * 2)
    assert found["rougeL"] == pytest.approx(100 * (1 + 2 / 4) / 2) and found["rouge1"] == pytest.approx(100), "words are stemmed"
    assert measure(["rouge:characters"], ["红楼梦"], ["红楼"])["rouge1"] == pytest.approx(80) and measure(["rouge"], ["红楼梦"], ["红楼"])["rouge1"] == 0
    assert measure(["chrf"], ["abc"], ["abc"])["chrf"] == pytest.approx(100)


def test_lines_are_the_sentences_of_rouge_lsum():
    """Sentences in another order: of the whole text half is in order, sentence by sentence all is there."""
    found = measure(["rouge"], ["cats sleep\ndogs bark"], ["dogs bark\ncats sleep"])
    assert found["rougeL"] == pytest.approx(50) and found["rougeLsum"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "unknown metric 'acuracy'.*Did you mean 'accuracy'"),
        ("accuracy:3", "accuracy has no option"),
        ("bleu:mecab", "bleu:TOKENIZER with one of .*zh"),
        ("entity_f1:iob9", "allowed: entity_f1 .lenient. and entity_f1:iob2"),
        ("rouge:words", "rouge:characters"),
        ("chrf:7", "chrf:2"),
    ],
)
def test_unknown_names_are_told(name, message):
    with pytest.raises(ConfigError, match=message):
        measure([name], ["a"], ["a"])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("bleu", "chrf", "rouge"):
        with pytest.raises(ConfigError, match=r"pip install 'ptm\[metrics\]'"):
            metrics.metric_of(name)


def test_shuffled_answers_measure_the_same():
    """A metric is a mean or a count over records: their order does not matter."""
    rng = random.Random(1)
    order = rng.sample(range(len(TRUTH)), len(TRUTH))
    names = ["accuracy", "f1_binary", "f1_macro", "matthews"]
    assert measure(names, [GUESS[n] for n in order], [TRUTH[n] for n in order]) == pytest.approx(measure(names, GUESS, TRUTH))


@pytest.mark.parity
def test_metrics_equal_those_of_the_libraries():
    spec = importlib.util.spec_from_file_location("metric_checks", Path(__file__).parent.parent / "benchmarks/metric_checks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.checks()
    assert not [check for check in found if not check.passes]
    without = {"f1_binary", "exact_match", "cmrc", "multirc", "parity"}  # checked as precision, recall, f1; or by hand
    assert {check.metric for check in found} >= set(METRICS) - without and len(found) > 50

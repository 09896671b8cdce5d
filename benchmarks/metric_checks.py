"""Every metric of ptm.metrics beside the library that published figures come from, on the same random answers.

    python benchmarks/metric_checks.py          (needs the extras metrics and parity)

Prints a table and writes one JSON line a check to benchmarks/results/metric_checks.jsonl: the two values and their difference. Where the library itself
computes ours (BLEU, chrF, ROUGE), the check is of what we hand it. CMRC 2018 and unanswerable questions have no library: tests/test_metrics.py has values
worked by hand.
"""

import json
import random
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptm.metrics import measure

RESULTS = Path(__file__).parent / "results/metric_checks.jsonl"
TOLERANCE = {"torchmetrics": 1e-6}  # of the larger value: it computes in float32
EXACT = 1e-12  # of the others, in float64 like ours
WORDS = ("the", "a", "cat", "dog's", "sat", "on", "1,000", "mats", "again", "An", "running", "U.S.", "--", "over", "they", "runs")


class Check(NamedTuple):
    """A value of a metric of ours, of a library, and what was measured."""

    metric: str
    value: str
    ours: float
    library: str
    theirs: float

    @property
    def difference(self) -> float:
        return abs(self.ours - self.theirs)

    @property
    def passes(self) -> bool:
        return self.difference <= (TOLERANCE[self.library] if self.library in TOLERANCE else EXACT) * max(1.0, abs(self.theirs))


def _labels(rng: random.Random, count: int, labels: str) -> tuple[list[str], list[str]]:
    truth = rng.choices(labels, weights=range(1, len(labels) + 1), k=count)
    return [label if rng.random() < 0.6 else rng.choice(labels) for label in truth], truth


def of_labels(rng: random.Random) -> Iterator[Check]:
    """Accuracy, F1 and Matthews beside scikit-learn: two labels, five, and one that is never predicted."""
    from sklearn import metrics as sk
    from sklearn.preprocessing import MultiLabelBinarizer

    for labels in ("01", "abcde"):
        ours, truth = _labels(rng, 400, labels)
        if labels != "01":
            ours = ["a" if label == "b" else label for label in ours]
        names = ["accuracy", "f1_macro", "f1_micro", "matthews", *(["f1_binary"] if labels == "01" else ["f1_binary:c"])]
        values = measure(names, ours, truth)
        positive = "1" if labels == "01" else "c"
        binary = {"average": "binary", "pos_label": positive}
        if labels != "01":  # scikit-learn takes two labels only
            chosen, right = ([str(label == positive) for label in side] for side in (ours, truth))
            binary["pos_label"] = "True"
        else:
            chosen, right = ours, truth
        expected = {
            "accuracy": sk.accuracy_score(truth, ours), "f1_macro": sk.f1_score(truth, ours, average="macro"), "f1_micro": sk.f1_score(truth, ours, average="micro"),
            "matthews": sk.matthews_corrcoef(truth, ours), "precision": sk.precision_score(right, chosen, **binary),
            "recall": sk.recall_score(right, chosen, **binary), "f1": sk.f1_score(right, chosen, **binary),
        }  # fmt: skip
        for name, value in expected.items():
            yield Check(name, f"{len(labels)} labels", values[name], "scikit-learn", float(value))
    sets = [[sorted(set(rng.choices("abcd", k=rng.randint(1, 3)))) for _ in range(200)] for _ in range(2)]
    binarizer = MultiLabelBinarizer().fit(sets[0] + sets[1])
    expected = sk.f1_score(binarizer.transform(sets[1]), binarizer.transform(sets[0]), average="micro")
    yield Check("f1_micro", "sets of labels", measure(["f1_micro"], *sets)["f1_micro"], "scikit-learn", float(expected))


def of_numbers(rng: random.Random) -> Iterator[Check]:
    """Correlations beside SciPy, with and without ties."""
    from scipy import stats
    from sklearn.metrics import mean_squared_error

    for what, digits in (("no ties", 15), ("ties", 1)):
        truth = [round(rng.uniform(0, 5), digits) for _ in range(300)]
        ours = [round(value + rng.gauss(0, 1), digits) for value in truth]
        values = measure(["pearson", "spearman", "mean_squared_error"], ours, truth)
        yield Check("pearson", what, values["pearson"], "scipy", float(stats.pearsonr(ours, truth).statistic))
        yield Check("spearman", what, values["spearman"], "scipy", float(stats.spearmanr(ours, truth).statistic))
        yield Check("mean_squared_error", what, values["mean_squared_error"], "scikit-learn", float(mean_squared_error(truth, ours)))


def of_entities(rng: random.Random) -> Iterator[Check]:
    """Entity F1 beside seqeval: tags in any order of any scheme, leniently, and of IOB2, strictly."""
    from seqeval import metrics as se
    from seqeval.scheme import IOB2

    types = ("PER", "LOC", "ORG-X")
    for what, prefixes, name, options in (
        ("any tags", "BIES", "entity_f1", {}), ("IOB tags", "BI", "entity_f1", {}), ("strict IOB2", "BI", "entity_f1:iob2", {"mode": "strict", "scheme": IOB2}),
    ):  # fmt: skip
        tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in types)]
        truth = [rng.choices(tags, k=rng.randint(1, 12)) for _ in range(300)]
        ours = [[tag if rng.random() < 0.7 else rng.choice(tags) for tag in sentence] for sentence in truth]
        values = measure([name], ours, truth)
        for metric, function in (("precision", se.precision_score), ("recall", se.recall_score), ("f1", se.f1_score)):
            yield Check(name, f"{metric}, {what}", values[metric], "seqeval", float(function(truth, ours, **options)))
        for kind, value in zip(sorted(types), se.f1_score(truth, ours, average=None, **options)):
            yield Check(name, f"f1 of {kind}, {what}", values[f"f1/{kind}"], "seqeval", float(value))


def _texts(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    truth = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(count)]
    return [" ".join(word for word in text.split() if rng.random() < 0.8) or "none" for text in truth], truth


def of_spans(rng: random.Random) -> Iterator[Check]:
    """SQuAD beside torchmetrics, which has version 1; of version 2 the answerable questions."""
    from torchmetrics.functional.text import squad

    ours, truth = _texts(rng, 300)
    references = [[text, " ".join(text.split()[:3])] for text in truth]
    expected = squad(
        [{"prediction_text": text, "id": str(n)} for n, text in enumerate(ours)],
        [{"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(n)} for n, texts in enumerate(references)],
    )
    values = measure(["squad"], ours, references)
    with_none = measure(["squad"], [*ours, "", "a guess"], [*references, [], []])
    for name in ("exact_match", "f1"):
        yield Check("squad", f"{name}, version 1", values[name], "torchmetrics", float(expected[name]))
        yield Check("squad", f"{name} of the answerable, version 2", with_none[f"has_answer_{name}"], "torchmetrics", float(expected[name]))


def of_writing(rng: random.Random) -> Iterator[Check]:
    """BLEU and chrF beside sacrebleu's functions, ROUGE beside rouge-score."""
    import sacrebleu
    from rouge_score import rouge_scorer

    ours, truth = _texts(rng, 200)
    seconds = [" ".join(reversed(text.split())) for text in truth]
    both = [list(pair) for pair in zip(truth, seconds)]
    for what, references, given in (("one reference", truth, [truth]), ("two references", both, [truth, seconds])):
        yield Check("bleu", what, measure(["bleu"], ours, references)["bleu"], "sacrebleu", sacrebleu.corpus_bleu(ours, given).score)
        yield Check("chrf", what, measure(["chrf"], ours, references)["chrf"], "sacrebleu", sacrebleu.corpus_chrf(ours, given).score)
        yield Check("chrf:2", what, measure(["chrf:2"], ours, references)["chrf"], "sacrebleu", sacrebleu.corpus_chrf(ours, given, word_order=2).score)
    chinese = ["".join(rng.choices("我你他在有个的了一二三。", k=rng.randint(5, 12))) for _ in range(80)]
    shorter = [text[: rng.randint(4, len(text))] for text in chinese]
    expected = sacrebleu.corpus_bleu(shorter, [chinese], tokenize="zh").score
    yield Check("bleu:zh", "one reference", measure(["bleu:zh"], shorter, chinese)["bleu"], "sacrebleu", expected)
    lines = [text.replace(" on ", "\n") for text in ours]
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scored = [scorer.score(target, text) for target, text in zip(truth, lines)]
    values = measure(["rouge"], lines, truth)
    for kind in kinds:
        yield Check("rouge", kind, values[kind], "rouge-score", 100 * float(np.mean([row[kind].fmeasure for row in scored])))


def checks() -> list[Check]:
    """All checks, the same each time."""
    rng = random.Random(0)
    return [check for group in (of_labels, of_numbers, of_entities, of_spans, of_writing) for check in group(rng)]


def row_of(check: Check) -> dict[str, Any]:
    """A line of the table, with the library's version."""
    return {**check._asdict(), "library": f"{check.library} {metadata.version(check.library)}", "difference": check.difference, "passes": check.passes}


def main() -> None:
    rows = [row_of(check) for check in checks()]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"| metric | of | ours | library | theirs | difference |\n|{'---|' * 6}")
    for row in rows:
        print(f"| {row['metric']} | {row['value']} | {row['ours']:.6f} | {row['library']} | {row['theirs']:.6f} | {row['difference']:.1e} |")
    print(f"{sum(row['passes'] for row in rows)} of {len(rows)} agree.")


if __name__ == "__main__":
    main()

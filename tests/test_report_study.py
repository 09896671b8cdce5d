"""The report of a study: comparisons with the base, verdicts, holes, warnings, curves, published numbers."""

import itertools
import math

import numpy as np
import pytest
from reports import ACCURACY, BOTH, CLEAR, LOSS, STEPS, decay, entries, ordering, study
from scipy import stats

from ptm.report import results
from ptm.report import study as study_lib
from ptm.report.document import Note


def test_comparisons_with_the_base(tmp_path):
    found = results.Results(study(tmp_path, values=CLEAR, metrics=BOTH))
    first, second = found.summaries[ACCURACY]["one"], found.summaries[LOSS]["two"]
    assert (first.n, first.mean, first.sd) == (3, pytest.approx(81.0), pytest.approx(1.0)) and second.mean == pytest.approx(7.535 / 3)
    raw = {}
    for name, arm in itertools.product((ACCURACY, LOSS), ("two", "three")):
        own, base = ([values[arm_][seed] for seed in range(3)] for values in [found.values[name]] for arm_ in (arm, "one"))
        raw[name, arm] = stats.ttest_rel(own, base).pvalue
        assert found.contrasts[name][arm].found.p == pytest.approx(raw[name, arm])
        assert found.contrasts[name][arm].found.difference.mean == pytest.approx(np.mean(own) - np.mean(base))
    order = sorted(raw, key=raw.get)
    assert found.comparisons == 4 and found.contrasts[order[0][0]][order[0][1]].corrected == pytest.approx(4 * raw[order[0]])
    told = {(name, arm): contrast.told for name, by_arm in found.contrasts.items() for arm, contrast in by_arm.items()}
    assert told[ACCURACY, "two"] == told[LOSS, "two"] == "worse than base", "of a loss the lower is the better"
    assert told[ACCURACY, "three"] == told[LOSS, "three"] == "not distinguishable from base"


def test_verdicts(tmp_path):
    claims = [
        ordering("one", "two"),
        ordering("two", "one", LOSS),
        ordering("one", "three"),
        ordering("one", "three", relation="~"),
        ordering("one", "two", relation="~"),
    ]
    found = results.Results(study(tmp_path, values=CLEAR, metrics=BOTH, orderings=claims))
    assert [verdict.word for verdict in found.verdicts] == [
        "reproduced",
        "reversed",
        "not distinguishable",
        "no difference was found",
        "a difference was found",
    ]
    assert found.verdicts[1].found.difference.mean < 0 < found.verdicts[0].found.difference.mean
    equal = found.verdicts[3]
    assert "not equivalence" in equal.told and f"{equal.margin:.3g}" in equal.told
    assert results.counted(found.verdicts) == "1 reproduced, 1 reversed, 1 not distinguishable, 1 no difference was found, 1 a difference was found"


def test_one_seed_gives_no_verdict(tmp_path):
    values = {arm: given[:1] for arm, given in CLEAR.items()}
    found = results.Results(study(tmp_path, values=values, metrics=BOTH, orderings=[ordering("one", "two")]))
    assert found.verdicts[0].word == "not tested" and "one pair" in found.verdicts[0].told
    assert found.contrasts[ACCURACY]["two"].told.startswith("not tested: one pair")


def test_holes_are_named_and_pairs_are_those_that_both_have(tmp_path):
    values = {
        "one": [*entries((0.80, 2.00), (0.82, 2.02), (0.81, 2.01)), "missing"],
        "two": [*entries((0.70, 2.50)), "failed", *entries((math.nan, 2.525)), *entries((0.7, 2.5))],
        "three": ["cut", {"validation/loss": 2.0}, *entries((0.8, 2.0), (0.8, 2.0))],
    }
    found = results.Results(study(tmp_path, values=values, metrics=BOTH))
    told = {(hole.arms, hole.seed): (hole.state, hole.told) for hole in found.holes}
    assert (
        told[("one",), 3][0] == "missing"
        and told[("two",), 1][0] == "failed"
        and "the loss is nan" in told[("two",), 1][1]
        and "2 attempts" in told[("two",), 1][1]
    )
    assert told[("two",), 2] == ("finished", "ended with validation/accuracy = nan") and told[("three",), 1] == (
        "finished",
        "finished without validation/accuracy",
    )
    assert told[("three",), 0][0] == "cut" and f"of {STEPS}" in told[("three",), 0][1] and len(told) == 5
    assert found.contrasts[ACCURACY]["two"].found.difference.n == 1 and found.contrasts[LOSS]["two"].found.difference.n == 2
    made = study_lib.report(tmp_path)
    assert any(isinstance(block, Note) and block.tone == "warning" and "1 failed" in block.text for block in made.sections[0].blocks)
    [holes] = [table for table in made.tables if table.name == "holes"]
    assert len(holes.rows) == 5


def test_complete_studies_say_so(tmp_path):
    made = study_lib.report(study(tmp_path, values=CLEAR, metrics=BOTH))
    notes = {section.title: [block for block in section.blocks if isinstance(block, Note)] for section in made.sections}
    assert notes["Holes"][0].text.startswith("None:") and not [note for note in notes["Verdict"] if note.tone == "warning"]


def test_mixed_code_is_a_warning(tmp_path):
    made = study_lib.report(study(tmp_path, values=CLEAR, metrics=BOTH, commits={"two": "b2" * 20}))
    [warned] = [block.text for block in made.sections[0].blocks if isinstance(block, Note) and block.tone == "warning"]
    assert "2 versions of the code" in warned and "a1a1a1a1a1a1: 6 runs" in warned and "b2b2b2b2b2b2: 3 runs" in warned


def test_what_early_stopping_decided_is_a_table(tmp_path):
    rungs = [
        {"step": 20, "values": {"one": 0.5, "two": 0.25, "three": 0.75}, "kept": ["one", "three"], "stopped": ["two"]},
        {"step": 50, "values": {"one": 0.625, "three": None}, "kept": ["one", "three"], "stopped": []},
    ]
    values = {**CLEAR, "two": ["cut"] * 3}
    made = study_lib.report(study(tmp_path, values=values, metrics=BOTH, halving={"metric": ACCURACY, "rungs": [20, 50], "keep": 0.5}, rungs=rungs))
    [found] = [table for table in made.tables if table.name == "halving"]
    assert found.columns == ("arm", "after step 20", "after step 50", "what became of it")
    assert [[cell.text for cell in row] for row in found.rows] == [
        ["one", "50.00", "62.50", "went on, as the base"], ["two", "25.00", "–", "stopped after step 20"], ["three", "75.00", "–", "went on"],
    ]  # fmt: skip
    assert "accuracy, % (higher is better)" in found.note and "the best 50%" in found.note
    notes = [block for block in made.sections[0].blocks if isinstance(block, Note) and block.tone == "warning"]
    assert any("Early stopping chose among the arms" in block.text for block in notes)
    assert [hole.state for hole in results.Results(tmp_path).holes] == ["stopped"] * 3


def test_arms_that_share_their_runs_are_not_compared(tmp_path):
    found = results.Results(study(tmp_path, values={**CLEAR, "one again": CLEAR["one"]}, metrics=BOTH, shared={"one again": "one"}))
    assert found.contrasts[ACCURACY]["one again"].told == "the same runs as the base" and found.comparisons == 4


def test_a_claim_about_arms_that_share_their_runs_is_not_tested(tmp_path):
    """Differences that are 0 by construction are no evidence, and count in no correction."""
    claims = [ordering("one", "one again"), ordering("one", "one again", relation="~"), ordering("one", "two")]
    found = results.Results(study(tmp_path, values={**CLEAR, "one again": CLEAR["one"]}, metrics=BOTH, shared={"one again": "one"}, orderings=claims))
    assert [(verdict.word, verdict.told) for verdict in found.verdicts[:2]] == [("not tested", "both arms are the same runs")] * 2
    assert found.verdicts[2].corrected == found.verdicts[2].found.p


def test_curves_are_means_over_seeds_with_a_band(tmp_path):
    found = results.Results(study(tmp_path, values=CLEAR))
    points, seeds = found.curve("one", "pretrain", "validation/loss", scale=10.0)
    values = np.array([[value for _, value in decay(4.0, entry["validation/loss"])] for entry in CLEAR["one"]]) * 10
    assert seeds == 3 and [point[0] for point in points] == [step for step, _ in decay(4.0, 2.0)]
    np.testing.assert_allclose([point[1] for point in points], values.mean(axis=0))
    np.testing.assert_allclose([point[3] - point[1] for point in points], values.std(axis=0, ddof=1), atol=1e-12)


def test_published_numbers_stand_beside_ours(tmp_path):
    published = [
        {"arm": arm, "metric": ACCURACY, "value": value, "sd": sd, "source": "table 1"} for arm, value, sd in (("one", 92.7, None), ("two", 90.2, 0.4))
    ]
    made = study_lib.report(study(tmp_path, values=CLEAR, metrics=BOTH, published=published, orderings=[ordering("one", "two")]))
    tables = {table.name: table for table in made.tables}
    assert [cell.text for cell in tables["published"].rows[1]][:4] == ["two", "accuracy, %", "table 1", "90.2 ± 0.4"]
    assert tables["published"].rows[0][6].value == pytest.approx(81.0 - 92.7)
    claim = dict(zip(tables["verdicts"].columns, tables["verdicts"].rows[0]))
    assert claim["published difference"].value == pytest.approx(2.5) and claim["verdict"].text == "reproduced"


def test_nothing_stands_beside_ours_where_nothing_is_published(tmp_path):
    made = study_lib.report(study(tmp_path, values=CLEAR, metrics=BOTH, orderings=[ordering("one", "two")]))
    [verdicts] = [table for table in made.tables if table.name == "verdicts"]
    assert "published difference" not in verdicts.columns and not [table for table in made.tables if table.name == "published"]

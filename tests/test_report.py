"""`ptm report`: statistics by independent formulas, verdicts, holes, every way of writing, hostile text, and its page in a real browser (marker browser)."""

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from reports import COMMIT, NASTY, STEPS, decay, session, study, workdir
from scipy import stats

from ptm import cli, statistics, tree
from ptm.report import command, compare, document, page, reading, results, runs, text
from ptm.report import study as study_lib
from ptm.report.document import Note, Table

LOSS, ACCURACY = "pretrain:validation/loss", "pretrain:validation/accuracy"
BOTH = (
    {"name": ACCURACY, "higher": True, "scale": 100.0, "label": "accuracy, %"},
    {"name": LOSS, "higher": False, "scale": 1.0, "label": "loss"},
)  # fmt: skip


def entries(*pairs):
    return [{"validation/accuracy": accuracy, "validation/loss": loss} for accuracy, loss in pairs]


# Statistics.


@pytest.mark.parametrize("n", [2, 3, 7])
def test_summaries_and_paired_tests_agree_with_scipy(n):
    rng = np.random.default_rng(n)
    first, second = rng.normal(3, 1, n), rng.normal(2, 1, n)
    found = statistics.summary(first.tolist())
    assert (found.n, found.mean, found.sd) == (n, pytest.approx(first.mean()), pytest.approx(first.std(ddof=1)))
    assert found.interval == pytest.approx(stats.t.interval(0.95, n - 1, loc=first.mean(), scale=stats.sem(first)))
    tested, theirs = statistics.paired((first - second).tolist()), stats.ttest_rel(first, second)
    assert tested.p == pytest.approx(theirs.pvalue) and tested.difference.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_what_cannot_be_tested_is_not():
    assert statistics.paired([]) is None
    assert statistics.paired([0.5]).p is None and "one pair" in statistics.paired([0.5]).why
    assert statistics.paired([0.0, 0.0, 0.0]).p == 1.0
    equal = statistics.paired([0.3 - 0.2, 0.4 - 0.3, 0.9 - 0.8])  # 0.1 but for rounding
    assert equal.p is None and "no spread" in equal.why and equal.difference.sd < 1e-15


def test_holm():
    """The worked example p = .01, .04, .03, .005; then the definition, the largest of (m - j + 1) p_(j) over the ranks up to one's own."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == [] and statistics.holm([0.7, 0.6]) == [1.0, 1.0]
    rng = random.Random(0)
    for m in (1, 2, 5):
        ps = [rng.random() ** 3 for _ in range(m)]
        ordered = sorted(ps)
        expected = [max(min(1.0, (m - j) * ordered[j]) for j in range(ordered.index(p) + 1)) for p in ps]
        assert statistics.holm(ps) == pytest.approx(expected)


def test_equivalence_margin():
    """At the margin the worse of two one-sided t-tests is just at 5 %."""
    values = [0.1, -0.05, 0.2, 0.02]
    margin = statistics.equivalence_margin(values)
    ps = [stats.ttest_1samp(values, -margin, alternative="greater").pvalue, stats.ttest_1samp(values, margin, alternative="less").pvalue]
    assert max(ps) == pytest.approx(0.05) and statistics.equivalence_margin([1.0]) is None


# Studies.

CLEAR = {
    "one": entries((0.80, 2.00), (0.82, 2.02), (0.81, 2.01)),
    "two": entries((0.70, 2.50), (0.725, 2.51), (0.71, 2.525)),
    "three": entries((0.80, 2.05), (0.81, 2.00), (0.83, 1.99)),
}


def ordering(better, worse, metric=ACCURACY, relation=">"):
    return {"better": better, "worse": worse, "metric": metric, "relation": relation, "source": "table 1"}


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
    claims = [ordering("one", "two"), ordering("two", "one", LOSS), ordering("one", "three"), ordering("one", "three", relation="~"), ordering("one", "two", relation="~")]
    found = results.Results(study(tmp_path, values=CLEAR, metrics=BOTH, orderings=claims))
    assert [verdict.word for verdict in found.verdicts] == ["reproduced", "reversed", "not distinguishable", "no difference was found", "a difference was found"]
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
    assert told[("one",), 3][0] == "missing" and told[("two",), 1][0] == "failed" and "the loss is nan" in told[("two",), 1][1] and "2 attempts" in told[("two",), 1][1]
    assert told[("two",), 2] == ("finished", "ended with validation/accuracy = nan") and told[("three",), 1] == ("finished", "finished without validation/accuracy")
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


def test_arms_that_share_their_runs_are_not_compared(tmp_path):
    found = results.Results(study(tmp_path, values={**CLEAR, "one again": CLEAR["one"]}, metrics=BOTH, shared={"one again": "one"}))
    assert found.contrasts[ACCURACY]["one again"].told == "the same runs as the base" and found.comparisons == 4


def test_curves_are_means_over_seeds_with_a_band(tmp_path):
    found = results.Results(study(tmp_path, values=CLEAR))
    points, seeds = found.curve("one", "pretrain", "validation/loss", scale=10.0)
    values = np.array([[value for _, value in decay(4.0, entry["validation/loss"])] for entry in CLEAR["one"]]) * 10
    assert seeds == 3 and [point[0] for point in points] == [step for step, _ in decay(4.0, 2.0)]
    np.testing.assert_allclose([point[1] for point in points], values.mean(axis=0))
    np.testing.assert_allclose([point[3] - point[1] for point in points], values.std(axis=0, ddof=1), atol=1e-12)


def test_published_numbers_stand_beside_ours(tmp_path):
    published = [{"arm": arm, "metric": ACCURACY, "value": value, "sd": sd, "source": "table 1"} for arm, value, sd in (("one", 92.7, None), ("two", 90.2, 0.4))]
    made = study_lib.report(study(tmp_path, values=CLEAR, metrics=BOTH, published=published, orderings=[ordering("one", "two")]))
    tables = {table.name: table for table in made.tables}
    assert [cell.text for cell in tables["published"].rows[1]][:4] == ["two", "accuracy, %", "table 1", "90.2 ± 0.4"]
    assert tables["published"].rows[0][6].value == pytest.approx(81.0 - 92.7)
    claim = dict(zip(tables["verdicts"].columns, tables["verdicts"].rows[0]))
    assert claim["published difference"].value == pytest.approx(2.5) and claim["verdict"].text == "reproduced"


# Ways of writing.


def nasty(folder):
    metrics = [{**BOTH[0], "label": NASTY}, BOTH[1]]
    values = {NASTY: CLEAR["one"], f"{NASTY} two": [*CLEAR["two"][:2], "failed"]}
    return study(folder, values=values, metrics=metrics, claim=NASTY, orderings=[ordering(NASTY, f"{NASTY} two")])


def test_no_text_becomes_markup_on_the_page(tmp_path):
    made = page.render(study_lib.report(nasty(tmp_path)))
    assert made.count("<script") == 2 and made.count("</script>") == 2 and "<img" not in made and "{{" not in made and "\x1b" not in made
    held = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', made, re.DOTALL)[1])
    shown = document.clean(NASTY)
    arms = next(block for section in held["sections"] for block in section["blocks"] if block["kind"] == "table" and block["name"] == "arms")
    assert arms["rows"][0][0][0] == shown and arms["columns"][1] == shown
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert "http" not in made.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", made, re.DOTALL)[1]
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy


def test_no_text_becomes_a_command_of_a_terminal(tmp_path):
    said = text.terminal(study_lib.report(nasty(tmp_path)))
    assert not {c for c in said if not c.isprintable()} - {"\n"} and r"\x1b[31m" in said


def test_markdown_has_no_markup_of_the_data(tmp_path):
    made = text.markdown(study_lib.report(nasty(tmp_path)), {"pretrain-validation-loss": "report-x.png"})
    assert not re.search(r"(?<!\\)<(script|img)", made) and "](report-x.png)" in made
    lines = [line for line in made.splitlines() if line.startswith("|")]
    header = next(n for n, line in enumerate(lines) if line.startswith("| arm |"))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[header : header + 4]} == {4}, "an arm and two metrics in every row"


def test_latex_has_no_command_of_the_data(tmp_path):
    assert text.escaped(r"\input{a} 50_% & $x^2$ ~ #1 <b> -1.5 a-b") == (
        r"\textbackslash{}input\{a\} 50\_\% \& \$x\textasciicircum{}2\$ \textasciitilde{} \#1 \textless{}b\textgreater{} $-$1.5 a{-}b"
    )
    made = text.latex(study_lib.report(nasty(tmp_path)))
    assert r"\input" not in "".join(line for line in made.splitlines() if not line.startswith("%")) and made.count(r"\begin{tabular}") == made.count(r"\end{tabular}")
    for body in re.findall(r"\\midrule\n(.*?)\n\\bottomrule", made, re.DOTALL):
        counts = {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines()}
        assert len(counts) == 1, "every row has the same number of cells"


def test_csv_holds_the_values_to_the_last_bit(tmp_path):
    made = study_lib.report(nasty(tmp_path))
    for table in made.tables:
        columns, *rows = csv.reader(io.StringIO(text.csv(table)))
        assert tuple(columns) == table.columns and len(rows) == len(table.rows)
        for row, cells in zip(rows, table.rows):
            for given, cell in zip(row, cells):
                assert (given == "" if cell.value is None else given == cell.value if isinstance(cell.value, str) else float(given) == cell.value), (given, cell)
    values = next(table for table in made.tables if table.name == "values")
    assert values.rows[0][2].value == 100.0 * 0.80 and values.rows[1][4].value is None


def test_decimals_show_two_digits_of_the_spread():
    assert document.decimals_for([81.0], [0.034]) == 3 and document.decimals_for([81.0], [1.2]) == 1 and document.decimals_for([81.0], [None]) == 2
    assert document.decimals_for([2.0], [0.0004, 0.5]) == 5 and document.decimals_for([], []) == 4


def test_curves_are_thinned_without_losing_their_ends():
    points = document.thinned([(step, 1.0 / step) for step in range(1, 5001)] + [(5001, math.nan)])
    assert len(points) <= document.POINTS + 1 and points[-1][:2] == (5000, 1 / 5000)
    assert points[0][1] == pytest.approx(np.mean([1 / step for step in range(1, 10)]))
    assert text.sparkline([0.0, 1.0]) == "▁█" and text.sparkline([1.0]) == "▁" and len(text.sparkline(list(range(100)))) == text.SPARK


def test_columns_of_a_text_table_are_read_back():
    leaf = type("Leaf", (), {"shape": (3, 4)})
    shown = tree.table({"a": {"b": leaf}, "c": leaf}, columns={"axes": {"a/b": "embed mlp", "c": "vocab embed"}, "decay": {"a/b": "yes", "c": "no"}})
    assert reading.table_cells(shown) == [
        ["parameter", "shape", "size", "axes", "decay"], ["a/b", "3x4", "12", "embed mlp", "yes"], ["c", "3x4", "12", "vocab embed", "no"],
        ["total", "2 arrays", "24", "", ""],
    ]  # fmt: skip


# Runs.


def test_a_run(tmp_path, capsys):
    answers = [{"id": f"a:{n}", "prediction": NASTY, "reference": None} for n in range(20)]
    workdir(tmp_path / "run", finals={"validation/loss": 1.5, "validation/tokens": 9.0}, curve=decay(4.0, 1.5), answers=answers, changes={"train.batch_size": 2})
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "gpt / causal: run" in said and "finished, 100 steps" in said and f"written to {tmp_path / 'run/report.html'}" in said and "▁" in said
    made = runs.report(runs.found_runs([str(tmp_path / "run")]))
    tables = {table.name: table for table in made.tables}
    assert [[cell.value for cell in row] for row in tables["results"].rows] == [["validation/loss", 1.5]]
    samples = next(table for name, table in tables.items() if name.startswith("samples"))
    assert "step 100" in samples.title and len(samples.rows) == reading.SHOWN
    assert ("train.batch_size", "2") in {(row[0].text, row[2].text) for row in tables["difference"].rows}
    assert [cell.value for cell in tables["parameters"].rows[0]][:3] == ["layers/kernel", "2x16x8", 256]
    [loss] = [chart for chart in made.charts if chart.title == "loss"]
    assert [series.name for series in loss.series] == ["training", "validation"] and loss.series[0].units == {"tokens": 1050.0, "model FLOPs": 2e9, "seconds": 0.5}


def test_a_run_that_is_not_finished_and_was_continued_by_other_code(tmp_path):
    history = [session(), session(git={"commit": "b2" * 20, "dirty": True}, from_step=40)]
    made = runs.report([reading.read(workdir(tmp_path / "run", curve=decay(4.0, 1.5)[:5], finished=False, history=history))])
    warned = [block.text for block in made.sections[0].blocks if isinstance(block, Note) and block.tone == "warning"]
    assert "at step 50 of 100" in warned[0] and "another version of the code" in warned[1] and "in no commit" in warned[2]


def test_several_runs_and_seeds(tmp_path, capsys):
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        workdir(tmp_path / f"all/seed{seed}", changes={"seed": seed}, finals={"validation/loss": value}, curve=decay(4.0, value))
    made = runs.report(runs.found_runs([str(tmp_path / "all")]))
    tables = {table.name: table for table in made.tables}
    assert [cell.value for cell in tables["seeds"].rows[0]][1:4] == [3, 2.0, 1.0] and tables["results"].columns == ("metric", "seed0", "seed1", "seed2")
    workdir(tmp_path / "other", changes={"optimizer.learning_rate": 0.5}, finals={"validation/loss": 1.0}, curve=decay(4.0, 1.0))
    made = runs.report(runs.found_runs([str(tmp_path / "all"), str(tmp_path / "other")]))
    tables = {table.name: table for table in made.tables}
    assert [row[0].text for row in tables["config"].rows] == ["seed", "optimizer.learning_rate"] and "seeds" not in tables
    loss = next(chart for chart in made.charts if chart.title == "validation/loss")
    assert [series.name for series in loss.series] == ["all/seed0", "all/seed1", "all/seed2", "other"]
    assert cli.main(["report", str(tmp_path / "all/seed0"), str(tmp_path / "other")]) == 0
    assert "written to" not in capsys.readouterr().out and not (tmp_path / "all/seed0/report.html").exists()


def test_comparing_two_runs(tmp_path, capsys):
    same = {"finals": {"validation/loss": 1.5}, "curve": decay(4.0, 1.5)}
    first, again = workdir(tmp_path / "a", **same), workdir(tmp_path / "b", **same)
    history = [session(git={"commit": "b2" * 20, "dirty": False}, versions={"ptm": "0.1.0", "jax": "0.11.0", "numpy": "2.4.6"})]
    other = workdir(tmp_path / "c", changes={"train.batch_size": 2}, finals={"validation/loss": 1.25}, curve=decay(4.0, 1.25), history=history, data="e" * 16)
    assert cli.main(["report", "--compare", str(first), str(again)]) == 0
    said = capsys.readouterr().out
    assert "Nothing differs" in said and "equal to the last bit" in said
    made = compare.report(reading.read(first), reading.read(other))
    assert made.about == "Config differs, code differs, data differs, environment differs, results differ."
    rows = {table.name: [[cell.text for cell in row] for row in table.rows] for table in made.tables}
    assert rows["config"] == [["train.batch_size", "4", "2"]] or ["train.batch_size", "4", "2"] in rows["config"]
    assert rows["code"] == [["commit", COMMIT[:12], "b2b2b2b2b2b2"]] and rows["data"] == [["data", "d" * 16, "e" * 16]] and rows["machines"] == [["jax", "0.10.2", "0.11.0"]]
    assert rows["results"] == [["validation/loss", "1.5000", "1.2500", "-0.2500"]]
    assert any(isinstance(block, Note) and "from step 10 on" in block.text for section in made.sections for block in section.blocks)


def test_every_file(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra analysis")
    folder = study(tmp_path / "study", values=CLEAR, metrics=BOTH, orderings=[ordering("one", "two")])
    assert cli.main(["report", str(folder), f"--output={tmp_path / 'out'}", "--formats=html,md,tex,csv,png"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"report.html", "report.md", "report.tex", "report-arms.csv", "report-values.csv", "report-verdicts.csv", "report-pretrain-validation-loss.png"} <= set(names)
    assert [line.removeprefix(f"written to {tmp_path / 'out'}/") for line in sorted(capsys.readouterr().out.split("\n")) if line] == names
    assert "report-pretrain-validation-loss.png" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/report-pretrain-validation-loss.png").read_bytes().startswith(b"\x89PNG")


MISTAKES = {
    "nothing": ([], "needs the WORKDIR of a run"),
    "no such folder": (["nowhere"], "there is no folder 'nowhere'"),
    "no run": (["."], "has no config.json"),
    "one to compare": (["--compare", "."], "--compare needs two workdirs"),
    "unknown format": (["--formats=pdf", "run"], "allowed: terminal, html, md, tex, csv, png"),
    "files of several runs": (["run", "run2", "--formats=md"], "needs --output=DIR"),
    "study beside a run": (["study", "run"], "a report is of one study, or of several runs"),
    "study to compare": (["--compare", "study", "run"], "--compare takes two runs"),
    "override": (["run", "--config.train.steps=3"], "belongs to `ptm train`"),
    "unknown flag": (["run", "--outptu=x"], "Did you mean '--output=x'?"),
    "value of a switch": (["run", "run2", "--compare=yes"], "takes no value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line(case, capsys, tmp_path, monkeypatch):
    argv, said = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    for name in ("run", "run2"):
        workdir(tmp_path / name, curve=decay(4.0, 1.0))
    study(tmp_path / "study", values={"one": entries((0.5, 1.0))})
    assert cli.main(["report", *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == "" and not list(tmp_path.rglob("report*"))


# The page in a browser.


def test_tables_hold_every_cell():
    with pytest.raises(AssertionError):
        document.table("x", "x", ("a", "b"), [(document.words("1"),)])
    mixed = Table("x", "x", ("a",), ((document.number(1.0),), (document.NOTHING,)))
    assert mixed.numeric(0) and not Table("x", "x", ("a",), ((document.NOTHING,),)).numeric(0)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(watched, tmp_path, width):
    """Tables are sorted, curves zoomed by dragging, keys and buttons; hostile text does nothing, nothing is fetched and nothing fails."""
    folder = study(
        tmp_path / "study", values={**CLEAR, NASTY: [*CLEAR["two"][:2], "failed"]}, metrics=[{**BOTH[1], "label": NASTY}, BOTH[0]], claim=NASTY, orderings=[ordering("one", NASTY)]
    )
    command.report(command.Options(words=(str(folder),)))
    tab, said, asked = watched(folder / "report.html", width=width)
    assert tab.locator("h1").text_content() == document.clean(NASTY)
    # Sorting: by a number, then the other way round; cells without a value stay last.
    arms = tab.locator('[data-name="arms"]')

    def column(n):
        return [cell.strip() for cell in arms.locator(f"tbody td:nth-child({n})").all_text_contents()]

    assert column(1)[0] == "one"
    head = arms.locator("th").nth(1)
    head.locator("button").click()
    ascending = [float(cell.split(" ")[0]) for cell in column(2)]
    assert ascending == sorted(ascending) and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert [float(cell.split(" ")[0]) for cell in column(2)] == ascending[::-1] and head.get_attribute("aria-sort") == "descending"
    # A curve: its domain by dragging, by buttons and keys, and back.
    plot = tab.locator(".chart svg[role=img]").first
    plot.scroll_into_view_if_needed()

    def domain():
        return float(plot.get_attribute("data-from")), float(plot.get_attribute("data-to"))

    assert domain() == (10.0, 100.0)
    box = plot.bounding_box()
    left, right = box["x"] + 58, box["x"] + box["width"] - 14
    tab.mouse.move(left + (right - left) / 3, box["y"] + 60)
    tab.mouse.down()
    tab.mouse.move(left + (right - left) / 2, box["y"] + 70)
    tab.mouse.move(left + (right - left) * 2 / 3, box["y"] + 80)
    tab.mouse.up()
    assert domain() == pytest.approx((40.0, 70.0), abs=1.0)
    tab.locator(".chart").first.get_by_role("button", name="The whole curve").click()
    assert domain() == (10.0, 100.0)
    tab.locator(".chart").first.get_by_role("button", name="Closer").click()
    assert domain() == pytest.approx((32.5, 77.5))
    plot.focus()
    tab.keyboard.press("0")
    assert domain() == (10.0, 100.0)
    tab.keyboard.press("ArrowRight")
    assert re.match(r"At step 5[67]:", tab.locator(".chart .where").first.inner_text())
    # The values behind the names are those of the curve; a name hides it.
    tab.keyboard.press("Escape")
    shown = tab.locator(".chart").first.locator(".legend output").all_inner_texts()
    assert len(shown) == 4 and re.match(r"2\.01 \(2(\.000)? to 2\.02\)", shown[0])
    count = plot.locator("path").count()
    tab.locator(".chart").first.locator(".legend button").first.click()
    assert plot.locator("path").count() == count - 2, "line and band"
    # Over tokens, on a logarithmic scale.
    tab.locator(".controls select").first.select_option("tokens")
    assert domain() == pytest.approx((10 * 1050.0, 100 * 1050.0), rel=0.01)
    tab.locator(".controls input").first.check()
    tab.locator('[data-name="values"] summary').click()
    tab.locator('[data-name="values"] tbody tr').first.wait_for()
    assert tab.locator('[data-name="values"] tbody tr').count() == 8
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.locator("#theme").click()
    assert tab.locator("html").get_attribute("class") == "dark" and tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out sideways"
    assert said == [] and asked == [(folder / "report.html").as_uri()]

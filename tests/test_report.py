"""`ptm report` of runs: one, several, two told apart, every file that is written, mistakes."""

import math

import pytest
from reports import BOTH, CLEAR, COMMIT, NASTY, decay, entries, ordering, session, study, workdir

from ptm import cli, log, statistics
from ptm.report import compare, page, reading, runs
from ptm.report.document import Note


def test_a_run(tmp_path, capsys):
    answers = [{"id": f"a:{n}", "prediction": NASTY, "reference": None} for n in range(20)]
    workdir(
        tmp_path / "run", finals={"validation/loss": 1.5, "validation/tokens": 9.0}, curve=decay(4.0, 1.5), answers=answers, changes={"train.batch_size": 2}
    )
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
    assert [series.name for series in loss.series] == ["training", "validation"] and loss.series[0].units == {
        "tokens": 1050.0,
        "model FLOPs": 2e9,
        "seconds": 0.5,
    }


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


def test_seeds_of_several_settings_are_paired(tmp_path):
    """Each setting over its seeds, beside the first one; one that has a single seed is no ground for a test."""
    for name, values in (("fresh", (1.0, 2.0, 3.0)), ("tuned", (1.5, 2.4, 3.6)), ("other", (1.1, 2.0, 3.2))):
        for seed, value in enumerate(values):
            workdir(tmp_path / f"{name}/seed{seed}", changes={"seed": seed, "init": name}, finals={"validation/loss": value}, curve=decay(4.0, value))

    def seeds(*names):
        made = runs.report(runs.found_runs([str(tmp_path / name) for name in names]))
        return [table for table in made.tables if table.name == "seeds"]

    [two], [three] = seeds("fresh", "tuned"), seeds("fresh", "tuned", "other")
    assert two.columns[1] == "setting" and [row[1].text for row in three.rows] == ["fresh", "tuned", "other"]
    base, tuned = ([cell.value for cell in row] for row in two.rows)
    assert base[2:4] == [3, 2.0] and base[6:] == [None] * 5
    expected = statistics.paired([0.5, 0.4, 0.6])
    assert tuned[6] == 3 and tuned[7] == pytest.approx(0.5) and tuned[9] == tuned[10] == pytest.approx(expected.p) and expected.p < 0.02
    assert three.rows[1][10].value == pytest.approx(2 * expected.p), "corrected for two comparisons"
    assert not seeds("fresh", "tuned/seed0")


def test_seeds_without_a_finite_value(tmp_path):
    for seed, value in enumerate((1.0, math.nan, 3.0)):
        workdir(tmp_path / f"seed{seed}", changes={"seed": seed}, finals={"validation/loss": value, "validation/accuracy": math.inf}, curve=decay(4.0, 1.0))
    made = runs.report(runs.found_runs([str(tmp_path)]))
    assert [[cell.value for cell in row][:3] for table in made.tables if table.name == "seeds" for row in table.rows] == [["validation/loss", 2, 2.0]]
    page.render(made)


def test_a_workdir_that_is_named_twice_is_one(tmp_path):
    workdir(tmp_path / "a", curve=decay(4.0, 1.0))
    assert len(runs.found_runs([str(tmp_path / "a"), f"{tmp_path}/a/"])) == 1


def test_skipped_steps_are_told_though_every_row_is_of_one(tmp_path):
    path = workdir(tmp_path / "a", curve=decay(4.0, 1.0))
    (path / "metrics.jsonl").write_text("".join(log.row(step, {"loss": 1.0, "skipped": 1.0}) + "\n" for step in (3, 5)))
    made = runs.report([reading.read(path)])
    assert any("2 steps were skipped" in block.text for block in made.sections[0].blocks if isinstance(block, Note))


def test_runs_that_diverged_alike_do_not_differ(tmp_path):
    both = [reading.read(workdir(tmp_path / name, finals={"validation/loss": math.nan}, curve=decay(4.0, 1.5))) for name in "ab"]
    made = compare.report(*both)
    assert made.about.startswith("Nothing differs") and "results" not in {table.name for table in made.tables}


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
    assert (
        rows["code"] == [["commit", COMMIT[:12], "b2b2b2b2b2b2"]]
        and rows["data"] == [["data", "d" * 16, "e" * 16]]
        and rows["machines"] == [["jax", "0.10.2", "0.11.0"]]
    )
    assert rows["results"] == [["validation/loss", "1.5000", "1.2500", "-0.2500"]]
    assert any(isinstance(block, Note) and "from step 10 on" in block.text for section in made.sections for block in section.blocks)


def test_every_file(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra analysis")
    folder = study(tmp_path / "study", values=CLEAR, metrics=BOTH, orderings=[ordering("one", "two")])
    assert cli.main(["report", str(folder), f"--output={tmp_path / 'out'}", "--formats=html,md,tex,csv,png"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {
        "report.html",
        "report.md",
        "report.tex",
        "report-arms.csv",
        "report-values.csv",
        "report-verdicts.csv",
        "report-pretrain-validation-loss.png",
    } <= set(names)
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

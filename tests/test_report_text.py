"""Every way of writing a report: hostile text, values to the last bit; and the page in a real browser (marker browser)."""

import base64
import csv
import dataclasses
import hashlib
import io
import json
import math
import re
import socket

import numpy as np
import pytest
from reports import BOTH, CLEAR, NASTY, nasty, nasty_run, ordering, study

from ptm import statistics, tree
from ptm.report import command, document, page, reading, runs, text
from ptm.report import study as study_lib
from ptm.report.document import Table


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


def test_no_text_of_a_run_becomes_markup_or_a_command(tmp_path):
    made = runs.report(runs.found_runs([str(nasty_run(tmp_path))]))
    html = page.render(made)
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<img" not in html and "\x1b" not in html
    assert "alert(1)" in html and "alert(4)" in html and "alert(5)" in html, "what is hostile is shown, as text"
    assert not {c for c in text.terminal(made) if not c.isprintable()} - {"\n"}
    assert not re.search(r"(?<!\\)<(script|img)", text.markdown(made, {}))
    assert r"\input" not in "".join(line for line in text.latex(made).splitlines() if not line.startswith("%"))


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
    assert text.escaped("[MASK] *alone*") == "{[}MASK{]} {*}alone{*}", "a row may begin with it, behind the end of another row"
    made = text.latex(study_lib.report(nasty(tmp_path)))
    assert r"\input" not in "".join(line for line in made.splitlines() if not line.startswith("%")) and made.count(r"\begin{tabular}") == made.count(
        r"\end{tabular}"
    )
    for body in re.findall(r"\\midrule\n(.*?)\n\\bottomrule", made, re.DOTALL):
        counts = {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines()}
        assert len(counts) == 1, "every row has the same number of cells"


def halves(cell):
    """Both ends of an interval as cells."""
    return [dataclasses.replace(cell, value=end) for end in cell.ends or (None, None)]


def test_csv_holds_the_values_to_the_last_bit(tmp_path):
    made = study_lib.report(nasty(tmp_path))
    for table in made.tables:
        columns, *rows = csv.reader(io.StringIO(text.csv(table)))
        cells_of = [[part for n, cell in enumerate(row) for part in (halves(cell) if table.spans(n) else (cell,))] for row in table.rows]
        expected = [part for n, name in enumerate(table.columns) for part in ((f"{name}: low", f"{name}: high") if table.spans(n) else (name,))]
        assert columns == expected and len(rows) == len(table.rows)
        for row, cells in zip(rows, cells_of):
            for given, cell in zip(row, cells, strict=True):
                assert given == "" if cell.value is None else given == cell.value if isinstance(cell.value, str) else float(given) == cell.value, (given, cell)
    values = next(table for table in made.tables if table.name == "values")
    assert values.rows[0][2].value == 100.0 * 0.80 and values.rows[1][4].value is None
    [details, _] = [table for table in made.tables if table.name.startswith("arms-")]
    first = next(csv.DictReader(io.StringIO(text.csv(details))))
    ours = statistics.summary([100.0 * value["validation/accuracy"] for value in CLEAR["one"]])
    assert (float(first["95 % interval: low"]), float(first["95 % interval: high"])) == ours.interval


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
        tmp_path / "study",
        values={**CLEAR, NASTY: [*CLEAR["two"][:2], "failed"]},
        metrics=[{**BOTH[1], "label": NASTY}, BOTH[0]],
        claim=NASTY,
        orderings=[ordering("one", NASTY)],
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


@pytest.mark.browser
@pytest.mark.parametrize("words", ["run", "compare", "study"])
def test_hostile_text_does_nothing_in_a_browser(words, watched, tmp_path):
    """Every page is opened, its closed parts too: no script of the data runs, nothing is fetched, no element is made of text."""
    if words == "study":
        given = command.Options(words=(str(nasty(tmp_path / "s")),), output=str(tmp_path / "out"))
    elif words == "run":
        given = command.Options(words=(str(nasty_run(tmp_path / "a")),), output=str(tmp_path / "out"))
    else:
        given = command.Options(words=(str(nasty_run(tmp_path / "a")), str(nasty_run(tmp_path / "b"))), output=str(tmp_path / "out"), compare=True)
    command.report(given)
    tab, said, asked = watched(tmp_path / "out/report.html", width=1280)
    for closed in tab.locator("summary").all():
        closed.click()
    shown = tab.locator("body").inner_text()
    assert "alert(1)" in shown and tab.locator("img, iframe, object, embed").count() == 0 and tab.locator("script").count() == 2
    assert tab.locator("a[href^='javascript']").count() == 0
    assert said == [] and asked == [(tmp_path / "out/report.html").as_uri()]


@pytest.mark.browser
def test_the_policy_stops_what_would_get_through(watched, tmp_path):
    """Were a text to become markup after all, its scripts would not run and nothing would be fetched."""
    made = page.render(runs.report(runs.found_runs([str(nasty_run(tmp_path))])))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        picture = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
        hostile = f'<script>alert(1)</script><img src="{picture}" onerror="alert(2)"><a id="go" href="javascript:alert(3)">go</a>'
        (tmp_path / "page.html").write_text(made.replace("</body>", f"{hostile}</body>"), encoding="utf-8")
        tab, said, _ = watched(tmp_path / "page.html", width=1280)
        tab.locator("#go").click()
        with pytest.raises(TimeoutError):
            server.accept()
    assert "dialog" not in said
    assert len([line for line in said if "Content Security Policy" in line]) >= 3

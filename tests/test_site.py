"""The documentation as a site (marker docs), in a real browser (marker browser), and its notebook run to its end (marker docs)."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a broken link, a page without a place and a place without a page are errors."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def served(site):
    """The address of the site, as a server on this machine gives it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.docs
def test_what_the_site_shows(site):
    """README.md is its front page; links to files outside of docs/ lead to pages that show them; the reference and the notebook are there."""
    front = (site / "index.html").read_text()
    assert 'href="repository/experiments/index.html"' in front and 'href="launch.html"' in front
    assert "def get_config(argument" in re.sub("<[^>]*>", "", (site / "repository/configs/quickstart.py.html").read_text())
    assert (site / "reference/commands.html").is_file() and 'href="quickstart.ipynb"' in (site / "notebooks/quickstart.html").read_text()
    assert not list(site.rglob("*.py")) and "https://fonts" not in front


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES)
def test_pages_at_two_widths(site, watched, size):
    """Every page, opened from a disk: nothing sticks out sideways, nothing is complained of, and nothing is fetched from elsewhere."""
    width, height = SIZES[size]
    tab, said, asked = watched(site / "index.html", width=width, height=height)
    for page in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # which only a server gives
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), page
        assert said == [], page
    assert all(address.startswith((site.as_uri(), "data:", "blob:")) for address in asked)


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["disk", "server"])
def test_search(site, served, watched, size, way):
    """A config key, a flag and a message are found, from a page in a folder too."""
    width, height = SIZES[size]
    start = site.as_uri() if way == "disk" else served
    tab, said, asked = watched(f"{start}/tutorials/text.html", width=width, height=height)
    if size == "phone":
        tab.locator("label.md-header__button[for=__search]").click()
    for words, page in (("microbatches", "reference/config.html"), ("allow_change", "reference/commands.html"), ("matches no file", "troubleshooting.html")):
        tab.locator("input.md-search__input").fill("")
        tab.locator("input.md-search__input").press_sequentially(words)
        tab.locator(f".md-search-result__link[href*='{page}']").first.wait_for()
    tab.locator(f".md-search-result__link[href*='{page}']").first.click()
    tab.wait_for_url(f"**/{page}*")
    assert said == [] and all(address.startswith((start, "data:", "blob:")) for address in asked)


@pytest.mark.docs
def test_the_notebook_runs(tmp_path):
    """Headless, as it is stored, in a folder that has the recipes."""
    nbclient, nbformat = pytest.importorskip("nbclient", reason="needs the extra docs"), pytest.importorskip("nbformat")
    for name in ("configs", "ptm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ptm").write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m ptm.cli "$@"\n')
    (tmp_path / "bin/ptm").chmod(0o755)
    book = nbformat.read(ROOT / "docs/notebooks/quickstart.ipynb", as_version=4)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute(env=env)
    said = "".join(output["text"] for cell in book.cells if cell.cell_type == "code" for output in cell.outputs if output.output_type == "stream")
    rows = [json.loads(line) for line in (tmp_path / "runs/notebook/metrics.jsonl").read_text().splitlines()]
    losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True) and "step  120  validation loss" in said
    assert (tmp_path / "runs/notebook/report.html").is_file() and '"prediction": "good"' in said
    assert said.count("ptm: 1 lines answered.") == 2 and "Traceback" not in said

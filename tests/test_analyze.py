"""`ptm analyze` as a whole, its mistakes, and its page, in a real browser too (marker browser)."""

import base64
import functools
import hashlib
import json
import re

import jax
import numpy as np
import pytest
import runs

from ptm import cli, registry, run
from ptm import config as config_lib
from ptm.analysis import attention, maps, page


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """kind of run -> a workdir with the parameters that it begins with"""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("analyze") / kind
        folder.mkdir()
        text = runs.corpus(folder.parent / f"{kind}.txt")
        this = run.setup(registry.resolve(runs.tiny(kind, text=text)), workdir=folder, devices=jax.devices()[:1])
        (folder / "config.json").write_text(json.dumps(config_lib.to_dict(this.config)))
        with run.open_checkpoints(this, folder / "ckpt") as checkpoints:
            checkpoints.save(0, {"params": this.init_params()}, streams={}, meta={"step": 0, "tokenizer": this.tokenizer.fingerprint})
        return folder

    return make


def analyzed(capsys, *argv):
    """The JSON line of a command that succeeds, and what it printed before."""
    assert cli.main(["analyze", *argv]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.strip().split("\n")
    return json.loads(lines[-1]), lines[:-1]


@pytest.mark.parametrize(("kind", "views"), [("mlm", ["self"]), ("spans", ["encoder", "decoder", "cross"])])
def test_attention_command(tmp_path, workdir, capsys, kind, views):
    pytest.importorskip("matplotlib", reason="needs the extra analysis")
    (tmp_path / "in.txt").write_text("the model\n\nof a </script> word\n")
    target = ["--target=to learn"] if kind == "spans" else []
    output = tmp_path / "out"
    result, _ = analyzed(
        capsys, f"--model=ckpt:{workdir(kind)}", "--what=attention", f"--input={tmp_path / 'in.txt'}", f"--output={output}", "--shown=1", *target
    )
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(["attention.html", "heads.json", "maps.npz", *(f"maps-1-{view}.png" for view in views), *(f"heads-{view}.png" for view in views)])
    assert [str(output / name) for name in names] == result["files"] and result["texts"] == 2 and list(result["means"]) == views
    arrays = np.load(output / "maps.npz")
    assert list(arrays) == [f"1/{view}" for view in views]
    for array in arrays.values():
        np.testing.assert_allclose(array.sum(axis=-1), 1, atol=1e-5)
    heads = json.loads((output / "heads.json").read_text())
    assert np.shape(heads["heads"][views[0]]["entropy"]) == arrays[f"1/{views[0]}"].shape[:2]


def test_probe_command(tmp_path, workdir, capsys):
    rows = [{"body": f"{'the small model' if n % 2 else 'a word has'} {n}", "mark": n % 2} for n in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    result, shown = analyzed(
        capsys, f"--model=ckpt:{workdir('mlm')}", "--what=probe", f"--input=jsonl:{tmp_path / 'd.jsonl'}", "--columns=text=body,label=mark",
        f"--output={tmp_path / 'out'}", "--pictures=no",
    )  # fmt: skip
    assert result["accuracy"][0] == 1.0 and len(result["accuracy"]) == 3 and result["train"] + result["test"] == 60 and result["test"] > 3
    assert result["skipped"]["records that cannot be read"] >= 1 and any("layer  2" in line for line in shown)
    assert json.loads((tmp_path / "out/probe.json").read_text())["labels"] == ["0", "1"]


CROWS = (
    ",sent_more,sent_less,stereo_antistereo,bias_type\n0,The poor are lazy.,The rich are lazy.,stereo,socioeconomic\n"
    "1,The old man sat.,The young man sat.,antistereo,age\n2,Blue zzz.,Blue yyy.,stereo,age\n"
)


def test_bias_command(tmp_path, workdir, capsys):
    (tmp_path / "c.csv").write_text(CROWS)
    result, shown = analyzed(
        capsys, f"--model=ckpt:{workdir('mlm')}", "--what=bias", "--suite=crows_pairs", f"--input={tmp_path / 'c.csv'}",
        f"--output={tmp_path / 'out'}", "--pictures=no",
    )  # fmt: skip
    assert result["measure"] == "pseudo-log-likelihood" and result["figures"]["all"]["count"] == 3 and any("Blodgett" in line for line in shown)
    assert len((tmp_path / "out/examples.jsonl").read_text().splitlines()) == 3


MISTAKES = {
    "no model": (["--what=probe", "--input=x", "--output=o"], "needs --model=SPEC"),
    "no kind": (["--model=ckpt:x", "--output=o"], "needs --what=attention|probe|bias"),
    "no output": (["--model=ckpt:x", "--what=probe", "--input=x"], "needs --output=DIR"),
    "unknown kind": (["--model=ckpt:x", "--what=attentoin", "--text=a", "--output=o"], "Did you mean 'attention'?"),
    "no text": (["--model=ckpt:x", "--what=attention", "--output=o"], "one of --text=TEXT and --input=FILE"),
    "no suite": (["--model=ckpt:x", "--what=bias", "--input=x", "--output=o"], "needs --suite=NAME"),
    "flag of another kind": (["--model=ckpt:x", "--what=bias", "--suite=winobias", "--input=x", "--output=o", "--pool=cls"], "--pool belongs to --what=probe"),
    "value": (["--model=ckpt:x", "--what=probe", "--input=x", "--output=o", "--l2=much"], "--l2=much cannot be read"),
    "no such model": (["--model=ckpt:nowhere", "--what=attention", "--text=a", "--output=o", "--pictures=no"], "there is no folder 'nowhere'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line(case, capsys, tmp_path, monkeypatch):
    argv, said = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["analyze", *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == "" and not list(tmp_path.iterdir())


def test_texts_that_cannot_be_looked_at(tmp_path, workdir, capsys):
    model = f"--model=ckpt:{workdir('mlm')}"
    for given_, said in [
        (["--text=" + "word " * 30], "but the model reads 48 at most"),
        (["--text="], "has no token"),
        (["--text=a", "--target=b"], "reads no --target; give --pair"),
        ([f"--input={tmp_path / 'none.txt'}"], "cannot be read"),
    ]:
        assert cli.main(["analyze", model, "--what=attention", f"--output={tmp_path / 'out'}", "--pictures=no", *given_]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    assert cli.main(["analyze", model, "--what=attention", f"--output={tmp_path / 'out'}", "--text=a", "--pictures=no"]) == 2
    assert "not empty" in capsys.readouterr().err and (tmp_path / "out/mine").read_text() == "kept"


# The page.

NASTY = '</script><img src=x onerror="alert(1)"> & \u2028<!--'


def view(name="self", *, queries=4, keys=4, layers=2, heads=3, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(keys, 0.3), size=(layers, heads, queries)).astype(np.float32)
    return maps.View(name, [f"q{n}" for n in range(queries - 1)] + [NASTY], [f"k{n}" for n in range(keys)], np.arange(keys) == 0, weights)


def unpacked(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<u2").reshape(packed["shape"]) / 65535


def test_page_holds_the_maps_and_nothing_that_runs():
    """The numbers come back as they went in; text can neither end its element nor run; the policy names the hashes of exactly what is there."""
    own, cross = view(), view("cross", keys=6)
    made = page.render([(NASTY, [own, cross])], title=NASTY, about="a & b")
    assert made.count("<script") == 2 and made.count("</script>") == 2 and "<img" not in made and "{{" not in made
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', made, re.DOTALL)[1])
    assert data["texts"][0]["text"] == NASTY and data["texts"][0]["views"][0]["queries"][-1] == NASTY
    shown = data["texts"][0]["views"][0]["maps"]
    for name, expected in {
        "head": own.maps_NHLT,
        "mean": own.maps_NHLT.mean(axis=1),
        "rollout": attention.rollout(own.maps_NHLT),
        "flow": maps.flow(own),
    }.items():
        np.testing.assert_allclose(unpacked(shown[name]), expected, atol=1e-5)
    assert data["texts"][0]["views"][1]["maps"]["rollout"] is None and data["texts"][0]["views"][1]["maps"]["flow"] is None
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)[1]
    assert (
        policy.startswith("default-src 'none'; ")
        and "unsafe" not in policy
        and "http" not in made.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    )
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", made, re.DOTALL)[1]
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(watched, tmp_path, width):
    """What a person sees after clicking a head, pointing at tokens and pressing keys are the numbers of the maps; nothing is fetched and nothing fails."""
    views = [view(queries=5, keys=5), view("cross", keys=6, seed=1)]
    other = view(queries=3, keys=3, seed=2)
    (tmp_path / "attention.html").write_text(page.render([(NASTY, views), ("second", [other])], title=NASTY, about="about"), encoding="utf-8")
    tab, said, asked = watched(tmp_path / "attention.html", width=width)
    assert tab.locator("h1").text_content() == NASTY
    assert tab.locator("#overview button").count() == 6

    def weights(side):
        return [float(text) for text in tab.locator(f"#{side} .weight").all_inner_texts() if text]

    def see(expected, side="keys"):
        np.testing.assert_allclose(weights(side), expected, atol=6e-4)

    own = views[0].maps_NHLT
    assert weights("keys") == []
    tab.locator('#overview [data-layer="1"][data-head="2"]').click()
    assert tab.locator("#matrix-title").inner_text() == "Layer 1, head 2"
    tab.locator("#queries button").nth(3).hover()
    see(own[1, 2, 3])
    best = int(np.argmax(own[1, 2, 3]))
    assert f"“k{best}” ({best}) {own[1, 2, 3, best]:.3f}"[:-1] in tab.locator("#readout").inner_text()
    tab.locator("#keys button").nth(1).hover()
    see(own[1, 2, :, 1], side="queries")
    # A token that was clicked stays, until Escape.
    tab.locator("#queries button").nth(0).click()
    tab.mouse.move(2, 2)
    see(own[1, 2, 0])
    assert tab.locator("#queries button").nth(0).get_attribute("aria-pressed") == "true"
    for mode, expected in {"mean": own.mean(axis=1)[1, 0], "rollout": attention.rollout(own)[1, 0], "flow": attention.flow(own)[0]}.items():
        tab.locator(f"input[value={mode}]").check()
        see(expected)
    tab.locator("input[value=rollout]").check()
    tab.locator("#layer").select_option("0")
    see(attention.rollout(own)[0, 0])
    tab.keyboard.press("Escape")
    assert weights("keys") == []
    # Keys alone: choose a head, go to a token, move down, keep it.
    tab.locator('#overview [data-layer="0"][data-head="0"]').focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#matrix-title").inner_text() == "Layer 0, head 1" and tab.locator("input[value=head]").is_checked()
    tab.locator("#queries button").nth(1).focus()
    tab.keyboard.press("ArrowDown")
    see(own[0, 1, 2])
    tab.keyboard.press("Enter")
    assert tab.locator("#queries button").nth(2).get_attribute("aria-pressed") == "true"
    # The heat map.
    tab.locator("#matrix").hover(position={"x": tab.locator("#matrix").bounding_box()["width"] - 12, "y": tab.locator("#matrix").bounding_box()["height"] - 12})
    shown = re.search(r"\((\d+)\) gives .* \((\d+)\) the weight ([\d.]+)", tab.locator("#readout").inner_text())
    if shown:
        assert float(shown[3]) == pytest.approx(own[0, 1, int(shown[1]), int(shown[2])], abs=6e-4)
    # Other kinds of attention and texts.
    tab.locator("#view").select_option("1")
    assert tab.locator("input[value=rollout]").is_disabled() and tab.locator("#keys button").count() == 6
    tab.locator("#queries button").nth(0).hover()
    see(views[1].maps_NHLT[0, 1, 0])
    tab.locator("#text").select_option("1")
    tab.locator("#queries button").nth(0).hover()
    see(other.maps_NHLT[0, 1, 0])
    tab.locator("#theme").click()
    assert tab.locator("html").get_attribute("class") == "dark"
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out sideways"
    assert said == [] and asked == [(tmp_path / "attention.html").as_uri()]

"""docs/start.md and the pages of docs/tutorials: their commands, in order and as they stand, but with few steps of small models and few seeds.

Blocks of the language `bash` are run; blocks of `sh` need models or data from elsewhere, and of those it is only checked that their recipes, flags and keys exist.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptm import cli

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path for path in (ROOT / "docs/start.md", *sorted((ROOT / "docs/tutorials").glob("*.md")))}
PAGES["zh"] = ROOT / "docs/zh/bert.md"
# `ptm` of the pages: what is trained gets a few steps, what begins from nothing is small, and seeds are two. The first run of runs/my-bert ends early, as if it had been
# interrupted.
PTM = f"""#!/usr/bin/env bash
set -euo pipefail
more=(--config.train.steps=4 --config.schedule.warmup_steps=1)
case "$*" in
  *runs/my-bert) [ -e runs/my-bert ] || more[0]=--config.train.steps=2 ;;
  *--seeds=5*) more+=(--seeds=2) ;;
esac
case "$*" in
  train*,tiny*) more=() ;;
  train*configs/quickstart.py*) more+=(--config.model.num_layers=1 --config.model.width=32 --config.model.num_heads=2) ;;
  train*) ;;
  study*) more=(); sed -i -E "s/range\\(5\\)/range(2)/; s/seeds=\\(0, 1, 2\\)/seeds=(0, 1)/; s/: (100|60),/: 4,/; s/: (10|6),/: 1,/; s/: 20}}/: 2}}/" "$2" ;;
  *) more=() ;;
esac
exec "{sys.executable}" -m ptm.cli "$@" "${{more[@]}}"
"""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last(folder: Path, run: str) -> dict:
    """The last values that a run wrote down."""
    return dict(item for row in lines(folder / "runs" / run / "metrics.jsonl") for item in row.items())


def text(folder: Path, said: list[dict]) -> None:
    assert len(lines(folder / "texts/written.jsonl")) == 2 and [len(answer["texts"]) for answer in lines(folder / "texts/written.jsonl")] == [2, 2]
    assert {"text", "ended"} <= said[0].keys() and [answer["log_likelihood"] < 0 for answer in said[1:]] == [True] * 3


def dialogue(folder: Path, said: list[dict]) -> None:
    assert isinstance(said[0]["text"], str) and "user:" not in said[0]["text"]
    assert "dev/bleu" in last(folder, "dialogue") and list((folder / "runs/dialogue/predictions").glob("dev-*.jsonl"))


def question_answering(folder: Path, said: list[dict]) -> None:
    assert {"dev/exact_match", "dev/f1"} <= said[0].keys()
    (answer,) = lines(folder / "questions/answer.jsonl")
    assert answer["id"] == 1 and answer["prediction"] in "Greta was born in Lima in 1950. Later Greta moved to the sea." and answer["n_best"]
    assert [answer["id"] for answer in lines(folder / "questions/answers.jsonl")] == [f"{n}-{k}" for n in range(20) for k in (0, 1)]


def translation(folder: Path, said: list[dict]) -> None:
    assert {"dev/bleu", "dev/chrf", "test/bleu"} <= last(folder, "numbers").keys()
    assert [isinstance(answer["prediction"], str) for answer in said[:2]] == [True] * 2 and len(said[2]["texts"]) == 2
    assert len(lines(folder / "numbers/test.jsonl")) == 50


def summarization(folder: Path, said: list[dict]) -> None:
    assert "dev/rougeL" in last(folder, "mails") and isinstance(said[0]["prediction"], str) and len(lines(folder / "mails/written.jsonl")) == 20


def classification(folder: Path, said: list[dict]) -> None:
    assert {"dev/accuracy", "dev/f1_macro", "dev/matthews"} <= said[0].keys()
    assert [answer["prediction"] in ("good", "bad") for answer in said[1:3]] == [True] * 2 and said[1]["id"] == 7
    assert len(lines(folder / "reviews/answers.jsonl")) == 20 and "error" not in lines(folder / "reviews/answers.jsonl")[0]
    summary = json.loads((folder / "runs/reviews-seeds/seeds.json").read_text())
    assert summary["metrics"]["dev/accuracy"]["n"] == 3 and len(summary["rows"]) == 3
    (vector,) = lines(folder / "reviews/vector.jsonl")
    assert sum(x * x for x in vector["embedding"]) == pytest.approx(1, abs=1e-3)


def analysis(folder: Path, said: list[dict]) -> None:
    assert [result["what"] for result in said] == ["attention", "probe", "bias"] and (folder / "runs/analysis/attention/attention.html").is_file()


def start(folder: Path, said: list[dict]) -> None:
    assert said[0]["validation/loss"] > 0 and (folder / "runs/quickstart/report.html").is_file()


def pretrain(folder: Path, said: list[dict]) -> None:
    run = folder / "runs/my-bert"
    assert [start["from_step"] for start in json.loads((run / "env.json").read_text())["history"]] == [0, 2], "it was begun, and continued"
    assert said[0]["validation/loss"] > 0 and [len(answer["blanks"]) for answer in said[1:3]] == [1, 1]
    assert [len((folder / f"labels/{part}.csv").read_text().splitlines()) for part in ("train", "dev")] == [41, 41]
    assert [answer["prediction"] in ("math", "string") for answer in said[3:]] == [True] * 2
    assert (run / "report.html").is_file() and (folder / "runs/my-labels/report.html").is_file()


def compare(folder: Path, said: list[dict]) -> None:
    assert json.loads((folder / "runs/subjects/seeds.json").read_text())["metrics"]["dev/accuracy"]["n"] == 2
    study = folder / "runs/subjects-study"
    assert sorted(str(path.parent.relative_to(study)) for path in study.glob("*/*/*/metrics.jsonl")) == [
        f"{arm}/seed{seed}/tune" for arm in ("from_scratch", "pretrained") for seed in (0, 1)
    ]
    assert (study / "report.html").is_file() and (folder / "runs/subjects/report.html").is_file()


def continuing(folder: Path, said: list[dict]) -> None:
    before, after = (row["pseudo_perplexity/loss"] for row in said[:2])
    assert before > 0 and after > 0 and (folder / "models/notes-bert/model.safetensors").is_file()
    grown = json.loads((folder / "runs/notes-pieces/config.json").read_text())
    assert grown["tokenizer"]["extra"] == "notes/pieces.txt"


def study(folder: Path, said: list[dict]) -> None:
    page = (folder / "runs/dropout/report.html").read_text(encoding="utf-8")
    assert (
        "dropout 0.2" in page
        and "http://" not in page.replace("http://www.w3.org", "")
        and any("tabular" in path.read_text() for path in (folder / "runs/dropout").glob("*.tex"))
    )


def pod(folder: Path, said: list[dict]) -> None:
    assert list((folder / "runs/rehearsal/ckpt").glob("24"))


def add_an_objective(folder: Path, said: list[dict]) -> None:
    assert json.loads((folder / "runs/backward/config.json").read_text())["objective"] == {
        "name": "backward", "share": 0.5, "boundaries": True, "z_loss": 0.0,
    }  # fmt: skip


def add_a_family(folder: Path, said: list[dict]) -> None:
    assert isinstance(said[0]["text"], str) and "position" not in (folder / "runs/nope/params.txt").read_text()


def corpus(folder: Path, said: list[dict]) -> None:
    tried, made = said
    for counts in (tried["counts"], made["counts"]):
        assert [sum(n for name, n in counts.items() if rule in name) for rule in ("exact", "near", "contaminated")] == [1, 1, 1], counts
    assert (folder / "data/notes/1.0.0/card.html").is_file() and any("draws" in name for name in last(folder, "two-sources"))


def chinese(folder: Path, said: list[dict]) -> None:
    assert said[-1]["prediction"] in ("好评", "差评")
    assert (folder / "runs/zh-bert/report.html").is_file()


CHECKS = {
    check.__name__: check
    for check in (
        start, pretrain, compare, text, dialogue, question_answering, translation, summarization, classification, analysis, corpus, study, pod, add_an_objective,
        add_a_family,
    )
}  # fmt: skip
CHECKS |= {"continue": continuing, "zh": chinese}
CHANGING = ("add_an_objective", "add_a_family")  # the pages that change the checkout


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_every_page_is_run_and_led_to():
    """And its links lead somewhere."""
    assert set(PAGES) == set(CHECKS)
    for page in PAGES.values():
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", CHECKS)
def test_commands_that_need_more(page, capsys, monkeypatch):
    """Those with models or data from elsewhere: recipes, flags and keys are there."""
    monkeypatch.chdir(ROOT)
    for name in ("PTM_DATA", "PTM_SQUAD"):
        monkeypatch.setenv(name, "data")
    for command in re.findall(r"^ptm train (.*)$", "".join(blocks(page, "sh")).replace("\\\n", " "), re.MULTILINE):
        words = [os.path.expandvars(word) for word in shlex.split(command) if not word.startswith(("--workdir", "--config.init"))]
        # The model of a smoke run stands in for the one that is not here.
        words = [f"{word}{',' if word.count(':') else ':'}tiny" if word.startswith("--config=") else word for word in words]
        assert cli.main(["train", *words, "--print_config"]) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder to which the recipes and the command belong; what one page trains, others with the same command find there."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "bin").mkdir()
    for name in ("configs", "experiments", "launch"):
        (folder / name).symlink_to(ROOT / name)
    for name, script in (("ptm", PTM), ("python", f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')):
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture
def copied(checkout, tmp_path) -> Path:
    """A checkout of its own, which may be changed."""
    for name in ("ptm", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", CHECKS)
def test_a_page(page, checkout, request):
    folder = request.getfixturevalue("copied") if page in CHANGING else checkout
    env = os.environ | {"PYTHONPATH": str(folder if page in CHANGING else ROOT), "PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    for name in ("PTM_DATA", "JAX_NUM_CPU_DEVICES"):
        env.pop(name, None)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", "".join(blocks(page, "bash"))], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    CHECKS[page](folder, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])

"""Files of runs and studies that were cut, emptied or overwritten: a report is made without them, or refused with the file's name."""

import shutil

import pytest
from reports import BOTH, entries, ordering, study, workdir

from ptm.fields import ConfigError
from ptm.report import command
from ptm.report.options import Options

ACCURACY = BOTH[0]["name"]
DAMAGE = {
    "missing": None, "empty": b"", "bytes": b"\xff\xfe\x00junk", "list": b"[]\n", "dict": b"{}\n", "number": b"3\n", "words": b'{"step": "x"}\n',
    "half": 0.5, "cut": 0.97,
}  # fmt: skip
FILES = (
    "study.json", "halving.json", "0_one/seed0/pretrain/config.json", "0_one/seed0/pretrain/env.json", "0_one/seed0/pretrain/metrics.jsonl",
    "solo/config.json", "solo/env.json", "solo/metrics.jsonl", "solo/timing.jsonl"
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound") / "study"
    rungs = [{"step": 20, "values": {"one": 0.5, "two": 0.25, "three": 0.75}, "kept": ["one", "three"], "stopped": ["two"]}]
    arms = {"one": entries((0.8, 2.0), (0.9, 2.1)), "two": entries((0.5, 2.5), (0.6, 2.4)), "three": entries((0.8, 2.0), (0.9, 2.1))}
    study(root, values=arms, metrics=BOTH, orderings=[ordering("one", "two")], halving={"metric": ACCURACY, "rungs": [20], "keep": 0.5}, rungs=rungs)
    workdir(root / "solo", finals={"validation/loss": 1.0}, curve=[(10, 4.0), (100, 1.0)])
    return root


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(name, sound, tmp_path):
    noticed = 0
    for kind, content in DAMAGE.items():
        root = tmp_path / kind
        shutil.copytree(sound, root)
        whole = (root / name).read_bytes()
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
        words = (str(root / "solo"),) if name.startswith("solo") else (str(root),)
        try:
            told, _ = command.report(Options(words=words, output=str(tmp_path / f"{kind}-out"), formats=("terminal", "html", "md", "tex", "csv")))
            noticed += "cannot be read" in told
        except ConfigError as error:
            noticed += 1
            assert str(root) in str(error) and "\n" not in str(error), kind
    assert noticed >= (0 if name.endswith(".jsonl") else 3), "what is read must be looked at"

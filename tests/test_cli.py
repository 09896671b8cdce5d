"""The command line as a user meets it: what it says to mistakes, how fast, what it shows, and how it exits."""

import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ptm import cli, config, evaluate, recipe, registry, train
from ptm.fields import unparse

ROOT = Path(__file__).parent.parent
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"
ALLOWED = (
    "--config, --workdir, --print_config, --show_batch, --seeds, --allow_change, --coordinator, --processes, --process, --join_timeout, --heartbeat, --config.SECTION.KEY=VALUE"
)


def fails(capsys, *argv: str) -> str:
    """What a command says that exits with 2: one line on stderr, nothing on stdout."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("ptm: ") and captured.err.count("\n") == 1, captured
    return captured.err.removeprefix("ptm: ").strip()


MISTAKES = {
    "no command": ([], ["give a command: `ptm train`, `ptm evaluate`", "`ptm --help`"]),
    "unknown command": (["trian"], ["unknown command 'trian'", "convert, evaluate", "Did you mean 'train'?"]),
    "no config": (["train"], ["needs --config=FILE.py[:WORDS]", "configs/quickstart.py"]),
    "empty config": (["train", "--config="], ["needs --config=FILE.py[:WORDS]"]),
    "no such recipe": (["train", f"--config={ROOT}/configs/quickstar.py"], ["no recipe", "gpt2.py, quickstart.py", "Did you mean 'quickstart.py'?"]),
    "no workdir": (["train", QUICKSTART], ["`ptm train` needs --workdir=DIR"]),
    "empty workdir": (["train", QUICKSTART, "--workdir="], ["`ptm train` needs --workdir=DIR"]),
    "typo in a flag": (["train", QUICKSTART, "--workdr=x"], ["unknown argument '--workdr=x' of `ptm train`", ALLOWED, "Did you mean '--workdir=x'?"]),
    "typo in the flag that must be there": (["train", "--confg=a.py"], ["'--confg=a.py'", "Did you mean '--config=a.py'?"]),
    "shortened flag": (["train", QUICKSTART, "--work=x"], ["unknown argument '--work=x'", ALLOWED]),
    "flag with one dash": (["train", QUICKSTART, "-workdir=x"], ["'-workdir=x'", "Did you mean '--workdir=x'?"]),
    "flag without dashes": (["train", QUICKSTART, "workdir=x"], ["'workdir=x'", "Did you mean '--workdir=x'?"]),
    "stray word": (["train", QUICKSTART, "runs/x"], ["unknown argument 'runs/x'", ALLOWED]),
    "recipe without its flag": (["train", "configs/quickstart.py:bert"], ["Did you mean '--config=configs/quickstart.py:bert'?"]),
    "override without dashes": (["train", QUICKSTART, "train.steps=3"], ["'train.steps=3'", "Did you mean '--config.train.steps=3'?"]),
    "override without config": (["train", QUICKSTART, "--train.steps=3"], ["Did you mean '--config.train.steps=3'?"]),
    "key as a flag": (["train", QUICKSTART, "--steps=3"], ["Did you mean '--config.train.steps=3'?"]),
    "top-level key as a flag": (["train", QUICKSTART, "--seed=3"], ["Did you mean '--config.seed=3'?"]),
    "override without a value": (["train", QUICKSTART, "--config.train.steps", "3"], ["--config.train.steps has no value", "write --config.train.steps=VALUE"]),
    "override of no key": (["train", QUICKSTART, "--config.=3"], ["unknown key --config.", "--print_config"]),
    "typo in an override": (["train", QUICKSTART, "--config.train.stps=3"], ["unknown key --config.train.stps", "Did you mean 'train.steps'?"]),
    "value that is no number": (["train", QUICKSTART, "--config.train.steps=3.5"], ["--config.train.steps=3.5", "allowed: int"]),
    "impossible combination": (["train", QUICKSTART, "--config.train.microbatches=3"], ["train.microbatches=3", "allowed: 1, 2, 4, 8, 16"]),
    "value for a switch": (["train", QUICKSTART, "--print_config=yes"], ["--print_config", "takes no value, got 'yes'", "`ptm train --help`"]),
    "word for a number of rows": (["train", QUICKSTART, "--show_batch=many"], ["--show_batch", "'many'", "`ptm train --help`"]),
    "no rows": (["train", QUICKSTART, "--show_batch=0"], ["--show_batch=0", "allowed: 1 or more"]),
    "change of no key": (["train", QUICKSTART, "--allow_change=schedule.nam", "--workdir=x"], ["--allow_change=schedule.nam", "Did you mean 'schedule.name'?"]),
    "nothing to evaluate": (["evaluate"], ["one of --workdir=DIR and --model=ckpt:DIR", "got neither"]),
    "two things to evaluate": (["evaluate", "--workdir=a", "--model=ckpt:b"], ["got both, --workdir=a and --model=ckpt:b"]),
    "override of what was trained": (["evaluate", "--workdir=a", "--config.seed=2"], ["belongs to `ptm train`, not to `ptm evaluate`"]),
    "flag of another command": (["evaluate", "--show_batch=2"], ["'--show_batch=2' of `ptm evaluate`", "allowed: --workdir, --model, --evals, --predictions"]),
    "no such workdir": (["evaluate", f"--workdir={ROOT}/config"], ["there is no folder", "Did you mean 'configs'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, capsys):
    argv, parts = MISTAKES[name]
    message = fails(capsys, *argv)
    assert all(part in message for part in parts), message


def test_a_mistake_leaves_no_workdir(capsys, tmp_path):
    fails(capsys, "train", QUICKSTART, "--config.train.stps=3", f"--workdir={tmp_path}/run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["evaluate", "-h"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (["train", "evaluate"] if argv == ["--help"] else ["--workdir"]))
    if argv[0] == "train":
        assert "75" in shown and "--config.SECTION.KEY=VALUE" in shown


# What the entry points are given, and what becomes of what they return.


@pytest.mark.parametrize("code", [0, 75])
def test_train_is_called_once_with_what_was_given(code, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(train, "train", lambda *args, **kwargs: calls.append((args, kwargs)) or code)
    flags = ["--config.train.steps=5", "--config.train.steps=6", "--allow_change=optimizer.learning_rate,schedule.name"]
    assert cli.main(["train", f"{QUICKSTART}:bert,tiny", f"--workdir={tmp_path}", *flags]) == code
    [((resolved,), options)] = calls
    assert resolved.model.name == "bert" and resolved.train.steps == 6, "the last of two equal overrides holds"
    assert options == {"workdir": str(tmp_path), "allow_change": ("optimizer.learning_rate", "schedule.name")}


def test_a_loss_that_is_not_finite_fails(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise FloatingPointError("stopped at step 3: loss nan")

    monkeypatch.setattr(train, "train", stop)
    assert cli.main(["train", QUICKSTART, f"--workdir={tmp_path}"]) == 1
    assert capsys.readouterr().err == "ptm: stopped at step 3: loss nan\n"


@pytest.mark.parametrize(("flag", "spec"), [("--workdir=runs/a", "ckpt:runs/a"), ("--model=ckpt:runs/a@best", "ckpt:runs/a@best")])
def test_evaluate_ends_with_one_json_object(flag, spec, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda model, **options: {"model": model, "validation/loss": 1.5})
    assert cli.main(["evaluate", flag]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"model": spec, "validation/loss": 1.5}


# --print_config


@pytest.mark.parametrize("words", ["", ":bert", ":t5,tiny"])
def test_print_config(words, capsys):
    """Every key once, with its value as an override takes it and its meaning; what differs from base is marked and listed."""
    assert cli.main(["train", QUICKSTART + words, "--config.optimizer.clip_norm=None", "--print_config"]) == 0
    keys, changes = capsys.readouterr().out.split("\nDifference from base (marked * above):\n")
    cfg = recipe.load(QUICKSTART.removeprefix("--config=") + words)
    schema = config.schema(cfg, registry.REGISTRIES)
    shown = {}
    for line in keys.splitlines():
        mark, key, value, _, doc = re.fullmatch(r"([ *]) (\S+) = (.*?) *(# (.*))?", line).groups()
        shown[key] = value
        if key in schema:
            assert doc.startswith(schema[key][1]["doc"]) and all(str(choice) in doc for choice in schema[key][1]["choices"] or ())
            config.override(cfg, key, value, registry.REGISTRIES)
        assert (mark == "*") == (f"  {key}: " in changes)
    resolved = registry.resolve(cfg)
    assert shown == {key: unparse(value) for key, value in config.flatten(resolved).items()}
    assert resolved.optimizer.clip_norm is None and "  optimizer.clip_norm: 1.0 -> None" in changes.splitlines()


# --show_batch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Lines of 6 to 20 letters: one byte a token, and no letter is a mark of what is shown."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "letters.txt"
    path.write_text("".join("".join(rng.choices("abcdefghij", k=rng.randint(6, 20))) + "\n" for _ in range(200)))
    return path


def show(capsys, corpus: Path, words: str, *flags: str) -> list[list[dict]]:
    """The segments of each row that `--show_batch=3` shows; each a dict of field, segment, positions, tokens and targets."""
    assert cli.main(["train", f"{QUICKSTART}:{words}", f"--config.data.source=text:{corpus}", "--show_batch=3", *flags]) == 0
    rows = re.split(r"^row \d+\n", capsys.readouterr().out, flags=re.MULTILINE)
    assert rows[0] == "" and len(rows) == 4
    shown = []
    for row in rows[1:]:
        segments, field, counts = [], "", {}
        for line in row.splitlines():
            if header := re.match(r"  (\w+): (\d+) of (\d+) positions, (\d+) padding, (\d+) segments", line):
                field, real, length, padding, count = header[1], *map(int, header.groups()[1:])
                assert real + padding == length
                counts[field] = (real, count)
            elif start := re.match(r"    segment (\d+), positions (\d+)\.\.(\d+)", line):
                segments.append({"field": field, "segment": int(start[1]), "positions": (int(start[2]), int(start[3]))})
            elif items := re.match(r"      (tokens|targets) +(.*)", line):
                segments[-1][items[1]] = items[2].split(" ")
            elif predicted := re.match(r"      predicted positions (\d+) of (\d+), attention (\w+)", line):
                segments[-1] |= {"predicted": int(predicted[1]), "mask": predicted[3]}
        for field, (real, count) in counts.items():
            mine = [segment for segment in segments if segment["field"] == field]
            assert [segment["segment"] for segment in mine] == list(range(1, count + 1))
            assert sum(len(segment["tokens"]) for segment in mine) == real
            assert all(segment["positions"] == (0, len(segment["tokens"]) - 1) for segment in mine)
        shown.append(segments)
    return shown


def text_of(pieces: list[str]) -> str:
    return "".join(piece for piece in pieces if len(piece) == 1)


def test_show_batch_of_gpt(capsys, corpus):
    documents = corpus.read_text().split()
    for row in show(capsys, corpus, "gpt,tiny"):
        for segment in row:
            assert segment["mask"] == "causal" and segment["predicted"] == len(segment["tokens"])
            assert segment["targets"][:-1] == segment["tokens"][1:]
            assert any(text_of(segment["tokens"]) in document for document in documents)


def test_show_batch_of_bert(capsys, corpus):
    documents = corpus.read_text().split()
    masked = 0
    for row in show(capsys, corpus, "bert,tiny", "--config.objective.unit=token", "--config.objective.random_share=0"):
        for segment in row:
            tokens, targets = segment["tokens"], segment["targets"]
            assert segment["mask"] == "full" and len(targets) == len(tokens)
            assert tokens[0] == "<cls>" and tokens[-1] == "<sep>"
            assert segment["predicted"] == sum(target != "." for target in targets)
            assert all(target != "." for token, target in zip(tokens, targets) if token == "<mask>")
            restored = [token if target == "." else target for token, target in zip(tokens, targets)]
            assert any(text_of(restored) in document for document in documents)
            masked += tokens.count("<mask>")
    assert masked


def test_show_batch_of_t5(capsys, corpus):
    documents = corpus.read_text().split()
    for row in show(capsys, corpus, "t5,tiny"):
        inputs, targets = ([segment for segment in row if segment["field"] == field] for field in ("inputs_BI", "tokens_BL"))
        assert len(inputs) == len(targets) > 0
        for given, wanted in zip(inputs, targets):
            assert given["tokens"][-1] == wanted["targets"][-1] == "</s>" and wanted["tokens"][1:] == wanted["targets"][:-1]
            spans = dict(re.findall(r"(<extra_id_\d+>)([a-j]+)", "".join(wanted["targets"])))
            assert spans and list(spans) == [piece for piece in given["tokens"] if piece.startswith("<extra")]
            assert "".join(spans.get(piece, piece) for piece in given["tokens"][:-1]) in "\n".join(documents)


# In a process of its own.


def run(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "ptm.cli", *argv], capture_output=True, text=True, cwd=ROOT, **options)


def test_exit_codes_of_the_process():
    wrong = run("train", QUICKSTART, "--config.train.steps=3.5")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr == "ptm: --config.train.steps=3.5 cannot be read; allowed: int.\n"
    assert run("--help").returncode == 0


def test_a_reader_may_stop_early():
    """`ptm train --print_config | head` is no error."""
    command = f"set -o pipefail; {sys.executable} -m ptm.cli train {QUICKSTART} --print_config | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("  seed = 0")


HEAVY = ["orbax", "grain", "tensorflow_datasets", "tensorflow", "tensorboardX", "ptm.run", "ptm.train", "ptm.checkpoint", "ptm.data.sources"]


@pytest.mark.parametrize(
    ("flag", "code", "limit"),
    [("--config.train.stps=3", 2, 2.0), ("--config.train.microbatches=3", 2, 2.0), ("--print_config", 0, 3.0)],
)
def test_answers_at_once(flag, code, limit):
    """Nothing heavy is loaded and no device is touched; seconds of processor, the least of up to three, as others use the machine too."""
    script = (
        "import sys\nfrom ptm import cli\ncode = cli.main(sys.argv[1:])\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "from jax._src import xla_bridge\n"
        "print('loaded', loaded, 'backends', xla_bridge.backends_are_initialized(), file=sys.stderr)\nsys.exit(code)\n"
    )
    seconds = []
    command = [sys.executable, "-c", script, "train", QUICKSTART, flag]
    while len(seconds) < 3 and not (seconds and min(seconds) < limit):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == code, result.stderr
        assert result.stderr.endswith("loaded [] backends False\n"), result.stderr
    assert min(seconds) < limit, seconds

"""The machinery of evaluation: items through batches in order, answers of tasks, several evals of one run, predictions, and `ptm evaluate` on them."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ptm import cli, config, evals, evaluate, metrics, parallel, registry
from ptm import run as run_lib
from ptm.config import Checkpoint, Data, Log, Optimizer, Schedule, Tokenizer, Train
from ptm.data.batch import Document, Field
from ptm.evals import loss, perplexity, protocol, stream, task
from ptm.evals.answers import answers
from ptm.evals.protocol import Measured
from ptm.fields import ConfigError
from ptm.models import bert
from ptm.objectives import classify
from ptm.objectives.mixture import Part

ROWS = 4


class Plain:
    """Rows of tokens alone."""

    lengths = {"L": 32}
    fields = {"tokens_BL": Field()}
    packing, raw_length, max_segments, visits = "none", None, 1, None

    def finish(self, row):
        return row


def host(layout=None):
    """What `through` needs of a run, without devices' programs."""
    return types.SimpleNamespace(layout=parallel.make_layout(config.Mesh(), devices=jax.devices()[:1]), to_device=lambda batch, **_: batch)


@pytest.mark.parametrize("window", [1, 8, 1000])
def test_items_come_back_in_their_order_with_all_their_rows(window):
    """Items of no, one or many rows of any length; each row comes back as it went in, and batches are of few lengths."""
    rng = np.random.default_rng(0)
    items = [[np.arange(1, 1 + rng.integers(1, 33)) * (n + 1) for _ in range(rng.integers(0, 6))] for n in range(40)]
    shapes, ahead = [], []

    def step(_, batch):
        shapes.append(batch["tokens_BL"].shape)
        return {"sum": batch["tokens_BL"].sum(1), "size": (batch["segments_BL"] > 0).sum(1)}

    def counted():
        for n, item in enumerate(items):
            ahead.append(n)
            yield item

    given = stream.through(
        counted(), rows=lambda item: ({"tokens_BL": row.astype(np.int32)} for row in item), featurizer=Plain(), step=step, run=host(), params=None,
        batch_size=ROWS, window=window,
    )  # fmt: skip
    found = []
    for item, outputs in given:
        found.append(item)
        assert [(int(o["sum"]), int(o["size"])) for o in outputs] == [(row.sum(), len(row)) for row in item]
        if window == 1:
            assert ahead[-1] - len(found) < 20, "items are given out while they are read"
    assert all(ours is theirs for ours, theirs in zip(found, items, strict=True))
    assert {rows for rows, _ in shapes} == {ROWS} and {length for _, length in shapes} <= {8, 16, 32}


@pytest.mark.parametrize(
    ("id", "file"), [("dev.jsonl:12", "dev"), ("3/causative.jsonl:1", "causative"), ("1/de/test.tsv:9", "de/test"), ("plain", "plain"), ("2018/a.txt:1", "a")]
)
def test_the_file_of_a_record(id, file):
    assert protocol.file_of(id) == file


def test_predictions_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "predictions" / "dev-3.jsonl"
    protocol.write(path, [{"id": "a", "prediction": "是"}])
    assert path.read_text(encoding="utf-8") == '{"id": "a", "prediction": "是"}\n'

    def broken():
        yield {"id": "b"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        protocol.write(path, broken())
    assert json.loads(path.read_text(encoding="utf-8"))["id"] == "a"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give another place with --predictions=FILE"):
        protocol.write(tmp_path / "file" / "x.jsonl", [])


def test_parts_of_a_mixture_are_measured_one_by_one(monkeypatch):
    """NAME/PART/METRIC and, where all parts have a loss, NAME/loss by weight; evals of the model itself are made once."""
    seen = []

    def evaluate_(options, *, run, params):
        seen.append(run)
        rows = [{"id": "r", "prediction": run}]
        return Measured({"loss": 1.0 if run == "a" else 4.0} if options.of_objective else {"accuracy": 0.5}, rows)

    module = types.SimpleNamespace(evaluate=evaluate_)
    monkeypatch.setitem(evals.EVALS, "task", module)
    monkeypatch.setitem(evals.EVALS, "perplexity", module)
    parts = tuple((Part(name, None, weight), name) for name, weight in (("a", 1.0), ("b", 2.0)))
    options = {"dev": task.Config(), "ppl": perplexity.Config()}
    run = types.SimpleNamespace(config=types.SimpleNamespace(evals=options), evaluated=parts)
    found = evals.measure(run, "dev", None)
    assert found.metrics == {"dev/loss": 3.0, "dev/a/loss": 1.0, "dev/b/loss": 4.0}
    assert found.predictions == [{"part": "a", "id": "r", "prediction": "a"}, {"part": "b", "id": "r", "prediction": "b"}]
    assert evals.measure(run, "ppl", None).metrics == {"ppl/accuracy": 0.5} and seen == ["a", "b", run]


# A task: is a text about a cat or about a dog?

ANIMALS = ("cat", "dog")


def record(n):
    """A text, its label, which is the animal that it begins with but in one of seven records behind the 300th, and a language."""
    rng = np.random.default_rng(n)
    words = rng.choice(runs.WORDS, rng.integers(1, 7))
    return {"sentence": " ".join([ANIMALS[n % 2], *words]), "animal": ANIMALS[(n + (n >= 300 and n % 7 == 0)) % 2], "language": "en" if n % 3 else "de"}


def jsonl(path, records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A training file, a dev file, and a test file with other columns of which two records tell no label."""
    folder = tmp_path_factory.mktemp("data")
    renamed = [{"body": item["sentence"], "kind": item["animal"] if n > 1 else None} for n, item in enumerate(map(record, range(400, 420)))]
    return {
        "train": jsonl(folder / "train.jsonl", map(record, range(300))), "dev": jsonl(folder / "dev.jsonl", map(record, range(300, 330))),
        "test": jsonl(folder / "test.jsonl", renamed),
    }  # fmt: skip


def config_of(data, **changes):
    """A tiny BERT that tells the animals apart, with three evals."""
    cfg = config.base(
        model=bert.BertConfig(**{**runs.SHAPE, "width": 32, "dropout": 0.0}, max_length=48, attention_dropout=0.0, init_std=0.2),
        objective=classify.Config(labels=ANIMALS, pooling="mean"),
        evals={
            "validation": loss.Config(every=10),
            "dev": task.Config(every=10, metrics=("accuracy", "f1_binary:dog"), group="language"),
            "test": task.Config(every=20, source=(data["test"],), columns=("text=body", "label=kind")),
        },
        train=Train(steps=20, batch_size=16),
        data=Data(source=(data["train"],), validation_source=(data["dev"],), columns=("text=sentence", "label=animal", "language=language"), length=48, packing="none"),
        tokenizer=Tokenizer(kind="bytes"),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(name="constant"),
        checkpoint=Checkpoint(every=10, keep_latest=5, metric="dev/accuracy", mode="max"),
        log=Log(every=10, writers=()),
    )
    for key, value in changes.items():
        config.override(cfg, key.replace("__", "."), value, registry.REGISTRIES)
    return cfg


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """What finds devices by itself, as the command does, finds one."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("task") / "run"
    assert runs.run(config_of(data), workdir) == 0
    return workdir


def predictions(workdir, name):
    return [json.loads(line) for line in (workdir / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def rows_of(workdir, metric):
    return {row["step"]: row for row in map(json.loads, runs.metrics(workdir).splitlines()) if metric in row}


def test_one_run_has_several_evals(finished):
    """A loss, a task on the validation split with groups, a task on another file with other columns, each at its own steps."""
    assert set(rows_of(finished, "validation/loss")) == set(rows_of(finished, "dev/accuracy")) == {10, 20} and set(rows_of(finished, "test/accuracy")) == {20}
    row = rows_of(finished, "dev/accuracy")[20]
    assert set(row) == {"step", "dev/records", *(f"dev/{group}{metric}" for group in ("", "de/", "en/") for metric in ("accuracy", "precision", "recall", "f1"))}
    assert 0.8 < row["dev/accuracy"] < 1 and row["dev/records"] == 30 and row["dev/accuracy"] == pytest.approx((row["dev/de/accuracy"] * 10 + row["dev/en/accuracy"] * 20) / 30)
    last = rows_of(finished, "test/accuracy")[20]
    assert (last["test/records"], last["test/unlabelled"]) == (18, 2)
    assert row["dev/accuracy"] == pytest.approx(rows_of(finished, "validation/loss")[20]["validation/accuracy"]), "the loss counts the same hits"


def test_predictions_are_the_answers_in_the_order_of_the_records(finished):
    assert rows_of(finished, "dev/f1")[20]["dev/de/f1"] != rows_of(finished, "dev/f1")[20]["dev/en/f1"]
    for name, first, count in (("dev-10", 300, 30), ("dev-20", 300, 30), ("test-20", 400, 20)):
        found = predictions(finished, name)
        assert [row["id"] for row in found] == [f"{name.split('-')[0]}.jsonl:{n + 1}" for n in range(count)]
        told = [record(first + n)["animal"] if name != "test-20" or n > 1 else None for n in range(count)]
        assert [row["reference"] for row in found] == told
        assert all(row["prediction"] == max(row["probabilities"], key=row["probabilities"].get) for row in found)
    dev = predictions(finished, "dev-20")
    ours, theirs = ([row[side] for row in dev] for side in ("prediction", "reference"))
    assert rows_of(finished, "dev/f1")[20]["dev/f1"] == metrics.measure(["f1_binary:dog"], ours, theirs)["f1"]
    assert {path.name for path in (finished / "predictions").iterdir()} == {"dev-10.jsonl", "dev-20.jsonl", "test-20.jsonl"}


def test_the_best_checkpoint_is_that_of_the_best_answers(finished):
    scores = {step: row["dev/accuracy"] for step, row in rows_of(finished, "dev/accuracy").items()}
    assert evaluate.evaluate(f"ckpt:{finished}@best", names=("dev",))["dev/accuracy"] == max(scores.values())


def test_answers_do_not_depend_on_what_is_beside_them(finished):
    """One by one as in batches; also for a document without a label, and of one that cannot be read the reason, in its place."""
    run, params = run_lib.setup(run_lib.read_config(finished), workdir=finished, devices=jax.devices()[:1]), None
    params = run.init_params()
    documents = list(run.documents(run.config.data, limit=7))
    together = [answer["probabilities"]["cat"] for _, answer in answers(run, params, documents, batch_size=16)]
    alone = [answer["probabilities"]["cat"] for doc in documents for _, answer in answers(run, params, [doc], batch_size=16)]
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    bare = [dataclasses.replace(doc, columns={}) for doc in documents]
    assert [answer["probabilities"]["cat"] for _, answer in answers(run, params, bare, batch_size=16)] == together
    bad = [documents[0], Document("bad", documents[0].tokens_L, {"label": "cow"}), documents[1]]
    with pytest.raises(ConfigError, match="cow"):
        list(answers(run, params, bad, batch_size=16))
    found = list(answers(run, params, bad, batch_size=16, tolerant=True))
    assert [doc.id for doc, _ in found] == [doc.id for doc in bad] and [list(answer) for _, answer in found][1] == ["error"]
    assert [found[n][1]["probabilities"]["cat"] for n in (0, 2)] == pytest.approx(together[:2], rel=1e-5)


def command(capfd, *arguments):
    capfd.readouterr()
    code = cli.main(["evaluate", *arguments])
    shown = capfd.readouterr()
    return json.loads(shown.out.strip().splitlines()[-1]) if code == 0 else shown.err


def test_the_command_gives_the_figures_of_the_loop(finished, capfd):
    """Equal numbers, and the same predictions, byte for byte."""
    folder = finished / "predictions"
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in (folder / "dev-20.jsonl", folder / "test-20.jsonl"):
        path.unlink()
    found = command(capfd, f"--workdir={finished}")
    logged = {key: value for metric in ("validation/loss", "dev/accuracy", "test/accuracy") for key, value in rows_of(finished, metric)[20].items()}
    assert found == {**logged, "model": f"ckpt:{finished}"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


@pytest.mark.slow
def test_averaged_parameters_have_predictions_of_their_own(finished, capfd):
    command(capfd, f"--model=ckpt:{finished}@avg2", "--evals=dev")
    path = finished / "predictions" / "dev-20@avg2.jsonl"
    assert path.is_file()
    path.unlink()


def test_chosen_and_changed_evals(finished, tmp_path, capfd):
    """--evals takes some of the run's, and kinds that it does not have; keys of evals can be set; predictions go where they are asked to."""
    written = tmp_path / "out" / "p.jsonl"
    flags = ["--evals=dev", "--config.evals.dev.examples=4", "--config.evals.dev.metrics=f1_macro", "--config.evals.dev.group=None", f"--predictions={written}"]
    found = command(capfd, f"--model=ckpt:{finished}@10", *flags)
    assert set(found) == {"model", "step", "dev/f1_macro", "dev/records"} and found["dev/records"] == 4 and found["step"] == 10
    assert len(written.read_text().splitlines()) == 4
    new = command(capfd, f"--workdir={finished}", "--evals=task", "--config.evals.task.examples=3")
    assert new["task/records"] == 3 and {"task/accuracy"} <= set(new)
    assert (finished / "predictions" / "task-20.jsonl").is_file()
    (finished / "predictions" / "task-20.jsonl").unlink()


MISTAKES = {
    "unknown eval": (["--evals=dve"], ["unknown eval 'dve'", "Did you mean 'dev'?"]),
    "unknown key": (["--config.evals.dev.example=4"], ["unknown key --config.evals.dev.example", "'evals.dev.examples'"]),
    "key of the run": (["--config.seed=1"], ["--config.seed=VALUE belongs to `ptm train`", "but for --config.evals.NAME.KEY"]),
    "one file for several": (["--predictions=x.jsonl"], ["--predictions=x.jsonl holds what one eval predicts, and there are ", "dev"]),
    "unknown metric": (["--config.evals.dev.metrics=acuracy"], ["unknown metric 'acuracy'", "Did you mean 'accuracy'?"]),
    "model without language": (["--evals=pseudo_perplexity"], ["needs a language model with the head mlm", "Take the run before fine-tuning"]),
    "no such group": (["--config.evals.dev.group=genre", "--evals=dev"], ["groups by 'genre'", "it has: label, language"]),
    "records without text": (["--evals=test", "--config.evals.test.columns=text=nothing"], ["nothing", "test.jsonl"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_one_line(case, finished, capfd):
    flags, words = MISTAKES[case]
    told = command(capfd, f"--workdir={finished}", *flags)
    assert isinstance(told, str) and told.splitlines()[-1].startswith("ptm: ") and "Traceback" not in told
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evals__dev__metrics": "f1_binari"}, "unknown metric 'f1_binari'"),
        ({"evals__test__source": "jsonl:nowhere.jsonl"}, "nowhere.jsonl matches no file"),
        ({"evals__dev__metrics": "multirc"}, "records that belong together"),
    ],
)
def test_what_cannot_be_measured_stops_the_run_before_training(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        runs.run(config_of(data, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "loss" not in runs.metrics(tmp_path / "run")


def test_a_run_without_a_task_is_told(tmp_path):
    text = runs.corpus(tmp_path / "corpus.txt", documents=60)
    cfg = runs.tiny("concat", text=text, train__steps=2)
    with cfg.unlocked():
        cfg.evals.dev = config.base(model=bert.BertConfig(), objective=classify.Config(), evals={"dev": task.Config()}).evals.dev
    with pytest.raises(ConfigError, match="objective causal is no fine-tuning task; use an eval such as loss"):
        runs.run(cfg, tmp_path / "run")


def test_programs_are_made_once(finished):
    """The same function with the same options is the same program, so that an evaluation compiles nothing that the one before it has."""
    run = run_lib.setup(run_lib.read_config(finished), workdir=finished, devices=jax.devices()[:1])

    def total(model, params, batch, *, scale):
        return scale * jnp.sum(batch["x"])

    assert run.program(total, scale=2.0) is run.program(total, scale=2.0) is not run.program(total, scale=3.0)
    assert run.outputs_step is run.outputs_step

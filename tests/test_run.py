"""A whole run: what it writes and says, how it is evaluated and loaded again, and what stops it."""

import contextlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import ptm
from ptm import cli, describe, evaluate, log, state, tree, weights
from ptm import run as run_lib
from ptm.checkpoint import Checkpoints
from ptm.fields import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text) -> Path:
    """The workdir of a finished run of 8 steps with a checkpoint after each and an evaluation after every second."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = runs.tiny("concat", text=text, train__steps=8, checkpoint__every=1, checkpoint__keep_latest=8, evals__validation__every=2)
    assert runs.run(config, workdir) == 0
    return workdir


def tree_shape(leaf: jax.Array) -> str:
    return "x".join(map(str, leaf.shape))


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in runs.metrics(workdir).splitlines()]


def test_workdir(finished, text):
    """The files of docs/design.md, section 7, each with what it must hold."""
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "diff.txt", "env.json", "params.txt", "metrics.jsonl", "timing.jsonl", "compiles.jsonl", "ckpt", "tokenizer", "run.lock"}
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["steps"] == 8 and config["model"]["name"] == "gpt" and config["data"]["source"] == [f"text:{text}"]
    diff = (finished / "diff.txt").read_text().splitlines()
    assert "train.steps: 1000 -> 8" in diff and "log.norms: False -> True" in diff and not any(line.startswith("seed") for line in diff)
    env = json.loads((finished / "env.json").read_text())
    assert set(env["fingerprints"]) == {"data", "tokenizer"} and len(env["history"]) == 1
    session = env["history"][0]
    assert session["from_step"] == 0 and session["versions"]["jax"] == jax.__version__ and session["devices"]["count"] == 1 and session["remat"] == "none"
    params = (finished / "params.txt").read_text()
    run, values = ptm.load(f"ckpt:{finished}")
    for path, leaf in tree.paths(values).items():
        assert re.search(rf"^{re.escape(path)} +{re.escape(tree_shape(leaf))} +{leaf.size:,} ", params, re.MULTILINE), path
    for step in range(1, 9):
        folder = finished / "ckpt" / str(step)
        assert {"state", "data", "meta", "manifest.json"} <= {path.name for path in folder.iterdir()}
        meta = json.loads((folder / "meta/meta.json").read_text())
        assert meta["step"] == step and meta["tokenizer"] == run.tokenizer.fingerprint and meta["config"] == config
        assert len(list((folder / "data").glob("stream-*.json"))) == 4


def test_metrics_hold_no_clocks(finished):
    trained = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 4, 6, 8]
    last = trained[-1]
    assert last["rows"] == 8 * 16 and 0 <= last["padding_share"] < 1 and last["epoch"] > 0 and last["bad_records"] == 0 and last["skipped"] == 0
    assert last["grad_norm"] > 0 and last["attention_logit"] > 0 and last["learning_rate"] == pytest.approx(0.01)
    groups = state.group_names(ptm.load(f"ckpt:{finished}")[1])
    for kind in ("grad_norm", "param_norm", "update_norm"):
        norms = {key.removeprefix(kind + "/"): value for key, value in last.items() if key.startswith(kind + "/")}
        assert sorted(norms) == sorted(groups) and all(value > 0 for value in norms.values())
    assert np.sqrt(sum(last[f"grad_norm/{name}"] ** 2 for name in groups)) == pytest.approx(last["grad_norm"], rel=1e-5)
    evaluated = [row for row in rows(finished) if "validation/loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 6, 8]
    assert {"validation/perplexity", "validation/bits_per_byte", "validation/accuracy", "validation/tokens"} <= set(evaluated[0])
    clocks = ("time", "seconds", "tokens_per_second", "compile", "bytes_peak", "flops")
    assert not [key for row in rows(finished) for key in row if any(word in key for word in clocks)]


def evaluated_by_command(capfd, *arguments: str) -> str:
    capfd.readouterr()
    assert cli.main(["evaluate", *arguments]) == 0
    return capfd.readouterr().out.strip().splitlines()[-1]


def test_evaluate_is_the_evaluation_of_the_loop(text, tmp_path, capfd):
    """String-equal numbers, on all devices as the command takes them; the last line of stdout is one JSON object."""
    config = runs.tiny("concat", text=text, train__steps=4, checkpoint__every=2, evals__validation__every=2)
    assert runs.run(config, tmp_path, devices=jax.device_count()) == 0
    lines = {json.loads(line)["step"]: line for line in runs.metrics(tmp_path).splitlines() if "validation/" in line}
    for arguments, step in ((["--workdir", str(tmp_path)], 4), (["--model", f"ckpt:{tmp_path}@2"], 2)):
        line = evaluated_by_command(capfd, *arguments)
        found = json.loads(line)
        assert found["step"] == step and found["model"].startswith("ckpt:")
        numbers = re.findall(r'"validation/\w+": [^,}]+', line)
        assert sorted(numbers) == sorted(re.findall(r'"validation/\w+": [^,}]+', lines[step])) and len(numbers) >= 4


def test_evaluate_best_and_average(finished):
    losses = {row["step"]: row["validation/loss"] for row in rows(finished) if "validation/loss" in row}
    best = min(losses, key=losses.get)
    found = evaluate.evaluate(f"ckpt:{finished}@best")
    assert found["step"] == best and found["validation/loss"] == pytest.approx(losses[best], rel=1e-5)
    averaged = evaluate.evaluate(f"ckpt:{finished}@avg2")
    assert averaged["step"] == 8 and abs(averaged["validation/loss"] - losses[8]) > 1e-4
    with pytest.raises(ConfigError, match="8 are valid, not 9; average fewer, or train with --config.checkpoint.keep_latest=9"):
        evaluate.evaluate(f"ckpt:{finished}@avg9")


def test_load_gives_the_chosen_parameters(finished):
    """Parameters, moving average and mean of steps are what the checkpoints hold."""
    saved = {step: runs.leaves(finished, step) for step in (6, 7, 8)}
    for spec, expected in {
        "": lambda path: saved[8]["params/" + path],
        "@6": lambda path: saved[6]["params/" + path],
        "@ema": lambda path: saved[8]["ema/" + path],
        "@avg3": lambda path: np.mean([saved[step]["params/" + path] for step in (6, 7, 8)], axis=0),
    }.items():
        run, params = ptm.load(f"ckpt:{finished}{spec}")
        for path, leaf in tree.paths(params).items():
            np.testing.assert_allclose(leaf, expected(path), rtol=1e-6, atol=1e-8, err_msg=f"{spec} {path}")
    assert run.tokenizer.decode(run.tokenizer.encode("three lines")) == "three lines"
    hidden = run.model.hidden(params, {key: jnp.asarray(value) for key, value in next(run.validation(8)).items()}, mask=run.objective.mask)
    assert hidden.hidden_BLD.shape == (8, 16, 16)


def test_moving_average_follows_the_parameters(finished):
    """ema_t = 0.9 ema_(t-1) + 0.1 params_t."""
    saved = {step: runs.leaves(finished, step) for step in (6, 7, 8)}
    averages = [path for path in saved[8] if path.startswith("ema/")]
    assert averages
    for path in averages:
        for step in (7, 8):
            expected = 0.9 * saved[step - 1][path] + 0.1 * saved[step]["params/" + path.removeprefix("ema/")]
            np.testing.assert_allclose(saved[step][path], expected, rtol=1e-5, atol=1e-7)


def test_init_from_the_checkpoint_of_another_run(finished, text, tmp_path, capfd):
    """The new run begins at step 0 with the other's parameters; its own workdir wins from then on."""
    config = runs.tiny("concat", text=text, init=f"ckpt:{finished}@4", train__steps=2, checkpoint__every=1)
    assert runs.run(config, tmp_path) == 0
    assert f"Parameters of step 4 from ckpt:{finished}@4." in capfd.readouterr().err
    ours, theirs = runs.leaves(tmp_path, 1), runs.leaves(finished, 4)
    assert int(ours["step"]) == 1, "the warm-up begins at 0: the first step changes nothing"
    for path in (path for path in theirs if path.startswith("params/")):
        np.testing.assert_array_equal(ours[path], theirs[path])
    assert runs.run(config, tmp_path) == 0
    assert "Parameters of step" not in capfd.readouterr().err
    other = runs.tiny("concat", text=text, init=f"ckpt:{finished}", tokenizer__kind="chars")
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        runs.run(other, tmp_path / "other")


def test_timing_writers_and_profile(text, tmp_path):
    config = runs.tiny("concat", text=text, train__steps=4, log__writers=("tensorboard",), log__profile=(1, 2))
    assert runs.run(config, tmp_path) == 0
    timing = log.read(str(tmp_path / "timing.jsonl"))
    assert {"time", "step_time", "tokens_per_second", "model_flops_per_second", "data_seconds", "compiles", "compile_seconds", "cache_hits"} <= set(timing[-1])
    assert timing[-1]["tokens_per_second"] == pytest.approx(16 * 16 / timing[-1]["step_time"]) and timing[-1]["host_peak_bytes"] > 2**20
    [events] = (tmp_path / "tb").iterdir()
    assert all(tag in events.read_bytes() for tag in (b"loss", b"validation/loss", b"timing/step_time"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_without_evaluation_ends_with_its_summary(text, tmp_path, capfd):
    config = runs.tiny("concat", text=text, train__steps=2, data__holdout=0.0)
    with config.unlocked():
        config.evals = {}
    assert runs.run(config, tmp_path, sample=True) == 0
    out = capfd.readouterr().out
    assert "Finished gpt / causal" in out and "generated" in out
    assert not [row for row in rows(tmp_path) if any(key.startswith("validation") for key in row)]


def test_a_batch_that_devices_cannot_share_is_refused_at_once(text, tmp_path):
    config = runs.tiny("concat", text=text, evals__validation__batch_size=12)
    with pytest.raises(ConfigError, match=r"evals\.validation\.batch_size=12 rows cannot be split .* 8 devices"):
        runs.run(config, tmp_path, devices=8)


def test_a_checkpoint_is_read_on_devices_that_its_mesh_does_not_fit(finished, text, tmp_path):
    """A run of 8 devices is evaluated on one, and one whose batch 3 devices cannot share on the first of three."""
    workdir = tmp_path / "run"
    runs.run(runs.tiny("concat", text=text, train__steps=2, mesh__fsdp=8, mesh__data=1), workdir, devices=8)
    for spec, devices in ((workdir, 1), (finished, 3)):
        run, params = weights.load(f"ckpt:{spec}", devices=jax.devices()[:devices])
        assert run.layout.mesh.size == 1
        expected = [row["validation/loss"] for row in rows(spec) if "validation/loss" in row][-1]
        assert run.evaluate("validation", params)["validation/loss"] == pytest.approx(expected, rel=1e-4)


def test_an_empty_validation_split_is_refused_before_training(text, tmp_path):
    short = tmp_path / "two.txt"
    short.write_text("one document of some words\nanother document\n")
    with pytest.raises(ConfigError, match="validation"):
        runs.run(runs.tiny("concat", text=short, data__holdout=0.0), tmp_path / "run")
    assert not (tmp_path / "run" / "ckpt").exists() or not any((tmp_path / "run" / "ckpt").iterdir())


def test_an_unknown_metric_to_keep_by_is_refused(text, tmp_path):
    config = runs.tiny("concat", text=text, train__steps=2, evals__validation__every=1, checkpoint__metric="validation/los")
    with pytest.raises(ConfigError, match="checkpoint.metric=validation/los is not among .* Did you mean 'validation/loss'"):
        runs.run(config, tmp_path / "run")


def test_a_run_goes_on_when_the_checkpoint_it_began_from_is_gone(finished, text, tmp_path):
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished, source)
    config = runs.tiny("concat", text=text, train__steps=2, init=f"ckpt:{source}")
    runs.run(config, workdir)
    shutil.rmtree(source)
    config.train.steps = 3
    assert runs.run(config, workdir) == 0
    with pytest.raises(ConfigError, match="there is no folder"):
        runs.run(config, tmp_path / "other")


def test_samples_show_no_control_characters(finished, capfd):
    """A terminal must not obey what an untrained model says."""
    config = json.loads((finished / "config.json").read_text())
    capfd.readouterr()
    assert runs.run(config, finished, sample=True) == 0
    out = capfd.readouterr().out
    assert all(c.isprintable() or c == "\n" or c == "\t" for c in out)


# What stops a run, and what it skips.


def poison(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Makes the loss of training batches nan, counted from 1 over all sessions of a test."""
    original, seen = run_lib.Run.to_device, itertools.count(1)

    def to_device(run, batch, **options):
        if next(seen) in calls:
            batch = batch | {"weights_BL": batch["weights_BL"] * np.float32(np.nan)}
        return original(run, batch, **options)

    monkeypatch.setattr(run_lib.Run, "to_device", to_device)


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch, capfd):
    """The message names step, groups and the last good checkpoint; the checkpoint holds finite parameters; the exit code is 1."""
    poison(monkeypatch, 3)
    monkeypatch.setenv("PTM_TEST_TEXT", str(text))
    arguments = ["--config.train.skip_sigma=None", "--config.checkpoint.every=2", "--config.evals.validation.every=1000", "--config.log.every=1"]
    code = cli.main(["train", f"--config={runs.__file__}:concat", f"--workdir={tmp_path}", *arguments])
    message = capfd.readouterr().err
    assert code == 1
    assert re.search(
        r"ptm: stopped at step 3: loss nan, gradient norm nan; not finite in the gradient of: .*token_embed.*\. Last good checkpoint: step 2\.", message
    )
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3] and rows(tmp_path)[-1]["loss"] == "nan"
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["2"]
    assert all(np.isfinite(leaf).all() for leaf in runs.leaves(tmp_path, 2).values())


def test_a_skipped_spike_changes_nothing(text):
    """A step that is skipped leaves parameters, optimizer, moving average and window as a step that does nothing would."""
    run = run_lib.setup(runs.tiny("concat", text=text), devices=jax.devices()[:1])

    def flat(values: dict) -> dict[str, bytes]:
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(values)}

    with contextlib.closing(run.loader()) as loader:
        batches = [run.to_device(next(loader), batch_size=16, rows=list(range(16))) for _ in range(14)]
    values = run.init_state(run.init_params())
    for batch in batches:
        values, metrics = run.train_step(values, batch)
        assert int(metrics["skips"]) == 0
    before = flat(values)
    spike = batches[0] | {"targets_BL": jnp.full_like(batches[0]["targets_BL"], 262)}
    not_finite = batches[1] | {"weights_BL": batches[1]["weights_BL"] * jnp.nan}
    for number, batch in enumerate((spike, not_finite), 1):
        values, metrics = run.train_step(values, batch)
        assert int(metrics["skips"]) == number
        assert bool(jnp.isfinite(metrics["loss"])) == (batch is spike)
        after = flat(values)
        changed = {path for path in before if after[path].tobytes() != before[path].tobytes()}
        assert changed == {"step", "window/skipped", "window/in_a_row"}
    values, metrics = run.train_step(values, batches[2])
    after = flat(values)
    assert int(metrics["skips"]) == 0 and int(after["window/in_a_row"]) == 0 and int(after["window/skipped"]) == 2
    assert int(after["step"]) == 17 and int(after["window/count"]) == 15


def test_skips_are_logged_counted_over_a_restart_and_limited(text, tmp_path, monkeypatch):
    """Steps 6 to 8 are not finite: two are skipped before a stop, the third, after it, is one too many for max_skips=3."""
    poison(monkeypatch, 6, 7, 8)
    config = runs.tiny("concat", text=text, train__max_skips=3, evals__validation__every=1000)
    with runs.at_batch(7, runs.stop):
        assert runs.run(config, tmp_path) == 75
    skipped = {row["step"]: row["skipped"] for row in rows(tmp_path)}
    assert skipped == {1: 0, 2: 0, 4: 0, 6: 1, 7: 1}
    with pytest.raises(FloatingPointError, match=r"3 steps in a row were skipped up to step 8: loss nan.*Last good checkpoint: step 7\..*max_skips"):
        runs.run(config, tmp_path)
    before = runs.leaves(tmp_path, 7)
    assert all(np.isfinite(leaf).all() for leaf in before.values()) and int(before["window/in_a_row"]) == 2


# What a terminal shows.


def test_messages_of_a_run(text, tmp_path, capfd):
    assert runs.run(runs.tiny("concat", text=text, train__steps=2), tmp_path, sample=True) == 0
    told = capfd.readouterr()
    lines = told.err.splitlines()
    size = tree.size(ptm.load(f"ckpt:{tmp_path}")[1])
    assert lines[0] == f"gpt with {size:,} parameters, objective causal, bytes tokenizer of 263 pieces."
    assert lines[1] == f"2 steps of 256 tokens from text:{text} on 1 x cpu, written to {tmp_path}."
    assert re.fullmatch(r"First step done .* after the start; \d+ compilations took .*, \d+ of them from the cache\.", lines[3])
    assert re.fullmatch(r"step 1/2 \(50 %\)  loss \d\.\d{4}", lines[4])
    assert re.fullmatch(r"step 2, validation: loss \d\.\d{4}, perplexity .*, accuracy .*, bits per byte .*", lines[6])
    for word in ("Finished gpt / causal in", "parameters", "tokens", "validation loss", "bits per byte", "generated", "written to", "ptm evaluate --workdir="):
        assert word in told.out


# Recipes.


def recipes() -> list:
    quickstart = [pytest.param(f"quickstart.py:{name},tiny", id=name) for name in ("gpt", "bert", "t5")]
    needs_data = pytest.mark.skipif("PTM_DATA" not in os.environ, reason="PTM_DATA names no folder of data sets")
    shakespeare = {"shakespeare_char_cpu": [needs_data], "shakespeare_char_best": [needs_data, pytest.mark.slow]}
    return [*quickstart, *(pytest.param(f"gpt2.py:{name},tiny", id=name, marks=marks) for name, marks in shakespeare.items())]


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_trains_saves_resumes_and_evaluates(recipe, tmp_path, capfd):
    """Its tiny variant, by the commands that a user types, stopped in the middle; the evaluation is that of the loop."""
    command = ["train", f"--config={CONFIGS / recipe}", f"--workdir={tmp_path}", "--config.log.every=1", "--config.log.writers=()", "--config.mesh.data=1"]
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        with runs.at_batch(7, runs.stop):
            assert cli.main(command) == 75
        assert cli.main(command) == 0
        told = capfd.readouterr()
        assert "Continuing" in told.err and "from step 7 of 20" in told.err and "Finished" in told.out
        assert any(shown in told.out for shown in ("generated", "filled blanks", "filled spans"))
        found = evaluate.evaluate(f"ckpt:{tmp_path}")
    trained = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 21))
    assert np.mean([row["loss"] for row in trained[-3:]]) < 0.95 * trained[0]["loss"]
    last = next(row for row in reversed(rows(tmp_path)) if "validation/loss" in row)
    assert found["step"] == 20 and {key: found[key] for key in last if key != "step"} == {key: value for key, value in last.items() if key != "step"}
    assert Checkpoints.reader(tmp_path / "ckpt").newest_valid() == 20 and len(describe.history(tmp_path)) == 2

"""Steps that are not accepted - a loss or gradient that is not finite, or a spike - leave a run as if they had done nothing, and are told of with their records.

What goes wrong is brought in by records: an objective of this file makes of a few characters what a bad batch, or a bad day of a device, makes of a loss.
"""

import contextlib
import itertools
import json
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import test_data

from ptm import objectives
from ptm import run as run_lib
from ptm.data.loader import Loader
from ptm.objectives import Entry, causal

ROWS, STEPS = 8, 22
GROUP = "decoder/final_norm"


def _scale(params):
    return params["decoder"]["final_norm"]["scale"]


def _root(hit, inside):
    """0, with the gradient of the root of `inside` at 0 where the row is hit."""
    return jnp.sqrt(jnp.where(hit, inside, 1.0)) - jnp.where(hit, 0.0, 1.0)


# Character -> what it does to the sum of losses `total` where a row of the batch has it. A gradient that is wrong is that of one parameter group.
EFFECTS = {
    "\x01": lambda total, hit, params: total * jnp.where(hit, jnp.nan, 1.0),
    "\x02": lambda total, hit, params: total + jnp.where(hit, jnp.inf, 0.0),
    "\x03": lambda total, hit, params: total + jnp.where(hit, -jnp.inf, 0.0),
    "\x04": lambda total, hit, params: total + _root(hit, 0.0 * jnp.sum(_scale(params))),  # gradient: infinity * 0
    "\x05": lambda total, hit, params: total + _root(hit, jnp.sum(_scale(params) - jax.lax.stop_gradient(_scale(params)))),  # infinity
    "\x06": lambda total, hit, params: total + jnp.where(hit, 1e6, 0.0),  # the loss alone
    "\x07": lambda total, hit, params: total + jnp.where(hit, 1e6, 0.0) * jnp.sum(_scale(params) - jax.lax.stop_gradient(_scale(params))),
    "\x08": lambda total, hit, params: total * jnp.where(hit, 1e30, 1.0),  # finite, but the squares of the gradient are not
}
FINITE = "\x02\x03\x06\x07"  # the gradient


class Poisoned(causal.Causal):
    """Causal language modelling of texts that may be poisoned."""

    def __init__(self, config, *, tokenizer, **given):
        super().__init__(config, tokenizer=tokenizer, **given)
        self._tokens = {character: int(tokenizer.encode(character)[0]) for character in EFFECTS}

    def loss(self, model, params, batch, *, rng, carry, train):
        totals, aux, carry = super().loss(model, params, batch, rng=rng, carry=carry, train=train)
        for character, effect in EFFECTS.items():
            totals["tokens"] = effect(totals["tokens"], jnp.any(batch["tokens_BL"] == self._tokens[character]), params)
        return totals, aux, carry


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "causal", Entry(causal.Config, Poisoned))


def corpus(path: Path, poison: dict[int, str]) -> Path:
    """A line for each row of each step, in order; a row in the middle of step k (from 1) begins with poison[k]."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(runs.WORDS, k=4))[:13] for _ in range(ROWS * STEPS)]  # none fills more than a row
    for step, character in poison.items():
        lines[ROWS * (step - 1) + 3] = character + lines[ROWS * (step - 1) + 3]
    path.write_text("\n".join(lines) + "\n")
    return path


def options_of(text: Path, **changes):
    """A run that reads the corpus line by line, a row each."""
    (text.parent / "validation.txt").write_text("the text of the validation\n")
    own = {
        "data__validation_source": (f"text:{text.parent}/validation.txt",), "data__packing": "none", "data__shuffle": False, "data__streams": 1,
        "train__batch_size": ROWS, "train__steps": STEPS, "evals__validation__every": 1000, "train__skip_sigma": 200.0,
    }  # fmt: skip
    return runs.tiny("concat", text=text, **own | changes)


def leaves_of(values) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


def with_nothing_done(options, skipped: set[int], *, devices: int = 1) -> dict[str, bytes]:
    """The state after all steps of a run in which those of `skipped` do nothing but be counted."""
    run = run_lib.setup(options, devices=jax.devices()[:devices])
    values, shardings = run.init_state(run.init_params()), jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state)
    with contextlib.closing(run.loader()) as loader:
        for step in range(1, STEPS + 1):
            batch = run.to_device(next(loader), batch_size=ROWS, rows=list(range(ROWS)))
            if step in skipped:
                window = values["window"] | {"skipped": values["window"]["skipped"] + 1, "in_a_row": values["window"]["in_a_row"] + 1}
                values = jax.device_put(values | {"step": values["step"] + 1, "window": window}, shardings)
            else:
                values, metrics = run.train_step(values, batch)
                assert int(metrics["skips"]) == 0, step
    return leaves_of(values)


POISON = dict(zip((5, 7, 8, 10, 12, 14, 16, 18), EFFECTS))  # the window of four steps is full after four


def written(workdir: Path, name: str = "skipped.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def assert_skipped(workdir: Path, expected: dict[str, bytes]) -> None:
    """The run ended as one in which the poisoned steps did nothing, and said which these were."""
    found = runs.leaves(workdir, STEPS)
    assert [path for path in expected if found[path].tobytes() != expected[path]] == [] and list(found) == list(expected)
    rows = written(workdir)
    assert [row["step"] for row in rows] == list(POISON)
    for row in rows:
        lines = range(ROWS * (row["step"] - 1) + 1, ROWS * row["step"] + 1)
        assert row["records"] == sorted(f"corpus.txt:{line}" for line in lines)
        character = POISON[row["step"]]
        of_group = re.escape(GROUP) if character in "\x04\x05\x07" else "(?!$).*"
        wrong = f"all gradients are finite, the largest is that of {of_group} .*" if character in FINITE else f"not finite in the gradient of: {of_group}"
        assert re.fullmatch(wrong, row["gradient"]), row
    logged = {row["step"]: row["skipped"] for row in written(workdir, "metrics.jsonl") if "skipped" in row}
    assert {step for step, skipped in logged.items() if skipped} == set(POISON)


@pytest.mark.parametrize(
    ("microbatches", "mesh"),
    [
        pytest.param(2, {}, id="one"),
        pytest.param(1, {}, id="whole_batches", marks=pytest.mark.slow),
        pytest.param(4, {}, id="microbatches", marks=pytest.mark.faults),
        pytest.param(2, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, id="sharded", marks=pytest.mark.faults),
        pytest.param(1, {"mesh__data": 8, "mesh__preset": "dp"}, id="dp", marks=pytest.mark.slow),
    ],
)
def test_skipped_steps_are_steps_that_do_nothing(microbatches, mesh, tmp_path, capfd, record_property):
    """Parameters, moments, averages and the window of spikes, bit for bit; so too after stops before, right after and between such steps."""
    options = options_of(corpus(tmp_path / "corpus.txt", POISON), train__microbatches=microbatches, **mesh)
    devices = 8 if mesh else 1
    expected = with_nothing_done(options, set(POISON), devices=devices)
    assert runs.run(options, tmp_path / "whole", devices=devices) == 0
    assert_skipped(tmp_path / "whole", expected)
    told = capfd.readouterr().err
    assert "Skipped step 7: loss inf, gradient norm " in told and "Records of its batch: corpus.txt:49, corpus.txt:50, " in told
    stops = (7,) if (microbatches, mesh) == (2, {}) else (4, 7, 9, 18)
    for before, step in itertools.pairwise((0, *stops)):
        with runs.at_batch(step - before, runs.stop):
            assert runs.run(options, tmp_path / "stopped", devices=devices) == 75
    assert runs.run(options, tmp_path / "stopped", devices=devices) == 0
    runs.assert_same(tmp_path / "stopped", tmp_path / "whole", STEPS)
    assert_skipped(tmp_path / "stopped", expected)
    record_property("fault", f"6. steps that are not finite, or spikes: {microbatches} microbatches, {devices} devices")
    record_property("tried", len(POISON))
    record_property("lost", 0)


def test_too_many_in_a_row_stop_the_run(tmp_path):
    """The message names the step, the group, the records and the last good checkpoint."""
    text = corpus(tmp_path / "corpus.txt", {8: "\x07", 9: "\x05", 10: "\x04", 12: "\x06"})
    records = re.escape(", ".join(sorted(f"corpus.txt:{line}" for line in range(73, 81))))
    with pytest.raises(
        FloatingPointError,
        match=rf"^3 steps in a row were skipped up to step 10: loss \d\S*, gradient norm nan; not finite in the gradient of: {GROUP}\. "
        rf"Records of its batch: {records}\. Last good checkpoint: step 6\. .*max_skips",
    ):
        runs.run(options_of(text, train__max_skips=3), tmp_path / "run")
    assert [row["step"] for row in written(tmp_path / "run")] == [8, 9, 10]
    assert all(np.isfinite(leaf).all() for leaf in runs.leaves(tmp_path / "run", 6).values())


@pytest.mark.faults
def test_without_skipping_the_first_that_is_not_finite_stops_the_run(tmp_path, record_property):
    text = corpus(tmp_path / "corpus.txt", {8: "\x07", 9: "\x05"})
    with pytest.raises(
        FloatingPointError, match=rf"^stopped at step 9: loss \d\S*, gradient norm inf; not finite in the gradient of: {GROUP}\. Records of its batch: "
    ):
        runs.run(options_of(text, train__skip_sigma=None), tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in runs.leaves(tmp_path / "run", 6).values())
    record_property("fault", "6. a gradient that is not finite, without skipping")
    record_property("tried", 1)
    record_property("lost", 0)


@pytest.mark.parametrize("name", test_data.CASES)
def test_a_batch_knows_its_records(name, tmp_path):
    """Whatever the packing, the records that are named are those whose tokens are in the batch; after a restore too."""
    featurizer, keys = test_data.CASES[name]
    alphabets = [{200 + 50 * n + i for i in range(4 + n)} for n in range(40)]
    path = test_data.write(tmp_path / "a.txt", "\n".join("".join(map(chr, sorted(letters))) for letters in alphabets) + "\n")
    data = test_data.loader(f"text:{path}", featurizer, **{"prefetch": 2, **keys})

    def check(data: Loader) -> None:
        batch = next(data)
        for p in range(4):
            present = {int(token) for name in ("tokens_BL", "inputs_BI") if name in batch for token in batch[name][2 * p : 2 * p + 2].flat}
            inside = {f"a.txt:{n}" for n, letters in enumerate(alphabets, 1) if letters & present}
            named = data.record_ids({p: data.drawn()[p]})
            assert len(named) == len(set(named)) and set(named) <= inside
            assert len(named) == len(inside) or name == "none"  # whose rows have a part of another record, drawn at random, besides

    for _ in range(6):
        check(data)
    again = test_data.loader(f"text:{path}", featurizer, **{"prefetch": 2, **keys})
    again.restore(json.loads(json.dumps(data.state())))
    for _ in range(6):
        check(again)
        check(data)
        assert again.drawn() == data.drawn()
    data.close(), again.close()

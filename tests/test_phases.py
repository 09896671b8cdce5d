"""Batches and rows whose sizes change at stated steps: nothing is lost or read twice at a change, and a run goes on exactly in every phase."""

import json

import jax
import numpy as np
import pytest
import runs
from test_weights import Chars, Whole

from ptm import registry
from ptm import run as run_lib
from ptm.config import Data
from ptm.data import mixture, pack
from ptm.data.loader import Loader
from ptm.fields import ConfigError

SIZES, LENGTHS = ((0, 4), (5, 8)), ((0, 20), (9, 48))
STEPS, RUN = 16, 14


class Sized(Whole):
    """Rows of a length; documents are cut by the objective or by the packer."""

    def __init__(self, length, packing, raw=False):
        super().__init__(packing)
        self.lengths, self.raw_length = {"L": length}, length if raw else None


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """400 documents of 1 to 70 times a letter of their own."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("text") / "a.txt"
    sizes = rng.integers(1, 70, 400)
    path.write_text("".join(chr(0x4E00 + n) * size + "\n" for n, size in enumerate(sizes)), encoding="utf-8")
    return path, sizes


def loader(path, packing, *, rows=None, raw=False):
    data = Data(source=(f"text:{path}",), holdout=0.0, prefetch=0, packing_bins=3, packing=packing)
    short, long = Sized(20, packing, raw), Sized(48, packing, raw)
    return Loader(data, featurizer=short, tokenizer=Chars(), seed=1, batch_size=4, streams=4, rows=rows, later=[(5, 8, short), (9, 8, long)])


@pytest.mark.parametrize(("packing", "raw"), [("first_fit", False), ("first_fit", True), ("concat", False), ("none", False)])
def test_nothing_is_lost_or_read_twice(documents, packing, raw):
    """Of each document that is done with every token came once, those of open rows at a change too; shapes are those of the steps; tokens are counted exactly."""
    path, sizes = documents
    made, seen, total = loader(path, packing, raw=raw), np.zeros(400, int), 0
    for step in range(STEPS):
        batch = next(made)
        rows, length = (max(point for point in points if point[0] <= step)[1] for points in (SIZES, LENGTHS))
        assert batch["tokens_BL"].shape == (rows, length)
        real = batch["segments_BL"] > 0
        total += real.sum()
        seen += np.bincount(batch["tokens_BL"][real] - 0x4E00, minlength=400)
        stats = made.stats()
        assert stats["tokens"] == total
    assert stats["rows"] == 5 * 4 + 11 * 8 and stats["padding_share"] == pytest.approx(1 - total / (5 * 4 * 20 + 4 * 8 * 20 + 7 * 8 * 48))
    order, done, begun = mixture.Order((400,), weights=(1.0,), seed=1, shuffle=True), [], []
    for p, state in made.state().items():
        assert len(state["begins"]) == 2
        waiting = pack.draws_of(state["packer"])
        places = [(draw, order[p + 4 * draw][1]) for draw in range(state["packer"]["draw"] + 1)]
        done += [record for draw, record in places if draw not in waiting]
        begun += [record for draw, record in places if draw in waiting]
    assert len(done) > 30 and len({*done, *begun}) == len(done) + len(begun) < 400
    np.testing.assert_array_equal(seen[done], sizes[done])
    assert (seen[begun] <= sizes[begun]).all() and seen.sum() == seen[done].sum() + seen[begun].sum()


@pytest.mark.parametrize("packing", ["first_fit", "concat", "window"])
def test_it_goes_on_in_every_phase_and_on_other_hosts(documents, packing):
    path, _ = documents
    straight = loader(path, packing)
    states, batches, stats = [straight.state()], [], [straight.stats()]
    for _ in range(STEPS):
        batches.append(next(straight))
        states.append(json.loads(json.dumps(straight.state())))
        stats.append(straight.stats())
    for at in (0, 3, 5, 7, 9, 10, 13):
        halves = [loader(path, packing, rows=lambda size, h=h: range(h * size // 2, (h + 1) * size // 2)) for h in range(2)]
        whole = loader(path, packing)
        for each in (whole, *halves):
            each.restore(states[at])
        assert json.loads(json.dumps(whole.state())) == json.loads(json.dumps(states[at]))
        for step in range(at, min(at + 5, STEPS)):
            parts = [next(half) for half in halves]
            for name, values in next(whole).items():
                np.testing.assert_array_equal(values, batches[step][name])
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
            assert whole.stats() == stats[step + 1]


def config(text, kind="mlm", **changes):
    options = {"train__batch_schedule": "0=8,4=16", "data__length_schedule": "0=24,8=48"} | changes
    return runs.tiny(kind, text=text, **{key: value for key, value in options.items() if value is not None})


@pytest.mark.parametrize("at", [6, 10])
def test_a_stopped_run_ends_as_if_nothing_had_happened(at, tmp_path, capfd):
    """Stopped in the second phase and in the third; each phase is compiled once."""
    text, whole, cut = runs.corpus(tmp_path / "corpus.txt"), tmp_path / "whole", tmp_path / "cut"
    assert runs.run(config(text), whole) == 0
    told = capfd.readouterr().err
    assert "From step 5 on batches have 16 rows of 24 tokens." in told and "From step 9 on batches have 16 rows of 48 tokens." in told
    compiled = [json.loads(line) for line in (whole / "compiles.jsonl").read_text().splitlines()]
    assert [row["step"] for row in compiled if row["function"] == "train_step"] == [0, 4, 8]
    with runs.at_batch(at, runs.stop):
        assert runs.run(config(text), cut) == 75
    assert runs.run(config(text), cut) == 0
    runs.assert_same(cut, whole, RUN)
    last = [row for row in map(json.loads, runs.metrics(whole).splitlines()) if "loss" in row][-1]
    assert last["rows"] == 4 * 8 + 10 * 16 and 0 < last["tokens"] <= 4 * 8 * 24 + 4 * 16 * 24 + 6 * 16 * 48


def test_what_is_planned_and_measured_has_the_largest_sizes(tmp_path):
    run = run_lib.setup(config(runs.corpus(tmp_path / "corpus.txt")), devices=jax.devices()[:1])
    assert run.abstract_batch()["tokens_BL"].shape == (16, 48) and run.tokens_per_step() == 16 * 48
    assert [(run.at(step).abstract_batch()["tokens_BL"].shape, run.at(step).tokens_per_step()) for step in (0, 4, 8)] == [
        ((8, 24), 192),
        ((16, 24), 384),
        ((16, 48), 768),
    ]
    assert run.total_tokens() == 4 * 192 + 4 * 384 + 6 * 768
    assert run.at(5) is run.at(7) is not run.at(8)
    assert registry.phases(run.config) == ((0, 8, 24), (4, 16, 24), (8, 16, 48)) and registry.streams(run.config) == 4


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("mlm", {"train__batch_schedule": "0=8,4=32"}, "--config.train.batch_size=32"),
        ("mlm", {"train__batch_schedule": "0=6,4=16"}, "data.streams=4 does not divide 6 rows, train.batch_schedule=0=6,4=16; allowed: 1, 2"),
        ("mlm", {"train__microbatches": "16"}, "train.microbatches=16 does not divide 8 rows"),
        ("mlm", {"data__length_schedule": "0=48,8=24"}, "lengths that rise up to data.length"),
        ("mlm", {"data__length_schedule": "0=2,8=48"}, "data.length=2 leaves no room"),
        ("memory", {"train__batch_schedule": "0=8,4=16", "data__length_schedule": None}, "objective.memory_length=12, whose rows go on"),
    ],
)  # fmt: skip
def test_refused(kind, changes, told, tmp_path):
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        run_lib.setup(config(runs.corpus(tmp_path / "corpus.txt"), kind, **changes), devices=jax.devices()[:1])

"""Mixtures whose weights change with the steps, and sources that may be drawn so often only: shares, limits, and the same order on any hosts."""

import collections
import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.config import Data
from ptm.data import documents, mixture
from ptm.data.batch import SOURCE, Field
from ptm.data.loader import Loader
from ptm.fields import ConfigError

STEPS, BATCH, STREAMS = 1000, 8, 4
SCHEDULE = ("0=0.7:0.2:0.1", "500=0.2:0.4:0.4", "800=0:1:3")


class Chars:
    """Tokens are code points; the letters of a source are its own."""

    def encode(self, text):
        return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int32)


class Whole:
    """Every token of a document once."""

    lengths, fields = {"L": 48}, {"tokens_BL": Field(is_tokens=True), "weights_BL": Field(np.float32)}
    raw_length, max_segments, visits = 48, None, None

    def __init__(self, packing="first_fit"):
        self.packing = packing

    def features(self, doc, *, rng, draw):
        yield {"tokens_BL": doc.tokens_L, "weights_BL": np.full(len(doc.tokens_L), rng.random(), np.float32)}

    def finish(self, row):
        return row


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three files of 400, 90 and 30 lines of 1 to 60 letters."""
    folder, rng, specs = tmp_path_factory.mktemp("sources"), random.Random(0), []
    for letter, count in zip("abc", (400, 90, 30)):
        (folder / f"{letter}.txt").write_text("".join(letter * rng.randint(1, 60) + "\n" for _ in range(count)))
        specs.append(f"text:{folder / letter}.txt")
    return tuple(specs)


def loader(sources, *, packing="first_fit", rows=None, batch_size=BATCH, streams=STREAMS, **keys):
    data = Data(source=sources, **{"holdout": 0.0, "prefetch": 0, "packing_bins": 3, **keys})
    return Loader(data, featurizer=Whole(packing), tokenizer=Chars(), seed=1, batch_size=batch_size, streams=streams, rows=rows)


def draws(stats):
    return np.array([stats[f"draws_{n}"] for n in range(3)])


def asked(step, schedule=SCHEDULE):
    weights = [entry for entry in schedule if int(entry.split("=")[0]) <= step][-1].split("=")[1].split(":")
    return np.array(weights, float) / sum(map(float, weights))


@pytest.mark.parametrize("packing", ["first_fit", "concat", "none"])
def test_shares_hold_at_every_step_and_on_any_hosts(sources, packing):
    """Within a batch of what was asked for so far, at each of 1,000 steps; and from a random step on the same batches on 1, 2 and 4 hosts."""
    at = random.Random(packing).randrange(1, STEPS - 3)
    made, expected, found, due, states, after = loader(sources, packing=packing, weight_schedule=SCHEDULE), [], np.zeros(3), np.zeros(3), {}, []
    for step in range(STEPS):
        batch = next(made)
        now = draws(made.stats())
        due += asked(step) * (now - found).sum()
        found = now
        assert np.abs(found - due).max() <= BATCH, (step, found, due)
        if step + 1 == at:
            states = json.loads(json.dumps(made.state()))
        if at <= step < at + 3:
            expected.append(batch)
            after.append(made.stats())
    tokens = np.bincount(np.searchsorted([ord(c) for c in "abc"], np.concatenate([batch["tokens_BL"].ravel() for batch in expected])), minlength=3)
    assert tokens.sum() > 0 and made.stats()["tokens_2"] > made.stats()["tokens_1"] * 0.5
    for hosts in (1, 2, 4):
        share = BATCH // hosts
        each = [loader(sources, packing=packing, weight_schedule=SCHEDULE, rows=range(h * share, (h + 1) * share)) for h in range(hosts)]
        for host in each:
            host.restore(states)
        for batch, stats in zip(expected, after):
            parts = [next(host) for host in each]
            for name in batch:
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])
            assert each[0].stats([host.counts() for host in each]) == stats


def test_counts_are_those_of_the_rows(sources):
    """Tokens and examples by source, as they can be read off the batches; draws are whole documents begun."""
    made, tokens, examples = loader(sources, weights=(0.6, 0.3, 0.1), batch_size=4), np.zeros(3, int), np.zeros(3, int)
    for _ in range(40):
        batch = next(made)
        for row, segments in zip(batch["tokens_BL"], batch["segments_BL"]):
            for n in range(1, segments.max() + 1):
                (source,) = {"abc".index(chr(token)) for token in row[segments == n]}
                tokens[source] += np.sum(segments == n)
                examples[source] += 1
        letters = batch["tokens_BL"][..., None] == np.array([ord(letter) for letter in "abc"])
        np.testing.assert_array_equal(batch[SOURCE], letters)
    stats = made.stats()
    assert [stats[f"tokens_{n}"] for n in range(3)] == tokens.tolist() and [stats[f"examples_{n}"] for n in range(3)] == examples.tolist()
    assert tokens.sum() == round((1 - stats["padding_share"]) * stats["rows"] * 48)
    assert draws(stats).sum() <= examples.sum() + 4 * 3 * 48


weights_of = st.lists(st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any)


@settings(max_examples=60, deadline=None)
@given(points=st.lists(weights_of, min_size=1, max_size=5), linear=st.booleans(), streams=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99))
def test_streams_stay_near_their_shares_whatever_the_weights_become(points, linear, streams, seed):
    """Of several streams that draw at rates of their own, and no draw comes twice."""
    plan = mixture.Weights(tuple((50 * n, tuple(point)) for n, point in enumerate(points)), linear, (None,) * 3)
    shuffles = mixture.Shuffles((5, 70, 1000), seed=0, shuffle=True)
    mixers, rng = [mixture.Mixer(shuffles, plan, first=p, step=streams) for p in range(streams)], np.random.default_rng(seed)
    due, found, seen = np.zeros((streams, 3)), np.zeros((streams, 3)), set()
    for step in range(50 * len(points)):
        for p, count in enumerate(rng.poisson(rng.random(streams) * 2)):
            for _ in range(count):
                source, record, visit = mixers[p].draw(step)
                due[p] += plan.at(step)
                found[p, source] += 1
                seen.add((source, record, visit))
        assert np.abs(found - due).max() < 2 and np.abs(found[0] - due[0]).max() < 1.3
        assert np.abs((found - due).sum(axis=0)).max() <= streams + 0.3
    assert len(seen) == found.sum()


def test_streams_do_not_draw_the_same_source_at_once():
    plan = mixture.Weights(((0, (0.5, 0.25, 0.25)),), False, (None,) * 3)
    mixers = [mixture.Mixer(mixture.Shuffles((9, 9, 9), seed=0, shuffle=True), plan, first=p, step=64) for p in range(64)]
    for _ in range(20):
        np.testing.assert_allclose(np.bincount([mixer.draw(0)[0] for mixer in mixers], minlength=3) / 64, [0.5, 0.25, 0.25], atol=0.15)


def test_weights_may_change_in_a_straight_line():
    points = ((0, (1.0, 1.0)), (100, (0.0, 2.0)))
    line, steps = (mixture.Weights(points, linear, (None, None)) for linear in (True, False))
    assert line.at(50) == (0.25, 0.75) and line.at(200) == (0.0, 1.0) and steps.at(99) == (0.5, 0.5) and steps.at(100) == (0.0, 1.0)


# --- limits ---


def test_sources_are_drawn_so_often_and_no_more(sources):
    """Each place of a source's order below its limit comes once over all streams; then the others have its share; then the data ends."""
    shuffles, limits = mixture.Shuffles((40, 20, 30), seed=0, shuffle=True), (100, 40, 3)
    plan = mixture.Weights(((0, (1.0, 1.0, 2.0)),), False, limits)
    mixers = [mixture.Mixer(shuffles, plan, first=p, step=4) for p in range(4)]
    seen = collections.Counter()
    for mixer in mixers:
        drawn = []
        with pytest.raises(ConfigError, match=r"the data ends in step 8: .*--config.train.steps=7, or raise --config.data.max_epochs"):
            while True:
                drawn.append(mixer.draw(7))
        seen.update(drawn)
        rest = [source for source, _, _ in drawn][8:16]  # no source 2 any more: the others have equal shares
        assert abs(rest.count(0) - 4) <= 1 and 2 not in rest
    assert set(seen.values()) == {1} and collections.Counter(source for source, _, _ in seen) == {0: 100, 1: 40, 2: 3}
    assert max(visit for source, _, visit in seen if source == 0) == 2


def test_the_end_of_the_data(sources):
    """Refused before the run where a sample tells so, else told at its step; what is there is given out, whatever the hosts."""
    short = loader(sources, max_epochs=(1.0, 2.0, 1.0))
    short.require(10)
    with pytest.raises(
        ConfigError, match=r"data.max_epochs leaves about .* rows, and train.steps=1000 with train.batch_size=8 needs 8,000: raise data.max_epochs to about"
    ):
        short.require(STEPS)
    loader(sources, max_epochs=(1.0, 2.0, 0.0)).require(10**6)
    loader(sources, weights=(1, 0, 0), max_epochs=(0.0, 1.0, 1.0)).require(10**6)
    made = 0
    with pytest.raises(ConfigError, match="the data ends in step"):
        while True:
            next(short)
            made += 1
    stats = short.stats()
    assert made > 40 and stats["epoch_0"] <= 1 and stats["epoch_1"] <= 2 and stats["epoch_1"] > 1 and stats["epoch_2"] == 1
    more = loader(sources, max_epochs=(2.0, 2.0, 1.0))
    more.restore(json.loads(json.dumps(short.state())))
    for _ in range(30):
        next(more)
    assert 1 < more.stats()["epoch_0"] <= 2 and more.stats()["epoch_2"] == 1, "a run may go on with more of its sources"
    states = None
    for rows in (range(8), range(4)):
        host = loader(sources, max_epochs=(1.0, 2.0, 1.0), rows=rows)
        if states:
            host.restore(states)
        for _ in range(20):
            next(host)
        states = states or host.state()


# --- what was there before ---


def test_orders_of_stored_runs_stay():
    """Runs of an earlier version go on in the order in which they were begun."""
    orders = {
        "one": mixture.Order((50,), weights=(1.0,), seed=3, shuffle=True),
        "large": mixture.Order((70_000,), weights=(1.0,), seed=3, shuffle=True),
        "three": mixture.Order((50, 30, 7), weights=(6.0, 3.0, 1.0), seed=0, shuffle=True),
        "plain": mixture.Order((50, 30), weights=(1.0, 2.0), seed=0, shuffle=False),
    }
    assert {name: hashlib.sha256(str([order[n] for n in range(3000)]).encode()).hexdigest()[:12] for name, order in orders.items()} == GOLDEN


GOLDEN = {"one": "7514880576a7", "large": "92b24abe0229", "three": "ccb4eac3ac86", "plain": "1c38a9dc9f1f"}


def test_states_from_before_sources_were_counted(sources):
    """The same batches; counts begin where the run goes on."""
    straight, again = (loader(sources, weights=(3, 2, 1)) for _ in range(2))
    for _ in range(5):
        next(straight)
    old = {p: {key: value for key, value in state.items() if key != "sources"} for p, state in straight.state().items()}
    again.restore(json.loads(json.dumps(old)))
    before = draws(straight.stats()).sum()
    for _ in range(5):
        np.testing.assert_array_equal(next(straight)["weights_BL"], next(again)["weights_BL"])
    assert 0 < draws(again.stats()).sum() < draws(straight.stats()).sum() and before > 0


# --- weights ---


def test_sizes_count_up_to_a_limit(sources):
    """Raffel et al. 2020, section 3.5.2: in proportion to min(size, K), to the power 1 / T."""
    for keys, expected in (
        ({"temperature": 1.0}, (400, 90, 30)),
        ({"temperature": 1.0, "size_limit": 100}, (100, 90, 30)),
        ({"temperature": 2.0, "size_limit": 100}, (10, 90**0.5, 30**0.5)),
    ):
        assert documents.Corpus(Data(source=sources, **keys), split="train").weights == pytest.approx(expected)
    assert documents.Corpus(Data(source=sources, weight_schedule=SCHEDULE), split="train").weights == pytest.approx((0.9, 0.85, 1.25))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"weight_schedule": ("0=1,2,3",)}, "is not of the form STEP=W:W"),
        ({"weight_schedule": ("0=1:2",)}, "step 0 must hold one weight for each of the 3"),
        ({"weight_schedule": ("0=1:1:1", "9=0:0:0")}, "step 9 must hold"),
        ({"weight_schedule": ("5=1:1:1",)}, "'5=1:1:1'; allowed: steps that begin with 0"),
        ({"weight_schedule": ("0=1:1:1", "9=1:0:0", "9=1:0:1")}, "'9=1:0:1'; allowed: steps"),
        ({"weight_schedule": ("0=1:1:1",), "weights": (1.0, 1.0, 1.0)}, "say the same in two ways"),
        ({"weight_schedule": ("0=1:1:1",), "temperature": 2.0}, "data.temperature=2.0 and data.weight_schedule"),
        ({"max_epochs": (1.0, 2.0)}, "one for each of the 3"),
        ({"size_limit": 7}, "set data.temperature=1"),
    ],
)  # fmt: skip
def test_refused(keys, told):
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        Data(source=("text:a", "text:b", "text:c"), **keys).check("data")

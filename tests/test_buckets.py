"""Batches of about equal length for answers, and rows that hold no more examples than may be. Judged by what they hold."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.config import Data
from ptm.data import buckets, pack, pipeline
from ptm.data.batch import Document, Field
from ptm.data.loader import Loader
from ptm.fields import ConfigError


class Marked:
    """Tokens, a label at one place and a number of the row; `finish` turns the marks into indices as tasks do."""

    packing, raw_length, visits = "first_fit", None, None

    def __init__(self, length, *, inputs=None, max_segments=2):
        self.max_segments = max_segments
        self.lengths = {"L": length, "S": max_segments} | ({"I": inputs} if inputs else {})
        self.fields = {"tokens_BL": Field(is_tokens=True, pad=-1), "marks_BL": Field(pad=0)} | ({"inputs_BI": Field(pad=-2)} if inputs else {})

    def features(self, doc, *, rng, draw):
        yield example(doc.tokens_L, doc.tokens_L if "I" in self.lengths else None)

    def finish(self, row):
        index = np.flatnonzero(row["marks_BL"])
        padded = np.full(self.lengths["S"], -1)
        padded[: len(index)] = index
        return {name: values for name, values in row.items() if name != "marks_BL"} | {"index_BS": padded}


def example(tokens_L, inputs_I=None):
    marks_L = np.zeros(len(tokens_L), np.int32)
    marks_L[-1:] = 1
    return {"tokens_BL": tokens_L, "marks_BL": marks_L} | ({} if inputs_I is None else {"inputs_BI": inputs_I})


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({"length": 128}, [16, 32, 64, 128]),
        ({"length": 100}, [16, 32, 56, 100]),
        ({"length": 20}, [8, 16, 20]),
        ({"length": 6}, [6]),
        ({"length": 32, "inputs": 512}, [(8, 64), (8, 128), (16, 256), (32, 512)]),
    ],
)
def test_lengths_grow_up_to_a_whole_row(lengths, expected):
    found = buckets.shapes(Marked(**lengths))
    assert [(sizes["L"], sizes["I"]) if "I" in sizes else sizes["L"] for sizes in found] == expected
    assert all(sizes["S"] == 2 for sizes in found)


def test_a_window_in_readable_form():
    words = ["a", "bb", "ccc", "d" * 9, "e" * 17, "f" * 30, "g"]
    items = [(word[0], example(np.frombuffer(word.encode(), np.uint8).astype(np.int32))) for word in words]
    found = list(buckets.batches(items, featurizer=Marked(32), batch_size=2, window=3))
    shown = [(keys, ["".join(chr(t) if t > 0 else "." for t in row) for row in batch["tokens_BL"]]) for keys, batch in found]
    assert shown == [  # two windows of 4, the longest first, each batch as short as its longest row allows
        (["d", "c"], ["ddddddddd.......", "ccc............."]),
        (["b", "a"], ["bb......", "a......."]),
        (["f", "e"], ["f" * 30 + "..", "e" * 17 + "." * 15]),
        (["g"], ["g.......", "........"]),
    ]
    assert found[0][1]["index_BS"].tolist() == [[8, -1], [2, -1]] and found[3][1]["index_BS"].tolist() == [[0, -1], [-1, -1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 70)), max_size=40), st.integers(1, 5), st.integers(1, 13), st.booleans())
def test_every_example_once_and_as_in_a_whole_row(sizes, batch_size, window, paired):
    featurizer = Marked(40, inputs=70 if paired else None)
    items = [(n, example(np.arange(a, dtype=np.int32) + 1000 * n, np.arange(b, dtype=np.int32) - 500 if paired else None)) for n, (a, b) in enumerate(sizes)]
    taken = []

    def streamed():
        for item in items:
            taken.append(item[0])
            yield item

    whole = pack.Layout(featurizer)
    seen, formed, lookahead = [], set(), -(-window // batch_size) * batch_size
    for keys, batch in buckets.batches(streamed(), featurizer=featurizer, batch_size=batch_size, window=window):
        assert len(taken) - len(seen) <= lookahead and {len(values) for values in batch.values()} == {batch_size}
        formed.add(tuple(sorted((name, values.shape) for name, values in batch.items())))
        for at in range(batch_size):
            row = pack.Row(whole)
            if at < len(keys):
                row.add(items[keys[at]][1], whole.sizes(items[keys[at]][1]))
            for name, values in featurizer.finish(row.arrays).items():
                short = batch[name][at]
                np.testing.assert_array_equal(values[: len(short)] if pack.dim_of(name) in "LI" else values, short, err_msg=name)
                assert not (pack.dim_of(name) in "LI" and "segments" in name and values[len(short) :].any()), "nothing is cut off"
        seen += keys
    assert sorted(seen) == list(range(len(items))) and len(formed) <= len(buckets.shapes(featurizer)) <= buckets.COUNT
    again = list(buckets.batches(items, featurizer=featurizer, batch_size=batch_size, window=window))
    assert [key for keys, _ in again for key in keys] == seen


def test_little_is_padding_and_too_long_is_refused():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(3, 0.6, 2000), 3, 128).astype(int)
    items = [(n, example(np.ones(size, np.int32))) for n, size in enumerate(sizes)]
    positions = sum(batch["tokens_BL"].size for _, batch in buckets.batches(items, featurizer=Marked(128), batch_size=32, window=1024))
    assert positions < 0.3 * 2000 * 128 and sizes.sum() / positions > 0.6
    with pytest.raises(ValueError, match="must keep to its lengths"):
        list(buckets.batches([(0, example(np.ones(9, np.int32)))], featurizer=Marked(8), batch_size=1, window=1))


# ---- the most examples of a packed row ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["first_fit", "concat"]))
def test_rows_hold_no_more_segments_than_may_be(sizes, bins, most, packing):
    featurizer = Marked(20, max_segments=most)
    if packing == "concat":
        featurizer.lengths = {"L": 20}
    examples = [np.full(size, n + 1, np.int32) for n, size in enumerate(sizes)]
    cursor = pack.Cursor(lambda draw: featurizer.features(Document("x", examples[draw]), rng=None, draw=None), count=len(sizes))
    packer = pack.make_packer(packing, layout=pack.Layout(featurizer), cursor=cursor, bins=bins)
    rows = [row.arrays for row in iter(packer.next_row, None)]
    assert all(row["segments_BL"].max() <= most for row in rows)
    tokens = np.concatenate([row["tokens_BL"][row["segments_BL"] > 0] for row in rows])
    assert sorted(tokens.tolist()) == np.repeat(np.arange(len(sizes)) + 1, sizes).tolist()


class Letters:
    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@pytest.mark.parametrize("most", [1, 3])
def test_packed_rows_go_on_from_their_state(tmp_path, most):
    path = tmp_path / "a.txt"
    path.write_text("".join("abcdefghijkl"[n % 11] * (1 + n * 7 % 9) + "\n" for n in range(60)))
    data = Data(source=(f"text:{path}",), holdout=0.0, prefetch=0, packing_bins=4)
    make = lambda: Loader(data, featurizer=Marked(20, max_segments=most), tokenizer=Letters(), seed=0, batch_size=4, streams=2)  # noqa: E731
    straight, restored = make(), make()
    expected, states = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(straight.state())))
        expected.append(next(straight))
    assert max(batch["segments_BL"].max() for batch in expected) == most
    ends = [batch["index_BS"] >= 0 for batch in expected]
    assert all((end.sum(axis=1) == batch["segments_BL"].max(axis=1)).all() for end, batch in zip(ends, expected))
    for at in (1, 5, 8):
        restored.restore(states[at])
        for batch in expected[at : at + 4]:
            found = next(restored)
            assert batch.keys() == found.keys() and all((batch[name] == found[name]).all() for name in batch)


def test_fields_of_the_row_still_keep_examples_apart(tmp_path):
    featurizer = Marked(20)
    featurizer.fields = featurizer.fields | {"label_B": Field()}
    cursor = pack.Cursor(lambda draw: iter(()), count=0)
    with pytest.raises(ConfigError, match="first_fit cannot share a row"):
        pack.make_packer("first_fit", layout=pack.Layout(featurizer), cursor=cursor, bins=2)
    assert pipeline.row_packing(Data(), featurizer) == "first_fit"

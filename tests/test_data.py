"""The data pipeline: sources, splits, packing, order, state. Batches are judged by what they hold, with tokens that are code points."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from ptm.config import Data
from ptm.data import documents, mixture, offsets, pack, pipeline, python_docs, sources
from ptm.data.batch import Document, Field
from ptm.data.loader import Loader
from ptm.fields import ConfigError


class Chars:
    """Tokens are code points; counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int32)


class Causal:
    """Shifts by one; the weights carry a random number for each document, so that randomness is seen in the batch."""

    max_segments = None

    def __init__(self, length=16, packing="concat", raw_length=None, visits=None):
        self.lengths, self.packing, self.raw_length, self.visits = {"L": length}, packing, raw_length, visits
        self.fields = {"tokens_BL": Field(is_tokens=True), "targets_BL": Field(is_tokens=True), "weights_BL": Field(np.float32)}

    def features(self, doc, *, rng, draw):
        x = doc.tokens_L
        if len(x) > 1:
            yield {"tokens_BL": x[:-1], "targets_BL": x[1:], "weights_BL": np.full(len(x) - 1, rng.random() + 0.5, np.float32)}

    def finish(self, row):
        return row | {"sum_B": row["tokens_BL"].sum()}


class Whole(Causal):
    """Every token of a piece once, so that packing can be checked to lose nothing."""

    def features(self, doc, *, rng, draw):
        yield {"tokens_BL": doc.tokens_L, "targets_BL": doc.tokens_L + 1, "weights_BL": np.ones(len(doc.tokens_L), np.float32)}


class Paired(Causal):
    """The first third of a piece goes to the decoder, the rest to the encoder."""

    def __init__(self, length=8, inputs=16):
        super().__init__(length, "first_fit", raw_length=18)
        self.lengths = {"L": length, "I": inputs}
        self.fields = {"tokens_BL": Field(pad=-1), "inputs_BI": Field(pad=-2)}

    def features(self, doc, *, rng, draw):
        third = max(1, len(doc.tokens_L) // 3)
        yield {"tokens_BL": doc.tokens_L[:third], "inputs_BI": doc.tokens_L[third:]}

    def finish(self, row):
        return row


class Pairs(Causal):
    """A piece and the beginning of a random other document, one label a row."""

    def __init__(self, length=24):
        super().__init__(length, "none", raw_length=10)
        self.fields = {"tokens_BL": Field(pad=-1), "label_B": Field(), "marks_BS": Field(pad=-3)}
        self.lengths = {"L": length, "S": 4}

    def features(self, doc, *, rng, draw):
        other = draw(rng).tokens_L[:10]
        yield {"tokens_BL": np.concatenate([doc.tokens_L, other]), "label_B": len(other), "marks_BS": doc.tokens_L[:2]}

    def finish(self, row):
        return row


CASES = {
    "concat": (Causal(), {}),
    "first_fit": (Causal(packing="first_fit"), {"packing_bins": 4}),
    "paired": (Paired(), {"packing_bins": 3}),
    "window": (Causal(), {"packing": "window"}),
    "none": (Pairs(), {}),
    "split": (Causal(raw_length=7), {"max_record_tokens": 16}),
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """40 lines of 3 to 42 different letters."""
    lines = ["".join(chr(200 + 50 * n + i) for i in range(3 + n)) for n in range(40)]
    return write(tmp_path / "lines.txt", "\n".join(lines) + "\n")


def loader(spec, featurizer=None, *, seed=0, batch_size=8, streams=4, rows=None, split="train", **keys):
    keys = {"holdout": 0.0, "prefetch": 0, **keys}
    data = Data(source=(spec,) if isinstance(spec, str) else spec, **keys)
    return Loader(data, featurizer=featurizer or Causal(), tokenizer=Chars(), seed=seed, batch_size=batch_size, streams=streams, rows=rows, split=split)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
            assert a[name].dtype == b[name].dtype


def segments(batch, tokens="tokens_BL", numbers="segments_BL"):
    """The token strings of all segments, row by row."""
    found = []
    for row, segment in zip(batch[tokens], batch[numbers]):
        found += [row[segment == n].tolist() for n in range(1, segment.max() + 1)]
    return found


def records(spec, **keys):
    """{id: text} of a source, bad records left out."""
    corpus = documents.Corpus(Data(source=(spec,), holdout=0.0, **keys), split="train")
    found = {corpus.id(0, n): corpus.record(0, n) for n in range(corpus.sizes[0])}
    return {name: record[0] for name, record in found.items() if record}, corpus.describe_bad()


# ---- sources ----


def test_lines_paragraphs_and_files_have_ids_by_line(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\n  \ntwo\nthree\n\nvier \u2028 ß")
    assert records(f"text:{path}")[0] == {"a.txt:1": "one", "a.txt:4": "two", "a.txt:5": "three", "a.txt:7": "vier \u2028 ß"}
    assert records(f"text:{path}", document="paragraph")[0] == {"a.txt:1": "one", "a.txt:4": "two\nthree", "a.txt:7": "vier \u2028 ß"}
    assert records(f"text:{path}", document="file")[0] == {"a.txt:1": "one\r\n\n  \ntwo\nthree\n\nvier \u2028 ß"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "bcd", "\n", "\n", " ", "\r\n", "éé", "\t"])), st.integers(1, 9))
def test_line_index_does_not_depend_on_the_block_size(tmp_path_factory, pieces, block):
    content = "".join(pieces)
    path = write(tmp_path_factory.mktemp("index") / "t.txt", content)
    expected = [(n, line) for n, line in enumerate(content.encode().split(b"\n"), 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offsets, "BLOCK", block)
        starts, lengths, lines = offsets.lines(path)
    raw = content.encode()
    assert [(n, raw[s : s + size].removesuffix(b"\n")) for s, size, n in zip(starts.tolist(), lengths.tolist(), lines.tolist())] == expected


def test_many_files_are_read_with_few_descriptors(tmp_path):
    for n in range(offsets.OPEN_FILES + 20):
        write(tmp_path / f"{n:03}.txt", f"text {n}")
    found, _ = records(f"text:{tmp_path}/*.txt")
    assert list(found.values()) == [f"text {n}" for n in range(offsets.OPEN_FILES + 20)]


def test_ids_differ_where_files_share_a_name(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.txt", folder)
    assert records(f"text:{tmp_path}/*/a.txt")[0] == {"x/a.txt:1": "x", "y/a.txt:1": "y"}


def test_csv_keeps_quoted_newlines_and_names_the_first_line_of_a_record(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\r\n"one\nmore, ""quoted""",1\r\n\r\n5" disk,2\r\nlong,1,2\r\n' + "x" * 200_000 + ",3\r\n")
    found, bad = records(f"csv:{path}", columns=("text=text", "label=label"))
    assert found == {"a.csv:2": 'one\nmore, "quoted"', "a.csv:5": '5" disk', "a.csv:7": "x" * 200_000}
    assert bad == ["a.csv:6: 3 cells, but the header has 2"]


def test_tsv_has_plain_quotes_and_maps_columns(tmp_path):
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"a\t1\nb "c"\t0\n')
    data = Data(source=(f"tsv:{path}",), columns=("text=sentence", "label=label"), holdout=0.0)
    corpus = documents.Corpus(data, split="train")
    assert [corpus.record(0, n) for n in range(2)] == [('"a', {"label": "1"}), ('b "c"', {"label": "0"})]


def test_numbers_as_columns_read_tables_without_a_header(tmp_path):
    path = write(tmp_path / "a.tsv", "ham\thello\nspam\tbuy\tnow\nham\n")
    assert records(f"tsv:{path}", columns=("text=1", "label=0")) == ({"a.tsv:1": "hello", "a.tsv:2": "buy"}, ["a.tsv:3: no column '1'"])


def array_record(path, contents):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()
    return f"array_record:{path}"


def test_array_record_holds_text_or_json(tmp_path):
    assert records(array_record(tmp_path / "t.ar", [b"one", "zwölf".encode()]))[0] == {"t.ar:1": "one", "t.ar:2": "zwölf"}
    rows = [b'{"body": "one"}', b"{broken", b'{"body": "two"}']
    found, bad = records(array_record(tmp_path / "j.ar", rows), columns=("text=body",))
    assert list(found.values()) == ["one", "two"] and len(bad) == 1 and bad[0].startswith("j.ar:2: broken JSON")


TFDS = """
import sys, numpy as np, tensorflow_datasets as tfds
class Small(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"body": tfds.features.Text(), "label": np.int64}))
    def _split_generators(self, dl_manager): return {"train": self._generate_examples("a"), "test": self._generate_examples("b")}
    def _generate_examples(self, letter):
        for n in range(5): yield n, {"body": letter * (n + 1), "label": n}
builder = Small(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
print(builder.data_path)
"""


def test_tfds_is_read_without_tensorflow(tmp_path):
    run = subprocess.run([sys.executable, "-c", TFDS, str(tmp_path)], capture_output=True, text=True, check=True)
    folder = run.stdout.strip().splitlines()[-1]
    found, bad = records(f"tfds:{folder}/test", columns=("text=body", "label=label"))
    assert sorted(found.values()) == ["b" * n for n in range(1, 6)] and not bad and "small/test:1" in found
    assert len(records(f"tfds:{folder}", columns=("text=body",))[0]) == 5
    assert "tensorflow" not in sys.modules
    with pytest.raises(ConfigError, match="no split 'dev'; it has: test, train"):
        records(f"tfds:{folder}/dev", columns=("text=body",))
    with pytest.raises(ConfigError, match="column 'text'.*it has: body, label"):
        records(f"tfds:{folder}")


def test_python_docs_are_cached_and_need_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = python_docs.documents()
    names = [name for name, _ in first]
    assert len(set(names)) == len(names) and "python_docs/topic/assert" in names and "python_docs/module/json" in names
    text = dict(first)["python_docs/module/json.decoder"]
    assert text.index("json.decoder.JSONDecodeError\n") < text.index("json.decoder.JSONDecoder\n") < text.index("json.decoder.JSONDecoder.decode\n")
    assert sum(len(text) for _, text in first) > 1_000_000 and not any(".test." in name or "idlelib" in name for name in names)
    assert len(os.listdir(tmp_path / "cache" / "ptm")) == 1
    monkeypatch.setattr(python_docs, "_extract", lambda: pytest.fail("the cache was not used"))
    assert python_docs.documents() == first
    monkeypatch.setattr(python_docs, "_extract", lambda: [("a", "b")])
    monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path / "file", "not a folder"))
    assert python_docs.documents() == [("a", "b")]


def test_fingerprint_follows_names_sizes_and_content(tmp_path):
    path = tmp_path / "a.txt"
    data = Data(source=(f"text:{path}",))
    seen = set()
    for content in ("one", "two", "two "):
        write(path, content)
        os.utime(path, ns=(len(seen), len(seen)))
        seen.add(pipeline.fingerprint(data))
        assert pipeline.fingerprint(data) in seen
    assert len(seen) == 3 and pipeline.fingerprint(Data(source=data.source, validation_source=data.source)) not in seen


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        ("corpus.txt", {}, "not of the form FORMAT:PATH"),
        ("txt:corpus.txt", {}, "unknown format of data source 'txt'.*Did you mean 'text'"),
        ("text:nowhere/*.txt", {}, "matches no file .*give an existing file"),
        ("jsonl:{0}", {"columns": ("body=text",)}, "maps no column to the field 'text'"),
        ("text:{0}", {"columns": ("text=body",)}, "column 'body', which text:.* does not have; it has: text"),
        ("csv:{0}", {"columns": ("text=bodi",)}, "column 'bodi'.*it has: body.*Did you mean 'body'"),
        ("text:{1}", {}, "holds no document"),
        ("python_docs:3.11", {}, "takes no path"),
    ],
)
def test_errors_say_what_to_do(tmp_path, spec, keys, message):
    full, empty = write(tmp_path / "a.txt", "body\ntext\n"), write(tmp_path / "empty.txt", "\n")
    with pytest.raises(ConfigError, match=message):
        loader(spec.format(full, empty), **keys)


# ---- bad records ----


def bad_sources(tmp_path):
    return {
        "text": ("text:" + write(tmp_path / "a.txt", b"good one\nfine two\nbad \xff\ngood three\n"), 1),
        "jsonl": (
            "jsonl:"
            + write(
                tmp_path / "a.jsonl",
                '{"text": "good one"}\n{"text": \n[1]\n{"body": "x"}\n{"text": " "}\n{"text": 3}\n{"text": "\\ud800"}\n'
                '{"text": "fine two"}\n{"text": "good three"}\n',
            ),
            6,
        ),
        "csv": ("csv:" + write(tmp_path / "a.csv", b"text,n\ngood one,1\nx,1,2\n\xff,3\n,4\nfine two,5\ngood three,6\n"), 3),
        "tsv": ("tsv:" + write(tmp_path / "a.tsv", b"text\tn\ngood one\t1\nx\n\xff\t3\n\t4\nfine two\t5\ngood three\t6\n"), 3),
        "array_record": (array_record(tmp_path / "a.ar", [b"good one", b"\xff", b"", b"fine two", b"good three"]), 2),
    }


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "tsv", "array_record"])
def test_bad_records_are_counted_once_named_and_skipped(tmp_path, kind):
    spec, count = bad_sources(tmp_path)[kind]
    data = loader(spec, Whole(packing="none"), batch_size=1, streams=1, shuffle=False, max_bad_records=count)
    rows = [bytes(row).decode() for batch in take(data, 9) for row in segments(batch)]
    assert rows == ["good one", "fine two", "good three"] * 3
    assert data.stats()["bad_records"] == count == len(data.bad_records())
    assert all(":" in line.split(": ")[0] and len(line.split(": ", 1)[1]) > 5 for line in data.bad_records())
    with pytest.raises(ConfigError, match=rf"more than data.max_bad_records={count - 1} .*raise data.max_bad_records"):
        take(loader(spec, Whole(packing="none"), batch_size=1, streams=1, shuffle=False, max_bad_records=count - 1), 9)


def test_nothing_usable_is_an_error_not_a_loop(tmp_path, corpus):
    bad = write(tmp_path / "bad.jsonl", "{\n" * 20)
    held = loader(f"text:{corpus}", holdout=0.0, split="validation")
    for data in (loader(f"jsonl:{bad}"), loader(f"jsonl:{bad}", shuffle=False), loader(f"jsonl:{bad}", Pairs()), held):
        with pytest.raises(ConfigError, match="no usable document"):
            next(data)
    short = write(tmp_path / "short.txt", "a\nb\n")  # too short for a causal example
    with pytest.raises(ConfigError, match="no usable document"):
        next(loader(f"text:{short}"))


def test_one_usable_record_among_many_is_found(tmp_path):
    path = write(tmp_path / "a.txt", "a\n" * 60 + "usable\n")
    batch = next(loader(f"text:{path}", batch_size=4, streams=4))
    assert {tuple(s) for s in segments(batch) if len(s) == 5} == {tuple(map(ord, "usabl"))}


# ---- splits ----


def split_texts(path, split, **keys):
    corpus = documents.Corpus(Data(source=(f"text:{path}",), **keys), split=split)
    return [found[0] for n in range(corpus.sizes[0]) if (found := corpus.record(0, n))]


def test_holdout_by_document_is_disjoint_and_outlives_reordering(tmp_path):
    lines = [f"document {n}" for n in range(400)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    train, held = (split_texts(path, split, holdout=0.2) for split in ("train", "validation"))
    assert sorted(train + held) == sorted(lines) and 40 < len(held) < 120
    backwards = write(tmp_path / "b.txt", "\n".join(["new", *reversed(lines)]))
    assert set(split_texts(backwards, "validation", holdout=0.2)) - {"new"} == set(held)
    assert set(split_texts(path, "validation", holdout=0.1)) < set(held)


def test_holdout_by_tail_cuts_every_document(tmp_path):
    path = write(tmp_path / "a.txt", "0123456789\nab\n")
    assert split_texts(path, "train", holdout=0.3, holdout_by="tail") == ["0123456", "a"]
    assert split_texts(path, "validation", holdout=0.3, holdout_by="tail") == ["789", "b"]
    big = write(tmp_path / "big.txt", "é" + "x" * 1_115_393)
    train, held = (split_texts(big, split, holdout=0.1, holdout_by="tail", document="file")[0] for split in ("train", "validation"))
    assert len(train) == 1_003_854 == int(0.9 * 1_115_394) and train + held == "é" + "x" * 1_115_393


def test_tiny_shakespeare_splits_at_nine_tenths():
    folder = os.environ.get("PTM_DATA")
    if not folder:
        pytest.skip("PTM_DATA is not set: no real data")
    data = Data(source=(f"text:{folder}/lm/tinyshakespeare/input.txt",), document="file", holdout=0.1, holdout_by="tail", packing="window")
    assert len(split_texts(data.source[0].partition(":")[2], "train", document="file", holdout=0.1, holdout_by="tail")[0]) == 1_003_854
    batches = list(pipeline.validation_batches(data, featurizer=Causal(64), tokenizer=Chars(), seed=0, batch_size=12))
    assert sum(int((batch["segments_BL"] > 0).sum()) for batch in batches) == 1_115_394 - 1_003_854 - 1


def test_validation_source_takes_the_place_of_the_holdout(tmp_path):
    train, held = write(tmp_path / "a.txt", "train one\ntrain two\n"), write(tmp_path / "b.txt", "held one\nheld two\n")
    keys = {"validation_source": (f"text:{held}",), "holdout": 0.5}
    assert split_texts(train, "train", **keys) == ["train one", "train two"]
    assert split_texts(train, "validation", **keys) == ["held one", "held two"]


def validation(spec, featurizer, *, batch_size=4, rows=None, **keys):
    return list(pipeline.validation_batches(Data(source=(spec,), **keys), featurizer=featurizer, tokenizer=Chars(), seed=0, batch_size=batch_size, rows=rows))


def test_validation_is_one_padded_pass_in_source_order(corpus):
    keys = {"validation_source": (f"text:{corpus}",)}
    batches = validation(f"text:{corpus}", Whole(), **keys)
    tokens = np.concatenate([batch["tokens_BL"][batch["segments_BL"] > 0] for batch in batches])
    np.testing.assert_array_equal(tokens, Chars().encode(pathlib.Path(corpus).read_text(encoding="utf-8").replace("\n", "")))
    assert {len(batch["tokens_BL"]) for batch in batches} == {4}
    last = batches[-1]
    assert not last["segments_BL"][-1].any() and not last["weights_BL"][last["segments_BL"] == 0].any() and last["sum_B"][-1] == 0
    halves = [validation(f"text:{corpus}", Whole(), rows=rows, **keys) for rows in ([0, 1], [2, 3])]
    assert_same(batches, [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves)])


@pytest.mark.parametrize("keys", [{"holdout": 0.0}, {"holdout": 0.0, "holdout_by": "tail"}, {"holdout": 1e-9}])
def test_an_empty_validation_split_says_what_to_change(corpus, keys):
    with pytest.raises(ConfigError, match="validation split is empty.*data.holdout_by=tail.*data.validation_source"):
        pipeline.validation_batches(Data(source=(f"text:{corpus}",), **keys), featurizer=Causal(), tokenizer=Chars(), seed=0, batch_size=4)


def test_training_texts_are_the_training_split_up_to_a_limit(corpus):
    data = Data(source=(f"text:{corpus}",), holdout=0.3)
    everything = list(documents.training_texts(data, limit_bytes=10**9))
    assert sorted(everything) == sorted(split_texts(corpus, "train", holdout=0.3))
    some = list(documents.training_texts(data, limit_bytes=301))
    assert some[:-1] == everything[: len(some) - 1] and everything[len(some) - 1].startswith(some[-1])
    assert 298 <= sum(len(text.encode()) for text in some) <= 301


# ---- packing ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 16), st.integers(1, 5), st.sampled_from(["concat", "first_fit"]))
def test_packing_loses_and_doubles_nothing(lengths, length, bins, packing):
    ends = np.cumsum(lengths)
    examples = [np.arange(end - size, end, dtype=np.int32) + 1 for end, size in zip(ends, lengths)]
    featurizer = Whole(length)
    layout = pack.Layout(featurizer)
    cursor = pack.Cursor(lambda draw: featurizer.features(Document("x", examples[draw]), rng=None, draw=None), count=len(examples))
    packer = pack.make_packer(packing, layout=layout, cursor=cursor, bins=bins)
    rows = []
    while (row := packer.next_row()) is not None:
        rows.append(row.arrays)
        assert row.used["L"] == (row.arrays["segments_BL"] > 0).sum()
    batch = pipeline.stack(rows)
    real = batch["segments_BL"] > 0
    tokens = batch["tokens_BL"][real]
    assert sorted(tokens.tolist()) == list(range(1, ends[-1] + 1))
    assert not batch["tokens_BL"][~real].any() and not batch["weights_BL"][~real].any() and not batch["positions_BL"][~real].any()
    np.testing.assert_array_equal(batch["targets_BL"][real], tokens + 1)
    if packing == "concat":
        assert tokens.tolist() == sorted(tokens.tolist()) and len(rows) == -(-int(ends[-1]) // length)
    starts = {0, *ends.tolist()}
    for row, segment, position in zip(batch["tokens_BL"], batch["segments_BL"], batch["positions_BL"]):
        numbers = segment[segment > 0]
        assert set(np.diff(numbers).tolist()) <= {0, 1} and numbers[0] == 1 and not segment[len(numbers) :].any()
        for n in range(1, numbers[-1] + 1):
            one = row[segment == n]
            np.testing.assert_array_equal(position[segment == n], np.arange(len(one)))
            np.testing.assert_array_equal(one, np.arange(one[0], one[0] + len(one)))  # a piece of one document
            assert not starts & set(range(int(one[0]), int(one[-1])))


def test_paired_rows_share_segment_numbers(corpus):
    batch = next(loader(f"text:{corpus}", Paired(), packing_bins=4))
    assert set(batch) == {"tokens_BL", "inputs_BI", "segments_BL", "positions_BL", "input_segments_BI", "input_positions_BI"}
    assert batch["tokens_BL"].shape == (8, 8) and batch["inputs_BI"].shape == (8, 16)
    assert (batch["tokens_BL"][batch["segments_BL"] == 0] == -1).all() and (batch["inputs_BI"][batch["input_segments_BI"] == 0] == -2).all()
    assert batch["segments_BL"].max() > 1
    decoded, encoded = segments(batch), segments(batch, "inputs_BI", "input_segments_BI")
    assert all(a[-1] + 1 == b[0] for a, b in zip(decoded, encoded, strict=True))


def test_single_rows_hold_values_of_the_row_and_selected_positions(corpus):
    batch = next(loader(f"text:{corpus}", Pairs()))
    assert batch["label_B"].shape == (8,) and batch["marks_BS"].shape == (8, 4) and (batch["marks_BS"][:, 2:] == -3).all()
    np.testing.assert_array_equal(batch["marks_BS"][:, :2], batch["tokens_BL"][:, :2])
    assert batch["segments_BL"].max() == 1 and (batch["tokens_BL"][batch["segments_BL"] == 0] == -1).all()


def test_first_fit_wastes_little():
    rng = np.random.default_rng(0)
    examples = [np.ones(n, np.int32) for n in rng.integers(5, 60, 3000)]
    featurizer = Whole(64)
    cursor = pack.Cursor(lambda draw: featurizer.features(Document("x", examples[draw]), rng=None, draw=None), count=3000)
    packer = pack.make_packer("first_fit", layout=pack.Layout(featurizer), cursor=cursor, bins=32)
    used = [row.used["L"] for row in iter(packer.next_row, None)]
    assert sum(used) / len(used) / 64 > 0.92


def test_packing_refuses_fields_it_cannot_pack(corpus):
    with pytest.raises(ConfigError, match="concat needs fields of the dimension L alone"):
        loader(f"text:{corpus}", Paired(), packing="concat")
    with pytest.raises(ConfigError, match="first_fit cannot share a row"):
        loader(f"text:{corpus}", Pairs(), packing="first_fit")
    too_long = Pairs(length=5)
    with pytest.raises(ValueError, match="must keep to its lengths"):
        next(loader(f"text:{corpus}", too_long))


# ---- order, streams, state ----


@pytest.mark.parametrize("case", CASES)
def test_batches_are_a_pure_function_of_the_seed(corpus, case):
    featurizer, keys = CASES[case]
    first, again, other, ahead = (
        take(loader(f"text:{corpus}", featurizer, seed=seed, prefetch=prefetch, **keys), 12) for seed, prefetch in ((1, 0), (1, 0), (2, 0), (1, 3))
    )
    assert_same(first, again)
    assert_same(first, ahead)
    assert any((a["tokens_BL"] != b["tokens_BL"]).any() for a, b in zip(first, other))
    hosts = [take(loader(f"text:{corpus}", featurizer, seed=1, rows=rows, **keys), 12) for rows in ([0, 1, 2], [3, 4], [7, 5, 6])]
    assert_same(first, [{n: np.concatenate([a[n], b[n], c[n][[1, 2, 0]]]) for n in a} for a, b, c in zip(*hosts)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_restored_state_goes_on_as_if_never_stopped(corpus, tmp_path, case, prefetch):
    featurizer, keys = CASES[case]
    keys = {"weights": (0.9, 0.1), "max_record_tokens": 900, "prefetch": prefetch, **keys}
    long = write(tmp_path / "long.txt", "".join(chr(4000 + n) for n in range(3000)))
    straight, restored = (loader((f"text:{corpus}", f"text:{long}"), featurizer, **keys) for _ in range(2))
    expected, states, stats = [], [straight.state()], [straight.stats()]
    for _ in range(14):
        expected.append(next(straight))
        states.append(json.loads(json.dumps(straight.state())))
        stats.append(straight.stats())
    for at in (0, 1, 4, 5, 9):
        restored.restore(states[at])
        assert json.loads(json.dumps(restored.state())) == json.loads(json.dumps(states[at]))
        assert restored.stats() == stats[at]
        assert_same(expected[at : at + 4], take(restored, 4))
        assert restored.stats() == stats[at + 4]
    straight.close(), restored.close()


def test_state_of_all_hosts_restores_on_another_split_of_hosts(corpus):
    whole = loader(f"text:{corpus}")
    hosts = [loader(f"text:{corpus}", rows=range(at, at + 2)) for at in range(0, 8, 2)]
    take(whole, 3), [take(host, 3) for host in hosts]
    states = {p: state for host in hosts for p, state in json.loads(json.dumps(host.state())).items()}
    assert {int(p): state for p, state in states.items()} == whole.state()
    expected = take(whole, 3)
    other = loader(f"text:{corpus}", rows=[4, 5, 6, 7])
    other.restore(states)
    assert_same([{n: batch[n][4:] for n in batch} for batch in expected], take(other, 3))
    with pytest.raises(ConfigError, match=r"lacks the logical streams \[2, 3\]"):
        other.restore({0: states["0"]})
    with pytest.raises(ConfigError, match="saved with 4 logical streams, this run has 2"):
        loader(f"text:{corpus}", streams=2).restore(states)
    with pytest.raises(ConfigError, match="saved with 4 logical streams, this run has 8; set --config.data.streams=4"):
        loader(f"text:{corpus}", streams=8).restore(states)


def test_bad_records_survive_a_restore(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "good one"}\n{\n{"text": "good two"}\n' * 3)
    first = loader(f"jsonl:{path}")
    take(first, 6)
    again = loader(f"jsonl:{path}")
    again.restore(json.loads(json.dumps(first.state())))
    assert again.bad_records() == first.bad_records() and len(first.bad_records()) == 3


@pytest.mark.parametrize("packing", ["concat", "first_fit", "window"])
@pytest.mark.parametrize("records_in_corpus", [1, 10])
def test_small_corpora_feed_64_streams(tmp_path, records_in_corpus, packing):
    text = "".join(chr(300 + n) for n in range(2000))
    size = 2000 // records_in_corpus
    path = write(tmp_path / "a.txt", "\n".join(text[at : at + size] for at in range(0, 2000, size)))
    data = loader(f"text:{path}", batch_size=64, streams=64, packing=packing, max_record_tokens=30, packing_bins=2)
    batches = take(data, 6)
    assert all((batch["segments_BL"] > 0).mean() > 0.6 for batch in batches)
    assert len({row.tobytes() for row in batches[0]["tokens_BL"]}) > 48  # streams do not read the same tokens at once


def test_streams_must_divide_the_batch(corpus):
    with pytest.raises(ConfigError, match="data.streams=3 does not divide the batch size 8"):
        loader(f"text:{corpus}", streams=3)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 2, 10, 1000, 65_536, 65_537, 70_000])
def test_every_epoch_visits_every_record_once(size, shuffle):
    order = mixture.Order((size,), weights=(1.0,), seed=3, shuffle=shuffle)
    epochs = [[order[epoch * size + n] for n in range(size)] for epoch in range(2)]
    for visit, epoch in enumerate(epochs):
        assert sorted(record for _, record, _ in epoch) == list(range(size))
        assert {(source, v) for source, _, v in epoch} == {(0, visit)}
    assert size < 10 or (epochs[0] != [(0, r, 0) for _, r, _ in epochs[1]]) == shuffle


def test_mixture_shares_are_exact_and_reach_every_stream():
    order = mixture.Order((50, 30, 7), weights=(6.0, 3.0, 1.0), seed=0, shuffle=True)
    draws = [order[n] for n in range(20_480)]
    counts = np.bincount([source for source, _, _ in draws])
    np.testing.assert_allclose(counts / len(draws), [0.6, 0.3, 0.1], atol=1e-4)
    assert len(set(draws)) == len(draws)  # (source, record, visit) comes once
    for p in range(4):
        np.testing.assert_allclose(np.bincount([source for source, _, _ in draws[p::4]]) / 5120, [0.6, 0.3, 0.1], atol=0.02)
    unweighted = mixture.Order((5, 5), weights=(1.0, 0.0), seed=0, shuffle=True)
    assert {unweighted[n][0] for n in range(2000)} == {0}


def test_an_unshuffled_mixture_keeps_the_order_of_each_source():
    order = mixture.Order((50, 30), weights=(1.0, 1.0), seed=0, shuffle=False)
    draws = [order[n] for n in range(3000)]
    for source, size in enumerate((50, 30)):
        taken = [(visit, record) for s, record, visit in draws if s == source]
        assert taken == [divmod(n, size) for n in range(len(taken))]


def test_mixtures_prefix_ids_and_tell_epochs_apart(tmp_path):
    paths = [write(tmp_path / name, text) for name, text in (("a.txt", "aaaa\naaaaa\n"), ("b.txt", "bbbb\n" * 30))]
    data = loader(tuple(f"text:{path}" for path in paths), Whole(packing="none"), weights=(3.0, 1.0), batch_size=8, streams=2)
    rows = [segment[0] for batch in take(data, 128) for segment in segments(batch)]
    assert rows.count(ord("a")) / len(rows) == 0.75
    stats = data.stats()
    assert stats["epoch"] == stats["epoch_0"] == pytest.approx(1024 * 0.75 / 2, rel=0.01) and stats["epoch_1"] == pytest.approx(1024 * 0.25 / 30, rel=0.01)
    corpus = documents.Corpus(Data(source=tuple(f"text:{path}" for path in paths)), split="train")
    assert [corpus.id(0, 1), corpus.id(1, 0)] == ["0/a.txt:2", "1/b.txt:1"]


def test_pieces_have_stable_ids_and_cover_the_document():
    document = Document("f:1", np.arange(10))
    assert documents.cut(document, size=10, mark="#") == [document]
    pieces = documents.cut(document, size=4, mark="#")
    assert [(piece.id, piece.tokens_L.tolist()) for piece in pieces] == [("f:1#0", [0, 1, 2, 3]), ("f:1#1", [4, 5, 6, 7]), ("f:1#2", [8, 9])]


@pytest.mark.parametrize(("visits", "different"), [(1, 1), (2, 2), (None, 6)])
def test_randomness_repeats_after_so_many_visits(tmp_path, visits, different):
    path = write(tmp_path / "a.txt", "abcdefgh\n")
    batches = take(loader(f"text:{path}", Causal(7, "none", visits=visits), batch_size=1, streams=1), 6)
    assert len({float(batch["weights_BL"][0, 0]) for batch in batches}) == different


def test_windows_are_uniform_fill_rows_and_reuse_tokens(tmp_path):
    path = write(tmp_path / "a.txt", "".join(chr(1000 + n) for n in range(40)))
    tokenizer = Chars()
    data = Data(source=(f"text:{path}",), holdout=0.0, packing="window", prefetch=0)
    batches = take(Loader(data, featurizer=Causal(16), tokenizer=tokenizer, seed=0, batch_size=8, streams=4), 50)
    tokens = np.concatenate([batch["tokens_BL"] for batch in batches])
    assert (np.concatenate([batch["segments_BL"] for batch in batches]) == 1).all() and (np.diff(tokens, axis=1) == 1).all()
    assert set(tokens[:, 0].tolist()) == set(range(1000, 1024)) and tokenizer.calls == 1


def test_the_cache_forgets_old_documents(corpus, monkeypatch):
    monkeypatch.setattr(documents, "CACHE_BYTES", 3 * (documents.ENTRY_BYTES + 200))
    tokenizer = Chars()
    found = documents.Corpus(Data(source=(f"text:{corpus}",), holdout=0.0), split="train", tokenizer=tokenizer)
    for record in (30, 31, 31, 30, 1, 2, 3, 4, 5, 30):
        assert len(found.document(0, record).tokens_L) == record + 3
    assert tokenizer.calls == 8


def test_errors_of_the_thread_come_out_of_next(corpus):
    class Broken(Causal):
        def features(self, doc, *, rng, draw):
            raise RuntimeError("broken objective")

    data = loader(f"text:{corpus}", Broken(), prefetch=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken objective"):
            next(data)
    data.close()


def test_stats_count_padding(tmp_path):
    path = write(tmp_path / "a.txt", "abcdefgh\n")
    data = loader(f"text:{path}", Whole(16, "none"), batch_size=2, streams=2)
    assert data.stats() == {"rows": 0, "tokens": 0, "epoch": 0.0, "padding_share": 0.0, "bad_records": 0}
    take(data, 3)
    assert data.stats() == {"rows": 6, "tokens": 48, "epoch": 6.0, "padding_share": 0.5, "bad_records": 0}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="must end in its dimensions"):
        pack.dim_of("tokens")
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        documents.Corpus(Data(), split="dev")
    with pytest.raises(ConfigError, match="unknown format of data source 'parket'.*Did you mean 'parquet'"):
        sources.open_source("parket:x", data=Data())

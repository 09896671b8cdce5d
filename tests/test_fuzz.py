"""Input that is nearly right to whatever reads what others wrote: an answer or a ConfigError, never another exception (docs/security.md has figures of long runs).

A few examples with every suite, thousands with `pytest -m faults --long -k fuzz`, and for hours with `PTM_FUZZ_MINUTES=30 pytest -m faults -k fuzz`, that many minutes for
each target. A target is a strategy and a function that reads one value of it.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports
from fuzzing import JSON, LONG, SHORT, TEXT, changed, mutated, run, targets
from hypothesis import strategies as st
from safetensors.numpy import save

from ptm import config as config_lib
from ptm import fields, log, recipe, registry, text
from ptm.config import Data
from ptm.data import files as data_files
from ptm.data.records import BadRecord
from ptm.data.sources import open_source
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.hf import files as hf_files
from ptm.models import gpt
from ptm.objectives import causal
from ptm.predict import lines as predict_lines

ROOT = Path(__file__).parent
CORPUS = ["The quick brown fox jumps over the lazy dog, 9,000 times.\n", "Naïve cafés; 中文测试。 it's <s> ▁ [MASK] fine\t\n"] * 40
SPELLED = st.sampled_from(
    [" ", "  ", "\t", "\r\n", "▁", "the", "</s>", "<pad>", "##s", "中", "é", "e\u0301", "😀", "\0", "\u2028", "\ufeff", "İ", "ﬁ", "\u200d", "``", "9,"]
)
ANY_TEXT = st.lists(SPELLED, max_size=12).map("".join) | st.text(max_size=40) | st.text(max_size=3).map(lambda part: part * 50)


class Target:
    """What is tried (`strategy`), and `check(value, folder)`, which reads it; `folder` is empty."""

    def __init__(self, strategy: st.SearchStrategy, check: Callable[[Any, Path], None]) -> None:
        self.strategy, self.check = strategy, check


def refused_or(read: Callable[[], Any]) -> Any:
    """What reading gives, or None where it was refused in words."""
    try:
        return read()
    except (ConfigError, BadRecord) as error:
        assert str(error) and len(str(error)) < 20_000
        return None


# Tokenizers.


def trained() -> dict[str, text.Tokenizer]:
    made = {"bytes": text.make("bytes", sentinels=2), "chars": text.make("chars", texts=CORPUS, specials=True)}
    made["bpe"] = text.make("bpe", texts=CORPUS, vocab_size=300)
    made["wordpiece"] = text.make("wordpiece", texts=CORPUS, vocab_size=110, lowercase=True)
    made["sentencepiece"] = text.make("sentencepiece", texts=CORPUS, vocab_size=314)
    return made | {"extended": made["bpe"].extended(["quick brown", "é", "中文"])}


TOKENIZERS = trained()
LOSSLESS = ("bytes", "bpe", "sentencepiece", "extended")


def _tokenize(string: str, _: Path) -> None:
    for name, tokenizer in TOKENIZERS.items():
        ids, starts, ends = tokenizer.encode_with_offsets(string)
        assert ids.tolist() == tokenizer.encode(string).tolist() and (ids >= 0).all() and (ids < tokenizer.vocab_size).all(), name
        assert (starts >= 0).all() and (starts <= ends).all() and (ends <= len(string)).all(), name
        assert (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all(), name
        decoded = tokenizer.decode(ids)
        if name in LOSSLESS:
            assert decoded == string and tokenizer.token_bytes[ids].sum() == len(string.encode()), name
        assert len(tokenizer.word_starts(ids)) == len(tokenizer.sentence_starts(ids)) == len(ids) == len(tokenizer.pieces(ids)), name
        assert len(tokenizer.encode_words(string.split())) == len(string.split())


def _saved(name: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        TOKENIZERS[name].save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _library() -> bytes:
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import models, normalizers, pre_tokenizers

    pipeline = Pipeline(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[CLS]": 3}, unk_token="[UNK]"))
    pipeline.normalizer, pipeline.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pipeline.add_special_tokens(["[CLS]"])
    return pipeline.to_str().encode()


def _vocabulary(kind: str, files: dict[str, bytes]) -> Callable[[Any, Path], None]:
    def check(value: tuple[str, Any], folder: Path) -> None:
        name, content = value
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        for other, data in {**files, name: content}.items():
            (folder / other).write_bytes(data)
        made = refused_or(lambda: text.make(kind, path=str(folder)) if "meta.json" not in files else text.load(str(folder)))
        if made is not None:
            refused_or(lambda: made.decode(made.encode_with_offsets("a quick ab, é")[0]))

    return check


def _of_files(files: dict[str, bytes]) -> st.SearchStrategy:
    return st.one_of(
        *(st.tuples(st.just(name), mutated(data)) for name, data in files.items()),
        *(st.tuples(st.just(name), changed(json.loads(data))) for name, data in files.items() if name.endswith(".json")),
    )


# Configs and command lines.

STORED = reports.config()
KEYS = sorted(config_lib.flatten(STORED))


def _stored(value: Any, folder: Path) -> None:
    from ptm import run as run_lib

    (folder / "config.json").write_text(json.dumps(value))
    made = refused_or(lambda: registry.resolve(run_lib.read_config(folder)))
    if made is not None:
        assert registry.resolve(config_lib.to_dict(made)) == made


def _override(value: tuple[str, str], _: Path) -> None:
    made = config_lib.base(model=gpt.Config(), objective=causal.Config(), evals={"validation": loss.Config()})
    refused_or(lambda: config_lib.override(made, *value, registry.REGISTRIES))
    refused_or(lambda: registry.resolve(made))


def _parsed(value: str, _: Path) -> None:
    for annotation in (int, float, bool, str, int | None, tuple[str, ...], tuple[float, ...], tuple[int, ...] | None):
        made = refused_or(lambda annotation=annotation: fields.parse(value, annotation, "x"))
        if made is not None and made == made and not isinstance(made, float) and (not isinstance(made, tuple) or all(item == item for item in made)):
            assert fields.parse(fields.unparse(made), annotation, "x") == made


def _words(value: str, _: Path) -> None:
    refused_or(lambda: recipe.words(value, recipes=("gpt", "bert"), objectives=("mlm", "sop"), extras=("test",)))


def _recipe(value: str, _: Path) -> None:
    refused_or(lambda: recipe.load(f"{ROOT.parent}/configs/quickstart.py:{value}"))


WORDS = st.lists(st.sampled_from(["gpt", "bert", "mlm", "sop", "tiny", "test", "t5", "", " ", ":", "=", "a,b"]) | TEXT, max_size=4).map(",".join)


# Records, compressed files.

RECORD = b'{"text": "one two", "n": [1, {"a": "b"}]}\n{"text": "\\u00e9", "label": 3}\n'
FORMATS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "text": (b"one\n\ntwo \xc3\xa9\r\nthree", ("text=text",)),
    "jsonl": (RECORD, ("text=text",)),
    "json": (b'[{"text": "one"}, {"text": "two"}]', ("text=text",)),
    "csv": (b'text,label\n"a ""b""\n c",1\nd,2\n', ("text=text",)),
    "tsv": (b"text\tlabel\na\t1\nb\t2\n", ("text=text",)),
    "conll": (b"-DOCSTART- O\n\nEU B-ORG\nsays O\n\nno O\n", ("text=text", "tags=tags")),
    "squad": (
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "a b c", "qas": [{"id": "1", "question": "q?", "answers": [{"text": "b", "answer_start": 2}]}]}]}]}).encode(),
        ("text=question", "context=context", "answers=answers"),
    ),
    "chat": (b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n', ("text=text", "target=target")),
    "multirc": (b'{"idx": 0, "passage": {"text": "p", "questions": [{"idx": 0, "question": "q", "answers": [{"text": "a", "idx": 0, "label": 1}]}]}}\n', ("text=text",)),
    "record": (b'{"idx": 0, "passage": {"text": "New York", "entities": [{"start": 0, "end": 7}]}, "qas": [{"idx": 0, "query": "in @placeholder", "answers": [{"text": "New York"}]}]}\n', ("text=text",)),
    "wsc": (b'{"text": "Tom saw him", "idx": 0, "target": {"span1_text": "Tom", "span1_index": 0, "span2_text": "him", "span2_index": 2}, "label": true}\n', ("text=text",)),
    "c3": (b'[[["line one", "line two"], [{"question": "q", "choice": ["a", "b"], "answer": "a"}], "name"]]', ("text=text",)),
    "chid": (b'{"content": ["a #idiom000001# b"], "candidates": ["x", "y"]}\n', ("text=text",)),
}  # fmt: skip


def _records(kind: str) -> Callable[[bytes, Path], None]:
    def check(content: bytes, folder: Path) -> None:
        (folder / "x").write_bytes(content)
        source = refused_or(lambda: open_source(f"{kind}:{folder}/x", data=Data(columns=FORMATS[kind][1])))
        for index in range(0 if source is None else len(source)):
            assert source.id(index)
            record = refused_or(lambda index=index: source.read(index))
            if record is not None:
                record["text"].encode()

    return check


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "one\n" * 50)
        archive.writestr("in/b.txt", "two\n")
    return made.getvalue()


COMPRESSED = {"x.gz": gzip.compress(b"one\n" * 50), "x.bz2": bz2.compress(b"one\n" * 50), "x.xz": lzma.compress(b"one\n" * 50), "x.zip": _zip()}


def _decompressed(value: tuple[str, bytes], folder: Path) -> None:
    name, content = value
    (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        refused_or(lambda: data_files.find(f"{folder}/{name}" + "/**" * name.endswith(".zip"), "text"))
    assert {path.name for path in folder.iterdir()} <= {name, "cache"}


# Models of others.

TENSORS = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)})
HEADER = json.loads(TENSORS[8 : 8 + int.from_bytes(TENSORS[:8], "little")])


def _safetensors(content: Any, folder: Path) -> None:
    if not isinstance(content, bytes):
        header = json.dumps(content).encode()
        content = struct.pack("<Q", len(header)) + header + TENSORS[-32:]
    (folder / hf_files.CONFIG).write_text("{}")
    (folder / hf_files.WEIGHTS).write_bytes(content)
    made = refused_or(lambda: hf_files.read(folder))
    for name, tensor in (made.tensors if made is not None else {}).items():
        array = refused_or(lambda name=name: made.read(name))
        assert array is None or array.shape == tensor.shape and array.nbytes <= len(content)


def _directory(value: tuple[str, Any], folder: Path) -> None:
    from ptm import hf

    name, config = value
    shutil.copy(ROOT / "data/hf" / name / hf_files.WEIGHTS, folder)
    (folder / hf_files.CONFIG).write_text(json.dumps(config))
    refused_or(lambda: hf.read(folder))


def _goldens() -> st.SearchStrategy:
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted((ROOT / "data/hf").glob("*/config.json"))}
    return st.one_of(*(st.tuples(st.just(name), changed(config)) for name, config in found.items() if (ROOT / "data/hf" / name / hf_files.WEIGHTS).is_file()))


# Workdirs and studies.

LOG = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "nan"}\n{"step": 3, "validation/loss": 1.0}\n'


def _log(content: bytes, folder: Path) -> None:
    path = str(folder / "metrics.jsonl")
    Path(path).write_bytes(content)
    rows, last = log.read(path), log.last_step(path)
    assert all(isinstance(row["step"], int) for row in rows) and (not rows or last == rows[-1]["step"])
    log.truncate(path, 2)
    assert repr([row for row in rows if row["step"] <= 2]) == repr(log.read(path))  # as text: a loss may be nan


def _asked(content: bytes, folder: Path) -> None:
    (folder / "x").write_bytes(content)
    with open(folder / "x", "rb") as file:
        for found in predict_lines.arrived(file):
            assert all((line.error is None) or not line.record for line in found)


TARGETS = {
    "text of tokenizers": Target(ANY_TEXT, _tokenize),
    **{f"vocabulary {name}": Target(_of_files(files := _saved(name)), _vocabulary(TOKENIZERS[name].kind, files)) for name in ("chars", "bpe", "wordpiece", "extended")},
    **{
        f"vocabulary published {kind}": Target(_of_files(files), _vocabulary(kind, files))
        for kind, files in {
            "bpe": {name: data for name, data in _saved("bpe").items() if name != "meta.json"}, "file": {"tokenizer.json": _library()},
            "wordpiece": {name: data for name, data in _saved("wordpiece").items() if name != "meta.json"},
            "sentencepiece": {name: data for name, data in _saved("sentencepiece").items() if name != "meta.json"},
        }.items()
    },
    "config.json": Target(changed(STORED), _stored),
    "override": Target(st.tuples(st.sampled_from(KEYS) | TEXT, TEXT | st.sampled_from(["1", "0.5", "true", "a,b", "(1,2)"])), _override),
    "value": Target(TEXT | st.text(st.sampled_from("ab,\"'(){}[] 1."), max_size=12), _parsed),
    "words": Target(WORDS, _words),
    "recipe": Target(WORDS, _recipe),
    **{f"records {kind}": Target(mutated(base), _records(kind)) for kind, (base, _) in FORMATS.items()},
    "compressed": Target(st.one_of(*(st.tuples(st.just(name), mutated(data)) for name, data in COMPRESSED.items())), _decompressed),
    "safetensors": Target(mutated(TENSORS) | changed(HEADER), _safetensors),
    "model directory": Target(_goldens(), _directory),
    "metrics.jsonl": Target(mutated(LOG) | st.lists(JSON, max_size=3).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()), _log),
    "lines to predict": Target(mutated(b'{"text": "a"}\n{"text": "b", "pair": ["c"]}\n'), _asked),
}  # fmt: skip


@contextlib.contextmanager
def empty(folder: Path) -> Iterator[Path]:
    """A folder of its own for each value."""
    made = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def attempt(target: Target, folder: Path, examples: int) -> int:
    def check(value: Any) -> None:
        with empty(folder) as made:
            target.check(value, made)

    return run(target.strategy, check, examples=examples)


@targets(TARGETS)
def test_a_few(target, tmp_path):
    assert attempt(TARGETS[target], tmp_path, SHORT) > 0


@pytest.mark.faults
@targets(TARGETS)
def test_fuzz(target, tmp_path, request, record_property):
    record_property("fault", f"security. nearly right input: {target}")  # one that fails counts as well
    tried = attempt(TARGETS[target], tmp_path, LONG if request.config.getoption("--long", default=False) else 5 * SHORT)
    record_property("tried", tried)
    print(f"{target}: {tried} examples")

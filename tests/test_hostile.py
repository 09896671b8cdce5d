"""Files that were made to do harm, for every reader: each is refused in one line (or told as a damaged record), in seconds, with little memory, and nothing is written elsewhere.

docs/security.md says what is trusted; tests/test_fuzz.py has files that are nearly right.
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reports

from ptm import cli, hf, log, text
from ptm import run as run_lib
from ptm.checkpoint import Checkpoints
from ptm.config import Data
from ptm.data import files as data_files
from ptm.data.records import BadRecord
from ptm.data.sources import open_source
from ptm.fields import ConfigError
from ptm.hf import files as hf_files
from ptm.predict import lines as predict_lines
from ptm.saved import MANIFEST
from ptm.study import attempts, folder
from ptm.text.base import fingerprint_of

GOLDEN = Path(__file__).parent / "data/hf"
DEEP = "[" * 100_000
NESTED = '{"a":' * 500 + "1" + "}" * 500  # the parser of JSON takes it; whoever walks through it would not
SECONDS, MEGABYTES = 5.0, 100


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little time, and little memory of Python and numpy."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEGABYTES << 20, f"{peak >> 20} MiB"
    assert time.process_time() - start < SECONDS


def refused(read: Callable[[], Any], *words: str) -> None:
    """A ConfigError of few lines that tells all of the words."""
    with bounded(), pytest.raises(ConfigError) as found:
        read()
    message = str(found.value)
    assert len(message) < 2000 and message.count("\n") < 5, message[:300]
    for word in words:
        assert word in message, message[:500]


# Weights.


def safetensors(header: Any, data: bytes = bytes(24)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def tensor(start: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
WEIGHTS = {
    "empty": b"", "short": b"\x08\0\0", "a header without end": struct.pack("<Q", 2**63) + bytes(8), "a header of all numbers": b"\xff" * 16,
    "a header beyond the file": struct.pack("<Q", 1000) + b"{}", "no JSON": safetensors(b"nonsense"), "not UTF-8": safetensors(b'{"\xff":1}'), "a list": safetensors([]),
    "deep": safetensors(DEEP.encode()), "nested": safetensors(NESTED.encode()), "nested shape": safetensors({"a": tensor(0, 24, [[[[[[6]]]]]])}),
    "a name twice": safetensors(b'{"a":' + A + b',"a":' + A + b"}", bytes(8)), "a key twice": safetensors(b'{"a":' + A[:-1] + b',"shape":[2]}}', bytes(8)),
    "overlap": safetensors({"a": tensor(0, 8), "b": tensor(4, 12), "c": tensor(12, 24, [3])}), "shared": safetensors({"a": tensor(0, 24, [6]), "b": tensor(0, 24, [6])}),
    "gap": safetensors({"a": tensor(0, 8), "b": tensor(16, 24)}), "beyond": safetensors({"a": tensor(0, 4000, [1000])}), "rest": safetensors({"a": tensor(0, 8)}),
    "size": safetensors({"a": tensor(0, 24, [7])}), "backwards": safetensors({"a": tensor(24, 0, [6])}), "negative shape": safetensors({"a": tensor(0, 24, [-6])}),
    "negative offset": safetensors({"a": tensor(-24, 0, [6])}), "overflow": safetensors({"a": tensor(0, 24, [2**32, 2**32])}), "wraps": safetensors({"a": tensor(0, 0, [2**62, 4])}, b""),
    "huge": safetensors({"a": tensor(0, 10**30, [10**30])}), "float": safetensors({"a": tensor(0.0, 24.0, [6])}), "type": safetensors({"a": tensor(0, 24, [6], "F99")}),
    "a word for a shape": safetensors({"a": tensor(0, 24, "6")}), "no offsets": safetensors({"a": {"dtype": "F32", "shape": [6]}}), "null": safetensors({"a": None}),
    "metadata that is no text": safetensors({"__metadata__": {"a": [1]}, "a": tensor(0, 24, [6])}),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, tmp_path):
    (tmp_path / hf_files.CONFIG).write_text("{}")
    (tmp_path / hf_files.WEIGHTS).write_bytes(WEIGHTS[name])
    refused(lambda: hf_files.read(tmp_path), "damaged or no safetensors file")


def test_weights_with_a_header_that_fills_memory(tmp_path):
    (tmp_path / hf_files.CONFIG).write_text("{}")
    with open(tmp_path / hf_files.WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 90 << 20))
        file.truncate(100 << 20)  # zeros that take no room
    refused(lambda: hf_files.read(tmp_path), "a header of 94,371,840 bytes")


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_layer", 2**40),
        ("n_embd", 2**40),
        ("n_positions", 2**62),
        ("vocab_size", 10**30),
        ("n_head", 0),
        ("n_layer", -1),
        ("n_inner", [1]),
        ("n_embd", NESTED),
    ],
)
def test_a_model_that_its_files_do_not_hold(key, value, tmp_path):
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "m")
    path = tmp_path / "m" / hf_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(lambda: hf.read(tmp_path / "m"), str(tmp_path))


# Compressed files and archives.


def archive(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as opened:
        for name, content in members:
            opened.writestr(name, content, compress_type=method)
    return made.getvalue()


def nameless() -> bytes:
    """An archive whose directory says that the name of its member is its extra field."""
    made = bytearray(archive(("a", b"x")))
    lengths = made.index(b"PK\x01\x02") + 28
    made[lengths : lengths + 4] = made[lengths + 2 : lengths + 4] + made[lengths : lengths + 2]
    return bytes(made)


def misnamed() -> bytes:
    """An archive whose member has another name where its bytes lie, one that is said to be UTF-8 and is not."""
    made = bytearray(archive(("a.txt", b"x")))
    made[7] |= 0x08
    made[30] = 0xCB
    return bytes(made)


def link() -> zipfile.ZipInfo:
    made = zipfile.ZipInfo("a.txt")
    made.create_system, made.external_attr = 3, 0o120777 << 16
    return made


ZEROS = bytes(3 << 20)
PACKED = {
    "a.gz": (gzip.compress(ZEROS), "more than 250 times larger"), "a.xz": (lzma.compress(ZEROS), "more than 250 times larger"),
    "a.zip/a.txt": (archive(("a.txt", ZEROS)), "more than 250 times larger"), "b.zip/*": (archive(*((f"{n}.txt", ZEROS[: 1 << 18]) for n in range(40))), "more than 250 times larger"),
    "c.zip/*": (archive(*((f"{n}.xz", lzma.compress(ZEROS[: 1 << 18])) for n in range(40))), "more than 250 times larger"),
    "up.zip/in/../../../x.txt": (archive(("in/../../../x.txt", b"x")), "below the archive"), "back.zip/**": (archive(("in\\..\\x.txt", b"x")), "below the archive"),
    "root.zip/**": (archive(("/x.txt", b"x")), "below the archive"), "link.zip/*": (archive((link(), b"/etc/passwd")), "is a link"),
    "bz2.zip/*": (archive(("a.txt", b"x"), method=zipfile.ZIP_BZIP2), "method 12"), "lzma.zip/*": (archive(("a.txt", b"x"), method=zipfile.ZIP_LZMA), "method 14"),
    "locked.zip/*": (archive(("a.txt", b"x" * 99)).replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0"), "cannot be decompressed"),
    "other.zip/*": (misnamed(), "cannot be decompressed"),
    "none.zip/**": (nameless(), "below the archive"), "d.zip/*": (archive(("a.txt", b"x"))[:-30], "zip archive"),
    "cut.gz": (gzip.compress(os.urandom(999))[:-20], "cannot be decompressed"), "nothing.xz": (b"", "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_archives(name, tmp_path, monkeypatch):
    """Limits are those of a smaller disk."""
    content, told = PACKED[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data_files, "ALWAYS_ALLOWED", 1 << 20)
    (tmp_path / "deep/er").mkdir(parents=True)
    file = tmp_path / "deep/er" / name.partition("/")[0]
    file.write_bytes(content)
    refused(lambda: data_files.find(f"{tmp_path}/deep/er/{name}", "text"), told)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert all(tmp_path / "cache" in path.parents for path in written) and sum(path.stat().st_size for path in written) < 8 << 20


# Records.

ROWS = {
    "jsonl": [DEEP, NESTED, '{"text": "\\ud800"}', '{"text": 1' + "0" * 5000 + "}", '{"text": null}', "\x00", '{"text": ["a"]}', '"text"'],
    "chat": [DEEP, NESTED, '{"messages": {"a": 1}}', '{"messages": [[[]]]}'],
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_records(kind, tmp_path):
    """They are told, and the others are read."""
    good = {"jsonl": '{"text": "one two"}', "chat": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one two"}]}'}[kind]
    (tmp_path / "x").write_text("\n".join([good, *ROWS[kind], good]) + "\n")
    with bounded():
        source = open_source(f"{kind}:{tmp_path}/x", data=Data(columns=("text=text",)))
        told = []
        for index in range(len(source)):
            try:
                assert len(source.read(index)["text"]) < 20
            except BadRecord as error:
                told.append(str(error))
    assert len(told) >= len(ROWS[kind]) and all(len(reason) < 6000 for reason in told) and source.read(0)["text"]


@pytest.mark.parametrize("kind", ["json", "squad", "c3"])
@pytest.mark.parametrize("content", [DEEP, NESTED, "[" + "1" * 5000 + "]", '{"data": 3}', "null", "\ufeff"])
def test_trees_of_records(kind, content, tmp_path):
    (tmp_path / "x").write_text(content)
    refused(lambda: open_source(f"{kind}:{tmp_path}/x", data=Data(columns=("text=text",))), str(tmp_path / "x"))


def test_a_line_to_predict(tmp_path):
    (tmp_path / "x").write_text("\n".join([DEEP, NESTED, '{"text": "\\udfff"}', '{"text": NaN}', '{"text": "a"}']))
    with bounded(), open(tmp_path / "x", "rb") as file:
        found = [line for part in predict_lines.arrived(file) for line in part]
    assert [line.error is None for line in found] == [False] * 4 + [True]


# Tokenizers.


def saved(folder: Path) -> dict[str, Any]:
    text.make("bytes", sentinels=1).save(str(folder))
    return json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"lowercase": False, "sentinels": 10**9}}, {"options": {"lowercase": False, "sentinels": -1}}, {"options": {"lowercase": 1, "sentinels": 1}}, {"kind": ["bytes"]},
        {"options": {"lowercase": False, "sentinels": 1, "files": {}}}, {"hashes": 3}, {"kind": "../bytes"}, {"kind": "__class__"}, {"hashes": {"../../etc/passwd": ""}, "kind": "bpe"},
        {"options": None}, {"format": {}},
    ],
)  # fmt: skip
def test_a_saved_tokenizer(change, tmp_path):
    meta = saved(tmp_path) | change
    with contextlib.suppress(TypeError):
        meta["fingerprint"] = fingerprint_of(kind=meta["kind"], options=meta["options"], hashes=meta["hashes"])
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    refused(lambda: text.load(str(tmp_path)))


LIBRARY = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
VOCABULARIES = {
    "deep": ("bpe", {"vocab.json": DEEP, "merges.txt": ""}), "nested": ("bpe", {"vocab.json": NESTED, "merges.txt": ""}), "texts for ids": ("bpe", {"vocab.json": '{"a": "0"}', "merges.txt": ""}),
    "a long number": ("bpe", {"vocab.json": '{"a": ' + "1" * 5000 + "}", "merges.txt": ""}), "half a pair": ("chars", {"chars.json": '["\\ud800"]'}), "objects": ("chars", {"chars.json": '[{"a": 1}]'}),
    "a sparse id": ("file", {"tokenizer.json": json.dumps(LIBRARY | {"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}})}),
    "an unknown piece that is none": ("file", {"tokenizer.json": json.dumps(LIBRARY | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}})}),
    "no pieces": ("file", {"tokenizer.json": json.dumps(LIBRARY | {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}})}), "deep pipeline": ("file", {"tokenizer.json": DEEP}),
    "empty model": ("sentencepiece", {"spiece.model": ""}), "no protobuf": ("sentencepiece", {"spiece.model": "\x0a\x7f" * 50}),
}  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(name, tmp_path):
    kind, files = VOCABULARIES[name]
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    refused(lambda: text.make(kind, path=str(tmp_path)))


def test_a_text_that_a_vocabulary_cannot_encode(tmp_path):
    pieces = {"type": "Unigram", "unk_id": None, "vocab": [["▁a", -1.0], ["a", -1.5], ["b", -2.0]], "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(LIBRARY | {"model": pieces}))
    made = text.make("file", path=str(tmp_path))
    assert made.decode(made.encode("ab")) == "ab"
    for encode in (made.encode, made.encode_with_offsets):
        refused(lambda encode=encode: encode("zebra"), "cannot encode 'zebra'")


def test_a_piece_that_is_nothing_once_normalised(tmp_path):
    made = text.make("wordpiece", texts=["a few plain words of lower case"] * 9, vocab_size=40, lowercase=True)
    refused(lambda: made.extended(["\u0301"]), "nothing once it is normalised")


# Workdirs, checkpoints, studies.


@pytest.mark.parametrize(
    "content", [DEEP, NESTED, "[]", "3", "\xff", '{"model": []}', '{"model": {"name": "gpt", "a.b": 1}, "objective": {"name": "causal"}}', "1" * 5000]
)
def test_config_of_a_workdir(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    refused(lambda: run_lib.read_config(tmp_path), str(tmp_path))
    assert cli.main(["report", str(tmp_path)]) == 2 and capsys.readouterr().err.startswith("ptm: ")


@pytest.mark.parametrize(
    "name", ["config.json", "env.json", "metrics.jsonl", "timing.jsonl", "run.json", "run.lock", "predictions/validation-100.jsonl", "params.txt"]
)
def test_files_of_a_workdir(name, tmp_path):
    workdir = reports.workdir(tmp_path / "w", finals={"validation/loss": 1.0}, curve=[(10, 4.0), (100, 1.0)], answers=[{"id": "a", "text": "b"}])
    for content in (
        DEEP,
        NESTED,
        f'{{"step": {NESTED}}}\n',
        '{"step": 1' + "0" * 4000 + "}\n",
        '{"step": 3, "loss": "\\ud800"}\n',
        "\x1b[2J" * 100,
        '{"attempts": [{}]}',
        '{"attempts": [3]}',
    ):
        (workdir / name).write_text(content + "\n")
        with bounded(), contextlib.suppress(ConfigError):
            cli.main(["report", str(workdir), f"--output={tmp_path}/out"])
        with bounded(), contextlib.suppress(ConfigError):
            log.last_step(str(workdir / "metrics.jsonl"))
            attempts.read(workdir)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made, run: {"runs": {"../../x": made["runs"][run]}}, "../../x"), (lambda made, run: {"runs": {"/etc": made["runs"][run]}}, "/etc"),
        (lambda made, run: {"runs": {**made["runs"], "a\0b": made["runs"][run]}}, "a\\x00b"), (lambda made, run: {"runs": {run: made["runs"][run] | {"needs": "../x"}}}, "../x"),
        (lambda made, run: {"arms": [{**made["arms"][0], "runs": {"0": {"pretrain": "../../x"}}}]}, "../../x"), (lambda made, run: {"runs": []}, "damaged"),
        (lambda made, run: {"search": {"asked": 3}}, "damaged"), (lambda made, run: {"halving": 3}, "damaged"),
    ],
)  # fmt: skip
def test_a_study(change, told, tmp_path):
    root = reports.study(tmp_path / "s", values={"one": [{"validation/loss": 1.0}]})
    made = json.loads((root / "study.json").read_text())
    (root / "study.json").write_text(json.dumps(made | change(made, next(iter(made["runs"])))))
    refused(lambda: folder.read(root), str(root), told)


@pytest.mark.parametrize("content", [DEEP, NESTED, '{"a": 1}', '[{"step": []}]'])
def test_files_of_a_study(content, tmp_path):
    root = reports.study(
        tmp_path / "s", values={"one": [{"validation/loss": 1.0}]}, halving={"metric": "pretrain:validation/loss", "rungs": [20], "keep": 0.5}, rungs=[]
    )
    (root / "halving.json").write_text(content)
    refused(lambda: folder.rungs(root), "halving.json")
    (root / "study.json").write_text(content)
    refused(lambda: folder.read(root), "study.json")


def test_a_manifest_stays_in_its_step(tmp_path):
    """It names files to be hashed: only those of its own step, links included, and none that never ends."""
    step = tmp_path / "5"
    (step / "state").mkdir(parents=True)
    (step / "state/link").symlink_to("/etc/passwd")
    (step / "state/endless").symlink_to("/dev/zero")
    for name in ("../../x", "/etc/passwd", "state/link", "state/endless", "state/../../../x", "a\0b"):
        (step / MANIFEST).write_text(json.dumps({"files": {name: {"size": os.path.getsize("/etc/passwd"), "sha256": ""}}}))
        with bounded():
            assert "not in the folder" in Checkpoints.reader(tmp_path).valid(5), name
    for content in (DEEP, NESTED, '{"files": [1]}', '{"files": {"a": 3}}', "1" * 5000):
        (step / MANIFEST).write_text(content)
        assert Checkpoints.reader(tmp_path).valid(5) == f"{MANIFEST} is damaged"

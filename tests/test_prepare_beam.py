"""`ptm prepare` by Apache Beam: the files are those of the path on one machine, byte for byte, whatever the runner."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import planted
import pytest

from ptm import cli
from ptm.config import Data
from ptm.data import sources
from ptm.fields import ConfigError, StorageError
from ptm.prepare import contamination, dataset, local, sketch, stages
from ptm.prepare import options as options_lib
from ptm.prepare.stages import Key

try:
    import apache_beam
except ImportError:
    apache_beam = None
else:
    from ptm.prepare import beam, builder

RUNNERS = {
    "in memory": ["--runner=DirectRunner"],
    "processes": ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    "portable": ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
}
SMALL = {"shard_bytes": "9000", "validation": "0.2"}


def needs_beam(test):
    return pytest.mark.beam(pytest.mark.skipif(apache_beam is None, reason="needs apache-beam: pip install 'ptm[beam]'")(test))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return planted.plant(tmp_path_factory.mktemp("planted"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compare(corpus, folder: Path, runner: str, given: dict[str, str]) -> dict[str, int]:
    """Holds every file of one path against the other's; the counts."""
    one, other = (corpus.options(folder / name, **{**SMALL, **given}) for name in ("local", "beam"))
    found = local.prepare(one, processes=1)
    assert builder.prepare(other, RUNNERS[runner]) == found
    assert content(local.target(one)) == content(local.target(other))
    assert os.listdir(folder / "beam") == ["corpus"] and os.listdir(folder / "beam" / "corpus") == ["1.0.0"], "nothing is left of the work"
    assert "tensorflow" not in sys.modules
    return found["counts"]


@needs_beam
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"near_threshold": "0.3", "near_rows": "1", "near_ngram": "1", "seed": "3"},
        {"tokenizer": "bytes", "exact": "false"},
        {"exact": "false", "near": "false", "evals": "", "shard_bytes": "500", "keep_ids": "false", "validation": "0"},
    ],
    ids=["defaults", "wide bands", "tokens", "no duplicates"],
)
def test_files_are_those_of_one_machine(corpus, tmp_path, given):
    compare(corpus, tmp_path, "in memory", given)


@needs_beam
@pytest.mark.parametrize("runner", ["processes", "portable"])
def test_on_other_runners(corpus, tmp_path, runner):
    compare(corpus, tmp_path, runner, {})


@needs_beam
def test_what_was_planted_is_found(corpus, tmp_path):
    options = corpus.options(tmp_path, **SMALL)
    found = builder.prepare(options, [])
    kept = set()
    for split in stages.SPLITS:
        spec = f"tfds:{local.target(options)}/{split}"
        source = sources.open_source(spec, data=Data(source=(spec,)))
        kept |= {source.raw(index)["id"].decode() for index in range(len(source))}
    assert kept == corpus.ids["original"] | corpus.ids["decoy"]
    assert [id for id, _ in found["bad"]] == sorted(corpus.ids["broken"], key=lambda id: int(id.rpartition(":")[2]))
    for rule, kind in (("bad", "broken"), ("exact", "exact"), ("near", "near"), ("contaminated:exam", "contaminated")):
        assert found["counts"][f"removed/{rule}"] == len(corpus.ids[kind])


@needs_beam
def test_a_finished_shard_is_not_made_again(corpus, tmp_path, monkeypatch):
    options = corpus.options(tmp_path, **SMALL)
    made, write = [], dataset.write_shard

    def fails(path, records):
        if len(made) == 2:
            raise OSError("no space")
        made.append(path.name)
        return write(path, records)

    monkeypatch.setattr(dataset, "write_shard", fails)
    with pytest.raises(StorageError, match="no space.*start the same command again"):
        builder.prepare(options, [])
    assert not local.target(options).exists()
    before = set(made)
    made.clear()
    monkeypatch.setattr(dataset, "write_shard", lambda path, records: made.append(path.name) or write(path, records))
    with pytest.raises(ConfigError, match="--seed: 0 -> 1"):
        builder.prepare(corpus.options(tmp_path, **SMALL, seed="1"), [])
    found = builder.prepare(options, [])
    assert not before & set(made) and before | set(made) == set(found["shards"]) and len(before) == 2 < len(found["shards"])
    monkeypatch.setattr(dataset, "write_shard", write)
    other = corpus.options(tmp_path / "local", **SMALL)
    local.prepare(other, processes=1)
    assert content(local.target(options)) == content(local.target(other))

    stamp = os.stat(local.target(options)).st_mtime_ns
    assert builder.prepare(options, []) == found and os.stat(local.target(options)).st_mtime_ns == stamp, "what is finished is only checked"
    with pytest.raises(ConfigError, match="--seed: 0 -> 1"):
        builder.prepare(corpus.options(tmp_path, **SMALL, seed="1"), [])
    shard = local.target(options) / next(iter(found["shards"]))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="missing or damaged"):
        builder.prepare(options, [])


@needs_beam
def test_killed_and_started_again(tmp_path):
    """With kill -9, twice: what was finished keeps its inode, and nothing is left of the processes that were killed."""
    corpus = planted.plant(tmp_path, originals=400)
    given = {**SMALL, "shard_bytes": "2000"}
    options, other = corpus.options(tmp_path / "out", **given), corpus.options(tmp_path / "local", **given)
    flags = [f"--source={corpus.source}", f"--evals={corpus.evals}", "--eval_columns=text={question} {answer}", f"--output={tmp_path}/out"]
    notes, finished = tmp_path / "out/corpus/.1.0.0.beam" / "notes", {}
    for least in (1, 20):
        command = [sys.executable, "-m", "ptm.cli", "prepare", *flags, *(f"--{key}={value}" for key, value in given.items()), "--"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(notes.glob("*.json"))) < least:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        now = {note.name[:-5]: os.stat(notes.parent / "shards" / note.name[:-5]).st_ino for note in notes.glob("*.json")}
        assert len(now) >= least and now.items() >= finished.items()
        finished = now
    found = builder.prepare(options, [])
    assert len(found["shards"]) > len(finished) >= 20
    assert finished.items() <= {path.name: os.stat(path).st_ino for path in local.target(options).iterdir()}.items()
    local.prepare(other, processes=1)
    assert content(local.target(options)) == content(local.target(other)) and os.listdir(tmp_path / "out/corpus") == ["1.0.0"]


@needs_beam
@pytest.mark.parametrize(("most", "runner"), [(4, "in memory"), (0, "in memory"), (0, "portable")])
def test_too_many_bad_records_are_told(corpus, tmp_path, most, runner):
    with pytest.raises(ConfigError, match=f"^more than --max_bad_records={most} records cannot be read: 0/c.jsonl:.*raise --max_bad_records.$"):
        builder.prepare(corpus.options(tmp_path, max_bad_records=str(most)), RUNNERS[runner])


@needs_beam
def test_nothing_left_is_told(corpus, tmp_path):
    with pytest.raises(ConfigError, match="no document is left"):
        builder.prepare(corpus.options(tmp_path, min_characters="100000"), [])


@needs_beam
def test_into_a_store(corpus, tmp_path, monkeypatch):
    """From a store and into one: files are put there whole, and no lock is asked for."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        protocol = "s3"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "s3", Store)
    for path in corpus.folder.iterdir():
        Store().pipe(f"s3://bucket/texts/{path.name}", path.read_bytes())
    of_store = {"source": corpus.source.replace(str(corpus.folder), "s3://bucket/texts")}
    options, other = corpus.options("s3://bucket/made", **SMALL, **of_store), corpus.options(tmp_path, **SMALL)
    found, wanted = builder.prepare(options, []), local.prepare(other, processes=1)
    assert found == builder.prepare(options, []), "what is finished is found"
    assert (found["shards"], found["counts"], found["bad"]) == (wanted["shards"], wanted["counts"], wanted["bad"])
    made = {path: entry.getvalue() for path, entry in Store.store.items() if "/texts/" not in path}
    assert all(path.startswith("/bucket/made/corpus/1.0.0/") for path in made)
    assert {Path(path).name: entry for path, entry in made.items() if "array_record" in path or "features" in path or "info" in path} == {
        name: entry for name, entry in content(local.target(other)).items() if "manifest" not in name and "card" not in name
    }


@needs_beam
def test_the_command_passes_flags_on(corpus, tmp_path):
    """In a process of its own, in which TensorFlow would be seen."""
    code = "import sys; from ptm import cli; code = cli.main(sys.argv[1:]); assert 'tensorflow' not in sys.modules; sys.exit(code)"
    flags = [f"--source={corpus.source}", f"--output={tmp_path}", "--validation=0"]
    done = subprocess.run([sys.executable, "-c", code, "prepare", *flags, "--", *RUNNERS["in memory"]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["folder"] == str(tmp_path / "corpus" / "1.0.0") and told["counts"]["removed/exact"] == len(corpus.ids["exact"])


@needs_beam
def test_keys_are_ordered_as_bytes():
    keys = [Key(source, file, place) for source in (0, 1, 300) for file in (0, 255, 256, 70000) for place in (1, 255, 256, 1 << 40)]
    assert [beam.pack(key) for key in keys] == sorted(map(beam.pack, reversed(keys)))


@needs_beam
def test_a_set_is_named_by_its_members():
    keys = [bytes([number]) * 16 for number in range(5)]
    names = [{name for _, name in beam.members((b"", order))} for order in (keys, keys[::-1], keys[1:], keys[:1])]
    assert names[0] == names[1] != names[2] and len(names[0]) == len(names[2]) == 1 and not names[3]
    assert [key for key, _ in beam.members((b"", keys))] == keys


@needs_beam
def test_a_large_set_lies_in_a_file(monkeypatch):
    rng = np.random.default_rng(0)
    options = options_lib.parse({"source": "text:none", "output": "none", "near_threshold": "0.6"})[0]
    sets = {bytes([number]) * 16: np.unique(rng.integers(0, 40, 30)).astype(np.uint64) for number in range(40)}
    group = (b"", [(key, found.astype("<u8").tobytes()) for key, found in reversed(sets.items())])
    wanted = sketch.duplicates(sorted(sets), sets.__getitem__, threshold=0.6)
    assert 0 < len(wanted) < 39
    for spooled in (1 << 20, 1):
        monkeypatch.setattr(beam, "SPOOLED", spooled)
        assert [key for key, _ in beam.similar(group, options)] == wanted


@needs_beam
def test_the_index_reaches_workers_whole(tmp_path):
    assert beam.load_index(str(tmp_path)) is None
    index = contamination.build({"a": ["one two three four five", "short"], "ü": ["six seven eight nine"]}, ngram=3)
    beam.save_index(index, str(tmp_path))
    found = beam.load_index(str(tmp_path))
    assert (found.names, found.ngram) == (index.names, index.ngram)
    for text in ("zero one two three four", "six seven eight", "one three five"):
        assert found.found(text, 0.3) == index.found(text, 0.3)


def test_without_beam_the_extra_is_named(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name in ("ptm.prepare.builder", "ptm.prepare.beam")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("ptm.prepare.builder", raising=False)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    (tmp_path / "a.txt").write_text("text\n")
    assert cli.main(["prepare", f"--source=text:{tmp_path}/a.txt", f"--output={tmp_path}/out", "--", "--runner=FlinkRunner"]) == 2
    assert "pip install 'ptm[beam]'" in capsys.readouterr().err
    assert cli.main(["prepare", f"--source=text:{tmp_path}/a.txt", f"--output={tmp_path}/out", "--processes=2", "--"]) == 2
    assert "--direct_num_workers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

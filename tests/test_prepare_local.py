"""`ptm prepare` on one machine: the records of the path in memory, whatever the processes, the sizes of parts and the moments at which it is killed."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import planted
import pytest
from ledger import tell

from ptm import cli
from ptm.config import Data
from ptm.data import documents, sources
from ptm.fields import ConfigError
from ptm.prepare import dataset, local, manifest, parts, reading, stages, trial
from ptm.prepare import options as options_lib
from ptm.prepare.pool import Progress


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return planted.plant(tmp_path_factory.mktemp("planted"))


SMALL = {"shard_bytes": "9000", "validation": "0.2"}


@pytest.fixture
def in_pieces(monkeypatch):
    """Sizes under which the small corpus has many batches, parts and ranges."""
    monkeypatch.setattr(parts, "PART_ROWS", 9)
    monkeypatch.setattr(local, "RANGE_ROWS", 13)
    monkeypatch.setattr(local, "BATCH_BYTES", 5000)
    monkeypatch.setattr(reading.cut, "__kwdefaults__", {"size": 9000})


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(folder: Path) -> dict[str, list[dict]]:
    """What `data.source=tfds:FOLDER/SPLIT` reads, by split."""
    found = {}
    for split in ("train", "validation"):
        spec = f"tfds:{folder}/{split}"
        source = sources.open_source(spec, data=Data(source=(spec,)))
        found[split] = [{key: value.decode() if isinstance(value, bytes) else value for key, value in source.raw(n).items()} for n in range(len(source))]
    return found


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    options = corpus.options(tmp_path_factory.mktemp("whole"), **SMALL)
    return options, local.prepare(options, processes=1)


def test_it_is_the_path_in_memory(whole):
    options, found = whole
    wanted, counts = trial.prepare(trial.documents(options), options, trial.index(options))
    assert found["counts"] == counts
    read = records(local.target(options))
    for split in stages.SPLITS:
        ordered = [record for _, name, record in wanted if name == split]
        count = stages.shards(sum(len(record["text"].encode()) for record in ordered), options)
        assert count > 1
        assert read[split] == [record for number in range(count) for record in ordered if stages.shard(record["id"], count) == number]


def test_sizes_of_parts_change_nothing(whole, corpus, tmp_path, in_pieces):
    local.prepare(corpus.options(tmp_path, **SMALL), processes=1)
    assert contents(tmp_path) == contents(Path(whole[0].output))


def test_parts_keep_their_order_whatever_their_number(corpus, tmp_path, monkeypatch):
    """A compressed file is one unit, and may have more parts than four digits count."""
    monkeypatch.setattr(parts, "PART_ROWS", 1)
    with parts.Writer(tmp_path, corpus.options(tmp_path)) as writer:
        writer._count = 9_998
        writer._start()
        for number in range(4):
            writer.add(f"{number}", f"text {number}")
    stems = sorted(path.with_suffix("") for path in tmp_path.glob("*.text") if path.stat().st_size)
    assert [parts.Part(stem).id(0) for stem in stems] == ["0", "1", "2", "3"]


def test_several_processes_change_nothing(whole, corpus, tmp_path):
    local.prepare(corpus.options(tmp_path, **SMALL), processes=2)
    assert contents(tmp_path) == contents(Path(whole[0].output))
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == ["1.0.0"], "nothing is left beside it"


def test_families_of_documents(tmp_path, in_pieces):
    """Many that are nearly the same, and more that share a band and are not: whatever one band has found, the others find what is left."""
    made, rng = planted.Words(7), random.Random(7)
    texts = []
    for _ in range(25):
        family = [made.text(60)]
        for _ in range(7):
            family.append(made.changed(rng.choice(family), rng.choice([0.02, 0.05, 0.1, 0.3])))
        texts += family
    rng.shuffle(texts)
    (tmp_path / "x.txt").write_text("\n".join(texts))
    given = {"source": f"text:{tmp_path}/x.txt", "near_rows": "2", "near_bands": "12", "near_threshold": "0.7", "validation": "0"}
    options = options_lib.parse({**given, "output": str(tmp_path / "out")})[0]
    wanted, counts = trial.prepare(trial.documents(options), options, None)
    assert local.prepare(options, processes=1)["counts"] == counts
    spec = f"tfds:{local.target(options)}"
    source = sources.open_source(spec, data=Data(source=(spec,)))
    assert [source.raw(n)["id"].decode() for n in range(len(source))] == [record["id"] for _, _, record in wanted]
    assert 50 < counts["removed/near"] < 150


def test_what_is_written(whole):
    options, found = whole
    folder = local.target(options)
    assert manifest.read(folder) == json.loads(json.dumps(found))
    assert {"manifest.json", "card.md", "card.html", "features.json", "dataset_info.json", *found["shards"]} == {path.name for path in folder.iterdir()}
    assert all(dataset.sha256(folder / name) == shard["sha256"] for name, shard in found["shards"].items())
    card = (folder / "card.md").read_text()
    assert "corpus 1.0.0" in card and "contaminated:exam" in card and "| near |" in card and "c.jsonl" in card
    assert found["evals"] == {"exam": {"too_short": 0}} and len(found["bad"]) == 5


def test_records_with_token_ids(corpus, tmp_path, monkeypatch):
    options = corpus.options(tmp_path, tokenizer="bytes", keep_ids="false", validation="0.2")
    found = local.prepare(options, processes=1)
    vocabulary = stages.tokenizer("bytes")
    assert found["tokenizer"] == vocabulary.fingerprint
    for record in (record for split in records(local.target(options)).values() for record in split):
        assert [*record] == ["text", "tokens"] and record["tokens"].dtype == np.uint16
        assert record["tokens"].tolist() == vocabulary.encode(record["text"]).tolist()
    assert found["counts"]["train/tokens"] == found["counts"]["train/bytes"]

    # What a run reads is what it would have made of the texts.
    folder = local.target(options)
    columns = {"columns": ("text=text", "tokens=tokens")}
    data = Data(source=(f"tfds:{folder}",), validation_source=(f"tfds:{folder}/validation",))
    for split in stages.SPLITS:
        plain, held = (documents.Corpus(dataclasses.replace(data, **given), split=split, tokenizer=vocabulary) for given in ({}, columns))
        for number in range(plain.sizes[0]):
            one, other = plain.document(0, number), held.document(0, number)
            assert one.id == other.id and one.tokens_L.dtype == other.tokens_L.dtype and one.tokens_L.tolist() == other.tokens_L.tolist()
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="made by another one"):
        patch.setattr(vocabulary, "fingerprint", "another")
        documents.Corpus(dataclasses.replace(data, **columns), split="train", tokenizer=vocabulary)
    with pytest.raises(ConfigError, match="holdout_by=tail"):
        documents.Corpus(Data(source=data.source, holdout_by="tail", **columns), split="train", tokenizer=vocabulary)


# Cut and continued.


class Cut(BaseException):
    """The moment at which a process is lost."""


def test_cut_off_at_many_moments(whole, corpus, tmp_path, in_pieces, monkeypatch):
    """Before a file or folder gets its name, or after it, the process is lost; the next one goes on."""
    options, left, rng, starts = corpus.options(tmp_path, **SMALL), [0], random.Random(0), 0

    def counted(real, *given):
        left[0] -= 1
        if left[0] or starts % 2 and not str(given[1]).endswith("/1.0.0"):
            real(*given)
        if not left[0]:
            raise Cut

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, functools.partial(counted, getattr(os, name)))
        while not local.target(options).exists():
            starts += 1
            left[0] = rng.randint(1, 24)
            assert starts < 100
            with contextlib.suppress(Cut):
                local.prepare(options, processes=1)
    assert starts > 10
    assert contents(tmp_path) == contents(Path(whole[0].output))


def test_what_is_finished_is_not_made_again(whole, corpus, tmp_path, in_pieces, monkeypatch):
    options = corpus.options(tmp_path, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "describe", lambda *given: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            local.prepare(options, processes=1)
    for name in ("_cut", "_read", "_exact", "_sketch", "_near", "_write"):
        monkeypatch.setattr(local, name, None)
    local.prepare(options, processes=1)
    assert contents(tmp_path) == contents(Path(whole[0].output))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("given", "message"),
    [({"min_characters": "60"}, "--min_characters: 50 -> 60"), ({"near_threshold": "0.7"}, "--near_threshold: 0.8 -> 0.7"), ({"evals": ""}, "--evals: exam")],
)
def test_a_changed_option_is_refused(whole, corpus, tmp_path, monkeypatch, finished, given, message):
    output = Path(whole[0].output)
    if not finished:
        output = tmp_path
        monkeypatch.setattr(local, "_read_all", lambda *given: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            local.prepare(corpus.options(output, **SMALL), processes=1)
    with pytest.raises(ConfigError) as error:
        local.prepare(corpus.options(output, **SMALL | given), processes=1)
    assert message in str(error.value) and "--version" in str(error.value)


def test_a_changed_source_is_refused_and_another_version_made(tmp_path):
    corpus = planted.plant(tmp_path, originals=30)
    options = corpus.options(tmp_path / "out")
    local.prepare(options, processes=1)
    with open(tmp_path / "more.txt", "a", encoding="utf-8") as file:
        file.write(f"\n{planted.Words(9).text()}\n")
    with pytest.raises(ConfigError, match=r"the files of text:.*more.txt have changed"):
        local.prepare(options, processes=1)
    after = local.prepare(corpus.options(tmp_path / "out", version="1.0.1"), processes=1)
    assert after["counts"]["read/documents"] == manifest.read(local.target(options))["counts"]["read/documents"] + 1


def test_a_finished_one_is_checked(whole, tmp_path):
    options, found = whole
    assert local.prepare(options, processes=1) == json.loads(json.dumps(found))
    path = local.target(options) / next(iter(found["shards"]))
    content = path.read_bytes()
    try:
        for damaged in (content[:-1], content[:100] + bytes([content[100] ^ 1]) + content[101:]):
            path.write_bytes(damaged)
            with pytest.raises(ConfigError, match="missing or damaged"):
                local.prepare(options, processes=1)
            sources._opened.cache_clear()
            with pytest.raises(ConfigError, match="is not the shard that manifest.json tells of"):
                records(local.target(options))
    finally:
        path.write_bytes(content)


def test_too_many_bad_records(corpus, tmp_path, in_pieces):
    with pytest.raises(ConfigError) as error:
        local.prepare(corpus.options(tmp_path, max_bad_records="4"), processes=1)
    message = str(error.value)
    assert "--max_bad_records=4" in message and message.count("0/c.jsonl:") == 5 and "no column 'text'" in message
    assert local.prepare(corpus.options(tmp_path, max_bad_records="5"), processes=1)["counts"]["removed/bad"] == 5, "and goes on with a higher limit"


def test_nothing_is_left(tmp_path):
    (tmp_path / "x.txt").write_text("short\n")
    with pytest.raises(ConfigError, match="no document is left"):
        local.prepare(options_lib.parse({"source": f"text:{tmp_path}/x.txt", "output": str(tmp_path)})[0], processes=1)


def test_a_signal_whose_exception_is_lost_is_heard_between_tasks(corpus, tmp_path, monkeypatch, capsys):
    real = local._read

    def read(*given):
        with contextlib.suppress(KeyboardInterrupt):  # as where an object is finalised
            signal.raise_signal(signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(local, "_read", read)
    assert cli.main(command(corpus, tmp_path, "--processes=1")) == 75
    assert "start the same command again" in capsys.readouterr().err
    monkeypatch.setattr(local, "_read", real)
    assert cli.main(command(corpus, tmp_path, "--processes=1")) == 0


def test_progress_is_a_line_of_a_terminal_and_nothing_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((io.StringIO(), ""), (Terminal(), "\rreading   [##########..........] 2/4\x1b[K\r\x1b[K")):
        progress = Progress(stream=stream, clock=lambda: 9.0)
        progress.show("reading", 2, 4)
        progress.show("reading", 3, 4)  # too soon
        progress.close()
        assert stream.getvalue() == shown


# The command line.


def command(corpus: planted.Planted, output: Path, *more: str) -> list[str]:
    given = ["--source", corpus.source, "--output", str(output), "--evals", corpus.evals, "--eval_columns", "text={question} {answer}"]
    return ["prepare", *(f"{key}={value}" for key, value in zip(given[::2], given[1::2])), *(f"--{key}={value}" for key, value in SMALL.items()), *more]


def test_the_command(whole, corpus, tmp_path, capsys):
    assert cli.main(command(corpus, tmp_path, "--dry_run=1000")) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]
    assert counts == whole[1]["counts"] and not list(tmp_path.iterdir())
    assert cli.main(command(corpus, tmp_path, "--processes=1")) == 0
    page = capsys.readouterr().out
    assert json.loads(page.splitlines()[-1]) == {"folder": str(tmp_path / "corpus/1.0.0"), "counts": counts} and "exact" in page
    assert contents(tmp_path) == contents(Path(whole[0].output))
    for wrong, message in (
        ("--processes=0", "1 or more"),
        ("--procesess=2", "--processes=2"),
        ("--near=perhaps", "true or false"),
        ("--name=..", "--name='..'"),
    ):
        assert cli.main(command(corpus, tmp_path, wrong)) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["prepare", "--output=x"]) == 2 and "--source=FORMAT:PATH" in capsys.readouterr().err


def test_a_missing_library_says_what_to_install(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert cli.main(command(corpus, tmp_path)) == 2
    assert "pip install 'ptm[prepare]'" in capsys.readouterr().err


def test_markup_in_names_stays_text(tmp_path):
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    (folder / "a.txt").write_bytes(planted.Words(0).text().encode() + b"\n\x1b[31m bad \xff\n")
    options = options_lib.parse({"source": f"text:{folder}/a.txt", "output": str(tmp_path)})[0]
    local.prepare(options, processes=1)
    page = (local.target(options) / "card.html").read_text()
    assert "<script>alert" not in page and "\\u003cscript>alert" in page
    assert r"\<script\>alert" in (local.target(options) / "card.md").read_text()


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "ptm.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.faults
def test_killed_at_random_moments(tmp_path, long, record_property):
    """With kill -9, the processes that it started included or left behind, and finished by another number of processes."""
    kills = 20 if long else 4
    tell(record_property, "1. SIGKILL at random moments: preparation of a corpus", tried=kills)
    corpus = planted.plant(tmp_path, originals=6000)
    arguments = command(corpus, tmp_path / "out", "--processes=2")
    rng, folder = random.Random(0), tmp_path / "out/corpus/1.0.0"
    done = 0
    while done < kills:
        process = start(arguments)
        place, wait = rng.choice(["batches.json", "read/000000", "exact.npy", "gone.npy", "shards/*.json"]), rng.random() / 2
        while process.poll() is None and not list((folder.parent / ".1.0.0.partial").glob(place)):
            time.sleep(0.01)
        time.sleep(wait)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if rng.random() < 0.5 else process.kill()
            done += 1
        else:
            assert process.returncode == 0, process.stderr.read()
            for path in (folder, folder.parent / ".1.0.0.partial"):
                subprocess.run(["rm", "-rf", path], check=True)
        process.wait()
        process.stdout.close(), process.stderr.close()
    assert cli.main(command(corpus, tmp_path / "out", "--processes=1")) == 0
    assert cli.main(command(corpus, tmp_path / "whole", "--processes=1")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def children(process: int) -> list[int]:
    """The processes that a process started for its tasks."""
    found = map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.faults
def test_a_process_of_several_is_lost(tmp_path, record_property):
    """As the system ends the one that takes the most memory: it is told, nothing hangs, and the same command goes on."""
    tell(record_property, "1. SIGKILL of one process of a preparation")
    corpus = planted.plant(tmp_path, originals=6000)
    process = start(command(corpus, tmp_path / "out", "--processes=2"))
    while process.poll() is None and not (tmp_path / "out/corpus/.1.0.0.partial/read/000000").exists():
        time.sleep(0.01)
    left = children(process.pid)
    os.kill(left[0], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "was ended from outside" in told and "Traceback" not in told
    assert not any(Path(f"/proc/{child}").exists() for child in left)
    assert cli.main(command(corpus, tmp_path / "out", "--processes=1")) == 0


@pytest.mark.faults
def test_no_process_outlives_the_first(tmp_path, record_property):
    tell(record_property, "1. SIGKILL of the first process of a preparation")
    corpus = planted.plant(tmp_path, originals=6000)
    process = start(command(corpus, tmp_path / "out", "--processes=2"))
    while not (tmp_path / "out/corpus/.1.0.0.partial/batches.json").exists():
        time.sleep(0.01)
    left = children(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in left):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.faults
def test_asked_to_stop(tmp_path, record_property):
    tell(record_property, "4. SIGTERM, SIGINT: preparation of a corpus", tried=2)
    corpus = planted.plant(tmp_path, originals=6000)
    for number in (signal.SIGTERM, signal.SIGINT):
        output = tmp_path / number.name
        process = start(command(corpus, output, "--processes=2"))
        while process.poll() is None and not (output / "corpus/.1.0.0.partial/batches.json").exists():
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal and schedulers do
        _, told = process.communicate(timeout=60)
        assert process.returncode == 75, told
        assert told.strip() == "ptm: interrupted. What is finished is kept; start the same command again."


# Real text.


def test_real_text(tmp_path):
    """English of a novel and of an encyclopedia, and Chinese, with planted repetitions and a contaminated set; what is natural is found besides."""
    if "PTM_DATA" not in os.environ:
        pytest.skip("needs the data that PTM_DATA names")
    data = Path(os.environ["PTM_DATA"])
    novel = [" ".join(part.split()) for part in (data / "lm/warandpeace/warandpeace.txt").read_text(encoding="utf-8-sig").split("\n\n")]
    novel = [part for part in novel if len(part) > 400][:300]
    wiki = [line.strip() for line in (data / "lm/wikitext2/wiki.test.tokens").read_text(encoding="utf-8").splitlines() if len(line) > 400][:300]
    near = [" ".join(part.split()[:-3]) for part in novel[100:120]]
    (tmp_path / "novel.txt").write_text("\n".join(novel), encoding="utf-8")
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*wiki, *novel[:10], *near]))
    (tmp_path / "exam.txt").write_text("\n".join(f"{line} What does this say?" for line in wiki[50:60]), encoding="utf-8")
    chinese = data / "qa/cmrc2018/cmrc2018_trial.json"
    contexts = [paragraph["context"] for article in json.loads(chinese.read_text())["data"] for paragraph in article["paragraphs"] for _ in paragraph["qas"]]
    given = {"source": f"text:{tmp_path}/novel.txt,jsonl:{tmp_path}/wiki.jsonl,squad:{chinese}", "columns": "text=text,2:text=context"}
    given |= {"output": str(tmp_path / "out"), "evals": f"exam=text:{tmp_path}/exam.txt", "tokenizer": "bytes", "validation": "0.1"}
    options = options_lib.parse(given)[0]
    counts = local.prepare(options, processes=1)["counts"]
    assert counts["read/documents"] == len(novel) + len(wiki) + 30 + len(contexts)
    assert counts["removed/contaminated:exam"] == 10
    assert counts["removed/exact"] == 10 + len(contexts) - len(set(contexts))
    assert 20 <= counts["removed/near"] <= 25
    assert counts["script/latin/documents"] + counts["script/han/documents"] == counts["train/documents"] + counts["validation/documents"]
    assert counts["script/han/documents"] > 200 and counts["train/tokens"] == counts["train/bytes"]
    ids = {record["id"] for split in records(local.target(options)).values() for record in split}
    assert not ids & {f"1/wiki.jsonl:{line}" for line in [*range(51, 61), *range(301, 331)]}, "what was planted behind is gone"
    assert len(ids & {f"0/novel.txt:{line}" for line in range(1, 301)}) > 290

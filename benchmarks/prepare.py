"""`ptm prepare`: seconds, memory and disk as a corpus grows, on one core and by Apache Beam, and how much of what was planted in real text is found.

    PTM_DATA=... python benchmarks/prepare.py [--only=local,beam,tokens,found] [--sizes=1,10,100] [--megabytes=2]

local, beam: corpora of 1, 10 and 100 times --megabytes, whose documents are sentences drawn from the texts of lm/ (20 in the median, log-normal). Of the
documents 5 % repeat an earlier one and 5 % repeat one but for a run of 4 % of its words. Every rule has its default, and 100 passages of XQuAD are looked for. Each
measurement is a process of its own. seconds: from the call to the finished data set; core_seconds: those that all processes used a core, which rates and
stages are of; start_mib: the memory before it; stages_mib: at the end of a task of each stage; peak_mib, worker_mib: the largest resident memory of the process, and of any that it started (by samples of 0.1 s); disk_mib: the
most that lay on disk, sources aside; text_mib: the text that was read. Beam has one worker, a process of its own, by its direct runner, which keeps what is
grouped in memory. tokens: local at ten times, with token ids of GPT-2.

found: documents planted behind the texts of the shared corpora. recall: of those that a rule is to remove the share that is gone; precision: of what is gone the share that was to go.
Near duplicates are to go if the Jaccard similarity to the document that they were made from, computed exactly, reaches the threshold. Decoys are to stay, and so are the
`untouched` documents that stay where nothing is planted. JSON lines are added to benchmarks/results/prepare.jsonl.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import re
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pairs

CASES = ("local", "beam", "tokens", "found")
PACKAGES = ("numpy", "datasketch", "tensorflow-datasets", "array_record")
FILES = 8
PLANTED = 200  # documents of a kind


# Corpora of any size


class Generator:
    """Documents by number, each a pure function of it: nothing is kept, whatever the size."""

    def __init__(self, data: Path):
        text = "\n".join(path.read_text("utf-8") for path in sorted((data / "lm").glob("*/*")) if path.suffix in (".txt", ".tokens"))
        found = (" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?;])\s+", text))
        self._sentences = sorted({sentence for sentence in found if 40 <= len(sentence) <= 400})

    def _kind(self, number: int) -> str:
        place = random.Random(f"kind {number}").random()
        return "exact" if place < 0.05 else "near" if place < 0.1 else "original"

    def _original(self, number: int) -> str:
        rng = random.Random(f"text {number}")
        return " ".join(rng.choices(self._sentences, k=max(3, int(rng.lognormvariate(3, 0.7)))))

    def document(self, number: int) -> tuple[str, str]:
        """(kind, text)."""
        kind = self._kind(number) if number else "original"
        if kind == "original":
            return kind, self._original(number)
        rng = random.Random(f"earlier {number}")
        earlier = next(place for place in iter(lambda: rng.randrange(number), None) if not place or self._kind(place) == "original")
        text = self._original(earlier)
        return kind, text if kind == "exact" else run_replaced(text, rng, 0.04, self._original(number))

    def write(self, folder: Path, size: int) -> Counter[str]:
        """Files of `size` bytes of text together, in the order of numbers; documents of each kind."""
        kinds, number = Counter(), 0
        for file in range(FILES):
            with open(folder / f"{file}.jsonl", "w", encoding="utf-8") as opened:
                left = size / FILES
                while left > 0:
                    kind, text = self.document(number)
                    opened.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    kinds[kind] += 1
                    number, left = number + 1, left - len(text.encode())
        return kinds


def parts(text: str) -> tuple[list[str], str]:
    """The words of a text, or its characters where it has few spaces; and what stands between them."""
    spaced = 20 * text.count(" ") > len(text)
    return (text.split(), " ") if spaced else (list(text), "")


def run_replaced(text: str, rng: random.Random, share: float, by: str) -> str:
    """The text with a run of its words, so large a share of them, replaced by words of another."""
    found, between = parts(text)
    count = max(1, round(share * len(found)))
    start = rng.randrange(max(1, len(found) - count))
    return between.join([*found[:start], *rng.choices(parts(by)[0], k=count), *found[start + count :]])


def passages(data: Path, path: Path, count: int) -> list[str]:
    """Passages of XQuAD, which are written as an evaluation set."""
    articles = json.loads((data / "qa/xquad/xquad.en.json").read_text("utf-8"))["data"]
    found = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]][:count]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
    return found


# One measurement, in a process of its own


class Watch:
    """The largest resident memory of this process and of each that it started, by samples."""

    def __init__(self) -> None:
        import psutil

        self._own, self._done, self._errors = psutil.Process(), threading.Event(), psutil.Error
        self.own, self.other = 0, 0
        self._others: dict[int, float] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.1):
            self.own = max(self.own, self._own.memory_info().rss)
            for child in self._own.children(recursive=True):
                with contextlib.suppress(self._errors):
                    self.other = max(self.other, child.memory_info().rss)
                    times = child.cpu_times()
                    self._others[child.pid] = times.user + times.system

    def seconds(self) -> float:
        """Seconds of a core that this process and those that it started have used."""
        return time.process_time() + sum(self._others.values())

    def close(self) -> None:
        """Ends the samples."""
        self._done.set()
        self._thread.join()


def on_disk(folder: Path) -> int:
    """Bytes of all files of a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def inside(case: str, given: dict[str, str]) -> dict[str, Any]:
    """Prepares, and says what it took."""
    import psutil

    from ptm.prepare import local, pool
    from ptm.prepare import options as options_lib

    options, _ = options_lib.parse(given)
    disk, begun, peaks = 0, {}, {}

    class Stages(pool.Progress):
        def show(self, stage: str, done: int, total: int, note: str = "") -> None:
            nonlocal disk
            begun.setdefault(stage, time.process_time())
            peaks[stage] = max(peaks.get(stage, 0.0), mib(psutil.Process().memory_info().rss))
            if done in (0, total):
                disk = max(disk, on_disk(Path(options.output)))

    if case == "beam":
        from ptm.prepare import builder
    start, watch = psutil.Process().memory_info().rss, Watch()
    first, used = time.perf_counter(), time.process_time()
    if case == "beam":
        flags = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=1"]
        found = builder.prepare(options, flags)
    else:
        found = local.prepare(options, processes=1, progress=Stages())
    last, seconds = time.process_time(), time.perf_counter() - first
    watch.close()
    ends = [*begun.values(), last][1:]
    return {
        "seconds": round(seconds, 2), "core_seconds": round(watch.seconds() - used, 2), "stages": {stage: round(end - at, 2) for (stage, at), end in zip(begun.items(), ends)},
        "start_mib": mib(start), "peak_mib": mib(watch.own), "worker_mib": mib(watch.other), "stages_mib": peaks, "disk_mib": mib(max(disk, on_disk(Path(options.output)))),
        "dataset_mib": mib(sum(shard["size"] for shard in found["shards"].values())), "counts": found["counts"],
    }  # fmt: skip


def mib(size: float) -> float:
    """Bytes as MiB, to five digits."""
    return float(f"{size / 2**20:.5g}")


def growing(case: str, data: Path, flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The measurements of a case, size by size."""
    generator = Generator(data)
    for times in (10,) if case == "tokens" else tuple(map(int, flags.sizes.split(","))):
        with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
            folder = Path(scratch)
            (folder / "texts").mkdir()
            kinds = generator.write(folder / "texts", times * flags.megabytes * 10**6)
            passages(data, folder / "exam.json", 100)
            given = {"source": f"jsonl:{folder}/texts/*.jsonl", "output": f"{folder}/made", "evals": f"xquad=jsonl:{folder}/exam.json"}
            if case == "tokens":
                given["tokenizer"] = f"bpe:{data}/vocab/gpt2"
            found = pairs.printed([__file__, f"--inside={case}", f"--given={json.dumps(given)}"])
        counts = found.pop("counts")
        seconds, size, documents = found["core_seconds"], counts["read/bytes"], counts["read/documents"]
        yield {
            "case": case, "times": times, "documents": documents, "text_mib": mib(size), "documents_per_second": round(documents / seconds, 1),
            "megabytes_per_second": round(size / 1e6 / seconds, 3), **found, "planted": dict(kinds), "counts": counts,
        }  # fmt: skip


# What is found of what was planted


def originals(data: Path) -> dict[str, list[str]]:
    """Texts of the shared corpora: e-mails, encyclopedia, novel, plays, Chinese encyclopedia."""
    files = [data / f"seq2seq/aeslc/{name}.jsonl" for name in ("train_3000", "dev", "test")]
    mails = [json.loads(line)["body"] for path in files for line in path.read_text("utf-8").split("\n") if line]
    chinese = [
        paragraph["context"]
        for name in ("trial", "dev")
        for article in json.loads((data / f"qa/cmrc2018/cmrc2018_{name}.json").read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
    ]
    split = {name: (data / "lm" / name).read_text("utf-8") for name in ("warandpeace/warandpeace.txt", "tinyshakespeare/input.txt")}
    novel, plays = (re.split(r"\n\s*\n", text) for text in split.values())
    encyclopedia = [line for name in ("valid", "test") for line in (data / f"lm/wikitext2/wiki.{name}.tokens").read_text("utf-8").split("\n")]
    return {"mails": mails, "encyclopedia": encyclopedia, "novel": novel, "plays": plays, "chinese": chinese}


def edited(kind: str, text: str, rng: random.Random, other: str) -> str:
    """The text as a near duplicate of a kind, or as a decoy."""
    if kind == "near: a run of 4 % replaced":
        return run_replaced(text, rng, 0.04, other)
    found, between = parts(text)
    if kind == "near: 1 % of words, here and there":
        return between.join(rng.choice(parts(other)[0]) if rng.random() < 0.01 else word for word in found)
    if kind == "near: words behind it":
        return between.join([*found, *parts(other)[0][:6]])
    if kind == "near: case and punctuation":
        return re.sub(r"[,;:]", "", text).upper()
    assert kind == "decoy: a run of 30 % replaced"
    return run_replaced(text, rng, 0.3, other)


def broken(number: int) -> bytes:
    """A line that is no record."""
    return (b'{"text": "cut off', b'{"text": "\xff\xfe and so on"}', b'{"body": "no text in it"}', b'{"text": 17}', b"[1, 2]")[number % 5]


FORMS: dict[str, Callable[[str], str]] = {
    "exact": lambda text: text,
    "exact: other form of Unicode, other line ends": lambda text: unicodedata.normalize("NFD", text).replace("\n", "\r\n"),
}
NEAR = ("near: a run of 4 % replaced", "near: 1 % of words, here and there", "near: words behind it", "near: case and punctuation")
DECOYS = ("decoy: a run of 30 % replaced",)


def found_of_planted(data: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for each kind, and one for documents that nothing was done to."""
    from ptm.prepare import local, sketch
    from ptm.prepare import options as options_lib

    logging.getLogger("ptm").setLevel(logging.ERROR)  # of bad records
    rng = random.Random(0)
    (scratch / "texts").mkdir()
    for name, texts in originals(data).items():
        lines = [json.dumps({"text": text}) for text in texts if text.strip()]
        (scratch / "texts" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    exams = passages(data, scratch / "exam.json", 100)

    def prepared(name: str) -> tuple[dict[str, Any], dict[str, str]]:
        given = {
            "source": f"jsonl:{scratch}/texts/*.jsonl",
            "output": f"{scratch}/{name}",
            "evals": f"xquad=jsonl:{scratch}/exam.json",
            "max_bad_records": "1000",
        }
        options, _ = options_lib.parse(given)
        return local.prepare(options, processes=1), dict(records(local.target(options)))

    before, kept = prepared("before")
    options, _ = options_lib.parse({"source": "jsonl:none", "output": "none"})
    bases = rng.sample(sorted(text for text in kept.values() if len(text) >= 300), PLANTED * (len(FORMS) + len(NEAR + DECOYS) + 2))
    others = {between: [text for text in bases if parts(text)[1] == between] for between in (" ", "")}
    planted: list[tuple[str, bool, bytes]] = []  # kind, whether it is to go, line

    def plant(kind: str, text: str, goes: bool) -> None:
        planted.append((kind, goes, json.dumps({"text": text}, ensure_ascii=False).encode()))

    for _ in range(PLANTED):
        for kind, form in FORMS.items():
            plant(kind, form(bases.pop()), True)
        for kind in (*NEAR, *DECOYS):
            text = bases.pop()
            made = edited(kind, text, rng, rng.choice(others[parts(text)[1]]))
            similarity = sketch.jaccard(sketch.shingles(text, options), sketch.shingles(made, options))
            plant(
                kind if similarity >= options.near_threshold or kind in DECOYS else "near, but below the threshold", made, similarity >= options.near_threshold
            )
        exam, (one, other) = rng.choice(exams), (bases.pop() for _ in range(2))
        one, other = one[: len(one) // 2], other[len(other) // 2 :]
        plant("contaminated", f"{one}\n{exam}\n{other}", True)
        start = rng.randrange(len(exam.split()) - 14)
        plant("decoy: a quotation of 14 words", f"{other}\n{' '.join(exam.split()[start : start + 14])}\n{one}", False)
        planted.append(("broken", True, broken(len(planted))))
        plant("filtered", rng.choice(("to be or not " * 60, "0123 % 456 $ 78 " * 20, "too short", f"{one}\n" * 5)), True)
    rng.shuffle(planted)
    (scratch / "texts" / "z_planted.jsonl").write_bytes(b"\n".join(line for _, _, line in planted))
    after, now = prepared("after")
    gone = {place for place in range(len(planted)) if f"z_planted.jsonl:{place + 1}" not in now}
    for kind in sorted({kind for kind, _, _ in planted}):
        places = {place for place, (of, _, _) in enumerate(planted) if of == kind}
        wanted = {place for place in places if planted[place][1]}
        yield {"case": "found", "kind": kind, "planted": len(places), "to_go": len(wanted), "gone": len(places & gone), "gone_of_those": len(wanted & gone)}
    wanted = {place for place, (_, goes, _) in enumerate(planted) if goes}
    lost = len(kept.keys() - now.keys())
    added = Counter(after["counts"])
    added.subtract(before["counts"])
    yield {
        "case": "found", "kind": "all", "recall": len(wanted & gone) / len(wanted), "precision": len(wanted & gone) / (len(gone) + lost), "untouched": len(kept), "lost": lost,
        "removed_by_rule": {rule: count for rule, count in sorted(added.items()) if rule.startswith("removed/") and count},
    }  # fmt: skip


def records(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of all records of a data set."""
    import tensorflow_datasets as tfds

    for source in tfds.builder_from_directory(str(folder)).as_data_source().values():
        for index in range(len(source)):
            yield source[index]["id"].decode(), source[index]["text"].decode()


def main() -> None:
    """Measures the cases and adds lines to the results."""
    parser = pairs.parser(__doc__, cases=CASES)
    parser.add_argument("--sizes", default="1,10,100", help="sizes of the corpora, times --megabytes")
    parser.add_argument("--megabytes", type=int, default=2, help="text of the smallest corpus")
    parser.add_argument("--scratch", help="folder for corpora and data sets; a temporary one otherwise")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--given", default="{}", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.inside:
        print(json.dumps(inside(flags.inside, json.loads(flags.given))))
        return
    data = pairs.data_folder()
    for case in pairs.chosen(flags, CASES):
        with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
            rows = found_of_planted(data, Path(scratch)) if case == "found" else growing(case, data, flags)
            for row in rows:
                pairs.save("prepare", row, note=flags.note, packages=(*PACKAGES, "apache-beam") if case == "beam" else PACKAGES)


if __name__ == "__main__":
    sys.path.insert(0, str(pairs.ROOT))
    main()

"""A corpus in which everything that a preparation is to find was planted, and the truth about it."""

import dataclasses
import gzip
import json
import random
import unicodedata
from pathlib import Path

from ptm.prepare import options as options_lib
from ptm.prepare import trial
from ptm.prepare.options import Options

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiouéü"]
RULES_OFF = {
    "min_characters": "None", "max_characters": "None", "max_duplicate_lines": "None", "max_duplicate_line_characters": "None", "max_top_ngrams": "None",
    "min_word_length": "None", "max_word_length": "None", "max_symbols": "None", "min_letters": "None", "exact": "false", "near": "false",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planted:
    """Where the corpus lies, and ids by what was planted there; `original` and `decoy` documents must stay."""

    folder: Path
    ids: dict[str, set[str]]

    @property
    def source(self) -> str:
        return f"jsonl:{self.folder}/?.jsonl*,text:{self.folder}/more.txt"

    @property
    def evals(self) -> str:
        return f"exam=jsonl:{self.folder}/exam.json"

    def options(self, output: Path, **given: str) -> Options:
        """Options for all of it, with the evaluation set."""
        return options_lib.parse({"source": self.source, "output": str(output), "evals": self.evals, "eval_columns": "text={question} {answer}", **given})[0]


class Words:
    """Texts of made-up words, no two of which share a run of five."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)

    def words(self, count: int) -> list[str]:
        return ["".join(self._rng.choices(SYLLABLES, k=self._rng.randint(2, 4))) for _ in range(count)]

    def text(self, count: int = 90) -> str:
        return " ".join(self.words(count))

    def changed(self, text: str, share: float) -> str:
        """The text with a share of its words, in one run, replaced."""
        found = text.split()
        size = round(share * len(found))
        start = self._rng.randrange(len(found) - size)
        return " ".join([*found[:start], *self.words(size), *found[start + size :]])


def plant(folder: Path, *, seed: int = 0, originals: int = 60) -> Planted:
    """Writes three files of jsonl, one of them compressed, one of text, and an evaluation set; later files hold what repeats earlier ones."""
    made = Words(seed)
    texts = [made.text() for _ in range(originals)]
    exams = [{"question": made.text(20), "answer": made.text(10)} for _ in range(6)]
    asked = [f"{exam['question']} {exam['answer']}" for exam in exams]
    lines = [[("original", text) for text in texts[: originals // 2]], [("original", text) for text in texts[originals // 2 :]], []]
    lines[1] += [("exact", text) for text in texts[:4]] + [("exact", unicodedata.normalize("NFD", text)) for text in texts[4:7]]
    lines[2] += [("near", made.changed(text, 0.04)) for text in texts[7:15]] + [("decoy", made.changed(text, 0.3)) for text in texts[15:20]]
    lines[2] += [("contaminated", f"{made.text(100)} {text} {made.text(60)}") for text in asked[:5]]
    lines[2] += [("decoy", f"{made.text(60)} {' '.join(text.split()[:14])} {made.text(60)}") for text in asked[:3]]
    lines[1] += [("filtered", "kurz"), ("filtered", "12 34 56 78 % $ " * 12), ("filtered", f"{made.text(12)}\n" * 6), ("filtered", made.text(6) * 30)]
    rng = random.Random(seed)
    ids: dict[str, set[str]] = {}
    for number, (name, entries) in enumerate(zip("abc", lines)):
        entries = [(kind, json.dumps({"text": text}, ensure_ascii=False).encode()) for kind, text in entries]
        if number == 2:
            entries += [
                ("broken", b'{"text": "cut off'),
                ("broken", b'{"text": "\xff\xfe"}'),
                ("broken", b'{"body": "no text"}'),
                ("broken", b'{"text": 7}'),
                ("broken", b"[]"),
            ]
            rng.shuffle(entries)
        for line, (kind, _) in enumerate(entries, 1):
            ids.setdefault(kind, set()).add(f"0/{name}.jsonl:{line}")
        content = b"".join(entry + b"\n" for _, entry in entries)
        (folder / f"{name}.jsonl{'.gz' if number == 1 else ''}").write_bytes(gzip.compress(content) if number == 1 else content)
    plain = [("exact", texts[20]), ("near", made.changed(texts[21], 0.05)), ("original", made.text())]
    (folder / "more.txt").write_text("\n\n".join(text for _, text in plain), encoding="utf-8")
    for line, (kind, _) in enumerate(plain):
        ids.setdefault(kind, set()).add(f"1/more.txt:{2 * line + 1}")
    (folder / "exam.json").write_text("".join(json.dumps(exam) + "\n" for exam in exams))
    return Planted(folder, ids)


def kept(options: Options) -> set[str]:
    """Ids of the documents that stay under options, as the path in memory has it."""
    records, _ = trial.prepare(trial.documents(options), options, trial.index(options))
    return {record["id"] for _, _, record in records}

"""Formats whose entries hold several records, or say things by position: dialogues, MultiRC, ReCoRD, WSC (SuperGLUE), CLUEWSC, CSL, CHID and C3 (CLUE).

The files of benchmarks are those that these publish. A record's id is that of the published file, so that predictions can be handed in.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ptm.data import conversation, files, offsets
from ptm.data.files import File
from ptm.data.formats.lines import json_object
from ptm.data.formats.trees import TreeSource
from ptm.data.records import BadRecord, Columns, Source
from ptm.fields import ConfigError

Unfolded = list[tuple[str, dict[str, Any]]]  # of a line: records with their names in the file


class Place(NamedTuple):
    """Where an entry stands."""

    path: str
    line: int


Unfold = Callable[[dict[str, Any], Place], Unfolded]

BLANK = "____"
IDIOM = re.compile(r"#idiom\d+#")
AROUND = 20  # characters of a text on either side of its blank: ten candidates with as much share a row of 512 positions
MALFORMED = (KeyError, TypeError, IndexError, AttributeError, ValueError)  # what a record of another form raises


class UnfoldedSource(Source):
    """Lines of JSON that hold several records each; a line is parsed when one of its records is read, and once before, to count them."""

    def __init__(self, name: str, *, found: Sequence[File], unfold: Unfold, known: tuple[str, ...], columns: Columns):
        super().__init__(name, columns=columns, known=known)
        self._found, self._names, self._unfold = found, files.names(found), unfold
        self._lines = offsets.Files(tuple(file.path for file in found), index=offsets.lines)
        self._records: list[tuple[int, int, str]] = []  # line, place in it, name
        for line in range(len(self._lines)):
            try:
                self._records += [(line, place, called) for place, (called, _) in enumerate(self._parsed(line))]
            except BadRecord:
                self._records.append((line, 0, f"line{self._lines.where(line)[1]}"))

    def _parsed(self, line: int) -> Unfolded:
        content, file = self._lines.read(line)
        form = self.name.partition(":")[0]
        try:
            made = self._unfold(json_object(content), Place(self._found[file].path, self._lines.where(line)[1]))
        except ConfigError:
            raise
        except MALFORMED as error:
            raise BadRecord(f"not of the form {form} ({type(error).__name__}: {error})") from None
        if not made:
            raise BadRecord(f"it holds none of what {form} is made of")
        return made

    def __len__(self) -> int:
        return len(self._records)

    def id(self, index: int) -> str:
        line, _, called = self._records[index]
        return f"{self._names[self._lines.where(line)[0]]}:{called}"

    def raw(self, index: int) -> Mapping[str, Any]:
        line, place, _ = self._records[index]
        return self._parsed(line)[place][1]

    def digests(self) -> list[tuple[str, int, str]]:
        return files.digests(self._found)


def _format(kind: str, unfold: Unfold, known: tuple[str, ...]) -> Callable[..., Source]:
    def opener(name: str, path: str, columns: Columns, document: str) -> Source:
        return UnfoldedSource(name, found=files.find(path, kind), unfold=unfold, known=known, columns=columns)

    opener.__doc__ = unfold.__doc__
    return opener


def _given(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of some entries that a record has: test sets lack what is asked for."""
    return {name: values[name] for name in names if name in values}


def _chat(record: dict[str, Any], place: Place) -> Unfolded:
    """Dialogues, a list `messages` of turns a line: each reply of the assistant with all that was said before."""
    return [(f"{place.line}/{number}", {"text": before, "reply": content}) for number, before, content in conversation.replies(record["messages"])]


def _multirc(record: dict[str, Any], place: Place) -> Unfolded:
    """MultiRC of SuperGLUE: a record for each answer of each question about a passage."""
    made, passage = [], record["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            group = f"{record['idx']}/{question['idx']}"
            row = {"text": passage["text"], "question": question["question"], "answer": answer["text"], "group": group}
            made.append((f"{group}/{answer['idx']}", row | _given(answer, "label")))
    return made


def _record(record: dict[str, Any], place: Place) -> Unfolded:
    """ReCoRD of SuperGLUE: a record for each question about a passage, with the entities that may answer it."""
    context, made = record["passage"]["text"], []
    entities = list(dict.fromkeys(context[span["start"] : span["end"] + 1] for span in record["passage"]["entities"]))
    for question in record["qas"]:
        row = {"text": question["query"], "context": context, "entities": entities, "listed": ", ".join(entities)}
        if "answers" in question:
            row["answers"] = [{"text": answer["text"], "answer_start": answer["start"]} for answer in question["answers"]]
            row["names"] = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
        made.append((str(question["idx"]), row))
    return made


def _named(record: dict[str, Any]) -> str:
    """What CLUE and SuperGLUE call the number of a record."""
    return str(record["idx"] if "idx" in record else record["id"])


def _pronoun(record: dict[str, Any], text: str) -> Unfolded:
    target = record["target"]
    return [(_named(record), {"text": text, "noun": target["span1_text"], "pronoun": target["span2_text"], **_given(record, "label")})]


def _wsc(record: dict[str, Any], place: Place) -> Unfolded:
    """WSC of SuperGLUE: the pronoun is the word of that number, marked as in Raffel et al. 2020, appendix D.15."""
    words, target = record["text"].split(" "), record["target"]
    word, pronoun = words[target["span2_index"]], target["span2_text"]
    words[target["span2_index"]] = word.replace(pronoun, f"*{pronoun}*", 1) if pronoun in word else f"*{word}*"
    return _pronoun(record, " ".join(words))


def _cluewsc(record: dict[str, Any], place: Place) -> Unfolded:
    """CLUEWSC: as WSC, the pronoun begins at the character of that number."""
    text, start, pronoun = record["text"], record["target"]["span2_index"], record["target"]["span2_text"]
    if not text.startswith(pronoun, start):
        raise ValueError(f"'{pronoun}' is not at character {start}")
    return _pronoun(record, f"{text[:start]}*{pronoun}*{text[start + len(pronoun) :]}")


def _csl(record: dict[str, Any], place: Place) -> Unfolded:
    """CSL of CLUE: abstracts and keywords, which may not all be theirs."""
    return [(_named(record), {"text": record["abst"], "keywords": "；".join(record["keyword"]), **_given(record, "label")})]


def _chid(record: dict[str, Any], place: Place) -> Unfolded:
    answers, made = _chid_answers(place.path), []
    for content in record["content"]:
        for match in IDIOM.finditer(content):
            before, after = (IDIOM.sub(BLANK, part) for part in (content[: match.start()], content[match.end() :]))
            row = {"text": before[-AROUND:] + BLANK + after[:AROUND], "choices": record["candidates"]}
            made.append((match[0], row | ({"label": answers[match[0]]} if match[0] in answers else {})))
    return made


def _answers_beside(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return f"{stem}_answer{suffix}"


def _chid_answers(path: str) -> dict[str, int]:
    """{blank: number of its idiom} of train.json in train_answer.json beside it; nothing where there is no such file. Raises ConfigError."""
    path = _answers_beside(path)
    return _read_answers(path, os.stat(path).st_mtime_ns) if os.path.isfile(path) else {}


@functools.lru_cache(maxsize=8)
def _read_answers(path: str, changed: int) -> dict[str, int]:
    try:
        with open(path, encoding="utf-8-sig") as opened:
            return dict(json.load(opened))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} does not hold the answers of CHID, one JSON object {{blank: number}} ({error}).") from None


class ChidSource(UnfoldedSource):
    """CHID's answers lie in files of their own, which are data too."""

    def digests(self) -> list[tuple[str, int, str]]:
        beside = [_answers_beside(file.path) for file in self._found]
        return super().digests() + [(os.path.basename(path), *files.digest(path)) for path in beside if os.path.isfile(path)]


def chid(name: str, path: str, columns: Columns, document: str) -> Source:
    """CHID (Zheng et al. 2019): texts with blanks and ten candidates a line; a record for each blank."""
    return ChidSource(name, found=files.find(path, "chid"), unfold=_chid, known=("text", "choices", "label"), columns=columns)


def _c3_records(tree: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, list):
        raise TypeError(f"it is a {type(tree).__name__}")
    for entry in tree:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[1], list):
            yield "", (entry, None)
            continue
        lines, questions, name = entry
        for number, question in enumerate(questions):
            yield str(question["id"]) if isinstance(question, dict) and "id" in question else f"{name}/{number}", (lines, question)


def _c3_columns(record: tuple[list[str], dict[str, Any]]) -> dict[str, Any]:
    lines, question = record
    try:
        row = {"text": "\n".join(lines), "question": question["question"], "choices": question["choice"]}
        return row | ({"label": question["answer"]} if "answer" in question else {})
    except MALFORMED as error:
        raise BadRecord(f"not of the form c3 ({type(error).__name__}: {error})") from None


def c3(name: str, path: str, columns: Columns, document: str) -> Source:
    """C3 (Sun et al. 2020): lists of a text's lines, its questions with `choice` and `answer`, and an id."""
    form = "in C3's format, [[lines, [{question, choice, answer}], id], ...]"
    known = ("text", "question", "choices", "label")
    return TreeSource(name, found=files.find(path, "c3"), records=_c3_records, parse=_c3_columns, form=form, columns=columns, known=known)


# The columns that each has; `label`, `answers` and `names` are those of training and validation files.
chat = _format("chat", _chat, ("text", "reply"))
multirc = _format("multirc", _multirc, ("text", "question", "answer", "group", "label"))
record = _format("record", _record, ("text", "context", "entities", "listed", "answers", "names"))
wsc = _format("wsc", _wsc, ("text", "noun", "pronoun", "label"))
cluewsc = _format("cluewsc", _cluewsc, ("text", "noun", "pronoun", "label"))
csl = _format("csl", _csl, ("text", "keywords", "label"))

"""Formats whose files are one JSON value each, kept in memory: lists of records, and questions about paragraphs as SQuAD stores them."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ptm.data import files
from ptm.data.files import File
from ptm.data.records import BadRecord, Columns, Source
from ptm.fields import ConfigError

_log = logging.getLogger(__name__)
Record = tuple[str, Any]  # what it is called within its file, and what `parse` makes columns of


class TreeSource(Source):
    """Records of JSON files, read whole; `records` lists those of a file, `parse` makes the columns of one."""

    def __init__(
        self, name: str, *, found: Sequence[File], records: Callable[[Any], Iterator[Record]], parse: Callable[[Any], Mapping[str, Any]], form: str, **keys: Any
    ):
        """`form` says what a file should hold. Raises ConfigError for one that holds something else."""
        super().__init__(name, **keys)
        self._found, self._parse = found, parse
        self._records: list[Record] = []
        for file, called in zip(found, files.names(found)):
            try:
                listed = list(records(_load(file)))
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"data source file {file.place} is not {form} ({type(error).__name__}: {error}).") from None
            if not listed:
                _log.warning("%s holds no record", file.place)
            names = [record_name for record_name, _ in listed if record_name]
            unique = names and len(set(names)) == len(names)  # one without a name, which may be a broken one, does not rename the others
            numbered = [(record_name or f"record{number}" if unique else number, record) for number, (record_name, record) in enumerate(listed, 1)]
            self._records += [(f"{called}:{record_name}", record) for record_name, record in numbered]

    def __len__(self) -> int:
        return len(self._records)

    def id(self, index: int) -> str:
        return self._records[index][0]

    def raw(self, index: int) -> Mapping[str, Any]:
        return self._parse(self._records[index][1])

    def digests(self) -> list[tuple[str, int, str]]:
        return files.digests(self._found)


def _load(file: File) -> Any:
    try:
        with open(file.path, encoding="utf-8-sig") as opened:
            return json.load(opened)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data source file {file.place} is no JSON ({error}).") from None


def _listed(tree: Any) -> Iterator[Record]:
    if not isinstance(tree, list):
        raise TypeError(f"it is a {type(tree).__name__}")
    return (("", record) for record in tree)


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecord(f"JSON {type(record).__name__}, not an object")
    return record


def json_list(name: str, path: str, columns: Columns, document: str) -> Source:
    """Files that are one list of objects, whose keys are the columns."""
    found = files.find(path, "json")
    return TreeSource(name, found=found, records=_listed, parse=_object, form="a list of objects", columns=columns, known=None)


def _questions(tree: Any) -> Iterator[Record]:
    for article in tree["data"]:
        for paragraph in article["paragraphs"]:
            title = next((part["title"] for part in (paragraph, article) if "title" in part), "")
            for question in paragraph["qas"]:
                yield str(question["id"]) if isinstance(question, dict) and "id" in question else "", (title, paragraph["context"], question)


def _question(record: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    title, context, question = record
    if not isinstance(context, str) or not context.strip():
        raise BadRecord("empty context")
    if not isinstance(question, dict) or "question" not in question:
        raise BadRecord("no question")
    columns = {"id": str(question["id"]) if "id" in question else "", "title": title, "text": question["question"]}
    columns |= {"question": question["question"], "context": context}
    if "answers" in question:
        if not isinstance(question["answers"], list | None):
            raise BadRecord(f"answers are {str(question['answers'])[:60]}, not a list")
        answers = [_answer(answer) for answer in question["answers"] or []]
        columns |= {"answers": answers, "is_impossible": question["is_impossible"] if "is_impossible" in question else not answers}
    return columns


def _answer(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str) or not isinstance(answer.get("answer_start"), int):
        raise BadRecord(f"an answer is {str(answer)[:60]}, not a text and its answer_start")
    return {"text": answer["text"], "answer_start": answer["answer_start"]}


def squad(name: str, path: str, columns: Columns, document: str) -> Source:
    """Files in SQuAD's format (Rajpurkar et al. 2016, 2018), a record for each question: id, title, text (= question), context, answers, is_impossible.

    Answers are given as the file has them. One that is not where its `answer_start` says is a matter for who learns places: a question is not lost for it.
    """
    known = ("id", "title", "text", "question", "context", "answers", "is_impossible")
    form = "in SQuAD's format, {data: [{paragraphs: [{context, qas: [{id, question, answers}]}]}]}"
    return TreeSource(name, found=files.find(path, "squad"), records=_questions, parse=_question, form=form, columns=columns, known=known)

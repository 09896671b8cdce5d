"""The files of bias suites: CrowS-Pairs (Nangia et al. 2020), WinoBias (Zhao et al. 2018), StereoSet (Nadeem et al. 2021)."""

import csv
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from ptm import untrusted
from ptm.fields import ConfigError

BLANK = "BLANK"
LABELS = ("stereotype", "anti-stereotype", "unrelated")
_NUMBERED = re.compile(r"\s*(\d+)\s+(.*)")
PRONOUNS = {"he": "he", "him": "he", "his": "he", "himself": "he", "she": "she", "her": "she", "hers": "she", "herself": "she"}


class Pair(NamedTuple):
    """Two sentences that differ in a few words: the one that agrees with a stereotype, and its counterpart."""

    id: str
    stereotypical: str
    other: str
    groups: dict[str, str]  # what figures are split by -> the group of this pair


class Cloze(NamedTuple):
    """A context with a blank, and what may fill it, by label."""

    id: str
    target: str
    domain: str
    context: str
    fillings: dict[str, str]  # label -> the word or words in place of the blank
    sentences: dict[str, str]


def _text(path: Path, what: str) -> str:
    if not path.is_file():
        raise ConfigError(f"there is no file '{path}'; {what}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 (byte {error.start}); {what}") from None


def crows_pairs(path: Path) -> tuple[list[Pair], dict[str, int]]:
    """Pairs of crows_pairs_anonymized.csv, by `bias_type` and by `direction` (stereo: of a disadvantaged group, antistereo), and counts of skipped rows."""
    what = "give crows_pairs_anonymized.csv, with the columns sent_more, sent_less, stereo_antistereo, bias_type."
    content = csv.DictReader(io.StringIO(_text(path, what), newline=""), strict=True)
    pairs, skipped = [], {"rows without two different sentences": 0}
    try:
        missing = {"sent_more", "sent_less", "stereo_antistereo", "bias_type"} - set(content.fieldnames or ())
        if missing:
            raise ConfigError(f"'{path}' has no column {', '.join(sorted(missing))}; {what}")
        for number, row in enumerate(content):
            more, less = row["sent_more"], row["sent_less"]
            if not more or not less or more == less:
                skipped["rows without two different sentences"] += 1
                continue
            pairs.append(Pair(str(number), more, less, {"bias_type": str(row["bias_type"]), "direction": str(row["stereo_antistereo"])}))
    except csv.Error as error:
        raise ConfigError(f"'{path}', line {content.line_num}: broken csv ({error}); {what}") from None
    return pairs, skipped


def winobias(folder: Path) -> tuple[list[Pair], dict[str, int]]:
    """Sentences of pro_stereotyped_* and anti_stereotyped_* of a folder, by `type` (1: the world must be known, 2: syntax tells) and `pronoun` (of the
    pro-stereotypical sentence), and counts of skipped ones: those whose two sentences do not differ in the gender of a pronoun alone.
    """
    what = "give the folder of WinoBias, with pro_stereotyped_type1.txt.dev, anti_stereotyped_type1.txt.dev and so on."
    files = sorted(folder.glob("pro_stereotyped_type*.txt.*")) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"'{folder}' holds no pro_stereotyped_type*.txt.*; {what}")
    pairs, skipped = [], {"lines without counterpart": 0, "pairs that differ in more than the gender of a pronoun": 0}
    for file in files:
        sides = [_winobias_lines(file, what), _winobias_lines(file.with_name(file.name.replace("pro_", "anti_", 1)), what)]
        skipped["lines without counterpart"] += len(sides[0].keys() ^ sides[1].keys())
        kind = re.search(r"type(\d+)", file.name)
        for number in sorted(sides[0].keys() & sides[1].keys()):
            pro, anti = (side[number] for side in sides)
            changed = [(a, b) for a, b in zip(_words(pro), _words(anti)) if a != b]
            genders = {(PRONOUNS[a], PRONOUNS[b]) if a in PRONOUNS and b in PRONOUNS else None for a, b in changed}
            if len(_words(pro)) != len(_words(anti)) or genders not in ({("he", "she")}, {("she", "he")}):
                skipped["pairs that differ in more than the gender of a pronoun"] += 1
                continue
            groups = {"type": kind[1] if kind else "other", "pronoun": next(iter(genders))[0]}
            pairs.append(Pair(f"{file.name}:{number}", pro, anti, groups))
    return pairs, skipped


def _winobias_lines(path: Path, what: str) -> dict[int, str]:
    lines = [match.groups() for line in _text(path, what).splitlines() if (match := _NUMBERED.fullmatch(line))]
    return {int(number): " ".join(re.sub(r"[\[\]]", "", text).split()) for number, text in lines}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def stereoset(path: Path) -> tuple[list[Cloze], dict[str, int]]:
    """The intrasentence part of a file in StereoSet's format, and counts of skipped examples: those without a blank or without one sentence of each label."""
    what = 'give a StereoSet file: {"data": {"intrasentence": [{"context": "... BLANK ...", "sentences": [...], ...}, ...]}}.'
    try:
        examples = untrusted.json_of(_text(path, what))["data"]["intrasentence"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' cannot be read ({type(error).__name__}: {error}); {what}") from None
    found, skipped = [], {"examples without a blank or a sentence of each label": 0}
    for number, example in enumerate(examples if isinstance(examples, list) else []):
        made = _cloze(number, example)
        if made is None:
            skipped["examples without a blank or a sentence of each label"] += 1
        else:
            found.append(made)
    return found, skipped


def _cloze(number: int, example: Any) -> Cloze | None:
    try:
        context, target, domain = str(example["context"]), str(example["target"]), str(example["bias_type"])
        sentences = {str(sentence["gold_label"]): str(sentence["sentence"]) for sentence in example["sentences"]}
    except (KeyError, TypeError):
        return None
    if context.count(BLANK) != 1 or set(sentences) != set(LABELS):
        return None
    before, after = context.split(BLANK)
    fillings = {}
    for label, sentence in sentences.items():
        # Some sentences differ from their context in white space or in the case of the first letter.
        if len(sentence) <= len(before) + len(after) or sentence[: len(before)].lower() != before.lower() or not sentence.endswith(after):
            return None
        fillings[label] = sentence[len(before) : len(sentence) - len(after)]
    return Cloze(str(number), target, domain, context, fillings, sentences)

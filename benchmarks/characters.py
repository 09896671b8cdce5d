"""The Chinese characters of $PTM_DATA that a vocabulary lacks, one a line: what configs/small.py:zh adds to the one of configs/small.py:en.

    PTM_DATA=... python benchmarks/characters.py runs/small-en/tokenizer/vocab.txt > characters.txt
"""

import collections
import json
import os
import sys
import zipfile
from pathlib import Path

OFTEN = 3  # times that a character must occur
PUNCTUATION = "，。！？：；、（）《》“”…·—"


def main() -> None:
    """Prints them, the most frequent first."""
    if len(sys.argv) != 2 or "PTM_DATA" not in os.environ:
        raise SystemExit(__doc__)
    data, counts = Path(os.environ["PTM_DATA"]), collections.Counter()
    for part in ("trial", "dev"):
        articles = json.loads((data / f"qa/cmrc2018/cmrc2018_{part}.json").read_text(encoding="utf-8"))["data"]
        counts.update("".join(paragraph["context"] for article in articles for paragraph in article["paragraphs"]))
    counts.update(zipfile.ZipFile(data / "classify/chnsenticorp/chnsenticorp.zip").read("train.tsv").decode())
    counts.update((data / "classify/thucnews/dev.txt").read_text(encoding="utf-8"))
    known = set(Path(sys.argv[1]).read_text(encoding="utf-8").split("\n"))
    for character, count in counts.most_common():
        if count >= OFTEN and ("\u4e00" <= character <= "\u9fff" or character in PUNCTUATION) and character not in known:
            print(character)


if __name__ == "__main__":
    main()

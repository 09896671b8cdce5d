"""The lead baseline of AESLC: the ROUGE of an e-mail's first words as its subject line, by the metric of configs/finetune/summarization.py.

    PTM_DATA=... python benchmarks/lead.py

Prints a JSON line for the first line, the first sentence, and the first 5, 10 and 15 words of the test set's e-mails, measured on the writer's subject.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from ptm.metrics import written

LEADS: dict[str, Callable[[str], str]] = {
    "first line": lambda body: body.strip().split("\n")[0],
    "first sentence": lambda body: re.split(r"(?<=[.!?])\s", body.strip())[0],
    **{f"first {count} words": lambda body, count=count: " ".join(body.split()[:count]) for count in (5, 10, 15)},
}


def main() -> None:
    """Measures each lead."""
    if "PTM_DATA" not in os.environ:
        raise SystemExit("PTM_DATA is not set: point it at the folder that holds seq2seq/aeslc")
    lines = (Path(os.environ["PTM_DATA"]) / "seq2seq/aeslc/test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for name, lead in LEADS.items():
        scores = written.rouge([lead(record["body"]) for record in records], [[record["subject"]] for record in records])
        print(json.dumps({"lead": name, "records": len(records), **{kind: round(value, 2) for kind, value in scores.items()}}), flush=True)


if __name__ == "__main__":
    main()

"""A target of tests/test_fuzz.py under atheris, whose inputs follow the branches that are taken: `python tests/guided_fuzz.py safetensors -max_total_time=600`.

It takes libFuzzer's options and needs `pip install atheris` (Linux, Python 3.11 to 3.13), which no extra has. A crash is written to crash-HASH in the working directory;
given that file as an argument, it is repeated.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris
from hypothesis import HealthCheck, given, settings

with atheris.instrument_imports(include=["ptm"]):
    import test_fuzz


def main() -> None:
    """Runs until the time is over, or until an input fails."""
    name, *options = sys.argv[1:]
    target, folder = test_fuzz.TARGETS[name], Path(tempfile.mkdtemp())

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.strategy)
    def check(value: Any) -> None:
        with test_fuzz.empty(folder) as made:
            target.check(value, made)

    atheris.Setup([sys.argv[0], *options], check.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Inputs that are nearly right, and who tries them: a few with every suite, more with `--long`, without end until PTM_FUZZ_MINUTES are over."""

import copy
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SHORT, LONG = 12, 3000
ROUND = 500  # examples between two looks at the clock

TEXT = st.text(max_size=12) | st.sampled_from(
    ["", "\0", "\x1b[2J", "../../x", "/etc/passwd", "<script>", "\u202e", "é" * 40, "a" * 3000, "nan", "1e999", "-1", "None", "{a", "$STUDY"]
)
NUMBERS = st.integers(-3, 3) | st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**40, 0.5, -0.0, 1e308]) | st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@st.composite
def mutated(draw: Any, base: bytes) -> bytes:
    """Bytes with a few places cut, doubled, flipped or overwritten; sometimes any bytes at all."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.binary(max_size=64))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(base))), draw(st.integers(1, 9))
        kind = draw(st.sampled_from(["cut", "rest", "twice", "put", "over", "flip"]))
        if kind == "rest":
            base = base[:at]
        elif kind == "cut":
            base = base[:at] + base[at + length :]
        elif kind == "twice":
            base = base[: at + length] + base[at:]
        elif kind == "flip":
            base = base[:at] + bytes(byte ^ 1 << length % 8 for byte in base[at : at + 1]) + base[at + 1 :]
        else:
            new = draw(
                st.binary(min_size=1, max_size=9)
                | st.sampled_from([b"\xff", b"\0", b"{", b"]", b'"', b",", b"\n", b"99999999999", b"-1", b"1e999", b"\\ud800"])
            )
            base = base[:at] + new + base[at + (len(new) if kind == "over" else 0) :]
    return base


@st.composite
def changed(draw: Any, base: Any) -> Any:
    """JSON with one to three values replaced, taken away or added, anywhere in it."""
    made = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        node, parent, key = made, None, None
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 3))):
            parent, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        if parent is None:
            return draw(JSON)
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(TEXT)] = draw(JSON)
        elif kind == "add":
            parent.insert(key, draw(JSON))
        else:
            parent[key] = draw(JSON)
    return made


def minutes() -> float:
    """How long each target is to be tried, where somebody asked for a time."""
    return float(os.environ.get("PTM_FUZZ_MINUTES", 0))


def run(strategy: st.SearchStrategy, check: Callable[[Any], None], *, examples: int) -> int:
    """Tries values of a strategy: so many, always the same, or new ones until the minutes are over. Returns how many were tried."""
    tried = 0

    def attempt(value: Any) -> None:
        nonlocal tried
        tried += 1
        check(value)

    def round_of(count: int, number: int | None) -> None:
        chosen = settings(
            max_examples=count, deadline=None, database=None, derandomize=number is None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        test = chosen(given(strategy)(attempt))
        (test if number is None else seed(number)(test))()

    until, number = time.monotonic() + 60 * minutes(), int(time.time())
    if not minutes():
        round_of(examples, None)
    while time.monotonic() < until:
        round_of(ROUND, number)
        number += 1
    return tried


def targets(table: Mapping[str, Any]) -> pytest.MarkDecorator:
    """A test for each target of a table."""
    return pytest.mark.parametrize("target", sorted(table))

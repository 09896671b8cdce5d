"""Memory that the process keeps on CPU (ptm/allocator.py), in processes of their own: the setting is for life."""

import subprocess
import sys

import pytest

from ptm import allocator

FAULTS = """
import resource, sys
import numpy as np
from ptm import allocator
kept = allocator.keep_pages() if sys.argv[1] == "keep" else None
np.ones(1 << 23)  # 64 MiB, given back at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 23)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[str, int]:
    printed = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout.split()
    return printed[0], int(printed[1])


def test_freed_pages_stay():
    kept, after = faults("keep")
    if kept != "True":
        pytest.skip("this C library has no mallopt")
    assert after < 100 < faults("leave")[1]


@pytest.mark.parametrize(("platforms", "expected"), [("cpu", True), ("cpu,cuda", True), ("cuda,cpu", False), ("tpu", False)])
def test_platform_as_told_by_the_environment(platforms, expected, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert allocator.on_cpu() is expected


@pytest.mark.parametrize("plugin", [True, False])
def test_platform_as_told_by_what_is_installed(plugin, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(allocator.importlib.metadata, "entry_points", lambda **_: ("a plugin",) if plugin else ())
    monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: None)
    assert allocator.on_cpu() is not plugin

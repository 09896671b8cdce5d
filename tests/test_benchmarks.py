"""Benchmarks that need time or hardware: what they would run is well formed, and what was not measured as it should have been is not recorded."""

import copy
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from ptm import config, recipe, registry
from ptm import run as run_lib

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, scaling = load("gpu"), load("scaling")
ROW = {
    "step_ms": 50.0, "first_loss": 10.9, "last_loss": 8.0, "parameters": 124_475_904, "attention": ["__cudnn$fmhaSoftmax"], "recompiled": 0, "compiled": True,
    "peak_bytes": 1, "device": "NVIDIA H100 80GB HBM3",
}  # fmt: skip
ABOUT = {"vocabulary": 50304, "tokens": 32768, "positions": 32768, "peak_flops": 989e12}


def test_a_good_measurement_passes():
    assert gpu.faults({"ptm": ROW, "torch": ROW}, about=ABOUT, smoke=False) == []


@pytest.mark.parametrize(
    ("side", "change", "told"),
    [
        ("ptm", {"first_loss": 9.0}, "ptm: the first loss is 9.000"),
        ("torch", {"first_loss": 11.4}, "begin in different places"),
        ("torch", {"first_loss": math.nan}, "torch: the first loss is nan"),
        ("torch", {"last_loss": 10.8}, "torch: the loss does not fall"),
        ("ptm", {"last_loss": math.nan}, "ptm: the loss does not fall"),
        ("ptm", {"recompiled": 2}, "ptm: 2 programs were compiled"),
        ("ptm", {"attention": []}, "ptm: no fused attention"),
        ("torch", {"compiled": False}, "torch: it was not compiled"),
        ("torch", {"parameters": 1}, "parameters: 124475904 of ptm, 1 of torch"),
        ("torch", {"device": "NVIDIA A100"}, "device: "),
        ("about", {"tokens": 20000}, "20000 of 32768 positions"),
        ("about", {"peak_flops": None}, "no peak is known of NVIDIA H100"),
    ],
)
def test_what_was_not_measured_is_told(side, change, told):
    found, about = {"ptm": dict(ROW), "torch": dict(ROW)}, dict(ABOUT)
    (about if side == "about" else found[side]).update(change)
    wrong = gpu.faults(copy.deepcopy(found), about=about, smoke=False)
    assert wrong and any(told in problem for problem in wrong), wrong


@pytest.mark.parametrize("task", list(gpu.TASKS))
def test_tasks_of_the_gpu(task):
    """Batches are those that the step takes, full of tokens, and each is another; the peer is told of a model of as many parameters."""
    run = gpu.make_run(task, rows=2, overrides=[], smoke=True)
    batches = gpu.make_batches(run)
    assert {name: (values.shape[1:], values.dtype) for name, values in batches.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in run.abstract_batch().items()
    }
    segments = [values for name, values in batches.items() if "segments" in name]
    assert sum((values > 0).sum() for values in segments) > gpu.FULL * sum(values.size for values in segments)
    assert len({values.tobytes() for values in batches["tokens_BL"]}) == gpu.BATCHES and set(np.unique(batches["weights_BL"])) <= {0.0, 1.0}
    told = gpu.peer_model(run)
    assert told["width"] == 64 and told["length"] == batches["tokens_BL"].shape[-1]


def test_model_flops_of_gpt2():
    """The formula behind utilisation: 6 N + 12 layers * width * length a token (Chowdhery et al. 2022, appendix B), N of matrices and the tied table."""
    run = gpu.make_run("gpt2", rows=1, overrides=["compute.attention=auto"], smoke=False)
    matrices = 12 * 12 * 768 * 768 + 50304 * 768
    assert 3 * run.forward_flops() / 1024 == pytest.approx(6 * matrices + 12 * 12 * 768 * 1024, rel=1e-12)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.abstract_params))
    assert parameters == 124_475_904


@pytest.mark.parametrize("table", ["devices", "length", "depth", "width", "batch"])
def test_rows_of_scaling(table):
    """Every row is a run that can be set up, named by what changes."""
    rows = scaling.rows(table)
    assert len({str(key) for key, _, _ in rows}) == len(rows) >= 4
    for _, overrides, devices in rows:
        made = recipe.load(scaling.RECIPE)
        for key, value in overrides.items():
            config.override(made, key, str(value), registry.REGISTRIES)
        resolved = registry.resolve(made)
        if devices <= jax.device_count():
            run_lib.layout_of(resolved, jax.devices()[:devices])

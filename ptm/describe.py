"""What a run says about itself: the files that describe it in its workdir, and the summary at its end."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ptm import atomic, log, run, tree, untrusted
from ptm import config as config_lib
from ptm.fields import ConfigError
from ptm.run import Run
from ptm.samples import sample

PACKAGES = ("ptm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def git_state() -> dict[str, Any]:
    """Commit of the checkout that this package lies in and whether it has changes; empty if it is none."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def history(workdir: Path) -> list[dict[str, Any]]:
    """The sessions of a workdir so far, from its env.json."""
    path = workdir / "env.json"
    if not path.is_file():
        return []
    try:
        return list(untrusted.read_json(path)["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); move it away, and the run goes on without its history.") from None


def session(run: Run, start: int, changes: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """What this start of the run ran on: versions, devices, code, the recomputation (chosen, if it was `auto`), flags of XLA, and the keys of the config that changed since."""
    devices = run.layout.mesh.devices.flat
    return {
        "from_step": start, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": {"kind": devices[0].device_kind, "count": run.layout.mesh.size, "processes": jax.process_count()},
        "mesh": dict(run.layout.mesh.shape), "remat": run.model.module.context.remat,
        "deterministic": run.config.compute.deterministic, "xla_flags": os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else "",
        "git": git_state(), "config": config_lib.fingerprint(run.config),
        "changes": {key: list(pair) for key, pair in changes.items()},
    }  # fmt: skip


def write(this: Run, history: list[dict[str, Any]]) -> str:
    """Writes config.json, diff.txt, env.json and params.txt into the workdir; returns two lines that say what the run is."""
    config = this.config
    changes = config_lib.diff(config_lib.defaults_of(config), config)
    if jax.process_index() == 0:
        atomic.write(this.workdir / "config.json", json.dumps(config_lib.to_dict(config), indent=1) + "\n")
        atomic.write(this.workdir / "diff.txt", "".join(f"{key}: {old!r} -> {new!r}\n" for key, (old, new) in changes.items()))
        atomic.write(this.workdir / "env.json", json.dumps({"fingerprints": this.fingerprints(), "history": history}, indent=1) + "\n")
        atomic.write(this.workdir / "params.txt", run.parameter_table(this))
    devices = this.layout.mesh.devices
    moving = tree.size(tree.unflatten({path: leaf for path, leaf in tree.paths(this.abstract_params).items() if not this.optimizer.frozen[path]}))
    share = f" ({moving:,} of them trained)" if any(this.optimizer.frozen.values()) else ""
    return (
        f"{config.model.name} with {tree.size(this.abstract_params):,} parameters{share}, objective {config.objective.name}, "
        f"{config.tokenizer.kind} tokenizer of {this.tokenizer.vocab_size:,} pieces.\n"
        f"{config.train.steps:,} steps of {'up to ' if len(this.starts) > 1 else ''}{this.tokens_per_step():,} tokens from {', '.join(config.data.source)} on {devices.size} x {devices.flat[0].device_kind}, "
        f"written to {this.workdir}."
    )


def summary(this: Run, params: Any, evals: dict[str, float], seconds: float) -> str:
    """What a person wants to know at the end of a run, on some lines."""
    config, per_step = this.config, f"{'up to ' if len(this.starts) > 1 else ''}{this.tokens_per_step():,}"
    lines = ["", f"Finished {config.model.name} / {config.objective.name} in {log.duration(seconds)}."]
    lines.append(f"  parameters                {tree.size(this.abstract_params):,}")
    lines.append(f"  tokens                    {this.total_tokens():,} ({config.train.steps:,} steps of {per_step}, padding included)")
    tokens_alone = all(set(branch.objective.coefficients) == {"tokens"} for branch in this.branches)
    nats = "{:.4f} nats a predicted token"
    shown = {"loss": nats if tokens_alone else "{:.4f}", "loss/tokens": nats, "loss/mlm": nats, "bits_per_byte": "{:.4f} of predicted text", "accuracy": "{:.3f}"}
    for name in config.evals:
        lines += [f"  {name + ' ' + metric.replace('_', ' '):<25} {text.format(evals[f'{name}/{metric}'])}" for metric, text in shown.items() if f"{name}/{metric}" in evals]
    lines += filter(None, [sample(this, params)])
    lines.append(f"  written to                {this.workdir} (config.json, metrics.jsonl, params.txt, ckpt/{config.train.steps}, ...)")
    lines.append(f"  evaluate again            ptm evaluate --workdir={this.workdir}")
    return "\n".join(lines)

"""Coordinate check (Yang et al. 2022, appendix D.1): how far a few steps move what a model computes, at several widths.

    python experiments/coordinates.py --config=configs/quickstart.py:gpt --widths=64,128,256,512 --config.mup.base_width=64

At each width, from the same seeds and on the same batches, the config is trained for some steps at its full rate, without warm-up. Told is the mean absolute change since
initialisation, on the first batch and without dropout, of the residual stream behind each layer, of attention logits (up to a constant of each query) and of every head's
output, and the slope of its logarithm over that of the width. Under the maximal update parametrisation all changes are of order 1, slopes near 0;
in the standard one hidden changes and logits grow with the width. Widths are those of `ptm.mup.at_width`: heads keep their size, or with --heads=N their number.

    --steps=4  --seeds=3  --tolerance=0.25 (largest slope, up or down, that counts as none)  --output=DIR for coordinates.jsonl and coordinates.png (a new folder)

The last line is the verdict; the exit code is 0 where coordinates stay, 1 where they do not.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm import config as config_lib
from ptm import fields, mup, recipe, registry
from ptm import run as run_lib
from ptm.analysis import pictures
from ptm.config import Config
from ptm.fields import ConfigError
from ptm.models import Model
from ptm.nn.heads import READERS, split_head


class Row(NamedTuple):
    """The mean absolute change of a quantity after some steps."""

    width: int
    seed: int
    step: int
    quantity: str
    change: float


def coordinates(model: Model, params: Any, batch: dict[str, jax.Array], *, mask: str) -> dict[str, jax.Array]:
    """What a model computes of a batch, by name: residual streams [B, L, D], logarithms of attention weights [N, B, H, L, T], outputs of heads."""
    heads = [head for head in model.module.heads if split_head(head)[0] not in READERS]
    found = {}
    for head in heads:
        out = model.hidden(params, batch, mask=mask, head=head, states=True, maps=True)
        of = f" ({split_head(head)[0]})" if len(heads) > 1 else ""
        found |= {f"residual {n}{of}": state_BLD for n, state_BLD in enumerate(out.states_NBLD)}
        found[f"attention{of}"] = jnp.log(out.maps_NBHLT)
        found[f"output {split_head(head)[0]}"] = model.logits(params, out.hidden_BLD, head=head)
    return found


@jax.jit
def _changes(start: dict[str, jax.Array], now: dict[str, jax.Array]) -> dict[str, jax.Array]:
    known = {name: jnp.isfinite(now[name]) & jnp.isfinite(start[name]) for name in now}  # what attention does not see has no logit
    return {name: jnp.mean(jnp.abs(now[name] - start[name]), where=known[name]) for name in now}


def measure(
    config: Config, widths: Sequence[int], *, steps: int, seeds: int, heads: int | None = None, devices: Sequence[jax.Device] | None = None
) -> list[Row]:  # fmt: skip
    """Changes at each width, seed and step, on the devices (default: all). Raises ConfigError where the model has no such width."""
    schedule = config_lib.Schedule(name="constant")
    config = dataclasses.replace(config, schedule=schedule, train=dataclasses.replace(config.train, steps=steps), log=config_lib.Log(writers=()))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = run_lib.setup(config, workdir=folder, devices=devices)  # makes the tokenizer, which all share
        if (Path(folder) / "tokenizer").is_dir():
            config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=f"{folder}/tokenizer", extra=None))
        del first
        for width in widths:
            model = mup.at_width(config.model, width, heads=heads)
            for seed in range(config.seed, config.seed + seeds):
                run = run_lib.setup(dataclasses.replace(config, model=model, seed=seed), devices=devices)
                rows += _of_run(run, steps=steps)
    return rows


def _of_run(run: run_lib.Run, *, steps: int) -> list[Row]:
    size, mask = run.config.train.batch_size, run.objective.mask
    batches = [run.to_device(batch, batch_size=size, rows=list(range(size))) for batch, _ in zip(run.loader(), range(steps))]
    state = run.init_state(run.init_params())
    computed = jax.jit(lambda params, batch: coordinates(run.model, params, batch, mask=mask))
    start = computed(state["params"], batches[0])
    rows = []
    for step, batch in enumerate(batches, start=1):
        state, _ = run.train_step(state, batch)
        found = jax.device_get(_changes(start, computed(state["params"], batches[0])))
        rows += [Row(run.config.model.width, run.config.seed, step, name, float(change)) for name, change in found.items()]
    return rows


def slopes(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Quantity -> slope of the logarithm of the mean change, over seeds, against the logarithm of the width, after each step."""
    names, widths, steps = (list(dict.fromkeys(row[n] for row in rows)) for n in (3, 0, 2))

    def mean(name: str, width: int, step: int) -> float:
        return float(np.mean([row.change for row in rows if (row.quantity, row.width, row.step) == (name, width, step)]))

    return {name: [float(np.polyfit(np.log(widths), np.log([mean(name, width, step) for width in widths]), 1)[0]) for step in steps] for name in names}


def verdict(found: Mapping[str, Sequence[float]], *, tolerance: float) -> tuple[bool, str]:
    """Whether all slopes after the last step are within the tolerance, and a sentence that says so or names the steepest."""
    last = {name: values[-1] for name, values in found.items()}
    grow, shrink = {n: s for n, s in last.items() if not s <= tolerance}, {n: s for n, s in last.items() if s < -tolerance}
    if not grow and not shrink:
        return True, f"coordinates stay: all slopes over width are within {tolerance:g} of 0, the steepest {max(last.values(), key=abs):+.2f}"
    told = [
        f"{len(part)} of {len(last)} {word} with width, {name} the most, as width ** {last[name]:.2f}"
        for word, part in (("grow", grow), ("shrink", shrink))
        for name in sorted(part, key=lambda name: -abs(part[name]))[:1]
    ]
    return False, f"coordinates do not stay: {'; '.join(told)}"


def table(rows: Sequence[Row], found: Mapping[str, Sequence[float]]) -> str:
    """Changes after the last step at each width, means over seeds, and the slopes after each step."""
    widths, last = sorted({row.width for row in rows}), max(row.step for row in rows)
    lines = [f"{f'change after {last} steps':<26}" + "".join(f"{width:>10}" for width in widths) + "   slopes after steps 1, 2, ..."]
    for name, values in found.items():
        means = [np.mean([row.change for row in rows if (row.quantity, row.width, row.step) == (name, width, last)]) for width in widths]
        lines.append(f"{name:<26}" + "".join(f"{mean:10.3g}" for mean in means) + "   " + " ".join(f"{value:+.2f}" for value in values))
    return "\n".join(lines)


def write(folder: Path, rows: Sequence[Row], *, title: str) -> None:
    """coordinates.jsonl, and coordinates.png where matplotlib is there."""
    folder.mkdir(parents=True)
    (folder / "coordinates.jsonl").write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        return
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, step, width in dict.fromkeys((row.quantity, row.step, row.width) for row in rows):
        mean = float(np.mean([row.change for row in rows if (row.quantity, row.step, row.width) == (name, step, width)]))
        panels.setdefault(name, {}).setdefault(f"step {step}", []).append((width, mean))
    pictures.log_log(folder / "coordinates.png", panels, x="width", y="mean absolute change", title=title)


def main(argv: Sequence[str]) -> int:
    """The command line; gives the exit code."""
    overrides = dict(word.removeprefix("--config.").partition("=")[::2] for word in argv if word.startswith("--config."))
    parser = argparse.ArgumentParser(prog="experiments/coordinates.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE.py[:WORDS]")
    parser.add_argument("--widths", required=True, metavar="N,N,...")
    for name, default in (("steps", 4), ("seeds", 3), ("heads", None)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--tolerance", type=float, default=0.25)
    parser.add_argument("--output", type=Path, metavar="DIR")
    flags = parser.parse_args([word for word in argv if not word.startswith("--config.")])
    widths = fields.parse(flags.widths, tuple[int, ...], "--widths")
    if len(set(widths)) < 2 or min(flags.steps, flags.seeds) < 1:
        raise ConfigError(f"--widths={flags.widths} --steps={flags.steps} --seeds={flags.seeds}; allowed: two widths or more, one step and one seed at least.")
    if flags.output is not None and flags.output.exists():
        raise ConfigError(f"--output={flags.output} is there already; give a new folder.")
    config = recipe.load(flags.config)
    for key, value in overrides.items():
        config_lib.override(config, key, value, registry.REGISTRIES)
    rows = measure(registry.resolve(config), widths, steps=flags.steps, seeds=flags.seeds, heads=flags.heads)
    found = slopes(rows)
    stays, told = verdict(found, tolerance=flags.tolerance)
    print(table(rows, found))
    if flags.output is not None:
        write(flags.output, rows, title=f"{flags.config}: {told}")
    print(told)
    return 0 if stays else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        print(f"coordinates: {error}", file=sys.stderr)
        sys.exit(2)

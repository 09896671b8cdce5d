"""Pretraining on one GPU: this project's train step beside a plain PyTorch implementation, compiled and with flash attention, in the same run.

    pip install -e '.[bench]' 'jax[cuda12]' && python benchmarks/gpu.py [--tasks gpt2,bert128,bert512,t5] [--repeats 5] [--steps 50] [--rows gpt2=64]
    python benchmarks/gpu.py --smoke       # both sides at tiny sizes on the CPU: nothing is recorded

gpt2: GPT-2 124M at length 1024; bert128, bert512: BERT-base by masked language modelling; t5: T5-base by span corruption, 512 / 114. bfloat16 activations,
float32 parameters, AdamW, the gradient norm clipped at 1, no dropout, the same batches on both sides: full rows of tokens drawn by Zipf's law, as our
objectives make examples of them. Ours is the compiled step of a Run (attention `cudnn`), with the next batch put on the device while a step runs, as `ptm
train` does; peers/torch_pretrain.py has the other side. The two run in turn as processes of their own (A B A B ...); figures are medians.

Utilisation is model FLOPs a second / dense bfloat16 peak (ptm/timing.py, MFU and PEAKS): three times those of the forward pass, `Run.forward_flops()`: matrix
products and attention over all keys, no discount for causal masks, for both sides alike. Before a line is added to benchmarks/results/gpu.jsonl it is checked
what was measured: that both are the same model (parameters) on the same GPU, of known peak; that both losses begin at ln(vocabulary), about, and fall; that
the fused kernels ran; that nothing was compiled while the clock ran; that rows are full. What fails is told, and not recorded.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/gpu.jsonl"
BATCHES, WARMUP, RATE = 8, 10, 3e-4
# Task -> rows of a batch on a GPU of 80 GB.
TASKS = {"gpt2": 32, "bert128": 256, "bert512": 64, "t5": 64}
FULL = 0.97  # of positions; the peer takes rows to be full


def make_config(task: str, *, rows: int, smoke: bool) -> Any:
    """The config of a task's run."""
    from ptm import config
    from ptm.config import Compute, Data, Mesh, Optimizer, Schedule, Tokenizer, Train
    from ptm.models import bert, gpt, t5
    from ptm.objectives import causal, mlm, span_corruption

    plain = {"dropout": 0.0, "attention_dropout": 0.0}
    small = {"num_layers": 2, "width": 64, "num_heads": 2}
    if task == "gpt2":
        length, pieces = (32, 512) if smoke else (1024, 50304)
        model, objective = gpt.Config(**small if smoke else gpt.SIZES["small"], **plain, max_length=length, vocab_size=pieces), causal.Config(boundaries=False)
    elif task.startswith("bert"):
        length, pieces = (32, 512) if smoke else (int(task.removeprefix("bert")), 30592)
        model, objective = bert.BertConfig(**small if smoke else bert.SIZES["base"], **plain, max_length=length, vocab_size=pieces), mlm.Config()
    else:
        length, inputs, pieces = (14, 64, 512) if smoke else (114, 512, 32128)
        shape = {**small, "head_dim": 32, "mlp_width": 256} if smoke else t5.SIZES["base"]
        model, objective = t5.Config(**shape, dropout=0.0, vocab_size=pieces), span_corruption.Config(input_length=inputs)
    sentinels = 100 if task == "t5" else 0
    return config.base(
        model=model, objective=objective, evals={}, train=Train(steps=1000, batch_size=rows), data=Data(length=length, packing="none"),
        tokenizer=Tokenizer(kind="wordpiece", vocab_size=pieces - sentinels, sentinels=sentinels),
        optimizer=Optimizer(learning_rate=RATE, weight_decay=0.1, b2=0.95, no_decay=()), schedule=Schedule(name="constant"), mesh=Mesh(data=1),
        compute=Compute(dtype="bfloat16", logits="bfloat16", attention="auto" if smoke else "cudnn", scan_layers=False, loss_chunk=2**20),
    )  # fmt: skip


def make_run(task: str, *, rows: int, overrides: list[str], smoke: bool) -> Any:
    """The run of a task, which reads no data: its vocabulary is stood in for."""
    import jax

    from ptm import config, registry
    from ptm import run as run_lib

    made = make_config(task, rows=rows, smoke=smoke)
    for entry in overrides:
        key, _, value = entry.partition("=")
        config.override(made, key, value, registry.REGISTRIES)
    return run_lib.setup(made, abstract=True, devices=jax.devices()[:1])


def make_batches(run: Any) -> dict[str, np.ndarray]:
    """BATCHES batches that the run's objective makes of random documents, each a row: arrays [BATCHES, rows, ...]."""
    from ptm.data.batch import Document, keyed_rng
    from ptm.data.pack import Layout, Row, stack

    objective, layout = run.objective, Layout(run.objective)
    ordinary = np.setdiff1d(np.arange(run.tokenizer.vocab_size), sorted(run.tokenizer.special_ids | set(run.tokenizer.sentinels)))
    shares = 1 / np.arange(1, len(ordinary) + 1)

    def row(number: int) -> dict[str, np.ndarray]:
        rng = keyed_rng("gpu", number)
        tokens = rng.choice(ordinary, objective.raw_length or 2 * objective.lengths["L"], p=shares / shares.sum()).astype(np.int32)
        made, made_row = next(iter(objective.features(Document(str(number), tokens), rng=rng, draw=None))), Row(layout)
        made_row.add(made, layout.sizes(made))
        return objective.finish(made_row.arrays)

    size = run.config.train.batch_size
    batches = [stack([row(size * batch + number) for number in range(size)]) for batch in range(BATCHES)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def peer_model(run: Any) -> dict[str, Any]:
    """What the peer must know of the model."""
    model, lengths = run.model.config, run.objective.lengths
    names = {
        "gpt": ("vocab_size", "num_layers", "width", "num_heads", "max_length", "norm_eps"),
        "bert": ("vocab_size", "num_layers", "width", "num_heads", "max_length", "num_types", "norm_eps"),
        "t5": ("vocab_size", "num_layers", "width", "num_heads", "mlp_width", "num_buckets", "max_distance", "norm_eps"),
    }[model.name]
    told = {"family": model.name, "mlp_width": 4 * model.width, "length": lengths["L"], **{name: getattr(model, name) for name in names}}
    return told | ({"inputs": lengths["I"]} if "I" in lengths else {})


def ours(run: Any, path: str, steps: int) -> dict[str, Any]:
    """Figures of the run's compiled step on the batches of a file."""
    import jax

    from ptm import compiles, tree

    batches = dict(np.load(path))
    size, events = run.config.train.batch_size, compiles.CompileEvents()
    state = run.init_state(run.init_params())
    losses, pending, start = [], None, 0.0
    for number in range(WARMUP + steps):
        if number == WARMUP:
            jax.block_until_ready(state)
            events.take()
            start = time.perf_counter()
        batch = run.to_device({name: values[number % BATCHES] for name, values in batches.items()}, batch_size=size, rows=list(range(size)))
        state, metrics = run.train_step(state, batch)
        if pending is not None:
            losses.append(float(pending))  # as the loop does: of the step before
        pending = metrics["loss"]
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    recompiled, device = len(events.take()), run.layout.mesh.devices.flat[0]
    memory = device.memory_stats() or {}
    text = run.train_step.lower(state, batch).compile().as_text()
    return {
        "step_ms": 1e3 * seconds / steps, "first_loss": losses[0], "last_loss": float(pending), "parameters": tree.size(run.abstract_params),
        "attention": sorted(set(re.findall(r'custom_call_target="([^"]*fmha[^"]*)"', text))), "recompiled": recompiled, "compiled": True,
        "peak_bytes": memory["peak_bytes_in_use"] if memory else None, "device": device.device_kind, "version": jax.__version__,
    }  # fmt: skip


def faults(found: dict[str, dict[str, Any]], *, about: dict[str, Any], smoke: bool) -> list[str]:
    """What was not measured as it should have been, by the last figures of both sides."""
    start, told = math.log(about["vocabulary"]), []
    for side, row in found.items():
        # Logits of a fresh model vary by at most 1 about their mean, which adds half of their variance.
        if not -0.1 < row["first_loss"] - start < 0.8:
            told.append(f"{side}: the first loss is {row['first_loss']:.3f}, ln(vocabulary) {start:.3f}")
        if not row["last_loss"] < row["first_loss"] - (0.0 if smoke else 0.5):
            told.append(f"{side}: the loss does not fall: {row['first_loss']:.3f}, {row['last_loss']:.3f}")
        if row["recompiled"]:
            told.append(f"{side}: {row['recompiled']} programs were compiled while the clock ran")
        if not smoke and not row["attention"]:
            told.append(f"{side}: no fused attention kernel ran")
        if not smoke and not row["compiled"]:
            told.append(f"{side}: it was not compiled")
        if not smoke and about["peak_flops"] is None:
            told.append(f"{side}: no peak is known of {row['device']}; add it to PEAKS in ptm/timing.py")
    if abs(found["ptm"]["first_loss"] - found["torch"]["first_loss"]) > 0.3:
        told.append("the two losses begin in different places")
    for key in ("parameters", "device"):
        if found["ptm"][key] != found["torch"][key]:
            told.append(f"{key}: {found['ptm'][key]} of ptm, {found['torch'][key]} of torch")
    if about["tokens"] < FULL * about["positions"]:
        told.append(f"{about['tokens']} of {about['positions']} positions hold tokens")
    return told


def measured(command: list[str], **env: str) -> dict[str, Any]:
    """The JSON object that a process prints last."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(task: str, flags: argparse.Namespace, scratch: str) -> tuple[dict[str, Any], list[str]]:
    """The line of a task, and what is wrong with it."""
    given = dict(entry.split("=") for entry in flags.rows.split(",") if entry)
    rows = 4 if flags.smoke else int({**TASKS, **given}[task])
    path, passed = f"{scratch}/{task}.npz", [f"--set={entry}" for entry in flags.set] + (["--smoke"] if flags.smoke else [])
    child = [sys.executable, __file__, f"--child={task}", f"--batches={path}", f"--child_rows={rows}", f"--steps={flags.steps}", *passed]
    # The process that makes the batches needs no GPU, and must not hold its memory.
    about = measured([*child, "--make"], JAX_PLATFORMS="cpu")
    peer = [
        sys.executable, str(ROOT / "benchmarks/peers/torch_pretrain.py"), f"--batches={path}", f"--model={json.dumps(about.pop('peer'))}",
        f"--steps={flags.steps}", f"--warmup={WARMUP}", f"--learning_rate={RATE}", *([] if flags.compile else ["--no-compile"]),
    ]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"ptm": [], "torch": []}
    for repeat in range(flags.repeats):
        found["ptm"].append(measured(child, XLA_PYTHON_CLIENT_MEM_FRACTION="0.92"))
        found["torch"].append(measured(peer))
        print(f"{task}, repeat {repeat}: " + ", ".join(f"{side} {rows[-1]['step_ms']:.2f} ms" for side, rows in found.items()), flush=True)
    last = {side: rows[-1] for side, rows in found.items()}
    about["peak_flops"] = peak = peak_of(last["ptm"]["device"])
    ms = {side: statistics.median(row["step_ms"] for row in rows) for side, rows in found.items()}
    line = {
        "benchmark": "gpu", "task": task, "rows": rows, **about, "steps": flags.steps,
        **{f"{side}_ms": [round(row["step_ms"], 3) for row in rows] for side, rows in found.items()},
        **{f"{side}_tokens_per_second": round(1e3 * about["tokens"] / value) for side, value in ms.items()},
        **{f"{side}_mfu": round(1e3 * about["model_flops"] / value / peak, 4) for side, value in ms.items() if peak},
        "ratio_ptm_to_torch": round(statistics.median(b["step_ms"] / a["step_ms"] for a, b in zip(found["ptm"], found["torch"])), 3),
        **{f"{side}_peak_gib": round(row["peak_bytes"] / 2**30, 2) for side, row in last.items() if row["peak_bytes"]},
        "last": {side: {key: row[key] for key in ("first_loss", "last_loss", "attention", "version")} for side, row in last.items()},
        "device": last["ptm"]["device"], "overrides": flags.set,
    }  # fmt: skip
    wrong = [problem for pair in zip(found["ptm"], found["torch"]) for problem in faults(dict(zip(("ptm", "torch"), pair)), about=about, smoke=flags.smoke)]
    return line, list(dict.fromkeys(wrong))


def peak_of(device: str) -> float | None:
    """Dense bfloat16 peak of a device, FLOPs a second."""
    from ptm import timing

    return timing.peak_flops(device)


def main() -> None:
    """Compares the tasks asked for and records what passes the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks, separated by commas")
    parser.add_argument("--rows", default="", help="rows of a batch, as gpt2=64,t5=32")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of a run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of our config")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile for the peer")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU; nothing is recorded")
    for name, kind in (("child", str), ("batches", str), ("child_rows", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of the processes that make batches and measure
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        run = make_run(flags.child, rows=flags.child_rows, overrides=flags.set + (["compute.attention=auto"] if flags.make else []), smoke=flags.smoke)
        if not flags.make:
            print(json.dumps(ours(run, flags.batches, flags.steps)))
            return
        batches = make_batches(run)
        np.savez(flags.batches, **batches)
        segments = [values[0] for name, values in batches.items() if "segments" in name]
        told = {"tokens": int(sum((values > 0).sum() for values in segments)), "positions": sum(values.size for values in segments), "peer": peer_model(run)}
        print(json.dumps({**told, "vocabulary": run.model.config.vocab_size, "model_flops": 3 * run.forward_flops()}))
        return
    if flags.smoke:
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import jax

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    refused = False
    with tempfile.TemporaryDirectory() as scratch:
        for task in flags.tasks.split(","):
            line, wrong = compare(task, flags, scratch)
            line |= {"time": time.strftime("%Y-%m-%d"), "commit": commit, "versions": {"jax": jax.__version__, "python": platform.python_version()}}
            print(json.dumps(line), flush=True)
            if wrong:
                refused = True
                print(f"{task} is not recorded:\n" + "\n".join(f"  {problem}" for problem in wrong), file=sys.stderr, flush=True)
            elif not flags.smoke:
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(line) + "\n")
    sys.exit(int(refused))


if __name__ == "__main__":
    main()

"""How a train step grows: with devices, processes, length, depth, width and batch; a small GPT by the real run, on the CPU.

    python benchmarks/scaling.py [--tables devices,processes,length,depth,width,batch]

devices: 1, 2, 4, 8 and 64 fake ones under four layouts: the loss after three steps, bytes of parameters and optimizer state and of the compiler's temporary
memory on a device, bytes that a device receives by collectives over each mesh axis in a step (read from the compiled program, ptm/plan/hlo.py).
processes: `ptm train` on four fake devices in one process, two of two and four of one, joined on this machine: the last loss and milliseconds of a step.
length: 512 to 32,768 positions in a batch, chunked attention, logits in chunks. depth, width, batch: as they say.
The last four have parameters, temporary memory, the compiled program's FLOPs and seconds to compile, and the median milliseconds of a step. Times are of the
cores that this process may use, which the rows tell, as they tell how busy the machine was before (`load`, of a minute); the first table has none, since
fake devices share the cores. Each row is measured in a process of its own, and a JSON line for it written to benchmarks/results/scaling.jsonl (an earlier
line of the same row is replaced).
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/scaling.jsonl"
RECIPE = f"{ROOT}/configs/quickstart.py:gpt"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DEVICES = (1, 2, 4, 8, 64)
COMMON = {"tokenizer.kind": "bytes", "model.vocab_size": 512, "data.streams": 1, "compute.scan_layers": "true"}
SMALL = COMMON | {"model.num_layers": 2, "model.width": 64, "model.num_heads": 2, "train.batch_size": 1}
# Layout -> its axes for a number of devices; None where it is none of its own there.
LAYOUTS = {
    "dp": lambda n: {"preset": "dp", "data": n},
    "fsdp": lambda n: {"preset": "fsdp", "data": 1, "fsdp": n} if n > 1 else None,
    "fsdp+tp": lambda n: {"preset": "fsdp+tp", "data": 1, "fsdp": n // 2, "tensor": 2} if n > 2 else None,
    "fsdp, lengths split": lambda n: {"preset": "fsdp", "data": 1, "fsdp": n // 2, "sequence": 2} if n > 2 else None,
}


def rows(table: str) -> list[tuple[dict[str, Any], dict[str, Any], int]]:
    """(what names a row, overrides of the recipe, fake devices) of the rows of a table that one process measures."""
    if table == "devices":
        own = COMMON | {"train.batch_size": 64, "model.max_length": 64, "data.length": 64, "model.num_heads": 4, "compute.loss_chunk": 1024}
        meshes = [(layout, count, mesh) for count in DEVICES for layout, of in LAYOUTS.items() if (mesh := of(count)) is not None]
        return [({"layout": layout, "devices": n}, own | {f"mesh.{axis}": size for axis, size in mesh.items()}, n) for layout, n, mesh in meshes]
    if table == "length":
        own = SMALL | {"compute.attention": "chunked", "compute.loss_chunk": 1024}
        return [({"length": n}, own | {"data.length": n, "model.max_length": n}, 1) for n in LENGTHS]
    changed = {
        "depth": [({"layers": n}, {"model.num_layers": n}) for n in (2, 4, 8, 16, 32)],
        "width": [({"width": n}, {"model.width": n, "model.num_heads": n // 32}) for n in (64, 128, 256, 512)],
        "batch": [({"rows": n}, {"train.batch_size": n}) for n in (4, 8, 16, 32, 64)],
    }
    own = SMALL | {"model.width": 128, "model.num_heads": 4, "model.max_length": 128, "data.length": 128, "train.batch_size": 8}
    return [(key, own | change, 1) for key, change in changed[table]]


def step(overrides: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """Figures of a run's compiled step: three steps of which the last one's loss is told, and as many more as fit into the seconds, nine at most, timed."""
    import jax

    from ptm import allocator, config, recipe, registry, tree
    from ptm import run as run_lib
    from ptm.plan import hlo, program

    allocator.keep_pages()  # as `ptm train` does
    made = recipe.load(RECIPE)
    for key, value in overrides.items():
        config.override(made, key, str(value), registry.REGISTRIES)
    run = run_lib.setup(made)
    state, size = run.init_state(run.init_params()), run.config.train.batch_size
    with contextlib.closing(run.loader()) as loader:
        batches = [run.to_device(next(loader), batch_size=size, rows=list(range(size))) for _ in range(3)]
    start = time.perf_counter()
    compiled = run.train_step.lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - start
    losses, times = [], []
    for number in range(12):
        start = time.perf_counter()
        state, metrics = compiled(state, batches[number % 3])
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
        if number >= 3 and sum(times) > seconds:
            break
    found, device = hlo.cost(compiled.as_text()), run.layout.mesh.devices.flat[0]
    moved: dict[str, int] = {}
    for entry in program.moved(found, run.layout.mesh):
        moved[entry.axes] = moved.get(entry.axes, 0) + entry.bytes
    return {
        "parameters": tree.size(run.abstract_params), "tokens": run.tokens_per_step(), "loss": losses[2],
        "state_bytes": sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.device == device),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes, "flops": found.flops, "collective_bytes": moved,
        "compile_seconds": round(compile_seconds, 2), "step_ms": round(1e3 * statistics.median(times[3:]), 2), "timed": len(times) - 3,
    }  # fmt: skip


def processes(count: int, steps: int) -> dict[str, Any]:
    """Figures of `ptm train` on four devices in some processes of this machine."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    own = {
        "train.steps": steps, "train.batch_size": 16, "mesh.preset": "fsdp", "mesh.data": 1, "mesh.fsdp": 4, "data.streams": 4, "log.every": 10,
        "evals.validation.every": steps, "evals.validation.batches": 1, "checkpoint.every": steps,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in {**COMMON, **own}.items()]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(4 // count)}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "ptm.cli", "train", f"--config={RECIPE}", f"--workdir={workdir}/run", *words]
        place = (lambda n: [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={n}"]) if count > 1 else lambda n: []
        children = [
            subprocess.Popen([*command, *place(n)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for n in range(count)
        ]
        told = [child.communicate()[1] for child in children]
        if any(child.returncode for child in children):
            raise SystemExit(f"{count} processes ended with {[child.returncode for child in children]}:\n{told[0][-2000:]}")
        read = {name: [json.loads(line) for line in (Path(workdir) / f"run/{name}.jsonl").read_text().splitlines()] for name in ("metrics", "timing")}
    losses = [row["loss"] for row in read["metrics"] if "loss" in row]
    timed = [row["step_time"] for row in read["timing"] if "step_time" in row and row["step"] > steps // 4]
    return {"first_loss": losses[0], "loss": losses[-1], "step_ms": round(1e3 * statistics.median(timed), 2)}


def measured(overrides: dict[str, Any], devices: int, seconds: float) -> dict[str, Any]:
    """`step` in a process of its own."""
    command = [sys.executable, __file__, f"--child={json.dumps(overrides)}", f"--seconds={seconds}"]
    # Without a cache, which would take the place of the compile time.
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(f"{overrides} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints and writes the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="devices,processes,length,depth,width,batch", help="tables, separated by commas")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the steps of a row; at least one step after three is timed")
    parser.add_argument("--steps", type=int, default=60, help="steps of the runs of several processes")
    parser.add_argument("--only", default="", help='rows whose name holds this text, such as "devices": 64')
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the process that measures: its overrides
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(step(json.loads(flags.child), seconds=flags.seconds)))
        return
    import jax

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    device = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} x {platform.machine()} CPU"
    about = {"time": time.strftime("%Y-%m-%d"), "commit": commit, "device": device, "versions": {"jax": jax.__version__, "python": platform.python_version()}}
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    for table in flags.tables.split(","):
        if table == "processes":
            jobs = [({"processes": count}, lambda count=count: processes(count, flags.steps)) for count in (1, 2, 4)]
        else:
            jobs = [(key, lambda given=(overrides, devices): measured(*given, flags.seconds)) for key, overrides, devices in rows(table)]
        for key, job in jobs:
            if flags.only not in json.dumps(key):
                continue
            row = {"table": table, **key}
            found = {"load": round(os.getloadavg()[0], 1)} | job()
            if table == "devices":  # that share the cores
                found = {name: value for name, value in found.items() if name not in ("load", "compile_seconds", "step_ms", "timed")}
            kept = [other for other in kept if {name: other.get(name) for name in row} != row] + [row | found | about]
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text("".join(json.dumps(line) + "\n" for line in kept))
            print("| " + " | ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in (row | found).values()) + " |", flush=True)


if __name__ == "__main__":
    main()

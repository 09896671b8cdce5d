"""Memory and time of attention by length: its gradient (loss, queries, keys, values) for one row of 4 heads of 64, causal and packed.

    python benchmarks/attention.py [--backends xla,chunked] [--lengths 512,1024,...,32768] [--timed 4096]
    python benchmarks/attention.py --topology=v5e:2x2 --backends splash,flash,chunked

Prints a table and writes one JSON line a backend and length to benchmarks/results/attention.jsonl (an earlier line of the same is replaced).
`temp_mib` is what the compiled program needs besides arguments and results (`memory_analysis().temp_size_in_bytes`); `ms` the median of 5 calls, for
lengths up to --timed, on the device at hand. With --topology the program is compiled for the first chip of a TPU that is not there (needs libtpu; see
docs/design.md), and nothing is timed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ptm import config, parallel
from ptm.nn.attention import attend
from ptm.nn.context import Context
from ptm.nn.masks import self_mask

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/attention.jsonl"
HEADS, WIDTH, DOCUMENT = 4, 64, 1000
QUADRATIC_TO = 8192  # tokens; longer matrices of logits do not fit a laptop


def compiled(backend: str, length: int, device: jax.Device, dtype: str) -> Any:
    """The compiled gradient of a causal call over packed documents."""
    layout = parallel.make_layout(config.Mesh(data=1), devices=[device])
    context = Context(layout, attention=backend)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments_BL: jax.Array) -> jax.Array:
        out = attend(q, k, v, context=context, mask=self_mask("causal", {"segments_BL": segments_BL}), scale=WIDTH**-0.5)[0]
        return jnp.sum(out.astype(jnp.float32))

    whole = layout.replicated()
    array = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), dtype, sharding=whole)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(array, array, array, segments).compile()


def median_ms(program: Any, length: int, dtype: str) -> float:
    """Median of 5 calls after one to warm up."""
    arrays = [jax.random.normal(jax.random.key(n), (1, length, HEADS, WIDTH), dtype) for n in range(3)]
    segments = (jnp.arange(length, dtype=jnp.int32) // DOCUMENT + 1)[None]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays, segments))
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 2)


def main() -> None:
    """Measures what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="xla,chunked", help="backends, separated by commas")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768", help="tokens, separated by commas")
    parser.add_argument("--timed", type=int, default=4096, help="longest length that is also timed")
    parser.add_argument("--topology", default="", help="a TPU to compile for, as v5e:2x2")
    parser.add_argument("--dtype", default="", help="type of queries, keys and values; default float32 on CPU, else bfloat16")
    flags = parser.parse_args()
    if flags.topology:
        device = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology, wrap=(False,) * 3, num_slices=1).devices[0]
        name = f"{flags.topology} ({device.device_kind}), compiled only"
    else:
        device = jax.devices()[0]
        name = f"{os.cpu_count()} x {platform.machine()} CPU" if device.platform == "cpu" else device.device_kind
    dtype = flags.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {"time": time.strftime("%Y-%m-%d"), "commit": commit, "device": name, "versions": {"jax": jax.__version__, "python": platform.python_version()}}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    print(f"{name}, {dtype}, 1 row, {HEADS} heads of {WIDTH}: MiB of temporaries (ms)")
    for backend in flags.backends.split(","):
        for length in map(int, flags.lengths.split(",")):
            if backend == "xla" and length > QUADRATIC_TO:
                continue
            program = compiled(backend, length, device, dtype)
            temp_mib = round(program.memory_analysis().temp_size_in_bytes / 2**20, 2)
            ms = median_ms(program, length, dtype) if not flags.topology and length <= flags.timed else None
            print(f"{backend:8} {length:6} {temp_mib:10.2f} MiB" + (f" {ms:9.2f} ms" if ms is not None else ""), flush=True)
            key = {"benchmark": "attention", "backend": backend, "length": length, "dtype": dtype, "device": name}
            rows = [row for row in rows if any(row[part] != value for part, value in key.items())]
            rows.append(key | {"temp_mib": temp_mib, "ms": ms} | about)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

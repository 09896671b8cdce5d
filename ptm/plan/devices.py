"""Devices that are not there: descriptions of TPU and GPU topologies to compile for, or fake CPU devices."""

import contextlib
import importlib.util
import math
import os
from importlib import metadata
from typing import NamedTuple

import jax
from jax.experimental import topologies

from ptm.fields import ConfigError
from ptm.plan.options import Topology

# libtpu looks for the machine that it runs on, and holds a lock file: neither is of use where nothing is run.
TPU_ENVIRONMENT = {
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"
}  # fmt: skip
# What the CUDA compiler wants to know of an H100 SXM (NVIDIA H100 data sheet; CUDA C programming guide, technical specifications of compute capability 9.0).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPUS_OF_A_HOST = 8


class Devices(NamedTuple):
    """Devices to compile for, what compiles for them, and what is other than was asked for."""

    devices: list
    compiler: str
    note: str = ""


def devices_of(topology: Topology) -> Devices:
    """The devices of a topology: fake CPU devices where its compiler is not installed. Raises ConfigError where even these cannot be had."""
    jax.config.update("jax_platforms", "cpu")
    if topology.platform != "cpu":
        jax.config.update("jax_enable_compilation_cache", False)  # programs that nothing here can run cannot be read back
    if topology.platform == "tpu" and _installed("libtpu"):
        return Devices(_tpus(topology), f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}")
    if topology.platform == "gpu" and (compiler := cuda_compiler()):
        return Devices(_gpus(topology), f"jax {jax.__version__}, " + ", ".join(f"{name} {metadata.version(name)}" for name in compiler))
    compiler, note = f"jax {jax.__version__}, CPU", ""
    if topology.platform != "cpu":
        extra = "plan" if topology.platform == "tpu" else "plan_gpu"
        note = f"the compiler of {topology.kind} is not installed (extra {extra}: pip install -e '.[{extra}]'): compiled for fake CPU devices, which have other kernels and buffers, so nothing here says that it fits"
    return Devices(_cpus(topology.chips), compiler, note)


def cuda_compiler() -> tuple[str, ...]:
    """The packages that compile for GPUs here, of the newest CUDA that has them all; without cuDNN fused attention cannot even be traced."""
    ways = ((f"jax-cuda{cuda}-pjrt", f"nvidia-cudnn-cu{cuda}") for cuda in (13, 12))
    return next((names for names in ways if all(map(_distributed, names))), ())


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _distributed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _tpus(topology: Topology) -> list:
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    padded = (*topology.shape, *[1] * (3 - len(topology.shape)))
    options = {"chips_per_host_bounds": (1, 1, 1) if math.prod(padded) == 1 else (2, 2, 1), "wrap": topology.wrap, "num_slices": topology.slices}
    if topology.kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # two cores that are one device
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ConfigError(f"--topology={topology.name}: the compiler knows no such topology ({str(error).splitlines()[0]}). Choose another, such as v5p:4x4x4.") from None


def _gpus(topology: Topology) -> list:
    count = topology.shape[0]
    hosts = -(-count // GPUS_OF_A_HOST)
    if count % hosts:
        raise ConfigError(f"--topology={topology.name}: hosts have {GPUS_OF_A_HOST} GPUs; give up to {GPUS_OF_A_HOST}, or a multiple of it.")
    return list(
        topologies.get_topology_desc(platform="cuda", topology_name=topology.kind, target_config=H100, topology=f"{hosts}x1x{count // hosts}").devices
    )


def _cpus(count: int) -> list:
    with contextlib.suppress(RuntimeError):  # a process that has its devices already keeps them
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"this process has {len(devices)} CPU devices, {count} are needed: start a new one, where nothing has run on JAX yet.")
    return devices[:count]

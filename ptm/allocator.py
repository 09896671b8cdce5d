"""How the C library's allocator treats the large buffers that each step on CPU takes and gives back."""

import ctypes
import importlib.metadata
import importlib.util
import os

# Of malloc.h of the GNU C library: parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_TOP_BYTES = 64 << 20  # taken from the system at a time


def on_cpu() -> bool:
    """Whether JAX is going to run on CPU, as far as can be told before it starts."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_pages() -> bool:
    """Lets freed memory stay with the process; for entry points, before JAX starts its threads. Returns whether the C library took it (GNU's does).

    By default every buffer above some MiB is mapped for its step and unmapped after it, and the system clears each of its pages anew: 5 to 15 % of a step
    of a small model on CPU. The price is that a peak of memory is given back to the system only when the process ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None  # elsewhere the process itself is no library
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _TOP_BYTES))
    taken = [mallopt(parameter, value) for parameter, value in settings]  # each, even where one is refused
    return all(taken)

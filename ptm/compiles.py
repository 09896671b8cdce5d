"""What is compiled while a run goes on: how long it took, whether the persistent cache had it, and why it was not there already.

JAX tells of compilations by events that name a function and nothing else. The programs of a run are made by `jit` here, which remembers the shapes that each
was compiled for, so that the next time can be explained: by what is other than in the call before that is nearest to it.
"""

import contextvars
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

FIRST = "first call"
SHOWN = 3  # differences that a reason names
COMPILED, ASKED, HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"


class Compiled(NamedTuple):
    """A compilation: the function's name, seconds (those of a load, if the cache had it), and its reason, "" for one that `jit` here did not make."""

    function: str
    seconds: float
    cached: bool
    reason: str

    @property
    def again(self) -> bool:
        """Whether the program was there for other arguments."""
        return self.reason not in ("", FIRST)

    def row(self) -> dict[str, Any]:
        """As it stands in compiles.jsonl."""
        return {"function": self.function, "seconds": round(self.seconds, 4), "cached": self.cached, "reason": self.reason}


class Jit:
    """A function compiled by `jax.jit` for each form of its arguments, which remembers these forms. It costs nothing while nothing is compiled."""

    def __init__(self, function: Callable[..., Any], *, arguments: tuple[str, ...], **options: Any) -> None:
        """`arguments` are the names of the positional arguments in what is told of them; `options` are those of `jax.jit`."""
        self.compiled = jax.jit(function, **options)
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        self.name, self._arguments, self._seen = inner.__name__, arguments, []

    def __call__(self, *args: Any) -> Any:
        token = _call.set((self, args))
        try:
            return self.compiled(*args)
        finally:
            _call.reset(token)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As of a function compiled by `jax.jit`."""
        return self.compiled.lower(*args)

    def explain(self, args: tuple) -> str:
        """Why these arguments needed a compilation, which is noted."""
        form = {
            f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/"): _form(leaf)
            for name, value in zip(self._arguments, args, strict=True)
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
        }
        reason = min((_differences(form, other) for other in reversed(self._seen)), key=len, default=[FIRST])
        self._seen.append(form)
        if not reason:
            return "arguments of the same shapes that lie elsewhere, or other settings of JAX"
        return "; ".join(reason[:SHOWN]) + (f"; {len(reason) - SHOWN} more" if len(reason) > SHOWN else "")


_call: contextvars.ContextVar[tuple[Jit, tuple] | None] = contextvars.ContextVar("call", default=None)


def jit(function: Callable[..., Any], *, arguments: tuple[str, ...], **options: Any) -> Jit:
    """`jax.jit(function, **options)` whose compilations are explained; `arguments` name the positional arguments, of which it takes no others."""
    return Jit(function, arguments=arguments, **options)


def _form(leaf: Any) -> str:
    array = jax.typeof(leaf)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]" + (" (weak)" if array.weak_type else "")


def _differences(form: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What is not in a form as it was in another."""
    changed = [f"{path} {form[path]}, was {other[path]}" for path in form if path in other and form[path] != other[path]]
    return changed + [f"{path} {form[path]} is new" for path in form if path not in other] + [f"{path} is gone" for path in other if path not in form]


class CompileEvents:
    """Counts compilations, their seconds and the persistent cache's hits and misses in this process, and collects them, from creation to `close`."""

    def __init__(self) -> None:
        self._compiles, self._seconds, self._asked, self._hits, self._hits_before = 0, 0.0, 0, 0, 0
        self._found: list[Compiled] = []
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)

    def _event(self, event: str, **_: str | int) -> None:
        self._asked += event == ASKED
        self._hits += event == HIT

    def _duration(self, event: str, seconds: float, fun_name: str = "", **_: str | int) -> None:
        seconds = max(0.0, seconds)  # JAX goes by a clock that may be set back
        if event != COMPILED:
            return
        self._compiles += 1
        self._seconds += seconds
        name = fun_name.removeprefix("jit").strip("(_)")
        call = _call.get()
        # While a program is traced, small ones of other names are compiled.
        reason = call[0].explain(call[1]) if call is not None and call[0].name.strip("_") == name else ""
        self._found.append(Compiled(name, seconds, self._hits > self._hits_before, reason))
        self._hits_before = self._hits

    def take(self) -> list[Compiled]:
        """What was compiled since the last call."""
        found, self._found = self._found, []
        return found

    def totals(self) -> dict[str, float]:
        """compiles and compile_seconds (XLA's part, loads from the cache included), cache_hits, cache_misses (asked for and not found)."""
        # jax's own event of a miss is sent only if the result is worth storing.
        misses = self._asked - self._hits
        return {"compiles": self._compiles, "compile_seconds": self._seconds, "cache_hits": self._hits, "cache_misses": misses}

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._duration)

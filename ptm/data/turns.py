"""Branches of a mixture that take turns batch by batch: whose turn a step is, and one loader each behind the interface of one."""

from collections.abc import Iterator, Sequence
from typing import Any

from ptm.data.batch import keyed_rng
from ptm.data.loader import Counts, Drawn, Loader
from ptm.data.pipeline import Batch, State


def turn(step: int, *, seed: int, weights: Sequence[float]) -> int:
    """Number of the branch whose turn a step is: drawn by weight, a pure function of (seed, step)."""
    return int(keyed_rng("turn", seed, step).choice(len(weights), p=[weight / sum(weights) for weight in weights]))


def branch_seed(seed: int, name: str) -> int:
    """The seed of a branch's data, so that branches read the documents in orders of their own; that of the run where there is one branch, without name."""
    return int(keyed_rng("branch", seed, name).integers(2**31)) if name else seed


class Turns(Iterator[Batch]):
    """Batch t is the next one of the branch whose turn step t is, and so a pure function of (data, seed, t), as the batches of each branch are.

    The state of a logical stream is the step and the states of all branches' streams of this number.
    """

    def __init__(self, loaders: dict[str, Loader], *, weights: Sequence[float], positions: Sequence[int], seed: int) -> None:
        """`loaders` of the branches, by name, have the same batch size, logical streams and rows; rows of branch n have `positions[n]` positions."""
        self._loaders, self._weights, self._positions, self._seed, self._step = loaders, tuple(weights), tuple(positions), seed, 0

    def __next__(self) -> Batch:
        batch = next(list(self._loaders.values())[turn(self._step, seed=self._seed, weights=self._weights)])
        self._step += 1
        return batch

    def require(self, steps: int) -> None:
        """As of a Loader, for batches that take turns: nothing ends, since their sources have no limits (ptm.run.setup)."""

    def state(self) -> dict[int, State]:
        """For each logical stream of this host its JSON-ready state after the last batch handed out."""
        states = {name: loader.state() for name, loader in self._loaders.items()}
        return {p: {"step": self._step, "branches": {name: state[p] for name, state in states.items()}} for p in next(iter(states.values()))}

    def restore(self, states: dict[Any, State]) -> None:
        """Goes on where `states` were taken: at least this host's streams, by number."""
        for name, loader in self._loaders.items():
            loader.restore({p: state["branches"][name] for p, state in states.items()})
        self._step = next(iter(states.values()))["step"]

    def drawn(self) -> tuple[str, Drawn]:
        """What the last batch handed out is made of, for `record_ids`."""
        name = list(self._loaders)[turn(self._step - 1, seed=self._seed, weights=self._weights)]
        return name, self._loaders[name].drawn()

    def record_ids(self, drawn: tuple[str, Drawn]) -> list[str]:
        """Ids of the records that the rows of this host in a batch are made of."""
        name, of_branch = drawn
        return self._loaders[name].record_ids(of_branch)

    def counts(self) -> Counts:
        """For each branch the counts of its loader, ready for JSON."""
        return {name: loader.counts() for name, loader in self._loaders.items()}

    def stats(self, counts: Sequence[Counts] | None = None) -> dict[str, float]:
        """Figures of all branches as Loader gives them, each branch's as NAME/FIGURE, and share/NAME, its share of all positions that are filled."""
        counts = [self.counts()] if counts is None else counts
        stats = {name: loader.stats([host[name] for host in counts]) for name, loader in self._loaders.items()}
        made = {name: counts["rows"] * size for (name, counts), size in zip(stats.items(), self._positions)}
        filled = {name: size * (1 - stats[name]["padding_share"]) for name, size in made.items()}
        total = {
            "rows": sum(counts["rows"] for counts in stats.values()),
            "tokens": sum(counts["tokens"] for counts in stats.values()),
            "epoch": max(counts["epoch"] for counts in stats.values()),
            "padding_share": 1 - sum(filled.values()) / max(sum(made.values()), 1),
            "bad_records": len({tuple(bad) for host in counts for branch in host.values() for stream in branch.values() for bad in stream["bad"]}),
        }
        total |= {f"share/{name}": size / max(sum(filled.values()), 1) for name, size in filled.items()}
        return total | {f"{name}/{key}": value for name, counts in stats.items() for key, value in counts.items()}

    def bad_records(self) -> list[str]:
        """'ID: reason' of the bad records that any branch met."""
        return sorted({record for loader in self._loaders.values() for record in loader.bad_records()})

    def close(self) -> None:
        """Stops the threads; no batch can be taken afterwards."""
        for loader in self._loaders.values():
            loader.close()

"""One HTML page, which needs nothing but itself, in which a person looks at attention over texts."""

import base64
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from ptm import page
from ptm.analysis import attention, maps
from ptm.analysis.maps import FIGURES, View

ONE = 65535  # the integer that stands for a weight of 1


def render(texts: Sequence[tuple[str, Sequence[View]]], *, title: str, about: str) -> str:
    """The page of some texts with their views; `about` is a line on the model."""
    template = resources.files("ptm.analysis").joinpath("page.html").read_text(encoding="utf-8")
    data = {"about": about, "figures": FIGURES, "texts": [{"text": text, "views": list(map(_view, views))} for text, views in texts]}
    return page.render(template, title=title, data=data)


def _view(view: View) -> dict[str, Any]:
    layers, heads = view.maps_NHLT.shape[:2]
    special = {"keys": view.special_T.tolist(), "queries": view.special_T.tolist() if view.square else [False] * len(view.queries)}
    flow = maps.flow(view)
    return {
        "name": view.name, "queries": view.queries, "keys": view.keys, "special": special, "layers": layers, "heads": heads,
        "figures": {name: [[float(x) if np.isfinite(x) else None for x in row] for row in values] for name, values in maps.figures(view).items()},
        "maps": {
            "head": _packed(view.maps_NHLT), "mean": _packed(view.maps_NHLT.mean(axis=1)),
            "rollout": _packed(attention.rollout(view.maps_NHLT)) if view.square else None, "flow": None if flow is None else _packed(flow),
        },
    }  # fmt: skip


def _packed(weights: np.ndarray) -> dict[str, Any]:
    """Weights as integers of 16 bits, of which ONE is 1, low byte first, in base64."""
    integers = np.rint(np.clip(weights, 0, 1) * ONE).astype("<u2")
    return {"shape": list(weights.shape), "data": base64.b64encode(integers.tobytes()).decode()}

"""Figures of attention maps, as pure functions of arrays.

A map is [..., L, T]: for each of L queries the weights of T keys, which sum to 1. Maps have no padding here. What the weights mean for what a model does is
disputed (Jain and Wallace 2019; Wiegreffe and Pinter 2019): they say where a head looks, not why an output is what it is.
"""

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

CAPACITY = 1 << 24  # of an edge of weight 1: flows are computed in integers


def entropy(maps: np.ndarray) -> np.ndarray:
    """Entropy of each query's weights, nats, [..., L]: 0 = one key has all, log T = all keys have the same (Clark et al. 2019, section 3.3)."""
    maps = np.asarray(maps, np.float64)
    return -np.sum(maps * np.log(np.where(maps > 0, maps, 1.0)), axis=-1)


def distance(maps: np.ndarray) -> np.ndarray:
    """Mean distance between each query and its keys, tokens, [..., L]: sum of weight x |query - key| (Vig and Belinkov 2019, section 4.2).

    For self-attention alone: queries and keys must be the same tokens.
    """
    maps = _square(maps)
    index = np.arange(maps.shape[-1])
    return np.sum(maps * np.abs(index[:, None] - index), axis=-1)


def share(maps: np.ndarray, keys_T: np.ndarray) -> np.ndarray:
    """Share of each query's weight, 0 to 1, that goes to the marked keys (special tokens, say), [..., L] (Clark et al. 2019, section 3.2)."""
    return np.sum(np.asarray(maps, np.float64) * np.asarray(keys_T, bool), axis=-1)


def at_offset(maps: np.ndarray, offset: int) -> np.ndarray:
    """Mean weight, 0 to 1, on the key that stands `offset` tokens behind the query, [...]; queries without such a key do not count (Clark et al. 2019,
    section 3.1).

    -1 is the previous token, 0 the token itself, 1 the next one. NaN where no query has such a key.
    """
    diagonal = np.diagonal(_square(maps), offset=offset, axis1=-2, axis2=-1)
    return np.mean(diagonal, axis=-1) if diagonal.shape[-1] else np.full(diagonal.shape[:-1], np.nan)


def with_residual(maps_NHLL: np.ndarray) -> np.ndarray:
    """Mean map of each layer's heads, halved with the identity that stands for the residual connection: [N, L, L] (Abnar and Zuidema 2020, section 3)."""
    mean_NLL = np.mean(_square(maps_NHLL), axis=1)
    return 0.5 * mean_NLL + 0.5 * np.eye(mean_NLL.shape[-1])


def rollout(maps_NHLL: np.ndarray) -> np.ndarray:
    """Attention rollout [N, L, L]: how much of each input token reaches each position of layer n, if attention weights were the shares in which information
    is mixed (Abnar and Zuidema 2020, section 3, equation 1).

    Each layer's `with_residual` times the rollout of the layer below. Rows sum to 1.
    """
    layers_NLL = with_residual(maps_NHLL)
    rolled = [layers_NLL[0]]
    for layer_LL in layers_NLL[1:]:
        rolled.append(layer_LL @ rolled[-1])
    return np.stack(rolled)


def flow(maps_NHLL: np.ndarray) -> np.ndarray:
    """Attention flow [L, L]: the maximum flow from each position of the last layer to each input token through edges whose capacities are `with_residual`
    (Abnar and Zuidema 2020, section 3).

    Exact but for capacities rounded to 2**-24. Rows need not sum to 1: each entry is a flow of its own. It takes L x L maximum flows, which is for
    sentences, not for documents.
    """
    layers_NLL = with_residual(maps_NHLL)
    layers, length, _ = layers_NLL.shape
    # Node (n, i), n counted from the input, has the number n * length + i; an edge leads from a position to those of the layer below.
    above, below = np.meshgrid(np.arange(length), np.arange(length), indexing="ij")
    starts = np.concatenate([(n + 1) * length + above.ravel() for n in range(layers)])
    ends = np.concatenate([n * length + below.ravel() for n in range(layers)])
    capacities = np.rint(layers_NLL * CAPACITY).astype(np.int32).ravel()
    nodes = (layers + 1) * length
    graph = sparse.csr_array((capacities, (starts, ends)), shape=(nodes, nodes))
    flows = [[csgraph.maximum_flow(graph, layers * length + top, token).flow_value for token in range(length)] for top in range(length)]
    return np.array(flows, np.float64) / CAPACITY


def _square(maps: np.ndarray) -> np.ndarray:
    maps = np.asarray(maps, np.float64)
    assert maps.shape[-2] == maps.shape[-1], f"queries and keys must be the same tokens, but the map is {maps.shape[-2]} x {maps.shape[-1]}"
    return maps

"""Attention through several layers: rollout and flow, and the trace of a bag that a transformer leaves.

Abnar and Zuidema, Quantifying attention flow in transformers, ACL 2020, https://arxiv.org/abs/2005.00928. Both follow
where the tokens of the last layer come from, through attention maps that are averaged over heads and mixed half and
half with the identity for the residual path. Neither looks at values, feed-forward layers or classes: what comes out is
where information may have come from, not what it counted for.

Other ways to fuse heads (their largest, their smallest) and to discard low weights are not in the paper: whoever wants
them passes maps that were made so, whose rows are normalised here.

A `Trace` carries the weights with which a bag is read out down to its tiles without an n × n matrix: a forward pass is
listened to (`inputs_of`), and each method says in its own file (`Aggregator.trace`) which factors its layers have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]
RowStep = Callable[[Floats], Floats]
"""A row r (t,) of weights to ``r @ A``."""

FLOW_UNIT = 2**30  # of capacity 1, in scipy's whole numbers of 32 bits
MAX_FLOW_TOKENS = 400
ROWS_PER_STEP = 16_384


def with_residual(attention: Floats) -> Floats:
    """Return attention (m, m) mixed with the identity, half and half where its rows sum to 1 as those returned do."""
    mixed = _square(attention) + np.eye(len(attention))
    return np.asarray(mixed / mixed.sum(axis=1, keepdims=True))


def rollout(attention: Sequence[Floats], *, residual: Literal["half", "none"] = "half") -> list[Floats]:
    """Multiply the attention of the layers, input side first.

    Parameters
    ----------
    attention : sequence of (m, m) float
        One map per layer, averaged over heads, rows summing to 1: row i says where token i looks.
    residual : {"half", "none"}
        Whether each map is mixed with the identity.

    Returns
    -------
    list of (m, m) float64
        After each layer; rows are output tokens, columns input tokens, rows sum to 1.

    Raises
    ------
    ValueError
        If a map is not square, as those of each head are not.
    """
    layers = [with_residual(layer) if residual == "half" else _square(layer) for layer in attention]
    products = layers[:1]
    for layer in layers[1:]:
        products.append(layer @ products[-1])
    return products


def rollout_row(token: Floats, layers: Sequence[RowStep]) -> Floats:
    """Return one row of the rollout without any n × n matrix.

    Parameters
    ----------
    token : (n,) float
        How much of each token of the last layer is asked about: 1 at the class token, or the weights of a pooling.
    layers : sequence of callables
        Input side first; each takes a row r (n,) and returns ``r @ A`` for the attention A of the layer, held whole or
        as factors (inducing points: ``(r @ A1) @ A0``; Nyström: three factors).

    Returns
    -------
    (n,) float64
        Non-negative and summing to 1. Approximate attention may have negative entries; they are cut to 0.
    """
    row = np.asarray(token, dtype=np.float64)
    for layer in reversed(layers):
        row = 0.5 * row + 0.5 * np.maximum(layer(row), 0)
        row = row / row.sum()
    return np.asarray(row)


def flow(attention: Sequence[Floats]) -> Floats:
    """Return the maximum flow from each token of the last layer to each input token.

    Parameters
    ----------
    attention : sequence of (m, m) float
        As for `rollout`; the residual is mixed in.

    Returns
    -------
    (m, m) float64
        Rows sum to 1. Each pair is a maximum-flow problem of its own over all layers.

    Raises
    ------
    ValueError
        If there are more than 400 tokens, use groups of tiles or `rollout`; or if a map is not square.
    """
    layers = [with_residual(layer) for layer in attention]
    tokens = len(layers[0])
    if tokens > MAX_FLOW_TOKENS:
        raise ValueError(
            f"attention flow is limited to {MAX_FLOW_TOKENS} tokens, because it solves one "
            f"problem per pair of tokens; found {tokens}"
        )
    capacity = _flow_graph(layers, tokens)
    whole = (capacity * FLOW_UNIT).rint().astype(np.int32)
    top = len(layers) * tokens
    flows = np.array([[_largest_flow(capacity, whole, top + i, j) for j in range(tokens)] for i in range(tokens)])
    return np.asarray(flows / flows.sum(axis=1, keepdims=True))


def _flow_graph(layers: Sequence[Floats], tokens: int) -> "scipy.sparse.csr_array":
    """Edges from token i of layer l to token j of the layer below."""
    rows, columns = np.indices((tokens, tokens)).reshape(2, -1)
    starts = np.concatenate([(layer + 1) * tokens + rows for layer in range(len(layers))])
    ends = np.concatenate([layer * tokens + columns for layer in range(len(layers))])
    capacities = np.concatenate([layer.ravel() for layer in layers])
    size = (len(layers) + 1) * tokens
    return scipy.sparse.coo_array((capacities, (starts, ends)), shape=(size, size)).tocsr()


def _largest_flow(capacity: "scipy.sparse.csr_array", whole: "scipy.sparse.csr_array", source: int, sink: int) -> float:
    """Return the capacity of the smallest cut, which the flow in whole numbers finds."""
    left = whole - scipy.sparse.csgraph.maximum_flow(whole, source, sink).flow
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    inside = np.zeros(whole.shape[0], dtype=bool)
    inside[scipy.sparse.csgraph.breadth_first_order(left, source, return_predecessors=False)] = True
    return float(capacity[inside][:, ~inside].sum())


def _square(attention: Floats) -> Floats:
    values = np.asarray(attention, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"a map of attention must be (m, m), the mean over heads; found {values.shape}")
    return values


@dataclass(frozen=True, eq=False)
class Trace:
    """What a rollout follows.

    Parameters
    ----------
    start : (t,) float64
        Weights with which the tokens of the last layer are read out.
    layers : sequence of callables
        Input side first; each returns ``r @ A`` of a row r (t,).
    to_tiles : callable
        From a row of tokens (t,) to tiles (n,).
    """

    start: Floats
    layers: Sequence[RowStep]
    to_tiles: RowStep

    def row(self) -> Floats:
        """Return the rollout of the slide's representation to its tiles, (n,) non-negative with sum 1."""
        tiles = self.to_tiles(rollout_row(self.start, self.layers))
        return np.asarray(tiles / tiles.sum())


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[list[Any]]]:
    """Collect, for each module, the first argument of every call while the block runs."""
    seen: list[list[Any]] = [[] for _ in modules]

    def listen(place: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[place].append(arguments[0])

    handles = [module.register_forward_pre_hook(partial(listen, place)) for place, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gather_row(
    row: Floats,
    values: Tensor,
    project: Callable[[Tensor], Tensor],
    keys: Tensor,
    *,
    scale: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Return ``Σ_n r_n softmax_m(q_n k_m)`` for tokens that read m others, (m, H), in steps that bound memory.

    Parameters
    ----------
    row : (n,) float64
    values : (n, E)
        Tokens.
    project : callable
        Tokens (c, E) to queries (c, H · d).
    keys : (m, H, d)
    scale : float
    counts : (m,) bool or float, optional
        How many equal keys each one stands for; 0 for none.
    """
    total = keys.new_zeros(keys.shape[:2])
    weights = torch.from_numpy(row).to(keys)
    for part, share in zip(torch.split(values, ROWS_PER_STEP), torch.split(weights, ROWS_PER_STEP), strict=True):
        scores = torch.einsum("nhd,mhd->nmh", by_head(project(part), keys.shape[1]), keys) * scale
        if counts is not None:
            scores = scores + counts.to(scores.dtype).log()[:, None]
        total += torch.einsum("n,nmh->mh", share, scores.softmax(1))
    return total


def by_head(values: Tensor, heads: int) -> Tensor:
    """Return the part of each head, (..., H, d), of values (..., H · d)."""
    split: Tensor = torch.unflatten(values, -1, (heads, -1))
    return split


def project_third(qkv: nn.Linear, third: int, values: Tensor) -> Tensor:
    """Return the queries (0), keys (1) or values (2) of a joint projection."""
    width = qkv.out_features // 3
    chosen = slice(third * width, (third + 1) * width)
    bias = None if qkv.bias is None else qkv.bias[chosen]
    return torch.nn.functional.linear(values, qkv.weight[chosen], bias)

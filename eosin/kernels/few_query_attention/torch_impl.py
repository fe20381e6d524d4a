"""Attention between a bag and a few vectors by blocks of rows: no map and no projection outlives its block.

Queries read a bag as in attention pooling: every block is scored and merged into a running (m, l, Z) per bag, head and
query, and the backward pass scores it again. A block is projected, read and forgotten. The way back, from instances to
few keys, has no state: a block needs nothing of others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eosin.kernels._bags import NEVER
from eosin.kernels._checks import accumulation_dtype, host_offsets
from eosin.kernels._products import affine, product, transposed_product
from eosin.kernels.gated_attention.torch_impl import pieces

ROWS, GPU_ROWS = 2048, 16384  # rows per block


@dataclass(frozen=True)
class Projection:
    """What makes keys and values of a block of rows: (E, D) and (F, D), or nothing when the rows are both."""

    k_weight: Tensor | None
    v_weight: Tensor | None
    heads: int

    @classmethod
    def make(cls, k_weight: Tensor | None, v_weight: Tensor | None, heads: int, dtype: torch.dtype) -> "Projection":
        """Return the projection by weights in any type."""
        keys, values = (None if weight is None else weight.to(dtype) for weight in (k_weight, v_weight))
        return cls(keys, values, heads)

    def width_of(self, values: Tensor) -> int:
        """Return the width of what a head reads."""
        return values.shape[1] if self.v_weight is None else len(self.v_weight) // self.heads

    def apply(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of each head: (n, D) -> (n, E / H), (n, F / H)."""
        if self.k_weight is None or self.v_weight is None:
            return [(rows, rows)]
        keys, values = affine(rows, self.k_weight), affine(rows, self.v_weight)
        return list(zip(keys.chunk(self.heads, 1), values.chunk(self.heads, 1), strict=True))


class ReadState:
    """Running (m, l, Z) of every bag, head and query."""

    def __init__(self, n_bags: int, query: Tensor, width: int) -> None:
        heads, n_queries, _ = query.shape
        self.top = query.new_full((n_bags, heads, n_queries), NEVER)
        self.total = query.new_zeros(n_bags, heads, n_queries)
        self.read = query.new_zeros(n_bags, heads, n_queries, width)

    def add(self, bag: int, head: int, scores: Tensor, values: Tensor) -> None:
        """Merge rows of one bag: (n, M), (n, f)."""
        place = (bag, head)
        old = self.top[place].clone()
        top = torch.maximum(old, scores.amax(0))
        weights = scores.sub_(top).exp_()
        shrink = (old - top).exp_()
        self.total[place] = self.total[place] * shrink + weights.sum(0)
        part = transposed_product(weights.to(values.dtype), values)
        self.read[place].mul_(shrink[:, None]).add_(part)
        self.top[place] = top

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return what was read (B, H, M, f) and the log-sum-exp (B, H, M)."""
        seen = self.total > 0
        total = torch.where(seen, self.total, 1)
        return self.read / total[..., None], torch.where(seen, self.top + total.log(), NEVER)


def read_forward(
    query: Tensor, values: Tensor, projection: Projection, cu_seqlens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what queries (H, M, e) read (B, H, M, f) and their log-sum-exp (B, H, M)."""
    offsets = host_offsets(cu_seqlens)
    state = ReadState(len(offsets) - 1, query, projection.width_of(values))
    narrow = query.to(dtype)
    for block in _blocks(values):
        heads = projection.apply(values[block].to(dtype))
        for bag, part in pieces(offsets, block):
            for head, (keys, read) in enumerate(heads):
                state.add(bag, head, affine(keys[part], narrow[head]).to(query.dtype), read[part])
    return state.finish()


@dataclass
class ReadGradients:
    """Running gradients of `read_forward`; None where not needed."""

    query: Tensor
    values: Tensor | None
    k_weight: Tensor | None
    v_weight: Tensor | None


def read_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    query: Tensor,
    values: Tensor,
    projection: Projection,
    cu_seqlens: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Return the gradients from those of what was read and of the log-sum-exp.

    With the attention a and c = v·g, ``ds = a (c - read·g + g_lse)``, ``dv = a g``; keys and queries follow from ds.
    """
    offsets = host_offsets(cu_seqlens)
    d_read, level = upstream[0], upstream[1] - (results[0] * upstream[0]).sum(3)  # (B, H, M)
    lse = torch.where(results[1] == NEVER, 0, results[1])
    weights = (projection.k_weight, projection.v_weight)
    found = ReadGradients(
        torch.zeros_like(query),
        torch.empty_like(values) if needs[1] else None,
        *(None if weight is None else query.new_zeros(weight.shape) for weight in weights),
    )
    narrow, narrow_grads = query.to(dtype), d_read.to(dtype)
    for block in _blocks(values):
        rows = values[block].to(dtype)
        heads = projection.apply(rows)
        d_keys, d_reads = zip(*((torch.empty_like(keys), torch.empty_like(read)) for keys, read in heads), strict=True)
        for bag, part in pieces(offsets, block):
            for head, (keys, read) in enumerate(heads):
                key, value = keys[part], read[part]
                attention = (affine(key, narrow[head]).to(query.dtype) - lse[bag, head]).exp_()  # (n, M)
                projected = affine(value, narrow_grads[bag, head]).to(query.dtype)
                d_scores = projected.add_(level[bag, head]).mul_(attention).to(dtype)
                d_reads[head][part] = product(attention.to(dtype), narrow_grads[bag, head])
                d_keys[head][part] = product(d_scores, narrow[head])
                found.query[head] += transposed_product(d_scores, key)
        _add_rows(found, projection, rows, block, d_keys, d_reads)
    return found.query, found.values, found.k_weight, found.v_weight


def _add_rows(
    found: ReadGradients,
    projection: Projection,
    rows: Tensor,
    block: slice,
    d_keys: tuple[Tensor, ...],
    d_reads: tuple[Tensor, ...],
) -> None:
    """Add one block's part of the gradients of the projections, and write those of its instances."""
    if projection.k_weight is None or projection.v_weight is None:
        if found.values is not None:
            found.values[block] = d_keys[0] + d_reads[0]
        return
    keys, read = torch.cat(d_keys, 1), torch.cat(d_reads, 1)
    if found.k_weight is not None and found.v_weight is not None:
        found.k_weight += transposed_product(keys, rows)
        found.v_weight += transposed_product(read, rows)
    if found.values is not None:
        found.values[block] = product(keys, projection.k_weight).add_(product(read, projection.v_weight))


def key_forward(
    queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, heads: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """Attend from each instance to the keys of its bag: (N, E), (B, M, E), (B, M, F) -> (N, F)."""
    wide = accumulation_dtype(queries.dtype)
    out = queries.new_zeros((len(queries), values.shape[2]), dtype=wide)
    split_keys, split_values = _by_head(keys.to(dtype), heads), _by_head(values.to(dtype), heads)
    offsets = host_offsets(cu_seqlens)
    for block in _blocks(queries):
        sliced = queries[block].to(dtype).chunk(heads, 1)
        written = out[block].chunk(heads, 1)
        for bag, part in pieces(offsets, block):
            for head in range(heads):
                weights = _key_weights(sliced[head][part], split_keys[bag, head], scale, wide)
                written[head][part] = product(weights.to(dtype), split_values[bag, head])
    return out


def key_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    heads: int,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; the attention of a block is computed again."""
    wide = accumulation_dtype(queries.dtype)
    d_queries = torch.zeros_like(queries)
    split_keys, split_values = _by_head(keys.to(dtype), heads), _by_head(values.to(dtype), heads)
    d_keys, d_values = torch.zeros_like(split_keys, dtype=wide), torch.zeros_like(split_values, dtype=wide)
    offsets = host_offsets(cu_seqlens)
    for block in _blocks(queries):
        rows, grads = (tensor[block].to(dtype).chunk(heads, 1) for tensor in (queries, upstream[0]))
        written = d_queries[block].chunk(heads, 1)
        for bag, part in pieces(offsets, block):
            for head in range(heads):
                query, g, key = rows[head][part], grads[head][part], split_keys[bag, head]
                weights = _key_weights(query, key, scale, wide)  # (n, M)
                d_values[bag, head] += transposed_product(weights.to(dtype), g)
                d_scores = affine(g, split_values[bag, head]).to(wide)
                d_scores -= (d_scores * weights).sum(1, keepdim=True)
                d_narrow = d_scores.mul_(weights).mul_(scale).to(dtype)
                d_keys[bag, head] += transposed_product(d_narrow, query)
                written[head][part] = product(d_narrow, key).to(queries.dtype)
    return d_queries, _together(d_keys), _together(d_values)


def _key_weights(query: Tensor, key: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    return affine(query, key).to(wide).mul_(scale).softmax(1)


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    return torch.unflatten(tokens, 2, (heads, -1)).transpose(1, 2).contiguous()  # (B, H, M, width / H)


def _together(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).flatten(2)


def _blocks(packed: Tensor) -> list[slice]:
    rows = GPU_ROWS if packed.is_cuda else ROWS
    return [slice(first, min(first + rows, len(packed))) for first in range(0, len(packed), rows)]

"""Attention between a bag and a few vectors by blocks of rows: no map and no projection outlives its block.

Queries read a bag as in attention pooling: every block is scored and merged into a running (m, l, Z) per bag, head and
query, and the backward pass scores it again. Where that is cheaper, the projections are folded into the queries: with
``q̃ = scale W_kᵀ q`` a score is ``x · q̃`` (the key bias shifts all scores of a query alike and cancels), and
``Σ a (W_v x + b_v) = W_v (Σ a x) + b_v``, so that the instances are keys and values themselves. Otherwise a block is
projected, read and forgotten. The way back, from instances to few keys, has no state: a block needs nothing of others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype, host_offsets
from eosin.kernels._products import affine, product, product_dtype, transposed_product
from eosin.kernels.gated_attention.torch_impl import NEVER, pieces
from eosin.kernels.segment_pool import attention_pool

ROWS, GPU_ROWS = 2048, 16384  # rows per block
FUSED_QUERIES = 128  # most folded queries whose scores are held for all instances on a GPU


def few_query_attention(
    queries: Tensor,
    values: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    heads: int,
    scale: float,
    fused: bool,
) -> Tensor:
    """Attend from the same queries to every bag: (M, E), (N, D) -> (B, M, F)."""
    wide, narrow = accumulation_dtype(values.dtype), product_dtype(values, k_weight)
    query = queries.to(wide).reshape(len(queries), heads, -1).transpose(0, 1) * scale  # (H, M, E / H)
    if folds(queries, k_weight, v_weight, heads):
        keys = k_weight.to(wide).reshape(heads, -1, values.shape[1])  # (H, E / H, D)
        folded = torch.einsum("hme,hed->hmd", query, keys).flatten(0, 1)
        pooled, lse = _pooled(folded, values, cu_seqlens, narrow, fused=fused)
        pooled = pooled.reshape(-1, heads, len(queries), values.shape[1])  # (B, H, M, D)
        out = torch.einsum("bhmd,hfd->bmhf", pooled, v_weight.to(wide).reshape(heads, -1, values.shape[1]))
    else:
        read, lse = _op()(query, values, k_weight, v_weight, cu_seqlens, narrow)
        out = read.transpose(1, 2)  # (B, M, H, F / H)
    out = out.flatten(2)
    if k_bias is not None:
        out = out + 0 * k_bias.sum()  # its gradient is 0, not missing
    if v_bias is None:
        return out
    seen = (lse.flatten(1)[:, :1] > NEVER).to(wide)  # an empty bag reads nothing, not even the bias
    return out + v_bias.to(wide) * seen[:, :, None]


def folds(queries: Tensor, k_weight: Tensor, v_weight: Tensor, heads: int) -> bool:
    """Return whether folded queries take fewer operations per instance than projecting it."""
    width = k_weight.shape[1]
    return 2 * len(queries) * heads * width <= (width + len(queries)) * (len(k_weight) + len(v_weight))


def _pooled(
    folded: Tensor, values: Tensor, cu_seqlens: Tensor, narrow: torch.dtype, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """Return what folded queries pool (B, Q, D) and the log-sum-exp (B, Q) of their scores."""
    if fused and len(folded) <= FUSED_QUERIES:
        scores = (values.to(narrow) @ folded.to(narrow).T).to(folded.dtype)
        pooled, lse, _ = attention_pool(scores, values, cu_seqlens)
        return pooled, lse
    read, lse = _op()(folded[None], values, None, None, cu_seqlens, narrow)
    return read[:, 0], lse[:, 0]


def _op() -> Callable[..., Any]:
    from eosin.kernels.few_query_attention import ops  # which builds on this module

    return ops.shared_query_attention


@dataclass(frozen=True)
class Projection:
    """What makes keys and values of a block of rows: (E, D) and (F, D), or nothing when the rows are both."""

    k_weight: Tensor | None
    v_weight: Tensor | None
    heads: int

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
    v_weight = projection.v_weight
    width = values.shape[1] if v_weight is None else len(v_weight) // projection.heads
    state = ReadState(len(offsets) - 1, query, width)
    narrow = query.to(dtype)
    for block in _blocks(values):
        heads = projection.apply(values[block].to(dtype))
        for bag, part in pieces(offsets, block):
            for head, (keys, read) in enumerate(heads):
                state.add(bag, head, affine(keys[part], narrow[head]).to(query.dtype), read[part])
    return state.finish()


@dataclass
class ReadGradients:
    """Gradients of `read_forward`; None where not needed."""

    query: Tensor
    values: Tensor | None
    k_weight: Tensor | None
    v_weight: Tensor | None


def read_backward(
    grads: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    query: Tensor,
    values: Tensor,
    projection: Projection,
    cu_seqlens: Tensor,
    dtype: torch.dtype,
    *,
    needs_values: bool,
) -> ReadGradients:
    """Return the gradients from those of what was read and of the log-sum-exp.

    With the attention a and c = v·g, ``ds = a (c - read·g + g_lse)``, ``dv = a g``; keys and queries follow from ds.
    """
    offsets = host_offsets(cu_seqlens)
    d_read, level = grads[0], grads[1] - (results[0] * grads[0]).sum(3)  # (B, H, M)
    lse = torch.where(results[1] == NEVER, 0, results[1])
    weights = (projection.k_weight, projection.v_weight)
    found = ReadGradients(
        torch.zeros_like(query),
        torch.empty_like(values) if needs_values else None,
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
    return found


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
    grad: Tensor,
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
        rows, grads = (tensor[block].to(dtype).chunk(heads, 1) for tensor in (queries, grad))
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
    return d_queries, _together(d_keys).to(keys.dtype), _together(d_values).to(values.dtype)


def _key_weights(query: Tensor, key: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    return affine(query, key).to(wide).mul_(scale).softmax(1)


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    return torch.unflatten(tokens, 2, (heads, -1)).transpose(1, 2).contiguous()  # (B, H, M, width / H)


def _together(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).flatten(2).contiguous()


def _blocks(packed: Tensor) -> list[slice]:
    rows = GPU_ROWS if packed.is_cuda else ROWS
    return [slice(first, min(first + rows, len(packed))) for first in range(0, len(packed), rows)]

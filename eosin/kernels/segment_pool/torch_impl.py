"""Pooling without autograd's intermediates: instances that have to be widened or gathered are so a block at a time."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from eosin.kernels._bags import NEVER, entropy, log_sum_exp, softmax
from eosin.kernels._checks import accumulation_dtype, host_lengths
from eosin.kernels._rows import Rows

ROWS = 1024  # rows widened at once: 4 MB at D = 1024, stays in the L2 cache


def forward(scores: Tensor, source: Rows, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled (B, H, D), log-sum-exp (B, H) and entropy (B, H), as `reference.attention_pool`."""
    values = source.values
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    heads, width = scores.shape[1], values.shape[1]
    pooled = values.new_empty((len(lengths), heads, width), dtype=dtype)
    lse, spread = (values.new_empty((len(lengths), heads), dtype=dtype) for _ in range(2))
    for number, rows in enumerate(_bags(lengths)):
        score = scores[rows].to(dtype)
        lse[number] = log_sum_exp(score)
        spread[number] = entropy(score)
        pooled[number] = weighted_rows(softmax(score), source, rows)
    return pooled, lse, spread


def backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    scores: Tensor,
    source: Rows,
    cu_seqlens: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients: ``ds = a (x·g_z - z·g_z + g_lse - g_E (s - lse + E))`` and ``dx = a g_z``.

    The sum over instances that the softmax's gradient contains is z·g_z, known without another pass.
    """
    g_pooled, g_lse, g_spread = upstream
    pooled, lse, spread = results
    level = g_lse - (pooled * g_pooled).sum(2)  # (B, H)
    d_scores = torch.empty_like(scores) if needs[0] else None
    d_values = source.new_gradient() if needs[1] else None
    for bag, rows in enumerate(_bags(host_lengths(cu_seqlens))):
        score = scores[rows].to(pooled.dtype)
        weight = (score - torch.where(lse[bag] == NEVER, 0, lse[bag])).exp()
        if d_scores is not None:
            surprise = torch.where(score == NEVER, 0, score - lse[bag] + spread[bag])
            projected = widened_product(source, rows, g_pooled[bag].T)
            d_scores[rows] = weight * (projected + level[bag] - g_spread[bag] * surprise)
        if d_values is not None:
            _add_products(weight, g_pooled[bag], source, rows, d_values)
    return d_scores, d_values


def weighted_forward(weights: Tensor, source: Rows, cu_seqlens: Tensor) -> Tensor:
    """Return Σ weight · value of each bag (B, H, D), as `reference.segment_pool`."""
    values = source.values
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    pooled = values.new_empty((len(lengths), weights.shape[1], values.shape[1]), dtype=dtype)
    for number, rows in enumerate(_bags(lengths)):
        pooled[number] = weighted_rows(weights[rows].to(dtype), source, rows)
    return pooled


def weighted_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs: list[bool],
    weights: Tensor,
    source: Rows,
    cu_seqlens: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of given weights and of values: ``dw = x·g_z`` and ``dx = w g_z``."""
    (g_pooled,) = upstream
    d_weights = torch.empty_like(weights) if needs[0] else None
    d_values = source.new_gradient() if needs[1] else None
    for bag, rows in enumerate(_bags(host_lengths(cu_seqlens))):
        if d_weights is not None:
            d_weights[rows] = widened_product(source, rows, g_pooled[bag].T)
        if d_values is not None:
            _add_products(weights[rows].to(g_pooled.dtype), g_pooled[bag], source, rows, d_values)
    return d_weights, d_values


def weighted_sum(weight: Tensor, value: Tensor) -> Tensor:
    """Return weightᵀ value in the type of ``weight``: (n, H), (n, D) -> (H, D)."""
    return weighted_rows(weight, Rows(value, None), slice(0, len(value)))


def weighted_rows(weight: Tensor, source: Rows, rows: slice) -> Tensor:
    """Return weightᵀ value of a run of instances in the type of ``weight``: (n, H), -> (H, D)."""
    if source.index is None and source.values.dtype == weight.dtype:
        return weight.T @ source[rows]
    total = weight.new_zeros((weight.shape[1], source.values.shape[1]))
    for block, part in source.blocks(rows, ROWS):
        total.addmm_(weight[part].T, source[block].to(weight.dtype))
    return total


def widened_product(source: Rows, rows: slice, matrix: Tensor) -> Tensor:
    """Return value @ matrix of a run of instances in the type of ``matrix``: (D, H) -> (n, H)."""
    if source.index is None and source.values.dtype == matrix.dtype:
        return source[rows] @ matrix
    product = matrix.new_empty((rows.stop - rows.start, matrix.shape[1]))
    for block, part in source.blocks(rows, ROWS):
        torch.mm(source[block].to(matrix.dtype), matrix, out=product[part])
    return product


def _add_products(weight: Tensor, matrix: Tensor, source: Rows, rows: slice, target: Tensor) -> None:
    """Add weight @ matrix to the gradient of a run of instances: (n, H), (H, D)."""
    for block, part in source.blocks(rows, ROWS):
        source.add_gradient(target, block, weight[part] @ matrix)


def _bags(lengths: list[int]) -> list[slice]:
    ends = [0, *accumulate(lengths)]
    return [slice(begin, end) for begin, end in pairwise(ends)]

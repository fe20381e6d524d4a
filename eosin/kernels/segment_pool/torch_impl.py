"""Pooling without autograd's intermediates: half-precision instances are widened one block of rows at a time."""

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype, host_lengths
from eosin.kernels.segments import NEVER, entropy, log_sum_exp, softmax

ROWS = 1024  # rows widened at once: 4 MB at D = 1024, stays in the L2 cache


def forward(scores: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled (B, H, D), log-sum-exp (B, H) and entropy (B, H), as `reference.attention_pool`."""
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    heads, width = scores.shape[1], values.shape[1]
    pooled = values.new_empty((len(lengths), heads, width), dtype=dtype)
    lse, spread = (values.new_empty((len(lengths), heads), dtype=dtype) for _ in range(2))
    bags = zip(torch.split(scores.to(dtype), lengths), torch.split(values, lengths), strict=True)
    for number, (score, value) in enumerate(bags):
        lse[number] = log_sum_exp(score)
        spread[number] = entropy(score)
        pooled[number] = weighted_sum(softmax(score), value)
    return pooled, lse, spread


def backward(
    needs: tuple[bool, bool],
    upstream: list[Tensor],
    results: list[Tensor],
    scores: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients: ``ds = a (x·g_z - z·g_z + g_lse - g_E (s - lse + E))`` and ``dx = a g_z``.

    The sum over instances that the softmax's gradient contains is z·g_z, known without another pass.
    """
    g_pooled, g_lse, g_spread = upstream
    pooled, lse, spread = results
    lengths = host_lengths(cu_seqlens)
    level = g_lse - (pooled * g_pooled).sum(2)  # (B, H)
    d_scores = torch.empty_like(scores) if needs[0] else None
    d_values = torch.empty_like(values) if needs[1] else None
    begin = 0
    for bag, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        begin += length
        score = scores[rows].to(pooled.dtype)
        weight = (score - torch.where(lse[bag] == NEVER, 0, lse[bag])).exp()
        if d_scores is not None:
            surprise = torch.where(score == NEVER, 0, score - lse[bag] + spread[bag])
            projected = widened_product(values[rows], g_pooled[bag].T)
            d_scores[rows] = weight * (projected + level[bag] - g_spread[bag] * surprise)
        if d_values is not None:
            write_product(weight, g_pooled[bag], d_values[rows])
    return d_scores, d_values


def weighted_forward(weights: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return Σ weight · value of each bag (B, H, D), as `reference.segment_pool`."""
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    pooled = values.new_empty((len(lengths), weights.shape[1], values.shape[1]), dtype=dtype)
    bags = zip(torch.split(weights.to(dtype), lengths), torch.split(values, lengths), strict=True)
    for number, (weight, value) in enumerate(bags):
        pooled[number] = weighted_sum(weight, value)
    return pooled


def weighted_backward(
    needs: tuple[bool, bool], g_pooled: Tensor, weights: Tensor, values: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of given weights and of values: ``dw = x·g_z`` and ``dx = w g_z``."""
    lengths = host_lengths(cu_seqlens)
    d_weights = torch.empty_like(weights) if needs[0] else None
    d_values = torch.empty_like(values) if needs[1] else None
    begin = 0
    for bag, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        begin += length
        if d_weights is not None:
            d_weights[rows] = widened_product(values[rows], g_pooled[bag].T)
        if d_values is not None:
            write_product(weights[rows].to(g_pooled.dtype), g_pooled[bag], d_values[rows])
    return d_weights, d_values


def weighted_sum(weight: Tensor, value: Tensor) -> Tensor:
    """Return weightᵀ value in the type of ``weight``: (n, H), (n, D) -> (H, D)."""
    if value.dtype == weight.dtype:
        return weight.T @ value
    total = weight.new_zeros((weight.shape[1], value.shape[1]))
    for part, rows in zip(torch.split(weight, ROWS), torch.split(value, ROWS), strict=True):
        total.addmm_(part.T, rows.to(weight.dtype))
    return total


def widened_product(value: Tensor, matrix: Tensor) -> Tensor:
    """Return value @ matrix in the type of ``matrix``: (n, D), (D, H) -> (n, H)."""
    if value.dtype == matrix.dtype:
        return value @ matrix
    product = matrix.new_empty((len(value), matrix.shape[1]))
    for target, rows in zip(torch.split(product, ROWS), torch.split(value, ROWS), strict=True):
        torch.mm(rows.to(matrix.dtype), matrix, out=target)
    return product


def write_product(weight: Tensor, matrix: Tensor, target: Tensor) -> None:
    """Write weight @ matrix into ``target`` in its own type: (n, H), (H, D) -> (n, D)."""
    for part, rows in zip(torch.split(weight, ROWS), torch.split(target, ROWS), strict=True):
        rows.copy_(part @ matrix)

"""Definition of pooling within bags: ``z_bh = Σ_{i in b} w_ih x_i``, with w given or the softmax of scores."""

import torch
from torch import Tensor

from eosin.kernels._bags import entropy, log_sum_exp, softmax
from eosin.kernels._checks import accumulation_dtype, host_lengths


def segment_pool(weights: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pool each bag with its own weights: (N, H), (N, D) -> (B, H, D)."""
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    bags = zip(torch.split(weights.to(dtype), lengths), torch.split(values.to(dtype), lengths), strict=True)
    pooled = [weight.T @ value for weight, value in bags]
    empty = values.new_zeros((0, weights.shape[1], values.shape[1]), dtype=dtype)
    return torch.stack(pooled) if pooled else empty


def attention_pool(scores: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool each bag with softmax(scores); also log-sum-exp and entropy: -> (B, H, D), (B, H), (B, H)."""
    dtype = accumulation_dtype(values.dtype)
    bags = torch.split(scores.to(dtype), host_lengths(cu_seqlens))
    if not bags:
        nothing = scores.new_zeros((0, scores.shape[1]), dtype=dtype)
        return nothing[:, :, None].expand(0, scores.shape[1], values.shape[1]), nothing, nothing
    pooled = segment_pool(torch.cat([softmax(bag) for bag in bags]), values, cu_seqlens)
    lse = torch.stack([log_sum_exp(bag) for bag in bags])
    return pooled, lse, torch.stack([entropy(bag) for bag in bags])

"""Definition of counterfactual effects: the bag is built again without the instance and pooled again.

Necessity in HIPPO (Kaczmarzyk et al., https://arxiv.org/abs/2409.03080) asks what a model says without one patch;
greedy search removes, round after round, the patch whose absence moves an objective furthest. Here a model is pooling
by attention scores, with a linear head ``logits_k = Σ_h C_kh · z_h + b_k``.
"""

import torch
from torch import Tensor

from eosin.kernels._bags import softmax
from eosin.kernels._checks import accumulation_dtype, host_lengths


def pooled_without(scores: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pool each bag once without each of its instances: (N, H), (N, D) -> (N, H, D)."""
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    pooled = []
    for bag_scores, bag in zip(
        torch.split(scores.to(dtype), lengths), torch.split(values.to(dtype), lengths), strict=True
    ):
        for left_out in range(len(bag)):
            rest = torch.arange(len(bag), device=bag.device) != left_out
            pooled.append(softmax(bag_scores[rest]).T @ bag[rest])
    return torch.stack(pooled) if pooled else values.new_zeros(0, scores.shape[1], values.shape[1], dtype=dtype)


def leave_one_out(scores: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Return the logits of the bag without each instance: (N, H), (N, D), (K, H, D) -> (N, K)."""
    pooled = pooled_without(scores, values, cu_seqlens)
    logits = torch.einsum("nhd,khd->nk", pooled, weight.to(pooled.dtype))
    return logits if bias is None else logits + bias.to(pooled.dtype)

"""Definition of the causal depthwise convolution within bags.

With taps w_0 … w_{K-1} per channel and rows before the start of a bag counting as 0:

    p_t = Σ_j w_j x_{t-K+1+j} + bias,   y_t = silu(p_t) or p_t.

Where an order is given, x is read through it first; places that it pads are rows of zeros, which the bias and the
activation turn into something else: they are part of the sequence.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from eosin.kernels._checks import accumulation_dtype, host_lengths


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: str,
) -> Tensor:
    """Convolve each bag: (N, D), (D, K) -> (N', D)."""
    dtype = accumulation_dtype(x.dtype)
    rows = x.to(dtype)
    if source is not None:
        rows = rows[source.clamp(min=0)] * (source >= 0)[:, None]
    bags = [_convolved(bag, weight.to(dtype)) for bag in torch.split(rows, host_lengths(cu_seqlens))]
    out = torch.cat(bags) if bags else rows
    out = out if bias is None else out + bias.to(dtype)
    return (silu(out) if activation == "silu" else out).to(x.dtype)


def _convolved(bag: Tensor, weight: Tensor) -> Tensor:
    n_rows, n_taps = len(bag), weight.shape[1]
    padded = pad(bag, (0, 0, n_taps - 1, 0))
    out = torch.zeros_like(bag)
    for tap in range(n_taps):
        out = out + padded[tap : tap + n_rows] * weight[:, tap]
    return out

"""Definition of the selective scan (S6), one step after the other.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", https://arxiv.org/abs/2312.00752,
algorithm 2. Per channel, with a state h of S entries that starts at 0 in every bag:

    δ_t = softplus(delta_t + bias),   h_t = exp(δ_t A) h_{t-1} + δ_t u_t B_t,   y_t = C_t · h_t + D u_t,
    o_t = y_t silu(z_t)   where z is given.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from eosin.kernels._checks import accumulation_dtype, host_lengths


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """Scan each bag from a zero state: (N, D) -> (N, D)."""
    dtype = accumulation_dtype(u.dtype)
    wide_u, steps = u.to(dtype), delta.to(dtype)
    steps = softplus(steps if delta_bias is None else steps + delta_bias.to(dtype))
    lengths = host_lengths(cu_seqlens)
    packed = (wide_u, steps, b.to(dtype), c.to(dtype))
    bags = zip(*(torch.split(tensor, lengths) for tensor in packed), strict=True)
    scanned = [_scan_bag(a.to(dtype), *bag) for bag in bags if len(bag[0])]
    y = torch.cat(scanned) if scanned else wide_u
    if d is not None:
        y = y + d.to(dtype) * wide_u
    return (y if z is None else y * silu(z.to(dtype))).to(u.dtype)


def _scan_bag(a: Tensor, u: Tensor, steps: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state = u.new_zeros(a.shape)  # (D, S)
    outputs = []
    for x, step, read_in, read_out in zip(u.unbind(), steps.unbind(), b.unbind(), c.unbind(), strict=True):
        state = torch.exp(step[:, None] * a) * state + (step * x)[:, None] * read_in
        outputs.append(state @ read_out)
    return torch.stack(outputs)

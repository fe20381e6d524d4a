# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The causal convolution on a GPU: rows are read through the order, so that no reordered copy exists.

The backward pass writes the gradient before the activation once, then every row gathers its own from the places that
saw it; tap and bias gradients go to one partial per program and are summed in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eosin.kernels.causal_conv.torch_impl import Convolution

ROW_BLOCK, COLUMN_BLOCK = 32, 128
BACKWARD_PROGRAMS = 264


def forward(convolution: Convolution) -> Tensor:
    """Return the result (N', D) in the type of x."""
    x = convolution.x.contiguous()
    out = x.new_empty(convolution.n_places, x.shape[1])
    if out.numel():
        conv_forward[(triton.cdiv(len(out), ROW_BLOCK), triton.cdiv(x.shape[1], COLUMN_BLOCK))](
            x, _source(convolution), _begins(convolution), convolution.weight.contiguous(), _bias(convolution), out,
            len(out), x.shape[1], **_options(convolution),
        )  # fmt: skip
    return out


def backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], convolution: Convolution
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    (grad,) = upstream
    x, weight = convolution.x.contiguous(), convolution.weight.contiguous()
    n_places, width = convolution.n_places, x.shape[1]
    source, begins = _source(convolution), _begins(convolution)
    programs = max(1, min(BACKWARD_PROGRAMS, triton.cdiv(n_places, ROW_BLOCK)))
    d_before = grad.new_empty(n_places, width)
    d_weight = weight.new_zeros(programs, *weight.shape)
    d_bias = weight.new_zeros(programs, width)
    d_x = torch.zeros_like(x) if convolution.source is not None else torch.empty_like(x)
    if n_places and width:
        columns = triton.cdiv(width, COLUMN_BLOCK)
        conv_before_gradient[(programs, columns)](
            x, source, begins, weight, _bias(convolution), grad, d_before, d_weight, d_bias,
            n_places, width, TAP_BLOCK=triton.next_power_of_2(weight.shape[1]), **_options(convolution),
        )  # fmt: skip
        conv_row_gradient[(triton.cdiv(n_places, ROW_BLOCK), columns)](
            d_before, source, begins, weight, d_x, n_places, width, **_options(convolution)
        )
    return d_x, d_weight.sum(0), d_bias.sum(0)


def _source(convolution: Convolution) -> Tensor:
    if convolution.source is not None:
        return convolution.source.contiguous()
    return torch.arange(convolution.n_places, device=convolution.x.device)


def _begins(convolution: Convolution) -> Tensor:
    """Return the place where each place's bag begins: (N',) int32."""
    offsets = convolution.cu_seqlens
    lengths = offsets.diff().to(torch.int64)
    return torch.repeat_interleave(offsets[:-1], lengths, output_size=convolution.n_places)


def _bias(convolution: Convolution) -> Tensor:
    weight = convolution.weight
    return weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias.contiguous()


def _options(convolution: Convolution) -> dict[str, int | bool]:
    return {
        "TAPS": convolution.weight.shape[1],
        "ACTIVATED": convolution.activated,
        "ROW_BLOCK": ROW_BLOCK,
        "COLUMN_BLOCK": COLUMN_BLOCK,
        "num_warps": 4,
    }


@triton.jit
def lagged(x, source, begins, places, lag, columns, n_places, width):
    """Return the rows that lie ``lag`` places before these, 0 where that is before the bag or padded."""
    begin = tl.load(begins + places, mask=places < n_places, other=0)
    earlier = places - lag
    seen = (places < n_places) & (earlier >= begin)
    row = tl.load(source + earlier, mask=seen, other=-1)
    inside = (row[:, None] >= 0) & (columns[None, :] < width)
    return tl.load(x + row[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def before_activation(x, source, begins, weight, bias, places, columns, n_places, width, TAPS: tl.constexpr):
    """Return the convolution of a block of places before the activation."""
    p = tl.load(bias + columns, mask=columns < width, other=0.0)[None, :] + tl.zeros([places.shape[0], 1], tl.float32)
    for lag in tl.static_range(TAPS):
        tap = tl.load(weight + columns * TAPS + (TAPS - 1 - lag), mask=columns < width, other=0.0)
        p += lagged(x, source, begins, places, lag, columns, n_places, width) * tap[None, :]
    return p


@triton.jit
def conv_forward(
    x, source, begins, weight, bias, out, n_places, width,
    TAPS: tl.constexpr, ACTIVATED: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of the result."""
    places = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    columns = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    p = before_activation(x, source, begins, weight, bias, places, columns, n_places, width, TAPS)
    if ACTIVATED:
        p *= tl.sigmoid(p)
    inside = (places[:, None] < n_places) & (columns[None, :] < width)
    tl.store(out + places[:, None].to(tl.int64) * width + columns[None, :], p, mask=inside)


@triton.jit
def conv_before_gradient(
    x, source, begins, weight, bias, d_out, d_before, d_weight, d_bias, n_places, width, TAP_BLOCK: tl.constexpr,
    TAPS: tl.constexpr, ACTIVATED: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient before the activation of every so many blocks, and this program's sums for taps and bias."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    taps = tl.arange(0, TAP_BLOCK)
    sum_taps = tl.zeros([TAP_BLOCK, COLUMN_BLOCK], tl.float32)
    sum_bias = tl.zeros([COLUMN_BLOCK], tl.float32)
    for first in range(program * ROW_BLOCK, n_places, programs * ROW_BLOCK):
        places = first + tl.arange(0, ROW_BLOCK)
        inside = (places[:, None] < n_places) & (columns[None, :] < width)
        target = places[:, None].to(tl.int64) * width + columns[None, :]
        g = tl.load(d_out + target, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATED:
            p = before_activation(x, source, begins, weight, bias, places, columns, n_places, width, TAPS)
            sigma = tl.sigmoid(p)
            g *= sigma * (1 + p * (1 - sigma))
        tl.store(d_before + target, g, mask=inside)
        sum_bias += tl.sum(g, 0)
        for lag in tl.static_range(TAPS):
            part = tl.sum(lagged(x, source, begins, places, lag, columns, n_places, width) * g, 0)
            sum_taps += tl.where(taps[:, None] == TAPS - 1 - lag, part[None, :], 0.0)
    place = d_weight + (program * width + columns)[None, :] * TAPS + taps[:, None]
    tl.store(place, sum_taps, mask=(columns[None, :] < width) & (taps[:, None] < TAPS))
    tl.store(d_bias + program * width + columns, sum_bias, mask=columns < width)


@triton.jit
def conv_row_gradient(
    d_before, source, begins, weight, d_x, n_places, width,
    TAPS: tl.constexpr, ACTIVATED: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the rows that a block of places reads."""
    places = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    columns = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    d = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], tl.float32)
    for lag in tl.static_range(TAPS):
        later = places + lag
        begin = tl.load(begins + later, mask=later < n_places, other=2147483647)
        inside = (begin[:, None] <= places[:, None]) & (columns[None, :] < width)
        tap = tl.load(weight + columns * TAPS + (TAPS - 1 - lag), mask=columns < width, other=0.0)
        g = tl.load(d_before + later[:, None].to(tl.int64) * width + columns[None, :], mask=inside, other=0.0)
        d += g.to(tl.float32) * tap[None, :]
    row = tl.load(source + places, mask=places < n_places, other=-1)
    inside = (row[:, None] >= 0) & (columns[None, :] < width)
    tl.store(d_x + row[:, None] * width + columns[None, :], d, mask=inside)

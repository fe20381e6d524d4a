"""The causal convolution by blocks of rows: only a block and the few rows before it are gathered at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from eosin.kernels._checks import accumulation_dtype, host_offsets

ROWS = 2048


@dataclass(frozen=True)
class Convolution:
    """One convolution over a pack.

    Parameters
    ----------
    x : (N, D)
        Rows, in their own order.
    weight, bias : (D, K), (D,) or None
        Taps and bias in the accumulation type.
    source : (N',) int64 or None
        Row that each place reads, -1 for zeros.
    cu_seqlens : (B+1,) int32
        Offsets of the bags in the new order.
    activated : bool
        Whether silu follows.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    source: Tensor | None
    cu_seqlens: Tensor
    activated: bool

    @classmethod
    def make(
        cls, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, cu_seqlens: Tensor, activation: str
    ) -> "Convolution":
        """Return the convolution by taps in any type."""
        wide = accumulation_dtype(x.dtype)
        bias = None if bias is None else bias.to(wide)
        return cls(x, weight.to(wide), bias, source, cu_seqlens, activated=activation == "silu")

    @property
    def n_places(self) -> int:
        """Rows of the result."""
        return self.x.shape[0] if self.source is None else self.source.shape[0]

    def windows(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield blocks: places, places from K-1 earlier on, and each place's distance from its bag's start."""
        ends = torch.tensor(host_offsets(self.cu_seqlens), device=self.x.device)
        for first in range(0, self.n_places, ROWS):
            block = slice(first, min(first + ROWS, self.n_places))
            places = torch.arange(block.start, block.stop, device=self.x.device)
            begin = ends[torch.searchsorted(ends, places, right=True) - 1]
            yield block, slice(max(0, first - self.weight.shape[1] + 1), block.stop), places - begin

    def read(self, places: slice) -> Tensor:
        """Return rows in the new order, in the accumulation type: -> (n, D)."""
        if self.source is None:
            return self.x[places].to(self.weight.dtype)
        source = self.source[places]
        rows = self.x.index_select(0, source.clamp(min=0)).to(self.weight.dtype)
        return rows.mul_((source >= 0)[:, None])

    def before_activation(self, window: Tensor, depth: Tensor) -> Tensor:
        """Return p of a block from the rows of its window: (n + halo, D), (n,) -> (n, D)."""
        n_rows = len(depth)
        out = window.new_zeros(n_rows, window.shape[1])
        for lag in range(self.weight.shape[1]):
            out.addcmul_(self._lagged(window, depth, lag), self.weight[:, -1 - lag])
        return out if self.bias is None else out.add_(self.bias)

    def _lagged(self, window: Tensor, depth: Tensor, lag: int) -> Tensor:
        """Return the row ``lag`` places earlier, 0 where that is before the bag: -> (n, D)."""
        n_rows, halo = len(depth), len(window) - len(depth)
        if lag > halo:  # the pack begins inside the halo
            missing = window.new_zeros(min(lag - halo, n_rows), window.shape[1])
            rows = torch.cat([missing, window[: max(0, n_rows - len(missing))]])
        else:
            rows = window[halo - lag : halo - lag + n_rows]
        return rows * (depth >= lag)[:, None] if lag else rows

    def tap_gradient(self, window: Tensor, depth: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of the taps from one block: -> (D, K)."""
        lags = [(self._lagged(window, depth, lag) * gradient).sum(0) for lag in range(self.weight.shape[1])]
        return torch.stack(lags[::-1], dim=1)


def forward(convolution: Convolution) -> Tensor:
    """Return the result (N', D) in the type of x."""
    out = convolution.x.new_empty(convolution.n_places, convolution.x.shape[1])
    for block, places, depth in convolution.windows():
        result = convolution.before_activation(convolution.read(places), depth)
        out[block] = silu(result) if convolution.activated else result
    return out


def backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], convolution: Convolution
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    weight, (grad,) = convolution.weight, upstream
    d_weight, d_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
    d_places = torch.zeros_like(grad, dtype=weight.dtype)
    for block, places, depth in convolution.windows():
        window = convolution.read(places)
        d_out = grad[block].to(weight.dtype)
        if convolution.activated:
            d_out = d_out * _silu_slope(convolution.before_activation(window, depth))
        d_weight += convolution.tap_gradient(window, depth, d_out)
        d_bias += d_out.sum(0)
        for lag in range(weight.shape[1]):
            inside = d_out * (depth >= lag)[:, None] * weight[:, -1 - lag]
            skipped = max(0, lag - block.start)
            d_places[max(0, block.start - lag) : max(0, block.stop - lag)] += inside[skipped:]
    return _to_rows(d_places, convolution), d_weight, d_bias


def _to_rows(d_places: Tensor, convolution: Convolution) -> Tensor:
    """Return the gradient of x from that of its reordered rows; each row is read at most once."""
    if convolution.source is None:
        return d_places.to(convolution.x.dtype)
    real = convolution.source >= 0
    d_x = torch.zeros_like(convolution.x)
    return d_x.index_copy_(0, convolution.source[real], d_places[real].to(d_x.dtype))


def _silu_slope(before: Tensor) -> Tensor:
    opening = before.sigmoid()
    return opening * (1 + before * (1 - opening))

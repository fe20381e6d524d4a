"""Linear layers of blocks of rows, and their gradients, by the library that is faster on this machine.

oneDNN returns a new tensor with the activation applied; the BLAS writes where the result is kept, and the activation
follows in tiles. The gradient of a weight sums over instances, and oneDNN's layer would have to transpose the upstream
gradient first. A convolution of one pixel is the same layer, and its weight's gradient reads both factors as they lie.
Where the BLAS is the faster of the two, as Intel's is on Intel's processors, it multiplies into a place that all blocks
share. Which is faster, `rates` measures once per machine.
"""

import torch
from torch import Tensor

from eosin.kernels import _rates as rates
from eosin.kernels._products import LINES, PICTURES, convolution_gradient, product, uses_onednn

_ENOUGH_ROWS = 3072  # from where on a convolution can be the faster way


def layers_by_blas(rows: Tensor) -> bool:
    """Return whether layers of rows like these go to the BLAS, or to torch where oneDNN cannot take them."""
    return not uses_onednn(rows) or rates.of_this_machine().layers_by_blas(rows.dtype)


class AffineGradient:
    """Running sums of the gradients of W (A, D) and b (A) in ``rows Wᵀ + b``.

    Parameters
    ----------
    weight : (A, D)
        W, or a tensor like it.
    dtype : torch.dtype
        Type of the sums.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = torch.zeros_like(weight, dtype=dtype)
        self.bias = self.weight.new_zeros(len(weight))
        self._place = torch.empty(0)

    def add(self, upstream: Tensor, rows: Tensor) -> None:
        """Add a block of rows to the gradient of W: (n, A), (n, D)."""
        if _convolves(upstream, rows):
            self.weight += convolution_gradient(upstream, rows)
            return
        if self._place.dtype != upstream.dtype or self._place.shape != self.weight.shape:
            self._place = torch.empty_like(self.weight, dtype=upstream.dtype)
        self.weight += torch.mm(upstream.T, rows, out=self._place)

    def add_bias(self, upstream: Tensor) -> None:
        """Add some rows to the gradient of b, best while they are in the cache: (n, A)."""
        self.bias += upstream.sum(0)


def _convolves(upstream: Tensor, rows: Tensor) -> bool:
    whole = len(rows) >= _ENOUGH_ROWS and len(rows) % (PICTURES * LINES) == 0
    narrow = rows.dtype == torch.float32 and uses_onednn(rows)
    return whole and narrow and upstream.is_contiguous() and rows.is_contiguous() and rates.of_this_machine().convolves


def product_into(place: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return left right, in the place given unless another library is faster: (n, A), (A, D) -> (n, D)."""
    return torch.mm(left, right, out=place) if layers_by_blas(left) else product(left, right)

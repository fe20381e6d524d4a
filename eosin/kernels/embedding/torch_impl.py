"""The embedding by blocks of rows: product, bias, relu and dropout while a block is in the cache.

Only h is kept for the backward pass: where it is 0, it was cut off or dropped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._dropout import EMBEDDING_BRANCH, Kept, drop_
from eosin.kernels._layers import AffineGradient, layers_by_blas
from eosin.kernels._memory import new_tensor
from eosin.kernels._products import affine, product
from eosin.kernels._rows import blocks, longest_block, tiles


@dataclass(frozen=True)
class Embedding:
    """The instances that are scored and pooled: the values themselves, or ``h = dropout(relu(W x + b))``.

    Parameters
    ----------
    weight, bias : (E, D) or None, (E,) or None
        The projection, times what dropout scales kept entries with; None leaves the values as they are.
    dropout : float
        Chance of an entry of h to be dropped.
    seed : int
        Seed of the dropout mask.
    dtype : torch.dtype
        Type in which products run.
    """

    weight: Tensor | None
    bias: Tensor | None
    dropout: float
    seed: int
    dtype: torch.dtype

    @classmethod
    def make(
        cls, weight: Tensor | None, bias: Tensor | None, *, dropout: float, seed: int, dtype: torch.dtype
    ) -> "Embedding":
        """Return the embedding by a projection in any type: relu(s (W x + b)) = s relu(W x + b)."""
        if weight is None:
            return cls(None, None, dropout, seed, dtype)
        wide, scale = accumulation_dtype(dtype), 1 / (1 - dropout)
        scaled_bias = None if bias is None else bias.to(wide) * scale
        return cls((weight.to(wide) * scale).to(dtype), scaled_bias, dropout, seed, dtype)

    def rows(self, values: Tensor, first: int, place: Tensor | None = None) -> Tensor:
        """Return the instances of a block whose first row is ``first`` in the pack: (n, D) -> (n, E).

        What is computed is written to the place, if one is given.
        """
        values = values.to(self.dtype)
        if self.weight is None:
            return values
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if layers_by_blas(values):
            place = values.new_empty(len(values), len(self.weight)) if place is None else place
            embedded = torch.mm(values, self.weight.T, out=place)
        else:
            embedded, bias = affine(values, self.weight, bias), None
            embedded = embedded if place is None else place.copy_(embedded)
        kept = self._kept(embedded, first)
        for tile in tiles(embedded):
            part = embedded[tile]
            if bias is not None:
                part += bias
            part.relu_()  # oneDNN's own relu would turn NaN into 0
            if kept is not None:
                drop_(part, kept[tile])
        return embedded

    def _kept(self, embedded: Tensor, first: int) -> Kept | None:
        if not self.dropout:
            return None
        shape, device = embedded.shape, embedded.device
        return Kept.of(self.seed, shape, self.dropout, branch=EMBEDDING_BRANCH, device=device, first_row=first)

    def backward(self, d_embedded: Tensor, embedded: Tensor, *, out: Tensor) -> Tensor:
        """Turn the gradient of h into that of what relu reads; where h is 0 it was cut off or dropped, and it is 0."""
        torch.ops.aten.threshold_backward.grad_input(d_embedded, embedded, 0, grad_input=out)
        return out

    def parameters(self, gradient: AffineGradient) -> tuple[Tensor, Tensor]:
        """Return the gradients of W and b from those of the projection: (E, D), (E,)."""
        return gradient.weight.div_(1 - self.dropout), gradient.bias.div_(1 - self.dropout)

    def to_values(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the values from that of what relu reads: (n, E) -> (n, D)."""
        return gradient if self.weight is None else product(gradient, self.weight)


def forward(values: Tensor, embedding: Embedding) -> Tensor:
    """Return all embedded instances: (N, D) -> (N, E)."""
    if len(values) == longest_block(len(values)):
        return embedding.rows(values, 0)
    assert embedding.weight is not None
    embedded = new_tensor(values, (len(values), len(embedding.weight)), embedding.dtype)
    for block in blocks(len(values)):
        embedding.rows(values[block], block.start, embedded[block])
    return embedded


def backward(
    upstream: list[Tensor], results: list[Tensor], needs: list[bool], values: Tensor, embedding: Embedding
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of values (if needed), weight and bias: (N, D), (E, D), (E,)."""
    assert embedding.weight is not None
    (grad,), (embedded,) = upstream, results
    d_values = new_tensor(values, values.shape) if needs[0] else None
    total = AffineGradient(embedding.weight, accumulation_dtype(embedding.dtype))
    place = torch.empty_like(embedded[: longest_block(len(values))])
    for block in blocks(len(values)):
        rows = values[block].to(embedding.dtype)
        through = embedding.backward(grad[block], embedded[block], out=place[: len(rows)])
        total.add_bias(through)
        total.add(through, rows)
        if d_values is not None:
            d_values[block] = embedding.to_values(through)
    return d_values, *embedding.parameters(total)

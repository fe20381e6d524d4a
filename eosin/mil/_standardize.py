"""Shifting and scaling of features, measured on the training bags and part of the model from then on."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.mil._data import BagSource
from eosin.mil.bags import BagInPieces, PackedBags, is_large
from eosin.mil.slots import Aggregator, AggregatorOutput, Wrapper

ROWS_PER_BAG = 2000
SMALLEST_DEVIATION = 1e-6


class Standardizer(nn.Module):
    """``(x - mean) * scale`` per feature.

    Attributes
    ----------
    mean, scale : (D,) float32
        `scale` is one over the standard deviation, and 0 for a feature that does not vary in the training bags: nothing
        was learnt about it, so whatever it does later is ignored.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @classmethod
    def measure(cls, bags: BagSource, ids: Sequence[str]) -> Self:
        """Measure mean and deviation over the instances of some bags; of a large bag, over evenly spaced rows."""
        count = 0
        total = torch.zeros(bags.spec.dim, dtype=torch.float64)
        squares = torch.zeros(bags.spec.dim, dtype=torch.float64)
        shift: Tensor | None = None
        for bag_id in ids:
            values = _sample(bags, bag_id).double()
            if shift is None and len(values):
                shift = values[0]
            if shift is not None:
                count += len(values)
                total += (values - shift).sum(0)
                squares += (values - shift).square().sum(0)
        result = cls(bags.spec.dim)
        if shift is None:
            return result
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        varies = deviation > SMALLEST_DEVIATION * (shift + mean).abs().clamp(min=SMALLEST_DEVIATION)
        result.mean.copy_(shift + mean)
        result.scale.copy_(torch.where(varies, 1 / deviation, 0.0))
        return result

    def forward(self, bags: PackedBags) -> PackedBags:
        """Return the bags with standardized values."""
        return bags.with_values(self.rows(bags.values))

    def rows(self, values: Tensor) -> Tensor:
        """Return standardized features (N, D)."""
        return (values - self.mean).mul_(self.scale)


def _sample(bags: BagSource, bag_id: str) -> Tensor:
    length = bags.length(bag_id)
    if length <= ROWS_PER_BAG:
        return bags.load(bag_id)
    return bags.load(bag_id, torch.linspace(0, length - 1, ROWS_PER_BAG).long())


class Standardized(Wrapper):
    """An aggregator that is given features as they are and standardizes them first.

    Parameters
    ----------
    standardizer : Standardizer
    aggregator : Aggregator
    """

    def __init__(self, standardizer: Standardizer, aggregator: Aggregator) -> None:
        super().__init__(aggregator.in_dim, aggregator.n_outputs, aggregator)
        self.standardizer = standardizer
        self.aggregator = aggregator

    @property
    @override
    def inner(self) -> Aggregator:
        return self.aggregator

    @override
    def prepare(self, bags: PackedBags) -> PackedBags:
        prepared: PackedBags = self.standardizer(bags)
        return prepared

    @override
    def forward(self, bags: PackedBags) -> AggregatorOutput:
        if is_large(bags):
            return self.forward_pieces(BagInPieces.of(bags))
        return super().forward(bags)

    @override
    def forward_pieces(self, bag: BagInPieces) -> AggregatorOutput:
        return self.aggregator.forward_pieces(bag.map(self.standardizer.rows))

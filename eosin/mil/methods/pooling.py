"""Pooling without attention: the bag is the mean, the maximum or the smooth maximum of its instances.

The smooth maximum is ``(1/r) log mean exp(r h)`` (Pinheiro and Collobert, CVPR 2015, https://arxiv.org/abs/1411.6228,
equation 6): the mean as r goes to 0, the maximum as r grows. An empty bag pools to 0.
"""

import torch
from torch import Tensor, nn

from eosin.kernels import segment_logsumexp, segment_max, segment_mean
from eosin.mil.bags import PackedBags
from eosin.mil.layers import Activation, as_dtype, embedding
from eosin.mil.recipe import RECIPES, Component, Recipe
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput


class Pooling(Aggregator):
    """Embed, pool, classify; a subclass says how instances become a bag.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims, embed_activation, dropout
        Layers before the pooling; none pools the features themselves.
    """

    output_type = AggregatorOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[int, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: float = 0.25,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=(in_dim, *embed_dims)[-1])
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.classifier = nn.Linear(self.embed_dim, n_outputs)

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return logits and bag embeddings."""
        bag = as_dtype(self.pool(self.embed(bags.values), bags), self.classifier.weight)
        return AggregatorOutput(self.classifier(bag), bag)

    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        """Return the bags (B, E) of embedded instances (N, E)."""
        raise NotImplementedError


@AGGREGATORS.register("mean")
class MeanPooling(Pooling):
    """The mean of the embedded instances."""

    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        """Return the means."""
        return segment_mean(instances, bags.cu_seqlens)


@AGGREGATORS.register("max")
class MaxPooling(Pooling):
    """The maximum of the embedded instances, feature by feature."""

    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        """Return the maxima."""
        return segment_max(instances, bags.cu_seqlens)


@AGGREGATORS.register("lse")
class LsePooling(Pooling):
    """The smooth maximum of the embedded instances, feature by feature.

    Parameters
    ----------
    in_dim, n_outputs, embed_dims, embed_activation, dropout
        As `Pooling`.
    sharpness : float
        r of the smooth maximum.
    """

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        sharpness: float = 5.0,
        embed_dims: tuple[int, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: float = 0.25,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dims=embed_dims, embed_activation=embed_activation, dropout=dropout)
        self.sharpness = sharpness

    def pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        """Return the smooth maxima."""
        total = segment_logsumexp(instances * self.sharpness, bags.cu_seqlens)  # (B, E), -inf for an empty bag
        lengths = bags.cu_seqlens.diff()[:, None]
        return torch.where(lengths > 0, total - lengths.clamp(min=1).to(total.dtype).log(), 0.0) / self.sharpness


for _name in ("mean", "max", "lse"):
    RECIPES.add(_name, Recipe(aggregator=Component(name=_name)))

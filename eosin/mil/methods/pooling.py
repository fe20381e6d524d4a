"""Pooling without attention: the bag is the mean, the maximum or the smooth maximum of its instances.

The smooth maximum is ``(1/r) log mean exp(r h)`` (Pinheiro and Collobert, CVPR 2015, https://arxiv.org/abs/1411.6228,
equation 6): the mean as r goes to 0, the maximum as r grows. An empty bag pools to 0.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from eosin.kernels import segment_logsumexp, segment_max, segment_mean
from eosin.mil.bags import PackedBags
from eosin.mil.layers import Activation, as_dtype, embedding
from eosin.mil.recipe import RECIPES, Component, Recipe
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput


@AGGREGATORS.register("pooling")
class Pooling(Aggregator):
    """Embed, pool, classify.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    mode : {"mean", "max", "lse"}
        How instances become a bag.
    sharpness : float
        r of the smooth maximum.
    embed_dims, embed_activation, dropout
        Layers before the pooling; none pools the features themselves.
    """

    output_type = AggregatorOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        mode: Literal["mean", "max", "lse"] = "mean",
        sharpness: float = 5.0,
        embed_dims: tuple[int, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: float = 0.25,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=(in_dim, *embed_dims)[-1])
        self.mode = mode
        self.sharpness = sharpness
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.classifier = nn.Linear(self.embed_dim, n_outputs)

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return logits and bag embeddings."""
        bag = as_dtype(self._pool(self.embed(bags.values), bags), self.classifier.weight)
        return AggregatorOutput(self.classifier(bag), bag)

    def _pool(self, instances: Tensor, bags: PackedBags) -> Tensor:
        if self.mode == "mean":
            return segment_mean(instances, bags.cu_seqlens)
        if self.mode == "max":
            return segment_max(instances, bags.cu_seqlens)
        return _smooth_maximum(instances, bags, self.sharpness)


def _smooth_maximum(instances: Tensor, bags: PackedBags, sharpness: float) -> Tensor:
    total = segment_logsumexp(instances * sharpness, bags.cu_seqlens)  # (B, E), -inf for an empty bag
    lengths = bags.cu_seqlens.diff()[:, None]
    return torch.where(lengths > 0, total - lengths.clamp(min=1).log(), 0.0) / sharpness


for _mode in ("mean", "max", "lse"):
    RECIPES.add(f"{_mode}_pool", Recipe(aggregator=Component(name="pooling", options={"mode": _mode})))

"""Additive MIL: the logits of a bag are the sum of what its instances say, each weighed by its attention.

Javed, Juyal, Padigela, Taylor-Weiner, Yu, Prakash: Additive MIL: Intrinsically interpretable multiple instance learning
for pathology, NeurIPS 2022, https://arxiv.org/abs/2206.01794.

1. ``h = embed(x)``; ``a = softmax(s(h))`` within the bag, s the attention of ABMIL.
2. ``logits = Σ_n f(a_n h_n)`` with a small network f. The evidence of an instance is its own summand, so that a map of
   the evidence is the prediction itself, spread over the slide.

With ``bias="bag"``, the default, the layers of f have no bias and the bag has one. As ReLU then obeys ``f(a h) = a
f(h)``, equation 2 is ``Σ_n a_n f(h_n) + b``: evidence adds up to ``logits - b``, and every what-if is exact. With
``bias="tiles"`` all layers have biases, which every instance adds, as in the authors' code: the more tiles a slide has,
the more often the last bias counts, and what-ifs run the model again.

Deviations from the authors' code: the bias above; the attention is that of ABMIL, where the code has layers with batch
norm, whose statistics would be those of a single slide.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.kernels import attention_pool, segment_softmax, segment_sum
from eosin.mil._attention import by_rows
from eosin.mil._closed_forms import PooledBag
from eosin.mil._layers import Activation, Attention, as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput, AttentionOutput
from eosin.mil.subsets import as_array


@dataclass(frozen=True, eq=False)
class AdditiveOutput(AttentionOutput):
    """Output of additive MIL.

    Attributes
    ----------
    instance_logits : (N, K) float
        The evidence of each instance: summed over a bag, its logits, but for the bias of the bag.
    """

    instance_logits: Tensor


@AGGREGATORS.register("additive")
class Additive(Aggregator):
    """Attention before a network of single instances, whose answers are added up.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims, embed_activation, dropout
        Of the layers before the attention.
    gated, hidden
        Of the attention; see `eosin.mil._layers.Attention`.
    head_dims : tuple of int
        Widths of the hidden layers of f, each followed by ReLU; none makes f linear.
    head_dropout : float
        After the hidden layers of f.
    bias : {"bag", "tiles"}
        Whether the bag has one bias, or every layer of f, so that every instance adds it.
    """

    output_type = AdditiveOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.25,
        gated: bool = True,
        hidden: Count = 128,
        head_dims: tuple[Count, ...] = (128,),
        head_dropout: Dropout = 0.25,
        bias: Literal["bag", "tiles"] = "bag",
    ) -> None:
        width = (in_dim, *embed_dims)[-1]
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.attention = Attention(width, hidden=hidden, gated=gated)
        each = bias == "tiles"
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip((width, *head_dims), head_dims, strict=False):
            layers += [nn.Linear(fan_in, fan_out, bias=each), nn.ReLU(), nn.Dropout(head_dropout)]
        self.head = nn.Sequential(*layers, nn.Linear((width, *head_dims)[-1], n_outputs, bias=each))
        self.bias = None if each else nn.Parameter(torch.zeros(n_outputs))

    def forward(self, bags: PackedBags) -> AdditiveOutput:
        """Return logits, attended means, scores, instances and their evidence."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AdditiveOutput:
        """Return the output for bags of embedded instances."""
        pool = self.attention.pool(bags.values, bags)
        bag = as_dtype(pool.pooled[:, 0], self.attention.w.weight)  # (B, E)
        weights = segment_softmax(pool.scores, bags.cu_seqlens)  # (N, 1)
        if self.bias is None:
            evidence = by_rows(lambda rows, share: self.head(share * rows), bags.values, weights.to(bags.values.dtype))
            logits = segment_sum(evidence, bags.cu_seqlens)
        else:
            said = by_rows(self.head, bags.values)
            evidence = weights * said
            logits = attention_pool(pool.scores, said, bags.cu_seqlens)[0][:, 0] + self.bias
        return AdditiveOutput(logits.to(bag.dtype), bag, pool.scores, bags.values, evidence)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> PooledBag | None:
        if self.bias is None:
            return None
        assert isinstance(output, AdditiveOutput)  # what the model declares
        how = "All numbers are exact: the model adds up what its tiles say, each weighed by its attention, so every "
        how += "prediction follows from sums without running it again"
        terms = as_array(by_rows(self.head, output.instances))
        return PooledBag(as_array(output.scores), terms[:, None], as_array(self.bias), how=how)


RECIPES.add("additive", Recipe(aggregator=Component(name="additive")))

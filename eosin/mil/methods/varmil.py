"""VarMIL: the bag is the attention-weighted mean of its instances and their attention-weighted variances.

Carmichael, Song, Chen, Williamson, Chen, Mahmood: Incorporating intratumoral heterogeneity into weakly-supervised deep
learning models via variance pooling, MICCAI 2022, https://arxiv.org/abs/2206.08885.

1. ``h = relu(W x + b)``; ``a = softmax(s(h))`` within the bag, s the gated attention of ABMIL; ``z = Σ_n a_n h_n``.
2. With learned directions v_p, ``var_p = Σ_n a_n (v_p · h_n - Σ_m a_m v_p · h_m)²``, the spread of the tiles along
   each, and ``u = sqrt(var)`` or ``log(0.01 + var)``; ``logits = W_2 relu(W_1 [z; u] + b_1) + b_2``.
3. With `separate`, means and variances have an attention of their own each.

A variance does not change when a tile is far from all others but weighs nothing, and it is 0 for a bag of one tile.

Deviations from the authors' code: what it calls gated is the attention without a gate and the other way around; here
words mean what they say. The root has an added 1e-12, since its slope at 0 is infinite and a bag of one tile has 0.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.kernels import attention_pool
from eosin.mil._closed_forms import ReadoutBag
from eosin.mil._layers import Activation, Attention, as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, Aggregator, AggregatorOutput, AttentionOutput

SMALLEST_VARIANCE = 1e-12  # added before the root
LOG_FLOOR = 0.01  # added before the logarithm


@AGGREGATORS.register("varmil")
class VarMil(Aggregator):
    """Attention pooling of means and variances, equations 1 to 3.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims, embed_activation, dropout
        Of the layers before the attention.
    gated, hidden
        Of the attention; see `eosin.mil._layers.Attention`.
    separate : bool
        Whether variances have their own attention, the second column of the scores.
    variances : int
        Directions P of equation 2.
    spread : {"root", "log"}
        u of equation 2.
    head_dim : int
        Width of the hidden layer after the pooling.
    """

    output_type = AttentionOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        embed_activation: Activation = "relu",
        dropout: Dropout = 0.25,
        gated: bool = True,
        hidden: Count = 256,
        separate: bool = False,
        variances: Count = 10,
        spread: Literal["root", "log"] = "root",
        head_dim: Count = 256,
    ) -> None:
        width = (in_dim, *embed_dims)[-1]
        super().__init__(in_dim, n_outputs, embed_dim=width + variances)
        self.spread = spread
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.attentions = nn.ModuleList(Attention(width, hidden=hidden, gated=gated) for _ in range(1 + separate))
        self.directions = nn.Linear(width, variances, bias=False)
        self.head = nn.Sequential(
            nn.Linear(self.embed_dim, head_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(head_dim, n_outputs)
        )

    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Return logits, means and spreads of the bags, scores and instances."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        scores = torch.cat([attention(bags.values) for attention in self.attentions], 1)  # (N, 1 or 2)
        along = self.directions(bags.values)
        mean = attention_pool(scores[:, :1], bags.values, bags.cu_seqlens)[0][:, 0]
        level = attention_pool(scores[:, -1:], along, bags.cu_seqlens)[0][:, 0]  # (B, P)
        # from the mean, not as a difference of two large sums
        squares = (along - level[bags.bag_index()].to(along.dtype)).square()
        variance = attention_pool(scores[:, -1:], squares, bags.cu_seqlens)[0][:, 0]
        bag = as_dtype(torch.cat([mean, self._spread(variance)], 1), self.directions.weight)
        return AttentionOutput(self.head(bag), bag, scores, bags.values)

    def _spread(self, variance: Tensor) -> Tensor:
        return (variance + SMALLEST_VARIANCE).sqrt() if self.spread == "root" else (variance + LOG_FLOOR).log()

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> ReadoutBag | None:
        assert isinstance(output, AttentionOutput)  # what the model declares
        if output.scores.shape[1] > 1:
            return None  # the form has the same values in every branch
        instances = output.instances.detach().double().cpu()
        directions = self.directions.weight.detach().double().cpu()
        along = instances @ directions.T
        head = copy.deepcopy(self.head).double().cpu()
        width, count = self.embed_dim - len(directions), len(directions)

        def read(pooled: Tensor) -> Tensor:
            mean, first, second = torch.split(pooled[:, 0], [width, count, count], 1)
            return head(torch.cat([mean, self._spread((second - first.square()).clamp_min(0))], 1))  # type: ignore[no-any-return]

        how = (
            "All numbers are exact: the model reads means and variances of its tiles, which follow from three sums for "
        )
        how += "every set; its last layers were run on those of every set, the rest of the model once"
        values = torch.cat([instances, along, along.square()], 1)[:, None]
        return ReadoutBag(output.scores.detach().double().cpu()[:, None], values, read, how=how)


RECIPES.add("varmil", Recipe(aggregator=Component(name="varmil")))

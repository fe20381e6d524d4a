"""DTFD-MIL: a slide is cut into pseudo-bags, and what is distilled from each of them is pooled once more.

Zhang, Meng, Zhao, Qiao, Yang, Coupland, Zheng: DTFD-MIL: Double-tier feature distillation multiple instance learning
for histopathology whole slide image classification, CVPR 2022, https://arxiv.org/abs/2203.12081.

1. The instances ``h = relu(W x)`` of a bag are spread at random over `groups` pseudo-bags of equal size.
2. First tier, for each pseudo-bag: ``a = softmax(s(h))``, ``f = Σ_n a_n h_n``, logits ``W_1 f + b_1`` with the label of
   its slide (term `dtfd_first_tier`). The class activation of an instance is ``c_n = W_1 (a_n h_n)``, and its rank the
   probability of the last class, ``softmax(c_n)_K``.
3. Distillation gives the second tier, of each pseudo-bag: ``afs``, the pooled f; ``max``, the `kept` instances of the
   highest rank; ``maxmin``, these and the `kept` of the lowest.
4. Second tier: attention pooling with weights of its own, ``logits = W_2 Σ b_g f_g + b_2``. The gradient of its loss
   reaches both tiers.

In evaluation the pseudo-bags are not drawn but dealt: instance i of the list goes to pseudo-bag i mod `groups`, so that
a prediction does not depend on chance and every pseudo-bag has tiles from the whole slide. What-ifs run the model
again, because without a tile all others are dealt again.

Deviations from the authors' code. It draws pseudo-bags in evaluation, too, once, so that the same slide has another
prediction each time. It trains both tiers by optimizers of their own, of which the first clips and steps before the
second reads its gradients; here one optimizer minimises the sum. One logit ranks by itself; the code needs two
classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eosin.kernels import bag_offsets, segment_softmax, segment_topk_mask
from eosin.mil._layers import Attention, as_dtype, embedding
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, Dropout
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, Aggregator, AggregatorOutput, AttentionOutput, LossTerm
from eosin.mil.task import Task

Distillation = Literal["afs", "max", "maxmin"]


@dataclass(frozen=True, eq=False)
class DtfdOutput(AttentionOutput):
    """Output of DTFD-MIL: scores are logarithms of the weights of tiles in the bag, of both tiers together.

    Attributes
    ----------
    pseudo_logits : (B, groups, K) float
        Of the first tier; 0 for pseudo-bags without instances.
    pseudo_filled : (B, groups) bool
        Whether a pseudo-bag has instances.
    """

    pseudo_logits: Tensor
    pseudo_filled: Tensor


@AGGREGATORS.register("dtfd")
class Dtfd(Aggregator):
    """Two tiers of attention pooling, equations 1 to 4.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims : tuple of int
        Widths of the layers before the first tier, without biases.
    dropout : float
        Of those layers.
    hidden : int
        Width of both attentions, which are gated.
    groups : int
        Pseudo-bags of a bag.
    distillation : {"afs", "max", "maxmin"}
        Equation 3.
    kept : int
        Instances of the highest, and of the lowest, rank.
    """

    output_type = DtfdOutput
    order_dependent = True

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[Count, ...] = (512,),
        dropout: Dropout = 0.0,
        hidden: Count = 128,
        groups: Count = 4,
        distillation: Distillation = "afs",
        kept: Count = 1,
    ) -> None:
        width = (in_dim, *embed_dims)[-1]
        super().__init__(in_dim, n_outputs, embed_dim=width)
        self.groups, self.distillation, self.kept = groups, distillation, kept
        self.embed = embedding(in_dim, embed_dims, bias=False, dropout=dropout)
        self.first, self.second = (Attention(width, hidden=hidden) for _ in range(2))
        self.first_classifier, self.classifier = (nn.Linear(width, n_outputs) for _ in range(2))

    def forward(self, bags: PackedBags) -> DtfdOutput:
        """Return logits, bag embeddings, weights of both tiers, instances and the logits of the first tier."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> DtfdOutput:
        """Return the output for bags of embedded instances."""
        order, counts = self._dealt(bags)
        lengths = tuple(counts.flatten().tolist())
        dealt = PackedBags(bags.values[order], bag_offsets(lengths, bags.values.device), lengths)  # (B * groups) bags
        pool = self.first.pool(dealt.values, dealt)
        pooled = as_dtype(pool.pooled[:, 0], self.classifier.weight)  # (B * groups, E)
        filled = counts > 0  # on the host, so that no step waits for a device
        first = self.first_classifier(pooled).view(bags.n_bags, self.groups, -1) * filled[..., None].to(pooled.device)
        weights = segment_softmax(pool.scores, dealt.cu_seqlens)  # (N, 1)
        if self.distillation == "afs":
            number = filled.flatten().cumsum(0) - 1  # of each pseudo-bag among those with instances
            tier, per_bag = pooled[filled.flatten().nonzero()[:, 0].to(pooled.device)], filled.sum(1)
            rows = torch.repeat_interleave(number, counts.flatten()).to(pooled.device)
        else:
            per_bag = counts.clamp(max=self.kept * (2 if self.distillation == "maxmin" else 1)).sum(1)
            rows = torch.nonzero_static(self._chosen(dealt, weights), size=int(per_bag.sum()))[:, 0]
            tier = dealt.values[rows]
        upper = tuple(per_bag.tolist())
        second = PackedBags(tier, bag_offsets(upper, tier.device), upper)
        read = self.second.pool(second.values, second)
        bag = as_dtype(read.pooled[:, 0], self.classifier.weight)
        top = segment_softmax(read.scores, second.cu_seqlens)
        if self.distillation == "afs":
            whole = weights * top[rows]
        else:
            whole = torch.zeros_like(weights).index_copy(0, rows, top.to(weights.dtype))
        whole = torch.zeros_like(whole).index_copy(0, order, whole)  # in the order of the bags
        scores = whole.clamp_min(torch.finfo(whole.dtype).tiny).log()
        return DtfdOutput(self.classifier(bag), bag, scores, bags.values, first, filled.to(bag.device))

    def _dealt(self, bags: PackedBags) -> tuple[Tensor, Tensor]:
        """Return the rows of all pseudo-bags, (N,), and how many instances each has, (B, groups) on the host."""
        lengths = torch.tensor(bags.lengths)
        # as numpy's array_split and as dealing do: the first ones have one more
        counts = lengths[:, None] // self.groups + (torch.arange(self.groups) < lengths[:, None] % self.groups)
        device = bags.values.device
        bag = bags.bag_index()
        place = torch.arange(bags.n_instances, device=device) - bags.cu_seqlens[:-1].long()[bag]
        if self.training:  # a random place instead of that in the list
            shuffled = torch.rand(bags.n_instances, device=device).argsort()
            shuffled = shuffled[bag[shuffled].argsort(stable=True)]
            place = torch.empty_like(place).index_copy(0, shuffled, place)
        order = (bag * self.groups + place % self.groups).argsort(stable=True)
        return order, counts

    def _chosen(self, dealt: PackedBags, weights: Tensor) -> Tensor:
        """Return which instances go on to the second tier, (N,) bool, by equation 3."""
        with torch.no_grad():
            activation = nn.functional.linear(
                weights.to(dealt.values.dtype) * dealt.values, self.first_classifier.weight
            )
            rank = activation if self.n_outputs == 1 else activation.softmax(1)[:, -1:]
            chosen = segment_topk_mask(rank, dealt.cu_seqlens, self.kept)
            if self.distillation == "maxmin":
                rest = rank.masked_fill(chosen, torch.inf)  # of equal ranks none is both
                chosen = chosen | segment_topk_mask(rest, dealt.cu_seqlens, self.kept, largest=False)
        return chosen[:, 0]


@LOSS_TERMS.register("dtfd_first_tier")
class DtfdFirstTier(LossTerm):
    """The task's loss of every pseudo-bag with the label of its slide, equation 2; mean over those with instances."""

    requires = DtfdOutput

    def __init__(self, model: Aggregator, task: Task) -> None:
        super().__init__(model, task)
        self.task = task

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the term, a scalar."""
        assert isinstance(output, DtfdOutput)  # checked when built
        losses = [self.task.bag_losses(logits, target) for logits in output.pseudo_logits.unbind(1)]
        filled = output.pseudo_filled
        return (torch.stack(losses, 1) * filled).sum() / filled.sum().clamp_min(1)


for _name, _distillation in (("dtfd", "afs"), ("dtfd_max", "max"), ("dtfd_maxmin", "maxmin")):
    _recipe = Recipe(
        aggregator=Component(name="dtfd", options={"distillation": _distillation}),
        terms=(Term(name="dtfd_first_tier"),),
        training=Training(
            optimizer="adam", lr=1e-4, weight_decay=1e-4, epochs=200, patience=20, clip_norm=5.0, schedule="constant"
        ),
    )
    RECIPES.add(_name, _recipe)

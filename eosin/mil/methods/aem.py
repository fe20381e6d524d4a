"""AEM: attention is kept spread out by maximising its entropy.

Zhang, Shui, Cai, Wang, Zheng, Yang: AEM: Attention entropy maximization for multiple instance learning based whole
slide image classification, MICCAI 2025, https://arxiv.org/abs/2406.15303.

1. ``L = Σ_n a_n log a_n = -H(a)`` for each attention row of a bag, added to the objective with weight λ; minimising
   it makes the entropy grow.
2. With `anneal`, ``λ_t = ½ λ (1 + cos(π t / T))`` over the training (the later version of the paper).

Reduction: mean over the rows (heads, branches, classes) and over the bags of a pack, no division by the number of
instances. The authors' code sums for one network, averages for the others and divides once more when it evaluates.

Deviations from the authors' code. The entropy comes from the scores, not from the weights, so that weights of exactly
0 (hidden instances) contribute 0 instead of NaN. The entropy is at most log n, so λ reaches further in larger bags;
`normalised` divides each bag's by log n, and is off by default as it is not part of the method.
The recipe embeds to 512, the authors' width for features of 1,024; theirs is half of other widths.
"""

import math

import torch
from torch import Tensor

from eosin.kernels import segment_attention_entropy
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.bags import PackedBags
from eosin.mil.slots import LOSS_TERMS, Aggregator, AggregatorOutput, AttentionOutput, LossTerm
from eosin.mil.task import Task


@LOSS_TERMS.register("attention_entropy")
class AttentionEntropy(LossTerm):
    """Negative entropy of the attention in nats; mean over rows and bags.

    Parameters
    ----------
    model : Aggregator
    task : Task
    normalised : bool
        Divide by log n, so that the term lies in [-1, 0]; bags of one instance count as 0.
    anneal : bool
        Fade the term out by half a cosine over the training, equation 2.
    """

    requires = AttentionOutput

    def __init__(self, model: Aggregator, task: Task, *, normalised: bool = False, anneal: bool = False) -> None:
        super().__init__(model, task)
        self.normalised = normalised
        self.anneal = anneal

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the term, a scalar of at most 0."""
        assert isinstance(output, AttentionOutput)  # checked when built
        entropy = segment_attention_entropy(output.scores, bags.cu_seqlens)  # (B, H)
        if self.normalised:
            lengths = torch.tensor(bags.lengths, dtype=entropy.dtype, device=entropy.device)
            entropy = entropy / lengths.clamp(min=2).log()[:, None]
        share = (1 + math.cos(math.pi * self.progress)) / 2 if self.anneal else 1.0
        return -share * entropy.mean()


RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"hidden": 128, "embed_bias": False, "dropout": 0.0}),
    terms=(Term(name="attention_entropy", weight=0.1),),
    training=Training(
        optimizer="adamw", lr=1e-4, weight_decay=1e-5, epochs=50, patience=0, schedule="cosine", select="metric"
    ),
)
RECIPES.add("aem", RECIPE)

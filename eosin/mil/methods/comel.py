"""CoMEL: attention through grouped tokens, pseudo-labels of patches, and low-rank updates that keep out of each other's
way.

Lee, Lee, Kim, Kim: Continual multiple instance learning with enhanced localization for histopathological whole slide
image analysis, ICCV 2025, https://arxiv.org/abs/2507.02395.

1. and 2. Attention through grouped tokens, and the backbone of it: aggregator `gdat`, in `eosin/mil/methods/gdat.py`.
3. Pseudo-labels (term `comel_bppl`), for bags of a positive class that are predicted right with probability above τ1:
   prototypes ``c⁺ = Σ a x``, ``c⁻ = Σ (1 - a) x / Σ (1 - a)``; posterior ``softmax([cos(x, c⁻), cos(x, c⁺)] / T)``;
   instances with a posterior above τ2 get its class as label y; with ``p = (a - min a) / (max a + 1e-10)`` the loss
   of a bag is ``-1/n Σ log(p_y + floor)``; τ2 = ½ (1 + τ q), q the mean of probability times correctness.
4. A sequence of tasks is learnt by low-rank updates and a head per task (aggregator and strategy `owlora`, in
   `eosin/mil/methods/owlora.py`): ``eosin train --continue-from RUN`` with the features and labels of the next task.
5. `eosin.mil.continual.continual_metrics` say how a sequence was learnt: average, forgetting, backward transfer.

Deviations from the authors' code. q in equation 3 is a moving average over steps; the code renews it once per epoch,
at which the objective jumps. `floor` is 1e-4; the code's 1e-10 lets one instance of the least attention dominate.
Those of the aggregator stand in its file.
"""

import torch
from torch import Tensor
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.kernels import segment_max, segment_pool, segment_softmax, segment_sum
from eosin.mil._attention import bag_product
from eosin.mil._recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Positive, Share
from eosin.mil.slots import LOSS_TERMS, Aggregator, AggregatorOutput, AttentionOutput, LossTerm
from eosin.mil.task import Task, require_classes


@LOSS_TERMS.register("comel_bppl")
class ComelPseudoLabels(LossTerm):
    """Pseudo-labels of instances from bag prototypes, equation 3; mean over the bags of a pack.

    Parameters
    ----------
    model : Aggregator
    task : Task
        Must have classes.
    positive : tuple of int or None
        Classes with something to find; None is every second, as in a sequence of pairs (normal, tumour).
    confidence : float
        τ1: least probability of the bag's class.
    quality_weight : float
        τ: how much the quality of the predictions raises τ2.
    temperature : float
        T.
    floor : float
        Added to the probabilities before the logarithm.
    momentum : float
        Of the moving average q.
    """

    requires = AttentionOutput
    quality: Tensor

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        positive: tuple[int, ...] | None = None,
        confidence: Share = 0.95,
        quality_weight: Share = 0.5,
        temperature: Positive = 1.0,
        floor: Positive = 1e-4,
        momentum: Share = 0.99,
    ) -> None:
        super().__init__(model, task)
        require_classes(task, "comel_bppl")
        self.task = task
        n_classes = max(2, task.n_outputs)
        self.positive = tuple(range(1, n_classes, 2)) if positive is None else positive
        if not self.positive or not set(self.positive) <= set(range(n_classes)):
            raise ConfigError(
                f"comel_bppl: positive {self.positive} must name some of the task's classes 0 to {n_classes - 1}"
            )
        self.confidence = confidence
        self.quality_weight = quality_weight
        self.temperature = temperature
        self.floor = floor
        self.momentum = momentum
        self.register_buffer("quality", torch.zeros(()))

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the loss, a scalar; 0 when no bag qualifies."""
        assert isinstance(output, AttentionOutput)  # checked when built
        probability, right, positive = self._judged(output.logits.detach(), target)
        threshold = (1 + self.quality_weight * self.quality) / 2
        if self.training:
            self.quality.lerp_((probability * right).mean().to(self.quality.dtype), 1 - self.momentum)
        weights = segment_softmax(output.scores, bags.cu_seqlens).mean(1, keepdim=True)
        losses = pseudo_label_losses(
            weights,
            output.instances.detach(),
            bags,
            threshold=threshold,
            temperature=self.temperature,
            floor=self.floor,
        )
        counted = right & positive & (probability > self.confidence)
        return torch.where(counted, losses, 0.0).mean()

    def _judged(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probability of the predicted class, whether it is right, and whether the bag is positive, (B,)."""
        if logits.shape[1] == 1:
            logits = functional.pad(logits, (1, 0))
            true = target.long()
        else:
            true = self.task.memberships(target).argmax(1)
        probability, predicted = logits.float().softmax(1).max(1)
        positive = (true[:, None] == torch.tensor(self.positive, device=true.device)).any(1)
        return probability, predicted == true, positive


def pseudo_label_losses(
    weights: Tensor,
    instances: Tensor,
    bags: PackedBags,
    *,
    threshold: Tensor | float,
    temperature: float = 1.0,
    floor: float = 1e-4,
) -> Tensor:
    """Return the pseudo-label loss of each bag, (B,), equation 3.

    Parameters
    ----------
    weights : (N, 1) float
        Attention, summing to 1 in each bag; the gradient goes here only.
    instances : (N, E) float
    bags : PackedBags
    threshold : float or scalar tensor
        τ2.
    temperature, floor : float
    """
    instances = instances.to(weights.dtype)
    labels, chosen = pseudo_labels(weights.detach(), instances, bags, threshold=threshold, temperature=temperature)
    bag = bags.bag_index()
    low, high = -segment_max(-weights, bags.cu_seqlens)[bag], segment_max(weights, bags.cu_seqlens)[bag]
    p = ((weights - low) / (high + 1e-10))[:, 0]
    losses = torch.where(chosen, -torch.log(torch.where(labels == 1, p, 1 - p) + floor), 0.0)
    lengths = bags.cu_seqlens.diff().clamp(min=1)
    return segment_sum(losses[:, None], bags.cu_seqlens)[:, 0] / lengths


def pseudo_labels(
    weights: Tensor, instances: Tensor, bags: PackedBags, *, threshold: Tensor | float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the pseudo-label of each instance, (N,) int64 of zeros and ones, and whether it is sure, (N,) bool."""
    sums = segment_pool(torch.cat([1 - weights, weights], 1), instances, bags.cu_seqlens)  # (B, 2, E)
    rest = segment_sum(1 - weights, bags.cu_seqlens).clamp_min(1e-12)  # (B, 1)
    prototypes = torch.stack([sums[:, 0] / rest, sums[:, 1]], 1)
    cosines = bag_product(functional.normalize(instances), functional.normalize(prototypes, dim=2), bags.lengths)
    posterior, label = (cosines / temperature).softmax(1).max(1)
    return label, posterior > threshold


RECIPE = Recipe(
    aggregator=Component(name="gdat"),
    terms=(Term(name="comel_bppl"),),
    training=Training(optimizer="adam", lr=1e-4, weight_decay=1e-5, epochs=100, patience=0, schedule="cosine"),
)
RECIPES.add("comel", RECIPE)

"""DSMIL: every instance is compared with the critical instance of each class.

Li, Li, Eliceiri: Dual-stream multiple instance learning network for whole slide image classification with
self-supervised contrastive learning, CVPR 2021, https://arxiv.org/abs/2011.08939.

1. Instance stream: ``c = W_i x + b`` (N, K); the critical instance of class k is ``m_k = argmax_n c_nk`` in the bag.
2. Bag stream: ``q(x) = tanh(W_2 relu(W_1 x))`` (one linear layer when not `nonlinear`), ``a_nk = softmax_n(q(x_n) ·
   q(x_{m_k}) / √A)``, ``z_k = Σ_n a_nk v(x_n)`` with v the identity or, with `passing_v`, ``relu(W_v dropout(x))``.
3. ``logits = Σ_k W_k z_k + b``: every output sees the rows of all classes.
4. Objective ``½ loss(bag logits) + ½ loss(max_n c)``, the second half being the term `dsmil_max`.
5. With ``prediction="mean"`` the logits are ``½ (bag logits + max_n c)``, in training and at inference, and the term is
   left out: the form of MHIM-MIL version 2.

Deviations from the authors' code. Of tied critical instances the first is taken, where the code's sort is unstable.
Both halves of the objective are the task's own loss: their sigmoid cross-entropy for a multi-label or binary task,
softmax cross-entropy for a classification. Weights start orthogonal with zero bias as in the training script, in the
recipe both classifiers at zero: unit rows read features of unit deviation, so that a fresh model has logits of several
units in a random direction, which a short training does not get rid of. The learning rate falls to 0, the code's to
5e-6. The code's `average` takes the mean of the two probabilities, and at inference alone. `PRESETS` are the variants
inside MHIM-MIL and PackMIL, which embed first and pool a projection.

Scores lie between -√A and √A, since queries do between -1 and 1. The gradient of the instance stream reaches one
instance per bag and class, so that which instance is critical at the start can decide whether a rare signal is found
(docs/methods.md).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from eosin.kernels import attention_pool, segment_max, segment_pool, segment_topk_mask
from eosin.mil.attention import bag_product
from eosin.mil.bags import PackedBags
from eosin.mil.layers import (
    Activation,
    as_dtype,
    embedding,
    initialise,
    require_counts,
    require_fractions,
)
from eosin.mil.recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.slots import (
    AGGREGATORS,
    LOSS_TERMS,
    Aggregator,
    AggregatorOutput,
    AttentionOutput,
    LossTerm,
)
from eosin.mil.tasks import Task


@dataclass(frozen=True, eq=False)
class DsmilOutput(AttentionOutput):
    """Output of DSMIL: scores have a column per class.

    Attributes
    ----------
    instance_logits : (N, K) float
        Of the instance stream.
    """

    instance_logits: Tensor


@AGGREGATORS.register("dsmil")
class Dsmil(Aggregator):
    """Attention by similarity to the critical instances, equations 1 to 3.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    embed_dims : tuple of int
        Widths of layers before both streams; none uses the features as they are.
    embed_activation, dropout
        Of those layers.
    hidden : int
        Width A of the query.
    nonlinear : bool
        Two query layers instead of one.
    passing_v : bool
        Pool a learned projection instead of the instances.
    value_dropout : float
        Before that projection.
    prediction : {"bag", "mean"}
        Logits of the bag stream, or the mean of both streams, equation 5.
    init : {"orthogonal", "zero_heads", "default", "xavier"}
        Initial weights, with `zero_heads` orthogonal but for both classifiers; biases are zero except with torch's
        default.
    """

    output_type = DsmilOutput

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        embed_dims: tuple[int, ...] = (),
        embed_activation: Activation = "relu",
        dropout: float = 0.0,
        hidden: int = 128,
        nonlinear: bool = True,
        passing_v: bool = False,
        value_dropout: float = 0.0,
        prediction: Literal["bag", "mean"] = "bag",
        init: Literal["orthogonal", "zero_heads", "default", "xavier"] = "orthogonal",
    ) -> None:
        require_counts("dsmil", hidden=hidden)
        require_fractions("dsmil", value_dropout=value_dropout)
        width = (in_dim, *embed_dims)[-1]
        super().__init__(in_dim, n_outputs, embed_dim=n_outputs * width)
        self.prediction = prediction
        self.embed = embedding(in_dim, embed_dims, activation=embed_activation, dropout=dropout)
        self.instance_classifier = nn.Linear(width, n_outputs)
        second = [nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh()] if nonlinear else []
        self.query = nn.Sequential(nn.Linear(width, hidden), *second)
        value = [nn.Dropout(value_dropout), nn.Linear(width, width), nn.ReLU()] if passing_v else []
        self.value = nn.Sequential(*value)
        self.classifier = nn.Linear(n_outputs * width, n_outputs)
        if init in ("default", "xavier"):
            initialise(self, init)
        else:
            self.apply(_orthogonal)
        if init == "zero_heads":
            for head in (self.instance_classifier, self.classifier):
                nn.init.zeros_(head.weight)

    def forward(self, bags: PackedBags) -> DsmilOutput:
        """Return logits, bag rows, scores, pooled instances and instance logits."""
        return self.aggregate(bags.with_values(self.embed(bags.values)))

    def aggregate(self, bags: PackedBags) -> DsmilOutput:
        """Return the output for bags of embedded instances."""
        instance_logits = self.instance_classifier(bags.values)  # (N, K)
        query = self.query(bags.values)  # (N, A)
        critical = segment_topk_mask(instance_logits, bags.cu_seqlens, 1).to(query.dtype)  # one 1 per bag and class
        key = segment_pool(critical, query, bags.cu_seqlens).to(query.dtype)  # (B, K, A)
        scores = bag_product(query, key, bags.lengths) * query.shape[1] ** -0.5
        values = self.value(bags.values)
        rows, _, _ = attention_pool(scores, values, bags.cu_seqlens)
        bag = as_dtype(rows.flatten(1), self.classifier.weight)  # (B, K * E)
        logits = self.classifier(bag)
        if self.prediction == "mean":
            logits = (logits + segment_max(instance_logits, bags.cu_seqlens)) / 2
        return DsmilOutput(logits, bag, scores, values, instance_logits)


@LOSS_TERMS.register("dsmil_max")
class DsmilMax(LossTerm):
    """The task's loss on the largest instance logit of each class, equation 4; mean over bags."""

    requires = DsmilOutput

    def __init__(self, model: Aggregator, task: Task) -> None:
        super().__init__(model, task)
        self.task = task

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return the loss, a scalar; the logits of an empty bag count as 0."""
        assert isinstance(output, DsmilOutput)  # checked when built
        return self.task.loss(segment_max(output.instance_logits, bags.cu_seqlens), target)


def _orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)


_EMBEDDED: dict[str, object] = {"embed_dims": (512,), "dropout": 0.25, "passing_v": True, "init": "xavier"}
PRESETS: dict[str, dict[str, object]] = {
    "mhim": _EMBEDDED,
    "mhim_v2": _EMBEDDED | {"embed_activation": "gelu", "prediction": "mean"},
    "packmil": _EMBEDDED | {"embed_activation": "gelu"},
}

RECIPE = Recipe(
    aggregator=Component(name="dsmil", options={"init": "zero_heads"}),
    terms=(Term(name="dsmil_max", weight=0.5),),
    bag_weight=0.5,
    training=Training(optimizer="adam", lr=1e-4, betas=(0.5, 0.9), weight_decay=1e-3, epochs=50, schedule="cosine"),
)
RECIPES.add("dsmil", RECIPE)

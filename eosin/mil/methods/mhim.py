"""MHIM-MIL: a moving-average teacher hides what is easy, and the student learns from the rest.

Version 1: Tang, Huang, Zhang, Zhou, Zhang, Liu: Multiple instance learning framework with masked hard instance mining
for whole slide image classification, ICCV 2023, https://arxiv.org/abs/2307.15254. Version 2: the same authors'
extension, Multiple instance learning framework with masked hard instance mining for gigapixel histopathology image
analysis, IJCV 2025.

Version 1 (`mhim`), for each bag of n instances:

1. The teacher, in training mode and without gradient, reads the whole bag: embedding F_t and attention scores (for
   DSMIL the largest instance logit instead).
2. Hidden is the union of three sets, their sizes relative to n: ⌈β_r n⌉ random instances, the ⌈β_l n⌉ lowest, and of
   the ⌈(β_h / r) n⌉ highest a random ⌈r ·⌉ ("randomly high"; all of the ⌈β_h n⌉ highest for r = 1). With several
   attention rows each row votes for its highest, the most voted count, and likewise for the lowest.
3. The student reads the instances that are left. Objective: bag loss ``+ α · (-Σ_j softmax(F_t / τ)_j log
   softmax(F_s)_j)`` over the features j of the bag embeddings; an embedding of several rows (one per class in DSMIL)
   has one softmax per row, and the mean over the rows is taken. With DSMIL the bag loss is ``½ bag + ½ maximum``.
4. After the step ``θ_t ← m θ_t + (1 - m) θ_s``. With `decay`, β_h falls to 0 by half a cosine over the training; with
   `momentum_schedule="cosine"`, m rises to 1: ``f + ½ (b - f) (1 + cos(π t / T))``.

Version 2 (`mhim_v2`):

5. Instances are ranked by ``p_n = max_c softmax_c(W (a_n h_n))``, the classifier on the weighted instance. For TransMIL
   the weighted instance is ``W_out concat_heads(a_hn v_hn)``, with attention and values of the first layer. DSMIL ranks
   as in version 1, and its one bag loss is that of the mean of its two logits.
6. The highest are hidden as in 2 with constant β_h; of the L survivors ``⌊(1 - random_mask_ratio) L⌋`` are kept at
   random, or `keep_at_least` if that is more; a bag of no more than these is left whole. The others are recycled: k
   global tokens Q read them, ``Z = out(attention(LN(Q), LN(rest)))`` with shared norm and without biases in q, k, v;
   the student reads [kept; Z]. After the step ``Q ← m_q Q + (1 - m_q) Z``. A bag that keeps few instances is given the
   first ⌊share · kept⌋ rows of Z only.

Deviations from the authors' code. `random_mask_ratio` is the fraction that is removed, 0.8; the code's `merge_ratio` is
the fraction that is kept, and its documentation contradicts it. Only the first bias of the classifier enters p in the
code, which cancels; `score_bias` adds all of them. Tokens are updated after the backward pass, not before it, from the
mean over the bags of a pack. A bag that would be hidden whole is left whole, and version 2 keeps at least one instance.
The code gives every bag all k tokens; beside a handful of kept instances the student then learns to read the class from
its tokens, which the deployed model does not see, and on whole bags it says nothing. `token_share` keeps them a
minority; it changes nothing where a bag keeps 10 k instances, and none is the code. The recipes keep at least 100
instances, for biopsies and cores: a student that sees 20 of 100 tiles misses a tumour of 3 % half of the time and
learns that it means nothing, one that sees 100 misses it once in 20; and 3 % of six instances, rounded up, are a sixth
of them. From 500 instances on it changes nothing. The student embeds only what is left, instead of embedding all and
then hiding. DSMIL predicts with the bag stream after version 1, where the code takes the mean of both probabilities.
The learning rate of version 2 falls to 0, the code's to 1e-7. Hiding uses boolean masks; there is no loop over bags.
Version 1 waits once per step for the number of instances left.

The teacher starts as the student, or with `init_from` as a model that was trained plainly, whose embedding the
student then takes too (the paper's order: `eosin train` with the recipe of the same aggregator, then with this one).
"""

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.layers import require_fractions
from eosin.mil.masking import fraction_counts, leaves_some, random_subset, randomly_high, voted
from eosin.mil.methods.abmil import PRESETS as ABMIL_PRESETS
from eosin.mil.methods.dsmil import PRESETS as DSMIL_PRESETS
from eosin.mil.methods.mhim_ranking import instance_probability, rankings, require_linear_classifier
from eosin.mil.methods.mhim_recycle import GlobalRecycle
from eosin.mil.methods.mhim_teacher import (
    MomentumSchedule,
    Teacher,
    consistency_loss,
    cosine,
    embedding_rows,
    started,
)
from eosin.mil.methods.transmil import PRESETS as TRANSMIL_PRESETS
from eosin.mil.recipe import RECIPES, Component, Recipe, Term, Training
from eosin.mil.slots import STRATEGIES, Aggregator, AttentionOutput, Step, Strategy
from eosin.mil.tasks import Task


@runtime_checkable
class EmbeddingAggregator(Protocol):
    """An aggregator that can start from embedded instances: ``forward`` is `embed`, then `aggregate`."""

    embed: nn.Module

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        ...


@STRATEGIES.register("mhim")
class Mhim(Strategy):
    """Masked hard instance mining, version 1, equations 1 to 4.

    Parameters
    ----------
    model : Aggregator
        The student.
    task : Task
    random_ratio, low_ratio, high_ratio : float
        Fractions β_r, β_l and β_h of a bag that are hidden.
    high_factor : float
        r: the highest are drawn from 1 / r times as many.
    decay : bool
        β_h falls to 0.
    consistency : float
        Weight α of the consistency between the embeddings.
    temperature : float
        τ of the teacher.
    momentum : float
        m of the teacher.
    momentum_schedule : {"constant", "cosine"}
    init_from : path or None
        Folder of a plainly trained model of the same aggregator.
    """

    requires = AttentionOutput

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        random_ratio: float = 0.5,
        low_ratio: float = 0.0,
        high_ratio: float = 0.01,
        high_factor: float = 0.5,
        decay: bool = True,
        consistency: float = 0.1,
        temperature: float = 0.1,
        momentum: float = 0.9999,
        momentum_schedule: MomentumSchedule = "constant",
        init_from: Path | None = None,
    ) -> None:
        super().__init__(model, task)
        require_fractions(
            "mhim", random_ratio=random_ratio, low_ratio=low_ratio, high_ratio=high_ratio, high_factor=high_factor
        )
        self.ratios = (random_ratio, low_ratio, high_ratio)
        self.high_factor = high_factor
        self.decay = decay
        self.consistency = consistency
        self.temperature = _positive(temperature)
        self.teacher = started(Teacher(model, momentum=momentum, schedule=momentum_schedule), model, init_from)

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Hide, let the student read the rest, and compare the embeddings."""
        whole = self.teacher(bags)
        left = bags.select(~self.hidden(rankings(whole), bags))
        output = self.model(left)
        loss = consistency_loss(embedding_rows(output), embedding_rows(whole), self.temperature)
        return Step(output, left, {"consistency": self.consistency * loss})

    def hidden(self, ranks: Tensor, bags: PackedBags) -> Tensor:
        """Return which instances are hidden given their scores (N, H): (N,) bool."""
        random_ratio, low_ratio, high_ratio = self.ratios
        if self.decay:
            high_ratio = cosine(high_ratio, 0.0, self.progress)
        hidden = random_subset(bags, fraction_counts(bags, random_ratio))
        hidden |= voted(ranks, bags, fraction_counts(bags, low_ratio), largest=False)
        hidden |= randomly_high(ranks, bags, high_ratio, self.high_factor)[0]
        return hidden & leaves_some(hidden, bags)

    def after_step(self, step: Step) -> None:
        """Let the teacher follow."""
        self.teacher.follow(self.model, self.progress)


@STRATEGIES.register("mhim_v2")
class MhimV2(Strategy):
    """Masked hard instance mining, version 2, equations 5 and 6.

    Parameters
    ----------
    model : Aggregator
        The student; must embed instances one by one before it aggregates them.
    task : Task
    high_ratio, high_factor : float
        β_h and r as in version 1, constant.
    random_mask_ratio : float
        Fraction of the other instances that is taken away at random and recycled.
    keep_at_least : int
        A bag of at most so many instances is left whole, and of a longer one as many are kept whatever that fraction.
    tokens : int
        Global tokens k.
    heads, head_dim : int
        Of the tokens' attention.
    token_dropout : float
        After its output projection.
    token_momentum : float
        m_q of the tokens.
    token_share : float or None
        Most tokens of a bag, as a fraction of the instances that it keeps; none gives every bag all.
    score_bias : bool
        Add the classifier's bias in equation 5.
    consistency, temperature, momentum, momentum_schedule, init_from
        As in version 1.
    """

    requires = AttentionOutput

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        high_ratio: float = 0.03,
        high_factor: float = 1.0,
        random_mask_ratio: float = 0.8,
        keep_at_least: int = 1,
        tokens: int = 10,
        heads: int = 8,
        head_dim: int = 64,
        token_dropout: float = 0.1,
        token_momentum: float = 0.9999,
        token_share: float | None = 0.1,
        score_bias: bool = False,
        consistency: float = 0.5,
        temperature: float = 0.1,
        momentum: float = 0.9997,
        momentum_schedule: MomentumSchedule = "constant",
        init_from: Path | None = None,
    ) -> None:
        super().__init__(model, task)
        require_fractions(
            "mhim_v2", high_ratio=high_ratio, high_factor=high_factor, random_mask_ratio=random_mask_ratio
        )
        if not isinstance(model, EmbeddingAggregator):
            raise ConfigError(
                f"mhim_v2 adds tokens to embedded instances, which {type(model).__name__} does not take; "
                "choose an aggregator with the methods embed and aggregate, or mhim"
            )
        require_linear_classifier(model)
        width = _embedded_width(model)
        self.high_ratio, self.high_factor = high_ratio, high_factor
        self.random_mask_ratio = random_mask_ratio
        self.keep_at_least = keep_at_least
        self.score_bias = score_bias
        self.consistency = consistency
        self.temperature = _positive(temperature)
        self.recycle = GlobalRecycle(
            width,
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            dropout=token_dropout,
            momentum=token_momentum,
            token_share=token_share,
        )
        self.teacher = started(Teacher(model, momentum=momentum, schedule=momentum_schedule), model, init_from)

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Hide, recycle, let the student read what is kept with the tokens, and compare the embeddings."""
        whole = self.teacher(bags)
        ranks = instance_probability(self.teacher.model, whole, bags, bias=self.score_bias)
        kept, rest, counts = self.divide(ranks, bags)
        student = self.model
        assert isinstance(student, EmbeddingAggregator)  # checked when built
        embedded = student.embed(bags.values)
        left = self.recycle(embedded, bags, kept, rest, counts)
        output = student.aggregate(left)
        loss = consistency_loss(embedding_rows(output), embedding_rows(whole), self.temperature)
        return Step(output, left, {"consistency": self.consistency * loss})

    def divide(self, ranks: Tensor, bags: PackedBags) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Return which instances are kept and which recycled, (N,) bool, and how many of each bag; equation 6."""
        hidden, taken = randomly_high(ranks, bags, self.high_ratio, self.high_factor)
        share, least = 1 - self.random_mask_ratio, self.keep_at_least
        taken = [count if length > max(count, least) else 0 for count, length in zip(taken, bags.lengths, strict=True)]
        hidden = hidden & torch.tensor(taken, device=hidden.device).bool()[bags.bag_index()]
        left = [length - count for length, count in zip(bags.lengths, taken, strict=True)]
        keep = [min(count, max(least, math.floor(share * count + 1e-9))) for count in left]
        kept = random_subset(bags, keep, among=~hidden)
        counts = [(stay, survivors - stay) for stay, survivors in zip(keep, left, strict=True)]
        return kept, ~hidden & ~kept, counts

    def after_step(self, step: Step) -> None:
        """Let the teacher and the tokens follow."""
        self.teacher.follow(self.model, self.progress)
        self.recycle.follow()


def _positive(temperature: float) -> float:
    if temperature <= 0:
        raise ConfigError(f"mhim: temperature {temperature} must be above 0")
    return temperature


def _embedded_width(model: EmbeddingAggregator) -> int:
    linear = [layer for layer in model.embed.modules() if isinstance(layer, nn.Linear)]
    assert isinstance(model, Aggregator)
    return linear[-1].out_features if linear else model.in_dim


# Table of the paper's settings: C16 is CAMELYON16, TCGA the two lung cohorts.
PRESETS: dict[str, dict[str, object]] = {
    "c16_abmil": {},
    "c16_transmil": {
        "random_ratio": 0.0,
        "low_ratio": 0.8,
        "high_ratio": 0.03,
        "momentum_schedule": "cosine",
    },
    "tcga_abmil": {
        "random_ratio": 0.7,
        "low_ratio": 0.2,
        "high_ratio": 0.02,
        "high_factor": 1.0,
        "consistency": 0.5,
        "momentum_schedule": "cosine",
    },
    "tcga_transmil": {
        "random_ratio": 0.6,
        "low_ratio": 0.2,
        "high_ratio": 0.02,
        "high_factor": 1.0,
        "consistency": 0.5,
    },
}

SMALL_BAGS: dict[str, object] = {"keep_at_least": 100}  # of version 2, see above

_TRAINING = Training(
    optimizer="adam", lr=2e-4, weight_decay=1e-5, epochs=200, patience=30, min_epochs=130, schedule="cosine"
)
_TRAINING_V2 = _TRAINING.model_copy(update={"patience": 20, "min_epochs": 75})
_DSMIL_TERMS = (Term(name="dsmil_max", weight=0.5),)

RECIPE = Recipe(
    aggregator=Component(name="abmil", options=ABMIL_PRESETS["mhim"]),
    strategy=Component(name="mhim", options=PRESETS["c16_abmil"]),
    training=_TRAINING,
)
RECIPES.add("mhim", RECIPE)
RECIPES.add(
    "mhim_dsmil",
    Recipe(
        aggregator=Component(name="dsmil", options=DSMIL_PRESETS["mhim"]),
        terms=_DSMIL_TERMS,
        strategy=Component(name="mhim", options=PRESETS["c16_abmil"]),
        bag_weight=0.5,
        training=_TRAINING,
    ),
)
RECIPES.add(
    "mhim_transmil",
    Recipe(
        aggregator=Component(name="transmil", options=TRANSMIL_PRESETS["mhim"]),
        strategy=Component(name="mhim", options=PRESETS["c16_transmil"]),
        training=_TRAINING,
    ),
)
RECIPES.add(
    "mhim_v2",
    Recipe(
        aggregator=Component(name="abmil", options=ABMIL_PRESETS["mhim_v2"]),
        strategy=Component(name="mhim_v2", options=SMALL_BAGS),
        training=_TRAINING_V2,
    ),
)
RECIPES.add(
    "mhim_v2_dsmil",
    Recipe(
        aggregator=Component(name="dsmil", options=DSMIL_PRESETS["mhim_v2"]),
        strategy=Component(name="mhim_v2", options=SMALL_BAGS),
        training=_TRAINING_V2,
    ),
)

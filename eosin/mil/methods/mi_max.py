"""MI-max: a bag is what its most positive instance is; of several starts the one with the smallest training loss stays.

Gonthier, Ladjal, Gousseau: Multiple instance learning on deep features for weakly supervised object detection with
extreme domain shifts, 2021, https://arxiv.org/abs/2008.01178, and, first, Gonthier, Gousseau, Ladjal, Bonfait: Weakly
supervised object detection in artworks, ECCV workshops 2018, https://arxiv.org/abs/1810.02569.

1. Instance scores on frozen features, for each class its own: ``f(x) = w · x + b`` (``linear``), ``w · relu(V x + c) +
   b`` (``hidden``), or ``max_r (w_r · x + b_r)`` over several hyperplanes (``polyhedral``). The logit of a bag is
   ``max_n f(x_n)``, so that an instance can only ever be evidence for a class.
2. Loss of a class: ``mean over bags of ((1 - y) / (1 - p) - y / p) tanh(max_n f(x_n)) + C |w|²``, with p the share of
   bags that have the class: positive and negative bags count equally, and a bag beyond doubt no longer counts.
3. `restarts` + 1 classifiers start from different weights and are trained beside each other. Of each class the one with
   the smallest training loss answers; a polyhedron keeps all its hyperplanes instead.

With one output (`--task binary`) this is the assumption of multiple-instance learning: a bag is positive because of
what it contains. So it is with several classes and ``background=true``: the first class then means that nothing was
found and has the logit 0; the recipes have it so. Otherwise every class has a detector of its own, which cannot learn a
class that lacks something. The strategy's ``loss=task`` trains equation 1 by the task's own loss, for tasks without
classes.

Deviations from the authors' code: p and the losses of the starts are moving averages over steps, where the code knows
the whole training set and reads the losses of its first batch after training, without tanh. The code multiplies scores
by those of an object detector, which tiles do not have. The hidden layer, which is in the paper and not in the code, is
not penalised. First weights are divided by the root of the width, for features of unit deviation.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.kernels import segment_max, segment_mean
from eosin.mil._attention import by_rows
from eosin.mil._closed_forms import MaxBag
from eosin.mil._layers import as_dtype
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.options import Count, NotNegative, Part, Whole
from eosin.mil.slots import AGGREGATORS, STRATEGIES, Aggregator, AggregatorOutput, Step, Strategy
from eosin.mil.task import Task, require_classes, wide
from eosin.mil.tasks._classification import Classification


@dataclass(frozen=True, eq=False)
class MiMaxOutput(AggregatorOutput):
    """Output of MI-max.

    Attributes
    ----------
    instance_logits : (N, K) float
        Of the starts that answer.
    starts : (B, R, K) float
        Logits of every start; a single one for a polyhedron.
    """

    instance_logits: Tensor
    starts: Tensor


@AGGREGATORS.register("mi_max")
class MiMax(Aggregator):
    """The largest score of an instance, equations 1 and 3.

    Parameters
    ----------
    in_dim, n_outputs
        Feature width D and logits K.
    classifier : {"linear", "hidden", "polyhedral"}
        Of instances, equation 1.
    hidden : int
        Width of the hidden layer.
    restarts : int
        Further starts besides the first, or further hyperplanes of a polyhedron.
    background : bool
        Whether the first class is what remains when no other is found, with the logit 0; for classes that exclude each
        other.
    """

    output_type = MiMaxOutput
    best: Tensor

    def __init__(
        self,
        in_dim: int,
        n_outputs: int,
        *,
        classifier: Literal["linear", "hidden", "polyhedral"] = "linear",
        hidden: Count = 128,
        restarts: Whole = 0,
        background: bool = False,
    ) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=in_dim)
        self.polyhedral = classifier == "polyhedral"
        self.background = background and n_outputs > 1
        rows, found = restarts + 1, n_outputs - self.background
        self.hidden = nn.Linear(in_dim, rows * hidden) if classifier == "hidden" else None
        width = in_dim if self.hidden is None else hidden
        self.weight = nn.Parameter(torch.randn(rows, found, width) * width**-0.5)
        self.bias = nn.Parameter(torch.randn(rows, found))
        self.register_buffer("best", torch.zeros(n_outputs, dtype=torch.int64))

    def forward(self, bags: PackedBags) -> MiMaxOutput:
        """Return logits, means of the features, instance logits and the logits of every start."""
        scores = by_rows(self.scores, bags.values)  # (N, R, K)
        starts = segment_max(scores.flatten(1), bags.cu_seqlens).view(bags.n_bags, *scores.shape[1:])
        bag = as_dtype(segment_mean(bags.values, bags.cu_seqlens), bags.values)
        return MiMaxOutput(self._chosen(starts), bag, self._chosen(scores), starts)

    def scores(self, values: Tensor) -> Tensor:
        """Return the scores (N, R, K) of features (N, D) by every start."""
        rows, found, width = self.weight.shape
        if self.hidden is None:
            flat = torch.addmm(self.bias.flatten(), values, self.weight.flatten(0, 1).T)
            scores = flat.view(-1, rows, found)
        else:
            inner = self.hidden(values).relu().view(-1, rows, width)
            scores = torch.einsum("nrw,rkw->nrk", inner, self.weight) + self.bias
        scores = scores.amax(1, keepdim=True) if self.polyhedral else scores
        return nn.functional.pad(scores, (1, 0)) if self.background else scores

    def penalty(self) -> Tensor:
        """Return ``|w|²`` of each start and class, (R, K), the hyperplanes of a polyhedron averaged."""
        squares = self.weight.square().sum(2)
        squares = squares.mean(0, keepdim=True) if self.polyhedral else squares
        return nn.functional.pad(squares, (1, 0)) if self.background else squares

    def _chosen(self, starts: Tensor) -> Tensor:
        """Return the scores (..., K) of the start that answers for each class."""
        return starts.gather(1, self.best.expand(len(starts), 1, -1))[:, 0]

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> MaxBag:
        assert isinstance(output, MiMaxOutput)  # what the model declares
        how = "All numbers are exact: the model takes the highest score that any tile has of a class, so every "
        how += "prediction follows from the highest that remain without running it again"
        head = torch.eye(self.n_outputs, dtype=torch.float64)
        return MaxBag(output.instance_logits.detach().cpu(), head, head.new_zeros(self.n_outputs), how=how)


@STRATEGIES.register("mi_max")
class MiMaxStrategy(Strategy):
    """Training of all starts beside each other, and the choice between them, equations 2 and 3.

    Parameters
    ----------
    model : Aggregator
    task : Task
    loss : {"tanh", "task"}
        Equation 2, or the loss of the task.
    penalty : float
        C.
    momentum : float
        Of the moving averages of losses and of p.
    """

    requires = MiMaxOutput
    losses: Tensor
    share: Tensor

    def __init__(
        self,
        model: Aggregator,
        task: Task,
        *,
        loss: Literal["tanh", "task"] = "tanh",
        penalty: NotNegative = 1.0,
        momentum: Part = 0.9,
    ) -> None:
        super().__init__(model, task)
        if loss == "tanh":
            require_classes(task, "mi_max with loss tanh")
        assert isinstance(model, MiMax)  # nothing else returns its output
        if model.background and not isinstance(task, Classification):
            raise ConfigError(
                f"mi_max: with background the first output stands for the absence of all others, but those of task "
                f"{task.kind} do not exclude each other; set recipe.aggregator.options.background=false"
            )
        self.loss = loss
        self.penalty = penalty
        self.momentum = momentum
        self.starts = model
        starts = model.penalty()
        # none before the first step
        self.register_buffer("losses", torch.full_like(starts if loss == "tanh" else starts[:, :1], torch.inf))
        self.register_buffer("share", starts.new_full((model.n_outputs,), 0.5))
        self._new = self.losses

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Run the model; the part ``mi_max`` of the objective is the sum of the losses of all starts."""
        output = self.model(bags)
        assert isinstance(output, MiMaxOutput)  # checked when built
        losses = self._of_classes(output, target) if self.loss == "tanh" else self._of_task(output, target)
        self._new = losses.detach()
        return Step(output, bags, {"mi_max": (losses + self.penalty * wide(self.starts.penalty())).sum()})

    @override
    def after_step(self, step: Step) -> None:
        """Follow the training losses, and let the best start of each class answer."""
        followed = torch.lerp(self._new, self.losses, self.momentum)
        self.losses.copy_(torch.where(self.losses.isinf(), self._new, followed))
        self.starts.best.copy_(self.losses.argmin(0).expand(self.model.n_outputs))

    def _of_classes(self, output: MiMaxOutput, target: Tensor) -> Tensor:
        """Return equation 2 for each start and class, (R, K)."""
        belongs = self.task.memberships(target).to(output.starts)  # (B, K)
        with torch.no_grad():
            self.share.lerp_(belongs.mean(0).to(self.share), 1 - self.momentum)
        share = self.share.clamp(0.01, 0.99).to(belongs)
        signs = (1 - belongs) / (1 - share) - belongs / share
        return (signs[:, None] * wide(output.starts).tanh()).mean(0)

    def _of_task(self, output: MiMaxOutput, target: Tensor) -> Tensor:
        """Return the task's loss of each start, (R, 1)."""
        losses = [self.task.bag_losses(start, target).mean() for start in output.starts.unbind(1)]
        return torch.stack(losses)[:, None]


_TRAINING = Training(optimizer="adam", lr=1e-2, weight_decay=0.0, epochs=50, bags_per_step=32, schedule="cosine")
for _name, _classifier in (("mi_max", "linear"), ("mi_max_hidden", "hidden"), ("mi_max_polyhedral", "polyhedral")):
    _network = Component(name="mi_max", options={"classifier": _classifier, "restarts": 11, "background": True})
    RECIPES.add(
        _name,
        Recipe(aggregator=_network, strategy=Component(name="mi_max"), bag_weight=0.0, training=_TRAINING),
    )

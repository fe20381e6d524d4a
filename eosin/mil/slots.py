"""The three slots that a paper fills, aggregator, loss term and strategy, and the registries that name them.

The objective of a training step is ``bag_weight * task.loss(output.logits, target) + sum(extra) +
sum(weight_i * term_i(output, bags, target))``, where a strategy returns ``output``, the ``bags`` it really used and
``extra``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.errors import ConfigError
from eosin.mil._closed_forms import PooledBag, contributions
from eosin.mil._registry import METHODS, ModuleRegistry, OptionsChecked
from eosin.mil._rollout import Trace
from eosin.mil.bags import BagInPieces, PackedBags
from eosin.mil.subsets import Floats, Subsets, Value, as_array, slope_of
from eosin.mil.task import Task

__all__ = [
    "AGGREGATORS",
    "LOSS_TERMS",
    "STRATEGIES",
    "Aggregator",
    "AggregatorOutput",
    "AttentionOutput",
    "EmbeddingAggregator",
    "HasInstanceLogits",
    "LossTerm",
    "Step",
    "Strategy",
    "Wrapper",
]


@dataclass(frozen=True, eq=False)
class AggregatorOutput:
    """What every aggregator returns.

    Attributes
    ----------
    logits : (B, K) float
    embedding : (B, E) float
        The bag's representation that the classifier reads.
    """

    logits: Tensor
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class AttentionOutput(AggregatorOutput):
    """Output of an aggregator that weighs instances.

    Attributes
    ----------
    scores : (N, H) float
        Unnormalised; the softmax over the instances of a bag gives the weights.
    instances : (N, E) float
        Embedded instances that the weights apply to.
    own_columns : bool
        Whether each output of the model is made of its own column of scores alone.
    """

    own_columns: ClassVar[bool] = False

    scores: Tensor
    instances: Tensor

    @property
    def ranks(self) -> Tensor:
        """What instances are ranked by, (N, H): the scores, unless a method knows better."""
        return self.scores


@runtime_checkable
class HasInstanceLogits(Protocol):
    """An output of a method that also classifies single instances: ``instance_logits`` (N, C).

    Attributes
    ----------
    instance_logits : (N, C) float
        Logits of single instances.
    """

    instance_logits: Tensor


class Aggregator(nn.Module, metaclass=OptionsChecked):
    """Base of what computes logits from bags; a subclass takes its options as keyword-only arguments.

    Parameters
    ----------
    in_dim : int
        Feature width D.
    n_outputs : int
        Logits K per bag, the task's.
    embed_dim : int
        Width E of the bag embedding.

    Attributes
    ----------
    output_type : type
        What `forward` returns: a capability is a type.
    order_dependent : bool
        True when the order of the instances of a bag matters.
    reads_places : bool
        True when it reads where tiles lie: packs then have `PackedBags.places`, and features without tile coordinates
        are refused.
    """

    output_type: ClassVar[type[AggregatorOutput]] = AggregatorOutput
    order_dependent: ClassVar[bool] = False
    reads_places: ClassVar[bool] = False

    def __init__(self, in_dim: int, n_outputs: int, *, embed_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.n_outputs = n_outputs
        self.embed_dim = embed_dim

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return one row of logits per bag; a bag without instances gives a finite row."""
        raise NotImplementedError

    def forward_pieces(self, bag: BagInPieces) -> AggregatorOutput:
        """Return the output for one bag that is read piece by piece, for predictions.

        Embedded instances are often narrower than features, so an `EmbeddingAggregator` embeds each piece as it comes;
        every other one is given the whole bag.
        """
        if isinstance(self, EmbeddingAggregator) and _starts_with_embed(type(self)):
            return self.aggregate(bag.map(self.embed).pack())
        output: AggregatorOutput = self(bag.pack())
        return output

    def require_places(self, bags: PackedBags) -> Tensor:
        """Return where the tiles lie, (N, 2), x then y in steps of their grid.

        Raises
        ------
        ConfigError
            If the pack has instances, but no places.
        """
        if bags.places is None and bags.n_instances:
            raise ConfigError(
                f"{type(self).__name__} reads where tiles lie, but these bags have no places; give "
                "PackedBags.pack(..., places=...), or use features with tile coordinates"
            )
        places = bags.values.new_zeros(0, 2) if bags.places is None else bags.places
        return places.to(torch.promote_types(bags.values.dtype, torch.float32))

    def readout(self, bags: PackedBags, output: AggregatorOutput) -> Subsets | None:
        """Return one bag as a form that answers every what-if without this model, or None where there is none.

        Parameters
        ----------
        bags : PackedBags
            One bag.
        output : AggregatorOutput
            What the model made of it. The form is compared with the model on the slide before it is used.
        """
        form = contributions(self, output)
        return PooledBag(as_array(output.scores), *form) if form and isinstance(output, AttentionOutput) else None

    def trace(self, bags: PackedBags) -> Trace | None:
        """Return how attention leads through the layers of one bag, or None without attention between instances."""
        return None

    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats | None:
        """Return ``G_i = ∂ value / ∂ log w_i`` of one bag, (n,), or None where it is read out without weights.

        w_i is the weight of instance i where the model reads its bag out, 1 for every instance; everything before that
        place is held fixed. Leaving an instance out costs about ``-G_i`` there, and more or less through the layers
        before: the first-order price of an instance, for models that have to be run again.
        """
        with torch.no_grad():
            output = self(bags)
            form = self.readout(bags, output)
        gradient = None if form is None else form.log_weight_gradient()
        return None if gradient is None else gradient @ slope_of(output.logits[0], value).cpu().numpy()

    def instance_values(self, output: AggregatorOutput) -> Tensor | None:
        """Return what each instance adds to the bag's embedding, (N, E); None where that is its weight times itself."""
        return None

    def branches(self, weights: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
        """Return the attention (n, H) of one bag by branch, (n,) each under its name.

        Parameters
        ----------
        weights : (n, H) float
            One column per score; each sums to 1.
        classes : sequence of str
            Names of the outputs, for methods whose branches belong to these.
        """
        return {f"branch {number}": column for number, column in enumerate(weights.unbind(1))}


def class_names(n_outputs: int, classes: Sequence[str]) -> list[str]:
    """Return one name per logit: a single logit of two classes belongs to the second."""
    if len(classes) == n_outputs:
        return list(classes)
    if n_outputs == 1 and len(classes) == 2:
        return [classes[1]]
    return [f"output {k}" for k in range(n_outputs)]


class Wrapper(Aggregator):
    """An aggregator that prepares bags for another one, and answers what it is asked as that one does.

    Attributes
    ----------
    instance_wise : bool
        Whether `prepare` looks at every instance alone, so that leaving some out does not change the others.
    """

    instance_wise: ClassVar[bool] = True

    def __init__(self, in_dim: int, n_outputs: int, inner: Aggregator) -> None:
        super().__init__(in_dim, n_outputs, embed_dim=inner.embed_dim)
        self.output_type = inner.output_type  # type: ignore[misc]  # of this instance: what the inner one can do
        self.order_dependent = inner.order_dependent  # type: ignore[misc]
        self.reads_places = inner.reads_places  # type: ignore[misc]

    @property
    def inner(self) -> Aggregator:
        """The other aggregator; each wrapper has it under the name that its saved weights carry."""
        raise NotImplementedError

    def prepare(self, bags: PackedBags) -> PackedBags:
        """Return the bags that the other aggregator reads."""
        raise NotImplementedError

    @override
    def forward(self, bags: PackedBags) -> AggregatorOutput:
        output: AggregatorOutput = self.inner(self.prepare(bags))
        return output

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> Subsets | None:
        return self.inner.readout(self.prepare(bags), output) if self.instance_wise else None

    @override
    def trace(self, bags: PackedBags) -> Trace | None:
        with torch.no_grad():
            prepared = self.prepare(bags)
        return self.inner.trace(prepared)

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats | None:
        with torch.no_grad():
            prepared = self.prepare(bags)
        return self.inner.weight_gradient(prepared, value)

    @override
    def branches(self, weights: Tensor, classes: Sequence[str]) -> dict[str, Tensor]:
        return self.inner.branches(weights, classes)


@runtime_checkable
class EmbeddingAggregator(Protocol):
    """An aggregator that can start from embedded instances: ``forward`` is `embed`, then `aggregate`.

    Attributes
    ----------
    embed : nn.Module
        Maps instances (N, D) to embedded instances (N, E).
    """

    embed: nn.Module

    def aggregate(self, bags: PackedBags) -> AttentionOutput:
        """Return the output for bags of embedded instances."""
        ...


def _starts_with_embed(kind: type) -> bool:
    """Return whether `forward` is still that of the class that gave `aggregate`, or of one that it was made from."""
    givers = [
        next(at for at, base in enumerate(kind.__mro__) if name in vars(base)) for name in ("forward", "aggregate")
    ]
    return givers[0] >= givers[1]


def instance_width(model: Aggregator) -> int:
    """Return the width E of the instances that an aggregator with attention returns."""
    parameter = next(model.parameters())
    empty = PackedBags.pack([parameter.new_zeros(0, model.in_dim)])
    training = model.training
    with torch.no_grad():
        output = model.eval()(empty)
    model.train(training)
    assert isinstance(output, AttentionOutput)  # checked when built
    return output.instances.shape[1]


class LossTerm(nn.Module, metaclass=OptionsChecked):
    """Base of what is added to the objective; may own parameters, states its reduction in its docstring.

    Parameters
    ----------
    model : Aggregator
        The model that is trained; its `output_type` must be a `requires`.
    task : Task
    """

    requires: ClassVar[type[AggregatorOutput]] = AggregatorOutput

    def __init__(self, model: Aggregator, task: Task) -> None:
        super().__init__()
        require_output(self, model)
        self.progress = 0.0

    def forward(self, output: AggregatorOutput, bags: PackedBags, target: Tensor) -> Tensor:
        """Return a scalar, unchanged when the batch is duplicated."""
        raise NotImplementedError

    def start_step(self, progress: float) -> None:
        """Hear from the loop, before each step, the fraction of the training that is done, 0 to 1: for schedules."""
        self.progress = progress


@dataclass(frozen=True, eq=False)
class Step:
    """What a strategy did with a pack.

    Attributes
    ----------
    output : AggregatorOutput
        One row per bag, in the order of the targets.
    bags : PackedBags
        The bags that `output` was computed from, after any masking or sampling.
    extra : mapping of str to scalar tensors
        Further parts of the objective, by the name under which they are logged.
    """

    output: AggregatorOutput
    bags: PackedBags
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class Strategy(nn.Module, metaclass=OptionsChecked):
    """Base of what happens around a training step; holds the model as the submodule `model`.

    Parameters
    ----------
    model : Aggregator
    task : Task
    """

    requires: ClassVar[type[AggregatorOutput]] = AggregatorOutput

    def __init__(self, model: Aggregator, task: Task) -> None:
        super().__init__()
        require_output(self, model)
        self.model = model
        self.task = task
        self.progress = 0.0

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Return the step for one pack."""
        raise NotImplementedError

    def start_step(self, progress: float) -> None:
        """Hear from the loop, before each step, the fraction of the training that is done, 0 to 1: for schedules."""
        self.progress = progress

    def after_step(self, step: Step) -> None:
        """Run after the optimizer's step: moving averages and the like."""

    def inference_model(self) -> Aggregator:
        """Return what is validated, saved and deployed."""
        return self.model


def require_output(part: LossTerm | Strategy, model: Aggregator) -> None:
    """Raise `ConfigError` unless the model's output has what the part of a recipe needs."""
    if not issubclass(model.output_type, part.requires):
        raise ConfigError(
            f"{type(part).__name__} needs an aggregator that returns {part.requires.__name__}; "
            f"{type(model).__name__} returns {model.output_type.__name__}; choose another aggregator"
        )


AGGREGATORS: ModuleRegistry[Aggregator] = ModuleRegistry("aggregator", METHODS)
LOSS_TERMS: ModuleRegistry[LossTerm] = ModuleRegistry("loss term", METHODS)
STRATEGIES: ModuleRegistry[Strategy] = ModuleRegistry("strategy", METHODS)


@STRATEGIES.register("supervised")
class SupervisedStrategy(Strategy):
    """The plain step: the model sees the whole bags."""

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Run the model."""
        return Step(self.model(bags), bags)

"""The three slots that a paper fills, aggregator, loss term and strategy, and the registries that name them.

The objective of a training step is ``bag_weight * task.loss(output.logits, target) + sum(extra) +
sum(weight_i * term_i(output, bags, target))``, where a strategy returns ``output``, the ``bags`` it really used and
``extra``.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from eosin.errors import ConfigError, UnknownNameError
from eosin.mil.bags import PackedBags
from eosin.mil.tasks import Task
from eosin.plugins import load_plugins

T = TypeVar("T")


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
    """

    scores: Tensor
    instances: Tensor


class Aggregator(nn.Module):
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
    """

    output_type: ClassVar[type[AggregatorOutput]] = AggregatorOutput
    order_dependent: ClassVar[bool] = False

    def __init__(self, in_dim: int, n_outputs: int, *, embed_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.n_outputs = n_outputs
        self.embed_dim = embed_dim

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return one row of logits per bag; a bag without instances gives a finite row."""
        raise NotImplementedError


class LossTerm(nn.Module):
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


class Strategy(nn.Module):
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


OWN_METHODS = "eosin.mil.methods"
"""Imported by name: methods import this module."""


class Registry(Generic[T]):
    """Things by name, for one slot.

    A name that is asked for may come from eosin's own methods or from a plug-in; both are imported then.

    Parameters
    ----------
    kind : str
        What the slot is called in messages: "aggregator".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register `item`; a definition that is run again in a notebook replaces itself.

        Raises
        ------
        ConfigError
            If the name belongs to something else.
        """
        old = self._items.get(name)
        if old is not None and getattr(old, "__qualname__", old) != getattr(item, "__qualname__", item):
            raise ConfigError(f"the {self.kind} name {name!r} is taken by {old!r}; choose another name")
        self._items[name] = item
        return item

    def _known(self) -> dict[str, T]:
        importlib.import_module(OWN_METHODS)
        load_plugins()
        return self._items

    def __getitem__(self, name: str) -> T:
        known = self._known()
        if name not in known:
            raise UnknownNameError(self.kind, name, known)
        return known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._known()))

    def __len__(self) -> int:
        return len(self._known())

    def __repr__(self) -> str:
        return f"<{len(self)} {self.kind}s: {', '.join(self)}>"


C = TypeVar("C", bound=nn.Module)


class ModuleRegistry(Registry[type[C]]):
    """A registry of modules; the options of each are the keyword-only arguments of its constructor."""

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Return a class decorator that registers under `name` and leaves the class as it is."""
        return lambda item: self.add(name, item)

    def defaults(self, name: str) -> dict[str, Any]:
        """Return every option of `name` with its default."""
        return self.resolve(name, {})

    def resolve(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of `name`, checked against its constructor's signature and with defaults filled in.

        Raises
        ------
        UnknownNameError
            If the name or an option does not exist; the message lists those that do.
        ConfigError
            If a value does not fit the constructor's annotation, or the range that the option's name implies.
        """
        schema = _schema(self[name])
        unknown = [key for key in options if key not in schema.model_fields]
        if unknown:
            raise UnknownNameError(f"option of {self.kind} {name}", unknown[0], schema.model_fields)
        try:
            checked = schema.model_validate(dict(options))
        except ValidationError as error:
            faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
            raise ConfigError(f"{self.kind} {name}: {faults}") from None
        return {key: getattr(checked, key) for key in schema.model_fields}

    def build(self, name: str, *args: Any, options: Mapping[str, Any] | None = None) -> C:
        """Construct `name` from positional arguments and its options; see `resolve` for the errors."""
        return self[name](*args, **self.resolve(name, options or {}))


def _schema(cls: type) -> type[BaseModel]:
    constructor = cls.__init__  # type: ignore[misc]
    hints = get_type_hints(constructor)
    fields: dict[str, Any] = {
        key: (_bounded(key, hints.get(key, Any)), ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


LEAST = {
    **dict.fromkeys(("width", "hidden", "heads", "layers", "branches", "k", "factor", "tokens", "seeds", "rate"), 1),
    **dict.fromkeys(("sample", "queue_size", "region_size", "rank", "pack_length", "projection", "expansion"), 1),
    **dict.fromkeys(("overflow", "keep_at_least"), 1),
    **dict.fromkeys(("expand", "d_state", "d_conv", "dt_rank", "head_dim", "landmarks", "pinv_iterations"), 1),
    **dict.fromkeys(("mask_k", "min_length", "isab_layers", "sab_layers"), 0),
}
"""Least value of an option that counts or measures something, the same in every method that has it."""

POSITIVE = {"temperature", "tau", "sharpness", "norm_eps", "floor"}
"""Options whose formula has no meaning at 0."""

NOT_NEGATIVE = {"penalty", "margin", "consistency"}
"""Options that weigh or move something and may be 0."""

SHARES = {"momentum", "confidence", "start", "phi_start", "phi_end", "quality_weight"}
"""Options between 0 and 1 whose name does not end in one of the words for that."""


def _bounded(option: str, hint: Any) -> Any:
    """Return the type of an option with the range that its name implies."""
    if option in LEAST and hint in (int, int | None):
        return Annotated[hint, Field(ge=LEAST[option])]
    if hint is not float:
        return hint
    if option.endswith("dropout"):
        return Annotated[float, Field(ge=0, lt=1)]
    if option in SHARES or option.endswith(("_ratio", "_fraction", "_p", "_momentum")):
        return Annotated[float, Field(ge=0, le=1)]
    if option in POSITIVE:
        return Annotated[float, Field(gt=0, allow_inf_nan=False)]
    if option in NOT_NEGATIVE or option.endswith("_weight"):
        return Annotated[float, Field(ge=0, allow_inf_nan=False)]
    return hint


AGGREGATORS: ModuleRegistry[Aggregator] = ModuleRegistry("aggregator")
LOSS_TERMS: ModuleRegistry[LossTerm] = ModuleRegistry("loss term")
STRATEGIES: ModuleRegistry[Strategy] = ModuleRegistry("strategy")


@STRATEGIES.register("supervised")
class SupervisedStrategy(Strategy):
    """The plain step: the model sees the whole bags."""

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Run the model."""
        return Step(self.model(bags), bags)

"""A recipe: which aggregator, loss terms and strategy, with which options and training settings.

As YAML::

    aggregator: {name: abmil, options: {gated: true}}
    terms: [{name: attention_entropy, weight: 0.1}]
    strategy: {name: supervised}
    bag_weight: 1.0
    training: {lr: 1.0e-4, epochs: 50}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from eosin.mil._registry import METHODS, Registry
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES
from eosin.options import Options, merge, read_yaml


class Component(Options):
    """One registered name and the options that differ from its defaults.

    Attributes
    ----------
    name : str
        Name in the registry.
    options : dict of str to object
        Options of the constructor.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        """Take ``aggregator: abmil`` for ``aggregator: {name: abmil}``."""
        return {"name": data} if isinstance(data, str) else data


class Term(Component):
    """A loss term and its weight in the objective.

    Attributes
    ----------
    weight : float
        Weight of the term in the objective.
    """

    weight: float = 1.0


class Training(Options):
    """Settings of the training loop.

    Attributes
    ----------
    epochs, patience, min_epochs : int
        Most passes over the training bags; passes without a better validation value before stopping (0: never stop
        early); passes before stopping may begin.
    select : str
        What the best model has on the validation bags: the lowest ``loss``, the highest of the task's own metric
        (``metric``), or ``last``, the model after the last pass, whatever the validation says.
    refit : bool
        Whether the model is trained once more, on training and validation bags together, for the number of passes that
        the validation chose; for small cohorts, where every patient counts.
    optimizer, lr, weight_decay, betas
        The optimizer; `betas` are Adam's.
    schedule, warmup
        Course of the learning rate, and passes of linear growth before it.
    bags_per_step, max_instances_per_step
        Bags packed into an optimizer step; instances (rows) that are computed at once, so that a step of many large
        bags is accumulated over several packs (0: no limit).
    max_instances_per_bag : int
        A random sample of this many instances of a larger bag in each pass (0: all).
    balance : str
        ``sampling`` draws bags with replacement so that classes are equally frequent, ``weights`` weighs their losses
        instead.
    clip_norm : float
        Largest norm of the gradient (0: not clipped).
    ema : float
        Decay per step of a moving average of the weights, which then is validated and deployed (0: none).
    threshold, temperature : bool
        Whether the threshold between two classes, and a temperature of the logits, are chosen on the validation bags.
    standardize : bool
        Shift and scale each feature to mean 0 and standard deviation 1, measured on the training bags and stored in the
        model. On by default: it changes little for encoders with normalised output and rescues unscaled features.
    seed : int
        Initial weights, order of bags, dropout.
    processes : int
        How many processes share the bags of each step, see `eosin.mil._parallel`; all must have been started.
    """

    epochs: PositiveInt = 50
    patience: int = Field(default=10, ge=0)
    min_epochs: int = Field(default=0, ge=0)
    select: Literal["loss", "metric", "last"] = "loss"
    refit: bool = False
    optimizer: Literal["adam", "adamw", "radam", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: NonNegativeFloat = 0.0
    bags_per_step: PositiveInt = 1
    max_instances_per_step: int = Field(default=0, ge=0)
    max_instances_per_bag: int = Field(default=0, ge=0)
    balance: Literal["none", "sampling", "weights"] = "none"
    clip_norm: NonNegativeFloat = 0.0
    ema: float = Field(default=0.0, ge=0, lt=1)
    threshold: bool = False
    temperature: bool = False
    standardize: bool = True
    seed: int = Field(default=0, ge=0)
    processes: PositiveInt = 1

    @model_validator(mode="after")
    def _passes(self) -> Self:
        if self.min_epochs > self.epochs:
            raise ValueError(f"min_epochs {self.min_epochs} is more than epochs {self.epochs}")
        return self


EVERYDAY = Training(lr=5e-4, weight_decay=1e-4, epochs=30, bags_per_step=4, refit=True)
"""Settings of the recipes whose training no paper prescribes: bags are packed by four, because that is faster, and the
model is refitted on all training bags, because cohorts are small. Chosen with MUSK1, whose test folds were seen in part
(`benchmarks/mil_datasets.py`)."""


class Recipe(Options):
    """All that a paper prescribes; the default trains gated attention pooling.

    Attributes
    ----------
    aggregator : Component
        Computes the output of a bag.
    terms : tuple of Term
        Loss terms in addition to the loss of the task.
    strategy : Component
        Changes a training step.
    bag_weight : float
        Weight of the loss of the task in the objective.
    training : Training
    linear_below : int
        With fewer training and validation slides than this the model has a linear part beside its aggregator, see
        `eosin.mil._linear`; 0 for none.
    """

    aggregator: Component = Component(name="abmil")
    terms: tuple[Term, ...] = ()
    strategy: Component = Component(name="supervised")
    bag_weight: NonNegativeFloat = 1.0
    training: Training = EVERYDAY
    linear_below: int = Field(default=0, ge=0)


DEFAULT = "everyday"
RECIPES: Registry[Recipe] = Registry("recipe", METHODS)


def choose_recipe(name: str | None = None, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by name or from a YAML file, with changes, and every name in it checked.

    Parameters
    ----------
    name : str, optional
        Of a registered recipe, or the path of a ``.yaml`` file; ``everyday`` unless given.
    changes : mapping, optional
        Options to change, as in YAML. A part that gets another name loses the options of the old one.

    Raises
    ------
    UnknownNameError
        If no recipe has the name, or it names a method or an option that does not exist.
    ConfigError
        If the file cannot be read or a value is wrong.
    """
    if name is not None and Path(name).suffix in (".yaml", ".yml"):
        base = Recipe.parse(read_yaml(Path(name)), source=name)
    else:
        base = RECIPES[name or DEFAULT]
    recipe = Recipe.parse(merge(base.model_dump(mode="json"), changes or {}), source="recipe")
    require_methods(recipe)
    return recipe


def require_methods(recipe: Recipe) -> None:
    """Raise `UnknownNameError` when a recipe names a method or an option that does not exist."""
    AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
    STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
    for term in recipe.terms:
        LOSS_TERMS.resolve(term.name, term.options)

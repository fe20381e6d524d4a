"""Every map that a model can give of a slide, one number per tile, and one sentence for each that it cannot give."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from eosin.errors import ConfigError, UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps._subject import Look, in_eval_mode, look, pack_bag, require_grid
from eosin.mil._reevaluation import BUDGET
from eosin.mil.slots import Aggregator, AggregatorOutput, AttentionOutput, HasInstanceLogits, class_names
from eosin.mil.subsets import Subsets, Target, as_array

Attribution = Literal["alone", "attention", "instance_logit", "effect", "log_weight_gradient", "gradient", "rollout"]
ATTRIBUTIONS: tuple[Attribution, ...] = (
    "alone",
    "attention",
    "instance_logit",
    "effect",
    "log_weight_gradient",
    "gradient",
    "rollout",
)
MANY_TILES = 20_000  # that a model which must be run again is run on one by one without being asked to
LOG_ODDS_REACH = 4.0  # where the colours of evidence end: 2 % and 98 %, on every slide of every cohort


@dataclass(frozen=True, eq=False)
class MapSet:
    """The maps of one slide.

    Parameters
    ----------
    maps : list of Heatmap
        The first is the one that pictures show: the evidence of each tile alone, because it is what is lost when the
        model is taken apart (`docs/heatmaps.md`); attention where that would take too long.
    absent : dict of str to str
        For each of `ATTRIBUTIONS` that is not there, one sentence that says why.
    """

    maps: list[Heatmap]
    absent: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<MapSet: {', '.join(heatmap.kind for heatmap in self.maps)}; {len(self.absent)} absent>"


@dataclass(frozen=True, eq=False)
class _Subject:
    """What maps are made of: a model, a bag, the targets by name and how the bag is asked about subsets."""

    model: Aggregator
    bag: FeatureBag
    names: Sequence[str]
    targets: dict[str, Target]
    subsets: Subsets
    wide: bool
    forced: bool


class _Absent(Exception):
    """Why a map cannot be made, in a sentence."""


def map_slide(
    model: Aggregator,
    bag: FeatureBag,
    *,
    classes: Sequence[str] = (),
    outputs: Sequence[str] = (),
    wanted: Sequence[str] | None = None,
    budget: int = BUDGET,
) -> MapSet:
    """Return every map of a slide.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag
        With a tile grid and at least one tile.
    classes : sequence of str
        Names of classes that exclude each other, as for `Classification` and `Binary`. Of two classes maps are of the
        log-odds of the second on every slide, so that a colour means the same everywhere; of more, of those of the
        predicted class and then of every other one.
    outputs : sequence of str
        Names of the model's outputs for tasks without such classes; maps are of each output itself.
    wanted : sequence of str, optional
        Among `ATTRIBUTIONS`; all unless given, except effects that would take more than a pass per tile of a bag of
        more than 500 tiles, and tiles alone of more than 20,000 where the model must be run again.
    budget : int
        Instances that estimates may run a model on that has no closed form.

    Raises
    ------
    UnknownNameError
        If an attribution is unknown.
    ConfigError
        If the features have no places, or none of the wanted maps exists for this model.
    """
    for name in wanted or ():
        if name not in _MAKERS:
            raise UnknownNameError("map", name, _MAKERS)
    maps: list[Heatmap] = []
    absent: dict[str, str] = {}
    with in_eval_mode(model):
        subject = _subject(model, bag, classes, outputs, budget=budget, forced=wanted is not None)
        for name in dict.fromkeys(wanted or ATTRIBUTIONS):
            try:
                maps += _MAKERS[name](subject)
            except _Absent as reason:
                absent[name] = str(reason)
    if not maps:
        raise ConfigError(f"{bag.slide_id}: there is no such map; {'; '.join(absent.values())}")
    return MapSet(maps, absent)


def first_map(
    model: Aggregator, bag: FeatureBag, *, classes: Sequence[str] = (), outputs: Sequence[str] = ()
) -> Heatmap:
    """Return the map that pictures show, the first of `map_slide`, without making the others.

    Parameters
    ----------
    model, bag, classes, outputs
        As for `map_slide`.
    """
    with in_eval_mode(model):
        subject = _subject(model, bag, classes, outputs, budget=BUDGET, forced=False)
        for name in ATTRIBUTIONS:
            with suppress(_Absent):
                return _MAKERS[name](subject)[0]
    raise AssertionError("every model has a gradient")


def _subject(
    model: Aggregator, bag: FeatureBag, classes: Sequence[str], outputs: Sequence[str], *, budget: int, forced: bool
) -> _Subject:
    require_grid(bag)
    wide = 0 < model.n_outputs < len(classes)
    seen = look(model, bag, single_logit_is_second_class=wide, budget=budget)
    return _Subject(model, bag, classes or outputs, _targets(seen, classes, outputs), seen.subsets, wide, forced)


def _targets(seen: Look, classes: Sequence[str], outputs: Sequence[str]) -> dict[str, Target]:
    """Return what class-specific maps are about: the second of two classes, of more the predicted one first."""
    logits = seen.subsets.logits()
    if not classes:
        return {name: Target(k, "logit") for k, name in enumerate(class_names(len(logits), outputs))}
    if len(classes) == 2:
        return {classes[1]: Target(1)}
    predicted = int(np.argmax(logits))
    return {classes[k]: Target(k) for k in (predicted, *(k for k in range(len(classes)) if k != predicted))}


def _attention(subject: _Subject) -> list[Heatmap]:
    if not issubclass(subject.model.output_type, AttentionOutput):
        raise _Absent("the model does not weigh tiles, so it has no attention")
    maps = output_maps(subject.model, subject.bag, classes=subject.names, of="attention")
    # ranks first: weights span decades, and a linear scale would show one tile
    return [maps[0].percentile(), maps[0].relative(), *maps]


def _alone(subject: _Subject) -> list[Heatmap]:
    # a transformer pays for every bag, not for every tile: bags of one cost it many times the pass over the slide
    if subject.subsets.price > MANY_TILES and not subject.forced:
        raise _Absent(
            f"the model would have to be run on each of {subject.bag.n_instances} tiles by itself; ask for the map "
            "alone by name"
        )
    first = next(iter(subject.targets))
    values = subject.subsets.only_one()
    return [
        alone_map(values, subject.bag, target, of=name, first=name == first) for name, target in subject.targets.items()
    ]


def _instance_logit(subject: _Subject) -> list[Heatmap]:
    maps = output_maps(subject.model, subject.bag, classes=subject.names, of="instance_logit")
    if not maps:
        raise _Absent("the model has no classifier of single tiles")
    return maps


def _effect(subject: _Subject) -> list[Heatmap]:
    if not subject.subsets.exact and not subject.forced:
        raise _Absent(
            f"the model would have to be run again without each of {subject.bag.n_instances} tiles; ask for the map "
            "effect by name to get an estimate that is compared with exact effects of some tiles"
        )
    first = next(iter(subject.targets))
    return [
        effect_map(subject.subsets, subject.bag, target, of=name, first=name == first)
        for name, target in subject.targets.items()
    ]


def _log_weight_gradient(subject: _Subject) -> list[Heatmap]:
    maps = []
    for name, target in subject.targets.items():
        heatmap = slope_map(subject.subsets, subject.bag, target, of=name)
        if heatmap is None:
            raise _Absent(subject.subsets.weightless)
        maps.append(heatmap)
    return maps


def _gradient(subject: _Subject) -> list[Heatmap]:
    return [
        gradient_map(subject.model, subject.bag, target, of=name, single_logit_is_second_class=subject.wide)
        for name, target in subject.targets.items()
    ]


def _rollout(subject: _Subject) -> list[Heatmap]:
    heatmap = rollout_map(subject.model, subject.bag)
    if heatmap is None:
        raise _Absent("this method has no layers of attention between tiles, so a rollout has nothing to follow")
    return [heatmap.percentile(), heatmap]


_MAKERS: dict[str, Callable[[_Subject], list[Heatmap]]] = {
    "attention": _attention,
    "alone": _alone,
    "instance_logit": _instance_logit,
    "effect": _effect,
    "log_weight_gradient": _log_weight_gradient,
    "gradient": _gradient,
    "rollout": _rollout,
}


def attention_weights(model: Aggregator, bag: FeatureBag) -> NDArray[np.float64]:
    """Return the weight of each tile in each branch.

    Parameters
    ----------
    model : Aggregator
        One whose output is an `AttentionOutput`.
    bag : FeatureBag

    Returns
    -------
    (n, H) float64
        Softmax of the scores over the tiles; every column sums to 1.

    Raises
    ------
    ConfigError
        If the model does not weigh instances.
    """
    return as_array(_attention_output(model, bag).scores.double().softmax(0))


def attention_map(model: Aggregator, bag: FeatureBag, *, branch: int | None = None) -> Heatmap:
    """Return the attention of one branch, or its mean over the branches.

    The values are weights: they sum to 1 over the slide. `Heatmap.percentile` and `Heatmap.relative` are the two
    scalings for showing them. Attention says what the model looked at and not in which direction it counted.

    Parameters
    ----------
    model : Aggregator
        One whose output is an `AttentionOutput`.
    bag : FeatureBag
        With a tile grid.
    branch : int, optional
        Branch of a model with several; the mean of all weights unless given.

    Raises
    ------
    ConfigError
        If the model does not weigh instances, the branch does not exist or the features have no places.
    """
    weights = attention_weights(model, bag)
    branches = weights.shape[1]
    if branch is None:
        return Heatmap(weights.mean(axis=1), require_grid(bag), "attention", "attention")
    if not 0 <= branch < branches:
        raise ConfigError(f"there is no branch {branch}; the model has branches 0 to {branches - 1}")
    return Heatmap(weights[:, branch], require_grid(bag), "attention", f"attention of branch {branch}", of=str(branch))


def attribution_maps(model: Aggregator, bag: FeatureBag, *, classes: Sequence[str] = ()) -> list[Heatmap]:
    """Return every map that one forward pass of the model gives, the mean attention first.

    Parameters
    ----------
    model : Aggregator
        One whose output is an `AttentionOutput`.
    bag : FeatureBag
        With a tile grid.
    classes : sequence of str
        Names of the model's outputs, for the labels of class-specific maps.

    Returns
    -------
    list of Heatmap
        Mean attention; each branch where there are several, by class where there is one branch per class;
        instance logits by class where the method has them.
    """
    output = _attention_output(model, bag)
    return _attention_maps(model, bag, output, classes) + _instance_maps(bag, output, classes)


def output_maps(
    model: Aggregator, bag: FeatureBag, *, classes: Sequence[str], of: Literal["attention", "instance_logit"]
) -> list[Heatmap]:
    """Return the part of `attribution_maps` that is asked for; of instance logits for models without attention, too.

    Returns
    -------
    list of Heatmap
        Empty when the method has no instance logits.
    """
    if of == "attention":
        return _attention_maps(model, bag, _attention_output(model, bag), classes)
    with torch.no_grad(), in_eval_mode(model):
        return _instance_maps(bag, model(pack_bag(model, bag)), classes)


def _attention_maps(
    model: Aggregator, bag: FeatureBag, output: AttentionOutput, classes: Sequence[str]
) -> list[Heatmap]:
    grid = require_grid(bag)
    weights = output.scores.double().softmax(0)
    maps = [Heatmap(as_array(weights.mean(1)), grid, "attention", "attention")]
    branches = model.branches(weights, classes)
    if len(branches) > 1:
        maps += [
            Heatmap(as_array(column), grid, "attention", f"attention of {name}", of=name)
            for name, column in branches.items()
        ]
    return maps


def _instance_maps(bag: FeatureBag, output: AggregatorOutput, classes: Sequence[str]) -> list[Heatmap]:
    if not isinstance(output, HasInstanceLogits):
        return []
    logits = as_array(output.instance_logits)
    names = class_names(logits.shape[1], classes)
    return [
        Heatmap(logits[:, k], require_grid(bag), "instance_logit", f"tile's own logit of {name}", of=name, signed=True)
        for k, name in enumerate(names)
    ]


@torch.no_grad()
def _attention_output(model: Aggregator, bag: FeatureBag) -> AttentionOutput:
    if not issubclass(model.output_type, AttentionOutput):
        raise ConfigError(
            f"{type(model).__name__} has no attention, so there is no attention map; choose another map or model"
        )
    with in_eval_mode(model):
        output = model(pack_bag(model, bag))
    # the declared type decided what was asked for; a method that returns something else is a fault of its author
    if not isinstance(output, AttentionOutput):
        raise TypeError(f"{type(model).__name__} returned {type(output).__name__}, not the output type it declares")
    return output


def alone_map(logits: NDArray[np.float64], bag: FeatureBag, target: Target, *, of: str, first: bool = True) -> Heatmap:
    """Return what the model says of each tile by itself: its evidence, whatever the rest of the slide shows.

    Parameters
    ----------
    logits : (n, K) float64
        Of each tile as a bag of its own, `eosin.mil.subsets.Subsets.only_one`.
    bag : FeatureBag
        With a tile grid.
    target : Target
    of : str
        Name of the class or output.
    first : bool
        Whether this is the map of the first class, whose column carries no name.
    """
    label, name = f"{_quantity(target, of)} of the tile alone", "" if first else of
    reach = None if target.on == "logit" else LOG_ODDS_REACH
    return Heatmap(target.of(logits), require_grid(bag), "alone", label, of=name, signed=True, reach=reach)


def effect_map(subsets: Subsets, bag: FeatureBag, target: Target, *, of: str, first: bool = True) -> Heatmap:
    """Return the effect of each tile: exact where the bag gives it so, else an estimate whose label says how good.

    Parameters
    ----------
    subsets : Subsets
        The slide as the model sees it.
    bag : FeatureBag
        With a tile grid.
    target : Target
    of : str
        Name of the class or output.
    first : bool
        Whether this is the map of the first class, whose column carries no name.
    """
    effects, agreement = subsets.effects(target)
    label = f"what a tile adds to {_quantity(target, of)}"
    if not subsets.exact:
        label = f"estimate of {label}; rank correlation with exact effects {agreement:.2f}"
    name = "" if first else of
    return Heatmap(effects, require_grid(bag), "effect", label, of=name, is_estimate=not subsets.exact, signed=True)


def slope_map(subsets: Subsets, bag: FeatureBag, target: Target, *, of: str) -> Heatmap | None:
    """Return the derivative of a target by the logarithm of each tile's weight; None where tiles have none."""
    values = subsets.slopes(target)
    if values is None:
        return None
    label = f"slope of {_quantity(target, of)} by the logarithm of the tile's weight"
    return Heatmap(values, require_grid(bag), "log_weight_gradient", label, of=of, signed=True)


def _quantity(target: Target, name: str) -> str:
    return name if target.on == "logit" else f"the log-odds of {name}"


def rollout_map(model: Aggregator, bag: FeatureBag) -> Heatmap | None:
    """Return the attention followed through all layers, or None for a method without attention between tiles."""
    with in_eval_mode(model), torch.no_grad():
        trace = model.trace(pack_bag(model, bag))
    if trace is None:
        return None
    return Heatmap(trace.row(), require_grid(bag), "rollout", "attention followed through all layers")


def gradient_map(
    model: Aggregator, bag: FeatureBag, target: Target, *, of: str, single_logit_is_second_class: bool = False
) -> Heatmap:
    """Return gradient times input of any model: the first-order share of each tile in the target.

    ``x_i · ∂target/∂x_i``, summed over the features. For a model that is linear in its features the values sum to the
    target without its constant; elsewhere they are a local approximation, unlike the effects of removing tiles.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag
        With a tile grid.
    target : Target
    of : str
        Name of the class, for the label.
    single_logit_is_second_class : bool
        Put a logit 0 before the model's only one, so that the target's index is that of a class.
    """
    pack = pack_bag(model, bag)
    values = pack.values.requires_grad_()
    with torch.enable_grad(), in_eval_mode(model):
        logits = model(pack.with_values(values)).logits[0]
        if single_logit_is_second_class:
            logits = torch.cat([torch.zeros_like(logits), logits])
        (gradient,) = torch.autograd.grad(target.of_tensor(logits), values)
    shares = as_array(gradient.mul_(values.detach()).sum(1))
    return Heatmap(shares, require_grid(bag), "gradient", f"gradient times input of {of}", of=of, signed=True)

"""Every map that a model can give of a slide, and one sentence for each that it cannot give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from eosin.errors import ConfigError, UnknownNameError
from eosin.features.bag import FeatureBag
from eosin.heatmaps.attribution import class_names, gradient_map, in_eval_mode, output_maps, pack_bag, require_grid
from eosin.heatmaps.counterfactual import is_exact, tile_effects
from eosin.heatmaps.heatmap import Heatmap
from eosin.heatmaps.pooled import Target
from eosin.heatmaps.readout import MaxBag
from eosin.heatmaps.reevaluation import BUDGET
from eosin.heatmaps.subsets import Look, look
from eosin.heatmaps.tracing import trace_attention
from eosin.heatmaps.weighting import weight_gradient
from eosin.mil.slots import Aggregator, AttentionOutput

ATTRIBUTIONS = ("attention", "instance_logit", "effect", "log_weight_gradient", "gradient", "rollout")


@dataclass(frozen=True, eq=False)
class MapSet:
    """The maps of one slide.

    Parameters
    ----------
    maps : list of Heatmap
        The first is the one that pictures show: the percentile of the attention, or the effect of each tile for a model
        without attention.
    absent : dict of str to str
        For each of `ATTRIBUTIONS` that is not there, one sentence that says why.
    """

    maps: list[Heatmap]
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Subject:
    """What maps are made of: a model, a bag, the targets by name and how the bag is asked about subsets."""

    model: Aggregator
    bag: FeatureBag
    names: Sequence[str]
    targets: dict[str, Target]
    seen: Look
    wide: bool
    forced: bool


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
        Names of classes that exclude each other, as for `Classification` and `Binary`. Maps are of the log-odds of the
        predicted class and, where there are more than two, of every other one; of two classes the other's map is the
        same with the sign turned.
    outputs : sequence of str
        Names of the model's outputs for tasks without such classes; maps are of each output itself.
    wanted : sequence of str, optional
        Among `ATTRIBUTIONS`; all unless given, except effects that would take more than a pass per tile of a bag of
        more than 500 tiles.
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
        if name not in ATTRIBUTIONS:
            raise UnknownNameError("map", name, ATTRIBUTIONS)
    require_grid(bag)
    wide = 0 < model.n_outputs < len(classes)
    with in_eval_mode(model):
        seen = look(model, bag, single_logit_is_second_class=wide, budget=budget)
        targets = _targets(seen, classes, outputs)
        subject = _Subject(model, bag, classes or outputs, targets, seen, wide, forced=wanted is not None)
        found = {name: _MAKERS[name](subject) for name in dict.fromkeys(wanted or ATTRIBUTIONS)}
    maps = [heatmap for part in found.values() if not isinstance(part, str) for heatmap in part]
    absent = {name: part for name, part in found.items() if isinstance(part, str)}
    if not maps:
        raise ConfigError(f"{bag.slide_id}: there is no such map; {'; '.join(absent.values())}")
    return MapSet(maps, absent)


def _targets(seen: Look, classes: Sequence[str], outputs: Sequence[str]) -> dict[str, Target]:
    """Return what class-specific maps are about, the predicted class first."""
    logits = seen.subsets.logits()
    if not classes:
        return {name: Target(k, "logit") for k, name in enumerate(class_names(len(logits), outputs))}
    predicted = int(np.argmax(logits))
    others = [k for k in range(len(classes)) if k != predicted and len(classes) > 2]
    return {classes[k]: Target(k) for k in (predicted, *others)}


Found = list[Heatmap] | str


def _attention(subject: _Subject) -> Found:
    if not issubclass(subject.model.output_type, AttentionOutput):
        return "the model does not weigh tiles, so it has no attention"
    maps = output_maps(subject.model, subject.bag, classes=subject.names, of="attention")
    return [maps[0].percentile(), maps[0].relative(), *maps]


def _instance_logit(subject: _Subject) -> Found:
    maps = output_maps(subject.model, subject.bag, classes=subject.names, of="instance_logit")
    return maps or "the model has no classifier of single tiles"


def _effect(subject: _Subject) -> Found:
    n = subject.bag.n_instances
    if not is_exact(subject.seen.subsets) and not subject.forced:
        return (
            f"the model would have to be run again without each of {n} tiles; ask for the map effect by name to get "
            "an estimate that is compared with exact effects of some tiles"
        )
    return [
        _effect_map(subject, name, target, kind=f"effect_{name}" if place else "effect")
        for place, (name, target) in enumerate(subject.targets.items())
    ]


def _effect_map(subject: _Subject, name: str, target: Target, *, kind: str) -> Heatmap:
    effects, agreement = tile_effects(subject.seen.subsets, target)
    label = f"what a tile adds to {_quantity(target, name)}"
    if not is_exact(subject.seen.subsets):
        kind = kind.replace("effect", "effect_estimate", 1)
        label = f"estimate of {label}; rank correlation with exact effects {agreement:.2f}"
    return Heatmap(effects, require_grid(subject.bag), kind, label, signed=True)


def _quantity(target: Target, name: str) -> str:
    return name if target.on == "logit" else f"the log-odds of {name}"


def _log_weight_gradient(subject: _Subject) -> Found:
    pack = pack_bag(subject.model, subject.bag)
    grid = require_grid(subject.bag)
    maps = []
    for name, target in subject.targets.items():
        values = weight_gradient(subject.model, pack, _value(subject, target))
        if values is None:
            return _without_weights(subject)
        label = f"slope of {_quantity(target, name)} by the logarithm of the tile's weight"
        maps.append(Heatmap(values, grid, f"log_weight_gradient_{name}", label, signed=True))
    return maps


def _without_weights(subject: _Subject) -> str:
    if isinstance(subject.seen.subsets, MaxBag):
        return "the model reads the slide out by a maximum, so tiles have no weight to derive by"
    return "no place is known where this method reads the slide out by weights of tiles"


def _value(subject: _Subject, target: Target) -> Callable[[torch.Tensor], torch.Tensor]:
    def value(logits: torch.Tensor) -> torch.Tensor:
        return target.of_tensor(torch.cat([torch.zeros_like(logits), logits]) if subject.wide else logits)

    return value


def _gradient(subject: _Subject) -> Found:
    return [
        gradient_map(subject.model, subject.bag, target, of=name, single_logit_is_second_class=subject.wide)
        for name, target in subject.targets.items()
    ]


def _rollout(subject: _Subject) -> Found:
    trace = trace_attention(subject.model, pack_bag(subject.model, subject.bag))
    if trace is None:
        return "no layers of attention between tiles are known for this method, so a rollout has nothing to follow"
    heatmap = Heatmap(trace.row(), require_grid(subject.bag), "rollout", "attention followed through all layers")
    return [heatmap.percentile(), heatmap]


_MAKERS: dict[str, Callable[[_Subject], Found]] = {
    "attention": _attention,
    "instance_logit": _instance_logit,
    "effect": _effect,
    "log_weight_gradient": _log_weight_gradient,
    "gradient": _gradient,
    "rollout": _rollout,
}

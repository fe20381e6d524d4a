"""The maps of one slide that a reader can lay over it, made when they are first asked for."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from eosin.features.bag import FeatureBag
from eosin.heatmaps.attribution import (
    attribution_maps,
    class_names,
    gradient_map,
    in_eval_mode,
    pack_bag,
    require_grid,
)
from eosin.heatmaps.counterfactual import effect_map, tile_effects
from eosin.heatmaps.heatmap import Heatmap
from eosin.heatmaps.pooled import PooledBag, Target
from eosin.heatmaps.subsets import Look
from eosin.heatmaps.tracing import trace_attention
from eosin.heatmaps.weighting import weight_gradient
from eosin.mil.slots import Aggregator, AttentionOutput

PERCENTILE, TIMES, PLAIN = "rank among tiles (percentile)", "times the average tile", "as it is"
SCALINGS = (PERCENTILE, TIMES, PLAIN)
EFFECT, GRADIENT, OWN_LOGIT = "effect of each tile", "gradient × input", "tile's own logit"
SLOPE, ROLLOUT = "slope by the tile's weight", "attention through all layers"
EVERY_CLASS = ""
On = Literal["log_odds", "logit"]


@dataclass(frozen=True)
class Choice:
    """One map as the page names it.

    Parameters
    ----------
    family : str
        What the numbers are.
    class_name : str
        The class that they are about; empty for maps that are about none.
    """

    family: str
    class_name: str = EVERY_CLASS


class Layers:
    """The maps of one slide, each computed once.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag
        With a grid.
    seen : Look
        The slide as the model sees it.
    classes : sequence of str
        Empty for tasks without.
    """

    def __init__(self, model: Aggregator, bag: FeatureBag, seen: Look, classes: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._made: dict[Choice, Heatmap] = {}
        self._makers: dict[Choice, Callable[[], Heatmap]] = {}
        if issubclass(model.output_type, AttentionOutput):
            self._add_attributions(model, bag, classes)
        for output, name in enumerate(classes):
            self._makers[Choice(EFFECT, name)] = partial(_effects, seen, bag, output, name)
        # one logit of two classes speaks for the second
        on: On = "log_odds" if classes else "logit"
        for output, name in enumerate(class_names(model.n_outputs, classes)):
            target = Target(output, on)
            self._makers[Choice(GRADIENT, name)] = partial(gradient_map, model, bag, target, of=name)
            if isinstance(seen.subsets, PooledBag) or _slope(model, bag, target, name) is not None:
                self._makers[Choice(SLOPE, name)] = partial(_require_slope, model, bag, target, name)
        rollout = None if seen.method == "closed form" else _rollout(model, bag)
        if rollout is not None:
            self._made[Choice(ROLLOUT)] = rollout

    def _add_attributions(self, model: Aggregator, bag: FeatureBag, classes: tuple[str, ...]) -> None:
        for heatmap in attribution_maps(model, bag, classes=classes):
            self._made[_choice_of(heatmap, classes)] = heatmap

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every map that there is, the mean attention first where the model attends."""
        return (*self._made_first, *(choice for choice in self._makers if choice not in self._made_first))

    @property
    def _made_first(self) -> tuple[Choice, ...]:
        return tuple(choice for choice in self._made if choice not in self._makers)

    def families(self) -> tuple[str, ...]:
        """Return what kinds of maps there are, in order."""
        return tuple(dict.fromkeys(choice.family for choice in self.choices))

    def classes_of(self, family: str) -> tuple[str, ...]:
        """Return the classes that a family has maps for; ``("",)`` when it is about none."""
        return tuple(choice.class_name for choice in self.choices if choice.family == family)

    def is_made(self, choice: Choice) -> bool:
        """Whether a map is there already, or must be computed first."""
        return choice in self._made

    def get(self, choice: Choice, scaling: str = PLAIN) -> Heatmap:
        """Return a map.

        Parameters
        ----------
        choice : Choice
            One of `choices`.
        scaling : str
            One of `scalings_of` it; "as it is" instead of one that does not fit.

        Raises
        ------
        LookupError
            If there is no such map.
        """
        with self._lock:
            if choice not in self._made:
                self._made[choice] = self._makers[choice]()
            heatmap = self._made[choice]
        if scaling not in scalings_of(heatmap):
            return heatmap
        if scaling == PERCENTILE:
            return heatmap.percentile()
        return heatmap.relative() if scaling == TIMES else heatmap


def scalings_of(heatmap: Heatmap) -> tuple[str, ...]:
    """Return how a map can be scaled; only weights that sum to 1 have an average to be multiples of."""
    return SCALINGS if _is_weight(heatmap) else (PERCENTILE, PLAIN)


def default_scaling(heatmap: Heatmap) -> str:
    """Return the scaling that shows a map best: ranks for weights, which span decades; signed effects as they are."""
    return PLAIN if heatmap.signed else PERCENTILE


def _is_weight(heatmap: Heatmap) -> bool:
    return heatmap.kind.startswith(("attention", "rollout"))


def _choice_of(heatmap: Heatmap, classes: tuple[str, ...]) -> Choice:
    for name in classes:
        if heatmap.kind == f"instance_logit_{name}":
            return Choice(OWN_LOGIT, name)
        if heatmap.kind == f"attention_{name}":
            return Choice("attention of the class", name)
    return Choice(heatmap.label)


def _effects(seen: Look, bag: FeatureBag, output: int, name: str) -> Heatmap:
    effects, agreement = tile_effects(seen.subsets, Target(output))
    heatmap = effect_map(effects, require_grid(bag), name)
    if agreement >= 1:
        return heatmap
    return replace(heatmap, label=f"{heatmap.label}, first-order guess (rank agreement {agreement:.2f})")


def _slope(model: Aggregator, bag: FeatureBag, target: Target, name: str) -> Heatmap | None:
    values = weight_gradient(model, pack_bag(model, bag), target.of_tensor)
    if values is None:
        return None
    quantity = f"the log-odds of {name}" if target.on == "log_odds" else name
    label = f"slope of {quantity} by the logarithm of the tile's weight"
    return Heatmap(values, require_grid(bag), f"log_weight_gradient_{name}", label, signed=True)


def _require_slope(model: Aggregator, bag: FeatureBag, target: Target, name: str) -> Heatmap:
    heatmap = _slope(model, bag, target, name)
    if heatmap is None:
        raise LookupError("the model reads no slide out by weights")
    return heatmap


def _rollout(model: Aggregator, bag: FeatureBag) -> Heatmap | None:
    with in_eval_mode(model), torch.no_grad():
        trace = trace_attention(model, pack_bag(model, bag))
    if trace is None:
        return None
    return Heatmap(trace.row(), require_grid(bag), "rollout", "attention followed through all layers")

"""The maps of one slide that a reader can lay over it, made when they are first asked for."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from eosin.features._bag import FeatureBag
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps._maps import (
    MANY_TILES,
    alone_map,
    attribution_maps,
    effect_map,
    gradient_map,
    rollout_map,
    slope_map,
)
from eosin.heatmaps._subject import Look
from eosin.mil.slots import Aggregator, AttentionOutput, class_names
from eosin.mil.subsets import Target

PERCENTILE, TIMES, PLAIN = "rank among tiles (percentile)", "relative to the average tile", "as it is"
SCALINGS = (PERCENTILE, TIMES, PLAIN)
EFFECT, GRADIENT, OWN_LOGIT = "effect of each tile", "gradient × input", "tile's own logit"
ALONE = "what each tile says alone"
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
        # first, because it is the map that a model loses with what it has learnt; but not where it takes long to make
        self._is_dear = seen.subsets.price > MANY_TILES
        for output, name in reversed(list(enumerate(classes))):  # of two classes the second is what is looked for
            self._makers[Choice(ALONE, name)] = partial(_alone, seen, bag, Target(output), name)
        if issubclass(model.output_type, AttentionOutput):
            self._add_attributions(model, bag, classes)
        for output, name in enumerate(classes):
            self._makers[Choice(EFFECT, name)] = partial(effect_map, seen.subsets, bag, Target(output), of=name)
        # one logit of two classes belongs to the second
        on: On = "log_odds" if classes else "logit"
        for output, name in enumerate(class_names(model.n_outputs, classes)):
            target = Target(output, on)
            self._makers[Choice(GRADIENT, name)] = partial(gradient_map, model, bag, target, of=name)
            asked = Target(classes.index(name), on) if classes else target
            if seen.subsets.slopes(asked) is not None:
                self._makers[Choice(SLOPE, name)] = partial(_require_slope, seen, bag, asked, name)
        rollout = rollout_map(model, bag)
        if rollout is not None:
            self._made[Choice(ROLLOUT)] = rollout

    def _add_attributions(self, model: Aggregator, bag: FeatureBag, classes: tuple[str, ...]) -> None:
        for heatmap in attribution_maps(model, bag, classes=classes):
            self._made[_choice_of(heatmap, classes)] = heatmap

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every map that there is: what each tile says alone, the attention, then the others."""
        ready = [choice for choice in self._made if choice not in self._makers]
        alone = 2 if self._is_dear else 0
        return tuple(sorted([*ready, *self._makers], key=lambda choice: alone if choice.family == ALONE else 1))

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
    return SCALINGS if heatmap.is_weight else (PERCENTILE, PLAIN)


def default_scaling(heatmap: Heatmap) -> str:
    """Return the scaling that shows a map best: weights by the average tile, which no slide can have more of."""
    return PLAIN if heatmap.signed else TIMES if heatmap.is_weight else PERCENTILE


def choose(layers: Layers, family: str, class_name: str) -> Choice:
    """Return the map of a family that is about a class, or the last of the family where none is.

    Raises
    ------
    LookupError
        If there is no such family.
    """
    names = layers.classes_of(family)
    if not names:
        raise LookupError("there is no such map")
    return Choice(family, class_name if class_name in names else names[-1])


def _choice_of(heatmap: Heatmap, classes: tuple[str, ...]) -> Choice:
    families = {"instance_logit": OWN_LOGIT, "attention": "attention of the class"}
    if heatmap.of in classes and heatmap.shows in families:
        return Choice(families[heatmap.shows], heatmap.of)
    return Choice(heatmap.label)


def _alone(seen: Look, bag: FeatureBag, target: Target, name: str) -> Heatmap:
    return alone_map(seen.subsets.only_one(), bag, target, of=name)


def _require_slope(seen: Look, bag: FeatureBag, target: Target, name: str) -> Heatmap:
    heatmap = slope_map(seen.subsets, bag, target, of=name)
    if heatmap is None:
        raise LookupError(seen.subsets.weightless)
    return heatmap

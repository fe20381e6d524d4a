"""The counterfactual examination of one slide: which questions are asked, and what the answers mean in words."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from eosin.errors import ConfigError, UnknownNameError
from eosin.features.bag import FeatureBag
from eosin.heatmaps.counterfactual import (
    Effect,
    Indices,
    Kind,
    SmallestSet,
    ablate_top,
    as_probability,
    certify,
    describe_method,
    effects_table,
    in_words,
    intervene,
    is_linear,
    smallest_necessary,
    tile_effects,
    top_tiles,
)
from eosin.heatmaps.explain import class_choices
from eosin.heatmaps.pooled import Floats, PooledBag, Search, Target
from eosin.heatmaps.subsets import Look, Subsets, look
from eosin.mil.checkpoint import ModelCard
from eosin.mil.slots import Aggregator
from eosin.options import Options

CURVE_SHARES = (0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
CURVE_DRAWS = 10


class Questions(Options):
    """What is asked about a slide.

    Parameters
    ----------
    fractions : tuple of float
        Shares of the most attended tiles that are removed, and kept alone.
    rounds : int
        Of the greedy search.
    controls : int
        Random sets per intervention.
    seed : int
        Of the random sets.
    """

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    rounds: int = 100
    controls: int = 50
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """What came out.

    Parameters
    ----------
    slide_id : str
    class_name : str
        The class that all numbers are about.
    output : int
        Its index among the logits of the search.
    method : str
        How the numbers were made, in a sentence.
    effects : list of Effect
    tile_effects : (n,) float64
        What each tile adds to the log-odds of the class.
    agreement : float
        See `eosin.heatmaps.counterfactual.tile_effects`.
    search : Search
        Greedy removal of the tiles that carry the class.
    smallest : SmallestSet or None
        Fewest tiles whose removal turns the prediction.
    enough_alone : int or None
        Tiles that the model would call the class each by itself: with softmax pooling, one such tile is the smallest
        sufficient set. None for models that have to be run again.
    certificate : (float, float) or None
        Log-odds after the search, and after the best set of the same size.
    curves : DataFrame
        Columns ``order`` (most attended first, greedy, random), ``share``, ``probability``, ``low``, ``high``.
    ranking : (n,) float64
        What "most attended" tiles are chosen by: attention, or the effects where a model has none.
    ranking_name : str
        "most attended" or "most effective".
    """

    slide_id: str
    class_name: str
    output: int
    method: str
    effects: list[Effect]
    tile_effects: Floats
    agreement: float
    search: Search
    smallest: SmallestSet | None
    enough_alone: int | None
    certificate: tuple[float, float] | None
    curves: pd.DataFrame
    ranking: Floats
    ranking_name: str

    @property
    def n_tiles(self) -> int:
        """Number of tiles of the slide."""
        return len(self.tile_effects)

    def table(self) -> pd.DataFrame:
        """Return one row per intervention."""
        return effects_table(self.effects, {"slide": self.slide_id, "class": self.class_name})

    def sentences(self) -> list[str]:
        """Return what came out as sentences for a pathologist."""
        first_kept = next((effect for effect in self.effects if effect.kind == "keep only"), None)
        told = [e for e in self.effects if e.kind == "remove" or e is first_kept or self.ranking_name not in e.what]
        sentences = [in_words(effect, self.class_name) for effect in told if effect.n_tiles]
        sentences.append(self._search_in_words())
        if self.effects[0].before > 0:
            sentences.append(self._smallest_in_words())
        if self.enough_alone is not None:
            alone = self._share_of_tiles(self.enough_alone)
            sentences.append(f"Each by itself, {alone} would be called {self.class_name}.")
        if self.agreement < 1:
            sentences.append(
                "The map of single tiles is a first-order guess; its rank correlation with the exact effects of "
                f"random tiles is {self.agreement:.2f}."
            )
        return [*sentences, self.method]

    def _share_of_tiles(self, count: int) -> str:
        return f"{count} {'tile' if count == 1 else 'tiles'} ({100 * count / self.n_tiles:.2g} %)"

    def _search_in_words(self) -> str:
        rounds = len(self.search.order)
        before, after = (as_probability(value) for value in self._search_ends())
        top = set(np.argsort(-self.ranking, kind="stable")[:rounds].tolist())
        shared = len(top & set(self.search.order.tolist()))
        sentence = (
            f"Taking out, one by one, the {rounds} tiles that carry {self.class_name} most: {before} → {after}; "
            f"{shared} of them are among the {rounds} {self.ranking_name}"
        )
        if self.certificate is None:
            return f"{sentence}."
        best = as_probability(float(expit(self.certificate[1])))
        return f"{sentence}; no other {rounds} tiles would bring it below {best}."

    def _search_ends(self) -> tuple[float, float]:
        target = Target(self.output, "probability")
        return float(target.of(self.search.logits[0])), float(target.of(self.search.logits[-1]))

    def _smallest_in_words(self) -> str:
        if self.smallest is None:
            return f"No set of tiles that was tried turns the prediction away from {self.class_name}."
        count = len(self.smallest.tiles)
        how = "at least" if self.smallest.is_certain else "in the order of the search,"
        return f"To turn the prediction away from {self.class_name}, {how} {self._share_of_tiles(count)} must go."


def examine(
    model: Aggregator,
    card: ModelCard,
    bag: FeatureBag,
    *,
    class_name: str | None = None,
    regions: Mapping[str, Indices] | None = None,
    questions: Questions = Questions(),  # noqa: B008 - frozen
) -> Counterfactuals:
    """Ask everything about one slide.

    Parameters
    ----------
    model : Aggregator
    card : ModelCard
    bag : FeatureBag
        With at least two tiles.
    class_name : str, optional
        The class to ask about; the predicted one unless given.
    regions : mapping of str to (k,) int64, optional
        Sets of tiles by name, for example those inside an annotation: each is removed and kept alone.
    questions : Questions

    Raises
    ------
    ConfigError
        If the task has no classes, the class is unknown or the bag has fewer than two tiles.
    """
    classes = class_choices(card)
    if not classes:
        raise ConfigError(f"counterfactuals are about classes; the task {card.load_task().kind} of this model has none")
    if bag.n_instances < 2:
        raise ConfigError(f"{bag.slide_id}: counterfactuals need at least two tiles, found {bag.n_instances}")
    seen = look(model, bag, single_logit_is_second_class=model.n_outputs < len(classes))
    chosen = classes[int(np.argmax(seen.subsets.logits()))] if class_name is None else class_name
    if chosen not in classes:
        raise UnknownNameError("class of the model", chosen, classes)
    return _ask(seen, Target(classes.index(chosen)), bag.slide_id, chosen, dict(regions or {}), questions)


def _ask(
    seen: Look, target: Target, slide_id: str, class_name: str, regions: dict[str, Indices], questions: Questions
) -> Counterfactuals:
    subsets = seen.subsets
    contribution, agreement = tile_effects(subsets, target)
    ranking, name = _ranking(seen, contribution)
    effects = ablate_top(
        subsets,
        target,
        ranking,
        name=name,
        fractions=questions.fractions,
        controls=questions.controls,
        seed=questions.seed,
    )
    kinds: tuple[Kind, Kind] = ("remove", "keep only")
    effects += [
        intervene(subsets, target, index, kind=kind, what=what, controls=questions.controls, seed=questions.seed)
        for what, index in regions.items()
        for kind in kinds
    ]
    search = subsets.greedy(target, "min", min(questions.rounds, subsets.n_instances - 1))
    smallest = smallest_necessary(subsets, target, search) if float(target.of(subsets.logits())) > 0 else None
    return Counterfactuals(
        slide_id=slide_id,
        class_name=class_name,
        output=target.output,
        method=describe_method(seen, search),
        effects=effects,
        tile_effects=contribution,
        agreement=agreement,
        search=search,
        smallest=smallest,
        enough_alone=_enough_alone(subsets, target),
        certificate=_certificate(subsets, target, search),
        curves=_curves(subsets, target, ranking, name, search, questions),
        ranking=ranking,
        ranking_name=name,
    )


def _enough_alone(subsets: Subsets, target: Target) -> int | None:
    if not isinstance(subsets, PooledBag):
        return None
    return int((Target(target.output).of(subsets.only_one()) > 0).sum())


def _certificate(subsets: Subsets, target: Target, search: Search) -> tuple[float, float] | None:
    if isinstance(subsets, PooledBag) and is_linear(subsets, target):
        return certify(subsets, target, search)
    return None


def _ranking(seen: Look, contribution: Floats) -> tuple[Floats, str]:
    return (contribution, "most effective") if seen.attention is None else (seen.attention, "most attended")


def _curves(
    subsets: Subsets, target: Target, ranking: Floats, name: str, search: Search, questions: Questions
) -> pd.DataFrame:
    n = subsets.n_instances
    rows = []
    for share in CURVE_SHARES:
        value = _probability(target, subsets.remove(top_tiles(ranking, share)))
        rows.append((name, share, value, value, value))
    for rounds in sorted({round(share * n) for share in CURVE_SHARES if share * n <= len(search.order)}):
        value = _probability(target, search.logits[rounds])
        rows.append(("greedy", rounds / n, value, value, value))
    rng = np.random.default_rng(questions.seed)
    draws = [rng.random(n) for _ in range(CURVE_DRAWS)]
    for share in CURVE_SHARES:
        values = [_probability(target, subsets.remove(top_tiles(draw, share))) for draw in draws]
        rows.append(("random", share, float(np.mean(values)), min(values), max(values)))
    return pd.DataFrame(rows, columns=["order", "share", "probability", "low", "high"])


def _probability(target: Target, logits: Floats) -> float:
    return float(Target(target.output, "probability").of(logits))

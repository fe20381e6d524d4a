"""The counterfactual examination of one slide: which questions are asked, and what the answers mean in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from eosin.errors import ConfigError, UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.heatmaps._counterfactual import (
    Effect,
    Kind,
    Origin,
    SmallestSet,
    ablate_top,
    certify,
    intervene,
    smallest_necessary,
    smallest_sufficient,
    tile_effects,
    top_tiles,
    transplant,
)
from eosin.heatmaps._findings import Counterfactuals, describe_method
from eosin.heatmaps._subject import Look, class_choices, look, require_classes
from eosin.mil._checkpoint import ModelCard
from eosin.mil._reevaluation import BUDGET
from eosin.mil.slots import Aggregator
from eosin.mil.subsets import Direction, Floats, Indices, Search, Subsets, Target
from eosin.options import Options

CURVE_SHARES = (0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
CURVE_DRAWS = 10
FEWEST_CONTROLS = 9
ATTENTION_STRATA = 5
POSITION_STRATA = 4
TISSUE_STRATA = (0.5, 0.75, 0.9, 0.999)  # shares of a tile that is tissue, between which tiles count as alike
SHUFFLES = 19  # the fewest whose rank can be 1 in 20


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
    direction : {"min", "max", "least"}
        What the search takes out: the tiles that carry the class, those that count against it, or those that matter
        least.
    on : {"log_odds", "probability"}
        What the search looks at. Probabilities saturate at 1, where all effects look like none.
    matched : {"number", "attention", "position", "tissue"}
        What the random sets share with the set beside its number of tiles: how many are in each fifth of the tiles by
        attention, in each of 16 parts of the slide, or of each share of tissue (which needs the slide).
    shuffles : int, optional
        For a cohort: models with shuffled weights that are asked the same, for p values of sets that the model chose.
        19 unless given, none where the model must be run again.
    budget : int
        For models without a closed form: tiles that the model may be run on for the search, and again for the sets
        with their controls. Larger slides get fewer controls and larger steps.
    """

    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.01, 0.05, 0.1, 0.2)
    rounds: Annotated[int, Field(ge=1)] = 100
    controls: Annotated[int, Field(ge=0)] = 50
    seed: int = 0
    direction: Direction = "min"
    on: Literal["log_odds", "probability"] = "log_odds"
    matched: Literal["number", "attention", "position", "tissue"] = "number"
    shuffles: Annotated[int, Field(ge=0)] | None = None
    budget: Annotated[int, Field(ge=1)] = BUDGET


@dataclass(frozen=True, eq=False)
class Donor:
    """Another slide whose tiles are added.

    Parameters
    ----------
    bag : FeatureBag
    regions : mapping of str to (k,) int64
        Sets of its tiles by name; its most attended tiles are added besides.
    seen : Look, optional
        What answers for it, when it is there already: `see_donor`.
    """

    bag: FeatureBag
    regions: Mapping[str, Indices] = field(default_factory=dict)
    seen: Look | None = None


def see_donor(model: Aggregator, card: ModelCard, donor: Donor) -> Donor:
    """Return the donor with what answers for it, so that many slides can be asked at the price of one look."""
    wide = model.n_outputs < len(class_choices(card))
    return replace(donor, seen=donor.seen or look(model, donor.bag, single_logit_is_second_class=wide))


def examine(
    model: Aggregator,
    card: ModelCard,
    bag: FeatureBag,
    *,
    class_name: str | None = None,
    regions: Mapping[str, Indices] | None = None,
    donors: Sequence[Donor] = (),
    questions: Questions = Questions(),  # noqa: B008 - frozen
    tissue: Floats | None = None,
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
    donors : sequence of Donor
        Slides whose tiles are added to this one.
    questions : Questions
    tissue : (n,) float64, optional
        Share of each tile that is tissue, for random sets that are matched by it.

    Returns
    -------
    Counterfactuals
        Effects of all sets, of the search and of the smallest sets.

    Raises
    ------
    ConfigError
        If the task has no classes, the class is unknown, the bag has fewer than two tiles, or what random sets are to
        be matched by is not known.
    """
    classes = require_classes(card)
    if bag.n_instances < 2:
        raise ConfigError(f"{bag.slide_id}: counterfactuals need at least two tiles, the slide has {bag.n_instances}")
    wide = model.n_outputs < len(classes)
    seen = look(model, bag, single_logit_is_second_class=wide, budget=questions.budget)
    chosen = classes[int(np.argmax(seen.subsets.logits()))] if class_name is None else class_name
    if chosen not in classes:
        raise UnknownNameError("class of the model", chosen, classes)
    strata = _strata(bag, seen, questions.matched, tissue)
    exam = _Exam(seen, Target(classes.index(chosen)), _affordable(seen.subsets, questions), strata)
    added = [effect for donor in donors for effect in exam.transplants(see_donor(model, card, donor))]
    return exam.ask(bag.slide_id, chosen, regions or {}, added)


def _strata(bag: FeatureBag, seen: Look, matched: str, tissue: Floats | None) -> Indices | None:
    """Return the stratum of each tile in which random sets take its place; None when the number alone is matched."""
    if matched == "attention":
        if seen.attention is None:
            raise ConfigError(
                "random tiles cannot be matched by attention, because the model has none; "
                "set questions.matched to number"
            )
        ranks = np.argsort(np.argsort(seen.attention, kind="stable"), kind="stable")
        return ranks * ATTENTION_STRATA // len(ranks)
    if matched == "number":
        return None
    if matched == "tissue":
        if tissue is None:
            raise ConfigError("the share of tissue is found on the slide; pass it, or set questions.matched to number")
        return np.digitize(tissue, TISSUE_STRATA)
    if bag.grid is None:
        raise ConfigError(
            f"{bag.slide_id}: random tiles cannot be matched by position, because the features "
            "have no coordinates; set questions.matched to number"
        )
    place = bag.grid.origins_px0 - bag.grid.origins_px0.min(0)
    part = np.minimum(place * POSITION_STRATA // (place.max(0) + 1), POSITION_STRATA - 1)
    return np.asarray(part[:, 0] * POSITION_STRATA + part[:, 1], np.int64)


def _affordable(subsets: Subsets, questions: Questions) -> Questions:
    """Return the questions with as many controls as a model that has to be run again may take."""
    if not subsets.price:
        return questions
    # each share is removed and kept alone; the search, the best and both smallest sets come besides
    sets = 2 * len(questions.fractions) + 4
    controls = max(FEWEST_CONTROLS, questions.budget // (subsets.price * sets))
    return questions.model_copy(update={"controls": min(questions.controls, controls)})


@dataclass(frozen=True, eq=False)
class _Exam:
    """One slide, what is asked about it and how."""

    seen: Look
    target: Target
    questions: Questions
    strata: Indices | None = None

    def ask(
        self, slide_id: str, class_name: str, regions: Mapping[str, Indices], added: Sequence[Effect]
    ) -> Counterfactuals:
        subsets, target, questions = self.seen.subsets, self.target, self.questions
        contribution, agreement = tile_effects(subsets, target)
        ranking, name = _ranking(self.seen, contribution)
        effects = ablate_top(
            subsets,
            target,
            ranking,
            name=name,
            fractions=questions.fractions,
            controls=questions.controls,
            seed=questions.seed,
            strata=self.strata,
        )
        effects += [effect for what, index in regions.items() for effect in self._both(index, what)]
        searched = Target(target.output, questions.on)
        search = subsets.greedy(searched, questions.direction, min(questions.rounds, subsets.n_instances - 1))
        is_called = float(target.of(subsets.logits())) > 0
        smallest = smallest_necessary(subsets, target, search) if is_called and questions.direction == "min" else None
        sufficient = smallest_sufficient(subsets, target, contribution) if is_called else None
        effects += [*added, *self._own_sets(search, smallest, sufficient)]
        return Counterfactuals(
            slide_id=slide_id,
            class_name=class_name,
            output=target.output,
            method=describe_method(self.seen, search),
            effects=effects,
            tile_effects=contribution,
            agreement=agreement,
            search=search,
            smallest=smallest,
            enough_alone=_enough_alone(subsets, target),
            certificate=_certificate(subsets, target, search, questions.direction),
            curves=_curves(subsets, target, ranking=ranking, name=name, search=search, questions=questions),
            ranking=ranking,
            ranking_name=name,
            sufficient=sufficient,
            direction=questions.direction,
        )

    def transplants(self, donor: Donor) -> list[Effect]:
        """Add the most attended tiles of a donor that has been seen, and those of its regions."""
        donor_seen = donor.seen
        assert donor_seen is not None  # `see_donor`
        unranked = donor_seen.attention is None
        contribution = tile_effects(donor_seen.subsets, self.target)[0] if unranked else np.zeros(0)
        ranking, name = _ranking(donor_seen, contribution)
        origin = f"of {donor.bag.slide_id}"
        shares = self.questions.fractions
        sets = {f"{100 * share:g} % {name} tiles {origin}": top_tiles(ranking, share) for share in shares}
        sets |= {f"{what} {origin}": index for what, index in donor.regions.items()}
        return [
            transplant(
                self.seen.subsets,
                donor_seen.subsets,
                self.target,
                index,
                what=what,
                controls=self.questions.controls,
                seed=self.questions.seed,
            )
            for what, index in sets.items()
        ]

    def _own_sets(self, search: Search, smallest: SmallestSet | None, sufficient: SmallestSet | None) -> list[Effect]:
        """Return the interventions on the sets that were searched for, with controls of the same number."""
        found = [self._one(search.order, "tiles of the search", Origin.SEARCH, kind="remove")]
        subsets, direction = self.seen.subsets, self.questions.direction
        if direction != "least" and subsets.knows_best_set(self.target):
            best = subsets.best_set(self.target, direction, len(search.order))
            found.append(self._one(best, "best set of the search's size", Origin.BEST, kind="remove"))
        if smallest is not None:
            found.append(self._one(smallest.tiles, "smallest necessary set", Origin.NECESSARY, kind="remove"))
        if sufficient is not None:
            found.append(self._one(sufficient.tiles, "smallest sufficient set", Origin.SUFFICIENT, kind="keep only"))
        return found

    def _both(self, index: Indices, what: str) -> list[Effect]:
        kinds: tuple[Kind, Kind] = ("remove", "keep only")
        return [self._one(index, what, Origin.REGION, kind=kind) for kind in kinds]

    def _one(self, index: Indices, what: str, origin: Origin, *, kind: Kind) -> Effect:
        return intervene(
            self.seen.subsets,
            self.target,
            index,
            kind=kind,
            what=what,
            origin=origin,
            controls=self.questions.controls,
            seed=self.questions.seed,
            strata=self.strata,
        )


def _enough_alone(subsets: Subsets, target: Target) -> int | None:
    if subsets.price:
        return None  # a pass over bags of one tile each; what a model says of these is another question
    return int((Target(target.output).of(subsets.only_one()) > 0).sum())


def _certificate(subsets: Subsets, target: Target, search: Search, direction: Direction) -> tuple[float, float] | None:
    if direction != "least" and subsets.knows_best_set(target):
        return certify(subsets, target, search, direction=direction)
    return None


def _ranking(seen: Look, contribution: Floats) -> tuple[Floats, str]:
    return (contribution, "most effective") if seen.attention is None else (seen.attention, "most attended")


def _curves(
    subsets: Subsets, target: Target, *, ranking: Floats, name: str, search: Search, questions: Questions
) -> pd.DataFrame:
    n = subsets.n_instances
    rows = []
    for share in CURVE_SHARES:
        value = _probability(target, subsets.remove(top_tiles(ranking, share)))
        rows.append((name, share, value, value, value))
    # a search in blocks has no answer at every share: the next one that it has is drawn where it lies
    wanted = np.array(CURVE_SHARES) * n
    for step in np.unique(np.searchsorted(search.removed, wanted[wanted <= len(search.order)].round())):
        value = _probability(target, search.logits[step])
        rows.append(("greedy", search.removed[step] / n, value, value, value))
    rng = np.random.default_rng(questions.seed)
    # one random order per draw for all shares, so that a line of the figure is one way of losing tiles
    draws = [rng.random(n) for _ in range(min(CURVE_DRAWS, max(1, questions.controls)))]
    for share in CURVE_SHARES:
        values = [_probability(target, subsets.remove(top_tiles(draw, share))) for draw in draws]
        rows.append(("random", share, float(np.mean(values)), min(values), max(values)))
    return pd.DataFrame(rows, columns=["order", "share", "probability", "low", "high"])


def _probability(target: Target, logits: Floats) -> float:
    return float(Target(target.output, "probability").of(logits))

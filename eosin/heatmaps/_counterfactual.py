"""Interventions on a slide: what the model says without some tiles, with those alone, and with others added.

HIPPO (Kaczmarzyk, Saltz, Koo, https://arxiv.org/abs/2409.03080). Necessity of a set S of tiles is the change of the
prediction when S is removed; sufficiency is the prediction of S alone, or the change when S is added to another
slide. Every set is compared with random sets of the same number of tiles, because removing many tiles changes a
prediction whatever they show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypeVar

import numpy as np
import scipy

from eosin.mil.subsets import Floats, Indices, Search, Subsets, Target

Kind = Literal["remove", "keep only", "add"]
SubsetsT = TypeVar("SubsetsT", bound=Subsets)
N_CONTROLS = 50


class Origin(StrEnum):
    """Where a set of tiles comes from; what is said of it depends on this and never on its name."""

    RANKING = "ranking"
    REGION = "region"
    DONOR = "donor"
    SEARCH = "search"
    NECESSARY = "necessary"
    SUFFICIENT = "sufficient"
    BEST = "best"

    @property
    def is_found(self) -> bool:
        """Whether the set was chosen by what the model says without it, or with it alone."""
        return self in (Origin.SEARCH, Origin.NECESSARY, Origin.SUFFICIENT, Origin.BEST)

    @property
    def is_given(self) -> bool:
        """Whether the set was chosen outside the model."""
        return self is Origin.REGION


@dataclass(frozen=True)
class Effect:
    """One intervention on one slide.

    Parameters
    ----------
    kind : {"remove", "keep only", "add"}
    what : str
        The tiles in words: "1 % most attended tiles".
    n_tiles : int
        How many tiles were removed, kept or added.
    before, after : float
        Log-odds of the class.
    control_mean, control_low, control_high : float or None
        Mean and 2.5 and 97.5 percentiles of the log-odds after the same intervention with random tiles.
    control_rank : float or None
        Share of the random sets that change the log-odds at least as much in the same direction, the set itself
        counted among them: a one-sided randomisation p value of tiles that were chosen outside the model, a description
        of those that it weighs most. None for a set that was searched for, which beats random sets by construction.
    n_controls : int
    control_sd : float or None
        Standard deviation of the log-odds with random tiles.
    origin : Origin
        Where the tiles come from.
    """

    kind: Kind
    what: str
    n_tiles: int
    before: float
    after: float
    control_mean: float | None = None
    control_low: float | None = None
    control_high: float | None = None
    control_rank: float | None = None
    n_controls: int = 0
    control_sd: float | None = None
    origin: Origin = Origin.REGION

    @property
    def effect_size(self) -> float | None:
        """Standard deviations between the result and that of random sets; None without controls that differ."""
        if self.control_mean is None or not self.control_sd:
            return None
        return (self.after - self.control_mean) / self.control_sd

    @property
    def change(self) -> float:
        """Change of the log-odds."""
        return self.after - self.before

    @property
    def probability_before(self) -> float:
        """Probability of the class before."""
        return float(scipy.special.expit(self.before))

    @property
    def probability_after(self) -> float:
        """Probability of the class after."""
        return float(scipy.special.expit(self.after))

    @property
    def is_still_predicted(self) -> bool:
        """Whether the log-odds stay on the side of zero where they were."""
        return (self.after > 0) == (self.before > 0)


def intervene(
    subsets: Subsets,
    target: Target,
    index: Indices,
    *,
    kind: Kind,
    what: str,
    origin: Origin = Origin.REGION,
    controls: int = N_CONTROLS,
    seed: int = 0,
    strata: Indices | None = None,
) -> Effect:
    """Remove a set of tiles, or keep it alone, and do the same with random sets of the same number.

    Parameters
    ----------
    subsets : Subsets
        The slide as the model sees it.
    target : Target
        The class; effects are in log-odds, whatever the target is on.
    index : (k,) int64
        The tiles.
    kind : {"remove", "keep only"}
        Necessity or sufficiency; for "add" see `transplant`.
    what : str
        The tiles in words.
    origin : Origin
        Where they come from.
    controls : int
        Random sets; 0 for none.
    seed : int
        Of their choice.
    strata : (n,) int64, optional
        Kind of each tile, such as its part of the slide; random sets then have as many tiles of each kind as the set.
    """
    act = subsets.remove if kind == "remove" else subsets.keep_only
    before, after = _value(target, subsets.logits()), _value(target, act(index))
    # sets of the same seed and size are the same sets, so that two interventions are compared with equal luck
    rng = np.random.default_rng(seed)
    n = subsets.n_instances
    kinds = np.zeros(n, np.int64) if strata is None else strata
    drawn = [act(_like(index, kinds, rng)) for _ in range(controls if 0 < len(index) < n else 0)]
    effect = Effect(kind, what, len(index), before, after, origin=origin)
    return _with_controls(effect, [_value(target, logits) for logits in drawn])


def _like(index: Indices, strata: Indices, rng: np.random.Generator) -> Indices:
    """Return as many random tiles of each stratum as a set has."""
    wanted, counts = np.unique(strata[index], return_counts=True)
    drawn = [
        rng.choice(np.flatnonzero(strata == stratum), size=count, replace=False)
        for stratum, count in zip(wanted, counts, strict=True)
    ]
    return np.concatenate(drawn)


def transplant(
    receiver: SubsetsT,
    donor: SubsetsT,
    target: Target,
    index: Indices,
    *,
    what: str,
    controls: int = N_CONTROLS,
    seed: int = 0,
) -> Effect:
    """Add some tiles of a donor slide to a receiver, both seen by the same model: sufficiency.

    Parameters
    ----------
    receiver, donor : Subsets
        Of the same type.
    target : Target
    index : (k,) int64
        Tiles of the donor.
    what : str
        These tiles in words.
    controls : int
        Random sets of as many tiles of the donor.
    seed : int
    """
    before = _value(target, receiver.logits())
    after = _value(target, receiver.add(donor.select(index)))
    rng = np.random.default_rng(seed)
    drawn = controls if 0 < len(index) < donor.n_instances else 0
    sets = [rng.choice(donor.n_instances, size=len(index), replace=False) for _ in range(drawn)]
    values = [_value(target, receiver.add(donor.select(chosen))) for chosen in sets]
    return _with_controls(Effect("add", what, len(index), before, after, origin=Origin.DONOR), values)


def _with_controls(effect: Effect, values: Sequence[float]) -> Effect:
    if not values:
        return effect
    low, high = np.quantile(values, [0.025, 0.975])
    direction = 1.0 if effect.change >= 0 else -1.0
    # the set itself counts among the draws: a randomisation p value is never 0
    as_large = sum(direction * (value - effect.before) >= direction * effect.change for value in values)
    return replace(
        effect,
        control_mean=float(np.mean(values)),
        control_low=float(low),
        control_high=float(high),
        control_rank=None if effect.origin.is_found else (1 + as_large) / (1 + len(values)),
        n_controls=len(values),
        control_sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
    )


def _value(target: Target, logits: Floats) -> float:
    return float(Target(target.output).of(logits))


def top_tiles(scores: Floats, fraction: float) -> Indices:
    """Return the ⌈fraction × n⌉ tiles with the highest scores, highest first; the first of equal ones."""
    # 0.05 of 100 is 5.000000000000001 in floating point, which must not become 6
    count = int(np.ceil(fraction * len(scores) - 1e-9))
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)


def ablate_top(
    subsets: Subsets,
    target: Target,
    scores: Floats,
    *,
    name: str,
    fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.2),
    controls: int = N_CONTROLS,
    seed: int = 0,
    strata: Indices | None = None,
) -> list[Effect]:
    """Remove the tiles with the highest scores, and keep them alone, for each fraction; options as of `intervene`."""
    kinds: tuple[Kind, Kind] = ("remove", "keep only")
    return [
        intervene(
            subsets,
            target,
            top_tiles(scores, fraction),
            kind=kind,
            what=f"{100 * fraction:g} % {name} tiles",
            origin=Origin.RANKING,
            controls=controls,
            seed=seed,
            strata=strata,
        )
        for fraction in fractions
        for kind in kinds
    ]


def tile_effects(subsets: Subsets, target: Target) -> tuple[Floats, float]:
    """Return what each tile adds to the log-odds of the class, and how far to trust it.

    Parameters
    ----------
    subsets : Subsets
    target : Target

    Returns
    -------
    effects : (n,) float64
        Log-odds with the tile minus log-odds without it. Exact for every model with a closed form, and for small
        bags of a model that has to be run again; for its large bags a first-order guess.
    agreement : float
        Spearman correlation of the guess with the exact effects of a random sample; 1 where all are exact.
    """
    return subsets.effects(target)


@dataclass(frozen=True, eq=False)
class SmallestSet:
    """The fewest tiles that decide a prediction.

    Parameters
    ----------
    tiles : (k,) int64
    is_certain : bool
        True when no smaller set can do it; False when the set comes from a greedy search.
    """

    tiles: Indices
    is_certain: bool


def smallest_necessary(subsets: Subsets, target: Target, search: Search) -> SmallestSet | None:
    """Return the smallest set whose removal turns the prediction, or None if no set is known to.

    With one branch and log-odds that are linear in the logits the best set of every size is known, and its effect
    grows with its size, so bisection finds the smallest size with certainty. Otherwise the set is read off the
    greedy search.

    Parameters
    ----------
    subsets : Subsets
    target : Target
        On log-odds, positive for the slide: the class that is predicted.
    search : Search
        Greedy, minimising the target; used where there is no closed form.
    """
    if subsets.knows_best_set(target):
        return _bisect(subsets, target)
    turned = np.flatnonzero(target.of(search.logits) <= 0)
    return SmallestSet(search.order[: search.removed[turned[0]]], is_certain=False) if len(turned) else None


def smallest_sufficient(subsets: Subsets, target: Target, effects: Floats) -> SmallestSet | None:
    """Return the smallest set known to be called the class when it is all there is, or None.

    Where a single tile is, that is certain; with one branch and linear log-odds no set is if no single tile is, as the
    prediction of a set lies between those of its tiles. Otherwise tiles are taken in the order of their effects.

    Parameters
    ----------
    subsets : Subsets
    target : Target
        On log-odds.
    effects : (n,) float64
        Of `tile_effects`, to order the tiles by.
    """
    if not subsets.price:
        alone = target.of(subsets.only_one())
        if alone.max() > 0:
            return SmallestSet(np.array([alone.argmax()]), is_certain=True)
        if subsets.knows_best_set(target):
            return None
    order = np.argsort(-effects, kind="stable")

    def suffices(size: int) -> bool:
        return _value(target, subsets.keep_only(order[:size])) > 0

    n, low, high = subsets.n_instances, 0, 1
    # doubling, then halving: a prediction is not monotone in the size of the set, so this finds a set and no bound
    while not suffices(high):
        if high == n:
            return None
        low, high = high, min(2 * high, n)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return SmallestSet(order[:high], is_certain=high == 1)


def _bisect(bag: Subsets, target: Target) -> SmallestSet | None:
    def turns(size: int) -> bool:
        return _value(target, bag.remove(bag.best_set(target, "min", size))) <= 0

    # the best set of a size turns whatever a smaller best set turns, which is what makes halving certain
    low, high = 0, bag.n_instances - 1
    if high < 1 or not turns(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if turns(middle) else (middle, high)
    return SmallestSet(bag.best_set(target, "min", high), is_certain=True)


def certify(
    bag: Subsets, target: Target, search: Search, *, direction: Literal["min", "max"] = "min"
) -> tuple[float, float]:
    """Return the log-odds after a greedy search and after removing the best set of the same size."""
    best = bag.best_set(target, direction, len(search.order))
    return _value(target, search.logits[-1]), _value(target, bag.remove(best))


def as_probability(probability: float) -> str:
    """Return a probability with three digits, and never as 0 or 1."""
    # "1.000" would be read as certainty
    if probability > 0.9995:
        return "> 0.999"
    return "< 0.001" if probability < 0.0005 else f"{probability:.3f}"

"""What splits must know of slides, and how slides are dealt out: in groups that stay together, by stratum."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SITE_ROUNDS = 3
ROUNDING = 1e-9


@dataclass(frozen=True)
class Cohort:
    """What a split must know of each slide.

    Attributes
    ----------
    slide_ids, patient_ids, strata : tuple of str
        One per slide; the strata of slides of one patient may differ.
    sites : tuple of str
        One per slide or empty; a site that is given is never on two sides.
    soft : frozenset of str
        Strata that are not classes but bins of a number and the like: shared out as well as they can be, and no fault
        where they are missing.
    """

    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    strata: tuple[str, ...]
    sites: tuple[str, ...] = ()
    soft: frozenset[str] = frozenset()

    @property
    def group_name(self) -> str:
        """What stays together: patients or sites."""
        return "sites" if self.sites else "patients"

    def groups(self) -> dict[str, list[int]]:
        """Return the rows of each group that must stay together: a patient, or a site with all its patients."""
        keys = self.sites or self.patient_ids
        groups: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        return groups

    def select(self, slide_ids: Iterable[str]) -> "Cohort":
        """Return the rows of these slides."""
        kept = set(slide_ids)
        rows = [row for row, slide in enumerate(self.slide_ids) if slide in kept]
        return Cohort(
            tuple(self.slide_ids[row] for row in rows),
            tuple(self.patient_ids[row] for row in rows),
            tuple(self.strata[row] for row in rows),
            tuple(self.sites[row] for row in rows) if self.sites else (),
            self.soft,
        )


def deal(cohort: Cohort, parts: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Deal the groups into parts: each goes where its strata are most wanted, large and rare ones first."""
    groups, shares = cohort.groups(), _shares(cohort)
    # sorted first, so that the order of the table does not change what a seed draws
    order = rng.permutation(sorted(groups)).tolist()
    order.sort(key=lambda key: -shares[key].max())
    filled = np.zeros((parts, len(set(cohort.strata))))
    members: list[list[str]] = [[] for _ in range(parts)]
    for key in order:
        share = shares[key]
        crowding = ((filled + share) ** 2).sum(1) - (filled**2).sum(1)
        # sums of shares differ in their last digits, and an exact minimum would prefer some parts
        emptiest = np.flatnonzero(np.isclose(crowding, crowding.min()))
        part = min(rng.permutation(emptiest).tolist(), key=lambda p: len(members[p]))
        filled[part] += share
        members[part].append(key)
    return [tuple(cohort.slide_ids[row] for key in part for row in groups[key]) for part in members]


def _shares(cohort: Cohort) -> dict[str, NDArray[np.float64]]:
    """Return the share of each stratum that each group has."""
    names = sorted(set(cohort.strata))
    numbers = [names.index(stratum) for stratum in cohort.strata]
    totals = np.bincount(numbers, minlength=len(names))
    return {
        key: np.bincount([numbers[row] for row in rows], minlength=len(names)) / totals
        for key, rows in cohort.groups().items()
    }


def _draw_sites(cohort: Cohort, fraction: float, rng: np.random.Generator) -> tuple[str, ...]:
    """Draw sites, which are of very different size, so that about this fraction of the slides of each stratum is drawn.

    In random order sites go in or out while that brings the shares closer to the fraction; then those go in that a
    stratum without any lacks. Never all sites of a stratum are drawn.
    """
    groups, shares = cohort.groups(), _shares(cohort)
    order = rng.permutation(sorted(groups)).tolist()
    filled = np.zeros(len(set(cohort.strata)))
    drawn: set[str] = set()

    def distance(key: str) -> float:
        """Return how far the shares are from the fraction when a site has gone in, or out; inf when it may not."""
        changed = filled - shares[key] if key in drawn else filled + shares[key]
        allowed = (changed < 1 - ROUNDING)[shares[key] > 0].all()
        return float(((changed - fraction) ** 2).sum()) if allowed else np.inf

    # a site that was refused may fit when others have left
    for key in order * SITE_ROUNDS:
        if distance(key) < ((filled - fraction) ** 2).sum() - ROUNDING:
            filled += -shares[key] if key in drawn else shares[key]
            drawn ^= {key}
    for stratum in np.flatnonzero(filled < ROUNDING):
        able = [key for key in order if shares[key][stratum] > 0 and distance(key) < np.inf]
        if able:
            nearest = min(able, key=distance)
            filled += shares[nearest]
            drawn.add(nearest)
    return tuple(cohort.slide_ids[row] for key in order if key in drawn for row in groups[key])


def draw(cohort: Cohort, fraction: float, rng: np.random.Generator) -> tuple[str, ...]:
    """Draw about this fraction of the groups of each stratum, at least one and never all."""
    if cohort.sites:
        return _draw_sites(cohort, fraction, rng)
    groups = cohort.groups()
    of_stratum: dict[str, list[str]] = {}
    for key, rows in groups.items():
        kinds = Counter(cohort.strata[row] for row in rows)
        # patients with slides of several strata are a stratum of their own
        of_stratum.setdefault("\0".join(sorted(kinds)), []).append(key)
    drawn: list[str] = []
    for _, keys in sorted(of_stratum.items()):
        wanted = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
        drawn += rng.permutation(sorted(keys)).tolist()[:wanted]
    return tuple(cohort.slide_ids[row] for key in drawn for row in groups[key])

"""What a reader has done to a slide: tiles taken away and added, and what the model says now."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from pydantic import Field

from eosin.errors import ConfigError
from eosin.heatmaps._counterfactual import as_probability
from eosin.heatmaps._subject import class_choices
from eosin.mil._jury import Asked
from eosin.mil.subsets import Floats, Target
from eosin.options import Options
from eosin.viewer._catalogue import Catalogue, SlideStudy
from eosin.viewer._lattice import Indices

Action = Literal["remove", "keep only", "restore"]
ACTIONS: tuple[Action, ...] = ("remove", "keep only", "restore")
MAX_UNDO = 100
N_CONTROLS = 20


@dataclass(frozen=True, eq=False)
class Added:
    """Tiles of another slide.

    Parameters
    ----------
    donor : SlideStudy
    tiles : (m,) int64
        Ascending.
    """

    donor: SlideStudy
    tiles: Indices

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Whether each of the donor's tiles is added, (n of the donor,)."""
        chosen = np.zeros(self.donor.n_tiles, dtype=bool)
        chosen[self.tiles] = True
        return chosen


@dataclass(frozen=True, eq=False)
class Edited:
    """A slide after some edits; every edit makes a new one.

    Parameters
    ----------
    study : SlideStudy
    present : (n,) bool
        Tiles that the model still gets.
    added : tuple of Added
        One for each donor, in the order in which they came.
    """

    study: SlideStudy
    present: NDArray[np.bool_]
    added: tuple[Added, ...] = ()

    @classmethod
    def untouched(cls, study: SlideStudy) -> "Edited":
        """Return the slide as it is."""
        return cls(study, np.ones(study.n_tiles, dtype=bool))

    @property
    def n_removed(self) -> int:
        """Tiles that were taken away."""
        return int(len(self.present) - np.count_nonzero(self.present))

    @property
    def n_added(self) -> int:
        """Tiles of other slides that were added."""
        return sum(len(one.tiles) for one in self.added)

    @property
    def is_touched(self) -> bool:
        """Whether anything was changed."""
        return bool(self.n_removed or self.n_added)

    def act(self, action: Action, tiles: Indices) -> "Edited":
        """Return the slide with these tiles removed, alone, or back again.

        Raises
        ------
        ConfigError
            If no tile would remain.
        """
        marked = np.zeros(len(self.present), dtype=bool)
        marked[tiles] = True
        changes = {
            "remove": self.present & ~marked,
            "keep only": self.present & marked,
            "restore": self.present | marked,
        }
        if not changes[action].any():
            raise ConfigError("no tile of the slide would remain; keep at least one")
        return replace(self, present=changes[action])

    def transplant(self, donor: SlideStudy, tiles: Indices) -> "Edited":
        """Return the slide with tiles of a donor added to those that were added before.

        Raises
        ------
        ConfigError
            If the donor is the slide itself, or one that another model answers for.
        """
        if donor.listed.key == self.study.listed.key:
            raise ConfigError("these tiles are from this slide; copy tiles of another slide")
        if donor.asked.model is not self.study.asked.model:
            raise ConfigError("other folds answer for that slide than for this one, so its tiles cannot be added here")
        given = {one.donor.listed.key: one for one in (*self.added, Added(donor, tiles))}  # keeps the order of donors
        before = [one.tiles for one in self.added if one.donor.listed.key == donor.listed.key]
        given[donor.listed.key] = Added(donor, np.unique(np.concatenate([*before, tiles])))
        return replace(self, added=tuple(given.values()))

    def logits(self) -> Floats:
        """Return what the model says now, (K,): exact, from sums or by running it again."""
        added = [(one.donor.seen.subsets, one.mask) for one in self.added]
        return self.study.seen.subsets.edited(self.present, added)

    def random_like(self, rng: np.random.Generator) -> "Edited":
        """Return as many tiles removed and added, chosen by chance: what such a change does whatever they show."""
        present = np.zeros(len(self.present), dtype=bool)
        present[rng.choice(len(present), size=np.count_nonzero(self.present), replace=False)] = True
        drawn = (
            replace(one, tiles=np.sort(rng.choice(one.donor.n_tiles, size=len(one.tiles), replace=False)))
            for one in self.added
        )
        return replace(self, present=present, added=tuple(drawn))


class Verdict(Options):
    """What the model says of one set of tiles, as sessions keep it, too.

    Parameters
    ----------
    logits : tuple of float
    columns : dict of str to str
        The columns of the prediction as they are printed.
    log_odds : dict of str to float
        By class; empty for tasks without classes.
    """

    logits: tuple[float, ...]
    columns: dict[str, str]
    log_odds: dict[str, float] = Field(default_factory=dict)

    @property
    def leading(self) -> str:
        """The class with the largest log-odds; empty without classes."""
        return max(self.log_odds, key=self.log_odds.__getitem__) if self.log_odds else ""

    def probability(self, name: str) -> float:
        """Return the probability of a class."""
        return float(scipy.special.expit(self.log_odds[name]))


def judge(asked: Asked, logits: Floats) -> Verdict:
    """Put logits (K,) into the words of the model's task."""
    classes, task = class_choices(asked.card), asked.card.load_task()
    own = logits[-asked.model.n_outputs :]  # without the zero that stands for the first class
    columns = task.table(task.activate(torch.from_numpy(own[None])))
    printed = {
        name: f"{row[0]:.3f}" if isinstance(row[0], float | np.floating) else str(row[0])
        for name, row in columns.items()
    }
    odds = {name: float(Target(output).of(logits)) for output, name in enumerate(classes)}
    return Verdict(logits=tuple(logits.tolist()), columns=printed, log_odds=odds)


def in_words(catalogue: Catalogue, edited: Edited, before: Verdict, after: Verdict, class_name: str) -> str:
    """Return what an edit did as a sentence for a pathologist; about `class_name` where the task has classes."""
    how = _how(edited)
    if not catalogue.classes:
        changes = ", ".join(f"{name} {value} → {after.columns[name]}" for name, value in before.columns.items())
        return f"{how}: {changes}."
    was, now = before.log_odds[class_name], after.log_odds[class_name]
    if (now > 0) == (was > 0):
        verb = "still says" if was > 0 else "still does not say"
    else:
        verb = "no longer says" if was > 0 else "now says"
    numbers = " → ".join(as_probability(verdict.probability(class_name)) for verdict in (before, after))
    return f"{how} the model {verb} {class_name}: {numbers} (log-odds {was:.2f} → {now:.2f}, {now - was:+.2f})."


def _how(edited: Edited) -> str:
    n, gone = edited.study.n_tiles, edited.n_removed
    parts = []
    if gone > n / 2:
        parts.append(f"With only {_tiles(n - gone, n)}")
    elif gone:
        parts.append(f"Without {_tiles(gone, n)}")
    if edited.added:
        start = "and with" if parts else "With"
        tiles = " and ".join(f"{counted(len(one.tiles))} of {one.donor.listed.slide_id}" for one in edited.added)
        parts.append(f"{start} {tiles} added")
    return " ".join(parts) or "With all tiles"


def _tiles(count: int, total: int) -> str:
    return f"{counted(count)} ({100 * count / total:.2g} %)"


def counted(count: int) -> str:
    """Return a number of tiles in words."""
    return f"{count:,} {'tile' if count == 1 else 'tiles'}"


def state_in_words(verdict: Verdict) -> str:
    """Return a prediction as a sentence."""
    if not verdict.log_odds:
        return "The model says " + ", ".join(f"{name} {value}" for name, value in verdict.columns.items()) + "."
    name = verdict.leading
    return f"The model says {name}, probability {as_probability(verdict.probability(name))}."


def controls(edited: Edited, class_output: int, *, draws: int = N_CONTROLS, seed: int = 0) -> Floats:
    """Return the log-odds of a class after the same edit with random tiles, (draws,)."""
    rng = np.random.default_rng(seed)
    return np.array([float(Target(class_output).of(edited.random_like(rng).logits())) for _ in range(draws)])


def controls_in_words(before: float, after: float, values: Floats) -> str:
    """Return how the edit compares with random ones: mean probability and one-sided randomisation p value."""
    sign = 1.0 if after >= before else -1.0
    as_large = int(np.count_nonzero(sign * (values - before) >= sign * (after - before)))
    p = (1 + as_large) / (1 + len(values))
    mean = as_probability(float(scipy.special.expit(values.mean())))
    return f"With as many random tiles instead: {mean} (mean of {len(values)} draws, p = {p:.2g})."

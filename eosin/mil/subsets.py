"""What a model says about any subset of a bag's instances: the questions, and the one interface that answers them.

The questions are those of HIPPO (Kaczmarzyk, Saltz, Koo, https://arxiv.org/abs/2409.03080). A method whose answers
follow from sums or extremes says so in its own file (`Aggregator.readout`) by one of the forms of
`eosin.mil._closed_forms`; every other model is run again (`eosin.mil._reevaluation`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["Search", "Subsets"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Direction = Literal["min", "max", "least"]
Value = Callable[[Tensor], Tensor]
"""One row of logits (K,) to the number that is asked about, differentiable."""


@dataclass(frozen=True)
class Target:
    """The one number of a prediction that a counterfactual is about.

    Parameters
    ----------
    output : int
        Index of the logit. A model of two classes with one logit has output 0 only, that of its second class.
    on : {"log_odds", "probability", "logit"}
        Log-odds are the default: probabilities saturate at 1, where all effects look like none.
    """

    output: int
    on: Literal["log_odds", "probability", "logit"] = "log_odds"

    def of(self, logits: ArrayLike) -> Floats:
        """Return the number for logits (..., K), shape (...)."""
        values = np.asarray(logits, dtype=np.float64)
        chosen = np.asarray(values[..., self.output])
        if self.on == "logit":
            return chosen
        rest = np.delete(values, self.output, axis=-1)
        others = rest[..., 0] if rest.shape[-1] == 1 else scipy.special.logsumexp(rest, axis=-1) if rest.size else 0.0
        log_odds = chosen - others
        return np.asarray(scipy.special.expit(log_odds) if self.on == "probability" else log_odds)

    def of_tensor(self, logits: Tensor) -> Tensor:
        """Return the number for one row of logits (K,), differentiable."""
        chosen = logits[self.output]
        if self.on == "logit":
            return chosen
        rest = torch.cat([logits[: self.output], logits[self.output + 1 :]])
        log_odds = chosen - rest.logsumexp(0) if len(rest) else chosen
        return log_odds.sigmoid() if self.on == "probability" else log_odds

    def direction(self, n_outputs: int) -> Floats | None:
        """Return the vector (K,) whose product with logits is the number, or None where it is not linear."""
        if self.on == "probability" or (self.on == "log_odds" and n_outputs > 2):
            return None
        vector = np.zeros(n_outputs)
        if self.on == "log_odds":
            vector[:] = -1.0
        vector[self.output] = 1.0
        return vector


def slope_of(logits: Tensor, value: Value) -> Tensor:
    """Return the derivative of a number by the logits (K,) that it is made of, (K,) float64."""
    with torch.enable_grad():
        leaf = logits.detach().double().requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf), leaf)
    return slope


@dataclass(frozen=True, eq=False)
class Search:
    """A greedy search.

    Parameters
    ----------
    order : (R,) int64
        Instances in the order in which they were removed.
    logits : (S + 1, K) float64
        The prediction before the first step and after each.
    evaluations : int
        Candidate bags that were judged.
    steps : (S + 1,) int64, optional
        Instances gone at each row of `logits`; one more per row unless given.
    how : str
        What a reader must know of the search where it did not judge every candidate.
    """

    order: Indices
    logits: Floats
    evaluations: int
    steps: Indices | None = None
    how: str = ""

    @property
    def removed(self) -> Indices:
        """Instances gone at each row of `logits`, (S + 1,)."""
        return np.arange(len(self.logits)) if self.steps is None else self.steps


class Subsets(ABC):
    """A bag that answers what a model would say without some of its instances, or with others.

    This is the only interface of a bag that can be asked; nothing asks which form it has.

    Attributes
    ----------
    how : str
        How the answers are made, in a sentence that is printed in every report.
    weightless : str
        Why there is no `slopes`, in a sentence; used where it returns None.
    """

    how: str
    weightless: str = "no place is known where this method reads the slide out by weights of tiles"

    @property
    @abstractmethod
    def n_instances(self) -> int:
        """Number of instances n."""

    @property
    def exact(self) -> bool:
        """Whether `effects` are exact, and not a guess that was compared with exact effects of a sample."""
        return True

    @property
    def price(self) -> int:
        """Instances that the model must be run on for one answer; 0 where answers follow from what is kept."""
        return 0

    @property
    def instant(self) -> bool:
        """Whether no question at all runs the model."""
        return not self.price

    def with_linear(self, share: float, terms: Floats, bias: Floats) -> "Subsets | None":
        """Return the bag of a model that answers together with a linear one; None where no such form is known.

        Parameters
        ----------
        share : float
            Weight of the linear model in the mean of the logits.
        terms : (n, K) float64
            What each instance adds to its logits when it is alone.
        bias : (K,) float64
        """
        return None

    @abstractmethod
    def logits(self) -> Floats:
        """Return the prediction, (K,)."""

    @abstractmethod
    def select(self, index: Indices) -> Self:
        """Return the bag of the instances at `index`."""

    @abstractmethod
    def join(self, donor: Self) -> Self:
        """Return the bag with all instances of a donor, seen by the same model, added."""

    @abstractmethod
    def with_zero_logit(self) -> Self:
        """Return the bag of a model of two classes and one logit with a logit 0 for the first class."""

    @abstractmethod
    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""

    @abstractmethod
    def only_one(self) -> Floats:
        """Return the prediction for each instance as a bag of its own, (n, K)."""

    def log_weight_gradient(self) -> Floats | None:
        """Return the derivative of the logits by each instance's log weight, (n, K), or None where it has none."""
        return None

    def keep_only(self, index: ArrayLike) -> Floats:
        """Return the prediction for these instances alone, (K,)."""
        return self.select(np.asarray(index, dtype=np.int64)).logits()

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without these instances, (K,)."""
        rest = np.ones(self.n_instances, dtype=bool)
        rest[np.asarray(index, dtype=np.int64)] = False
        return self.keep_only(np.flatnonzero(rest))

    def add(self, donor: Self) -> Floats:
        """Return the prediction with all instances of a donor added, (K,)."""
        return self.join(donor).logits()

    def edited(self, present: NDArray[np.bool_], added: Sequence[tuple[Self, NDArray[np.bool_]]] = ()) -> Floats:
        """Return the prediction for the instances that are present and those of donors that are added, (K,).

        Parameters
        ----------
        present : (n,) bool
        added : sequence of (Subsets, (n of the donor,) bool)
            Other slides as the same model sees them, and which of their instances are added.
        """
        whole = self if present.all() else self.select(np.flatnonzero(present))
        for donor, chosen in added:
            whole = whole.join(donor.select(np.flatnonzero(chosen)))
        return whole.logits()

    def effects(self, target: Target) -> tuple[Floats, float]:
        """Return what each instance adds to the log-odds (or logit) of a target, and how far to trust it.

        Returns
        -------
        effects : (n,) float64
            The number with the instance minus the number without it.
        agreement : float
            1 where all are exact, else the rank correlation of the guess with exact effects of a random sample.
        """
        number = target if target.on == "logit" else Target(target.output)
        changes = self.leave_one_out()
        vector = number.direction(changes.shape[1])
        if vector is not None:
            return -(changes @ vector), 1.0
        logits = self.logits()
        return number.of(logits) - number.of(logits + changes), 1.0

    def slopes(self, target: Target) -> Floats | None:
        """Return the derivative of a target by the logarithm of each instance's weight, (n,), or None without weights.

        The weight is that with which the model reads the bag out, 1 for every instance; what lies before is held fixed.
        """
        gradient = self.log_weight_gradient()
        return (
            None if gradient is None else gradient @ slope_of(torch.from_numpy(self.logits()), target.of_tensor).numpy()
        )

    def knows_best_set(self, target: Target) -> bool:
        """Whether `best_set` answers for this target."""
        return False

    def best_set(self, target: Target, direction: Literal["min", "max"], size: int) -> Indices:
        """Return the `size` instances whose removal lowers or raises the target most, over all sets of that size.

        Raises
        ------
        ValueError
            If that is not known for this bag and target, or no instance would remain.
        """
        raise ValueError("the best set is known for one branch and a target that is linear in the logits")

    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove one instance per round: the one that lowers, raises or changes the target least.

        Parameters
        ----------
        target : Target
        direction : {"min", "max", "least"}
        rounds : int
            At most n - 1.

        Returns
        -------
        Search
            All that remain are judged in each round; the first of equal candidates is taken.
        """
        bag, here = self, np.arange(self.n_instances)
        order, logits, evaluations = [], [self.logits()], 0
        for _ in range(max(0, min(rounds, self.n_instances - 1))):
            predictions = logits[-1] + bag.leave_one_out()
            costs = cost_of(target.of(predictions), float(target.of(logits[-1])), direction)
            best = int(np.argmin(costs))
            order.append(int(here[best]))
            evaluations += len(here)
            bag = bag.select(np.delete(np.arange(len(here)), best))
            here = np.delete(here, best)
            logits.append(bag.logits())
        return Search(np.array(order, dtype=np.int64), np.array(logits), evaluations)


def cost_of(candidates: Floats, current: float, direction: Direction) -> Floats:
    """Return what a search makes small: the numbers themselves, their negatives or their distance from the current."""
    costs = {"min": candidates, "max": -candidates, "least": np.abs(candidates - current)}
    return np.asarray(costs[direction], dtype=np.float64)


def as_array(values: Tensor) -> Floats:
    """Return a tensor as float64 on the host."""
    return np.asarray(values.detach().double().cpu().numpy())

"""Exact answers for models whose bag is not a weighted sum of logits: any head after softmax pooling, and extremes.

Like `eosin.heatmaps.pooled`, these models embed every instance alone. What a bag becomes then follows from sums or
from the two largest values of every channel, so leaving out each single instance needs no further pass of the model:

- softmax pooling with a head that is not linear (ACMIL with multi-head attention, INS by mean): the pooled values
  without instance i are ``V + (V - v_i) α_i / (1 - α_i)`` in each branch, and the head runs on all of them in blocks;
- maximum (max pooling, INS by maximum): only the instance that holds a channel's maximum matters, which then falls to
  the second largest value;
- smooth maximum: ``(1/r) log mean exp(r h)`` changes by ``(log(1 - s_i) + log(n / (n - 1))) / r`` with s_i the share of
  instance i in the sum of its channel.

- noisy or (INS): the logarithms of "not this instance" add up, and one is taken away.

Everything is float64 but the stored rows of maxima, whose values are those of the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from eosin.heatmaps.pooled import Direction, Floats, Search, Target, choose

BLOCK_ENTRIES = 2**24  # numbers of a block of candidates
SMALLEST = torch.finfo(torch.float64).tiny


class LeavesOneOut(Protocol):
    """A bag that knows its prediction without each single instance."""

    @property
    def n_instances(self) -> int:
        """Number of instances n."""

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""

    def select(self, index: NDArray[np.int64]) -> Self:
        """Return the bag of these instances."""


def greedy_by_leaving_out(bag: LeavesOneOut, target: Target, direction: Direction, rounds: int) -> Search:
    """Remove one instance per round, judging all that remain: the first of the best leaves."""
    here = np.arange(bag.n_instances)
    order, logits, evaluations = [], [bag.logits()], 0
    for _ in range(max(0, min(rounds, bag.n_instances - 1))):
        predictions = logits[-1] + bag.leave_one_out()
        best = choose(target.of(predictions), float(target.of(logits[-1])), direction)
        order.append(int(here[best]))
        evaluations += len(here)
        bag = bag.select(np.delete(np.arange(len(here)), best))
        here = np.delete(here, best)
        logits.append(bag.logits())
    return Search(np.array(order, dtype=np.int64), np.array(logits), evaluations)


class ExactBag(ABC):
    """Base of bags that answer every question about subsets without running a model."""

    @property
    @abstractmethod
    def n_instances(self) -> int:
        """Number of instances n."""

    @abstractmethod
    def logits(self) -> Floats:
        """Return the prediction, (K,)."""

    @abstractmethod
    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""

    @abstractmethod
    def log_weight_gradient(self) -> Floats | None:
        """Return the derivative of the logits by each instance's log weight, (n, K), or None where there are none."""

    @abstractmethod
    def select(self, index: NDArray[np.int64]) -> Self:
        """Return the bag of the instances at `index`, an array of numbers or a mask."""

    @abstractmethod
    def join(self, donor: Self) -> Self:
        """Return the bag with the instances of a donor, seen by the same model, added."""

    @abstractmethod
    def with_zero_logit(self) -> Self:
        """Return the bag of a model of two classes and one logit with a logit 0 for the first class."""

    def keep_only(self, index: ArrayLike) -> Floats:
        """Return the prediction for these instances alone, (K,)."""
        return self.select(np.asarray(index, dtype=np.int64)).logits()

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without these instances, (K,)."""
        return self.select(np.setdiff1d(np.arange(self.n_instances), np.asarray(index, dtype=np.int64))).logits()

    def add(self, donor: Self) -> Floats:
        """Return the prediction with all instances of a donor added, (K,)."""
        return self.join(donor).logits()

    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove one instance per round, judging all that remain."""
        return greedy_by_leaving_out(self, target, direction, rounds)


@dataclass(frozen=True, eq=False)
class ReadoutBag(ExactBag):
    """Softmax pooling with any head: ``logits = head(mean over M of Σ_i softmax(scores)_iMG values_iG)``.

    Parameters
    ----------
    scores : (n, M, G) float64
        Unnormalised attention of M branches in G heads.
    values : (n, G, d) float64
        What each head pools; all branches pool the same.
    head : callable
        (c, G, d) to logits (c, K), differentiable.
    """

    scores: Tensor
    values: Tensor
    head: Callable[[Tensor], Tensor]

    @property
    def n_instances(self) -> int:
        """Number of instances n."""
        return len(self.scores)

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        return np.asarray(self._read(self._branch_means(self._weights()).mean(0)[None])[0])

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""
        weights = self._weights()
        whole = self._branch_means(weights)  # (M, G, d)
        ratio = weights / (1 - weights).clamp_min(0.25)
        step = max(1, BLOCK_ENTRIES // max(1, whole.numel()))
        blocks = zip(torch.split(ratio, step), torch.split(self.values, step), strict=True)
        without = [self._read(_pooled_without(whole, part, values)) for part, values in blocks]
        changes = np.concatenate([np.empty((0, len(self.logits()))), *without]) - self.logits()
        # where one instance has most of a weight, 1 - weight has lost its digits: at most one per branch and head
        for heavy in torch.unique(torch.nonzero(weights > 0.5)[:, 0]).tolist():
            changes[heavy] = self.remove([heavy]) - self.logits()
        return np.asarray(changes)

    def log_weight_gradient(self) -> Floats:
        """Return the derivative of the logits by the logarithm of each instance's weight, (n, K)."""
        weights = self._weights()
        whole = self._branch_means(weights)
        slope = torch.func.jacrev(lambda pooled: self.head(pooled[None])[0])(whole.mean(0))  # (K, G, d)
        own = torch.einsum("nmg,ngd,kgd->nk", weights, self.values, slope)
        level = torch.einsum("nmg,mgd,kgd->nk", weights, whole, slope)
        return np.asarray(((own - level) / weights.shape[1]).detach().numpy())

    def select(self, index: NDArray[np.int64]) -> "ReadoutBag":
        """Return the bag of the instances at `index`."""
        rows = torch.from_numpy(np.asarray(index))
        return replace(self, scores=self.scores[rows], values=self.values[rows])

    def join(self, donor: "ReadoutBag") -> "ReadoutBag":
        """Return the bag with the instances of a donor added."""
        return replace(
            self, scores=torch.cat([self.scores, donor.scores]), values=torch.cat([self.values, donor.values])
        )

    def with_zero_logit(self) -> "ReadoutBag":
        """Return the bag with a logit 0 for the first class."""
        return replace(self, head=lambda pooled: torch.nn.functional.pad(self.head(pooled), (1, 0)))

    def _weights(self) -> Tensor:
        return self.scores.softmax(0)

    def _branch_means(self, weights: Tensor) -> Tensor:
        return torch.einsum("nmg,ngd->mgd", weights, self.values)

    def _read(self, pooled: Tensor) -> Floats:
        with torch.no_grad():
            return np.asarray(self.head(pooled).double().numpy())


def _pooled_without(whole: Tensor, ratio: Tensor, values: Tensor) -> Tensor:
    """Return ``mean_m V_m + (V_m - v) ρ_m`` of some instances: (M, G, d), (c, M, G), (c, G, d) -> (c, G, d)."""
    branches = len(whole)
    level = whole.mean(0) + torch.einsum("cmg,mgd->cgd", ratio, whole) / branches
    return level - values * ratio.mean(1)[..., None]


@dataclass(frozen=True, eq=False)
class RowsBag(ExactBag):
    """A bag that is pooled channel by channel and read by a linear head.

    Parameters
    ----------
    rows : (n, F) float
        Channels of each instance.
    head : (K, F) float64
    bias : (K,) float64
    """

    rows: Tensor
    head: Tensor
    bias: Tensor

    @property
    def n_instances(self) -> int:
        """Number of instances n."""
        return len(self.rows)

    def select(self, index: NDArray[np.int64]) -> Self:
        """Return the bag of the instances at `index`."""
        return replace(self, rows=self.rows[torch.from_numpy(np.asarray(index))])

    def join(self, donor: Self) -> Self:
        """Return the bag with the instances of a donor added."""
        return replace(self, rows=torch.cat([self.rows, donor.rows]))

    def with_zero_logit(self) -> Self:
        """Return the bag with a logit 0 for the first class."""
        head = torch.cat([torch.zeros_like(self.head), self.head])
        return replace(self, head=head, bias=torch.cat([torch.zeros_like(self.bias), self.bias]))


@dataclass(frozen=True, eq=False)
class MaxBag(RowsBag):
    """``logits = head · max over the instances, channel by channel, + bias``; the bag without instances pools to 0.

    Parameters
    ----------
    rows, head, bias
        As of `RowsBag`.
    """

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        pooled = self.rows.amax(0).double() if len(self.rows) else self.head.new_zeros(self.head.shape[1])
        return np.asarray((self.head @ pooled + self.bias).numpy())

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""
        changes = self.bias.new_zeros(self.n_instances, len(self.bias))
        if self.n_instances == 1:
            changes[0] = -self.head @ self.rows[0].double()
        elif self.n_instances:
            values, places = self.rows.topk(2, dim=0)  # (2, F)
            falls = (values[1].double() - values[0].double()) * self.head  # (K, F)
            changes.index_add_(0, places[0], falls.T)
        return np.asarray(changes.numpy())

    def log_weight_gradient(self) -> None:
        """Return None: how often an instance occurs does not move a maximum."""


@dataclass(frozen=True, eq=False)
class SmoothMaxBag(RowsBag):
    """``logits = head · (1/r) log mean exp(r h) + bias``; the bag without instances pools to 0.

    Parameters
    ----------
    rows, head, bias
        As of `RowsBag`.
    sharpness : float
        r.
    """

    sharpness: float

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        if not self.n_instances:
            return np.asarray(self.bias.numpy())
        pooled = (self._total() - np.log(self.n_instances)) / self.sharpness
        return np.asarray((self.head @ pooled + self.bias).numpy())

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""
        n = self.n_instances
        if n < 2:
            return np.asarray((self.bias.numpy() - self.logits())[None].repeat(n, axis=0))
        total = self._total()
        steps = torch.split(self.rows, max(1, BLOCK_ENTRIES // self.rows.shape[1]))
        parts = [torch.log1p(-self._shares(rows, total).clamp_max(0.5)) @ self.head.T for rows in steps]
        changes = (torch.cat(parts) + np.log(n / (n - 1)) * self.head.sum(1)) / self.sharpness
        for heavy in self._heavy(total):
            changes[heavy] = torch.from_numpy(self.remove([heavy]) - self.logits())
        return np.asarray(changes.numpy())

    def log_weight_gradient(self) -> Floats:
        """Return the derivative of the logits by the logarithm of each instance's weight, (n, K)."""
        total, n = self._total(), self.n_instances
        steps = torch.split(self.rows, max(1, BLOCK_ENTRIES // self.rows.shape[1]))
        parts = [(self._shares(rows, total) - 1 / n) @ self.head.T for rows in steps]
        return np.asarray((torch.cat(parts) / self.sharpness).numpy())

    def _total(self) -> Tensor:
        """Return the logarithm of each channel's sum, (F,)."""
        steps = torch.split(self.rows, max(1, BLOCK_ENTRIES // max(1, self.rows.shape[1])))
        return torch.stack([(rows.double() * self.sharpness).logsumexp(0) for rows in steps]).logsumexp(0)

    def _shares(self, rows: Tensor, total: Tensor) -> Tensor:
        return (rows.double() * self.sharpness - total).exp()

    def _heavy(self, total: Tensor) -> list[int]:
        """Return the instances that have more than half of some channel's sum: at most one per channel."""
        largest, places = self.rows.max(0)
        heavy: list[int] = torch.unique(places[self._shares(largest, total) > 0.5]).tolist()
        return heavy


@dataclass(frozen=True, eq=False)
class NoisyOrBag(ExactBag):
    """``logits = head · [0, log odds that some instance has class c]``; the bag without instances has logits 0.

    Parameters
    ----------
    none : (n, C - 1) float64
        Logarithm of each instance's probability of not being of the class, for all classes but the first.
    head : (K, C) float64
    """

    none: Tensor
    head: Tensor

    @property
    def n_instances(self) -> int:
        """Number of instances n."""
        return len(self.none)

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        odds = self._odds(self.none.sum(0)) if self.n_instances else self.none.new_zeros(self.none.shape[1])
        return np.asarray(self._headed(odds[None]).numpy()[0])

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""
        if self.n_instances < 2:
            return np.asarray(-self.logits()[None].repeat(self.n_instances, axis=0))
        return np.asarray(self._headed(self._odds(self.none.sum(0) - self.none)).numpy() - self.logits())

    def log_weight_gradient(self) -> Floats:
        """Return the derivative of the logits by the logarithm of how often each instance occurs, (n, K)."""
        total = self.none.sum(0).clamp_max(-SMALLEST)
        return np.asarray(self._headed(self.none / torch.expm1(total)).numpy())

    def select(self, index: NDArray[np.int64]) -> "NoisyOrBag":
        """Return the bag of the instances at `index`."""
        return replace(self, none=self.none[torch.from_numpy(np.asarray(index))])

    def join(self, donor: "NoisyOrBag") -> "NoisyOrBag":
        """Return the bag with the instances of a donor added."""
        return replace(self, none=torch.cat([self.none, donor.none]))

    def with_zero_logit(self) -> "NoisyOrBag":
        """Return the bag with a logit 0 for the first class."""
        return replace(self, head=torch.cat([torch.zeros_like(self.head), self.head]))

    def _odds(self, none: Tensor) -> Tensor:
        none = none.clamp_max(-SMALLEST)
        return torch.log(-torch.expm1(none)) - none

    def _headed(self, odds: Tensor) -> Tensor:
        return torch.nn.functional.pad(odds, (1, 0)) @ self.head.T

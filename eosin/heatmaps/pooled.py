"""What a softmax-pooling model would say about any subset of its instances, without running it again.

A model of this kind embeds every instance alone, weighs the instances of a bag by softmax and is linear afterwards:
``logits = bias + Σ_h Σ_i α_hi p_ih`` with ``α_h = softmax(scores_h)`` over the bag and ``p_ih`` the logits that
instance i contributes through branch h. ABMIL, CLAM and models that average attention branches are of this kind;
models with BatchNorm, with positions or with attention between instances are not.

Removing or adding instances only changes the sums ``Z_h = Σ w_hi`` and ``P_h = Σ w_hi p_ih`` with ``w = exp(score)``,
so every counterfactual is exact at the price of those sums. Everything here is float64.

The questions asked are those of HIPPO (Kaczmarzyk, Saltz, Koo, https://arxiv.org/abs/2409.03080); the best set of a
given size follows Dinkelbach (Management Science 1967, https://doi.org/10.1287/mnsc.13.7.492).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp
from torch import Tensor

from eosin import kernels

Floats = NDArray[np.float64]
Direction = Literal["min", "max", "least"]

DINKELBACH_STEPS = 100


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
        others = rest[..., 0] if rest.shape[-1] == 1 else logsumexp(rest, axis=-1) if rest.size else 0.0
        log_odds = chosen - others
        return np.asarray(expit(log_odds) if self.on == "probability" else log_odds)

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
    """

    order: NDArray[np.int64]
    logits: Floats
    evaluations: int
    steps: NDArray[np.int64] | None = None

    @property
    def removed(self) -> NDArray[np.int64]:
        """Instances gone at each row of `logits`, (S + 1,)."""
        return np.arange(len(self.logits)) if self.steps is None else self.steps


@dataclass(frozen=True, eq=False)
class PooledBag:
    """A bag as a softmax-pooling model sees it.

    Parameters
    ----------
    scores : (n, H) float64
        Unnormalised attention of each instance in each branch.
    terms : (n, H, K) float64
        The logits that an instance contributes when a branch attends to it alone.
    bias : (K,) float64
        The logits of an empty bag.
    """

    scores: Floats
    terms: Floats
    bias: Floats

    @property
    def n_instances(self) -> int:
        """Number of instances n."""
        return len(self.scores)

    @cached_property
    def weights(self) -> Floats:
        """``exp(score - largest score)``, (n, H)."""
        return np.asarray(np.exp(self.scores - self.scores.max(axis=0, initial=-np.inf)))

    @cached_property
    def attention(self) -> Floats:
        """Softmax of the scores over the instances, (n, H)."""
        return np.asarray(self.weights / self.weights.sum(axis=0))

    def select(self, index: ArrayLike) -> "PooledBag":
        """Return the bag of the instances at `index`."""
        chosen = np.asarray(index)
        return PooledBag(self.scores[chosen], self.terms[chosen], self.bias)

    def with_zero_logit(self) -> "PooledBag":
        """Return the bag of a model of two classes and one logit with a logit 0 for the first class."""
        terms = np.concatenate([np.zeros_like(self.terms), self.terms], axis=2)
        return PooledBag(self.scores, terms, np.concatenate([np.zeros_like(self.bias), self.bias]))

    def join(self, donor: "PooledBag") -> "PooledBag":
        """Return the bag with the instances of a donor, seen by the same model, added."""
        scores = np.concatenate([self.scores, donor.scores])
        return PooledBag(scores, np.concatenate([self.terms, donor.terms]), self.bias)

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        return np.asarray(self.bias + self._branch_means().sum(axis=0))

    def _branch_means(self) -> Floats:
        if not self.n_instances:
            return np.zeros(self.terms.shape[1:])
        return np.asarray(np.einsum("nh,nhk->hk", self.attention, self.terms))

    def keep_only(self, index: ArrayLike) -> Floats:
        """Return the prediction for the instances at `index` alone, (K,)."""
        return self.select(np.asarray(index, dtype=np.int64)).logits()

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without the instances at `index`, (K,): sums over the rest, never differences."""
        rest = np.ones(self.n_instances, dtype=bool)
        rest[np.asarray(index, dtype=np.int64)] = False
        return self.select(rest).logits()

    def add(self, donor: "PooledBag") -> Floats:
        """Return the prediction with all instances of a donor added, (K,)."""
        return self.join(donor).logits()

    def add_one(self, donor: "PooledBag") -> Floats:
        """Return the prediction with each single instance of a donor added, (n of the donor, K).

        ``f + α* (p* - F)`` in each branch, with α* the weight that the new instance would have.
        """
        top = np.maximum(self.scores.max(axis=0, initial=-np.inf), donor.scores.max(axis=0, initial=-np.inf))
        total = np.exp(self.scores - top).sum(axis=0)  # (H,)
        new = np.exp(donor.scores - top)  # (m, H)
        shift = (new / (total + new))[..., None] * (donor.terms - self._branch_means())
        return np.asarray(self.logits() + shift.sum(axis=1))

    def only_one(self) -> Floats:
        """Return the prediction for each instance as a bag of its own, (n, K)."""
        return np.asarray(self.bias + self.terms.sum(axis=1))

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K).

        ``-α / (1 - α) (p - F)`` in each branch: an instance with much attention and contributions like the
        average has no effect.
        """
        without = kernels.leave_one_out(*self._kernel_arguments(), self._offsets())
        return np.asarray(without.numpy() - self.logits())

    def log_weight_gradient(self) -> Floats:
        """Return the derivative of the logits by the logarithm of each instance's weight, (n, K).

        ``Σ_h α (p - F)``: the first-order price of an instance; leaving it out costs this over ``1 - α``.
        """
        deviation = self.terms - self._branch_means()
        return np.asarray((self.attention[..., None] * deviation).sum(axis=1))

    def _kernel_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return scores, values, head and bias of an equal model whose values are the terms themselves."""
        n, branches, outputs = self.terms.shape
        values = torch.from_numpy(np.ascontiguousarray(self.terms.reshape(n, branches * outputs)))
        head = torch.eye(branches * outputs, dtype=torch.float64).view(branches, outputs, -1).transpose(0, 1)
        scores, bias = (torch.from_numpy(np.ascontiguousarray(array)) for array in (self.scores, self.bias))
        return scores, values, head.contiguous(), bias

    def _offsets(self) -> Tensor:
        return torch.tensor([0, self.n_instances], dtype=torch.int32)

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
            The first of equal candidates is taken. A round costs one pass over the n × H × K numbers.
        """
        rounds = max(0, min(rounds, self.n_instances - 1))

        def cost(candidates: Tensor, now: Tensor) -> Tensor:
            values, current = target.of(candidates.numpy()), float(target.of(now.numpy()))
            return torch.from_numpy(cost_of(values, current, direction))

        path = kernels.greedy_removal(*self._kernel_arguments(), rounds=rounds, objective=cost)
        n = self.n_instances
        return Search(path.order.numpy(), path.logits.numpy(), rounds * n - rounds * (rounds - 1) // 2)

    def best_set(self, target: Target, direction: Literal["min", "max"], size: int) -> NDArray[np.int64]:
        """Return the `size` instances whose removal lowers or raises the target most, over all sets of that size.

        The rest has the smallest weighted mean of all sets of its size, which Dinkelbach's iteration finds: keep the
        n - size instances with the smallest ``w_i (q_i - λ)``, where λ is the mean of those kept before.

        Raises
        ------
        ValueError
            If the model has several branches, the target is not linear in the logits or no instance would remain.
        """
        vector = target.direction(len(self.bias))
        if vector is None or self.scores.shape[1] != 1:
            raise ValueError("the best set is known for one branch and a target that is linear in the logits")
        if not 0 <= size < self.n_instances:
            raise ValueError(f"{size} of {self.n_instances} instances cannot be removed; at least one must remain")
        sign = 1.0 if direction == "min" else -1.0
        q = sign * (self.terms[:, 0] @ vector)
        keep = np.arange(self.n_instances)
        mean = np.inf
        for _ in range(DINKELBACH_STEPS):
            new_mean = _weighted_mean(q[keep], self.scores[keep, 0])
            if new_mean >= mean:
                break
            mean = new_mean
            gain = self.weights[:, 0] * (q - mean)
            keep = np.argsort(gain, kind="stable")[: self.n_instances - size]
        removed = np.ones(self.n_instances, dtype=bool)
        removed[keep] = False
        return np.flatnonzero(removed)


def cost_of(candidates: Floats, current: float, direction: Direction) -> Floats:
    """Return what a search makes small: the numbers themselves, their negatives or their distance from the current."""
    costs = {"min": candidates, "max": -candidates, "least": np.abs(candidates - current)}
    return np.asarray(costs[direction], dtype=np.float64)


def choose(candidates: Floats, current: float, direction: Direction) -> int:
    """Return the first of the best candidates."""
    return int(np.argmin(cost_of(candidates, current, direction)))


def _weighted_mean(values: Floats, scores: Floats) -> float:
    share = np.exp(scores - scores.max())
    return float(share @ values / share.sum())

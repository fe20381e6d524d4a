"""Bags whose every what-if follows from what a model keeps of its instances, without running it again.

All these models embed every instance alone. What a bag becomes then follows from sums or from the two largest values of
every channel, so leaving out each single instance needs no further pass of the model:

- softmax pooling with a linear head (`PooledBag`: ABMIL, CLAM, averaged branches, the mean as equal weights): ``logits
  = bias + Σ_h Σ_i α_hi p_ih`` with ``α_h = softmax(scores_h)`` over the bag and ``p_ih`` the logits that instance i
  contributes through branch h. Removing or adding instances changes the sums ``Z_h = Σ w_hi`` and ``P_h = Σ w_hi p_ih``
  with ``w = exp(score)`` and nothing else;
- softmax pooling with any head (`ReadoutBag`): the pooled values without instance i are ``V + (V - v_i) α_i / (1 -
  α_i)`` in each branch, and the head runs on all of them in blocks;
- maximum (`MaxBag`): only the instance that holds a channel's maximum matters, which then falls to the second largest;
- smooth maximum (`SmoothMaxBag`): ``(1/r) log mean exp(r h)`` changes by ``(log(1 - s_i) + log(n / (n - 1))) / r`` with
  s_i the share of instance i in the sum of its channel;
- noisy or (`NoisyOrBag`): the logarithms of "not this instance" add up, and one is taken away.

Models with BatchNorm, with positions or with attention between instances have no such form. Everything is float64 but
the stored rows of maxima, whose values are those of the model. The best set of a given size follows Dinkelbach
(Management Science 1967, https://doi.org/10.1287/mnsc.13.7.492).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, singledispatch
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from typing_extensions import override

from eosin import kernels
from eosin.mil.subsets import Direction, Floats, Indices, Search, Subsets, Target, as_array, cost_of

CACHED_ROWS = 1024  # float64 weights would copy the instances; products are summed in blocks that stay in the cache
DINKELBACH_STEPS = 100
BLOCK_ENTRIES = 2**24  # numbers of a block of candidates
LEAST_WEIGHT = 1e-250  # a sum of weights below this has lost its digits to the largest weight that was taken out
SMALLEST = torch.finfo(torch.float64).tiny


def linear_terms(rule: str, instances: Tensor, weights: Tensor) -> Floats:
    """Return what a linear head makes of each instance, float64 on the host: an einsum in blocks of instances."""
    wide = weights.detach().double()
    blocks = [torch.einsum(rule, block.double(), wide) for block in torch.split(instances, CACHED_ROWS)]
    return as_array(torch.cat(blocks))


@singledispatch
def contributions(model: object, output: object) -> tuple[Floats, Floats] | None:
    """Return terms (n, H, K) and bias (K,) of a method that joined by ``@contributions.register``, as in 0.1.

    Kept for one release; a method of your own overrides `eosin.mil.slots.Aggregator.readout` instead.
    """
    return None


@dataclass(frozen=True, eq=False)
class PooledBag(Subsets):
    """A bag as a softmax-pooling model sees it.

    Parameters
    ----------
    scores : (n, H) float64
        Unnormalised attention of each instance in each branch.
    terms : (n, H, K) float64
        The logits that an instance contributes when a branch attends to it alone.
    bias : (K,) float64
        The logits of an empty bag.
    how : str
        Of the method, for the report.
    """

    scores: Floats
    terms: Floats
    bias: Floats
    how: str = field(
        default="All numbers are exact: the model is linear after its softmax pooling, so every prediction follows "
        "from its sums without running it again",
        kw_only=True,
    )

    @property
    @override
    def n_instances(self) -> int:
        return len(self.scores)

    @cached_property
    def weights(self) -> Floats:
        """``exp(score - largest score)``, (n, H)."""
        return np.asarray(np.exp(self.scores - self.scores.max(axis=0, initial=-np.inf)))

    @cached_property
    def attention(self) -> Floats:
        """Softmax of the scores over the instances, (n, H)."""
        return np.asarray(self.weights / self.weights.sum(axis=0))

    @override
    def select(self, index: ArrayLike) -> Self:
        chosen = np.asarray(index)
        return replace(self, scores=self.scores[chosen], terms=self.terms[chosen])

    @override
    def with_zero_logit(self) -> Self:
        terms = np.concatenate([np.zeros_like(self.terms), self.terms], axis=2)
        return replace(self, terms=terms, bias=np.concatenate([np.zeros_like(self.bias), self.bias]))

    @override
    def with_linear(self, share: float, terms: Floats, bias: Floats) -> Self:
        # one more branch, in which all instances have the same attention
        return replace(
            self,
            scores=np.concatenate([self.scores, np.zeros((len(terms), 1))], 1),
            terms=np.concatenate([(1 - share) * self.terms, share * terms[:, None]], 1),
            bias=(1 - share) * self.bias + share * bias,
        )

    @override
    def join(self, donor: Self) -> Self:
        scores = np.concatenate([self.scores, donor.scores])
        return replace(self, scores=scores, terms=np.concatenate([self.terms, donor.terms]))

    @override
    def logits(self) -> Floats:
        return np.asarray(self.bias + self._branch_means().sum(axis=0))

    def _branch_means(self) -> Floats:
        if not self.n_instances:
            return np.zeros(self.terms.shape[1:])
        return np.asarray(np.einsum("nh,nhk->hk", self.attention, self.terms))

    @override
    def edited(self, present: NDArray[np.bool_], added: Sequence[tuple[Self, NDArray[np.bool_]]] = ()) -> Floats:
        # sums that are taken again instead of a copy of the bag: what keeps the viewer instant on large slides
        return pooled_logits([(self, present), *added])

    def add_one(self, donor: Self) -> Floats:
        """Return the prediction with each single instance of a donor added, (n of the donor, K).

        ``f + α* (p* - F)`` in each branch, with α* the weight that the new instance would have.
        """
        top = np.maximum(self.scores.max(axis=0, initial=-np.inf), donor.scores.max(axis=0, initial=-np.inf))
        total = np.exp(self.scores - top).sum(axis=0)  # (H,)
        new = np.exp(donor.scores - top)  # (m, H)
        shift = (new / (total + new))[..., None] * (donor.terms - self._branch_means())
        return np.asarray(self.logits() + shift.sum(axis=1))

    @override
    def only_one(self) -> Floats:
        return np.asarray(self.bias + self.terms.sum(axis=1))

    @override
    def leave_one_out(self) -> Floats:
        """Return ``-α / (1 - α) (p - F)`` of each branch: much attention to what is like the average has no effect."""
        without = kernels.leave_one_out(
            *self._kernel_arguments(), torch.tensor([0, self.n_instances], dtype=torch.int32)
        )
        return np.asarray(without.numpy() - self.logits())

    @override
    def log_weight_gradient(self) -> Floats:
        """Return ``Σ_h α (p - F)``: the first-order price of an instance; leaving it out costs this over ``1 - α``."""
        deviation = self.terms - self._branch_means()
        return np.asarray((self.attention[..., None] * deviation).sum(axis=1))

    def _kernel_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return scores, values, head and bias of an equal model whose values are the terms themselves."""
        n, branches, outputs = self.terms.shape
        values = torch.from_numpy(np.ascontiguousarray(self.terms.reshape(n, branches * outputs)))
        head = torch.eye(branches * outputs, dtype=torch.float64).view(branches, outputs, -1).transpose(0, 1)
        scores, bias = (torch.from_numpy(np.ascontiguousarray(array)) for array in (self.scores, self.bias))
        return scores, values, head.contiguous(), bias

    @override
    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        # the kernel keeps the sums between rounds: one pass over the n × H × K numbers each, without new bags
        rounds = max(0, min(rounds, self.n_instances - 1))

        def cost(candidates: Tensor, now: Tensor) -> Tensor:
            values, current = target.of(candidates.numpy()), float(target.of(now.numpy()))
            return torch.from_numpy(cost_of(values, current, direction))

        path = kernels.greedy_removal(*self._kernel_arguments(), rounds=rounds, objective=cost)
        n = self.n_instances
        return Search(path.order.numpy(), path.logits.numpy(), rounds * n - rounds * (rounds - 1) // 2)

    @override
    def knows_best_set(self, target: Target) -> bool:
        return self.scores.shape[1] == 1 and target.direction(len(self.bias)) is not None

    @override
    def best_set(self, target: Target, direction: Literal["min", "max"], size: int) -> Indices:
        """Keep those whose weighted mean is smallest among all sets of their size, by Dinkelbach's iteration.

        Keep the n - size instances with the smallest ``w_i (q_i - λ)``, where λ is the mean of those kept before.
        """
        vector = target.direction(len(self.bias))
        if vector is None or self.scores.shape[1] != 1:
            return super().best_set(target, direction, size)
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


def _weighted_mean(values: Floats, scores: Floats) -> float:
    share = np.exp(scores - scores.max())
    return float(share @ values / share.sum())


def pooled_logits(parts: Sequence[tuple[PooledBag, NDArray[np.bool_]]]) -> Floats:
    """Return the prediction for the chosen instances of one or more bags together, (K,).

    ``bias + Σ_h Σ w p / Σ w`` over what is chosen, with the weights that each bag keeps, brought to one scale. Sums
    over the rest, never differences; where the rest weighs so little that weights vanish, its own softmax is taken.

    Parameters
    ----------
    parts : sequence of (PooledBag, (n,) bool)
        Bags as one model sees them, and which of their instances count.
    """
    peaks = np.array([bag.scores.max(axis=0, initial=-np.inf) for bag, _ in parts])  # (parts, H)
    total, sums = np.zeros(peaks.shape[1]), np.zeros(parts[0][0].terms.shape[1:])
    for (bag, chosen), peak in zip(parts, peaks, strict=True):
        weights = bag.weights * chosen[:, None]
        scale = np.exp(peak - peaks.max(axis=0))
        total += scale * weights.sum(axis=0)
        sums += scale[:, None] * np.einsum("nh,nhk->hk", weights, bag.terms)
    if total.min() < LEAST_WEIGHT:
        first, *others = (bag.select(np.flatnonzero(chosen)) for bag, chosen in parts)
        for other in others:
            first = first.join(other)
        return first.logits()
    return np.asarray(parts[0][0].bias + (sums / total[:, None]).sum(axis=0))


@dataclass(frozen=True, eq=False)
class ReadoutBag(Subsets):
    """Softmax pooling with any head: ``logits = head(mean over M of Σ_i softmax(scores)_iMG values_iG)``.

    Parameters
    ----------
    scores : (n, M, G) float64
        Unnormalised attention of M branches in G heads.
    values : (n, G, d) float64
        What each head pools; all branches pool the same.
    head : callable
        (c, G, d) to logits (c, K), differentiable.
    how : str
        Of the method, for the report.
    """

    scores: Tensor
    values: Tensor
    head: Callable[[Tensor], Tensor]
    how: str = field(
        default="All numbers are exact: the model reads what its softmax pools by layers that are not linear; these "
        "layers were run on the pooled values of every set, the rest of the model once",
        kw_only=True,
    )

    @property
    @override
    def n_instances(self) -> int:
        return len(self.scores)

    @override
    def logits(self) -> Floats:
        return np.asarray(self._read(self._branch_means(self.scores.softmax(0)).mean(0)[None])[0])

    @override
    def leave_one_out(self) -> Floats:
        weights = self.scores.softmax(0)
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

    @override
    def only_one(self) -> Floats:
        # the softmax over a single instance is 1 in every branch and head, so its values are what is pooled
        step = max(1, BLOCK_ENTRIES // max(1, self.values[:1].numel()))
        return np.concatenate([self._read(values) for values in torch.split(self.values, step)])

    @override
    def log_weight_gradient(self) -> Floats:
        weights = self.scores.softmax(0)
        whole = self._branch_means(weights)
        slope = torch.func.jacrev(lambda pooled: self.head(pooled[None])[0])(whole.mean(0))  # (K, G, d)
        own = torch.einsum("nmg,ngd,kgd->nk", weights, self.values, slope)
        level = torch.einsum("nmg,mgd,kgd->nk", weights, whole, slope)
        return np.asarray(((own - level) / weights.shape[1]).detach().numpy())

    @override
    def select(self, index: Indices) -> Self:
        rows = torch.from_numpy(np.asarray(index))
        return replace(self, scores=self.scores[rows], values=self.values[rows])

    @override
    def join(self, donor: Self) -> Self:
        scores = torch.cat([self.scores, donor.scores])
        return replace(self, scores=scores, values=torch.cat([self.values, donor.values]))

    @override
    def with_zero_logit(self) -> Self:
        return replace(self, head=lambda pooled: torch.nn.functional.pad(self.head(pooled), (1, 0)))

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
class RowsBag(Subsets):
    """A bag that is pooled channel by channel and read by a linear head; alone, an instance is what is pooled.

    Parameters
    ----------
    rows : (n, F) float
        Channels of each instance.
    head : (K, F) float64
    bias : (K,) float64
    how : str
        Of the method, for the report.
    """

    rows: Tensor
    head: Tensor
    bias: Tensor
    how: str = field(kw_only=True)

    @property
    @override
    def n_instances(self) -> int:
        return len(self.rows)

    @override
    def only_one(self) -> Floats:
        blocks = torch.split(self.rows, max(1, BLOCK_ENTRIES // max(1, self.rows.shape[1])))
        return np.concatenate([np.asarray((rows.double() @ self.head.T + self.bias).numpy()) for rows in blocks])

    @override
    def select(self, index: Indices) -> Self:
        return replace(self, rows=self.rows[torch.from_numpy(np.asarray(index))])

    @override
    def join(self, donor: Self) -> Self:
        return replace(self, rows=torch.cat([self.rows, donor.rows]))

    @override
    def with_zero_logit(self) -> Self:
        head = torch.cat([torch.zeros_like(self.head), self.head])
        return replace(self, head=head, bias=torch.cat([torch.zeros_like(self.bias), self.bias]))


@dataclass(frozen=True, eq=False)
class MaxBag(RowsBag):
    """``logits = head · max over the instances, channel by channel, + bias``; the bag without instances pools to 0.

    Parameters
    ----------
    rows, head, bias, how
        As of `RowsBag`.
    """

    weightless = "the model reads the slide out by a maximum, so tiles have no weight to derive by"
    how: str = field(
        default="All numbers are exact: the model keeps the largest value of each channel, so every prediction follows "
        "from the largest values that remain without running it again",
        kw_only=True,
    )

    @override
    def logits(self) -> Floats:
        pooled = self.rows.amax(0).double() if len(self.rows) else self.head.new_zeros(self.head.shape[1])
        return np.asarray((self.head @ pooled + self.bias).numpy())

    @override
    def leave_one_out(self) -> Floats:
        changes = self.bias.new_zeros(self.n_instances, len(self.bias))
        if self.n_instances == 1:
            changes[0] = -self.head @ self.rows[0].double()
        elif self.n_instances:
            values, places = self.rows.topk(2, dim=0)  # (2, F)
            falls = (values[1].double() - values[0].double()) * self.head  # (K, F)
            changes.index_add_(0, places[0], falls.T)
        return np.asarray(changes.numpy())


@dataclass(frozen=True, eq=False)
class SmoothMaxBag(RowsBag):
    """``logits = head · (1/r) log mean exp(r h) + bias``; the bag without instances pools to 0.

    Parameters
    ----------
    rows, head, bias, how
        As of `RowsBag`.
    sharpness : float
        r.
    """

    sharpness: float
    how: str = field(
        default="All numbers are exact: the model pools each channel by a smooth maximum, so every prediction follows "
        "from sums of exponentials without running it again",
        kw_only=True,
    )

    @override
    def logits(self) -> Floats:
        if not self.n_instances:
            return np.asarray(self.bias.numpy())
        pooled = (self._total() - np.log(self.n_instances)) / self.sharpness
        return np.asarray((self.head @ pooled + self.bias).numpy())

    @override
    def leave_one_out(self) -> Floats:
        n = self.n_instances
        if n < 2:
            return np.asarray((self.bias.numpy() - self.logits())[None].repeat(n, axis=0))
        total = self._total()
        parts = [torch.log1p(-self._shares(rows, total).clamp_max(0.5)) @ self.head.T for rows in self._blocks()]
        changes = (torch.cat(parts) + np.log(n / (n - 1)) * self.head.sum(1)) / self.sharpness
        for heavy in self._heavy(total):
            changes[heavy] = torch.from_numpy(self.remove([heavy]) - self.logits())
        return np.asarray(changes.numpy())

    @override
    def log_weight_gradient(self) -> Floats:
        total, n = self._total(), self.n_instances
        parts = [(self._shares(rows, total) - 1 / n) @ self.head.T for rows in self._blocks()]
        return np.asarray((torch.cat(parts) / self.sharpness).numpy())

    def _blocks(self) -> Sequence[Tensor]:
        return torch.split(self.rows, max(1, BLOCK_ENTRIES // max(1, self.rows.shape[1])))

    def _total(self) -> Tensor:
        """Return the logarithm of each channel's sum, (F,)."""
        return torch.stack([(rows.double() * self.sharpness).logsumexp(0) for rows in self._blocks()]).logsumexp(0)

    def _shares(self, rows: Tensor, total: Tensor) -> Tensor:
        return (rows.double() * self.sharpness - total).exp()

    def _heavy(self, total: Tensor) -> list[int]:
        """Return the instances that have more than half of some channel's sum: at most one per channel."""
        largest, places = self.rows.max(0)
        heavy: list[int] = torch.unique(places[self._shares(largest, total) > 0.5]).tolist()
        return heavy


@dataclass(frozen=True, eq=False)
class NoisyOrBag(Subsets):
    """``logits = head · [0, log odds that some instance has class c]``; the bag without instances has logits 0.

    Parameters
    ----------
    none : (n, C - 1) float64
        Logarithm of each instance's probability of not being of the class, for all classes but the first.
    head : (K, C) float64
    how : str
        Of the method, for the report.
    """

    none: Tensor
    head: Tensor
    how: str = field(
        default="All numbers are exact: the model asks whether any tile has the class, so every prediction follows "
        "from the product of the tiles' probabilities of not having it",
        kw_only=True,
    )

    @property
    @override
    def n_instances(self) -> int:
        return len(self.none)

    @override
    def logits(self) -> Floats:
        odds = self._odds(self.none.sum(0)) if self.n_instances else self.none.new_zeros(self.none.shape[1])
        return np.asarray(self._headed(odds[None]).numpy()[0])

    @override
    def leave_one_out(self) -> Floats:
        if self.n_instances < 2:
            return np.asarray(-self.logits()[None].repeat(self.n_instances, axis=0))
        return np.asarray(self._headed(self._odds(self.none.sum(0) - self.none)).numpy() - self.logits())

    @override
    def only_one(self) -> Floats:
        return np.asarray(self._headed(self._odds(self.none)).numpy())

    @override
    def log_weight_gradient(self) -> Floats:
        # here the weight of an instance is how often it occurs
        total = self.none.sum(0).clamp_max(-SMALLEST)
        return np.asarray(self._headed(self.none / torch.expm1(total)).numpy())

    @override
    def select(self, index: Indices) -> Self:
        return replace(self, none=self.none[torch.from_numpy(np.asarray(index))])

    @override
    def join(self, donor: Self) -> Self:
        return replace(self, none=torch.cat([self.none, donor.none]))

    @override
    def with_zero_logit(self) -> Self:
        return replace(self, head=torch.cat([torch.zeros_like(self.head), self.head]))

    def _odds(self, none: Tensor) -> Tensor:
        # a tile that certainly has the class would have log 0 of not having it: the smallest number bounds the odds
        none = none.clamp_max(-SMALLEST)
        return torch.log(-torch.expm1(none)) - none

    def _headed(self, odds: Tensor) -> Tensor:
        return torch.nn.functional.pad(odds, (1, 0)) @ self.head.T

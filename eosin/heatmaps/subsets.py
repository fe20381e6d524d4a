"""How to ask a model about subsets of a bag: exactly from sums where its form allows, else by running it again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from eosin.features.bag import FeatureBag
from eosin.heatmaps.attribution import pack_bag
from eosin.heatmaps.pooled import Direction, Floats, PooledBag, Search, Target, choose
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.acmil import Acmil
from eosin.mil.methods.clam import ClamMultiBranch, ClamSingleBranch
from eosin.mil.methods.dsmil import Dsmil, DsmilOutput
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.mil.standardize import Standardized

CLOSE = 1e-4
SHORTLIST = 256
INSTANCES_PER_PASS = 200_000


Method = Literal["closed form", "closed form but for critical tiles", "re-evaluation"]


class Subsets(Protocol):
    """A bag that answers what a model would say without some of its instances, or with others."""

    @property
    def n_instances(self) -> int:
        """Number of instances n."""

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""

    def keep_only(self, index: ArrayLike) -> Floats:
        """Return the prediction for these instances alone, (K,)."""

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without these instances, (K,)."""

    def select(self, index: NDArray[np.int64]) -> Self:
        """Return the bag of these instances."""

    def add(self, donor: Self) -> Floats:
        """Return the prediction with all instances of a donor, seen by the same model, added, (K,)."""

    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove one instance per round, the one that changes the target most in a direction, or least."""


@dataclass(frozen=True, eq=False)
class Look:
    """What answers for a bag, and what a reader must know about it.

    Parameters
    ----------
    subsets : Subsets
    method : {"closed form", "closed form but for critical tiles", "re-evaluation"}
        Closed form: exact for every set at once, for DSMIL unless a set takes a critical tile, when the model is run
        again. Re-evaluation: every set is a forward pass, exact too, and searches judge a shortlist only.
    attention : (n,) float64 or None
        Mean weight of each tile over the branches, None for models without attention.
    """

    subsets: Subsets
    method: Method
    attention: Floats | None


def look(model: Aggregator, bag: FeatureBag | PackedBags, *, single_logit_is_second_class: bool = False) -> Look:
    """Choose how to ask a model about a bag.

    The closed form is taken for the methods that have one, after its prediction has been compared with the model's.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag or PackedBags
        A pack holds one bag.
    single_logit_is_second_class : bool
        Give a model of two classes and one logit two logits, the first of them 0, so that classes have an index each.
    """
    pack = bag if isinstance(bag, PackedBags) else pack_bag(model, bag)
    again = ForwardBag(model.eval(), pack, with_zero_logit=single_logit_is_second_class)
    with torch.no_grad():
        output = model(pack)
    if not isinstance(output, AttentionOutput):
        return Look(again, "re-evaluation", None)
    scores = _array(output.scores)
    attention = PooledBag(scores, np.zeros((*scores.shape, 1)), np.zeros(1)).attention.mean(axis=1)
    form = contributions(_bare(model), output)
    if form is None:
        return Look(again, "re-evaluation", attention)
    pooled = PooledBag(scores, *form)
    exact = _with_zero_logit(pooled) if single_logit_is_second_class else pooled
    if isinstance(output, DsmilOutput):
        critical = CriticalBag(exact, again, _array(output.instance_logits).argmax(axis=0))
        return Look(critical, "closed form but for critical tiles", attention)
    return Look(exact, "closed form", attention) if _agree(exact, again) else Look(again, "re-evaluation", attention)


def _agree(exact: PooledBag, again: "ForwardBag") -> bool:
    """Compare the closed form with the model, on the whole bag and on every second instance."""
    for index in (np.arange(exact.n_instances), np.arange(0, exact.n_instances, 2)):
        if not np.allclose(exact.keep_only(index), again.keep_only(index), rtol=CLOSE, atol=CLOSE):
            return False
    return True


def _bare(model: nn.Module) -> nn.Module:
    return model.aggregator if isinstance(model, Standardized) else model


def _with_zero_logit(bag: PooledBag) -> PooledBag:
    terms = np.concatenate([np.zeros_like(bag.terms), bag.terms], axis=2)
    return PooledBag(bag.scores, terms, np.concatenate([np.zeros_like(bag.bias), bag.bias]))


@singledispatch
def contributions(model: nn.Module, output: AttentionOutput) -> tuple[Floats, Floats] | None:
    """Return terms (n, H, K) and bias (K,) of a model that is linear after its pooling, or None for any other.

    A method joins by ``@contributions.register``.
    """
    return None


@contributions.register(Abmil)
def _of_concatenated_heads(model: Abmil, output: AttentionOutput) -> tuple[Floats, Floats]:
    heads = output.scores.shape[1]
    weights = model.classifier.weight.view(model.n_outputs, heads, -1)  # (K, H, E)
    return _terms("ne,khe->nhk", output.instances, weights), _array(model.classifier.bias)


@contributions.register(Dsmil)
def _of_critical_instances(model: Dsmil, output: AttentionOutput) -> tuple[Floats, Floats]:
    weights = model.classifier.weight.view(model.n_outputs, model.n_outputs, -1)  # (K, H, E)
    return _terms("ne,khe->nhk", output.instances, weights), _array(model.classifier.bias)


@contributions.register(ClamSingleBranch)
def _of_one_branch(model: ClamSingleBranch, output: AttentionOutput) -> tuple[Floats, Floats]:
    return _terms("ne,ke->nk", output.instances, model.classifier.weight)[:, None], _array(model.classifier.bias)


@contributions.register(ClamMultiBranch)
def _of_branch_per_class(model: ClamMultiBranch, output: AttentionOutput) -> tuple[Floats, Floats]:
    own = _terms("ne,ke->nk", output.instances, model.classifier.weight)
    return own[:, :, None] * np.eye(own.shape[1]), _array(model.classifier.bias)


@contributions.register(Acmil)
def _of_averaged_branches(model: Acmil, output: AttentionOutput) -> tuple[Floats, Floats]:
    branches = output.scores.shape[1]
    one = _terms("ne,ke->nk", output.instances, model.classifier.weight)[:, None] / branches
    return np.repeat(one, branches, axis=1), _array(model.classifier.bias)


def _terms(rule: str, instances: Tensor, weights: Tensor) -> Floats:
    # float64 weights would copy the instances; the products are summed in blocks instead
    blocks = [torch.einsum(rule, block.double(), weights.detach().double()) for block in torch.split(instances, 8192)]
    return _array(torch.cat(blocks))


def _array(values: Tensor) -> Floats:
    return np.asarray(values.detach().double().cpu().numpy())


@dataclass(frozen=True, eq=False)
class ForwardBag:
    """A bag of any model: every question is a forward pass on the instances that remain, several in a pack.

    Parameters
    ----------
    model : Aggregator
        In evaluation mode.
    pack : PackedBags
        One bag on the model's device.
    with_zero_logit : bool
        Put a zero before the model's logit.
    shortlist : int
        Candidates that a round of `greedy` judges: those with the largest effect by the gradient.
    """

    model: Aggregator
    pack: PackedBags
    with_zero_logit: bool = False
    shortlist: int = SHORTLIST

    @property
    def n_instances(self) -> int:
        """Number of instances n."""
        return self.pack.n_instances

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        return self.keep_only(np.arange(self.n_instances))

    def keep_only(self, index: ArrayLike) -> Floats:
        """Return the prediction for these instances alone, (K,); their order is that of the bag."""
        return np.asarray(self._judge([np.sort(np.asarray(index, dtype=np.int64))])[0])

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without these instances, (K,)."""
        return self.keep_only(self._rest(index))

    def remove_each(self, candidates: ArrayLike, alive: NDArray[np.bool_] | None = None) -> Floats:
        """Return the prediction without each single candidate, (m, K), among the instances that are alive."""
        here = np.ones(self.n_instances, dtype=bool) if alive is None else alive
        rows = np.flatnonzero(here)
        return self._judge([rows[rows != candidate] for candidate in np.asarray(candidates).tolist()])

    def proxy(self, target: Target, alive: NDArray[np.bool_] | None = None) -> Floats:
        """Return a first-order guess of the change of the target when each instance leaves, (n,).

        ``-(x_i - mean x) · ∂target/∂x_i``: the gradient's price for replacing the instance by the mean of the bag.
        Instances that are not alive get 0.
        """
        rows = np.arange(self.n_instances) if alive is None else np.flatnonzero(alive)
        values = self.pack.values[torch.from_numpy(rows)].detach().requires_grad_()
        with torch.enable_grad():
            logits = self._wide(self.model(PackedBags.pack([values])).logits)[0]
            (gradient,) = torch.autograd.grad(target.of_tensor(logits), values)
        guess = np.zeros(self.n_instances)
        guess[rows] = -((values - values.mean(0)) * gradient).sum(1).double().detach().cpu().numpy()
        return guess

    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove one instance per round; each round re-evaluates the shortlist of `proxy` and takes the best of it."""
        alive = np.ones(self.n_instances, dtype=bool)
        order, logits, evaluations = [], [self.logits()], 0
        for _ in range(min(rounds, self.n_instances - 1)):
            candidates = _shortlist(self.proxy(target, alive), direction, alive, self.shortlist)
            predictions = self.remove_each(candidates, alive)
            values = target.of(predictions)
            best = choose(values, float(target.of(logits[-1])), direction)
            order.append(int(candidates[best]))
            logits.append(predictions[best])
            alive[order[-1]] = False
            evaluations += len(candidates)
        return Search(np.array(order, dtype=np.int64), np.array(logits), evaluations)

    def select(self, index: NDArray[np.int64]) -> "ForwardBag":
        """Return the bag of the instances at `index`, in ascending order."""
        keep = torch.zeros(self.n_instances, dtype=torch.bool, device=self.pack.values.device)
        keep[torch.from_numpy(index).to(keep.device)] = True
        return replace(self, pack=self.pack.select(keep))

    def add(self, donor: "ForwardBag") -> Floats:
        """Return the prediction with all instances of a donor added, (K,); it has no places, they are of two slides."""
        values = torch.cat([self.pack.values, donor.pack.values])
        with torch.no_grad():
            return np.asarray(_array(self._wide(self.model(PackedBags.pack([values])).logits))[0])

    def _rest(self, index: ArrayLike) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(self.n_instances), np.asarray(index, dtype=np.int64))

    @torch.no_grad()
    def _judge(self, subsets: Sequence[NDArray[np.int64]]) -> Floats:
        per_pass = max(1, INSTANCES_PER_PASS // max(1, max(len(subset) for subset in subsets)))
        rows = []
        for start in range(0, len(subsets), per_pass):
            bags = [self.pack.values[torch.from_numpy(subset)] for subset in subsets[start : start + per_pass]]
            places = self.pack.coords_px0
            chosen = subsets[start : start + per_pass]
            coords = None if places is None else [places[torch.from_numpy(subset)] for subset in chosen]
            rows.append(_array(self._wide(self.model(PackedBags.pack(bags, coords_px0=coords)).logits)))
        return np.concatenate(rows)

    def _wide(self, logits: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if self.with_zero_logit else logits


@dataclass(frozen=True, eq=False)
class CriticalBag:
    """A bag of DSMIL: softmax pooling whose scores hang on one critical instance per class.

    Sets that leave the critical instances in place follow from the sums; the others are forward passes, at most one per
    class when single instances are asked about.

    Parameters
    ----------
    pooled : PooledBag
        With the scores of the whole bag.
    again : ForwardBag
    critical : (K,) int64
        The instance of each class that all others are compared with.
    """

    pooled: PooledBag
    again: ForwardBag
    critical: NDArray[np.int64]

    @property
    def n_instances(self) -> int:
        """Number of instances n."""
        return self.pooled.n_instances

    def logits(self) -> Floats:
        """Return the prediction, (K,)."""
        return self.pooled.logits()

    def keep_only(self, index: ArrayLike) -> Floats:
        """Return the prediction for these instances alone, (K,)."""
        keeps_all = bool(np.isin(self.critical, index).all())
        return self.pooled.keep_only(index) if keeps_all else self.again.keep_only(index)

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without these instances, (K,)."""
        return self.keep_only(np.setdiff1d(np.arange(self.n_instances), np.asarray(index, dtype=np.int64)))

    def select(self, index: NDArray[np.int64]) -> "CriticalBag":
        """Return the bag of the instances at `index`, in ascending order."""
        again = self.again.select(index)
        kept = np.unique(index)
        if np.isin(self.critical, kept).all():
            return CriticalBag(self.pooled.select(kept), again, np.searchsorted(kept, self.critical))
        seen = look(again.model, again.pack, single_logit_is_second_class=again.with_zero_logit)
        return cast(CriticalBag, seen.subsets)

    def add(self, donor: "CriticalBag") -> Floats:
        """Return the prediction with all instances of a donor added, (K,)."""
        return self.again.add(donor.again)

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""
        changes = self.pooled.leave_one_out()
        critical = np.unique(self.critical)
        changes[critical] = self.again.remove_each(critical) - self.logits()
        return changes

    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove one instance per round, judging all that remain."""
        here = np.arange(self.n_instances)
        bag: CriticalBag = self
        order, logits, evaluations = [], [self.logits()], 0
        for _ in range(min(rounds, self.n_instances - 1)):
            predictions = logits[-1] + bag.leave_one_out()
            best = choose(target.of(predictions), float(target.of(logits[-1])), direction)
            order.append(int(here[best]))
            logits.append(predictions[best])
            evaluations += len(here)
            here = np.delete(here, best)
            bag = bag.select(np.delete(np.arange(bag.n_instances), best))
        return Search(np.array(order, dtype=np.int64), np.array(logits), evaluations)


def _shortlist(guess: Floats, direction: Direction, alive: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    cost = {"min": guess, "max": -guess, "least": np.abs(guess)}[direction]
    best = np.argsort(np.where(alive, cost, np.inf), kind="stable")[: min(size, int(alive.sum()))]
    return np.sort(best)

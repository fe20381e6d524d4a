"""How to ask a model about subsets of a bag: exactly from sums where its form allows, else by running it again."""

from dataclasses import dataclass
from typing import Literal, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from eosin.features.bag import FeatureBag
from eosin.heatmaps.attribution import pack_bag
from eosin.heatmaps.closed_forms import Exact, as_array, closed_form
from eosin.heatmaps.closed_forms import contributions as contributions
from eosin.heatmaps.pooled import Direction, Floats, PooledBag, Search, Target
from eosin.heatmaps.readout import greedy_by_leaving_out
from eosin.heatmaps.reevaluation import BUDGET
from eosin.heatmaps.reevaluation import ForwardBag as ForwardBag
from eosin.mil.bags import PackedBags
from eosin.mil.methods.dsmil import DsmilOutput
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.mil.standardize import Standardized

CLOSE = 1e-4
COMPARED_INSTANCES = 4096
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


def look(
    model: Aggregator,
    bag: FeatureBag | PackedBags,
    *,
    single_logit_is_second_class: bool = False,
    budget: int = BUDGET,
) -> Look:
    """Choose how to ask a model about a bag.

    The closed form is taken for the methods that have one, after its prediction has been compared with the model's.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag or PackedBags
        A pack holds one bag.
    single_logit_is_second_class : bool
        Give a model of two classes and one logit two logits, the first of them 0, so that classes have an index each.
    budget : int
        Instances that a search may run a model on that has no closed form.
    """
    pack = bag if isinstance(bag, PackedBags) else pack_bag(model, bag)
    again = ForwardBag(model.eval(), pack, with_zero_logit=single_logit_is_second_class, budget=budget)
    with torch.no_grad():
        output = model(pack)
        form = closed_form(*_bare(model, pack), output)
    attention = mean_attention(output.scores) if isinstance(output, AttentionOutput) else None
    if form is None:
        return Look(again, "re-evaluation", attention)
    exact: Exact = form.with_zero_logit() if single_logit_is_second_class else form
    if isinstance(output, DsmilOutput) and isinstance(exact, PooledBag):
        places = as_array(output.instance_logits).argmax(axis=0) if exact.n_instances else np.zeros(0, dtype=np.int64)
        critical = CriticalBag(exact, again, places, np.arange(exact.n_instances))
        return Look(critical, "closed form but for critical tiles", attention)
    agrees = _agree(exact, again, as_array(output.logits)[0])
    return Look(exact, "closed form", attention) if agrees else Look(again, "re-evaluation", attention)


def mean_attention(scores: Tensor) -> Floats:
    """Return the mean weight of each instance over the branches, (n,), of scores (n, H)."""
    return np.asarray(scores.detach().double().softmax(0).mean(1).cpu().numpy())


def _agree(exact: Exact, again: ForwardBag, whole: Floats) -> bool:
    """Compare the closed form with the model, on the whole bag and on a part of it spread over all."""
    predicted = np.concatenate([np.zeros(int(again.with_zero_logit)), whole])
    part = np.arange(0, exact.n_instances, max(2, exact.n_instances // COMPARED_INSTANCES))
    pairs = ((exact.logits(), predicted), (exact.keep_only(part), again.keep_only(part)))
    return all(np.allclose(ours, theirs, rtol=CLOSE, atol=CLOSE) for ours, theirs in pairs)


def _bare(model: nn.Module, pack: PackedBags) -> tuple[nn.Module, PackedBags]:
    return (model.aggregator, model.standardizer(pack)) if isinstance(model, Standardized) else (model, pack)


@dataclass(frozen=True, eq=False)
class CriticalBag:
    """A bag of DSMIL: softmax pooling whose scores hang on one critical instance per class.

    Sets that leave the critical instances in place follow from the sums; the others are forward passes, at most one per
    class when single instances are asked about.

    Parameters
    ----------
    pooled : PooledBag
        The bag's instances, with scores against the critical ones.
    again : ForwardBag
        The bag that this one was selected from.
    critical : (K,) int64
        The instance of each class that all others are compared with.
    rows : (n,) int64
        Rows of this bag's instances in `again`.
    """

    pooled: PooledBag
    again: ForwardBag
    critical: NDArray[np.int64]
    rows: NDArray[np.int64]

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
        if keeps_all:
            return self.pooled.keep_only(index)
        return self.again.keep_only(self.rows[np.asarray(index, dtype=np.int64)])

    def remove(self, index: ArrayLike) -> Floats:
        """Return the prediction without these instances, (K,)."""
        return self.keep_only(np.setdiff1d(np.arange(self.n_instances), np.asarray(index, dtype=np.int64)))

    def select(self, index: NDArray[np.int64]) -> "CriticalBag":
        """Return the bag of the instances at `index`, in ascending order."""
        kept = np.unique(index)
        if np.isin(self.critical, kept).all():
            critical = np.searchsorted(kept, self.critical)
            return CriticalBag(self.pooled.select(kept), self.again, critical, self.rows[kept])
        again = self.again.select(self.rows[kept])
        seen = look(again.model, again.pack, single_logit_is_second_class=again.with_zero_logit)
        return cast(CriticalBag, seen.subsets)

    def add(self, donor: "CriticalBag") -> Floats:
        """Return the prediction with all instances of a donor added, (K,)."""
        return self.again.select(self.rows).add(donor.again.select(donor.rows))

    def leave_one_out(self) -> Floats:
        """Return the change of the logits when each single instance is removed, (n, K)."""
        changes = self.pooled.leave_one_out()
        critical = np.unique(self.critical)
        changes[critical] = np.stack([self.remove([instance]) for instance in critical]) - self.logits()
        return changes

    def log_weight_gradient(self) -> Floats:
        """Return the derivative of the logits by each instance's log weight, (n, K), the critical ones held."""
        return self.pooled.log_weight_gradient()

    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove one instance per round, judging all that remain."""
        return greedy_by_leaving_out(self, target, direction, rounds)

"""A bag of any model: every question is the model run again on the instances that remain.

A search would need one pass per candidate and round. It judges a shortlist instead, by first-order guesses that cost a
pass or two of the model, and in large bags it removes several instances per round. How much it may cost is a budget in
instances that the model is run on; `plan_search` divides it. How well a guess ranks is measured, not assumed:
`ForwardBag.best_guess` compares it with exact effects of a random sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, Self

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from typing_extensions import override

from eosin._processes import require_running
from eosin.mil.bags import PackedBags, side_by_side
from eosin.mil.slots import Aggregator
from eosin.mil.subsets import Direction, Floats, Indices, Search, Subsets, Target, cost_of

SHORTLIST = 256
INSTANCES_PER_PASS = 200_000
BAGS_PER_PASS = 4096  # of single tiles: what a transformer adds to each bag outgrows the tile itself
ALL_EXACT_TILES = 500  # most tiles of a bag that a model is run again without, each once
BUDGET = 4_000_000
BLOCK_SHARES = (0.001, 0.002, 0.005, 0.01)
SAMPLE = 64
SMALLEST_SAMPLE = 8


class Plan(NamedTuple):
    """How a search spends its budget: instances removed per round, and candidates judged in each."""

    block: int
    shortlist: int


def plan_search(n: int, rounds: int, *, budget: int = BUDGET, shortlist: int = SHORTLIST) -> Plan:
    """Return how to remove `rounds` of n instances when the model may be run on `budget` instances.

    One instance per round while the budget lasts, else blocks of 0.1, 0.2, 0.5 or 1 % of the bag, and then fewer
    candidates; a shortlist no longer than the block means that the guess alone decides.
    """
    affordable = budget // max(n, 1)
    candidates = min(shortlist, n)
    blocks = [1, *(max(1, int(np.ceil(share * n))) for share in BLOCK_SHARES)]
    for block in blocks:
        if -(-rounds // block) * max(candidates, block) <= affordable:
            return Plan(block, max(candidates, min(block, n)))
    block = min(blocks[-1], max(rounds, 1))
    return Plan(block, min(n, max(block, affordable // max(1, -(-rounds // block)))))


class Guess(NamedTuple):
    """A first-order guess (n,) of what leaving out does, and its rank correlation with exact effects of a sample."""

    name: str
    values: Floats
    agreement: float
    sample: int


@dataclass(frozen=True, eq=False)
class ForwardBag(Subsets):
    """A bag of any model: every question is a forward pass on the instances that remain, several in a pack.

    Parameters
    ----------
    model : Aggregator
        In evaluation mode.
    pack : PackedBags
        One bag on the model's device.
    wide : bool
        Put a zero before the model's logit.
    shortlist : int
        Most candidates that a round of `greedy` judges.
    budget : int
        Instances that a search may run the model on.
    """

    model: Aggregator
    pack: PackedBags
    wide: bool = False
    shortlist: int = SHORTLIST
    budget: int = BUDGET

    how = "Every number is the model run again on the tiles that remain"

    @property
    @override
    def n_instances(self) -> int:
        return self.pack.n_instances

    @property
    @override
    def exact(self) -> bool:
        return self.n_instances <= ALL_EXACT_TILES

    @property
    @override
    def price(self) -> int:
        return self.n_instances

    @override
    def logits(self) -> Floats:
        return self.keep_only(np.arange(self.n_instances))

    @override
    def keep_only(self, index: ArrayLike) -> Floats:
        # in the order of the bag, which some models read
        return np.asarray(self._judge([np.sort(np.asarray(index, dtype=np.int64))])[0])

    def remove_each(self, candidates: ArrayLike, alive: NDArray[np.bool_] | None = None) -> Floats:
        """Return the prediction without each single candidate, (m, K), among the instances that are alive."""
        here = np.ones(self.n_instances, dtype=bool) if alive is None else alive
        rows = np.flatnonzero(here)
        return self._judge([rows[rows != candidate] for candidate in np.asarray(candidates).tolist()])

    @cached_property
    def without_each(self) -> Floats:
        """The prediction without each single instance, (n, K)."""
        return self.remove_each(np.arange(self.n_instances))

    @override
    def leave_one_out(self) -> Floats:
        return self.without_each - self.logits()

    @override
    def only_one(self) -> Floats:
        return self._judge([np.array([instance]) for instance in range(self.n_instances)])

    @override
    def effects(self, target: Target) -> tuple[Floats, float]:
        if self.exact:
            return super().effects(target)
        guess = self.best_guess(target if target.on == "logit" else Target(target.output))
        return -guess.values, guess.agreement

    @override
    def slopes(self, target: Target) -> Floats | None:
        return self.model.weight_gradient(self.pack, partial(self._value, target))

    def guesses(self, target: Target, alive: NDArray[np.bool_] | None = None) -> dict[str, Floats]:
        """Return first-order guesses, by name, of the change of the target when each instance leaves, (n,) each.

        ``weight``: -G_i, the derivative by the logarithm of the instance's weight where the model reads the bag out,
        with everything before held fixed. ``gradient``: ``-(x_i - mean x) · ∂target/∂x_i``, the price of replacing the
        instance by the mean of the bag. Instances that are not alive get 0.
        """
        by_weight = self.weight_guess(target, alive)
        found = {} if by_weight is None else {"weight": by_weight}
        return found | {"gradient": self.gradient_guess(target, alive)}

    def best_guess(self, target: Target) -> Guess:
        """Return the guess that ranks a random sample of instances most like their exact effects."""
        affordable = self.budget // (4 * max(1, self.n_instances))
        size = min(SAMPLE, max(SMALLEST_SAMPLE, affordable))
        sample = np.random.default_rng(0).permutation(self.n_instances)[:size]
        exact = target.of(self.remove_each(sample)) - float(target.of(self.logits()))
        measured = [
            Guess(name, values, _rank_agreement(values[sample], exact), len(sample))
            for name, values in self.guesses(target).items()
        ]
        return max(measured, key=lambda guess: -2.0 if np.isnan(guess.agreement) else guess.agreement)

    def weight_guess(self, target: Target, alive: NDArray[np.bool_] | None = None) -> Floats | None:
        """Return ``-G_i`` (n,), or None for a model that has no weights of instances."""
        rows = self._alive_rows(alive)
        gradient = self.model.weight_gradient(self._packed([rows]), partial(self._value, target))
        return None if gradient is None else self._spread(-gradient, rows)

    def gradient_guess(self, target: Target, alive: NDArray[np.bool_] | None = None) -> Floats:
        """Return ``-(x_i - mean x) · ∂target/∂x_i`` (n,): the price of replacing an instance by the mean of the bag."""
        rows = self._alive_rows(alive)
        pack = self._packed([rows])
        values = pack.values.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                self._value(target, self.model(pack.with_values(values)).logits[0]), values
            )
        return self._spread(-((values - values.mean(0)) * gradient).sum(1).double().detach().cpu().numpy(), rows)

    @override
    def greedy(self, target: Target, direction: Direction, rounds: int) -> Search:
        """Remove instances until `rounds` are gone; each step re-evaluates a shortlist and takes the best.

        `plan_search` says how many leave at once and how many candidates are judged.
        """
        rounds = max(0, min(rounds, self.n_instances - 1))
        plan = plan_search(self.n_instances, rounds, budget=self.budget, shortlist=self.shortlist)
        alive = np.ones(self.n_instances, dtype=bool)
        order: list[int] = []
        sizes, logits, evaluations = [0], [self.logits()], 0
        while len(order) < rounds:
            count = min(plan.block, rounds - len(order))
            leaving, after, judged = self._best(
                target, direction, alive, count=count, shortlist=plan.shortlist, now=logits[-1]
            )
            order += leaving
            alive[leaving] = False
            sizes.append(len(order))
            logits.append(self.keep_only(np.flatnonzero(alive)) if after is None else after)
            evaluations += judged
        steps = np.array(sizes, dtype=np.int64)
        return Search(
            np.array(order, dtype=np.int64), np.array(logits), evaluations, steps, _in_words(steps, evaluations)
        )

    def _best(
        self, target: Target, direction: Direction, alive: NDArray[np.bool_], *, count: int, shortlist: int, now: Floats
    ) -> tuple[list[int], Floats | None, int]:
        """Return the instances that leave, the logits without them if known, and how many candidates were judged."""
        candidates = _shortlist(self.guesses(target, alive), direction, alive, shortlist)
        if len(candidates) <= count:
            return candidates[:count].tolist(), None, 0
        candidates = np.sort(candidates)  # of equal effects the first instance leaves
        predictions = self.remove_each(candidates, alive)
        best = np.argsort(cost_of(target.of(predictions), float(target.of(now)), direction), kind="stable")[:count]
        return candidates[best].tolist(), predictions[best[0]] if count == 1 else None, len(candidates)

    @override
    def select(self, index: Indices) -> Self:
        # in ascending order, which some models read
        return replace(self, pack=self._packed([np.unique(np.asarray(index, dtype=np.int64))]))

    @override
    def join(self, donor: Self) -> Self:
        # level-0 pixels of two slides have nothing in common, but their tiles can lie side by side
        mine, others = self.pack.places, donor.pack.places
        places = None if mine is None or others is None else [side_by_side([mine, others])]
        return replace(self, pack=PackedBags.pack([torch.cat([self.pack.values, donor.pack.values])], places=places))

    @override
    def with_zero_logit(self) -> Self:
        return replace(self, wide=True)

    def _alive_rows(self, alive: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        return np.arange(self.n_instances) if alive is None else np.flatnonzero(alive)

    def _spread(self, values: Floats, rows: NDArray[np.int64]) -> Floats:
        spread = np.zeros(self.n_instances)
        spread[rows] = values
        return spread

    def _packed(self, subsets: Sequence[NDArray[np.int64]]) -> PackedBags:
        rows = [torch.from_numpy(subset).to(self.pack.values.device) for subset in subsets]
        coords, places = (
            None if where is None else [where[chosen] for chosen in rows]
            for where in (self.pack.coords_px0, self.pack.places)
        )
        return PackedBags.pack([self.pack.values[chosen] for chosen in rows], coords_px0=coords, places=places)

    def _value(self, target: Target, logits: Tensor) -> Tensor:
        return target.of_tensor(self._wide(logits[None])[0])

    @torch.no_grad()
    def _judge(self, subsets: Sequence[NDArray[np.int64]]) -> Floats:
        longest = max((len(subset) for subset in subsets), default=1)
        per_pass = max(1, min(BAGS_PER_PASS, INSTANCES_PER_PASS // max(1, longest)))
        rows = []
        for start in range(0, len(subsets), per_pass):
            require_running()
            pack = self._packed(subsets[start : start + per_pass])
            rows.append(self._wide(self.model(pack).logits).double().cpu().numpy())
        return np.concatenate(rows)

    def _wide(self, logits: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if self.wide else logits


def _shortlist(
    guesses: Mapping[str, Floats], direction: Direction, alive: NDArray[np.bool_], size: int
) -> NDArray[np.int64]:
    """Return the candidates that the guesses put first, taking from each in turn."""
    costs = [np.where(alive, cost_of(guess, 0.0, direction), np.inf) for guess in guesses.values()]
    ranked = np.stack([np.argsort(cost, kind="stable")[: int(alive.sum())] for cost in costs], axis=1).ravel()
    _, first = np.unique(ranked, return_index=True)
    return np.asarray(ranked[np.sort(first)][:size])


def _in_words(steps: Indices, evaluations: int) -> str:
    """Return how a search went, for the report."""
    largest = int(np.diff(steps).max(initial=1))
    how = f"the search removed {'one tile' if largest == 1 else f'{largest} tiles'} at a time"
    if not evaluations:
        return f"{how} in the order of first-order guesses"
    return f"{how} and judged {evaluations} candidates, shortlisted by first-order guesses"


def _rank_agreement(guess: Floats, exact: Floats) -> float:
    if len(exact) < 2 or np.ptp(exact) == 0 or np.ptp(guess) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(guess, exact).statistic)

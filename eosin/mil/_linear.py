"""A linear part beside an aggregator, for training sets that are too small to train the aggregator alone.

1. Standardized features z; of a bag the means of z and of |z|, 2 D numbers: level and spread of each feature.
2. ``logits = W m + b``, where the loss of all training bags plus ``RIDGE / 2 |W|²`` is least, with every column of m
   scaled to deviation 1. The losses of the tasks are convex in the logits, so there is one solution; it is computed,
   not approached by passes, and needs no validation bags.
3. The part is used where it predicts, in a cross-validation inside the training slides, better than one answer for all:
   where a few tiles decide, a mean over all tiles says nothing.
4. The model answers with a weighted mean of the logits of both parts, see `share_of`.

|z| and not the standard deviation, because a mean over instances is a sum of what single instances say: every what-if
stays exact (`eosin.mil._closed_forms.PooledBag` with one more branch, whose weights are equal).

The ridge is the prior that a weight is about 0.3 log-odds per deviation. It is fixed, because choosing it by
cross-validation inside 50 bags was worse on UCSB and MUSK1; docs/evaluation.md says which sets were seen.
"""

from dataclasses import replace
from typing import Self

import numpy as np
import scipy
import torch
from torch import Tensor, nn
from typing_extensions import override

from eosin.kernels import segment_mean
from eosin.mil._closed_forms import linear_terms
from eosin.mil._data import Examples
from eosin.mil._standardize import SMALLEST_DEVIATION, Standardizer
from eosin.mil.bags import PIECE_ROWS, BagInPieces, PackedBags, is_large
from eosin.mil.slots import Aggregator, AggregatorOutput, Wrapper
from eosin.mil.subsets import Floats, Subsets, Value, as_array, slope_of
from eosin.mil.task import Task

RIDGE = 10.0
LEAST_SHARE = 0.5
MOST_STEPS = 1000
FOLDS = 5


def share_of(slides: int, below: int) -> float:
    """Return the share of the linear part in the answer: the fewer slides, the less a network has learnt from them.

    Parameters
    ----------
    slides : int
        Of training and validation.
    below : int
        ``linear_below`` of the recipe, which is more.
    """
    return max(1 - slides / below, LEAST_SHARE)


class LinearPart(nn.Module):
    """Logits (B, K) that are linear in the means of a bag's standardized features and of their absolute values.

    Parameters
    ----------
    dim, n_outputs : int
        Feature width D and logits K.
    """

    def __init__(self, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.standardizer = Standardizer(dim)
        self.readout = nn.Linear(2 * dim, n_outputs)

    @classmethod
    def solve(cls, task: Task, train: Examples) -> Self | None:
        """Return the one solution for these bags, or None where it does not help, see the text of this module.

        Parameters
        ----------
        task : Task
            After `Task.fit_to`.
        train : Examples
        """
        part = cls(train.bags.spec.dim, task.n_outputs).requires_grad_(False)
        part.standardizer = Standardizer.measure(train.bags, train.ids)
        if not part.standardizer.mean.isfinite().all():
            return None  # the first pass of training refuses such features and names the slides
        means = torch.cat([part.means(PackedBags.pack([train.bags.load(name).float()])) for name in train.ids]).double()
        centre, spread = means.mean(0), means.std(0, unbiased=False)
        scale = torch.where(spread > SMALLEST_DEVIATION, 1 / spread, 0.0)
        columns = (means - centre) * scale
        if not helps(task, columns, train):
            return None
        weight, bias = ridge(task, columns, train.targets)
        part.readout.weight.copy_(weight * scale)
        part.readout.bias.copy_(bias - weight @ (centre * scale))
        return part

    def means(self, bags: PackedBags) -> Tensor:
        """Return (B, 2 D)."""
        rows = self.standardizer.rows(bags.values)
        return torch.cat([segment_mean(rows, bags.cu_seqlens), segment_mean(rows.abs(), bags.cu_seqlens)], 1)

    def means_of_pieces(self, bag: BagInPieces) -> Tensor:
        """Return (1, 2 D)."""
        total = torch.zeros(1, self.readout.in_features, dtype=torch.float64)
        for piece in bag.pieces:
            total += len(piece) * self.means(PackedBags.pack([piece.float()])).double().cpu()
        return (total / bag.length).to(self.readout.weight)

    def forward(self, bags: PackedBags) -> Tensor:
        """Return logits (B, K) in float32: a precision that is chosen for the aggregator does not apply here."""
        if is_large(bags):
            return self.forward_pieces(BagInPieces.of(bags))
        with torch.autocast(bags.values.device.type, enabled=False):
            logits: Tensor = self.readout(self.means(bags.with_values(bags.values.float())))
        return logits

    def forward_pieces(self, bag: BagInPieces) -> Tensor:
        """Return the logits (1, K) of a bag that is read piece by piece."""
        with torch.autocast(self.readout.weight.device.type, enabled=False):
            logits: Tensor = self.readout(self.means_of_pieces(bag))
        return logits

    def terms(self, bags: PackedBags) -> Floats:
        """Return the logits of every instance without the bias, (n, K), whose mean over a bag is the bag's."""
        level, spread = self.readout.weight.chunk(2, 1)
        terms = []
        for piece in torch.split(bags.values, PIECE_ROWS):
            rows = self.standardizer.rows(piece.float())
            terms.append(linear_terms("nd,kd->nk", rows, level) + linear_terms("nd,kd->nk", rows.abs_(), spread))
        return np.concatenate(terms)


def helps(task: Task, columns: Tensor, train: Examples) -> bool:
    """Return whether columns (B, M) predict held-out patients with less loss than the best answer that ignores them."""
    names, patient = np.unique(np.asarray(train.patient_ids), return_inverse=True)
    first = train.targets.reshape(len(train), -1)[:, 0].double().numpy()
    value = np.bincount(patient, first) / np.bincount(patient)
    # dealt in the order of their targets, so that every fold has some of each
    fold = np.empty(len(names), dtype=np.int64)
    fold[np.argsort(value, kind="stable")] = np.arange(len(names)) % FOLDS
    gained = 0.0
    for number in range(min(FOLDS, len(names))):
        held = torch.from_numpy(fold[patient] == number)
        for sign, known in ((1.0, columns), (-1.0, 0 * columns)):
            weight, bias = ridge(task, known[~held], train.targets[~held])
            gained -= sign * float(task.bag_losses(known[held] @ weight.T + bias, train.targets[held]).sum())
    return gained > 0


def ridge(task: Task, columns: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (K, M) and bias (K,) with the least loss of bags (B, M) plus penalty."""
    # the penalty keeps the weights in the space that the bags span, which has few dimensions
    left, sizes, directions = torch.linalg.svd(columns, full_matrices=False)
    found = fit_linear(task, (left * sizes).numpy(), targets, RIDGE / len(columns))
    return found[:-1].T @ directions, found[-1]


def fit_linear(task: Task, rows: Floats, targets: Tensor, strength: float, start: Tensor | None = None) -> Tensor:
    """Return (E + 1, K) float64 weights, the offset last, that minimise ``mean loss + strength / 2 |weights|²``.

    The loss is the task's, so this is logistic, ridge or Cox regression. The offset is not penalised.
    """
    inputs = torch.from_numpy(np.ascontiguousarray(rows))
    shape = (inputs.shape[1] + 1, task.n_outputs)

    def objective(flat: Floats) -> tuple[float, Floats]:
        weights = torch.from_numpy(flat.reshape(shape)).requires_grad_()
        with torch.enable_grad():
            loss = task.bag_losses(logits_of(inputs, weights), targets).mean()
            loss = loss + strength / 2 * weights[:-1].square().sum()
            (gradient,) = torch.autograd.grad(loss, weights)
        return float(loss.detach()), gradient.numpy().ravel()

    first = np.zeros(shape) if start is None else start.numpy()
    found = scipy.optimize.minimize(
        objective, first.ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": MOST_STEPS, "ftol": 1e-12, "gtol": 1e-7},
    )  # fmt: skip
    return torch.from_numpy(found.x.reshape(shape))


def logits_of(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the logits (n, K) of vectors (n, E) for weights as `fit_linear` returns them."""
    return rows @ weights[:-1] + weights[-1]


class WithLinear(Wrapper):
    """An aggregator and a linear part that answer together, with a mean of their logits.

    Parameters
    ----------
    aggregator : Aggregator
    linear : LinearPart
    share : float
        Weight of the linear part in the mean.
    """

    def __init__(self, aggregator: Aggregator, linear: LinearPart, share: float) -> None:
        super().__init__(aggregator.in_dim, aggregator.n_outputs, aggregator)
        self.aggregator = aggregator
        self.linear = linear
        self.share = share

    @property
    @override
    def inner(self) -> Aggregator:
        return self.aggregator

    @override
    def prepare(self, bags: PackedBags) -> PackedBags:
        return bags

    @override
    def forward(self, bags: PackedBags) -> AggregatorOutput:
        output: AggregatorOutput = self.aggregator(bags)
        return replace(output, logits=self._joined(output.logits, self.linear(bags)))

    @override
    def forward_pieces(self, bag: BagInPieces) -> AggregatorOutput:
        output = self.aggregator.forward_pieces(bag)
        return replace(output, logits=self._joined(output.logits, self.linear.forward_pieces(bag)))

    def _joined(self, logits: Tensor, linear: Tensor) -> Tensor:
        return (1 - self.share) * logits + self.share * linear.to(logits.dtype)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> Subsets | None:
        form = self.aggregator.readout(bags, output)
        if form is None:
            return None
        return form.with_linear(self.share, self.linear.terms(bags), as_array(self.linear.readout.bias))

    @override
    def weight_gradient(self, bags: PackedBags, value: Value) -> Floats | None:
        with torch.no_grad():
            logits, linear = self.aggregator(bags).logits, self.linear(bags)
        inner = self.aggregator.weight_gradient(bags, lambda own: value(self._joined(own, linear[0])))
        if inner is None:
            return None
        # the weights of a mean are equal: the slope of instance i is a share of how far its term is from the mean
        terms = self.linear.terms(bags)
        slope = as_array(slope_of(self._joined(logits[0], linear[0]), value))
        return np.asarray(inner + self.share / len(terms) * (terms - terms.mean(0)) @ slope)

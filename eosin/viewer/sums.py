"""The answer to an edit from sums that are taken anew, without copying the bag: what keeps large slides instant."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eosin.heatmaps.pooled import Floats, PooledBag

LEAST_WEIGHT = 1e-250
Part = tuple[PooledBag, NDArray[np.bool_]]


def pooled_logits(parts: Sequence[Part]) -> Floats:
    """Return the prediction for the chosen instances of one or more bags together.

    ``bias + Σ_h Σ w p / Σ w`` over what is chosen, with the weights that each bag keeps, brought to one scale. Sums
    over the rest, never differences; where the rest weighs so little that weights vanish, its own softmax is taken.

    Parameters
    ----------
    parts : sequence of (PooledBag, (n,) bool)
        Bags as one model sees them, and which of their instances count.

    Returns
    -------
    (K,) float64
    """
    peaks = np.array([bag.scores.max(axis=0) for bag, _ in parts])  # (parts, H)
    total, sums = np.zeros(peaks.shape[1]), np.zeros(parts[0][0].terms.shape[1:])
    for (bag, chosen), peak in zip(parts, peaks, strict=True):
        weights = bag.weights * chosen[:, None]
        scale = np.exp(peak - peaks.max(axis=0))
        total += scale * weights.sum(axis=0)
        sums += scale[:, None] * np.einsum("nh,nhk->hk", weights, bag.terms)
    if total.min() < LEAST_WEIGHT:
        return _softmax_again(parts)
    return np.asarray(parts[0][0].bias + (sums / total[:, None]).sum(axis=0))


def _softmax_again(parts: Sequence[Part]) -> Floats:
    first, *others = [bag.select(np.flatnonzero(chosen)) for bag, chosen in parts]
    for other in others:
        first = first.join(other)
    return first.logits()

"""Operations on the scores of one bag, from which those on packs are made."""

import torch
from torch import Tensor

NEVER = float("-inf")  # score of an instance that takes no part


def log_sum_exp(scores: Tensor) -> Tensor:
    """Return log Σ exp over the rows of one bag: (n, H) -> (H,)."""
    shift, total = _shifted_total(scores)
    seen = total > 0
    return torch.where(seen, shift + torch.where(seen, total, 1).log(), NEVER)


def softmax(scores: Tensor) -> Tensor:
    """Return the attention weights of one bag: (n, H) -> (n, H)."""
    shift, total = _shifted_total(scores)
    return (scores - shift).exp() / torch.where(total > 0, total, 1)


def entropy(scores: Tensor) -> Tensor:
    """Return the attention entropy of one bag in nats: (n, H) -> (H,).

    E = log Σ e^(s-m) - Σ a (s-m), shifted by the maximum m so that large scores do not cancel.
    """
    shift, total = _shifted_total(scores)
    relative = torch.where(scores == NEVER, 0, scores - shift)  # 0 · -inf would be NaN
    return torch.where(total > 0, total, 1).log() - (softmax(scores) * relative).sum(0)


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Return the k highest rows of each column, the earlier row on ties: (n, H) -> (n, H) bool."""
    k = min(k, len(scores))
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.topk(k, dim=0).values[-1]
    above = scores > threshold
    tied = scores == threshold
    places = k - above.sum(0)
    return above | (tied & (tied.cumsum(0) <= places))


def _shifted_total(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum (0 where there is none) and Σ exp(s - maximum): (n, H) -> (H,), (H,)."""
    if len(scores) == 0:
        nothing = scores.sum(0)
        return nothing, nothing
    top = scores.detach().amax(0)
    shift = torch.where(top == NEVER, 0, top)
    return shift, (scores - shift).exp().sum(0)

"""Choosing instances of bags, for methods that hide some: at random, by rank, by the vote of several rankings."""

import math

import torch
from torch import Tensor

from eosin.kernels import segment_max, segment_topk_mask
from eosin.mil.bags import PackedBags


def random_subset(bags: PackedBags, counts: list[int], *, among: Tensor | None = None) -> Tensor:
    """Draw so many instances of each bag, of those in `among`: (N,) bool."""
    priority = torch.rand(bags.n_instances, 1, device=bags.values.device)
    if among is not None:
        priority = torch.where(among[:, None], priority, -1.0)
    return segment_topk_mask(priority, bags.cu_seqlens, torch.tensor(counts))[:, 0]


def voted(ranks: Tensor, bags: PackedBags, counts: list[int], *, largest: bool = True) -> Tensor:
    """Return so many instances of each bag with the most votes of the columns, earlier ones on ties: (N,) bool."""
    k = torch.tensor(counts)
    chosen = segment_topk_mask(ranks, bags.cu_seqlens, k, largest=largest)
    if chosen.shape[1] == 1:
        return chosen[:, 0]
    votes = chosen.sum(1, keepdim=True).to(torch.float32)
    return segment_topk_mask(votes, bags.cu_seqlens, k)[:, 0]


def randomly_high(ranks: Tensor, bags: PackedBags, ratio: float, factor: float) -> tuple[Tensor, list[int]]:
    """Draw a fraction of each bag from its highest, equation 2 of `mhim`: (N,) bool and how many of each bag."""
    wide = ratio / factor if factor else 0.0
    if wide > 1:
        wide, factor = 1.0, ratio
    candidates = fraction_counts(bags, wide)
    high = voted(ranks, bags, candidates)
    counts = [math.ceil(factor * count) for count in candidates]
    if factor == 1:
        return high, counts
    return random_subset(bags, counts, among=high), counts


def fraction_counts(bags: PackedBags, ratio: float) -> list[int]:
    """Return ⌈ratio · n⌉ of each bag."""
    return [math.ceil(ratio * length) for length in bags.lengths]


def leaves_some(hidden: Tensor, bags: PackedBags) -> Tensor:
    """Return for each instance whether anything of its bag is left, (N,) bool."""
    left = segment_max((~hidden)[:, None].float(), bags.cu_seqlens)[:, 0] > 0  # (B,)
    return left[bags.bag_index()]


def rows_where(mask: Tensor, count: int) -> Tensor:
    """Return the rows where a mask of known count is true, without asking the device for the count."""
    return torch.nonzero_static(mask, size=count)[:, 0]

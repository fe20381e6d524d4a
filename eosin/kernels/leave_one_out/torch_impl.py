"""Counterfactual effects in closed form, from one pass over the instances.

With the attention a and the table ``c_ikh = C_kh · x_i``, the share of head h in logit k is ``p = Σ a c``, and without
instance i it is ``p + (p - c_i) a_i / (1 - a_i)``. Where a_i exceeds one half, which happens to one instance of a bag
and head at most, 1 - a_i has lost digits and the share is summed again without it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eosin.kernels._bags import NEVER, softmax
from eosin.kernels._checks import accumulation_dtype, host_lengths
from eosin.kernels._products import affine, product_dtype
from eosin.kernels.segment_pool.torch_impl import weighted_sum


def leave_one_out(scores: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Return the logits of the bag without each instance: (N, H), (N, D), (K, H, D) -> (N, K)."""
    shares = head_shares(values, weight)
    lengths = host_lengths(cu_seqlens)
    bags = zip(torch.split(scores.to(shares.dtype), lengths), torch.split(shares, lengths), strict=True)
    logits = shares.new_empty(len(values), len(weight))
    for target, (bag_scores, bag_shares) in zip(torch.split(logits, lengths), bags, strict=True):
        target.copy_(shares_without(bag_scores, bag_shares).sum(2))
    return logits if bias is None else logits + bias.to(logits.dtype)


def pooled_without(scores: Tensor, values: Tensor, cu_seqlens: Tensor, instances: Tensor) -> Tensor:
    """Return the pooled bag without each of the given instances: -> (M, H, D)."""
    dtype = accumulation_dtype(values.dtype)
    lengths = host_lengths(cu_seqlens)
    pooled = values.new_empty((len(instances), scores.shape[1], values.shape[1]), dtype=dtype)
    begin = 0
    for bag_scores, bag in zip(torch.split(scores.to(dtype), lengths), torch.split(values, lengths), strict=True):
        inside = torch.nonzero((instances >= begin) & (instances < begin + len(bag)))[:, 0]
        if len(inside):
            pooled[inside] = _bag_without(bag_scores, bag, instances[inside] - begin)
        begin += len(bag)
    return pooled


def _bag_without(scores: Tensor, bag: Tensor, instances: Tensor) -> Tensor:
    weights = softmax(scores)
    whole = weighted_sum(weights, bag)  # (H, D)
    chosen = weights[instances]  # (M, H)
    ratio = torch.where(chosen > 0.5, 0, chosen / (1 - chosen))
    pooled = whole + (whole - bag[instances].to(whole.dtype)[:, None]) * ratio[:, :, None]
    for place, head in torch.nonzero(chosen > 0.5).tolist():
        pooled[place, head] = weighted_sum(_weights_without(scores, int(instances[place]), head), bag)[0]
    return pooled


def head_shares(values: Tensor, weight: Tensor) -> Tensor:
    """Return what each instance contributes to each logit through each head: (N, D), (K, H, D) -> (N, K, H)."""
    dtype = product_dtype(values, weight)
    shares = affine(values.to(dtype), weight.to(dtype).flatten(0, 1))
    return shares.reshape(len(values), *weight.shape[:2]).to(accumulation_dtype(dtype))


def shares_without(scores: Tensor, shares: Tensor) -> Tensor:
    """Return the shares of the heads of one bag without each instance: (n, H), (n, K, H) -> (n, K, H)."""
    weights = softmax(scores)
    whole = torch.einsum("nh,nkh->kh", weights, shares)
    ratio = torch.where(weights > 0.5, 0, weights / (1 - weights))
    without = whole + (whole - shares) * ratio[:, None]
    for instance, head in torch.nonzero(weights > 0.5).tolist():
        rest = _weights_without(scores, instance, head)  # (n, 1)
        without[instance, :, head] = (rest * shares[:, :, head]).sum(0)
    return without


def greedy_removal(
    scores: Tensor, shares: Tensor, bias: Tensor, rounds: int, objective: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return which instance leaves in each round (R,) and the logits before and after each (R + 1, K)."""
    scores = scores.clone()
    order = torch.empty(rounds, dtype=torch.int64, device=scores.device)
    logits = [torch.einsum("nh,nkh->k", softmax(scores), shares) + bias]
    here = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    for number in range(rounds):
        candidates = shares_without(scores, shares).sum(2) + bias
        worth = torch.where(here, objective(candidates, logits[-1]), float("inf"))
        leaving = worth.argmin()
        order[number] = leaving
        logits.append(candidates[leaving])
        scores[leaving], here[leaving] = NEVER, False
    return order, torch.stack(logits)


def _weights_without(scores: Tensor, instance: int, head: int) -> Tensor:
    rest = scores[:, head : head + 1].clone()
    rest[instance] = NEVER
    return softmax(rest)

"""Operations within bags of a pack: the only place that loops over the instances of each bag.

A pack holds B bags one after the other in N rows; ``cu_seqlens`` (B+1,) int32 says where each begins.
Sums are held in float32 at least. Bags never see each other. What an empty bag gives is stated per function.
All functions but the masks are differentiable any number of times, and deterministic.
"""

import torch
from torch import Tensor

from eosin.kernels._bags import NEVER, entropy, log_sum_exp, softmax, topk_mask
from eosin.kernels._checks import accumulation_dtype, check_floating, check_no_nan, check_offsets, host_lengths
from eosin.kernels._dispatch import choose
from eosin.kernels._library import Later
from eosin.kernels.segment_pool import attention_pooling, weighted_pooling

_triton = Later("eosin.kernels.segment_pool.triton_impl")


def bag_index(cu_seqlens: Tensor, n_instances: int) -> Tensor:
    """Return the bag that each instance lies in.

    Parameters
    ----------
    cu_seqlens : (B+1,) int32
        Offsets of the bags.
    n_instances : int
        N, the last offset; an argument so that the device need not be asked.

    Returns
    -------
    (N,) int64
        Ascending bag numbers.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    bags = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(bags, lengths, output_size=n_instances)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the sum of each bag's instances: (N, D) -> (B, D) in float32 at least; 0 for an empty bag.

    Parameters
    ----------
    values : (N, D) float
        One row per instance.
    cu_seqlens : (B + 1,) int32
        Offsets of the bags.
    """
    _check_packed("values", values, cu_seqlens)
    dtype = accumulation_dtype(values.dtype)
    if choose(values) == "triton":
        ones = values.new_ones(len(values), 1)
        pooled: Tensor = weighted_pooling(ones, values, cu_seqlens, None, backend="triton")
        return pooled[:, 0]
    sums = [bag.sum(0, dtype=dtype) for bag in _bags(values, cu_seqlens)]
    return _stack(sums, values, dtype)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean of each bag's instances: (N, D) -> (B, D) in float32 at least; 0 for an empty bag.

    Parameters
    ----------
    values : (N, D) float
        One row per instance.
    cu_seqlens : (B + 1,) int32
        Offsets of the bags.
    """
    sums = segment_sum(values, cu_seqlens)
    lengths = cu_seqlens.diff().clamp(min=1).to(sums.dtype)
    return sums / lengths[:, None]


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the largest value of each bag and column: (N, D) -> (B, D) in the type of ``values``.

    An empty bag gives 0, as its mean does. The gradient of tied instances is shared equally.

    Parameters
    ----------
    values : (N, D) float
        One row per instance.
    cu_seqlens : (B + 1,) int32
        Offsets of the bags.
    """
    _check_packed("values", values, cu_seqlens)
    width = values.shape[1]
    tops = [bag.amax(0) if len(bag) else values.new_zeros(width) for bag in _bags(values, cu_seqlens)]
    return _stack(tops, values, values.dtype)


def segment_logsumexp(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return log Σ exp(score) over each bag: (N, H) -> (B, H); -inf for an empty or fully masked bag.

    Parameters
    ----------
    scores : (N, H) float
        One column per head; -inf masks an instance.
    cu_seqlens : (B + 1,) int32
        Offsets of the bags.
    """
    _check_scores(scores, cu_seqlens)
    if choose(scores) == "triton":
        return _attention_statistics(scores, cu_seqlens)[0]
    return _stack([log_sum_exp(bag) for bag in _bags(_accumulated(scores), cu_seqlens)], _accumulated(scores))


def segment_softmax(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return each bag's attention weights: (N, H) -> (N, H), each bag and head summing to 1.

    A score of -inf gives weight 0 exactly; in a fully masked bag every weight is 0.

    Parameters
    ----------
    scores : (N, H) floating
        Unnormalised attention.
    cu_seqlens : (B+1,) int32
        Offsets of the bags.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets, NaN in a score on the CPU.
    """
    _check_scores(scores, cu_seqlens)
    if choose(scores) == "triton":
        lse, _ = _attention_statistics(scores, cu_seqlens)
        base = torch.where(lse == NEVER, 0, lse)[bag_index(cu_seqlens, len(scores))]
        return (_accumulated(scores) - base).exp()
    return _concatenate([softmax(bag) for bag in _bags(_accumulated(scores), cu_seqlens)], _accumulated(scores))


def segment_attention_entropy(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the entropy -Σ a log a of each bag's attention in nats: (N, H) -> (B, H).

    Masked instances contribute exactly 0; an empty or fully masked bag has entropy 0.

    Parameters
    ----------
    scores : (N, H) float
        One column per head; -inf masks an instance.
    cu_seqlens : (B + 1,) int32
        Offsets of the bags.
    """
    _check_scores(scores, cu_seqlens)
    if choose(scores) == "triton":
        return _attention_statistics(scores, cu_seqlens)[1]
    return _stack([entropy(bag) for bag in _bags(_accumulated(scores), cu_seqlens)], _accumulated(scores))


def segment_topk_mask(scores: Tensor, cu_seqlens: Tensor, k: int | Tensor, *, largest: bool = True) -> Tensor:
    """Return which instances are among the k highest (or lowest) scores of their bag and head.

    Exactly min(k, n) instances are chosen; of equal scores the earlier instance is chosen. Not differentiable.

    Parameters
    ----------
    scores : (N, H) floating
        Unnormalised attention.
    cu_seqlens : (B+1,) int32
        Offsets of the bags.
    k : int or (B,) integer tensor
        How many to choose, for all bags or per bag.
    largest : bool, optional
        Choose the highest scores (default) or the lowest.

    Returns
    -------
    (N, H) bool
        True where chosen.
    """
    _check_scores(scores, cu_seqlens)
    if choose(scores) == "triton":
        per_bag = _counts_on_device(k, cu_seqlens)
        mask: Tensor = _triton.topk_mask(scores.detach(), per_bag, cu_seqlens, largest=largest)
        return mask
    counts = _counts(k, cu_seqlens)
    ordered = scores.detach() if largest else -scores.detach()
    masks = [topk_mask(bag, count) for bag, count in zip(_bags(ordered, cu_seqlens), counts, strict=True)]
    return _concatenate(masks, torch.zeros_like(scores, dtype=torch.bool))


def _bags(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(packed, host_lengths(cu_seqlens))


def _stack(rows: list[Tensor], packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if not rows:
        return packed.new_zeros((0, packed.shape[1]), dtype=dtype)
    return torch.stack(rows)


def _concatenate(bags: list[Tensor], if_none: Tensor) -> Tensor:
    return torch.cat(bags) if bags else if_none


def _accumulated(scores: Tensor) -> Tensor:
    return scores.to(accumulation_dtype(scores.dtype))


def _attention_statistics(scores: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and entropy (B, H) from the pooling kernel, with no values to pool."""
    no_values = scores.new_empty(len(scores), 0)
    _, lse, spread = attention_pooling(scores, no_values, cu_seqlens, None, backend="triton")
    return lse, spread


def _counts_on_device(k: int | Tensor, cu_seqlens: Tensor) -> Tensor:
    n_bags = cu_seqlens.numel() - 1
    if isinstance(k, Tensor) and k.is_cuda:  # its values are not looked at: that would stall the device
        _check_counts_shape(k, n_bags)
        return k.clamp(min=0).to(torch.int32)
    return torch.tensor(_counts(k, cu_seqlens), dtype=torch.int32).to(cu_seqlens.device)


def _check_counts_shape(k: Tensor, n_bags: int) -> None:
    if k.is_floating_point() or k.dtype == torch.bool or tuple(k.shape) != (n_bags,):
        raise ValueError(f"k: expected an int or integers of shape ({n_bags},), given {k.dtype} {tuple(k.shape)}")


def _counts(k: int | Tensor, cu_seqlens: Tensor) -> list[int]:
    n_bags = cu_seqlens.numel() - 1
    if isinstance(k, Tensor):
        _check_counts_shape(k, n_bags)
        counts = [int(count) for count in k.tolist()]
    else:
        counts = [k] * n_bags
    if any(count < 0 for count in counts):
        raise ValueError(f"k: expected counts of at least 0, given {min(counts)}")
    return counts


def _check_packed(name: str, packed: Tensor, cu_seqlens: Tensor) -> None:
    check_floating(name, packed, ("N", "D" if name == "values" else "H"))
    check_offsets(cu_seqlens, packed.shape[0], packed)


def _check_scores(scores: Tensor, cu_seqlens: Tensor) -> None:
    _check_packed("scores", scores, cu_seqlens)
    check_no_nan("scores", scores)

"""Weighted sums of the instances of each bag, from given weights or from attention scores."""

from torch import Tensor

from eosin.kernels._checks import check_floating, check_no_nan, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels.segment_pool import ops, reference


def segment_pool(weights: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return Σ weight · value over each bag, for every head.

    Parameters
    ----------
    weights : (N, H) floating
        One weight per instance and head; need not be normalised.
    values : (N, D) floating
        Instances.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.

    Returns
    -------
    (B, H, D)
        float32 at least; 0 for an empty bag. Differentiable in both tensors, any number of times.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets.
    """
    _check(("weights", weights), values, cu_seqlens)
    backend = choose(weights, values)
    if backend == "reference":
        return reference.segment_pool(weights, values, cu_seqlens)
    pooled: Tensor = ops.segment_pool(weights, values, cu_seqlens, backend)
    return pooled


def attention_pool(scores: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each bag's attention-weighted mean, log-sum-exp and attention entropy.

    Parameters
    ----------
    scores : (N, H) floating
        Unnormalised attention; -inf keeps an instance out.
    values : (N, D) floating
        Instances.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.

    Returns
    -------
    pooled : (B, H, D)
        Σ a · value with a = softmax(scores) within the bag; 0 for an empty or fully masked bag.
    lse : (B, H)
        log Σ exp(score); -inf for an empty or fully masked bag.
    entropy : (B, H)
        -Σ a log a in nats; 0 for an empty or fully masked bag.
        All three are float32 at least and differentiable, any number of times.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets, NaN in a score on the CPU.
    """
    _check(("scores", scores), values, cu_seqlens)
    check_no_nan("scores", scores)
    backend = choose(scores, values)
    if backend == "reference":
        return reference.attention_pool(scores, values, cu_seqlens)
    pooled, lse, entropy = ops.attention_pool(scores, values, cu_seqlens, backend)
    return pooled, lse, entropy


def _check(per_head: tuple[str, Tensor], values: Tensor, cu_seqlens: Tensor) -> None:
    name, tensor = per_head
    check_floating("values", values, ("N", "D"))
    check_floating(name, tensor, (values.shape[0], "H"), values)
    check_offsets(cu_seqlens, values.shape[0], values)

"""Weighted sums of the instances of each bag, from given weights or from attention scores."""

from torch import Tensor

from eosin.kernels._checks import check_floating, check_no_nan, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels._rows import check_row_index, gathered
from eosin.kernels.segment_pool import ops, reference


def segment_pool(weights: Tensor, values: Tensor, cu_seqlens: Tensor, *, row_index: Tensor | None = None) -> Tensor:
    """Return Σ weight · value over each bag, for every head.

    Parameters
    ----------
    weights : (N, H) floating
        One weight per instance and head; need not be normalised.
    values : (N, D) floating
        Instances.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.
    row_index : (M,) int64, optional
        Instance i is row ``row_index[i]`` of ``values``: a subset or another order without a copy of it. N is then M
        in all other shapes.

    Returns
    -------
    (B, H, D)
        float32 at least; 0 for an empty bag. Differentiable in both tensors, any number of times.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets.
    """
    _check(("weights", weights), values, cu_seqlens, row_index)
    backend = choose(weights, values)
    if backend == "reference":
        return reference.segment_pool(weights, gathered(values, row_index), cu_seqlens)
    pooled: Tensor = ops.segment_pool(weights, values, cu_seqlens, row_index, backend)
    return pooled


def attention_pool(
    scores: Tensor, values: Tensor, cu_seqlens: Tensor, *, row_index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each bag's attention-weighted mean, log-sum-exp and attention entropy.

    Parameters
    ----------
    scores : (N, H) floating
        Unnormalised attention; -inf keeps an instance out.
    values : (N, D) floating
        Instances.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.
    row_index : (M,) int64, optional
        Instance i is row ``row_index[i]`` of ``values``: a subset or another order without a copy of it. N is then M
        in all other shapes.

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
    _check(("scores", scores), values, cu_seqlens, row_index)
    check_no_nan("scores", scores)
    backend = choose(scores, values)
    if backend == "reference":
        return reference.attention_pool(scores, gathered(values, row_index), cu_seqlens)
    pooled, lse, entropy = ops.attention_pool(scores, values, cu_seqlens, row_index, backend)
    return pooled, lse, entropy


def _check(per_head: tuple[str, Tensor], values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None) -> None:
    name, tensor = per_head
    check_floating("values", values, ("N", "D"))
    n_rows = check_row_index(row_index, values)
    check_floating(name, tensor, (n_rows, "H"), values)
    check_offsets(cu_seqlens, n_rows, values)

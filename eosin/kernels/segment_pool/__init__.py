"""Weighted sums of the instances of each bag, from given weights or from attention scores."""

from torch import Tensor

from eosin.kernels._checks import accumulation_dtype, check_floating, check_no_nan, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels._library import Later, Operator
from eosin.kernels._rows import Rows, check_row_index
from eosin.kernels.segment_pool import reference, torch_impl

_triton = Later("eosin.kernels.segment_pool.triton_impl")


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
    pooled: Tensor = weighted_pooling(weights, values, cu_seqlens, row_index, backend=choose(weights, values))
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
    pooled, lse, entropy = attention_pooling(scores, values, cu_seqlens, row_index, backend=choose(scores, values))
    return pooled, lse, entropy


def _check(per_head: tuple[str, Tensor], values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None) -> None:
    name, tensor = per_head
    check_floating("values", values, ("N", "D"))
    n_rows = check_row_index(row_index, values)
    check_floating(name, tensor, (n_rows, "H"), values)
    check_offsets(cu_seqlens, n_rows, values)


def _prepared(
    per_head: Tensor, values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None
) -> tuple[Tensor, Rows, Tensor]:
    return per_head, Rows(values, row_index), cu_seqlens


def _empty_pooled(per_head: Tensor, source: Rows, cu_seqlens: Tensor) -> Tensor:
    size = (cu_seqlens.shape[0] - 1, per_head.shape[1], source.values.shape[1])
    return source.values.new_empty(size, dtype=accumulation_dtype(source.values.dtype))


def _empty_pool(per_head: Tensor, source: Rows, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pooled = _empty_pooled(per_head, source, cu_seqlens)
    return pooled, pooled.new_empty(pooled.shape[:2]), pooled.new_empty(pooled.shape[:2])


weighted_pooling = Operator(
    "segment_pool",
    "(Tensor weights, Tensor values, Tensor cu_seqlens, Tensor? row_index) -> Tensor",
    reference=reference.segment_pool,
    differentiable=2,
    prepare=_prepared,
    empty=_empty_pooled,
    torch=(torch_impl.weighted_forward, torch_impl.weighted_backward),
    triton=(_triton.weighted_forward, _triton.weighted_backward),
)
attention_pooling = Operator(
    "attention_pool",
    "(Tensor scores, Tensor values, Tensor cu_seqlens, Tensor? row_index) "
    "-> (Tensor pooled, Tensor lse, Tensor entropy)",
    reference=reference.attention_pool,
    differentiable=2,
    prepare=_prepared,
    empty=_empty_pool,
    reads_results=True,
    torch=(torch_impl.forward, torch_impl.backward),
    triton=(_triton.forward, _triton.backward),
)

"""Attention between a bag and a few learned vectors, in both directions.

Where that is cheaper, the projections of keys and values are folded into the queries: with ``q̃ = scale W_kᵀ q`` a
score is ``x · q̃`` (the key bias shifts all scores of a query alike and cancels), and
``Σ a (W_v x + b_v) = W_v (Σ a x) + b_v``, so that the instances are keys and values themselves.
"""

import torch
from torch import Tensor

from eosin.kernels._bags import NEVER
from eosin.kernels._checks import accumulation_dtype, check_floating, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels._library import Later, Operator
from eosin.kernels._products import product_dtype
from eosin.kernels.few_query_attention import reference, torch_impl
from eosin.kernels.few_query_attention.torch_impl import Projection
from eosin.kernels.segment_pool import attention_pool

FUSED_QUERIES = 128  # most folded queries whose scores are held for all instances on a GPU
_triton = Later("eosin.kernels.few_query_attention.triton_impl")


def few_query_attention(
    queries: Tensor,
    values: Tensor,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    heads: int,
    scale: float,
) -> Tensor:
    """Let a few queries, the same for all bags, read every bag: pooling by attention, inducing points.

    Parameters
    ----------
    queries : (M, E) floating
        Projected queries.
    values : (N, D) floating
        Instances.
    k_weight, k_bias : (E, D), (E,) or None
        Projection of the instances to keys.
    v_weight, v_bias : (F, D), (F,) or None
        Projection of the instances to what is read.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.
    heads : int
        Slices of E and of F that attend apart.
    scale : float
        Factor of the scores; the Set Transformer takes ``E ** -0.5``, not the head's width.

    Returns
    -------
    (B, M, F)
        float32 at least; 0 for an empty bag. Differentiable in all tensors. Memory is that of a block of instances for
        any M; where M·heads is small beside D, neither keys nor values of the instances are formed.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, a width that the heads do not divide, inconsistent offsets.
    """
    check_floating("values", values, ("N", "D"))
    width = values.shape[1]
    check_floating("queries", queries, ("M", "E"), values)
    check_floating("k_weight", k_weight, (queries.shape[1], width), values)
    check_floating("v_weight", v_weight, ("F", width), values)
    for name, bias, size in (("k_bias", k_bias, k_weight.shape[0]), ("v_bias", v_bias, v_weight.shape[0])):
        if bias is not None:
            check_floating(name, bias, (size,), values)
    _check_heads(heads, queries=queries.shape[1], v_weight=v_weight.shape[0])
    check_offsets(cu_seqlens, values.shape[0], values)
    backend = choose(values)
    tensors = (queries, values, k_weight, k_bias, v_weight, v_bias, cu_seqlens)
    if backend == "reference" or 0 in (queries.shape[0], queries.shape[1], v_weight.shape[0], width):
        return reference.few_query_attention(*tensors, heads=heads, scale=scale)
    query, dtype = _scaled_query(queries, values, heads, scale), product_dtype(values, k_weight)
    if folds(queries, k_weight, v_weight, heads):
        read, lse = _read_folded(query, values, k_weight, v_weight, cu_seqlens, dtype, fused=backend == "triton")
    else:
        read, lse = _read(query, values, k_weight, v_weight, cu_seqlens, dtype, backend="torch")
    out: Tensor = read.transpose(1, 2).flatten(2)
    if k_bias is not None:
        out = out + 0 * k_bias.sum()  # its gradient is 0, not missing
    if v_bias is None:
        return out
    seen = (lse.flatten(1)[:, :1] > NEVER).to(out.dtype)  # an empty bag reads nothing, not even the bias
    return out + v_bias.to(out.dtype) * seen[:, :, None]


def few_key_attention(
    queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, *, heads: int, scale: float
) -> Tensor:
    """Let every instance read the few keys of its own bag: the way back from inducing points.

    Parameters
    ----------
    queries : (N, E) floating
        Projected instances.
    keys : (B, M, E) floating
        Keys of each bag.
    values : (B, M, F) floating
        What is read from them.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``queries``.
    heads : int
        Slices of E and of F that attend apart.
    scale : float
        Factor of the scores.

    Returns
    -------
    (N, F)
        float32 at least. Differentiable in all tensors. Memory is that of a block of instances. On a GPU, more than
        128 keys (16 in float32), or heads wider than 64, go by blocks of torch.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, a width that the heads do not divide, inconsistent offsets.
    """
    check_floating("queries", queries, ("N", "E"))
    check_offsets(cu_seqlens, queries.shape[0], queries)
    n_bags = cu_seqlens.shape[0] - 1
    check_floating("keys", keys, (n_bags, "M", queries.shape[1]), queries)
    check_floating("values", values, (n_bags, keys.shape[1], "F"), queries)
    _check_heads(heads, queries=queries.shape[1], values=values.shape[2])
    backend = choose(queries, keys, values)
    if backend == "reference" or 0 in (n_bags, keys.shape[1], queries.shape[1], values.shape[2]):
        return reference.few_key_attention(queries, keys, values, cu_seqlens, heads=heads, scale=scale)
    dtype = product_dtype(queries, keys)
    out: Tensor = _read_keys(queries, keys, values, cu_seqlens, heads, scale, dtype, backend=backend)
    return out


def folds(queries: Tensor, k_weight: Tensor, v_weight: Tensor, heads: int) -> bool:
    """Return whether folded queries take fewer operations per instance than projecting it."""
    width = k_weight.shape[1]
    return 2 * len(queries) * heads * width <= (width + len(queries)) * (len(k_weight) + len(v_weight))


def _scaled_query(queries: Tensor, values: Tensor, heads: int, scale: float) -> Tensor:
    """Return the queries by heads, in the type of the sums: (M, E) -> (H, M, E / H)."""
    wide = queries.to(accumulation_dtype(values.dtype))
    return wide.reshape(len(queries), heads, -1).transpose(0, 1) * scale


def _read_folded(
    query: Tensor,
    values: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    cu_seqlens: Tensor,
    dtype: torch.dtype,
    *,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Return what queries read (B, H, M, F / H) and the log-sum-exp of their scores (B, H·M)."""
    heads, n_queries, width = query.shape
    keys = k_weight.to(query.dtype).reshape(heads, width, -1)
    folded = torch.einsum("hme,hed->hmd", query, keys).flatten(0, 1)
    if fused and len(folded) <= FUSED_QUERIES:
        scores = (values.to(dtype) @ folded.to(dtype).T).to(folded.dtype)
        pooled, lse, _ = attention_pool(scores, values, cu_seqlens)
    else:
        pooled, lse = (
            found[:, 0] for found in _read(folded[None], values, None, None, cu_seqlens, dtype, backend="torch")
        )
    pooled = pooled.reshape(-1, heads, n_queries, values.shape[1])
    return torch.einsum("bhmd,hfd->bhmf", pooled, v_weight.to(query.dtype).reshape(heads, -1, values.shape[1])), lse


def _check_heads(heads: int, **widths: int) -> None:
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, given {heads}")
    for name, width in widths.items():
        if width % heads:
            raise ValueError(f"{name}: expected a width that {heads} heads divide, given {width}")


def _prepared_read(
    query: Tensor,
    values: Tensor,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    cu_seqlens: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Projection, Tensor, torch.dtype]:
    return query, values, Projection.make(k_weight, v_weight, len(query), dtype), cu_seqlens, dtype


def _empty_read(
    query: Tensor, values: Tensor, projection: Projection, cu_seqlens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    sizes = (cu_seqlens.shape[0] - 1, *query.shape[:2])
    return query.new_empty((*sizes, projection.width_of(values))), query.new_empty(sizes)


_read = Operator(
    "shared_query_attention",
    "(Tensor query, Tensor values, Tensor? k_weight, Tensor? v_weight, Tensor cu_seqlens, ScalarType product_dtype) "
    "-> (Tensor read, Tensor lse)",
    reference=reference.shared_query_attention,
    differentiable=4,
    prepare=_prepared_read,
    empty=_empty_read,
    reads_results=True,
    torch=(torch_impl.read_forward, torch_impl.read_backward),
)
_read_keys = Operator(
    "few_key_attention",
    "(Tensor queries, Tensor keys, Tensor values, Tensor cu_seqlens, int heads, float scale, "
    "ScalarType product_dtype) -> Tensor",
    reference=reference.few_key_attention,
    differentiable=3,
    empty=lambda queries, keys, values, *_: queries.new_empty(
        (queries.shape[0], values.shape[2]), dtype=accumulation_dtype(queries.dtype)
    ),
    torch=(torch_impl.key_forward, torch_impl.key_backward),
    triton=(_triton.key_forward, _triton.key_backward),
)

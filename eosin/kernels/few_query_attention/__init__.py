"""Attention between a bag and a few learned vectors, in both directions."""

import torch
from torch import Tensor

from eosin.kernels._checks import check_floating, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels._products import product_dtype
from eosin.kernels.few_query_attention import ops, reference, torch_impl


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
    return torch_impl.few_query_attention(*tensors, heads=heads, scale=scale, fused=backend == "triton")


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
    if backend == "triton" and not _fits_a_program(keys, values, heads, dtype):
        backend = "torch"  # blocks of library products do as well where tiles are this large
    out: Tensor = ops.few_key_attention(queries, keys, values, cu_seqlens, heads, scale, dtype, backend)
    return out


def _fits_a_program(keys: Tensor, values: Tensor, heads: int, dtype: torch.dtype) -> bool:
    from eosin.kernels.few_query_attention import triton_impl

    return triton_impl.fits(keys.shape[1], keys.shape[2] // heads, values.shape[2] // heads, dtype)


def _check_heads(heads: int, **widths: int) -> None:
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, given {heads}")
    for name, width in widths.items():
        if width % heads:
            raise ValueError(f"{name}: expected a width that {heads} heads divide, given {width}")

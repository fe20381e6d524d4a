"""Attention scores of instances, plain or gated, and the pooled bag with its log-sum-exp and entropy."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from eosin.kernels._checks import (
    check_bool,
    check_floating,
    check_no_nan,
    check_offsets,
    check_same_dtype,
    check_unit_interval,
)
from eosin.kernels._dispatch import choose
from eosin.kernels._dropout import EMBEDDING_BRANCH, draw_seed, dropped
from eosin.kernels._products import product_dtype
from eosin.kernels._rows import check_row_index, gathered
from eosin.kernels.gated_attention import one_pass, ops, reference
from eosin.kernels.segment_pool import ops as pool_ops


class AttentionPool(NamedTuple):
    """What `gated_attention_pool` returns: ``scores (N, H)``, ``pooled (B, H, D)``, ``lse`` and ``entropy (B, H)``."""

    scores: Tensor
    pooled: Tensor
    lse: Tensor
    entropy: Tensor


def gated_attention_scores(
    values: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    gate_dropout: float = 0.0,
    generator: torch.Generator | None = None,
    activation: str = "tanh",
    memory_budget: int | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """Score every instance for every head: ``w · (act(V x + b_V) ⊙ σ(U x + b_U)) + b``.

    Parameters
    ----------
    values : (N, D) floating
        Instances.
    v_weight, v_bias : (A, D), (A,) or None
        Projection under the activation.
    u_weight, u_bias : (A, D) or None, (A,) or None
        Projection of the gate; without it the attention is plain.
    w_weight, w_bias : (H, A), (H,) or None
        One row per head or branch.
    gate_dropout : float, optional
        Chance of an entry of either projection to be dropped; 0 outside training.
    generator : torch.Generator, optional
        Draws the seed of the dropout mask, which is a hash of seed, row and column, equal on all devices.
    activation : {"tanh", "relu"}, optional
        Activation of the first projection.
    memory_budget : int, optional
        Bytes that may be kept between the forward and the backward pass, without limit unless given. What does not
        fit is computed again.
    row_index : (M,) int64, optional
        Instance i is row ``row_index[i]`` of ``values``: a subset or another order without a copy of it. N is then M
        in all other shapes.

    Returns
    -------
    (N, H)
        Unnormalised attention, float32 at least. Differentiable in all tensors.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device; the message names the argument.
    """
    check_floating("values", values, ("N", "D"))
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    _check_gate(values, values.shape[1], *parameters)
    _check_options(activation, gate_dropout=gate_dropout)
    n_rows = check_row_index(row_index, values)
    seed = draw_seed(generator) if gate_dropout else 0
    backend = choose(values)
    if backend == "reference":
        return reference.gated_attention_scores(
            gathered(values, row_index), *parameters, gate_dropout=gate_dropout, seed=seed, activation=activation
        )
    dtype = product_dtype(values, v_weight)
    _, keep_branches = _what_fits(memory_budget, n_rows, dtype, None, v_weight, u_weight)
    scores: Tensor
    scores, _ = ops.gated_scores(
        values, *parameters, row_index, gate_dropout, seed, activation, keep_branches, dtype, backend
    )
    return scores


def gated_attention_pool(
    values: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    score_mask: Tensor | None = None,
    keep: Tensor | None = None,
    gate_dropout: float = 0.0,
    generator: torch.Generator | None = None,
    activation: str = "tanh",
    embed_weight: Tensor | None = None,
    embed_bias: Tensor | None = None,
    embed_dropout: float = 0.0,
    memory_budget: int | None = None,
    row_index: Tensor | None = None,
) -> AttentionPool:
    """Score the instances and pool each bag with the softmax of the scores.

    Parameters
    ----------
    values, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, gate_dropout, generator, activation, memory_budget,
    row_index
        As in `gated_attention_scores`; D is E where the instances are embedded.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.
    temperature : float or scalar tensor, optional
        Divides the scores; differentiable when a tensor.
    score_mask : (N,) or (N, H) floating, optional
        Added to the scores after the temperature; differentiable.
    keep : (N,) or (N, H) bool, optional
        False gives the instance a score of -inf.
    embed_weight, embed_bias : (E, D), (E,) or None, optional
        Score and pool ``h = dropout(relu(W x + b))`` instead of x, without h of all instances in memory at once.
    embed_dropout : float, optional
        Chance of an entry of h to be dropped; 0 outside training.

    Returns
    -------
    AttentionPool
        ``scores (N, H)`` after temperature and masks, ``pooled (B, H, D or E)``, ``lse (B, H)``, ``entropy (B, H)``;
        float32 at least, all differentiable. An empty or fully masked bag pools to 0 with entropy 0 and lse -inf.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets; the message names the argument.
    """
    width = _check_embedding(values, embed_weight, embed_bias)
    n_rows = check_row_index(row_index, values)
    check_offsets(cu_seqlens, n_rows, values)
    gate = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    _check_gate(values, width, *gate)
    _check_options(activation, gate_dropout=gate_dropout, embed_dropout=embed_dropout)
    _check_masks((n_rows, w_weight.shape[0]), values, temperature, score_mask, keep)
    seed = draw_seed(generator) if gate_dropout or embed_dropout else 0
    divisor = temperature if isinstance(temperature, Tensor) else values.new_tensor(temperature, dtype=torch.float64)
    tensors = (embed_weight, embed_bias, *gate, divisor, score_mask, keep, cu_seqlens)
    backend = choose(values)
    if backend == "reference":
        return AttentionPool(
            *reference.gated_attention_pool(
                gathered(values, row_index),
                *tensors,
                embed_dropout=embed_dropout,
                gate_dropout=gate_dropout,
                seed=seed,
                activation=activation,
            )
        )
    dtype = product_dtype(values, v_weight)
    keep_instances, keep_branches = _what_fits(memory_budget, n_rows, dtype, embed_weight, v_weight, u_weight)
    if backend == "triton":
        instances, index = values, row_index
        if embed_weight is not None:
            rows = gathered(values, row_index)
            instances, index = _embedded(rows, embed_weight, embed_bias, embed_dropout, seed, dtype), None
        if not gate_dropout and one_pass.pays((instances, *gate, divisor, score_mask), dtype):
            added = _added_to_scores(score_mask, keep)
            return AttentionPool(
                *one_pass.one_pass_pool(instances, *gate, divisor, added, cu_seqlens, index, activation, dtype)
            )
        raw, _ = ops.gated_scores(
            instances, *gate, index, gate_dropout, seed, activation, keep_branches, dtype, backend
        )
        scores = reference.masked_scores(raw, divisor, score_mask, keep)
        return AttentionPool(scores, *pool_ops.attention_pool(scores, instances, cu_seqlens, index, backend))
    results = ops.gated_pool(
        values, *tensors, row_index, embed_dropout, keep_instances, gate_dropout, seed, activation, keep_branches, dtype
    )
    return AttentionPool(*results[:4])


def _added_to_scores(score_mask: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """Return both masks of one head as what is added to its scores, (N,)."""
    added = None if score_mask is None else score_mask.flatten().to(torch.float32)
    if keep is None:
        return added
    never = torch.zeros(len(keep), device=keep.device).masked_fill_(~keep.flatten(), float("-inf"))
    return never if added is None else never + added


def _embedded(
    values: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor | None,
    dropout: float,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the embedded instances of the whole pack; on a GPU the library's product is hard to better."""
    bias = None if embed_bias is None else embed_bias.to(dtype)
    embedded = torch.relu(linear(values.to(dtype), embed_weight.to(dtype), bias))
    return dropped(embedded, seed, dropout, branch=EMBEDDING_BRANCH)


def _what_fits(
    budget: int | None,
    n_rows: int,
    dtype: torch.dtype,
    embed_weight: Tensor | None,
    v_weight: Tensor,
    u_weight: Tensor | None,
) -> tuple[bool, bool]:
    """Return whether embedded instances and branches may be kept; each saves as much work per byte as the other."""
    left = float("inf") if budget is None else budget
    size = n_rows * dtype.itemsize
    instances = 0 if embed_weight is None else size * embed_weight.shape[0]
    branches = size * v_weight.shape[0] * (1 if u_weight is None else 2)
    keeps_instances = 0 < instances <= left
    return keeps_instances, branches <= left - instances * keeps_instances


def _check_gate(
    values: Tensor,
    width: int,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
) -> None:
    check_floating("v_weight", v_weight, ("A", width), values)
    hidden = v_weight.shape[0]
    check_floating("w_weight", w_weight, ("H", hidden), values)
    if u_weight is not None:
        check_floating("u_weight", u_weight, (hidden, width), values)
    elif u_bias is not None:
        raise ValueError("u_bias: expected None because u_weight is None, given a tensor")
    sized = {"v_bias": (v_bias, hidden), "u_bias": (u_bias, hidden), "w_bias": (w_bias, w_weight.shape[0])}
    for name, (bias, size) in sized.items():
        if bias is not None:
            check_floating(name, bias, (size,), values)
    check_same_dtype(
        v_weight=v_weight, v_bias=v_bias, u_weight=u_weight, u_bias=u_bias, w_weight=w_weight, w_bias=w_bias
    )


def _check_embedding(values: Tensor, embed_weight: Tensor | None, embed_bias: Tensor | None) -> int:
    """Return the width of the instances that are scored and pooled."""
    check_floating("values", values, ("N", "D"))
    if embed_weight is None:
        if embed_bias is not None:
            raise ValueError("embed_bias: expected None because embed_weight is None, given a tensor")
        return values.shape[1]
    check_floating("embed_weight", embed_weight, ("E", values.shape[1]), values)
    if embed_bias is not None:
        check_floating("embed_bias", embed_bias, (embed_weight.shape[0],), values)
    return embed_weight.shape[0]


def _check_options(activation: str, **dropouts: float) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected tanh or relu, given {activation!r}")
    for name, probability in dropouts.items():
        check_unit_interval(name, probability)


def _check_masks(
    shape: tuple[int, int],
    values: Tensor,
    temperature: float | Tensor,
    score_mask: Tensor | None,
    keep: Tensor | None,
) -> None:
    if isinstance(temperature, Tensor):
        check_floating("temperature", temperature, (), values)
    elif not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, given {temperature}")
    if score_mask is not None:
        check_floating("score_mask", score_mask, shape[: score_mask.dim()], values)
        check_no_nan("score_mask", score_mask)
    if keep is not None:
        check_bool("keep", keep, shape[: keep.dim()], values)

"""Attention scores of instances, plain or gated, and the pooled bag with its log-sum-exp and entropy."""

from typing import NamedTuple

import torch
from torch import Tensor

from eosin.kernels._checks import (
    check_bool,
    check_floating,
    check_no_nan,
    check_offsets,
    check_same_dtype,
    check_unit_interval,
)
from eosin.kernels._dispatch import choose
from eosin.kernels.gated_attention import reference, torch_impl
from eosin.kernels.gated_attention.dropout import draw_seed
from eosin.kernels.segment_pool import attention_pool


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

    Returns
    -------
    (N, H)
        Unnormalised attention, float32 at least. Differentiable in all tensors.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device; the message names the argument.
    """
    _check_parameters(values, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    check_unit_interval("gate_dropout", gate_dropout)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: expected tanh or relu, given {activation!r}")
    seed = draw_seed(generator) if gate_dropout else 0
    implementation = reference if choose(values) == "reference" else torch_impl
    scores: Tensor = implementation.gated_attention_scores(
        values,
        v_weight,
        v_bias,
        u_weight,
        u_bias,
        w_weight,
        w_bias,
        gate_dropout=gate_dropout,
        seed=seed,
        activation=activation,
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
) -> AttentionPool:
    """Score the instances and pool each bag with the softmax of the scores.

    Parameters
    ----------
    values, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, gate_dropout, generator, activation
        As in `gated_attention_scores`.
    cu_seqlens : (B+1,) int32
        Offsets of the bags, on the device of ``values``.
    temperature : float or scalar tensor, optional
        Divides the scores; differentiable when a tensor.
    score_mask : (N,) or (N, H) floating, optional
        Added to the scores after the temperature; differentiable.
    keep : (N,) or (N, H) bool, optional
        False gives the instance a score of -inf.

    Returns
    -------
    AttentionPool
        ``scores (N, H)`` after temperature and masks, ``pooled (B, H, D)``, ``lse (B, H)`` and ``entropy (B, H)``;
        float32 at least, all differentiable. An empty or fully masked bag pools to 0 with entropy 0 and lse -inf.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets; the message names the argument.
    """
    check_floating("values", values, ("N", "D"))
    check_offsets(cu_seqlens, values.shape[0], values)
    raw = gated_attention_scores(
        values,
        v_weight,
        v_bias,
        u_weight,
        u_bias,
        w_weight,
        w_bias,
        gate_dropout=gate_dropout,
        generator=generator,
        activation=activation,
    )
    _check_masks(raw, temperature, score_mask, keep)
    scores = reference.masked_scores(raw, temperature, score_mask, keep)
    return AttentionPool(scores, *attention_pool(scores, values, cu_seqlens))


def _check_parameters(
    values: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
) -> None:
    check_floating("values", values, ("N", "D"))
    check_floating("v_weight", v_weight, ("A", values.shape[1]), values)
    hidden = v_weight.shape[0]
    check_floating("w_weight", w_weight, ("H", hidden), values)
    if u_weight is not None:
        check_floating("u_weight", u_weight, (hidden, values.shape[1]), values)
    elif u_bias is not None:
        raise ValueError("u_bias: expected None because u_weight is None, given a tensor")
    sized = {"v_bias": (v_bias, hidden), "u_bias": (u_bias, hidden), "w_bias": (w_bias, w_weight.shape[0])}
    for name, (bias, size) in sized.items():
        if bias is not None:
            check_floating(name, bias, (size,), values)
    check_same_dtype(
        v_weight=v_weight, v_bias=v_bias, u_weight=u_weight, u_bias=u_bias, w_weight=w_weight, w_bias=w_bias
    )


def _check_masks(scores: Tensor, temperature: float | Tensor, score_mask: Tensor | None, keep: Tensor | None) -> None:
    if isinstance(temperature, Tensor):
        check_floating("temperature", temperature, ())
    elif not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, given {temperature}")
    shape = scores.shape
    if score_mask is not None:
        check_floating("score_mask", score_mask, shape[: score_mask.dim()], scores)
        check_no_nan("score_mask", score_mask)
    if keep is not None:
        check_bool("keep", keep, shape[: keep.dim()], scores)

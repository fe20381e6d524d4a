"""What a model that pools by attention scores would say without one instance, or without one after the other."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eosin.kernels._checks import check_floating, check_no_nan, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels.leave_one_out import reference, torch_impl


class GreedyPath(NamedTuple):
    """What `greedy_removal` found: ``order (R,)`` of the instances that left, ``logits (R + 1, K)`` along the way.

    Attributes
    ----------
    order : (R,) int64
        Instances in the order of their removal.
    logits : (R + 1, K) float
        Logits before the first removal and after each.
    """

    order: Tensor
    logits: Tensor


def leave_one_out(scores: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """Return the logits of each bag without each of its instances.

    For ``logits_k = Σ_h C_kh · z_h + b_k`` on bags pooled with softmax(scores).

    Parameters
    ----------
    scores : (N, H) floating
        Unnormalised attention.
    values : (N, D) floating
        Instances that the attention pools.
    weight : (K, H, D) floating
        The linear head: C; one plane per output. A mean over branches has ``weight / H`` in each.
    bias : (K,) floating or None
        Its bias.
    cu_seqlens : (B+1,) int32
        Offsets of the bags.

    Returns
    -------
    (N, K)
        float32 at least. Without its only instance a bag pools to 0, and its logits are the bias. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets, NaN in a score on the CPU.
    """
    _check(scores, values, cu_seqlens)
    _check_head(scores, values, weight, bias)
    with torch.no_grad():
        if choose(scores, values) == "reference":
            return reference.leave_one_out(scores, values, weight, bias, cu_seqlens)
        return torch_impl.leave_one_out(scores, values, weight, bias, cu_seqlens)


def pooled_without(scores: Tensor, values: Tensor, cu_seqlens: Tensor, *, instances: Tensor | None = None) -> Tensor:
    """Return each bag pooled without one instance, for models whose head is not linear.

    Parameters
    ----------
    scores : (N, H) floating
        Unnormalised attention.
    values : (N, D) floating
        Instances that the attention pools.
    cu_seqlens : (B+1,) int32
        Offsets of the bags.
    instances : (M,) int64, optional
        Rows of the pack to leave out, one at a time; all of them unless given. Pass slices to bound the memory.

    Returns
    -------
    (M, H, D)
        float32 at least. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets, NaN in a score on the CPU, a row outside the pack.
    """
    _check(scores, values, cu_seqlens)
    if instances is None:
        instances = torch.arange(values.shape[0], device=values.device)
    if instances.dtype != torch.int64 or instances.dim() != 1:
        raise ValueError(f"instances: expected int64 (M,), given {instances.dtype} {tuple(instances.shape)}")
    if len(instances) and not (int(instances.min()) >= 0 and int(instances.max()) < values.shape[0]):
        raise ValueError(f"instances: expected rows in [0, {values.shape[0]}), given some outside")
    with torch.no_grad():
        if choose(scores, values) == "reference":
            return reference.pooled_without(scores, values, cu_seqlens)[instances]
        return torch_impl.pooled_without(scores, values, cu_seqlens, instances)


def greedy_removal(
    scores: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rounds: int,
    objective: Callable[[Tensor, Tensor], Tensor],
) -> GreedyPath:
    """Remove, round after round, the instance of one bag whose absence makes the objective smallest.

    Parameters
    ----------
    scores : (n, H) floating
        Unnormalised attention of one bag.
    values : (n, D) floating
        Its instances.
    weight, bias
        As in `leave_one_out`.
    rounds : int
        R, from 0 to n.
    objective : callable
        Maps the logits without each candidate (n, K) and the logits now (K,) to one number each (n,); the candidate
        with the smallest leaves, the earliest on ties.

    Returns
    -------
    GreedyPath
        Instances in the order of leaving, and the logits before the first and after each round.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, rounds outside [0, n], NaN in a score on the CPU.
    """
    offsets = torch.tensor([0, values.shape[0]], dtype=torch.int32, device=values.device)
    _check(scores, values, offsets)
    _check_head(scores, values, weight, bias)
    if not 0 <= rounds <= values.shape[0]:
        raise ValueError(f"rounds: expected from 0 to the {values.shape[0]} instances, given {rounds}")
    choose(scores, values)
    with torch.no_grad():
        shares = torch_impl.head_shares(values, weight)
        offset = shares.new_zeros(len(weight)) if bias is None else bias.to(shares.dtype)
        return GreedyPath(*torch_impl.greedy_removal(scores.to(shares.dtype), shares, offset, rounds, objective))


def _check(scores: Tensor, values: Tensor, cu_seqlens: Tensor) -> None:
    check_floating("values", values, ("N", "D"))
    check_floating("scores", scores, (values.shape[0], "H"), values)
    check_no_nan("scores", scores)
    check_offsets(cu_seqlens, values.shape[0], values)


def _check_head(scores: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("weight", weight, ("K", scores.shape[1], values.shape[1]), values)
    if bias is not None:
        check_floating("bias", bias, (weight.shape[0],), values)

"""Attention scores of instances, plain or gated, and the pooled bag with its log-sum-exp and entropy."""

from typing import Any, NamedTuple

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
from eosin.kernels._library import Later, Operator
from eosin.kernels._products import product_dtype
from eosin.kernels._rows import Rows, check_row_index, gathered
from eosin.kernels.embedding.torch_impl import Embedding
from eosin.kernels.gated_attention import reference, torch_impl
from eosin.kernels.gated_attention.torch_impl import Gate, Kept, Masks, Pooling
from eosin.kernels.segment_pool import attention_pooling

SMALL_HIDDEN = {True: 96, False: 192}  # gated or not: up to here projecting again is cheaper than keeping
MOST_WIDTH = 1024  # of an instance: a program holds its sum in registers
_triton = Later("eosin.kernels.gated_attention.triton_impl")


class AttentionPool(NamedTuple):
    """What `gated_attention_pool` returns: ``scores (N, H)``, ``pooled (B, H, D)``, ``lse`` and ``entropy (B, H)``.

    Attributes
    ----------
    scores : (N, H) float
        Attention scores before the softmax.
    pooled : (B, H, D) float
        Weighted mean of the values of each bag.
    lse : (B, H) float
        Log-sum-exp of the scores of each bag.
    entropy : (B, H) float
        Entropy of the attention of each bag in nats.
    """

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
    dtype = product_dtype(values, v_weight)
    _, keep_branches = _what_fits(memory_budget, n_rows, dtype, None, v_weight, u_weight)
    options = (gate_dropout, seed, activation, keep_branches, dtype)
    scores: Tensor = _scores(values, *parameters, row_index, *options, backend=choose(values))
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
    backend, dtype = choose(values), product_dtype(values, v_weight)
    keep_instances, keep_branches = _what_fits(memory_budget, n_rows, dtype, embed_weight, v_weight, u_weight)
    instances, index, embedding = values, row_index, (embed_weight, embed_bias)
    if backend == "triton" and embed_weight is not None:
        rows = gathered(values, row_index)
        instances, index = _embedded(rows, embed_weight, embed_bias, embed_dropout, seed, dtype), None
        embedding, keep_instances = (None, None), False
    if backend == "triton" and (gate_dropout or not one_pass_pays((instances, *gate, divisor, score_mask), dtype)):
        options = (gate_dropout, seed, activation, keep_branches, dtype)
        raw = _scores(instances, *gate, index, *options, backend=backend)
        scores = reference.masked_scores(raw, divisor, score_mask, keep)
        return AttentionPool(scores, *attention_pooling(scores, instances, cu_seqlens, index, backend=backend))
    tensors = (instances, *embedding, *gate, divisor, score_mask, keep, cu_seqlens, index)
    keep_branches = keep_branches and backend != "triton"  # one pass projects again
    options = (gate_dropout, seed, activation, keep_branches, dtype)
    return AttentionPool(*_pool(*tensors, embed_dropout, keep_instances, *options, backend=backend))


def one_pass_pays(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> bool:
    """Return whether a GPU had better score and pool in one kernel, which reads the instances once from memory.

    A projection costs A/92 times as long as reading the instances (gated, in half precision on an H200), and the
    backward pass projects again: one kernel for everything pays where A is small, or where no gradient is asked for.
    It takes one head, products in half precision, and instances that fit.

    Parameters
    ----------
    tensors : tuple of Tensor or None
        Values, the six tensors of the gate, and others that may need a gradient.
    dtype : torch.dtype
        Type of the products.
    """
    values, v_weight, _, u_weight, _, w_weight = tensors[:6]
    assert values is not None
    assert v_weight is not None
    assert w_weight is not None
    fits = len(w_weight) == 1 and values.shape[1] <= MOST_WIDTH and dtype in (torch.float16, torch.bfloat16)
    needs_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return fits and (not needs_grad or len(v_weight) <= SMALL_HIDDEN[u_weight is not None])


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


_N_GATE = 6  # v_weight, v_bias, u_weight, u_bias, w_weight, w_bias
_GATE = "Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, Tensor w_weight, Tensor? w_bias"
_OPTIONS = "float gate_dropout, int seed, str activation, bool keep_branches, ScalarType product_dtype"


def _prepared_scores(values: Tensor, *arguments: Any) -> tuple[Rows, Gate, bool]:
    gate, (index, dropout, seed, activation, keep_branches, dtype) = arguments[:_N_GATE], arguments[_N_GATE:]
    return Rows(values, index), Gate.make(gate, dropout, seed, activation, dtype), keep_branches


def _empty_scores(source: Rows, gate: Gate, keep_branches: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
    kept = Kept.make(source, gate, instances=False, branches=keep_branches)
    return gate.w_weight.new_empty((len(source), len(gate.w_weight))), kept.branches


def _prepared_pool(values: Tensor, *arguments: Any) -> tuple[Pooling]:
    embedding, gate, rest = arguments[:2], arguments[2 : 2 + _N_GATE], arguments[2 + _N_GATE :]
    temperature, score_mask, keep, cu_seqlens, index, embed_dropout, keep_instances, *options = rest
    gate_dropout, seed, activation, keep_branches, dtype = options
    hidden = Gate.make(gate, gate_dropout, seed, activation, dtype)
    wide = hidden.w_weight.dtype
    pooling = Pooling(
        Rows(values, index),
        Embedding.make(*embedding, dropout=embed_dropout, seed=seed, dtype=dtype),
        hidden,
        Masks(temperature.to(wide), None if score_mask is None else score_mask.to(wide), keep),
        cu_seqlens,
        keep_instances,
        keep_branches,
    )
    return (pooling,)


def _empty_pool(pooling: Pooling) -> tuple[Tensor, ...]:
    (heads, _), width = pooling.gate.w_weight.shape, pooling.gate.v_weight.shape[1]
    n_bags, kept = pooling.cu_seqlens.shape[0] - 1, pooling.new_kept()
    sizes = ((len(pooling.values), heads), (n_bags, heads, width), (n_bags, heads), (n_bags, heads))
    return *(pooling.gate.w_weight.new_empty(size) for size in sizes), kept.instances, kept.branches


_scores = Operator(
    "gated_scores",
    f"(Tensor values, {_GATE}, Tensor? row_index, {_OPTIONS}) -> (Tensor scores, Tensor branches)",
    reference=reference.gated_attention_scores,
    differentiable=1 + _N_GATE,
    prepare=_prepared_scores,
    empty=_empty_scores,
    kept=1,
    torch=(torch_impl.score_forward, torch_impl.score_backward),
    triton=(_triton.score_forward, _triton.score_backward),
)
_pool = Operator(
    "gated_pool",
    f"(Tensor values, Tensor? embed_weight, Tensor? embed_bias, {_GATE}, Tensor temperature, Tensor? score_mask, "
    f"Tensor? keep, Tensor cu_seqlens, Tensor? row_index, float embed_dropout, bool keep_instances, {_OPTIONS}) -> "
    "(Tensor scores, Tensor pooled, Tensor lse, Tensor entropy, Tensor instances, Tensor branches)",
    reference=reference.gated_attention_pool,
    differentiable=3 + _N_GATE + 2,
    prepare=_prepared_pool,
    empty=_empty_pool,
    kept=2,
    reads_results=True,
    torch=(torch_impl.pool_forward, torch_impl.pool_backward),
    triton=(_triton.one_pass, _triton.one_pass_backward),
)

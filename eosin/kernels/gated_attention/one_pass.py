"""Scoring and pooling on a GPU with one read of the instances from memory, as a `torch.library` operator.

A projection costs A/92 times as long as reading the instances (gated, in half precision on an H200), so that one kernel
for everything pays where A is small, and at inference, where nothing is kept for a backward pass. The backward pass
projects again, in chunks.
"""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._library import Operator
from eosin.kernels._rows import Rows, gathered
from eosin.kernels.gated_attention import reference
from eosin.kernels.gated_attention.ops import N_GATE, dense, make_gate

SMALL_HIDDEN = {True: 96, False: 192}  # gated or not: up to here projecting again is cheaper than keeping
MOST_WIDTH = 1024  # of an instance: a program holds its sum in registers
_GATE = "Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, Tensor w_weight, Tensor? w_bias"
_INPUTS = (
    f"Tensor values, {_GATE}, Tensor temperature, Tensor? added, Tensor cu_seqlens, "
    "Tensor? row_index, str activation, ScalarType product_dtype"
)
_N_TENSORS = 1 + N_GATE + 4


def pays(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> bool:
    """Return whether one pass is the better plan for ``(values, six tensors of the gate, others that may need grad)``.

    One head, products in half precision, instances that fit; and a small hidden layer, or no gradient asked for.
    """
    values, v_weight, _, u_weight, _, w_weight = tensors[:6]
    assert values is not None
    assert v_weight is not None
    assert w_weight is not None
    fits = len(w_weight) == 1 and values.shape[1] <= MOST_WIDTH and dtype in (torch.float16, torch.bfloat16)
    needs_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return fits and (not needs_grad or len(v_weight) <= SMALL_HIDDEN[u_weight is not None])


def _run(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from eosin.kernels.gated_attention import triton_impl

    values, temperature, added, cu_seqlens, index, activation, dtype = inputs[0], *inputs[1 + N_GATE :]
    source = Rows(values, index)
    gate = make_gate(inputs[1 : 1 + N_GATE], 0.0, 0, activation, dtype)
    return triton_impl.one_pass(source, gate, temperature, added, cu_seqlens)


def _run_backward(
    grads: list[Tensor],
    results: list[Tensor],
    needs_values: bool,  # noqa: FBT001
    *inputs: Any,
) -> list[Tensor]:
    """Return the gradients of values, the gate's six tensors, temperature and added."""
    from eosin.kernels.gated_attention import triton_impl
    from eosin.kernels.segment_pool import triton_impl as pool

    values, temperature, added, cu_seqlens, index, activation, dtype = inputs[0], *inputs[1 + N_GATE :]
    source = Rows(values, index)
    gate = make_gate(inputs[1 : 1 + N_GATE], 0.0, 0, activation, dtype)
    scores, temperature = results[0], temperature.to(torch.float32)
    d_scores, d_pooled_values = pool.backward((True, needs_values), grads[1:], results[1:], scores, source, cu_seqlens)
    assert d_scores is not None
    d_scores = torch.where(scores == float("-inf"), 0, d_scores + grads[0])
    unmasked = torch.where(scores == float("-inf"), 0, scores if added is None else scores - added[:, None])
    d_raw = d_scores / temperature
    d_values, (d_weight, d_bias, d_w) = triton_impl.score_backward(
        d_raw, source, gate, values.new_empty(0, 0), needs_values=needs_values
    )
    if d_values is not None and d_pooled_values is not None:
        d_values += d_pooled_values
    hidden = len(gate.v_weight)
    halves = [d_weight[:hidden], d_bias[:hidden], d_weight[hidden:], d_bias[hidden:]]
    found = [d_values, *halves, d_w, d_raw.sum(0), -(d_raw * unmasked).sum(), d_scores[:, 0]]
    return dense(found, inputs[: 1 + N_GATE + 2])


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, cu_seqlens, index = inputs[0], *inputs[_N_TENSORS - 2 : _N_TENSORS]
    n_bags = cu_seqlens.shape[0] - 1
    sizes = ((len(Rows(values, index)), 1), (n_bags, 1, values.shape[1]), (n_bags, 1), (n_bags, 1))
    scores, pooled, lse, entropy = (values.new_empty(size, dtype=torch.float32) for size in sizes)
    return scores, pooled, lse, entropy


def _fake_backward(
    grads: list[Tensor],
    results: list[Tensor],
    needs_values: bool,  # noqa: FBT001
    *inputs: Any,
) -> list[Tensor]:
    wanted = (inputs[0] if needs_values else None, *inputs[1 : 1 + N_GATE + 2])
    return [inputs[0].new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS], *output)
    ctx.options = inputs[_N_TENSORS:]


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    tensors, results = ctx.saved_tensors[:_N_TENSORS], ctx.saved_tensors[_N_TENSORS:]
    needs = ctx.needs_input_grad[: _N_TENSORS - 2]
    if torch.is_grad_enabled():  # a second derivative is asked for
        values, *gate, temperature, added, cu_seqlens, index = tensors
        arguments: list[Any] = [gathered(values, index), None, None, *gate, temperature, added, None, cu_seqlens]
        outputs = reference.gated_attention_pool(*arguments, activation=ctx.options[0])
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=False) if need]
        rest = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return *(next(rest) if need else None for need in needs), *(None,) * 4
    found = one_pass_pool_backward(list(grads), list(results), needs[0], *tensors, *ctx.options)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), *(None,) * 4


one_pass_pool = Operator(
    "one_pass_pool",
    f"({_INPUTS}) -> (Tensor scores, Tensor pooled, Tensor lse, Tensor entropy)",
    run=_run,
    fake=_fake,
)
one_pass_pool_backward = Operator(
    "one_pass_pool_backward",
    f"(Tensor[] grads, Tensor[] results, bool needs_values, {_INPUTS}) -> Tensor[]",
    run=_run_backward,
    fake=_fake_backward,
)
one_pass_pool.differentiate(_gradient, _save)

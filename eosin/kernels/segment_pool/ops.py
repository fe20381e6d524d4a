"""Attention pooling as a `torch.library` operator; second derivatives differentiate the plain definition."""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels.segment_pool import reference, torch_impl

_INPUTS = "Tensor scores, Tensor values, Tensor cu_seqlens"


def _backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs_scores: bool,  # noqa: FBT001
    needs_values: bool,  # noqa: FBT001
    *inputs: Tensor,
) -> list[Tensor]:
    found = torch_impl.backward((needs_scores, needs_values), upstream, results, *inputs)
    return [inputs[0].new_empty(0) if gradient is None else gradient for gradient in found]


def _fake_forward(scores: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (cu_seqlens.shape[0] - 1, scores.shape[1])
    dtype = accumulation_dtype(values.dtype)
    pooled = values.new_empty((*sizes, values.shape[1]), dtype=dtype)
    return pooled, values.new_empty(sizes, dtype=dtype), values.new_empty(sizes, dtype=dtype)


def _fake_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs_scores: bool,  # noqa: FBT001
    needs_values: bool,  # noqa: FBT001
    *inputs: Tensor,
) -> list[Tensor]:
    needs = (needs_scores, needs_values)
    return [
        torch.empty_like(tensor) if need else inputs[0].new_empty(0)
        for tensor, need in zip(inputs[:2], needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs, results = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # a second derivative is asked for
        wanted = [tensor for tensor, need in zip(inputs[:2], needs, strict=True) if need]
        outputs = reference.attention_pool(*inputs)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
        return *(next(found) if need else None for need in needs), None
    gradients = attention_pool_backward(list(grads), list(results), *needs, *inputs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None


attention_pool = Operator(
    "attention_pool",
    f"({_INPUTS}) -> (Tensor pooled, Tensor lse, Tensor entropy)",
    run=torch_impl.forward,
    fake=_fake_forward,
)
attention_pool_backward = Operator(
    "attention_pool_backward",
    f"(Tensor[] upstream, Tensor[] results, bool needs_scores, bool needs_values, {_INPUTS}) -> Tensor[]",
    run=_backward,
    fake=_fake_backward,
)
attention_pool.differentiate(_gradient, _save)

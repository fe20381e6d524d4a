"""Attention pooling as a `torch.library` operator; second derivatives differentiate the plain definition."""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels._rows import Rows, gathered
from eosin.kernels.segment_pool import reference, torch_impl

_INPUTS = "Tensor scores, Tensor values, Tensor cu_seqlens, Tensor? row_index, str backend"


def _forward(
    scores: Tensor, values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    source = Rows(values, row_index)
    if backend == "triton":
        from eosin.kernels.segment_pool import triton_impl

        return triton_impl.forward(scores, source, cu_seqlens)
    return torch_impl.forward(scores, source, cu_seqlens)


def _backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs_scores: bool,  # noqa: FBT001
    needs_values: bool,  # noqa: FBT001
    scores: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    backend: str,
) -> list[Tensor]:
    needs, source = (needs_scores, needs_values), Rows(values, row_index)
    if backend == "triton":
        from eosin.kernels.segment_pool import triton_impl

        found = triton_impl.backward(needs, upstream, results, scores, source, cu_seqlens)
    else:
        found = torch_impl.backward(needs, upstream, results, scores, source, cu_seqlens)
    return [scores.new_empty(0) if gradient is None else gradient for gradient in found]


def _fake_forward(
    scores: Tensor, values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (cu_seqlens.shape[0] - 1, scores.shape[1])
    dtype = accumulation_dtype(values.dtype)
    pooled = values.new_empty((*sizes, values.shape[1]), dtype=dtype)
    return pooled, values.new_empty(sizes, dtype=dtype), values.new_empty(sizes, dtype=dtype)


def _fake_backward(
    upstream: list[Tensor],
    results: list[Tensor],
    needs_scores: bool,  # noqa: FBT001
    needs_values: bool,  # noqa: FBT001
    scores: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    backend: str,
) -> list[Tensor]:
    wanted = zip((scores, values), (needs_scores, needs_values), strict=True)
    return [torch.empty_like(tensor) if need else scores.new_empty(0) for tensor, need in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.backend = inputs[4]


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    inputs, results = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # a second derivative is asked for
        wanted = [tensor for tensor, need in zip(inputs[:2], needs, strict=True) if need]
        outputs = reference.attention_pool(inputs[0], gathered(inputs[1], inputs[3]), inputs[2])
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None, None
    gradients = attention_pool_backward(list(grads), list(results), *needs, *inputs, ctx.backend)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None, None


def _weighted_forward(
    weights: Tensor, values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None, backend: str
) -> Tensor:
    source = Rows(values, row_index)
    if backend == "triton":
        from eosin.kernels.segment_pool import triton_impl

        return triton_impl.weighted_forward(weights, source, cu_seqlens)
    return torch_impl.weighted_forward(weights, source, cu_seqlens)


def _weighted_backward(
    grad: Tensor,
    needs_weights: bool,  # noqa: FBT001
    needs_values: bool,  # noqa: FBT001
    weights: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    backend: str,
) -> list[Tensor]:
    needs, source = (needs_weights, needs_values), Rows(values, row_index)
    if backend == "triton":
        from eosin.kernels.segment_pool import triton_impl

        found = triton_impl.weighted_backward(needs, grad, weights, source, cu_seqlens)
    else:
        found = torch_impl.weighted_backward(needs, grad, weights, source, cu_seqlens)
    return [weights.new_empty(0) if gradient is None else gradient for gradient in found]


def _fake_weighted_forward(
    weights: Tensor, values: Tensor, cu_seqlens: Tensor, row_index: Tensor | None, backend: str
) -> Tensor:
    size = (cu_seqlens.shape[0] - 1, weights.shape[1], values.shape[1])
    return values.new_empty(size, dtype=accumulation_dtype(values.dtype))


def _fake_weighted_backward(
    grad: Tensor,
    needs_weights: bool,  # noqa: FBT001
    needs_values: bool,  # noqa: FBT001
    weights: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    row_index: Tensor | None,
    backend: str,
) -> list[Tensor]:
    wanted = zip((weights, values), (needs_weights, needs_values), strict=True)
    return [torch.empty_like(tensor) if need else weights.new_empty(0) for tensor, need in wanted]


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.backend = inputs[4]


def _weighted_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # a second derivative is asked for
        wanted = [tensor for tensor, need in zip(inputs[:2], needs, strict=True) if need]
        pooled = reference.segment_pool(inputs[0], gathered(inputs[1], inputs[3]), inputs[2])
        found = iter(torch.autograd.grad(pooled, wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None, None
    gradients = segment_pool_backward(grad, *needs, *inputs, ctx.backend)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None, None


attention_pool = Operator(
    "attention_pool",
    f"({_INPUTS}) -> (Tensor pooled, Tensor lse, Tensor entropy)",
    run=_forward,
    fake=_fake_forward,
)
attention_pool_backward = Operator(
    "attention_pool_backward",
    f"(Tensor[] upstream, Tensor[] results, bool needs_scores, bool needs_values, {_INPUTS}) -> Tensor[]",
    run=_backward,
    fake=_fake_backward,
)
attention_pool.differentiate(_gradient, _save)

_WEIGHTED = "Tensor weights, Tensor values, Tensor cu_seqlens, Tensor? row_index, str backend"
segment_pool = Operator("segment_pool", f"({_WEIGHTED}) -> Tensor", run=_weighted_forward, fake=_fake_weighted_forward)
segment_pool_backward = Operator(
    "segment_pool_backward",
    f"(Tensor grad, bool needs_weights, bool needs_values, {_WEIGHTED}) -> Tensor[]",
    run=_weighted_backward,
    fake=_fake_weighted_backward,
)
segment_pool.differentiate(_weighted_gradient, _save_weighted)

"""Attention between a bag and a few vectors as `torch.library` operators.

Second derivatives differentiate the plain definition. An absent tensor's gradient is an empty tensor: an operator's
outputs are fixed.
"""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels.few_query_attention import reference, torch_impl
from eosin.kernels.few_query_attention.torch_impl import Projection

_SHARED = "Tensor query, Tensor values, Tensor? k_weight, Tensor? v_weight, Tensor cu_seqlens, ScalarType product_dtype"
_KEYED = (
    "Tensor queries, Tensor keys, Tensor values, Tensor cu_seqlens, int heads, float scale, ScalarType product_dtype, "
    "str backend"
)


def _shared(query: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k_weight, v_weight, cu_seqlens, dtype = rest
    return torch_impl.read_forward(query, values, _projection(query, k_weight, v_weight, dtype), cu_seqlens, dtype)


def _shared_backward(
    grads: list[Tensor],
    results: list[Tensor],
    needs_values: bool,  # noqa: FBT001
    query: Tensor,
    values: Tensor,
    *rest: Any,
) -> list[Tensor]:
    k_weight, v_weight, cu_seqlens, dtype = rest
    found = torch_impl.read_backward(
        (grads[0], grads[1]),
        (results[0], results[1]),
        query,
        values,
        _projection(query, k_weight, v_weight, dtype),
        cu_seqlens,
        dtype,
        needs_values=needs_values,
    )
    gradients = (found.query, found.values, found.k_weight, found.v_weight)
    return [
        query.new_empty(0) if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, (query, values, k_weight, v_weight), strict=True)
    ]


def _projection(query: Tensor, k_weight: Tensor | None, v_weight: Tensor | None, dtype: torch.dtype) -> Projection:
    keys, values = (None if weight is None else weight.to(dtype) for weight in (k_weight, v_weight))
    return Projection(keys, values, heads=len(query))


def _fake_shared(query: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, v_weight, cu_seqlens, _ = rest
    heads, n_queries, _ = query.shape
    width = values.shape[1] if v_weight is None else v_weight.shape[0] // heads
    sizes = (cu_seqlens.shape[0] - 1, heads, n_queries)
    return query.new_empty((*sizes, width)), query.new_empty(sizes)


def _fake_shared_backward(
    grads: list[Tensor],
    results: list[Tensor],
    needs_values: bool,  # noqa: FBT001
    query: Tensor,
    values: Tensor,
    *rest: Any,
) -> list[Tensor]:
    wanted = (query, values if needs_values else None, *rest[:2])
    return [query.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in wanted]


def _save_shared(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.dtype = inputs[5]


def _shared_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    tensors, results = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    needs = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # a second derivative is asked for
        found = _second_order(reference.shared_query_attention(*tensors), tensors, needs, grads)
    else:
        found = shared_query_attention_backward(list(grads), list(results), needs[1], *tensors, ctx.dtype)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None, None


def _keyed(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *arguments, backend = rest
    if backend == "triton":
        from eosin.kernels.few_query_attention import triton_impl

        return triton_impl.key_forward(queries, keys, values, *arguments)
    return torch_impl.key_forward(queries, keys, values, *arguments)


def _keyed_backward(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> list[Tensor]:
    *arguments, backend = rest
    if backend == "triton":
        from eosin.kernels.few_query_attention import triton_impl

        return list(triton_impl.key_backward(grad, queries, keys, values, *arguments))
    return list(torch_impl.key_backward(grad, queries, keys, values, *arguments))


def _fake_keyed(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return queries.new_empty((queries.shape[0], values.shape[2]), dtype=accumulation_dtype(queries.dtype))


def _fake_keyed_backward(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (queries, keys, values)]


def _save_keyed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _keyed_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    heads, scale = ctx.options[:2]
    if torch.is_grad_enabled():  # a second derivative is asked for
        out = reference.few_key_attention(*tensors, heads=heads, scale=scale)
        found = _second_order((out,), tensors, needs, (grad,))
    else:
        found = few_key_attention_backward(grad.contiguous(), *tensors, *ctx.options)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), *(None,) * 5


def _second_order(outputs: Any, tensors: Any, needs: Any, grads: Any) -> list[Tensor | None]:
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=False) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


shared_query_attention = Operator(
    "shared_query_attention", f"({_SHARED}) -> (Tensor read, Tensor lse)", run=_shared, fake=_fake_shared
)
shared_query_attention_backward = Operator(
    "shared_query_attention_backward",
    f"(Tensor[] grads, Tensor[] results, bool needs_values, {_SHARED}) -> Tensor[]",
    run=_shared_backward,
    fake=_fake_shared_backward,
)
shared_query_attention.differentiate(_shared_gradient, _save_shared)
few_key_attention = Operator("few_key_attention", f"({_KEYED}) -> Tensor", run=_keyed, fake=_fake_keyed)
few_key_attention_backward = Operator(
    "few_key_attention_backward",
    f"(Tensor grad, {_KEYED}) -> Tensor[]",
    run=_keyed_backward,
    fake=_fake_keyed_backward,
)
few_key_attention.differentiate(_keyed_gradient, _save_keyed)

"""The embedding as a `torch.library` operator; second derivatives differentiate the plain definition."""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels.embedding import reference, torch_impl

N_TENSORS = 3  # values, weight, bias
_INPUTS = "Tensor values, Tensor weight, Tensor? bias, float dropout, int seed, ScalarType product_dtype"


def _embedding(*inputs: Any) -> torch_impl.Embedding:
    _, weight, bias, dropout, seed, dtype = inputs
    return torch_impl.Embedding.make(weight, bias, dropout=dropout, seed=seed, dtype=dtype)


def _forward(*inputs: Any) -> Tensor:
    return torch_impl.forward(inputs[0], _embedding(*inputs))


def _backward(grad: Tensor, embedded: Tensor, needs_values: bool, *inputs: Any) -> list[Tensor]:  # noqa: FBT001
    sums = accumulation_dtype(inputs[-1])
    found = torch_impl.backward(grad, embedded, inputs[0], _embedding(*inputs), sums=sums, needs_values=needs_values)
    return [
        grad.new_empty(0) if tensor is None or gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, inputs[:N_TENSORS], strict=True)
    ]


def _fake_forward(*inputs: Any) -> Tensor:
    values, weight, dtype = inputs[0], inputs[1], inputs[-1]
    empty: Tensor = values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype)
    return empty


def _fake_backward(grad: Tensor, embedded: Tensor, needs_values: bool, *inputs: Any) -> list[Tensor]:  # noqa: FBT001
    wanted = (inputs[0] if needs_values else None, *inputs[1:N_TENSORS])
    return [grad.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:N_TENSORS], output)
    ctx.options = inputs[N_TENSORS:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, embedded = ctx.saved_tensors
    needs, nothing = ctx.needs_input_grad[:N_TENSORS], (None,) * len(ctx.options)
    if torch.is_grad_enabled():  # a second derivative is asked for
        dropout, seed, _ = ctx.options
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
        out = reference.embed_instances(*tensors, dropout=dropout, seed=seed)
        rest = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True))
        return *(next(rest) if need else None for need in needs), *nothing
    found = embed_instances_backward(grad, embedded, needs[0], *tensors, *ctx.options)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), *nothing


embed_instances = Operator("embed_instances", f"({_INPUTS}) -> Tensor", run=_forward, fake=_fake_forward)
embed_instances_backward = Operator(
    "embed_instances_backward",
    f"(Tensor grad, Tensor embedded, bool needs_values, {_INPUTS}) -> Tensor[]",
    run=_backward,
    fake=_fake_backward,
)
embed_instances.differentiate(_gradient, _save)

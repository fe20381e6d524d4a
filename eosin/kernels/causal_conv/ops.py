"""The causal convolution as a `torch.library` operator; second derivatives differentiate the plain definition."""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels.causal_conv import reference, torch_impl
from eosin.kernels.causal_conv.torch_impl import Convolution

N_TENSORS = 3  # x, weight, bias
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? source, Tensor cu_seqlens, str activation, str backend"


def _convolution(*inputs: Any) -> Convolution:
    x, weight, bias, source, cu_seqlens, activation, _ = inputs
    wide = accumulation_dtype(x.dtype)
    bias = None if bias is None else bias.to(wide)
    return Convolution(x, weight.to(wide), bias, source, cu_seqlens, activated=activation == "silu")


def _forward(*inputs: Any) -> Tensor:
    if inputs[-1] == "triton":
        from eosin.kernels.causal_conv import triton_impl

        return triton_impl.forward(_convolution(*inputs))
    return torch_impl.forward(_convolution(*inputs))


def _backward(grad: Tensor, *inputs: Any) -> list[Tensor]:
    if inputs[-1] == "triton":
        from eosin.kernels.causal_conv import triton_impl

        found = triton_impl.backward(grad, _convolution(*inputs))
    else:
        found = torch_impl.backward(grad, _convolution(*inputs))
    return [
        grad.new_empty(0) if tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, inputs[:N_TENSORS], strict=True)
    ]


def _fake_forward(*inputs: Any) -> Tensor:
    x, source = inputs[0], inputs[3]
    empty: Tensor = x.new_empty((x.shape[0] if source is None else source.shape[0], x.shape[1]))
    return empty


def _fake_backward(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [grad.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in inputs[:N_TENSORS]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.activation, ctx.backend = inputs[-2:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:N_TENSORS]
    if torch.is_grad_enabled():  # a second derivative is asked for
        wanted = [tensor for tensor, need in zip(tensors[:N_TENSORS], needs, strict=True) if need]
        out = reference.causal_conv(*tensors, activation=ctx.activation)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None, None, None
    gradients = causal_conv_backward(grad, *tensors, ctx.activation, ctx.backend)
    return (
        *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)),
        None,
        None,
        None,
        None,
    )


causal_conv = Operator("causal_conv", f"({_INPUTS}) -> Tensor", run=_forward, fake=_fake_forward)
causal_conv_backward = Operator(
    "causal_conv_backward", f"(Tensor grad, {_INPUTS}) -> Tensor[]", run=_backward, fake=_fake_backward
)
causal_conv.differentiate(_gradient, _save)

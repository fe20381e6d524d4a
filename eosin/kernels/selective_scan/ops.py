"""The selective scan as a `torch.library` operator; second derivatives differentiate the plain definition."""

from typing import Any

import torch
from torch import Tensor

from eosin.kernels._checks import accumulation_dtype
from eosin.kernels._library import Operator
from eosin.kernels.selective_scan import reference, torch_impl
from eosin.kernels.selective_scan.torch_impl import LOG2_E, Inputs

N_TENSORS = 8  # u, delta, a, b, c, d, z, delta_bias
_INPUTS = (
    "Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? delta_bias, "
    "Tensor cu_seqlens, str backend"
)


def _forward(*tensors: Any) -> tuple[Tensor, Tensor]:
    inputs, (cu_seqlens, backend) = _inputs(tensors[:N_TENSORS]), tensors[N_TENSORS:]
    if backend == "triton":
        from eosin.kernels.selective_scan import triton_impl

        return triton_impl.forward(inputs, cu_seqlens)
    return torch_impl.forward(inputs, cu_seqlens)


def _backward(grad: Tensor, states: Tensor, *tensors: Any) -> list[Tensor]:
    given, (cu_seqlens, backend) = tensors[:N_TENSORS], tensors[N_TENSORS:]
    if backend == "triton":
        from eosin.kernels.selective_scan import triton_impl

        found = triton_impl.backward(grad, _inputs(given), cu_seqlens, states)
    else:
        found = torch_impl.backward(grad, _inputs(given), cu_seqlens, states)
    gradients = (found.u, found.delta, found.a.T, found.b, found.c, found.d, found.z, found.delta_bias)
    return [
        grad.new_empty(0) if tensor is None else gradient.to(tensor.dtype).contiguous()
        for gradient, tensor in zip(gradients, given, strict=True)
    ]


def _inputs(tensors: tuple[Any, ...]) -> Inputs:
    u, delta, a, b, c, d, z, delta_bias = tensors
    wide = accumulation_dtype(u.dtype)
    transposed = (a.to(wide).T * LOG2_E).contiguous()
    d = None if d is None else d.to(wide)
    return Inputs(u, delta, transposed, b, c, d, z, None if delta_bias is None else delta_bias.to(wide))


def _fake_forward(*tensors: Any) -> tuple[Tensor, Tensor]:
    u, a = tensors[0], tensors[2]
    n_states = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(u), u.new_empty((n_states, a.shape[1], a.shape[0]), dtype=accumulation_dtype(u.dtype))


def _fake_backward(grad: Tensor, states: Tensor, *tensors: Any) -> list[Tensor]:
    return [grad.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in tensors[:N_TENSORS]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.backend = inputs[-1]


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if grad is None:
        return (None,) * (N_TENSORS + 2)
    needs = ctx.needs_input_grad[:N_TENSORS]
    if torch.is_grad_enabled():  # a second derivative is asked for
        wanted = [tensor for tensor, need in zip(tensors[:N_TENSORS], needs, strict=True) if need]
        found = iter(torch.autograd.grad(reference.selective_scan(*tensors), wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None
    gradients = selective_scan_backward(grad, states, *tensors, ctx.backend)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


selective_scan = Operator(
    "selective_scan", f"({_INPUTS}) -> (Tensor out, Tensor states)", run=_forward, fake=_fake_forward
)
selective_scan_backward = Operator(
    "selective_scan_backward",
    f"(Tensor grad, Tensor states, {_INPUTS}) -> Tensor[]",
    run=_backward,
    fake=_fake_backward,
)
selective_scan.differentiate(_gradient, _save)

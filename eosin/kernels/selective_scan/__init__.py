"""The selective scan (S6) over packed bags, and the orders in which a bag can be walked."""

import torch
from torch import Tensor

from eosin.kernels._checks import check_floating, check_offsets
from eosin.kernels._dispatch import choose
from eosin.kernels._library import Later, Operator
from eosin.kernels.selective_scan import reference, torch_impl
from eosin.kernels.selective_scan.order import ScanOrder, reversed_order, strided_order
from eosin.kernels.selective_scan.torch_impl import Inputs

__all__ = ["ScanOrder", "reversed_order", "selective_scan", "strided_order"]

_triton = Later("eosin.kernels.selective_scan.triton_impl")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    cu_seqlens: Tensor,
    *,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """Scan every bag of a pack from a zero state.

    ``h_t = exp(δ_t A) h_{t-1} + δ_t u_t B_t`` and ``y_t = C_t·h_t + D u_t`` with ``δ = softplus(delta + bias)``, per
    channel, times ``silu(z)`` where z is given.

    Parameters
    ----------
    u, delta : (N, D) floating
        Inputs and raw step sizes, channels last.
    a : (D, S) floating
        Decay rates, negative for a stable scan.
    b, c : (N, S) floating
        How each instance is written to and read from the state.
    cu_seqlens : (B+1,) int32
        Offsets of the bags; the state is 0 at the start of each.
    d : (D,) floating, optional
        Skip connection.
    z : (N, D) floating, optional
        Gate.
    delta_bias : (D,) floating, optional
        Added to ``delta``.

    Returns
    -------
    (N, D)
        In the type of ``u``; the state is held in float32 at least. Differentiable in all tensors.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets; the message names the argument.
    """
    check_floating("u", u, ("N", "D"))
    n_rows, width = u.shape
    check_floating("a", a, (width, "S"), u)
    by_row = {"delta": (delta, width), "b": (b, a.shape[1]), "c": (c, a.shape[1]), "z": (z, width)}
    for name, (tensor, size) in by_row.items():
        if tensor is not None:
            check_floating(name, tensor, (n_rows, size), u)
    for name, vector in {"d": d, "delta_bias": delta_bias}.items():
        if vector is not None:
            check_floating(name, vector, (width,), u)
    check_offsets(cu_seqlens, n_rows, u)
    out: Tensor = _scan(u, delta, a, b, c, d, z, delta_bias, cu_seqlens, backend=choose(u))
    return out


def _empty(inputs: Inputs, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    n_states = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(inputs.u), inputs.a.new_empty((n_states, *inputs.a.shape))


_scan = Operator(
    "selective_scan",
    "(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? delta_bias, "
    "Tensor cu_seqlens) -> (Tensor out, Tensor states)",
    reference=reference.selective_scan,
    differentiable=8,
    prepare=lambda *arguments: (Inputs.make(*arguments[:-1]), arguments[-1]),
    empty=_empty,
    kept=1,
    torch=(torch_impl.forward, torch_impl.backward),
    triton=(_triton.forward, _triton.backward),
)

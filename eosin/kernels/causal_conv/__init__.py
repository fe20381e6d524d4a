"""Causal depthwise convolution within bags, reading them in any order."""

import torch
from torch import Tensor

from eosin.kernels._checks import check_floating, check_offsets, check_shape
from eosin.kernels._dispatch import choose
from eosin.kernels._library import Later, Operator
from eosin.kernels.causal_conv import reference, torch_impl
from eosin.kernels.causal_conv.torch_impl import Convolution
from eosin.kernels.selective_scan.order import ScanOrder

ACTIVATIONS = ("silu", "none")
_triton = Later("eosin.kernels.causal_conv.triton_impl")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    order: ScanOrder | None = None,
    activation: str = "silu",
) -> Tensor:
    """Convolve every channel of every bag with its own taps, looking back only.

    Parameters
    ----------
    x : (N, D) floating
        Rows, channels last.
    weight : (D, K) floating
        Taps; the last one meets the row itself.
    bias : (D,) floating or None
        Added before the activation.
    cu_seqlens : (B+1,) int32
        Offsets of the bags; rows before the start of a bag count as 0.
    order : ScanOrder, optional
        Read the rows through this order instead of copying them; padded places count as rows of zeros.
    activation : {"silu", "none"}, optional
        What follows.

    Returns
    -------
    (N, D), or (N', D) with an order
        In the type of ``x``; sums are held in float32 at least. Differentiable in ``x``, ``weight`` and ``bias``.

    Raises
    ------
    TypeError, ValueError
        Wrong type, shape or device, inconsistent offsets; the message names the argument.
    """
    check_floating("x", x, ("N", "D"))
    check_floating("weight", weight, (x.shape[1], "K"), x)
    if bias is not None:
        check_floating("bias", bias, (x.shape[1],), x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected silu or none, given {activation!r}")
    check_offsets(cu_seqlens, x.shape[0], x)
    source, offsets = None, cu_seqlens
    if order is not None:
        source, offsets = order.source, order.cu_seqlens
        check_shape("order.place", order.place, (x.shape[0],), x)
        if source.dtype != torch.int64:
            raise TypeError(f"order.source: expected torch.int64, given {source.dtype}")
        check_offsets(offsets, source.shape[0], x)
    out: Tensor = _convolve(x, weight, bias, source, offsets, activation, backend=choose(x))
    return out


_convolve = Operator(
    "causal_conv",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? source, Tensor cu_seqlens, str activation) -> Tensor",
    reference=reference.causal_conv,
    differentiable=3,
    prepare=lambda *arguments: (Convolution.make(*arguments),),
    empty=lambda convolution: convolution.x.new_empty(convolution.n_places, convolution.x.shape[1]),
    torch=(torch_impl.forward, torch_impl.backward),
    triton=(_triton.forward, _triton.backward),
)

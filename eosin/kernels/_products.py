"""Matrix products of the CPU paths.

For float32 and bfloat16 they call oneDNN, which on many CPUs is twice as fast as the BLAS behind `torch.mm` and
applies bias and activation before the result leaves the cache. Its kernels are those that `torch.compile` uses;
where torch was built without them, or for other types and devices, plain torch computes the same.
"""

import torch
from torch import Tensor

_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
PICTURES, LINES = 16, 4  # what a block of rows becomes; of fewer pictures torch takes a slower way on one thread


def product_dtype(values: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type in which products of these two run: autocast's where it is on, else the wider of the two.

    On a CPU float32 takes the place of float16, whose products are hundreds of times slower there.
    """
    kind = values.device.type
    autocast = torch.is_autocast_enabled(kind) and values.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(values.dtype, weight.dtype)
    return torch.float32 if kind == "cpu" and dtype == torch.float16 else dtype


def affine(rows: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Return act(rows weightᵀ + bias): (n, D), (A, D), (A,) -> (n, A); activation none, relu, tanh or sigmoid."""
    if uses_onednn(rows) and len(rows) > 0:
        bias = None if bias is None else bias.to(rows.dtype)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, activation, [], "")
        return result
    result = rows @ weight.T
    if bias is not None:
        result += bias
    return result if activation == "none" else getattr(torch, activation + "_")(result)


def transposed_product(left: Tensor, right: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return leftᵀ right, added to ``plus`` (A, D) in its type: (n, A), (n, D) -> (A, D)."""
    if left.dtype == torch.bfloat16:  # takes the transposed factor as it lies, where oneDNN's layer copies it
        return left.T @ right if plus is None else plus.add_(left.T @ right)
    return product(left.T, right.contiguous(), plus)  # of rows with gaps oneDNN makes a product a hundred times slower


def convolution_gradient(upstream: Tensor, rows: Tensor) -> Tensor:
    """Return upstreamᵀ rows by oneDNN's convolution: (n, A), (n, D) -> (A, D).

    Rows must be a multiple of 64, both tensors contiguous.
    """
    size = (upstream.shape[1], rows.shape[1])
    _, weight, _ = torch.ops.aten.convolution_backward(
        *(_picture(upstream), _picture(rows), rows.new_empty(*size, 1, 1), None),
        stride=[1, 1],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[False, True, False],
    )
    gradient: Tensor = weight.view(size)
    return gradient


def _picture(rows: Tensor) -> Tensor:
    """Return rows as pictures, channels last: (n, D) -> (16, D, 4, n / 64)."""
    return rows.view(PICTURES, LINES, len(rows) // (PICTURES * LINES), -1).permute(0, 3, 1, 2)


def product(left: Tensor, right: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return left right, and ``plus`` (n, D) in addition: (n, A), (A, D) -> (n, D)."""
    if plus is None:
        return affine(left, right.T)
    if uses_onednn(left) and len(left) > 0:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(left, plus, right.T, None, "add")
        return result
    return torch.addmm(plus, left, right)


def uses_onednn(tensor: Tensor) -> bool:
    """Return whether products of this tensor go to oneDNN."""
    return tensor.device.type == "cpu" and tensor.dtype in _ONEDNN_DTYPES and _has_onednn()


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")

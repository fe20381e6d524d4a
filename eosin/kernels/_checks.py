"""Checks of kernel arguments: every refusal names the argument, what was expected and what was given."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# GPU packs only: reading offsets back stalls the device, so each tensor is read at most once per in-place version.
_host_offsets = WeakTensorKeyDictionary()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums over instances are held: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, tensor: Tensor, shape: Sequence[int | str], like: Tensor | None = None) -> None:
    """Refuse a tensor that is not floating point, of another shape, or on another device than ``like``.

    Parameters
    ----------
    name : str
        The argument's name in the public signature.
    tensor : Tensor
        What was given.
    shape : sequence of int or str
        Sizes; a letter stands for a free size and is printed in the message.
    like : Tensor, optional
        A tensor whose device must be the same.

    Raises
    ------
    TypeError
        Not a tensor, or not of a floating type.
    ValueError
        Wrong shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, given {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, given {tensor.dtype}")
    check_shape(name, tensor, shape, like)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str], like: Tensor | None = None) -> None:
    """Refuse a tensor of another shape than asked for, or on another device than ``like``."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({wanted}), given {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like the values, given on {tensor.device}")


def check_bool(name: str, tensor: Tensor, shape: Sequence[int | str], like: Tensor) -> None:
    """Refuse a mask that is not a boolean tensor of this shape."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a bool tensor, given {given}")
    check_shape(name, tensor, shape, like)


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Refuse tensors of different floating types."""
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        first, expected = next(iter(given.items()))
        name, other = next((name, dtype) for name, dtype in given.items() if dtype != expected)
        raise TypeError(f"{name}: expected {expected} like {first}, given {other}")


def check_no_nan(name: str, tensor: Tensor) -> None:
    """Refuse NaN in a tensor on the CPU; on a GPU the look would stall the device, and NaN propagates instead."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if tensor.isnan().any():
        row = int(tensor.isnan().nonzero()[0, 0])
        raise ValueError(f"{name}: expected no NaN, given NaN in row {row}")


def check_unit_interval(name: str, probability: float) -> None:
    """Refuse a dropout probability outside [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1), given {probability}")


def check_offsets(cu_seqlens: Tensor, n_rows: int, like: Tensor) -> None:
    """Refuse bag offsets that are not int32 (B+1,), sorted, from 0 to the number of rows, on ``like``'s device.

    Raises
    ------
    TypeError
        Not an int32 tensor.
    ValueError
        Wrong shape, device, order or total.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 tensor, given {given}")
    check_shape("cu_seqlens", cu_seqlens, ("B+1",), like)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: expected at least the leading 0, given an empty tensor")
    if torch.compiler.is_compiling():
        return
    offsets = host_offsets(cu_seqlens)
    if offsets[0] != 0 or offsets[-1] != n_rows:
        raise ValueError(f"cu_seqlens: expected offsets from 0 to {n_rows} rows, given {offsets[0]} to {offsets[-1]}")
    if any(after < before for before, after in pairwise(offsets)):
        raise ValueError(f"cu_seqlens: expected offsets in ascending order, given {offsets[:8]}…")


def host_offsets(cu_seqlens: Tensor) -> list[int]:
    """Return the offsets as Python integers; a GPU tensor is read back once, or never if `bag_offsets` made it."""
    if not cu_seqlens.is_cuda:
        return _read(cu_seqlens)
    cached = _host_offsets.get(cu_seqlens)  # type: ignore[no-untyped-call]
    if cached is None or cached[0] != _version(cu_seqlens):
        cached = (_version(cu_seqlens), _read(cu_seqlens))
        _host_offsets[cu_seqlens] = cached
    offsets: list[int] = cached[1]
    return offsets


def bag_offsets(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Return the offsets of bags on a device, without a kernel ever having to read them back from there.

    Parameters
    ----------
    lengths : sequence of int
        Instances of each bag.
    device : torch.device or str

    Returns
    -------
    (B+1,) int32
        0 and the ends of the bags.
    """
    offsets = [0, *accumulate(lengths)]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)
    if cu_seqlens.is_cuda:
        _host_offsets[cu_seqlens] = (_version(cu_seqlens), offsets)
    return cu_seqlens


def host_lengths(cu_seqlens: Tensor) -> list[int]:
    """Return the number of instances of each bag as Python integers."""
    return [after - before for before, after in pairwise(host_offsets(cu_seqlens))]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # made in inference mode, it counts no changes


def _read(cu_seqlens: Tensor) -> list[int]:
    return [int(offset) for offset in cu_seqlens.tolist()]

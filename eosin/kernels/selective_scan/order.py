"""Orders in which a bag is scanned, as index arithmetic: reversed, and MambaMIL's sequence reordering."""

from typing import NamedTuple

import torch
from torch import Tensor

from eosin.kernels._checks import bag_offsets, check_offsets, host_lengths, host_offsets


class ScanOrder(NamedTuple):
    """A reordered pack.

    ``source`` (N',) int64 is the row that each place reads, -1 where a row of zeros is padded;
    ``place`` (N,) int64 is the place of each row; ``cu_seqlens`` (B+1,) int32 are the offsets of the reordered bags.
    """

    source: Tensor
    place: Tensor
    cu_seqlens: Tensor


def reversed_order(cu_seqlens: Tensor) -> ScanOrder:
    """Return the order that walks every bag from its end."""
    return _packed([_reversed(length) for length in _checked_lengths(cu_seqlens)], cu_seqlens)


def strided_order(cu_seqlens: Tensor, rate: int) -> ScanOrder:
    """Return the order that walks every bag in ``rate`` interleaved columns, padded to a full rectangle.

    With k = ⌈n / rate⌉, place j reads row (j mod k)·rate + j // k, and zeros where that is beyond the bag (MambaMIL:
    Yang, Wang, Chen, MICCAI 2024, https://arxiv.org/abs/2403.06800, sequence reordering).

    Parameters
    ----------
    cu_seqlens : (B+1,) int32
        Offsets of the bags.
    rate : int
        Distance between neighbours, at least 1.

    Raises
    ------
    ValueError
        The rate is below 1, or the offsets are inconsistent.
    """
    if rate < 1:
        raise ValueError(f"rate: expected at least 1, given {rate}")
    return _packed([_strided(length, rate) for length in _checked_lengths(cu_seqlens)], cu_seqlens)


def _reversed(length: int) -> Tensor:
    return torch.arange(length - 1, -1, -1)


def _strided(length: int, rate: int) -> Tensor:
    rows = -(-length // rate)
    places = torch.arange(rows * rate)
    source = (places % max(rows, 1)) * rate + places // max(rows, 1)
    return torch.where(source < length, source, -1)


def _packed(sources: list[Tensor], cu_seqlens: Tensor) -> ScanOrder:
    lengths = host_lengths(cu_seqlens)
    device = cu_seqlens.device
    shifted, begin = [torch.empty(0, dtype=torch.int64)], 0
    for source, length in zip(sources, lengths, strict=True):
        shifted.append(torch.where(source < 0, -1, source + begin))
        begin += length
    packed = torch.cat(shifted)
    place = torch.empty(begin, dtype=torch.int64)
    place[packed[packed >= 0]] = torch.nonzero(packed >= 0)[:, 0]
    packed, place = (rows.to(device, non_blocking=True) for rows in (packed, place))
    return ScanOrder(packed, place, bag_offsets([len(source) for source in sources], device))


def _checked_lengths(cu_seqlens: Tensor) -> list[int]:
    check_offsets(cu_seqlens, host_offsets(cu_seqlens)[-1] if cu_seqlens.numel() else 0, cu_seqlens)
    return host_lengths(cu_seqlens)

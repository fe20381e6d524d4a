"""The dropout mask of embeddings and gates: a hash of seed, row and column; no tiling, chunk or device changes it.

Row and column are hashed apart and combined by two multiply-xorshift rounds; an entry is dropped when the low 24 bits
fall below ``p · 2^24``. All arithmetic is on 32-bit integers that wrap around, in torch and in Triton alike.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BITS = 24
GATE_BRANCHES = (0, 1)  # the activated projection and the gate
EMBEDDING_BRANCH = 2
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # the second as a signed 32-bit integer
_SHIFTS = (16, 15, 16)
_COLUMN_SALT = 0x5BD1E995
_CACHED = 1 << 15  # entries hashed at once on a CPU: a dozen steps in its cache, none of which waits for another thread


def keep_mask(
    seed: int,
    shape: tuple[int, ...],
    probability: float,
    *,
    branch: int,
    device: torch.device,
    first_row: int = 0,
) -> Tensor:
    """Return which entries of a block of rows are kept.

    Parameters
    ----------
    seed : int
        31-bit seed of this call.
    shape : tuple of int
        Rows and columns of the block.
    probability : float
        Chance of an entry to be dropped.
    branch : int
        0 for the activated branch, 1 for the gate, 2 for the embedding.
    device : torch.device
        Where the mask is wanted.
    first_row : int, optional
        Row of the pack that the block begins with.

    Returns
    -------
    (n_rows, n_columns) bool
        True where kept.
    """
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    for part, kept in _tiles(seed, shape, probability, branch, device, first_row):
        keep[part] = kept
    return keep


def drop_(values: Tensor, seed: int, probability: float, *, branch: int, first_row: int = 0) -> Tensor:
    """Drop entries of a block of rows in place and scale the rest by 1 / (1 - p): (n, A) -> (n, A)."""
    for part, kept in _tiles(seed, values.shape, probability, branch, values.device, first_row):
        values[part].mul_(kept).div_(1 - probability)
    return values


def dropped(values: Tensor, seed: int, probability: float, *, branch: int) -> Tensor:
    """Return what `drop_` makes of all rows, differentiably: (N, A) -> (N, A)."""
    if probability == 0:
        return values
    return values * keep_mask(seed, values.shape, probability, branch=branch, device=values.device) / (1 - probability)


def _tiles(
    seed: int, shape: tuple[int, ...], probability: float, branch: int, device: torch.device, first_row: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time and which of their entries are kept."""
    n_rows, n_columns = shape
    rows = row_hash(seed, branch, torch.arange(first_row, first_row + n_rows, device=device))
    columns = column_hash(seed, branch, torch.arange(n_columns, device=device))
    at_once = max(1, _CACHED // max(1, n_columns)) if device.type == "cpu" else max(1, n_rows)
    for first in range(0, n_rows, at_once):
        part = slice(first, first + at_once)
        bits = _mixed(rows[part, None] ^ columns[None, :]).bitwise_and_((1 << BITS) - 1)
        yield part, bits >= threshold(probability)


def threshold(probability: float) -> int:
    """Return the number of the 2^24 hash values that mean "dropped"."""
    return round(probability * (1 << BITS))


def row_hash(seed: int, branch: int, rows: Tensor) -> Tensor:
    """Return the int32 hash of packed row numbers."""
    return _mixed(_mixed(rows.to(torch.int32, copy=True)) ^ (seed ^ branch))


def column_hash(seed: int, branch: int, columns: Tensor) -> Tensor:
    """Return the int32 hash of hidden column numbers."""
    return _mixed(_mixed(columns.to(torch.int32) + _COLUMN_SALT) ^ (seed ^ (branch + 4)))


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a 31-bit seed; a generator on a GPU costs a synchronisation, one on the CPU does not."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(1 << 31, (), generator=generator, device=device).item())


def _mixed(bits: Tensor) -> Tensor:
    """Scramble int32 values in place: x ^= x >> 16, x *= c1, x ^= x >> 15, x *= c2, x ^= x >> 16, shifts unsigned."""
    shifted = torch.empty_like(bits)
    for by, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        torch.bitwise_right_shift(bits, by, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - by)) - 1))
        if multiplier != 1:
            bits.mul_(multiplier)
    return bits

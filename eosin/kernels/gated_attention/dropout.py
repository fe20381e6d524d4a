"""The dropout mask of the gate: a hash of (seed, row, column), so that it depends on no tiling, chunk or device.

Row and column are hashed apart and combined by two multiply-xorshift rounds; an entry is dropped when the low 24 bits
fall below ``p · 2^24``. All arithmetic is on 32-bit integers that wrap around, in torch and in Triton alike.
"""

import torch
from torch import Tensor

BITS = 24
GATE_BRANCHES = (0, 1)  # the activated projection and the gate
EMBEDDING_BRANCH = 2
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # the second as a signed 32-bit integer
_COLUMN_SALT = 0x5BD1E995


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
    n_rows, n_columns = shape
    rows = row_hash(seed, branch, torch.arange(first_row, first_row + n_rows, device=device))
    columns = column_hash(seed, branch, torch.arange(n_columns, device=device))
    bits = _mixed(rows[:, None] ^ columns[None, :])
    return (bits & ((1 << BITS) - 1)) >= threshold(probability)


def threshold(probability: float) -> int:
    """Return the number of the 2^24 hash values that mean "dropped"."""
    return round(probability * (1 << BITS))


def row_hash(seed: int, branch: int, rows: Tensor) -> Tensor:
    """Return the int32 hash of packed row numbers."""
    return _mixed(_mixed(rows.to(torch.int32)) ^ (seed ^ branch))


def column_hash(seed: int, branch: int, columns: Tensor) -> Tensor:
    """Return the int32 hash of hidden column numbers."""
    return _mixed(_mixed(columns.to(torch.int32) + _COLUMN_SALT) ^ (seed ^ (branch + 4)))


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a 31-bit seed; a generator on a GPU costs a synchronisation, one on the CPU does not."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(1 << 31, (), generator=generator, device=device).item())


def _mixed(bits: Tensor) -> Tensor:
    """Scramble int32 values: x ^= x >> 16, x *= c1, x ^= x >> 15, x *= c2, x ^= x >> 16, shifts unsigned."""
    bits = bits ^ _shifted(bits, 16)
    bits = bits * _MULTIPLIERS[0]
    bits = bits ^ _shifted(bits, 15)
    bits = bits * _MULTIPLIERS[1]
    return bits ^ _shifted(bits, 16)


def _shifted(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (32 - by)) - 1)

"""The dropout mask of embeddings and gates: a hash of seed, row and column; no tiling, chunk or device changes it.

Entry (i, j) is hashed to ``a_i · x_j + b_i`` (32-bit integers that wrap around) and dropped when that lies below a
threshold. a, b and x are scrambled row and column numbers, so that rows are independent of each other, and so are any
two entries of a row (Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer arithmetic
without primes", STACS 1996). A multiplication and an addition per entry is all that a mask costs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GATE_BRANCH, EMBEDDING_BRANCH = 0, 1
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # the second as a signed 32-bit integer
_SHIFTS = (16, 15, 16)
_COLUMN_SALT = 0x5BD1E995
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_mask(
    seed: int, shape: tuple[int, ...], probability: float, *, branch: int, device: torch.device, first_row: int = 0
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
        0 for the gate, 1 for the embedding.
    device : torch.device
        Where the mask is wanted.
    first_row : int, optional
        Row of the pack that the block begins with.

    Returns
    -------
    (n_rows, n_columns) bool
        True where kept.
    """
    return Kept.of(seed, shape, probability, branch=branch, device=device, first_row=first_row)[:].bool()


@dataclass(frozen=True)
class Kept:
    """The mask of a block of rows, computed for the rows that are asked for: `kept[rows]` is 1 where kept, int32."""

    factors: Tensor
    addends: Tensor
    columns: Tensor
    threshold: int

    @classmethod
    def of(
        cls,
        seed: int,
        shape: tuple[int, ...],
        probability: float,
        *,
        branch: int,
        device: torch.device,
        first_row: int = 0,
    ) -> "Kept":
        """Return the mask that `keep_mask` describes."""
        return cls(*_hashes(seed, shape, branch, device, first_row), threshold(probability))

    def __getitem__(self, rows: slice) -> Tensor:
        """Return some rows: (n, A) int32."""
        return (self.factors[rows] * self.columns).add_(self.addends[rows]).ge_(self.threshold)


def drop_(values: Tensor, kept: Tensor) -> Tensor:
    """Set the entries that are not kept to 0 in place: (n, A), (n, A); what scales the rest is the caller's."""
    bits = values.view(_SAME_SIZE[values.itemsize])  # an integer times 0 or 1 is the fastest mask, and exact
    bits.mul_(kept.to(bits.dtype))
    return values


def dropped(values: Tensor, seed: int, probability: float, *, branch: int) -> Tensor:
    """Return all rows with dropped entries 0 and the rest scaled by 1 / (1 - p), differentiably: (N, A) -> (N, A)."""
    if probability == 0:
        return values
    keep = keep_mask(seed, values.shape, probability, branch=branch, device=values.device)
    return torch.where(keep, values / (1 - probability), 0)


def gate_probability(probability: float, *, gated: bool) -> float:
    """Return how often dropout of both branches of a gate drops their product, which is all that is read of them."""
    return 1 - (1 - probability) ** 2 if gated else probability


def threshold(probability: float) -> int:
    """Return the signed 32-bit integer below which a hash means "dropped"."""
    return min(round(probability * (1 << 32)) - (1 << 31), (1 << 31) - 1)


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a 31-bit seed; a generator on a GPU costs a synchronisation, one on the CPU does not."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(1 << 31, (), generator=generator, device=device).item())


def _hashes(
    seed: int, shape: tuple[int, ...], branch: int, device: torch.device, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a and b of every row and x of every column: (n, 1), (n, 1), (1, A) int32."""
    n_rows, n_columns = shape
    rows = _mixed(torch.arange(first_row, first_row + n_rows, device=device).to(torch.int32))
    columns = _mixed(torch.arange(n_columns, device=device, dtype=torch.int32) + _COLUMN_SALT)
    factors, addends = (_mixed(rows ^ (seed ^ (4 * branch + stream)))[:, None] for stream in (0, 1))
    return factors, addends, _mixed(columns ^ (seed ^ (4 * branch + 2)))[None]


def _mixed(bits: Tensor) -> Tensor:
    """Scramble int32 values in place: x ^= x >> 16, x *= c1, x ^= x >> 15, x *= c2, x ^= x >> 16, shifts unsigned."""
    shifted = torch.empty_like(bits)
    for by, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        torch.bitwise_right_shift(bits, by, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - by)) - 1))
        if multiplier != 1:
            bits.mul_(multiplier)
    return bits

"""Rows of a tensor that are read where an index says, a block at a time, instead of copied."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from eosin.kernels._checks import check_shape
from eosin.kernels._memory import new_tensor

ROWS = 4096  # rows per block: 4 MB of float32 per branch at A = 256; shorter ones cost more in calls than they save


def blocks(n_rows: int) -> Iterator[slice]:
    """Yield the rows of each block of a pack."""
    for first in range(0, n_rows, ROWS):
        yield slice(first, min(first + ROWS, n_rows))


def tiles(rows: Tensor) -> Iterator[slice]:
    """Yield the rows of each tile of a block: what several passes over a few tensors leave in the L2 cache.

    Threads share a tile. On a GPU the block is one tile.
    """
    at_once = len(rows)
    if rows.device.type == "cpu":
        at_once = cached_entries() * torch.get_num_threads() // max(1, rows.shape[1])
    for first in range(0, len(rows), max(1, at_once)):
        yield slice(first, min(first + max(1, at_once), len(rows)))


@cache
def cached_entries() -> int:
    """Return how many entries of a tensor a core works on at once: a 16th of its L2 cache in bytes.

    A gate's backward pass has five tensors in use; shorter tiles cost more in calls than they save. Without Linux's
    description of the cache it is taken as 1 MB.
    """
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index2/size")]
    kilobytes = int(sizes[0].removesuffix("K")) if sizes and sizes[0].endswith("K") else 1024
    return max(kilobytes, 256) * 1024 // 16


def longest_block(n_rows: int) -> int:
    """Return the number of rows of the longest block of a pack."""
    return min(ROWS, n_rows)


@dataclass(frozen=True)
class Rows:
    """The instances of a pack: the rows of ``values`` (N, D), or those that ``index`` (M,) names, in its order."""

    values: Tensor
    index: Tensor | None

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.values) if self.index is None else len(self.index)

    def __getitem__(self, block: slice) -> Tensor:
        """Return some instances: a view without an index, a copy of this block with one."""
        return self.values[block] if self.index is None else self.values.index_select(0, self.index[block])

    def blocks(self, rows: slice, size: int) -> Iterator[tuple[slice, slice]]:
        """Cut a run of instances: each block, and where it lies within the run."""
        for first in range(rows.start, rows.stop, size):
            block = slice(first, min(first + size, rows.stop))
            yield block, slice(block.start - rows.start, block.stop - rows.start)

    def new_gradient(self) -> Tensor:
        """Return what `add_gradient` fills: rows that no instance reads have gradient 0."""
        return torch.zeros_like(self.values) if self.index is not None else new_tensor(self.values, self.values.shape)

    def add_gradient(self, target: Tensor, block: slice, gradient: Tensor) -> None:
        """Write the gradient of a block of instances; a row that is read twice gets the sum."""
        if self.index is None:
            target[block] = gradient
        else:
            target.index_add_(0, self.index[block], gradient.to(target.dtype))

    def spread(self, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of ``values`` from that of all instances: (M, D) -> (N, D)."""
        if gradient is None or self.index is None:
            return gradient
        return torch.zeros_like(self.values).index_add_(0, self.index, gradient.to(self.values.dtype))


def gathered(values: Tensor, index: Tensor | None) -> Tensor:
    """Return the instances as one tensor."""
    return values if index is None else values.index_select(0, index)


def check_row_index(index: Tensor | None, values: Tensor) -> int:
    """Refuse an index that is not int64 (M,) of rows of ``values``; return the number of instances."""
    if index is None:
        return values.shape[0]
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        given = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"row_index: expected an int64 tensor, given {given}")
    check_shape("row_index", index, ("M",), values)
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and len(index):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= values.shape[0]:
            raise ValueError(f"row_index: expected rows in [0, {values.shape[0]}), given {low} to {high}")
    return index.shape[0]

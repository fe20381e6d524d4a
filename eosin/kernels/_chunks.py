"""Tables that cut the bags of a pack into chunks of rows, one per program of a GPU kernel."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from eosin.kernels._checks import host_offsets


@dataclass(frozen=True)
class ChunkTable:
    """Chunks of at most ``rows`` rows; none crosses the border of a bag.

    ``bag``, ``start`` and ``end`` (chunks,) int32 say where each lies; ``first`` (B+1,) int32 which chunks are a bag's.
    """

    rows: int
    bag: Tensor
    start: Tensor
    end: Tensor
    first: Tensor

    @property
    def n_chunks(self) -> int:
        """How many chunks there are."""
        return len(self.bag)


def chunk_table(cu_seqlens: Tensor, rows: int) -> ChunkTable:
    """Cut every bag into chunks of ``rows`` rows, the last of each shorter."""
    offsets = host_offsets(cu_seqlens)
    bags, starts, ends, first = [], [], [], [0]
    for bag, (begin, end) in enumerate(pairwise(offsets)):
        for start in range(begin, end, rows):
            bags.append(bag)
            starts.append(start)
            ends.append(min(start + rows, end))
        first.append(len(bags))
    packed = torch.tensor([*bags, *starts, *ends, *first], dtype=torch.int32)
    packed = packed.to(cu_seqlens.device, non_blocking=True)
    n = len(bags)
    return ChunkTable(rows, packed[:n], packed[n : 2 * n], packed[2 * n : 3 * n], packed[3 * n :])

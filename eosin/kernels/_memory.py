"""Memory of large tensors on a CPU, used again by the next step.

Touching a page for the first time costs more than filling it, and much of what a step computes is in new pages: the C
library gives pieces of 32 MB and more back to the system at once. So a piece that is freed stays here for the next
tensor of its size, up to `MOST_FREE` bytes in all, as torch's own allocator does on a GPU.

For smaller pieces the library's threshold adapts to what has been freed (mallopt(3), M_MMAP_THRESHOLD): freeing one
untouched piece once lets all blocks of rows use the same pages.
"""

import math
import mmap
import queue
import sys
import weakref
from collections import defaultdict

import torch
from torch import Tensor

MOST_FREE = 2**30
_LARGE = 32 * 2**20
_free: defaultdict[int, "queue.SimpleQueue[mmap.mmap]"] = defaultdict(queue.SimpleQueue)  # by size, a power of two
torch.empty(_LARGE - 2**20, dtype=torch.uint8, device="cpu")


def new_tensor(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor on the device of another one; a large one on a Linux CPU in memory used before.

    Parameters
    ----------
    like : Tensor
        Says the device, and the type if none is given.
    shape : tuple of int
    dtype : torch.dtype, optional
    """
    dtype = dtype or like.dtype
    n_bytes = math.prod(shape) * dtype.itemsize if type(like) is Tensor else 0  # a fake tensor has no memory
    if n_bytes < _LARGE or like.device.type != "cpu" or sys.platform != "linux":
        return like.new_empty(shape, dtype=dtype)
    pages = _take(1 << (n_bytes - 1).bit_length())  # pages that are never touched take no memory
    view = memoryview(pages)
    weakref.finalize(view, _give_back, pages).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def release() -> None:
    """Give all free memory back to the system."""
    _free.clear()


def _take(size: int) -> mmap.mmap:
    try:
        return _free[size].get_nowait()
    except queue.Empty:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _give_back(pages: mmap.mmap) -> None:
    """Keep memory that a tensor has left; may run at any point of any thread."""
    if len(pages) + sum(size * kept.qsize() for size, kept in list(_free.items())) <= MOST_FREE:
        _free[len(pages)].put(pages)

"""Decoded segments of a slide, shared by threads, within a bound of memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
ENTRY_BYTES = 2048  # what Python needs for an entry; counts when segments are tiny


class _Making:
    """An array that a thread is making; others wait until the lock is free. A Future would cost ten times as much."""

    __slots__ = ("done", "error", "pixels")

    def __init__(self) -> None:
        self.done = Lock()
        self.done.acquire()
        self.pixels: Pixels | None = None
        self.error: BaseException | None = None

    def result(self) -> Pixels:
        with self.done:
            if self.pixels is None:
                raise self.error or RuntimeError("nothing was made")
            return self.pixels


class SegmentCache:
    """Keeps the arrays used last; each is made once, also when several threads ask for it at the same time.

    Parameters
    ----------
    max_bytes : int
        Upper bound of what is kept; the arrays being made at the moment come on top.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = Lock()
        self._kept: OrderedDict[Hashable, Pixels] = OrderedDict()
        self._making: dict[Hashable, _Making] = {}

    def get(self, key: Hashable, make: Callable[[], Pixels]) -> Pixels:
        """Return the array of a key; calls `make` when it is not kept. What `make` raises is not kept."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
            other = self._making.get(key)
            if other is None:
                mine = self._making[key] = _Making()
        return self._make(key, mine, make) if other is None else other.result()

    def _make(self, key: Hashable, mine: _Making, make: Callable[[], Pixels]) -> Pixels:
        try:
            pixels = mine.pixels = make()
        except BaseException as error:
            mine.error = error
            with self._lock:
                del self._making[key]
            raise
        else:
            with self._lock:
                del self._making[key]
                self._kept[key] = pixels
                self._bytes += pixels.nbytes + ENTRY_BYTES
                while self._bytes > self._max_bytes:
                    _, oldest = self._kept.popitem(last=False)
                    self._bytes -= oldest.nbytes + ENTRY_BYTES
            return pixels
        finally:
            mine.done.release()

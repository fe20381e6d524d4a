"""Decoded segments of a slide, shared by threads, within a bound of memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
ENTRY_BYTES = 2048  # what Python needs for an entry; counts when segments are tiny


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
        self._entries: OrderedDict[Hashable, Future[Pixels]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Pixels]) -> Pixels:
        """Return the array of a key; calls `make` when it is not kept. What `make` raises is not kept."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                made: Future[Pixels] = Future()
                self._entries[key] = made
        return entry.result() if entry is not None else self._make(key, made, make)

    def _make(self, key: Hashable, entry: Future[Pixels], make: Callable[[], Pixels]) -> Pixels:
        try:
            pixels = make()
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            entry.set_exception(error)
            raise
        entry.set_result(pixels)
        with self._lock:
            self._bytes += pixels.nbytes + ENTRY_BYTES
            self._evict()
        return pixels

    def _evict(self) -> None:
        while self._bytes > self._max_bytes:
            key = next((key for key, entry in self._entries.items() if entry.done()), None)
            if key is None:
                return
            self._bytes -= self._entries.pop(key).result().nbytes + ENTRY_BYTES

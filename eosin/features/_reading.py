"""Tiles of many slides, decoded ahead of the encoder and away from it.

Every reader is a thread with, normally, a child process that does the decoding: a decoder that crashes or hangs costs
its slide, never the run. Readers take slides from one list and put batches of all of them into one short queue, so
that a device that encodes finds work also while one slide ends and the next is opened.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin._files import file_fingerprint
from eosin._processes import Child, require_running
from eosin.errors import CorruptSlideError, EosinError, SlideError, WorkerError
from eosin.wsi._coordinates import read_footer, read_grid
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._tiles import iterate_tiles

QUEUED_BATCHES = 4
HANG_S = 300.0
POLL_S = 0.2
JOIN_S = 10.0

_NOTHING_LEFT = object()


@dataclass(frozen=True)
class ReadRequest:
    """One slide to read.

    Parameters
    ----------
    slide : SlideFile
        What to open.
    patches : Path
        Its coordinates file.
    batch_size : int
        Tiles per batch.
    threads : int
        Threads that decode.
    """

    slide: SlideFile
    patches: Path
    batch_size: int
    threads: int = 2


@dataclass(frozen=True)
class TileBatch:
    """Some tiles of one slide.

    Parameters
    ----------
    slide_id : str
        The slide.
    tiles : (b, h, w, 3) uint8
        Pixels.
    index : (b,) int64
        Their rows in the slide's grid.
    """

    slide_id: str
    tiles: NDArray[np.uint8]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class SlideEnd:
    """No more tiles of this slide; `error` says why when not all of them came, `message` why none were needed."""

    slide_id: str
    error: EosinError | None = None
    message: str = ""


Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]


def pageable(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return uint8 memory as the operating system gives it."""
    return np.empty(shape, np.uint8)


def read_slide(request: ReadRequest) -> Iterator[TileBatch]:
    """Read the tiles of one slide in this process.

    Raises
    ------
    SlideError
        When the slide cannot be opened or decoded.
    FeatureFileError
        When its coordinates file cannot be read.
    """
    grid, stated = read_grid(request.patches), read_footer(request.patches).fingerprint
    request.slide.stage()
    if stated and request.slide.path.is_file() and stated != file_fingerprint(request.slide.path):
        message = "is not the file that was tiled; run `eosin tile` on it again"
        raise SlideError(request.slide.path, message, code="changed")
    with request.slide.open(mpp=grid.slide_mpp) as slide:
        if other := slide.other_image(grid.image):
            raise SlideError(slide.path, f"its tiles are of {other}, or tile it again", code="changed")
        batches = iterate_tiles(slide, grid, batch_size=request.batch_size, threads=request.threads)
        for tiles, index in batches:
            yield TileBatch(request.slide.slide_id, tiles, index)


class _SlideReader:
    """A child process that reads slides one after another."""

    def __init__(self, allocate: Allocate) -> None:
        self.allocate = allocate
        self.child = Child(_serve, has_children=True, needs_script=False)

    def read(self, request: ReadRequest, stopping: threading.Event) -> Iterator[TileBatch]:
        path = request.slide.path
        request.slide.stage()  # here, since a process that copies for an hour looks like one that hangs
        self.child.send(request)
        try:
            while not stopping.is_set():
                message = self.child.receive(HANG_S, is_needed=lambda: not stopping.is_set())
                if message is None:
                    return
                index, shape = message
                tiles = self.allocate(shape)
                self.child.receive_into(tiles.reshape(-1).data, HANG_S)
                yield TileBatch(request.slide.slide_id, tiles, index)
        except WorkerError as error:
            raise CorruptSlideError(path, f"the process that decoded it {error.message}", code=error.code) from None


def _serve(connection: "Connection[Any, Any]") -> None:
    while True:
        _send_slide(connection, connection.recv())


def _send_slide(connection: "Connection[Any, Any]", request: ReadRequest) -> None:
    try:
        for batch in read_slide(request):
            connection.send((batch.index, batch.tiles.shape))
            connection.send_bytes(batch.tiles.reshape(-1).data)
        connection.send(None)
    except EosinError as error:
        connection.send(error)
    except MemoryError:
        connection.send(
            SlideError(
                request.slide.path,
                "needs more memory than this machine has left; use fewer --workers",
                code="out-of-memory",
            )
        )
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises must reach the parent as this slide's failure
        connection.send(SlideError(request.slide.path, f"{type(error).__name__}: {error}", code="internal"))


class SlideReaders:
    """Readers that work ahead through slides; a context manager and an iterator over what they read.

    Parameters
    ----------
    requests : iterable of ReadRequest, SlideEnd or None
        Slides in the order in which they are begun, asked for as readers become free. A `SlideEnd` is passed on; None
        means that there is nothing to read at the moment.
    workers : int
        Number of child processes, each with one slide at a time; 0 reads in a thread of this process.
    allocate : callable
        Makes the memory that batches of child processes are received in; a GPU copies from pinned memory while it
        computes.
    """

    def __init__(
        self,
        requests: Iterable[ReadRequest | SlideEnd | None],
        *,
        workers: int,
        allocate: Allocate = pageable,
    ) -> None:
        self._requests = iter(requests)
        self._asking = threading.Lock()
        self._queue: queue.Queue[TileBatch | SlideEnd] = queue.Queue(QUEUED_BATCHES)
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._isolated = workers > 0
        self._allocate = allocate
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max(1, workers))]

    def __enter__(self) -> "SlideReaders":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(JOIN_S)

    def __iter__(self) -> Iterator[TileBatch | SlideEnd | None]:
        """Yield what is read, and None now and then while nothing is."""
        while True:
            require_running()
            working = any(thread.is_alive() for thread in self._threads)
            try:
                yield self._queue.get(timeout=POLL_S if working else 0)
            except queue.Empty:
                if self._failure is not None:
                    raise self._failure from None
                if not working:
                    return
                yield None

    def _work(self) -> None:
        child: _SlideReader | None = None
        try:
            for request in self._asked():
                if isinstance(request, SlideEnd):
                    self._put(request)
                    continue
                if self._isolated and child is None:
                    child = _SlideReader(self._allocate)
                if not self._read(request, child) and child is not None:
                    child.child.stop()
                    child = None
        except Exception as error:  # noqa: BLE001 - raised again where the run waits
            self._failure = error
        finally:
            if child is not None:
                child.child.stop()

    def _asked(self) -> Iterator[ReadRequest | SlideEnd]:
        """Yield what this reader is to do, until there is nothing left or the run stops."""
        while not self._stopping.is_set():
            with self._asking:
                request = next(self._requests, _NOTHING_LEFT)
            if isinstance(request, ReadRequest | SlideEnd):
                yield request
            elif request is _NOTHING_LEFT:
                return
            else:
                self._stopping.wait(POLL_S)

    def _read(self, request: ReadRequest, child: _SlideReader | None) -> bool:
        """Put one slide into the queue; return whether the child can go on to the next."""
        slide_id = request.slide.slide_id
        try:
            for batch in read_slide(request) if child is None else child.read(request, self._stopping):
                if not self._put(batch):
                    return False
        except EosinError as error:
            self._put(SlideEnd(slide_id, error))
            return error.code not in ("crashed", "timeout")
        except Exception as error:  # noqa: BLE001 - a thread that dies silently would stall the run
            self._put(SlideEnd(slide_id, SlideError(request.slide.path, f"{type(error).__name__}: {error}")))
            return False
        return self._put(SlideEnd(slide_id))

    def _put(self, item: TileBatch | SlideEnd) -> bool:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

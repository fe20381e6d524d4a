"""Pixels of slides in TIFF files, decoded without OpenSlide in between: each stored tile once, in the caller's threads.

Between two stored levels the JPEG decoder can deliver 1/2, 1/4 and 1/8 of the size at a fraction of the cost. These
scaled decodings act as further levels. Against decode-then-average they differ by less than 0.5 grey levels in the
mean on real slides (docs/slides.md, measured by a test); they are exact in position.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import tifffile
from numpy.typing import NDArray

from eosin.errors import CorruptSlideError
from eosin.wsi.cache import SegmentCache
from eosin.wsi.pixels import WHITE, ReadLevel, is_native, read_scaled
from eosin.wsi.resolution import Resolution
from eosin.wsi.segments import MAX_STORED_BYTES, DecodeError, Level, decode_segment

CACHE_BYTES = (16 * 2**20, 128 * 2**20)
MANY_SEGMENTS = 32
SEGMENT_RUN = 16
MAX_THREADS = 4
SHRINKS = (2, 4, 8)
Facts = dict[str, str | int | float | list[int] | list[float] | None]


class TiffReader:
    """A slide read segment by segment; implements `eosin.wsi.slide.Slide`. Made by `open_direct` and `open_plain`.

    Parameters
    ----------
    path : Path
        The file.
    levels : sequence of Level
        Stored levels, finest first.
    resolution : Resolution
        Outcome of the mpp policy.
    background : tuple of int
        RGB of missing pixels.
    bounds_px0 : tuple of int or None
        Scanned part.
    icc_profile : bytes or None
        Colour profile of the pixels.
    facts : mapping
        What may be shown about the file, without the reader.
    tiff : TiffFile, optional
        The same file as tifffile has it open; closed with the reader.
    """

    def __init__(
        self,
        path: Path,
        levels: Sequence[Level],
        resolution: Resolution,
        *,
        background: tuple[int, int, int] = WHITE,
        bounds_px0: tuple[int, int, int, int] | None = None,
        icc_profile: bytes | None = None,
        facts: Facts,
        tiff: tifffile.TiffFile | None = None,
    ) -> None:
        self.path = path
        self.size_px0: tuple[int, int] = levels[0].size_px
        self.bounds_px0 = bounds_px0
        self.icc_profile = icc_profile
        self._tiff = tiff
        self._file: BinaryIO = path.open("rb")
        self._file_lock = Lock()
        self._levels = sorted(_with_shrunk(levels), key=lambda level: (level.downsample, -level.shrink))
        self._resolution = resolution
        self._background = background
        self._facts = facts
        self._cache = SegmentCache(_cache_bytes(levels[0]))
        self._plan = lru_cache(maxsize=8)(self._plan_reading)

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel."""
        return self._resolution.require(self.path)

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from."""
        return self._resolution.source

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return (h, w, 3) RGB at any mpp; see `eosin.wsi.slide.Slide.read`."""
        downsample = mpp / self.mpp
        read_level, downsamples = self._plan(downsample, max(size_px))
        return read_scaled(read_level, downsamples, origin_px0, size_px, downsample)

    def _plan_reading(self, downsample: float, longest_px: int) -> tuple[ReadLevel, list[float]]:
        """Choose the levels that may serve a request; the same for every tile of a grid."""
        levels = [level for level in self._levels if _serves(level, downsample, longest_px)]

        def read_level(number: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
            return self._read_level(levels[number], corner, size)

        return read_level, [level.downsample for level in levels]

    def _read_level(self, level: Level, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one level, in that level's pixels; background outside."""
        (left, top), (width, height) = corner, size
        whole = self._within_segment(level, corner, size)
        if whole is not None:
            return whole
        result = np.empty((height, width, 3), np.uint8)
        right, bottom = min(left + width, level.size_px[0]), min(top + height, level.size_px[1])
        if left < 0 or top < 0 or right < left + width or bottom < top + height:
            result[:] = self._background
        segment_w, segment_h = level.segment_px
        places = [
            (column, row)
            for row in range(max(top, 0) // segment_h, -(-bottom // segment_h))
            for column in range(max(left, 0) // segment_w, -(-right // segment_w))
        ]
        if len(places) < MANY_SEGMENTS:
            for place in places:
                self._paste(result, level, (left, top), place, self._segment)
        else:  # more than is worth keeping
            _in_threads(partial(self._paste, result, level, (left, top), segment_of=self._decoded), places)
        return result

    def _within_segment(self, level: Level, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """Return a region that lies in one stored segment without copying it, as tiles on the file's lattice do."""
        (left, top), (width, height), (segment_w, segment_h) = corner, size, level.segment_px
        if left < 0 or top < 0 or left + width > level.size_px[0] or top + height > level.size_px[1]:
            return None
        x, y = left % segment_w, top % segment_h
        if x + width > segment_w or y + height > segment_h:
            return None
        segment = self._segment(level, (top // segment_h) * level.across + left // segment_w)
        if segment is None:
            return None
        region = segment[y : y + height, x : x + width]
        region.flags.writeable = False  # the cache holds it, too
        return region

    def _paste(
        self,
        result: NDArray[np.uint8],
        level: Level,
        corner: tuple[int, int],
        place: tuple[int, int],
        segment_of: Callable[[Level, int], NDArray[np.uint8] | None],
    ) -> None:
        """Copy the part of a segment that lies in the result."""
        (left, top), (segment_w, segment_h) = corner, level.segment_px
        x, y = place[0] * segment_w - left, place[1] * segment_h - top  # the segment's corner in the result
        right = min(x + segment_w, result.shape[1], level.size_px[0] - left)
        bottom = min(y + segment_h, result.shape[0], level.size_px[1] - top)
        x0, y0 = max(x, 0), max(y, 0)
        segment = segment_of(level, place[1] * level.across + place[0])
        target = result[y0:bottom, x0:right]
        target[:] = self._background if segment is None else segment[y0 - y : bottom - y, x0 - x : right - x]

    def _decoded(self, level: Level, index: int) -> NDArray[np.uint8] | None:
        return self._decode(level, index) if level.has(index) else None

    def _segment(self, level: Level, index: int) -> NDArray[np.uint8] | None:
        if not level.has(index):
            return None
        return self._cache.get((level.number, level.shrink, index), lambda: self._decode(level, index))

    def _decode(self, level: Level, index: int) -> NDArray[np.uint8]:
        x, y = (index % level.across) * level.segment_px[0], (index // level.across) * level.segment_px[1]
        try:
            pixels = decode_segment(level, index, self._stored_bytes(level, index))
            needed = [min(level.segment_px[axis], level.size_px[axis] - (x, y)[axis]) for axis in (1, 0)]
            if pixels.shape[0] < needed[0] or pixels.shape[1] < needed[1]:
                raise DecodeError(f"it is only {pixels.shape[1]} x {pixels.shape[0]} px")
            return pixels
        except (DecodeError, OSError) as error:
            place = ", ".join(str(round(value * level.downsample)) for value in (x, y))
            raise CorruptSlideError(
                self.path, f"stored pixels cannot be decoded (segment {index} at level-0 ({place})): {error}"
            ) from error

    def _stored_bytes(self, level: Level, index: int) -> bytes:
        offset, count = int(level.places.offsets[index]), int(level.places.counts[index])
        if not (0 <= count <= MAX_STORED_BYTES and offset >= 0):
            raise DecodeError(f"{count} bytes at {offset} are stated for it")
        with self._file_lock:
            self._file.seek(offset)
            data = self._file.read(count)
        if len(data) != count:
            raise DecodeError("the file ends before it")
        return data

    def facts(self) -> Facts:
        """Return what may be shown about the slide."""
        return {"reader": "direct TIFF", **self._facts}

    def close(self) -> None:
        """Release the file."""
        if self._tiff is not None:
            self._tiff.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_threads(paste: Callable[[tuple[int, int]], None], places: Sequence[tuple[int, int]]) -> None:
    """Decode many segments, a run of them in each thread's turn; the decoders release the interpreter's lock."""
    runs = [places[start : start + SEGMENT_RUN] for start in range(0, len(places), SEGMENT_RUN)]

    def paste_run(run: Sequence[tuple[int, int]]) -> None:
        for place in run:
            paste(place)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="segments") as pool:
        try:
            for _ in pool.map(paste_run, runs):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cache_bytes(level: Level) -> int:
    """Return room for three rows of segments, within bounds: tiles come row by row and share segments with the next."""
    row = 3 * level.across * level.segment_px[0] * level.segment_px[1]
    return int(np.clip(3 * row, *CACHE_BYTES))


def _serves(level: Level, downsample: float, longest_px: int) -> bool:
    """Scaled decodings are used as they are, or averaged further when they are at least twice as fine as wanted."""
    ratio = downsample / level.downsample
    return level.shrink == 1 or ratio >= 2 or is_native(ratio, longest_px)


def _with_shrunk(levels: Sequence[Level]) -> Iterator[Level]:
    for number, level in enumerate(levels):
        yield level
        following = levels[number + 1].downsample if number + 1 < len(levels) else float("inf")
        for factor in SHRINKS:
            divides = all(side % factor == 0 for side in level.segment_px)
            if level.is_jpeg and divides and level.downsample * factor < 0.97 * following:
                yield level.shrunk(factor)

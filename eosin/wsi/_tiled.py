"""Slides of stored pieces, decoded directly: each piece once, in the caller's threads.

Between two stored levels the JPEG decoder can deliver 1/2, 1/4 and 1/8 of the size at a fraction of the cost. These
scaled decodings act as further levels. Against decode-then-average they differ by less than 0.5 grey levels in the
mean on real slides (docs/slides.md, measured by a test); they are exact in position.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eosin._devices import count_cores
from eosin.errors import CorruptSlideError, SlideError
from eosin.wsi._cache import SegmentCache
from eosin.wsi._jpeg import DecodeError
from eosin.wsi._pixels import ReadLevel, flips, is_native, read_oriented, read_scaled, turns
from eosin.wsi._segments import Level, with_shrunk
from eosin.wsi._slide import Slide
from eosin.wsi.inventory import Picture

CACHE_BYTES = (16 * 2**20, 128 * 2**20)
MANY_SEGMENTS = 32
SEGMENT_RUN = 16
MAX_THREADS = 4
MAX_MISSING = 0.5
MAX_MISSING_SPARSE = 0.99


class Closes(Protocol):
    """What a slide holds open."""

    def close(self) -> None:
        """Release it."""


class TiledSlide(Slide):
    """A slide read segment by segment.

    Parameters
    ----------
    path : Path
        The file.
    picture : Picture
        What it is; its sizes are those of `levels`, turned by `orientation`.
    levels : sequence of Level
        Stored levels, finest first.
    reader : str
        Name of the reader.
    files : sequence
        What is closed with the slide.
    orientation : int
        Tag 274 of TIFF 6.0: how the stored pixels are flipped or turned.
    sparse : bool
        Whether the format leaves out empty glass, so that many pieces may be missing.
    background : tuple of int
        RGB of missing pixels.
    icc_profile : bytes or None
        Colour profile of the pixels.
    mpp : float, optional
        The user's µm per level-0 pixel.

    Raises
    ------
    SlideError
        Code ``missing-tiles`` if more of the finest level than half is not stored.
    """

    def __init__(
        self,
        path: Path,
        picture: Picture,
        levels: Sequence[Level],
        *,
        reader: str,
        files: Sequence[Closes] = (),
        orientation: int = 1,
        sparse: bool = False,
        icc_profile: bytes | None = None,
        mpp: float | None = None,
    ) -> None:
        super().__init__(path, picture, reader=reader, mpp=mpp)
        self.icc_profile = icc_profile
        self._files = files
        self._orientation = orientation
        self._stored = list(levels)
        self.offsets_px0 = self._corners()
        self._cache = SegmentCache(_cache_bytes(levels[0]))
        self._plan = lru_cache(maxsize=8)(self._plan_reading)
        self._refuse_missing(levels[0].segments.missing(), sparse=sparse)

    def _corners(self) -> list[tuple[float, float]]:
        """Return where the corner of each level lies, in level-0 pixels.

        What is stored backwards ends where the finest level ends, and what rounding added or left out is at its start.
        """
        backwards = flips(self._orientation)
        if turns(self._orientation):
            backwards = backwards[::-1]
        corners = []
        for size, scale in zip(self.level_sizes, self.downsamples, strict=True):
            x, y = (
                whole - side * scale if is_backwards else 0.0
                for whole, side, is_backwards in zip(self.size_px0, size, backwards, strict=True)
            )
            corners.append((x, y))
        return corners

    def _refuse_missing(self, missing: float, *, sparse: bool) -> None:
        if missing > (MAX_MISSING_SPARSE if sparse else MAX_MISSING):
            self.close()
            message = f"{missing:.0%} of the stored pieces of its finest level are missing; copy or convert it again"
            raise SlideError(self.path, message, code="missing-tiles")
        if missing and not sparse:
            self.notes.append(f"{missing:.1%} of its stored tiles are missing and are treated as glass")

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return (h, w, 3) RGB at any mpp; see `eosin.wsi._slide.Slide.read`."""
        downsample = mpp / self.mpp
        read_level, levels = self._plan(downsample, max(size_px))
        downsamples, offsets = [level.downsample for level in levels], [level.offset_px0 for level in levels]
        return read_scaled(read_level, downsamples, origin_px0, size_px, downsample, offsets_px0=offsets)

    def _plan_reading(self, downsample: float, longest_px: int) -> tuple[ReadLevel, list[Level]]:
        """Choose the levels that may serve a request; the same for every tile of a grid."""
        stored = [
            replace(level, downsample=scale, offset_px0=offset)
            for level, scale, offset in zip(self._stored, self.downsamples, self.offsets_px0, strict=True)
        ]
        known = sorted(with_shrunk(stored), key=lambda level: (level.downsample, -level.shrink))
        levels = [self._placed(level) for level in known if _serves(level, downsample, longest_px)]

        def read_level(number: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
            return self._read_picture(levels[number], corner, size)

        return read_level, levels

    def _placed(self, level: Level) -> Level:
        """Return a level with its corner where it lies in the picture as it is meant.

        A picture that is stored backwards begins with the scaled level's last, partly filled column or row.
        """
        if level.shrink == 1 or self._orientation == 1:
            return level
        stored, backwards = self._stored[level.number].size_px, flips(self._orientation)
        beyond = [
            (level.size_px[axis] - stored[axis] / level.shrink) * level.downsample if backwards[axis] else 0.0
            for axis in (0, 1)
        ]
        across, down = beyond[::-1] if turns(self._orientation) else beyond
        return replace(level, offset_px0=(level.offset_px0[0] - across, level.offset_px0[1] - down))

    def read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one stored level, in that level's pixels; background outside."""
        return self._read_picture(self._stored[level], corner, size)

    def can_shrink(self, level: int, factor: int) -> bool:
        """Return whether the decoder delivers a level at a part of its size."""
        stored = self._stored[level]
        return factor == 1 or (stored.segments.shrinks and not any(side % factor for side in stored.segment_px))

    def read_shrunk(self, level: int, corner: tuple[int, int], size: tuple[int, int], factor: int) -> NDArray[np.uint8]:
        """Return pixels of a stored level at a part of its size."""
        stored = self._stored[level]
        return self._read_picture(stored if factor == 1 else stored.shrunk(factor), corner, size)

    def keep_levels(self, levels: Sequence[int]) -> None:
        """Forget all stored levels but these."""
        super().keep_levels(levels)
        self._stored = [replace(self._stored[level], number=number) for number, level in enumerate(levels)]
        self._cache = SegmentCache(_cache_bytes(self._stored[0]))

    def _read_picture(self, level: Level, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one level as the picture is meant."""
        if self._orientation == 1:
            return self._read_stored(level, corner, size)
        return read_oriented(partial(self._read_stored, level), level.size_px, self._orientation, corner, size)

    def _read_stored(self, level: Level, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one level as they are stored; background outside."""
        (left, top), (width, height) = corner, size
        whole = self._within_segment(level, corner, size)
        if whole is not None:
            return whole
        result = np.empty((height, width, 3), np.uint8)
        right, bottom = min(left + width, level.size_px[0]), min(top + height, level.size_px[1])
        if left < 0 or top < 0 or right < left + width or bottom < top + height:
            result[:] = self.background
        # wholly beside the picture: a segment at the edge may still reach under the region
        if right <= max(left, 0) or bottom <= max(top, 0):
            return result
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
        target[:] = self.background if segment is None else segment[y0 - y : bottom - y, x0 - x : right - x]

    def _decoded(self, level: Level, index: int) -> NDArray[np.uint8] | None:
        return self._decode(level, index) if level.segments.has(index) else None

    def _segment(self, level: Level, index: int) -> NDArray[np.uint8] | None:
        if not level.segments.has(index):
            return None
        return self._cache.get((level.number, level.shrink, index), lambda: self._decode(level, index))

    def _decode(self, level: Level, index: int) -> NDArray[np.uint8]:
        try:
            return level.decode(index)
        except (DecodeError, OSError) as error:
            row, column = divmod(index, level.across)
            scale = self.downsamples[level.number] * level.shrink
            x, y = (round(at * side * scale) for at, side in zip((column, row), level.segment_px, strict=True))
            where = f"segment {index} at level-0 ({x}, {y})"
            raise CorruptSlideError(self.path, f"stored pixels cannot be decoded ({where}): {error}") from error

    def close(self) -> None:
        """Release the file, and the decoded pixels: a slide refers to itself and may live long after this."""
        self._cache = SegmentCache(0)
        self._plan.cache_clear()
        for file in self._files:
            file.close()


def _in_threads(paste: Callable[[tuple[int, int]], None], places: Sequence[tuple[int, int]]) -> None:
    """Decode many segments, a run of them in each thread's turn; the decoders release the interpreter's lock."""
    runs = [places[start : start + SEGMENT_RUN] for start in range(0, len(places), SEGMENT_RUN)]

    def paste_run(run: Sequence[tuple[int, int]]) -> None:
        for place in run:
            paste(place)

    with ThreadPoolExecutor(min(MAX_THREADS, count_cores()), thread_name_prefix="segments") as pool:
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

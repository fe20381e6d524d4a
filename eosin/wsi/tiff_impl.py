"""Slides in TIFF files, decoded without OpenSlide in between: each stored tile once, in the caller's threads.

`open_direct` takes the tiled JPEG slides that OpenSlide reads too (SVS, generic pyramids, Philips-like) and leaves the
metadata to OpenSlide, so both readers agree on sizes and mpp; before a file is accepted, stored tiles of each level are
compared with OpenSlide's pixels. `open_plain` takes what OpenSlide refuses: OME-TIFF, strips, other compressions.

Between two stored levels the JPEG decoder can deliver 1/2, 1/4 and 1/8 of the size at a fraction of the cost. These
scaled decodings act as further levels. Against decode-then-average they differ by less than 0.5 grey levels in the
mean on real slides (docs/slides.md, measured by a test); they are exact in position.
"""

import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import tifffile
from numpy.typing import NDArray

from eosin.errors import CorruptSlideError, EosinError, SlideOpenError
from eosin.wsi.cache import SegmentCache
from eosin.wsi.openslide_impl import OpenSlideReader
from eosin.wsi.pixels import WHITE, ReadLevel, is_native, read_scaled
from eosin.wsi.resolution import Resolution, StatedMpp, resolve_mpp
from eosin.wsi.segments import DecodeError, Level, Places, decode_segment

CACHE_BYTES = (16 * 2**20, 128 * 2**20)
MAX_SEGMENT_PX = 64 * 2**20
MANY_SEGMENTS = 32
CORNER_PX = 64
SEGMENT_RUN = 16
MAX_THREADS = 4
DIRECT_VENDORS = ("aperio", "generic-tiff", "philips")
SHRINKS = (2, 4, 8)
DAMAGE = (  # what tifffile raises on damaged files
    tifffile.TiffFileError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError,
    OverflowError, ZeroDivisionError, struct.error,
)  # fmt: skip
_UNITS_UM = {1: None, 2: 25400.0, 3: 10000.0}
_OME_LENGTHS_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
Facts = dict[str, str | int | float | list[int] | list[float] | None]


class TiffReader:
    """A slide read segment by segment; implements `eosin.wsi.slide.Slide`. Made by `open_direct` and `open_plain`.

    Parameters
    ----------
    path : Path
        The file.
    tiff : TiffFile
        Open; closed with the reader.
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
    """

    def __init__(
        self,
        path: Path,
        tiff: tifffile.TiffFile,
        levels: Sequence[Level],
        resolution: Resolution,
        *,
        background: tuple[int, int, int] = WHITE,
        bounds_px0: tuple[int, int, int, int] | None = None,
        icc_profile: bytes | None = None,
        facts: Facts,
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
        if count > 8 * MAX_SEGMENT_PX:
            raise DecodeError(f"{count} bytes are stated for it")
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


def open_direct(path: Path, reference: OpenSlideReader) -> TiffReader | None:
    """Return a direct reader for a slide that OpenSlide has open, or None when the file does not qualify.

    Parameters
    ----------
    path : Path
        The file.
    reference : OpenSlideReader
        The same file; gives sizes, mpp and background, and pixels to compare with.
    """
    if reference.vendor not in DIRECT_VENDORS:
        return None
    try:
        tiff = _open_tiff(path)
    except DAMAGE:
        return None
    try:
        levels = _levels_like(tiff, reference)
        if levels and _pixels_agree(path, levels, reference):
            return TiffReader(
                path, tiff, levels, reference.resolution,
                background=reference.background, bounds_px0=reference.bounds_px0,
                icc_profile=reference.icc_profile, facts=_facts_like(reference),
            )  # fmt: skip
    except (EosinError, DecodeError, *DAMAGE):
        pass  # whatever is odd about the file, OpenSlide's own reader is the one to tell
    tiff.close()
    return None


def _open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF; what tifffile would log about damage becomes an error or a missing level here."""
    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        tiff = tifffile.TiffFile(path)
        try:
            list(tiff.pages)  # read while the log is off, and the series, too
            tiff.series  # noqa: B018
        except BaseException:
            tiff.close()
            raise
        return tiff
    finally:
        log.disabled = before


def _facts_like(reference: OpenSlideReader) -> Facts:
    facts = reference.facts()
    del facts["reader"]
    return facts


def _levels_like(tiff: tifffile.TiffFile, reference: OpenSlideReader) -> list[Level]:
    pages: dict[tuple[int, int], Any] = {}
    for page in (page.aspage() for page in tiff.pages):
        if page.is_tiled:
            pages.setdefault((page.imagewidth, page.imagelength), page)
    found = [pages.get(size) for size in reference.level_sizes]
    if not all(page is not None and _is_rgb_jpeg(page) for page in found):
        return []
    return [_level(page, number, reference.downsamples[number]) for number, page in enumerate(found)]


def _is_rgb_jpeg(page: Any) -> bool:
    is_missing = (
        page.description.startswith("Aperio") and 0 in page.databytecounts
    )  # Aperio fills these from other levels
    return bool(
        page.compression == 7
        and page.photometric in (2, 6)
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == 1
        and page.tilewidth * page.tilelength <= MAX_SEGMENT_PX
        and not is_missing
    )


def _level(page: Any, number: int, downsample: float) -> Level:
    size = (page.imagewidth, page.imagelength)
    segment = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    if 0 in segment:
        raise ValueError(f"it states stored pieces of {segment[0]} x {segment[1]} px")
    n_offsets, n_counts = len(page.dataoffsets), len(page.databytecounts)
    if n_offsets != n_counts:
        raise ValueError(f"it states {n_offsets} places and {n_counts} sizes of stored pieces")
    needed = -(-size[0] // segment[0]) * -(-size[1] // segment[1])
    if n_counts < needed:  # a piece that is missing on purpose has an entry of no bytes
        raise ValueError(f"it lists {n_counts} of the {needed} stored pieces of {size[0]} x {size[1]} px")
    return Level(page, number, size, segment, Places(page), downsample)


def _pixels_agree(path: Path, levels: Sequence[Level], reference: OpenSlideReader) -> bool:
    """Compare a corner of each level's first stored segment, and the middle one of level 0, with OpenSlide's pixels."""
    middle = (levels[0].across * (-(-levels[0].size_px[1] // levels[0].segment_px[1]))) // 2
    probes = [(levels[0], middle, MAX_SEGMENT_PX), *((level, 0, CORNER_PX) for level in levels)]
    with path.open("rb") as file:
        for level, index, longest in probes:
            count = level.page.databytecounts[index]
            if count == 0:
                continue
            file.seek(level.page.dataoffsets[index])
            decoded = decode_segment(level, index, file.read(count))
            row, column = divmod(index, level.across)
            x, y = column * level.segment_px[0], row * level.segment_px[1]
            width, height = (min(level.segment_px[i], level.size_px[i] - (x, y)[i], longest) for i in (0, 1))
            wanted = reference.read_level(level.number, (x, y), (width, height))
            if not np.array_equal(decoded[:height, :width], wanted):
                return False
    return True


def open_plain(path: Path, *, mpp: float | None = None) -> TiffReader:
    """Open a TIFF that OpenSlide refuses.

    Parameters
    ----------
    path : Path
        The file.
    mpp : float, optional
        The user's µm per level-0 pixel.

    Raises
    ------
    SlideOpenError
        If it is no TIFF, holds no 8-bit RGB picture, or would have to be decoded whole.
    """
    try:
        tiff = _open_tiff(path)
    except DAMAGE as error:
        raise SlideOpenError(path, "no reader knows this format", code="unsupported") from error
    try:
        levels = _levels_of_series(path, tiff)
        resolution = _plain_resolution(tiff, mpp)
        profile = levels[0].page.tags.valueof("InterColorProfile")
        return TiffReader(
            path, tiff, levels, resolution,
            icc_profile=bytes(profile) if profile else None, facts=_plain_facts(tiff, levels, resolution),
        )  # fmt: skip
    except DAMAGE as error:
        tiff.close()
        if isinstance(error, EosinError):
            raise
        raise SlideOpenError(path, f"the TIFF is damaged: {error}") from error


def _levels_of_series(path: Path, tiff: tifffile.TiffFile) -> list[Level]:
    pages = [level.keyframe for level in tiff.series[0].levels]
    first = pages[0]
    if 0 in (first.imagewidth, first.imagelength):
        raise ValueError(f"it states {first.imagewidth} x {first.imagelength} px")
    if len(tiff.series[0].pages) > 1 or not _is_rgb(first):
        channels = len(tiff.series[0].pages) * first.samplesperpixel
        raise SlideOpenError(
            path,
            f"it holds {channels} channel(s) of {first.dtype}; eosin reads 8-bit RGB (bright-field)",
            code="unsupported-pixels",
        )
    levels = [_level(page, number, first.imagewidth / page.imagewidth) for number, page in enumerate(pages)]
    for level in levels:
        if level.segment_px[0] * level.segment_px[1] > MAX_SEGMENT_PX:
            raise SlideOpenError(
                path,
                f"its pixels are stored in pieces of {level.segment_px[0]} x {level.segment_px[1]} px; convert it with "
                f"`vips tiffsave {path.name} out.tif --tile --pyramid --compression jpeg --bigtiff`",
                code="untiled",
            )
    return [level for level in levels if _is_rgb(level.page)]


def _is_rgb(page: Any) -> bool:
    colours = page.photometric in (2, 6) or page.compression in (33003, 33005, 34712)
    return bool(page.dtype == np.uint8 and page.samplesperpixel == 3 and page.planarconfig == 1 and colours)


def _plain_resolution(tiff: tifffile.TiffFile, user_mpp: float | None) -> Resolution:
    text = tiff.ome_metadata or ""
    stated = [found for found in (_ome_mpp(text), _tag_mpp(tiff.pages[0])) if found is not None]
    power = re.search(r'NominalMagnification="([0-9.]+)"', text)
    return resolve_mpp(stated, power=float(power[1]) if power else None, user_mpp=user_mpp)


def _ome_mpp(text: str) -> StatedMpp | None:
    pixels = re.search(r"<(?:\w+:)?Pixels\s[^>]*>", text)
    if pixels is None:
        return None
    values = []
    for axis in "XY":
        size = re.search(rf'PhysicalSize{axis}="([0-9.eE+-]+)"', pixels[0])
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', pixels[0])
        scale = _OME_LENGTHS_UM.get(unit[1] if unit else "µm")
        if size is None or scale is None:
            return None
        values.append(float(size[1]) * scale)
    return StatedMpp("ome", values[0], values[1])


def _tag_mpp(page: Any) -> StatedMpp | None:
    per_unit = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    unit_um = _UNITS_UM.get(int(page.tags.valueof("ResolutionUnit", 2)))
    if unit_um is None or any(value is None or 0 in value for value in per_unit):
        return None
    x, y = (unit_um * denominator / numerator for numerator, denominator in per_unit)
    return StatedMpp("tiff-resolution", x, y)


def _plain_facts(tiff: tifffile.TiffFile, levels: Sequence[Level], resolution: Resolution) -> Facts:
    width, height = levels[0].size_px
    return {
        "vendor": "ome" if tiff.is_ome else "tiff",
        "width_px0": width,
        "height_px0": height,
        "level_downsamples": [round(level.downsample, 4) for level in levels],
        "mpp": resolution.mpp,
        "mpp_source": resolution.source,
        "mpp_note": resolution.note or resolution.refusal,
        "objective_power": None,
    }

"""Which TIFF files are read directly, and what their directories say.

`open_direct` takes the tiled JPEG slides that OpenSlide reads too (SVS, generic pyramids, Philips-like) and leaves the
metadata to OpenSlide, so both readers agree on sizes and mpp; before a file is accepted, stored tiles of each level are
compared with OpenSlide's pixels. `open_plain` takes what OpenSlide refuses: OME-TIFF, strips, other compressions.
"""

import logging
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from eosin.errors import EosinError, SlideOpenError
from eosin.wsi.directory import Directory, read_directories
from eosin.wsi.openslide_impl import OpenSlideReader
from eosin.wsi.resolution import Resolution, StatedMpp, resolve_mpp
from eosin.wsi.segments import MAX_SEGMENT_PX, MAX_STORED_BYTES, DecodeError, Level, Places, decode_segment
from eosin.wsi.tiff_impl import Facts, TiffReader

CORNER_PX = 64
DIRECT_VENDORS = ("aperio", "generic-tiff", "philips")
DAMAGE = (  # what tifffile raises on damaged files
    tifffile.TiffFileError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError,
    OverflowError, ZeroDivisionError, struct.error,
)  # fmt: skip
_UNITS_UM = {1: None, 2: 25400.0, 3: 10000.0}
_OME_LENGTHS_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}


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
        with path.open("rb") as file:
            levels = _levels_like(read_directories(file), reference)
            if not levels or not _pixels_agree(file, levels, reference):
                return None
        return TiffReader(
            path, levels, reference.resolution,
            background=reference.background, bounds_px0=reference.bounds_px0,
            icc_profile=reference.icc_profile, facts=_facts_like(reference),
        )  # fmt: skip
    except (EosinError, DecodeError, *DAMAGE):
        return None  # whatever is odd about the file, OpenSlide's own reader is the one to tell


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


def _levels_like(directories: Sequence[Directory], reference: OpenSlideReader) -> list[Level]:
    pages: dict[tuple[int, int], Directory] = {}
    for page in directories:
        if page.is_tiled:
            pages.setdefault((page.imagewidth, page.imagelength), page)
    found = [pages.get(size) for size in reference.level_sizes]
    if not all(page is not None and _is_rgb_jpeg(page) for page in found):
        return []
    return [_level(page, number, reference.downsamples[number]) for number, page in enumerate(found)]


def _is_rgb_jpeg(page: Directory) -> bool:
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


def _pixels_agree(file: BinaryIO, levels: Sequence[Level], reference: OpenSlideReader) -> bool:
    """Compare a corner of each level's first stored segment, and the middle one of level 0, with OpenSlide's pixels."""
    middle = (levels[0].across * (-(-levels[0].size_px[1] // levels[0].segment_px[1]))) // 2
    probes = [(levels[0], middle, MAX_SEGMENT_PX), *((level, 0, CORNER_PX) for level in levels)]
    for level, index, longest in probes:
        count = int(level.page.databytecounts[index])
        if count == 0:
            continue
        if count > MAX_STORED_BYTES:
            return False
        file.seek(int(level.page.dataoffsets[index]))
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
        If it is not a TIFF, holds no 8-bit RGB picture, or would have to be decoded whole.
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
            path, levels, resolution,
            icc_profile=bytes(profile) if profile else None, facts=_plain_facts(tiff, levels, resolution), tiff=tiff,
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

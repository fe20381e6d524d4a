"""Stored pieces of a TIFF level, tiles or strips, and how one is decoded; JPEG tiles also at a part of their size."""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SEGMENT_PX = 64 * 2**20
MAX_STORED_BYTES = 8 * MAX_SEGMENT_PX
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
END_OF_IMAGE = b"\xff\xd9"
RGB_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
YCBCR_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"


class DecodeError(Exception):
    """Stored bytes that are not a picture of the size that the file states."""


class Places:
    """Where the segments of a level lie in the file.

    Parameters
    ----------
    page : TiffPage
        Their directory. Tables of 100,000 entries take their time and are made when they are asked for.
    """

    def __init__(self, page: Any) -> None:
        self._page = page

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First byte of each, (n,)."""
        return np.asarray(self._page.dataoffsets, np.int64)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Bytes of each, (n,); 0 where a segment is missing."""
        return np.asarray(self._page.databytecounts, np.int64)


@dataclass(frozen=True)
class Level:
    """One resolution of the file: a lattice of segments (tiles, or strips as wide as the picture).

    Parameters
    ----------
    page : TiffPage
        Directory of the file that holds it.
    number : int
        Identifies the stored level in the cache.
    size_px, segment_px : tuple of int
        Width and height.
    places : Places
        Where each segment lies.
    downsample : float
        Level-0 pixels per pixel.
    shrink : int
        Factor by which the JPEG decoder reduces the stored pixels.
    """

    page: Any
    number: int
    size_px: tuple[int, int]
    segment_px: tuple[int, int]
    places: Places
    downsample: float
    shrink: int = 1

    @property
    def across(self) -> int:
        """Segments in a row."""
        return -(-self.size_px[0] // self.segment_px[0])

    @cached_property
    def start_rgb(self) -> bytes:
        """What a stored JPEG of RGB begins with: its tables, which the directory keeps once."""
        return self._start(RGB_MARKER)

    @cached_property
    def start_ycbcr(self) -> bytes:
        """What a stored JPEG of YCbCr begins with."""
        return self._start(YCBCR_MARKER)

    def _start(self, marker: bytes) -> bytes:
        tables: bytes = (self.page.jpegtables or b"")[2:-2]  # without start and end of image
        return b"\xff\xd8" + marker + tables

    @property
    def is_jpeg(self) -> bool:
        """Whether segments can be decoded at a fraction of their size."""
        return bool(self.page.compression == 7 and self.page.is_tiled)

    def has(self, index: int) -> bool:
        """Return whether a segment is stored."""
        counts, offsets = self.places.counts, self.places.offsets
        return index < len(counts) and bool(counts[index] and offsets[index])

    def shrunk(self, factor: int) -> "Level":
        """Return the level that the JPEG decoder makes of this one."""
        width, height = (-(-side // factor) for side in self.size_px)
        segment = (self.segment_px[0] // factor, self.segment_px[1] // factor)
        return Level(
            self.page, self.number, (width, height), segment, self.places, self.downsample * factor, factor
        )  # fmt: skip


def decode_segment(level: Level, index: int, data: bytes) -> NDArray[np.uint8]:
    """Decode one stored segment.

    Returns
    -------
    (h, w, 3) uint8
        As large as the level's segments; strips and tiles at the edge may be smaller.

    Raises
    ------
    DecodeError
        If the bytes are not a picture of the stated size.
    """
    try:
        if not level.is_jpeg:
            return _decode_any(level, index, data)
        if END_OF_IMAGE not in data[-64:]:
            raise DecodeError("the JPEG is cut off")
        return _decode_jpeg(level, data) if level.shrink == 1 else _decode_shrunk(level, index, data)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError, SyntaxError, struct.error) as error:
        raise DecodeError(str(error) or type(error).__name__) from error


def _decode_jpeg(level: Level, data: bytes) -> NDArray[np.uint8]:
    width, height = level.segment_px
    pixels: NDArray[np.uint8] = np.empty((height, width, 3), np.uint8)
    colours = "YCBCR" if _is_ycbcr(level, data) else "RGB"
    tables = level.page.jpegtables
    imagecodecs.jpeg8_decode(data, tables=tables, colorspace=colours, outcolorspace="RGB", out=pixels)
    return pixels


def _is_ycbcr(level: Level, data: bytes) -> bool:
    """Return the colours of the stored JPEG: the TIFF tag, unless a JFIF header contradicts it (JFIF is YCbCr)."""
    return bool(level.page.photometric == 6) or data[6:10] == b"JFIF"


def _decode_shrunk(level: Level, index: int, data: bytes) -> NDArray[np.uint8]:
    start = level.start_ycbcr if _is_ycbcr(level, data) else level.start_rgb
    return _without_padding(level, index, decode_reduced(data, level.segment_px, level.shrink, start=start))


def decode_reduced(
    data: bytes, size_px: tuple[int, int], shrink: int, *, start: bytes = b"\xff\xd8"
) -> NDArray[np.uint8]:
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size.

    Pillow's own decoder without the parsing around it, which for tiles of 256 px costs as much as the decoding.

    Parameters
    ----------
    data : bytes
        The JPEG.
    size_px : tuple of int
        Width and height of the result.
    shrink : int
        2, 4 or 8.
    start : bytes
        Takes the place of the first two bytes: the start of the image, and tables that the TIFF keeps once.

    Returns
    -------
    (h, w, 3) uint8

    Raises
    ------
    DecodeError
        If the bytes are not a JPEG that is `shrink` times as large as `size_px`.
    """
    width, height = size_px
    stored = _stored_size(data)
    if stored != (width * shrink, height * shrink):
        raise DecodeError(f"it is {stored[0]} x {stored[1]} px")
    decoder = Image._getdecoder("RGB", "jpeg", ("RGB", ""), (shrink, 0))
    picture = Image.new("RGB", size_px, None)
    decoder.setimage(picture.im, (0, 0, width, height))
    used, code = decoder.decode(start + data[2:])
    if used >= 0 or code < 0:
        raise DecodeError(f"the JPEG is damaged or cut off (code {code})")
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, 3)


def _stored_size(data: bytes) -> tuple[int, int]:
    """Return width and height that the frame header of a JPEG states."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if kind in FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        place += 2 + length
    raise DecodeError("it has no frame header")


def _without_padding(level: Level, index: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Replace averages over what lies beyond the picture's edge by their neighbours inside."""
    row, column = divmod(index, level.across)
    stored = level.page.imagewidth, level.page.imagelength
    whole = [stored[axis] // level.shrink - place * level.segment_px[axis] for axis, place in enumerate((column, row))]
    partial = [0 < count < level.segment_px[axis] for axis, count in enumerate(whole)]
    if any(partial):
        pixels = pixels.copy()
    if partial[0]:
        pixels[:, whole[0]] = pixels[:, whole[0] - 1]
    if partial[1]:
        pixels[whole[1]] = pixels[whole[1] - 1]
    return pixels


def _decode_any(level: Level, index: int, data: bytes) -> NDArray[np.uint8]:
    decoded, _, _ = level.page.decode(data, index, jpegtables=level.page.jpegtables)
    if decoded is None or decoded.ndim != 4 or decoded.shape[-1] < 3 or decoded.dtype != np.uint8:
        raise DecodeError("it is not an 8-bit RGB picture")
    pixels: NDArray[np.uint8] = decoded[0]
    if pixels.shape[-1] == 4:
        raise DecodeError("it has an alpha channel")
    return pixels

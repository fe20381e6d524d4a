"""JPEG pieces of slides: which colours they store, and decoding at full size or a part of it."""

import struct
from collections.abc import Iterator

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JFIF, ADOBE, SCAN = 0xE0, 0xEE, 0xDA
START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
RGB_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
YCBCR_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"


class DecodeError(Exception):
    """Stored bytes that are not a picture of the size that the file states."""


def _markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker before the pixels, and the place after its length."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == SCAN:
            return
        yield kind, place + 4
        place += 2 + length


def is_ycbcr(data: bytes, *, stated: bool | None) -> bool:
    """Return whether a JPEG of three components stores YCbCr.

    One rule for every container. What the JPEG says of itself counts before what the container says of it, because
    writers copy JPEGs as they are and state their colours wrongly: JFIF (always YCbCr), then Adobe's marker, as libjpeg
    has it, then the names of the components, then chroma at a part of the resolution (RGB is never stored so).

    Parameters
    ----------
    data : bytes
        The JPEG.
    stated : bool or None
        What the container says; None when it says nothing, and the JPEG standard's YCbCr holds.
    """
    adobe, frame = None, None
    for kind, place in _markers(data):
        if kind == JFIF and data[place : place + 4] == b"JFIF":
            return True
        if kind == ADOBE and data[place : place + 5] == b"Adobe" and len(data) >= place + 12:
            adobe = data[place + 11] != 0
        elif kind in FRAME_HEADERS and len(data) >= place + 15:
            frame = _says_its_frame(data[place + 6 : place + 15])
    if adobe is not None:
        return adobe
    return (stated is not False) if frame is None else frame


def _says_its_frame(components: bytes) -> bool | None:
    """Return what names and sampling of three components say: YCbCr, RGB or nothing."""
    if components[0::3] == b"RGB":
        return False
    sampling = components[1::3]
    return True if sampling[0] > max(sampling[1], sampling[2]) else None


def stored_size(data: bytes) -> tuple[int, int]:
    """Return width and height that the frame header of a JPEG states.

    Raises
    ------
    DecodeError
        If there is none.
    """
    for kind, place in _markers(data):
        if kind in FRAME_HEADERS and place + 5 <= len(data):
            height, width = struct.unpack_from(">HH", data, place + 1)
            return width, height
    raise DecodeError("it has no frame header")


def decode_whole(
    data: bytes, size_px: tuple[int, int], *, tables: bytes | None = None, stated: bool | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG of three components.

    Parameters
    ----------
    data : bytes
        The JPEG.
    size_px : tuple of int
        Its width and height.
    tables : bytes, optional
        Tables that the container keeps once for all.
    stated : bool, optional
        Whether the container says that it is YCbCr.

    Returns
    -------
    (h, w, 3) uint8

    Raises
    ------
    DecodeError
        If the JPEG is cut off.
    """
    if END_OF_IMAGE not in data[-64:]:
        raise DecodeError("the JPEG is cut off")
    pixels: NDArray[np.uint8] = np.empty((size_px[1], size_px[0], 3), np.uint8)
    colours = "YCBCR" if is_ycbcr(data, stated=stated) else "RGB"
    imagecodecs.jpeg8_decode(data, tables=tables, colorspace=colours, outcolorspace="RGB", out=pixels)
    return pixels


def decode_shrunk(
    data: bytes, size_px: tuple[int, int], shrink: int, *, tables: bytes | None = None, stated: bool | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG of three components at 1/2, 1/4 or 1/8 of its size; see `decode_whole` and `decode_reduced`."""
    if END_OF_IMAGE not in data[-64:]:
        raise DecodeError("the JPEG is cut off")
    marker = YCBCR_MARKER if is_ycbcr(data, stated=stated) else RGB_MARKER
    start = START_OF_IMAGE + marker + (tables or b"")[2:-2]  # tables without their start and end of image
    return decode_reduced(data, size_px, shrink, start=start)


def decode_reduced(
    data: bytes, size_px: tuple[int, int], shrink: int, *, start: bytes = START_OF_IMAGE
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
    stored = stored_size(data)
    if stored != (width * shrink, height * shrink):
        raise DecodeError(f"it is {stored[0]} x {stored[1]} px")
    decoder = Image._getdecoder("RGB", "jpeg", ("RGB", ""), (shrink, 0))
    picture = Image.new("RGB", size_px, None)
    decoder.setimage(picture.im, (0, 0, width, height))
    used, code = decoder.decode(start + data[2:])
    if used >= 0 or code < 0:
        raise DecodeError(f"the JPEG is damaged or cut off (code {code})")
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, 3)

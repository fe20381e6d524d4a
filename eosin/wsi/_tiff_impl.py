"""TIFF slides, read without OpenSlide: SVS, OME-TIFF, Philips, QPTIFF and generic ones, of every compression."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eosin.errors import EosinError, SlideOpenError
from eosin.wsi._directory import (
    EXTRA_SAMPLES,
    ICC_PROFILE,
    ORIENTATION,
    EndsEarlyError,
    read_directories,
    require_whole,
)
from eosin.wsi._jpeg import DecodeError, decode_shrunk, decode_whole
from eosin.wsi._pixels import WHITE, flatten, to_8_bit, turns, ycbcr_to_rgb
from eosin.wsi._segments import Bytes, Level, Segments, without_padding
from eosin.wsi._tiff_inventory import (
    APERIO_YCBCR,
    DECODES_TO_RGB,
    JPEG,
    YCBCR,
    Channels,
    Stack,
    list_stacks,
    vendor_of,
)  # fmt: skip
from eosin.wsi._tiled import TiledSlide
from eosin.wsi.inventory import Picture
from eosin.wsi.reader import Reader

if TYPE_CHECKING:
    import tifffile

MAGIC = (b"II\x2a\0", b"MM\0\x2a", b"II\x2b\0", b"MM\0\x2b")
OPENSLIDES = ("hamamatsu", "leica", "trestle", "ventana")
DAMAGE = (  # what decoders raise on damaged files
    OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError,
    OverflowError, ZeroDivisionError, SyntaxError, struct.error,
)  # fmt: skip


class TiffReader(Reader):
    """TIFF files, save those whose vendors put pictures together from overlapping parts, which OpenSlide knows."""

    name = "direct TIFF"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with path.open("rb") as file:
                chain = read_directories(file)
            self._stacks = list_stacks(chain)
            require_whole(chain, path.stat().st_size)
        except EndsEarlyError as error:
            message = f"the TIFF is cut short: {error}; copy the file again"
            raise SlideOpenError(path, message, code="truncated") from error
        except DAMAGE as error:
            if isinstance(error, EosinError):
                raise
            raise SlideOpenError(path, f"the TIFF is damaged: {error}") from error
        self.pictures = [stack.picture for stack in self._stacks]

    @classmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether a file is a TIFF of a kind that is read here.

        A .vsi is a TIFF of macro and label; the slide lies in other files beside it.
        """
        if not head.startswith(MAGIC) or path.name.lower().endswith(".vsi"):
            return False
        try:
            with path.open("rb") as file:
                chain = read_directories(file)
        except (OSError, ValueError):
            return True  # reading it will say what is wrong
        vendor = vendor_of(chain)
        # JPEG 2000 whose colours have half the resolution, which only OpenSlide puts together
        subsampled = vendor == "aperio" and chain[0].compression == APERIO_YCBCR
        return vendor not in OPENSLIDES and not subsampled

    def open(self, picture: Picture, plane: int, mpp: float | None) -> TiledSlide:
        """Open a picture; see `Reader.open`."""
        stack = next(stack for stack in self._stacks if stack.picture is picture)
        data, pages = Bytes(self.path), Pages(self.path)
        try:
            return self._open(stack, plane, mpp, data, pages)
        except DAMAGE as error:
            data.close()
            pages.close()
            if isinstance(error, EosinError):
                raise
            raise SlideOpenError(self.path, f"the TIFF is damaged: {error}") from error

    def _open(self, stack: Stack, plane: int, mpp: float | None, data: Bytes, pages: "Pages") -> TiledSlide:
        first = stack.planes[plane][0][0]
        orientation = first.number(ORIENTATION, 1)
        orientation = orientation if 1 <= orientation <= 8 else 1
        picture = _turned(stack.picture) if turns(orientation) else stack.picture
        profile = first.fields.get(ICC_PROFILE)
        slide = TiledSlide(
            self.path, picture, _levels(stack, plane, data, pages), reader=self.name, files=(data, pages),
            orientation=orientation, sparse=stack.sparse, icc_profile=bytes(profile) if profile is not None else None,
            mpp=mpp,
        )  # fmt: skip
        slide.declared = list(stack.declared)
        return slide


def _turned(picture: Picture) -> Picture:
    return replace(picture, sizes_px=tuple((height, width) for width, height in picture.sizes_px))


def _levels(stack: Stack, plane: int, data: Bytes, pages: "Pages") -> list[Level]:
    return [
        _level(number, channels, TiffSegments(data, pages, channels, stack.top))
        for number, channels in enumerate(stack.planes[plane])
    ]


def _level(number: int, channels: Channels, segments: "TiffSegments") -> Level:
    page = channels[0]
    size, piece = page.size_px, page.segment_px
    if 0 in piece:
        raise ValueError(f"it states stored pieces of {piece[0]} x {piece[1]} px")
    for channel in channels:
        n_offsets, n_counts = len(channel.dataoffsets), len(channel.databytecounts)
        if n_offsets != n_counts:
            raise ValueError(f"it states {n_offsets} places and {n_counts} sizes of stored pieces")
        needed = segments.per_plane * (page.samplesperpixel if page.planarconfig == 2 else 1)
        if n_counts < needed:  # a piece that is missing on purpose has an entry of no bytes
            raise ValueError(f"it lists {n_counts} of the {needed} stored pieces of {size[0]} x {size[1]} px")
    return Level(segments, number, size, piece)


class Pages:
    """Directories as tifffile reads them, for its decoders; opened when the first is asked for.

    Parameters
    ----------
    path : Path
        The TIFF.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tiff: tifffile.TiffFile | None = None
        self._lock = Lock()

    def page(self, place: int) -> Any:
        """Return the page whose directory lies at a place in the file."""
        import tifffile  # takes longer to import than all readers together

        with self._lock, _silent_tifffile():
            if self._tiff is None:
                self._tiff = tifffile.TiffFile(self._path)
            self._tiff.filehandle.seek(place)
            page = tifffile.TiffPage(self._tiff, index=0)
            page.decode  # noqa: B018 - is made on first use, which is not safe in threads
            return page

    def close(self) -> None:
        """Close the file."""
        if self._tiff is not None:
            self._tiff.close()


@contextmanager
def _silent_tifffile() -> Iterator[None]:
    """Keep tifffile from logging what becomes an error here."""
    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class TiffSegments(Segments):
    """Tiles or strips of a directory, or of three that hold red, green and blue.

    Parameters
    ----------
    data : Bytes
        The file.
    pages : Pages
        The same file.
    channels : tuple of Directory
        One, or one for each colour.
    top : int
        Largest value of a pixel.
    """

    def __init__(self, data: Bytes, pages: Pages, channels: Channels, top: int) -> None:
        self._data = data
        self._pages = pages
        self._channels = channels
        self._top = top
        page = channels[0]
        self._page = page
        self._size, self._piece = page.size_px, page.segment_px
        # the fast decoders know colours that lie together, of 8 bits
        chunky = len(channels) == 1 and page.planarconfig != 2
        self._is_jpeg = page.compression == JPEG and chunky and page.samplesperpixel == 3 and page.bitspersample == 8
        self.shrinks = self._is_jpeg and page.is_tiled
        self._stated = page.photometric == YCBCR

    @property
    def per_plane(self) -> int:
        """How many pieces hold one colour, or all colours of a picture whose colours lie together."""
        across, down = (-(-side // piece) for side, piece in zip(self._size, self._piece, strict=True))
        return across * down

    @cached_property
    def _places(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Offsets and sizes per channel; tables of 100,000 entries take their time and are made when needed."""
        return [
            (np.asarray(channel.dataoffsets, np.int64), np.asarray(channel.databytecounts, np.int64))
            for channel in self._channels
        ]

    @cached_property
    def _decoders(self) -> list[Any]:
        return [self._pages.page(channel.place) for channel in self._channels]

    def has(self, index: int) -> bool:
        """Return whether a piece is stored; see `Segments.has`."""
        offsets, counts = self._places[0]
        return index < len(counts) and bool(counts[index] and offsets[index])

    def missing(self) -> float:
        """Return the share of pieces that are not stored."""
        offsets, counts = self._places[0]
        needed = self.per_plane
        return float(np.mean((offsets[:needed] == 0) | (counts[:needed] == 0)))

    def decode(self, index: int, shrink: int) -> NDArray[np.uint8]:
        """Return the pixels of a piece; see `Segments.decode`."""
        try:
            if self._is_jpeg:
                return self._decode_jpeg(index, shrink)
            pieces = [
                self._decode_piece(channel, index + plane * self.per_plane)
                for channel in range(len(self._channels))
                for plane in range(self._page.samplesperpixel if self._page.planarconfig == 2 else 1)
            ]
            return self._finish(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1))
        except (ValueError, RuntimeError, KeyError, TypeError, IndexError, SyntaxError, struct.error) as error:
            raise DecodeError(str(error) or type(error).__name__) from error

    def _stored(self, channel: int, index: int) -> bytes:
        offsets, counts = self._places[channel]
        return self._data.read(int(offsets[index]), int(counts[index]))

    def _decode_jpeg(self, index: int, shrink: int) -> NDArray[np.uint8]:
        data, tables = self._stored(0, index), self._page.jpegtables
        width, height = self._piece
        row, column = divmod(index, -(-self._size[0] // width))
        if not self._page.is_tiled:  # the last strip is as high as what is left
            height = min(height, self._size[1] - row * height)
        if shrink == 1:
            return decode_whole(data, (width, height), tables=tables, stated=self._stated)
        size = (width // shrink, height // shrink)
        pixels = decode_shrunk(data, size, shrink, tables=tables, stated=self._stated)
        whole = [self._size[axis] // shrink - (column, row)[axis] * size[axis] for axis in (0, 1)]
        return without_padding(pixels, (whole[0], whole[1]))

    def _decode_piece(self, channel: int, index: int) -> NDArray[Any]:
        data, page = self._stored(channel, index), self._channels[channel]
        if page.compression == JPEG:
            # a plane of one colour; tifffile would apply the colour space of the whole picture to it
            grey = imagecodecs.jpeg8_decode(data, tables=page.jpegtables)
            return np.asarray(grey if grey.ndim == 3 else grey[..., None])
        decoded, _, _ = self._decoders[channel].decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:
            raise DecodeError("it is empty")
        return np.asarray(decoded[0])

    def _finish(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return 8-bit RGB of what a decoder delivers."""
        if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4) or pixels.dtype not in (np.uint8, np.uint16):
            raise DecodeError(f"it is not RGB but {pixels.dtype} of shape {pixels.shape}")
        rgb = to_8_bit(pixels, self._top)
        if rgb.shape[-1] == 4:
            return self._without_alpha(rgb)
        # codecs that know colours deliver RGB already
        plain = self._stated and self._page.compression not in DECODES_TO_RGB
        return ycbcr_to_rgb(rgb) if plain else rgb

    def _without_alpha(self, rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
        kind = self._page.number(EXTRA_SAMPLES, 0)
        if kind == 0:  # not said to be alpha
            return np.ascontiguousarray(rgba[..., :3])
        if kind == 2:
            return flatten(Image.fromarray(rgba, "RGBA"), WHITE)
        colours, alpha = rgba[..., :3].astype(np.int16), rgba[..., 3:].astype(np.int16)
        return np.asarray(np.minimum(colours + 255 - alpha, 255), np.uint8)  # multiplied with alpha already

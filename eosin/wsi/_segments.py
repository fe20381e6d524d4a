"""Stored pieces of a picture's levels, and the lattice that they form, for every container of pieces."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._jpeg import DecodeError

MAX_SEGMENT_PX = 64 * 2**20
MAX_STORED_BYTES = 8 * MAX_SEGMENT_PX
SHRINKS = (2, 4, 8)


class Bytes:
    """The bytes of a file, for several threads.

    Parameters
    ----------
    path : Path
        Opened at once.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        self._lock = Lock()

    def read(self, offset: int, count: int) -> bytes:
        """Return stored bytes.

        Raises
        ------
        DecodeError
            If the file ends before them, or no file could hold them.
        """
        if not (0 <= count <= MAX_STORED_BYTES and 0 <= offset < 2**63):
            raise DecodeError(f"{count} bytes at {offset} are stated for it")
        with self._lock:  # place and reading belong together
            self._file.seek(offset)
            data = self._file.read(count)
        if len(data) != count:
            raise DecodeError("the file ends before it")
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Segments(ABC):
    """The stored pieces of one level: tiles, strips, frames or chunks, numbered row by row."""

    shrinks = False
    """Whether the decoder can deliver a piece at 1/2, 1/4 and 1/8 of its size."""

    @abstractmethod
    def has(self, index: int) -> bool:
        """Return whether a piece is stored."""

    @abstractmethod
    def decode(self, index: int, shrink: int) -> NDArray[np.uint8]:
        """Return the pixels of a piece, (h, w, 3); those at the edge may be smaller than the others.

        Raises
        ------
        DecodeError, OSError
            If the bytes are not a picture of the stated size.
        """

    @abstractmethod
    def missing(self) -> float:
        """Return the share of pieces that are not stored."""


@dataclass(frozen=True)
class Level:
    """One resolution of a picture: a lattice of segments (tiles, or strips as wide as the picture).

    Parameters
    ----------
    segments : Segments
        What is stored.
    number : int
        Identifies the stored level in the cache.
    size_px, segment_px : tuple of int
        Width and height.
    downsample : float
        Level-0 pixels per pixel.
    offset_px0 : tuple of float
        Where the level's corner lies, level-0 pixels.
    shrink : int
        Factor by which the decoder reduces the stored pixels.
    """

    segments: Segments
    number: int
    size_px: tuple[int, int]
    segment_px: tuple[int, int]
    downsample: float = 1.0
    offset_px0: tuple[float, float] = (0.0, 0.0)
    shrink: int = 1

    @property
    def across(self) -> int:
        """Segments in a row."""
        return -(-self.size_px[0] // self.segment_px[0])

    def shrunk(self, factor: int) -> "Level":
        """Return the level that the decoder makes of this one."""
        width, height = (-(-side // factor) for side in self.size_px)
        segment = (self.segment_px[0] // factor, self.segment_px[1] // factor)
        return replace(
            self, size_px=(width, height), segment_px=segment, downsample=self.downsample * factor, shrink=factor
        )

    def decode(self, index: int) -> NDArray[np.uint8]:
        """Decode one stored segment, (h, w, 3).

        Raises
        ------
        DecodeError, OSError
            If it is not a picture of the stated size.
        """
        pixels = self.segments.decode(index, self.shrink)
        row, column = divmod(index, self.across)
        corner = (column * self.segment_px[0], row * self.segment_px[1])
        width, height = (min(self.segment_px[axis], self.size_px[axis] - corner[axis]) for axis in (0, 1))
        # a piece may be larger than what lies in the picture, never smaller: nothing is made up
        if pixels.shape[0] < height or pixels.shape[1] < width:
            raise DecodeError(f"it is only {pixels.shape[1]} x {pixels.shape[0]} px")
        return pixels


def without_padding(pixels: NDArray[np.uint8], inside_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Replace averages over what lies beyond the picture's edge by their neighbours inside.

    Parameters
    ----------
    pixels : (h, w, 3) uint8
        A piece that was decoded at a part of its size.
    inside_px : tuple of int
        How many of its columns and rows lie wholly within the picture.
    """
    height, width = pixels.shape[:2]
    partial = 0 < inside_px[0] < width, 0 < inside_px[1] < height
    if any(partial):
        pixels = pixels.copy()
    if partial[0]:
        pixels[:, inside_px[0]] = pixels[:, inside_px[0] - 1]
    if partial[1]:
        pixels[inside_px[1]] = pixels[inside_px[1] - 1]
    return pixels


def with_shrunk(levels: Sequence[Level]) -> Iterator[Level]:
    """Yield each level and those that its decoder makes of it, down to the next stored one."""
    for number, level in enumerate(levels):
        yield level
        following = levels[number + 1].downsample if number + 1 < len(levels) else float("inf")
        for factor in SHRINKS:
            divides = all(side % factor == 0 for side in level.segment_px)
            # scaled decodings that a stored level nearly equals would only cost memory
            if level.segments.shrinks and divides and level.downsample * factor < 0.97 * following:
                yield level.shrunk(factor)

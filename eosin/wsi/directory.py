"""Directories of a TIFF file, as far as tiled JPEG slides need them.

tifffile reads every tag of every directory, which takes half of the time to open a slide; here only the tags that
decide where stored tiles lie and how they are decoded are read, and tables of 100,000 tiles stay bytes until they are
asked for. TIFF 6.0 and BigTIFF, both byte orders.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_DIRECTORIES = 1000
MAX_TAGS = 4096
MAX_TABLE_BYTES = 256 * 2**20
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION = 256, 257, 258, 259, 262, 270
SAMPLES, PLANAR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS, JPEG_TABLES = 277, 284, 322, 323, 324, 325, 347
_WANTED = frozenset(
    (WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION, SAMPLES, PLANAR, TILE_WIDTH, TILE_LENGTH,
     TILE_OFFSETS, TILE_COUNTS, JPEG_TABLES)
)  # fmt: skip
_KINDS = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}  # by type of field
_ORDERS = {b"II": "<", b"MM": ">"}


@dataclass(frozen=True, eq=False)
class Directory:
    """One directory: the names are those of tifffile's pages.

    Parameters
    ----------
    fields : mapping
        Numbers or bytes of a tag by its code.
    """

    fields: Mapping[int, NDArray[np.unsignedinteger]]

    def _number(self, code: int, default: int) -> int:
        values = self.fields.get(code)
        return default if values is None or not len(values) else int(values[0])

    @cached_property
    def imagewidth(self) -> int:
        """Width of the picture."""
        return self._number(WIDTH, 0)

    @cached_property
    def imagelength(self) -> int:
        """Height of the picture."""
        return self._number(LENGTH, 0)

    @cached_property
    def tilewidth(self) -> int:
        """Width of a tile."""
        return self._number(TILE_WIDTH, 0)

    @cached_property
    def tilelength(self) -> int:
        """Height of a tile."""
        return self._number(TILE_LENGTH, 0)

    @cached_property
    def is_tiled(self) -> bool:
        """Whether the picture is stored in tiles."""
        return TILE_WIDTH in self.fields and TILE_OFFSETS in self.fields and TILE_COUNTS in self.fields

    @cached_property
    def compression(self) -> int:
        """7 is JPEG."""
        return self._number(COMPRESSION, 1)

    @cached_property
    def photometric(self) -> int:
        """2 is RGB, 6 is YCbCr."""
        return self._number(PHOTOMETRIC, -1)

    @cached_property
    def samplesperpixel(self) -> int:
        """Channels."""
        return self._number(SAMPLES, 1)

    @cached_property
    def bitspersample(self) -> int:
        """Bits of each channel; 0 when they differ."""
        bits = {int(value) for value in self.fields.get(BITS, ())}
        return bits.pop() if len(bits) == 1 else 0

    @cached_property
    def planarconfig(self) -> int:
        """1 where the channels of a pixel lie together."""
        return self._number(PLANAR, 1)

    @cached_property
    def description(self) -> str:
        """What the writer says of the picture; never shown."""
        return bytes(self.fields.get(DESCRIPTION, ())).rstrip(b"\0").decode("latin-1")

    @cached_property
    def jpegtables(self) -> bytes | None:
        """Tables that the JPEGs of all tiles share."""
        tables = self.fields.get(JPEG_TABLES)
        return None if tables is None else bytes(tables)

    @property
    def dataoffsets(self) -> NDArray[np.unsignedinteger]:
        """First byte of each tile, (n,)."""
        return self.fields[TILE_OFFSETS]

    @property
    def databytecounts(self) -> NDArray[np.unsignedinteger]:
        """Bytes of each tile, (n,)."""
        return self.fields[TILE_COUNTS]


def read_directories(file: BinaryIO) -> list[Directory]:
    """Read the chain of directories of an open TIFF.

    Raises
    ------
    ValueError
        If the file is not a TIFF, ends early, or its directories are too many or form a loop.
    """
    layout, place = _layout(file)
    seen: set[int] = set()
    found = []
    while place:
        if place in seen or len(seen) >= MAX_DIRECTORIES:
            raise ValueError("its directories form a loop, or there are too many")
        seen.add(place)
        directory, place = layout.directory(file, place)
        found.append(directory)
    return found


def _layout(file: BinaryIO) -> "tuple[_Layout, int]":
    """Return how numbers are stored, and where the first directory lies."""
    header = _read(file, 0, 16)
    order = _ORDERS.get(header[:2])
    if order is None:
        raise ValueError("it is not a TIFF")
    version, width, zero = struct.unpack(order + "HHH", header[2:8])
    if version == 42:
        return _Layout(order, "H", "I"), struct.unpack(order + "I", header[4:8])[0]
    if (version, width, zero) == (43, 8, 0):
        return _Layout(order, "Q", "Q"), struct.unpack(order + "Q", header[8:16])[0]
    raise ValueError("it is not a TIFF")


@dataclass(frozen=True)
class _Layout:
    """Byte order, and the `struct` codes of the number of tags and of places."""

    order: str
    count: str
    place: str

    def directory(self, file: BinaryIO, place: int) -> tuple[Directory, int]:
        """Return a directory and where the next one lies."""
        head, tail = struct.calcsize("=" + self.count), struct.calcsize("=" + self.place)
        (number,) = struct.unpack(self.order + self.count, _read(file, place, head))
        if number > MAX_TAGS:
            raise ValueError(f"a directory states {number} tags")
        entry = struct.Struct(f"{self.order}HH{self.place}{tail}s")
        body = _read(file, place + head, number * entry.size + tail)
        fields = dict(self._fields(file, entry.iter_unpack(body[:-tail])))
        return Directory(fields), struct.unpack(self.order + self.place, body[-tail:])[0]

    def _fields(
        self, file: BinaryIO, entries: Iterator[tuple[int, int, int, bytes]]
    ) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
        for code, kind, count, value in entries:
            if code not in _WANTED or kind not in _KINDS:
                continue
            numbers = np.dtype(self.order + _KINDS[kind])
            size = count * numbers.itemsize
            if size > len(value):
                value = _read(file, struct.unpack(self.order + self.place, value)[0], size)
            yield code, np.frombuffer(value[:size], numbers)


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    if size > MAX_TABLE_BYTES or place >= 2**63:
        raise ValueError(f"a table of {size} bytes is stated")
    file.seek(place)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it ends within a directory")
    return data

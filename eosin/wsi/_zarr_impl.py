"""OME-Zarr slides, versions 0.4 and 0.5: a folder of chunks, read with the zarr library (an extra)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin.errors import EosinError, MissingPackageError, SlideOpenError
from eosin.wsi._jpeg import DecodeError
from eosin.wsi._pixels import to_8_bit
from eosin.wsi._resolution import StatedMpp, to_um
from eosin.wsi._segments import MAX_SEGMENT_PX, Level, Segments
from eosin.wsi._tiled import TiledSlide
from eosin.wsi.inventory import Kind, Picture, kind_of
from eosin.wsi.reader import Reader

MARKS = (".zgroup", "zarr.json")
RGB_COLOURS = ("FF0000", "00FF00", "0000FF")
DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, EOFError)


@dataclass(frozen=True)
class Pyramid:
    """One multiscale image.

    Parameters
    ----------
    picture : Picture
        For the inventory.
    arrays : sequence
        Its levels, finest first.
    axes : str
        Names of their axes in order, for example ``tczyx``.
    top : int
        Largest value of a pixel.
    """

    picture: Picture
    arrays: Sequence[Any]
    axes: str
    top: int


class ZarrReader(Reader):
    """Folders of OME-Zarr; one image, or several as bioformats2raw lays them out."""

    name = "OME-Zarr"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._pyramids = list(_pyramids(path))
        except ImportError as error:
            raise MissingPackageError(error) from error
        except DAMAGE as error:
            if isinstance(error, EosinError):
                raise
            raise SlideOpenError(path, f"the OME-Zarr is damaged: {error}") from error
        self.pictures = [pyramid.picture for pyramid in self._pyramids]

    @classmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether a folder is a Zarr group."""
        return path.is_dir() and any((path / mark).is_file() for mark in MARKS)

    def open(self, picture: Picture, plane: int, mpp: float | None) -> TiledSlide:
        """Open an image; see `Reader.open`."""
        pyramid = next(one for one in self._pyramids if one.picture is picture)
        levels = [
            Level(ZarrSegments(array, pyramid.axes, plane, pyramid.top), number, size, _piece(array))
            for number, (array, size) in enumerate(zip(pyramid.arrays, picture.sizes_px, strict=True))
        ]
        return TiledSlide(self.path, picture, levels, reader=self.name, mpp=mpp)


def _pyramids(path: Path) -> Iterator[Pyramid]:
    import zarr

    root = zarr.open_group(path, mode="r")
    # bioformats2raw puts each image into a numbered group
    groups = [root] if "multiscales" in _attributes(root) else [group for _, group in sorted(root.groups())]
    for group in groups:
        facts = _attributes(group)
        for image in facts.get("multiscales", [])[:1]:
            yield _pyramid(path, group, image, facts.get("omero") or {})


def _attributes(group: Any) -> dict[str, Any]:
    """Return the metadata of a group: version 0.5 keeps them under ``ome``."""
    found = dict(group.attrs)
    return dict(found.get("ome", found))


def _pyramid(path: Path, group: Any, image: Mapping[str, Any], omero: Mapping[str, Any]) -> Pyramid:
    axes = "".join(axis["name"] if isinstance(axis, Mapping) else axis for axis in image.get("axes", "tczyx")).lower()
    if not axes.endswith("yx") or "c" not in axes or set(axes) - set("tczyx"):
        raise ValueError(f"its axes are {axes}")
    arrays = [group[_inside(path, str(level["path"]))] for level in image["datasets"]]
    spacings = [_spacing(image, level, axes) for level in image["datasets"]]
    sizes = tuple((int(array.shape[-1]), int(array.shape[-2])) for array in arrays)
    first = arrays[0]
    planes = int(np.prod([first.shape[axes.index(axis)] for axis in "tz" if axis in axes]))
    stated = (StatedMpp("ome-zarr", *spacings[0]),) if spacings[0] else ()
    kind: Kind = kind_of(str(image.get("name", "")))
    fault = _fault(first, axes, omero)
    return Pyramid(
        Picture(
            kind, sizes, stated=stated, vendor="ome-zarr", planes=planes, fault=fault,
            colour=f"{8 * first.dtype.itemsize}-bit, {first.shape[axes.index('c')]} channels",
        ), arrays, axes, _top(first, omero),
    )  # fmt: skip


def _inside(path: Path, name: str) -> str:
    """Return the path of a level unless it leads out of the folder."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
        raise SlideOpenError(path, "its metadata point to a path outside its folder")
    return name


def _spacing(image: Mapping[str, Any], level: Mapping[str, Any], axes: str) -> tuple[float, float] | None:
    """Return µm per pixel, x and y, of a level; None unless scale and unit are stated."""
    scales = np.ones(len(axes))
    known = False
    # scales of the level and of the image multiply; translations do not change what a pixel measures
    for transform in [*level.get("coordinateTransformations", []), *image.get("coordinateTransformations", [])]:
        if transform.get("type") == "scale":
            scales, known = scales * np.asarray(transform["scale"], float), True
    units = [axis.get("unit", "") if isinstance(axis, Mapping) else "" for axis in image.get("axes", [])][-2:]
    if not known or len(units) < 2:
        return None
    y, x = (to_um(float(value), unit) for value, unit in zip(scales[-2:], units, strict=True))
    return (x, y) if x and y else None


def _fault(array: Any, axes: str, omero: Mapping[str, Any]) -> str:
    colours = tuple(str(channel.get("color", "")).upper() for channel in omero.get("channels", []))
    count = array.shape[axes.index("c")]
    if count != 3 or array.dtype not in (np.uint8, np.uint16) or (colours and colours != RGB_COLOURS):
        return f"it holds {count} channels of {array.dtype}; eosin reads 8- and 16-bit RGB (bright-field)"
    width, height = _piece(array)
    return "" if width * height <= MAX_SEGMENT_PX else f"its chunks are {width} x {height} px"


def _top(array: Any, omero: Mapping[str, Any]) -> int:
    windows = [channel.get("window", {}).get("max") for channel in omero.get("channels", [])]
    stated = max((int(window) for window in windows if window), default=0)
    return stated if array.dtype == np.uint16 and stated > 255 else 2 ** (8 * int(array.dtype.itemsize)) - 1


def _piece(array: Any) -> tuple[int, int]:
    """Return width and height of a chunk."""
    rows, columns = array.chunks[-2:]
    return int(min(columns, array.shape[-1])), int(min(rows, array.shape[-2]))


class ZarrSegments(Segments):
    """Chunks of a level.

    Parameters
    ----------
    array : Array
        From zarr.
    axes : str
        Names of its axes.
    plane : int
        Which of its planes and points in time.
    top : int
        Largest value of a pixel.
    """

    def __init__(self, array: Any, axes: str, plane: int, top: int) -> None:
        self._array = array
        self._axes = axes
        self._top = top
        self._piece = _piece(array)
        self._across = -(-int(array.shape[-1]) // self._piece[0])
        sizes = {axis: int(array.shape[axes.index(axis)]) for axis in "tz" if axis in axes}
        self._at = {"t": plane % sizes.get("t", 1), "z": plane // sizes.get("t", 1)}

    def has(self, index: int) -> bool:
        """Return True: a chunk that is not stored has the fill value, which the library delivers."""
        return True

    def missing(self) -> float:
        """Return the share of chunks that are not stored."""
        return 1 - float(self._array.nchunks_initialized) / max(1, int(self._array.nchunks))

    def decode(self, index: int, shrink: int) -> NDArray[np.uint8]:
        """Return the pixels of a chunk; see `Segments.decode`."""
        row, column = divmod(index, self._across)
        width, height = self._piece
        place: dict[str, Any] = {
            **self._at, "c": slice(None), "y": slice(row * height, (row + 1) * height),
            "x": slice(column * width, (column + 1) * width),
        }  # fmt: skip
        try:
            pixels = np.asarray(self._array[tuple(place[axis] for axis in self._axes)])
        except DAMAGE as error:
            raise DecodeError(str(error) or type(error).__name__) from error
        return np.ascontiguousarray(np.moveaxis(to_8_bit(pixels, self._top), 0, -1))

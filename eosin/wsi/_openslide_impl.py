"""Slides that OpenSlide reads: formats that it alone knows (MRXS, SCN, BIF, NDPI, CZI, ...)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image, ImageCms

from eosin.errors import CorruptSlideError, SlideOpenError
from eosin.wsi._pixels import WHITE, flatten
from eosin.wsi._resolution import StatedMpp
from eosin.wsi._slide import Slide
from eosin.wsi.inventory import Picture, kind_of
from eosin.wsi.reader import Reader


class OpenSlideReader(Reader):
    """Files whose vendor OpenSlide detects; asked after the readers of TIFF and DICOM."""

    name = f"openslide {openslide.__library_version__}"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._handle: openslide.OpenSlide | None = _open(path)
        try:
            self.pictures = list(_pictures(self._handle))
        except (openslide.OpenSlideError, KeyError, ValueError) as error:  # a damaged file loses its properties
            self.close()
            raise SlideOpenError(path, f"OpenSlide cannot list what is in the file: {error}") from error

    @classmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether OpenSlide knows the vendor of a file."""
        vendor = openslide.OpenSlide.detect_format(path) if path.is_file() else None
        return vendor not in (None, "generic-tiff", "dicom")  # those have readers of their own

    def open(self, picture: Picture, plane: int, mpp: float | None) -> "OpenSlideSlide":
        """Open the slide, which takes the handle over; see `Reader.open`."""
        # opening costs tens of ms for some formats, so the slide takes the handle that listed it
        handle, self._handle = self._handle or _open(self.path), None
        return OpenSlideSlide(self.path, picture, handle, mpp=mpp)

    def close(self) -> None:
        """Close the handle unless a slide has it."""
        if self._handle is not None:
            self._handle.close()


class OpenSlideSlide(Slide):
    """A slide opened with OpenSlide.

    Parameters
    ----------
    path : Path
        The file.
    picture : Picture
        From the reader; made again when left out.
    handle : OpenSlide
        The open file, closed with the slide; opened when left out.
    mpp : float, optional
        The user's µm per level-0 pixel.

    Raises
    ------
    SlideOpenError
        If OpenSlide does not know the format or cannot open the file.
    """

    def __init__(
        self,
        path: Path,
        picture: Picture | None = None,
        handle: openslide.OpenSlide | None = None,
        *,
        mpp: float | None = None,
    ) -> None:
        self._handle = handle or _open(path)
        super().__init__(path, picture or next(_pictures(self._handle)), reader=OpenSlideReader.name, mpp=mpp)
        properties = self._handle.properties
        self.bounds_px0 = _bounds(properties)
        self.background = _background(properties)
        self.icc_profile = _profile(self._handle)

    def read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one stored level, in that level's pixels; background outside."""
        downsample = self.downsamples[level]
        location = (round(corner[0] * downsample), round(corner[1] * downsample))
        try:
            image = self._handle.read_region(location, level, size)
        except openslide.OpenSlideError:
            image = self._read_again(location, level, size)
        return flatten(image, self.background)

    def _read_again(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """Read with a new handle: one failed read makes an OpenSlide handle useless.

        The old handle is not closed here, because another thread may be reading with it.
        """
        fresh = _open(self.path)
        try:
            image = fresh.read_region(location, level, size)
        except openslide.OpenSlideError as error:
            self._handle = _open(self.path)
            where = f"level {level}, {size[0]} x {size[1]} px at level-0 ({location[0]}, {location[1]})"
            raise CorruptSlideError(self.path, f"stored pixels cannot be decoded ({where}): {error}") from error
        self._handle = fresh
        return image

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


def _pictures(handle: openslide.OpenSlide) -> Iterator[Picture]:
    """Yield the slide and what lies beside it; label and macro are listed by their sizes, never read."""
    properties = handle.properties
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
    sizes = tuple((int(width), int(height)) for width, height in handle.level_dimensions)
    slide = Picture(
        "slide", sizes, stated=_stated(properties), power=_number(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER),
        vendor=vendor, scales=tuple(float(scale) for scale in handle.level_downsamples),
    )  # fmt: skip
    # OpenSlide's scales are means of both sides' ratios; where a whole ratio explains the sizes, that is the true one
    whole = tuple(Picture("slide", sizes).downsamples())
    yield replace(slide, scales=tuple(b if b == round(b) else a for a, b in zip(slide.scales, whole, strict=True)))
    for name, value in properties.items():
        if name.startswith("openslide.associated.") and name.endswith(".width"):
            height = properties.get(name.removesuffix("width") + "height", "0")
            yield Picture(kind_of(name.split(".")[2], "other"), ((int(value), int(height)),), vendor=vendor)


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideOpenError(path, "eosin cannot read this format", code="unsupported") from None
    except openslide.OpenSlideError as error:
        raise SlideOpenError(path, f"the file is damaged or of a kind that OpenSlide cannot read: {error}") from error


def _profile(handle: openslide.OpenSlide) -> bytes | None:
    try:
        profile = handle.color_profile
        return None if profile is None else bytes(profile.tobytes())
    except (openslide.OpenSlideError, OSError, ImageCms.PyCMSError):
        return None  # damaged: as if there were none; reading pixels tells more


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        return float(properties[name])
    except (KeyError, ValueError):
        return None


def _stated(properties: Mapping[str, str]) -> tuple[StatedMpp, ...]:
    known = [_number(properties, name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    found = [value for value in known if value is not None]
    return (StatedMpp("openslide.mpp-x", found[0], found[-1]),) if found else ()


def _bounds(properties: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    try:
        x, y, width, height = (
            int(properties[name])
            for name in (
                openslide.PROPERTY_NAME_BOUNDS_X,
                openslide.PROPERTY_NAME_BOUNDS_Y,
                openslide.PROPERTY_NAME_BOUNDS_WIDTH,
                openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
            )
        )
    except (KeyError, ValueError):
        return None
    return x, y, width, height


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    text = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "")
    if len(text) != 6:
        return WHITE
    try:
        red, green, blue = bytes.fromhex(text)
    except ValueError:
        return WHITE
    return red, green, blue

"""Slides through OpenSlide: every format it knows; the definition of correct pixels."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image, ImageCms

from eosin.errors import CorruptSlideError, SlideOpenError
from eosin.wsi.pixels import WHITE, flatten, read_scaled
from eosin.wsi.resolution import Resolution, StatedMpp, resolve_mpp


class OpenSlideReader:
    """A slide opened with OpenSlide; implements `eosin.wsi.slide.Slide`.

    Parameters
    ----------
    path : Path
        The file.
    mpp : float, optional
        The user's µm per level-0 pixel.

    Raises
    ------
    SlideOpenError
        If OpenSlide does not know the format or cannot open the file.
    """

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        self.path = path
        self._handle = _open(path)
        properties = self._handle.properties
        width, height = self._handle.dimensions
        self.size_px0: tuple[int, int] = (int(width), int(height))
        self.bounds_px0 = _bounds(properties)
        self.vendor: str = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
        self.level_sizes: list[tuple[int, int]] = [(int(w), int(h)) for w, h in self._handle.level_dimensions]
        self.downsamples = [float(value) for value in self._handle.level_downsamples]
        self.background = _background(properties)
        self.icc_profile = _profile(self._handle)
        self._power = _number(properties, openslide.PROPERTY_NAME_OBJECTIVE_POWER)
        self.resolution = _resolution(properties, self._power, mpp)

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel."""
        return self.resolution.require(self.path)

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from."""
        return self.resolution.source

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return (h, w, 3) RGB at any mpp; see `eosin.wsi.slide.Slide.read`."""
        return read_scaled(self.read_level, self.downsamples, origin_px0, size_px, mpp / self.mpp)

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

    def facts(self) -> dict[str, str | int | float | list[int] | list[float] | None]:
        """Return what may be shown about the slide; raw properties can hold names and dates."""
        return {
            "reader": f"openslide {openslide.__library_version__}",
            "vendor": self.vendor,
            "width_px0": self.size_px0[0],
            "height_px0": self.size_px0[1],
            "level_downsamples": [round(value, 4) for value in self.downsamples],
            "mpp": self.resolution.mpp,
            "mpp_source": self.resolution.source,
            "mpp_note": self.resolution.note or self.resolution.refusal,
            "objective_power": self._power,
            "icc_profile": "none" if self.icc_profile is None else f"{len(self.icc_profile)} bytes",
        }

    def close(self) -> None:
        """Release the file."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideOpenError(path, "no reader knows this format", code="unsupported") from None
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


def _resolution(properties: Mapping[str, str], power: float | None, user_mpp: float | None) -> Resolution:
    x = _number(properties, openslide.PROPERTY_NAME_MPP_X)
    y = _number(properties, openslide.PROPERTY_NAME_MPP_Y)
    generic = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"  # its mpp is the TIFF resolution
    source = "tiff-resolution" if generic else "openslide.mpp-x"
    known = [value for value in (x, y) if value is not None]
    stated = [StatedMpp(source, known[0], known[-1])] if known else []
    return resolve_mpp(stated, power=power, user_mpp=user_mpp)


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

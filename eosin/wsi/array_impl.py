"""Slides that lie in memory: arrays, and plain pictures read whole."""

import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from eosin.errors import SlideOpenError
from eosin.wsi.pixels import WHITE, flatten, read_scaled
from eosin.wsi.resolution import resolve_mpp

MAX_PICTURE_PX = 80_000_000


class ArraySlide:
    """A slide held in memory; implements `eosin.wsi.slide.Slide`.

    Parameters
    ----------
    pixels : (h, w, 3) uint8
        RGB; not copied.
    mpp : float or None
        µm per pixel, as stated by the user.
    path : Path
        Names it in errors.
    icc_profile : bytes, optional
        Colour profile of the pixels.
    """

    bounds_px0 = None

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        *,
        mpp: float | None,
        path: Path | None = None,
        icc_profile: bytes | None = None,
    ) -> None:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
            raise ValueError(f"a slide is (h, w, 3) uint8, not {pixels.shape} {pixels.dtype}")
        self.path = path or Path("array")
        self.size_px0: tuple[int, int] = (pixels.shape[1], pixels.shape[0])
        self.icc_profile = icc_profile
        self._pixels = pixels
        self._resolution = resolve_mpp([], power=None, user_mpp=mpp)

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel."""
        return self._resolution.require(self.path)

    @property
    def mpp_source(self) -> str:
        """``user`` or ``none``."""
        return self._resolution.source

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return (h, w, 3) RGB at any mpp; see `eosin.wsi.slide.Slide.read`."""
        return read_scaled(self._read_level, [1.0], origin_px0, size_px, mpp / self.mpp)

    def _read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        (left, top), (width, height) = corner, size
        result = np.empty((height, width, 3), np.uint8)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + width, self.size_px0[0]), min(top + height, self.size_px0[1])
        if (x0, y0, x1, y1) != (left, top, left + width, top + height):
            result[:] = WHITE
        if x1 > x0 and y1 > y0:
            result[y0 - top : y1 - top, x0 - left : x1 - left] = self._pixels[y0:y1, x0:x1]
        return result

    def facts(self) -> dict[str, str | int | float | list[int] | list[float] | None]:
        """Return what may be shown about the slide."""
        return {
            "reader": "memory",
            "vendor": None,
            "width_px0": self.size_px0[0],
            "height_px0": self.size_px0[1],
            "level_downsamples": [1.0],
            "mpp": self._resolution.mpp,
            "mpp_source": self._resolution.source,
            "mpp_note": self._resolution.refusal,
            "objective_power": None,
        }

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_picture(path: Path, *, mpp: float | None = None) -> ArraySlide:
    """Read a PNG or JPEG whole.

    The resolution that such files may state (72 dpi and the like) is the printer's, never the microscope's, and is
    not used.

    Parameters
    ----------
    path : Path
        The file.
    mpp : float, optional
        The user's µm per pixel.

    Raises
    ------
    SlideOpenError
        If it is not a picture, is damaged, or has more than 80 million pixels.
    """
    try:
        with _opened(path) as image:
            if image.width * image.height > MAX_PICTURE_PX:
                raise _too_large(path, f"{image.width} x {image.height} px")
            profile = image.info.get("icc_profile") or None
            return ArraySlide(flatten(image.convert("RGBA"), WHITE), mpp=mpp, path=path, icc_profile=profile)
    except Image.DecompressionBombError:
        raise _too_large(path, f"more than {2 * MAX_PICTURE_PX // 10**6} million pixels") from None
    except UnidentifiedImageError as error:
        raise SlideOpenError(path, "no reader knows this format", code="unsupported") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, SlideOpenError):
            raise
        raise SlideOpenError(path, f"the picture is damaged: {error}") from error


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is lower
        return Image.open(path, formats=("PNG", "JPEG"))


def _too_large(path: Path, found: str) -> SlideOpenError:
    return SlideOpenError(
        path,
        f"{found} would have to be decoded whole; convert it with "
        f"`vips tiffsave {path.name} out.tif --tile --pyramid --compression jpeg --bigtiff`",
        code="untiled",
    )

"""Slides that lie in memory: arrays, and plain pictures read whole."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from eosin._names import is_picture
from eosin.errors import SlideOpenError
from eosin.wsi._pixels import WHITE, flatten
from eosin.wsi._resolution import resolve_mpp
from eosin.wsi._slide import Slide
from eosin.wsi.inventory import CONVERT, Picture
from eosin.wsi.reader import Reader

MAX_PICTURE_PX = 80_000_000


class ArraySlide(Slide):
    """A slide held in memory.

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
        picture = Picture("slide", ((pixels.shape[1], pixels.shape[0]),))
        super().__init__(path or Path("array"), picture, reader="memory", mpp=mpp)
        self.icc_profile = icc_profile
        self._pixels = pixels

    def read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels; background outside."""
        (left, top), (width, height) = corner, size
        result = np.empty((height, width, 3), np.uint8)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + width, self.size_px0[0]), min(top + height, self.size_px0[1])
        if (x0, y0, x1, y1) != (left, top, left + width, top + height):
            result[:] = WHITE
        if x1 > x0 and y1 > y0:
            result[y0 - top : y1 - top, x0 - left : x1 - left] = self._pixels[y0:y1, x0:x1]
        return result

    def close(self) -> None:
        """Nothing to release."""


class PictureReader(Reader):
    """PNG and JPEG files, each one picture, read whole."""

    name = "memory"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._slide = open_picture(path)
        self.pictures = [self._slide.picture]

    @classmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether a file is a PNG or a JPEG."""
        return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or is_picture(path)

    def open(self, picture: Picture, plane: int, mpp: float | None) -> "ArraySlide":
        """Return the picture as a slide; see `Reader.open`."""
        self._slide.resolution = resolve_mpp([], power=None, user_mpp=mpp)
        return self._slide


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
            upright = ImageOps.exif_transpose(image)
            return ArraySlide(flatten(upright.convert("RGBA"), WHITE), mpp=mpp, path=path, icc_profile=profile)
    except Image.DecompressionBombError:
        raise _too_large(path, f"more than {2 * MAX_PICTURE_PX // 10**6} million pixels") from None
    except UnidentifiedImageError as error:
        raise SlideOpenError(path, "eosin cannot read this format", code="unsupported") from error
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
        f"{found} must be decoded as a whole, which needs too much memory; {CONVERT.format(name=path.name)}",
        code="untiled",
    )

"""Colours as the scanner's ICC profile means them: one conversion to sRGB for mask, thumbnail and tiles."""

import io
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from eosin.errors import SlideError
from eosin.wsi.slide import Fact, Slide

NO_CACHE = 0x0040  # cmsFLAGS_NOCACHE: threads share the transform


def in_srgb(slide: Slide) -> Slide:
    """Return the slide with its pixels converted to sRGB; the slide itself when it states no profile.

    Raises
    ------
    SlideError
        Code ``bad-icc`` if the profile is damaged or not one of RGB pixels.
    """
    if isinstance(slide, ManagedSlide) or slide.icc_profile is None:
        return slide
    return ManagedSlide(slide)


class ManagedSlide:
    """A slide whose pixels are converted to sRGB as they are read; implements `eosin.wsi.slide.Slide`.

    The transform is built once per slide, with the profile's own rendering intent.

    Parameters
    ----------
    slide : Slide
        Open, with a profile; closed with this one.
    """

    icc_profile = None

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self._transform = _build(slide.path, slide.icc_profile or b"")

    @property
    def path(self) -> Path:
        """The file."""
        return self._slide.path

    @property
    def size_px0(self) -> tuple[int, int]:
        """Width and height in level-0 pixels."""
        return self._slide.size_px0

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel."""
        return self._slide.mpp

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from."""
        return self._slide.mpp_source

    @property
    def bounds_px0(self) -> tuple[int, int, int, int] | None:
        """The scanned part."""
        return self._slide.bounds_px0

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return (h, w, 3) sRGB at any mpp; see `eosin.wsi.slide.Slide.read`."""
        picture = Image.fromarray(self._slide.read(origin_px0, size_px, mpp))
        ImageCms.applyTransform(picture, self._transform, inPlace=True)
        return np.asarray(picture)

    def facts(self) -> dict[str, Fact]:
        """Return what may be shown about the slide."""
        return {**self._slide.facts(), "colours": "sRGB by ICC profile"}

    def close(self) -> None:
        """Release the file."""
        self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _build(path: Path, profile: bytes) -> ImageCms.ImageCmsTransform:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, "RGB", "RGB", intent, NO_CACHE)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        reason = f"its ICC profile cannot be used ({error}); leave out --icc"
        raise SlideError(path, reason, code="bad-icc") from error

"""Colours as the scanner's ICC profile means them: one conversion to sRGB for mask, thumbnail and tiles."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from eosin.errors import SlideError
from eosin.wsi._slide import Fact, Slide

NEUTRAL = 128  # of the chroma channels
CAST_TOLERANCE = 12
LEAST_LIGHT = 180
CLIPPED = 235
LEAST_CAST = 0.05
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


class ManagedSlide(Slide):
    """A slide whose pixels are converted to sRGB as they are read.

    The transform is built once per slide, with the profile's own rendering intent.

    Parameters
    ----------
    slide : Slide
        Open, with a profile; closed with this one.
    """

    def __init__(self, slide: Slide) -> None:
        super().__init__(slide.path, slide.picture, reader=slide.reader)
        self.bounds_px0, self.resolution, self.notes = slide.bounds_px0, slide.resolution, slide.notes
        self.image = slide.image
        self._slide = slide
        self._transform = _build(slide.path, slide.icc_profile or b"")

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return (h, w, 3) sRGB at any mpp; see `eosin.wsi._slide.Slide.read`."""
        return self._converted(self._slide.read(origin_px0, size_px, mpp))

    def read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return sRGB pixels of one stored level."""
        return self._converted(self._slide.read_level(level, corner, size))

    def _converted(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        picture = Image.fromarray(pixels)
        ImageCms.applyTransform(picture, self._transform, inPlace=True)
        return np.asarray(picture)

    def facts(self) -> dict[str, Fact]:
        """Return what may be shown about the slide."""
        return {**self._slide.facts(), "colours": "sRGB by ICC profile"}

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


def check_colours(slide: Slide, planes: NDArray[np.uint8]) -> None:
    """Refuse a slide whose glass has the colours of a wrong conversion.

    White that is stored as YCbCr and shown as RGB becomes (Y, 128, 128), salmon; white that is stored as RGB and taken
    for YCbCr becomes magenta, with red and blue at their ends. Neither a lamp nor a stain makes glass look so, but a
    stain may look so; hence a slide that also has glass as it should be passes.

    Parameters
    ----------
    slide : Slide
        Named in the error.
    planes : (3, h, w) uint8
        Red, green and blue of the slide, of all pixels or some.

    Raises
    ------
    SlideError
        Code ``false-colours``.
    """
    red, green, blue = planes.astype(np.int16)  # bytes would wrap around in differences
    neutral = [abs(channel - NEUTRAL) <= CAST_TOLERANCE for channel in (green, blue)]
    casts = {
        "YCbCr pixels are stated to be RGB": (red >= LEAST_LIGHT) & neutral[0] & neutral[1],
        "RGB pixels are stated to be YCbCr": (red >= CLIPPED) & (blue >= CLIPPED) & neutral[0],
    }
    glass = float((planes.min(axis=0) >= LEAST_LIGHT).mean())
    for cause, cast in casts.items():
        share = float(cast.mean())
        if share >= LEAST_CAST and glass < share / 10:
            seen = f"{share:.0%} of the slide has the colour that white gets where {cause}"
            raise SlideError(slide.path, f"{seen}; correct the file's colour space", code="false-colours")


def _build(path: Path, profile: bytes) -> ImageCms.ImageCmsTransform:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, "RGB", "RGB", intent, NO_CACHE)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        reason = f"its ICC profile cannot be used ({error}); leave out --icc"
        raise SlideError(path, reason, code="bad-icc") from error

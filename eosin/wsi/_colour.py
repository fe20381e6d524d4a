"""Colours as the scanner's ICC profile means them: one conversion to sRGB for mask, thumbnail and tiles."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from eosin.errors import SlideError
from eosin.wsi._pixels import rgb_to_ycbcr, ycbcr_to_rgb
from eosin.wsi._slide import Fact, Slide

NEUTRAL = 128  # of the chroma channels
CAST_TOLERANCE = 12
LEAST_LIGHT = 180
CLIPPED = 235
MAGENTA_TOLERANCE = 30
LEAST_CAST = 0.05
FLAT = 4.0  # levels of standard deviation, below which a picture is of glass alone
# 160 real overviews under 12 tints, as they are and falsely converted: 0.50 to 3.1 and below 0.10; 0.74 to 6.8 and, for
# nearly all, below 0.55
LEAST_RISE_OF_GREEN_AND_BLUE, LEAST_RISE_OF_GREEN = 0.3, 0.65
BRIGHT = 0.7
TINT, MOST_TINT = 0.05, 0.3
MOST_CHROMA = 40  # levels that the chroma of a slide differs from grey, on average and in spread
SHOWN_AS_RGB = "YCbCr pixels are stated to be RGB"
READ_AS_YCBCR = "RGB pixels are stated to be YCbCr"
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
    """Refuse a slide whose pixels have the colours of a wrong conversion.

    Two signs tell, whatever the tint of the glass. Dye and dirt absorb in all channels together, so in a picture of
    light the channels rise and fall with each other; brightness and the two channels of chroma do not. And undoing the
    wrong conversion does not make the glass more colourful. A slide of hardly anything but glass has no such rise, so
    there the glass itself decides: white stored as YCbCr and shown as RGB becomes (Y, 128, 128), salmon; white stored
    as RGB and read as YCbCr becomes magenta, with red and blue at their ends. A stain may look so, too; hence a slide
    that also has glass as it should be passes.

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
    for cause, seen in ((SHOWN_AS_RGB, _looks_like_ycbcr), (READ_AS_YCBCR, _looks_like_converted_rgb)):
        if seen(planes):
            message = f"its colours are wrong, most likely because {cause}; correct the file's colour space"
            raise SlideError(slide.path, message, code="false-colours")


def _looks_like_ycbcr(planes: NDArray[np.uint8]) -> bool:
    """Return whether a picture shows YCbCr as if it were RGB."""
    red, green, blue = planes.astype(np.float32)
    if red.std() > FLAT:
        apart = _rise_of_green_and_blue(planes) < LEAST_RISE_OF_GREEN_AND_BLUE and red.std() > max(
            green.std(), blue.std()
        )
        undone = _converted(ycbcr_to_rgb, planes)
        return apart and _rise_of_green_and_blue(undone) >= LEAST_RISE_OF_GREEN_AND_BLUE and _is_calmer(undone, planes)
    neutral = (np.abs(green - NEUTRAL) <= CAST_TOLERANCE) & (np.abs(blue - NEUTRAL) <= CAST_TOLERANCE)
    return _is_common(neutral & (red >= LEAST_LIGHT), planes)


def _looks_like_converted_rgb(planes: NDArray[np.uint8]) -> bool:
    """Return whether a picture shows RGB that was converted as if it were YCbCr."""
    red, green, blue = planes.astype(np.float32)
    if ((red + blue) / 2).std() > FLAT and _rise_of_green(planes) < LEAST_RISE_OF_GREEN:
        undone = _converted(rgb_to_ycbcr, planes)
        if _rise_of_green(undone) >= LEAST_RISE_OF_GREEN and _is_calmer(undone, planes):
            return True
    magenta = (red >= CLIPPED) & (blue >= CLIPPED) & (np.abs(green - NEUTRAL) <= MAGENTA_TOLERANCE)
    return _is_common(magenta, planes)


def _rise_of_green_and_blue(planes: NDArray[np.uint8]) -> float:
    red, green, blue = planes.astype(np.float32)
    return _rise((green + blue) / 2, red)


def _rise_of_green(planes: NDArray[np.uint8]) -> float:
    red, green, blue = planes.astype(np.float32)
    return _rise(green, (red + blue) / 2)


def _rise(values: NDArray[np.float32], along: NDArray[np.float32]) -> float:
    """Return the slope of the line through values; 0 along a constant."""
    centred = along - along.mean()
    spread = float((centred**2).mean())
    return float((centred * values).mean()) / spread if spread else 0.0


def _converted(
    convert: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], planes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    return convert(planes.transpose(1, 2, 0)).transpose(2, 0, 1)


def _is_calmer(undone: NDArray[np.uint8], planes: NDArray[np.uint8]) -> bool:
    """Return whether the brighter pixels may be glass, and are no more colourful than before."""
    return _cast_of(undone) <= min(_cast_of(planes) + TINT, MOST_TINT)


def _cast_of(planes: NDArray[np.uint8]) -> float:
    """Return how colourful the brighter pixels are: 0 grey, 1 a pure colour."""
    lightest, darkest = planes.max(axis=0).ravel(), planes.min(axis=0).ravel()
    bright = lightest >= BRIGHT * np.percentile(lightest, 98)
    return float(np.median(1 - darkest[bright] / np.maximum(lightest[bright], 1)))


def _is_common(cast: NDArray[np.bool_], planes: NDArray[np.uint8]) -> bool:
    """Return whether many pixels have a cast, and few are glass without it."""
    share, glass = cast.mean(), (planes.min(axis=0) >= LEAST_LIGHT).mean()
    return bool(share >= LEAST_CAST and glass < share / 10)


def _build(path: Path, profile: bytes) -> ImageCms.ImageCmsTransform:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, "RGB", "RGB", intent, NO_CACHE)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        reason = f"its ICC profile cannot be used ({error}); leave out --icc"
        raise SlideError(path, reason, code="bad-icc") from error

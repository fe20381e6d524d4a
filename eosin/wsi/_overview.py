"""A whole slide as one small picture."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eosin.errors import ConfigError
from eosin.wsi._slide import Slide
from eosin.wsi._stain import find_glass, is_dark, sample_step, to_light

MAX_OVERVIEW_PX = 100_000_000
THUMBNAIL_PX = 1000
LEAST_THUMBNAIL_PX = 600


@dataclass(frozen=True, eq=False)
class Overview:
    """A slide as one picture.

    Attributes
    ----------
    rgb : (h, w, 3) uint8
        From `read_overview`.
    mpp : float
        µm per pixel.
    """

    rgb: NDArray[np.uint8]
    mpp: float

    @cached_property
    def few(self) -> NDArray[np.uint8]:
        """Red, green and blue of every n-th pixel, (3, h, w): enough of them for statistics."""
        step = sample_step(self.rgb.shape[:2])
        return np.ascontiguousarray(self.rgb[::step, ::step].transpose(2, 0, 1))

    @cached_property
    def glass(self) -> NDArray[np.float64]:
        """Colour of empty glass, (3,)."""
        return find_glass(self.few)

    @cached_property
    def light(self) -> NDArray[np.uint8]:
        """How much light each pixel lets through, (3, h, w)."""
        return to_light(self.rgb, self.glass)

    @cached_property
    def is_dark(self) -> bool:
        """Whether the background is dark, as in fluorescence."""
        return is_dark(self.few)


def read_overview(slide: Slide, mpp: float) -> NDArray[np.uint8]:
    """Return the whole slide at a coarse mpp.

    Parameters
    ----------
    slide : Slide
        Open slide with a known mpp.
    mpp : float
        µm per pixel of the result.

    Returns
    -------
    (h, w, 3) uint8
        The last row and column may reach past the slide and hold background there. Memory is bounded by the size of
        the result plus one block, also on slides with a single level.

    Raises
    ------
    ConfigError
        If the result would have more than 100 million pixels.
    """
    width, height = (max(1, math.ceil(side * slide.mpp / mpp - 1e-6)) for side in slide.size_px0)
    if width * height > MAX_OVERVIEW_PX:
        raise ConfigError(
            f"an overview at {mpp:g} µm/px has {width} x {height} pixels, which is too large; request a larger mpp"
        )
    return slide.read((0, 0), (width, height), mpp)


def make_thumbnail(slide: Slide, overview: NDArray[np.uint8] | None = None) -> Image.Image:
    """Return the whole slide as a picture whose longer side is 600 to 1000 px; small slides stay as they are.

    Parameters
    ----------
    slide : Slide
        Open slide with a known mpp.
    overview : (h, w, 3) uint8, optional
        The slide at some mpp, read already; used when it is at least half as large as the thumbnail may be.
    """
    longest = max(slide.size_px0)
    mpp = slide.mpp * max(1.0, longest / THUMBNAIL_PX)
    if overview is None or 2 * max(overview.shape) < min(THUMBNAIL_PX, longest):
        return Image.fromarray(read_overview(slide, mpp))
    whole = -(-max(overview.shape) // THUMBNAIL_PX)
    if whole == 1:
        return Image.fromarray(overview)
    if max(overview.shape) >= whole * LEAST_THUMBNAIL_PX:  # a fifth of the time of any other ratio
        return Image.fromarray(overview).reduce(whole)
    size = (max(1, round(slide.size_px0[0] * slide.mpp / mpp)), max(1, round(slide.size_px0[1] * slide.mpp / mpp)))
    return Image.fromarray(overview).resize(size, Image.Resampling.BOX, reducing_gap=1.0)

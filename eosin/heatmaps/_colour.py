"""The colour scale that every export shares.

Weights and percentiles use viridis: equal steps in the value look equal, light means much, and readers with any
colour vision see the same order. Signed numbers use a purple-white-orange scale whose middle is zero. Laid over a
slide, they show more of it the nearer they are to zero: white would hide the tissue that the model is neutral about.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from matplotlib import colormaps
from numpy.typing import NDArray

from eosin.heatmaps._heatmap import Heatmap

SEQUENTIAL = "viridis"
DIVERGING = "PuOr_r"
PART_SHOWN = {SEQUENTIAL: (0.0, 1.0), DIVERGING: (0.12, 0.88)}  # the dark ends of purple and orange look like nuclei
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ColourScale:
    """How numbers become colours, and the words for its two ends.

    Parameters
    ----------
    low, high : float
        Values that get the first and the last colour; values beyond them are clipped.
    colormap : str
        Name of a matplotlib colour map.
    low_words, high_words : str
        What the ends mean.
    title : str
        What the number is.
    """

    low: float
    high: float
    colormap: str
    low_words: str
    high_words: str
    title: str

    def rgb(self, values: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return colours of the same shape plus a last axis of 3; NaN becomes white."""
        part = np.linspace(*PART_SHOWN.get(self.colormap, (0.0, 1.0)), 256)
        table = (np.asarray(colormaps[self.colormap](part))[:, :3] * 255 + 0.5).astype(np.uint8)
        table = np.vstack([table, np.full((1, 3), 255, dtype=np.uint8)])
        return np.asarray(table[self._index(values)])

    def _index(self, values: NDArray[np.floating]) -> NDArray[np.intp]:
        span = self.high - self.low or 1.0
        position = np.clip((np.asarray(values, dtype=np.float32) - self.low) / span, 0, 1)
        blank = np.isnan(position)
        return np.where(blank, 256, np.minimum(np.where(blank, 0, position) * 256, 255)).astype(np.intp)

    def over(self, ground: Floats, values: NDArray[np.floating], *, opacity: float) -> Floats:
        """Return the colours as they look over a grey ground, 0 to 255, of the shape of `values` and an axis of 3."""
        strength = opacity * self.strength(values)
        colours: Floats = self.rgb(values).astype(np.float64)
        return (1 - strength)[..., None] * ground + strength[..., None] * colours

    def strength(self, values: NDArray[np.floating]) -> Floats:
        """Return how much of the ground a value hides at full opacity, 0 to 1: less near the zero of signed numbers."""
        if self.colormap != DIVERGING:
            return np.ones(np.shape(values))
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2 or 1.0
        return np.asarray(np.clip(np.abs(np.asarray(values) - middle) / half, 0, 1) ** 0.5)

    def stops(self, n: int = 9, *, opacity: float = 1.0, ground: float = 0.85) -> list[str]:
        """Return `n` colours from low to high as ``#rrggbb``, as they look at `opacity` over a grey of `ground`."""
        colours = self.over(np.full(1, ground * 255), np.linspace(self.low, self.high, n), opacity=opacity)
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours.round().astype(int).tolist()]


def scale_of(heatmap: Heatmap) -> ColourScale:
    """Return the scale of a map: 0 to 100 for percentiles, symmetric for signed effects, else its own range.

    The ends of its own range are the 1st and 99th percentile, so that one extreme tile does not turn the rest flat;
    minimum and maximum where these two are equal.
    """
    if heatmap.scaling == "percentile":
        is_mean = heatmap.shows == "attention" and not heatmap.of
        low, high = ("least attended", "most attended") if is_mean else ("lowest", "highest")
        return ColourScale(0.0, 100.0, SEQUENTIAL, low, high, heatmap.caption)
    if heatmap.reach is not None:
        reach = heatmap.reach
        words = f"against it ({scipy.special.expit(-reach):.0%})", f"for it ({scipy.special.expit(reach):.0%})"
        return ColourScale(-reach, reach, DIVERGING, *words, heatmap.caption)
    if heatmap.signed:
        reach = float(np.quantile(np.abs(heatmap.values), 0.99)) if heatmap.values.size else 0.0
        # most effects may be exactly 0, as those of a maximum are
        reach = reach or float(np.abs(heatmap.values).max(initial=0.0)) or 1.0
        return ColourScale(
            -reach, reach, DIVERGING, f"lowers it ({-reach:.2g})", f"raises it (+{reach:.2g})", heatmap.caption
        )
    # one extreme tile must not turn the rest flat
    bottom, top = (float(np.quantile(heatmap.values, q)) if heatmap.values.size else q for q in (0.01, 0.99))
    if bottom == top:
        bottom, top = float(heatmap.values.min()), float(heatmap.values.max())
    return ColourScale(bottom, top, SEQUENTIAL, f"{bottom:.3g}", f"{top:.3g}", heatmap.caption)

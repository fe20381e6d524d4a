"""The colour scale that every export shares.

Weights and percentiles use viridis: light means much, and readers with any colour vision see the same order. Signed
numbers get darker from light blue (against) over the tissue itself (zero) to dark red (for), so that a grey print keeps
the order, too: two colours of equal lightness would look the same there. The slide below is a pale grey picture, so
that no tissue is darker than the one end or lighter than the other.
"""

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from eosin.heatmaps._heatmap import Heatmap

SEQUENTIAL = "viridis"
SIGNED = "signed"
AGAINST, FOR = np.array([210.0, 232.0, 255.0]), np.array([143.0, 36.0, 0.0])
BRIGHT_TISSUE = 0.85  # legends show the colours as they look over pale tissue of this brightness
GREY_WEIGHTS = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # Rec. 709
PALEST, DARKEST = 0.92, 0.40
MANY_TIMES = 10.0
Floats = NDArray[np.float64]


def pale_grey(rgb: NDArray[np.uint8]) -> Floats:
    """Return a picture (h, w, 3) without colours and with little contrast, (h, w, 1) from 0 to 255."""
    grey = np.asarray(rgb @ GREY_WEIGHTS, np.float64)[..., None]
    return 255 * DARKEST + (PALEST - DARKEST) * grey


@dataclass(frozen=True)
class ColourScale:
    """How numbers become colours, and the words for its two ends.

    Parameters
    ----------
    low, high : float
        Values that get the first and the last colour; values beyond them are clipped.
    colormap : str
        Name of a matplotlib colour map, or "signed".
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
        if self.colormap == SIGNED:
            mixed = self.over(np.full(1, 255 * BRIGHT_TISSUE), values, opacity=1.0)
            mixed[np.isnan(np.asarray(values))] = 255
            return mixed.round().astype(np.uint8)
        from matplotlib import colormaps  # an extra; whoever draws needs it, whoever asks for a scale does not

        table = (np.asarray(colormaps[self.colormap].resampled(256)(np.arange(256)))[:, :3] * 255 + 0.5).astype(
            np.uint8
        )
        table = np.vstack([table, np.full((1, 3), 255, dtype=np.uint8)])
        return np.asarray(table[self._index(values)])

    def pure(self, values: NDArray[np.floating]) -> Floats:
        """Return the colours before anything below shows through, of the same shape plus a last axis of 3."""
        if self.colormap != SIGNED:
            return self.rgb(values).astype(np.float64)
        is_for = np.asarray(values) > (self.high + self.low) / 2
        return np.where(is_for[..., None], FOR, AGAINST)

    def _index(self, values: NDArray[np.floating]) -> NDArray[np.intp]:
        span = self.high - self.low or 1.0
        position = np.clip((np.asarray(values, dtype=np.float32) - self.low) / span, 0, 1)
        blank = np.isnan(position)
        return np.where(blank, 256, np.minimum(np.where(blank, 0, position) * 256, 255)).astype(np.intp)

    def over(self, ground: Floats, values: NDArray[np.floating], *, opacity: float) -> Floats:
        """Return the colours as they look over a grey ground, 0 to 255, of the shape of `values` and an axis of 3."""
        strength = opacity * self.strength(values)
        return np.asarray((1 - strength)[..., None] * ground + strength[..., None] * self.pure(values))

    def strength(self, values: NDArray[np.floating]) -> Floats:
        """Return how much of the ground a value hides at full opacity, 0 to 1: less near the zero of signed numbers."""
        if self.colormap != SIGNED:
            return np.ones(np.shape(values))
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2 or 1.0
        return np.asarray(np.clip(np.abs(np.asarray(values) - middle) / half, 0, 1) ** 0.5)

    def stops(self, n: int = 9, *, opacity: float = 1.0, ground: float = BRIGHT_TISSUE) -> list[str]:
        """Return `n` colours from low to high as ``#rrggbb``, as they look at `opacity` over a grey of `ground`."""
        colours = self.over(np.full(1, ground * 255), np.linspace(self.low, self.high, n), opacity=opacity)
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colours.round().astype(int).tolist()]


def scale_of(heatmap: Heatmap) -> ColourScale:
    """Return the scale of a map.

    The same for all slides: 0 to 100 for percentiles, multiples of the mean from 1 to 10 for weights, the reach of what
    tiles say alone. Symmetric for other signed numbers, else the map's own range. The ends of its own range are the 1st
    and 99th percentile, so that one extreme tile does not turn the rest flat; minimum and maximum where these two are
    equal.
    """
    if heatmap.scaling == "percentile":
        is_mean = heatmap.shows == "attention" and not heatmap.of
        low, high = ("least attended", "most attended") if is_mean else ("lowest", "highest")
        return ColourScale(0.0, 100.0, SEQUENTIAL, low, high, heatmap.caption)
    if heatmap.reach is not None:
        reach = heatmap.reach
        words = f"against it ({scipy.special.expit(-reach):.0%})", f"for it ({scipy.special.expit(reach):.0%})"
        return ColourScale(-reach, reach, SIGNED, *words, heatmap.caption)
    if heatmap.signed:
        reach = float(np.quantile(np.abs(heatmap.values), 0.99)) if heatmap.values.size else 0.0
        # most effects may be exactly 0, as those of a maximum are
        reach = reach or float(np.abs(heatmap.values).max(initial=0.0)) or 1.0
        return ColourScale(
            -reach, reach, SIGNED, f"lowers it ({-reach:.2g})", f"raises it (+{reach:.2g})", heatmap.caption
        )
    if heatmap.is_weight or heatmap.scaling == "relative":
        mean = 1.0 if heatmap.scaling == "relative" else 1 / max(1, heatmap.values.size)
        words = "average or less", f"{MANY_TIMES:.0f} times the average"
        return ColourScale(mean, MANY_TIMES * mean, SEQUENTIAL, *words, heatmap.caption)
    # one extreme tile must not turn the rest flat
    bottom, top = (float(np.quantile(heatmap.values, q)) if heatmap.values.size else q for q in (0.01, 0.99))
    if bottom == top:
        bottom, top = float(heatmap.values.min()), float(heatmap.values.max())
    return ColourScale(bottom, top, SEQUENTIAL, f"{bottom:.3g}", f"{top:.3g}", heatmap.caption)

"""Pictures: the slide's thumbnail with a heat map over it, outlines, a scale bar and a colour bar in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outlines
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry.base import BaseGeometry

from eosin.heatmaps._colour import BRIGHT_TISSUE, ColourScale, pale_grey, scale_of
from eosin.heatmaps._heatmap import Heatmap, Window
from eosin.wsi._picture import write_picture
from eosin.wsi._slide import Slide
from eosin.wsi._tissue import TissueMask

DPI = 100
TISSUE_COLOUR = "#2f6fb5"
TRUTH_COLOUR = "#000000"
OPACITY = 0.7
MARGIN_PX = 12
TITLE_PX = 30
COLOUR_BAR_PX = 190
LEGEND_PX = 24
LINE_PX = 17  # of words in 10 points


@dataclass(frozen=True, eq=False)
class View:
    """A small picture of a slide and where its pixels lie.

    Parameters
    ----------
    image : (h, w, 3) uint8
    mpp : float
        Resolution of the image.
    slide_mpp : float
        Resolution of level 0.
    window_px0 : (x, y, w, h)
        The part of the slide that the image shows: all of it, or the box that was scanned when the file states one.
    """

    image: NDArray[np.uint8]
    mpp: float
    slide_mpp: float
    window_px0: Window

    @property
    def px_per_px0(self) -> float:
        """Pixels of the image per level-0 pixel."""
        return self.slide_mpp / self.mpp

    def show_mask(self, tissue: TissueMask) -> NDArray[np.bool_]:
        """Return, for each pixel of the image, whether the cell of the mask that holds its centre is tissue."""
        columns, rows = (
            (((np.arange(count) + 0.5) / self.px_per_px0 + start) / cell_px0).astype(np.int64)
            for count, start, cell_px0 in zip(
                self.image.shape[1::-1], self.window_px0, tissue.px0_per_cell, strict=False
            )
        )
        last_row, last_column = tissue.mask.shape[0] - 1, tissue.mask.shape[1] - 1
        return np.asarray(tissue.mask[np.minimum(rows, last_row)][:, np.minimum(columns, last_column)])


@dataclass(frozen=True, eq=False)
class Contour:
    """An outline to draw: its geometry in level-0 pixels, its colour and its name for the legend."""

    geometry: BaseGeometry
    colour: str
    name: str


def take_view(slide: Slide, *, longest_px: int = 1200) -> View:
    """Read a thumbnail of the scanned part of a slide.

    Parameters
    ----------
    slide : Slide
    longest_px : int
        Longest side of the image; a slide smaller than this is shown at its own resolution.
    """
    x, y, width, height = slide.bounds_px0 or (0, 0, *slide.size_px0)
    mpp = slide.mpp * max(1.0, max(width, height) / longest_px)
    # rounding of the division must not add a column of background
    size_px = [max(1, math.ceil(side * slide.mpp / mpp - 1e-6)) for side in (width, height)]
    image = slide.read((x, y), (size_px[0], size_px[1]), mpp)
    return View(image=image, mpp=mpp, slide_mpp=slide.mpp, window_px0=(x, y, width, height))


def blend(
    view: View,
    heatmap: Heatmap,
    scale: ColourScale,
    *,
    tissue: TissueMask | None = None,
    opacity: float = OPACITY,
) -> NDArray[np.uint8]:
    """Lay the colours of a map over a pale grey copy of the view, so that every colour belongs to the map.

    Blank where no tile lies and, when `tissue` is given, where none is: tiles reach over the edge of the tissue.
    """
    plane = heatmap.raster(view.mpp, window_px0=view.window_px0)
    if tissue is not None:
        plane = np.where(view.show_mask(tissue), plane, np.nan)
    grey = pale_grey(view.image)
    mixed = scale.over(grey, plane, opacity=opacity)
    return np.where(np.isnan(plane)[..., None], grey, mixed).round().astype(np.uint8)


def draw(
    view: View, image: NDArray[np.uint8], *, contours: Sequence[Contour] = (), scale_bar: bool = True
) -> NDArray[np.uint8]:
    """Return `image` with outlines and a scale bar drawn on it, pixel for pixel the same size."""
    figure, (axes,) = _canvas([image])
    _draw_contours(axes, view, contours)
    if scale_bar:
        _draw_scale_bar(axes, view)
    return render(figure)


def write_png(
    path: Path,
    view: View,
    heatmap: Heatmap,
    *,
    title: str = "",
    tissue: TissueMask | None = None,
    contours: Sequence[Contour] = (),
    scale: ColourScale | None = None,
    opacity: float = OPACITY,
) -> None:
    """Write the picture of a heat map: slide and overlay side by side, outlines, scale bar, colour bar in words.

    Parameters
    ----------
    path : Path
    view : View
        Of `take_view`.
    heatmap : Heatmap
    title : str
        Printed above the image, usually the slide and what the model says.
    tissue : TissueMask, optional
        Outlined, and the overlay is blank outside of it.
    contours : sequence of Contour
        Truth or annotation.
    scale : ColourScale, optional
        `scale_of(heatmap)` unless given.
    opacity : float
        Of the overlay, 0 to 1.
    """
    scale = scale or scale_of(heatmap)
    images = [view.image, blend(view, heatmap, scale, tissue=tissue, opacity=opacity)]
    if tissue is not None:
        contours = [Contour(tissue.contours(), TISSUE_COLOUR, "tissue found"), *contours]
    top, bottom = MARGIN_PX + TITLE_PX * bool(title), MARGIN_PX + LEGEND_PX * bool(contours)
    figure, panels = _canvas(images, top=top, right=COLOUR_BAR_PX, bottom=bottom, left=MARGIN_PX)
    for axes in panels:
        _draw_contours(axes, view, contours)
        _draw_scale_bar(axes, view)
    _draw_colour_bar(figure, scale, opacity)
    _draw_words(figure, title, contours)
    write_picture(path, Image.fromarray(render(figure)), dpi=(DPI, DPI))


def _canvas(
    images: Sequence[NDArray[np.uint8]], *, top: int = 0, right: int = 0, bottom: int = 0, left: int = 0
) -> tuple[Figure, list[Axes]]:
    """Return a figure with images of one size side by side, each pixel of an image one pixel of the figure."""
    height, width = images[0].shape[:2]
    full_width = left + len(images) * width + (len(images) - 1) * MARGIN_PX + right
    # a flat picture still needs the height of the colour bar beside it
    full_height = max(top + height + bottom, 240 if right else 1)
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    panels = []
    for number, image in enumerate(images):
        x = left + number * (width + MARGIN_PX)
        box = (x / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
        axes = figure.add_axes(box)
        axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        panels.append(axes)
    return figure, panels


def render(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of a figure that has an Agg canvas, (h, w, 3)."""
    figure.canvas.draw()
    # a copy: the canvas draws into this memory again
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def _draw_contours(axes: Axes, view: View, contours: Sequence[Contour]) -> None:
    corner = np.array(view.window_px0[:2])
    for contour in contours:
        rings = [ring for polygon in _polygons(contour.geometry) for ring in (polygon.exterior, *polygon.interiors)]
        if not rings:
            continue
        paths = [Outlines((np.asarray(ring.coords)[:, :2] - corner) * view.px_per_px0, closed=True) for ring in rings]
        outline = Outlines.make_compound_path(*paths)
        halo = [withStroke(linewidth=3.0, foreground="white", alpha=0.85)]
        axes.add_patch(PathPatch(outline, fill=False, edgecolor=contour.colour, linewidth=1.3, path_effects=halo))


def _polygons(geometry: BaseGeometry) -> list[BaseGeometry]:
    parts = getattr(geometry, "geoms", [geometry])
    return [part for part in parts if part.geom_type == "Polygon" and not part.is_empty]


def scale_bar_um(width_um: float) -> float:
    """Return the largest of 1, 2, 5 × 10ᵏ µm that is at most a quarter of the width."""
    exponent = math.floor(math.log10(width_um / 4))
    steps = [step * 10.0**exponent for step in (1.0, 2.0, 5.0)]
    return max(step for step in steps if step <= width_um / 4)


def _draw_scale_bar(axes: Axes, view: View) -> None:
    height, width = view.image.shape[:2]
    length_um = scale_bar_um(width * view.mpp)
    words = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    left, bottom, thick = round(0.025 * width), height - round(0.025 * height), max(3, height // 180)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    bar = Rectangle(
        (left, bottom - thick), length_um / view.mpp, thick, facecolor="black", linewidth=0, path_effects=halo
    )
    axes.add_patch(bar)
    axes.text(left, bottom - thick - 4, words, fontsize=10, va="bottom", ha="left", path_effects=halo)


def _draw_colour_bar(figure: Figure, scale: ColourScale, opacity: float) -> None:
    width, height = figure.get_size_inches() * DPI
    title = _wrapped(scale.title)
    above = MARGIN_PX + LINE_PX * (1 + title.count("\n")) + MARGIN_PX
    tall = min(300.0, height - above - MARGIN_PX)
    axes = figure.add_axes((1 - 170 / width, 1 - (above + tall) / height, 16 / width, tall / height))
    levels = np.linspace(scale.low, scale.high, 256)
    shown = scale.over(np.full(1, 255 * BRIGHT_TISSUE), levels, opacity=opacity) / 255
    axes.imshow(levels[::-1, None], aspect="auto", cmap=ListedColormap(shown), norm=Normalize(scale.low, scale.high))
    axes.set_xticks([])
    axes.set_yticks([])
    for height_in_bar, words in ((1.0, scale.high_words), (0.0, scale.low_words)):
        va = "top" if height_in_bar else "bottom"
        axes.text(1.5, height_in_bar, words, transform=axes.transAxes, fontsize=10, va=va)
    figure.text(1 - 170 / width, 1 - MARGIN_PX / height, title, fontsize=10, va="top")


def _wrapped(words: str, width: int = 23) -> str:
    lines = [""]
    for word in words.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, word]
    return "\n".join(lines)


def _draw_words(figure: Figure, title: str, contours: Sequence[Contour]) -> None:
    width, height = figure.get_size_inches() * DPI
    if title:
        figure.text(12 / width, 1 - 12 / height, title, fontsize=11, va="top")
    left = 12.0
    for contour in contours:
        figure.text(left / width, 8 / height, "▬ ", color=contour.colour, fontsize=10, va="bottom")
        text = figure.text((left + 18) / width, 8 / height, contour.name, fontsize=10, va="bottom")
        # the width of a text is known only when it is drawn
        left += 36 + text.get_window_extent().width

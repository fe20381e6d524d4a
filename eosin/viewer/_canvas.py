"""The picture that a reader moves in: slide, map, tissue outline, scale bar; the same live and offline.

Plot units are µm with y upwards, so that a level-0 pixel (x, y) lies at (x · mpp, -y · mpp). Maps are one small
picture each, one cell per tile, coloured in the browser: 200,000 tiles are as fluid as 200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    CustomJS,
    Div,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    Image,
    ImageRGBA,
    LinearColorMapper,
    MultiLine,
    Range1d,
    ScaleBar,
    Segment,
    Slider,
    Text,
    WheelZoomTool,
)
from bokeh.plotting import figure
from numpy.typing import NDArray
from shapely import MultiPolygon

from eosin.heatmaps._colour import ColourScale, scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._lattice import Lattice
from eosin.wsi._grid import TileGrid

TISSUE_COLOUR = "#2f6fb5"
REMOVED_COLOUR = "#c2185b"
REMOVED_VEIL = np.array([255, 255, 255, 200], dtype=np.uint8)
COLOURS = 256
MAX_EDGES = 20_000
OPACITY = 0.6
LEAST_VIEW_UM = 50.0
FOOT = {"font-size": "13px", "min-height": "20px"}

READOUT = """
const hit = cb_data.index.image_indices
const at = hit.length ? hit[0].flat_index : -1
const data = source.data
const value = at < 0 ? NaN : data.plain[0][at]
if (!isFinite(value)) { readout.text = idle; return }
const size = Math.abs(value)
const number = size >= 0.01 && size < 1e5 || size == 0 ? value.toFixed(3) : value.toExponential(2)
const place = `x ${Math.round(cb_data.geometry.x)}, y ${Math.round(-cb_data.geometry.y)} µm`
readout.text = `${mapper.tags[0]} <b>${number}</b> · percentile ${data.rank[0][at].toFixed(1)}`
    + ` · tile ${data.tile[0][at]} at ${place}`
"""
# as `ColourScale.stops`: the colours over tissue of a brightness of 0.85
FADE = """
const mixed = (colour, opacity) => {
    const [r, g, b, a] = [1, 3, 5, 7].map((at) => parseInt(colour.slice(at, at + 2), 16))
    const strength = opacity * a / 255
    return "#" + [r, g, b].map((part) => Math.round((1 - strength) * 0.85 * 255 + strength * part)
        .toString(16).padStart(2, "0")).join("")
}
for (const [glyph, mapper, legend] of maps) {
    glyph.global_alpha = slider.value
    const palette = mapper.palette.map((colour) => mixed(colour, slider.value))
    legend.setv({palette, low: mapper.low, high: mapper.high})
}
"""
IDLE = "Point at a tile to read its score."
MAGNIFY = """
const mpp = (range.end - range.start) / (plot.inner_width || 1)
if (!isFinite(mpp) || !plot.inner_width) return
const power = 10 / mpp
const number = (value) => value >= 10 ? value.toFixed(0) : String(Number(value.toPrecision(2)))
const beyond = mpp < 0.99 * own ? ` · finer than the scan (${number(own)} µm/px, ${number(10 / own)}x)` : ""
lens.text = `<b>${number(power)}x</b> · ${number(mpp)} µm/px${note}${beyond}`
"""
GIVEN = " (resolution as given by you)"


@dataclass(frozen=True, eq=False)
class Canvas:
    """A figure of one slide and the parts of it that change.

    Parameters
    ----------
    plot : figure
    lattice : Lattice
    maps : ColumnDataSource
        Of each cell: the ``value`` that is coloured, the ``plain`` score, its ``rank`` and the ``tile``.
    shown : GlyphRenderer
        The map.
    mapper : LinearColorMapper
    legend : LinearColorMapper
        The colours as they look over grey tissue at the opacity of the map.
    bar : ColorBar
    veil, edges : ColumnDataSource
        Of removed tiles.
    outline : GlyphRenderer
        Of the tissue.
    notes : GlyphRenderer
        Lines of annotations.
    names : GlyphRenderer
        Names of annotations.
    readout : Div
        What lies under the pointer.
    lens : Div
        Magnification and µm per pixel of the screen.
    """

    plot: figure
    lattice: Lattice
    maps: ColumnDataSource
    shown: GlyphRenderer
    mapper: LinearColorMapper
    legend: LinearColorMapper
    bar: ColorBar
    veil: ColumnDataSource
    edges: ColumnDataSource
    outline: GlyphRenderer
    notes: GlyphRenderer
    names: GlyphRenderer
    readout: Div
    lens: Div

    def show_map(self, shown: Heatmap, plain: Heatmap) -> None:
        """Put another map in the place of the one that is shown: as it is coloured, and before it was scaled."""
        self.maps.data = map_columns(self.lattice, shown, plain)
        scale = scale_of(shown)
        self.mapper.update(palette=palette(scale), low=scale.low, high=scale.high, tags=[escape(plain.label)])
        colours = scale.stops(COLOURS, opacity=float(self.shown.glyph.global_alpha))
        self.legend.update(palette=colours, low=scale.low, high=scale.high)
        self.bar.major_label_overrides = _end_words(scale)
        self.bar.ticker.ticks = [scale.low, scale.high]  # of the same ticker: the browser does not listen to another

    def show_removed(self, present: NDArray[np.bool_]) -> None:
        """Veil the tiles that are not present, (n,)."""
        gone = self.lattice.cover(~present) & ~self.lattice.cover(present)
        self.veil.data.update(image=[_veil(gone)])
        self.edges.data = _edges(self.lattice, gone)

    def show_annotations(self, columns: dict[str, list[Any]]) -> None:
        """Draw lines with names: see `eosin.viewer._annotations.annotation_columns`."""
        self.notes.data_source.data = columns

    def look_at(self, centre_um: tuple[float, float], width_um: float) -> None:
        """Move the view: centre x and y (downwards), and its width."""
        ratio = (self.plot.inner_height or 1) / (self.plot.inner_width or 1)
        x, y = centre_um[0], -centre_um[1]
        height_um = width_um * ratio
        self.plot.x_range.update(start=x - width_um / 2, end=x + width_um / 2)
        self.plot.y_range.update(start=y - height_um / 2, end=y + height_um / 2)


def make_canvas(
    lattice: Lattice, shown: Heatmap, plain: Heatmap, *, opacity: float = OPACITY, is_given: bool = False
) -> Canvas:
    """Return a canvas without the slide's own pixels; the caller adds these below.

    Parameters
    ----------
    lattice : Lattice
    shown, plain : Heatmap
        The map that is shown first, as it is coloured and before it was scaled.
    opacity : float
    is_given : bool
        Whether a person stated the resolution, because the file does not.
    """
    plot = _plot(shown.grid)
    scale = scale_of(shown)
    mapper = LinearColorMapper(
        palette=palette(scale), low=scale.low, high=scale.high, nan_color="rgba(0, 0, 0, 0)", tags=[escape(plain.label)]
    )
    maps = ColumnDataSource(map_columns(lattice, shown, plain))
    (x, y), (width, height) = lattice.origin_um, lattice.size_um
    place = {"x": x, "y": -(y + height), "dw": width, "dh": height}
    glyph = Image(image="value", color_mapper=mapper, global_alpha=opacity, **place)
    layer = plot.add_glyph(maps, glyph, level="glyph", name="map")
    nothing = np.zeros(lattice.shape, dtype=bool)
    veil = ColumnDataSource({"image": [_veil(nothing)]})
    plot.add_glyph(veil, ImageRGBA(image="image", **place), level="glyph", name="removed")
    edges = ColumnDataSource(_edges(lattice, nothing))
    plot.add_glyph(edges, Segment(line_color=REMOVED_COLOUR, line_width=2), level="glyph")
    outline = plot.add_glyph(
        ColumnDataSource({"xs": [], "ys": []}), MultiLine(line_color=TISSUE_COLOUR, line_width=1.5), name="tissue"
    )
    notes, names = _add_notes(plot)
    legend = LinearColorMapper(palette=scale.stops(COLOURS, opacity=opacity), low=scale.low, high=scale.high)
    bar = _colour_bar(legend, scale)
    plot.add_layout(bar, "right")
    readout = Div(text=IDLE, styles=FOOT, sizing_mode="stretch_width", name="readout")
    _add_readout(plot, layer, maps, mapper, readout)
    lens = _add_lens(plot, shown.grid.slide_mpp, is_given=is_given)
    return Canvas(plot, lattice, maps, layer, mapper, legend, bar, veil, edges, outline, notes, names, readout, lens)


def _plot(grid: TileGrid) -> figure:
    width, height = (side * grid.slide_mpp for side in grid.slide_size_px0)
    x_range, y_range = (
        Range1d(start, end, min_interval=LEAST_VIEW_UM, max_interval=8 * max(width, height))
        for start, end in ((0, width), (-height, 0))
    )
    plot = figure(
        x_range=x_range, y_range=y_range, tools="pan,wheel_zoom,reset", toolbar_location="above", min_border=0,
        sizing_mode="stretch_both", outline_line_color="#cccccc", background_fill_color="#ffffff",
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = plot.select_one(WheelZoomTool)
    plot.axis.visible = False
    plot.grid.visible = False
    bar = ScaleBar(
        range=x_range, unit="µm", location="bottom_left", background_fill_alpha=0.75, border_line_color=None,
        label_text_font_size="13px",
    )  # fmt: skip
    plot.add_layout(bar)
    return plot


def _add_readout(
    plot: figure, shown: GlyphRenderer, maps: ColumnDataSource, mapper: LinearColorMapper, readout: Div
) -> None:
    args = {"source": maps, "readout": readout, "mapper": mapper, "idle": IDLE}
    hover = HoverTool(renderers=[shown], tooltips=None, callback=CustomJS(args=args, code=READOUT), visible=False)
    plot.add_tools(hover)


def fade(slider: Slider, canvases: Sequence[Canvas]) -> CustomJS:
    """Return what lets a slider set the opacity of maps and of their legends, in the browser."""
    maps = [[canvas.shown.glyph, canvas.mapper, canvas.legend] for canvas in canvases]
    return CustomJS(args={"maps": maps, "slider": slider}, code=FADE)


def map_columns(lattice: Lattice, shown: Heatmap, plain: Heatmap) -> dict[str, list[NDArray[np.float32]]]:
    """Return the pictures of a map as Bokeh draws them, bottom row first."""
    tiles = np.arange(shown.grid.n_tiles, dtype=np.float64)
    planes = {"value": shown.values, "plain": plain.values, "rank": plain.percentile().values, "tile": tiles}
    return {name: [picture(lattice, values)] for name, values in planes.items()}


def picture(lattice: Lattice, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return one value per tile (n,) as a picture, bottom row first."""
    return np.ascontiguousarray(lattice.paint(values)[::-1])


def palette(scale: ColourScale) -> list[str]:
    """Return the colours of a scale, those of every other export: ``#rrggbbaa``, clear where a map says nothing."""
    values = np.linspace(scale.low, scale.high, COLOURS)
    alpha = np.round(255 * scale.strength(values)).astype(int)
    return [
        f"#{r:02x}{g:02x}{b:02x}{a:02x}"
        for (r, g, b), a in zip(scale.pure(values).astype(int).tolist(), alpha.tolist(), strict=True)
    ]


def _veil(gone: NDArray[np.bool_]) -> NDArray[np.uint32]:
    picture = np.zeros((*gone.shape, 4), dtype=np.uint8)
    picture[gone[::-1]] = REMOVED_VEIL
    return picture.view(np.uint32)[..., 0]


def _edges(lattice: Lattice, gone: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    x0, y0, x1, y1 = lattice.edges_um(gone).T
    if len(x0) > MAX_EDGES:  # scattered single tiles: the veil shows them, and a browser draws this many lines slowly
        x0 = y0 = x1 = y1 = np.zeros(0)
    return {"x0": x0, "y0": -y0, "x1": x1, "y1": -y1}


def _add_notes(plot: figure) -> tuple[GlyphRenderer, GlyphRenderer]:
    columns: dict[str, list[object]] = {name: [] for name in ("xs", "ys", "colour", "x", "y", "name")}
    notes = ColumnDataSource(columns)
    lines = plot.add_glyph(notes, MultiLine(line_color="colour", line_width=3), name="annotations")
    look = {"text_font_size": "13px", "text_font_style": "bold", "text_color": "#ffffff", "text_baseline": "bottom"}
    box = {"background_fill_color": "colour", "background_fill_alpha": 0.9, "padding": 3}
    names = plot.add_glyph(notes, Text(x="x", y="y", text="name", y_offset=-4, text_align="center", **look, **box))
    return lines, names


def _add_lens(plot: figure, own_mpp: float, *, is_given: bool) -> Div:
    """Return what says how large things are shown; "x" is that of a scanner with 0.25 µm per pixel at 40x."""
    lens = Div(text="", styles=FOOT, name="lens")
    args = {"plot": plot, "range": plot.x_range, "lens": lens, "own": own_mpp, "note": GIVEN if is_given else ""}
    tell = CustomJS(args=args, code=MAGNIFY)
    plot.x_range.js_on_change("start", tell)
    plot.x_range.js_on_change("end", tell)
    plot.js_on_change("inner_width", tell)
    return lens


def _colour_bar(legend: LinearColorMapper, scale: ColourScale) -> ColorBar:
    return ColorBar(
        color_mapper=legend, width=14, label_standoff=6, major_tick_line_color=None,
        ticker=FixedTicker(ticks=[scale.low, scale.high]), major_label_overrides=_end_words(scale),
    )  # fmt: skip


def _end_words(scale: ColourScale) -> dict[float, str]:
    return {scale.low: scale.low_words, scale.high: scale.high_words}


def outline_columns(tissue: MultiPolygon, mpp: float) -> dict[str, list[NDArray[np.float64]]]:
    """Return the rings of an outline (level-0 pixels) as lines in plot units."""
    rings = [ring for part in tissue.geoms for ring in (part.exterior, *part.interiors)]
    points = [np.asarray(ring.simplify(4 / mpp).coords)[:, :2] * mpp for ring in rings]
    return {"xs": [ring[:, 0] for ring in points], "ys": [-ring[:, 1] for ring in points]}

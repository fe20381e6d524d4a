"""The viewer as one file to send around: a small picture of each slide, every map, no server and no edits."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bokeh.embed import file_html
from bokeh.layouts import column, row
from bokeh.models import (
    CheckboxGroup,
    ColumnDataSource,
    CustomJS,
    Div,
    ImageURL,
    Row,
    Select,
    Slider,
    TabPanel,
    Tabs,
)
from bokeh.plotting import figure
from bokeh.resources import INLINE

from eosin._files import write_text
from eosin.errors import ConfigError
from eosin.heatmaps._colour import scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._png import View, take_view
from eosin.viewer._canvas import OPACITY, Canvas, fade, make_canvas, outline_columns, palette, picture
from eosin.viewer._catalogue import Catalogue, SlideStudy
from eosin.viewer._drawing import add_slide
from eosin.viewer._layers import PERCENTILE, PLAIN, TIMES, Choice, default_scaling, scalings_of
from eosin.viewer._minimap import make_minimap
from eosin.viewer._panel import TEXT, verdict_html
from eosin.viewer._session import judge, state_in_words
from eosin.viewer._tiles import blank_png, encode_jpeg
from eosin.wsi._grid import TileGrid

PICTURE_PX = 2000
MAX_SLIDES = 50

NO_TILES = f"data:image/png;base64,{base64.b64encode(blank_png()).decode()}"
"""Address of tiles that show nothing: a tile layer is what keeps width and height of the view in proportion."""

SHOW = """
const entry = entries[select.value]
const plain = store.data[entry.plain], rank = store.data[entry.rank]
source.data = {value: entry.by_rank ? rank : plain, plain, rank, tile: source.data.tile}
mapper.setv({palette: entry.palette, low: entry.low, high: entry.high, tags: [entry.label]})
bar.major_label_overrides = new Map([[entry.low, entry.low_words], [entry.high, entry.high_words]])
bar.ticker.ticks = [entry.low, entry.high]
"""
TOGGLE = "parts.forEach((part, i) => { part.visible = box.active.includes(i) })"


@dataclass(frozen=True)
class _Entry:
    """One map on one scale, as the page's script reads it; low and high are in the values that are stored."""

    name: str
    plain: str
    rank: str
    by_rank: bool
    palette: list[str]
    low: float
    high: float
    low_words: str
    high_words: str
    label: str


def write_static(path: Path, catalogue: Catalogue) -> None:
    """Write one HTML page that opens anywhere without a network: slides, maps, opacity, scores under the pointer.

    Parameters
    ----------
    path : Path
    catalogue : Catalogue

    Raises
    ------
    ConfigError
        If no slide can be shown, or more than fit into one file.
    """
    if not 0 < len(catalogue.shown) <= MAX_SLIDES:
        raise ConfigError(
            f"{path}: one page holds 1 to {MAX_SLIDES} slides, but {len(catalogue.shown)} can "
            "be shown; pass other slides"
        )
    tabs = [TabPanel(title=one.slide_id, child=_slide_page(catalogue.study(one.key))) for one in catalogue.shown]
    whole = {"height": "calc(100vh - 16px)"}
    write_text(path, file_html(Tabs(tabs=tabs, sizing_mode="stretch_both", styles=whole), INLINE, title="eosin view"))


def _slide_page(study: SlideStudy) -> Row:
    with study.slides.borrow(study.listed.key) as slide:
        view = take_view(slide, longest_px=PICTURE_PX)
    choice = study.layers.choices[0]
    plain = study.layers.get(choice)
    first = default_scaling(plain)
    canvas = make_canvas(study.lattice, study.layers.get(choice, first), plain, is_given=study.is_mpp_given)
    add_slide(canvas, study.grid, NO_TILES)
    minimap = _add_picture(canvas, view, study.grid)
    canvas.outline.data_source.data = outline_columns(study.tissue, study.grid.slide_mpp)
    store, entries = _all_maps(study)
    before = judge(study.asked, study.seen.subsets.logits())
    words = verdict_html(study, state_in_words(before), before, study.asked.card.recipe.aggregator.name)
    controls = _controls(canvas, store, entries, _name(choice, first))
    foot = row(canvas.readout, canvas.lens, sizing_mode="stretch_width")
    return row(
        column(canvas.plot, minimap, foot, sizing_mode="stretch_both", styles={"position": "relative"}),
        column(Div(text=words, styles=TEXT, width=380), *controls, width=400),
        sizing_mode="stretch_both",
    )


def _add_picture(canvas: Canvas, view: View, grid: TileGrid) -> figure:
    """Put the picture below the map, and return the overview that shows it, too."""
    x, y, width, height = (side * view.slide_mpp for side in view.window_px0)
    url = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(view.image)).decode()}"
    place = {"url": [url], "x": [x], "y": [-y], "w": [width], "h": [height]}
    glyph = ImageURL(url="url", x="x", y="y", w="w", h="h", anchor="top_left")
    canvas.plot.add_glyph(ColumnDataSource(place), glyph, level="image", name="pixels")
    return make_minimap(canvas.plot, grid, url, (x, y, width, height))


def _all_maps(study: SlideStudy) -> tuple[ColumnDataSource, dict[str, Any]]:
    """Return every map as pictures, once as it is and once as ranks, and what each scale makes of them."""
    columns: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for number, choice in enumerate(study.layers.choices):
        plain = study.layers.get(choice)
        columns[f"plain_{number}"] = [picture(study.lattice, plain.values)]
        columns[f"rank_{number}"] = [picture(study.lattice, plain.percentile().values)]
        for scaling in scalings_of(plain):
            entry = _entry(choice, scaling, number, plain, study.layers.get(choice, scaling))
            entries[entry.name] = vars(entry)
    return ColumnDataSource(columns), entries


def _entry(choice: Choice, scaling: str, number: int, plain: Heatmap, shown: Heatmap) -> _Entry:
    scale = scale_of(shown)
    factor = plain.grid.n_tiles if scaling == TIMES else 1
    return _Entry(
        name=_name(choice, scaling),
        plain=f"plain_{number}",
        rank=f"rank_{number}",
        by_rank=scaling == PERCENTILE,
        palette=palette(scale),
        low=scale.low / factor,
        high=scale.high / factor,
        low_words=scale.low_words,
        high_words=scale.high_words,
        label=escape(plain.label),
    )


def _name(choice: Choice, scaling: str) -> str:
    about = f" for {choice.class_name}" if choice.class_name else ""
    return f"{choice.family}{about}" + ("" if scaling == PLAIN else f", {scaling}")


def _controls(canvas: Canvas, store: ColumnDataSource, entries: dict[str, Any], first: str) -> list[Any]:
    select = Select(title="Map", options=list(entries), value=first, width=380)
    args = {
        "select": select, "entries": entries, "store": store, "source": canvas.maps, "mapper": canvas.mapper,
        "bar": canvas.bar,
    }  # fmt: skip
    slider = Slider(title="Opacity", start=0, end=1, step=0.05, value=OPACITY, width=380)
    fading = fade(slider, [canvas])
    select.js_on_change("value", CustomJS(args=args, code=SHOW), fading)
    slider.js_on_change("value", fading)
    box = CheckboxGroup(labels=["map", "tissue outline"], active=[0, 1], inline=True)
    parts = [canvas.shown, canvas.outline]
    box.js_on_change("active", CustomJS(args={"parts": parts, "box": box}, code=TOGGLE))
    return [select, slider, box]

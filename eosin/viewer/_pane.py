"""A slide on the page: its pixels, the canvas over them, the overview in a corner, the line below."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bokeh.layouts import row
from bokeh.models import LayoutDOM, Slider, WMTSTileSource

from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._annotations import Annotation, annotation_columns
from eosin.viewer._canvas import Canvas, fade, make_canvas, outline_columns
from eosin.viewer._catalogue import SlideStudy
from eosin.viewer._drawing import add_slide
from eosin.viewer._minimap import make_minimap
from eosin.viewer._panel import SHOW_GREY, SHOW_MAP, SHOW_NOTES, SHOW_TISSUE
from eosin.viewer._tiles import TilePyramid

Address = Callable[[str], str]


@dataclass(frozen=True, eq=False)
class Pane:
    """One slide with one map.

    Parameters
    ----------
    study : SlideStudy
    canvas : Canvas
    pixels : WMTSTileSource
    parts : list of LayoutDOM
        What a column shows: the figure first.
    address : callable
        Given a look, returns the address of the slide's tiles.
    """

    study: SlideStudy
    canvas: Canvas
    pixels: WMTSTileSource
    parts: list[LayoutDOM]
    address: Address

    def show_parts(self, active: Sequence[int]) -> None:
        """Show or hide map, tissue outline and annotations; take the colours out of a slide below a map."""
        canvas = self.canvas
        canvas.shown.visible = canvas.bar.visible = SHOW_MAP in active
        canvas.outline.visible = SHOW_TISSUE in active
        canvas.notes.visible = canvas.names.visible = SHOW_NOTES in active
        self.pixels.url = self.address("grey" if SHOW_GREY in active and SHOW_MAP in active else "colour")

    def show_annotations(self, annotations: Sequence[Annotation]) -> None:
        """Draw these annotations in the place of those that are drawn."""
        self.canvas.show_annotations(annotation_columns(annotations, self.study.grid.slide_mpp))


def make_pane(study: SlideStudy, shown: Heatmap, plain: Heatmap, address: Address, *, opacity: float) -> Pane:
    """Return a slide with a map, as it is coloured and before it was scaled."""
    canvas = make_canvas(study.lattice, shown, plain, opacity=opacity, is_given=study.is_mpp_given)
    pixels = add_slide(canvas, study.grid, address("colour"))
    canvas.outline.data_source.data = outline_columns(study.tissue, study.grid.slide_mpp)
    side = TilePyramid(study.grid.slide_size_px0, study.grid.slide_mpp).side_um
    whole = address("colour").replace("{Z}/{X}/{Y}", "0/0/0")
    overview = make_minimap(canvas.plot, study.grid, whole, (0, 0, side, side))
    foot = row(canvas.readout, canvas.lens, sizing_mode="stretch_width", styles={"flex-wrap": "wrap", "gap": "4px"})
    return Pane(study, canvas, pixels, [canvas.plot, overview, foot], address)


def connect_opacity(slider: Slider, panes: Sequence[Pane]) -> None:
    """Let the slider fade the maps of these panes and their legends, in the browser."""
    slider.js_property_callbacks = {"change:value": [fade(slider, [pane.canvas for pane in panes])]}

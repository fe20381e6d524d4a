"""The whole slide in a corner while a part of it is shown: drag the frame, or click to go somewhere."""

from bokeh.events import Tap
from bokeh.models import BoxAnnotation, ColumnDataSource, CustomJS, ImageURL, Range1d, RangeTool
from bokeh.plotting import figure

from eosin.wsi._grid import TileGrid

LONGEST_PX = 120
FRAME_COLOUR = "#c2185b"
CORNER = {
    "position": "absolute", "top": "40px", "left": "8px", "background": "white", "border": "1px solid #999",
    "box-shadow": "0 1px 4px rgba(0, 0, 0, 0.35)", "z-index": "2",
}  # fmt: skip
SHOW = """
const sees = (range, length) => range.end - range.start >= 0.98 * length
small.visible = !(sees(main.x_range, width) && sees(main.y_range, height))
"""
GO = """
for (const [range, to] of [[main.x_range, cb_obj.x], [main.y_range, cb_obj.y]]) {
    const half = (range.end - range.start) / 2
    range.setv({start: to - half, end: to + half})
}
"""


def make_minimap(main: figure, grid: TileGrid, url: str, box_um: tuple[float, float, float, float]) -> figure:
    """Return a small figure that moves the view of `main`.

    Parameters
    ----------
    main : figure
    grid : TileGrid
    url : str
        Address of a small picture.
    box_um : x, y, w, h
        Where the picture lies on the slide, y downwards.
    """
    width, height = (side * grid.slide_mpp for side in grid.slide_size_px0)
    scale = LONGEST_PX / max(width, height)
    plot = figure(
        x_range=Range1d(0, width), y_range=Range1d(-height, 0), tools="tap", toolbar_location=None, min_border=0,
        frame_width=max(24, round(width * scale)), frame_height=max(24, round(height * scale)),
        outline_line_color=None, styles=CORNER, visible=False, name="minimap",
    )  # fmt: skip
    plot.axis.visible = False
    plot.grid.visible = False
    x, y, w, h = box_um
    place = ColumnDataSource({"url": [url], "x": [x], "y": [-y], "w": [w], "h": [h]})
    plot.add_glyph(place, ImageURL(url="url", x="x", y="y", w="w", h="h", anchor="top_left"))
    frame = BoxAnnotation(fill_color=FRAME_COLOUR, fill_alpha=0.12, line_color=FRAME_COLOUR, line_width=1.5)
    mover = RangeTool(x_range=main.x_range, y_range=main.y_range, overlay=frame, start_gesture="none")
    plot.add_tools(mover)
    plot.js_on_event(Tap, CustomJS(args={"main": main}, code=GO))
    show = CustomJS(args={"main": main, "small": plot, "width": width, "height": height}, code=SHOW)
    for side in (main.x_range, main.y_range):
        side.js_on_change("end", show)
    return plot

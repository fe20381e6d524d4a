"""What a reader draws with: the slide's tiles below, and lasso, box and brush above."""

from collections.abc import Callable
from typing import Any

import numpy as np
from bokeh.events import DoubleTap, SelectionGeometry
from bokeh.models import (
    BoxSelectTool,
    ColumnDataSource,
    CustomJS,
    FreehandDrawTool,
    LassoSelectTool,
    MultiLine,
    PanTool,
    PolySelectTool,
    TileRenderer,
    WMTSTileSource,
)
from numpy.typing import NDArray

from eosin.viewer._canvas import REMOVED_COLOUR, Canvas
from eosin.viewer._panel import SidePanel, switch_tools
from eosin.viewer._tiles import TilePyramid
from eosin.wsi._grid import TileGrid

SCREEN_TILE_PX = 256  # of a tile: the server sends twice as many, so that pixels are sharp at every zoom
# Bokeh ends a polygon with the Enter key or a long press; people double-click
CLOSE = """
const view = Bokeh.index.find_one(plot).tool_views.get(tool)
const none = {shift: false, ctrl: false}
if (tool.active && view._is_selecting) view._finish_selection({...none, modifiers: none})
"""
Points = NDArray[np.float64]


def add_slide(canvas: Canvas, grid: TileGrid, address: str) -> WMTSTileSource:
    """Put the slide's tiles below everything else; the source's address can be changed later."""
    pyramid = TilePyramid(grid.slide_size_px0, grid.slide_mpp)
    source = WMTSTileSource(
        url=address,
        tile_size=SCREEN_TILE_PX,
        max_zoom=pyramid.max_zoom,
        initial_resolution=pyramid.side_um / SCREEN_TILE_PX,
        x_origin_offset=0,
        y_origin_offset=pyramid.side_um,
        wrap_around=False,
    )
    canvas.plot.renderers.insert(0, TileRenderer(tile_source=source, name="pixels"))
    return source


def add_tools(
    canvas: Canvas,
    panel: SidePanel,
    draw: Callable[[SelectionGeometry], None],
    paint: Callable[[ColumnDataSource, dict[str, Any]], None],
) -> None:
    """Give the canvas lasso, polygon, box and brush, switched by the panel's buttons.

    Parameters
    ----------
    canvas : Canvas
    panel : SidePanel
    draw : callable
        Gets what lasso and box drew.
    paint : callable
        Gets the source of the strokes and its columns ``xs`` and ``ys``, one list of points per stroke.
    """
    strokes = ColumnDataSource({"xs": [], "ys": []})
    look = MultiLine(line_color=REMOVED_COLOUR, line_width=6, line_alpha=0.5, line_cap="round")
    brush = canvas.plot.add_glyph(strokes, look)
    tools = [
        canvas.plot.select_one(PanTool),
        LassoSelectTool(renderers=[], continuous=False),
        PolySelectTool(renderers=[], continuous=False),
        BoxSelectTool(renderers=[], continuous=False),
        FreehandDrawTool(renderers=[brush], num_objects=1),
    ]
    canvas.plot.add_tools(*tools[1:])
    chosen = tools[panel.tool.active or 0]
    if isinstance(chosen, PolySelectTool):
        canvas.plot.toolbar.active_tap = chosen
    else:
        canvas.plot.toolbar.active_drag = chosen
    canvas.plot.js_on_event(DoubleTap, CustomJS(args={"tool": tools[2], "plot": canvas.plot}, code=CLOSE))
    switch_tools(panel.tool, tools, panel.brush)
    canvas.plot.on_event(SelectionGeometry, draw)
    strokes.on_change("data", lambda _attribute, _old, new: paint(strokes, new))


def outline_of(geometry: dict[str, Any]) -> Points:
    """Return the corners (m, 2) of what lasso or box drew, in plot units."""
    if geometry.get("type") == "rect":
        x0, x1, y0, y1 = (float(geometry[name]) for name in ("x0", "x1", "y0", "y1"))
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return np.stack([np.asarray(geometry[axis], dtype=np.float64) for axis in ("x", "y")], axis=1)


def last_stroke(data: dict[str, Any]) -> Points:
    """Return the points (m, 2) of the stroke that was painted last, in plot units."""
    return np.stack([np.asarray(data[axis][-1], dtype=np.float64) for axis in ("xs", "ys")], axis=1)

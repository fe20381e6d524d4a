"""The controls beside the slide: what there is to press, without what it does."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from bokeh.events import ButtonClick
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CheckboxGroup,
    Column,
    ColumnDataSource,
    CustomJS,
    Div,
    ImageURL,
    LayoutDOM,
    RadioButtonGroup,
    Range1d,
    Select,
    Slider,
    Text,
    TextInput,
)
from bokeh.plotting import figure
from numpy.typing import NDArray

from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._canvas import OPACITY
from eosin.viewer._catalogue import SlideStudy
from eosin.viewer._lattice import Indices
from eosin.viewer._session import Verdict
from eosin.viewer._tiles import TileStore

WIDTH = 390
GALLERY_COLUMNS, GALLERY_ROWS = 4, 3
GALLERY_PX = 192
GALLERY_WIDTH = 366  # fits on a phone
GALLERY_SIZE = GALLERY_COLUMNS * GALLERY_ROWS
TOOLS = ("Move", "Lasso", "Polygon", "Box", "Brush")
ACTIONS = ("Remove", "Keep only", "Restore", "Copy", "Annotate")
COPY, ANNOTATE = 3, 4
SHOW_MAP, SHOW_TISSUE, SHOW_GREY, SHOW_NOTES = range(4)
NARROW_PX = 900
FILL = {"sizing_mode": "stretch_width"}
SPIN = (
    "<style>@keyframes eosin-spin {to {transform: rotate(360deg)}}</style>"
    '<span class="eosin-spinner" style="display:inline-block;width:11px;height:11px;border:2px solid #bbb;'
    'border-top-color:#2f6fb5;border-radius:50%;animation:eosin-spin 0.8s linear infinite;margin-right:7px"></span>'
)
TEXT = {"font-size": "14px", "line-height": "1.4"}
SMALL = {"font-size": "12px", "color": "#555555", "line-height": "1.35"}
MAX_HISTORY = 12
OVERLAY = {
    "position": "fixed", "left": "50%", "top": "50%", "transform": "translate(-50%, -50%)", "z-index": "10",
    "background": "#ffffff", "border": "1px solid #888", "border-radius": "6px", "padding": "14px 18px",
    "box-shadow": "0 6px 30px rgba(0, 0, 0, 0.35)", "font-size": "14px", "max-height": "90vh", "overflow": "auto",
    "min-width": "250px",
}  # fmt: skip
KEYS = (
    ("← → ↑ ↓", "move"), ("+ −", "zoom in, zoom out"), ("0", "the whole slide"), ("n p", "next slide, previous slide"),
    ("m", "map on and off"), ("g", "grey below the map on and off"), ("t", "tissue outline on and off"),
    ("a", "annotations on and off"), ("v l o b r", "tools: move, lasso, polygon, box, brush"),
    ("u", "undo; also Ctrl+Z"), ("?", "show and hide this list"),
)  # fmt: skip
PANEL_STYLE = f"""
:host {{ overflow: hidden auto; padding-left: 12px; box-sizing: border-box }}
@media (max-width: {NARROW_PX}px) {{
    :host {{ width: 100% !important; padding-left: 0; overflow: visible; flex: none !important }}
}}
@media (min-width: 2400px) {{ :host {{ width: 560px !important }} }}
"""
CAUTION = "font-size:12px;color:#8a4b00;border-left:3px solid #e08a00;padding-left:7px;margin-top:4px"


@dataclass(frozen=True, eq=False)
class SidePanel:
    """The widgets by what they are for."""

    verdict: Div
    slide: Select
    family: Select
    class_name: Select
    scaling: Select
    opacity: Slider
    shown: CheckboxGroup
    tool: RadioButtonGroup
    action: RadioButtonGroup
    brush: Slider
    undo: Button
    start_over: Button
    transplant: Button
    save: Button
    name: TextInput
    notes: Select
    drop: Button
    status: Div
    result: Div
    history: Div
    gallery: ColumnDataSource
    gallery_plot: figure
    gallery_title: Div
    help: Div
    layout: Column


def make_panel(
    slides: list[tuple[str, str]],
    refused: list[tuple[str, str]],
    classes: tuple[str, ...],
    beside: Sequence[LayoutDOM] = (),
) -> SidePanel:
    """Return the controls.

    Parameters
    ----------
    slides : list of (key, slide id)
    refused : list of (slide id, reason)
    classes : tuple of str
        Empty for tasks without.
    beside : sequence of LayoutDOM
        Controls of the second view.
    """
    gallery, gallery_plot = _make_gallery()
    parts: dict[str, Any] = {
        "verdict": Div(text="", name="verdict", styles={**TEXT, "font-size": "15px"}, **FILL),
        "slide": Select(title="Slide", options=slides, value=slides[0][0], name="slide", **FILL),
        "family": Select(title="Map", options=[], name="family", **FILL),
        "class_name": Select(title="Class", options=list(classes), width=140, name="class", visible=bool(classes)),
        "scaling": Select(title="Scale", options=[], name="scaling", **FILL),
        "opacity": Slider(title="Opacity", start=0, end=1, step=0.05, value=OPACITY, width=140, name="opacity"),
        "shown": CheckboxGroup(
            labels=["map", "tissue outline", "grey below the map", "annotations"],
            active=[SHOW_MAP, SHOW_TISSUE, SHOW_GREY, SHOW_NOTES], inline=True, name="shown", **FILL,
        ),
        "tool": RadioButtonGroup(labels=list(TOOLS), active=0, name="tool", **FILL),
        "action": RadioButtonGroup(labels=list(ACTIONS), active=0, name="action", **FILL),
        "brush": Slider(
            title="Brush width (tiles)", start=1, end=20, step=1, value=3, visible=False, name="brush", **FILL
        ),
        "undo": Button(label="Undo", disabled=True, name="undo", **FILL),
        "start_over": Button(label="Start over", disabled=True, name="start_over", **FILL),
        "transplant": Button(label="Add copied tiles", visible=False, name="transplant", **FILL),
        "save": Button(label="Save session", disabled=True, name="save", **FILL),
        "name": TextInput(title="Name of what you draw", value="Tumour", name="name", max_length=80, **FILL),
        "notes": Select(title="Go to", options=[], name="notes", **FILL),
        "drop": Button(label="Delete", disabled=True, width=80, align="end", name="drop"),
        "status": Div(text="", name="status", styles={**SMALL, "min-height": "20px"}, **FILL),
        "result": Div(text="", name="result", styles=TEXT, **FILL),
        "history": Div(text="", name="history", styles=SMALL, **FILL),
        "gallery": gallery,
        "gallery_plot": gallery_plot,
        "gallery_title": Div(text="", name="gallery_title", styles=SMALL, **FILL),
        "help": Div(text=_help_html(), name="help", visible=False, styles=OVERLAY),
    }  # fmt: skip
    return SidePanel(**parts, layout=_arrange(parts, refused, beside))


def _arrange(parts: dict[str, Any], refused: list[tuple[str, str]], beside: Sequence[LayoutDOM]) -> Column:
    p = parts
    head = Div(text=_heading("What if?"), **FILL)
    hint = Div(
        text="Draw on the slide. <i>Copy</i> keeps tiles for another slide. <i>Annotate</i> names what you draw.",
        styles=SMALL, **FILL,
    )  # fmt: skip
    note = Div(text=_refused_in_words(refused), styles=SMALL, visible=bool(refused), name="refused", **FILL)
    notes = column(p["name"], row(p["notes"], p["drop"], **FILL), visible=False, name="annotating", **FILL)
    show = CustomJS(args={"notes": notes, "action": p["action"]}, code=f"notes.visible = action.active == {ANNOTATE}")
    p["action"].js_on_change("active", show)
    keys = Button(label="Keys (?)", width=76, align="end", name="keys")
    keys.js_on_event(ButtonClick, CustomJS(args={"help": p["help"]}, code="help.visible = !help.visible"))
    return column(
        p["verdict"], row(p["slide"], keys, **FILL), note,
        row(p["family"], p["class_name"], **FILL), row(p["scaling"], p["opacity"], **FILL), p["shown"], *beside,
        head, hint, p["tool"], p["action"], p["brush"], notes, row(p["undo"], p["start_over"], p["save"], **FILL),
        p["transplant"],
        p["status"], p["result"], p["history"], p["gallery_title"], p["gallery_plot"], p["help"],
        width=WIDTH + 30, sizing_mode="stretch_height", stylesheets=[PANEL_STYLE], name="panel",
    )  # fmt: skip


def _help_html() -> str:
    rows = "".join(f"<tr><td><kbd>{keys}</kbd></td><td>{what}</td></tr>" for keys, what in KEYS)
    return f'<div style="font-weight:600;margin-bottom:6px">Keys</div><table>{rows}</table>'


def _heading(words: str) -> str:
    return f'<div style="font-size:15px;font-weight:600;margin-top:8px">{words}</div>'


def _refused_in_words(refused: list[tuple[str, str]]) -> str:
    items = "".join(f"<li>{escape(slide_id)}: {escape(reason)}</li>" for slide_id, reason in refused)
    return f"<details><summary>{len(refused)} not shown</summary><ul>{items}</ul></details>"


def _make_gallery() -> tuple[ColumnDataSource, figure]:
    source = ColumnDataSource(gallery_columns([], []))
    plot = figure(
        x_range=Range1d(0, GALLERY_COLUMNS), y_range=Range1d(-GALLERY_ROWS * 1.18, 0), tools="tap",
        toolbar_location=None, width=GALLERY_WIDTH, height=round(GALLERY_WIDTH / GALLERY_COLUMNS * GALLERY_ROWS * 1.18),
        min_border=0, outline_line_color=None, name="gallery",
    )  # fmt: skip
    plot.axis.visible = False
    plot.grid.visible = False
    plot.add_glyph(source, ImageURL(url="url", x="x", y="y", w=0.96, h=0.96, anchor="top_left"))
    plot.add_glyph(
        source, Text(text="label", x="x", y="under", text_font_size="11px", text_color="#555555", text_baseline="top")
    )
    return source, plot


def gallery_columns(urls: list[str], labels: list[str]) -> dict[str, Any]:
    """Return the gallery's columns: pictures as addresses, row by row, each with its label."""
    index = np.arange(len(urls))
    x, y = index % GALLERY_COLUMNS, -(index // GALLERY_COLUMNS) * 1.18
    return {"url": urls, "label": labels, "x": x + 0.02, "y": y - 0.01, "under": y - 0.98}


def highest(heatmap: Heatmap, present: NDArray[np.bool_]) -> Indices:
    """Return the tiles with the highest values among those that are present, (n,); highest first."""
    values = np.where(present, heatmap.values, -np.inf)
    count = min(GALLERY_SIZE, int(np.count_nonzero(present)))
    return np.asarray(np.argsort(-values, kind="stable")[:count], dtype=np.int64)


def make_gallery(store: TileStore, study: SlideStudy, heatmap: Heatmap, present: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the columns of the gallery: pictures of `highest`, each with its score."""
    boxes = study.grid.boxes_px0()
    urls, labels = [], []
    for tile in highest(heatmap, present).tolist():
        x0, y0, x1, y1 = boxes[tile].tolist()
        jpeg = store.cutout(study.listed.key, (x0, y0, x1, y1), GALLERY_PX)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}")
        labels.append(f"{heatmap.values[tile]:.3g}")
    return gallery_columns(urls, labels)


def place_in_gallery(x: float, y: float) -> int:
    """Return which picture lies at a point of the gallery."""
    return int(-y // 1.18) * GALLERY_COLUMNS + int(x)


def switch_tools(radio: RadioButtonGroup, tools: list[Any], brush: Slider) -> None:
    """Let the buttons choose which tool the mouse uses, in the browser; `brush` shows with the last."""
    code = """
tools.forEach((tool, i) => { tool.active = i == radio.active })
brush.visible = radio.active == tools.length - 1
"""
    callback = CustomJS(args={"radio": radio, "tools": tools, "brush": brush}, code=code)
    radio.js_property_callbacks = {"change:active": [callback]}


def spinner(words: str) -> str:
    """Return the text of a status that says what is being worked on."""
    return f"{SPIN}{escape(words)}"


def verdict_html(study: SlideStudy, sentence: str, verdict: Verdict, how: str) -> str:
    """Return the prediction of the whole slide, with a bar for each class, and whether the model has seen it."""
    bars = "".join(_bar(name, verdict.probability(name)) for name in verdict.log_odds)
    note = f'<div style="font-size:12px;color:#555">{study.n_tiles:,} tiles · {escape(how)}</div>'
    seen = "".join(f'<div style="{CAUTION}">{escape(text)}</div>' for text in study.asked.notes)
    return f"<b>{escape(study.listed.slide_id)}</b><br>{escape(sentence)}{bars}{note}{seen}"


def _bar(name: str, share: float) -> str:
    return (
        '<div style="display:flex;align-items:center;font-size:12px;margin-top:3px">'
        f'<span style="width:90px;overflow:hidden;text-overflow:ellipsis">{escape(name)}</span>'
        '<span style="flex:1;background:#eee;height:9px;border-radius:4px">'
        f'<span style="display:block;background:#2f6fb5;height:9px;border-radius:4px;width:{100 * share:.1f}%"></span>'
        f'</span><span style="width:48px;text-align:right">{share:.3f}</span></div>'
    )


def result_html(sentence: str, note: str = "") -> str:
    """Return the sentence on the last edit, with what random tiles do."""
    small = f'<div style="font-size:12px;color:#555">{escape(note)}</div>' if note else ""
    return f'<div style="border-left:3px solid #c2185b;padding-left:9px">{escape(sentence)}{small}</div>'


def history_html(sentences: list[str]) -> str:
    """Return the last edits, the newest first."""
    if len(sentences) < 2:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences[-2 : -MAX_HISTORY - 2 : -1])
    return f"<details><summary>Earlier steps</summary><ol reversed>{items}</ol></details>"

"""The controls beside the slide: what there is to press, without what it does."""

import base64
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CheckboxGroup,
    Column,
    ColumnDataSource,
    CustomJS,
    Div,
    ImageURL,
    RadioButtonGroup,
    Range1d,
    Select,
    Slider,
    Text,
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
GALLERY_SIZE = GALLERY_COLUMNS * GALLERY_ROWS
TOOLS = ("Move", "Lasso", "Box", "Brush")
ACTIONS = ("Remove", "Keep only", "Restore", "Copy")
SHOW_MAP, SHOW_TISSUE, SHOW_GREY = range(3)
SPIN = (
    "<style>@keyframes eosin-spin {to {transform: rotate(360deg)}}</style>"
    '<span class="eosin-spinner" style="display:inline-block;width:11px;height:11px;border:2px solid #bbb;'
    'border-top-color:#2f6fb5;border-radius:50%;animation:eosin-spin 0.8s linear infinite;margin-right:7px"></span>'
)
TEXT = {"font-size": "14px", "line-height": "1.4"}
SMALL = {"font-size": "12px", "color": "#555555", "line-height": "1.35"}
MAX_HISTORY = 12
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
    status: Div
    result: Div
    history: Div
    gallery: ColumnDataSource
    gallery_plot: figure
    gallery_title: Div
    layout: Column


def make_panel(slides: list[tuple[str, str]], refused: list[tuple[str, str]], classes: tuple[str, ...]) -> SidePanel:
    """Return the controls.

    Parameters
    ----------
    slides : list of (key, slide id)
    refused : list of (slide id, reason)
    classes : tuple of str
        Empty for tasks without.
    """
    gallery, gallery_plot = _make_gallery()
    parts: dict[str, Any] = {
        "verdict": Div(text="", name="verdict", styles={**TEXT, "font-size": "15px"}, width=WIDTH),
        "slide": Select(title="Slide", options=slides, value=slides[0][0], width=WIDTH, name="slide"),
        "family": Select(title="Map", options=[], width=230, name="family"),
        "class_name": Select(title="Class", options=list(classes), width=150, name="class", visible=bool(classes)),
        "scaling": Select(title="Scale", options=[], width=230, name="scaling"),
        "opacity": Slider(title="Opacity", start=0, end=1, step=0.05, value=OPACITY, width=150, name="opacity"),
        "shown": CheckboxGroup(
            labels=["map", "tissue outline", "slide in grey"], active=[SHOW_MAP, SHOW_TISSUE], inline=True, name="shown"
        ),
        "tool": RadioButtonGroup(labels=list(TOOLS), active=0, width=WIDTH, name="tool"),
        "action": RadioButtonGroup(labels=list(ACTIONS), active=0, width=WIDTH, name="action"),
        "brush": Slider(
            title="Brush width (tiles)", start=1, end=20, step=1, value=3, width=WIDTH, visible=False, name="brush"
        ),
        "undo": Button(label="Undo", width=80, disabled=True, name="undo"),
        "start_over": Button(label="Start over", width=100, disabled=True, name="start_over"),
        "transplant": Button(label="Add copied tiles", width=WIDTH, visible=False, name="transplant"),
        "save": Button(label="Save session", width=190, disabled=True, name="save"),
        "status": Div(text="", name="status", styles={**SMALL, "min-height": "20px"}, width=WIDTH),
        "result": Div(text="", name="result", styles=TEXT, width=WIDTH),
        "history": Div(text="", name="history", styles=SMALL, width=WIDTH),
        "gallery": gallery,
        "gallery_plot": gallery_plot,
        "gallery_title": Div(text="", name="gallery_title", styles=SMALL, width=WIDTH),
    }
    return SidePanel(**parts, layout=_arrange(parts, refused))


def _arrange(parts: dict[str, Any], refused: list[tuple[str, str]]) -> Column:
    p = parts
    head = Div(text=_heading("What if?"), width=WIDTH)
    help_ = Div(
        text="Draw on the slide. <i>Copy</i> keeps tiles for another slide.", styles=SMALL, width=WIDTH
    )  # fmt: skip
    note = Div(text=_refused_in_words(refused), styles=SMALL, width=WIDTH, visible=bool(refused), name="refused")
    return column(
        p["verdict"], p["slide"], note, row(p["family"], p["class_name"]), row(p["scaling"], p["opacity"]), p["shown"],
        head, help_, p["tool"], p["action"], p["brush"], row(p["undo"], p["start_over"], p["save"]),
        p["transplant"],
        p["status"], p["result"], p["history"], p["gallery_title"], p["gallery_plot"],
        width=WIDTH + 30, sizing_mode="stretch_height",
        styles={"overflow-y": "auto", "overflow-x": "hidden", "padding-left": "12px"}, name="panel",
    )  # fmt: skip


def _heading(words: str) -> str:
    return f'<div style="font-size:15px;font-weight:600;margin-top:8px">{words}</div>'


def _refused_in_words(refused: list[tuple[str, str]]) -> str:
    items = "".join(f"<li>{escape(slide_id)}: {escape(reason)}</li>" for slide_id, reason in refused)
    return f"<details><summary>{len(refused)} not shown</summary><ul>{items}</ul></details>"


def _make_gallery() -> tuple[ColumnDataSource, figure]:
    source = ColumnDataSource(gallery_columns([], []))
    plot = figure(
        x_range=Range1d(0, GALLERY_COLUMNS), y_range=Range1d(-GALLERY_ROWS * 1.18, 0), tools="tap",
        toolbar_location=None, width=WIDTH, height=round(WIDTH / GALLERY_COLUMNS * GALLERY_ROWS * 1.18),
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
    """Let the buttons choose which tool a drag of the mouse uses, in the browser; `brush` shows with the last."""
    code = """
tools.forEach((tool, i) => { if (i == radio.active) tool.active = true })
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

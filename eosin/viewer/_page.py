"""The live page: one per browser tab. What a reader does becomes an edit, an edit becomes a prediction in words."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from bokeh.document import Document
from bokeh.events import ButtonClick, DocumentReady, SelectionGeometry, Tap
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, CustomJS, Div
from numpy.typing import NDArray
from shapely import Geometry
from tornado.ioloop import IOLoop

from eosin.errors import EosinError
from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._annotations import Annotation, Annotations
from eosin.viewer._beside import Beside, Second, view_title
from eosin.viewer._catalogue import Catalogue, SlideStudy
from eosin.viewer._drawing import add_tools, last_stroke, outline_of
from eosin.viewer._lattice import Indices, area_in_outline, area_under_stroke, tiles_within
from eosin.viewer._layers import Choice, choose, default_scaling, scalings_of
from eosin.viewer._pane import Pane, connect_opacity, make_pane
from eosin.viewer._panel import (
    ANNOTATE,
    COPY,
    NARROW_PX,
    TEXT,
    SidePanel,
    highest,
    history_html,
    make_gallery,
    make_panel,
    place_in_gallery,
    result_html,
    spinner,
    verdict_html,
)
from eosin.viewer._saved import save_session
from eosin.viewer._session import (
    ACTIONS,
    MAX_UNDO,
    Edited,
    Verdict,
    controls,
    controls_in_words,
    counted,
    in_words,
    judge,
    state_in_words,
)
from eosin.viewer._tiles import TileStore

logger = logging.getLogger(__name__)

LOOK_TILES = 12
WHOLE = {"height": "100vh", "padding": "8px", "box-sizing": "border-box"}
UPON_EACH_OTHER = f"""
@media (max-width: {NARROW_PX}px) {{
    :host {{ flex-direction: column !important; height: auto !important; padding: 4px !important }}
}}
"""
VIEWS_STYLE = f"""
@media (max-width: {NARROW_PX}px) {{
    :host {{ flex-direction: column !important; height: auto !important; flex: none !important }}
}}
"""
VIEW_STYLE = f"@media (max-width: {NARROW_PX}px) {{ :host {{ height: 62vh !important; flex: none !important }} }}"
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, eq=False)
class Desk:
    """What all pages of one viewer share.

    Parameters
    ----------
    catalogue : Catalogue
    store : TileStore
    out : Path or None
        Folder of the sessions; None where nothing may be saved.
    pool : ThreadPoolExecutor
        One thread: a model is asked one thing at a time.
    second : Catalogue, optional
        Of a second model, which answers beside the first.
    """

    catalogue: Catalogue
    store: TileStore
    out: Path | None
    pool: ThreadPoolExecutor
    second: Catalogue | None = None

    @cached_property
    def annotations(self) -> Annotations:
        """The annotations that all pages share."""
        return Annotations(self.out)


@dataclass(frozen=True, eq=False)
class _Step:
    """An edit and what the model said to it."""

    edited: Edited
    after: Verdict


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A slide with everything that its first view needs."""

    study: SlideStudy
    choice: Choice
    heatmap: Heatmap
    before: Verdict


def told(method: Callable[..., None]) -> Callable[..., None]:
    """Make a callback tell its reader what went wrong, in a sentence, and the terminal the rest."""

    @functools.wraps(method)
    def safe(page: "Page", *arguments: Any) -> None:
        try:
            method(page, *arguments)
        except Exception as error:  # noqa: BLE001 - a browser must not see a traceback
            page.tell(_told(error))

    return safe


def _told(error: Exception) -> str:
    if isinstance(error, EosinError):
        return error.message
    logger.error("the viewer could not do %s: %s", type(error).__name__, error, exc_info=error)
    return "This did not work; the terminal shows the reason."


class Page:
    """The page of one browser tab.

    Parameters
    ----------
    desk : Desk
    document : Document
    template : str
        Address of the tiles, see `eosin.viewer._server.start_viewer`.
    """

    def __init__(self, desk: Desk, document: Document, template: str) -> None:
        self.desk, self.document, self.template = desk, document, template
        catalogue, second = desk.catalogue, desk.second
        slides = [(one.key, one.slide_id) for one in catalogue.shown]
        self.first_name, name = ("", "") if second is None else _names(catalogue, second)
        self.beside = Beside(second or catalogue, slides, name)
        self.panel: SidePanel = make_panel(
            slides,
            [(one.slide_id, one.refusal) for one in catalogue.refused],
            catalogue.classes,
            self.beside.controls,
        )
        self.holder = column(Div(text=""), sizing_mode="stretch_both", name="canvas", styles={"position": "relative"})
        self.title = Div(text="", styles=TEXT, sizing_mode="stretch_width", visible=False)
        self.steps: dict[str, list[_Step]] = {}
        self.befores: dict[str, Verdict] = {}
        self.copied: tuple[SlideStudy, Indices] | None = None
        self.pane: Pane | None = None
        self.study: SlideStudy | None = None
        self.drawn: dict[str, list[str]] = {}
        self.choice = Choice("")
        self._is_filling = self._is_working = False
        self._has_chosen_class = False
        self._connect()
        if desk.out is None:
            self.panel.save.label = "Saving needs --out"
        document.title = "eosin view"
        views = row(self.holder, self.beside.layout, sizing_mode="stretch_both", stylesheets=[VIEWS_STYLE])
        self.holder.stylesheets = self.beside.layout.stylesheets = [VIEW_STYLE]
        whole = row(views, self.panel.layout, sizing_mode="stretch_both", styles=WHOLE, stylesheets=[UPON_EACH_OTHER])
        document.add_root(whole)
        document.js_on_event(DocumentReady, self._keys())
        self.open(catalogue.shown[0].key)

    def _keys(self) -> CustomJS:
        panel = self.panel
        code = (Path(__file__).parent / "keys.js").read_text(encoding="utf-8")
        parts = {"slide": panel.slide, "shown": panel.shown, "tool": panel.tool, "undo": panel.undo, "help": panel.help}
        return CustomJS(args={"holder": self.holder, **parts}, code=code)

    def _connect(self) -> None:
        panel = self.panel
        self.beside.select.on_change("value", lambda _attribute, _old, _new: self.look_beside())
        self.beside.family.on_change("value", lambda _attribute, _old, _new: self.look_beside())
        panel.action.on_change("active", lambda _attribute, _old, _new: self._enable())
        panel.notes.on_change("value", lambda _attribute, _old, new: self.look_at_annotation(new))
        panel.slide.on_change("value", lambda _attribute, _old, new: self.open(new))
        panel.family.on_change("value", lambda _attribute, _old, _new: self.choose_map())
        panel.class_name.on_change("value", lambda _attribute, _old, _new: self.choose_class())
        panel.scaling.on_change("value", lambda _attribute, _old, _new: self.rescale())
        panel.shown.on_change("active", lambda _attribute, _old, _new: self.show_parts())
        for button, act in (
            (panel.undo, self.undo),
            (panel.start_over, self.start_over),
            (panel.transplant, self.transplant),
            (panel.save, self.save),
            (panel.drop, self.drop),
        ):
            button.on_event(ButtonClick, partial(_press, act))
        panel.gallery_plot.on_event(Tap, self.jump)

    @property
    def class_name(self) -> str:
        """The class that the reader asks about; empty for tasks without."""
        return str(self.panel.class_name.value) if self.desk.catalogue.classes else ""

    @property
    def edited(self) -> Edited:
        """The slide as it is edited now."""
        steps = self._shown_steps()
        return steps[-1].edited if steps else Edited.untouched(self._shown_study())

    def _shown_steps(self) -> list[_Step]:
        return self.steps.setdefault(self._shown_study().listed.key, [])

    def _shown_study(self) -> SlideStudy:
        if self.study is None:
            raise LookupError("no slide is shown yet")
        return self.study

    def tell(self, words: str) -> None:
        """Show a line to the reader."""
        self.panel.status.text = escape(words)

    def later(self, words: str, work: Callable[[], ResultT], then: Callable[[ResultT], None]) -> None:
        """Show a spinner, do `work` away from the page's loop, then `then` on it; no words, no spinner."""
        if words:
            self.panel.status.text = spinner(words)
            self._is_working = True
        loop = IOLoop.current()

        def hand_over(done: Future[ResultT]) -> None:
            with contextlib.suppress(RuntimeError):  # the server may have stopped meanwhile
                loop.add_callback(self._take_over, words, then, done)

        self.desk.pool.submit(work).add_done_callback(hand_over)

    def _take_over(self, words: str, then: Callable[[ResultT], None], done: Future[ResultT]) -> None:
        with contextlib.suppress(RuntimeError):  # the tab may be closed meanwhile
            self.document.add_next_tick_callback(partial(self._finish, words, then, done))

    def _finish(self, words: str, then: Callable[[ResultT], None], done: Future[ResultT]) -> None:
        if words:
            self._is_working = False
            self.tell("")
        try:
            then(done.result())
        except Exception as error:  # noqa: BLE001 - a browser must not see a traceback
            self.tell(_told(error))

    @told
    def open(self, key: str) -> None:
        """Show a slide of the list."""
        listed = self.desk.catalogue.by_key(key)
        self.later(f"Loading {listed.slide_id} and running the model ...", lambda: self._prepare(key), self._show)

    def _prepare(self, key: str) -> _Prepared:
        study = self.desk.catalogue.study(key)
        before = judge(study.asked, study.seen.subsets.logits())
        name = self.class_name if self._has_chosen_class else before.leading
        families = study.layers.families()
        choice = choose(study.layers, self.choice.family if self.choice.family in families else families[0], name)
        _ = study.tissue  # found here, away from the page's loop
        return _Prepared(study, choice, study.layers.get(choice), before)

    def _show(self, prepared: _Prepared) -> None:
        study = prepared.study
        key, panel = study.listed.key, self.panel
        self.study, self.choice = study, prepared.choice
        self.befores[key] = prepared.before
        self._fill_choices(prepared)
        shown = self._shown_map(prepared.heatmap)
        opacity = float(panel.opacity.value)
        self.pane = make_pane(study, shown, prepared.heatmap, partial(self._address, key), opacity=opacity)
        add_tools(self.pane.canvas, self.panel, self.draw, self.paint)
        self.holder.children = [*self.pane.parts, self.title]
        self.document.title = f"eosin · {study.listed.slide_id}"
        self.show_parts()
        self._refresh(self.edited)
        self._tell_result()
        self._read_annotations()
        self.look_beside()

    def _fill_choices(self, prepared: _Prepared) -> None:
        panel, layers = self.panel, prepared.study.layers
        self._is_filling = True
        panel.family.options = list(layers.families())
        panel.family.value = prepared.choice.family
        if not self._has_chosen_class and prepared.before.leading:
            panel.class_name.value = prepared.before.leading
        panel.scaling.options = list(scalings_of(prepared.heatmap))
        if panel.scaling.value not in panel.scaling.options:
            panel.scaling.value = default_scaling(prepared.heatmap)
        self._is_filling = False

    def _shown_map(self, heatmap: Heatmap) -> Heatmap:
        return self._shown_study().layers.get(self.choice, str(self.panel.scaling.value))

    def _address(self, key: str, look: str) -> str:
        return self.template.replace("{key}", key).replace("{look}", look)

    @told
    def look_beside(self) -> None:
        """Show a second slide, or the same slide by a second model."""
        beside, names = self.beside, {one.key: one.slide_id for one in self.desk.catalogue.shown}
        if beside.is_filling or self.study is None:
            return
        key = beside.wanted(self.study.listed.slide_id, names)
        if not key:
            beside.hide()
            self.title.visible = False
            self.show_parts()
            return
        choice, name = self.choice, self.class_name
        self.later("Loading the second view ...", lambda: beside.prepare(key, choice, name), self._show_beside)

    def _show_beside(self, second: Second) -> None:
        if self.pane is None:
            return
        slide_id = second.study.listed.slide_id
        key = next(one.key for one in self.desk.catalogue.shown if one.slide_id == slide_id)
        scaling = str(self.panel.scaling.value) if second.choice.family == self.choice.family else ""
        address, opacity = partial(self._address, key), float(self.panel.opacity.value)
        self.beside.show(second, self.pane, scaling=scaling, address=address, opacity=opacity)
        before = self.befores[self._shown_study().listed.key]
        self.title.text = view_title(self._shown_study().listed.slide_id, self.first_name, state_in_words(before))
        self.title.visible = True
        self.show_parts()
        self._read_annotations()

    @told
    def draw(self, event: SelectionGeometry) -> None:
        """Act on the tiles inside a lasso or a box."""
        if event.final:
            self._use(area_in_outline(self._shown_study().grid, self._to_px0(outline_of(event.geometry))))

    @told
    def paint(self, strokes: ColumnDataSource, data: dict[str, Any]) -> None:
        """Act on the tiles under a brush stroke."""
        if not len(data.get("xs", ())):
            return
        stroke = last_stroke(data)
        strokes.data = {"xs": [], "ys": []}
        width = float(self.panel.brush.value)
        self._use(area_under_stroke(self._shown_study().grid, self._to_px0(stroke), width_tiles=width))

    def _to_px0(self, points_um: NDArray[np.float64]) -> NDArray[np.float64]:
        return points_um * (1, -1) / self._shown_study().grid.slide_mpp

    def _use(self, area: Geometry) -> None:
        """Do what the reader chose with an area that was drawn."""
        started = time.perf_counter()
        if self.panel.action.active == ANNOTATE:
            self._annotate(area)
        else:
            self._act(tiles_within(self._shown_study().grid, area), started)

    def _annotate(self, area: Geometry) -> None:
        study, name = self._shown_study(), str(self.panel.name.value_input or self.panel.name.value)
        self.later(
            "Saving the annotation ...",
            lambda: self.desk.annotations.add(study, name, area),
            partial(self._annotated, study.listed.key),
        )

    def _annotated(self, key: str, one: str) -> None:
        self.drawn[key] = [*self.drawn.get(key, []), one][-MAX_UNDO:]
        self._read_annotations(tell=True)

    def _read_annotations(self, *, tell: bool = False) -> None:
        """Show what the slides' files hold now."""
        panes = [pane for pane in (self.pane, self.beside.pane) if pane is not None]

        def show(found: list[list[Annotation]]) -> None:
            for pane, annotations in zip(panes, found, strict=True):
                pane.show_annotations(annotations)
            self._list_annotations(found[0])
            if tell:
                self.tell(self._saved_where())

        self.later("", lambda: [self.desk.annotations.of(pane.study) for pane in panes], show)

    def _list_annotations(self, found: list[Annotation]) -> None:
        mpp = self._shown_study().grid.slide_mpp
        self._is_filling = True
        self.panel.notes.options = [("", f"{len(found)} drawn"), *((one.id, one.in_words(mpp)) for one in found)]
        if self.panel.notes.value not in [one.id for one in found]:
            self.panel.notes.value = ""
        self._is_filling = False
        self._enable()

    def _saved_where(self) -> str:
        path = self.desk.annotations.path(self._shown_study().listed.slide_id)
        if path is None:
            return "Kept until the viewer ends; start it with --out FOLDER to save annotations."
        return f"Saved in {path.parent.name}/{path.name} of the folder --out; QuPath opens it."

    @told
    def look_at_annotation(self, key: str) -> None:
        """Go to an annotation of the list."""
        if self._is_filling or self.pane is None or not key:
            self._enable()
            return
        study, canvas = self._shown_study(), self.pane.canvas

        def go(found: list[Annotation]) -> None:
            for one in found:
                if one.id == key:
                    x0, y0, x1, y1 = (side * study.grid.slide_mpp for side in one.area.bounds)
                    canvas.look_at(((x0 + x1) / 2, (y0 + y1) / 2), 2 * max(x1 - x0, y1 - y0))
            self._enable()

        self.later("", lambda: self.desk.annotations.of(study), go)

    @told
    def drop(self) -> None:
        """Delete the annotation that is chosen in the list."""
        self._drop(str(self.panel.notes.value))

    def _drop(self, one: str) -> None:
        study = self._shown_study()
        self.drawn[study.listed.key] = [key for key in self.drawn.get(study.listed.key, []) if key != one]
        self.later(
            "Deleting the annotation ...",
            lambda: self.desk.annotations.remove(study, one),
            lambda _nothing: self._read_annotations(tell=True),
        )

    def _act(self, tiles: Indices, started: float) -> None:
        if not len(tiles):
            self.tell("The drawing contains no tile centre.")
        elif self.panel.action.active == COPY:
            self._copy(tiles)
        else:
            self._do(self.edited.act(ACTIONS[int(self.panel.action.active or 0)], tiles), started)

    def _copy(self, tiles: Indices) -> None:
        study = self._shown_study()
        self.copied = study, tiles
        self._enable()
        self.tell(f"Copied {counted(len(tiles))}; open another slide of the list and add them there.")

    def _do(self, edited: Edited, started: float) -> None:
        """Ask the model about an edit: at once where it answers from sums, else with a spinner."""
        if self._is_working:
            self.tell("Please wait: the last action is not finished.")
            return
        if edited.study.is_instant:
            self._done(edited, judge(edited.study.asked, edited.logits()), started)
            return
        self.later(
            "The model runs again on the remaining tiles ...",
            lambda: judge(edited.study.asked, edited.logits()),
            lambda verdict: self._done(edited, verdict, started),
        )

    def _done(self, edited: Edited, after: Verdict, started: float) -> None:
        key, step = edited.study.listed.key, _Step(edited, after)
        self.steps[key] = [*self.steps.get(key, []), step][-MAX_UNDO:]
        if self._shown_study().listed.key == key:
            self._refresh(edited)
            self._tell_result()
        self.tell(f"Computed in {1000 * (time.perf_counter() - started):.0f} ms.")
        self._compare_with_chance()

    def _compare_with_chance(self) -> None:
        """Add to the last answer what as many random tiles do, where that takes no time to speak of."""
        steps, name = self._shown_steps(), self.class_name
        if not (steps and name and steps[-1].edited.is_touched and steps[-1].edited.study.is_instant):
            return
        step, output = steps[-1], self.desk.catalogue.classes.index(name)
        before = self.befores[step.edited.study.listed.key].log_odds[name]

        def show(values: NDArray[np.float64]) -> None:
            now = self._shown_steps()
            if now and now[-1] is step and self.class_name == name:
                note = controls_in_words(before, step.after.log_odds[name], values)
                self.panel.result.text = result_html(self._sentences()[-1], note)

        self.later("", lambda: controls(step.edited, output), show)

    def _sentences(self) -> list[str]:
        """Return what each step did, for the class that is asked about."""
        before, name = self.befores[self._shown_study().listed.key], self.class_name
        return [in_words(self.desk.catalogue, step.edited, before, step.after, name) for step in self._shown_steps()]

    def _refresh(self, edited: Edited) -> None:
        """Show what is removed and which tiles stand highest among the others."""
        if self.pane is not None:
            self.pane.canvas.show_removed(edited.present)
        self._enable()
        study, choice = edited.study, self.choice
        self.later(
            "",
            lambda: make_gallery(self.desk.store, study, study.layers.get(choice), edited.present),
            self._show_gallery,
        )

    def _enable(self) -> None:
        panel, edited = self.panel, self.edited
        panel.start_over.disabled = not self._shown_steps()
        panel.undo.disabled = not (self._own_drawings() if panel.action.active == ANNOTATE else self._shown_steps())
        panel.drop.disabled = not panel.notes.value
        panel.save.disabled = not (edited.is_touched and self.desk.out is not None)
        source, tiles = self.copied or (None, ())
        panel.transplant.visible = source is not None and source.listed.key != edited.study.listed.key
        if source is not None:
            panel.transplant.label = f"Add {counted(len(tiles))} of {source.listed.slide_id}"

    def _tell_result(self) -> None:
        study = self._shown_study()
        before, sentences = self.befores[study.listed.key], self._sentences()
        how = "is computed exactly, without running again" if study.is_instant else "runs again for every change"
        sentence = state_in_words(before)
        name = study.asked.card.recipe.aggregator.name
        self.panel.verdict.text = verdict_html(study, sentence, before, f"{name} {how}")
        self.panel.result.text = result_html(sentences[-1]) if sentences else ""
        self.panel.history.text = history_html(sentences)

    def _own_drawings(self) -> list[str]:
        """Return the annotations of the slide that were drawn on this page."""
        return self.drawn.get(self._shown_study().listed.key, [])

    @told
    def undo(self) -> None:
        """Take the last edit back, or while annotating the last annotation."""
        if self.panel.action.active != ANNOTATE:
            self._go_back_to(self._shown_steps()[:-1])
        elif self._own_drawings():
            self._drop(self._own_drawings()[-1])

    @told
    def start_over(self) -> None:
        """Take all edits of the slide back."""
        self._go_back_to([])

    def _go_back_to(self, steps: list[_Step]) -> None:
        self.steps[self._shown_study().listed.key] = steps
        self._refresh(self.edited)
        self._tell_result()
        self._compare_with_chance()

    @told
    def transplant(self) -> None:
        """Add the copied tiles to this slide."""
        started = time.perf_counter()
        if self.copied is not None:
            self._do(self.edited.transplant(*self.copied), started)

    @told
    def save(self) -> None:
        """Write the slide's edits into the session folder."""
        out, edited, name = self.desk.out, self.edited, self.class_name
        if out is None:
            self.tell("Nothing is saved without --out.")
            return
        self.later(
            "Saving ...",
            lambda: save_session(self.desk.catalogue, edited, name, out),
            lambda paths: self.tell(f"Saved {', '.join(path.name for path in paths)} in {out}."),
        )

    @told
    def choose_map(self) -> None:
        """Show another family of maps."""
        if not self._is_filling:
            self._change_map(str(self.panel.family.value), self.class_name)

    @told
    def choose_class(self) -> None:
        """Ask about another class."""
        if self._is_filling:
            return
        self._has_chosen_class = True
        self._change_map(self.choice.family, self.class_name)
        self._tell_result()
        self._compare_with_chance()

    def _change_map(self, family: str, name: str) -> None:
        study = self._shown_study()
        choice = choose(study.layers, family, name)
        words = "" if study.layers.is_made(choice) else f"Computing {family} ..."
        self.later(words, lambda: study.layers.get(choice), lambda heatmap: self._put_map(choice, heatmap))

    def _put_map(self, choice: Choice, heatmap: Heatmap) -> None:
        is_other = choice.family != self.choice.family
        self.choice = choice
        self._is_filling = True
        self.panel.scaling.options = list(scalings_of(heatmap))
        if is_other:
            self.panel.scaling.value = default_scaling(heatmap)
        self._is_filling = False
        self._paint_map(heatmap)

    def _paint_map(self, heatmap: Heatmap) -> None:
        if self.pane is not None:
            self.pane.canvas.show_map(self._shown_map(heatmap), heatmap)
        self._refresh(self.edited)
        self.look_beside()

    @told
    def rescale(self) -> None:
        """Show the same map on another scale."""
        if not self._is_filling:
            self._paint_map(self._shown_study().layers.get(self.choice))

    @told
    def show_parts(self) -> None:
        """Show or hide map, outline and annotations, and take the colours out of the slides."""
        panes = [pane for pane in (self.pane, self.beside.pane) if pane is not None]
        for pane in panes:
            pane.show_parts(self.panel.shown.active)
        connect_opacity(self.panel.opacity, panes)

    @told
    def jump(self, event: Tap) -> None:
        """Look at the tile of the gallery that was pressed."""
        ranked = highest(self._shown_study().layers.get(self.choice), self.edited.present)
        place = place_in_gallery(float(event.x), float(event.y))
        if self.pane is not None and 0 <= place < len(ranked):
            grid = self._shown_study().grid
            x, y = (grid.origins_px0[ranked[place]] + grid.tile_px0 / 2) * grid.slide_mpp
            self.pane.canvas.look_at((float(x), float(y)), LOOK_TILES * grid.tile_px0 * grid.slide_mpp)

    def _show_gallery(self, columns: dict[str, Any]) -> None:
        self.panel.gallery.data = columns
        count = len(columns["url"])
        words = f"The {count} tiles with the highest scores in this map. Click a tile to go to its position."
        self.panel.gallery_title.text = words if count else ""


def _names(first: Catalogue, second: Catalogue) -> tuple[str, str]:
    """Return what two models are called: their methods, with their ids where these are equal."""
    a, b = (one.card.recipe.aggregator.name for one in (first, second))
    return (a, b) if a != b else (f"{a} {first.card.model_id[:6]}", f"{b} {second.card.model_id[:6]}")


def _press(act: Callable[[], None], _event: ButtonClick) -> None:
    act()

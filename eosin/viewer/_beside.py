"""A second slide, or a second model, beside the first: only to look at."""

from dataclasses import dataclass
from html import escape

from bokeh.layouts import column, row
from bokeh.models import CheckboxGroup, CustomJS, Div, LayoutDOM, Select

from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._catalogue import Catalogue, SlideStudy
from eosin.viewer._layers import Choice, choose, default_scaling
from eosin.viewer._pane import Address, Pane, make_pane
from eosin.viewer._panel import TEXT
from eosin.viewer._session import judge, state_in_words

NOTHING, SAME = "", "same"
LINKED = 0
# both have the same µm per pixel, whatever their sizes; `tags` is the way from the middle of the first to the second
FOLLOW = """
if (!together.active.includes(0) || window.eosinFollows || !to.inner_width || !from.inner_width) return
window.eosinFollows = true
const mpp = (from.x_range.end - from.x_range.start) / from.inner_width
const [dx, dy] = together.tags.map((by) => sign * by)
const put = (range, middle, half) => range.setv({start: middle - half, end: middle + half})
put(to.x_range, (from.x_range.start + from.x_range.end) / 2 + dx, mpp * to.inner_width / 2)
put(to.y_range, (from.y_range.start + from.y_range.end) / 2 + dy, mpp * to.inner_height / 2)
window.eosinFollows = false
"""
MEET = """
if (!together.active.includes(0)) return
const middle = (range) => (range.start + range.end) / 2
together.tags = same ? [0, 0] : [middle(second.x_range) - middle(first.x_range),
                                 middle(second.y_range) - middle(first.y_range)]
first.x_range.properties.end.change.emit()
"""


@dataclass(frozen=True, eq=False)
class Second:
    """What the second pane is about to show.

    Parameters
    ----------
    study : SlideStudy
    choice : Choice
    heatmap : Heatmap
    words : str
        What the model says of the slide.
    """

    study: SlideStudy
    choice: Choice
    heatmap: Heatmap
    words: str


def view_title(slide_id: str, model: str, words: str) -> str:
    """Return what stands below one of two views."""
    by = f" by {escape(model)}" if model else ""
    return f"<b>{escape(slide_id)}</b>{by}: {escape(words)}"


class Beside:
    """The controls of the second pane, and what it shows.

    Parameters
    ----------
    catalogue : Catalogue
        Of the second model, or of the only one.
    slides : list of (key, slide id)
        Those of the first pane.
    name : str
        Of the second model; empty where there is only one.
    """

    def __init__(self, catalogue: Catalogue, slides: list[tuple[str, str]], name: str) -> None:
        self.catalogue, self.name = catalogue, name
        self._keys = {one.slide_id: one.key for one in catalogue.shown}
        options = [(key, slide_id) for key, slide_id in slides if slide_id in self._keys]
        title = f"Beside it, by {name}" if name else "Beside it"
        start = SAME if name else NOTHING
        self.select = Select(
            title=title, options=[(NOTHING, "nothing"), (SAME, "the same slide"), *options], value=start,
            sizing_mode="stretch_width", name="beside",
        )  # fmt: skip
        self.family = Select(title="Map of the second view", options=[], sizing_mode="stretch_width", name="second_map")
        self.family.visible = False
        self.together = CheckboxGroup(labels=["move both together"], active=[LINKED], visible=False, name="together")
        self.words = Div(text="", styles=TEXT, sizing_mode="stretch_width", name="second_words")
        self.holder = column(sizing_mode="stretch_both", name="second", styles={"position": "relative"})
        self.layout = column(self.holder, self.words, sizing_mode="stretch_both", visible=False)
        self.pane: Pane | None = None
        self.is_filling = False

    @property
    def controls(self) -> list[LayoutDOM]:
        """What belongs into the panel."""
        return [self.select, row(self.family, self.together, sizing_mode="stretch_width")]

    def wanted(self, shown_id: str, names: dict[str, str]) -> str:
        """Return the key of the slide to show, in the second catalogue; empty for none.

        Parameters
        ----------
        shown_id : str
            The slide of the first pane.
        names : dict of str to str
            Slide ids of the first pane by their keys.
        """
        value = str(self.select.value)
        slide_id = shown_id if value == SAME else names.get(value, "")
        return self._keys.get(slide_id, "")

    def prepare(self, key: str, first: Choice, class_name: str) -> Second:
        """Return what there is to show; runs the model where the slide is new to it."""
        study = self.catalogue.study(key)
        families = study.layers.families()
        wanted = [family for family in (str(self.family.value), first.family, families[0]) if family in families]
        choice = choose(study.layers, wanted[0], class_name)
        verdict = judge(study.asked, study.seen.subsets.logits())
        _ = study.tissue  # found here, away from the page's loop
        return Second(study, choice, study.layers.get(choice), state_in_words(verdict))

    def hide(self) -> None:
        """Show nothing beside the first pane."""
        self.pane, self.holder.children = None, []
        self.layout.visible = self.together.visible = self.family.visible = False

    def show(self, second: Second, first: Pane, *, scaling: str, address: Address, opacity: float) -> None:
        """Show a slide beside the first; an empty `scaling` chooses the usual one of the map."""
        layers = second.study.layers
        shown = layers.get(second.choice, scaling or default_scaling(second.heatmap))
        self.pane = make_pane(second.study, shown, second.heatmap, address, opacity=opacity)
        self.is_filling = True
        self.family.options = list(layers.families())
        self.family.value = second.choice.family
        self.is_filling = False
        self.words.text = view_title(second.study.listed.slide_id, self.name, second.words)
        ends = [(one.canvas.mapper.low, one.canvas.mapper.high) for one in (first, self.pane)]
        if ends[0] == ends[1]:  # one legend is enough, and leaves room for the slides
            self.pane.canvas.plot.right = []
        self._link(first, is_same=second.study.listed.slide_id == first.study.listed.slide_id)
        self.holder.children = self.pane.parts
        self.layout.visible = self.together.visible = self.family.visible = True

    def _link(self, first: Pane, *, is_same: bool) -> None:
        """Let both views move together: one slide at one place, two slides by the same way."""
        assert self.pane is not None  # set by `show`
        a, b, together = first.canvas.plot, self.pane.canvas.plot, self.together
        together.active, together.tags = ([LINKED] if is_same else []), [0, 0]
        for one, other, sign in ((a, b, 1), (b, a, -1)):
            args = {"from": one, "to": other, "sign": sign, "together": together}
            follow = CustomJS(args=args, code=FOLLOW)
            for side in (one.x_range, one.y_range):
                side.js_on_change("start", follow)
                side.js_on_change("end", follow)
            if one is b:
                continue
            b.js_on_change("inner_width", follow)  # once it is laid out, and when its size changes
            b.js_on_change("inner_height", follow)
        meet = CustomJS(args={"first": a, "second": b, "together": together, "same": is_same}, code=MEET)
        together.js_property_callbacks = {"change:active": [meet]}

"""The report: one HTML file that opens offline and shows how well a model did and what it looked at.

The report depends on neither models nor slides. It takes the frozen results below, whoever made them: the demo with
one held-out test set, cross-validation with its folds.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry.base import BaseGeometry

from eosin import __version__
from eosin._files import write_text
from eosin.heatmaps._colour import ColourScale, scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._png import OPACITY, TRUTH_COLOUR, Contour, blend, draw, take_view
from eosin.mil._flow import Flow
from eosin.report._card import CardPart
from eosin.report._figures import Panel
from eosin.report._flow import flow_svg
from eosin.wsi._slide import Slide
from eosin.wsi._tissue import TissueMask

JPEG_QUALITY = 88


@dataclass(frozen=True)
class Metric:
    """One figure of merit with its uncertainty.

    Parameters
    ----------
    name : str
        In words, for example "Area under the ROC curve".
    value : float or None
        None where the data do not define it; shown as "undefined".
    low, high : float or None
        Ends of the confidence interval; None when it is not known.
    note : str
        How the interval was made and over what, for example "95 % bootstrap over 12 patients".
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts of true and predicted classes.

    Parameters
    ----------
    name : str
        Of the target; may be empty.
    classes : sequence of str
    counts : (classes, classes) int
        Rows are the truth, columns the prediction.
    """

    name: str
    classes: Sequence[str]
    counts: NDArray[np.int64]

    def rows(self) -> list[tuple[str, list[tuple[int, float]]]]:
        """Return, per true class, its name and for each predicted class the count and its share of the row."""
        totals = np.maximum(self.counts.sum(1, keepdims=True), 1)
        shares = self.counts / totals
        return [
            (name, list(zip(counts.tolist(), parts.tolist(), strict=True)))
            for name, counts, parts in zip(self.classes, self.counts, shares, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a slide card.

    Parameters
    ----------
    image : (h, w, 3) uint8
    caption : str
    scale : ColourScale or None
        Drawn as a colour bar in words under the image.
    """

    image: NDArray[np.uint8]
    caption: str
    scale: ColourScale | None = None

    @property
    def uri(self) -> str:
        """The picture as a ``data:`` address."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, "jpeg", quality=JPEG_QUALITY, subsampling=0, optimize=True)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, eq=False)
class SlideCard:
    """One slide of the report.

    Parameters
    ----------
    slide_id : str
    facts : mapping of str to str
        Short lines shown beside the pictures, in order: patient, truth, prediction, probability, tiles ...
    pictures : tuple of Picture
        Shown side by side; `slide_pictures` makes thumbnail, heat map and true outline.
    sentences : tuple of str
        What the model says about the slide, in plain words; shown as one paragraph.
    correct : bool or None
        Whether the prediction agrees with the truth; None when there is no truth.
    links : tuple of Link
        Files about the slide, from the folder of the page.
    command : str
        Shows the slide in the viewer.
    """

    slide_id: str
    facts: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    sentences: tuple[str, ...] = ()
    correct: bool | None = None
    links: "tuple[Link, ...]" = ()
    command: str = ""


@dataclass(frozen=True)
class Link:
    """Another page that belongs to this one.

    Parameters
    ----------
    name : str
    path : str
        Of the page, from the folder of this one.
    note : str
        What it shows.
    """

    name: str
    path: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything that `write_report` shows; an empty field leaves its section out.

    Parameters
    ----------
    title : str
    summary : str
        One paragraph: what was asked, on what data, what came out.
    metrics : tuple of Metric
    metrics_note : str
        Over what the metrics are, and how their intervals were made, when that is the same for all.
    panels : tuple of Panel
        Figures, see `eosin.report._figures`.
    confusions : tuple of Confusion
    slides : tuple of SlideCard
    slides_heading : str
    predictions : DataFrame or None
        One row per slide, columns as they should be printed.
    tables : mapping of str to DataFrame
        Further tables under their headings, for example one row per fold.
    notes : tuple of str
        Limits that a reader must know.
    provenance : mapping of str to str
        Versions, options, seeds, fingerprints.
    flow : Flow, optional
        From the slides that were given to those that were used; drawn as a diagram.
    links : tuple of Link
        Earlier studies of the same slides.
    card : tuple of CardPart
        The model card, see `eosin.report._card`.
    """

    title: str
    summary: str = ""
    metrics: tuple[Metric, ...] = ()
    slides: tuple[SlideCard, ...] = ()
    predictions: pd.DataFrame | None = None
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    metrics_note: str = ""
    panels: tuple[Panel, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    slides_heading: str = "Slides"
    flow: Flow | None = None
    links: tuple[Link, ...] = ()
    card: tuple[CardPart, ...] = ()


@dataclass(frozen=True)
class _Grid:
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "_Grid":
        numeric = [bool(pd.api.types.is_numeric_dtype(kind)) for kind in frame.dtypes]
        rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
        return cls([str(column) for column in frame.columns], rows, numeric)


def slide_pictures(
    slide: Slide,
    heatmap: Heatmap,
    *,
    tissue: TissueMask | None = None,
    truth: BaseGeometry | None = None,
    longest_px: int = 720,
) -> tuple[Picture, ...]:
    """Return the pictures of a slide card: thumbnail, heat map and, when it is known, the true outline.

    Parameters
    ----------
    slide : Slide
    heatmap : Heatmap
        Usually the percentile map of the attention.
    tissue : TissueMask, optional
        The map is blank outside of it.
    truth : geometry, optional
        Polygons of the annotated region in level-0 pixels; drawn on the slide and on the map. An empty geometry means
        that the slide is known to hold none.
    longest_px : int
        Longest side of each picture.
    """
    view = take_view(slide, longest_px=longest_px)
    scale = scale_of(heatmap)
    contours = [] if truth is None else [Contour(truth, TRUTH_COLOUR, "truth")]
    overlay = draw(view, blend(view, heatmap, scale, tissue=tissue), contours=contours)
    pictures = [Picture(draw(view, view.image), "Slide"), Picture(overlay, heatmap.caption, scale)]
    if truth is not None:
        outline = draw(view, view.image, contours=contours)
        pictures.append(Picture(outline, "True outline" if not truth.is_empty else "True outline: none on this slide"))
    return tuple(pictures)


def write_report(path: Path, data: ReportData) -> None:
    """Write a report as one HTML file that needs no network and no other file.

    Its own script sorts tables and enlarges pictures; the page states the hash, so that no other script can run.

    Parameters
    ----------
    path : Path
        Of the HTML file.
    data : ReportData
        Every text in it is escaped.
    """
    text = _template().render(
        data=data,
        version=__version__,
        sections=_sections(data),
        tables=[(heading, _Grid.of(frame)) for heading, frame in data.tables.items()],
        predictions=None if data.predictions is None else _Grid.of(data.predictions),
        flow=None if data.flow is None else flow_svg(data.flow),
        number=_cell,
        interval=_interval,
        hows=_hows(data.metrics),
        script=_script(),
        script_hash=_hash(_script()),
        opacity=OPACITY,
        small=all(len(card.pictures) <= 1 and not card.sentences for card in data.slides),
    )
    write_text(path, text)


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html.jinja")


@cache
def _script() -> str:
    return (Path(__file__).parent / "page.js").read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Return a script's hash as a Content-Security-Policy states it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _hows(metrics: Sequence[Metric]) -> list[tuple[str, list[str]]]:
    """Return each way in which metrics were made, with their names; without names that of most, which comes first."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        if metric.note:
            found.setdefault(metric.note, []).append(metric.name)
    ordered = sorted(found.items(), key=lambda how: -len(how[1]))
    return [(note, names if number else []) for number, (note, names) in enumerate(ordered)]


def _sections(data: ReportData) -> list[tuple[str, str]]:
    sections = [("performance", "Performance")] if data.metrics else []
    sections += [("figures", "Figures")] if data.panels or data.confusions else []
    sections += [("cohort", "Cohort")] if data.flow is not None else []
    sections += [(f"table-{index}", heading) for index, heading in enumerate(data.tables, start=1)]
    sections += [("slides", data.slides_heading)] if data.slides else []
    sections += [("predictions", "Predictions")] if data.predictions is not None else []
    sections += [("earlier", "Earlier studies")] if data.links else []
    sections += [("card", "Model card")] if data.card else []
    return sections + ([("provenance", "Provenance")] if data.provenance else [])


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return "–" if np.isnan(value) else f"{value:.3f}"
    if isinstance(value, list | tuple):
        return " to ".join(_cell(part) for part in value)
    return "undefined" if value is None else str(value)


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return "–"
    return f"{metric.low:.3f} to {metric.high:.3f}"

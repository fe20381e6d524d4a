"""What a pipeline leaves behind, and the report that puts it together for a person."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from shapely.geometry.base import BaseGeometry

from eosin import __version__
from eosin._records import Report
from eosin._seals import read_json
from eosin._spread import find_file
from eosin.errors import EosinError
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps._maps import first_map
from eosin.heatmaps._subject import class_choices
from eosin.mil._checkpoint import ModelCard, load_card, load_model
from eosin.mil._crossval import PREDICTIONS, read_predictions
from eosin.mil._flow import Flow
from eosin.mil._probe import BASELINE, Probe
from eosin.mil._tables import shown
from eosin.mil.slots import Aggregator
from eosin.mil.task import Task
from eosin.report._evaluation import (
    SHOWN_PREDICTIONS,
    confusions,
    panels,
    positives,
    shortened,
    verdict,
    worst_rows,
)
from eosin.report._measures import (
    Evaluated,
    baseline_table,
    fold_table,
    led_by,
    metric_name,
    over_folds,
    threshold_table,
)
from eosin.report._model_card import model_card
from eosin.report._page import Link, Metric, Picture, ReportData, SlideCard, slide_pictures
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

PICTURE_PX = 560
MOST_CARDS = 60
"""Slides that a report shows with pictures, about 0.3 MB each."""


@dataclass(frozen=True)
class Earlier:
    """A study of the same job that was made before.

    Attributes
    ----------
    name : str
    report : str
        Its page, as a path from that of the study that names it.
    note : str
        What it has different, and what it found.
    """

    name: str
    report: str
    note: str


@dataclass(frozen=True, eq=False)
class Result:
    """What a pipeline leaves behind.

    Attributes
    ----------
    job : JobFolder
        Of tiles and features.
    out : Path
        Of the results.
    features, splits, crossval, model, heatmaps : Path
        Folders in the job.
    predictions : DataFrame
        One row per slide that was tested: fold, slide_id, patient_id, label and the columns of the task, all by a model
        that did not see the patient.
    metrics : mapping
        As `eosin.mil._crossval.crossval` returns.
    task : Task
    slides : mapping of str to SlideFile
        All slides.
    report : Report
        Each slide's worst record over all stages.
    left_out : tuple of str
        Labelled slides without features.
    flow : Flow
        What became of every slide that was given.
    earlier : tuple of Earlier
        Studies of the job that were made before.
    """

    job: JobFolder
    out: Path
    features: Path
    splits: Path
    crossval: Path
    model: Path
    heatmaps: Path
    predictions: pd.DataFrame
    metrics: Mapping[str, Any]
    task: Task
    slides: Mapping[str, SlideFile]
    report: Report
    left_out: tuple[str, ...] = ()
    flow: Flow = field(default_factory=Flow)
    earlier: tuple[Earlier, ...] = ()

    def __repr__(self) -> str:
        chosen = self.metrics["out_of_fold"].get(self.task.selection_metric)
        shown_metric = "" if chosen is None else f", {self.task.selection_metric} {chosen['value']:.3f}"
        return f"<Result in {self.out}: {len(self.predictions)} slides predicted{shown_metric}>"

    def fold_model(self, slide_id: str) -> Path:
        """Return the folder of the model that has not seen the slide's patient."""
        fold = dict(zip(self.predictions["slide_id"], self.predictions["fold"], strict=True))[slide_id]
        return self.crossval / f"fold_{fold}"

    def feature_file(self, slide_id: str) -> Path:
        """Return the slide's feature file."""
        return find_file(self.features, slide_id, ".h5")


def out_of_fold(path: Path) -> pd.DataFrame:
    """Read the out-of-fold predictions of `eosin.mil._crossval.crossval`; ids, labels and classes stay text."""
    frame = pd.DataFrame(read_predictions(path).columns)
    numbers = [name for name in map(str, frame) if name.startswith("prob_")]
    return frame.astype(dict.fromkeys(numbers, float))


def make_report(result: Result, *, truth: Mapping[str, BaseGeometry] | None = None) -> ReportData:
    """Put the result of a pipeline together for a person.

    Of more than `MOST_CARDS` slides those have pictures whose predictions are farthest from the truth.

    Parameters
    ----------
    result : Result
    truth : mapping of str to geometry, optional
        True outline per slide in level-0 pixels, drawn beside the heat map; an empty one where there is nothing.

    Returns
    -------
    ReportData
    """
    columns = result.predictions.columns.astype(str)
    rows = [dict(zip(columns, row, strict=True)) for row in result.predictions.itertuples(index=False)]
    patients = result.predictions["patient_id"].nunique()
    found = Evaluated.of(result.task, result.predictions)
    everyone = len(rows) <= MOST_CARDS
    pictured = rows if everyone else [rows[row] for row in worst_rows(found, MOST_CARDS)]
    return ReportData(
        title="Cross-validation, slide by slide",
        summary=(
            f"{len(rows)} slides of {patients} patients, each predicted by a model that was trained on other patients."
        ),
        metrics=_metrics(result, patients),
        metrics_note=positives(found),
        panels=panels(found),
        confusions=confusions(found),
        slides=tuple(_card(result, row, truth) for row in pictured),
        slides_heading="Slides" if everyone else f"The {len(pictured)} worst predictions of {len(rows)}",
        predictions=result.predictions.head(SHOWN_PREDICTIONS),
        tables=threshold_table(found) | _beside(result) | _fold_tables(result.metrics, result.task.selection_metric),
        notes=(*_notes(result), *shortened(result.predictions)),
        provenance=_provenance(result),
        flow=result.flow,
        card=model_card(result.metrics, load_card(result.model), notes=_notes(result)[1:]),
        links=tuple(Link(one.name, one.report, one.note) for one in result.earlier),
    )


def _beside(result: Result) -> dict[str, pd.DataFrame]:
    """Return the table of the baseline."""
    predictions, baseline = (folder / PREDICTIONS for folder in (result.crossval, result.crossval / BASELINE))
    return baseline_table(result.metrics["task"], predictions, baseline, Probe().in_words(result.task))


def _fold_tables(metrics: Mapping[str, Any], first: str) -> dict[str, pd.DataFrame]:
    over = over_folds(led_by(first, metrics["metrics"])) if len(metrics["folds"]) > 1 else None
    return ({} if over is None else {"Over folds": over}) | {"Folds": fold_table(metrics["folds"], first)}


def _metrics(result: Result, patients: int) -> tuple[Metric, ...]:
    note = f"All held-out slides together; 95 % interval that counts {patients} patients"
    estimates = result.metrics["out_of_fold"]
    names = sorted(estimates, key=lambda name: name != result.task.selection_metric)
    return tuple(
        Metric(metric_name(name), estimate["value"], estimate["lower"], estimate["upper"], note)
        for name, estimate in ((name, estimates[name]) for name in names)
    )


def _card(result: Result, row: Mapping[str, Any], truth: Mapping[str, BaseGeometry] | None) -> SlideCard:
    slide_id, target = row["slide_id"], result.task.columns[0]
    facts = {"patient": row["patient_id"], target: row[target], "fold": row["fold"]}
    said, correct = verdict(result.task, {name: str(value) for name, value in row.items()})
    bag = read_bag(result.feature_file(slide_id))
    pictures: tuple[Picture, ...] = ()
    if bag.n_instances:
        heatmap = _shown_map(*load_model(result.fold_model(slide_id)), bag)
        file = result.slides[slide_id]
        outline = None if truth is None else truth.get(slide_id)
        with file.open() as slide:
            pictures = slide_pictures(slide, heatmap, truth=outline, longest_px=PICTURE_PX)
    tiles = {"tiles": str(bag.n_instances)}
    return SlideCard(
        slide_id, facts | said | tiles, pictures, correct=correct, links=_links(result, slide_id),
        command=_view_command(result, slide_id),
    )  # fmt: skip


LINK_NAMES = {"png": "heat map", "geojson": "GeoJSON for QuPath", "html": "tiles and maps", "csv": "tiles as a table"}


def _links(result: Result, slide_id: str) -> tuple[Link, ...]:
    """Return the files of a slide's heat map, as the report finds them."""
    try:
        names = list(read_json(result.heatmaps / f"{slide_id}.json")["files"])
    except (OSError, ValueError, LookupError, TypeError, EosinError):
        return ()
    folder = result.heatmaps.relative_to(result.out)
    return tuple(Link(LINK_NAMES.get(name.rpartition(".")[2], name), (folder / name).as_posix()) for name in names)


def _view_command(result: Result, slide_id: str) -> str:
    """Return the command that shows a slide with the model that has not seen it."""
    paths = {
        "--slides": result.slides[slide_id].path,
        "--features": result.feature_file(slide_id),
        "--model": result.fold_model(slide_id),
    }
    return " ".join(["eosin view", *(f"{name} {shlex.quote(str(path))}" for name, path in paths.items())])


def _shown_map(model: Aggregator, card: ModelCard, bag: FeatureBag) -> Heatmap:
    """Return the map that the files of `explain_slide` show."""
    return first_map(model, bag, classes=class_choices(card), outputs=card.load_task().columns)


def _notes(result: Result) -> tuple[str, ...]:
    notes = ["Maps show what the model says of each tile as if it were the whole slide: its evidence."]
    if result.left_out:
        notes.append(f"{len(result.left_out)} labelled slides have no features: {shown(result.left_out)}.")
    if result.report.failed:
        reasons = "; ".join(f"{record.slide_id} ({record.reason})" for record in result.report.failed[:10])
        notes.append(f"{len(result.report.failed)} slides failed: {reasons}.")
    return tuple(notes)


def _provenance(result: Result) -> dict[str, str]:
    card = load_card(result.model)
    return {
        "eosin": __version__,
        "encoder": card.features.encoder,
        "tiles": f"{card.features.patch_size} px at {card.features.mpp:g} µm/px",
        "aggregator": card.recipe.aggregator.name,
        "recipe": card.recipe.to_json(),
        "splits": f"{result.metrics['n_folds']} folds by patient, seed {card.recipe.training.seed}",
        "model for other slides": f"{result.model.name} ({card.model_id})",
    }

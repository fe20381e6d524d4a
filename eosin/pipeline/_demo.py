"""The demonstration: the whole way on slides that are made on the spot, judged by the truth that was planted.

Nothing but the judging at the end reads the truth. The slides are predicted in a cross-validation by patient, so every
prediction and every heat map that is judged comes from a model that has not seen the patient.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry
from shapely.ops import unary_union

from eosin._files import write_json
from eosin._records import Report
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._maps import first_map
from eosin.heatmaps._subject import class_choices, require_grid
from eosin.mil._checkpoint import load_model
from eosin.mil._metrics import roc_auc
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._shuffled import shuffle_weights
from eosin.mil.slots import Aggregator
from eosin.options import Options
from eosin.pipeline._deploy import Machine, ProgressBar, no_progress
from eosin.pipeline._preflight import Problems
from eosin.pipeline._result import Result, make_report
from eosin.pipeline._run import Pipeline, check_options, run_pipeline
from eosin.report._page import Metric, ReportData, SlideCard, write_report
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._synthetic import Cohort, make_cohort, read_truth
from eosin.wsi._tissue import TissueMask

TUMOUR_TILE = 0.1
"""A tile is tumour when at least this part of it lies in the truth mask."""

RESAMPLES = 2000
RANDOM_MODELS = 20
"""Copies with shuffled weights whose maps the localisation is held against."""


class Demo(Options):
    """What the demonstration does.

    Attributes
    ----------
    cohort : Cohort
        The slides that are made. Blood, necrosis and sheets of harmless cells lie on all of them, so that tumour is not
        what a model with random weights finds.
    pipeline : Pipeline
        What is done with them. The recipe stops after a fixed number of passes: with two dozen slides no part can be
        spared to select a model.
    """

    cohort: Cohort = Cohort(striking=True)
    pipeline: Pipeline = Pipeline(
        tiling=Tiling(mpp=0.5, patch_size=128, min_tissue=0.5),
        recipe=Recipe(
            aggregator=Component(name="abmil", options={"embed_dims": [64], "hidden": 32, "dropout": 0.25}),
            training=Training(epochs=40, lr=1e-3, weight_decay=1e-2, select="last", patience=0),
        ),
    )


@dataclass(frozen=True)
class DemoSummary:
    """What came out.

    Attributes
    ----------
    slide_auc : float
        Area under the ROC curve over all slides, each predicted by a model that has not seen its patient.
    localisation_auc : float
        Area under the ROC curve of the map against the truth of the tiles, mean over the tumour slides.
    random_localisation : Random
        The same of models whose weights are shuffled: what there is to reach without having learnt anything.
    n_slides : int
    n_located : int
        Tumour slides with tiles of both kinds, over which `localisation_auc` is the mean.
    seconds : float
    out : Path
    report : Report
        Each slide's worst record over all stages.
    """

    slide_auc: float
    localisation_auc: float
    random_localisation: "Random"
    n_slides: int
    n_located: int
    seconds: float
    out: Path
    report: Report


@dataclass(frozen=True)
class Random:
    """What models with shuffled weights reach.

    Attributes
    ----------
    mean, highest : float
        Over the models.
    p : float
        Share of models, the trained one counted among them, that reach what the trained one does.
    """

    mean: float
    highest: float
    p: float


def run_demo(
    out: Path,
    options: Demo | None = None,
    *,
    machine: Machine | None = None,
    progress: ProgressBar | None = None,
) -> DemoSummary:
    """Make a cohort, run every step on it and judge the result.

    Parameters
    ----------
    out : Path
        Receives ``cohort/`` (slides, labels.csv, truth), what `eosin.pipeline._run.run_pipeline` writes into a job
        folder, ``report.html`` with the truth beside the heat maps, and ``summary.json``. What is there already from
        the same options is kept.
    options : Demo, optional
    machine : Machine, optional
    progress : callable, optional

    Returns
    -------
    DemoSummary
        ``summary.json`` holds the same numbers.

    Raises
    ------
    EosinError
        Before anything is painted: what stands in the way of `run_pipeline`.
    OutputError
        If the folder cannot be written.
    """
    started = time.monotonic()
    options, machine, problems = options or Demo(), machine or Machine(), Problems()
    check_options(problems, options.pipeline, out, machine)
    problems.require()
    with _one_thread():
        located, random, result = _run(out, options, machine, progress or no_progress)
    summary = DemoSummary(
        slide_auc=float(result.metrics["out_of_fold"]["auc"]["value"]),
        localisation_auc=float(np.mean(list(located.values()))),
        random_localisation=random,
        n_slides=len(result.predictions),
        n_located=len(located),
        seconds=round(time.monotonic() - started, 1),
        out=result.out,
        report=result.report,
    )
    write_json(summary.out / "summary.json", _as_json(summary))
    return summary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from dividing these small products: waiting for each other costs the threads far more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(out: Path, options: Demo, machine: Machine, progress: ProgressBar) -> tuple[dict[str, float], Random, Result]:
    cohort = out / "cohort"
    with progress("paint slides", options.cohort.n_slides) as advance:
        make_cohort(cohort, options.cohort, workers=machine.workers, progress=advance)
    result = run_pipeline(
        [cohort / "slides"],
        cohort / "labels.csv",
        JobFolder(out),
        options.pipeline,
        machine=machine,
        report=False,
        progress=progress,
    )
    slides = tumour_slides(result, cohort / "truth")
    located = locate_tumour(slides)
    random = locate_at_random(slides, float(np.mean(list(located.values()))))
    write_report(result.out / "report.html", _report(result, cohort / "truth", located, random))
    return located, random, result


def _as_json(summary: DemoSummary) -> dict[str, float | int]:
    random = summary.random_localisation
    return {
        "slide_auc": summary.slide_auc,
        "localisation_auc": summary.localisation_auc,
        "random_localisation_auc": random.mean,
        "random_localisation_auc_highest": random.highest,
        "random_localisation_p": random.p,
        "n_slides": summary.n_slides,
        "n_located": summary.n_located,
        "seconds": summary.seconds,
    }


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A slide with tumour, which of its tiles are tumour, and the model that has not seen its patient."""

    slide_id: str
    bag: FeatureBag
    is_tumour: NDArray[np.bool_]
    model: Aggregator
    classes: tuple[str, ...]


def tumour_slides(result: Result, truth: Path) -> list[HeldOut]:
    """Return the slides that have tiles with and without tumour.

    Parameters
    ----------
    result : Result
    truth : Path
        Folder of truth masks, see `eosin.wsi._synthetic.make_cohort`.
    """
    found = []
    for slide_id in result.predictions["slide_id"]:
        bag = read_bag(result.feature_file(slide_id))
        is_tumour = tumour_tiles(bag, truth / f"{slide_id}.png")
        if is_tumour.any() and not is_tumour.all():
            model, card = load_model(result.fold_model(slide_id))
            found.append(HeldOut(slide_id, bag, is_tumour, model, class_choices(card)))
    return found


def locate_tumour(
    slides: Sequence[HeldOut], *, change: Callable[[Aggregator], Aggregator] = lambda model: model
) -> dict[str, float]:
    """Compare maps with the truth, tile by tile.

    Parameters
    ----------
    slides : sequence of HeldOut
    change : callable, optional
        Makes the model that is judged from the one that was trained.

    Returns
    -------
    dict
        Area under the ROC curve by slide id.
    """
    areas = {}
    for slide in slides:
        heatmap = first_map(change(slide.model), slide.bag, classes=slide.classes)
        areas[slide.slide_id] = cast("float", roc_auc(heatmap.values, slide.is_tumour))
    return areas


def tumour_tiles(bag: FeatureBag, truth: Path) -> NDArray[np.bool_]:
    """Return which tiles of a slide have tumour, (n,), from the mask that was painted."""
    grid = require_grid(bag)
    mask, mpp = read_truth(truth)
    side_px0 = mpp / grid.slide_mpp
    known = TissueMask(mask, (side_px0, side_px0), grid.slide_size_px0, grid.slide_mpp)
    return np.asarray(known.fraction(grid.boxes_px0()) >= TUMOUR_TILE)


def locate_at_random(slides: Sequence[HeldOut], reached: float) -> Random:
    """Return what `RANDOM_MODELS` copies with shuffled weights reach on average over the slides."""
    areas = [locate_tumour(slides, change=partial(shuffle_weights, seed=seed)) for seed in range(RANDOM_MODELS)]
    means = [float(np.mean(list(one.values()))) for one in areas]
    as_good = sum(mean >= reached for mean in means)
    return Random(float(np.mean(means)), max(means), (1 + as_good) / (1 + RANDOM_MODELS))


def read_outline(path: Path) -> BaseGeometry:
    """Return the outline in a truth GeoJSON, in level-0 pixels; empty when there is no tumour."""
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    return unary_union([shape(feature["geometry"]) for feature in features])


def _report(result: Result, truth: Path, located: Mapping[str, float], random: Random) -> ReportData:
    outlines = {slide: read_outline(truth / f"{slide}.geojson") for slide in result.predictions["slide_id"]}
    data = make_report(result, truth=outlines)
    return replace(
        data,
        title="Finding planted tumour on synthetic slides",
        summary=(
            f"{data.summary} The slides are painted, not scanned; some hold tumour nests whose exact outline is known. "
            "The models were trained with slide labels only; the outlines are used only to test the maps."
        ),
        metrics=(*data.metrics[:1], _localisation(result, located, random), *data.metrics[1:]),
        slides=tuple(
            _with_area(card, located) for card in sorted(data.slides, key=lambda c: c.slide_id not in located)
        ),
    )


def _localisation(result: Result, located: Mapping[str, float], random: Random) -> Metric:
    """Return the mean over slides with the interval of a bootstrap that draws patients."""
    patient = dict(zip(result.predictions["slide_id"], result.predictions["patient_id"], strict=True))
    by_patient: dict[str, list[float]] = {}
    for slide_id, area in located.items():
        by_patient.setdefault(patient[slide_id], []).append(area)
    sums = np.array([(sum(areas), len(areas)) for areas in by_patient.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    total, count = sums[drawn].sum(axis=1).T
    low, high = np.quantile(total / count, [0.025, 0.975])
    note = (
        f"what a tile says alone, against truth, mean of {len(located)} tumour slides; a tile is tumour from "
        f"{TUMOUR_TILE:.0%} overlap; 95 % bootstrap over {len(sums)} patients; {RANDOM_MODELS} models with shuffled "
        f"weights reach {random.mean:.3f} on average, {random.highest:.3f} at most"
    )
    name = "Localisation: area under the ROC curve of tiles"
    return Metric(name, float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high), note)


def _with_area(card: SlideCard, located: Mapping[str, float]) -> SlideCard:
    if card.slide_id not in located:
        return card
    return replace(card, facts={**card.facts, "localisation AUC": f"{located[card.slide_id]:.3f}"})

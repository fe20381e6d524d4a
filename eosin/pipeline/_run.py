"""The whole way in one call: slides → tiles → features → splits → cross-validation → heat maps → report.

Every stage is the function that its own command calls, writes into the job folder, and is skipped where its result is
there already. A slide that fails somewhere is left out of what follows and named at the end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eosin._batch import Outcome, Report, run_batch
from eosin._files import file_fingerprint, write_json
from eosin._fingerprints import content_hash, fingerprint
from eosin._names import Ids
from eosin._seals import read_json
from eosin.errors import EosinError, LabelError
from eosin.features._encoders import find_encoder
from eosin.features._store import read_bag
from eosin.mil._checkpoint import load_card
from eosin.mil._crossval import PREDICTIONS
from eosin.mil._flow import Flow
from eosin.mil._recipe import Recipe, require_methods
from eosin.mil._splits import make_splits, write_splits
from eosin.mil._study import (
    Study,
    checked_splits,
    crossval_study,
    fit_study,
    label_cohort,
    open_labels,
    open_study,
    pose_task,
    read_any_splits,
    without_label,
)
from eosin.mil._tables import shown
from eosin.options import Options
from eosin.pipeline._deploy import (
    Advance,
    Encoded,
    Machine,
    ProgressBar,
    Tiler,
    TissueTiles,
    encode_slides,
    no_progress,
)
from eosin.pipeline._explain import explain_slide, require_formats
from eosin.pipeline._result import Result, make_report, out_of_fold
from eosin.report._page import write_report
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._quality import QualityLimits
from eosin.wsi._slide_file import SlideFile, find_slides
from eosin.wsi._tissue import TissueOptions

VAL_FRACTION = 0.15


class Pipeline(Options):
    """What `run_pipeline` does with the slides.

    Attributes
    ----------
    tiling, tissue, quality
        As of `eosin.wsi._job.tile_slides`.
    encoder : str
        Name, see `eosin.features._encoders`.
    recipe : Recipe
    task : str
        ``classification`` and others, see `eosin.mil.task.make_task`.
    target : str, optional
        Column of the label; found when it is not given.
    folds : int
        Folds of the cross-validation; `splits` given to `run_pipeline` win.
    formats : tuple of str
        Of the heat maps.
    """

    tiling: Tiling = Tiling()
    tissue: TissueOptions = TissueOptions()
    quality: QualityLimits = QualityLimits()
    encoder: str = "he_texture"
    recipe: Recipe = Recipe()
    task: str = "classification"
    target: str | None = None
    folds: int = 5
    formats: tuple[str, ...] = ("png", "geojson")

    @property
    def val_fraction(self) -> float:
        """Share of the patients that selects a model; none when the recipe takes the last pass."""
        return 0.0 if self.recipe.training.select == "last" else VAL_FRACTION


def run_pipeline(
    slides: Sequence[Path],
    labels: Path,
    job: JobFolder,
    options: Pipeline | None = None,
    *,
    machine: Machine | None = None,
    slide_mpp: float | Path | None = None,
    splits: Path | None = None,
    missing: Literal["error", "drop"] = "error",
    ids: Ids = "ask",
    tiles: Tiler | None = None,
    report: bool = True,
    progress: ProgressBar | None = None,
) -> Result:
    """Go the whole way and write the report.

    Parameters
    ----------
    slides : sequence of Path
        Slides, and folders that are searched.
    labels : Path
        Table of slides, patients and labels.
    job : JobFolder
        Receives, besides tiles and features: ``splits/``, ``crossval/`` (a model per fold, ``predictions.csv``,
        ``metrics.json``), ``model/`` (trained on all labelled slides, for others), ``heatmaps/`` and ``report.html``.
    options : Pipeline, optional
    machine : Machine, optional
    slide_mpp : float or Path, optional
        As of `eosin.wsi._slide_file.find_slides`.
    splits : Path, optional
        Splits to use instead of new ones, in any layout that `eosin.mil._study.Study.splits` reads.
    missing : {"error", "drop"}
        What becomes of a label whose slide is not among the slides.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, see `eosin._names.unify`.
    tiles : Tiler, optional
        Takes the place of the tiles with tissue.
    report : bool
        Whether ``report.html`` is written; a caller that writes another one from the result says no.
    progress : callable, optional

    Returns
    -------
    Result

    Raises
    ------
    ConfigError
        If slides, encoder or recipe do not exist.
    LabelError
        If the table cannot be used, names slides that are not there, or too few slides remain.
    OutputError
        If the environment stops the run; what is finished stays.
    """
    options, machine, progress = options or Pipeline(), machine or Machine(), progress or no_progress
    files = find_slides(slides, slide_mpp=slide_mpp)
    require_possible(options, files, labels, splits=splits, missing=missing, ids=ids)
    tiles = tiles or TissueTiles(options.tiling, options.tissue, options.quality)
    encoded = encode_slides(files, job, tiles, options.encoder, machine=machine, progress=progress)
    study = _open_study(files, encoded, labels, options, ids)
    parts = study.splits(
        splits, folds=options.folds, val_fraction=options.val_fraction, seed=options.recipe.training.seed
    )
    write_splits(job.root / "splits", parts, study.cohort)
    with progress("cross-validate", len(parts)) as advance:
        metrics = crossval_study(
            study, options.recipe, job.root / "crossval", splits=parts, device=machine.device, progress=advance
        )
    with progress("train", options.recipe.training.epochs) as advance:
        fit_study(study, options.recipe, job.root / "model", device=machine.device, progress=advance)
    result = Result(
        job=job,
        features=encoded.folder,
        splits=job.root / "splits",
        crossval=job.root / "crossval",
        model=job.root / "model",
        heatmaps=job.root / "heatmaps",
        predictions=out_of_fold(job.root / "crossval" / PREDICTIONS),
        metrics=metrics,
        task=study.task,
        slides={file.slide_id: file for file in files},
        report=encoded.report,
        left_out=tuple(slide for slide in study.table.slide_ids if slide in study.left_out),
        flow=study.account(parts),
    )
    with progress("heat maps", len(result.predictions)) as advance:
        drawn = draw_maps(result, options.formats, advance)
    result = replace(result, report=encoded.report.then(drawn))
    if report:
        write_report(job.root / "report.html", make_report(result))
    return result


def require_possible(
    options: Pipeline,
    files: Sequence[SlideFile],
    labels: Path,
    *,
    splits: Path | None,
    missing: Literal["error", "drop"],
    ids: Ids = "ask",
) -> None:
    """Refuse what cannot work before the hours of work that lead up to it; errors as of `run_pipeline`."""
    find_encoder(options.encoder)
    require_methods(options.recipe)
    require_formats(options.formats)
    table = open_labels(labels, ids=ids)
    there = {file.slide_id for file in files}
    absent = [slide for slide in table.slide_ids if slide not in there]
    if absent and (missing == "error" or len(absent) == len(table)):
        raise LabelError(
            f"{len(absent)} of {len(table)} labelled slides are not among the {len(files)} slides: {shown(absent)}; "
            "correct the table, or leave them out on purpose (--missing drop)"
        )
    blank = without_label(table, options.task, options.target) if missing == "drop" else {}
    known = table.select(there - set(blank))
    cohort = label_cohort(known, pose_task(options.task, known, options.target))
    if splits is None:
        make_splits(cohort, folds=options.folds, val_fraction=options.val_fraction, seed=options.recipe.training.seed)
    else:
        checked_splits(read_any_splits(splits, table), cohort, left_out=[*absent, *blank])


def _open_study(files: Sequence[SlideFile], encoded: Encoded, labels: Path, options: Pipeline, ids: Ids) -> Study:
    """Join the labels with the features of the slides that did not fail."""
    flow = Flow.of(file.slide_id for file in files).joined(open_labels(labels, ids=ids).slide_ids)
    flow = flow.keep("found", (file.slide_id for file in files), "has no slide file")
    flow = encoded.account(flow)
    if not encoded.files:
        raise LabelError("no slide has features; run.json in the job folder says why for each slide")
    return open_study(
        encoded.files, labels, task=options.task, target=options.target, missing="drop", ids=ids, flow=flow
    )


def draw_maps(result: Result, formats: Sequence[str], advance: Advance | None = None) -> Report:
    """Draw every tested slide's heat map by the model that has not seen it, into ``heatmaps/``.

    Parameters
    ----------
    result : Result
    formats : sequence of str
        Among `eosin.pipeline._explain.FORMATS`.
    advance : callable, optional
        Called with the record of each slide.
    """
    items = [
        _Drawing(
            result.slides[slide],
            result.feature_file(slide),
            result.fold_model(slide),
            result.heatmaps,
            tuple(formats),
        )
        for slide in result.predictions["slide_id"]
    ]
    return run_batch(
        items,
        _draw,
        key=lambda item: item.slide.slide_id,
        stage="heatmap",
        is_done=_is_drawn,
        run_json=result.job.run_json,
        progress=advance,
    )


@dataclass(frozen=True)
class _Drawing:
    """The heat map of one slide: what it is made from, and the folder of its files."""

    slide: SlideFile
    features: Path
    model: Path
    folder: Path
    formats: tuple[str, ...]

    @property
    def note(self) -> Path:
        """The file that says what the others were made from."""
        return self.folder / f"{self.slide.slide_id}.json"

    def origin(self, files: Iterable[Path]) -> dict[str, Any]:
        """Return what the map is made from, and hashes of its files."""
        made_from = fingerprint(
            "map",
            model=load_card(self.model),
            features=file_fingerprint(self.features),
            slide=file_fingerprint(self.slide.path),
            slide_mpp=self.slide.mpp,
            formats=list(self.formats),
        )
        return {"fingerprint": made_from, "files": {path.name: content_hash(path) for path in files}}


def _is_drawn(item: _Drawing) -> bool:
    try:
        note = read_json(item.note)
        return bool(note == item.origin(item.folder / name for name in note["files"]))
    except (OSError, ValueError, LookupError, TypeError, EosinError):
        return False


def _draw(item: _Drawing) -> Outcome:
    files = explain_slide(item.model, item.slide, read_bag(item.features), item.folder, formats=item.formats)
    write_json(item.note, item.origin(files))
    return Outcome()

"""The whole way in one call: slides → tiles → features → splits → cross-validation → heat maps → report.

Every stage is the function that its own command calls, writes into the job folder, and is skipped where its result is
there already. A slide that fails somewhere is left out of what follows and named at the end.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eosin.batch import Outcome, Record, Report, run_batch
from eosin.errors import EosinError, LabelError, UnknownNameError
from eosin.features.encoders import find_encoder, folder_name
from eosin.features.extract import extract
from eosin.features.store import read_bag, read_footer
from eosin.files import write_json
from eosin.heatmaps.subject import map_name
from eosin.mil.checkpoint import load_card, load_model
from eosin.mil.crossval import PREDICTIONS, cohort_of, crossval
from eosin.mil.data import Examples, FeatureFolder, LabelTable, make_examples, shown
from eosin.mil.recipe import Recipe
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES
from eosin.mil.splits import Cohort, Split, check_splits, make_splits, read_splits, with_validation, write_splits
from eosin.mil.study import label_cohort, open_labels, pose_task
from eosin.mil.tasks import Task
from eosin.mil.train import fit
from eosin.options import Options
from eosin.pipeline.deploy import Machine, ProgressBar, no_progress
from eosin.pipeline.explain import FORMATS, explain_slide
from eosin.pipeline.result import Result, make_report, read_predictions
from eosin.report.page import write_report
from eosin.wsi.grid import Tiling
from eosin.wsi.job import JobFolder, tile_slides
from eosin.wsi.quality import QualityLimits
from eosin.wsi.slide import SlideFile, find_slides
from eosin.wsi.tissue import TissueOptions

VAL_FRACTION = 0.15


class Pipeline(Options):
    """What `run_pipeline` does with the slides.

    Attributes
    ----------
    tiling, tissue, quality
        As of `eosin.wsi.job.tile_slides`.
    encoder : str
        Name, see `eosin.features.encoders`.
    recipe : Recipe
    task : str
        ``classification`` and others, see `eosin.mil.tasks.make_task`.
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


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles that come from elsewhere than the tissue.

    Attributes
    ----------
    folder : str
        Of the coordinates in the job.
    write : callable
        Given slides and what to call after each, writes their coordinates files and reports.
    """

    folder: str
    write: Callable[[Sequence[SlideFile], Callable[[object], None] | None], Report]


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
        As of `eosin.wsi.slide.find_slides`.
    splits : Path, optional
        Folder of splits to use instead of new ones.
    missing : {"error", "drop"}
        What becomes of a label whose slide is not among the slides.
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
    result = run_stages(
        slides,
        labels,
        job,
        options,
        machine=machine,
        slide_mpp=slide_mpp,
        splits=splits,
        missing=missing,
        progress=progress,
    )
    write_report(job.root / "report.html", make_report(result))
    return result


def run_stages(
    slides: Sequence[Path],
    labels: Path,
    job: JobFolder,
    options: Pipeline | None = None,
    *,
    machine: Machine | None = None,
    slide_mpp: float | Path | None = None,
    splits: Path | None = None,
    missing: Literal["error", "drop"] = "error",
    tiles: Tiles | None = None,
    progress: ProgressBar | None = None,
) -> Result:
    """Do all that `run_pipeline` does but the report; arguments, result and errors are the same.

    With `tiles`, these take the place of the tiles with tissue.
    """
    run = _Run(job, options or Pipeline(), machine or Machine(), progress or no_progress, tiles)
    return run.all_stages(find_slides(slides, slide_mpp=slide_mpp), open_labels(labels), splits, missing)


@dataclass(eq=False)
class _Run:
    """One call of `run_pipeline`: its fixed arguments, and the records so far."""

    job: JobFolder
    options: Pipeline
    machine: Machine
    progress: ProgressBar
    tiles: Tiles | None = None
    records: dict[str, Record] = field(default_factory=dict)

    def all_stages(
        self,
        files: Sequence[SlideFile],
        table: LabelTable,
        given_splits: Path | None,
        missing: Literal["error", "drop"],
    ) -> Result:
        table = _labelled(table, files, missing)
        task = pose_task(self.options.task, table, self.options.target)
        self.check_names()
        self.choose_splits(label_cohort(table, task), given_splits)
        features = self.features(files)
        used, left_out = self.usable(table, features)
        examples = make_examples(FeatureFolder(_bags(features, used)), used, task, missing="drop")
        cohort = cohort_of(examples, task, used.rows(examples.ids))
        splits = self.choose_splits(cohort, given_splits, left_out)
        write_splits(self.job.root / "splits", splits, cohort)
        metrics = self.crossval(task, examples, cohort, splits)
        self.final_model(task, examples, cohort)
        result = Result(
            job=self.job,
            features=features,
            splits=self.job.root / "splits",
            crossval=self.job.root / "crossval",
            model=self.job.root / "model",
            heatmaps=self.job.root / "heatmaps",
            predictions=read_predictions(self.job.root / "crossval" / PREDICTIONS),
            metrics=metrics,
            task=task,
            slides={file.slide_id: file for file in files},
            report=self.report(files),
            left_out=left_out,
        )
        self.heatmaps(result)
        return replace(result, report=self.report(files))

    def check_names(self) -> None:
        """Refuse what does not exist before the hours of work that lead up to it."""
        recipe = self.options.recipe
        AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
        STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
        for term in recipe.terms:
            LOSS_TERMS.resolve(term.name, term.options)
        for name in self.options.formats:
            if name not in FORMATS:
                raise UnknownNameError("heat-map format", name, FORMATS)

    def features(self, files: Sequence[SlideFile]) -> Path:
        """Tile and encode every slide; return the folder of the feature files."""
        options, machine = self.options, self.machine
        encoder = folder_name(find_encoder(options.encoder).name)
        tiling = options.tiling.folder if self.tiles is None else self.tiles.folder
        with self.progress("tile", len(files)) as advance:
            self.note(self.tile(files, advance))
        with self.progress("extract", len(files)) as advance:
            self.note(
                extract(
                    [file for file in files if self.records[file.slide_id].status != "failed"],
                    self.job,
                    options.encoder,
                    weights=machine.weights,
                    batch_size=machine.batch_size,
                    precision=machine.precision,
                    device=machine.device,
                    tiling=tiling,
                    workers=machine.workers,
                    progress=advance,
                )
            )
        return self.job.features_dir(tiling, encoder)

    def tile(self, files: Sequence[SlideFile], advance: Callable[[object], None] | None) -> Report:
        if self.tiles is not None:
            return self.tiles.write(files, advance)
        return tile_slides(
            files,
            self.job,
            self.options.tiling,
            tissue=self.options.tissue,
            quality=self.options.quality,
            workers=self.machine.workers,
            progress=advance,
        )

    def note(self, report: Report) -> None:
        """Keep each slide's worst record: a failure stays, whatever comes later."""
        for record in report.records:
            before = self.records.get(record.slide_id)
            if before is None or before.status in ("ok", "skipped"):
                self.records[record.slide_id] = record

    def report(self, files: Sequence[SlideFile]) -> Report:
        return Report(tuple(self.records[file.slide_id] for file in files))

    def usable(self, table: LabelTable, features: Path) -> tuple[LabelTable, tuple[str, ...]]:
        """Return the rows of slides that did not fail and have at least one tile, and the ids of the others."""
        usable = [
            slide
            for slide in table.slide_ids
            if self.records[slide].status != "failed" and _n_tiles(features / f"{slide}.h5")
        ]
        if not usable:
            raise LabelError("no labelled slide has features; run.json in the job folder says why for each slide")
        left_out = tuple(slide for slide in table.slide_ids if slide not in set(usable))
        return table.select(usable), left_out

    def choose_splits(self, cohort: Cohort, given: Path | None, left_out: Sequence[str] = ()) -> list[Split]:
        """Return the given splits without the slides that are left out, or new ones; checked before anything runs."""
        training = self.options.recipe.training
        if given is None:
            val_fraction = 0.0 if training.select == "last" else VAL_FRACTION
            return make_splits(cohort, folds=self.options.folds, val_fraction=val_fraction, seed=training.seed)
        gone = set(left_out)
        splits = [
            Split(*(tuple(slide for slide in part if slide not in gone) for part in split.parts().values()))
            for split in read_splits(given)
        ]
        check_splits(splits, cohort)
        return splits

    def crossval(self, task: Task, examples: Examples, cohort: Cohort, splits: Sequence[Split]) -> dict[str, Any]:
        with self.progress("cross-validate", len(splits)) as advance:
            return crossval(
                self.options.recipe,
                task,
                examples,
                splits,
                cohort,
                self.job.root / "crossval",
                device=self.machine.device,
                progress=advance,
            )

    def final_model(self, task: Task, examples: Examples, cohort: Cohort) -> None:
        """Train on all labelled slides; cross-validation has estimated what such a model is worth."""
        recipe = self.options.recipe
        split = Split(examples.ids, (), ())
        if recipe.training.select != "last":
            split = with_validation(split, cohort, val_fraction=VAL_FRACTION, seed=recipe.training.seed)
        val = examples.subset(split.val) if split.val else None
        with self.progress("train", recipe.training.epochs) as advance:
            fit(
                recipe,
                task,
                examples.subset(split.train),
                val,
                folder=self.job.root / "model",
                device=self.machine.device,
                progress=advance,
            )

    def heatmaps(self, result: Result) -> None:
        """Explain every tested slide by the model that has not seen it."""
        model, _ = load_model(result.model)
        name, formats = map_name(model), self.options.formats
        items = [
            _Explain(
                result.slides[slide],
                result.feature_file(slide),
                result.fold_model(slide),
                result.heatmaps / f"{slide}_{name}",
                formats,
            )
            for slide in result.predictions["slide_id"]
            if slide in result.slides
        ]
        with self.progress("heat maps", len(items)) as advance:
            self.note(
                run_batch(
                    items,
                    _explain,
                    key=lambda item: item.slide.slide_id,
                    stage="heatmap",
                    is_done=lambda item: item.is_done(),
                    run_json=self.job.run_json,
                    progress=advance,
                )
            )


def _labelled(table: LabelTable, files: Sequence[SlideFile], missing: Literal["error", "drop"]) -> LabelTable:
    """Return the rows whose slide is there; refuse the others unless they may be dropped."""
    there = {file.slide_id for file in files}
    absent = [slide for slide in table.slide_ids if slide not in there]
    if absent and (missing == "error" or len(absent) == len(table)):
        raise LabelError(
            f"{len(absent)} of {len(table)} labelled slides are not among the {len(files)} slides: {shown(absent)}; "
            "correct the table, or leave them out on purpose (--missing drop)"
        )
    return table.select(there)


def _n_tiles(path: Path) -> int:
    try:
        return read_footer(path).n_rows
    except (EosinError, OSError):
        return 0


def _bags(features: Path, table: LabelTable) -> dict[str, Path]:
    return {slide: features / f"{slide}.h5" for slide in table.slide_ids}


@dataclass(frozen=True)
class _Explain:
    """The heat map of one slide: what it is made from, its files without their formats, and the note that says so."""

    slide: SlideFile
    features: Path
    model: Path
    stem: Path
    formats: tuple[str, ...]

    @property
    def note(self) -> Path:
        return self.stem.with_name(f"{self.slide.slide_id}.json")

    def origin(self) -> dict[str, Any]:
        footer = read_footer(self.features)
        return {
            "model": load_card(self.model).model_id,
            "features": footer.options_hash,
            "slide": footer.input_fingerprint,
            "formats": list(self.formats),
        }

    def files(self) -> list[Path]:
        return [self.stem.with_name(f"{self.stem.name}.{name}") for name in self.formats]

    def is_done(self) -> bool:
        try:
            same = json.loads(self.note.read_text(encoding="utf-8")) == self.origin()
        except (OSError, ValueError, EosinError):
            return False
        return same and all(path.is_file() for path in self.files())


def _explain(item: _Explain) -> Outcome:
    explain_slide(item.model, item.slide, read_bag(item.features), item.stem.parent, formats=item.formats)
    write_json(item.note, item.origin())
    return Outcome()

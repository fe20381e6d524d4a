"""Two stages in one call: a model at a low magnification chooses the tiles that a second model sees at a higher one.

Both stages are whole pipelines with cross-validation, models, heat maps and a report, the first in ``JOB/stage1``. The
tiles of the second are chosen by the first's model of the fold that tests the slide, so that no slide is trained on or
judged by tiles that its own label has chosen. One thing remains: the first-stage models that choose a training slide's
tiles have seen the labels of slides that test the second stage, as in every stacking of models without a nested
cross-validation.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eosin._files import write_json
from eosin._names import Ids
from eosin._records import Report
from eosin.errors import ConfigError
from eosin.mil._recipe import RECIPES, Recipe, require_methods
from eosin.mil._selection import tile_ratio
from eosin.mil._splits import read_splits
from eosin.mil._tables import LabelTable, Missing, shown
from eosin.mil.slots import AGGREGATORS, AttentionOutput
from eosin.options import Options
from eosin.pipeline._deploy import Advance, Machine, ProgressBar
from eosin.pipeline._preflight import Problems, check_labels
from eosin.pipeline._result import Result, make_report
from eosin.pipeline._run import Checked, Inputs, Pipeline, check_run, run_checked
from eosin.pipeline._selection import Selection, tile_selected
from eosin.pipeline._studies import earlier_studies
from eosin.report._page import write_report
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SceneChoice, SlideFile

logger = logging.getLogger(__name__)

FIRST = "stage1"
STAGES = "stages.json"
FIRST_TILING = Tiling(mpp=2.0)
ANY_WIDTH = 64


class SecondStage(Options):
    """What the second stage does differently from the first.

    Attributes
    ----------
    tiling : Tiling
        Finer than the first stage's, whose tiles are whole numbers of these.
    selection : Selection
        How many tiles of the first stage are looked at closely, and which.
    recipe : Recipe, optional
        The first stage's unless given.
    target : str, optional
        Label column of the second stage, for example a grade where the first stage finds cancer; the first's unless
        given.
    """

    tiling: Tiling = Tiling(mpp=1.0)
    selection: Selection = Selection()
    recipe: Recipe | None = None
    target: str | None = None

    def after(self, first: Pipeline) -> Pipeline:
        """Return the options of the second stage, given those of the first."""
        changes = {"tiling": self.tiling, "recipe": self.recipe, "target": self.target}
        return first.model_copy(update={name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True, eq=False)
class TwoStageResult:
    """What both stages leave behind.

    Attributes
    ----------
    first, second : Result
    report : Report
        Each slide's first failure in either stage, else its last record.
    summary : mapping
        What ``stages.json`` holds: of each stage mpp, tiles and out-of-fold metrics.
    """

    first: Result
    second: Result
    report: Report
    summary: Mapping[str, Any]


def run_two_stage(
    slides: Sequence[Path],
    labels: Path,
    job: JobFolder,
    options: Pipeline | None = None,
    second: SecondStage | None = None,
    *,
    machine: Machine | None = None,
    slide_mpp: float | Path | None = None,
    scene: SceneChoice = None,
    plane: int | None = None,
    splits: Path | None = None,
    missing: Missing = "error",
    ids: Ids = "ask",
    study: str | None = None,
    problems: Problems | None = None,
    progress: ProgressBar | None = None,
) -> TwoStageResult:
    """Go the whole way twice.

    Parameters
    ----------
    slides, labels, machine, slide_mpp, scene, plane, splits, missing, ids, study, problems, progress
        As of `eosin.pipeline._run.run_pipeline`; given splits must test every slide once.
    job : JobFolder
        Receives the second stage as `eosin.pipeline._run.run_pipeline` writes it, the first below ``stage1/``, and
        ``stages.json``; of every further study below ``studies/<name>``.
    options : Pipeline, optional
        Of both stages; tiling, recipe and target are the first's. The recipe `two_stage` at 2 µm/px unless given.
    second : SecondStage, optional
        The defaults otherwise.

    Returns
    -------
    TwoStageResult

    Raises
    ------
    ConfigError
        If the tilings do not fit together, or the model of the first stage does not weigh tiles.
    LabelError, OutputError
        As `eosin.pipeline._run.run_pipeline`.
    """
    options = options or Pipeline(tiling=FIRST_TILING, recipe=RECIPES["two_stage"])
    inputs = Inputs(
        slides, labels, job, options, machine or Machine(), slide_mpp, scene, plane, splits, missing, ids, study
    )
    return run_both(inputs, second or SecondStage(), problems=problems, progress=progress)


def run_both(
    inputs: Inputs, second: SecondStage, *, problems: Problems | None = None, progress: ProgressBar | None = None
) -> TwoStageResult:
    """Do what `run_two_stage` does, with its arguments in one object."""
    options, problems = inputs.options, problems or Problems()
    checked = check_two_stage(problems, inputs, second)
    chosen = checked.begin(problems, inputs.study)
    first = run_checked(
        inputs, checked.files, JobFolder(chosen.tiles.root / FIRST), chosen.path / FIRST, progress=progress
    )
    same = second.target in (None, options.target)
    splits = first.splits if same and inputs.splits is None else inputs.splits
    last = run_checked(
        replace(inputs, options=second.after(options), splits=splits),
        checked.files,
        chosen.tiles,
        chosen.path,
        tiles=ChosenTiles(first, second),
        report=False,
        earlier=earlier_studies(chosen),
        progress=progress,
    )
    summary = _summary(options, second, first, last)
    note = (
        f"The tiles are at most {second.selection.budget} per slide of {options.tiling.mpp:g} µm/px, chosen by a first "
        "model that has not seen the slide, cut into finer ones."
    )
    page = make_report(last)
    write_report(chosen.path / "report.html", replace(page, notes=(note, *page.notes)))
    write_json(chosen.path / STAGES, summary)
    return TwoStageResult(first, last, first.report.then(last.report), summary)


def check_two_stage(problems: Problems, inputs: Inputs, second: SecondStage) -> Checked:
    """Find what stands in the way of both stages; errors as of `run_two_stage`."""
    options, splits = inputs.options, inputs.splits
    checked = check_run(problems, inputs, second.model_dump(mode="json"))
    problems.attempt(tile_ratio, options.tiling, second.tiling)
    problems.attempt(_require_attention, options.recipe)
    if second.recipe is not None:
        problems.attempt(require_methods, second.recipe)
    if splits is not None and checked.labelled is not None:
        problems.attempt(_require_every_slide_tested, splits, checked.labelled.table)
    if second.target not in (None, options.target):
        question = replace(inputs.question(), target=second.target, splits=None)
        check_labels(problems, question, {file.slide_id for file in checked.files}, bad=checked.headers.bad)
    return checked


@dataclass(frozen=True)
class ChosenTiles:
    """The tiles that the models of the first stage choose, see `eosin.pipeline._selection.tile_selected`."""

    first: Result
    second: SecondStage

    @property
    def folder(self) -> str:
        """Name of the folder of the coordinates in a job."""
        return self.second.selection.folder(self.second.tiling)

    def write(self, slides: Sequence[SlideFile], job: JobFolder, *, workers: int, progress: Advance | None) -> Report:
        """Write the coordinates file of every slide."""
        return tile_selected(
            slides,
            job,
            self.first.crossval,
            self.second.tiling,
            selection=self.second.selection,
            features=self.first.features,
            workers=workers,
            progress=progress,
        )


def _require_attention(recipe: Recipe) -> None:
    """Refuse a model that cannot choose tiles before the hours of work that lead up to it."""
    component = recipe.aggregator
    with torch.random.fork_rng(devices=[]):
        model = AGGREGATORS.build(component.name, ANY_WIDTH, 2, options=component.options)
    if not issubclass(model.output_type, AttentionOutput):
        raise ConfigError(
            f"the first stage chooses tiles by attention, which {component.name} does not have; use another aggregator"
        )


def _require_every_slide_tested(splits: Path, table: LabelTable) -> None:
    """Refuse splits that leave slides without a first-stage model that has not seen them."""
    tested = {slide for split in read_splits(splits) for slide in split.test}
    others = [slide for slide in table.slide_ids if slide not in tested]
    if others:
        raise ConfigError(
            f"{splits}: no fold tests {shown(others)}, so every first-stage model was trained on them and cannot "
            "choose their tiles; pass splits that test every slide"
        )


def _summary(options: Pipeline, second: SecondStage, first: Result, last: Result) -> dict[str, Any]:
    stages = ((options.tiling, first), (second.tiling, last))
    return {
        "selection": second.selection.model_dump(mode="json"),
        "stages": [
            {
                "mpp": tiling.mpp,
                "patch_size": tiling.patch_size,
                "features": str(result.features.relative_to(last.job.root)),
                "out_of_fold": result.metrics["out_of_fold"],
            }
            for tiling, result in stages
        ],
    }

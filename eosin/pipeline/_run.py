"""The whole way in one call: slides → tiles → features → splits → cross-validation → heat maps → report.

Every stage is the function that its own command calls, writes into the job folder, and is skipped where its result is
there already. A slide that fails somewhere is left out of what follows and named at the end.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from eosin._batch import Outcome, run_stage
from eosin._devices import choose_device
from eosin._files import file_fingerprint, paths_of, write_json
from eosin._fingerprints import content_hash, fingerprint
from eosin._names import Ids
from eosin._records import Report
from eosin._seals import read_json
from eosin.errors import EosinError, LabelError, SlideError
from eosin.features._encoders import EncoderSpec, find_encoder, folder_name
from eosin.features._inference import require_encoder
from eosin.features._store import read_bag
from eosin.features._tissue_model import NetworkTiles, load_tissue_model
from eosin.features._weights import find_weights
from eosin.mil._checkpoint import load_card
from eosin.mil._crossval import PREDICTIONS
from eosin.mil._flow import Flow
from eosin.mil._probe import BASELINE, write_baseline
from eosin.mil._recipe import Recipe, choose_recipe, require_methods
from eosin.mil._seen import Models
from eosin.mil._splits import write_splits
from eosin.mil._study import Study, crossval_study, fit_study, open_labels, open_study
from eosin.mil._tables import Missing
from eosin.mil._train import require_fitting, settled_precision
from eosin.options import Options
from eosin.pipeline._deploy import (
    Advance,
    Encoded,
    Machine,
    ProgressBar,
    Tiler,
    encode_slides,
    no_progress,
)
from eosin.pipeline._explain import explain_slide, require_formats, require_maps
from eosin.pipeline._preflight import (
    Headers,
    Labelled,
    Need,
    Problems,
    Question,
    check_folder,
    check_headers,
    check_labels,
    check_space,
    collect_slides,
)
from eosin.pipeline._result import Earlier, Result, make_report, out_of_fold
from eosin.pipeline._studies import (
    DIGITS,
    StudyFolder,
    StudyKey,
    begin_study,
    earlier_studies,
    flat,
    place_study,
    plain_hash,
    require_name,
)
from eosin.report._page import write_report
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles
from eosin.wsi._quality import QualityLimits
from eosin.wsi._slide_file import SceneChoice, SlideFile
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
    maps : tuple of str
        Of each slide; all that the model can give unless they are named, see `eosin.heatmaps._maps`.
    """

    tiling: Tiling = Tiling()
    tissue: TissueOptions = TissueOptions()
    quality: QualityLimits = QualityLimits()
    encoder: str = "he_texture"
    recipe: Recipe = Field(default_factory=choose_recipe)
    task: str = "classification"
    target: str | None = None
    folds: int = Field(default=5, ge=2)
    formats: tuple[str, ...] = ("png", "geojson")
    maps: tuple[str, ...] = ()

    @property
    def val_fraction(self) -> float:
        """Share of the patients that selects a model; none when the recipe takes the last pass."""
        return 0.0 if self.recipe.training.select == "last" else VAL_FRACTION


@dataclass(frozen=True)
class Inputs:
    """What a run is given; attributes as the arguments of `run_pipeline`."""

    slides: Sequence[Path]
    labels: Path
    job: JobFolder
    options: Pipeline = Pipeline()  # noqa: RUF009 - frozen
    machine: Machine = Machine()  # noqa: RUF009 - frozen
    slide_mpp: float | Path | None = None
    scene: SceneChoice = None
    plane: int | None = None
    splits: Path | None = None
    missing: Missing = "error"
    ids: Ids = "ask"
    study: str | None = None
    tissue_weights: Path | None = None

    @property
    def tiles(self) -> Tiler:
        """Which tiles are taken: those with tissue, by our own rules or by a network."""
        options = self.options
        tiles = TissueTiles(options.tiling, options.tissue, options.quality)
        return tiles if self.tissue_weights is None else NetworkTiles(tiles, self.tissue_weights, self.machine.device)

    def question(self) -> Question:
        """Return what is asked of the labels."""
        options = self.options
        return Question(
            self.labels,
            options.task,
            options.target,
            missing=self.missing,
            ids=self.ids,
            splits=self.splits,
            folds=options.folds,
            val_fraction=options.val_fraction,
            seed=options.recipe.training.seed,
        )


def run_pipeline(
    slides: Path | str | Sequence[Path | str],
    labels: Path | str,
    job: JobFolder,
    options: Pipeline | None = None,
    *,
    machine: Machine | None = None,
    slide_mpp: float | Path | str | None = None,
    scene: SceneChoice = None,
    plane: int | None = None,
    splits: Path | str | None = None,
    missing: Missing = "error",
    ids: Ids = "ask",
    study: str | None = None,
    tissue_weights: Path | str | None = None,
    report: bool = True,
    problems: Problems | None = None,
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
        ``metrics.json``), ``model/`` (trained on all labelled slides, for others), ``heatmaps/`` and ``report.html``;
        of every further study, with other options or labels, below ``studies/<name>``.
    options : Pipeline, optional
    machine : Machine, optional
    slide_mpp, scene, plane : optional
        As of `eosin.wsi._slide_file.find_slides`.
    splits : Path, optional
        Splits to use instead of new ones, in any layout that `eosin.mil._study.Study.splits` reads.
    missing : {"error", "few", "drop"}
        What becomes of a label whose slide is not among the slides, and of a slide without a label, see
        `eosin.mil._study.open_study`.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, see `eosin._names.unify`.
    study : str, optional
        Name of the study, see `eosin.pipeline._studies.place_study`.
    tissue_weights : Path, optional
        Weights of a network that finds the tissue, see `eosin.features._tissue_model`.
    report : bool
        Whether ``report.html`` is written; a caller that writes another one from the result says no.
    problems : Problems, optional
        What the caller has found already; it is raised together with what is found here.
    progress : callable, optional

    Returns
    -------
    Result

    Raises
    ------
    SeveralErrors
        If several of the following hold, all of them.
    ConfigError
        If slides, encoder, its weights, device or recipe do not exist, or most slides cannot be opened.
    LabelError
        If the table cannot be used, names slides that are not there, or too few slides remain.
    OutputError
        If the environment stops the run; what is finished stays.
    """
    labels = Path(labels)
    splits = None if splits is None else Path(splits)
    slides, slide_mpp = paths_of(slides), Path(slide_mpp) if isinstance(slide_mpp, str) else slide_mpp
    inputs = Inputs(
        slides,
        labels,
        job,
        options or Pipeline(),
        machine or Machine(),
        slide_mpp,
        scene,
        plane,
        splits,
        missing,
        ids,
        study,
        None if tissue_weights is None else Path(tissue_weights),
    )
    return run_inputs(inputs, report=report, problems=problems, progress=progress)


def run_inputs(
    inputs: Inputs, *, report: bool = True, problems: Problems | None = None, progress: ProgressBar | None = None
) -> Result:
    """Do what `run_pipeline` does, with its arguments in one object."""
    problems = problems or Problems()
    checked = check_run(problems, inputs)
    chosen = checked.begin(problems, inputs.study)
    return run_checked(
        inputs,
        checked.files,
        chosen.tiles,
        chosen.path,
        report=report,
        earlier=earlier_studies(chosen),
        progress=progress,
    )


def run_checked(
    inputs: Inputs,
    files: Sequence[SlideFile],
    job: JobFolder,
    out: Path,
    *,
    tiles: Tiler | None = None,
    report: bool = True,
    earlier: Sequence[Earlier] = (),
    progress: ProgressBar | None = None,
) -> Result:
    """Do what `run_pipeline` does once nothing stands in the way.

    Parameters
    ----------
    inputs : Inputs
    files : sequence of SlideFile
        The slides, in place of those that the inputs name.
    job : JobFolder
        Receives tiles and features.
    out : Path
        Receives the results.
    tiles : Tiler, optional
        Takes the place of the tiles with tissue.
    report, progress
        As of `run_pipeline`.
    earlier : sequence of Earlier
        Studies that the report names.
    """
    options, machine, progress = inputs.options, inputs.machine, progress or no_progress
    encoded = encode_slides(files, job, tiles or inputs.tiles, options.encoder, machine=machine, progress=progress)
    study = _open_study(inputs, files, encoded)
    parts = study.splits(
        inputs.splits, folds=options.folds, val_fraction=options.val_fraction, seed=options.recipe.training.seed
    )
    write_splits(out / "splits", parts, study.cohort)
    device, precision = machine.device, settled_precision("auto", machine.device, out)
    with progress("cross-validate", len(parts)) as advance:
        metrics = crossval_study(
            study,
            options.recipe,
            out / "crossval",
            splits=parts,
            device=device,
            precision=precision,
            progress=advance,
        )
    write_baseline(study, parts, out / "crossval" / BASELINE)
    with progress("train", options.recipe.training.epochs) as advance:
        fit_study(study, options.recipe, out / "model", device=device, precision=precision, progress=advance)
    result = Result(
        job=job,
        out=out,
        features=encoded.folder,
        splits=out / "splits",
        crossval=out / "crossval",
        model=out / "model",
        heatmaps=out / "heatmaps",
        predictions=out_of_fold(out / "crossval" / PREDICTIONS),
        metrics=metrics,
        task=study.task,
        slides={file.slide_id: file for file in files},
        report=encoded.report,
        left_out=tuple(slide for slide in study.table.slide_ids if slide in study.left_out),
        flow=study.account(parts),
        earlier=tuple(earlier),
    )
    with progress("heat maps", len(result.predictions)) as advance:
        drawn = draw_maps(result, options.formats, advance, maps=options.maps)
    result = replace(result, report=encoded.report.then(drawn))
    if report:
        write_report(out / "report.html", make_report(result))
    return result


@dataclass(frozen=True, eq=False)
class Checked:
    """What is known of a run before any work.

    Attributes
    ----------
    files : list of SlideFile
    headers : Headers
    labelled : Labelled, optional
        None where something is wrong with the labels.
    space : str
        How much will be written, and how much is free.
    study : StudyFolder, optional
        Where results go; None where something is wrong.
    """

    files: list[SlideFile]
    headers: Headers
    labelled: Labelled | None
    space: str
    study: StudyFolder | None = None

    def lines(self) -> Iterator[str]:
        """Return a short summary for a person."""
        yield f"slides: {self.headers.in_words()}"
        if self.labelled is not None:
            yield f"labels: {self.labelled.in_words()}"
            yield f"splits: {self.labelled.n_splits}"
        yield f"disk: {self.space}"
        if self.study is not None:
            resumed = ", which has begun" if self.study.begun else ""
            yield f"study: {self.study.name}{resumed}, in {self.study.path}"

    def begin(self, problems: Problems, name: str | None = None) -> StudyFolder:
        """Raise the problems; without any, begin the study, which has this name if one was given."""
        problems.require()
        assert self.study is not None  # whatever leaves it out is a problem
        assert self.study.key is not None
        return begin_study(self.study.job, self.study.key, name)


def check_run(problems: Problems, inputs: Inputs, second: Mapping[str, Any] | None = None) -> Checked:
    """Find what stands in the way of a run, in seconds and without writing anything.

    Every problem is added to `problems`, whose `require` raises them. `second` are the options of a second stage, which
    are a part of the study's key.
    """
    options, machine, job = inputs.options, inputs.machine, inputs.job
    files = collect_slides(problems, inputs.slides, inputs.slide_mpp, inputs.scene, inputs.plane)
    headers = check_headers(problems, files, machine.workers)
    labelled = check_labels(problems, inputs.question(), {file.slide_id for file in files}, bad=headers.bad)
    encoder = check_options(problems, options, job.root, machine)
    if inputs.tissue_weights is not None:
        problems.attempt(load_tissue_model, inputs.tissue_weights, choose_device("cpu"))
    if labelled is not None:
        problems.attempt(require_fitting, options.recipe.training, labelled.task)
    place = None
    problems.attempt(require_name, inputs.study)
    if labelled is not None:
        key = problems.attempt(
            study_key,
            options,
            labelled,
            machine,
            slide_mpp=inputs.slide_mpp,
            picture=(inputs.scene, inputs.plane),
            splits=inputs.splits,
            second=second,
            tissue_weights=inputs.tissue_weights,
        )
        place = None if key is None else problems.attempt(place_study, job, key, inputs.study)
    tiles, space = job if place is None else place.tiles, ""
    if encoder is not None:
        width = 4 if machine.precision == "fp32" else 2
        need = Need(tiles, options.tiling, options.tiling.folder, folder_name(encoder.name), encoder.dim, width)
        space = problems.attempt(check_space, job.root, need.bytes(files, headers)) or ""
    return Checked(files, headers, labelled, space, place)


def study_key(
    options: Pipeline,
    labelled: Labelled,
    machine: Machine,
    *,
    slide_mpp: float | Path | None = None,
    picture: tuple[SceneChoice, int | None] = (None, None),
    splits: Path | None = None,
    second: Mapping[str, Any] | None = None,
    tissue_weights: Path | None = None,
) -> StudyKey:
    """Return what decides the results of a study."""
    plain = options.model_dump(mode="json", exclude={"formats", "maps"})
    if tissue_weights is not None:  # without a network the key stays as it was
        plain["tissue"] = {**plain["tissue"], "network": file_fingerprint(find_weights(tissue_weights))}
    chosen = plain if second is None else {**plain, "second": dict(second)}
    rows, given = labelled.hash_rows(), None if splits is None else _hash_splits(splits)
    mpp: object = content_hash(slide_mpp) if isinstance(slide_mpp, Path) else slide_mpp
    if picture != (None, None):  # a study without a choice keeps the key that it had before there was one
        mpp = [mpp, *picture]
    weights = None if machine.weights is None else file_fingerprint(find_weights(machine.weights))
    encoder = [weights, machine.precision]
    whole = fingerprint("study", options=chosen, labels=rows, splits=given, slide_mpp=mpp, encoder=encoder)
    cut = [plain["tiling"], plain["tissue"], plain["quality"], mpp, whole if second is not None else None]
    shown = {
        **flat(chosen),
        "labels": f"{len(labelled.table)} slides ({rows[:DIGITS]})",
        "splits": given,
        "slide_mpp": mpp,
        "weights": weights,
        "precision": machine.precision,
    }
    return StudyKey(whole, shown, plain_hash(cut), plain_hash(encoder), find_encoder(options.encoder).name)


def _hash_splits(path: Path) -> str:
    """Return a hash of the file of splits, or of all files in their folder."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return plain_hash([[one.relative_to(path).as_posix(), content_hash(one)] for one in files])


def check_options(problems: Problems, options: Pipeline, folder: Path, machine: Machine) -> EncoderSpec | None:
    """Find what stands in the way whatever the slides are; return the encoder if there is such a one."""
    encoder = problems.attempt(require_encoder, options.encoder, weights=machine.weights, precision=machine.precision)
    problems.attempt(require_methods, options.recipe)
    problems.attempt(require_formats, options.formats)
    problems.attempt(require_maps, options.maps)
    problems.attempt(choose_device, machine.device)
    problems.attempt(check_folder, folder)
    return encoder or Problems().attempt(find_encoder, options.encoder)


def _open_study(inputs: Inputs, files: Sequence[SlideFile], encoded: Encoded) -> Study:
    """Join the labels with the features of the slides that did not fail."""
    labels, ids, options = inputs.labels, inputs.ids, inputs.options
    found = [file.slide_id for file in files]
    flow = Flow.of(found).joined(open_labels(labels, ids=ids, among=found).named_as(found, ids).slide_ids)
    flow = flow.keep("found", found, "has no slide file")
    flow = encoded.account(flow)
    if not encoded.files:
        raise LabelError("no slide has features; run.json in the job folder says why for each slide")
    return open_study(
        encoded.files, labels, task=options.task, target=options.target, missing="drop", ids=ids, flow=flow
    )


def draw_maps(
    result: Result, formats: Sequence[str], advance: Advance | None = None, *, maps: Sequence[str] = ()
) -> Report:
    """Draw every tested slide's heat map by the model that has not seen it, into ``heatmaps/``.

    Parameters
    ----------
    result : Result
    formats : sequence of str
        Among `eosin.pipeline._explain.FORMATS`.
    advance : callable, optional
        Called with the record of each slide.
    maps : sequence of str
        Among `eosin.heatmaps._maps.ATTRIBUTIONS`; none: all that the model can give.
    """
    items = [
        Drawing(
            result.slides[slide],
            result.feature_file(slide),
            result.fold_model(slide),
            result.heatmaps,
            tuple(formats),
            tuple(maps) or None,
        )
        for slide in result.predictions["slide_id"]
    ]
    return run_stage(DrawStage(), items, run_json=JobFolder(result.out).run_json, progress=advance)


@dataclass(frozen=True)
class Drawing:
    """The heat map of one slide: what it is made from, and the folder of its files; `maps` as of `explain_slide`."""

    slide: SlideFile
    features: Path
    model: Path
    folder: Path
    formats: tuple[str, ...]
    maps: tuple[str, ...] | None = None

    @property
    def note(self) -> Path:
        """The file that says what the others were made from."""
        return self.folder / f"{self.slide.slide_id}.json"

    def origin(self, files: Iterable[Path]) -> dict[str, Any]:
        """Return what the map is made from, and hashes of its files."""
        cards = [load_card(folder) for folder in Models.open([self.model]).folders]
        made_from = fingerprint(
            "map",
            model=cards[0] if len(cards) == 1 else cards,
            features=file_fingerprint(self.features),
            slide=self.slide.version(),
            slide_mpp=self.slide.reading,
            formats=[*self.formats, *(self.maps or ())],
        )
        return {"fingerprint": made_from, "files": {path.name: content_hash(path) for path in files}}


@dataclass(frozen=True)
class DrawStage:
    """Heat maps as a `eosin._batch.Stage`."""

    name: ClassVar[str] = "heatmap"

    def key(self, item: Drawing) -> str:
        """Return the id of a slide."""
        return item.slide.slide_id

    def output(self, item: Drawing) -> Path:
        """Return the file that is written last."""
        return item.note

    def is_done(self, item: Drawing) -> bool:
        """Tell whether the map was drawn from the same model, features and slide."""
        try:
            note = read_json(item.note)
            return bool(note == item.origin(item.folder / name for name in note["files"]))
        except (OSError, ValueError, LookupError, TypeError, EosinError):
            return False

    def do(self, item: Drawing) -> Outcome:
        """Draw one map."""
        bag = read_bag(item.features)
        try:
            files = explain_slide(item.model, item.slide, bag, item.folder, formats=item.formats, maps=item.maps)
        except SlideError as error:
            if error.code == "empty":
                return Outcome("empty", error.detail)
            raise
        write_json(item.note, item.origin(files))
        return Outcome()

    def files(self, item: Drawing) -> list[Path]:
        """Return the files of a map; none where it was not drawn."""
        try:
            return [item.folder / name for name in read_json(item.note)["files"]]
        except (OSError, ValueError, LookupError, TypeError):
            return []

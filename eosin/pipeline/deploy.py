"""From slides to the features that a model reads, and from there to its predictions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from eosin.batch import Record, Report
from eosin.errors import ConfigError
from eosin.features.bag import FeatureSpec
from eosin.features.encoders import Precision, folder_name
from eosin.features.extract import extract
from eosin.mil.checkpoint import load_card
from eosin.mil.predict import predict
from eosin.wsi.grid import Tiling
from eosin.wsi.job import JobFolder, tile_slides
from eosin.wsi.slide import SlideFile, find_slides

ProgressBar = Callable[[str, int | None], AbstractContextManager[Callable[[object], None] | None]]
"""Given the name of a stage and its number of slides; its context is called with each finished item."""


@dataclass(frozen=True)
class Machine:
    """How the work is done; changes nothing of the results.

    Attributes
    ----------
    workers : int
        Processes that read slides; 0 reads in this one.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    batch_size : int
        Tiles that are encoded at once.
    precision : str
        Of the encoder.
    weights : Path, optional
        Local weights of the encoder.
    """

    workers: int = 0
    device: str = "auto"
    batch_size: int = 64
    precision: Precision = "fp32"
    weights: Path | None = None


def no_progress(_stage: str, _total: int | None) -> AbstractContextManager[None]:
    """Show nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Encoded:
    """Where the feature file of each slide is that has one, and what became of the slides on the way there."""

    files: Mapping[str, Path]
    report: Report


def encode_like(
    spec: FeatureSpec,
    slides: Sequence[SlideFile],
    job: JobFolder,
    *,
    machine: Machine | None = None,
    progress: ProgressBar = no_progress,
) -> Encoded:
    """Tile and encode slides as a model's features were made; what is done already in the job is kept.

    Raises
    ------
    ConfigError
        If the model was not trained on features of tiles.
    OutputError
        If the environment stops the run; what is finished stays.
    """
    if spec.mpp is None or spec.patch_size is None:
        raise ConfigError(f"the model was not trained on slide tiles (encoder {spec.encoder}); pass --features FOLDER")
    means, tiling = machine or Machine(), Tiling(mpp=spec.mpp, patch_size=spec.patch_size)
    with progress("tile", len(slides)) as advance:
        tiled = tile_slides(slides, job, tiling, workers=means.workers, progress=advance)
    failed = {record.slide_id for record in tiled.failed}
    rest = [slide for slide in slides if slide.slide_id not in failed]
    with progress("extract", len(rest)) as advance:
        encoded = extract(
            rest,
            job,
            spec.encoder,
            weights=means.weights,
            batch_size=means.batch_size,
            precision=means.precision,
            device=means.device,
            tiling=tiling.folder,
            workers=means.workers,
            progress=advance,
        )
    folder = job.features_dir(tiling.folder, folder_name(spec.encoder))
    report = worst([tiled, encoded])
    lost = {record.slide_id for record in report.failed}
    return Encoded({s.slide_id: folder / f"{s.slide_id}.h5" for s in slides if s.slide_id not in lost}, report)


def predict_slides(
    models: Sequence[Path],
    slides: Sequence[Path],
    job: JobFolder,
    out: Path,
    *,
    patient_of: Mapping[str, str] | None = None,
    slide_mpp: float | Path | None = None,
    machine: Machine | None = None,
    progress: ProgressBar = no_progress,
) -> Report:
    """Predict slides from their pixels: tiled and encoded as the first model's features were, then predicted.

    Parameters
    ----------
    models : sequence of Path
        Model folders.
    slides : sequence of Path
        Slides, and folders that are searched.
    job : JobFolder
        Receives tiles and features; what is there already is used.
    out : Path
        The table, see `eosin.mil.predict.predict`; a slide that could not be tiled or encoded has a row that says why.
    patient_of : mapping of str to str, optional
        Patient of each slide, for a second table.
    slide_mpp : float or Path, optional
        As of `eosin.wsi.slide.find_slides`.
    machine : Machine, optional
    progress : callable, optional

    Returns
    -------
    Report
        Each slide's first failure, else its last record.

    Raises
    ------
    ConfigError
        If slides or models do not exist or do not fit together.
    OutputError
        If the environment stops the run; what is finished stays.
    """
    means = machine or Machine()
    found = find_slides(slides, slide_mpp=slide_mpp)
    encoded = encode_like(load_card(models[0]).features, found, job, machine=means, progress=progress)
    with progress("predict", len(encoded.files)) as advance:
        failures = encoded.report.failed
        predicted = predict(
            models,
            encoded.files,
            out,
            failures=failures,
            patient_of=patient_of,
            device=means.device,
            progress=advance,
        )
    return worst([encoded.report, predicted])


def worst(reports: Sequence[Report]) -> Report:
    """Return one report over several stages: for each slide its first failure, else its last record."""
    records: dict[str, Record] = {}
    for report in reports:
        for record in report.records:
            if record.slide_id not in records or records[record.slide_id].status != "failed":
                records[record.slide_id] = record
    return Report(tuple(records.values()))

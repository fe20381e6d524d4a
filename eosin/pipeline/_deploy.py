"""From slides to the features that a model reads, and from there to its predictions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from eosin._files import paths_of
from eosin._names import Ids
from eosin._records import Report
from eosin.errors import ConfigError
from eosin.features._bag import FeatureSpec
from eosin.features._encoders import Precision, find_encoder, folder_name
from eosin.features._extract import extract
from eosin.features._tissue_model import NetworkTiles
from eosin.mil._checkpoint import load_card
from eosin.mil._flow import Flow
from eosin.mil._predict import Predictions, predict
from eosin.mil._seen import Models
from eosin.mil._tables import LabelTable
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles
from eosin.wsi._slide_file import SceneChoice, SlideFile, find_slides

Advance = Callable[[object], None]
ProgressBar = Callable[[str, int | None], AbstractContextManager[Advance | None]]
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


class Tiler(Protocol):
    """Decides which tiles of slides are encoded."""

    @property
    def folder(self) -> str:
        """Name of the folder of the coordinates in a job."""

    def write(self, slides: Sequence[SlideFile], job: JobFolder, *, workers: int, progress: Advance | None) -> Report:
        """Write the coordinates file of every slide; `progress` is called after each."""


def tiles_like(spec: FeatureSpec) -> TissueTiles:
    """Return the tiles that a model's features were made of; `ConfigError` when it was not trained on tiles."""
    if spec.mpp is None or spec.patch_size is None:
        raise ConfigError(
            f"this model was not trained on slide tiles (encoder {spec.encoder}), so slides cannot be encoded for "
            "it; pass --features FOLDER"
        )
    return TissueTiles(Tiling(mpp=spec.mpp, patch_size=spec.patch_size))


@dataclass(frozen=True)
class Encoded:
    """The features of a batch of slides.

    Attributes
    ----------
    folder : Path
        Where the feature files are.
    files : mapping of str to Path
        The file of each slide that has not failed.
    tiled, extracted : Report
        What became of each slide in the two stages.
    """

    folder: Path
    files: Mapping[str, Path]
    tiled: Report
    extracted: Report

    @property
    def report(self) -> Report:
        """What became of each slide."""
        return self.tiled.then(self.extracted)

    def account(self, flow: Flow) -> Flow:
        """Return the account of a cohort after both stages."""
        reasons = [
            {record.slide_id: record.reason for record in stage.failed} for stage in (self.tiled, self.extracted)
        ]
        return flow.lose("readable", reasons[0]).lose("features", reasons[1])


def encode_slides(
    slides: Sequence[SlideFile],
    job: JobFolder,
    tiles: Tiler,
    encoder: str,
    *,
    machine: Machine,
    progress: ProgressBar = no_progress,
) -> Encoded:
    """Tile and encode slides; what is done already in the job is kept.

    Parameters
    ----------
    slides : sequence of SlideFile
    job : JobFolder
        Tiles and features are written here.
    tiles : Tiler
        Makes the coordinates files.
    encoder : str
        Name of the encoder.
    machine : Machine
        Device, workers, batch size and precision.
    progress : callable
        Makes the progress bar of each stage.

    Returns
    -------
    Encoded
        The folder of features, and a record for each slide.

    Raises
    ------
    OutputError
        If the environment stops the run; what is finished stays.
    """
    name = folder_name(find_encoder(encoder).name)
    with progress("tile", len(slides)) as advance:
        tiled = tiles.write(slides, job, workers=machine.workers, progress=advance)
    failed = {record.slide_id for record in tiled.failed}
    rest = [slide for slide in slides if slide.slide_id not in failed]
    with progress("extract", len(rest)) as advance:
        extracted = extract(
            rest,
            job,
            encoder,
            weights=machine.weights,
            batch_size=machine.batch_size,
            precision=machine.precision,
            device=machine.device,
            tiling=tiles.folder,
            workers=machine.workers,
            progress=advance,
        )
    lost = failed | {record.slide_id for record in extracted.failed}
    files = {s.slide_id: job.features(tiles.folder, name, s.slide_id) for s in slides if s.slide_id not in lost}
    return Encoded(job.features_dir(tiles.folder, name), files, tiled, extracted)


def predict_slides(
    models: Path | str | Sequence[Path | str],
    slides: Path | str | Sequence[Path | str],
    job: JobFolder,
    out: Path | str,
    *,
    patient_of: Mapping[str, str] | None = None,
    labels: LabelTable | None = None,
    ids: Ids = "ask",
    slide_mpp: float | Path | str | None = None,
    scene: SceneChoice = None,
    plane: int | None = None,
    tissue_weights: Path | str | None = None,
    machine: Machine | None = None,
    progress: ProgressBar = no_progress,
) -> Predictions:
    """Predict slides from their pixels: tiled and encoded as the first model's features were, then predicted.

    Parameters
    ----------
    models : sequence of Path
        Model folders and cross-validations.
    slides : sequence of Path
        Slides, and folders that are searched.
    job : JobFolder
        Receives tiles and features; what is there already is used.
    out : Path
        The table, see `eosin.mil._predict.predict`; a slide that could not be tiled or encoded has a row that says why.
    patient_of : mapping of str to str, optional
        Patient of each slide, for a second table.
    labels : LabelTable, optional
        As of `eosin.mil._predict.predict`.
    ids : {"ask", "merge", "exact"}
        As of `eosin.mil._predict.predict`.
    slide_mpp, scene, plane : optional
        As of `eosin.wsi._slide_file.find_slides`.
    tissue_weights : Path, optional
        Weights of a network that finds the tissue, see `eosin.features._tissue_model`.
    machine : Machine, optional
    progress : callable, optional

    Returns
    -------
    Predictions
        Each slide's first failure, else its last record.

    Raises
    ------
    ConfigError
        If slides or models do not exist or do not fit together.
    OutputError
        If the environment stops the run; what is finished stays.
    """
    out = Path(out)
    machine, spec = machine or Machine(), load_card(Models.open(paths_of(models)).folders[0]).features
    found = find_slides(slides, slide_mpp=slide_mpp, scene=scene, plane=plane)
    tiles: Tiler = tiles_like(spec)
    if tissue_weights is not None:
        tiles = NetworkTiles(tiles_like(spec), Path(tissue_weights), machine.device)
    encoded = encode_slides(found, job, tiles, spec.encoder, machine=machine, progress=progress)
    with progress("predict", len(encoded.files)) as advance:
        predicted = predict(
            models,
            encoded.files,
            out,
            failures=encoded.report.failed,
            patient_of=patient_of,
            labels=labels,
            ids=ids,
            device=machine.device,
            progress=advance,
        )
    return replace(predicted, records=encoded.report.then(predicted).records)

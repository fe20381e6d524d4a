"""Features for slides that are shown to a finished model: tiled and encoded as the model was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eosin.cli._common import progress
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin.batch import Record, Report
    from eosin.features.bag import FeatureSpec
    from eosin.wsi.slide import SlideFile


@dataclass(frozen=True)
class Encoded:
    """Where the feature file of each slide is, and what became of the slides on the way there."""

    files: dict[str, Path]
    report: "Report"


def encode_like(
    spec: "FeatureSpec",
    slides: "Sequence[SlideFile]",
    job: Path,
    *,
    weights: Path | None,
    workers: int,
    device: str,
) -> Encoded:
    """Tile and encode slides as a model's features were made; what is done already in the job is kept.

    Raises
    ------
    ConfigError
        If the model was not trained on features of tiles.
    """
    from eosin.features.encoders import folder_name
    from eosin.features.extract import extract
    from eosin.wsi.grid import Tiling
    from eosin.wsi.job import JobFolder, tile_slides

    if spec.mpp is None or spec.patch_size is None:
        raise ConfigError(f"the model was trained on {spec.encoder}, which are no tiles of slides; pass --features")
    folder, tiling = JobFolder(job), Tiling(mpp=spec.mpp, patch_size=spec.patch_size)
    with progress("tile", len(slides)) as advance:
        tiled = tile_slides(slides, folder, tiling, workers=workers, progress=advance)
    failed = {record.slide_id for record in tiled.failed}
    rest = [slide for slide in slides if slide.slide_id not in failed]
    with progress("extract", len(rest)) as advance:
        encoded = extract(
            rest,
            folder,
            spec.encoder,
            weights=weights,
            device=device,
            tiling=tiling.folder,
            workers=workers,
            progress=advance,
        )
    features = folder.features_dir(tiling.folder, folder_name(spec.encoder))
    return Encoded({slide.slide_id: features / f"{slide.slide_id}.h5" for slide in slides}, worst([tiled, encoded]))


def worst(reports: "Sequence[Report]") -> "Report":
    """Return one report over several stages: for each slide its first failure, else its last record."""
    from eosin.batch import Report

    records: dict[str, Record] = {}
    for report in reports:
        for record in report.records:
            if record.slide_id not in records or records[record.slide_id].status != "failed":
                records[record.slide_id] = record
    return Report(tuple(records.values()))

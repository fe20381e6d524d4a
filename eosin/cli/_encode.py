"""Features for slides that are shown to a finished model, with a progress bar for a person."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eosin.cli._common import progress

if TYPE_CHECKING:
    from eosin.batch import Report
    from eosin.features.bag import FeatureSpec
    from eosin.pipeline.deploy import Encoded
    from eosin.wsi.slide import SlideFile


def encode_like(
    spec: "FeatureSpec",
    slides: "Sequence[SlideFile]",
    job: Path,
    *,
    weights: Path | None,
    workers: int,
    device: str,
) -> "Encoded":
    """Tile and encode slides as a model's features were made; see `eosin.pipeline.deploy.encode_like`."""
    from eosin.pipeline.deploy import Machine
    from eosin.pipeline.deploy import encode_like as encode
    from eosin.wsi.job import JobFolder

    machine = Machine(workers=workers, device=device, weights=weights)
    return encode(spec, slides, JobFolder(job), machine=machine, progress=progress)


def worst(reports: "Sequence[Report]") -> "Report":
    """Return one report over several stages; see `eosin.pipeline.deploy.worst`."""
    from eosin.pipeline.deploy import worst as worst_of

    return worst_of(reports)

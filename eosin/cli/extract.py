"""`eosin extract`: tiles → features."""

from typing import Annotated

import typer

from eosin.cli._arguments import (
    BatchSize,
    Device,
    EncoderName,
    Job,
    Precision,
    Shard,
    SlideMpp,
    Slides,
    Weights,
    shard_numbers,
    slide_mpp_source,
)
from eosin.cli._common import Done, command, progress


@command()
def extract(
    slides: Slides,
    *,
    job: Job,
    encoder: EncoderName,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    precision: Precision = "fp32",
    device: Device = "auto",
    tiling: Annotated[
        str | None, typer.Option(help="Which tiling, when the job has several: 0.5mpp_256px_0px_overlap.")
    ] = None,
    slide_mpp: SlideMpp = None,
    shard: Shard = "0/1",
) -> Done:
    """Encode the tiles of slides that `eosin tile` has cut."""
    from eosin.features.extract import extract as extract_features
    from eosin.wsi.job import JobFolder
    from eosin.wsi.slide import find_slides

    files = find_slides(slides, slide_mpp=slide_mpp_source(slide_mpp))
    folder = JobFolder(job)
    with progress("extract", len(files)) as advance:
        report = extract_features(
            files,
            folder,
            encoder,
            weights=weights,
            batch_size=batch_size,
            precision=precision,
            device=device,
            tiling=tiling,
            shard=shard_numbers(shard),
            progress=advance,
        )
    return Done([job], report)

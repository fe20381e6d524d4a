"""`eosin extract`: tiles → features."""

from typing import TYPE_CHECKING, Annotated, cast

import typer

from eosin.cli._arguments import (
    BatchSize,
    Device,
    EncoderName,
    Job,
    Plane,
    Precision,
    Scene,
    Shard,
    SlideMpp,
    Slides,
    Weights,
    Workers,
    scene_number,
    shard_numbers,
    slide_mpp_source,
)
from eosin.cli._common import Done, command
from eosin.cli._progress import progress

if TYPE_CHECKING:
    from eosin.features._encoders import Precision as PrecisionName


@command(rare=("precision", "compiled", "tiling", "slide_mpp", "scene", "plane", "shard"), bare="slides", cluster="job")
def extract(
    *,
    slides: Slides,
    job: Job,
    encoder: EncoderName,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    precision: Precision = "fp32",
    device: Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="LIST|N|all", help="Several devices, one process each: cuda:0,cuda:1, a number of GPUs, or all."
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Speed up the network with torch.compile; the first batch takes about a minute."
        ),
    ] = False,
    tiling: Annotated[
        str | None,
        typer.Option(help="Tiling folder to use, if the job has several, for example 0.5mpp_256px_0px_overlap."),
    ] = None,
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
    workers: Workers = 1,
    shard: Shard = "0/1",
) -> Done:
    """Compute the features of the tiles that `eosin tile` has cut."""
    from eosin._devices import parse_devices
    from eosin.features._encoders import find_encoder, folder_name
    from eosin.features._extract import extract as extract_features
    from eosin.wsi._job import JobFolder
    from eosin.wsi._slide_file import find_slides

    files = find_slides(slides, slide_mpp=slide_mpp_source(slide_mpp), scene=scene_number(scene), plane=plane)
    folder, (index, count) = JobFolder(job), shard_numbers(shard)
    with progress("extract", len(files[index::count])) as advance:
        report = extract_features(
            files,
            folder,
            encoder,
            weights=weights,
            batch_size=batch_size,
            precision=cast("PrecisionName", precision),
            device=device,
            devices=parse_devices(devices) if devices else (),
            compiled=compiled,
            tiling=tiling,
            shard=(index, count),
            workers=workers,
            progress=advance,
        )
    name = folder_name(find_encoder(encoder).name)
    return Done([folder.features_dir(tiling or folder.tilings()[0], name)], report)

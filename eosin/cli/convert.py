"""`eosin convert`: another tool's trained aggregator → a model folder of ours."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Run
from eosin.cli._common import Done, command


@command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint file with a state dict of CLAM, ACMIL, DSMIL, TransMIL, MIL-Lab ...")
    ],
    *,
    out: Run,
    encoder: Annotated[str, typer.Option(help="Tile encoder of the features that the model was trained on.")],
    mpp: Annotated[float, typer.Option(help="µm per pixel of the tiles it was trained on.")],
    patch_size: Annotated[int, typer.Option(help="Side of those tiles in pixels.")],
    classes: Annotated[
        str, typer.Option(help="Class names in the order of the model's outputs, for example normal,tumour.")
    ],
    dim: Annotated[
        int | None,
        typer.Option(help="Number of features per tile, for an encoder that `eosin encoders` does not list."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a file with missing layers; they get random, untrained weights.")
    ] = False,
) -> Done:
    """Convert another tool's checkpoint to a model folder for `eosin predict` and `eosin heatmap`.

    Code inside the checkpoint is never executed.
    """
    from eosin.features._bag import FeatureSpec
    from eosin.features._encoders import find_encoder
    from eosin.mil._convert import convert_checkpoint

    known = None if dim is not None else find_encoder(encoder)
    name, width = (encoder, dim) if known is None else (known.name, known.dim)
    facts = {"encoder": name, "dim": width, "mpp": mpp, "patch_size": patch_size}
    spec = FeatureSpec.parse(facts, source="convert")
    names = [part.strip() for part in classes.split(",")]
    convert_checkpoint(checkpoint, out, features=spec, classes=names, partial=partial)
    return Done([out])

"""`eosin convert`: another tool's trained aggregator → a model folder of ours."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Run
from eosin.cli._common import Done, command


@command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="State dictionary of CLAM, ACMIL, DSMIL, TransMIL, MIL-Lab ...")],
    *,
    out: Run,
    encoder: Annotated[str, typer.Option(help="Encoder of the features that it was trained on.")],
    mpp: Annotated[float, typer.Option(help="µm per pixel of their tiles.")],
    patch_size: Annotated[int, typer.Option(help="Side of their tiles in pixels.")],
    classes: Annotated[str, typer.Option(help="Names of the classes in the order of the outputs: normal,tumour.")],
    dim: Annotated[int | None, typer.Option(help="Width of the features, for an encoder that eosin lacks.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Fill layers that the file lacks with fresh, untrained ones.")
    ] = False,
) -> Done:
    """Turn a checkpoint into a model that `eosin predict` and `eosin heatmap` take; pickled code never runs."""
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

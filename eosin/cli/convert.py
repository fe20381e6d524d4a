"""`eosin convert`: another tool's trained aggregator → a model folder of ours."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Run
from eosin.cli._common import Done, command
from eosin.errors import ConfigError


@command(rare=("activation", "dim", "partial"))
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
        str | None, typer.Option(help="Class names in the order of the model's outputs, for example normal,tumour.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What the model predicts: classification, binary, multilabel or cox.")
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="softmax|sigmoid|risk[:INDEX]",
            help="What the outputs mean: classes that exclude each other, a yes or no each, or a hazard.",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(metavar="relu|gelu|none", help="Of the first layer; the same as --option embed_activation=..."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option that the file does not show, for example heads=8."),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Number of features per tile, for an encoder that `eosin encoders` does not list."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a file with missing layers; they get random, untrained weights.")
    ] = False,
) -> Done:
    """Convert another tool's checkpoint to a model folder for `eosin predict` and `eosin heatmap`.

    Code inside the checkpoint is never executed. What the file does not say is asked for: the command then stops and
    names the choices.
    """
    from eosin.features._bag import FeatureSpec
    from eosin.features._encoders import find_encoder
    from eosin.mil._convert import convert_checkpoint

    known = None if dim is not None else find_encoder(encoder)
    name, width = (encoder, dim) if known is None else (known.name, known.dim)
    facts = {"encoder": name, "dim": width, "mpp": mpp, "patch_size": patch_size}
    convert_checkpoint(
        checkpoint,
        out,
        features=FeatureSpec.parse(facts, source="convert"),
        classes=[part.strip() for part in classes.split(",")] if classes else [],
        task=task,
        outputs=outputs,
        options=_stated(option or [], activation),
        partial=partial,
    )
    return Done([out])


def _stated(assignments: list[str], activation: str | None) -> dict[str, str]:
    stated = {} if activation is None else {"embed_activation": activation}
    for assignment in assignments:
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not (name and equals and value) or stated.get(name, value) != value:
            raise ConfigError(f"--option {assignment}: expected NAME=VALUE, each name once (embed_activation=gelu)")
        stated[name] = value
    return stated

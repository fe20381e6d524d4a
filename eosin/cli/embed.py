"""`eosin embed`: features of tiles → one vector per slide or per patient."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from eosin.cli._arguments import Device, FeaturesFolder, IdsPolicy, Weights
from eosin.cli._common import Done, command
from eosin.cli._progress import progress

if TYPE_CHECKING:
    from eosin.pipeline._embed import Per


@command(rare=("ids", "weights"), cluster="features")
def embed(
    *,
    features: FeaturesFolder,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the vectors.", show_default="slide_features_ENCODER beside the features"),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="mean, max, mean_sd, or a slide encoder; `eosin encoders` lists the names.")
    ] = "mean",
    model: Annotated[
        Path | None, typer.Option(help="Model folder; the vector is what its classifier reads. Replaces --encoder.")
    ] = None,
    per: Annotated[str, typer.Option(help="One vector per slide, or per patient (all slides together).")] = "slide",
    patients: Annotated[
        Path | None, typer.Option(metavar="TABLE", help="Table with the columns slide and patient, for --per patient.")
    ] = None,
    weights: Weights = None,
    allow_remote_code: Annotated[
        bool,
        typer.Option(
            "--allow-remote-code", help="Run the authors' code of this slide encoder with your rights; read it first."
        ),
    ] = False,
    ids: IdsPolicy = "ask",
    device: Device = "auto",
) -> Done:
    """Make one vector per slide or per patient from the features of its tiles.

    A vector is a feature file with one row: `eosin probe`, `eosin crossval` and `eosin predict` read it.
    """
    from eosin.cli._study import ids_policy
    from eosin.features._store import find_bags
    from eosin.mil._patients import read_patients
    from eosin.pipeline._embed import embed_slides

    patient_of = None if patients is None else read_patients(patients, ids_policy(ids))
    files = find_bags(features)
    with progress("embed", len(set(patient_of.values())) if per == "patient" and patient_of else len(files)) as advance:
        made = embed_slides(
            files,
            out,
            encoder=encoder,
            model=model,
            weights=weights,
            per=cast("Per", per),
            patient_of=patient_of,
            allow_remote_code=allow_remote_code,
            device=device,
            progress=advance,
        )
    return Done([made.folder], made.report)

"""`eosin predict`: features or slides → one row of predictions per slide."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Device, Features, IdsPolicy, SlideMpp, SlidesIfAny, Weights, Workers, slide_mpp_source
from eosin.cli._common import Done, command, progress


@command(rare=("ids", "slide_mpp", "weights"), of_job={"model": "model", "out": "predictions.csv"}, cluster="job")
def predict(
    *,
    model: Annotated[
        list[Path],
        typer.Option(help="Model folder or cross-validation folder; repeatable, several models are averaged."),
    ],
    features: Features = None,
    slides: SlidesIfAny = None,
    out: Annotated[Path, typer.Option(help="Table to write, .csv or .parquet.")],
    patients: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Table with the columns slide and patient; adds the output OUT_patients with one row per patient.",
        ),
    ] = None,
    job: Annotated[Path | None, typer.Option(help="Job folder for tiles and features made from --slides.")] = None,
    ids: IdsPolicy = "ask",
    slide_mpp: SlideMpp = None,
    weights: Weights = None,
    workers: Workers = 0,
    device: Device = "auto",
) -> Done:
    """Predict slides, and patients, with one trained model or the mean of several.

    A slide that fails is a row of the table with its reason. Start a killed run again: it continues.
    """
    from eosin.cli._study import ids_policy
    from eosin.errors import ConfigError
    from eosin.features._store import find_bags
    from eosin.mil._patients import patients_file, read_patients
    from eosin.mil._predict import predict as predict_files
    from eosin.pipeline._deploy import Machine, predict_slides
    from eosin.wsi._job import JobFolder

    policy = ids_policy(ids)
    patient_of = None if patients is None else read_patients(patients, policy)
    made = [out] if patients is None else [out, patients_file(out)]
    if features is not None and not slides:
        files = {features.stem: features} if features.suffix == ".h5" else find_bags(features)
        with progress("predict", len(files)) as advance:
            report = predict_files(
                model, files, out, patient_of=patient_of, ids=policy, device=device, progress=advance
            )
        return Done(made, report)
    if slides and features is None and job is not None:
        machine = Machine(workers=workers, device=device, weights=weights)
        mpp = slide_mpp_source(slide_mpp)
        report = predict_slides(
            model,
            slides,
            JobFolder(job),
            out,
            patient_of=patient_of,
            ids=policy,
            slide_mpp=mpp,
            machine=machine,
            progress=progress,
        )
        return Done(made, report)
    raise ConfigError("nothing to predict: pass --features FOLDER, or --slides SLIDES with --job JOB")

"""`eosin predict`: features or slides → one row of predictions per slide."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import (
    Device,
    Features,
    IdsPolicy,
    Plane,
    Scene,
    SlideMpp,
    SlidesIfAny,
    TissueWeights,
    Weights,
    Workers,
    scene_number,
    slide_mpp_source,
)
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin._names import Ids
    from eosin.mil._predict import Predictions
    from eosin.pipeline._external import Truth
    from eosin.pipeline._preflight import Problems


@command(
    rare=("ids", "slide_mpp", "scene", "plane", "tissue_weights", "weights", "workers", "target", "with_seen"),
    of_job={"model": "model", "out": "predictions.csv"},
    cluster="job", checks_device=False,
)  # fmt: skip
def predict(
    *,
    model: Annotated[
        list[Path],
        typer.Option(help="Folder of a model, cross-validation or job; repeatable, several models are averaged."),
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
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Table of slides, patients and labels: adds figures (JSON and a report) over slides that no model has "
            "seen.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Label column in --labels.", show_default="called as in the training")
    ] = None,
    with_seen: Annotated[
        bool, typer.Option("--with-seen", help="Count slides that shaped the models in the figures of --labels.")
    ] = False,
    job: Annotated[Path | None, typer.Option(help="Job folder for tiles and features made from --slides.")] = None,
    ids: IdsPolicy = "ask",
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
    tissue_weights: TissueWeights = None,
    weights: Weights = None,
    workers: Workers = 0,
    device: Device = "auto",
) -> Done:
    """Predict slides, and patients, with one trained model or the mean of several.

    A slide that fails is a row of the table with its reason. Start a killed run again: it continues.
    """
    from eosin._devices import choose_device
    from eosin.cli._study import ids_policy, model_of
    from eosin.features._store import find_bags
    from eosin.features._tissue_model import load_tissue_model
    from eosin.mil._patients import patients_file, read_patients
    from eosin.mil._predict import predict as predict_files
    from eosin.mil._prediction_table import require_table_suffix
    from eosin.pipeline._deploy import Machine, predict_slides
    from eosin.pipeline._preflight import Problems, check_folder, check_prediction
    from eosin.wsi._job import JobFolder

    problems = Problems()
    policy = problems.attempt(ids_policy, ids) or "ask"
    model = [problems.attempt(model_of, one) or one for one in model]
    patient_of = None if patients is None else problems.attempt(read_patients, patients, policy)
    truth = _truth(problems, labels, model, target=target, with_seen=with_seen, ids=policy)
    table = None if truth is None else truth.table
    problems.attempt(require_table_suffix, out)
    problems.attempt(check_folder, out.parent, "--out")
    problems.attempt(choose_device, device)
    made = [out] if patients is None else [out, patients_file(out)]
    if features is not None and not slides:
        problems.require()
        files = {features.stem: features} if features.suffix == ".h5" else find_bags(features)
        with progress("predict", len(files)) as advance:
            report = predict_files(
                model, files, out, patient_of=patient_of, labels=table, ids=policy, device=device, progress=advance
            )
        return _told(made, report, out, truth)
    if slides and features is None and job is not None:
        machine = Machine(workers=workers, device=device, weights=weights)
        mpp, number = slide_mpp_source(slide_mpp), problems.attempt(scene_number, scene)
        check_prediction(
            problems,
            model,
            slides,
            JobFolder(job),
            slide_mpp=mpp,
            scene=number,
            plane=plane,
            weights=weights,
            workers=workers,
        )
        if tissue_weights is not None:
            problems.attempt(load_tissue_model, tissue_weights, choose_device("cpu"))
        problems.require()
        report = predict_slides(
            model,
            slides,
            JobFolder(job),
            out,
            patient_of=patient_of,
            labels=table,
            ids=policy,
            slide_mpp=mpp,
            scene=number,
            plane=plane,
            tissue_weights=tissue_weights,
            machine=machine,
            progress=progress,
        )
        return _told(made, report, out, truth)
    problems.add(ConfigError("nothing to predict: pass --features FOLDER, or --slides SLIDES with --job JOB"))
    problems.require()
    return Done()


def _truth(
    problems: "Problems", labels: Path | None, models: list[Path], *, target: str | None, with_seen: bool, ids: "Ids"
) -> "Truth | None":
    """Read the labels of an external cohort, and check that the models know them."""
    from eosin.pipeline._external import Truth

    if labels is None:
        if target is not None or with_seen:
            problems.add(ConfigError("--target and --with-seen are about the figures of --labels; pass --labels, too"))
        return None
    truth = problems.attempt(Truth.read, labels, target=target, with_seen=with_seen, ids=ids)
    if truth is not None:
        problems.attempt(truth.check, models)
    return truth


def _told(made: list[Path], report: "Predictions", out: Path, truth: "Truth | None") -> Done:
    """Measure what has labels, draw the account of the slides beside the table, and say both in the last lines."""
    from eosin._files import write_text
    from eosin.pipeline._external import judge_external
    from eosin.report._flow import flow_svg

    figures = None if truth is None else judge_external(out, report, truth)
    flow = report.flow if figures is None else figures.flow
    write_text(out.with_name(f"{out.stem}_cohort.svg"), flow_svg(flow))
    if figures is None:
        return Done(made, report, lines=tuple(flow.lines()))
    return Done([*made, *figures.files(out)], report, lines=tuple(figures.lines()))

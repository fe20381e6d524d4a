"""`eosin heatmap`: model + slides → what the model looked at, as files to open."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import (
    Device,
    Features,
    Model,
    Out,
    Plane,
    Scene,
    SlideMpp,
    Slides,
    Weights,
    Workers,
    scene_number,
    slide_mpp_source,
)
from eosin.cli._common import Done, apply_to_each, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings
from eosin.errors import SlideError

if TYPE_CHECKING:
    from eosin._batch import Outcome
    from eosin._records import Report
    from eosin.mil._jury import Jury
    from eosin.wsi._slide_file import SlideFile

DEFAULT_FORMATS = ("png", "geojson")


@command(
    "formats",
    rare=("slide_mpp", "scene", "plane", "weights", "workers"),
    of_job={"model": "model", "out": "heatmaps"},
    cluster="out",
)
def heatmap(
    *,
    model: Model,
    features: Features = None,
    slides: Slides,
    out: Out,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Output formats, comma-separated: png, geojson, tiff, scores.tiff, csv, parquet, html.",
            show_default="png,geojson",
        ),
    ] = None,
    maps: Annotated[
        str | None,
        typer.Option(
            help="alone, attention, instance_logit, effect, log_weight_gradient, gradient, rollout; pictures show the "
            "first.",
            show_default="all that the model can give, what it says of each tile alone first",
        ),
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(help="Job folder for features, if they must be extracted first.", show_default="OUT/job"),
    ] = None,
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
    weights: Weights = None,
    workers: Workers = 0,
    device: Device = "auto",
    settings: Settings,
) -> Done:
    """Draw heat maps of what a model's prediction rests on, as pictures and for QuPath."""
    from eosin._batch import is_elsewhere, run_stage
    from eosin._records import Report
    from eosin._spread import find_file
    from eosin.cli._study import job_features, model_of
    from eosin.mil._jury import Jury
    from eosin.mil._seen import seen_notes
    from eosin.pipeline._deploy import Machine, encode_slides, tiles_like
    from eosin.pipeline._run import Drawing, DrawStage
    from eosin.wsi._job import JobFolder
    from eosin.wsi._slide_file import find_slides

    formats = _formats(settings.choose("formats", format_.split(",") if format_ else None, DEFAULT_FORMATS))
    model = model_of(model)
    jury = Jury.open([model], device="cpu")
    found = find_slides(slides, slide_mpp=slide_mpp_source(slide_mpp), scene=scene_number(scene), plane=plane)
    before = Report(())
    made = None if features is not None else job_features(model)
    if made is not None and all(find_file(made, file.slide_id, ".h5").is_file() for file in found):
        features = made
    if features is None:
        spec, machine = jury.ensemble.cards[0].features, Machine(workers=workers, device=device, weights=weights)
        tiles, folder = tiles_like(spec), JobFolder(job or out / "job")
        encoded = encode_slides(found, folder, tiles, spec.encoder, machine=machine, progress=progress)
        files, before = encoded.files, encoded.report
    elif features.suffix == ".h5" and len(found) == 1:
        files = {found[0].slide_id: features}
    else:
        files = {file.slide_id: find_file(features, file.slide_id, ".h5") for file in found}
    broken = {record.slide_id for record in before.failed}
    usable = [file for file in found if file.slide_id not in broken]
    sights = {file.slide_id: jury.choose(file.slide_id).sight for file in usable}
    notes = [f"warning: {note}" for note in seen_notes(sights)]
    if is_elsewhere():
        stage, chosen = DrawStage(), _chosen(maps)
        items = [
            Drawing(file, files[file.slide_id], model, out, formats, None if chosen is None else tuple(chosen))
            for file in usable
        ]
        with progress("heat maps", len(items)) as advance:
            drawn = run_stage(stage, items, run_json=JobFolder(out).run_json, progress=advance)
        return _ended([path for item in items for path in stage.files(item)], out, before, drawn, notes)
    written: dict[str, list[Path]] = {}
    work = partial(_explain, jury, files, out, formats=formats, maps=_chosen(maps), written=written)
    drawn = apply_to_each(usable, work, key=lambda file: file.slide_id, stage="heat maps")
    return _ended([path for one in written.values() for path in one], out, before, drawn, notes)


def _ended(paths: list[Path], out: Path, before: "Report", drawn: "Report", notes: Sequence[str]) -> Done:
    """Return the files, what became of the slides, and what to open."""
    count = drawn.count("ok")
    where = [f"heat maps of {count} {'slide' if count == 1 else 'slides'}: open {out}"] if count else []
    return Done(paths, before.then(drawn), [*notes, *where])


def _formats(wanted: Sequence[str]) -> tuple[str, ...]:
    from eosin.pipeline._explain import require_formats

    require_formats(wanted)
    return tuple(wanted)


def _chosen(wanted: str | None) -> list[str] | None:
    from eosin.pipeline._explain import require_maps

    names = wanted.split(",") if wanted else None
    require_maps(names or ())
    return names


def _explain(
    jury: "Jury",
    features: Mapping[str, Path],
    out: Path,
    slide: "SlideFile",
    *,
    formats: Sequence[str],
    maps: Sequence[str] | None,
    written: dict[str, list[Path]],
) -> "Outcome":
    from eosin._batch import Outcome
    from eosin.features._store import read_bag
    from eosin.pipeline._explain import explain_slide

    try:
        bag, asked = read_bag(features[slide.slide_id]), jury.ask(slide.slide_id)
        written[slide.slide_id] = explain_slide(asked, slide, bag, out, formats=formats, maps=maps)
    except SlideError as error:
        if error.code == "empty":
            return Outcome("empty", error.detail)
        raise
    return Outcome()

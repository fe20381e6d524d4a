"""`eosin counterfactual`: what the model would have said of slides without, or with only, some of their tiles."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import IdsPolicy, Model, Out, Plane, Scene, SlideMpp, scene_number, slide_mpp_source
from eosin.cli._common import Done, command
from eosin.cli._progress import progress, say
from eosin.cli._settings import Settings
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin.heatmaps._examination import Questions
    from eosin.pipeline._cohort_questions import Cohort
    from eosin.pipeline._question import DonorFile
    from eosin.wsi._slide_file import SlideFile


@command(
    "questions",
    rare=("region_class", "donor", "donor_slides", "donor_regions", "ids", "slide_mpp", "scene", "plane"),
    of_job={"model": "model", "out": "counterfactuals"},
    cluster="out",
)  # fmt: skip
def counterfactual(
    *,
    model: Model,
    features: Annotated[Path, typer.Option(help="Feature file of one slide, or a folder of them for a whole cohort.")],
    slides: Annotated[
        list[Path] | None, typer.Option(help="Slide file or folder of slides, to draw the pictures; repeatable.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="For a cohort: table of slides, patients and labels, to compute sensitivity and tests."),
    ] = None,
    out: Out,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class to examine.", show_default="the predicted class")
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(help="GeoJSON with areas to remove, and to keep alone. For a cohort: folder of <slide>.geojson."),
    ] = None,
    region_class: Annotated[
        list[str] | None, typer.Option(help="Use only areas of this QuPath class; repeatable.")
    ] = None,
    donor: Annotated[
        list[Path] | None,
        typer.Option(help="Feature file of another slide; its most attended tiles are added. Repeatable."),
    ] = None,
    donor_slides: Annotated[
        list[Path] | None, typer.Option(help="Slide files of the donors, in the same order.")
    ] = None,
    donor_regions: Annotated[
        list[Path] | None,
        typer.Option(help="GeoJSON per donor, in the same order; only tiles in these areas are added."),
    ] = None,
    format_: Annotated[
        str,
        typer.Option("--format", help="Output formats, comma-separated: csv, parquet, geojson, png, figure.png, html."),
    ] = "csv,geojson,html",
    ids: IdsPolicy = "ask",
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
    settings: Settings,
) -> Done:
    """Remove, keep or add tiles of a slide, and compute how the prediction changes.

    The result names the tiles that the prediction needs, the tiles that suffice for it, the effect of every tile, and
    the effect of tiles from other slides.
    """
    from eosin.cli._study import model_of
    from eosin.heatmaps._examination import Questions

    questions, model = settings.parse("questions", Questions), model_of(model)
    donors = _donors(donor or (), donor_slides or (), donor_regions or (), slide_mpp)
    formats, classes = format_.split(","), region_class or ()
    found = _slides(slides, slide_mpp, scene, plane) if slides else None
    if features.is_dir():
        cohort = _cohort(features, labels, found or {}, regions, ids)
        return _ask_cohort(
            model,
            cohort,
            out,
            class_name=class_name,
            region_classes=classes,
            donors=donors,
            questions=questions,
            formats=formats,
        )
    if labels is not None:
        raise ConfigError("--labels needs a cohort; pass a folder of feature files as --features, or remove --labels")
    return _ask_slide(
        model,
        features,
        out,
        found=found,
        class_name=class_name,
        regions=regions,
        region_classes=classes,
        donors=donors,
        questions=questions,
        formats=formats,
    )


def _slides(
    paths: Sequence[Path], slide_mpp: str | None, scene: str | None = None, plane: int | None = None
) -> "dict[str, SlideFile]":
    from eosin.wsi._slide_file import find_slides

    found = find_slides(paths, slide_mpp=slide_mpp_source(slide_mpp), scene=scene_number(scene), plane=plane)
    return {file.slide_id: file for file in found}


def _donors(
    features: Sequence[Path], slides: Sequence[Path], regions: Sequence[Path], slide_mpp: str | None
) -> "list[DonorFile]":
    from eosin.pipeline._question import DonorFile

    for name, given in (("--donor-slides", slides), ("--donor-regions", regions)):
        if given and len(given) != len(features):
            raise ConfigError(
                f"{len(given)} {name} for {len(features)} --donor; pass one for each donor, in the same order"
            )
    opened = [next(iter(_slides([path], slide_mpp).values())) for path in slides]
    matched = itertools.zip_longest(features, opened, regions)
    return [DonorFile(path, slide, annotation) for path, slide, annotation in matched]


def _ask_slide(
    model: Path,
    features: Path,
    out: Path,
    *,
    found: "dict[str, SlideFile] | None",
    class_name: str | None,
    regions: Path | None,
    region_classes: Sequence[str],
    donors: "Sequence[DonorFile]",
    questions: "Questions",
    formats: Sequence[str],
) -> Done:
    from eosin.features._store import read_bag
    from eosin.mil._jury import ask
    from eosin.mil._seen import seen_notes
    from eosin.pipeline._question import question_slide

    bag = read_bag(features)
    if found is not None and len(found) != 1:
        if bag.slide_id not in found:  # of all scenes of a file the features have one
            raise ConfigError(f"--slides: {len(found)} slides for one feature file; pass the slide that it came from")
        found = {bag.slide_id: found[bag.slide_id]}
    asked = ask(model, bag.slide_id)
    paths = question_slide(
        asked,
        bag,
        out,
        slide_file=None if found is None else next(iter(found.values())),
        class_name=class_name,
        annotation=regions,
        region_classes=region_classes,
        donors=donors,
        questions=questions,
        formats=formats,
    )
    for note in seen_notes({bag.slide_id: asked.sight}):
        say(f"warning: {note}")
    return Done(paths)


def _cohort(
    features: Path, labels: Path | None, slides: "dict[str, SlideFile]", regions: Path | None, ids: str
) -> "Cohort":
    from eosin._tables import of_slides
    from eosin.cli._study import ids_policy
    from eosin.features._store import find_bags
    from eosin.mil._tables import read_labels
    from eosin.pipeline._cohort_questions import Cohort

    if regions is not None and not regions.is_dir():
        raise ConfigError(f"--regions {regions}: pass a folder of <slide>.geojson when --features is a folder")
    files = find_bags(features)
    outlines = [] if regions is None else [(path.name, path) for path in sorted(regions.glob("*.geojson"))]
    annotations = of_slides(outlines, files, str(regions))
    table = None if labels is None else read_labels(labels, ids=ids_policy(ids)).named_as(files, ids_policy(ids))
    if table is not None:
        files = {name: path for name, path in files.items() if name in table.slide_ids}
        if not files:
            raise ConfigError(f"{labels}: none of the slides in {features} has a row")
    return Cohort(files, table, slides, annotations)


def _ask_cohort(
    model: Path,
    cohort: "Cohort",
    out: Path,
    *,
    class_name: str | None,
    region_classes: Sequence[str],
    donors: "Sequence[DonorFile]",
    questions: "Questions",
    formats: Sequence[str],
) -> Done:
    from eosin.pipeline._cohort_questions import question_cohort

    if class_name is None:
        raise ConfigError("a cohort needs one class for all slides; pass --class")
    with progress("counterfactuals", len(cohort.features)) as advance:
        paths, report = question_cohort(
            model,
            cohort,
            out,
            class_name=class_name,
            region_classes=region_classes,
            donors=donors,
            questions=questions,
            formats=formats,
            progress=advance,
        )
    return Done(paths, report)

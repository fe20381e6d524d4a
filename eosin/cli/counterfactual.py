"""`eosin counterfactual`: what the model would have said of a slide without, or with only, some of its tiles."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Model, Out, SlideMpp, slide_mpp_source
from eosin.cli._common import Done, Settings, command


@command("questions")
def counterfactual(
    *,
    model: Model,
    features: Annotated[Path, typer.Option(help="The slide's feature file.")],
    slide: Annotated[Path | None, typer.Option(help="The slide itself, for pictures.")] = None,
    out: Out,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class to ask about; the predicted one unless given.")
    ] = None,
    regions: Annotated[
        Path | None, typer.Option(help="GeoJSON of QuPath: its areas are removed and kept alone.")
    ] = None,
    region_class: Annotated[
        list[str] | None, typer.Option(help="Ask about areas of this class alone; repeatable.")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="csv, geojson, html, png.")] = "csv,geojson,html",
    slide_mpp: SlideMpp = None,
    settings: Settings,
) -> Done:
    """Ask which tiles a prediction needs, which suffice, and what each one adds."""
    from eosin.features.store import read_bag
    from eosin.heatmaps.question import Questions, question_slide
    from eosin.wsi.slide import find_slides

    found = None if slide is None else find_slides([slide], slide_mpp=slide_mpp_source(slide_mpp))[0]
    paths = question_slide(
        model,
        read_bag(features),
        out,
        slide_file=found,
        class_name=class_name,
        annotation=regions,
        region_classes=region_class or (),
        questions=settings.parse("questions", Questions),
        formats=format_.split(","),
    )
    return Done(paths)

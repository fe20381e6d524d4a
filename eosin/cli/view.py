"""`eosin view`: slides in the browser with maps over them, and questions asked by drawing."""

import contextlib
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin._processes import Stopped
from eosin.cli._arguments import Model, Plane, Scene, SlideMpp, Slides, scene_number, slide_mpp_source
from eosin.cli._common import Done, command
from eosin.cli._progress import progress, say
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin._records import Report
    from eosin.viewer._catalogue import Catalogue


@command(
    rare=(
        "slide_mpp",
        "scene",
        "plane",
        "replay",
    ),
    of_job={"model": "model", "features": ""},
    bare="model",
)
def view(
    *,
    model: Model,
    features: Annotated[
        list[Path] | None,
        typer.Option(
            help="Feature file, or folder of feature files; repeatable.", show_default="those of the model's job"
        ),
    ] = None,
    slides: Slides,
    beside: Annotated[
        Path | None, typer.Option(help="Second model (folder or job), shown beside the first, for the same slides.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for sessions and annotations. Without --out, nothing is saved.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0: any free port.", min=0, max=65535)] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    html: Annotated[
        Path | None, typer.Option(help="Write one offline page, without edits, instead of starting the viewer.")
    ] = None,
    replay: Annotated[
        list[Path] | None, typer.Option(help="Repeat a saved session (.json) and print its numbers; repeatable.")
    ] = None,
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
) -> Done:
    """Show slides with heat maps in the browser; remove or add tiles and see the new prediction at once."""
    from eosin.cli._study import job_features, model_of
    from eosin.mil._seen import seen_notes
    from eosin.viewer._catalogue import open_catalogue
    from eosin.viewer._saved import replay_sessions
    from eosin.viewer._show import show_slides
    from eosin.viewer._static import write_static
    from eosin.wsi._slide_file import find_slides

    features, model = features or [_required(job_features(model))], model_of(model)
    files = find_slides(slides, slide_mpp=slide_mpp_source(slide_mpp), scene=scene_number(scene), plane=plane)
    with progress("check slides", len(files)) as advance:
        catalogue = open_catalogue(model, features, files, progress=advance)
    report = _require_shown(catalogue)
    sights = {one.slide_id: catalogue.ask(one.slide_id).sight for one in catalogue.shown}
    notes = [f"warning: {note}" for note in seen_notes(sights)]
    second = None
    if beside is not None:
        of_second = job_features(beside)
        second = open_catalogue(model_of(beside), features if of_second is None else [of_second], files)
    with contextlib.closing(catalogue.slides):
        if replay:
            return Done(replay_sessions(catalogue, replay, out or replay[0].parent, tell=typer.echo), report, notes)
        if html is not None:
            write_static(html, catalogue)
            return Done([html], report, notes)
        for one in catalogue.refused:
            say(f"not shown: {one.refusal}")
        try:
            show_slides(catalogue, second=second, out=out, port=port, ready=partial(_announce, notes), browser=browser)
        except Stopped as stopped:
            if stopped.number != signal.SIGINT:  # Ctrl+C is the way to end it
                raise
    return Done([], report)


def _required(features: Path | None) -> Path:
    if features is None:
        raise ConfigError("--features: missing; pass it as an option, or in a study file (--config FILE)")
    return features


def _require_shown(catalogue: "Catalogue") -> "Report":
    """Return one record per slide; refuse a list of which no slide can be shown."""
    from eosin._records import Record, Report

    if not catalogue.shown:
        first, *others = catalogue.refused
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{first.refusal}{more}")
    return Report(
        tuple(
            Record(one.slide_id, "view", "failed" if one.refusal else "ok", one.code, one.refusal)
            for one in catalogue.listed
        )
    )


def _announce(notes: Sequence[str], url: str) -> None:
    typer.echo(url)
    for note in notes:
        say(note)
    say("anyone with this address can use the viewer; Ctrl+C ends it")

"""`eosin demo`: the whole way on slides that are made on the spot."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Device, Workers
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings


@command("cohort", "pipeline", checks_device=False)
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the slides and results.")] = Path("demo"),
    device: Device = "auto",
    workers: Workers = 0,
    settings: Settings,
) -> Done:
    """Paint synthetic slides with tumour nests, and run every step on them. Nothing is downloaded."""
    from eosin.options import merge
    from eosin.pipeline._demo import Demo, run_demo
    from eosin.pipeline._deploy import Machine

    wanted = {name: settings.data[name] for name in ("cohort", "pipeline") if name in settings.data}
    options = Demo.parse(merge(Demo().model_dump(mode="json"), wanted), source="demo")
    summary = run_demo(out, options, machine=Machine(workers=workers, device=device), progress=progress)
    typer.echo(f"slides: {summary.n_slides}")
    typer.echo(f"slide AUC: {summary.slide_auc:.3f}")
    random = summary.random_localisation
    typer.echo(
        f"localisation AUC: {summary.localisation_auc:.3f} (shuffled weights: {random.mean:.3f} on average, "
        f"{random.highest:.3f} at most)"
    )
    typer.echo(f"seconds: {summary.seconds:.0f}")
    return Done([summary.out / "summary.json", summary.out / "report.html"], summary.report)

"""`eosin jobs`: what a job is doing, here or on a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._common import Done, command
from eosin.cli._progress import duration


@command()
def jobs(
    job: Annotated[Path, typer.Argument(help="Job folder, or the folder of a cross-validation.")],
    *,
    stop: Annotated[bool, typer.Option("--stop", help="End the run on the cluster; what is finished is kept.")] = False,
) -> Done:
    """Show what is done, failed and running in a job, how fast it goes and how long it will take."""
    import time

    from eosin.cluster import _jobs

    if stop:
        for line in _jobs.stop(job):
            typer.echo(line)
        return Done()
    for stage in _jobs.view_job(job):
        done = sum(number for status, number in stage.counts.items() if status != "failed")
        line = f"{stage.name}: {done} done, {stage.counts['failed']} failed, {len(stage.running)} running"
        line += f", {stage.per_hour:.0f} per hour" if stage.per_hour else ""
        line += f", {duration(stage.left_s)} left" if stage.left_s is not None else ""
        typer.echo(line)
        for begun in stage.running:
            typer.echo(f"  {begun.slide_id} on {begun.by} for {duration(time.time() - begun.at)}")
    logs = sorted((job / "cluster").glob("*/logs"))
    return Done([logs[-1]] if logs else [])

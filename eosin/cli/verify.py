"""`eosin verify`: every file of a job against what it says about itself."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._common import Done, command
from eosin.cli._progress import progress


@command()
def verify(job: Annotated[Path, typer.Argument(help="Job folder.")]) -> Done:
    """Read every file of a job and compare it with its checksum. Damaged files are listed."""
    from eosin.features._verify import verify_job
    from eosin.wsi._job import JobFolder

    with progress("verify", None) as advance:
        report = verify_job(JobFolder(job), progress=advance)
    return Done(report=report)

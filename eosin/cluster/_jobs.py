"""What a job is doing, read from its records: any machine that sees the folder may ask."""

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eosin._files import is_running, write_text
from eosin._records import Begun, Record, process_name, read_begun, read_run_json
from eosin._seals import read_json
from eosin.cluster._place import DRIVER, FOLDER, STOP
from eosin.errors import ConfigError

RECENT_S = 3600.0


@dataclass(frozen=True)
class StageView:
    """One stage of a job.

    Attributes
    ----------
    name : str
    counts : mapping of str to int
        Slides by status.
    running : tuple of Begun
        What is worked on, the longest first.
    per_hour : float
        Slides of the last hour; 0 when there were none.
    left_s : float, optional
        Seconds until the stage is finished at that pace, where a driver says how many slides there are.
    """

    name: str
    counts: Counter[str]
    running: tuple[Begun, ...]
    per_hour: float
    left_s: float | None


def view_job(folder: Path) -> list[StageView]:
    """Return the stages of a job folder, or of the folder of a cross-validation.

    Raises
    ------
    ConfigError
        If nothing was ever recorded there.
    """
    records: list[Record] = []
    begun: list[Begun] = []
    for run_json in (folder / "run.json", folder / "crossval" / "run.json"):
        records += read_run_json(run_json)
        begun += read_begun(run_json)
    if not records and not begun:
        raise ConfigError(f"{folder}: is not a job folder, or has no records yet; pass the --job of `eosin run`")
    driver = read_driver(folder) or read_driver(folder / "crossval")
    now = time.time()
    first = sorted([(one.at, one.stage) for one in records] + [(one.at, one.stage) for one in begun])
    names = dict.fromkeys(stage for _, stage in first)
    return [_view(name, records, begun, driver, now) for name in names]


def _view(name: str, records: Sequence[Record], begun: Sequence[Begun], driver: Any, now: float) -> StageView:
    own = [record for record in records if record.stage == name]
    running = sorted((one for one in begun if one.stage == name and _may_run(one)), key=lambda one: one.at)
    made = [record.at for record in own if record.at > now - RECENT_S and record.status != "skipped"]
    per_hour = 0.0
    if len(made) > 1:
        per_hour = 3600 * len(made) / max(1.0, now - min(made))
    left = None
    if driver and driver["stage"] == name and driver["jobs"] and per_hour:
        left = max(0, driver["total"] - len(own)) / per_hour * 3600
    return StageView(name, Counter(record.status for record in own), tuple(running), per_hour, left)


def _may_run(begun: Begun) -> bool:
    """Return whether the process that began a slide may be alive: on this machine that can be asked."""
    host, _, number = begun.by.rpartition("-")
    return host != process_name().rpartition("-")[0] or not number.isdecimal() or is_running(int(number))


def read_driver(folder: Path) -> dict[str, Any] | None:
    """Return what the last run on a cluster said of itself: driver, stage, total, provider, jobs."""
    try:
        data = read_json(folder / FOLDER / DRIVER)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def stop(folder: Path) -> list[str]:
    """Ask the driver of a job to end, and cancel the jobs of one that is gone.

    Returns
    -------
    list of str
        What was done, for a person.

    Raises
    ------
    ConfigError
        If no run on a cluster was ever started with this folder.
    """
    found = [one for one in (folder, folder / "crossval") if read_driver(one)]
    if not found:
        raise ConfigError(f"{folder}: no run with --cluster was started there")
    lines = []
    for one in found:
        driver = read_driver(one)
        assert driver is not None
        write_text(one / FOLDER / STOP, "")
        host, _, number = str(driver["driver"]).rpartition("-")
        here = process_name().rpartition("-")[0] == host
        if here and number.isdecimal() and not is_running(int(number)):
            lines += _cancel(driver)
        else:
            lines.append(f"the run of {driver['driver']} ends within seconds; what is finished is kept")
    return lines


def _cancel(driver: dict[str, Any]) -> list[str]:
    """Cancel the jobs of a driver that was killed."""
    tool = {"slurm": "scancel", "pbspro": "qdel", "lsf": "bkill", "grid_engine": "qdel"}.get(str(driver["provider"]))
    jobs = [str(job) for job in driver["jobs"]]
    if not jobs:
        return ["the driver is gone and left no jobs behind"]
    if tool is None or shutil.which(tool) is None:
        return [f"the driver is gone; end its jobs yourself: {' '.join(jobs)}"]
    subprocess.run([tool, *jobs], check=False)
    return [f"the driver is gone; its jobs were cancelled: {' '.join(jobs)}"]

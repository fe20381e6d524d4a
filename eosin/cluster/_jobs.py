"""What a job is doing, read from its records: any machine that sees the folder may ask."""

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eosin._files import is_running, write_text
from eosin._records import Begun, Record, process_name, read_begun, read_run_json
from eosin._seals import read_json
from eosin.cluster._place import FOLDER, driver_file, stop_file
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
    drivers = [driver for one in (folder, folder / "crossval") for driver in read_drivers(one)]
    now = time.time()
    first = sorted([(one.at, one.stage) for one in records] + [(one.at, one.stage) for one in begun])
    names = dict.fromkeys(stage for _, stage in first)
    return [_view(name, records, begun, drivers, now) for name in names]


def _view(
    name: str, records: Sequence[Record], begun: Sequence[Begun], drivers: Sequence[Any], now: float
) -> StageView:
    own = [record for record in records if record.stage == name]
    running = sorted((one for one in begun if one.stage == name and _may_run(one)), key=lambda one: one.at)
    made = [record.at for record in own if record.at > now - RECENT_S and record.status != "skipped"]
    per_hour = 0.0
    if len(made) > 1:
        per_hour = 3600 * len(made) / max(1.0, now - min(made))
    left = None
    totals = [driver["total"] for driver in drivers if driver["stage"] == name and driver["jobs"]]
    if totals and per_hour:
        left = max(0, max(totals) - len(own)) / per_hour * 3600
    return StageView(name, Counter(record.status for record in own), tuple(running), per_hour, left)


def _may_run(begun: Begun) -> bool:
    """Return whether the process that began a slide may be alive: on this machine that can be asked."""
    host, _, number = begun.by.rpartition("-")
    return host != process_name().rpartition("-")[0] or not number.isdecimal() or is_running(int(number))


def read_drivers(folder: Path) -> list[dict[str, Any]]:
    """Return what runs on a cluster said of themselves: driver, stage, total, provider, jobs."""
    found = []
    for path in sorted((folder / FOLDER).glob("driver*.json")):
        with suppress(OSError, ValueError):
            data = read_json(path)
            if isinstance(data, dict):
                found.append(data)
    return found


def stop(folder: Path) -> list[str]:
    """Ask the drivers of a job to end, and cancel the jobs of those that are gone.

    Returns
    -------
    list of str
        What was done, for a person.

    Raises
    ------
    ConfigError
        If no run on a cluster was ever started with this folder.
    """
    found = [(one / FOLDER, driver) for one in (folder, folder / "crossval") for driver in read_drivers(one)]
    if not found:
        raise ConfigError(f"{folder}: no run with --cluster was started there")
    running = [(logs, driver) for logs, driver in found if driver["jobs"] or _lives(driver)]
    return [line for logs, driver in running for line in _stop(logs, driver)] or ["no run with --cluster is going on"]


def _stop(logs: Path, driver: dict[str, Any]) -> list[str]:
    if _lives(driver) is False:
        lines = _cancel(driver)
        driver_file(logs, driver["driver"]).unlink(missing_ok=True)
        return lines
    write_text(stop_file(logs, driver["driver"]), "")
    return [f"the run of {driver['driver']} ends within seconds; what is finished is kept"]


def _lives(driver: dict[str, Any]) -> bool | None:
    """Return whether a driver runs; None where that cannot be asked, because it is one of another machine."""
    host, _, number = str(driver["driver"]).rpartition("-")
    return is_running(int(number)) if host == process_name().rpartition("-")[0] and number.isdecimal() else None


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

"""What this process may compute on: a device by its name, and the processor cores that it was given."""

import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from eosin.errors import ConfigError

if TYPE_CHECKING:
    import torch

SCHEDULER_CORES = (  # a batch system's word for the cores of one process; the first that is set counts
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPUS_ON_NODE",
    "PBS_NCPUS",
    "NSLOTS",
    "LSB_DJOB_NUMPROC",
)


def choose_device(name: str = "auto") -> "torch.device":
    """Return the device of a name: ``cpu``, ``cuda``, ``cuda:1``, ..., or ``auto``, which is CUDA when it is there.

    Raises
    ------
    ConfigError
        If there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} does not exist; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":  # counted, not tried: a try takes memory of the device in every process that asks
        count = torch.cuda.device_count()
        if (device.index or 0) < count:
            return device
        raise ConfigError(f"device {name!r} cannot be used here: this machine has {count} GPUs; use --device auto")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # noqa: BLE001 - each backend that is not there fails in its own way
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); use --device auto") from None
    return device


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the devices that a list (``cuda:0,cuda:1``), a number of GPUs or ``all`` stands for.

    Raises
    ------
    ConfigError
        When one of them is not there.
    """
    import torch

    there = torch.cuda.device_count()
    if text != "all" and not text.isdecimal():
        return tuple(str(choose_device(name.strip())) for name in text.split(",") if name.strip())
    count = there if text == "all" else int(text)
    if not 0 < count <= there:
        raise ConfigError(
            f"--devices {text}: this machine has {there} GPUs; "
            f"pass a number up to {there}, or names such as cuda:0,cuda:1"
        )
    return tuple(f"cuda:{index}" for index in range(count))


@cache
def count_cores() -> int:
    """Return how many processor cores this process may use, which on a shared machine is fewer than it has.

    The least of what the process is bound to, what its control groups grant and what a batch system granted.
    """
    quotas = _cgroup_cores(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.floor(min([_bound_cores(), *quotas, *_scheduled_cores(os.environ)])))


def limit_threads() -> None:
    """Tell numerical libraries that are loaded later how many cores there are, where they would count too many.

    OpenMP sees what a process is bound to, but neither a container's quota nor a batch system's grant: with 2 of 64
    cores it would start 64 threads, which wait for each other.
    """
    if count_cores() < _bound_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(count_cores()))


def _bound_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _scheduled_cores(environment: Mapping[str, str]) -> list[int]:
    stated = [environment[name] for name in SCHEDULER_CORES if environment.get(name, "").isdecimal()]
    return [int(stated[0])] if stated and int(stated[0]) else []


def _cgroup_cores(membership: Path, root: Path) -> Iterator[float]:
    """Yield the quota of each control group around this process, in cores; both versions of Linux's groups."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for place in (Path(group), *Path(group).parents):  # a container sees its own group as the root
            folder = root / controllers / place.relative_to("/")
            quota = _read_quota(folder)
            if quota is not None:
                yield quota


def _read_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():  # version 2: "max 100000" or "200000 100000"
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
            quota, period = (file.read_text(encoding="utf-8") for file in files)
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or no limit
        return None

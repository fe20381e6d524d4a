"""Data parallel training: each process computes its share of the bags of a step, gradients are summed.

Start the same command once per device with ``torchrun``, or as the tasks of one step of a batch system. The result is
that of one process that accumulates the same step, up to rounding and to the random numbers of dropout.
"""

import os
import re
from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor, distributed, nn

from eosin.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 12_000
"""Where processes of a batch system meet: a port that follows from the numbers of job and step, below those that
systems give to outgoing connections."""


def join(device: torch.device, processes: int = 1) -> tuple[int, int]:
    """Join the other processes, if there are any, and return this one's rank and their number.

    Parameters
    ----------
    device : torch.device
    processes : int
        How many the recipe asks for. Variables of a batch system count only then: most of its steps with several tasks
        are not meant to train one model.

    Raises
    ------
    ConfigError
        If more are asked for than were started.
    """
    if not distributed.is_available():
        _require(processes, 1)
        return 0, 1
    if not distributed.is_initialized():
        started = _processes(os.environ, processes)
        if started == 1:
            return 0, 1
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def _processes(environment: MutableMapping[str, str], asked: int) -> int:
    """Return how many processes were started; where a batch system did it, set what torch reads."""
    started = int(environment.get("WORLD_SIZE", "1"))
    if started == 1 and asked > 1 and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        started = int(environment["SLURM_STEP_NUM_TASKS"])
        host, port = meeting_point(environment)
        environment.setdefault("MASTER_ADDR", host)
        environment.setdefault("MASTER_PORT", str(port))
        for name, source in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
            environment[name] = environment[source]
        environment["WORLD_SIZE"] = str(started)
    _require(asked, started)
    return started


def _require(asked: int, started: int) -> None:
    if asked not in (1, started):
        raise ConfigError(
            f"recipe.training.processes asks for {asked} processes, and {started} started; start the command with "
            f"torchrun --nproc-per-node {asked} -m eosin ..., or with srun --ntasks {asked} eosin ..."
        )


def meeting_point(environment: MutableMapping[str, str]) -> tuple[str, int]:
    """Return host and port at which the tasks of one step of SLURM meet: the first host of ``gpu[03-05,07]``."""
    host = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    assert host is not None
    numbers = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return "".join(part or "" for part in host.groups()), FIRST_PORT + sum(numbers) % PORTS


def require_same(made_from: str, device: torch.device) -> None:
    """Refuse processes that train different models: their gradients would be summed all the same.

    Parameters
    ----------
    made_from : str
        Hexadecimal digits over all inputs of the training, the precision among them.
    device : torch.device

    Raises
    ------
    ConfigError
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    number = int(made_from, 16) >> 1  # fits a signed integer
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    distributed.all_reduce(ends, op=distributed.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise ConfigError(
            "the processes would train different models: recipe, features, labels or precision differ; start all with "
            "the same command, and with --precision fp32 or bf16 instead of auto"
        )


def own_device(device: torch.device) -> torch.device:
    """Return this process's device: of GPUs without a number, the one of its place on the machine (``LOCAL_RANK``)."""
    if device.type != "cuda" or device.index is not None:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)  # NCCL takes the current one
    return own


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes, in one message; a parameter that no process reached keeps none."""
    kept = list(parameters)
    if not kept:
        return
    reached = torch.tensor([p.grad is not None for p in kept], dtype=torch.float32, device=kept[0].device)
    flat = torch.cat([reached, *(_gradient(p).flatten() for p in kept)])
    distributed.all_reduce(flat)
    for parameter, touched, values in zip(
        kept,
        flat[: len(kept)].tolist(),
        torch.split(flat[len(kept) :], [p.numel() for p in kept]),
        strict=True,
    ):
        parameter.grad = values.view_as(parameter).clone() if touched else None


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def mean_over_processes(value: float, weight: int, device: torch.device) -> float:
    """Return the mean of a number over the processes, each counted with its weight."""
    pair = torch.tensor([value * weight, float(weight)], dtype=torch.float64).to(device)
    distributed.all_reduce(pair)
    return float(pair[0] / pair[1])

"""Data parallel training: each process computes its share of the bags of a step, gradients are summed.

Start the same command once per device with ``torchrun``; it sets the variables that `join` reads. The result is that of
one process that accumulates the same step, up to rounding and to the random numbers of dropout.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn


def join(device: torch.device) -> tuple[int, int]:
    """Join the other processes, if there are any, and return this one's rank and their number."""
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


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

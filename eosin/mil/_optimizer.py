"""The optimizer of a recipe, the course of its learning rate, and the moving average of weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eosin.mil._recipe import Training


def make_optimizer(options: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe; parameters with a true attribute ``no_weight_decay`` have none."""
    exempt = [parameter for parameter in parameters if getattr(parameter, "no_weight_decay", False)]
    others = [parameter for parameter in parameters if not getattr(parameter, "no_weight_decay", False)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": exempt, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=options.betas[0], fused=True, **settings)
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "radam": torch.optim.RAdam,
    }
    settings["betas"] = options.betas
    if options.optimizer != "radam":
        settings["fused"] = True
    return kinds[options.optimizer](groups, **settings)


def rate_factor(options: Training, done: float, *, step: float) -> float:
    """Return the learning rate of the step after so many passes, as a fraction of its highest value.

    It grows linearly over the passes of the warm-up, then stays or falls to 0 along half a cosine; `step` is the length
    of a step in passes.
    """
    if done < options.warmup:
        return min((done + step) / options.warmup, 1.0)
    if options.schedule == "constant":
        return 1.0
    course = (done - options.warmup) / max(options.epochs - options.warmup, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(course, 1.0)))


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the weights of `average` towards those of `model`; buffers that are not floats are copied."""
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)

"""The teacher of MHIM-MIL: a moving average of the student, its start and what the student is compared with.

Equations 1, 3 and 4 of `mhim`.
"""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.layers import require_fractions
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.mil.standardize import Standardized

MomentumSchedule = Literal["constant", "cosine"]


class Teacher(nn.Module):
    """A moving average of a model, in the same mode as the student and without gradient.

    Parameters
    ----------
    model : Aggregator
    momentum : float
        m of equation 4.
    schedule : {"constant", "cosine"}
        Whether m rises to 1.
    """

    def __init__(self, model: Aggregator, *, momentum: float, schedule: MomentumSchedule) -> None:
        super().__init__()
        require_fractions("mhim", momentum=momentum)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.momentum = momentum
        self.schedule = schedule

    @torch.no_grad()
    def forward(self, bags: PackedBags) -> AttentionOutput:
        """Read whole bags."""
        output = self.model(bags)
        assert isinstance(output, AttentionOutput)  # checked when built
        return output

    @torch.no_grad()
    def follow(self, student: Aggregator, progress: float) -> None:
        """Move towards the student, equation 4; parameters only."""
        momentum = cosine(self.momentum, 1.0, progress) if self.schedule == "cosine" else self.momentum
        for mine, new in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.lerp_(new.detach(), 1 - momentum)


def started(teacher: Teacher, student: Aggregator, folder: Path | None) -> Teacher:
    """Give the teacher, and the student's embedding, the weights of a plainly trained model."""
    if folder is None:
        return teacher
    from eosin.mil.checkpoint import load_model  # which imports the methods

    plain, _ = load_model(folder)
    model = plain.aggregator if isinstance(plain, Standardized) else plain
    state = model.state_dict()
    if type(model) is not type(student) or _shapes(state.items()) != _shapes(student.state_dict().items()):
        raise ConfigError(
            f"init_from {folder} holds a {type(model).__name__} of another kind or size than the "
            f"{type(student).__name__} that is trained; train a plain model with the same aggregator and options"
        )
    teacher.model.load_state_dict(state)
    embedding = {name: value for name, value in state.items() if name.startswith("embed.")}
    student.load_state_dict(embedding, strict=False)
    return teacher


def _shapes(state: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state}


def cosine(start: float, end: float, progress: float) -> float:
    """Return the value at a fraction of half a cosine from `start` to `end`."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def consistency_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy between the softmaxes of embeddings (..., E), equation 3; mean over the rows."""
    wide = torch.promote_types(student.dtype, torch.float32)
    wanted = functional.softmax(teacher.detach().to(wide) / temperature, -1)
    return -(wanted * functional.log_softmax(student.to(wide), -1)).sum(-1).mean()


def embedding_rows(output: AttentionOutput) -> Tensor:
    """Return the bag embeddings as rows of the width of an instance, (B, rows, E), or as one row each."""
    width = output.instances.shape[1]
    if output.embedding.shape[1] % width:
        return output.embedding[:, None]
    return torch.unflatten(output.embedding, 1, (-1, width))

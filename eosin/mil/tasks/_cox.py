"""Proportional hazards: the partial likelihood of Cox."""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PrivateAttr
from torch import Tensor
from typing_extensions import override

from eosin.mil._metrics import Floats
from eosin.mil._step_losses import StepLosses
from eosin.mil.task import TASKS, Columns, Task, to_numpy, wide
from eosin.mil.tasks._survival import SurvivalTask


@TASKS.register("cox")
class Cox(SurvivalTask):
    """Proportional hazards: one logit, the logarithm of the relative risk.

    Loss of a bag with an event at t: ``log Σ exp(r_j) - r`` over the bags of the same step that are still at risk at t
    (Breslow's handling of ties); of a censored one: 0. Risk sets are those of a step, however many packs or processes
    it is computed in (`eosin.mil._step_losses`), so a step should have many bags: set ``training.bags_per_step`` to 16
    or more.

    The partial likelihood leaves the level and, with it, any comparison of two models open, so risks of different
    models are compared within the fold of each only: C-index and time-dependent AUC count pairs of one fold.

    Attributes
    ----------
    time, event : str
        Columns.
    one_is_censored : bool
        Orientation of the event column in the table.
    event_value, censored_value : str
        The values of the event column, when they were named.
    edges : tuple of float
        Quartiles of the times of events of the training part, at which discrimination is judged.
    """

    kind: Literal["cox"] = "cox"

    @property
    def n_outputs(self) -> int:
        """One logit."""
        return 1

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the negative partial log-likelihood of each bag among these bags."""
        risk = wide(logits)[:, 0]
        later = target[None, :, 0] >= target[:, None, 0]  # (B, B): j is at risk when i has its event
        at_risk = risk.expand(len(risk), -1).masked_fill(~later, float("-inf")).logsumexp(1)
        return (at_risk - risk) * target[:, 1].to(risk.dtype)

    @property
    def compares_bags(self) -> bool:
        """Risk sets are made of the bags of a step."""
        return True

    def across_packs(self, step: StepLosses) -> Task:
        """Return the task whose risk sets are those of the step."""
        return _CoxOfStep(**dict(self)).within(step)

    def activate(self, logits: Tensor) -> Floats:
        """Return the logarithm of the relative risk, (B, 1)."""
        return to_numpy(wide(logits))

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the mean of the logarithms of the relative risks."""
        return torch.stack([wide(own) for own in logits]).mean(0)

    def _groups(self, folds: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        return folds

    def risk(self, outputs: Floats) -> Floats:
        """Return the logarithm of the relative risk."""
        return outputs[:, 0]

    @property
    @override
    def verdicts(self) -> tuple[str, ...]:
        return ("risk",)

    def table(self, outputs: Floats) -> Columns:
        """Return the column ``risk``."""
        return {"risk": outputs[:, 0]}


class _CoxOfStep(Cox):
    """A Cox task in training, which hears of the bags in other packs of the step."""

    _step: StepLosses = PrivateAttr()

    def within(self, step: StepLosses) -> Self:
        self._step = step
        return self

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return self._step.losses(self.time, wide(logits), target, super().bag_losses)

"""Survival: what a time and an event mean, two losses, and concordance.

Orientation. Internally 1 is an event that was seen and 0 is censored. A column whose name says ``censor`` has 1 for
censored, as in the CLAM family of tables, and is turned round; any other has 1 for the event.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from eosin.errors import LabelError
from eosin.mil.metrics import Floats, Metrics
from eosin.mil.task import Columns, Row, Task, number, rank_bins, to_numpy, wide

SMALLEST_PROBABILITY = 1e-7
TIED_RISK = 1e-8
YES = frozenset({"1", "1.0", "true", "yes", "dead", "deceased", "event", "1:deceased"})
NO = frozenset({"0", "0.0", "false", "no", "alive", "living", "censored", "0:living"})


class _Survival(Task):
    """What both survival tasks share: the columns and their orientation.

    Targets are (B, 2) float64: time, and 1 for an event or 0 for censored.
    """

    selection_metric: ClassVar[str] = "cindex"
    time: str = "time"
    event: str = "event"
    one_is_censored: bool = False

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of two columns, ``time,event``; a name with ``censor`` means that 1 is censored."""
        time, comma, event = (part.strip() for part in target.partition(","))
        if not comma:
            raise LabelError(
                f"survival needs two columns, time and event; name them (--target time,event), not {target!r}"
            )
        task = cls.parse({"time": time, "event": event, "one_is_censored": "censor" in event.lower()})
        if not task.encode(rows)[:, 1].any():
            raise LabelError(
                f"column {event!r} holds no event, 1 being {'censored' if task.one_is_censored else 'the event'}; "
                "if it is the other way round, rename the column (event or censorship)"
            )
        return task

    @property
    def columns(self) -> tuple[str, ...]:
        """Time and event."""
        return (self.time, self.event)

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return time and event, (B, 2) float64; `LabelError` for a negative time or a value of no meaning."""
        return torch.tensor([self._pair(row) for row in rows], dtype=torch.float64).reshape(-1, 2)

    def _pair(self, row: Row) -> tuple[float, float]:
        time = number(row[self.time], self.time)
        if time < 0:
            raise LabelError(f"{row[self.time]!r} in column {self.time!r}: a time cannot be negative")
        value = row[self.event].strip().lower()
        if value not in YES | NO:
            raise LabelError(f"{row[self.event]!r} in column {self.event!r} is neither 0 nor 1")
        return time, float((value in YES) != self.one_is_censored)

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the columns of times and of events as the table has them."""
        events = 1 - target[:, 1] if self.one_is_censored else target[:, 1]
        return [target[:, 0], events.astype(np.int64)]

    def require_trainable(self, target: Tensor) -> None:
        """Refuse targets without an event."""
        if not target[:, 1].any():
            raise LabelError("no training slide has an event; use fewer folds")

    def risk(self, outputs: Floats) -> Floats:
        """Return a number that is higher for an earlier event, (B,)."""
        raise NotImplementedError

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return cindex, see `concordance`."""
        return {"cindex": concordance(self.risk(outputs), target[:, 0], target[:, 1] == 1)}

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return event or censored, in thirds of the time by rank."""
        target = self.encode(rows).numpy()
        thirds = rank_bins(target[:, 0], 3)
        return [f"{'event' if seen else 'censored'}-{third}" for (_, seen), third in zip(target, thirds, strict=True)]


class DiscreteSurvival(_Survival):
    """Survival in a few bins of time: one logit per bin, the hazard of an event in it.

    ``h = σ(logits)``, ``S_k = Π_{j<=k} (1 - h_j)``. Loss of a bag with an event in bin Y: ``-log S_{Y-1} - log h_Y``;
    of a censored one: ``-(1 - alpha) log S_Y``; each argument at least 1e-7 (Zadeh and Schmid, 2020; the form
    that MHIM v2 and PackMIL use, with alpha 0).

    Attributes
    ----------
    edges : tuple of float
        Upper ends of all bins but the last: quantiles of the times of events of the training part, see `fit_to`.
    bins : int
        Number of bins.
    alpha : float
        Takes weight from the censored.
    time, event : str
        Columns.
    one_is_censored : bool
        Orientation of the event column in the table.
    """

    kind: Literal["survival"] = "survival"
    learnt: ClassVar[frozenset[str]] = frozenset({"edges"})
    bins: int = Field(default=4, ge=2)
    alpha: float = Field(default=0.0, ge=0, le=1)
    edges: tuple[float, ...] = ()

    def fit_to(self, target: Tensor) -> Self:
        """Return the task with bins of equal numbers of these targets' events."""
        times = target[target[:, 1] == 1, 0]
        parts = torch.arange(1, self.bins, dtype=times.dtype) / self.bins
        return self.model_copy(update={"edges": tuple(torch.quantile(times, parts).tolist())})

    @property
    def n_outputs(self) -> int:
        """One logit per bin."""
        return self.bins

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood of each bag."""
        edges = torch.tensor(self.edges, dtype=target.dtype, device=target.device)
        place = torch.bucketize(target[:, 0].contiguous(), edges, right=True)  # a time on an edge opens the next bin
        return survival_losses(wide(logits), place, target[:, 1], alpha=self.alpha)

    def activate(self, logits: Tensor) -> Floats:
        """Return the probability of surviving each bin, (B, K)."""
        return to_numpy((1 - wide(logits).sigmoid()).cumprod(1))

    def risk(self, outputs: Floats) -> Floats:
        """Return minus the sum of the survival probabilities."""
        return np.asarray(-outputs.sum(1))

    def table(self, outputs: Floats) -> Columns:
        """Return ``risk`` and ``survival_<bin>`` columns."""
        return {"risk": self.risk(outputs)} | {f"survival_{k + 1}": outputs[:, k] for k in range(self.bins)}


def survival_losses(logits: Tensor, place: Tensor, event: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Return the discrete-time negative log-likelihood of each bag.

    Parameters
    ----------
    logits : (B, K) float
    place : (B,) int64
        Bin of the event or of the censoring.
    event : (B,) float
        1 for an event, 0 for censored.
    alpha : float
        Weight that is taken from the censored.
    """
    hazard = logits.sigmoid()
    survival = (1 - hazard).cumprod(1)
    before = torch.cat([torch.ones_like(survival[:, :1]), survival], 1)  # (B, K + 1): S_{-1} ... S_{K-1}

    def log_at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[:, None])[:, 0].clamp(min=SMALLEST_PROBABILITY).log()

    seen = event.to(logits.dtype)
    happened = -(log_at(before, place) + log_at(hazard, place)) * seen
    censored = -log_at(before, place + 1) * (1 - seen)
    return happened + (1 - alpha) * censored


class Cox(_Survival):
    """Proportional hazards: one logit, the logarithm of the relative risk.

    Loss of a bag with an event at t: ``log Σ exp(r_j) - r`` over the bags of the *same pack* that are still at risk at
    t (Breslow's handling of ties); of a censored one: 0. Risk sets are those of a pack, so a step should have many
    bags: set ``training.bags_per_step`` to 16 or more.

    Attributes
    ----------
    time, event : str
        Columns.
    one_is_censored : bool
        Orientation of the event column in the table.
    """

    kind: Literal["cox"] = "cox"

    @property
    def n_outputs(self) -> int:
        """One logit."""
        return 1

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the negative partial log-likelihood of each bag within its pack."""
        risk = wide(logits)[:, 0]
        later = target[None, :, 0] >= target[:, None, 0]  # (B, B): j is at risk when i has its event
        at_risk = risk.expand(len(risk), -1).masked_fill(~later, float("-inf")).logsumexp(1)
        return (at_risk - risk) * target[:, 1].to(risk.dtype)

    def activate(self, logits: Tensor) -> Floats:
        """Return the logarithm of the relative risk, (B, 1)."""
        return to_numpy(wide(logits))

    def risk(self, outputs: Floats) -> Floats:
        """Return the logarithm of the relative risk."""
        return outputs[:, 0]

    def table(self, outputs: Floats) -> Columns:
        """Return the column ``risk``."""
        return {"risk": outputs[:, 0]}


def concordance(risk: Floats, time: Floats, event: NDArray[np.bool_], *, tied: float = TIED_RISK) -> float | None:
    """Return Harrell's C: how often the higher risk has the earlier event; None when no pair can be compared.

    Pair (i, j) is compared when i has an event and j lives longer, or is censored at the same time. Risks that differ
    by at most `tied` count one half (scikit-survival's ``concordance_index_censored``).
    """
    later = (time[None, :] > time[:, None]) | ((time[None, :] == time[:, None]) & ~event[None, :])
    compared = later & event[:, None]
    difference = risk[:, None] - risk[None, :]
    ties = (np.abs(difference) <= tied) & compared
    right = (difference > 0) & compared & ~ties
    pairs = int(compared.sum())
    return (int(right.sum()) + 0.5 * int(ties.sum())) / pairs if pairs else None

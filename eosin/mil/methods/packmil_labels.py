"""What PackMIL labels a hyperslide with, a bag of instances from several slides, and the loss of its residual branch.

Equation 3 of `packmil`. A slide of the hyperslide counts as one, or as its instances w.

- ``classes``: counts / largest count, a target of each class in [0, 1]; focal loss ``mean ¼ (1 - e^{-b})² b`` with b
  the sigmoid cross-entropy.
- ``shares``: counts / sum, softmax cross-entropy with soft targets.
- ``grades`` (ISUP 0 to 5): the weighted means of primary and secondary Gleason pattern, their sum interpolated between
  0→0, 6→1, 7→2 (3 if the primary pattern is higher), 8→4, 9→5 and rounded. Other numbers of ordered classes: the
  weighted mean of the class numbers, rounded. Loss ``-(1 - p) log p`` with p the probability of that grade, from
  softmax, or from the steps of ordered classes. It is the authors' asymmetric loss (γ₊ 1, γ₋ 4, no smoothing), in which
  γ₋ has no effect.
- ``survival``: the earliest slide's bin, an uncensored label if that slide is uncensored; else event bin Y of the
  earliest event in the pack (its own bin without one), Y_c its own bin and c the fraction of censored slides in
  ``-(1 - c) (log S_{Y-1} + log h_Y) - c log S_{Y_c}``.

Deviation from the authors' code: benign slides alone make a benign hyperslide; the code calls it grade 1.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.mil.survival import DiscreteSurvival
from eosin.mil.tasks import Ordinal, Task

Labels = Literal["auto", "classes", "shares", "grades", "survival"]
LabelWeights = Literal["slides", "instances"]
PRIMARY, SECONDARY = (2.0, 3.0, 3.0, 4.0, 4.0, 5.0), (2.0, 3.0, 4.0, 3.0, 4.0, 5.0)  # Gleason patterns of ISUP 0 to 5
NEEDED = {
    "classes": "classes without an order",
    "shares": "classes without an order, one of which is true",
    "grades": "ordered classes, or six grades as classes",
    "survival": "survival times in bins",
}


def choose_labels(task: Task, labels: Labels) -> Labels:
    """Return the labels to use: those asked for, or those that suit the task.

    Raises
    ------
    ConfigError
        If the task cannot have them.
    """
    ordered, survival = isinstance(task, Ordinal), isinstance(task, DiscreteSurvival)
    classes = not ordered and type(task).memberships is not Task.memberships
    fits: dict[Labels, bool] = {
        "survival": survival,
        "grades": ordered or (task.kind == "classification" and task.n_outputs == len(PRIMARY)),
        "classes": classes,
        "shares": task.kind == "classification",
    }
    if labels == "auto":
        labels = "survival" if survival else "grades" if ordered else "classes"
    if not fits[labels]:
        raise ConfigError(
            f"packmil labels hyperslides by {labels}, which needs a task with {NEEDED[labels]}, not {task.kind} with "
            f"{task.n_outputs} outputs; choose other labels or residual_weight 0"
        )
    return labels


def residual_loss(
    task: Task, labels: Labels, logits: Tensor, target: Tensor, pack_of: Sequence[int], weights: Sequence[int]
) -> Tensor:
    """Return the loss of hyperslides; mean over hyperslides, for ``classes`` also over the classes.

    Parameters
    ----------
    task : Task
    labels : {"classes", "shares", "grades", "survival"}
        See `choose_labels`.
    logits : (P, K) float
        Of the hyperslides.
    target : (B, ...)
        The slides' targets.
    pack_of : sequence of int
        Hyperslide of each slide.
    weights : sequence of int
        What each slide counts.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    member = membership(pack_of, wide)  # (P, B)
    weight = torch.tensor(weights, dtype=wide.dtype, device=wide.device)
    if labels == "classes":
        return focal_loss(wide, class_shares(member * weight, task.memberships(target).to(wide)))
    if labels == "shares":
        shares = class_shares(member * weight, task.memberships(target).to(wide), of="sum")
        return -(shares * functional.log_softmax(wide, 1)).sum(1).mean()
    if labels == "grades":
        grades = hyperslide_grade(member, target, weight, n_grades=len(class_logs(task, wide[:1])[0]))
        return asymmetric_loss(class_logs(task, wide), grades.argmax(1))
    assert isinstance(task, DiscreteSurvival)  # checked when built
    return survival_loss(wide, *hyperslide_survival(member, *_bins_and_censored(task, target), weight))


def membership(pack_of: Sequence[int], like: Tensor) -> Tensor:
    """Return which slides a hyperslide holds, (P, B) of zeros and ones."""
    numbers = torch.tensor(pack_of, device=like.device)
    packs = torch.arange(pack_of[-1] + 1, device=like.device)
    return (packs[:, None] == numbers).to(like.dtype)


def class_shares(member: Tensor, memberships: Tensor, *, of: Literal["largest", "sum"] = "largest") -> Tensor:
    """Return class counts over the largest count or over their sum: (P, B) weights, (B, K) -> (P, K).

    With one output the other class is counted, too.
    """
    counts = member @ memberships
    others = member.sum(1, keepdim=True) - counts if counts.shape[1] == 1 else counts[:, :0]
    every = torch.cat([counts, others], 1)
    whole = every.amax(1, keepdim=True) if of == "largest" else every.sum(1, keepdim=True)
    return counts / whole.clamp_min(1e-12)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return ``mean ¼ (1 - e^{-b})² b`` with b the sigmoid cross-entropy with soft targets, all (P, K)."""
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (0.25 * (1 - torch.exp(-entropy)).square() * entropy).mean()


def hyperslide_grade(
    member: Tensor, grade: Tensor, weight: Tensor, *, n_grades: int = len(PRIMARY), benign_is_zero: bool = True
) -> Tensor:
    """Return the two neighbouring grades of a hyperslide, weighted: (P, B), (B,) int64, (B,) -> (P, n_grades).

    Six grades are ISUP's. With ``benign_is_zero=False`` benign slides alone give two thirds of grade 1, as in the
    authors' code.
    """
    weights = member * weight
    whole = weights.sum(1).clamp_min(1e-12)
    is_isup = n_grades == len(PRIMARY)
    value = _isup_grade(weights, whole, grade) if is_isup else weights @ grade.to(weights.dtype) / whole
    if benign_is_zero:
        value = torch.where((member @ (grade > 0).to(member.dtype)) > 0, value, 0)
    distance = (value[:, None] - torch.arange(n_grades, device=value.device)).abs()
    return (1 - distance).clamp_min(0)


def _isup_grade(weights: Tensor, whole: Tensor, grade: Tensor) -> Tensor:
    """Return the grade of mean Gleason patterns, (P,) from 0 to 5; sums of counts are exact, so that ties are."""
    primary, secondary = (
        weights @ grade.new_tensor(table, dtype=weights.dtype)[grade] for table in (PRIMARY, SECONDARY)
    )
    total = (primary + secondary) / whole
    seven = torch.where(secondary >= primary, 2.0, 3.0).to(total.dtype)
    value = torch.where(total <= 6, total / 6, 1 + (total - 6) * (seven - 1))
    value = torch.where(total > 7, seven + (total - 7) * (4 - seven), value)
    return torch.where(total > 8, 4 + (total - 8), value).clamp(0, 5)


def class_logs(task: Task, logits: Tensor) -> Tensor:
    """Return the log probability of each class, (P, classes), from softmax or from the steps of ordered classes."""
    if not isinstance(task, Ordinal):
        return functional.log_softmax(logits, 1)
    zeros = logits.new_zeros(len(logits), 1)
    reached = torch.cat([zeros, functional.logsigmoid(logits).cumsum(1)], 1)
    return reached + torch.cat([functional.logsigmoid(-logits), zeros], 1)


def asymmetric_loss(logs: Tensor, target: Tensor) -> Tensor:
    """Return the mean of ``-(1 - p) log p``: log probabilities (P, classes), true class (P,)."""
    true = logs.gather(1, target[:, None])
    return -((1 - true.exp()) * true).mean()


def hyperslide_survival(
    member: Tensor, time_bin: Tensor, censored: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return event bin Y, soft censoring c and censoring bin Y_c of hyperslides, (P,) each.

    Parameters
    ----------
    member : (P, B) of zeros and ones
    time_bin : (B,) int64
    censored : (B,) of zeros and ones
    weight : (B,) float, optional
        What each slide counts in c.
    """
    never = int(1e9)
    holds = member > 0
    n_slides = len(time_bin)
    place = time_bin * n_slides + torch.arange(n_slides, device=time_bin.device)  # the first of ties is smallest
    first = torch.where(holds, place, never).argmin(1)
    earliest = time_bin[first]
    event = torch.where(holds & (censored == 0), time_bin, never).amin(1)
    is_censored = censored[first] > 0
    weights = member if weight is None else member * weight
    share = (weights @ censored.to(member.dtype)) / weights.sum(1).clamp_min(1e-12)
    event_bin = torch.where(is_censored & (event < never), event, earliest)
    return event_bin, torch.where(is_censored, share, 0), earliest


def survival_loss(logits: Tensor, event_bin: Tensor, censored: Tensor, censored_bin: Tensor) -> Tensor:
    """Return the mean of ``-(1 - c) (log S_{Y-1} + log h_Y) - c log S_{Y_c}``, probabilities clamped at 1e-7."""
    hazard = logits.sigmoid()
    survival = functional.pad((1 - hazard).cumprod(1), (1, 0), value=1.0)  # S_{-1}, S_0, ...
    before = survival.gather(1, event_bin[:, None]).clamp_min(1e-7).log()
    event = hazard.gather(1, event_bin[:, None]).clamp_min(1e-7).log()
    after = survival.gather(1, censored_bin[:, None] + 1).clamp_min(1e-7).log()
    soft = censored[:, None]
    return (-(1 - soft) * (before + event) - soft * after).mean()


def _bins_and_censored(task: DiscreteSurvival, target: Tensor) -> tuple[Tensor, Tensor]:
    edges = torch.tensor(task.edges, dtype=target.dtype, device=target.device)
    return torch.bucketize(target[:, 0].contiguous(), edges, right=True), 1 - target[:, 1]

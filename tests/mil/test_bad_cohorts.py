"""Cohorts that say little or nothing: every measure is undefined or has an interval that can be, for every task."""

import numpy as np
import pytest
import torch

from eosin.mil._evaluate import bootstrap, summarise_folds
from eosin.mil._metrics import value_range
from eosin.mil.task import make_task

N = 12
TARGETS = {
    "classification": "label",
    "binary": "label",
    "ordinal": "grade",
    "multilabel": "label,other",
    "regression": "value",
    "cox": "time,event",
    "survival": "time,event",
    "multitask": "label; ordinal:grade; regression:value; cox:time,event",
}
COHORTS = (
    "ordinary",
    "one class",
    "two patients",
    "one patient",
    "perfect separation",
    "constant scores",
    "all censored",
)


def table(n, *, classes=2, events=True):
    """Return rows in which every column tells slides apart in the same order."""
    return [
        {
            "slide_id": f"s{i}", "patient_id": f"p{i}", "label": "ab"[i % classes], "other": "01"[i // 2 % classes],
            "grade": str(i % classes), "value": str(float(i)), "time": str(n - i), "event": str(int(events)),
        }
        for i in range(n)
    ]  # fmt: skip


def truth_as_logits(task, targets, rows):
    """Return logits that put every slide on its side, or in its place."""
    if task.kind == "multitask":
        return torch.cat([truth_as_logits(part, part.encode(rows), rows) for part in task.parts], 1)
    if task.kind in ("regression", "cox", "survival"):
        order = torch.tensor([float(row["value"]) for row in rows])[:, None]
        return (order - order.mean()) / order.std() * torch.linspace(1, 1.1, task.n_outputs)
    classes = targets.long() if targets.ndim == 1 else targets
    if task.kind == "classification":
        return 8.0 * torch.nn.functional.one_hot(classes, task.n_outputs).float()
    return 16.0 * classes.reshape(len(rows), -1).float().clamp(0, 1) - 8


def cohort(kind, name):
    n = 2 if name == "two patients" else N
    rows = table(n)
    task = make_task(kind, table(N), target=TARGETS[kind])
    task = task.fit_to(task.encode(table(N)))
    if name == "one class":
        rows = table(n, classes=1)
    if name == "all censored":
        rows = table(n, events=False)
    targets = task.encode(rows)
    noise = torch.randn(n, task.n_outputs, generator=torch.Generator().manual_seed(0))
    logits = truth_as_logits(task, targets, rows) if name == "perfect separation" else noise
    logits = torch.zeros_like(noise) if name == "constant scores" else logits
    patients = ["p"] * n if name == "one patient" else [row["patient_id"] for row in rows]
    return task, task.activate(logits), targets.numpy(), patients


@pytest.mark.parametrize("name", COHORTS)
@pytest.mark.parametrize("kind", TARGETS)
def test_no_interval_is_impossible(kind, name):
    task, outputs, targets, patients = cohort(kind, name)
    for metric, found in bootstrap(task, outputs, targets, patients, resamples=25).items():
        lowest, highest = value_range(metric)
        said = f"{metric}: {found}"
        if found.value is None:
            assert found.lower is found.upper is None, said
            continue
        assert np.isfinite(found.value), said
        assert lowest <= found.value <= highest, said
        assert (found.lower is None) == (found.upper is None), said
        if found.lower is not None:
            assert lowest <= found.lower <= found.value <= found.upper <= highest, said
            assert found.lower < found.upper, said


@pytest.mark.parametrize("kind", TARGETS)
def test_a_fold_that_defines_nothing_leaves_the_others_as_they_are(kind):
    ordinary = [cohort(kind, name) for name in ("ordinary", "perfect separation")]
    folds = [task.metrics(outputs, targets) for task, outputs, targets, _ in ordinary]
    alone = summarise_folds(folds)
    empty = dict.fromkeys(folds[0])
    assert {name: found["mean"] for name, found in summarise_folds([*folds, empty]).items()} == {
        name: found["mean"] for name, found in alone.items()
    }
    for name, found in alone.items():
        lowest, highest = value_range(name)
        assert found["interval"] is None or lowest <= found["interval"][0] <= found["interval"][1] <= highest

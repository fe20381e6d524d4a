"""One task after another: ``eosin train --continue-from RUN`` learns new classes and keeps count of what is forgotten.

Every training run of a classification leaves ``sequence.json``: its tasks so far, where their features and labels lie,
which slides judge them, and R[i, j], the accuracy on task j after training task i, with the classes of all tasks to
choose from. A run that continues another one adds a task and a row, and writes ``continual.csv``. The low-rank updates
themselves are in `eosin/mil/methods/owlora.py`.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from eosin._devices import choose_device
from eosin._files import write_json, write_text
from eosin._seals import KEY, is_intact, read_json, sealed
from eosin._tables import csv_text
from eosin.errors import CheckpointError, ConfigError, EosinError, LabelError
from eosin.mil._checkpoint import ModelCard, load_card, load_model
from eosin.mil._data import Examples
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import Component, Recipe
from eosin.mil._study import Study, open_study
from eosin.mil._tables import shown
from eosin.mil.continual._metrics import continual_metrics
from eosin.mil.slots import AGGREGATORS, Aggregator
from eosin.mil.task import Task
from eosin.mil.tasks._classification import Classification
from eosin.options import Options

SEQUENCE = "sequence.json"
MAX_BYTES = 64 * 2**20
TABLE = "continual.csv"
METHOD = "owlora"
ORIGIN = ("continue_from", "model_id")

logger = logging.getLogger(__name__)


class _LaterClasses(Classification):
    """A classification of which the first classes were learnt before and have no training slides now."""

    known: int = Field(default=0, exclude=True)

    def require_trainable(self, target: Tensor) -> None:
        counts = target.bincount(minlength=len(self.classes)).tolist()
        absent = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        lost = [name for name in absent if name in self.classes[self.known :]]
        if lost:
            raise LabelError(f"no training slide of class {', '.join(lost)}; use fewer folds, or leave the class out")


class Source(Options):
    """Where the examples of a task come from, as `eosin.mil._study.open_study` takes it.

    Attributes
    ----------
    features, labels : Path
        Absolute.
    target : str
        Label column.
    group : str
    level : str
    slide_table : Path, optional
        Slides of each patient, for labels by patient.
    """

    features: Path
    labels: Path
    target: str
    group: Literal["patient", "slide"] = "patient"
    level: Literal["slide", "patient"] = "slide"
    slide_table: Path | None = None

    @classmethod
    def of(
        cls,
        features: Path,
        labels: Path,
        study: Study,
        *,
        group: str = "patient",
        level: str = "slide",
        slide_table: Path | None = None,
    ) -> "Source":
        """Return the source of a study that was opened with these arguments."""
        places = {"features": features.resolve(), "labels": labels.resolve()}
        places |= {} if slide_table is None else {"slide_table": slide_table.resolve()}
        return cls.parse({**places, "target": ",".join(study.task.columns), "group": group, "level": level})


class TaskRecord(Options):
    """A task of a sequence.

    Attributes
    ----------
    classes : tuple of str
    source : Source
    judged_by : str
        ``test``, ``val`` or ``none``: the part of the split that the accuracy is measured on.
    slides : tuple of str
        Its bags.
    run : Path
        Folder of the model after this task.
    """

    classes: tuple[str, ...]
    source: Source
    judged_by: Literal["test", "val", "none"]
    slides: tuple[str, ...]
    run: Path


class TaskSequence(Options):
    """What ``sequence.json`` holds.

    Attributes
    ----------
    tasks : tuple of TaskRecord
    accuracy : tuple of tuples
        Row i has i + 1 entries; None where it could not be measured.
    """

    schema_version: Literal[1] = 1
    tasks: tuple[TaskRecord, ...]
    accuracy: tuple[tuple[float | None, ...], ...] = ()

    def results(self) -> NDArray[np.float64]:
        """Return R, (T, T), NaN where it is not known."""
        table = np.full((len(self.tasks), len(self.tasks)), np.nan)
        for number, row in enumerate(self.accuracy):
            table[number, : len(row)] = [np.nan if value is None else value for value in row]
        return table

    def row(self) -> tuple[float | None, ...]:
        """Return the accuracies after the last task."""
        return self.accuracy[-1]


def base_recipe(run: Path) -> Recipe:
    """Return the recipe of a model, with its aggregator made ready for updates.

    Raises
    ------
    CheckpointError
        If there is no model.
    ConfigError
        If it was trained by a strategy that a later task cannot follow.
    """
    recipe = load_card(run).recipe
    if recipe.strategy.name not in ("supervised", METHOD):
        raise ConfigError(
            f"{run}: was trained by the strategy {recipe.strategy.name}; a sequence of tasks needs supervised training"
        )
    if recipe.aggregator.name == METHOD:
        strategy = {key: value for key, value in recipe.strategy.options.items() if key not in ORIGIN}
        return recipe.model_copy(update={"strategy": Component(name=METHOD, options=strategy)})
    options = {"host": recipe.aggregator.name, "host_options": recipe.aggregator.options}
    aggregator = Component(name=METHOD, options=options)
    return recipe.model_copy(update={"aggregator": aggregator, "strategy": Component(name=METHOD)})


def continued(run: Path, study: Study, recipe: Recipe) -> tuple[Recipe, Study]:
    """Return recipe and study of the task after a model's last: new classes follow the old ones.

    Parameters
    ----------
    run : Path
        Folder of the model.
    study : Study
        Of the new task alone.
    recipe : Recipe
        Terms, training and options of the strategy; the aggregator must be the model's, as `base_recipe` returns it or
        as it was trained.

    Raises
    ------
    ConfigError
        If the task is not classification, or the recipe builds another aggregator.
    LabelError
        If a class is known already.
    FeatureMismatchError
        If the features are of another kind.
    """
    card = load_card(run)
    old = card.load_task()
    if not (isinstance(old, Classification) and isinstance(study.task, Classification)):
        raise ConfigError(
            "--continue-from works with classification only; "
            f"{run} has the task {old.kind}, the new labels have {study.task.kind}"
        )
    card.features.require_match(study.examples.bags.spec, run, expected_by=f"the model in {run}")
    twice = [name for name in study.task.classes if name in old.classes]
    if twice:
        raise LabelError(f"{run} already has the classes {shown(twice)}; give the classes of the new task other names")
    task = _LaterClasses(classes=(*old.classes, *study.task.classes), target=study.task.target, known=len(old.classes))
    examples = replace(study.examples, targets=study.examples.targets + len(old.classes))
    return _with_update(recipe, run, card, task), replace(study, task=task, examples=examples)


def _with_update(recipe: Recipe, run: Path, card: ModelCard, task: _LaterClasses) -> Recipe:
    before = AGGREGATORS.resolve(METHOD, base_recipe(run).aggregator.options)
    asked = _asked(recipe)
    first = before["classes"] is None
    if _host(asked) != _host(before) or not (first or asked["rank"] == before["rank"]):
        raise ConfigError(
            f"{run} holds {before['host']}, whose options stay as they are in later tasks; leave --recipe and the "
            "aggregator's options out"
        )
    options = {**asked, "classes": [*(before["classes"] or (task.known,)), len(task.classes) - task.known]}
    strategy = recipe.strategy.options if recipe.strategy.name == METHOD else {}
    origin = dict(zip(ORIGIN, (str(run.resolve()), card.model_id), strict=True))
    return recipe.model_copy(
        update={
            "aggregator": Component(name=METHOD, options=options),
            "strategy": Component(name=METHOD, options={**strategy, **origin}),
            "linear_below": 0,  # a linear part would know the new classes alone
            "training": recipe.training.model_copy(update={"standardize": False}),  # the first task's statistics stay
        }
    )


def _asked(recipe: Recipe) -> dict[str, Any]:
    """Return the options that a recipe has for `owlora`, whether it names that or the host."""
    part = recipe.aggregator
    options = part.options if part.name == METHOD else {"host": part.name, "host_options": part.options}
    return AGGREGATORS.resolve(METHOD, options)


def _host(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return options["host"], AGGREGATORS.resolve(options["host"], options["host_options"] or {})


def read_sequence(run: Path) -> TaskSequence:
    """Read ``sequence.json``.

    Raises
    ------
    CheckpointError
        If it is not there or damaged.
    """
    path = run / SEQUENCE
    try:
        data = read_json(path, most_bytes=MAX_BYTES)
        if not isinstance(data, dict) or (KEY in data and not is_intact(data)):
            raise ValueError("it is damaged or was changed by hand")
        return TaskSequence.parse({name: value for name, value in data.items() if name != KEY}, source=str(path))
    except FileNotFoundError:
        raise CheckpointError(run, f"has no {SEQUENCE}; train the earlier task again with `eosin train`") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read ({error}); train the earlier task again") from None


def record_task(
    folder: Path,
    study: Study,
    source: Source,
    *,
    test: tuple[str, ...] = (),
    val: tuple[str, ...] = (),
    run: Path | None = None,
    device: str = "auto",
) -> TaskSequence | None:
    """Write ``sequence.json`` of a new model; of a later task measure it on its own and all before, ``continual.csv``.

    Parameters
    ----------
    folder : Path
        Of the new model.
    study : Study
        As `continued` returned it, or of a first task.
    source : Source
    test, val : tuple of str
        Held-out bags; those of `val` judge where there is no test part.
    run : Path, optional
        Folder of the model before.
    device : str

    Returns
    -------
    TaskSequence or None
        None for a task that is not classification.

    Raises
    ------
    CheckpointError
        If the earlier run does not say what its tasks were.
    """
    if not isinstance(study.task, Classification):
        return None
    known = study.task.known if isinstance(study.task, _LaterClasses) else 0
    before = TaskSequence(tasks=()) if run is None else read_sequence(run)
    slides = test or val
    judged_by: Literal["test", "val", "none"] = "test" if test else "val" if val else "none"
    record = TaskRecord(
        classes=study.task.classes[known:], source=source, judged_by=judged_by, slides=slides, run=folder.resolve()
    )
    rows = before.accuracy
    if run is not None:
        rows = rows or (_row(run, before.tasks, device),)  # a first task is not judged before there is a second
        rows = (*rows, _row(folder, (*before.tasks, record), device))
    sequence = TaskSequence(tasks=(*before.tasks, record), accuracy=rows)
    write_json(folder / SEQUENCE, sealed(sequence.model_dump(mode="json")))
    if run is not None:
        write_text(folder / TABLE, _table(sequence))
    return sequence


def _row(folder: Path, tasks: tuple[TaskRecord, ...], device: str) -> tuple[float | None, ...]:
    """Return the accuracy of a model on each of these tasks."""
    model, card = load_model(folder)
    task = card.load_task()
    return tuple(_accuracy(model, task, _held_out(record, task), device) for record in tasks)


def _held_out(record: TaskRecord, task: Task) -> Examples | None:
    """Return the bags that judge an earlier task; None, with a warning, when they are gone."""
    source = record.source
    try:
        study = open_study(
            source.features,
            source.labels,
            target=source.target,
            group=source.group,
            level=source.level,
            slide_table=source.slide_table,
            missing="drop",
        )
        examples = study.examples.subset(record.slides)
        return replace(examples, targets=task.encode(study.table.rows(examples.ids)))
    except (EosinError, OSError) as error:
        logger.warning("the task %s cannot be tested again: %s", ", ".join(record.classes), error)
        return None


def _accuracy(model: Aggregator, task: Task, examples: Examples | None, device: str) -> float | None:
    """Return the share of bags whose most probable class, of all tasks, is right."""
    if examples is None or not len(examples):
        return None
    outputs = predict_outputs(model, task, examples.bags, examples.ids, device=choose_device(device))
    return float((outputs.argmax(1) == examples.targets.numpy()).mean())


def measures(sequence: TaskSequence, n_tasks: int) -> dict[str, float | None]:
    """Return average accuracy, forgetting and backward transfer after the first tasks; None where R has gaps."""
    table = sequence.results()[:n_tasks, :n_tasks]
    if np.isnan(table[np.tril_indices(n_tasks)]).any():
        return {"average_accuracy": None, "forgetting": None, "backward_transfer": None}
    if n_tasks == 1:
        return {"average_accuracy": float(table[0, 0]), "forgetting": None, "backward_transfer": None}
    found = continual_metrics(table)
    return {
        "average_accuracy": found.final_average,
        "forgetting": found.forgetting,
        "backward_transfer": found.backward_transfer,
    }


def _table(sequence: TaskSequence) -> str:
    """Return a row per task that was trained: R, then the measures of the sequence so far; empty where unknown."""
    names = [f"accuracy_{'_'.join(task.classes)}" for task in sequence.tasks]
    rows = [["after_task", *names, *measures(sequence, 1)]]
    for number, row in enumerate(sequence.accuracy, start=1):
        cells = [*row, *([None] * (len(names) - number)), *measures(sequence, number).values()]
        rows.append([str(number), *("" if cell is None else f"{cell:.6g}" for cell in cells)])
    return csv_text(rows)


def summary(sequence: TaskSequence) -> list[str]:
    """Return what a person should read after a training: the last row of R and its measures."""
    lines = [
        f"task {number} ({', '.join(task.classes)}): accuracy {_shown(value)}, {len(task.slides)} {_part(task)} slides"
        for number, (task, value) in enumerate(zip(sequence.tasks, sequence.row(), strict=True), start=1)
    ]
    found = measures(sequence, len(sequence.tasks))
    parts = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in found.items()]
    return [*lines, f"after {len(sequence.tasks)} tasks: {', '.join(parts)}"]


def _part(task: TaskRecord) -> str:
    return {"test": "test", "val": "validation", "none": "held-out"}[task.judged_by]


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"

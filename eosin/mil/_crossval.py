"""Cross-validation: a model per fold, out-of-fold predictions, and metrics over folds and over patients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin._claims import claimed
from eosin._devices import choose_device
from eosin._files import write_json, write_text
from eosin._filesets import begin_set, finish_set, require_named
from eosin._tables import Table, csv_text, read_table
from eosin.errors import LabelError
from eosin.mil._checkpoint import CARD
from eosin.mil._cohort import Cohort
from eosin.mil._data import Examples
from eosin.mil._evaluate import RESAMPLES, bootstrap, predict_outputs, summarise_folds
from eosin.mil._flow import Flow
from eosin.mil._metrics import Floats, Metrics
from eosin.mil._recipe import Recipe
from eosin.mil._seen import Part, Sight, seen_counts
from eosin.mil._splits import Split, check_splits, with_validation
from eosin.mil._train import fit
from eosin.mil._training_run import Fitted
from eosin.mil.task import Task
from eosin.options import Options

METRICS = "metrics.json"
PREDICTIONS = "predictions.csv"
PATIENTS = "predictions_patients.csv"
VAL_FRACTION = 0.15


FoldSplits = Split | Sequence[Split]
"""A fold is a split, or several with the same test part whose models answer together (nested splits)."""


@dataclass(frozen=True, eq=False)
class Fold:
    """What a fold's model, or models, say of its test slides.

    Attributes
    ----------
    number : int
    ids, patient_ids : tuple of str
    outputs : (n, outputs) float
    targets : (n, ...) array
    metrics : dict
    task : Task
        With what the training and validation parts of the fold taught.
    validation : tuple of dict
        Validation metrics of each model.
    n_train : int
        Slides that shaped the models; 0 where nobody knows.
    """

    number: int
    ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    outputs: Floats
    targets: NDArray[Any]
    metrics: Metrics
    task: Task
    validation: tuple[Metrics, ...] = ()
    n_train: int = 0


def cohort_of(examples: Examples, task: Task, rows: Sequence[Mapping[str, str]], *, site: str | None = None) -> Cohort:
    """Return what splits must know of examples.

    Parameters
    ----------
    examples : Examples
    task : Task
    rows : sequence of mappings
        The rows of the label table of these examples, in their order.
    site : str, optional
        Column of sites that must not be on two sides.
    """
    sites = tuple(row[site] for row in rows) if site else ()
    return Cohort(examples.ids, examples.patient_ids, tuple(task.strata(rows)), sites, task.soft_strata(rows))


def crossval(
    recipe: Recipe,
    task: Task,
    examples: Examples,
    splits: Sequence[FoldSplits],
    *,
    cohort: Cohort,
    out: Path,
    device: str = "auto",
    precision: str = "fp32",
    val_fraction: float = VAL_FRACTION,
    resamples: int = RESAMPLES,
    flow: Flow | None = None,
    progress: Callable[[Fold], None] | None = None,
) -> dict[str, Any]:
    """Train and test every fold.

    Parameters
    ----------
    recipe : Recipe
        Fold `i` trains with seed ``training.seed + i``.
    task : Task
    examples : Examples
        All labelled bags.
    splits : sequence of Split, or of sequences of Split
        A fold without a validation part gets one from its training part, unless the recipe selects the last epoch.
        Nothing is ever selected by a test part. Several splits with one test part are one fold: a model is trained on
        each, and the mean of their outputs is tested.
    cohort : Cohort
        Of these examples, see `cohort_of`.
    out : Path
        Receives ``fold_<i>/`` with each model (``fold_<i>/inner_<j>/`` of nested splits), ``predictions.csv`` and
        ``metrics.json``. Folds that are there already, of the same recipe and data, are not trained again.
    device, precision
        As in `eosin.mil._train.fit`.
    val_fraction : float
        Share of the training patients that select the model where a split has none.
    resamples : int
        Of the bootstrap over patients.
    flow : Flow, optional
        What became of the slides that were given, see `eosin.mil._study.Study.account`; written to ``cohort.csv`` and
        into the metrics.
    progress : callable, optional
        Is given each fold when it is done.

    Returns
    -------
    dict
        What ``metrics.json`` holds: ``metrics`` over folds (mean, standard_deviation, standard_error, interval,
        n_folds), ``out_of_fold`` over all test predictions with intervals of a bootstrap over patients, ``folds``, and
        where some patients have several slides ``patients``, the same as ``out_of_fold`` by patient.

    Raises
    ------
    LabelError
        If the splits leak, name unknown slides or leave a class out of a training part.
    """
    for fold_splits in splits:
        check_splits(inner_splits(fold_splits), cohort)
    untested = [str(number) for number, fold in enumerate(splits) if not inner_splits(fold)[0].test]
    if untested:
        raise LabelError(
            f"there are no slides to test in fold {', '.join(untested)}; "
            "pass splits with a test part, or use `eosin train`"
        )
    plan = FoldPlan(recipe, task, examples, out, device, precision)
    models = [
        f"{folder.relative_to(out)}/{CARD}"
        for number, fold in enumerate(splits)
        for folder in plan.folders(number, fold)
    ]
    # from here on nothing of an earlier run in the folder counts as a result
    begin_set(out, [*models, PREDICTIONS, METRICS], pattern=r"fold_\d+")
    folds = []
    for number, fold_splits in enumerate(splits):
        complete = [complete_split(split, recipe, cohort, val_fraction, number) for split in inner_splits(fold_splits)]
        with claimed(out / f"fold_{number}"):  # another run with the same folder trains another fold meanwhile
            fold = plan.run(number, complete, plan.folders(number, fold_splits))
        folds.append(fold)
        if progress is not None:
            progress(fold)
    summary = write_folds(recipe, task, folds, out, resamples=resamples, flow=flow)
    finish_set(out, [*models, *result_files(summary)])
    return summary


def result_files(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that `write_folds` wrote with these metrics."""
    return [PREDICTIONS, METRICS, *([PATIENTS] if "patients" in summary else [])]


def write_predictions(path: Path, folds: Sequence[Fold]) -> None:
    """Write the table of the test predictions of folds."""
    write_text(path, _predictions(folds))


def write_folds(
    recipe: Options,
    task: Task,
    folds: Sequence[Fold],
    out: Path,
    *,
    resamples: int,
    flow: Flow | None = None,
    part: Part = "no",
) -> dict[str, Any]:
    """Write ``predictions.csv`` and ``metrics.json`` of finished folds, and ``cohort.csv``; return the metrics.

    Where a patient has several slides with one target, ``predictions_patients.csv``, too. `part` is what the models did
    with the slides that judge them; the metrics count them under ``seen``.
    """
    write_predictions(out / PREDICTIONS, folds)
    summary = _summary(recipe, task, folds, resamples)
    summary["seen"] = seen_counts(Sight(part) for fold in folds for _ in fold.ids)
    patients = by_patient(folds)
    if patients:
        write_predictions(out / PATIENTS, patients)
        summary["patients"] = pooled_figures(task, patients, resamples)
    if flow is not None:
        flow.write(out)
        summary["cohort"] = flow.as_json()
    write_json(out / METRICS, summary)
    return summary


def read_predictions(path: Path) -> Table:
    """Read predictions that a command has written.

    Raises
    ------
    ConfigError
        If the file is missing, not a table, or not the one that the manifest beside it names.
    """
    require_named(path)
    return read_table(path)


def inner_splits(fold: FoldSplits) -> Sequence[Split]:
    """Return the splits of a fold: itself, or the nested ones."""
    return [fold] if isinstance(fold, Split) else fold


def tested_slides(folds: Sequence[FoldSplits]) -> list[str]:
    """Return the slides of the test parts, each once."""
    return list(dict.fromkeys(slide for fold in folds for slide in inner_splits(fold)[0].test))


def complete_split(split: Split, recipe: Recipe, cohort: Cohort, val_fraction: float, number: int) -> Split:
    """Return a split with the validation part that its recipe needs."""
    # nothing is selected, so no slide is kept from training
    if recipe.training.select == "last":
        return split
    return with_validation(split, cohort, val_fraction=val_fraction, seed=recipe.training.seed + number)


def judge_models(made: Sequence[Fitted], task: Task, test: Examples, *, number: int = 0, device: str = "auto") -> Fold:
    """Return what a model, or several together, say of slides.

    Parameters
    ----------
    made : sequence of Fitted
    task : Task
        As it was before training.
    test : Examples
    number : int
        Of the fold.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    """
    tasks = [fitted.card.load_task() for fitted in made]
    outputs = [
        predict_outputs(fitted.model, own, test.bags, test.ids, device=choose_device(device))
        for fitted, own in zip(made, tasks, strict=True)
    ]
    pooled, together = task.pooled(tasks, outputs)
    judge = tasks[0] if len(tasks) == 1 else pooled.with_mean_threshold(tasks)
    mean = together.reshape(len(tasks), len(test), -1).mean(0)
    targets = test.targets.numpy()
    validation = tuple(fitted.card.training["validation"] for fitted in made)
    return Fold(number, test.ids, test.patient_ids, mean, targets, judge.metrics(mean, targets), judge, validation)


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """What all folds have in common."""

    recipe: Recipe
    task: Task
    examples: Examples
    out: Path
    device: str
    precision: str

    def folders(self, number: int, fold: FoldSplits) -> list[Path]:
        """Return the model folders of a fold: one, or one for each of its nested splits."""
        folder = self.out / f"fold_{number}"
        return [folder] if isinstance(fold, Split) else [folder / f"inner_{place}" for place in range(len(fold))]

    def run(self, number: int, splits: Sequence[Split], folders: Sequence[Path]) -> Fold:
        """Train the models of a fold and test them together."""
        made = self.train(number, splits, folders)
        test = self.examples.subset(splits[0].test)
        fold = judge_models(made, self.task, test, number=number, device=self.device)
        # validation slides have chosen the model, so they are part of what it saw
        return replace(fold, n_train=len(set(splits[0].train) | set(splits[0].val)))

    def train(self, number: int, splits: Sequence[Split], folders: Sequence[Path]) -> list[Fitted]:
        """Train the models of a fold; those that are there already are only read."""
        return [self._train(number, split, place) for split, place in zip(splits, folders, strict=True)]

    def _train(self, number: int, split: Split, folder: Path) -> Fitted:
        training = self.recipe.training
        # with one seed all folds would start from the same weights, and their spread would not show that chance
        seeded = training.model_copy(update={"seed": training.seed + number})
        return fit(
            self.recipe.model_copy(update={"training": seeded}),
            self.task,
            self.examples.subset(split.train),
            self.examples.subset(split.val),
            folder=folder,
            device=self.device,
            precision=self.precision,
        )


def _predictions(folds: Sequence[Fold]) -> str:
    first = folds[0]
    rows: list[list[object]] = [
        ["fold", "slide_id", "patient_id", *first.task.columns, *first.task.table(first.outputs)]
    ]
    for fold in folds:
        columns = [*fold.task.decode(fold.targets), *fold.task.table(fold.outputs).values()]
        for row, (slide, patient) in enumerate(zip(fold.ids, fold.patient_ids, strict=True)):
            rows.append([fold.number, slide, patient, *(column[row] for column in columns)])
    return csv_text(rows)


def by_patient(folds: Sequence[Fold]) -> list[Fold]:
    """Return the folds with a row per patient, the mean over the patient's slides as in `eosin.mil._patients`.

    Empty when no patient has several slides, or the slides of one have different targets.
    """
    made = []
    for fold in folds:
        names, first, number = np.unique(fold.patient_ids, return_index=True, return_inverse=True)
        # nan is a target that is not known, equal to itself here
        if not np.array_equal(fold.targets, fold.targets[first][number], equal_nan=fold.targets.dtype.kind == "f"):
            return []
        outputs = np.stack([fold.outputs[number == place].mean(0) for place in range(len(names))])
        patients, targets = tuple(map(str, names)), fold.targets[first]
        metrics = fold.task.metrics(outputs, targets)
        made.append(
            replace(fold, ids=patients, patient_ids=patients, outputs=outputs, targets=targets, metrics=metrics)
        )
    return made if any(len(one.ids) < len(other.ids) for one, other in zip(made, folds, strict=True)) else []


def pooled_figures(task: Task, folds: Sequence[Fold], resamples: int) -> dict[str, Any]:
    """Return every metric over all rows of the folds with its interval."""
    judge, outputs = task.pooled([fold.task for fold in folds], [fold.outputs for fold in folds])
    found = bootstrap(
        judge,
        outputs,
        np.concatenate([fold.targets for fold in folds]),
        [patient for fold in folds for patient in fold.patient_ids],
        # each fold decides by its own threshold
        decided=np.concatenate([fold.task.decide(fold.outputs) for fold in folds]),
        folds=np.repeat([fold.number for fold in folds], [len(fold.ids) for fold in folds]),
        resamples=resamples,
    )
    return {name: estimate.as_json() for name, estimate in found.items()}


def _test_per_train(folds: Sequence[Fold]) -> float:
    """Return the mean of test slides per training slide; 0 where it is not known."""
    return float(np.mean([len(fold.ids) / fold.n_train if fold.n_train else 0.0 for fold in folds]))


def _summary(recipe: Options, task: Task, folds: Sequence[Fold], resamples: int) -> dict[str, Any]:
    judge, _ = task.pooled([fold.task for fold in folds], [fold.outputs for fold in folds])
    return {
        "task": judge.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "n_folds": len(folds),
        "metrics": summarise_folds([fold.metrics for fold in folds], test_per_train=_test_per_train(folds)),
        "out_of_fold": pooled_figures(task, folds, resamples),
        "folds": [{"fold": fold.number, "n_test": len(fold.ids), **fold.metrics} for fold in folds],
    }

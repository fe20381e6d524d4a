"""A folder of features and a table of labels, understood and joined: what every training command starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eosin.features.store import find_bags
from eosin.mil.crossval import cohort_of
from eosin.mil.data import (
    Examples,
    FeatureFolder,
    LabelTable,
    make_examples,
    patient_examples,
    read_labels,
)
from eosin.mil.splits import Cohort, Split, check_splits, make_splits, read_splits
from eosin.mil.tasks import Task, make_task

CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, eq=False)
class Study:
    """Labelled bags, the task they pose, and what splits must know of them.

    Attributes
    ----------
    task : Task
    examples : Examples
    cohort : Cohort
    table : LabelTable
        As it was read; its notes say how the columns were understood.
    """

    task: Task
    examples: Examples
    cohort: Cohort
    table: LabelTable

    def splits(
        self, path: Path | None = None, *, folds: int = 5, val_fraction: float = 0.15, seed: int = 0
    ) -> list[Split]:
        """Return the splits of a folder or file, checked, or new ones by patient.

        Raises
        ------
        LabelError
            If splits leak or name slides that are not in the study, or there are too few patients for new ones.
        """
        if path is None:
            return make_splits(self.cohort, folds=folds, val_fraction=val_fraction, seed=seed)
        splits = read_splits(path)
        check_splits(splits, self.cohort)
        return splits


def open_study(
    features: Path,
    labels: Path,
    *,
    task: str = "classification",
    target: str | None = None,
    group: Literal["patient", "slide"] = "patient",
    level: Literal["slide", "patient"] = "slide",
    site: str | None = None,
    missing: Literal["error", "drop"] = "error",
    cache_bytes: int = CACHE_BYTES,
) -> Study:
    """Read labels and features and join them.

    Parameters
    ----------
    features : Path
        Folder of feature files.
    labels : Path
        Table of labels, see `eosin.mil.data.read_labels`.
    task : str
        Kind of the task, see `eosin.mil.tasks.make_task`.
    target : str, optional
        Label column; found when there is only one candidate.
    group : {"patient", "slide"}
        ``slide`` makes each slide its own patient.
    level : {"slide", "patient"}
        Whether a bag is a slide or all slides of a patient.
    site : str, optional
        Column of sites that splits must keep together.
    missing : {"error", "drop"}
        What becomes of labels whose slide has no features.
    cache_bytes : int
        Features kept in memory.

    Raises
    ------
    LabelError
        If the table cannot be used or does not fit the features.
    FeatureMismatchError
        If the features were not all made alike.
    """
    table = read_labels(labels, group=group)
    column = table.target_column(target)
    if site is not None:
        table.require([site])
    made = make_task(task, table.rows(), target=column)
    bags = FeatureFolder(_labelled(find_bags(features), table), cache_bytes=cache_bytes)
    examples = make_examples(bags, table, made, missing=missing)
    rows = table.rows(examples.ids)
    if level == "patient":
        rows = _first_of_each_patient(rows)
        examples = patient_examples(examples)
    return Study(made, examples, cohort_of(examples, made, rows, site=site), table)


def _labelled(files: dict[str, Path], table: LabelTable) -> dict[str, Path]:
    """Leave out files without a label, so that they need not be alike; all stay when no label fits, for the message."""
    wanted = set(table.slide_ids)
    return {slide: path for slide, path in files.items() if slide in wanted} or files


def _first_of_each_patient(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({row["patient_id"]: row for row in reversed(rows)}.values())[::-1]

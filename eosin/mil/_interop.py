"""Label tables and splits as other tools lay them out; tables of one row per slide are read by `_tables.py`.

STAMP has a table of patients with their labels and a table of slides with their patients, and splits of patients.
TransMIL has one table per fold with the slides and labels of each part side by side. PackMIL has a column that says
which part a slide belongs to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eosin._columns import PATIENT_COLUMNS, SLIDE_COLUMNS, detect_column, normalised
from eosin._files import write_json
from eosin._names import Ids, same_patient, slide_id, spelled_as, unify
from eosin._seals import read_json
from eosin._tables import Table, read_table
from eosin.errors import LabelError
from eosin.mil._cohort import Cohort
from eosin.mil._splits import PARTS, Split, require_unchanged
from eosin.mil._tables import LabelTable, identify, rows_without_id, several_slides, shown
from eosin.mil._target import SITE_COLUMNS


def read_two_tables(patients: Path, slides: Path, ids: Ids = "ask") -> LabelTable:
    """Join a table of patients with their labels and a table of slides with their patients (STAMP).

    Parameters
    ----------
    patients : Path
        ``PATIENT`` and any labels; one row per patient.
    slides : Path
        ``PATIENT`` and ``FILENAME``.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, also of one in each table; see `eosin._names.unify`.

    Raises
    ------
    LabelError
        If a column is missing, a patient has two rows of labels, or a slide's patient has none.
    """
    clinical, files = read_table(patients), read_table(slides)
    key = _column(clinical, PATIENT_COLUMNS, patients, "patients")
    of_slide = _column(files, PATIENT_COLUMNS, slides, "patients")
    names = _column(files, SLIDE_COLUMNS, slides, "slides")
    rows_of = [*clinical[key], *files[of_slide]]
    faults = rows_without_id(patients, clinical[key], "patient", clinical.row_numbers)
    if faults:
        raise LabelError(faults[0])
    slide_ids, _ = identify(slides, files[names], files[of_slide], "exact", files.row_numbers)
    both = f"{patients.name} and {slides.name}"
    all_ids = unify(rows_of, what="patients", where=both, policy=ids, key=same_patient)
    labelled, owners = all_ids[: len(clinical[key])], all_ids[len(clinical[key]) :]
    row = {patient: number for number, patient in enumerate(labelled)}
    if len(row) < len(labelled):
        twice = sorted({patient for patient in labelled if labelled.count(patient) > 1})
        raise LabelError(f"{patients}: patients with more than one row: {shown(twice)}; keep one row per patient")
    unknown = [patient for patient in owners if patient not in row]
    if unknown:
        raise LabelError(f"{slides}: patients without a row in {patients.name}: {shown(unknown)}")
    values = {
        name: tuple(column[row[patient]] for patient in owners) for name, column in clinical.items() if name != key
    }
    site = detect_column(files, SITE_COLUMNS)
    if site is not None and detect_column(clinical, SITE_COLUMNS) is None:
        values[site] = files[site]
    spare = len(set(row) - set(owners))
    notes = [
        f"slides: column {names!r} of {slides.name}",
        f"patients: column {key!r} of {patients.name}{several_slides(owners)}",
        *([f"{spare} of {len(row)} patients in {patients.name} have no slide and are left out"] if spare else []),
    ]
    return LabelTable(slide_ids, owners, values, tuple(notes))


def _column(table: Table, names: Sequence[str], path: Path, what: str) -> str:
    column = detect_column(table, names)
    if column is None:
        raise LabelError(f"{path}: has no column for the {what}; found {', '.join(table)}; expected {names[0]}")
    return column


def read_fold_table(path: Path) -> tuple[LabelTable, Split]:
    """Read a fold of TransMIL: columns ``train``, ``train_label``, ``val``, ``val_label``, ``test``, ``test_label``.

    The table has no patients, so each slide is its own. Labels like ``0.0``, which spreadsheets make of numbers in
    ragged columns, become ``0``.

    Raises
    ------
    LabelError
        If a column is missing or a slide has no label.
    """
    table = read_table(path)
    absent = [name for part in PARTS for name in (part, f"{part}_label") if name not in table]
    if absent:
        raise LabelError(f"{path}: not a fold table of TransMIL; the columns {', '.join(absent)} are missing")
    pairs = {
        part: [(slide_id(s), _whole(v)) for s, v in zip(table[part], table[f"{part}_label"], strict=True) if s]
        for part in PARTS
    }
    slides = tuple(slide for part in pairs.values() for slide, _ in part)
    labels = LabelTable(slides, slides, {"label": tuple(label for part in pairs.values() for _, label in part)})
    labels.require(["label"])
    return labels, Split(*(tuple(slide for slide, _ in pairs[part]) for part in PARTS))


def _whole(label: str) -> str:
    head, dot, tail = label.partition(".")
    return head if dot and head.isdigit() and not tail.strip("0") else label


def split_by_column(table: LabelTable, column: str) -> Split:
    """Return the split that a column of the label table states: train, val (or valid, validation), test.

    Raises
    ------
    LabelError
        If the column does not exist or names another part.
    """
    table.require([column])
    parts = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    found = [normalised(value) for value in table.values[column]]
    other = sorted(set(found) - set(parts))
    if other:
        raise LabelError(f"column {column!r} names {shown(other)}; expected train, val, test")
    members: dict[str, list[str]] = {part: [] for part in PARTS}
    for slide, value in zip(table.slide_ids, found, strict=True):
        members[parts[value]].append(slide)
    return Split(*(tuple(members[part]) for part in PARTS))


def read_patient_splits(path: Path, cohort: Cohort, ids: Ids = "ask") -> list[Split]:
    """Read STAMP's ``splits.json`` and turn its patients into their slides; there is no validation part.

    Raises
    ------
    LabelError
        If the file is not of this kind or names unknown patients.
    """
    require_unchanged(path)
    try:
        folds = read_json(path)["splits"]
        sides = [(list(fold["train_patients"]), list(fold["test_patients"])) for fold in folds]
    except FileNotFoundError:
        raise LabelError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabelError(f"{path}: is not a splits.json of STAMP ({error})") from None
    slides: dict[str, list[str]] = {}
    for slide, patient in zip(cohort.slide_ids, cohort.patient_ids, strict=True):
        slides.setdefault(patient, []).append(slide)
    everyone = [str(patient) for side in sides for part in side for patient in part]
    meant = spelled_as(everyone, slides, what="patients", where="the splits", than="the label table", policy=ids)
    sides = [
        ([meant.get(str(p), str(p)) for p in train], [meant.get(str(p), str(p)) for p in test]) for train, test in sides
    ]
    unknown = sorted({patient for side in sides for part in side for patient in part} - set(slides))
    if unknown:
        raise LabelError(
            f"{path}: names patients that are not in the label table: {shown(unknown)}; "
            "use the label table of these splits"
        )
    return [Split(_slides(train, slides), (), _slides(test, slides)) for train, test in sides]


def _slides(patients: Sequence[str], slides: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(slide for patient in patients for slide in slides[patient])


def write_patient_splits(path: Path, splits: Sequence[Split], cohort: Cohort) -> None:
    """Write STAMP's ``splits.json``; it has no validation part, so that of a split counts as training."""
    patient = dict(zip(cohort.slide_ids, cohort.patient_ids, strict=True))

    def patients(slides: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(patient[slide] for slide in slides))

    folds: list[dict[str, Any]] = [
        {"train_patients": patients((*split.train, *split.val)), "test_patients": patients(split.test)}
        for split in splits
    ]
    write_json(path, {"splits": folds})

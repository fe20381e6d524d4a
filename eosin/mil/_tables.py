"""Tables of labels: read as text, whatever made them, their columns understood by name.

Ids are text: leading zeros and the dots of TCGA names stay. A label that is empty or NaN is an error: delete the row,
or say what the slide is. What a spreadsheet did to ids is refused where it can be seen and stated where it cannot.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from eosin._columns import PATIENT_COLUMNS, detect_column
from eosin._columns import slide_column as find_slide_column
from eosin._names import Ids, is_missing, look_alike, same_patient, slide_id, spelled_as, unify
from eosin._tables import UNNAMED, Table, read_table
from eosin.errors import LabelError
from eosin.mil._target import DATE, SITE_COLUMNS, has_value, same_class, target_column

SHOWN = 5
FEW_VALUES = 20
"""A column of more values than that holds no classes."""

ROUNDED = re.compile(r"\d[.,]\d+[eE]\+\d+")
"""How a spreadsheet writes long numbers, of which it keeps the first digits."""

Missing = Literal["error", "few", "drop"]
"""What becomes of rows without a slide or a label: stop, stop if they are more than a few, or leave them out."""


@dataclass(frozen=True)
class LabelTable:
    """A table with one row per slide, every value as text.

    Attributes
    ----------
    slide_ids, patient_ids : tuple of str
        One per row; slide ids are unique and have no file suffix.
    values : mapping of str to tuple of str
        The other columns.
    notes : tuple of str
        How each column was understood, for a person to read.
    """

    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = slides_named_twice(self.slide_ids)
        if faults:
            raise LabelError(faults[0])

    def __repr__(self) -> str:
        patients = len(set(self.patient_ids))
        return f"<LabelTable: {len(self)} slides of {patients} patients, columns {', '.join(self.values)}>"

    def __len__(self) -> int:
        return len(self.slide_ids)

    def rows(self, slide_ids: Sequence[str] | None = None) -> list[dict[str, str]]:
        """Return the rows of some slides in their order, or of all; `LabelError` for slides that the table lacks."""
        place = {slide: number for number, slide in enumerate(self.slide_ids)}
        wanted = self.slide_ids if slide_ids is None else slide_ids
        unknown = [slide for slide in wanted if slide not in place]
        if unknown:
            raise LabelError(f"slides without a row in the label table: {shown(unknown)}")
        return [
            {"slide_id": slide, "patient_id": self.patient_ids[place[slide]]}
            | {name: column[place[slide]] for name, column in self.values.items()}
            for slide in wanted
        ]

    def select(self, slide_ids: Iterable[str]) -> "LabelTable":
        """Return the rows of these slides alone, in the table's order."""
        kept = set(slide_ids)
        places = [number for number, slide in enumerate(self.slide_ids) if slide in kept]
        return LabelTable(
            tuple(self.slide_ids[i] for i in places),
            tuple(self.patient_ids[i] for i in places),
            {name: tuple(column[i] for i in places) for name, column in self.values.items()},
            self.notes,
        )

    def named_as(self, slide_ids: Collection[str], ids: Ids = "ask") -> "LabelTable":
        """Return the table with its slides named as their files are, see `eosin._names.match_slides`.

        Parameters
        ----------
        slide_ids : collection of str
            The slides, or feature files, that the table is about; rows of no such slide stay as they are.
        ids : {"ask", "merge", "exact"}
            Whether names that only look like that of a file stop, mean that file or do not.

        Raises
        ------
        LabelError
            With all of them, if names look like those of files and it is not said what they are.
        """
        known, named = set(slide_ids), set(self.slide_ids)
        free = [one for one in slide_ids if one not in named]
        rest = [one for one in self.slide_ids if one not in known]
        file_of = spelled_as(rest, free, what="slides", where="the label table", than="their files", policy=ids)
        return replace(self, slide_ids=tuple(file_of.get(one, one) for one in self.slide_ids))

    def of_patients(self, columns: Iterable[str]) -> "LabelTable":
        """Return a table with one row per patient, whose id is that of its slide, for vectors of patients.

        Raises
        ------
        LabelError
            If the rows of a patient differ in one of the columns.
        """
        first: dict[str, int] = {}
        for row, patient in enumerate(self.patient_ids):
            first.setdefault(patient, row)
        for name in columns:
            column = self.values.get(name, ())
            unlike = {patient for patient, value in zip(self.patient_ids, column, strict=bool(column))
                      if value != column[first[patient]]}  # fmt: skip
            if unlike:
                raise LabelError(
                    f"the vectors are of patients, and rows of a patient differ in column {name!r}: "
                    f"{shown(sorted(unlike))}; correct the table, or make one vector per slide"
                )
        rows = list(first.values())
        values = {name: tuple(column[row] for row in rows) for name, column in self.values.items()}
        return LabelTable(tuple(first), tuple(first), values, (*self.notes, "one vector per patient"))

    def patient_of(self) -> dict[str, str]:
        """Return the patient of each slide."""
        return dict(zip(self.slide_ids, self.patient_ids, strict=True))

    def require(self, columns: Iterable[str]) -> None:
        """Raise `LabelError` unless the columns exist and every row has a value in them."""
        for name in columns:
            if name not in self.values:
                raise LabelError(f"the label table has no column {name!r}; it has {', '.join(self.values) or 'none'}")
            empty = [
                slide for slide, value in zip(self.slide_ids, self.values[name], strict=True) if not has_value(value)
            ]
            if empty:
                raise LabelError(
                    f"no value in column {name!r} for {shown(empty)} (empty, nan, unknown ...); "
                    "delete these rows or complete the table"
                )

    def site_column(self) -> str | None:
        """Return the column that says where a slide is from, or None."""
        return detect_column(self.values, SITE_COLUMNS)

    def target_column(self, name: str | None = None, *, kind: str = "") -> str:
        """Return the column that holds the label: the one that is asked for, else as `eosin.mil._target` finds it."""
        return target_column(self.values, kind) if name is None else name


def shown(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


FEW = 0.1
"""Share of the rows of a table that may lack a slide or a label before somebody must say that they may."""


def may_drop(missing: Missing, lost: int, total: int) -> bool:
    """Return whether rows without a slide or a label are left out, and named, or stop the command.

    Parameters
    ----------
    missing : {"error", "few", "drop"}
        ``few`` leaves out at most `FEW` of them.
    lost, total : int
        Rows.
    """
    return missing == "drop" or (missing == "few" and lost <= FEW * total)


def read_labels(
    path: Path,
    *,
    slide_column: str | None = None,
    patient_column: str | None = None,
    group: Literal["patient", "slide"] = "patient",
    ids: Ids = "ask",
    among: Collection[str] = (),
) -> LabelTable:
    """Read a label table of this or another tool; its columns are found by their names.

    Slides: ``slide_id`` (CLAM), ``slide`` (slideflow), ``FILENAME`` (STAMP), ``ID`` (PackMIL) and others; patients:
    ``case_id``, ``patient_id``, ``patient``, ``PATIENT``, ``Case`` and others. A cell with several slides, separated by
    semicolons, is that many rows (PackMIL's ``WSI``). `LabelTable.notes` say how each column was read.

    Parameters
    ----------
    path : Path
        csv (separated by comma, semicolon or tab), tsv, xlsx (first sheet) or parquet.
    slide_column, patient_column : str, optional
        Taken instead of the detected column.
    group : {"patient", "slide"}
        ``slide`` makes each slide its own patient, for tables without patients.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, see `eosin._names.unify`; ``merge`` also takes spellings of one class, or
        of another value that repeats, for one.
    among : collection of str
        Slides that are there: of several columns that could name slides the one that names most of these is taken.

    Returns
    -------
    LabelTable
        One row per slide. Rows that are the same in every column are one.

    Raises
    ------
    LabelError
        If there is no such column, an id is missing or spoilt by a spreadsheet, ids look alike and it is not said what
        they are, or a slide has two rows.
    """
    table = read_table(path)
    frame: Mapping[str, tuple[str, ...]] = table
    slides = slide_column or find_slide_column(frame, among)
    rest = {name: values for name, values in frame.items() if name != slides}
    patients = slides if group == "slide" else patient_column or detect_column(rest, PATIENT_COLUMNS)
    found = f"found {', '.join(frame)}"
    if slides is None or slides not in frame:
        raise LabelError(f"{path}: no column of slide ids{_named(slides)}; {found}; expected slide_id")
    if patients is None or patients not in frame:
        raise LabelError(
            f"{path}: no column of patients{_named(patients)}; {found}; expected patient_id or case_id, "
            "or say that each slide is its own patient (--group slide; for eosin run a copy of the column of slides "
            "under the name patient_id)"
        )
    id_columns = dict.fromkeys((slides, patients))
    notes = [f"slides: column {slides!r}", f"patients: column {patients!r}"]
    notes += [*table.notes, *(note for name in id_columns for note in id_notes(table, name))]
    frame, numbers, same = _without_repeats(*_one_row_per_slide(frame, slides, table))
    notes += [f"rows: {same} are the same as others and count once"] if same else []
    others = [name for name in frame if name not in id_columns and not name.startswith(UNNAMED)]
    owners = None if group == "slide" else frame[patients]
    slide_ids, patient_ids = identify(path, frame[slides], owners, ids, numbers)
    notes[1] += several_slides(patient_ids)
    if group == "patient" and patient_ids == slide_ids:
        notes.append(f"every id in {patients!r} equals its slide's id, so each slide counts as a separate patient")
    notes.append(f"values: {', '.join(others) or 'none'}")
    values = {name: one_spelling(frame[name]) if ids == "merge" else frame[name] for name in others}
    return LabelTable(slide_ids, patient_ids, values, tuple(notes))


def one_spelling(column: tuple[str, ...]) -> tuple[str, ...]:
    """Return a column in which each value that repeats is written as it is most often, see `same_class`."""
    counts = Counter(value for value in column if has_value(value))
    if len(counts) > FEW_VALUES:
        return column
    spellings: dict[str, str] = {}
    for value, _ in counts.most_common():
        spellings.setdefault(same_class(value), value)
    return tuple(spellings[same_class(value)] if value in counts else value for value in column)


def identify(
    path: Path, slides: Sequence[str], patients: Sequence[str] | None, ids: Ids, numbers: Sequence[int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ids of the slides and patients of a table, cleaned; without patients each slide is its own.

    `numbers` are those of the rows in a spreadsheet.

    Raises
    ------
    LabelError
        With all problems: rows without an id, and ids that look alike where `ids` is ``ask``.
    """
    faults, found = [], []
    for names, what, key in (
        ([slide_id(name) for name in slides], "slide", look_alike),
        (patients, "patient", same_patient),
    ):
        if names is None:
            continue
        faults += rows_without_id(path, names, what, numbers)
        try:
            found.append(unify(names, what=f"{what}s", where=str(path), policy=ids, key=key))
        except LabelError as error:
            faults.append(error.message)
    faults += slides_named_twice([name for name in map(slide_id, slides) if not is_missing(name)])
    if faults:
        raise LabelError("; ".join(faults))
    return found[0], found[-1]


def rows_without_id(path: Path, names: Sequence[str], what: str, numbers: Sequence[int]) -> list[str]:
    """Return a sentence about the rows that name no slide or patient, by their numbers; none where all do."""
    absent = list(dict.fromkeys(str(row) for row, name in zip(numbers, names, strict=True) if is_missing(name)))
    if not absent:
        return []
    rows = f"row {absent[0]} has" if len(absent) == 1 else f"rows {shown(absent)} have"
    return [f"{path}: {rows} no id of a {what} (empty, nan, unknown ...); complete the table or delete such rows"]


def slides_named_twice(slide_ids: Iterable[str]) -> list[str]:
    """Return a sentence about the slides that several rows name, if any."""
    twice = [slide for slide, count in Counter(slide_ids).items() if count > 1]
    return [f"slides with more than one row: {shown(twice)}; keep one row per slide"] if twice else []


def several_slides(patient_ids: Sequence[str]) -> str:
    """Return how many patients have how many slides; nothing where each has one."""
    patients = len(set(patient_ids))
    return (
        ""
        if patients == len(patient_ids)
        else f" ({patients} patient{'s' * (patients > 1)} with {len(patient_ids)} slides)"
    )


def id_notes(table: Table, name: str) -> list[str]:
    """Refuse ids that a spreadsheet has spoilt, and say where it may have taken leading zeros.

    Raises
    ------
    LabelError
        If one is a date, a fraction or a number that was rounded.
    """
    if name in table.spoilt:
        raise LabelError(
            f"{table.path}: column {name!r} holds ids, but {table.spoilt[name]}; "
            "format the column as text and enter them again"
        )
    faults = [(row, fault) for row, cell in enumerate(table[name]) if (fault := _spoilt_text(cell))]
    dates = sum(fault.startswith("a date") for _, fault in faults)
    # a column of days alone may be how somebody names patients
    if faults and dates < sum(map(bool, table[name])):
        row, fault = faults[0]
        raise LabelError(
            f"{table.path}: column {name!r} holds ids, but row {table.row_numbers[row]} is {fault}; "
            "format the column as text and enter them again"
        )
    if faults:
        return [f"every id in {name!r} is a date, such as {table[name][0]}; check that no spreadsheet made them"]
    if name not in table.numbers:
        return []
    count = len(table.numbers[name])
    return [f"{count} ids in {name!r} are stored as numbers: leading zeros, had there been any, are lost"]


def _spoilt_text(cell: str) -> str:
    """Return what a spreadsheet has made of an id before it was written as text, or nothing."""
    if ROUNDED.fullmatch(cell):
        return f"a number that was rounded ({cell})"
    return f"a date ({cell})" if DATE.fullmatch(cell) else ""


def _one_row_per_slide(
    frame: Mapping[str, tuple[str, ...]], slides: str, table: Table
) -> tuple[Mapping[str, tuple[str, ...]], list[int]]:
    """Return the table with the rows repeated that name several slides, and the numbers of its rows."""
    parts = [[part.strip() for part in re.split(r"[;\n]", value) if part.strip()] or [""] for value in frame[slides]]
    numbers = [row for row, part in zip(table.row_numbers, parts, strict=True) for _ in part]
    if all(len(part) == 1 for part in parts):
        return frame, numbers
    times = [len(part) for part in parts]
    repeated = {
        name: tuple(value for value, count in zip(column, times, strict=True) for _ in range(count))
        for name, column in frame.items()
    }
    return repeated | {slides: tuple(slide for part in parts for slide in part)}, numbers


def _without_repeats(
    frame: Mapping[str, tuple[str, ...]], numbers: Sequence[int]
) -> tuple[Mapping[str, tuple[str, ...]], Sequence[int], int]:
    """Return the table without rows that are the same as one above in every column, and how many these were."""
    first: dict[tuple[str, ...], int] = {}
    told = [column for name, column in frame.items() if not name.startswith(UNNAMED)]
    for place, row in enumerate(zip(*told, strict=True)):
        first.setdefault(row, place)
    same = len(numbers) - len(first)
    if not same:
        return frame, numbers, 0
    kept = list(first.values())
    rows = {name: tuple(column[place] for place in kept) for name, column in frame.items()}
    return rows, [numbers[place] for place in kept], same


def _named(column: str | None) -> str:
    return "" if column is None else f" named {column!r}"

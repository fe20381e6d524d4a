"""A first study file, drafted from a folder of slides and a table: what can be guessed is, the rest is marked."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from eosin._names import is_missing
from eosin._tables import decimal_point, first_few
from eosin.errors import EosinError
from eosin.mil._study import open_labels
from eosin.mil._tables import FEW, LabelTable
from eosin.mil._target import can_be_label, has_value, is_number, target_column, values_in_words
from eosin.pipeline._preflight import Headers, Problems, collect_slides, open_headers, rough_table
from eosin.wsi._slide_file import SlideFile, open_file

MARK = "DECIDE"
ORDINAL = "ordinal"
LEAST_NUMBERS = 12
"""A column of numbers with so many different values is measured, not counted."""

MOST_FOLDS = 5
MEASURED_SLIDES = 8
USUAL_MPP, COARSEST = 0.5, 1.05


@dataclass(frozen=True)
class Line:
    """One key of the draft.

    Attributes
    ----------
    key : str
    comment : str
        What the key means.
    value : object
        None where a person must decide.
    found : str
        What was found, or between what to decide.
    is_active : bool
        Whether the line is more than a comment.
    """

    key: str
    comment: str
    value: Any = None
    found: str = ""
    is_active: bool = True

    @property
    def is_open(self) -> bool:
        """Whether a person must decide."""
        return self.is_active and self.value is None

    def text(self) -> str:
        """Return the lines of YAML."""
        value = "" if self.value is None else _yaml(self.value)
        found = _one_line(f"{MARK}: {self.found}" if self.is_open else self.found)
        setting = f"{'' if self.is_active else '# '}{self.key}: {value}".rstrip()
        return f"# {self.comment}\n{setting}{f'  # {found}' if found else ''}\n"


@dataclass(frozen=True)
class Draft:
    """A study file with comments.

    Attributes
    ----------
    lines : tuple of Line
    warnings : tuple of str
        What should be looked at before the study is run.
    """

    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = ()

    @property
    def to_decide(self) -> list[str]:
        """Keys that are left to a person."""
        return [line.key for line in self.lines if line.is_open]

    def text(self) -> str:
        """Return the file."""
        head = ["# A study for eosin. Check it with `eosin check FILE`, do it with `eosin run FILE`."]
        head += ["# All other commands read their part of it. Flags and --set KEY=VALUE win over this file."]
        head += [f"# Complete the lines that are marked {MARK}."] if self.to_decide else []
        head += [f"# Note: {_one_line(warning)}" for warning in self.warnings]
        return "\n".join([*head, "", *(line.text() for line in self.lines)]).rstrip() + "\n"


def draft_study(slides: Sequence[Path], labels: Path, job: Path, folder: Path) -> Draft:
    """Look at slides and labels, and draft a study of them.

    Parameters
    ----------
    slides : sequence of Path
        Slides, and folders that are searched.
    labels : Path
    job : Path
        Where the study will be done.
    folder : Path
        Of the study file; paths below it are written relative to it.

    Raises
    ------
    EosinError
        If there are no slides, or the table cannot be read at all.
    """
    problems = Problems()
    files = collect_slides(problems, slides, None)
    spelling = "Ids that differ in spelling only (P01, p01): ask stops, merge joins them, exact keeps them apart."
    ids = Line("ids", spelling, "ask", is_active=False)
    table, refused = _table(problems, labels)
    problems.require()
    assert table is not None  # otherwise it is a problem
    if refused is not None:
        ids = replace(ids, value=None, found=refused.message, is_active=True)
    headers, names = open_headers(files), {file.slide_id for file in files}
    table = table.named_as(names, "merge")
    target, task = guess_target(table)
    column = None if target.value is None else str(target.value).split("=")[0]
    return Draft(
        (
            Line("slides", "Slide files, or folders that are searched; a list for several.", _paths(slides, folder),
                 headers.in_words()),
            Line("labels", "Table with one row per slide, and the columns slide, patient and label.",
                 _path(labels, folder), "; ".join(table.notes[:2])),
            Line("job", "Folder for all results.", _path(job, folder)),
            target,
            task,
            _missing(table, names, column),
            ids,
            _slide_mpp(headers),
            _tiling(files, headers),
            Line("encoder", "Tile encoder; `eosin encoders` lists them. he_texture is a baseline without weights.",
                 "he_texture"),
            Line("recipe", "Model and training; `eosin methods` lists the names.",
                 {"aggregator": "abmil", "training": {"epochs": 30}}),
            _folds(table, names, column, is_number=task.value in ("regression", "survival")),
            Line("splits", "Splits from elsewhere, in place of folds.", "splits.csv", is_active=False),
            Line("quality", "Leave out tiles that are blurred, inked or folded.",
                 {"max_blur": 0.9, "max_pen": 0.3, "max_fold": 0.5}, is_active=False),
            Line("formats", "Files of each heat map: png, geojson (QuPath), tiff, csv, html ...", ["png", "geojson"]),
            Line("maps", "What heat maps show; without the line, all that the model can give.", ["alone", "attention"],
                 is_active=False),
            Line("workers", "Child processes; a slide that crashes a reader then costs one slide.", 2, is_active=False),
            Line("cluster", "Let other machines do the work (docs/cluster.md).", "cluster.yaml", is_active=False),
        ),
        tuple(_warnings(table, names, headers)),
    )  # fmt: skip


def _table(problems: Problems, labels: Path) -> tuple[LabelTable | None, EosinError | None]:
    """Return the table, and why it was refused when only its ids are in doubt."""
    first = Problems()
    table = first.attempt(open_labels, labels)
    if table is not None:
        return table, None
    exact = Problems().attempt(open_labels, labels, ids="exact")
    if exact is not None:
        return exact, first.errors[0]
    alone = Problems().attempt(open_labels, labels, group="slide")
    rough = alone or rough_table(labels)
    if rough is None:
        problems.add(*first.errors)
        return None, None
    return replace(rough, notes=(*rough.notes, first.errors[0].message)), None


def guess_target(table: LabelTable) -> tuple[Line, Line]:
    """Return the lines of the label column and of the kind of label; the first is open when several could be meant."""
    target = Line("target", "Label column; COLUMN=VALUE names the positive class; time,event is for survival.")
    task = Line("task", "Kind of label: classification, ordinal, multilabel, regression, survival ...")
    chosen = Problems().attempt(target_column, table.values)
    if chosen is None or ("," not in chosen and not _can_be_label(table.values[chosen])):
        could = [name for name, values in table.values.items() if can_be_label(values)]
        choice = "; ".join(f"{name} ({values_in_words(table.values[name])})" for name in could)
        found = choice or "no column holds classes or numbers"
        return replace(target, found=found), replace(task, value="classification", is_active=False)
    kind = "survival" if "," in chosen else _kind(table.values[chosen])
    target = replace(target, value=chosen, found=values_in_words(table.values[chosen.split(",")[-1]]))
    if kind == ORDINAL:
        note = "ordinal, if the order of the numbers matters"
        return target, replace(task, value="classification", found=note)
    return target, replace(task, value=kind)


def _can_be_label(values: Sequence[str]) -> bool:
    return can_be_label(values) or can_be_label(values, "regression")


def _kind(values: Sequence[str]) -> str:
    """Return the task that a column poses: measured numbers, a few whole numbers, or classes."""
    stated = [value for value in values if has_value(value)]
    if not all(is_number(value) for value in stated):
        return "classification"
    numbers = {float(decimal_point(value)) for value in stated}
    if len(numbers) >= LEAST_NUMBERS or not all(number.is_integer() for number in numbers):
        return "regression"
    return "classification" if len(numbers) <= 2 else ORDINAL


def _missing(table: LabelTable, names: Collection[str], column: str | None) -> Line:
    comment = "Rows without a slide or a label: few leaves out up to one in ten, drop all, error stops."
    line = Line("missing", comment, "few")
    lost = [row for row in table.rows() if row["slide_id"] not in names or _is_blank(row, column)]
    if not lost:
        return line
    found = f"{len(lost)} of {len(table)} rows have no slide or no label"
    if len(lost) <= FEW * len(table):
        return replace(line, found=found)
    cure = "correct the names of the slides" if len(lost) == len(table) else "write drop to leave them out"
    return replace(line, value=None, found=f"{found}; {cure}")


def _is_blank(row: Mapping[str, str], column: str | None) -> bool:
    return any(not has_value(row.get(name, "x")) for name in (column or "").split(","))


def _slide_mpp(headers: Headers) -> Line:
    """Return the line of the slides' own resolution, which is open when a slide does not state it."""
    line = Line("slide_mpp", "µm/px of the slides: a number, or a table with the columns slide and mpp.", 0.25,
                is_active=False)  # fmt: skip
    lacking = [name for name, record in headers.bad.items() if record.reason == "no-mpp"]
    if not lacking:
        return replace(line, found="not needed: every slide states its own")
    found = f"{len(lacking)} of {headers.n_slides} slides do not state it: {first_few(lacking, most=3)}"
    return replace(line, value=None, found=found, is_active=True)


def _tiling(files: Sequence[SlideFile], headers: Headers) -> Line:
    """Return the line of the tiles: 0.5 µm/px, or as fine as the coarsest of some slides allows."""
    usable = [file for file in files if file.slide_id not in headers.bad]
    coarsest = max((_mpp(file) for file in usable[:: max(1, len(usable) // MEASURED_SLIDES)]), default=USUAL_MPP)
    mpp = USUAL_MPP if coarsest <= USUAL_MPP * COARSEST else round(coarsest, 3)
    found = "" if mpp == USUAL_MPP else f"the slides have {coarsest:.3g} µm/px"
    comment = "Tiles: µm per pixel (0.5 is 20x, 1.0 is 10x) and pixels per side."
    return Line("tiling", comment, {"mpp": mpp, "patch_size": 256}, found)


def _mpp(file: SlideFile) -> float:
    with open_file(file.path) as reader, reader.slide(scene=file.scene, plane=file.plane, mpp=file.mpp) as slide:
        return slide.mpp


def _folds(table: LabelTable, names: Collection[str], column: str | None, *, is_number: bool) -> Line:
    """Return the line of the folds: five, or as many as the rarest class has patients."""
    line = Line("folds", "Folds of the cross-validation; patients stay together.", MOST_FOLDS)
    if column is None or is_number:
        return line
    patients: dict[str, set[str]] = {}
    for row in table.rows():
        if row["slide_id"] in names and has_value(row.get(column, "")):
            patients.setdefault(row[column], set()).add(row["patient_id"])
    rarest = min(patients, key=lambda name: len(patients[name]), default=None)
    if rarest is None or len(patients[rarest]) >= MOST_FOLDS:
        return line
    found = f"{rarest} has {len(patients[rarest])} patients"
    return replace(line, value=max(2, len(patients[rarest])), found=found)


def _warnings(table: LabelTable, names: Collection[str], headers: Headers) -> Iterator[str]:
    yield from table.notes[2:]
    absent = [name for name in table.slide_ids if name not in names]
    unlabelled = sorted({*names} - {*table.slide_ids})
    if absent:
        yield f"{len(absent)} rows have no slide file: {first_few(absent)}"
    if unlabelled:
        yield f"{len(unlabelled)} slides have no row and are not used: {first_few(unlabelled)}"
    bad = [name for name, record in headers.bad.items() if record.reason != "no-mpp" and not is_missing(name)]
    if bad:
        yield f"{len(bad)} slides cannot be opened: {first_few(bad)}"


def _paths(paths: Sequence[Path], folder: Path) -> str | list[str]:
    written = [_path(path, folder) for path in paths]
    return written[0] if len(written) == 1 else written


def _path(path: Path, folder: Path) -> str:
    """Return a path as the study file names it: relative below the file's folder, absolute elsewhere."""
    whole, base = path.absolute(), folder.absolute()
    return str(whole.relative_to(base) if whole.is_relative_to(base) else whole)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())

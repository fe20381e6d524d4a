"""What may stand in the way of a command, found in seconds and told in one list before any work.

A check is a function that raises an error whose sentence says what to do. `Problems` keeps what checks raise and goes
on, so that a person meets all problems at once. Nothing here writes, and no pixel is read.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from eosin._batch import run_batch
from eosin._columns import PATIENT_COLUMNS, detect_column, normalised, slide_column
from eosin._devices import choose_device, count_cores
from eosin._names import Ids, as_url, is_missing, slide_id
from eosin._records import Record
from eosin._tables import first_few, read_table
from eosin.errors import ConfigError, EosinError, LabelError, MissingPackageError, OutputError, SeveralErrors
from eosin.features._encoders import folder_name
from eosin.features._inference import require_encoder
from eosin.features._store import find_bags, read_common_spec
from eosin.mil._checkpoint import ModelCard, load_card
from eosin.mil._recipe import Recipe
from eosin.mil._seen import Run
from eosin.mil._splits import make_splits, read_nested_splits
from eosin.mil._study import (
    checked_splits,
    label_cohort,
    open_labels,
    owner,
    pose_task,
    read_any_splits,
    require_sites,
    without_label,
)
from eosin.mil._tables import LabelTable, Missing, may_drop, shown
from eosin.mil._target import SAID_AS_VALUES
from eosin.mil._train import require_fitting
from eosin.mil.task import TASKS, Task
from eosin.mil.tasks._classification import Binary, Classification
from eosin.pipeline._deploy import tiles_like
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, open_header, slide_key
from eosin.wsi._slide_file import SceneChoice, SlideFile, find_slides

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

STAGE = "check"
READINGS = ("sheet:", "encoding:", "header:", "columns:", "hidden rows:", "rows:")
"""How notes on a table begin that say more than which columns were taken."""

HEADERS_S = 30.0
"""After so many seconds no further header is opened: a check of 10,000 slides on a slow disk still ends."""

AT_ONCE = 100
SLOW = "timeout"
FEW_SLIDES = 64
"""Headers of so many slides are opened in this process: child processes would take longer to start."""

HEADER_TIMEOUT_S = 20.0
MOST_BAD = 0.5
TWO = 2
TISSUE_SHARE = 0.3
"""Of the area of a scan, for an estimate: 12 to 45 % in most cohorts of resections and biopsies."""

BYTES_PER_SLIDE = 2 * 2**20
"""Thumbnail, contours, heat maps."""

COORDINATES_BYTES = 24


@dataclass
class Problems:
    """What stands in the way, in the order in which it was found.

    Attributes
    ----------
    errors : list of EosinError
    warnings : list of str
        What a person should know although it stops nothing.
    """

    errors: list[EosinError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | None:
        """Return what a function returns; None, and a problem more, when it raises one."""
        try:
            return function(*args, **options)
        except SeveralErrors as error:
            self.add(*error.errors)
        except EosinError as error:
            self.add(error)
        except ImportError as error:
            self.add(MissingPackageError(error))
        return None

    def add(self, *errors: EosinError) -> None:
        """Add problems; one that two checks have found counts once."""
        for error in errors:
            if all(error.message != known.message for known in self.errors):
                self.errors.append(error)

    def require(self) -> None:
        """Say the warnings, and raise the problem, or all of them.

        Raises
        ------
        EosinError
            The only one; `SeveralErrors` for several.
        """
        for warning in self.warnings:
            logger.warning("%s", warning)
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralErrors(self.errors)


@dataclass(frozen=True)
class Headers:
    """What the headers of slides say.

    Attributes
    ----------
    n_slides : int
        Slides of the cohort, of which `records` are those whose header was opened.
    records : tuple of Record
    """

    n_slides: int
    records: tuple[Record, ...] = ()

    @cached_property
    def bad(self) -> dict[str, Record]:
        """The slides that cannot be used."""
        return {record.slide_id: record for record in self.records if record.status == "failed"}

    @cached_property
    def areas_mm2(self) -> dict[str, float]:
        """The area of each slide that can be used."""
        return {record.slide_id: float(record.message) for record in self.records if record.status == "ok"}

    def in_words(self) -> str:
        """Return how many were opened and how many of them can be used."""
        opened = len(self.records)
        some = "" if opened == self.n_slides else f" of {opened} of them, as many as {HEADERS_S:.0f} s allow,"
        bad = f", {len(self.bad)} cannot be used" if self.bad else ""
        return f"{self.n_slides} found, headers{some} opened{bad}"

    def named(self) -> str:
        """Return the slides that cannot be used with their reasons."""
        return first_few([f"{name} ({record.reason})" for name, record in self.bad.items()], most=10)


def collect_slides(
    problems: Problems,
    paths: Sequence[Path],
    slide_mpp: float | Path | None,
    scene: SceneChoice = None,
    plane: int | None = None,
) -> list[SlideFile]:
    """Return the slides that can be found, whatever else is wrong with the paths or the table of resolutions."""
    found = []
    for path in paths:
        if path.exists() or as_url(path):
            found.append(path)
        else:
            problems.add(ConfigError(f"{path}: no such file or folder; correct --slides"))
    if not found:
        if not paths:
            problems.add(ConfigError("no slides were given; pass --slides"))
        return []
    files = problems.attempt(find_slides, found, slide_mpp=slide_mpp, scene=scene, plane=plane)
    if files is None and slide_mpp is not None:
        files = Problems().attempt(find_slides, found, scene=scene, plane=plane)
    return files or []


def open_headers(files: Sequence[SlideFile], workers: int = 0) -> Headers:
    """Open the header of every slide, or of as many, spread over the cohort, as `HEADERS_S` allow.

    Many slides are opened in child processes, where a reader that crashes or hangs costs one slide.
    """
    if len(files) > FEW_SLIDES:
        workers = max(workers, min(4, count_cores()))
    # the first of them are spread over the cohort, whose slides often lie in the order of their scanners
    spread = [one for start in range(AT_ONCE) for one in files[start::AT_ONCE]]
    report = run_batch(
        spread, partial(open_header, until=time.time() + HEADERS_S), key=slide_key, stage=STAGE, workers=workers,
        timeout_s=HEADER_TIMEOUT_S if workers else None,
    )  # fmt: skip
    # a header that takes longer, on a busy machine or a slow disk, says nothing against its slide
    return Headers(len(files), tuple(one for one in report.records if one.status != "skipped" and one.reason != SLOW))


def check_headers(problems: Problems, files: Sequence[SlideFile], workers: int = 0) -> Headers:
    """Open headers; a few bad slides are a warning, most of them a problem."""
    headers = open_headers(files, workers)
    if len(headers.bad) > MOST_BAD * len(headers.records):
        first = next(iter(headers.bad.values()))
        problems.add(
            ConfigError(
                f"{len(headers.bad)} of the {len(headers.records)} slides that were opened cannot be used: "
                f"{headers.named()}; the first says: {first.message}"
            )
        )
    elif headers.bad:
        slides = "1 slide" if len(headers.bad) == 1 else f"{len(headers.bad)} slides"
        problems.warnings.append(f"{slides} cannot be used and will be left out: {headers.named()}")
    return headers


@dataclass(frozen=True, eq=False)
class Labelled:
    """What the labels say of the slides that are there.

    Attributes
    ----------
    table : LabelTable
        The rows that have a slide and a label.
    task : Task
        As the rows pose it whose slide can be opened.
    missing : {"error", "drop"}
        What `missing` came to.
    n_splits : int
    """

    table: LabelTable
    task: Task
    missing: Missing
    n_splits: int

    def hash_rows(self) -> str:
        """Return a hash of slides, patients and targets, whatever else the table holds."""
        rows = [[row[name] for name in ("slide_id", "patient_id", *self.task.columns)] for row in self.table.rows()]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()

    def in_words(self) -> str:
        """Return how the labels were understood."""
        return "; ".join((*self.table.notes, self.task.describe(self.table.rows())))


@dataclass(frozen=True)
class Question:
    """What labels are asked for.

    Attributes
    ----------
    labels : Path
    task : str
    target : str, optional
    slide_table : Path, optional
    group : str
        ``patient``, ``slide`` or ``site``.
    missing, ids
        As of `eosin.mil._study.open_study`.
    splits : Path, optional
    folds : int
        Of new splits; 0 where none are made.
    val_fraction : float
    seed : int
    """

    labels: Path
    task: str = "classification"
    target: str | None = None
    slide_table: Path | None = None
    group: str = "patient"
    missing: Missing = "error"
    ids: Ids = "ask"
    splits: Path | None = None
    folds: int = 0
    val_fraction: float = 0.15
    seed: int = 0

    def open(self, there: Collection[str] = ()) -> LabelTable:
        """Read the table, which is about these slides."""
        group = owner(self.group)
        return open_labels(self.labels, slide_table=self.slide_table, group=group, ids=self.ids, among=there)


def check_labels(
    problems: Problems, asked: Question, there: Collection[str], *, what: str = "slides", bad: Collection[str] = ()
) -> Labelled | None:
    """Check the table, its labels, and the splits that they allow, against the slides that are there.

    Parameters
    ----------
    problems : Problems
    asked : Question
    there : collection of str
        Slides, or feature files; where there are none the table is checked alone.
    what : str
        Their name in messages.
    bad : collection of str
        Those of which it is known that they will be lost.
    """
    before = len(problems.errors)
    table = _read_table(problems, asked, there)
    if table is None:
        return None
    if asked.task not in TASKS:
        problems.attempt(pose_task, asked.task, table, asked.target)
        return None
    blank = problems.attempt(without_label, table, asked.task, asked.target) or {}
    absent = [slide for slide in table.slide_ids if slide not in there] if there else []
    drop = may_drop(asked.missing, len({*blank, *absent}), len(table))
    if absent and (not drop or len(absent) == len(table)):
        problems.add(_absent(absent, table, there, what))
    if blank and not drop:
        problems.add(_blank(blank))
    elif drop and asked.missing == "few":
        problems.warnings += _left_out(list(dict.fromkeys((*absent, *blank))))
    known = table.select({slide for slide in table.slide_ids if slide not in {*absent, *blank, *bad}})
    task = problems.attempt(pose_task, asked.task, known, asked.target) if len(known) else None
    if task is not None:
        problems.warnings += label_notes(asked, known, task)
    count = None if task is None else problems.attempt(_count_splits, asked, known, task, [*absent, *blank, *bad])
    if task is None or count is None or len(problems.errors) > before:
        read_so = [note for note in table.notes if note.startswith(READINGS)]
        if read_so:  # a table that is read in another way than was meant shows here
            problems.warnings.append(f"{asked.labels.name} was read so: {'; '.join(read_so)}")
        return None
    named = table.select(set(table.slide_ids) - {*absent, *blank})
    return Labelled(named, task, "drop" if drop else "error", count)


def _read_table(problems: Problems, asked: Question, there: Collection[str]) -> LabelTable | None:
    """Return the table with its slides named as their files, or what can be used of one that was refused."""
    table = problems.attempt(asked.open, there)
    if table is None:
        rough = rough_table(asked.labels, there)
        return rough and (Problems().attempt(rough.named_as, there, "merge") or rough)
    return (problems.attempt(table.named_as, there, asked.ids) or table.named_as(there, "merge")) if there else table


def _left_out(lost: Sequence[str]) -> list[str]:
    """Return a sentence about rows that are left out, if any."""
    rows = "1 row has" if len(lost) == 1 else f"{len(lost)} rows have"
    return [f"{rows} no slide or no label and will be left out: {first_few(lost, most=10)}"] if lost else []


def label_notes(asked: Question, table: LabelTable, task: Task) -> list[str]:
    """Return what a person should confirm of the label: a column that nobody named, a class that may be no value."""
    notes = []
    others = [name for name in table.values if name not in task.columns]
    if asked.target is None and others and not any(normalised(name) == "label" for name in task.columns):
        columns = " and ".join(map(repr, task.columns))
        notes.append(f"the label was taken from {columns}; pass --target for another column ({first_few(others)})")
    doubtful = [name for name in class_names(task) if name.casefold() in SAID_AS_VALUES]
    if doubtful and len(class_names(task)) > TWO:
        notes.append(f"{doubtful[0]!r} is one of the classes; if it means that nothing is known, leave the cell blank")
    return notes


def class_names(task: Task) -> tuple[str, ...]:
    """Return the classes of a task that has one per slide."""
    return task.classes if isinstance(task, Classification | Binary) else ()


def check_training(
    problems: Problems, features: Path, asked: Question, out: Path, *, device: str, recipes: Iterable[Recipe] = ()
) -> Labelled | None:
    """Check features, labels, splits, device and folder for a training."""
    files = problems.attempt(find_bags, features) or {}
    labelled = check_labels(problems, asked, files, what="features")
    problems.attempt(choose_device, device)
    problems.attempt(check_folder, out, "--out")
    if labelled is not None:
        for recipe in recipes:
            problems.attempt(require_fitting, recipe.training, labelled.task)
    if problems.errors and files:  # otherwise they are read when the study is opened
        wanted = {slide: files[slide] for slide in labelled.table.slide_ids} if labelled else files
        problems.attempt(read_common_spec, wanted)
    return labelled


def check_prediction(
    problems: Problems,
    models: Sequence[Path],
    slides: Sequence[Path],
    job: JobFolder,
    *,
    slide_mpp: float | Path | None = None,
    scene: SceneChoice = None,
    plane: int | None = None,
    weights: Path | None = None,
    workers: int = 0,
) -> None:
    """Check models, slides, the encoder of their features, job folder and disk for predictions from slides."""
    cards = [card for root in models for card in problems.attempt(_cards, root) or ()]
    files = collect_slides(problems, slides, slide_mpp, scene, plane)
    headers = check_headers(problems, files, workers)
    problems.attempt(check_folder, job.root)
    if not cards:
        return
    spec = cards[0].features
    encoder = problems.attempt(require_encoder, spec.encoder, weights=weights)
    tiles = problems.attempt(tiles_like, spec)
    if encoder is not None and tiles is not None:
        need = Need(job, tiles.tiling, tiles.folder, folder_name(encoder.name), encoder.dim)
        problems.attempt(check_space, job.root, need.bytes(files, headers))


def _cards(root: Path) -> list[ModelCard]:
    """Return the cards of a model or of the models of a cross-validation."""
    return [load_card(model.folder) for model in Run.open(root).models]


def _absent(absent: Sequence[str], table: LabelTable, there: Collection[str], what: str) -> LabelError:
    found = f"are not among the {len(there)} slides" if what == "slides" else f"have no {what}"
    cure = "correct the table" if what == "slides" else "extract them, delete their rows"
    return LabelError(
        f"{len(absent)} of {len(table)} labelled slides {found}: {shown(absent)}; {cure}, or pass --missing drop to "
        "leave these slides out"
    )


def _blank(blank: Mapping[str, str]) -> LabelError:
    lack = "1 slide has" if len(blank) == 1 else f"{len(blank)} slides have"
    return LabelError(
        f"{lack} no label ({next(iter(blank.values()))}): {shown(list(blank))}; complete the table, or pass "
        "--missing drop to leave these slides out"
    )


def _count_splits(asked: Question, table: LabelTable, task: Task, gone: Sequence[str]) -> int:
    """Return how many splits there are, given or made."""
    sites = asked.group == "site"
    if sites:
        require_sites(table)
    cohort = label_cohort(table, task, keep_sites=sites)
    if asked.splits is not None:
        if not asked.splits.exists():
            raise LabelError(f"{asked.splits}: no such file or folder of splits; correct --splits")
        nested = read_nested_splits(asked.splits)
        for splits in nested:
            checked_splits(splits, cohort, left_out=gone, ids=asked.ids)
        if nested:
            return len(nested)
        given = read_any_splits(asked.splits, table, asked.ids)
        return len(checked_splits(given, cohort, left_out=gone, ids=asked.ids))
    if not asked.folds:
        return 0
    return len(make_splits(cohort, folds=asked.folds, val_fraction=asked.val_fraction, seed=asked.seed))


def rough_table(path: Path, there: Collection[str] = ()) -> LabelTable | None:
    """Return what can be used of a table that was refused, so that the rest of it can be checked, too.

    Of several rows of a slide the first counts here; that there are several is a problem of its own.
    """
    table = Problems().attempt(read_table, path)
    if table is None:
        return None
    rest: dict[str, tuple[str, ...]] = dict(table)
    slides = rest.pop(slide_column(rest, there) or "", ())
    patients = rest.pop(detect_column(rest, PATIENT_COLUMNS) or "", slides)
    rows: dict[str, int] = {}
    for row, name in enumerate(slides):
        if not is_missing(name) and not is_missing(patients[row]):
            rows.setdefault(slide_id(name), row)
    if not rows:
        return None
    return LabelTable(
        tuple(rows),
        tuple(patients[row] for row in rows.values()),
        {name: tuple(values[row] for row in rows.values()) for name, values in rest.items()},
        table.notes,
    )


def check_folder(folder: Path, option: str = "--job") -> None:
    """Refuse a folder for results that could not be written.

    Raises
    ------
    OutputError
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise OutputError(folder, f"is not a folder that can be made, because {nearest} is a file; correct {option}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(folder, f"cannot be written to (no permission for {nearest}); choose another {option}")


@dataclass(frozen=True)
class Need:
    """Tiles and features that are still to be made.

    Attributes
    ----------
    job : JobFolder
    tiling : Tiling
    folder : str
        Of the tiles in the job.
    encoder : str
        Name of the folder of features.
    dim : int
    bytes_per_value : int
    """

    job: JobFolder
    tiling: Tiling
    folder: str
    encoder: str
    dim: int
    bytes_per_value: int = 4

    def bytes(self, files: Sequence[SlideFile], headers: Headers) -> int:
        """Return about how many bytes they take, by the areas that headers state."""
        if not headers.areas_mm2:
            return 0
        mean = sum(headers.areas_mm2.values()) / len(headers.areas_mm2)
        step_um = (self.tiling.patch_size - self.tiling.overlap) * self.tiling.mpp
        per_mm2 = TISSUE_SHARE * 1e6 / step_um**2 * (self.dim * self.bytes_per_value + COORDINATES_BYTES)
        todo = [one.slide_id for one in files if one.slide_id not in headers.bad and not self._is_there(one.slide_id)]
        return int(sum(headers.areas_mm2.get(one, mean) * per_mm2 + BYTES_PER_SLIDE for one in todo))

    def _is_there(self, slide: str) -> bool:
        return self.job.features(self.folder, self.encoder, slide).is_file()


def check_space(folder: Path, needed: int) -> str:
    """Refuse a disk that is too small for what is going to be written; return both numbers in words.

    Raises
    ------
    OutputError
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise OutputError(
            folder,
            f"has {_gigabytes(free)} of free space, and tiles and features take about {_gigabytes(needed)} "
            f"(estimated with {TISSUE_SHARE:.0%} tissue); free some, or choose another folder",
        )
    return f"about {_gigabytes(needed)} to be written, {_gigabytes(free)} free"


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"

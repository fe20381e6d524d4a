"""Tables of labels and folders of features, joined into examples.

Policies, the same everywhere. Ids are text. A label whose slide has no features is an error unless `missing` is
``drop``; features without a label are left out. A label that is empty or NaN is an error: delete the row, or say what
the slide is. A patient may have several slides.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.errors import LabelError
from eosin.features.bag import FeatureSpec
from eosin.features.store import read_bag, read_common_spec, read_footer
from eosin.mil.tasks import Task
from eosin.wsi.names import SLIDE_SUFFIXES

SLIDE_COLUMNS = ("slide_id", "slide", "filename", "image_id", "tissue_sample_id", "wsi", "image")
PATIENT_COLUMNS = ("patient_id", "case_id", "patient", "subject_id", "case", "submitter_id")
SURVIVAL_COLUMNS = (("survival_months", "censorship"), ("time", "event"), ("time", "censorship"), ("Event", "Status"))
OTHER_COLUMNS = ("site", "split", "fold")
FILE_SUFFIXES = (*SLIDE_SUFFIXES, ".h5", ".pt", ".hdf5")
MISSING = frozenset({"", "nan", "na", "n/a", "<na>"})
SHOWN = 5


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
        twice = [slide for slide, count in Counter(self.slide_ids).items() if count > 1]
        if twice:
            raise LabelError(f"slides with more than one row: {shown(twice)}; keep one row per slide")

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

    def patient_of(self) -> dict[str, str]:
        """Return the patient of each slide."""
        return dict(zip(self.slide_ids, self.patient_ids, strict=True))

    def require(self, columns: Iterable[str]) -> None:
        """Raise `LabelError` unless the columns exist and every row has a value in them."""
        for name in columns:
            if name not in self.values:
                raise LabelError(f"the label table has no column {name!r}; it has {', '.join(self.values) or 'none'}")
            empty = [
                slide
                for slide, value in zip(self.slide_ids, self.values[name], strict=True)
                if value.strip().lower() in MISSING
            ]
            if empty:
                raise LabelError(
                    f"no value in column {name!r} for {shown(empty)}; delete these rows or complete the table"
                )

    def target_column(self, name: str | None = None) -> str:
        """Return the column that holds the label: the one that is asked for, ``label``, or the only one there is.

        Several, separated by commas, may be asked for. A pair of survival columns is found as ``time,event``.

        Raises
        ------
        LabelError
            If it does not exist, or several could be meant.
        """
        if name is not None or "label" in self.values:
            self.require(part.strip() for part in (name or "label").split(","))
            return name or "label"
        pair = next((pair for pair in SURVIVAL_COLUMNS if set(pair) <= set(self.values)), None)
        if pair is not None:
            self.require(pair)
            return ",".join(pair)
        candidates = [column for column in self.values if normalised(column) not in OTHER_COLUMNS]
        if len(candidates) != 1:
            raise LabelError(
                f"which column is the label? no column is called 'label', the table has "
                f"{', '.join(candidates) or 'no other column'}; name one (--target)"
            )
        self.require(candidates)
        return candidates[0]


def shown(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


Table = dict[str, tuple[str, ...]]


def read_table(path: Path) -> Table:
    """Read the columns of a csv, tsv, xlsx or parquet file, every value as text.

    Raises
    ------
    LabelError
        If the file is missing, empty or of another kind, or the package that reads it is not installed.
    """
    readers = {
        ".csv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig"),
        ".tsv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", sep="\t"),
        ".txt": lambda: pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", sep=None, engine="python"
        ),
        ".xlsx": lambda: pd.read_excel(path, dtype=str, keep_default_na=False),
        ".parquet": lambda: pd.read_parquet(path).astype("string").fillna("").astype(str),
    }
    if path.suffix.lower() not in readers:
        raise LabelError(f"{path}: tables are {', '.join(readers)}; found {path.suffix or 'no suffix'}")
    try:
        frame = readers[path.suffix.lower()]()
    except FileNotFoundError:
        raise LabelError(f"{path}: no such file") from None
    except ImportError as error:
        raise LabelError(f"{path}: {' '.join(str(error).split())}; install it, or save the table as csv") from None
    except (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise LabelError(f"{path}: cannot be read as a table ({' '.join(str(error).split())})") from None
    if frame.empty:
        raise LabelError(f"{path}: the table has no rows")
    return {str(name): tuple(str(value).strip() for value in frame[name]) for name in frame}


def read_labels(
    path: Path,
    *,
    slide_column: str | None = None,
    patient_column: str | None = None,
    group: Literal["patient", "slide"] = "patient",
) -> LabelTable:
    """Read a label table of this or another tool; its columns are found by their names.

    Slides: ``slide_id`` (CLAM), ``slide`` (slideflow), ``FILENAME`` (STAMP) and others; patients: ``case_id``,
    ``patient_id``, ``patient``, ``PATIENT`` and others. `LabelTable.notes` say which was taken for what.

    Parameters
    ----------
    path : Path
        csv, tsv, xlsx or parquet.
    slide_column, patient_column : str, optional
        Taken instead of the detected column.
    group : {"patient", "slide"}
        ``slide`` makes each slide its own patient, for tables without patients.

    Raises
    ------
    LabelError
        If there is no such column, an id is empty, or a slide has two rows.
    """
    frame = read_table(path)
    slides = slide_column or detect_column(frame, SLIDE_COLUMNS)
    patients = slides if group == "slide" else patient_column or detect_column(frame, PATIENT_COLUMNS)
    found = f"found {', '.join(frame)}"
    if slides is None or slides not in frame:
        raise LabelError(f"{path}: no column of slide ids{_named(slides)}; {found}; expected slide_id")
    if patients is None or patients not in frame:
        raise LabelError(
            f"{path}: no column of patients{_named(patients)}; {found}; expected patient_id or case_id, "
            "or say that each slide is its own patient (--group slide)"
        )
    others = [name for name in frame if name not in (slides, patients) and not name.startswith("Unnamed:") and name]
    notes = (f"slides: column {slides!r}", f"patients: column {patients!r}", f"values: {', '.join(others) or 'none'}")
    slide_ids = tuple(slide_id(value) for value in frame[slides])
    patient_ids = slide_ids if group == "slide" else tuple(frame[patients])
    if "" in slide_ids or "" in patient_ids:
        row = (slide_ids.index("") if "" in slide_ids else patient_ids.index("")) + 2
        raise LabelError(f"{path}: row {row} has no id; complete the table")
    return LabelTable(slide_ids, patient_ids, {name: frame[name] for name in others}, notes)


def slide_id(name: str) -> str:
    """Return the id of a slide from its id or file name: a known suffix goes, the other dots of a TCGA name stay."""
    stem = name.strip()
    for suffix in FILE_SUFFIXES:
        if stem.lower().endswith(suffix):
            return stem[: -len(suffix)]
    return stem


def normalised(column: str) -> str:
    """Return a column name in lower case with underscores."""
    return column.strip().lower().replace(" ", "_")


def detect_column(frame: Table, names: Sequence[str]) -> str | None:
    """Return the column that has the first of these normalised names that is there, or None."""
    by_name = {normalised(column): column for column in frame}
    return next((by_name[name] for name in names if name in by_name), None)


def _named(column: str | None) -> str:
    return "" if column is None else f" named {column!r}"


class BagSource(Protocol):
    """Where the instances of bags come from."""

    @property
    def spec(self) -> FeatureSpec:
        """What the features are, the same for all bags."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the bags."""

    def length(self, bag_id: str) -> int:
        """Return the number of instances without reading them."""

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances (n, D) in their stored dtype, or some rows of them; the caller must not change them."""


class MemoryBags:
    """Bags that are in memory already.

    Parameters
    ----------
    bags : mapping of str to (n, D) tensor or array
    spec : FeatureSpec
    """

    def __init__(self, bags: Mapping[str, Tensor | NDArray[np.floating]], spec: FeatureSpec):
        self._bags = {name: torch.as_tensor(bag) for name, bag in bags.items()}
        self.spec = spec
        self.ids: Sequence[str] = tuple(self._bags)

    def length(self, bag_id: str) -> int:
        """Return the number of instances."""
        return len(self._bags[bag_id])

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances, or some rows of them."""
        bag = self._bags[bag_id]
        return bag if rows is None else bag[rows]


class FeatureFolder:
    """Bags in feature files, memory-mapped, and kept in memory as long as a budget lasts.

    Parameters
    ----------
    files : mapping of str to Path
        As `eosin.features.store.find_bags` returns it; all of one specification.
    cache_bytes : int
        Bags are kept from their first use until this many bytes are used.

    Raises
    ------
    FeatureMismatchError
        If two files were made differently.
    """

    def __init__(self, files: Mapping[str, Path], *, cache_bytes: int = 2 * 2**30) -> None:
        self.spec = read_common_spec(files)
        self.ids: Sequence[str] = tuple(files)
        self._files = dict(files)
        self._lengths: dict[str, int] = {}
        self._cache: dict[str, Tensor] = {}
        self._free_bytes = cache_bytes

    def length(self, bag_id: str) -> int:
        """Return the number of instances."""
        if bag_id not in self._lengths:
            self._lengths[bag_id] = read_footer(self._files[bag_id]).n_rows
        return self._lengths[bag_id]

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances, or some rows of them; of a file that is not kept only these rows are read."""
        if bag_id not in self._cache:
            features = read_bag(self._files[bag_id]).features
            if features.nbytes > self._free_bytes:
                return torch.from_numpy(np.array(features if rows is None else features[rows.numpy()]))
            self._cache[bag_id] = torch.from_numpy(np.array(features))
            self._free_bytes -= features.nbytes
        bag = self._cache[bag_id]
        return bag if rows is None else bag[rows]


class PatientBags:
    """A patient as one bag: the instances of all slides of the patient, slide after slide.

    Parameters
    ----------
    slides : BagSource
    slides_of : mapping of str to sequence of str
        The slides of each patient.
    """

    def __init__(self, slides: BagSource, slides_of: Mapping[str, Sequence[str]]) -> None:
        self._slides = slides
        self._slides_of = slides_of
        self.spec = slides.spec
        self.ids: Sequence[str] = tuple(slides_of)

    def length(self, bag_id: str) -> int:
        """Return the number of instances of all slides."""
        return sum(self._slides.length(slide) for slide in self._slides_of[bag_id])

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances of all slides, or some rows of them."""
        bag = torch.cat([self._slides.load(slide) for slide in self._slides_of[bag_id]])
        return bag if rows is None else bag[rows]

    def slides_of(self, bag_id: str) -> tuple[str, ...]:
        """Return the ids of the patient's slides."""
        return tuple(self._slides_of[bag_id])

    def slide_index(self, bag_id: str) -> Tensor:
        """Return which of the patient's slides each instance is from, (n,) int64."""
        lengths = [self._slides.length(slide) for slide in self._slides_of[bag_id]]
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@dataclass(frozen=True, eq=False)
class Examples:
    """Bags with their targets.

    Attributes
    ----------
    bags : BagSource
    ids, patient_ids : tuple of str
        One per example.
    targets : (examples, ...) tensor
        As the task encodes them, on the host.
    """

    bags: BagSource = field(repr=False)
    ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, ids: Iterable[str]) -> Self:
        """Return the examples with these ids, in the order of the ids; `LabelError` for one that is not there."""
        place = {name: number for number, name in enumerate(self.ids)}
        wanted = list(ids)
        unknown = [name for name in wanted if name not in place]
        if unknown:
            raise LabelError(f"slides of a split without a label or features: {shown(unknown)}")
        at = [place[name] for name in wanted]
        patients = tuple(self.patient_ids[i] for i in at)
        return type(self)(self.bags, tuple(wanted), patients, self.targets[at])

    def joined(self, other: Self) -> Self:
        """Return these examples and others of the same bags."""
        targets = torch.cat([self.targets, other.targets])
        return type(self)(self.bags, self.ids + other.ids, self.patient_ids + other.patient_ids, targets)


def make_examples(
    bags: BagSource, table: LabelTable, task: Task, *, missing: Literal["error", "drop"] = "error"
) -> Examples:
    """Join features and labels by slide id.

    Parameters
    ----------
    bags : BagSource
    table : LabelTable
    task : Task
        Reads its columns of the table.
    missing : {"error", "drop"}
        What becomes of a label whose slide has no features.

    Raises
    ------
    LabelError
        If slides have no features and `missing` is ``error``, if none has, or a label is empty or of no meaning.
    """
    available = set(bags.ids)
    absent = [slide for slide in table.slide_ids if slide not in available]
    if absent and (missing == "error" or len(absent) == len(table)):
        raise LabelError(
            f"{len(absent)} of {len(table)} labelled slides have no features: {shown(absent)}; extract them, delete "
            "their rows, or leave them out on purpose (--missing drop)"
        )
    used = table.select(available)
    used.require(task.columns)
    return Examples(bags, used.slide_ids, used.patient_ids, task.encode(used.rows()))


def patient_examples(examples: Examples) -> Examples:
    """Return one example per patient from examples of slides.

    Raises
    ------
    LabelError
        If the slides of a patient have different labels.
    """
    slides_of: dict[str, list[str]] = {}
    for slide, patient in zip(examples.ids, examples.patient_ids, strict=True):
        slides_of.setdefault(patient, []).append(slide)
    firsts = examples.subset(slides[0] for slides in slides_of.values())
    for number, (patient, slides) in enumerate(slides_of.items()):
        if (examples.subset(slides).targets != firsts.targets[number]).any():
            raise LabelError(f"patient {patient} has slides with different labels ({shown(slides)}); train on slides")
    patients = tuple(slides_of)
    return Examples(PatientBags(examples.bags, slides_of), patients, patients, firsts.targets)

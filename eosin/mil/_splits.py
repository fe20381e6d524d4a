"""Who is trained on, who selects the model and who tests it.

A patient is never on two sides. Strata, the labels of a class task, are dealt out patient by patient, so that each part
gets its share; a class that a training part would lack is an error, not a surprise.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from eosin._columns import detect_column
from eosin._files import write_text
from eosin._filesets import MANIFEST, begin_set, finish_set, members_of, require_named
from eosin._names import Ids, is_missing, slide_id, spelled_as
from eosin._tables import csv_text, read_table
from eosin.errors import ConfigError, LabelError
from eosin.mil._cohort import Cohort, deal, draw
from eosin.mil._tables import shown

PARTS = ("train", "val", "test")
OTHER_NAMES = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}
OUTER = "outer_"
OWNED = rf"splits_\d+(_descriptor)?\.csv|splits\.json|{OUTER}\d+"

SplitKind = Literal["kfold", "monte-carlo", "holdout"]


@dataclass(frozen=True)
class Split:
    """One fold: ids of slides; `val` may be empty, then a part of `train` is taken where a model must be selected.

    Attributes
    ----------
    train, val, test : tuple of str
        Slide ids of each part.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Split: {', '.join(f'{len(slides)} {part}' for part, slides in self.parts().items())}>"

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return the parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def make_splits(
    cohort: Cohort,
    *,
    folds: int = 5,
    kind: SplitKind = "kfold",
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[Split]:
    """Make three-way splits, grouped and stratified by patient (or site); `make_nested_splits` makes nested ones.

    Parameters
    ----------
    cohort : Cohort
    folds : int
        Number of splits, at least 2 for k-fold and held-out test.
    kind : {"kfold", "monte-carlo", "holdout"}
        Every slide tested once; independent draws; or one test part that is the same in every split, while every other
        slide validates once.
    val_fraction, test_fraction : float
        Share of all patients that select the model; share that test it in a Monte-Carlo draw or are held out.
    seed : int

    Returns
    -------
    list of Split
        One per fold.

    Raises
    ------
    LabelError
        If a class has fewer patients than folds (k-fold) or than parts, or a part would be empty or lack a class in
        training.
    """
    if not (0 <= val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise LabelError(
            f"validation {val_fraction:g} and test {test_fraction:g}: the shares must be "
            "greater than 0 and their sum less than 1"
        )
    if folds < (1 if kind == "monte-carlo" else 2):
        raise LabelError(f"{folds} folds: cross-validation needs at least 2; use --kind monte-carlo for a single split")
    rng = np.random.default_rng(seed)
    if kind == "holdout":
        return _holdout(cohort, folds, test_fraction, rng)
    # before anything is drawn: afterwards one could only say that a part lacks a class
    _require_groups(cohort, max(folds if kind == "kfold" else 2, 2 + (val_fraction > 0)))
    draws = (draw(cohort, test_fraction, rng) for _ in range(folds))
    splits = []
    for test in deal(cohort, folds, rng) if kind == "kfold" else draws:
        rest = cohort.select(set(cohort.slide_ids) - set(test))
        # a share of all patients, drawn from those that are left
        val = draw(rest, val_fraction / (1 - len(test) / len(cohort.slide_ids)), rng) if val_fraction else ()
        splits.append(_ordered(cohort, val=val, test=test))
    return _finished(splits, cohort, parts=("val", "test") if val_fraction else ("test",))


def _holdout(cohort: Cohort, folds: int, test_fraction: float, rng: np.random.Generator) -> list[Split]:
    _require_groups(cohort, folds + 1)
    test = draw(cohort, test_fraction, rng)
    rest = cohort.select(set(cohort.slide_ids) - set(test))
    splits = [_ordered(cohort, val=val, test=test) for val in deal(rest, folds, rng)]
    return _finished(splits, cohort, parts=("val", "test"))


def _finished(splits: list[Split], cohort: Cohort, *, parts: Sequence[str]) -> list[Split]:
    check_splits(splits, cohort)
    if not all(split.parts()[part] for split in splits for part in parts):
        raise LabelError(
            f"too few {cohort.group_name} for {len(splits)} folds with {' and '.join(parts)} parts; use fewer folds"
        )
    return splits


def make_nested_splits(cohort: Cohort, *, folds: int = 5, inner_folds: int = 5, seed: int = 0) -> list[list[Split]]:
    """Make nested splits: for each outer fold, its test part with every rotation of validation within the rest.

    Parameters
    ----------
    cohort : Cohort
    folds, inner_folds : int
        Outer folds, each slide tested in one; inner folds, each of the others validating in one.
    seed : int

    Returns
    -------
    list of lists of Split
        One list per outer fold; all splits of a list have the same test part.

    Raises
    ------
    LabelError
        If a class has too few patients (or sites) for either.
    """
    if folds < 2 or inner_folds < 2:
        raise LabelError(f"{folds} outer and {inner_folds} inner folds: both need at least 2")
    _require_groups(cohort, max(folds, inner_folds + 1))
    rng = np.random.default_rng(seed)
    nested = []
    for test in deal(cohort, folds, rng):
        rest = cohort.select(set(cohort.slide_ids) - set(test))
        inner = [_ordered(cohort, val=val, test=test) for val in deal(rest, inner_folds, rng)]
        nested.append(_finished(inner, cohort, parts=("val", "test")))
    return nested


def with_validation(split: Split, cohort: Cohort, *, val_fraction: float = 0.15, seed: int = 0) -> Split:
    """Return the split as it is, or with a validation part taken from its training patients when it has none.

    Raises
    ------
    LabelError
        If a class has fewer than two training patients to share.
    """
    if split.val:
        return split
    train = cohort.select(split.train)
    _require_groups(train, 2, "train without a validation part (training.select: last)")
    val = draw(train, val_fraction, np.random.default_rng(seed))
    # slides that the split leaves out would else be trained on
    return _ordered(cohort.select((*split.train, *split.test)), val=val, test=split.test)


def named_splits(splits: Sequence[Split], slides: Iterable[str], ids: Ids = "ask") -> list[Split]:
    """Return splits with the slides named as they are here, see `eosin._names.spelled_as`; unknown names stay.

    Parameters
    ----------
    splits : sequence of Split
    slides : iterable of str
        Slides; and patients, where splits may name these.
    ids : {"ask", "merge", "exact"}
        What becomes of names that only look alike.

    Raises
    ------
    LabelError
        With all of them, if names only look alike and it is not said what they are.
    """
    everyone = (name for split in splits for part in split.parts().values() for name in part)
    meant = spelled_as(everyone, slides, what="slides", where="the splits", than="the label table", policy=ids)
    return [Split(*(tuple(meant.get(n, n) for n in part) for part in split.parts().values())) for split in splits]


def check_splits(splits: Sequence[Split], cohort: Cohort) -> None:
    """Refuse splits that would give wrong figures.

    Parameters
    ----------
    splits : sequence of Split
    cohort : Cohort
        Slides with their patients and classes.

    Raises
    ------
    LabelError
        If a slide is unknown or twice in a fold, a patient (or site) is on two sides, a training part is empty, or it
        lacks a class that the cohort has. The message names the first fold that is wrong and who is.
    """
    patient = dict(zip(cohort.slide_ids, cohort.patient_ids, strict=True))
    stratum = dict(zip(cohort.slide_ids, cohort.strata, strict=True))
    for number, split in enumerate(splits):
        everyone = [slide for part in split.parts().values() for slide in part]
        unknown = [slide for slide in everyone if slide not in patient]
        if unknown:
            raise LabelError(
                f"fold {number}: slides that are not in the label table: {shown(unknown)}; "
                "use the label table of these splits"
            )
        _refuse_leakage(number, split, patient, "patient")
        if cohort.sites:
            _refuse_leakage(number, split, dict(zip(cohort.slide_ids, cohort.sites, strict=True)), "site")
        twice = [slide for slide, count in Counter(everyone).items() if count > 1]
        if twice:
            raise LabelError(
                f"fold {number}: slides named more than once: {shown(twice)}; name each slide in one part only"
            )
        if not split.train:
            raise LabelError(f"fold {number}: there are no slides to train on")
        learnt = {stratum[slide] for slide in split.train} | cohort.soft
        absent = sorted({stratum[slide] for slide in everyone} - learnt)
        if absent:
            raise LabelError(
                f"fold {number}: no training slide of {shown(absent)}; use fewer folds, or leave the class out"
            )


def _refuse_leakage(number: int, split: Split, group: Mapping[str, str], kind: str) -> None:
    sides = {name: {group[slide] for slide in part} for name, part in split.parts().items()}
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        both = sorted(sides[first] & sides[second])
        if both:
            raise LabelError(
                f"fold {number}: {kind}s in both {first} and {second}: {shown(both)}; "
                f"split by {kind} (`eosin split --group {kind}`)"
            )


def _require_groups(cohort: Cohort, least: int, advice: str = "use fewer folds") -> None:
    members: dict[str, set[str]] = {}
    owners = cohort.sites or cohort.patient_ids
    for key, stratum in zip(owners, cohort.strata, strict=True):
        members.setdefault(stratum, set()).add(key)
    for stratum, keys in sorted(members.items()):
        if len(keys) < least and stratum not in cohort.soft:
            raise LabelError(
                f"class {stratum!r} has {_counted(len(keys), cohort)}, "
                f"at least {least} are needed to have it in every part; {advice}, or leave the class out"
            )
    if len(set(owners)) < least:
        raise LabelError(f"there are {_counted(len(set(owners)), cohort)}, at least {least} are needed; {advice}")


def _counted(number: int, cohort: Cohort) -> str:
    return f"{number} {cohort.group_name if number != 1 else cohort.group_name[:-1]}"


def _ordered(cohort: Cohort, *, val: Iterable[str], test: Iterable[str]) -> Split:
    in_val, in_test = set(val), set(test)
    return Split(
        tuple(slide for slide in cohort.slide_ids if slide not in in_val and slide not in in_test),
        tuple(slide for slide in cohort.slide_ids if slide in in_val),
        tuple(slide for slide in cohort.slide_ids if slide in in_test),
    )


def write_splits(folder: Path, splits: Sequence[Split], cohort: Cohort) -> None:
    """Write ``splits_<i>.csv`` with the columns train, val, test as CLAM does, and counts in ``_descriptor.csv``.

    Splits of an earlier call in the folder are replaced, those that are too many deleted.

    Parameters
    ----------
    folder : Path
    splits : sequence of Split
    cohort : Cohort
        For the counts of classes.

    Raises
    ------
    ConfigError
        If the folder has more splits, and eosin did not write them.
    """
    numbers = range(len(splits))
    members = [f"splits_{number}{end}.csv" for number in numbers for end in ("", "_descriptor")]
    begin_set(folder, members, pattern=OWNED)
    for number, split in enumerate(splits):
        write_text(folder / f"splits_{number}.csv", _as_csv(split))
        write_text(folder / f"splits_{number}_descriptor.csv", _descriptor(split, cohort))
    finish_set(folder, members)


def write_nested_splits(folder: Path, nested: Sequence[Sequence[Split]], cohort: Cohort) -> None:
    """Write ``outer_<i>/splits_<j>.csv``; what `write_splits` says of earlier splits holds for outer folds, too."""
    members = [f"{OUTER}{number}/{MANIFEST}" for number in range(len(nested))]
    begin_set(folder, members, pattern=OWNED)
    for number, splits in enumerate(nested):
        write_splits(folder / f"{OUTER}{number}", splits, cohort)
    finish_set(folder, members)


def read_nested_splits(folder: Path) -> list[list[Split]]:
    """Read what `write_nested_splits` wrote; empty when the folder has no ``outer_<i>``.

    Raises
    ------
    LabelError
        If the splits of an outer fold do not share their test part.
    """
    if not folder.is_dir():
        return []
    names = {name.partition("/")[0] for name in _members(folder)}
    found = sorted((int(match[1]), folder / name) for name in names if (match := re.fullmatch(rf"{OUTER}(\d+)", name)))
    nested = [read_splits(path) for _, path in found]
    for (number, path), splits in zip(found, nested, strict=True):
        if len({frozenset(split.test) for split in splits}) > 1:
            raise LabelError(f"{path}: the splits of outer fold {number} have different test parts")
    return nested


def _as_csv(split: Split) -> str:
    length = max(len(part) for part in split.parts().values())
    columns = [[*part, *[""] * (length - len(part))] for part in split.parts().values()]
    rows = [["", *PARTS], *([number, *row] for number, row in enumerate(zip(*columns, strict=True)))]
    return csv_text(rows)


def _descriptor(split: Split, cohort: Cohort) -> str:
    stratum = dict(zip(cohort.slide_ids, cohort.strata, strict=True))
    counts = [Counter(stratum[slide] for slide in part) for part in split.parts().values()]
    names = sorted(set(cohort.strata))
    return csv_text([["", *PARTS], *([name, *(count[name] for count in counts)] for name in names)])


def read_splits(path: Path) -> list[Split]:
    """Read splits of this or another tool.

    Parameters
    ----------
    path : Path
        A folder with ``splits_<i>.csv`` as CLAM and `write_splits` make them, or one such file; CLAM's
        ``splits_<i>_bool.csv`` is read when it is named.

    Returns
    -------
    list of Split
        In the order of their numbers.

    Raises
    ------
    LabelError
        If there is no such file or it is not a split.
    """
    if path.is_dir():
        names = [(match, name) for name in _members(path) if (match := re.fullmatch(r"splits_(\d+)\.csv", name))]
        files = sorted((int(match[1]), path / name) for match, name in names)
        if not files and any(path.glob(f"{OUTER}*")):
            raise LabelError(f"{path}: holds nested splits; pass the folder of one outer fold, {path / OUTER}<i>")
        if not files:
            raise LabelError(f"{path}: has no splits_<i>.csv; make them with `eosin split`")
        return [_read_csv(file) for _, file in files]
    require_unchanged(path)
    return [_read_csv(path)]


def _members(folder: Path) -> Sequence[str]:
    """Return the files of the set that was written last; all where nobody says which they are."""
    try:
        named = members_of(folder)
    except ConfigError as error:
        raise LabelError(error.message) from None
    return [path.name for path in folder.iterdir()] if named is None else named


def require_unchanged(path: Path) -> None:
    """Raise `LabelError` for a file of splits that is not as eosin wrote it; files of other tools pass."""
    try:
        require_named(path)
    except ConfigError as error:
        raise LabelError(error.message) from None


def _read_csv(path: Path) -> Split:
    table = read_table(path)
    if path.stem.endswith("_descriptor"):
        raise LabelError(f"{path}: lists numbers of slides, not their names; pass the file without _descriptor")
    named = [detect_column(table, (part, *OTHER_NAMES.get(part, ()))) for part in PARTS]
    if named[0] is None or named[2] is None:
        raise LabelError(
            f"{path}: not a table of splits; expected the columns train, val, test, found {', '.join(table)}"
        )
    columns = [() if name is None else table[name] for name in named]
    # one row per slide and a flag per part; a spreadsheet writes flags in capitals
    if all(value.casefold() in ("true", "false", "") for column in columns for value in column):
        names = [slide_id(name) for name in next(iter(table.values()))]
        columns = [
            tuple(name for name, flag in zip(names, column, strict=True) if flag.casefold() == "true") if column else ()
            for column in columns
        ]
    return Split(*(tuple(slide_id(value) for value in column if not is_missing(value)) for column in columns))

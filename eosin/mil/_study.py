"""A folder of features and a table of labels, understood and joined: what every training command starts from."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from eosin._batch import Outcome, is_elsewhere, run_stage
from eosin._columns import PATIENT_COLUMNS, SLIDE_COLUMNS, detect_column
from eosin._filesets import finish_set, members_of
from eosin._names import Ids
from eosin._tables import read_table
from eosin.errors import ConfigError, LabelError, OutputError, UnknownNameError
from eosin.features._store import find_bags, read_spec
from eosin.mil._cohort import Cohort
from eosin.mil._crossval import (
    VAL_FRACTION,
    Fold,
    FoldPlan,
    FoldSplits,
    cohort_of,
    complete_split,
    crossval,
    inner_splits,
)
from eosin.mil._data import Examples, FeatureFolder, make_examples, patient_examples
from eosin.mil._flow import Flow
from eosin.mil._interop import (
    read_fold_table,
    read_patient_splits,
    read_two_tables,
    split_by_column,
    write_patient_splits,
)
from eosin.mil._recipe import DEFAULT, Recipe, choose_recipe
from eosin.mil._splits import (
    Split,
    check_splits,
    make_splits,
    named_splits,
    read_nested_splits,
    read_splits,
    with_validation,
    write_nested_splits,
    write_splits,
)
from eosin.mil._tables import (
    LabelTable,
    Missing,
    id_notes,
    may_drop,
    read_labels,
    shown,
)
from eosin.mil._target import SITE_COLUMNS, has_value
from eosin.mil._train import BAGS_TO_COMPARE, fit, require_fitting, require_machine
from eosin.mil._training_run import Epoch, Fitted
from eosin.mil.task import TASKS, Task, make_task

CACHE_BYTES = 2 * 2**30
SPLIT_COLUMN = ("split",)
STAMP = "splits.json"
SITE = "site"
GROUPS = ("patient", "slide", SITE)


def open_labels(
    labels: Path,
    *,
    slide_table: Path | None = None,
    group: Literal["patient", "slide"] = "patient",
    ids: Ids = "ask",
    among: Collection[str] = (),
) -> LabelTable:
    """Read a table of labels in any layout that is known, told by its columns.

    Parameters
    ----------
    labels : Path
        One row per slide (CLAM, slideflow, PackMIL, ACMIL ...); a fold of TransMIL, with ``train`` and ``train_label``;
        or, with `slide_table`, one row per patient (STAMP).
    slide_table : Path, optional
        STAMP's second table, of slides and their patients.
    group : {"patient", "slide"}
        ``slide`` makes each slide its own patient.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, see `eosin._names.unify`.
    among : collection of str
        Slides that are there, see `eosin.mil._tables.read_labels`.

    Returns
    -------
    LabelTable
        One row per slide.

    Raises
    ------
    LabelError
        If no layout fits, ids are missing or twice, or some look alike and it is not said what they are.
    """
    if slide_table is not None:
        table = read_two_tables(labels, slide_table, ids)
        return replace(table, notes=(*table.notes, *_notes_on_ids(labels), *_notes_on_ids(slide_table)))
    if {"train", "train_label", "test_label"} <= set(read_table(labels)):
        table, _ = read_fold_table(labels)
        notes = ("slides: the columns train, val and test of a fold of TransMIL", "patients: each slide its own")
        return replace(table, notes=notes)
    return read_labels(labels, group=group, ids=ids, among=among)


def _notes_on_ids(path: Path) -> list[str]:
    table = read_table(path)
    found = {detect_column(table, names) for names in (PATIENT_COLUMNS, SLIDE_COLUMNS)}
    return [*table.notes, *(note for name in sorted(filter(None, found)) for note in id_notes(table, name))]


def pose_task(kind: str, table: LabelTable, target: str | None = None) -> Task:
    """Make the task that a label table poses.

    Parameters
    ----------
    kind : str
        See `eosin.mil.task.make_task`.
    table : LabelTable
    target : str, optional
        The label column or columns; found when there is only one candidate.

    Raises
    ------
    LabelError
        If several columns could be meant, or the labels do not pose such a task.
    UnknownNameError
        If there is no such task.
    """
    return make_task(kind, table.rows(), target=table.target_column(target, kind=kind))


def without_label(table: LabelTable, kind: str, target: str | None = None) -> dict[str, str]:
    """Return the slides whose row has no label, each with what it lacks.

    Raises
    ------
    LabelError
        If the label column does not exist, or several could be meant.
    """
    task = TASKS[kind]
    columns = task.named_columns(table.target_column(target, kind=kind))
    if not set(columns) <= set(table.values):
        return {}  # making the task says which columns there are
    enough = any if task.may_be_incomplete else all
    return {
        row["slide_id"]: f"has no value in column {' or '.join(columns)}"
        for row in table.rows()
        if not enough(has_value(row[name]) for name in columns)
    }


@dataclass(frozen=True)
class Source:
    """What a study was opened from; attributes as of `open_study`."""

    features: Path | dict[str, Path]
    labels: Path
    task: str
    target: str | None
    group: Literal["patient", "slide"]
    level: Literal["slide", "patient"]
    keep_sites: bool
    missing: Literal["error", "few", "drop"]
    slide_table: Path | None
    ids: Ids
    cache_bytes: int

    def open(self) -> "Study":
        """Open it again, on another machine."""
        return open_study(**vars(self))


@dataclass(frozen=True, eq=False)
class Study:
    """Labelled bags, the task they pose, and what splits must know of them.

    Attributes
    ----------
    task : Task
    examples : Examples
    cohort : Cohort
    table : LabelTable
        As it was read.
    notes : tuple of str
        How its columns and labels were understood, for a person to read.
    left_out : frozenset of str
        Slides of the table that are not part of it: splits may name them.
    flow : Flow
        What became of every slide that a file or a row of the table names.
    source : Source, optional
        What it was opened from.
    """

    task: Task
    examples: Examples
    cohort: Cohort
    table: LabelTable
    notes: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()
    flow: Flow = field(default_factory=Flow)
    source: Source | None = None

    def __repr__(self) -> str:
        patients = len(set(self.examples.patient_ids))
        return f"<Study: {len(self.examples)} bags of {patients} patients, {self.task!r}>"

    def splits(
        self, path: Path | None = None, *, folds: int = 5, val_fraction: float = 0.15, seed: int = 0
    ) -> list[Split]:
        """Return the splits of a folder or file, checked, or new ones by patient.

        Parameters
        ----------
        path : Path, optional
            Folder of ``splits_<i>.csv``, one such file (CLAM), ``splits.json`` (STAMP), a fold of TransMIL, or a table
            of slides with a column ``Split``. Splits of slides are read as splits of their patients when bags are
            patients.
        folds, val_fraction, seed
            Of new splits.

        Raises
        ------
        LabelError
            If splits leak or name slides that are not in the study, or there are too few patients for new ones.
        """
        if path is None:
            return make_splits(self.cohort, folds=folds, val_fraction=val_fraction, seed=seed)
        return self.checked(read_any_splits(path, self.table, self._ids))

    @property
    def _ids(self) -> Ids:
        return "ask" if self.source is None else self.source.ids

    def training_split(self, recipe: Recipe, splits: Path | None = None, fold: int | None = None) -> Split:
        """Return the split that one model trains on: a fold, or all slides.

        It has a validation part when the recipe selects by one.

        Raises
        ------
        ConfigError
            If there is no such fold, or it is not said which.
        LabelError
            As `splits`.
        """
        split = Split(self.examples.ids, (), ())
        if splits is None and fold is not None:
            raise ConfigError(f"--fold {fold} needs --splits; pass --splits, or remove --fold to train on all slides")
        if splits is not None:
            split = _one_of(self.splits(splits), fold, splits)
        if recipe.training.select == "last":
            return split
        return with_validation(split, self.cohort, seed=recipe.training.seed)

    def account(self, splits: Iterable[FoldSplits]) -> Flow:
        """Return what became of every slide that files or the table name, once splits say which are used."""
        inner = [split for fold in splits for split in inner_splits(fold)]
        named = {name for split in inner for part in split.parts().values() for name in part}
        patient = self.table.patient_of()
        used = [slide for slide in self.flow.used if slide in named or patient.get(slide) in named]
        return self.flow.keep("in splits", used, "is in no split")

    def nested(self, path: Path | None) -> list[list[Split]]:
        """Return the nested splits of a folder, checked; empty when it holds none.

        Raises
        ------
        LabelError
            As `splits`.
        """
        return [] if path is None else [self.checked(splits) for splits in read_nested_splits(path)]

    def checked(self, splits: Sequence[Split]) -> list[Split]:
        """Return splits with the ids that bags have here; errors as of `checked_splits`."""
        names = (*self.table.slide_ids, *self.cohort.slide_ids, *self.cohort.patient_ids)
        named = named_splits(splits, names, self._ids)
        fitting = [self._of_bags(split) for split in _without(named, self.left_out)]
        check_splits(fitting, self.cohort)
        return fitting

    def _of_bags(self, split: Split) -> Split:
        """Return the split of patients that a split of slides makes when the bags are patients."""
        known, patient = set(self.cohort.slide_ids), self.table.patient_of()
        if all(name in known or name not in patient for part in split.parts().values() for name in part):
            return split
        return Split(*(tuple(dict.fromkeys(patient.get(n, n) for n in part)) for part in split.parts().values()))


def checked_splits(
    splits: Sequence[Split], cohort: Cohort, *, left_out: Collection[str] = (), ids: Ids = "ask"
) -> list[Split]:
    """Return splits without the slides that are left out, and with those that are named as in the cohort.

    Raises
    ------
    LabelError
        If they leak or name slides that are not in the cohort.
    """
    kept = _without(named_splits(splits, (*cohort.slide_ids, *left_out), ids), left_out)
    check_splits(kept, cohort)
    return kept


def _without(splits: Sequence[Split], gone: Collection[str]) -> list[Split]:
    return [
        Split(*(tuple(name for name in part if name not in gone) for part in split.parts().values()))
        for split in splits
    ]


def _one_of(splits: Sequence[Split], fold: int | None, path: Path) -> Split:
    if fold is None and len(splits) > 1:
        raise ConfigError(f"{path} has {len(splits)} folds; choose one with --fold, or train all with `eosin crossval`")
    number = fold or 0
    if not 0 <= number < len(splits):
        raise ConfigError(f"--fold {number}: {path} has folds 0 to {len(splits) - 1}")
    return splits[number]


def read_any_splits(path: Path, table: LabelTable, ids: Ids = "ask") -> list[Split]:
    """Read splits in any layout that `Study.splits` names, for the slides of a table."""
    if path.suffix.lower() == ".json":
        slides = table.slide_ids
        return read_patient_splits(path, Cohort(slides, table.patient_ids, ("",) * len(slides)), ids)
    if path.is_file():
        column = detect_column(read_table(path), SPLIT_COLUMN)
        if column is not None:
            stated = read_labels(path, group="slide", ids=ids).named_as(table.slide_ids, ids)
            return [split_by_column(stated.select(table.slide_ids), column)]
    return read_splits(path)


def prepare(study: Study, out: Path, recipes: Iterable[Recipe], *, device: str, precision: str) -> tuple[str, ...]:
    """Refuse what stands in the way of hours of work, make the folder, and return what a person should read first.

    Raises
    ------
    ConfigError
        If there is no such device or precision, or a recipe asks for what the task cannot have.
    OutputError
        If the folder cannot be made.
    """
    require_machine(device, precision)
    fewest = BAGS_TO_COMPARE
    for recipe in recipes:
        fewest = min(fewest, recipe.training.bags_per_step)
        require_fitting(recipe.training, study.task)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(out, f"cannot be written to ({error.strerror})") from error
    understood = "; ".join(study.notes)
    if not study.task.compares_bags or fewest >= BAGS_TO_COMPARE:
        return (understood,)
    few = (
        f"task {study.task.kind} compares the bags of a step, which are {fewest}; {BAGS_TO_COMPARE} or more are better "
        f"(--set recipe.training.bags_per_step={BAGS_TO_COMPARE})"
    )
    return understood, few


def fit_study(
    study: Study,
    recipe: Recipe | str = DEFAULT,
    out: Path | str | None = None,
    *,
    split: Split | None = None,
    device: str = "auto",
    precision: str = "fp32",
    device_cache_bytes: int = 0,
    progress: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Train one model on a study.

    Parameters
    ----------
    study : Study
        See `open_study`.
    recipe : Recipe or str
        Or its name, or the path of a ``.yaml`` file.
    out : Path, optional
        Folder of the model; nothing is written without it.
    split : Split, optional
        Who trains and who selects; all slides unless given.
    device, precision, device_cache_bytes, progress
        As of `eosin.mil._train.fit`.

    Returns
    -------
    Fitted

    Raises
    ------
    ConfigError, LabelError
        As `eosin.mil._train.fit`.
    """
    chosen = choose_recipe(recipe) if isinstance(recipe, str) else recipe
    split = split or study.training_split(chosen)
    return fit(
        chosen,
        study.task,
        study.examples.subset(split.train),
        study.examples.subset(split.val) if split.val else None,
        folder=None if out is None else Path(out),
        device=device,
        precision=precision,
        device_cache_bytes=device_cache_bytes,
        progress=progress,
    )


def crossval_study(
    study: Study,
    recipe: Recipe | str = DEFAULT,
    out: Path | str = Path("crossval"),
    *,
    splits: Sequence[FoldSplits] | None = None,
    device: str = "auto",
    precision: str = "fp32",
    progress: Callable[[Fold], None] | None = None,
) -> dict[str, Any]:
    """Train and test every fold of a study.

    Parameters
    ----------
    study : Study
        See `open_study`.
    recipe : Recipe or str
        Or its name, or the path of a ``.yaml`` file.
    out : Path
        Folder of the models, the predictions and the metrics.
    splits : sequence of Split, optional
        As `Study.splits` returns; five new folds by patient unless given.
    device, precision, progress
        As of `eosin.mil._crossval.crossval`.

    Returns
    -------
    dict
        The metrics, see `eosin.mil._crossval.crossval`.

    Raises
    ------
    ConfigError, LabelError
        As `eosin.mil._crossval.crossval`.
    """
    chosen = choose_recipe(recipe) if isinstance(recipe, str) else recipe
    parts = splits or study.splits(seed=chosen.training.seed)
    train_elsewhere(study, {"": chosen}, parts, Path(out), device=device, precision=precision)
    return crossval(
        chosen,
        study.task,
        study.examples,
        parts,
        cohort=study.cohort,
        out=Path(out),
        flow=study.account(parts),
        device=device,
        precision=precision,
        progress=progress,
    )


def train_elsewhere(
    study: Study,
    recipes: Mapping[str, Recipe],
    splits: Sequence[FoldSplits],
    out: Path,
    *,
    device: str = "auto",
    precision: str = "fp32",
) -> None:
    """Train the folds of a cross-validation, or of the candidates of a sweep, on a cluster; without one do nothing.

    What comes after finds the models and reads them.

    Parameters
    ----------
    study : Study
    recipes : mapping of str to Recipe
        By the folder of the candidate in `out`; an empty text is `out` itself.
    splits, out, device, precision
        As of `eosin.mil._crossval.crossval`.

    Raises
    ------
    LabelError
        If a fold cannot be trained; the first reason is given.
    """
    if not is_elsewhere() or study.source is None:
        return
    for fold in splits:
        check_splits(inner_splits(fold), study.cohort)
    parts = tuple(fold if isinstance(fold, Split) else tuple(fold) for fold in splits)
    stage = FoldStage(study.source, dict(recipes), parts, out.absolute(), device, precision)
    items = [FoldItem(folder, number) for folder in recipes for number in range(len(parts))]
    report = run_stage(stage, items, run_json=out / "run.json")
    if report.failed:
        first = report.failed[0]
        raise LabelError(f"{len(report.failed)} of {len(items)} folds failed; {first.slide_id}: {first.message}")


@dataclass(frozen=True)
class FoldItem:
    """One fold of one candidate.

    Attributes
    ----------
    folder : str
        Of the candidate in the cross-validation's folder; empty when there is one recipe.
    number : int
        Of the fold.
    """

    folder: str
    number: int


@dataclass(frozen=True)
class FoldStage:
    """The training of folds as a `eosin._batch.Stage`; attributes as of `train_elsewhere`."""

    source: Source
    recipes: dict[str, Recipe]
    splits: tuple[Split | tuple[Split, ...], ...]
    out: Path
    device: str
    precision: str
    name: ClassVar[str] = "train"

    @cached_property
    def _study(self) -> Study:
        return self.source.open()

    def key(self, item: FoldItem) -> str:
        """Return the name of a fold."""
        return f"{item.folder} fold {item.number}".strip()

    def output(self, item: FoldItem) -> Path:
        """Return the folder of a fold's models."""
        return self.out / item.folder / f"fold_{item.number}"

    def is_done(self, _item: FoldItem) -> bool:
        """Leave it to the training, which reads a model that is there already."""
        return False

    def do(self, item: FoldItem) -> Outcome:
        """Train the models of a fold."""
        study, recipe, fold = self._study, self.recipes[item.folder], self.splits[item.number]
        plan = FoldPlan(recipe, study.task, study.examples, self.out / item.folder, self.device, self.precision)
        complete = [
            complete_split(split, recipe, study.cohort, VAL_FRACTION, item.number) for split in inner_splits(fold)
        ]
        plan.train(item.number, complete, plan.folders(item.number, fold))
        return Outcome()


def owner(group: str) -> Literal["patient", "slide"]:
    """Return whom slides belong to when splits keep a group together: a site keeps patients together too."""
    if group not in GROUPS:
        raise UnknownNameError("group", group, GROUPS)
    return "slide" if group == "slide" else "patient"


def require_sites(table: LabelTable) -> str:
    """Return the column of sites; `LabelError` when there is none or it is incomplete."""
    column = table.site_column()
    table.require([column or SITE_COLUMNS[0]])
    return column or SITE_COLUMNS[0]


def note_on_sites(table: LabelTable) -> str:
    """Return which column is read as the sites."""
    return f"sites: column {require_sites(table)!r}"


def confounded_sites(table: LabelTable, task: Task) -> tuple[str, ...]:
    """Return a note where every site has slides of one class only, so that a model may have learnt the site."""
    column = table.site_column()
    strata = list(task.strata(table.rows()))
    if column is None or task.soft_strata(table.rows()) or len(set(strata)) < 2:
        return ()
    pairs = set(zip(table.values[column], strata, strict=True))
    sites = {site for site, _ in pairs}
    # a site of its own for every slide says nothing about sites
    if len(pairs) > len(sites) or len(sites) == len(table):
        return ()
    return (
        f"warning: every site in column {column!r} has slides of one class only; site and class cannot be separated, "
        "so no result on these slides shows that the disease was learnt",
    )


def label_cohort(table: LabelTable, task: Task, *, keep_sites: bool = False) -> Cohort:
    """Return what splits must know of the slides of a table, before there are features."""
    rows = table.rows()
    sites = table.values[require_sites(table)] if keep_sites else ()
    return Cohort(table.slide_ids, table.patient_ids, tuple(task.strata(rows)), sites, task.soft_strata(rows))


def write_all_splits(folder: Path, nested: Sequence[Sequence[Split]], cohort: Cohort) -> None:
    """Write splits as CLAM and STAMP read them: ``splits_<i>.csv`` and ``splits.json``; nested ones in ``outer_<i>``.

    Parameters
    ----------
    folder : Path
    nested : sequence of sequences of Split
        One sequence of splits, or one per outer fold.
    cohort : Cohort
    """
    if len(nested) > 1:
        write_nested_splits(folder, nested, cohort)
        return
    write_splits(folder, nested[0], cohort)
    write_patient_splits(folder / STAMP, nested[0], cohort)
    finish_set(folder, [*(members_of(folder) or ()), STAMP])


def open_study(
    features: Path | str | Mapping[str, Path],
    labels: Path | str,
    *,
    task: str = "classification",
    target: str | None = None,
    group: Literal["patient", "slide"] = "patient",
    level: Literal["slide", "patient"] = "slide",
    keep_sites: bool = False,
    missing: Missing = "error",
    slide_table: Path | str | None = None,
    ids: Ids = "ask",
    flow: Flow | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Study:
    """Read labels and features and join them.

    Parameters
    ----------
    features : Path or mapping of str to Path
        Folder of feature files, or the file of each slide.
    labels : Path
        Table of labels, see `open_labels`.
    task : str
        Kind of the task, see `eosin.mil.task.make_task`.
    target : str, optional
        Label column; found when there is only one candidate.
    group : {"patient", "slide"}
        ``slide`` makes each slide its own patient.
    level : {"slide", "patient"}
        Whether a bag is a slide or all slides of a patient.
    keep_sites : bool
        Whether splits must keep sites together; they are a column called site, centre, institution or hospital.
    missing : {"error", "few", "drop"}
        What becomes of labels whose slide has no features, and of slides without a label; ``few`` leaves them out as
        long as they are at most one row in ten.
    slide_table : Path, optional
        STAMP's second table, see `open_labels`.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, see `eosin._names.unify`, and of slides that the table writes in another
        way than their files, see `LabelTable.named_as`.
    flow : Flow, optional
        What became of the slides before they had features, to be continued.
    cache_bytes : int
        Features kept in memory.

    Returns
    -------
    Study
        Bags, labels, patients and task, joined by slide id.

    Raises
    ------
    LabelError
        If the table cannot be used or does not fit the features.
    FeatureMismatchError
        If the features were not all made alike.
    """
    slide_table = None if slide_table is None else Path(slide_table)
    source = Source(
        {name: path.absolute() for name, path in features.items()}
        if isinstance(features, Mapping)
        else Path(features).absolute(),
        Path(labels).absolute(),
        task,
        target,
        group,
        level,
        keep_sites,
        missing,
        None if slide_table is None else slide_table.absolute(),
        ids,
        cache_bytes,
    )
    files = dict(features) if isinstance(features, Mapping) else find_bags(Path(features))
    full = open_labels(Path(labels), slide_table=slide_table, group=group, ids=ids, among=files)
    if _are_of_patients(files, full):
        full = full.of_patients(TASKS[task].named_columns(full.target_column(target, kind=task)))
    full = full.named_as({*files, *(flow or Flow()).slide_ids}, ids)
    blank = without_label(full, task, target) if missing != "error" and task in TASKS else {}
    lost_rows = {*blank, *(slide for slide in full.slide_ids if slide not in files)}
    missing = "drop" if may_drop(missing, len(lost_rows), len(full)) else "error"
    blank = blank if missing == "drop" else {}
    table = full.select(set(full.slide_ids) - set(blank))
    made = pose_task(task, table, target)
    site = require_sites(table) if keep_sites else None
    bags = FeatureFolder(_labelled(files, table), cache_bytes=cache_bytes)
    filled, notes_on_tiles = _with_tiles(table, bags)
    examples = make_examples(bags, filled, made, missing=missing)
    gone = frozenset(full.slide_ids) - set(examples.ids)
    rows = table.rows(examples.ids)
    if level == "patient":
        rows = _first_of_each_patient(rows)
        examples = patient_examples(examples)
    spare, lost = len(files) - len(bags.ids), len(filled) - (len(full) - len(gone))
    left_out = [f"{spare} of {len(files)} slides with features have no label and are left out"] if spare else []
    left_out += [f"{lost} of {len(table)} labelled slides have no features and are left out"] if lost else []
    left_out += [f"{len(blank)} slides have no label and are left out: {shown(list(blank))}"] if blank else []
    sites = (*((note_on_sites(table),) if keep_sites else ()), *confounded_sites(table, made))
    notes = (*table.notes, *sites, made.describe(rows), *left_out, *notes_on_tiles)
    return Study(
        made,
        examples,
        cohort_of(examples, made, rows, site=site),
        full,
        notes,
        gone,
        _account((flow or Flow()).lose("labelled", blank), files, full, filled),
        source,
    )


def _are_of_patients(files: Mapping[str, Path], table: LabelTable) -> bool:
    """Return whether the files are vectors of the table's patients."""
    if not set(files).isdisjoint(table.slide_ids) or set(files).isdisjoint(table.patient_ids):
        return False
    return read_spec(next(iter(files.values()))).is_vector


def _account(before: Flow, files: Collection[str], table: LabelTable, filled: LabelTable) -> Flow:
    """Return the account of a study: `filled` are the rows whose slides have tiles."""
    flow = before.joined(files, table.slide_ids, patient_of=table.patient_of())
    flow = flow.lose("features", {slide: "has no features" for slide in table.slide_ids if slide not in files})
    with_tiles = set(filled.slide_ids)
    empty = [slide for slide in table.slide_ids if slide not in with_tiles and slide not in flow.losses]
    flow = flow.lose("tissue", dict.fromkeys(empty, "has no tissue"))
    return flow.keep("labelled", table.slide_ids, "has no row in the label table")


def _with_tiles(table: LabelTable, bags: FeatureFolder) -> tuple[LabelTable, tuple[str, ...]]:
    """Return the table without the slides on which no tissue was found, and a note of them."""
    wanted = set(table.slide_ids)
    empty = [name for name in bags.ids if name in wanted and not bags.length(name)]
    if not empty:
        return table, ()
    if len(empty) == len(table):
        raise LabelError(f"no labelled slide has tiles: {shown(empty)}; tile them with other tissue options")
    return table.select(wanted - set(empty)), (f"{len(empty)} slides without tiles are left out: {shown(empty)}",)


def _labelled(files: dict[str, Path], table: LabelTable) -> dict[str, Path]:
    """Leave out files without a label, so that they need not be alike; all stay when no label fits, for the message."""
    wanted = set(table.slide_ids)
    return {slide: path for slide, path in files.items() if slide in wanted} or files


def _first_of_each_patient(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({row["patient_id"]: row for row in reversed(rows)}.values())[::-1]

"""The studies of a job: every set of options has results of its own, on tiles and features that studies share.

The first study of a job lies in the job folder itself, where a job with one study has everything; each further one in
``studies/<name>``. ``study.json`` says what decides its results, so that the same options find them again and
others never touch them. A job of eosin 0.1 has results and no ``study.json``: it is a first study that can
be read and that nothing continues.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from eosin import __version__
from eosin._files import locked, write_json
from eosin._seals import is_intact, read_json, sealed
from eosin.errors import ConfigError, EosinError, UnknownNameError
from eosin.features._bag import FeatureSpec
from eosin.features._encoders import folder_name
from eosin.features._store import find_bags, read_spec
from eosin.mil._checkpoint import load_card
from eosin.mil._seen import Run
from eosin.mil.task import load_task
from eosin.pipeline._result import Earlier
from eosin.wsi._job import STUDIES, JobFolder

STUDY = "study.json"
LOCK = f".{STUDY}.lock"
FIRST = "first"
METRICS, PREDICTIONS, MODEL = "crossval/metrics.json", "crossval/predictions.csv", "model/model.json"
NAME = re.compile(r"[\w][\w .+-]*")
SCHEMA = 1
DIGITS = 8


@dataclass(frozen=True)
class StudyKey:
    """What decides the results of a study: two studies with the same are one.

    Attributes
    ----------
    fingerprint : str
        Of everything that decides its results.
    options : mapping of str to JSON
        By their names with dots, for people to compare.
    tiles, features : str
        Hashes of what decides the tiles, and their features besides the encoder's name.
    encoder : str
    """

    fingerprint: str
    options: Mapping[str, Any]
    tiles: str
    features: str
    encoder: str


@dataclass(frozen=True, eq=False)
class StudyFolder:
    """One study of a job.

    Attributes
    ----------
    job : JobFolder
    name : str
    key : StudyKey, optional
        None of a job of eosin 0.1.
    tiles : JobFolder
        Where its tiles and features are.
    begun : str
        When, in UTC.
    """

    job: JobFolder
    name: str
    key: StudyKey | None
    tiles: JobFolder
    begun: str = ""

    @property
    def path(self) -> Path:
        """Where its results are."""
        return path_of(self.job, self.name)

    @property
    def is_finished(self) -> bool:
        """Whether cross-validation and model are there."""
        return (self.path / METRICS).is_file() and (self.path / MODEL).is_file()

    @property
    def report(self) -> Path:
        """Its page."""
        return self.path / "report.html"

    @cached_property
    def metrics(self) -> Mapping[str, Any]:
        """What its cross-validation measured; `ConfigError` where that cannot be read."""
        try:
            found: Mapping[str, Any] = read_json(self.path / METRICS)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path / METRICS}: cannot be read ({error})") from None
        return found

    def begin(self) -> None:
        """Write its key; nothing where it has begun before."""
        if self.key is None or (self.path / STUDY).is_file():
            return
        tiles = self.tiles.root.relative_to(self.job.root).as_posix()
        facts = {
            "schema": SCHEMA,
            "name": self.name,
            "eosin": __version__,
            "begun": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "tiles_in": tiles,
            "key": {name: getattr(self.key, name) for name in StudyKey.__dataclass_fields__},
        }
        write_json(self.path / STUDY, sealed(facts))


def path_of(job: JobFolder, name: str) -> Path:
    """Return the folder of a study by its name."""
    return job.root if name == FIRST else job.root / STUDIES / name


def studies_of(job: JobFolder) -> list[StudyFolder]:
    """Return the studies of a job, the oldest first.

    Raises
    ------
    ConfigError
        If the description of one is damaged.
    """
    names = sorted(path.parent.name for path in job.root.glob(f"{STUDIES}/*/{STUDY}"))
    found = [_read(job, name) for name in names]
    if (job.root / STUDY).is_file():
        found.append(_read(job, FIRST))
    elif (job.root / METRICS).is_file() or (job.root / MODEL).is_file():
        found.append(StudyFolder(job, FIRST, None, job))
    return sorted(found, key=lambda study: (study.begun, study.name))


def _read(job: JobFolder, name: str) -> StudyFolder:
    path = path_of(job, name) / STUDY
    try:
        data = read_json(path)
        if data["schema"] != SCHEMA or not is_intact(data):
            raise ValueError("its checksum does not fit")
        return StudyFolder(job, name, StudyKey(**data["key"]), JobFolder(job.root / data["tiles_in"]), data["begun"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); delete it to keep the results of this study as they are"
        ) from None


def place_study(job: JobFolder, key: StudyKey, name: str | None = None) -> StudyFolder:
    """Return the study of a key: the one that has begun with it, or a new one beside the others.

    Nothing is written.

    Parameters
    ----------
    job : JobFolder
    key : StudyKey
    name : str, optional
        Of a new study; the first eight digits of its fingerprint otherwise, and the job itself for the first.

    Raises
    ------
    ConfigError
        If the name is not one of a folder, or that of a study which asks something else.
    """
    known = {study.name: study for study in studies_of(job)}
    same = [study for study in known.values() if study.key and study.key.fingerprint == key.fingerprint]
    if name is None:
        if same:
            return same[0]
        name = FIRST if FIRST not in known else key.fingerprint[:DIGITS]
    require_name(name)
    taken = known.get(name)
    if taken is None:
        path = path_of(job, name)
        return StudyFolder(job, name, key, _tiles_for(key, known.values(), job, path))
    if taken in same:
        return taken
    others = ", ".join(f"{name} {_shown(old)} instead of {_shown(new)}" for name, (old, new) in changes(taken, key))
    raise ConfigError(
        f"--study {name}: holds a study with other options ({others or 'of another version of eosin'}); "
        "choose another name, or remove --study to start a new one"
    )


def begin_study(job: JobFolder, key: StudyKey, name: str | None = None) -> StudyFolder:
    """Return the study of a key once its key is written; arguments and errors as of `place_study`.

    Of runs that begin in one job at the same moment one is the first study, and the others see it.
    """
    with locked(job.root / LOCK):
        study = place_study(job, key, name)
        study.begin()
    return study


def require_name(name: str | None) -> None:
    """Refuse a name that cannot be that of a folder.

    Raises
    ------
    ConfigError
    """
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError(f"--study {name!r} cannot be the name of a folder; use letters, digits, dots and dashes")


def _tiles_for(key: StudyKey, known: Iterable[StudyFolder], job: JobFolder, path: Path) -> JobFolder:
    """Return where tiles and features go: to those of another study that are made alike, else to a place of their own.

    Tiles, pictures and features of one job folder are named after slides alone, so that other options need another.
    """
    others = [study for study in known if study.key is not None]
    for root in dict.fromkeys((job.root, *(study.tiles.root for study in others))):
        if all(_share(key, study.key) for study in others if study.tiles.root == root and study.key):
            return JobFolder(root)
    return JobFolder(path)


def _share(one: StudyKey, other: StudyKey) -> bool:
    return one.tiles == other.tiles and (one.encoder != other.encoder or one.features == other.features)


def changes(study: StudyFolder, key: StudyKey | None) -> list[tuple[str, tuple[Any, Any]]]:
    """Return the options that a study and a question have different, each with both values."""
    if study.key is None or key is None:
        return []
    old, new = study.key.options, key.options
    return [(name, (old.get(name), new.get(name))) for name in {**old, **new} if old.get(name) != new.get(name)]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def find_study(job: JobFolder, name: str | None = None) -> StudyFolder:
    """Return the study that is meant: by name, else the newest that is finished, else the newest.

    Raises
    ------
    UnknownNameError
        If there is no such study.
    ConfigError
        If the job has none.
    """
    known = studies_of(job)
    if name is not None:
        for study in known:
            if study.name == name:
                return study
        raise UnknownNameError(f"study in {job.root}", name, [study.name for study in known])
    if not known:
        raise ConfigError(f"{job.root}: has no study; make one with eosin run")
    return ([study for study in known if study.is_finished] or known)[-1]


def study_at(path: Path) -> StudyFolder | None:
    """Return the study that a folder is, or of a job the one that `find_study` takes; None of any other folder."""
    if (path / STUDY).is_file() and path.parent.name == STUDIES:
        return find_study(JobFolder(path.parent.parent), path.name)
    return find_study(JobFolder(path)) if (path / STUDY).is_file() or (path / STUDIES).is_dir() else None


def features_of(study: StudyFolder) -> Path:
    """Return the folder of the features that the models of a study have learnt from.

    Raises
    ------
    ConfigError
        If there is none, or several fit.
    """
    wanted = load_card(Run.open(study.path).folders[0]).features
    folders = sorted(study.tiles.root.glob(f"*/features_{folder_name(wanted.encoder)}"))
    found = [folder for folder in folders if _is_of(folder, wanted)]
    if len(found) == 1:
        return found[0]
    several = ", ".join(map(str, found)) or "none"
    raise ConfigError(f"{study.path}: the features of its models are needed, found {several}; pass --features")


def _is_of(folder: Path, wanted: FeatureSpec) -> bool:
    """Return whether the first file of a folder has the features that a model wants."""
    try:
        first = next(iter(find_bags(folder).values()))
        wanted.require_match(read_spec(first), first)
    except EosinError:
        return False
    return True


def main_metric(study: StudyFolder) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the metric that its task is judged by, and its value and interval over all test slides."""
    name = load_task(study.metrics["task"]).selection_metric
    return name, study.metrics["out_of_fold"][name]


def earlier_studies(study: StudyFolder) -> list[Earlier]:
    """Return the finished studies of the job that began before this one."""
    found = []
    for other in studies_of(study.job):
        if other.name == study.name:
            break
        if other.is_finished and other.report.is_file():
            name, measured = main_metric(other)
            value = "undefined" if measured["value"] is None else f"{measured['value']:.3f}"
            told = [f"{option} {_shown(old)}" for option, (old, _) in changes(other, study.key)]
            page = os.path.relpath(other.report, study.path)
            found.append(Earlier(other.name, Path(page).as_posix(), f"{name} {value}; {', '.join(told) or 'of 0.1'}"))
    return found


def plain_hash(value: object) -> str:
    """Return a hash of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def flat(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested options by their names with dots."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = value
    return found


def differing(studies: Sequence[StudyFolder]) -> dict[str, list[Any]]:
    """Return the options that are not the same in all studies, with their values; None where it is not known."""
    values = [{} if study.key is None else study.key.options for study in studies]
    names = dict.fromkeys(name for known in values for name in known)
    columns = {name: [known.get(name) for known in values] for name in names}
    known_of = {
        name: [value for value, study in zip(column, studies, strict=True) if study.key is not None]
        for name, column in columns.items()
    }
    return {name: column for name, column in columns.items() if any(v != known_of[name][0] for v in known_of[name])}

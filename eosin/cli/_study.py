"""What `split`, `train`, `crossval` and `run` have in common: groups, policies, and a recipe with its changes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from eosin.cli._progress import say
from eosin.cli._settings import Settings
from eosin.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from eosin._names import Ids
    from eosin.mil._recipe import Recipe
    from eosin.mil._study import Study
    from eosin.mil._tables import Missing
    from eosin.pipeline._preflight import Problems

LEVELS = ("slide", "patient")

SlideTable = Annotated[
    Path | None,
    typer.Option(help="Table with the columns slide and patient, for labels with one row per patient (STAMP)."),
]
MaxInstancesPerStep = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Most tiles in memory at once; a larger step accumulates gradients over several packs.",
        show_default="no limit",
    ),
]
CacheGb = Annotated[float, typer.Option(help="GB of features kept in memory; the rest is read again in every epoch.")]
DeviceCacheGb = Annotated[
    float, typer.Option(help="GB of features kept in GPU memory, to save copying them in every epoch.")
]
BYTES_PER_GB = 2**30


def read_study(
    features: Path,
    labels: Path,
    settings: Settings,
    *,
    task: str | None,
    target: str | None,
    group: str,
    level: str,
    missing: str,
    ids: str,
    problems: "Problems",
    out: Path,
    device: str,
    splits: Path | None,
    folds: int = 0,
    recipes: "Sequence[Recipe]" = (),
    slide_table: Path | None = None,
    cache_gb: float = 2.0,
) -> "Study":
    """Join features and labels as the options of a command say, once nothing stands in the way.

    Raises
    ------
    EosinError
        What `problems` holds already, and all that is wrong with table, features, splits, device and folder.
    """
    from eosin.mil._study import SITE, open_study, owner
    from eosin.pipeline._preflight import Question, check_training

    question = Question(
        labels,
        settings.choose("task", task, "classification"),
        settings.choose("target", target, None),
        slide_table=slide_table,
        group=group,
        missing=problems.attempt(missing_policy, missing) or "few",
        ids=problems.attempt(ids_policy, ids) or "ask",
        splits=None if level == "patient" else splits,  # they may name patients, which `Study.checked` understands
        folds=folds,
        seed=recipes[0].training.seed if recipes else 0,
    )
    problems.attempt(require_level, level)
    problems.attempt(require_no_study, out)
    cache = problems.attempt(cache_bytes, cache_gb)
    check_training(problems, features, question, out, device=device, recipes=recipes)
    problems.require()
    return open_study(
        features,
        labels,
        task=question.task,
        target=question.target,
        group=owner(group),
        level=cast("Literal['slide', 'patient']", level),
        keep_sites=group == SITE,
        missing=question.missing,
        slide_table=slide_table,
        ids=question.ids,
        cache_bytes=cache or 0,
    )


def model_of(path: Path) -> Path:
    """Return the cross-validation of a job's newest finished study, and say which it is; any other path as it is."""
    from eosin.pipeline._studies import study_at

    study = study_at(path)
    if study is None or (path / "model.json").is_file():
        return path
    say(f"model: the cross-validation of study {study.name} ({study.path / 'crossval'})")
    return study.path / "crossval"


def job_features(model: Path) -> Path | None:
    """Return the features of the study whose model, or cross-validation, a folder is; None where it is of no study."""
    from eosin.pipeline._studies import features_of, study_at

    study = study_at(model) or study_at(model.parent)
    return None if study is None else features_of(study)


def require_no_study(out: Path) -> None:
    """Refuse to overwrite the results of `eosin run`.

    Raises
    ------
    ConfigError
    """
    from eosin.pipeline._studies import STUDY

    if (out.parent / STUDY).is_file():
        raise ConfigError(f"{out}: belongs to a study of eosin run, which is never overwritten; pass another --out")


def require_level(level: str) -> None:
    """Refuse what a bag cannot be."""
    if level not in LEVELS:
        raise UnknownNameError("level", level, LEVELS)


def settle(precision: str, device: str, out: Path) -> str:
    """Return the precision that a run in this folder computes in, and say which one ``auto`` chose."""
    from eosin.mil._train import settled_precision

    settled = settled_precision(precision, device, out)
    if precision == "auto":
        say(f"precision {settled}, chosen by --precision auto")
    return settled


def begin(study: "Study", out: Path, recipes: "Iterable[Recipe]", *, device: str, precision: str) -> None:
    """Say how the table was understood, once nothing stands in the way of hours of work."""
    from eosin.mil._study import prepare

    for line in prepare(study, out, recipes, device=device, precision=precision):
        say(line)


def ids_policy(name: str) -> "Ids":
    """Return what becomes of ids that look alike, by name."""
    from eosin._names import POLICIES

    if name not in POLICIES:
        raise UnknownNameError("policy for --ids", name, POLICIES)
    return cast("Ids", name)


def missing_policy(name: str) -> "Missing":
    """Return what becomes of labels without slides, by name."""
    from eosin.mil._tables import Missing

    if name not in get_args(Missing):
        raise UnknownNameError("policy for --missing", name, get_args(Missing))
    return cast("Missing", name)


def require_one_source(splits: Path | None, folds: int | None) -> None:
    """Refuse a number of folds beside splits, which have their own.

    Raises
    ------
    ConfigError
        If both are given.
    """
    if splits is not None and folds is not None:
        raise ConfigError(
            f"--folds {folds} and --splits {splits} exclude each other, because the splits fix "
            "the number of folds; pass one of them"
        )


def cache_bytes(gigabytes: float) -> int:
    """Return the value of --cache-gb or --device-cache-gb in bytes.

    Raises
    ------
    ConfigError
        If it is negative or no number.
    """
    if not gigabytes >= 0:
        raise ConfigError(f"a cache of {gigabytes:g} GB is not possible; pass 0 or more")
    return int(gigabytes * BYTES_PER_GB)


def recipe_of(name: str | None, settings: Settings, *, max_instances_per_step: int | None = None) -> "Recipe":
    """Return the recipe of a name or a YAML file, changed by the group ``recipe`` of ``--config`` and ``--set``.

    `max_instances_per_step` is the flag of that name and wins over them.
    """
    from eosin.mil._recipe import choose_recipe
    from eosin.options import merge

    stated, changes = settings.named("recipe")
    if max_instances_per_step is not None:
        changes = merge(changes, {"training": {"max_instances_per_step": max_instances_per_step}})
    return choose_recipe(name or stated, changes)

"""What `split`, `train`, `crossval` and `run` have in common: groups, policies, and a recipe with its changes."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from eosin.cli._common import Settings, merge, say
from eosin.errors import ConfigError, OutputError, UnknownNameError

if TYPE_CHECKING:
    from eosin.mil.recipe import Recipe
    from eosin.mil.splits import Split
    from eosin.mil.study import Study

SITE = "site"
GROUPS = ("patient", "slide", SITE)
MISSING = ("error", "drop")
LEVELS = ("slide", "patient")

SlideTable = Annotated[
    Path | None,
    typer.Option(help="Table of slides and their patients, when the labels are one row per patient (STAMP)."),
]
MaxInstancesPerStep = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tiles computed at once; a step of more is accumulated over several packs (recipe.training).",
        show_default="no limit",
    ),
]
CacheGb = Annotated[float, typer.Option(help="GB of features kept in memory; what is beyond is read at each pass.")]
DeviceCacheGb = Annotated[
    float, typer.Option(help="GB of features kept on the device, so that a pass copies nothing to it.")
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
    slide_table: Path | None = None,
    cache_gb: float = 2.0,
) -> "Study":
    """Join features and labels as the options of a command say."""
    from eosin.mil.study import open_study

    if level not in LEVELS:
        raise UnknownNameError("level", level, LEVELS)
    return open_study(
        features,
        labels,
        task=settings.choose("task", task, "classification"),
        target=settings.choose("target", target, None),
        group=owner(group),
        level=cast("Literal['slide', 'patient']", level),
        keep_sites=group == SITE,
        missing=missing_policy(missing),
        slide_table=slide_table,
        cache_bytes=cache_bytes(cache_gb),
    )


def begin(study: "Study", out: Path, recipes: "Iterable[Recipe]", *, device: str, precision: str) -> None:
    """Say how the table was understood, once nothing stands in the way of hours of work.

    Raises
    ------
    ConfigError
        If there is no such device or precision, or a recipe asks for what the task cannot have.
    OutputError
        If the folder cannot be made.
    """
    from eosin.mil.train import BAGS_TO_COMPARE, require_fitting, require_machine

    require_machine(device, precision)
    fewest = BAGS_TO_COMPARE
    for recipe in recipes:
        fewest = min(fewest, recipe.training.bags_per_step)
        require_fitting(recipe.training, study.task)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(out, f"cannot be written to ({error.strerror})") from error
    say("; ".join(study.notes))
    if study.task.compares_bags and fewest < BAGS_TO_COMPARE:
        say(
            f"task {study.task.kind} compares the bags of a step, which are {fewest}; "
            f"{BAGS_TO_COMPARE} or more are better (--set recipe.training.bags_per_step={BAGS_TO_COMPARE})"
        )


def owner(group: str) -> "Literal['patient', 'slide']":
    """Return whom slides belong to when splits keep a group together: a site keeps patients together too."""
    if group not in GROUPS:
        raise UnknownNameError("group", group, GROUPS)
    return "slide" if group == "slide" else "patient"


def missing_policy(name: str) -> "Literal['error', 'drop']":
    """Return what becomes of labels without slides, by name."""
    if name not in MISSING:
        raise UnknownNameError("policy for --missing", name, MISSING)
    return cast("Literal['error', 'drop']", name)


def require_one_source(splits: Path | None, folds: int | None) -> None:
    """Refuse a number of folds beside splits, which have their own.

    Raises
    ------
    ConfigError
        If both are given.
    """
    if splits is not None and folds is not None:
        raise ConfigError(f"--folds {folds} and --splits {splits} were both given; splits have their own number")


def cache_bytes(gigabytes: float) -> int:
    """Return the value of --cache-gb or --device-cache-gb in bytes.

    Raises
    ------
    ConfigError
        If it is negative or no number.
    """
    if not gigabytes >= 0:
        raise ConfigError(f"a cache of {gigabytes:g} GB was asked for; it takes 0 or more")
    return int(gigabytes * BYTES_PER_GB)


def training_split(study: "Study", splits: Path | None, fold: int | None, recipe: "Recipe") -> "Split":
    """Return the fold that was asked for, or all slides; with a validation part when the recipe selects by one."""
    from eosin.mil.splits import Split, with_validation

    split = Split(study.examples.ids, (), ())
    if splits is None and fold is not None:
        raise ConfigError(f"--fold {fold} of which splits? pass --splits, or leave --fold out to train on all slides")
    if splits is not None:
        split = _one_of(study.splits(splits), fold, splits)
    if recipe.training.select == "last":
        return split
    return with_validation(split, study.cohort, seed=recipe.training.seed)


def _one_of(splits: "list[Split]", fold: int | None, path: Path) -> "Split":
    if fold is None and len(splits) > 1:
        raise ConfigError(f"{path} has {len(splits)} folds; choose one with --fold, or train all with `eosin crossval`")
    number = fold or 0
    if not 0 <= number < len(splits):
        raise ConfigError(f"--fold {number}: {path} has folds 0 to {len(splits) - 1}")
    return splits[number]


def choose_recipe(name: str | None, settings: Settings, *, max_instances_per_step: int | None = None) -> "Recipe":
    """Return the recipe of a name or a YAML file, changed by the group ``recipe`` of ``--config`` and ``--set``.

    `max_instances_per_step` is the flag of that name and wins over them.

    Raises
    ------
    UnknownNameError
        If no recipe has the name, or it names a method or an option that does not exist.
    """
    import eosin.mil.methods  # noqa: F401 - registers the recipes
    from eosin.mil.recipe import RECIPES, Recipe
    from eosin.options import read_yaml

    if name is not None and Path(name).suffix in (".yaml", ".yml"):
        base = Recipe.parse(read_yaml(Path(name)), source=name)
    else:
        base = RECIPES[name or "abmil"]
    changed = merge(base.model_dump(mode="json"), settings.group("recipe"))
    if max_instances_per_step is not None:
        changed = merge(changed, {"training": {"max_instances_per_step": max_instances_per_step}})
    recipe = Recipe.parse(changed, source="recipe")
    require_methods(recipe)
    return recipe


def require_methods(recipe: "Recipe") -> None:
    """Raise `UnknownNameError` when a recipe names a method or an option that does not exist."""
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES

    AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
    STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
    for term in recipe.terms:
        LOSS_TERMS.resolve(term.name, term.options)

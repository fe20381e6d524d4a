"""What `train` and `crossval` start from: features and labels joined, and a recipe with its changes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from eosin.cli._common import Settings, merge
from eosin.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from eosin.mil.data import Examples, LabelTable
    from eosin.mil.recipe import Recipe
    from eosin.mil.splits import Cohort, Split
    from eosin.mil.tasks import Task

GROUPS = ("patient", "slide", "site")
MISSING = ("error", "drop")
SITE = "site"


@dataclass(frozen=True, eq=False)
class Labelled:
    """A label table and what its labels mean."""

    table: "LabelTable"
    task: "Task"
    group: str

    @classmethod
    def read(cls, labels: Path, *, task: str, target: str | None, group: str) -> "Labelled":
        """Read the table and make the task of its label column."""
        from eosin.mil.data import read_labels
        from eosin.mil.tasks import make_task

        if group not in GROUPS:
            raise UnknownNameError("group", group, GROUPS)
        table = read_labels(labels, group="slide" if group == "slide" else "patient")
        return cls(table, make_task(task, table.rows(), target=table.target_column(target)), group)

    def cohort(self) -> "Cohort":
        """Return what splits must know of the slides of the table."""
        from eosin.mil.splits import Cohort

        sites: tuple[str, ...] = ()
        if self.group == "site":
            self.table.require([SITE])
            sites = self.table.values[SITE]
        strata = tuple(self.task.strata(self.table.rows()))
        return Cohort(self.table.slide_ids, self.table.patient_ids, strata, sites)


@dataclass(frozen=True, eq=False)
class Study:
    """Labelled bags, ready to be split and trained on."""

    task: "Task"
    examples: "Examples"
    cohort: "Cohort"

    @classmethod
    def read(cls, features: Path, labelled: Labelled, *, missing: str) -> "Study":
        """Join a folder of features with a label table."""
        from eosin.features.store import find_bags
        from eosin.mil.data import FeatureFolder, make_examples

        policy = missing_policy(missing)
        bags = FeatureFolder(find_bags(features))
        examples = make_examples(bags, labelled.table, labelled.task, missing=policy)
        return cls(labelled.task, examples, labelled.cohort().select(examples.ids))

    def training_split(self, splits: Path | None, fold: int | None, recipe: "Recipe") -> "Split":
        """Return the fold that was asked for, or all slides; with a validation part when the recipe selects by one."""
        from eosin.mil.splits import Split, check_splits, read_splits, with_validation

        split = Split(self.examples.ids, (), ())
        if splits is not None:
            split = _one_of(read_splits(splits), fold, splits)
            check_splits([split], self.cohort)
        if recipe.training.select == "last":
            return split
        return with_validation(split, self.cohort, seed=recipe.training.seed)


def _one_of(splits: "list[Split]", fold: int | None, path: Path) -> "Split":
    if fold is None and len(splits) > 1:
        raise ConfigError(f"{path} has {len(splits)} folds; choose one with --fold, or train all with `eosin crossval`")
    number = fold or 0
    if not 0 <= number < len(splits):
        raise ConfigError(f"--fold {number}: {path} has folds 0 to {len(splits) - 1}")
    return splits[number]


def missing_policy(name: str) -> "Literal['error', 'drop']":
    """Return what becomes of labels without slides, by name."""
    if name not in MISSING:
        raise UnknownNameError("policy for --missing", name, MISSING)
    return cast("Literal['error', 'drop']", name)


def choose_recipe(name: str | None, settings: Settings) -> "Recipe":
    """Return the recipe of a name or a YAML file, changed by the group ``recipe`` of ``--config`` and ``--set``.

    Raises
    ------
    UnknownNameError
        If no recipe has the name, or it names a method or an option that does not exist.
    """
    import eosin.mil.methods  # noqa: F401 - registers the recipes
    from eosin.mil.recipe import RECIPES, Recipe
    from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES
    from eosin.options import read_yaml

    if name is not None and Path(name).suffix in (".yaml", ".yml"):
        base = Recipe.parse(read_yaml(Path(name)), source=name)
    else:
        base = RECIPES[name or "abmil"]
    recipe = Recipe.parse(merge(base.model_dump(mode="json"), settings.group("recipe")), source="recipe")
    AGGREGATORS.resolve(recipe.aggregator.name, recipe.aggregator.options)
    STRATEGIES.resolve(recipe.strategy.name, recipe.strategy.options)
    for term in recipe.terms:
        LOSS_TERMS.resolve(term.name, term.options)
    return recipe

"""Many recipes over the same folds, and a choice between them that sees no test fold.

Every candidate is cross-validated. In each fold the candidate is chosen that has the best value on the fold's
validation part, or the best mean over the validation parts of nested splits, and only its test predictions count: the
figure of the choice, not of the luckiest candidate.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from eosin._files import write_json, write_text
from eosin._filesets import MANIFEST, begin_set, finish_set
from eosin._tables import csv_text
from eosin.errors import ConfigError
from eosin.mil._cohort import Cohort
from eosin.mil._crossval import METRICS, VAL_FRACTION, Fold, FoldSplits, crossval, result_files, write_folds
from eosin.mil._data import Examples
from eosin.mil._evaluate import RESAMPLES, summarise_folds
from eosin.mil._recipe import DEFAULT, RECIPES, Recipe
from eosin.mil.task import Task
from eosin.options import Options, override

TABLE = "sweep.csv"
CHOSEN = "chosen"
SEED = " seed="


class Sweep(Options):
    """What is tried.

    Attributes
    ----------
    recipes : tuple of str
        Names of registered recipes.
    grid : mapping of str to list
        Values of options of a recipe, for example ``training.lr: [1.0e-4, 3.0e-4]``; all combinations are tried.
    seeds : tuple of int
        Each combination is trained with each of these seeds.
    """

    recipes: tuple[str, ...] = Field(default=(DEFAULT,), min_length=1)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    def candidates(self) -> dict[str, Recipe]:
        """Return every recipe that is tried, by a name that says what is different about it.

        Raises
        ------
        UnknownNameError, ConfigError
            If a recipe or option does not exist.
        """
        found: dict[str, Recipe] = {}
        values = itertools.product(*self.grid.values())
        for name, chosen, seed in itertools.product(self.recipes, list(values), self.seeds):
            changes = [f"{key}={value}" for key, value in zip(self.grid, chosen, strict=True)]
            said = (f"{key.split('.')[-1]}={value}" for key, value in zip(self.grid, chosen, strict=True))
            label = " ".join([name, *said])
            label += f"{SEED}{seed}" if len(self.seeds) > 1 else ""
            data = override(RECIPES[name].model_dump(mode="json"), [*changes, f"training.seed={seed}"])
            if label in found:
                raise ConfigError(
                    f"two candidates of the sweep have the name {label!r}; list each recipe, option and seed once"
                )
            found[label] = Recipe.parse(data, source="sweep")
        _require_selectable(found)
        return found


def run_sweep(
    candidates: Mapping[str, Recipe],
    task: Task,
    examples: Examples,
    splits: Sequence[FoldSplits],
    *,
    cohort: Cohort,
    out: Path,
    device: str = "auto",
    precision: str = "fp32",
    val_fraction: float = VAL_FRACTION,
    resamples: int = RESAMPLES,
    progress: Callable[[str, Fold], None] | None = None,
) -> dict[str, Any]:
    """Cross-validate every candidate and the choice between them.

    Parameters
    ----------
    candidates : mapping of str to Recipe
        See `Sweep.candidates`; all must select by a validation part.
    task, examples, splits, cohort, device, precision, val_fraction, resamples
        As of `eosin.mil._crossval.crossval`.
    out : Path
        Receives a folder per candidate, ``chosen/`` with the predictions and metrics of the choice, and ``sweep.csv``.
    progress : callable, optional
        Is given the candidate's name and the fold.

    Returns
    -------
    dict
        The metrics of the choice, as `crossval` returns them, and ``choices``: the candidate of each fold.

    Raises
    ------
    ConfigError
        If a candidate has no validation part to be chosen by.
    """
    _require_selectable(candidates)
    members = [f"candidate_{number}/{MANIFEST}" for number in range(len(candidates))]
    begin_set(out, [*members, TABLE], pattern=r"candidate_\d+")
    folds: dict[str, list[Fold]] = {}
    lines = []
    for number, (name, recipe) in enumerate(candidates.items()):
        done: list[Fold] = []
        folds[name] = done

        def note(fold: Fold, name: str = name, done: list[Fold] = done) -> None:
            done.append(fold)
            if progress is not None:
                progress(name, fold)

        summary = crossval(
            recipe,
            task,
            examples,
            splits,
            cohort=cohort,
            out=out / f"candidate_{number}",
            device=device,
            precision=precision,
            val_fraction=val_fraction,
            resamples=resamples,
            progress=note,
        )
        lines.append(_line(name, summary))
    choices = [choose(folds, number, task) for number in range(len(splits))]
    picked = [folds[name][number] for number, name in enumerate(choices)]
    summary = write_folds(next(iter(candidates.values())), task, picked, out / CHOSEN, resamples=resamples)
    chosen = {name: recipe.model_dump(mode="json") for name, recipe in candidates.items() if name in choices}
    summary = summary | {"choices": choices, "recipe": chosen}
    write_json(out / CHOSEN / METRICS, summary)
    finish_set(out / CHOSEN, result_files(summary))
    write_text(out / TABLE, _as_csv([*lines, *_over_seeds(folds), _line("chosen by validation", summary)]))
    finish_set(out, [*members, TABLE])
    return summary


def _require_selectable(candidates: Mapping[str, Recipe]) -> None:
    blind = [name for name, recipe in candidates.items() if recipe.training.select == "last"]
    if blind:
        raise ConfigError(
            f"{', '.join(blind)}: training.select is 'last', so a sweep cannot compare models; set it to loss or metric"
        )


def _over_seeds(folds: Mapping[str, Sequence[Fold]]) -> list[dict[str, Any]]:
    """Return a line for all seeds of each candidate that was trained with several: figures over folds and seeds."""
    groups: dict[str, list[Fold]] = {}
    counts: Counter[str] = Counter()
    for name, made in folds.items():
        base = name.partition(SEED)[0]
        groups[base] = [*groups.get(base, []), *made]
        counts[base] += 1
    return [
        _line(f"{base}, {counts[base]} seeds", {"metrics": summarise_folds([fold.metrics for fold in made])})
        for base, made in groups.items()
        if counts[base] > 1
    ]


def choose(folds: Mapping[str, Sequence[Fold]], number: int, task: Task) -> str:
    """Return the candidate with the best mean validation value: the selection metric, the loss where it ties."""
    values = {}
    for name, made in folds.items():
        parts = made[number].validation
        metrics = [part[task.selection_metric] for part in parts]
        known = [metric for metric in metrics if metric is not None]
        losses = [loss for part in parts if (loss := part["loss"]) is not None]
        # undefined on one part: a mean over the other parts would be about other slides
        values[name] = (np.mean(known) if len(known) == len(parts) else -np.inf, -np.mean(losses))
    return max(values, key=values.__getitem__)


def _line(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"candidate": name}
    for metric, figures in summary["metrics"].items():
        line |= {f"{metric}_mean": figures["mean"], f"{metric}_sd": figures["standard_deviation"]}
    return line


def _as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    names = list(lines[0])
    return csv_text([names, *([line.get(name) for name in names] for line in lines)])

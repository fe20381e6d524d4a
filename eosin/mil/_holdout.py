"""One model on slides that have not trained it: the part of a split that is left to judge it."""

from pathlib import Path
from typing import Any

from eosin._filesets import finish_set
from eosin.mil._crossval import judge_models, result_files, write_folds
from eosin.mil._data import Examples
from eosin.mil._evaluate import RESAMPLES
from eosin.mil._recipe import Recipe
from eosin.mil._seen import Part
from eosin.mil._splits import Split
from eosin.mil._training_run import Fitted
from eosin.mil.task import Task


def unseen_part(split: Split, recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """Return name and slides of the part that judges a model, empty when there is none.

    That is the test part, else the validation part unless the model was refitted on it.
    """
    if split.test:
        return "test", split.test
    return ("validation", split.val) if split.val and not recipe.training.refit else ("", ())


def judge(
    fitted: Fitted,
    task: Task,
    examples: Examples,
    out: Path,
    *,
    part: Part = "no",
    device: str = "auto",
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Write ``predictions.csv`` and ``metrics.json`` of a model on these examples; return the latter.

    Parameters
    ----------
    fitted : Fitted
        A threshold is the one that it chose on validation slides.
    task : Task
        As it was before training.
    examples : Examples
    out : Path
    part : {"no", "validated"}
        Whether the slides have chosen the model, which the metrics then say.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    resamples : int
        Of the bootstrap over patients.

    Returns
    -------
    dict
        As `eosin.mil._crossval.crossval` returns it, of one fold.
    """
    fold = judge_models([fitted], task, examples, device=device)
    summary = write_folds(fitted.card.recipe, task, [fold], out, resamples=resamples, part=part)
    finish_set(out, result_files(summary))
    return summary

"""The studies of a job side by side: which options differ, what they found, and whether that is chance."""

from collections.abc import Sequence
from dataclasses import dataclass

from eosin._tables import read_table
from eosin.errors import ConfigError, EosinError
from eosin.mil._compare import Difference, compare_predictions
from eosin.mil.task import load_task
from eosin.pipeline._studies import PREDICTIONS, StudyFolder, differing, find_study, main_metric, studies_of
from eosin.wsi._job import JobFolder


@dataclass(frozen=True)
class Compared:
    """One study in a comparison.

    Attributes
    ----------
    name : str
    options : mapping of str to value
        Those that are not the same in all studies.
    state : str
        ``finished`` or ``unfinished``.
    metric : str
        Name of the metric that its task is judged by.
    value, lower, upper : float or None
        The metric over all test slides and its 95 % interval over patients.
    n_slides, n_patients : int
        That were tested.
    difference : Difference, optional
        To the study that all are compared with, on the same patients.
    refusal : str
        Why there is none; empty for the study that all are compared with.
    """

    name: str
    options: dict[str, object]
    state: str
    metric: str = ""
    value: float | None = None
    lower: float | None = None
    upper: float | None = None
    n_slides: int = 0
    n_patients: int = 0
    difference: Difference | None = None
    refusal: str = ""


def compare_studies(job: JobFolder, against: str | None = None) -> list[Compared]:
    """Compare the studies of a job with one of them.

    Areas under the ROC curve of one slide per patient are compared by DeLong's test, everything else by a bootstrap
    that draws the same patients for both, see `eosin.mil._compare.compare_predictions`.

    Parameters
    ----------
    job : JobFolder
    against : str, optional
        Name of the study that the others are compared with; the oldest that is finished otherwise.

    Returns
    -------
    list of Compared
        The oldest study first.

    Raises
    ------
    ConfigError
        If the job has no study, or no such one.
    """
    studies = studies_of(job)
    if not studies:
        raise ConfigError(f"{job.root}: has no study; make one with eosin run")
    finished = [study for study in studies if study.is_finished]
    first = find_study(job, against) if against is not None else next(iter(finished), None)
    columns = differing(studies)
    return [
        _compared(study, {name: column[place] for name, column in columns.items()}, first)
        for place, study in enumerate(studies)
    ]


def _compared(study: StudyFolder, options: dict[str, object], first: StudyFolder | None) -> Compared:
    if not study.is_finished:
        return Compared(study.name, options, "unfinished")
    name, measured = main_metric(study)
    table = read_table(study.path / PREDICTIONS)
    difference, refusal = None, ""
    if first is not None and study.name != first.name:
        difference, refusal = _difference(study, first, name)
    return Compared(
        study.name,
        options,
        "finished",
        name,
        measured["value"],
        measured["lower"],
        measured["upper"],
        len(table["slide_id"]),
        len(set(table["patient_id"])),
        difference,
        refusal,
    )


def _difference(study: StudyFolder, first: StudyFolder, metric: str) -> tuple[Difference | None, str]:
    """Return the difference in the main metric, or why two studies cannot be compared."""
    task = load_task(study.metrics["task"])
    if not task.same_question(load_task(first.metrics["task"])):
        return None, f"not comparable with {first.name}: they answer different questions"
    try:
        tables = [read_table(one.path / PREDICTIONS) for one in (study, first)]
        return compare_predictions(task, *tables)[metric], ""
    except EosinError as error:
        return None, f"not comparable with {first.name}: {error.message}"


def in_words(studies: Sequence[Compared]) -> list[str]:
    """Return what holds for the whole table."""
    tests = {one.difference.test for one in studies if one.difference is not None}
    return [f"differences by {' and '.join(sorted(tests))} over the same patients"] if tests else []

"""`eosin probe`: vectors or pooled tiles + labels → linear probes, out-of-fold predictions, metrics, report."""

from pathlib import Path
from typing import Annotated, cast

import typer

from eosin.cli._arguments import FeaturesFolder, Group, IdsPolicy, Labels, Level, Missing, Splits, Target, TaskKind
from eosin.cli._common import Done, command
from eosin.cli._progress import say
from eosin.cli._settings import Settings
from eosin.cli._study import SlideTable
from eosin.errors import ConfigError

REPORT = "report.html"


@command(
    "task", "target", "folds",
    rare=(
        "splits", "seed", "slide_table", "task", "group", "level", "missing", "ids", "compare", "strength",
        "neighbours", "repeats",
    ),
    of_job={"out": "probe"},
)  # fmt: skip
def probe(
    *,
    features: FeaturesFolder,
    labels: Labels,
    slide_table: SlideTable = None,
    task: TaskKind = None,
    out: Annotated[Path, typer.Option(help="Folder for the predictions, metrics and report.")],
    method: Annotated[
        str, typer.Option(help="logistic, ridge, cox, hazard or knn; auto takes the linear one of the task.")
    ] = "auto",
    pool: Annotated[
        str, typer.Option(help="How tiles become a vector: mean, max, mean_sd; vectors stay what they are.")
    ] = "mean",
    strength: Annotated[
        float | None,
        typer.Option(help="Penalty on squared weights.", show_default="chosen on inner folds of the training part"),
    ] = None,
    neighbours: Annotated[int, typer.Option(help="Training slides that knn asks.")] = 5,
    few_shot: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help="Also fit probes to so few patients of each class: 1,2,4,8,16,32."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Draws per number of patients and fold.")] = 20,
    splits: Splits = None,
    folds: Annotated[
        int | None, typer.Option(help="Number of folds, if there is no --splits.", show_default="5")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of new folds, inner folds and few-shot draws.")] = 0,
    target: Target = None,
    group: Group = "patient",
    level: Level = "slide",
    missing: Missing = "few",
    ids: IdsPolicy = "ask",
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Folder of an `eosin crossval` or `eosin probe` on the same slides, to compare with."
        ),
    ] = None,
    settings: Settings,
) -> Done:
    """Fit and test a linear probe, or nearest neighbours, on one vector per slide: the baseline of every model.

    The folds, predictions, metrics and the report are those of `eosin crossval`. The linear probe of all slides, on the
    mean or maximum of their tiles, is a model in OUT/model for `eosin predict` and `eosin heatmap`.
    """
    from eosin._files import file_fingerprint
    from eosin.cli._study import read_study, require_one_source
    from eosin.mil._compare import require_comparable
    from eosin.mil._crossval import METRICS, PREDICTIONS, read_predictions, tested_slides
    from eosin.mil._probe import FEW_SHOT, MODEL, Probe, can_be_saved, probe_study, require_no_models, require_shots
    from eosin.pipeline._preflight import Problems
    from eosin.report._evaluation import Context, report_crossval
    from eosin.report._measures import compare_runs, shots_table

    problems = Problems()
    problems.attempt(require_one_source, splits, folds)
    options = {"method": method, "pool": pool, "strength": strength, "neighbours": neighbours, "seed": seed}
    chosen = cast("Probe", problems.attempt(Probe.parse, options, source="the command line")) or Probe()
    shots = problems.attempt(_numbers, few_shot) or ()
    problems.attempt(require_no_models, out)
    if repeats < 1:
        problems.add(ConfigError(f"--repeats {repeats}: pass 1 or more"))
    study = read_study(
        features,
        labels,
        settings,
        task=task,
        target=target,
        group=group,
        level=level,
        missing=missing,
        ids=ids,
        problems=problems,
        out=out,
        device="cpu",
        splits=splits,
        folds=settings.choose("folds", folds, 5),
        slide_table=slide_table,
    )
    chosen = chosen.of_task(study.task)
    parts = study.nested(splits) or study.splits(splits, folds=settings.choose("folds", folds, 5), seed=seed)
    require_shots(study.task, study.cohort, parts, shots)
    if compare is not None:
        require_comparable(study.task, tested_slides(parts), read_predictions(compare / PREDICTIONS))
    flow = study.account(parts)
    say("; ".join(study.notes))
    metrics = probe_study(study, out, probe=chosen, splits=parts, shots=shots, repeats=repeats, flow=flow)
    tables = {} if compare is None else compare_runs(metrics["task"], out / PREDICTIONS, compare / PREDICTIONS)
    if shots:
        tables |= shots_table(metrics["few_shot"])
    context = Context(
        title=f"Probe: {chosen.in_words(study.task)}",
        flow=flow,
        thumbnails=features.parent.parent / "thumbnails",
        tables=tables,
        provenance={"labels": f"{labels.name} ({file_fingerprint(labels)})"},
    )
    report_crossval(out / REPORT, metrics, out / PREDICTIONS, study, context)
    more = [*([out / FEW_SHOT] if shots else []), *([out / MODEL] if can_be_saved(chosen) else [])]
    paths = [out / METRICS, out / PREDICTIONS, *more, out / REPORT]
    return Done(paths, lines=tuple(flow.lines()))


def _numbers(text: str | None) -> tuple[int, ...]:
    """Return the numbers of --few-shot.

    Raises
    ------
    ConfigError
        If they are not positive whole numbers.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--few-shot {text}: pass whole numbers from 1, for example 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))

"""`eosin crossval`: features + labels → a model per fold, out-of-fold predictions, metrics, report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli._arguments import (
    Device,
    FeaturesFolder,
    Group,
    IdsPolicy,
    Labels,
    Level,
    Missing,
    RecipeName,
    Splits,
    Target,
    TaskKind,
    TrainPrecision,
)
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings
from eosin.cli._study import CacheGb, MaxInstancesPerStep, SlideTable
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin.mil._crossval import FoldSplits
    from eosin.mil._recipe import Recipe
    from eosin.mil._study import Study

CHOSEN, SWEEP_TABLE, REPORT = "chosen", "sweep.csv", "report.html"


@command(
    "recipe", "task", "target", "folds",
    rare=("slide_table", "task", "group", "level", "missing", "ids", "sweep", "compare", "max_instances_per_step",
          "cache_gb", "precision"),
    of_job={"out": "crossval"}, checks_device=False, cluster="out",
)  # fmt: skip
def crossval(
    *,
    features: FeaturesFolder,
    labels: Labels,
    slide_table: SlideTable = None,
    task: TaskKind = None,
    recipe: RecipeName = None,
    out: Annotated[Path, typer.Option(help="Folder for the models, predictions, metrics and report.")],
    splits: Splits = None,
    folds: Annotated[
        int | None, typer.Option(help="Number of folds, if there is no --splits.", show_default="5")
    ] = None,
    target: Target = None,
    group: Group = "patient",
    level: Level = "slide",
    missing: Missing = "few",
    ids: IdsPolicy = "ask",
    sweep: Annotated[
        Path | None,
        typer.Option(help="YAML file with recipes, an option grid and seeds; the best is chosen on validation slides."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Folder of another `eosin crossval` on the same slides; its models are compared with these.",
        ),
    ] = None,
    max_instances_per_step: MaxInstancesPerStep = None,
    cache_gb: CacheGb = 2.0,
    device: Device = "auto",
    precision: TrainPrecision = "auto",
    settings: Settings,
) -> Done:
    """Train and test one model per fold, and write out-of-fold metrics. Test slides are never used to choose."""
    from eosin._devices import choose_device
    from eosin._files import file_fingerprint
    from eosin.cli._study import begin, read_study, recipe_of, require_one_source, settle
    from eosin.mil._compare import require_comparable
    from eosin.mil._crossval import METRICS, PREDICTIONS, read_predictions, tested_slides
    from eosin.mil._probe import BASELINE, Probe, write_baseline
    from eosin.mil._recipe import Recipe
    from eosin.pipeline._preflight import Problems
    from eosin.report._evaluation import Context, report_crossval
    from eosin.report._measures import baseline_table, compare_runs, headline, sweep_table

    problems = Problems()
    problems.attempt(require_one_source, splits, folds)
    chosen = problems.attempt(recipe_of, recipe, settings, max_instances_per_step=max_instances_per_step) or Recipe()
    candidates = problems.attempt(_candidates, sweep, recipe, settings) or {}
    recipes = list(candidates.values()) or [chosen]
    number, seed = settings.choose("folds", folds, 5), chosen.training.seed
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
        device=device,
        splits=splits,
        folds=number,
        recipes=recipes,
        slide_table=slide_table,
        cache_gb=cache_gb,
    )
    parts: Sequence[FoldSplits] = study.nested(splits) or study.splits(splits, folds=number, seed=seed)
    if compare is not None:
        require_comparable(study.task, tested_slides(parts), read_predictions(compare / PREDICTIONS))
    precision = settle(precision, device, out)
    begin(study, out, recipes, device=device, precision=precision)
    results = out
    if sweep is None:
        metrics = _train(chosen, study, parts, out, device=device, precision=precision)
    else:
        metrics = _sweep(candidates, study, parts, out, device=device, precision=precision)
        results = out / CHOSEN
    tables = {} if compare is None else compare_runs(metrics["task"], results / PREDICTIONS, compare / PREDICTIONS)
    if sweep is not None:
        tables |= sweep_table(out / SWEEP_TABLE, metrics)
    baseline = write_baseline(study, parts, out / BASELINE)
    tables |= baseline_table(metrics["task"], results / PREDICTIONS, baseline, Probe().in_words(study.task))
    context = Context(
        flow=study.account(parts),
        thumbnails=features.parent.parent / "thumbnails",
        tables=tables,
        provenance={
            "labels": f"{labels.name} ({file_fingerprint(labels)})",
            "splits": f"{splits.name if splits else f'{number} new folds'}, never with a {group} on two sides",
            "computed": f"{choose_device(device)}, {precision}, seed {seed}",
        },
    )
    report_crossval(out / REPORT, metrics, results / PREDICTIONS, study, context)
    first = [] if sweep is None else [out / SWEEP_TABLE]
    return Done(
        [*first, results / METRICS, results / PREDICTIONS, out / REPORT],
        lines=(*study.account(parts).lines(), headline(metrics), f"open {out / REPORT} in a browser"),
    )


def _candidates(sweep: Path | None, recipe: str | None, settings: Settings) -> "dict[str, Recipe]":
    from eosin.mil._recipe import require_methods
    from eosin.mil._sweep import Sweep
    from eosin.options import read_yaml

    if sweep is None:
        return {}
    if recipe is not None or settings.data.get("recipe"):
        raise ConfigError("--sweep brings its own recipes; remove --recipe and the option group recipe")
    candidates = Sweep.parse(read_yaml(sweep), source=str(sweep)).candidates()
    for candidate in candidates.values():
        require_methods(candidate)
    return candidates


def _train(
    recipe: "Recipe", study: "Study", parts: "Sequence[FoldSplits]", out: Path, *, device: str, precision: str
) -> Mapping[str, Any]:
    from eosin.mil._study import crossval_study

    with progress("cross-validate", len(parts)) as advance:
        return crossval_study(study, recipe, out, splits=parts, device=device, precision=precision, progress=advance)


def _sweep(
    candidates: "dict[str, Recipe]",
    study: "Study",
    parts: "Sequence[FoldSplits]",
    out: Path,
    *,
    device: str,
    precision: str,
) -> Mapping[str, Any]:
    from eosin.mil._study import train_elsewhere
    from eosin.mil._sweep import run_sweep

    folders = {f"candidate_{number}": recipe for number, recipe in enumerate(candidates.values())}
    train_elsewhere(study, folders, parts, out, device=device, precision=precision)

    with progress("sweep", len(candidates) * len(parts)) as advance:
        return run_sweep(
            candidates,
            study.task,
            study.examples,
            parts,
            cohort=study.cohort,
            out=out,
            device=device,
            precision=precision,
            progress=None if advance is None else lambda _name, fold: advance(fold),
        )

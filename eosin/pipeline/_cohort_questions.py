"""The same counterfactual questions to every slide of a cohort: tables, one report, and what holds over patients."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eosin import __version__
from eosin._batch import run_stage
from eosin._records import Record, Report
from eosin.errors import ConfigError
from eosin.heatmaps._cohort import CohortEffect, Interval, holm, mean_change, summarise_cohort
from eosin.heatmaps._counterfactual import Effect, Origin
from eosin.heatmaps._examination import Questions
from eosin.heatmaps._subject import require_classes
from eosin.heatmaps.export._png import DPI, render
from eosin.heatmaps.export._table import write_frame
from eosin.mil._checkpoint import ModelCard
from eosin.mil._seen import Sight, donor_notes, donor_parts, seen_notes, worst
from eosin.mil._tables import LabelTable
from eosin.mil.slots import Aggregator
from eosin.pipeline._cohort_answers import Answers, AskInMemory, AskStage, Question
from eosin.pipeline._question import DonorFile, open_donor, require_formats
from eosin.report._page import Picture, ReportData, SlideCard, write_report
from eosin.wsi._slide_file import SlideFile

logger = logging.getLogger(__name__)

FEWEST_SLIDES = 2
TESTS = ("p", "p_over_random", "p_turned", "p_shuffled")
COHORT_FORMATS = ("csv", "parquet", "html")
LARGEST_CAPTION = 60


@dataclass(frozen=True, eq=False)
class Cohort:
    """What a cohort is made of.

    Parameters
    ----------
    features : mapping of str to Path
        Feature file of each slide.
    labels : LabelTable, optional
        Patients, and the truth in the column of the model's target. Without it every slide is its own patient, and
        there is no sensitivity.
    slides : mapping of str to SlideFile
        The slides themselves where they are available, for pictures, scanned boxes and the check of the fingerprint.
    annotations : mapping of str to Path
        GeoJSON of the slides that have one.
    """

    features: Mapping[str, Path]
    labels: LabelTable | None = None
    slides: Mapping[str, SlideFile] = field(default_factory=dict)
    annotations: Mapping[str, Path] = field(default_factory=dict)


def question_cohort(
    model: Path | tuple[Aggregator, ModelCard],
    cohort: Cohort,
    out_dir: Path,
    *,
    class_name: str,
    region_classes: Sequence[str] = (),
    donors: Sequence[DonorFile] = (),
    questions: Questions = Questions(),  # noqa: B008 - frozen
    formats: Sequence[str] = ("csv", "html"),
    progress: Callable[[Record], None] | None = None,
) -> tuple[list[Path], Report]:
    """Ask every slide of a cohort about one class and summarise what each intervention does.

    Parameters
    ----------
    model : Path or (Aggregator, ModelCard)
        A model folder, or a cross-validation, of which each slide is asked of the folds that have not seen its patient.
    cohort : Cohort
    out_dir : Path
        Gets ``interventions.<csv, parquet>`` (a row per slide and intervention), ``cohort.<csv, parquet>`` (a row per
        intervention, with how many slides the model has seen; where it has seen some, a second row over the others
        alone, ``slides`` = unseen), ``report.html``, and ``slides/<slide id>_counterfactual.<format>`` for the other
        formats.
    class_name : str
        The class that all slides are asked about.
    region_classes, donors, questions
        As `eosin.pipeline._question.question_slide`.
    formats : sequence of str
        Among `eosin.pipeline._question.FORMATS`.
    progress : callable, optional
        Called with the record of each slide.

    Returns
    -------
    paths : list of Path
        Of the cohort's own files.
    report : Report
        One record per slide; a slide that cannot be asked is a failed record.

    Raises
    ------
    ConfigError
        If a format or the class is unknown, or fewer than two slides could be asked.
    """
    require_formats(formats, has_slide=bool(cohort.slides))
    of_slides = tuple(name for name in formats if name not in COHORT_FORMATS)
    patients = {} if cohort.labels is None else cohort.labels.patient_of()
    fields = (class_name, patients, tuple(region_classes), tuple(donors), questions, of_slides)
    stage = AskInMemory(Path(), *fields, model) if isinstance(model, tuple) else AskStage(Path(model), *fields)
    card = stage.first_card()
    _require_class(card, class_name)
    for donor in donors:
        open_donor(donor, card, region_classes)  # refuses one that does not fit, before the first slide
    items = [
        Question(name, path, Path(out_dir) / "slides", cohort.slides.get(name), cohort.annotations.get(name))
        for name, path in cohort.features.items()
    ]
    report = run_stage(stage, items, run_json=Path(out_dir) / "run.json", progress=progress)
    made = {record.slide_id for record in report.records if record.status in ("ok", "skipped")}
    found = {item.slide_id: item.read() for item in items if item.slide_id in made}
    asked = {name: answers for name, answers in found.items() if answers is not None}
    if len(asked) < FEWEST_SLIDES:
        reasons = "; ".join(f"{record.slide_id}: {record.message}" for record in report.failed[:3])
        raise ConfigError(
            f"{len(asked)} of {len(cohort.features)} slides could be examined ({reasons}); a cohort needs more"
        )
    for note in _notes_on_seen(asked):
        logger.warning("%s", note)
    summary = _summaries(asked, cohort, card, class_name)
    unseen = {name: answers for name, answers in asked.items() if answers.sight.is_new}
    fewer = FEWEST_SLIDES <= len(unseen) < len(asked)
    alone = _summaries(unseen, cohort, card, class_name) if fewer else []
    return _write_cohort(
        out_dir, asked, summary, alone, card=card, class_name=class_name, formats=formats, report=report
    ), report


def _require_class(card: ModelCard, class_name: str) -> None:
    classes = require_classes(card)
    if class_name not in classes:
        raise ConfigError(f"the model has no class {class_name!r}; it has {', '.join(classes)}")


def _donors(asked: Mapping[str, Answers]) -> dict[str, Sight]:
    """Return the worst that any of the models that answered has seen of each donor."""
    names = dict.fromkeys(name for answers in asked.values() for name in answers.donors)
    return {name: worst(answers.donors.get(name, Sight()) for answers in asked.values()) for name in names}


def _notes_on_seen(asked: Mapping[str, Answers]) -> list[str]:
    return [*seen_notes({name: answers.sight for name, answers in asked.items()}), *donor_notes(_donors(asked))]


def _summaries(asked: Mapping[str, Answers], cohort: Cohort, card: ModelCard, class_name: str) -> list[CohortEffect]:
    """Return the summary of each intervention that at least two slides share."""
    kinds: dict[tuple[str, Origin, str], list[tuple[str, Effect]]] = {}
    for slide_id, answers in asked.items():
        for effect in answers.effects:
            kinds.setdefault((effect.kind, effect.origin, effect.what), []).append((slide_id, effect))
    return [
        replace(
            summarise_cohort(
                [effect for _, effect in members],
                *_truth_and_patients([name for name, _ in members], cohort, card, class_name),
                shuffled=_of_shuffled((kind, what), asked, cohort, card, class_name),
            ),
            n_seen=sum(asked[name].sight.part in ("trained", "validated") for name, _ in members),
            n_unknown=sum(asked[name].sight.part == "unknown" for name, _ in members),
        )
        for (kind, _, what), members in kinds.items()
        if len(members) >= FEWEST_SLIDES
    ]


def _of_shuffled(
    key: tuple[str, str], asked: Mapping[str, Answers], cohort: Cohort, card: ModelCard, class_name: str
) -> list[float]:
    """Return the mean change of one intervention in each model with shuffled weights."""
    changes = []
    for number in range(min(len(answers.shuffled) for answers in asked.values())):
        models = {name: answers.shuffled[number] for name, answers in asked.items()}
        found = {
            name: effect
            for name, effects in models.items()
            for effect in effects
            if (str(effect.kind), effect.what) == key
        }
        _, patients = _truth_and_patients(list(found), cohort, card, class_name)
        changes.append(mean_change(list(found.values()), patients))
    return changes


def _truth_and_patients(
    slide_ids: Sequence[str], cohort: Cohort, card: ModelCard, class_name: str
) -> tuple[list[bool] | None, list[str]]:
    if cohort.labels is None:
        return None, list(slide_ids)
    rows = cohort.labels.rows(slide_ids)
    column = card.load_task().columns[0]
    patients = [row["patient_id"] for row in rows]
    return ([row[column] == class_name for row in rows] if column in cohort.labels.values else None), patients


def cohort_table(summary: Sequence[CohortEffect]) -> pd.DataFrame:
    """Return one row per intervention; intervals and pairs in two columns each, p values also adjusted (Holm)."""
    rows = []
    for effect in summary:
        row: dict[str, object] = {}
        for name, value in asdict(effect).items():
            if name in ("sensitivity", "specificity"):
                row |= {f"{name}_before": value[0], f"{name}_after": value[1]}
            elif isinstance(value, tuple):
                row |= {f"{name}_low": value[0], f"{name}_high": value[1]}
            else:
                row[name] = value
        rows.append(row)
    frame = pd.DataFrame(rows)
    for test in TESTS:
        frame[f"{test}_adjusted"] = pd.Series(_adjusted(summary, test), dtype=float)
    return frame


def _adjusted(summary: Sequence[CohortEffect], test: str) -> list[float | None]:
    return holm([getattr(effect, test) for effect in summary])


def draw_cohort(summary: Sequence[CohortEffect], class_name: str) -> Picture:
    """Return the figure of mean changes with their intervals, and those over random tiles beside them."""
    figure = Figure(figsize=(8.2, 1.1 + 0.34 * len(summary)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(summary))[::-1]
    for shift, colour, label, ends in (
        (0.12, "#b35806", "change", [(effect.change, effect.interval) for effect in summary]),
        (-0.12, "0.45", "beyond random tiles", [(e.change_over_random, e.interval_over_random) for e in summary]),
    ):
        known = [
            (place + shift, mean, interval)
            for place, (mean, interval) in zip(places.tolist(), ends, strict=True)
            if mean is not None and interval is not None
        ]
        heights = [height for height, _, _ in known]
        axes.hlines(heights, [low for _, _, (low, _) in known], [high for _, _, (_, high) in known], colour)
        axes.plot([mean for _, mean, _ in known], heights, "o", color=colour, label=label, ms=4)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_yticks(places, [f"{effect.kind} {effect.what}"[:LARGEST_CAPTION] for effect in summary])
    axes.set_xlabel(f"mean change of the log-odds of {class_name}, 95 % interval over patients")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return Picture(render(figure), "Mean effect of each intervention over the cohort")


def cohort_sentences(summary: Sequence[CohortEffect], class_name: str) -> list[str]:
    """Return what each removal does over the cohort, for a pathologist."""
    return [_in_words(effect, class_name) for effect in summary if effect.kind != "keep only"]


def _in_words(effect: CohortEffect, class_name: str) -> str:
    how = "Without" if effect.kind == "remove" else "With"
    low, high = effect.interval
    sentence = (
        f"{how} the {effect.what} the log-odds of {class_name} change by {effect.change:+.2f} ({low:+.2f} to "
        f"{high:+.2f}, {effect.n_patients} patients{_chance(effect)}{_seen(effect)})"
    )
    if effect.change_over_random is not None and effect.interval_over_random is not None:
        low, high = effect.interval_over_random
        sentence += f", {effect.change_over_random:+.2f} ({low:+.2f} to {high:+.2f}) beyond random tiles"
    rates = [
        f"{name} {before:.2f} → {after:.2f}"
        for name, (before, after) in (("sensitivity", effect.sensitivity), ("specificity", effect.specificity))
        if not np.isnan(before)
    ]
    return f"{sentence}{'; ' if rates else ''}{', '.join(rates)}{_seen(effect) if rates else ''}."


def _seen(effect: CohortEffect) -> str:
    return f"; {effect.seen_words}" if effect.seen_words else ""


def _chance(effect: CohortEffect) -> str:
    if effect.p is not None:
        return f", p = {effect.p:.2g}"
    return "" if effect.p_shuffled is None else f", p = {effect.p_shuffled:.2g} compared with shuffled weights"


def _write_cohort(
    out_dir: Path,
    asked: Mapping[str, Answers],
    summary: Sequence[CohortEffect],
    unseen: Sequence[CohortEffect],
    *,
    card: ModelCard,
    class_name: str,
    formats: Sequence[str],
    report: Report,
) -> list[Path]:
    every = pd.concat([answers.table(name, class_name) for name, answers in asked.items()], ignore_index=True)
    paths = []
    for name in (name for name in formats if name in ("csv", "parquet")):
        tables = [cohort_table(summary).assign(slides="all")]
        tables += [cohort_table(unseen).assign(slides="unseen")] if unseen else []
        donors = _donors(asked)
        if donors:
            tables = [table.assign(donor_seen=donor_parts(table["what"], donors)) for table in tables]
        for stem, frame in (("interventions", every), ("cohort", pd.concat(tables, ignore_index=True))):
            paths.append(out_dir / f"{stem}.{name}")
            write_frame(paths[-1], frame)
    if "html" in formats:
        paths.append(out_dir / "report.html")
        write_report(paths[-1], _cohort_report(asked, summary, unseen, card, class_name=class_name, report=report))
    return paths


def _cohort_report(
    asked: Mapping[str, Answers],
    summary: Sequence[CohortEffect],
    unseen: Sequence[CohortEffect],
    card: ModelCard,
    *,
    class_name: str,
    report: Report,
) -> ReportData:
    together = SlideCard(
        "All slides",
        {"slides": str(len(asked))},
        (draw_cohort(summary, class_name),),
        tuple(cohort_sentences(summary, class_name)),
    )
    cards = [SlideCard(name, answers.prediction, (), tuple(answers.sentences)) for name, answers in asked.items()]
    left_out = [record for record in report.records if record.slide_id not in asked]
    return ReportData(
        title=f"What {class_name} rests on",
        summary=" ".join(
            (
                f"{len(asked)} slides were asked what they would be called without, or with only, some of their tiles.",
                *(f"Caution: {note}." for note in _notes_on_seen(asked)),
            )
        ),
        slides=(together, *cards),
        tables={f"Interventions on {class_name}": printed_cohort(summary)}
        | ({f"Interventions on {class_name}, slides new to the model alone": printed_cohort(unseen)} if unseen else {}),
        notes=(
            "Effects are those of this model; they say what it uses, not what causes the disease. Intervals are of "
            "95 % over patients, those of sensitivity and specificity of their change. p values in the table are "
            "adjusted for the number of interventions (Holm); those in the sentences are not. Tiles that the model "
            "chose itself have no p value against no change, because removing them changes any model, also one with "
            "random weights; they are compared with models whose weights are shuffled (`questions.shuffles`). The "
            "last column tests the predictions that turn, by patient (McNemar).",
            *(f"Left out, {record.slide_id}: {record.message}." for record in left_out),
        ),
        provenance={
            "eosin": __version__,
            "model": card.model_id,
            "aggregator": card.recipe.aggregator.name,
            "encoder": card.features.encoder,
        },
    )


def printed_cohort(summary: Sequence[CohortEffect]) -> pd.DataFrame:
    """Return the cohort's table as it is printed."""
    adjusted = {test: _adjusted(summary, test) for test in TESTS}
    rows = [
        {
            "Intervention": f"{effect.kind} {effect.what}",
            "Slides": f"{effect.n_slides}{f' ({effect.seen_words})' * bool(effect.seen_words)}",
            "Change of log-odds": f"{effect.change:+.2f} {_printed(effect.interval)}",
            "Beyond random tiles": "–"
            if effect.change_over_random is None or effect.interval_over_random is None
            else f"{effect.change_over_random:+.2f} {_printed(effect.interval_over_random)}",
            "Effect size": "–" if np.isnan(effect.effect_size) else f"{effect.effect_size:+.2f}",
            "p": _printed_p(adjusted["p"][place]),
            "p, shuffled weights": _printed_p(adjusted["p_shuffled"][place]),
            "Sensitivity": _printed_rate(effect.sensitivity, effect.sensitivity_change),
            "Specificity": _printed_rate(effect.specificity, effect.specificity_change),
            "p of turned": _printed_p(adjusted["p_turned"][place]),
        }
        for place, effect in enumerate(summary)
    ]
    return pd.DataFrame(rows)


def _printed_p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _printed(interval: Interval) -> str:
    return f"({interval[0]:+.2f} to {interval[1]:+.2f})"


def _printed_rate(rate: Interval, change: Interval) -> str:
    return "–" if np.isnan(rate[0]) else f"{rate[0]:.2f} → {rate[1]:.2f} {_printed(change)}"

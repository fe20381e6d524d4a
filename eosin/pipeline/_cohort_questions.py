"""The same counterfactual questions to every slide of a cohort: tables, one report, and what holds over patients."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eosin import __version__
from eosin._batch import Outcome, run_batch
from eosin._records import Record, Report
from eosin.errors import ConfigError
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._cohort import CohortEffect, Interval, holm, mean_change, summarise_cohort
from eosin.heatmaps._counterfactual import Effect, Origin
from eosin.heatmaps._examination import SHUFFLES, Donor, Questions, examine, see_donor
from eosin.heatmaps._findings import Counterfactuals
from eosin.heatmaps._subject import class_choices, look, predict_bag, require_same_slide
from eosin.heatmaps.export._png import DPI, render
from eosin.heatmaps.export._table import write_frame
from eosin.mil._checkpoint import ModelCard
from eosin.mil._jury import Asked, Jury
from eosin.mil._seen import Sight, seen_notes
from eosin.mil._shuffled import shuffle_weights
from eosin.mil._tables import LabelTable
from eosin.mil.slots import Aggregator
from eosin.pipeline._question import (
    DonorFile,
    open_donor,
    open_optional,
    read_sets,
    require_formats,
    seen_table,
    tissue_shares,
    write_findings,
)
from eosin.report._page import Picture, ReportData, SlideCard, write_report
from eosin.wsi._slide_file import SlideFile

logger = logging.getLogger(__name__)

STAGE = "counterfactual"
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


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a slide left behind: its prediction and effects, without the arrays of its tiles."""

    prediction: Mapping[str, str]
    effects: list[Effect]
    table: pd.DataFrame
    sentences: list[str]
    shuffled: list[dict[tuple[str, str], Effect]]
    sight: Sight


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
    ask, card = _asking(model, cohort)
    require_formats(formats, has_slide=bool(cohort.slides))
    _require_class(card, class_name)
    given = [open_donor(donor, card, region_classes) for donor in donors]
    of_slides = [name for name in formats if name not in COHORT_FORMATS]
    work = _Work(ask, cohort, out_dir / "slides", class_name, region_classes, given, questions, of_slides)
    report = run_batch(list(cohort.features), work, key=str, stage=STAGE, progress=progress)
    if len(work.asked) < FEWEST_SLIDES:
        reasons = "; ".join(f"{record.slide_id}: {record.message}" for record in report.failed[:3])
        raise ConfigError(
            f"{len(work.asked)} of {len(cohort.features)} slides could be examined ({reasons}); a cohort needs more"
        )
    for note in seen_notes({name: answers.sight for name, answers in work.asked.items()}):
        logger.warning("%s", note)
    summary = _summaries(work.asked, cohort, card, class_name)
    unseen = {name: answers for name, answers in work.asked.items() if answers.sight.is_new}
    fewer = FEWEST_SLIDES <= len(unseen) < len(work.asked)
    alone = _summaries(unseen, cohort, card, class_name) if fewer else []
    return _write_cohort(
        out_dir, work.asked, summary, alone, card=card, class_name=class_name, formats=formats, report=report
    ), report


def _asking(model: Path | tuple[Aggregator, ModelCard], cohort: Cohort) -> tuple[Callable[[str], Asked], ModelCard]:
    """Return who answers for each slide, and a card for what all models have in common."""
    if isinstance(model, tuple):
        return lambda _slide: Asked(*model), model[1]
    jury = Jury.open([model], device="cpu")
    if cohort.labels is not None:
        jury = replace(jury, patient_of=cohort.labels.patient_of())
    return jury.ask, jury.ensemble.cards[0]


def _require_class(card: ModelCard, class_name: str) -> None:
    classes = class_choices(card)
    if class_name not in classes:
        raise ConfigError(f"the model has no class {class_name!r}; it has {', '.join(classes) or 'none'}")


@dataclass(frozen=True, eq=False)
class _Work:
    """The work on one slide, for `run_batch`."""

    ask: Callable[[str], Asked]
    cohort: Cohort
    folder: Path
    class_name: str
    region_classes: Sequence[str]
    donors: Sequence[Donor]
    questions: Questions
    formats: Sequence[str]
    asked: dict[str, _Asked] = field(default_factory=dict)
    seen_donors: dict[Aggregator, list[Donor]] = field(default_factory=dict)

    def __call__(self, slide_id: str) -> Outcome:
        asked = self.ask(slide_id)
        aggregator, card = asked.model, asked.card
        bag = read_bag(self.cohort.features[slide_id])
        card.features.require_match(bag.spec, self.cohort.features[slide_id])
        if bag.n_instances < 2:
            return Outcome("empty", f"{bag.n_instances} tiles, too few to remove some")
        annotation = self.cohort.annotations.get(slide_id)
        with open_optional(self.cohort.slides.get(slide_id)) as slide:
            if slide is not None:
                require_same_slide(slide, bag)
            bounds = None if slide is None else slide.bounds_px0
            regions = {} if annotation is None else read_sets(annotation, bag, bounds, self.region_classes)
            found = examine(
                aggregator,
                card,
                bag,
                class_name=self.class_name,
                regions=regions,
                donors=[donor for donor in self._donors_of(asked) if donor.bag.slide_id != slide_id],
                questions=self.questions,
                tissue=tissue_shares(slide, bag, self.questions),
            )
            formats = [name for name in self.formats if name != "png" or slide is not None]
            write_findings(found, bag, slide, asked, self.folder, formats=formats)
            quick = self.questions.model_copy(update={"controls": 0, "matched": "number"})
            others = [
                examine(model, card, bag, class_name=self.class_name, regions=regions, donors=given, questions=quick)
                for model, given in self._shuffled(slide_id, aggregator, bag)
            ]
        self.asked[slide_id] = _remembered(found, asked, predict_bag(aggregator, card, bag), others)
        return Outcome()

    def _donors_of(self, asked: Asked) -> list[Donor]:
        """Return the donors as the model sees them, which takes one look for each model."""
        if asked.model not in self.seen_donors:
            self.seen_donors[asked.model] = [see_donor(asked.model, asked.card, donor) for donor in self.donors]
        return self.seen_donors[asked.model]

    def _shuffled(self, slide_id: str, model: Aggregator, bag: FeatureBag) -> Iterator[tuple[Aggregator, list[Donor]]]:
        """Yield models with shuffled weights, and the donors that they have not seen."""
        donors = [donor for donor in self.donors if donor.bag.slide_id != slide_id]
        wanted = self.questions.shuffles
        if wanted is None:
            # every copy that must be run again costs as much as the model itself
            wanted = 0 if look(model, bag).subsets.price else SHUFFLES
        for seed in range(wanted):
            yield shuffle_weights(model, seed), donors


def _remembered(
    found: Counterfactuals, asked: Asked, prediction: Mapping[str, str], others: Sequence[Counterfactuals]
) -> _Asked:
    shuffled = [{(str(effect.kind), effect.what): effect for effect in other.effects} for other in others]
    sentences = [*asked.notes, *found.sentences()]
    return _Asked(prediction, found.effects, seen_table(found, asked), sentences, shuffled, asked.sight)


def _summaries(asked: Mapping[str, _Asked], cohort: Cohort, card: ModelCard, class_name: str) -> list[CohortEffect]:
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
    key: tuple[str, str], asked: Mapping[str, _Asked], cohort: Cohort, card: ModelCard, class_name: str
) -> list[float]:
    """Return the mean change of one intervention in each model with shuffled weights."""
    changes = []
    for number in range(min(len(answers.shuffled) for answers in asked.values())):
        models = {name: answers.shuffled[number] for name, answers in asked.items()}
        found = {name: effects[key] for name, effects in models.items() if key in effects}
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
    asked: Mapping[str, _Asked],
    summary: Sequence[CohortEffect],
    unseen: Sequence[CohortEffect],
    *,
    card: ModelCard,
    class_name: str,
    formats: Sequence[str],
    report: Report,
) -> list[Path]:
    every = pd.concat([answers.table for answers in asked.values()], ignore_index=True)
    paths = []
    for name in (name for name in formats if name in ("csv", "parquet")):
        tables = [cohort_table(summary).assign(slides="all")]
        tables += [cohort_table(unseen).assign(slides="unseen")] if unseen else []
        for stem, frame in (("interventions", every), ("cohort", pd.concat(tables, ignore_index=True))):
            paths.append(out_dir / f"{stem}.{name}")
            write_frame(paths[-1], frame)
    if "html" in formats:
        paths.append(out_dir / "report.html")
        write_report(paths[-1], _cohort_report(asked, summary, unseen, card, class_name=class_name, report=report))
    return paths


def _cohort_report(
    asked: Mapping[str, _Asked],
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
                *(f"Caution: {note}." for note in seen_notes({name: answers.sight for name, answers in asked.items()})),
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

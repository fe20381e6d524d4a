"""The counterfactual examination of one slide: all interventions, their controls, and what they mean in words."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import expit

from eosin import __version__
from eosin.errors import ConfigError, UnknownNameError
from eosin.features.bag import FeatureBag
from eosin.heatmaps.annotations import read_regions, tiles_inside
from eosin.heatmaps.attribution import require_grid
from eosin.heatmaps.counterfactual import (
    AGREEMENT_TILES,
    Effect,
    Indices,
    Kind,
    SmallestSet,
    ablate_top,
    as_probability,
    certify,
    describe_method,
    effect_map,
    effects_table,
    in_words,
    intervene,
    is_linear,
    smallest_necessary,
    tile_effects,
    top_tiles,
)
from eosin.heatmaps.explain import class_choices, predict_bag, prediction_in_words, require_same_slide
from eosin.heatmaps.export.geojson import write_geojson
from eosin.heatmaps.export.png import DPI, render, take_view, write_png
from eosin.heatmaps.export.table import write_frame
from eosin.heatmaps.heatmap import Heatmap, Window
from eosin.heatmaps.pooled import Floats, PooledBag, Search, Target
from eosin.heatmaps.report import Picture, ReportData, SlideCard, slide_pictures, write_report
from eosin.heatmaps.subsets import Look, Subsets, look
from eosin.mil.checkpoint import ModelCard, load_model
from eosin.mil.slots import Aggregator
from eosin.options import Options
from eosin.wsi.slide import Slide, SlideFile, open_slide

FORMATS = ("csv", "geojson", "png", "html")
CURVE_SHARES = (0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
CURVE_DRAWS = 10


class Questions(Options):
    """What is asked about a slide.

    Parameters
    ----------
    fractions : tuple of float
        Shares of the most attended tiles that are removed, and kept alone.
    rounds : int
        Of the greedy search.
    controls : int
        Random sets per intervention.
    seed : int
        Of the random sets.
    """

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    rounds: int = 100
    controls: int = 50
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """What came out.

    Parameters
    ----------
    slide_id : str
    class_name : str
        The class that all numbers are about.
    output : int
        Its index among the logits of the search.
    method : str
        How the numbers were made, in a sentence.
    effects : list of Effect
    tile_effects : (n,) float64
        What each tile adds to the log-odds of the class.
    agreement : float
        See `eosin.heatmaps.counterfactual.tile_effects`.
    search : Search
        Greedy removal of the tiles that carry the class.
    smallest : SmallestSet or None
        Fewest tiles whose removal turns the prediction.
    enough_alone : int or None
        Tiles that the model would call the class each by itself: with softmax pooling, one such tile is the smallest
        sufficient set. None for models that have to be run again.
    certificate : (float, float) or None
        Log-odds after the search, and after the best set of the same size.
    curves : DataFrame
        Columns ``order`` (most attended first, greedy, random), ``share``, ``probability``, ``low``, ``high``.
    ranking : (n,) float64
        What "most attended" tiles are chosen by: attention, or the effects where a model has none.
    ranking_name : str
        "most attended" or "most effective".
    """

    slide_id: str
    class_name: str
    output: int
    method: str
    effects: list[Effect]
    tile_effects: Floats
    agreement: float
    search: Search
    smallest: SmallestSet | None
    enough_alone: int | None
    certificate: tuple[float, float] | None
    curves: pd.DataFrame
    ranking: Floats
    ranking_name: str

    @property
    def n_tiles(self) -> int:
        """Number of tiles of the slide."""
        return len(self.tile_effects)

    def table(self) -> pd.DataFrame:
        """Return one row per intervention."""
        return effects_table(self.effects, {"slide": self.slide_id, "class": self.class_name})

    def sentences(self) -> list[str]:
        """Return what came out as sentences for a pathologist."""
        first_kept = next((effect for effect in self.effects if effect.kind == "keep only"), None)
        told = [e for e in self.effects if e.kind == "remove" or e is first_kept or self.ranking_name not in e.what]
        sentences = [in_words(effect, self.class_name) for effect in told if effect.n_tiles]
        sentences.append(self._search_in_words())
        if self.effects[0].before > 0:
            sentences.append(self._smallest_in_words())
        if self.enough_alone is not None:
            alone = self._share_of_tiles(self.enough_alone)
            sentences.append(f"Each by itself, {alone} would be called {self.class_name}.")
        if self.agreement < 1:
            sentences.append(
                "The map of single tiles is a first-order guess; its rank correlation with the exact effects of "
                f"{AGREEMENT_TILES} random tiles is {self.agreement:.2f}."
            )
        return [*sentences, self.method]

    def _share_of_tiles(self, count: int) -> str:
        return f"{count} {'tile' if count == 1 else 'tiles'} ({100 * count / self.n_tiles:.2g} %)"

    def _search_in_words(self) -> str:
        rounds = len(self.search.order)
        before, after = (as_probability(value) for value in self._search_ends())
        top = set(np.argsort(-self.ranking, kind="stable")[:rounds].tolist())
        shared = len(top & set(self.search.order.tolist()))
        sentence = (
            f"Taking out, one by one, the {rounds} tiles that carry {self.class_name} most: {before} → {after}; "
            f"{shared} of them are among the {rounds} {self.ranking_name}"
        )
        if self.certificate is None:
            return f"{sentence}."
        best = as_probability(float(expit(self.certificate[1])))
        return f"{sentence}; no other {rounds} tiles would bring it below {best}."

    def _search_ends(self) -> tuple[float, float]:
        target = Target(self.output, "probability")
        return float(target.of(self.search.logits[0])), float(target.of(self.search.logits[-1]))

    def _smallest_in_words(self) -> str:
        if self.smallest is None:
            return f"No set of tiles that was tried turns the prediction away from {self.class_name}."
        count = len(self.smallest.tiles)
        how = "at least" if self.smallest.is_certain else "in the order of the search,"
        return f"To turn the prediction away from {self.class_name}, {how} {self._share_of_tiles(count)} must go."


def question(
    model: Aggregator,
    card: ModelCard,
    bag: FeatureBag,
    *,
    class_name: str | None = None,
    regions: Mapping[str, Indices] | None = None,
    questions: Questions = Questions(),  # noqa: B008 - frozen
) -> Counterfactuals:
    """Ask everything about one slide.

    Parameters
    ----------
    model : Aggregator
    card : ModelCard
    bag : FeatureBag
        With at least two tiles.
    class_name : str, optional
        The class to ask about; the predicted one unless given.
    regions : mapping of str to (k,) int64, optional
        Sets of tiles by name, for example those inside an annotation: each is removed and kept alone.
    questions : Questions

    Raises
    ------
    ConfigError
        If the task has no classes, the class is unknown or the bag has fewer than two tiles.
    """
    classes = class_choices(card)
    if not classes:
        raise ConfigError(f"counterfactuals are about classes; the task {card.load_task().kind} of this model has none")
    if bag.n_instances < 2:
        raise ConfigError(f"{bag.slide_id}: counterfactuals need at least two tiles, found {bag.n_instances}")
    seen = look(model, bag, single_logit_is_second_class=model.n_outputs < len(classes))
    chosen = classes[int(np.argmax(seen.subsets.logits()))] if class_name is None else class_name
    if chosen not in classes:
        raise UnknownNameError("class of the model", chosen, classes)
    return _ask(seen, Target(classes.index(chosen)), bag.slide_id, chosen, dict(regions or {}), questions)


def _ask(
    seen: Look, target: Target, slide_id: str, class_name: str, regions: dict[str, Indices], questions: Questions
) -> Counterfactuals:
    subsets = seen.subsets
    contribution, agreement = tile_effects(subsets, target)
    ranking, name = _ranking(seen, contribution)
    effects = ablate_top(
        subsets,
        target,
        ranking,
        name=name,
        fractions=questions.fractions,
        controls=questions.controls,
        seed=questions.seed,
    )
    kinds: tuple[Kind, Kind] = ("remove", "keep only")
    effects += [
        intervene(subsets, target, index, kind=kind, what=what, controls=questions.controls, seed=questions.seed)
        for what, index in regions.items()
        for kind in kinds
    ]
    search = subsets.greedy(target, "min", min(questions.rounds, subsets.n_instances - 1))
    smallest = smallest_necessary(subsets, target, search) if float(target.of(subsets.logits())) > 0 else None
    return Counterfactuals(
        slide_id=slide_id,
        class_name=class_name,
        output=target.output,
        method=describe_method(seen, search),
        effects=effects,
        tile_effects=contribution,
        agreement=agreement,
        search=search,
        smallest=smallest,
        enough_alone=_enough_alone(subsets, target),
        certificate=_certificate(subsets, target, search),
        curves=_curves(subsets, target, ranking, name, search, questions),
        ranking=ranking,
        ranking_name=name,
    )


def _enough_alone(subsets: Subsets, target: Target) -> int | None:
    if not isinstance(subsets, PooledBag):
        return None
    return int((Target(target.output).of(subsets.only_one()) > 0).sum())


def _certificate(subsets: Subsets, target: Target, search: Search) -> tuple[float, float] | None:
    if isinstance(subsets, PooledBag) and is_linear(subsets, target):
        return certify(subsets, target, search)
    return None


def _ranking(seen: Look, contribution: Floats) -> tuple[Floats, str]:
    return (contribution, "most effective") if seen.attention is None else (seen.attention, "most attended")


def _curves(
    subsets: Subsets, target: Target, ranking: Floats, name: str, search: Search, questions: Questions
) -> pd.DataFrame:
    n = subsets.n_instances
    rows = []
    for share in CURVE_SHARES:
        value = _probability(target, subsets.remove(top_tiles(ranking, share)))
        rows.append((name, share, value, value, value))
    for rounds in sorted({round(share * n) for share in CURVE_SHARES if share * n <= len(search.order)}):
        value = _probability(target, search.logits[rounds])
        rows.append(("greedy", rounds / n, value, value, value))
    rng = np.random.default_rng(questions.seed)
    draws = [rng.random(n) for _ in range(CURVE_DRAWS)]
    for share in CURVE_SHARES:
        values = [_probability(target, subsets.remove(top_tiles(draw, share))) for draw in draws]
        rows.append(("random", share, float(np.mean(values)), min(values), max(values)))
    return pd.DataFrame(rows, columns=["order", "share", "probability", "low", "high"])


def _probability(target: Target, logits: Floats) -> float:
    return float(Target(target.output, "probability").of(logits))


def draw_curves(found: Counterfactuals) -> Picture:
    """Return the figure of the probability against the share of tiles that was removed, by order of removal."""
    figure = Figure(figsize=(5.4, 3.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {"greedy": ("#b35806", "-"), "random": ("0.45", "--")}
    for name, curve in found.curves.groupby("order", sort=False):
        colour, line = styles.get(str(name), ("#440154", "-"))
        label = {"greedy": "largest effect first", "random": "random tiles"}.get(str(name), f"{name} first")
        axes.plot(100 * curve.share, curve.probability, color=colour, linestyle=line, label=label)
        if name == "random":
            axes.fill_between(100 * curve.share, curve.low, curve.high, color="0.85", linewidth=0)
    axes.set(xlabel="tiles removed (%)", ylabel=f"probability of {found.class_name}", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return Picture(
        render(figure), f"Probability of {found.class_name} as tiles are removed; grey: range of {CURVE_DRAWS} draws"
    )


def counterfactual_maps(found: Counterfactuals, bag: FeatureBag) -> list[Heatmap]:
    """Return the effect of each tile, the percentile of its attention and the round in which the search removed it."""
    grid = require_grid(bag)
    rounds = np.zeros(grid.n_tiles)
    rounds[found.search.order] = np.arange(1, len(found.search.order) + 1)
    effect = effect_map(found.tile_effects, grid, found.class_name)
    kind = found.ranking_name.replace(" ", "_")
    ranking = Heatmap(found.ranking, grid, kind, found.ranking_name).percentile()
    return [effect, ranking, Heatmap(rounds, grid, "removal_round", "round of removal (0: not removed)")]


def question_slide(
    model: Path | tuple[Aggregator, ModelCard],
    bag: FeatureBag,
    out_dir: Path,
    *,
    slide_file: SlideFile | None = None,
    class_name: str | None = None,
    annotation: Path | None = None,
    region_classes: Sequence[str] = (),
    questions: Questions = Questions(),  # noqa: B008 - frozen
    formats: Sequence[str] = ("csv", "geojson", "html"),
) -> list[Path]:
    """Write the counterfactual examination of one slide.

    Parameters
    ----------
    model : Path or (Aggregator, ModelCard)
    bag : FeatureBag
        Of the kind that the model was trained on.
    out_dir : Path
        Gets ``<slide id>_counterfactual.<format>``.
    slide_file : SlideFile, optional
        Needed for pictures, and for GeoJSON and annotations of slides that state a scanned box.
    class_name : str, optional
        The class to ask about; the predicted one unless given.
    annotation : Path, optional
        GeoJSON of QuPath: its regions are removed and kept alone.
    region_classes : sequence of str
        The classes of regions to ask about, each by itself; all regions together unless given.
    questions : Questions
    formats : sequence of str
        Among `FORMATS`.

    Returns
    -------
    list of Path

    Raises
    ------
    FeatureMismatchError, SlideError, ConfigError
        As `eosin.heatmaps.explain.explain_slide`, `question` and `eosin.heatmaps.annotations.read_regions`.
    """
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError("counterfactual format", name, FORMATS)
    if "png" in formats and slide_file is None:
        raise ConfigError("the picture of a counterfactual needs the slide; pass --slide, or leave png out")
    aggregator, card = load_model(model) if isinstance(model, Path) else model
    card.features.require_match(bag.spec, Path(bag.slide_id))
    with _opened(slide_file) as slide:
        if slide is not None:
            require_same_slide(slide, bag)
        bounds = None if slide is None else slide.bounds_px0
        regions = {} if annotation is None else _read_sets(annotation, bag, bounds, region_classes)
        found = question(aggregator, card, bag, class_name=class_name, regions=regions, questions=questions)
        paths = [out_dir / f"{bag.slide_id}_counterfactual.{name}" for name in formats]
        for path in paths:
            _write(path, found, bag, slide, card, predict_bag(aggregator, card, bag))
    return paths


def _opened(slide_file: SlideFile | None) -> AbstractContextManager[Slide | None]:
    return nullcontext() if slide_file is None else open_slide(slide_file.path, mpp=slide_file.mpp)


def _read_sets(
    annotation: Path, bag: FeatureBag, bounds_px0: Window | None, classes: Sequence[str]
) -> dict[str, Indices]:
    grid = require_grid(bag)
    wanted: list[tuple[str, Sequence[str]]] = [(f"tiles in {name}", [name]) for name in classes]
    sets = {
        what: tiles_inside(grid, read_regions(annotation, bounds_px0=bounds_px0, classes=names))
        for what, names in wanted or [("annotated tiles", ())]
    }
    empty = [what for what, index in sets.items() if not len(index)]
    if empty:
        raise ConfigError(f"{annotation}: there are no {' and no '.join(empty)} of {bag.slide_id}")
    return sets


def _write(
    path: Path,
    found: Counterfactuals,
    bag: FeatureBag,
    slide: Slide | None,
    card: ModelCard,
    prediction: Mapping[str, str],
) -> None:
    bounds = None if slide is None else slide.bounds_px0
    if path.suffix == ".csv":
        write_frame(path, found.table())
    elif path.suffix == ".geojson":
        write_geojson(path, counterfactual_maps(found, bag), slide_id=found.slide_id, bounds_px0=bounds)
    elif path.suffix == ".png" and slide is not None:
        title = f"{found.slide_id}: {prediction_in_words(prediction)}"
        write_png(path, take_view(slide), counterfactual_maps(found, bag)[0], title=title)
    else:
        write_report(path, counterfactual_report(found, bag, slide, card, prediction))


def counterfactual_report(
    found: Counterfactuals, bag: FeatureBag, slide: Slide | None, card: ModelCard, prediction: Mapping[str, str]
) -> ReportData:
    """Return the report of one slide: sentences, curves, map, table of every intervention."""
    pictures = () if slide is None else slide_pictures(slide, counterfactual_maps(found, bag)[0])
    sentences = tuple(found.sentences())
    return ReportData(
        title=f"{found.slide_id}: what if?",
        summary=f"What the prediction of {found.class_name} rests on, asked by taking tiles away.",
        slides=(SlideCard(found.slide_id, prediction, (draw_curves(found), *pictures), sentences),),
        tables={f"Interventions on {found.class_name}": _printed_table(found.effects)},
        notes=(
            "Effects are those of this model on this slide; they say what the model uses, not what causes the disease.",
            f"Every set of tiles is compared with {found.effects[0].n_controls} random sets of as many tiles; p is the "
            "share of sets, itself included, that change the log-odds at least as much in the same direction.",
        ),
        provenance={
            "eosin": __version__,
            "model": card.model_id,
            "aggregator": card.recipe.aggregator.name,
            "encoder": card.features.encoder,
            "tiles": str(found.n_tiles),
        },
    )


def _printed_table(effects: Sequence[Effect]) -> pd.DataFrame:
    rows = [
        {
            "Intervention": f"{effect.kind} {effect.what}",
            "Tiles": effect.n_tiles,
            "Probability": f"{as_probability(effect.probability_before)} → {as_probability(effect.probability_after)}",
            "Log-odds": f"{effect.before:.2f} → {effect.after:.2f}",
            "Random tiles, log-odds": _printed_range(effect),
            "p": "–" if effect.control_rank is None else f"{effect.control_rank:.2g}",
        }
        for effect in effects
    ]
    return pd.DataFrame(rows)


def _printed_range(effect: Effect) -> str:
    if effect.control_mean is None:
        return "–"
    return f"{effect.control_mean:.2f} ({effect.control_low:.2f} to {effect.control_high:.2f})"

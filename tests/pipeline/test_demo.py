import json
from pathlib import Path

import numpy as np
import pytest

from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps._maps import map_slide
from eosin.heatmaps._subject import class_choices
from eosin.mil._checkpoint import load_model
from eosin.mil._metrics import roc_auc
from eosin.pipeline._demo import (
    RANDOM_MODELS,
    TUMOUR_TILE,
    Demo,
    DemoSummary,
    locate_at_random,
    locate_tumour,
    read_outline,
    run_demo,
    tumour_slides,
)
from eosin.pipeline._result import Result
from eosin.pipeline._run import Pipeline, run_pipeline
from eosin.wsi._job import JobFolder
from eosin.wsi._synthetic import Cohort, read_truth

SMALL = Cohort(
    n_slides=8, size_um=(440.0, 500.0), fine_fraction=0.5, pen_fraction=0, min_tumour=0.1, striking=True, seed=4
)


def small_demo() -> Demo:
    demo = Demo()
    training = demo.pipeline.recipe.training.model_copy(update={"epochs": 3})
    recipe = demo.pipeline.recipe.model_copy(update={"training": training})
    pipeline = demo.pipeline.model_copy(update={"recipe": recipe, "folds": 2, "formats": ("geojson",)})
    return Demo(cohort=SMALL, pipeline=pipeline)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> DemoSummary:
    return run_demo(tmp_path_factory.mktemp("demo"), small_demo())


@pytest.fixture(scope="module")
def result(summary: DemoSummary) -> Result:
    cohort = summary.out / "cohort"
    return run_pipeline([cohort / "slides"], cohort / "labels.csv", JobFolder(summary.out), small_demo().pipeline)


@pytest.mark.long
def test_summary_is_in_the_file(summary: DemoSummary) -> None:
    written = json.loads((summary.out / "summary.json").read_text())
    random = summary.random_localisation
    assert written == {
        "slide_auc": summary.slide_auc,
        "localisation_auc": summary.localisation_auc,
        "random_localisation_auc": random.mean,
        "random_localisation_auc_highest": random.highest,
        "random_localisation_p": random.p,
        "n_slides": 8,
        "n_located": 4,
        "seconds": summary.seconds,
    }
    assert 0 <= random.mean <= random.highest <= 1
    assert 1 / (1 + RANDOM_MODELS) <= random.p <= 1


def test_report_stands_alone_and_shows_both_figures(summary: DemoSummary) -> None:
    report = (summary.out / "report.html").read_text(encoding="utf-8")
    assert f"{summary.slide_auc:.3f}" in report
    assert f"{summary.localisation_auc:.3f}" in report
    random = summary.random_localisation
    assert f"weights reach {random.mean:.3f} on average, {random.highest:.3f} at most" in report
    assert "True outline" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report


def test_a_map_that_is_the_truth_locates_perfectly(
    summary: DemoSummary, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = summary.out / "cohort/truth"

    def cheating_map(_model: object, bag: object, **_: object) -> Heatmap:
        grid = bag.grid  # type: ignore[attr-defined]
        mask, mpp = read_truth(truth / f"{bag.slide_id}.png")  # type: ignore[attr-defined]
        boxes = (grid.boxes_px0() * grid.slide_mpp / mpp).round().astype(int)
        share = np.array([mask[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes])
        return Heatmap((share >= TUMOUR_TILE) * 1.0, grid, "alone", "cheating")

    monkeypatch.setattr("eosin.pipeline._demo.first_map", cheating_map)
    slides = tumour_slides(result, truth)
    areas = locate_tumour(slides)
    assert len(areas) == 4
    assert min(areas.values()) > 0.97
    # a map that does not depend on the weights is no better than chance can be: every random model reaches it
    assert locate_at_random(slides, float(np.mean(list(areas.values())))).p == 1


def test_localisation_is_judged_on_models_that_have_not_seen_the_slide(
    summary: DemoSummary, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eosin.pipeline._demo.load_model", lambda folder: (folder, None))
    monkeypatch.setattr("eosin.pipeline._demo.class_choices", lambda _card: ())
    used = {slide.slide_id: slide.model for slide in tumour_slides(result, summary.out / "cohort/truth")}
    assert used == {slide: result.fold_model(slide) for slide in used}
    assert len(used) == 4


def test_an_even_map_locates_nothing(summary: DemoSummary, result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(_model: object, bag: object, **_: object) -> Heatmap:
        return Heatmap(np.ones(bag.grid.n_tiles), bag.grid, "alone", "flat")  # type: ignore[attr-defined]

    monkeypatch.setattr("eosin.pipeline._demo.first_map", flat)
    assert set(locate_tumour(tumour_slides(result, summary.out / "cohort/truth")).values()) == {0.5}


def test_the_map_that_is_judged_is_the_one_that_is_drawn(summary: DemoSummary, result: Result) -> None:
    slide = tumour_slides(result, summary.out / "cohort/truth")[0]
    model, card = load_model(result.fold_model(slide.slide_id))
    drawn = map_slide(model, slide.bag, classes=class_choices(card)).maps[0]
    assert drawn.kind == "alone"
    assert "tumour" in drawn.label
    area = locate_tumour([slide])[slide.slide_id]
    assert area == pytest.approx(roc_auc(drawn.values, slide.is_tumour))
    assert (result.heatmaps / f"{slide.slide_id}_alone.geojson").is_file()


def test_outline_of_a_normal_slide_is_empty(summary: DemoSummary) -> None:
    outlines = [read_outline(path) for path in sorted((summary.out / "cohort/truth").glob("*.geojson"))]
    assert sum(outline.is_empty for outline in outlines) == 4


def test_demo_options_are_the_documented_ones() -> None:
    demo = Demo()
    assert demo.cohort.n_slides >= 24
    assert demo.pipeline.recipe.aggregator.name == "abmil"
    assert isinstance(demo.pipeline, Pipeline)
    assert Demo.parse(json.loads(demo.to_json())) == demo


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_reaches_its_targets(tmp_path: Path, seed: int) -> None:
    demo = Demo(cohort=Cohort(seed=seed, striking=True))
    summary = run_demo(tmp_path, demo)
    assert summary.slide_auc >= 0.90
    assert summary.localisation_auc >= 0.85
    assert summary.random_localisation.p <= 0.05

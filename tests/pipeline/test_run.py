import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from eosin.errors import ConfigError, LabelError, SeveralErrors, UnknownNameError
from eosin.features._store import find_bags
from eosin.heatmaps.export._geojson import check_geojson
from eosin.mil._checkpoint import load_card
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._splits import read_splits
from eosin.mil.tasks._regression import Regression
from eosin.pipeline._result import Result, make_report
from eosin.pipeline._run import Pipeline, run_pipeline
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import open_slide
from eosin.wsi._synthetic import Cohort, make_cohort, plan_cohort

COHORT = Cohort(n_slides=8, size_um=(440.0, 500.0), fine_fraction=0, pen_fraction=0, min_tumour=0.1, seed=2)
TRAINING = Training(epochs=3, select="last", patience=0)
OPTIONS = Pipeline(
    tiling=Tiling(patch_size=128),
    recipe=Recipe(aggregator=Component(name="abmil", options={"embed_dims": [8], "hidden": 4}), training=TRAINING),
    folds=2,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, COHORT)
    return folder


@pytest.fixture(scope="module")
def result(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(cohort, tmp_path_factory.mktemp("job"))


def run(cohort: Path, job: Path, options: Pipeline = OPTIONS, labels: str = "labels.csv") -> Result:
    return run_pipeline([cohort / "slides"], cohort / labels, JobFolder(job), options)


def test_every_stage_leaves_its_result(result: Result) -> None:
    root = result.job.root
    ids = [plan.slide_id for plan in plan_cohort(COHORT)]
    assert sorted(find_bags(result.features)) == ids
    assert all((root / "thumbnails" / f"{slide}.jpg").is_file() for slide in ids)
    assert (root / "crossval/predictions.csv").is_file()
    assert (root / "crossval/metrics.json").is_file()
    assert load_card(root / "model").features.encoder == "he_texture"
    assert all((root / "heatmaps" / f"{slide}_alone.{kind}").is_file() for slide in ids for kind in ("png", "geojson"))
    assert (root / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert result.report.exit_code == 0


def test_every_slide_is_predicted_once_by_a_model_of_other_patients(result: Result) -> None:
    plans = plan_cohort(COHORT)
    assert sorted(result.predictions["slide_id"]) == [plan.slide_id for plan in plans]
    patient = {plan.slide_id: plan.patient_id for plan in plans}
    splits = read_splits(result.splits)
    for row in result.predictions.itertuples():
        trained = {patient[slide] for slide in splits[int(row.fold)].train}
        assert row.patient_id == patient[row.slide_id] not in trained
        assert result.fold_model(row.slide_id).name == f"fold_{row.fold}"


def test_geojson_of_a_heat_map_is_what_qupath_reads(result: Result) -> None:
    slide_id = result.predictions["slide_id"][0]
    with open_slide(result.slides[slide_id].path) as slide:
        check_geojson(result.heatmaps / f"{slide_id}_alone.geojson", size_px=slide.size_px0)


def test_second_call_does_nothing_again(cohort: Path, result: Result) -> None:
    kept = [path for path in result.job.root.rglob("*") if path.suffix in (".h5", ".safetensors", ".png", ".tiff")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = run(cohort, result.job.root)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert again.report.count("skipped") == len(again.slides)
    pd.testing.assert_frame_equal(again.predictions, result.predictions)


@pytest.mark.long
def test_heat_maps_follow_the_model(cohort: Path, result: Result, tmp_path: Path) -> None:
    job = tmp_path / "job"
    shutil.copytree(result.job.root, job)
    seeded = OPTIONS.recipe.model_copy(update={"training": TRAINING.model_copy(update={"seed": 5})})
    made = run(cohort, job, OPTIONS.model_copy(update={"recipe": seeded}))
    slide = result.predictions["slide_id"][0]
    notes = [json.loads((one.heatmaps / f"{slide}.json").read_text()) for one in (result, made)]
    assert notes[0]["fingerprint"] != notes[1]["fingerprint"]


@pytest.mark.long
def test_a_model_without_attention_shows_the_evidence_of_each_tile(
    cohort: Path, result: Result, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    shutil.copytree(result.job.root, job, ignore=shutil.ignore_patterns("heatmaps", "crossval", "model"))
    recipe = OPTIONS.recipe.model_copy(update={"aggregator": Component(name="mean")})
    made = run(cohort, job, OPTIONS.model_copy(update={"recipe": recipe}))
    slide = made.predictions["slide_id"][0]
    assert (made.heatmaps / f"{slide}_alone.png").is_file()
    data = make_report(made)
    assert all(len(card.pictures) == 2 for card in data.slides)
    assert "of the tile alone" in data.slides[0].pictures[1].caption
    assert data.notes[0].startswith("Maps show what the model says of each tile as if it were the whole slide")
    assert run(cohort, job, OPTIONS.model_copy(update={"recipe": recipe})).report.count("skipped") == len(made.slides)


@pytest.mark.long
def test_the_report_of_many_slides_pictures_the_worst(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_report(result).slides_heading == "Slides"
    monkeypatch.setattr("eosin.pipeline._result.MOST_CARDS", 3)
    data = make_report(result)
    assert data.slides_heading == f"The 3 worst predictions of {len(result.predictions)}"
    tumour = result.predictions["prob_tumour"].where(result.predictions["label"] == "tumour")
    missed = tumour.fillna(1 - result.predictions["prob_tumour"]).sort_values(kind="stable").index[:3]
    assert [card.slide_id for card in data.slides] == list(result.predictions["slide_id"][missed])
    assert all(card.pictures for card in data.slides)


def test_the_report_names_measures_in_words_and_the_positive_class(result: Result) -> None:
    data = make_report(result)
    names = [metric.name for metric in data.metrics]
    assert names[0] == "Area under the ROC curve"
    assert len(names) == len(result.metrics["out_of_fold"])
    assert not set(names) & set(result.metrics["out_of_fold"])
    assert {"Balanced accuracy", "Cohen's kappa", "Brier score ↓", "Sensitivity", "Specificity"} <= set(names)
    assert list(data.tables["Folds"])[:3] == ["Fold", "Test slides", "Area under the ROC curve"]
    assert list(data.tables["Folds"]["Fold"]) == ["0", "1"]
    assert data.metrics_note == "The positive class is tumour, the other normal."
    page = (result.job.root / "report.html").read_text(encoding="utf-8")
    assert "Expected calibration error ↓" in page
    assert "balanced_accuracy" not in page


def test_the_report_of_a_number_has_a_card_per_slide(result: Result) -> None:
    frame = result.predictions[["fold", "slide_id", "patient_id"]]
    frame = frame.assign(area=[str(n) for n in range(len(frame))], predicted=[f"{n}.25" for n in range(len(frame))])
    folds = [{"fold": fold, "n_test": 4, "r2": 0.5} for fold in range(2)]
    metrics = {"task": result.metrics["task"], "folds": folds, "out_of_fold": {}, "metrics": {}, "n_folds": 2}
    data = make_report(replace(result, task=Regression(target="area"), predictions=frame, metrics=metrics))
    assert data.slides[3].facts["predicted"] == "3.250"
    assert data.slides[3].correct is None


@pytest.mark.long
def test_bad_slide_is_left_out_and_named(cohort: Path, result: Result, tmp_path: Path) -> None:
    folder, job = tmp_path / "cohort", tmp_path / "job"
    shutil.copytree(cohort, folder)
    shutil.copytree(result.job.root, job)
    (folder / "slides/S000.tiff").write_bytes(b"II*\0 this is not a slide")
    (folder / "slides/extra.svs").write_bytes(b"nor is this")
    mended = run(folder, job)
    assert mended.left_out == ("S000",)
    assert {record.slide_id for record in mended.report.failed} == {"S000", "extra"}
    assert mended.report.exit_code == 1
    assert "S000" not in set(mended.predictions["slide_id"])
    assert len(mended.predictions) == 7
    assert any("S000" in note for note in make_report(mended).notes)
    assert {slide: loss.step for slide, loss in mended.flow.losses.items()} == {"S000": "readable", "extra": "readable"}
    rows = pd.read_csv(mended.crossval / "cohort.csv", keep_default_na=False)
    assert set(rows.loc[rows["used"] == 0, "slide_id"]) == {"S000", "extra"}
    assert set(rows.loc[rows["used"] == 1, "slide_id"]) == set(mended.predictions["slide_id"])
    assert json.loads((mended.crossval / "metrics.json").read_text())["cohort"][-1]["slides"] == 7
    assert "2 lost" in (job / "report.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_old_features_of_a_slide_that_fails_now_are_not_used(cohort: Path, result: Result, tmp_path: Path) -> None:
    folder, job = tmp_path / "cohort", tmp_path / "job"
    shutil.copytree(cohort, folder)
    shutil.copytree(result.job.root, job)
    assert (job / result.features.relative_to(result.job.root) / "S001.h5").is_file()
    (folder / "slides/S001.tiff").write_bytes(b"broken since")
    assert "S001" not in set(run(folder, job).predictions["slide_id"])


def test_label_of_an_unknown_slide_is_refused_before_any_work(cohort: Path, tmp_path: Path) -> None:
    labels = (cohort / "labels.csv").read_text() + "P999,S999,normal\n"
    (cohort / "more.csv").write_text(labels)
    with pytest.raises(LabelError, match="S999"):
        run(cohort, tmp_path / "job", labels="more.csv")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "he_textur"},
        {"recipe": Recipe(aggregator=Component(name="abmill"))},
        {"recipe": Recipe(aggregator=Component(name="abmil", options={"gate": True}))},
        {"task": "classfication"},
        {"formats": ("pgn",)},
        {"recipe": Recipe(strategy=Component(name="supervized"))},
    ],
)
def test_unknown_names_are_refused_before_any_work(cohort: Path, tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises((UnknownNameError, SeveralErrors), match="did you mean"):
        run(cohort, tmp_path / "job", OPTIONS.model_copy(update=change))
    assert not (tmp_path / "job").exists()


def test_too_many_folds_are_refused_before_any_work(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="fewer folds"):
        run(cohort, tmp_path / "job", OPTIONS.model_copy(update={"folds": 5}))
    assert not (tmp_path / "job").exists()


@pytest.mark.long
def test_given_splits_are_used_without_the_slide_that_fails(cohort: Path, result: Result, tmp_path: Path) -> None:
    folder, job = tmp_path / "cohort", tmp_path / "job"
    shutil.copytree(cohort, folder)
    shutil.copytree(result.job.root, job)
    (folder / "slides/S003.tiff").write_bytes(b"broken")
    mended = run_pipeline([folder / "slides"], folder / "labels.csv", JobFolder(job), OPTIONS, splits=result.splits)
    for old, new in zip(read_splits(result.splits), read_splits(mended.splits), strict=True):
        assert new.test == tuple(slide for slide in old.test if slide != "S003")


def test_folder_without_slides_is_refused(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError):
        run_pipeline([tmp_path / "none"], cohort / "labels.csv", JobFolder(tmp_path / "job"), OPTIONS)

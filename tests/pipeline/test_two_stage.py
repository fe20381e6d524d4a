"""The whole two-stage chain, on slides whose label no low magnification shows."""

import json
import shutil
from pathlib import Path

import pytest
from fine_texture import FineCohort, make_fine_cohort

from eosin.errors import ConfigError
from eosin.features._store import find_bags
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.pipeline._run import Pipeline
from eosin.pipeline._selection import Selection
from eosin.pipeline._two_stage import SecondStage, TwoStageResult, run_two_stage
from eosin.wsi._coordinates import read_footer
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder

TWO_STAGE = RECIPES["two_stage"]
NARROW = Component(name="abmil", options={"gated": False, "embed_dims": [32], "hidden": 16})
TRAINING = Training(epochs=25, lr=3e-3, select="last", patience=0, bags_per_step=4)
OPTIONS = Pipeline(
    tiling=Tiling(mpp=2.0, patch_size=32),
    recipe=Recipe(aggregator=NARROW, strategy=TWO_STAGE.strategy, training=TRAINING),
    folds=4,
    formats=("geojson",),
)
SECOND = SecondStage(tiling=Tiling(mpp=1.0, patch_size=32), selection=Selection(budget=12))


def run(cohort: Path, job: Path, options: Pipeline = OPTIONS, second: SecondStage = SECOND) -> TwoStageResult:
    return run_two_stage([cohort / "slides"], cohort / "labels.csv", JobFolder(job), options, second)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fine")
    make_fine_cohort(folder, FineCohort(n_slides=16, side_px=768, radius_px=80))
    return folder


@pytest.fixture(scope="module")
def result(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoStageResult:
    return run(cohort, tmp_path_factory.mktemp("job"))


@pytest.mark.long
def test_the_chain_sees_what_the_low_magnification_cannot(result: TwoStageResult) -> None:
    first, second = (stage.metrics["out_of_fold"]["auc"]["value"] for stage in (result.first, result.second))
    assert 0.25 < first < 0.75
    assert second > 0.9


def test_both_stages_leave_their_results(result: TwoStageResult) -> None:
    root = result.second.job.root
    stages = json.loads((root / "stages.json").read_text())["stages"]
    assert [stage["mpp"] for stage in stages] == [2.0, 1.0]
    assert [stage["out_of_fold"] for stage in stages] == [
        result.first.metrics["out_of_fold"],
        result.second.metrics["out_of_fold"],
    ]
    for folder in (root, root / "stage1"):
        assert (folder / "report.html").is_file()
        assert (folder / "model/model.json").is_file()
        assert len(list((folder / "heatmaps").glob("*_alone.geojson"))) == 16
    assert "cut into finer ones" in (root / "report.html").read_text(encoding="utf-8")
    coarse, fine = find_bags(result.first.features), find_bags(result.second.features)
    assert coarse.keys() == fine.keys()


def test_no_tile_was_chosen_by_a_model_that_saw_the_slide(result: TwoStageResult) -> None:
    for slide in result.second.predictions["slide_id"]:
        patches = result.second.job.patches(SECOND.selection.folder(SECOND.tiling), slide)
        assert json.loads(read_footer(patches).selection)["out_of_fold"] == "yes"
    columns = ["slide_id", "fold"]
    first, second = (stage.predictions[columns].sort_values("slide_id") for stage in (result.first, result.second))
    assert first.to_numpy().tolist() == second.to_numpy().tolist()


@pytest.mark.slow
def test_a_second_call_does_nothing_again_and_a_bad_slide_is_named_once(
    cohort: Path, result: TwoStageResult, tmp_path: Path
) -> None:
    root = result.second.job.root
    kept = [path for path in root.rglob("*") if path.suffix in (".h5", ".safetensors", ".geojson")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert run(cohort, root).report.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    shutil.copytree(cohort, tmp_path / "cohort")
    (tmp_path / "cohort/slides/torn.svs").write_bytes(b"no slide")
    torn = run(tmp_path / "cohort", root).report
    assert [(record.slide_id, record.reason) for record in torn.failed] == [("torn", "unsupported")]


def test_what_cannot_work_is_refused_before_any_work(cohort: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    with pytest.raises(ConfigError, match="cannot be cut into"):
        run(cohort, job, second=SecondStage(tiling=Tiling(mpp=0.7, patch_size=32)))
    pooled = Recipe(aggregator=Component(name="mean"), training=TRAINING)
    with pytest.raises(ConfigError, match="by attention, which mean does not have"):
        run(cohort, job, OPTIONS.model_copy(update={"recipe": pooled}))
    (tmp_path / "splits_0.csv").write_text("train,val,test\nF000,,F002\nF001,,F003\n")
    with pytest.raises(ConfigError, match="no fold tests F000, F001"):
        run_two_stage(
            [cohort / "slides"],
            cohort / "labels.csv",
            JobFolder(job),
            OPTIONS,
            SECOND,
            splits=tmp_path / "splits_0.csv",
        )
    assert not job.exists()

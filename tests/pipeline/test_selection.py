"""Tiles for a second stage, from the files of a first one."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fine_texture import FineCohort, make_fine_cohort

from eosin._files import write_text
from eosin.errors import CheckpointError, ConfigError, FeatureMismatchError
from eosin.features._extract import extract
from eosin.mil._crossval import crossval
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import read_seen
from eosin.mil._study import Study, open_study
from eosin.mil._train import fit
from eosin.pipeline._selection import Selection, tile_selected
from eosin.wsi._coordinates import read_footer, read_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides

COARSE, FINE = Tiling(mpp=2.0, patch_size=32), Tiling(mpp=1.0, patch_size=32)
BUDGET = Selection(budget=6)
RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"embed_dims": [8], "hidden": 4}),
    training=Training(epochs=1, select="last", patience=0),
)


@dataclass
class Stage:
    """A first stage on painted slides: job folder, run, study."""

    cohort: Path
    job: JobFolder
    run: Path
    study: Study

    @property
    def slides(self):
        return find_slides([self.cohort / "slides"])

    def patches(self, slide_id, selection=BUDGET):
        return self.job.patches(selection.folder(FINE), slide_id)

    def select(self, run=None, tiling=FINE, selection=BUDGET, **options):
        return tile_selected(self.slides, self.job, run or self.run, tiling, selection=selection, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("stage")
    make_fine_cohort(root / "cohort", FineCohort(n_slides=6, side_px=768, radius_px=70))
    job, files = JobFolder(root / "job"), find_slides([root / "cohort/slides"])
    tile_slides(files, job, COARSE)
    extract(files, job, "he_texture", workers=0)
    study = open_study(job.features_dir(COARSE.folder, "he_texture"), root / "cohort/labels.csv")
    splits = study.splits(folds=3, val_fraction=0.0)
    crossval(RECIPE, study.task, study.examples, splits, cohort=study.cohort, out=root / "run")
    return Stage(root / "cohort", job, root / "run", study)


@pytest.fixture
def stage(made, tmp_path):
    """The first stage in a folder that a test may spoil."""
    for name in ("cohort", "job", "run"):
        shutil.copytree(made.cohort.parent / name, tmp_path / name)
    return Stage(tmp_path / "cohort", JobFolder(tmp_path / "job"), tmp_path / "run", made.study)


def test_the_second_grid_is_made_of_the_chosen_tiles(stage):
    report = stage.select()
    assert report.count("ok") == 6
    for slide in stage.slides:
        fine = read_grid(stage.patches(slide.slide_id))
        coarse = read_grid(stage.job.patches(COARSE.folder, slide.slide_id))
        assert fine.tiling == FINE
        assert fine.tile_px0 == 64
        within = (fine.origins_px0[:, None] >= coarse.origins_px0) & (
            fine.origins_px0[:, None] + 64 <= coarse.origins_px0 + 128
        )
        parents = within.all(2)
        assert (parents.sum(1) == 1).all()
        assert parents.any(0).sum() == 6
        order = np.lexsort(fine.origins_px0.T)
        assert (order == np.arange(fine.n_tiles)).all()  # row by row


def test_each_slide_is_chosen_by_the_model_that_has_not_seen_it_and_the_file_says_so(stage):
    stage.select()
    for slide in stage.slides:
        origin = json.loads(read_footer(stage.patches(slide.slide_id)).selection)
        assert origin["out_of_fold"] == "yes"
        assert (origin["budget"], origin["chosen"]) == (6, 6)
        (model,) = origin["models"]
        cards = {path: json.loads((path / "model.json").read_text()) for path in stage.run.glob("fold_*")}
        (folder,) = [path for path, card in cards.items() if card["weights_hash"].startswith(model)]
        assert slide.slide_id not in read_seen(folder).patient_of


def test_a_second_call_does_nothing_and_other_options_select_again(stage):
    stage.select()
    assert stage.select().count("skipped") == 6
    assert stage.select(selection=Selection(budget=6, clusters=2)).count("ok") == 6
    stage.patches("F001", Selection(budget=6, clusters=2)).write_bytes(b"torn")
    again = stage.select(selection=Selection(budget=6, clusters=2))
    assert (again.count("skipped"), again.count("ok")) == (5, 1)


def test_a_redrawn_outline_is_followed(stage):
    stage.select()
    path = stage.job.contours_geojson("F001")
    write_text(path, path.read_text() + "\n")
    again = stage.select()
    assert (again.count("skipped"), again.count("ok")) == (5, 1)


def test_a_budget_beyond_the_tiles_takes_them_all(stage):
    everything = Selection(budget=10_000)
    stage.select(selection=everything)
    origin = json.loads(read_footer(stage.patches("F000", everything)).selection)
    assert origin["chosen"] == origin["of"] == read_grid(stage.job.patches(COARSE.folder, "F000")).n_tiles


def test_a_slide_without_tissue_is_empty_and_bad_ones_are_named(stage):
    from PIL import Image

    slides = stage.cohort / "slides"
    Image.new("RGB", (600, 600), (244, 244, 244)).save(slides / "blank.png")
    (slides / "F001.tiff").write_bytes(b"II*\0 this is not a slide any more")
    (stage.job.features(COARSE.folder, "he_texture", "F002")).unlink()
    (stage.job.features(COARSE.folder, "he_texture", "F003")).write_bytes(b"torn")
    blank = find_slides([slides / "blank.png"], slide_mpp=0.5)
    tile_slides(blank, stage.job, COARSE)
    extract(blank, stage.job, "he_texture", workers=0, tiling=COARSE.folder)
    report = tile_selected(find_slides([slides], slide_mpp=0.5), stage.job, stage.run, FINE, selection=BUDGET)
    found = {record.slide_id: (record.status, record.reason) for record in report.records}
    assert found["blank"] == ("empty", "")
    assert read_grid(stage.patches("blank")).n_tiles == 0
    assert found["F001"] == ("failed", "changed")
    assert found["F002"] == ("failed", "no-features")
    assert found["F003"] == ("failed", "features")
    assert [found[f"F00{n}"][0] for n in (0, 4, 5)] == ["ok"] * 3


def test_a_model_that_has_seen_the_slide_is_refused_or_recorded(stage, tmp_path, caplog):
    study = stage.study
    fit(RECIPE, study.task, study.examples.subset(study.examples.ids[:4]), folder=tmp_path / "single")
    report = stage.select(run=tmp_path / "single")
    assert report.count("ok") == 2
    assert {record.reason for record in report.failed} == {"seen"}
    assert "cross-validation run" in report.failed[0].message
    with caplog.at_level(logging.WARNING):
        assert stage.select(run=tmp_path / "single", allow_seen=True).count("ok") == 4
    assert "4 of 6 slides are chosen by models that have seen them" in caplog.text
    outs = [json.loads(read_footer(stage.patches(f"F00{n}")).selection)["out_of_fold"] for n in range(6)]
    assert outs == ["no"] * 4 + ["yes"] * 2


def test_a_model_that_keeps_silent_about_what_it_saw_is_not_trusted(stage):
    for path in stage.run.glob("fold_*/seen.csv"):
        path.unlink()
    report = stage.select()
    assert {record.reason for record in report.failed} == {"seen"}
    assert "does not state which slides" in report.failed[0].message
    stage.select(allow_seen=True)
    assert json.loads(read_footer(stage.patches("F000")).selection)["out_of_fold"] == "unknown"


@pytest.mark.slow
def test_workers_write_the_same(stage):
    stage.select()
    before = [read_grid(stage.patches(slide.slide_id)).origins_px0 for slide in stage.slides]
    shutil.rmtree(stage.job.root / BUDGET.folder(FINE))
    assert stage.select(workers=1).count("ok") == 6
    after = [read_grid(stage.patches(slide.slide_id)).origins_px0 for slide in stage.slides]
    assert all((first == second).all() for first, second in zip(before, after, strict=True))


def test_what_does_not_fit_together_is_refused_before_any_slide(stage, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be cut into tiles of 48 px.*--mpp may be"):
        stage.select(tiling=Tiling(mpp=1.0, patch_size=48))
    with pytest.raises(ConfigError, match="cannot be cut"):
        stage.select(tiling=Tiling(mpp=4.0, patch_size=16))
    with pytest.raises(ConfigError, match="overlap 4"):
        stage.select(tiling=Tiling(mpp=1.0, patch_size=32, overlap=4))
    with pytest.raises(CheckpointError, match="not a training run"):
        stage.select(run=tmp_path / "nowhere")
    study = stage.study
    pooled = Recipe(aggregator=Component(name="mean"), training=RECIPE.training)
    fit(pooled, study.task, study.examples, folder=tmp_path / "mean")
    with pytest.raises(ConfigError, match="mean has no attention"):
        stage.select(run=tmp_path / "mean")


def test_the_features_of_the_first_stage_are_found_or_asked_for(stage, tmp_path):
    features = stage.job.features_dir(COARSE.folder, "he_texture")
    elsewhere = JobFolder(tmp_path / "other")
    with pytest.raises(ConfigError, match="has no folder of he_texture features of 32 px at 2 µm/px"):
        tile_selected(stage.slides, elsewhere, stage.run, FINE)
    report = tile_selected(stage.slides, elsewhere, stage.run, FINE, features=features, selection=BUDGET)
    assert report.count("ok") == 6
    tile_slides(stage.slides, stage.job, FINE)
    extract(stage.slides[:1], stage.job, "he_texture", workers=0, tiling=FINE.folder)
    assert stage.select().count("ok") == 6  # the other resolution is not taken for the first stage
    with pytest.raises(FeatureMismatchError, match="mpp 1, not 2"):
        stage.select(features=stage.job.features_dir(FINE.folder, "he_texture"))
    shutil.copytree(features, stage.job.root / "copy/features_he_texture")
    with pytest.raises(ConfigError, match=r"has 2 folders.*--features"):
        stage.select()

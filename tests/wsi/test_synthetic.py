import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from shapely.geometry import shape

from eosin.wsi._histology import lay_out
from eosin.wsi._synthetic import TRUTH_MPP, Cohort, SlidePlan, make_cohort, make_slide, plan_cohort, read_truth

SMALL = Cohort(n_slides=4, size_um=(460.0, 520.0), fine_fraction=0.5, min_tumour=0.05, seed=3)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    assert make_cohort(folder, SMALL).count("ok") == 4
    return folder


def pixels(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages.first.asarray()


def test_slides_open_as_pyramids_with_their_mpp(cohort: Path) -> None:
    for plan in plan_cohort(SMALL):
        with openslide.OpenSlide(cohort / f"slides/{plan.slide_id}.tiff") as slide:
            assert slide.properties["openslide.vendor"] == "generic-tiff"
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(plan.mpp, rel=1e-3)
            assert slide.dimensions == plan.size_px0
            assert slide.level_count >= 2
            assert slide.level_downsamples == pytest.approx([2.0**i for i in range(slide.level_count)], rel=5e-3)
            assert slide.properties["openslide.level[0].tile-width"] == "256"


def test_levels_are_jpeg_and_show_the_same_picture(cohort: Path) -> None:
    with tifffile.TiffFile(next((cohort / "slides").glob("*.tiff"))) as tiff:
        first, second = tiff.pages[0], tiff.pages[1]
        assert first.compression == second.compression == tifffile.COMPRESSION.JPEG
        assert (first.subfiletype, second.subfiletype) == (0, 1)
        full, half = first.asarray(), second.asarray()
    h, w = (side // 2 for side in full.shape[:2])
    reduced = full[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced - half[:h, :w]).mean() < 3


def test_truth_mask_and_outline_agree_and_cover_the_planned_part(cohort: Path) -> None:
    for plan in plan_cohort(SMALL):
        mask, mpp = read_truth(cohort / f"truth/{plan.slide_id}.png")
        outline = json.loads((cohort / f"truth/{plan.slide_id}.geojson").read_text())
        area_um2 = sum(shape(feature["geometry"]).area for feature in outline["features"]) * plan.mpp**2
        assert mpp == TRUTH_MPP
        assert area_um2 == pytest.approx(mask.sum() * mpp**2, rel=0.03)
        layout = lay_out(plan.size_um, tumour_fraction=plan.tumour_fraction, rng=plan.rng("layout"))
        tissue = (layout.resized(layout.tissue, TRUTH_MPP) > 0).sum()
        assert mask.sum() / tissue == pytest.approx(plan.tumour_fraction, rel=0.05)
        assert mask.any() == (plan.label == "tumour")


def test_tumour_is_bluer_where_the_mask_says_so(cohort: Path) -> None:
    plan = max(plan_cohort(SMALL), key=lambda plan: plan.tumour_fraction)
    mask, mpp = read_truth(cohort / f"truth/{plan.slide_id}.png")
    step = mpp / plan.mpp
    red = pixels(cohort / f"slides/{plan.slide_id}.tiff")[..., 0].astype(float)
    rows, columns = (np.arange(side) * step for side in mask.shape)
    sampled = red[np.ix_(rows.astype(int), columns.astype(int))]
    tissue = sampled < 215
    assert sampled[mask].mean() < sampled[tissue & ~mask].mean() - 20


def test_label_table_groups_slides_by_patient_and_shares_the_label() -> None:
    by_patient = defaultdict(set)
    plans = plan_cohort(Cohort(n_slides=24))
    for plan in plans:
        by_patient[plan.patient_id].add(plan.label)
    assert len(by_patient) == 12
    assert all(len(labels) == 1 for labels in by_patient.values())
    assert sum(plan.label == "tumour" for plan in plans) == 12


def test_label_table_is_written(cohort: Path) -> None:
    with (cohort / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == [plan.slide_id for plan in plan_cohort(SMALL)]
    assert set(rows[0]) == {"patient_id", "slide_id", "label"}


def test_fractions_span_the_range_that_was_asked_for() -> None:
    fractions = [plan.tumour_fraction for plan in plan_cohort(Cohort(n_slides=24)) if plan.label == "tumour"]
    assert min(fractions) == pytest.approx(0.005)
    assert max(fractions) == pytest.approx(0.20)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_the_tumour_tells_the_label(seed: int) -> None:
    plans = plan_cohort(Cohort(n_slides=24, seed=seed))
    looks = {
        label: sorted(
            (p.size_um, p.mpp, p.pen, p.staining.strength, p.staining.light) for p in plans if p.label == label
        )
        for label in ("tumour", "normal")
    }
    assert looks["tumour"] == looks["normal"]


def test_normal_tissue_does_not_depend_on_tumour() -> None:
    bare, sick = (lay_out((600, 500), tumour_fraction=f, rng=np.random.default_rng(5)) for f in (0.0, 0.1))
    np.testing.assert_array_equal(bare.tissue, sick.tissue)
    np.testing.assert_array_equal(bare.lymphoid, sick.lymphoid)
    assert not (bare.tumour > 0).any()


def test_same_seed_gives_the_same_pixels_and_another_seed_does_not(tmp_path: Path) -> None:
    sizes = {"size_px0": (512, 400), "tumour_fraction": 0.1, "pen": True}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_slide(tmp_path / f"{name}.tiff", seed=seed, **sizes)
    a, b, c = (pixels(tmp_path / f"{name}.tiff") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


@pytest.mark.long
def test_pixels_do_not_depend_on_the_workers(cohort: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path, SMALL, workers=1)
    for path in sorted((cohort / "slides").glob("*.tiff")):
        np.testing.assert_array_equal(pixels(path), pixels(tmp_path / "slides" / path.name))


@pytest.mark.long
def test_second_call_keeps_slides_and_a_changed_plan_repaints(cohort: Path) -> None:
    assert make_cohort(cohort, SMALL).count("skipped") == 4
    (cohort / "truth/S001.png").unlink()
    assert make_cohort(cohort, SMALL).count("skipped") == 3
    assert make_cohort(cohort, SMALL.model_copy(update={"seed": 9})).count("ok") == 4
    assert make_cohort(cohort, SMALL).count("ok") == 4


def test_no_temporary_file_stays(cohort: Path) -> None:
    assert not [path for path in cohort.rglob("*") if ".tmp" in path.name]


def test_plan_of_another_slide_draws_other_numbers() -> None:
    a, b = SlidePlan("a", seed=(1,)), SlidePlan("b", seed=(2,))
    assert a.rng("paint").random() != b.rng("paint").random()
    assert a.rng("paint").random() != a.rng("layout").random()
    assert a.rng("paint").random() == a.rng("paint").random()


def test_pen_and_tumour_fraction_change_the_picture(tmp_path: Path) -> None:
    make_slide(tmp_path / "plain.tiff", size_px0=(700, 600), seed=4)
    make_slide(tmp_path / "pen.tiff", size_px0=(700, 600), seed=4, pen=True)
    changed = np.abs(pixels(tmp_path / "plain.tiff").astype(int) - pixels(tmp_path / "pen.tiff")).max(axis=2) > 40
    assert 0.005 < changed.mean() < 0.5

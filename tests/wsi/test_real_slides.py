"""What eosin does with every file of the reference data: the table of docs/slides.md."""

from pathlib import Path

import pytest

from eosin.wsi.job import JobFolder, tile_slides
from eosin.wsi.slide import find_slides

EXPECTED = {
    "CMU-1-Small-Region": ("ok", "45 tiles"),
    "OS-1-detail": ("ok", "1 tile"),
    "OS-2-ndpi": ("ok", "8 tiles"),
    "boxes": ("failed", "bad-mpp"),
    "boxes.png": ("failed", "no-mpp"),
    "boxes_0": ("empty", "smaller than one tile"),
    "boxes_1": ("empty", "smaller than one tile"),
    "downsample-1-in": ("failed", "unreadable"),
    "histolab-broken": ("failed", "unsupported"),
    "kidney-48-5": ("failed", "no-mpp"),
    "multi_frame_jpeg_camelyon_challenge_image": ("failed", "bad-mpp"),
    "pathml-small_HE_levels": ("failed", "bad-mpp"),
    "pathml-small_dicom": ("failed", "unreadable"),
    "pathml-small_vectra": ("failed", "unsupported-pixels"),
    "skimage-ihc": ("failed", "no-mpp"),
    "small": ("empty", "smaller than one tile"),
    "tcga-cr-7395-01a-01-ts1": ("failed", "no-mpp"),
    "test3-DAPI-2-(387)": ("failed", "dark-background"),
    "unopenable": ("failed", "unreadable"),
}


@pytest.mark.shared
def test_every_file_ends_as_stated(shared: Path, tmp_path: Path):
    slides = find_slides([shared / "data" / "slides"])
    report = tile_slides(slides, JobFolder(tmp_path / "job"))
    found = {record.slide_id: record for record in report.records}
    assert set(found) == set(EXPECTED)
    for slide_id, (status, words) in EXPECTED.items():
        record = found[slide_id]
        assert record.status == status, record
        assert words in f"{record.reason} {record.message}", record
        assert "\n" not in record.message
    assert report.exit_code == 1


@pytest.mark.shared
def test_a_slide_without_mpp_is_tiled_when_the_user_states_it(shared: Path, tmp_path: Path):
    slides = find_slides([shared / "data" / "slides" / "tcga-cr-7395-01a-01-ts1.svs"], slide_mpp=0.25)
    report = tile_slides(slides, JobFolder(tmp_path / "job"))
    assert report.records[0].status == "ok"
    assert report.records[0].message.startswith("38 tiles")

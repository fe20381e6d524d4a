import json

import numpy as np
import pytest
from PIL import Image

from eosin.errors import ConfigError
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles
from eosin.wsi._picture import OUTLINE_COLOUR
from eosin.wsi._preview import TILE_COLOUR, preview_slide, preview_slides
from eosin.wsi._slide_file import SlideFile

SMALL = Tiling(patch_size=64)


@pytest.fixture
def slide(write_slide, tissue_picture):
    return SlideFile(write_slide("slides/good (1) µ.tiff", tissue_picture, levels=(4,)), "good (1) µ")


def test_a_preview_shows_outline_and_tiles_and_writes_nothing(slide, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    picture = np.asarray(preview_slide(slide, SMALL))
    assert max(picture.shape) == 1000
    assert (picture == TILE_COLOUR).all(axis=2).sum() > 1000
    assert (picture == OUTLINE_COLOUR).all(axis=2).sum() > 500
    assert sorted(tmp_path.rglob("*")) == before


def test_previews_of_a_cohort_are_pictures_and_nothing_else(slide, write_slide, tmp_path):
    glass = SlideFile(write_slide("slides/glass.tiff", np.full((600, 600, 3), 240, np.uint8)), "glass")
    job = JobFolder(tmp_path / "job")
    report = preview_slides([slide, glass], job, SMALL)
    assert [record.status for record in report.records] == ["ok", "empty"]
    assert {path for path in job.root.rglob("*") if path.is_file()} == {job.preview("good (1) µ"), job.preview("glass")}
    with Image.open(job.preview("glass")) as picture:
        assert picture.size == (600, 600)
    assert preview_slides([slide], job, SMALL).count("ok") == 1


def test_a_preview_shows_what_was_drawn(slide, tmp_path):
    folder = tmp_path / "edited"
    folder.mkdir()
    square = {"type": "Polygon", "coordinates": [[[0, 0], [256, 0], [256, 128], [0, 128], [0, 0]]]}
    (folder / "good (1) µ.json").write_text(json.dumps(square))
    report = preview_slides([slide], JobFolder(tmp_path / "job"), TissueTiles(SMALL, contours=folder))
    assert report.records[0].message.startswith("8 tiles; 0.00")
    assert report.records[0].message.endswith("; tissue as drawn in good (1) µ.json")
    outside = {"type": "Polygon", "coordinates": [[[9000, 0], [9256, 0], [9256, 128], [9000, 128], [9000, 0]]]}
    (folder / "good (1) µ.json").write_text(json.dumps(outside))
    report = preview_slides([slide], JobFolder(tmp_path / "job"), TissueTiles(SMALL, contours=folder))
    assert report.records[0].status == "empty"
    assert report.records[0].message.endswith("tissue as drawn in good (1) µ.json, which lies outside the slide")
    with pytest.raises(ConfigError, match="no such folder"):
        preview_slides([slide], JobFolder(tmp_path / "job"), TissueTiles(SMALL, contours=tmp_path / "none"))

"""What eosin does with every file of the reference data; the table of docs/slides.md comes from here."""

from pathlib import Path

import numpy as np
import pytest

from eosin._records import Record
from eosin.errors import SlideError
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides, open_slide
from eosin.wsi._tissue import find_tissue

DOCS = Path(__file__).parents[2] / "docs" / "slides.md"
EXPECTED = {
    "CMU-1-Small-Region": ("ok", "45 tiles"),
    "OS-1-detail": ("ok", "1 tile"),
    "OS-2-ndpi": ("ok", "8 tiles"),
    "boxes": ("failed", "bad-mpp"),
    "boxes.png": ("failed", "no-mpp"),
    "boxes_0": ("empty", "smaller than one tile"),
    "downsample-1-in": ("failed", "no-slide"),
    "histolab-broken": ("failed", "unsupported"),
    "kidney-48-5": ("failed", "no-mpp"),
    "multi_frame_jpeg_camelyon_challenge_image": ("failed", "too-coarse"),
    "pathml-small_HE_levels": ("failed", "bad-mpp"),
    "pathml-small_dicom": ("failed", "bad-mpp"),
    "pathml-small_vectra": ("failed", "unsupported-pixels"),
    "skimage-ihc": ("failed", "no-mpp"),
    "small": ("empty", "smaller than one tile"),
    "tcga-cr-7395-01a-01-ts1": ("failed", "no-mpp"),
    "test3-DAPI-2-(387)": ("failed", "dark-background"),
    "unopenable": ("failed", "unreadable"),
}
STATED_MPP = {
    "tcga-cr-7395-01a-01-ts1.svs": (0.25, "38 tiles"),
    "skimage-ihc.png": (0.5, "4 tiles"),
    "boxes.png": (0.5, "the slide (300 x 250 px) is smaller than one tile"),
}


@pytest.fixture(scope="module")
def records(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    slides = find_slides([shared / "data" / "slides"])
    report = tile_slides(slides, JobFolder(tmp_path_factory.mktemp("job")))
    assert report.exit_code == 1
    return {record.slide_id: record for record in report.records}


@pytest.mark.shared
def test_every_file_ends_as_stated(records: dict[str, Record]):
    assert set(records) == set(EXPECTED)
    for slide_id, (status, words) in EXPECTED.items():
        record = records[slide_id]
        assert record.status == status, record
        assert words in f"{record.reason} {record.message}", record
        assert "\n" not in record.message


def make_table(shared: Path, records: dict[str, Record]) -> str:
    folder = shared / "data" / "slides"
    lines = ["| file | reader | outcome at 0.5 µm/px | said |", "| --- | --- | --- | --- |"]
    for slide in find_slides([folder]):
        record = records[slide.slide_id]
        try:
            with open_slide(slide.path) as opened:
                reader = str(opened.facts()["reader"]).split()[0]
        except SlideError:
            reader = "–"
        outcome = f"{record.status} (`{record.reason}`)" if record.reason else record.status
        said = record.message.replace(f"{slide.path}: ", "").replace(f"{folder}/", "")
        lines.append(f"| `{slide.path.relative_to(folder)}` | {reader} | {outcome} | {said} |")
    return "\n".join(lines)


@pytest.mark.shared
def test_the_table_of_the_documentation_is_true(shared: Path, records: dict[str, Record]):
    table = make_table(shared, records)
    assert table in DOCS.read_text(encoding="utf-8"), f"put this into {DOCS}:\n{table}"


@pytest.mark.shared
@pytest.mark.parametrize("name", STATED_MPP)
def test_slides_without_mpp_are_tiled_when_the_user_states_it(shared: Path, tmp_path: Path, name: str):
    mpp, words = STATED_MPP[name]
    slides = find_slides([shared / "data" / "slides" / name], slide_mpp=mpp)
    record = tile_slides(slides, JobFolder(tmp_path / "job")).records[0]
    assert record.message.startswith(words), record


@pytest.mark.shared
def test_one_small_grey_blue_piece_among_dirt_is_found(shared: Path):
    with open_slide(shared / "data" / "slides" / "kidney-48-5.tif", mpp=8.0) as slide:
        outline = find_tissue(slide).contours()
    assert len(outline.geoms) == 1
    assert np.abs(np.subtract(outline.bounds, (283, 504, 400, 567))).max() < 4


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mpp", "corner", "rgb"),
    [
        ("dicom-camelyon-jpeg/multi_frame_jpeg_camelyon_challenge_image.dcm", 19.0, (120, 200), (128.3, 83.9, 168.7)),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.25, (2000, 2600), (192.0, 85.1, 136.4)),
        ("CMU-1-Small-Region.svs", 0.499, (900, 1200), (191.6, 130.4, 163.7)),
    ],
)
def test_colours_are_those_that_were_looked_at(shared: Path, name: str, mpp: float, corner, rgb):
    with open_slide(shared / "data" / "slides" / name, mpp=mpp) as slide:
        pixels = slide.read(corner, (64, 64), mpp)
    assert np.abs(pixels.mean(axis=(0, 1)) - rgb).max() < 1

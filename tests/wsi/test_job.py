import json
import subprocess
import sys
import uuid

import numpy as np
import pytest
from PIL import Image

from eosin.errors import ConfigError, OutputError
from eosin.wsi._coordinates import read_footer, read_grid, read_quality
from eosin.wsi._geojson import outline_to_geojson, qupath_origin
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles, read_overrides, tile_slides
from eosin.wsi._outline import trace_outline
from eosin.wsi._slide_file import SlideFile, find_slides
from eosin.wsi._tissue import TissueOptions

SMALL = Tiling(patch_size=64)


@pytest.fixture
def job(tmp_path):
    return JobFolder(tmp_path / "job")


@pytest.fixture
def slides(write_slide, tissue_picture, tmp_path):
    write_slide("slides/good (1) µ.tiff", tissue_picture, levels=(4,))
    write_slide("slides/glass.tiff", np.full((600, 600, 3), 240, np.uint8))
    write_slide("slides/no-mpp.tiff", tissue_picture, mpp=None)
    (tmp_path / "slides" / "text.svs").write_text("not a slide")
    return find_slides([tmp_path / "slides"])


def by_id(report):
    return {record.slide_id: record for record in report.records}


def test_every_slide_ends_with_a_reason_and_none_stops_the_run(slides, job):
    report = tile_slides(slides, job, SMALL)
    found = {name: (record.status, record.reason) for name, record in by_id(report).items()}
    assert found == {
        "good (1) µ": ("ok", ""),
        "glass": ("empty", ""),
        "no-mpp": ("failed", "no-mpp"),
        "text": ("failed", "unsupported"),
    }
    assert report.exit_code == 1
    assert "no tissue" in by_id(report)["glass"].message
    records = json.loads(job.run_json.read_text())
    assert "good (1) µ" in json.dumps(records, ensure_ascii=False)


def test_the_folder_is_laid_out_as_documented(slides, job):
    tile_slides(slides, job, SMALL)
    assert job.tilings() == ["0.5mpp_64px_0px_overlap"]
    for slide_id in ("good (1) µ", "glass"):
        with Image.open(job.thumbnail(slide_id)) as thumbnail, Image.open(job.contours(slide_id)) as contours:
            assert max(thumbnail.size) <= 1000
            assert thumbnail.size == contours.size
        assert read_footer(job.patches(SMALL.folder, slide_id)).mpp_source == "tiff-resolution"
    assert read_grid(job.patches(SMALL.folder, "glass")).n_tiles == 0
    grid = read_grid(job.patches(SMALL.folder, "good (1) µ"))
    centres = grid.origins_px0 + grid.tile_px0 / 2
    assert np.hypot(*(centres - (700, 600)).T).max() < 400 + 64
    assert grid.n_tiles == pytest.approx(np.pi * 400**2 / 64**2, rel=0.2)
    assert not list(job.root.rglob("*.tmp*"))
    assert job.features(SMALL.folder, "resnet", "a").parent == job.features_dir(SMALL.folder, "resnet")


def test_the_contour_picture_shows_the_outline(slides, job):
    tile_slides(slides, job, SMALL)
    with Image.open(job.contours("good (1) µ")) as picture:
        pixels = np.asarray(picture).astype(int)
    green = (pixels[..., 1] > 130) & (pixels[..., 0] < 100) & (pixels[..., 2] < 100)
    rows, columns = np.nonzero(green)
    distance = np.hypot(columns * 1.6 - 700, rows * 1.6 - 600)
    assert len(rows) > 500
    assert np.abs(distance - 400).max() < 40


def test_finished_slides_are_skipped_until_something_changes(slides, job):
    tile_slides(slides, job, SMALL)
    patches = job.patches(SMALL.folder, "good (1) µ")
    before = patches.stat().st_mtime_ns
    assert tile_slides(slides, job, SMALL).count("skipped") == 2
    assert patches.stat().st_mtime_ns == before
    assert tile_slides(slides, job, TissueTiles(SMALL, tissue=TissueOptions(min_area_um2=1))).count("skipped") == 0
    assert tile_slides(slides, job, SMALL).count("skipped") == 0
    assert tile_slides(slides, job, Tiling(patch_size=32)).count("skipped") == 0
    assert len(job.tilings()) == 2


@pytest.mark.parametrize("harm", ["truncate", "delete picture", "other slide", "other mpp"])
def test_a_result_that_is_not_whole_or_not_of_this_slide_is_made_again(slides, job, harm, write_slide, tissue_picture):
    tile_slides(slides, job, SMALL)
    good = next(slide for slide in slides if slide.slide_id.startswith("good"))
    patches = job.patches(SMALL.folder, good.slide_id)
    if harm == "truncate":
        patches.write_bytes(patches.read_bytes()[:700])
    elif harm == "delete picture":
        job.contours(good.slide_id).unlink()
    elif harm == "other slide":
        write_slide("slides/good (1) µ.tiff", tissue_picture[:900])
    else:
        good = SlideFile(good.path, good.slide_id, 0.4)
    report = tile_slides([good], job, SMALL)
    assert report.count("ok") == 1
    assert read_grid(patches).n_tiles > 0


def test_workers_give_the_same_files(slides, job, tmp_path):
    other = JobFolder(tmp_path / "other")
    tile_slides(slides, job, SMALL)
    tile_slides(slides, other, SMALL, workers=1)
    written = [path for path in job.root.rglob("*") if path.suffix in {".h5", ".jpg", ".geojson"}]
    names = [path.relative_to(job.root) for path in written]
    assert len(names) == 8
    for name in names:
        assert (job.root / name).read_bytes() == (other.root / name).read_bytes()


def test_a_job_folder_that_cannot_be_written_stops_the_run(slides, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        tile_slides(slides, JobFolder(tmp_path / "file"), SMALL)


def test_a_slide_smaller_than_a_tile_is_empty_and_says_so(write_slide, tissue_picture, job, tmp_path):
    write_slide("tiny.tiff", tissue_picture[600:616, 700:716])
    report = tile_slides(find_slides([tmp_path / "tiny.tiff"]), job)
    assert report.records[0].status == "empty"
    assert "smaller than one tile" in report.records[0].message


def test_the_outline_opens_in_qupath(slides, job):
    tile_slides(slides, job, SMALL)
    check_qupath_rules(json.loads(job.contours_geojson("good (1) µ").read_text()), (1600, 1200))
    assert json.loads(job.contours_geojson("glass").read_text()) == {"type": "FeatureCollection", "features": []}


def test_the_outline_is_relative_to_the_bounds_box():
    mask = np.zeros((10, 10), bool)
    mask[4:8, 5:9] = True
    outline = trace_outline(mask, (10.0, 10.0), (100, 100))
    text = outline_to_geojson(outline, slide_id="a", qupath_origin_px0=qupath_origin((30, 20, 70, 80)))
    ring = np.array(json.loads(text)["features"][0]["geometry"]["coordinates"][0])
    assert ring.min(axis=0).tolist() == [20, 20]
    assert qupath_origin(None) == (0, 0)


def check_qupath_rules(data, size):
    assert data["type"] == "FeatureCollection"
    ids = [uuid.UUID(feature["id"]) for feature in data["features"]]
    assert len(set(ids)) == len(ids) > 0
    for feature in data["features"]:
        assert feature["type"] == "Feature"
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert all(isinstance(value, int) and 0 <= value <= 255 for value in properties["classification"]["color"])
        assert feature["geometry"]["type"] == "Polygon"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            points = np.array(ring)
            assert (points >= 0).all()
            assert (points <= size).all()


def test_edited_contours_are_used_and_a_new_edit_tiles_again(slides, job, tmp_path):
    folder = tmp_path / "edited"
    folder.mkdir()
    good = [slide for slide in slides if slide.slide_id.startswith("good")]
    drawn = {"type": "Polygon", "coordinates": [[[0, 0], [256, 0], [256, 128], [0, 128], [0, 0]]]}
    (folder / "good (1) µ.geojson").write_text(json.dumps({"type": "Feature", "geometry": drawn}))
    report = tile_slides(slides, job, TissueTiles(SMALL, contours=folder))
    assert by_id(report)["glass"].status == "empty"
    grid = read_grid(job.patches(SMALL.folder, "good (1) µ"))
    assert grid.origins_px0.tolist() == [[x, y] for y in (0, 64) for x in (0, 64, 128, 192)]
    assert tile_slides(good, job, TissueTiles(SMALL, contours=folder)).count("skipped") == 1
    (folder / "good (1) µ.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert tile_slides(good, job, TissueTiles(SMALL, contours=folder)).count("empty") == 1
    (folder / "good (1) µ.geojson").write_text("{")
    record = tile_slides(good, job, TissueTiles(SMALL, contours=folder)).records[0]
    assert (record.status, record.reason) == ("failed", "bad-contours")
    with pytest.raises(ConfigError, match="no such folder"):
        tile_slides(good, job, TissueTiles(SMALL, contours=tmp_path / "none"))


def test_our_own_contours_give_the_same_tiles_when_read_back(slides, job, tmp_path):
    tile_slides(slides, job, SMALL)
    other = JobFolder(tmp_path / "other")
    tile_slides(slides, other, TissueTiles(SMALL, contours=job.root / "contours_geojson"))
    first, second = (
        {tuple(row) for row in read_grid(folder.patches(SMALL.folder, "good (1) µ")).origins_px0.tolist()}
        for folder in (job, other)
    )
    assert len(first ^ second) <= 2


def test_options_of_single_slides(slides, job, tmp_path):
    table = tmp_path / "overrides.csv"
    table.write_text("slide,min_stain,remove_pen,mpp\ngood (1) µ,0.9,,\nother,,false,16\n")
    overrides = read_overrides(table, TissueOptions(open_um=10))
    assert overrides["other"] == TissueOptions(open_um=10, remove_pen=False, mpp=16)
    report = tile_slides(slides, job, TissueTiles(SMALL, overrides=overrides))
    assert by_id(report)["good (1) µ"].status == "empty"


@pytest.mark.parametrize("text", ["slide,colour\na,red\n", "slide,mpp\na,-1\n", "name\na\n"])
def test_bad_overrides_are_refused(tmp_path, text):
    (tmp_path / "o.csv").write_text(text)
    with pytest.raises(ConfigError):
        read_overrides(tmp_path / "o.csv", TissueOptions())


CHILD = """
import sys
from pathlib import Path
from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
from eosin.wsi._slide_file import SlideFile
report = tile_slides([SlideFile(Path(sys.argv[1]), "giant")], JobFolder(Path(sys.argv[2])))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.records[0].status, report.records[0].message.split()[0], peak.split()[1])
"""


SCORED = """
import sys
from pathlib import Path
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
from eosin.wsi._quality import QualityLimits
from eosin.wsi._slide_file import SlideFile
slides = [SlideFile(Path(sys.argv[1]), "giant")]
tiling = Tiling(patch_size=64, overlap=15)
report = tile_slides(slides, JobFolder(Path(sys.argv[2])), TissueTiles(tiling, quality=QualityLimits(blur=True)))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report.records[0].message.split()[0], peak.split()[1])
"""


LIGHT = """
import sys
from pathlib import Path
from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
from eosin.wsi._slide_file import SlideFile
report = tile_slides([SlideFile(Path(sys.argv[1]), "a")], JobFolder(Path(sys.argv[2])))
print(report.records[0].status, *{"scipy", "skimage", "torch", "pandas"} & set(sys.modules))
"""


def test_a_plain_slide_is_tiled_without_loading_what_takes_longer_than_the_slide(giant_slide, tmp_path):
    path = giant_slide("40,000.tiff", 40_000, mpp=0.25, n_levels=5)
    command = [sys.executable, "-c", LIGHT, str(path), str(tmp_path / "job")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["ok"]


@pytest.mark.slow
def test_200_000_tiles_are_scored_within_a_gigabyte(giant_slide, tmp_path):
    path = giant_slide("5 levels.tiff", 100_000, mpp=0.25, n_levels=5)
    command = [sys.executable, "-c", SCORED, str(path), str(tmp_path / "job")]
    n_tiles, peak_kb = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(n_tiles) > 200_000
    assert int(peak_kb) < 1024 * 1024
    quality = read_quality(JobFolder(tmp_path / "job").patches("0.5mpp_64px_15px_overlap", "giant"))
    assert np.isfinite(quality.blur).all()


@pytest.mark.parametrize("n_levels", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_giant_slide_is_tiled_within_a_gigabyte(giant_slide, tmp_path, n_levels):
    path = giant_slide(f"{n_levels} levels.tiff", 100_000, mpp=0.25, n_levels=n_levels)
    command = [sys.executable, "-c", CHILD, str(path), str(tmp_path / "job")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    status, n_tiles, peak_kb = ended.stdout.split()
    assert status == "ok"
    assert int(n_tiles) == pytest.approx(np.pi * (25_000 / 512) ** 2, rel=0.05)
    assert int(peak_kb) < 1024 * 1024

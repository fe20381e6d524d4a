"""Options of `eosin tile` that a person repairs a slide with: contours, overrides, previews."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapely.affinity import scale, translate
from shapely.geometry import mapping, shape

from eosin.wsi._coordinates import read_grid, read_quality
from eosin.wsi._geojson import read_outline
from eosin.wsi._synthetic import make_slide

from .conftest import Run

TILING = "0.5mpp_64px_0px_overlap"
NO_AREA = ("qupath-line.json", "qupath-multipoint.json", "qupath-point.json", "qupath-polyline.json")
WITH_AREA = (
    "qupath-brush.json",
    "qupath-core-polygon.geojson",
    "qupath-ellipse.json",
    "qupath-polygon.json",
    "qupath-rectangle.json",
    "qupath-wand.json",
)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "slides/a.tiff"
    path.parent.mkdir()
    make_slide(path, size_px0=(512, 512), mpp=0.5)
    return path


def origins(job: Path, slide_id: str = "a") -> set[tuple[int, int]]:
    grid = read_grid(job / TILING / f"patches/{slide_id}_patches.h5")
    return {(x, y) for x, y in grid.origins_px0.tolist()}


def move_onto_slide(source: Path, target: Path) -> None:
    """Write a drawn shape enlarged and where the reference slide has tissue, otherwise as QuPath wrote it."""
    data: dict[str, Any] = json.loads(source.read_text())
    holder = data if "geometry" in data else {"geometry": data}
    drawn = shape(holder["geometry"])
    drawn = scale(drawn, *[1000 / max(np.ptp(np.reshape(drawn.bounds, (2, 2)), axis=0).max(), 1)] * 2)
    holder["geometry"] = mapping(translate(drawn, 700 - drawn.bounds[0], 900 - drawn.bounds[1]))
    target.write_text(json.dumps(data if "geometry" in data else holder["geometry"]))


@pytest.mark.shared
@pytest.mark.parametrize("name", WITH_AREA)
def test_a_shape_drawn_in_qupath_decides_the_tiles_of_a_real_slide(
    run: Run, shared: Path, tmp_path: Path, name: str
) -> None:
    drawn = tmp_path / f"CMU-1-Small-Region{Path(name).suffix}"
    move_onto_slide(shared / "data/interop/qupath_geojson" / name, drawn)
    slide = shared / "data/slides/CMU-1-Small-Region.svs"
    job = tmp_path / "job"
    done = run("tile", slide, "--job", job, "--patch-size", 64, "--min-tissue", 0.5, "--contours", tmp_path)
    assert (done.exit_code, done.stdout) == (0, f"{job / TILING}\n")
    outline = read_outline(drawn)
    inside = {
        (x, y)
        for x in range(0, 2220 - 64, 64)
        for y in range(0, 2967 - 64, 64)
        if outline.intersection(shape(tile_geometry(x, y))).area >= 0.5 * 64 * 64
    }
    assert len(inside) > 0
    assert len(origins(job, "CMU-1-Small-Region") ^ inside) <= 0.1 * len(inside) + 1  # tiles at the very limit


def tile_geometry(x: int, y: int) -> dict[str, object]:
    return {"type": "Polygon", "coordinates": [[(x, y), (x + 64, y), (x + 64, y + 64), (x, y + 64), (x, y)]]}


@pytest.mark.shared
@pytest.mark.parametrize("name", NO_AREA)
def test_a_shape_without_area_fails_the_slide(run: Run, shared: Path, tmp_path: Path, name: str) -> None:
    move_onto_slide(shared / "data/interop/qupath_geojson" / name, tmp_path / "CMU-1-Small-Region.json")
    slide = shared / "data/slides/CMU-1-Small-Region.svs"
    failed = run("tile", slide, "--job", tmp_path / "job", "--contours", tmp_path)
    assert failed.exit_code == 1
    assert "no annotation with an area; draw one in QuPath [bad-contours]" in failed.stderr


@pytest.mark.shared
def test_contours_of_a_real_slide_are_written_edited_and_read_back(run: Run, shared: Path, tmp_path: Path) -> None:
    slide = shared / "data/slides/CMU-1-Small-Region.svs"
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("tile", slide, "--job", first, "--patch-size", 64).exit_code == 0
    path = first / "contours_geojson/CMU-1-Small-Region.geojson"
    data = json.loads(path.read_text())
    half = {"type": "Polygon", "coordinates": [[(0, 0), (1110, 0), (1110, 2967), (0, 2967), (0, 0)]]}
    ignored = {"objectType": "annotation", "classification": {"name": "Ignore*"}}
    data["features"].append({"type": "Feature", "geometry": half, "properties": ignored})
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / path.name).write_text(json.dumps(data))
    assert run("tile", slide, "--job", second, "--patch-size", 64, "--contours", edited).exit_code == 0
    found, kept = origins(first, "CMU-1-Small-Region"), origins(second, "CMU-1-Small-Region")
    right = {(x, y) for x, y in found if x >= 1110}
    assert min(x for x, _ in kept) > 1110 - 64
    assert len(kept ^ right) < 0.15 * len(right)


def test_a_magnification_says_what_it_is_taken_for(run: Run, slide: Path, tmp_path: Path) -> None:
    done = run("tile", slide, "--job", tmp_path / "job", "--magnification", 10, "--patch-size", 64)
    assert done.stderr.splitlines()[0] == "--magnification 10 means 1 µm/px (10 / magnification)"
    assert (tmp_path / "job/1mpp_64px_0px_overlap").is_dir()


def test_overrides_change_one_slide(run: Run, slide: Path, tmp_path: Path) -> None:
    make_slide(slide.with_name("b.tiff"), size_px0=(512, 512), mpp=0.5)
    table = tmp_path / "overrides.csv"
    table.write_text("slide,min_stain\na.tiff,0.95\n")
    job = tmp_path / "job"
    done = run("tile", slide.parent, "--job", job, "--patch-size", 64, "--overrides", table)
    assert (done.exit_code, done.stderr) == (0, "2 slides: 1 ok, 1 empty\n")
    assert origins(job, "a") == set()
    assert len(origins(job, "b")) > 5


def test_names_that_no_slide_has_are_told(run: Run, slide: Path, tmp_path: Path) -> None:
    table = tmp_path / "overrides.csv"
    table.write_text("slide,min_stain\nb,0.95\n")
    (tmp_path / "drawn").mkdir()
    done = run("tile", slide, "--job", tmp_path / "job", "--overrides", table, "--contours", tmp_path / "drawn")
    assert done.exit_code == 0
    assert "warning: options of single slides: names of unknown slides are not used: b\n" in done.stderr
    assert "drawn: has no outline for a; their tissue is detected automatically\n" in done.stderr


def test_a_preview_writes_pictures_and_no_coordinates(run: Run, slide: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    done = run("tile", slide, "--job", job, "--patch-size", 64, "--preview")
    assert (done.exit_code, done.stdout) == (0, f"{job / 'previews'}\n")
    assert [path.name for path in job.rglob("*") if path.is_file()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--contours", "none"], "no such folder of contours"),
        (["--overrides", "none.csv"], "cannot be read as a table"),
        (["--timeout", 10], "add --workers"),
        (["--timeout", 0, "--workers", 1], "must be greater than 0"),
    ],
)
def test_options_that_cannot_be_followed(
    refused: Run, slide: Path, tmp_path: Path, options: list[object], told: str
) -> None:
    assert told in refused("tile", slide, "--job", tmp_path / "job", *options)
    assert not (tmp_path / "job").exists()


def test_limits_of_quality_come_from_the_command_line(run: Run, slide: Path, tmp_path: Path) -> None:
    all_of_them, none = tmp_path / "all", tmp_path / "none"
    assert run("tile", slide, "--job", all_of_them, "--patch-size", 64, "--set", "quality.blur=true").exit_code == 0
    quality = read_quality(all_of_them / TILING / "patches/a_patches.h5")
    assert quality is not None
    blur = quality.blur
    limit = float(np.median(blur))
    done = run("tile", slide, "--job", none, "--patch-size", 64, "--max-blur", limit, "--max-pen", 0.5)
    assert done.exit_code == 0
    assert len(origins(none)) == (blur <= limit).sum() < len(origins(all_of_them))
    facts = run("info", all_of_them / TILING / "patches/a_patches.h5").stdout
    assert f"mean_blur: {blur.mean():.4g}" in facts
    assert "mean_pen: 0.0" in facts


def test_limits_outside_0_to_1_are_refused(refused: Run, slide: Path, tmp_path: Path) -> None:
    assert "max_blur" in refused("tile", slide, "--job", tmp_path / "job", "--max-blur", 2)


def test_colours_by_the_profile_are_stated_in_the_file(run: Run, slide: Path, tmp_path: Path) -> None:
    for flags, stated in (([], False), (["--icc"], True)):
        job = tmp_path / str(stated)
        assert run("tile", slide, "--job", job, "--patch-size", 64, *flags).exit_code == 0
        assert read_grid(job / TILING / "patches/a_patches.h5").tiling.icc is stated

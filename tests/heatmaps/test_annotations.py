import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from scenes import lattice
from shapely import MultiPolygon, box, geometry

from eosin.errors import ConfigError
from eosin.heatmaps import _annotations as annotations
from eosin.heatmaps._annotations import read_regions, tiles_inside


def feature(shape, *, name=None, classification=None):
    properties = {"name": name, "classification": classification}
    return {"type": "Feature", "geometry": geometry.mapping(shape), "properties": properties}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("wrap", ["collection", "list", "feature", "geometry"])
def test_every_form_that_qupath_writes_is_read(tmp_path, wrap):
    one = feature(box(10, 20, 110, 220))
    data = {
        "collection": {"type": "FeatureCollection", "features": [one]},
        "list": [one],
        "feature": one,
        "geometry": one["geometry"],
    }[wrap]
    assert read_regions(write(tmp_path / "a.geojson", data)).bounds == (10, 20, 110, 220)


def test_scanned_box_is_added(tmp_path):
    path = write(tmp_path / "a.geojson", feature(box(0, 0, 10, 10)))
    assert read_regions(path, bounds_px0=(300, 200, 50, 50)).bounds == (300, 200, 310, 210)


def test_classes_are_chosen_by_classification_or_name(tmp_path):
    data = [
        feature(box(0, 0, 10, 10), classification={"name": "Tumor", "color": [200, 0, 0]}),
        feature(box(50, 50, 60, 60), classification="Stroma"),
        feature(box(80, 80, 90, 90), name="by hand"),
    ]
    path = write(tmp_path / "a.geojson", data)
    assert read_regions(path, classes=["Tumor"]).bounds == (0, 0, 10, 10)
    assert read_regions(path, classes=["Stroma", "by hand"]).bounds == (50, 50, 90, 90)
    assert read_regions(path).area == 300
    with pytest.raises(ConfigError, match="has no region named Necrosis; it has Stroma, Tumor, by hand"):
        read_regions(path, classes=["Necrosis"])


def test_area_that_crosses_itself_is_repaired(tmp_path):
    bow_tie = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    region = read_regions(write(tmp_path / "a.geojson", {"type": "Feature", "geometry": bow_tie, "properties": {}}))
    assert region.is_valid
    assert region.area == 50


def test_points_and_lines_have_no_area(tmp_path):
    data = [feature(geometry.Point(1, 2)), feature(geometry.LineString([(0, 0), (5, 5)]))]
    assert read_regions(write(tmp_path / "a.geojson", data)).is_empty


@pytest.mark.parametrize("text", ["", "{", '{"type": "Topology"}', "[[[]]]", '"text"', "[" * 100_000])
def test_other_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "a.geojson"
    path.write_text(text)
    if text == "[[[]]]":
        assert read_regions(path).is_empty
        return
    with pytest.raises(ConfigError, match=r"a\.geojson"):
        read_regions(path)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"properties": [1]},
        {"properties": "a"},
        {"geometry": "Polygon"},
        {"properties": {"classification": {"names": 1}}},
    ],
)
def test_features_built_otherwise_are_refused_in_one_line(tmp_path, spoiled):
    with pytest.raises(ConfigError, match=r"a\.geojson: cannot be read as GeoJSON"):
        read_regions(write(tmp_path / "a.geojson", [feature(box(0, 0, 9, 9)) | spoiled]))


def test_a_number_beyond_all_floats_is_refused_in_one_line(tmp_path):
    text = json.dumps(feature(box(0, 0, 777, 9))).replace("777", "9" * 400)
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.geojson"):
        read_regions(tmp_path / "a.geojson")


def test_damaged_geometry_and_missing_file(tmp_path):
    broken = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], ["x", 1]]]}, "properties": {}}
    with pytest.raises(ConfigError, match="damaged"):
        read_regions(write(tmp_path / "a.geojson", broken))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_regions(tmp_path / "gone.geojson")


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("layout", ["features first", "type first", "spaced", "bom"])
def test_files_are_read_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, layout):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    boxes = [feature(box(10 * i, 0, 10 * i + 5, 5), classification={"name": "Tumör"}) for i in range(20)]
    data = {"type": "FeatureCollection", "features": boxes, "crs": {"a": [1, 2.5e3]}}
    if layout == "features first":
        data = {"features": boxes, "type": "FeatureCollection"}
    text = json.dumps(data, indent=3 if layout == "spaced" else None, ensure_ascii=False)
    (tmp_path / "a.geojson").write_text(text, encoding="utf-8-sig" if layout == "bom" else "utf-8")
    assert read_regions(tmp_path / "a.geojson", classes=["Tumör"]).area == 500


@pytest.mark.parametrize("text", ['{"features": [{"type": "Feature"', '[{"type": "Feature"} 5]', "[] []", "[1]", "7"])
def test_what_breaks_off_or_goes_on_is_refused(tmp_path, text):
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read as GeoJSON"):
        read_regions(tmp_path / "a.geojson")


def test_file_with_too_many_areas_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "MAX_AREAS", 50)
    data = [feature(box(i, 0, i + 1, 1), classification={"name": "Tile"}) for i in range(60)]
    data.append(feature(box(0, 0, 10, 10), classification={"name": "Tumor"}))
    path = write(tmp_path / "a.geojson", data)
    with pytest.raises(ConfigError, match="more than 50 areas"):
        read_regions(path)
    assert read_regions(path, classes=["Tumor"]).area == 100


@pytest.mark.slow
def test_300_mb_are_read_in_bounded_memory_and_time(tmp_path):
    path = tmp_path / "large.geojson"
    tile = json.dumps(feature(box(0, 0, 5, 5), classification={"name": "Tile", "color": [0, 0, 0]}))
    region = json.dumps(feature(box(0, 0, 100, 100), classification={"name": "Tumor", "color": [0, 0, 0]}))
    with path.open("w") as file:
        file.write('{"type": "FeatureCollection", "features": [' + region)
        for _ in range(300_000_000 // len(tile) // 1000):
            file.write("," + ",".join([tile] * 1000))
        file.write("]}")
    program = (
        "import resource, sys, time; from pathlib import Path;"
        "from eosin.heatmaps._annotations import read_regions; started = time.process_time();"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "area = read_regions(Path(sys.argv[1]), classes=['Tumor']).area;"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(area, (after - before) / 1024, time.process_time() - started)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    area, mib, seconds = map(float, done.stdout.split())
    assert area == 10_000
    assert mib < 100
    assert seconds < 60
    with pytest.raises(ConfigError, match="more than 100000 areas"):
        read_regions(path)


def test_tiles_with_half_of_their_area_inside(tmp_path):
    grid = lattice(size_px0=(1000, 1000), slide_mpp=0.5, patch_size=100)
    region = MultiPolygon([box(100, 100, 351, 200), box(600, 600, 640, 700)])
    assert tiles_inside(grid, region).tolist() == [11, 12, 13]
    assert tiles_inside(grid, region, share=0.3).tolist() == [11, 12, 13, 66]
    assert tiles_inside(grid, MultiPolygon()).tolist() == []


def test_region_of_another_slide_is_refused():
    grid = lattice(size_px0=(1000, 1000), slide_mpp=0.5, patch_size=100)
    with pytest.raises(ConfigError, match="outside the slide of 1000 x 1000"):
        tiles_inside(grid, MultiPolygon([box(5000, 5000, 6000, 6000)]))


@pytest.mark.shared
def test_files_of_qupath(shared):
    folder = shared / "data" / "interop" / "qupath_geojson"
    areas = {path.stem: read_regions(path).area for path in sorted(folder.iterdir())}
    assert areas["qupath-rectangle"] == pytest.approx(210 * 176)
    assert areas["qupath-line"] == areas["qupath-point"] == areas["qupath-multipoint"] == 0
    assert all(np.isfinite(area) for area in areas.values())
    assert areas["qupath-core-polygon"] > 0


SQUARE = b'{"type":"Feature","geometry":{"type":"Polygon","coordinates":[[[0,0],[9,0],[9,9],[0,0]]]},"properties":{}},'
BOMBS = {
    "areas": (b"[" + SQUARE * 300_000 + b"{}]", "more than 100000 areas or 5000000 points"),
    "points": (b'{"type":"Polygon","coordinates":[[' + b"[1,2]," * 6_000_000 + b"[1,2]]]}", "more than 100000 areas"),
    "levels": (
        b'{"type":"Polygon","coordinates":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "levels than 64, the limit",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once_and_the_limit_is_named(tmp_path, name):
    data, words = BOMBS[name]
    (tmp_path / "a.geojson").write_bytes(data)
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=words):
        read_regions(tmp_path / "a.geojson")
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB


def test_many_features_of_other_classes_take_time_in_proportion(tmp_path):
    (tmp_path / "a.geojson").write_bytes(b"[" + SQUARE * 20_000 + SQUARE.replace(b"{}", b'{"name":"T"}')[:-1] + b"]")
    started = time.process_time()
    assert read_regions(tmp_path / "a.geojson", classes=["T"]).area == 40.5
    assert time.process_time() - started < 2

import json

import numpy as np
import pytest
from scenes import lattice
from shapely import MultiPolygon, box, geometry

from eosin.errors import ConfigError
from eosin.heatmaps.annotations import read_regions, tiles_inside


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
    with pytest.raises(ConfigError, match="no region is called Necrosis; the file has Stroma, Tumor, by hand"):
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


def test_damaged_geometry_and_missing_file(tmp_path):
    broken = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], ["x", 1]]]}, "properties": {}}
    with pytest.raises(ConfigError, match="damaged"):
        read_regions(write(tmp_path / "a.geojson", broken))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_regions(tmp_path / "gone.geojson")


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

import json

import numpy as np
import pytest
from shapely import MultiPolygon, Point, Polygon, box

from eosin.errors import SlideError
from eosin.wsi import _geojson as geojson
from eosin.wsi._geojson import outline_to_geojson, read_outline

AREAS = {
    "qupath-brush.json": True,
    "qupath-core-polygon.geojson": True,
    "qupath-ellipse.json": True,
    "qupath-line.json": False,
    "qupath-multipoint.json": False,
    "qupath-point.json": False,
    "qupath-polygon.json": True,
    "qupath-polyline.json": False,
    "qupath-rectangle.json": True,
    "qupath-wand.json": True,
}


@pytest.mark.shared
@pytest.mark.parametrize("name", AREAS)
def test_every_shape_of_qupath(shared, name):
    path = shared / "data" / "interop" / "qupath_geojson" / name
    if AREAS[name]:
        outline = read_outline(path)
        assert outline.area > 100
        assert outline.is_valid
    else:
        with pytest.raises(SlideError, match="no annotation with an area") as caught:
            read_outline(path)
        assert caught.value.code == "bad-contours"


@pytest.mark.shared
def test_a_rectangle_is_where_it_was_drawn(shared):
    path = shared / "data" / "interop" / "qupath_geojson" / "qupath-rectangle.json"
    assert read_outline(path).bounds == (26268, 15298, 26478, 15474)


@pytest.fixture
def read(tmp_path):
    def read(data, **options):
        path = tmp_path / "a.geojson"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return read_outline(path, **options)

    return read


def feature(shape, **properties):
    return {"type": "Feature", "geometry": json.loads(json.dumps(shape.__geo_interface__)), "properties": properties}


def test_what_is_written_is_read_back(read):
    outline = MultiPolygon([Polygon(box(0, 0, 100, 50).exterior, [box(10, 10, 20, 20).exterior]), box(200, 0, 300, 50)])
    text = outline_to_geojson(outline, slide_id="a", qupath_origin_px0=(30, 40))
    assert read(text, qupath_origin_px0=(30, 40)).equals(outline)


def test_lists_single_features_and_bare_geometries(read):
    square = box(0, 0, 10, 10)
    for data in ([feature(square)], feature(square), feature(square)["geometry"], {
        "type": "GeometryCollection", "geometries": [feature(square)["geometry"]],
    }):  # fmt: skip
        assert read(data).area == 100


def test_overlapping_annotations_are_united_and_ignored_ones_cut_out(read):
    data = [
        feature(box(0, 0, 10, 10), classification={"name": "Tissue", "color": [0, 0, 0]}),
        feature(box(5, 0, 15, 10), classification="Tumor"),
        feature(box(0, 0, 2, 10), classification={"name": "Ignore*", "color": [0, 0, 0]}),
        feature(box(100, 100, 200, 200), objectType="tile"),
        feature(box(100, 100, 200, 200), objectType="detection"),
    ]
    assert read(data).area == 130


def test_a_crossing_outline_is_repaired(read):
    bow_tie = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    assert read(bow_tie).area == pytest.approx(50)


def test_a_file_whose_objects_were_all_deleted_is_empty(read):
    assert read({"type": "FeatureCollection", "features": []}).is_empty


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", '{"type": "Feature"', '{"features": []}', '{"type": "Circle", "coordinates": [1]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [1, 0], [0, 0]]]}', "[" * 100_000,
        '{"type": "Polygon", "coordinates": [[[0, 0], [1e999, 1], [1, 0], [0, 0]]]}', "\xff\xfe",
        '{"type": "Polygon", "coordinates": [[[0, 0], ["a", 1], [1, 0], [0, 0]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}',
    ],
)  # fmt: skip
def test_what_is_no_outline_is_refused(read, text):
    with pytest.raises(SlideError) as caught:
        read(text)
    assert caught.value.code == "bad-contours"


def test_an_outline_that_crosses_itself_for_ever_is_given_up(read, monkeypatch):
    points = np.random.default_rng(0).random((4000, 2)) * 1e5  # some four million crossings
    tangled = {"type": "Polygon", "coordinates": [[*points.round(2).tolist(), points[0].round(2).tolist()]]}
    monkeypatch.setattr(geojson, "UNITE_S", 0.5)
    with pytest.raises(SlideError, match=r"uniting its 4,001 points failed: .*; simplify the outline") as caught:
        read(tangled)
    assert caught.value.code == "bad-contours"


def test_an_outline_of_many_points_is_united_in_another_process(read):
    circle = Point(0, 0).buffer(1000, quad_segs=500)
    assert read([feature(circle), feature(box(0, 0, 2000, 2000))]).area == pytest.approx(
        circle.area * 0.75 + 4e6, rel=1e-6
    )


def test_a_bomb_of_values_or_levels_is_refused(read):
    deep = {"type": "Polygon", "coordinates": json.loads("[" * 70 + "1" + "]" * 70)}
    with pytest.raises(SlideError, match="more than 64 levels, the limit"):
        read(deep)

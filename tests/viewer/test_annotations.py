import json

import numpy as np
import pytest
import shapely

from eosin.errors import ConfigError
from eosin.heatmaps._annotations import read_regions
from eosin.heatmaps.export._geojson import check_geojson
from eosin.viewer._annotations import Annotations, annotation_columns, require_apart

SQUARE = shapely.box(100, 100, 200, 300)


def test_annotations_are_files_that_qupath_and_eosin_read(studies, tmp_path):
    study, annotations = studies[0], Annotations(tmp_path)
    annotations.add(study, "  Tumour\n", SQUARE)
    annotations.add(study, "", shapely.box(400, 100, 450, 150))
    path = annotations.path("slide-1")
    assert path == tmp_path / "annotations/slide-1.geojson"
    features = check_geojson(path, size_px=study.grid.slide_size_px0)
    assert [one["properties"]["name"] for one in features] == ["Tumour", "Region"]
    assert read_regions(path, classes=["Tumour"]).equals(SQUARE)
    first, _ = Annotations(tmp_path).of(study)
    assert (first.name, first.area.area) == ("Tumour", SQUARE.area)
    assert first.in_words(0.5) == "Tumour (0.005 mm²)"


def test_what_others_wrote_into_a_file_stays_in_it(studies, tmp_path):
    study, annotations = studies[0], Annotations(tmp_path)
    cell = {"type": "Feature", "id": "c", "geometry": {"type": "Point", "coordinates": [1, 2]},
            "properties": {"objectType": "detection", "measurements": {"a": 1}}}  # fmt: skip
    square = json.loads(shapely.to_geojson(SQUARE))
    hand = {"type": "Feature", "geometry": square, "properties": {"name": "By hand"}}
    path = annotations.path("slide-1")
    path.parent.mkdir()
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [cell, hand]}))
    mine = annotations.add(study, "Mine", shapely.box(0, 0, 9, 9))
    assert [one.name for one in annotations.of(study)] == ["By hand", "Mine"]
    annotations.remove(study, mine)
    assert json.loads(path.read_text())["features"] == [cell, hand]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"type": "FeatureCollection", "features": 3}', "[" * 100_000])
def test_a_damaged_file_is_reported_and_never_overwritten(studies, tmp_path, text):
    annotations = Annotations(tmp_path)
    path = annotations.path("slide-1")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"slide-1\.geojson: .*cannot be read"):
        annotations.add(studies[0], "Tumour", SQUARE)
    assert path.read_text() == text


def test_drawings_are_cut_to_the_slide_and_repaired(studies):
    study, annotations = studies[0], Annotations(None)
    width, height = study.grid.slide_size_px0
    annotations.add(study, "edge", shapely.box(-50, -50, 10, 20))
    annotations.add(study, "bow", shapely.Polygon([(0, 0), (100, 100), (100, 0), (0, 100)]))
    edge, bow = annotations.of(study)
    assert edge.area.bounds == (0, 0, 10, 20)
    assert bow.area.is_valid
    assert bow.area.area == pytest.approx(5000)
    with pytest.raises(ConfigError, match="no area on the slide"):
        annotations.add(study, "beside", shapely.box(width, height, width + 5, height + 5))
    assert annotations.path("slide-1") is None
    assert annotations.of(studies[1]) == []


def test_coordinates_are_those_of_the_scanned_box(studies, tmp_path, monkeypatch):
    study, annotations = studies[0], Annotations(tmp_path)
    monkeypatch.setitem(vars(study), "bounds_px0", (50, 60, 200, 400))
    annotations.add(study, "Tumour", SQUARE)
    (feature,) = check_geojson(annotations.path("slide-1"), size_px=(200, 400))
    assert shapely.geometry.shape(feature["geometry"]).bounds == (50, 40, 150, 240)
    assert annotations.of(study)[0].area.bounds == SQUARE.bounds


def test_holes_are_drawn_without_a_second_name(studies):
    study, annotations = studies[0], Annotations(None)
    annotations.add(study, "ring", shapely.box(0, 0, 100, 100).difference(shapely.box(40, 40, 60, 60)))
    columns = annotation_columns(annotations.of(study), 0.5)
    assert columns["name"] == ["ring", ""]
    assert np.max(columns["xs"][0]) == 50


def test_the_folder_of_the_slides_is_never_written_to(tmp_path):
    slides = [tmp_path / "a.tiff"]
    require_apart(None, slides)
    require_apart(tmp_path / "sessions", slides)
    with pytest.raises(ConfigError, match="folder of the slides"):
        require_apart(tmp_path / "x/..", slides)

"""What `eosin export` writes for other programs, read again by the rules of those programs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eosin.errors import ConfigError, UnknownNameError
from eosin.heatmaps.export._geojson import check_geojson
from eosin.heatmaps.export._qupath import BIOFORMATS, PROJECT, SCRIPT, TILES, Project, check_project, image_of
from eosin.heatmaps.export._tiles import SlideTiles
from eosin.pipeline._data_out import add_to_project, collect_tiles, export_tiles, require_layout
from eosin.wsi._slide_file import SlideFile

TILE = 5 * 16 + 9


def test_a_wide_table_has_facts_maps_prediction_and_features(scene, model_folder, tmp_path) -> None:
    _, _, bag = scene
    (path,) = export_tiles(collect_tiles(bag, model_folder), tmp_path, "csv")
    table = pd.read_csv(path)
    assert path.name == "slide-1.csv"
    np.testing.assert_array_equal(table[["x_px0", "y_px0"]], bag.grid.origins_px0)
    np.testing.assert_allclose(table[[f"test_{k}" for k in range(6)]], bag.features, rtol=1e-6)
    assert table.alone.idxmax() == TILE
    assert set(table.slide_predicted) == {"tumour"}
    assert table.slide_prob_tumour.nunique() == 1
    assert table.slide_prob_tumour[0] > 0.5


def test_without_a_model_a_table_has_the_features_alone(scene, tmp_path) -> None:
    _, _, bag = scene
    (path,) = export_tiles(collect_tiles(bag), tmp_path, "parquet")
    expected = ["slide_id", "x_px0", "y_px0", "size_px0", *(f"test_{k}" for k in range(6))]
    assert list(pd.read_parquet(path).columns) == expected


def test_features_without_coordinates_have_names_of_rows(scene) -> None:
    tiles = SlideTiles(replace(scene[2], grid=None))
    assert tiles.names[:2] == ["slide-1_0", "slide-1_1"]
    assert list(tiles.facts().columns) == ["slide_id"]


@pytest.fixture
def project(scene, model_folder, tmp_path) -> Path:
    write(scene, model_folder, tmp_path / "qupath")
    return tmp_path / "qupath"


def write(scene, model_folder, folder: Path, *slides: SlideFile) -> None:
    begun = Project.open(folder)
    for slide in slides or (scene[1],):
        add_to_project(begun, slide, collect_tiles(scene[2], model_folder))
    begun.save()


def test_a_project_follows_the_rules_of_qupath(scene, project) -> None:
    content = json.loads((project / PROJECT).read_text(encoding="utf-8"))
    check_project(content)
    (entry,) = content["images"]
    assert entry["imageName"] == "slide-1"
    assert entry["serverBuilder"] == {
        "builderType": "uri",
        "providerClassName": BIOFORMATS,  # a plain TIFF
        "uri": scene[1].path.resolve().as_uri(),
        "args": [],
    }
    assert entry["metadata"]["predicted"] == "tumour"
    tiles = check_geojson(project / "data" / str(entry["entryID"]) / TILES, size_px=(640, 480))
    assert len(tiles) == scene[2].n_instances
    script = (project / SCRIPT).read_text(encoding="utf-8")
    assert "def sizes = ['1': [640, 480]]" in script
    assert f"resolve('{TILES}')" in script


def test_what_a_user_adds_to_a_project_stays(scene, model_folder, project, tmp_path) -> None:
    path = project / PROJECT
    content = json.loads(path.read_text(encoding="utf-8"))
    entry = content["images"][0]
    entry |= {"imageName": "renamed", "description": "second look", "tags": ["seen"]}
    entry["metadata"]["reader"] = "ab"
    other = json.loads(json.dumps(entry)) | {"entryID": 7, "imageName": "another"}
    other["serverBuilder"]["uri"] = "file:///elsewhere/b.svs"
    content["images"].append(other)
    content |= {"lastID": 9, "version": "0.8.0"}
    path.write_text(json.dumps(content), encoding="utf-8")
    (project / "data" / "1" / "data.qpdata").write_bytes(b"annotations")

    copy = tmp_path / "copy.tiff"
    copy.write_bytes(scene[1].path.read_bytes())
    write(scene, model_folder, project, scene[1], SlideFile(copy, "slide-1"))

    now = json.loads(path.read_text(encoding="utf-8"))
    by_number = {one["entryID"]: one for one in now["images"]}
    assert set(by_number) == {1, 7, 10}, "a number is never used again: it names the folder of a user's work"
    kept = {"imageName": "renamed", "description": "second look", "tags": ["seen"]}
    assert by_number[1].items() >= kept.items()
    assert by_number[1]["metadata"]["reader"] == "ab"
    assert by_number[7] == other
    assert (now["version"], now["createTimestamp"]) == ("0.8.0", content["createTimestamp"])
    assert (project / "data" / "1" / "data.qpdata").read_bytes() == b"annotations"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"createTimestamp": "yesterday"}, "createTimestamp"),
        ({"lastID": None}, "no version and lastID"),
        ({"images": [{"entryID": 0}]}, "entryID 0"),
        ({"images": [{"entryID": 1, "imageName": "a"}]}, "no serverBuilder"),
    ],
)
def test_a_file_that_is_not_a_project_is_not_overwritten(project, change, fault) -> None:
    path = project / PROJECT
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ConfigError, match=fault):
        Project.open(project)


def test_a_slide_with_a_scanned_box_has_the_size_of_the_box(scene, model_folder) -> None:
    with scene[1].open() as slide:
        slide.bounds_px0 = (40, 80, 200, 160)
        assert image_of(slide, SlideTiles(scene[2])).size_px == (200, 160)


@pytest.mark.parametrize(
    ("to", "is_judged", "has_slides", "maps", "error"),
    [
        ("h5mu", True, True, None, UnknownNameError),
        ("qupath", False, True, None, ConfigError),
        ("qupath", True, False, None, ConfigError),
        ("clam", True, True, "alone", ConfigError),
        ("csv", False, False, "alone", ConfigError),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(to, is_judged, has_slides, maps, error) -> None:
    with pytest.raises(error):
        require_layout(to, is_judged=is_judged, has_slides=has_slides, maps=maps)

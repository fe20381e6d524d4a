import json
import tracemalloc
import uuid

import numpy as np
import pytest
from scenes import lattice, marked_map

from eosin.heatmaps._colour import scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._geojson import check_geojson, write_geojson


def corners(feature):
    ring = np.array(feature["geometry"]["coordinates"][0])
    return [*ring.min(0).tolist(), *ring.max(0).tolist()]


def attention(feature):
    return feature["properties"]["measurements"]["attention"]


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("slide_mpp", [0.25, 0.2428])
def test_marked_tile_is_the_object_with_the_high_measurement(tmp_path, mpp, slide_mpp):
    grid = lattice(size_px0=(1403, 1101), slide_mpp=slide_mpp, mpp=mpp, patch_size=32)
    tile = grid.n_tiles // 2
    heatmap = marked_map(grid, tile)
    write_geojson(tmp_path / "a.geojson", [heatmap, heatmap.percentile()], slide_id="s")

    features = check_geojson(tmp_path / "a.geojson", size_px=(1403, 1101))
    assert len(features) == grid.n_tiles
    (lit,) = [feature for feature in features if attention(feature) == 1]
    assert corners(lit) == grid.boxes_px0()[tile].tolist()
    assert lit["properties"]["measurements"]["attention_percentile"] == 100
    assert all(type(x) is int for feature in features for x in np.ravel(feature["geometry"]["coordinates"]).tolist())


def test_scanned_box_becomes_the_origin_and_tiles_are_clipped_to_it(tmp_path):
    grid = lattice(size_px0=(1200, 900), slide_mpp=0.5, patch_size=60)
    tile = 7 * 20 + 11
    write_geojson(tmp_path / "a.geojson", [marked_map(grid, tile)], slide_id="s", bounds_px0=(307, 211, 701, 503))
    features = check_geojson(tmp_path / "a.geojson", size_px=(701, 503))
    (lit,) = [feature for feature in features if attention(feature) == 1]
    x0, y0, x1, y1 = grid.boxes_px0()[tile].tolist()
    assert corners(lit) == [x0 - 307, y0 - 211, x1 - 307, y1 - 211]
    assert min(corners(feature)[0] for feature in features) == 0
    assert max(corners(feature)[2] for feature in features) == 701


def test_padded_tiles_end_where_the_slide_ends(tmp_path):
    grid = lattice(size_px0=(403, 301), slide_mpp=0.5, patch_size=64, edges="pad")
    heatmap = marked_map(grid, grid.n_tiles - 1)
    write_geojson(tmp_path / "a.geojson", [heatmap], slide_id="s")
    (lit,) = [one for one in check_geojson(tmp_path / "a.geojson", size_px=(403, 301)) if attention(one) == 1]
    assert corners(lit) == [384, 256, 403, 301]
    raster = heatmap.raster(32.0)
    assert raster.shape == (5, 7)
    assert raster[-1, -1] == 1
    assert np.isfinite(raster).all()


def test_colour_is_that_of_the_shared_scale(tmp_path):
    grid = lattice(size_px0=(400, 400), slide_mpp=0.5, patch_size=40)
    heatmap = Heatmap(np.linspace(0, 1, grid.n_tiles), grid, "attention", "attention").percentile()
    write_geojson(tmp_path / "a.geojson", [heatmap], slide_id="s")
    features = check_geojson(tmp_path / "a.geojson", size_px=(400, 400))
    scale = scale_of(heatmap)
    assert features[-1]["properties"]["classification"]["color"] == scale.rgb(np.array([95.0]))[0].tolist()
    assert features[0]["properties"]["classification"]["color"] == scale.rgb(np.array([5.0]))[0].tolist()
    names = {feature["properties"]["classification"]["name"] for feature in features}
    assert len(names) == 10


def test_uuids_are_the_same_every_time_and_differ_between_slides(tmp_path):
    grid = lattice(size_px0=(400, 400), slide_mpp=0.5, patch_size=40)
    for name, slide_id in (("a", "s"), ("b", "s"), ("c", "t")):
        write_geojson(tmp_path / f"{name}.geojson", [marked_map(grid, 0)], slide_id=slide_id)
    first, again, other = ((tmp_path / f"{name}.geojson").read_bytes() for name in "abc")
    assert first == again
    ids = [{feature["id"] for feature in json.loads(text)["features"]} for text in (first, other)]
    assert not ids[0] & ids[1]
    assert all(uuid.UUID(one).version == 5 for one in ids[0])


def test_top_keeps_the_highest(tmp_path):
    grid = lattice(size_px0=(400, 400), slide_mpp=0.5, patch_size=40)
    heatmap = Heatmap(np.arange(grid.n_tiles) * 1.0, grid, "attention", "attention")
    write_geojson(tmp_path / "a.geojson", [heatmap], slide_id="s", top=7)
    features = check_geojson(tmp_path / "a.geojson", size_px=(400, 400))
    assert sorted(attention(feature) for feature in features) == [93, 94, 95, 96, 97, 98, 99]


def test_no_tiles_give_an_empty_collection(tmp_path):
    grid = lattice(size_px0=(400, 400), slide_mpp=0.5, patch_size=40).select(np.zeros(0, dtype=int))
    write_geojson(tmp_path / "a.geojson", [Heatmap(np.zeros(0), grid, "attention", "attention")], slide_id="s")
    assert check_geojson(tmp_path / "a.geojson", size_px=(400, 400)) == []


def test_many_tiles_are_streamed(tmp_path):
    grid = lattice(size_px0=(2800, 2800), slide_mpp=0.5, patch_size=20)
    heatmap = Heatmap(np.random.default_rng(0).random(grid.n_tiles), grid, "attention", "attention")
    tracemalloc.start()
    write_geojson(tmp_path / "a.geojson", [heatmap], slide_id="s")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "a.geojson").stat().st_size
    assert size > 5e6
    assert peak < size / 2


def test_maps_of_other_grids_or_the_same_kind_are_refused(tmp_path):
    grid, other = (lattice(size_px0=(400, 400), slide_mpp=0.5, patch_size=40) for _ in range(2))
    with pytest.raises(ValueError, match="same grid"):
        write_geojson(tmp_path / "a.geojson", [marked_map(grid, 0), marked_map(other, 0).percentile()], slide_id="s")
    with pytest.raises(ValueError, match="different kinds"):
        write_geojson(tmp_path / "a.geojson", [marked_map(grid, 0), marked_map(grid, 1)], slide_id="s")
    assert not list(tmp_path.iterdir())


def good_feature():
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "x")),
        "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]},
        "properties": {
            "objectType": "tile",
            "classification": {"name": "a", "color": [1, 2, 3]},
            "measurements": {"a": 1.0},
        },
    }


def break_feature(path, value):
    feature = good_feature()
    node = feature
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return feature


@pytest.mark.parametrize(
    ("feature", "fault"),
    [
        (break_feature(("properties", "objectType"), "patch"), "objectType"),
        (break_feature(("properties", "classification"), {"name": "a"}), "colour"),
        (break_feature(("properties", "classification", "color"), [0, 0, 256]), "colour"),
        (break_feature(("properties", "measurements"), {"a": float("nan")}), "NaN"),
        (break_feature(("properties", "measurements"), {"a": "high"}), "finite"),
        (break_feature(("geometry", "coordinates"), [[[0, 0], [9, 0], [9, 9], [0, 1]]]), "closed"),
        (break_feature(("geometry", "coordinates"), [[[0, 0], [11, 0], [9, 9], [0, 0]]]), "outside"),
        (break_feature(("id",), "PathTileObject"), "badly formed"),
    ],
)
def test_what_qupath_would_not_read_is_found(tmp_path, feature, fault):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [good_feature()]}))
    assert len(check_geojson(path, size_px=(10, 10))) == 1
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    with pytest.raises(ValueError, match=fault):
        check_geojson(path, size_px=(10, 10))


def test_repeated_ids_and_unequal_measurements_are_found(tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [good_feature(), good_feature()]}))
    with pytest.raises(ValueError, match="unique"):
        check_geojson(path, size_px=(10, 10))
    second = break_feature(("properties", "measurements"), {"b": 1.0}) | {"id": str(uuid.uuid4())}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [good_feature(), second]}))
    with pytest.raises(ValueError, match="measurement names"):
        check_geojson(path, size_px=(10, 10))

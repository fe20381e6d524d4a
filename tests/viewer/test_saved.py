import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin._seals import KEY, sealed
from eosin.errors import ConfigError
from eosin.heatmaps._annotations import read_regions, tiles_inside
from eosin.heatmaps.export._geojson import check_geojson
from eosin.viewer._saved import (
    from_ranges,
    is_same,
    read_session,
    replay_session,
    replay_sessions,
    save_session,
    to_ranges,
)
from eosin.viewer._session import Edited

GONE = np.array([5, 6, 7, 22, 23, 89, 191])


@given(st.sets(st.integers(0, 300)))
def test_ranges_say_the_same_tiles(tiles):
    index = np.array(sorted(tiles), dtype=np.int64)
    ranges = to_ranges(index)
    np.testing.assert_array_equal(from_ranges(ranges, 301, "file"), index)
    assert all(a[1] < b[0] for a, b in pairwise(ranges))


@pytest.fixture
def saved(catalogue, studies, tmp_path):
    edited = Edited.untouched(studies[0]).act("remove", GONE).transplant(studies[1], np.array([0, 1, 50]))
    return edited, save_session(catalogue, edited, "tumour", tmp_path)


def test_a_saved_session_gives_the_same_numbers_again(catalogue, saved):
    edited, (path, *_) = saved
    record = read_session(path)
    again = replay_session(catalogue, path)
    assert is_same(record, again)
    assert again == record
    np.testing.assert_allclose(again.after.logits, edited.logits())
    told = []
    (copy,) = replay_sessions(catalogue, [path], path.parent / "again", tell=told.append)
    assert told[0].endswith("[as saved]")
    assert json.loads(copy.read_text()) == json.loads(path.read_text())


def test_a_replay_says_when_numbers_differ(catalogue, saved):
    _, (path, *_) = saved
    data = json.loads(path.read_text())
    data["after"]["logits"][0] += 0.1
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="damaged or was changed by hand"):
        read_session(path)
    path.write_text(json.dumps(sealed({name: value for name, value in data.items() if name != "checksum"})))
    told = []
    replay_sessions(catalogue, [path], path.parent, tell=told.append)
    assert told[0].endswith("[NOT as saved]")


def test_saving_twice_keeps_both(catalogue, saved):
    edited, (path, *_) = saved
    assert save_session(catalogue, edited, "tumour", path.parent)[0].name == "slide-1_2.json"
    assert path.name == "slide-1_1.json"


def test_regions_open_in_qupath_and_name_the_same_tiles(saved, studies):
    _, (_, regions, added) = saved
    wanted = ((regions, GONE, "Removed", studies[0]), (added, [0, 1, 50], "Added", studies[1]))
    for path, tiles, name, study in wanted:
        features = check_geojson(path, size_px=study.grid.slide_size_px0)
        assert {one["properties"]["classification"]["name"] for one in features} == {name}
        found = tiles_inside(study.grid, read_regions(path))
        np.testing.assert_array_equal(np.sort(found), tiles)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_id": "0" * 16}, "was saved with the model"),
        ({"kind": "other"}, "not a saved session"),
        ({"version": 4}, "version"),
        ({"class_name": "zebra"}, "zebra"),
        ({"removed": {"slide_id": "slide-9", "n_tiles": 192, "tiles": []}}, "not in --slides"),
        ({"removed": {"slide_id": "slide-1", "n_tiles": 191, "tiles": []}}, "differ from those"),
        ({"removed": {"slide_id": "slide-1", "n_tiles": 192, "tiles": [[0, 193]]}}, "the slide has 192"),
        ({"removed": {"slide_id": "slide-1", "n_tiles": 192, "tiles": [[0, 192]]}}, "keep at least one"),
        (
            {"removed": {"slide_id": "slide-1", "slide_fingerprint": "f", "n_tiles": 192, "tiles": []}},
            "differ from those",
        ),
    ],
)
def test_a_session_of_something_else_is_refused(catalogue, saved, change, words):
    _, (path, *_) = saved
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps(sealed({name: value for name, value in data.items() if name != "checksum"})))
    with pytest.raises(ConfigError, match=words):
        replay_session(catalogue, path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", '{"kind": "eosin-viewer-session"}'])
def test_what_is_no_session_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError):
        read_session(tmp_path / "a.json")


def test_sessions_of_older_versions_with_one_donor_are_repeated(catalogue, saved):
    _, (path, *_) = saved
    data = json.loads(path.read_text())
    data = {**data, "version": 2, "added": data["added"][0]}
    path.write_text(json.dumps(sealed({name: value for name, value in data.items() if name != KEY})))
    assert is_same(read_session(path), replay_session(catalogue, path))


def test_a_session_of_two_donors_keeps_both(catalogue, studies, tmp_path):
    third = dataclasses.replace(studies[1], listed=dataclasses.replace(studies[1].listed, key="other"))
    vars(third)["bounds_px0"] = None
    edited = Edited.untouched(studies[0]).transplant(studies[1], np.array([0, 1])).transplant(third, np.array([4]))
    paths = save_session(catalogue, edited, "tumour", tmp_path)
    assert [path.name for path in paths[2:]] == ["slide-1_1_added.geojson", "slide-1_1_added_2.geojson"]
    assert [one.tiles for one in read_session(paths[0]).added] == [[(0, 2)], [(4, 5)]]
    np.testing.assert_allclose(replay_session(catalogue, paths[0]).after.logits, edited.logits())

import time
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

from eosin._seals import seal_image
from eosin.errors import FeatureFileError
from eosin.wsi import _coordinates as coordinates
from eosin.wsi._coordinates import CoordsFooter, nominal_magnification, read_footer, read_grid, write_grid
from eosin.wsi._grid import TileGrid, Tiling


@pytest.fixture
def grid():
    origins = np.array([[0, 0], [512, 0], [0, 512]], np.int64)
    return TileGrid(origins, 512, Tiling(mpp=0.5, patch_size=256), (5000, 4000), 0.2501)


@pytest.fixture
def path(tmp_path, grid):
    path = tmp_path / "a b_patches.h5"
    write_grid(path, grid, slide_id="a b", mpp_source="user", fingerprint="f" * 16, options_hash="0" * 16)
    return path


def test_round_trip(path, grid):
    found = read_grid(path)
    assert np.array_equal(found.origins_px0, grid.origins_px0)
    assert (found.tile_px0, found.tiling, found.slide_size_px0, found.slide_mpp) == (
        grid.tile_px0, grid.tiling, grid.slide_size_px0, grid.slide_mpp,
    )  # fmt: skip
    assert read_footer(path) == CoordsFooter("a b", "user", "f" * 16, "0" * 16)


def test_trident_finds_its_attributes(path):
    with h5py.File(path) as file:
        coords, attributes = file["coords"], dict(file["coords"].attrs)
        assert coords.dtype == np.int64
        assert coords.shape == (3, 2)
    expected = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "name": "a b", "level0_width": 5000, "level0_height": 4000,
    }  # fmt: skip
    assert {name: attributes[name] for name in expected} == expected
    assert attributes["savetodir"] == "."  # folder names can be names of people


def test_no_tiles_is_a_normal_content(tmp_path, grid):
    path = tmp_path / "empty.h5"
    write_grid(path, grid.select([]), slide_id="e", mpp_source="user", fingerprint="")
    assert read_grid(path).origins_px0.shape == (0, 2)


def test_one_writing_equals_the_next(tmp_path, grid, path):
    again = tmp_path / "again.h5"
    write_grid(again, grid, slide_id="a b", mpp_source="user", fingerprint="f" * 16, options_hash="0" * 16)
    assert again.read_bytes() == path.read_bytes()


@contextmanager
def edited(path):
    """Change a file with HDF5 and give it a checksum that fits."""
    with h5py.File(path, "r+") as file:
        yield file
    image = bytearray(path.read_bytes())
    seal_image(image, rows_at=len(image), rows_bytes=0)
    path.write_bytes(image)


def test_rows_have_a_checksum_of_their_own(path):
    with edited(path) as file:
        file["coords"][1, 0] = 513
    with pytest.raises(FeatureFileError, match="do not match their checksum"):
        read_grid(path)


@pytest.mark.long
def test_every_flipped_byte_is_noticed_before_hdf5_sees_the_file(path, monkeypatch):
    data = path.read_bytes()
    monkeypatch.setattr(h5py, "File", None)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(FeatureFileError):
            read_grid(path)


@pytest.mark.parametrize("length", [0, 7, 40, 511, 512, -1])
def test_a_cut_file_is_noticed(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FeatureFileError):
        read_grid(path)


def test_a_file_of_0_1_has_no_preamble_and_is_read(path, tmp_path, grid):
    old = tmp_path / "old_patches.h5"
    with h5py.File(path) as file, h5py.File(old, "w") as copy:
        file.copy("coords", copy)
    assert np.array_equal(read_grid(old).origins_px0, grid.origins_px0)


def test_truncated_missing_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(FeatureFileError, match="no such file"):
        read_grid(tmp_path / "none.h5")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(FeatureFileError, match="cut off or extended"):
        read_grid(path)
    foreign = tmp_path / "clam.h5"
    with h5py.File(foreign, "w") as file:
        file["coords"] = np.zeros((3, 2), np.int64)
    with pytest.raises(FeatureFileError, match="eosin import"):
        read_grid(foreign)
    with h5py.File(foreign, "w") as file:
        file["features"] = np.zeros((3, 2))
    with pytest.raises(FeatureFileError, match="no dataset named coords"):
        read_footer(foreign)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("encoding-version", "9", "version 9"),
        ("tiling", "{", "damaged"),
        ("tiling", '{"overlap": 900}', "damaged"),
    ],
)
def test_other_versions_and_damaged_attributes_are_refused(path, name, value, words):
    with edited(path) as file:
        file["coords"].attrs[name] = value
    with pytest.raises(FeatureFileError, match=words):
        read_grid(path)


def test_a_declared_size_beyond_the_limit_is_refused_before_reading(path):
    with edited(path) as file:
        attributes = dict(file["coords"].attrs)
        del file["coords"]
        bomb = file.create_dataset("coords", (10**12, 2), np.int64, chunks=(1024, 2))
        bomb.attrs.update(attributes)
    with pytest.raises(FeatureFileError, match="at most"):
        read_grid(path)


@pytest.mark.parametrize(("mpp", "power"), [(0.12, 80), (0.25, 40), (0.5, 20), (1.0, 10), (2.0, 5), (8.0, 1)])
def test_nominal_magnification(mpp, power):
    assert nominal_magnification(mpp) == power


@pytest.mark.long
def test_a_file_of_0_1_on_which_hdf5_hangs_is_a_damaged_file(monkeypatch):
    path = Path(__file__).parents[3] / "shared/cases/damage/hang_coords.h5"
    if not path.exists():
        pytest.skip(f"no {path}")
    monkeypatch.setattr(coordinates, "PROBE_S", 15.0)
    with pytest.raises(FeatureFileError, match="coordinates cannot be read: the process that tried"):
        read_grid(path)


def test_a_file_of_0_1_that_makes_its_reader_hang_is_given_up(path, tmp_path, monkeypatch):
    old = tmp_path / "old_patches.h5"
    with h5py.File(path) as file, h5py.File(old, "w") as copy:
        file.copy("coords", copy)
    monkeypatch.setattr(coordinates, "_probe", hang)
    monkeypatch.setattr(coordinates, "PROBE_S", 3.0)
    with pytest.raises(FeatureFileError, match="the process that tried"):
        read_grid(old)


def hang(_path):
    time.sleep(600)

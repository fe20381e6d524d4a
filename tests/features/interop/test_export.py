"""Our files in the layouts of TRIDENT and CLAM, read the way those tools read."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eosin.errors import ConfigError, FeatureFileError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import read_bag, write_bag
from eosin.features.interop import ImportOptions, export_bag, import_file
from eosin.wsi._coordinates import read_grid
from eosin.wsi._grid import TileGrid, Tiling


def make_bag(n: int, *, patch: int = 256, mpp: float = 0.5, slide_mpp: float = 0.25, overlap: int = 0) -> FeatureBag:
    rng = np.random.default_rng(n)
    tiling = Tiling(mpp=mpp, patch_size=patch, overlap=overlap, min_tissue=0.0)
    side = round(patch * mpp / slide_mpp)
    origins = rng.integers(0, 40000, (n, 2)).astype(np.int64)
    grid = TileGrid(origins, side, tiling, (50000, 60000), slide_mpp)
    spec = FeatureSpec(encoder="uni_v1", dim=8, mpp=mpp, patch_size=patch)
    return FeatureBag(rng.normal(size=(n, 8)).astype(np.float32), spec, "s.1", grid, {})


def test_as_trident_reads(tmp_path: Path) -> None:
    bag = make_bag(5)
    write_bag(tmp_path / "s.1.h5", bag)
    patches, features = export_bag(tmp_path / "s.1.h5", tmp_path / "job", "trident")
    assert patches == tmp_path / "job" / "20x_256px_0px_overlap" / "patches" / "s.1_patches.h5"
    assert features == tmp_path / "job" / "20x_256px_0px_overlap" / "features_uni_v1" / "s.1.h5"
    for path in (patches, features):
        with h5py.File(path) as file:
            coords = file["coords"]
            assert (coords.dtype, coords.chunks, coords.maxshape) == (np.int64, (1, 2), (None, 2))
            expected = {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "name": "s.1"}
            expected |= {"target_magnification": 20, "overlap": 0, "level0_width": 50000, "level0_height": 60000}
            assert {name: coords.attrs[name] for name in expected} == expected
    with h5py.File(features) as file:
        assert (file["features"].dtype, file["features"].chunks) == (np.float32, (1, 8))
        assert file["features"].attrs["encoder"] == "uni_v1"
        np.testing.assert_array_equal(file["features"][:], bag.features)


def test_as_clam_reads(tmp_path: Path) -> None:
    bag = make_bag(40)
    write_bag(tmp_path / "s.1.h5", bag)
    h5, tensor, patches = export_bag(tmp_path / "s.1.h5", tmp_path / "clam", "clam")
    assert [path.parent.name for path in (h5, tensor, patches)] == ["h5_files", "pt_files", "patches"]
    with h5py.File(h5) as file:
        assert (file["coords"].dtype, file["features"].dtype) == (np.int32, np.float32)
        assert dict(file["coords"].attrs) == {}
        assert file["features"].chunks == (32, 8)
        np.testing.assert_array_equal(file["coords"][:], bag.grid.origins_px0)
    np.testing.assert_array_equal(torch.load(tensor, weights_only=True).numpy(), bag.features)
    with h5py.File(patches) as file:
        coords = file["coords"]
        assert (coords.dtype, coords.chunks, coords.maxshape) == (np.int64, (1, 2), (None, 2))
        assert (coords.attrs["patch_level"], coords.attrs["patch_size"], coords.attrs["name"]) == (0, 256, "s.1")
        assert coords.attrs["level_dim"].tolist() == [50000, 60000]
        assert coords.attrs["custom_downsample"] == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 30), patch=st.sampled_from([224, 256]), scale=st.sampled_from([0.9, 1.0, 1.5, 2.0, 4.0]))
def test_clam_and_back(tmp_path: Path, n: int, patch: int, scale: float) -> None:
    bag = make_bag(n, patch=patch, mpp=0.25 * scale, slide_mpp=0.25)
    write_bag(tmp_path / "s.1.h5", bag)
    h5, tensor, patches = export_bag(tmp_path / "s.1.h5", tmp_path / "clam", "clam")
    options = ImportOptions(slide_mpp=0.25, encoder="uni_v1", coords=patches)
    for number, path in enumerate((h5, tensor)):
        back = read_bag(import_file(path, tmp_path / f"back{number}-{scale}-{patch}", options).paths[0])
        np.testing.assert_array_equal(back.features, bag.features)
        assert back.grid is not None
        np.testing.assert_array_equal(back.grid.origins_px0, bag.grid.origins_px0)
        assert (back.grid.tile_px0, back.grid.slide_size_px0) == (bag.grid.tile_px0, (50000, 60000))
        if bag.grid.tile_px0 % patch == 0:
            assert back.spec.mpp == pytest.approx(bag.spec.mpp)
            assert back.spec.patch_size == patch


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 30),
    patch=st.sampled_from([224, 256, 512]),
    scale=st.sampled_from([0.9, 1.0, 2.0, 4.0]),
    slide_mpp=st.floats(0.12, 1.0).map(lambda mpp: round(mpp, 4)),
    overlap=st.integers(0, 100),
)
def test_trident_and_back(tmp_path: Path, n: int, patch: int, scale: float, slide_mpp: float, overlap: int) -> None:
    bag = make_bag(n, patch=patch, mpp=slide_mpp * scale, slide_mpp=slide_mpp, overlap=overlap)
    write_bag(tmp_path / "s.1.h5", bag)
    patches, features = export_bag(tmp_path / "s.1.h5", tmp_path / "job", "trident")
    options = ImportOptions(slide_mpp=slide_mpp)
    back = read_bag(import_file(features, tmp_path / "back", options).paths[0])
    grids = [back.grid, read_grid(import_file(patches, tmp_path / "back", options).paths[0])]
    np.testing.assert_array_equal(back.features, bag.features)
    assert back.spec.encoder == bag.spec.encoder
    for grid in grids:
        assert grid is not None
        np.testing.assert_array_equal(grid.origins_px0, bag.grid.origins_px0)
        assert (grid.tile_px0, grid.slide_size_px0, grid.slide_mpp) == (bag.grid.tile_px0, (50000, 60000), slide_mpp)
        assert (grid.tiling.patch_size, grid.tiling.overlap) == (patch, overlap)
        assert grid.tiling.mpp == pytest.approx(bag.grid.tiling.mpp, rel=0.01)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stamp_and_back(tmp_path: Path, dtype: type) -> None:
    bag = make_bag(40, patch=224, mpp=256 / 224, slide_mpp=0.5)
    bag = replace(bag, features=bag.features.astype(dtype))
    write_bag(tmp_path / "s.1.h5", bag)
    (path,) = export_bag(tmp_path / "s.1.h5", tmp_path / "stamp", "stamp")
    assert path == tmp_path / "stamp/uni_v1/s.1.h5"
    with h5py.File(path) as file:
        assert (file["coords"].dtype, file["feats"].dtype) == (np.float32, dtype)
        np.testing.assert_allclose(file["coords"][:], bag.grid.origins_px0 * 0.5)
        stated = {name: file.attrs[name] for name in ("unit", "tile_size_um", "tile_size_px", "feat_type", "extractor")}
    assert stated == {
        "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "feat_type": "tile", "extractor": "uni_v1",
    }  # fmt: skip
    back = read_bag(import_file(path, tmp_path / "back", ImportOptions(slide_mpp=0.5)).paths[0])
    np.testing.assert_array_equal(back.grid.origins_px0, bag.grid.origins_px0)
    np.testing.assert_array_equal(back.features, bag.features)
    assert (back.grid.tile_px0, back.spec.patch_size, back.spec.encoder) == (512, 224, "uni_v1")


def test_features_without_places_have_no_such_layout(tmp_path: Path) -> None:
    write_bag(tmp_path / "m.h5", FeatureBag(np.ones((2, 3), np.float32), FeatureSpec(encoder="npz:x", dim=3), "m"))
    for layout in ("trident", "clam", "stamp"):
        with pytest.raises(FeatureFileError, match="without tile coordinates"):
            export_bag(tmp_path / "m.h5", tmp_path / "out", layout)
    with pytest.raises(ConfigError, match="no export layout 'zarr'"):
        export_bag(tmp_path / "m.h5", tmp_path / "out", "zarr")

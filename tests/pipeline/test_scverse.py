"""AnnData and SpatialData, read with their own libraries; `make scverse` runs this."""

import numpy as np
import pytest

from eosin.pipeline._data_out import collect_tiles, export_tiles

pytestmark = pytest.mark.scverse
TILE = 5 * 16 + 9


def test_anndata_reads_the_tiles(scene, model_folder, tmp_path) -> None:
    import anndata

    _, _, bag = scene
    (path,) = export_tiles(collect_tiles(bag, model_folder), tmp_path, "anndata")
    table = anndata.read_h5ad(path)
    assert table.shape == bag.features.shape
    np.testing.assert_array_equal(table.X, bag.features)
    np.testing.assert_array_equal(table.obs[["x_px0", "y_px0"]], bag.grid.origins_px0)
    np.testing.assert_array_equal(table.obsm["spatial"], bag.grid.origins_px0 + bag.grid.tile_px0 / 2)
    assert table.obs.alone.argmax() == TILE
    assert table.obs_names[0] == "slide-1_0_0"
    assert table.obs_names.is_unique
    assert set(table.obs.slide_predicted) == {"tumour"}
    origin = table.uns["eosin"]
    assert (origin["encoder"], origin["slide_mpp"]) == ("test", 0.5)
    assert origin["maps"]["alone"].startswith("The log-odds of tumour")


def test_anndata_of_several_slides_can_be_joined(scene, tmp_path) -> None:
    import anndata

    _, _, bag = scene
    (path,) = export_tiles(collect_tiles(bag), tmp_path, "anndata")
    assert anndata.concat([anndata.read_h5ad(path)] * 2).n_obs == 2 * bag.n_instances


def test_spatialdata_reads_squares_and_their_table(scene, model_folder, tmp_path) -> None:
    import spatialdata
    from spatialdata.transformations import get_transformation

    _, _, bag = scene
    tiles = collect_tiles(bag, model_folder)
    for _ in range(2):  # a second export replaces the first
        (path,) = export_tiles(tiles, tmp_path, "spatialdata")
    found = spatialdata.read_zarr(path)
    squares, table = found.shapes["tiles"], found.tables["features"]
    assert squares.loc["slide-1_40_0"].geometry.bounds == (40, 0, 80, 40)
    assert list(table.obs["tile"]) == list(squares.index)
    assert table.uns["spatialdata_attrs"] == {"region": "tiles", "region_key": "region", "instance_key": "tile"}
    scale = get_transformation(squares, "micrometres").to_affine_matrix(("x", "y"), ("x", "y"))
    assert scale[0, 0] == 0.5
    joined, matched = spatialdata.join_spatialelement_table(
        sdata=found, spatial_element_names="tiles", table_name="features", how="inner"
    )
    assert len(joined["tiles"]) == matched.n_obs == bag.n_instances
    assert [entry.name for entry in tmp_path.iterdir()] == ["slide-1.zarr"]

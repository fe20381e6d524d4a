"""Tiles as AnnData and SpatialData, for scanpy, squidpy, napari-spatialdata and whatever else reads those."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely

from eosin._files import write_folder
from eosin.errors import ConfigError
from eosin.features._store import written_hdf5
from eosin.heatmaps.export._tiles import SlideTiles

if TYPE_CHECKING:
    from anndata import AnnData

REGION = "tiles"


def as_anndata(tiles: SlideTiles) -> "AnnData":
    """Return a table of tiles.

    Returns
    -------
    AnnData
        ``X`` (n, D) float32: features. ``obs``: the facts of each tile. ``obsm["spatial"]`` (n, 2): centres, x then y,
        level-0 pixels. ``uns["eosin"]``: encoder, resolution, model, maps in words.
    """
    from anndata import AnnData

    obs = tiles.facts().set_index(pd.Index(tiles.names, dtype=str))
    obs["slide_id"] = pd.Categorical(obs["slide_id"])
    var = pd.DataFrame(index=pd.Index(tiles.feature_names, dtype=str))
    table = AnnData(tiles.features, obs=obs, var=var, uns={"eosin": tiles.origin()})
    if tiles.bag.grid is not None:
        boxes = tiles.bag.grid.boxes_px0()
        table.obsm["spatial"] = (boxes[:, :2] + boxes[:, 2:]) / 2
    return table


def write_anndata(path: Path, tiles: SlideTiles) -> None:
    """Write ``<slide>.h5ad``; `OutputError` where it cannot be written."""
    from anndata.io import write_elem

    table = as_anndata(tiles)
    with written_hdf5(path) as file:
        write_elem(file, "/", table)


def write_spatialdata(path: Path, tiles: SlideTiles) -> None:
    """Write ``<slide>.zarr``: tiles as squares, and the table of `as_anndata` about them.

    The squares are in level-0 pixels, the coordinate system ``global``; ``micrometres`` is a scaling of it.

    Raises
    ------
    ConfigError
        If the features have no tile coordinates.
    OutputError
        If it cannot be written.
    """
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    grid = tiles.bag.grid
    if grid is None:
        raise ConfigError(f"{tiles.bag.slide_id} has features without tile coordinates; pass --to anndata or --to csv")
    squares = GeoDataFrame(geometry=shapely.box(*grid.boxes_px0().T.astype(np.float64)), index=tiles.names)
    systems = {"global": Identity(), "micrometres": Scale([grid.slide_mpp, grid.slide_mpp], axes=("x", "y"))}
    table = as_anndata(tiles)
    table.obs["region"] = pd.Categorical([REGION] * len(squares))
    table.obs["tile"] = tiles.names
    found = SpatialData(
        shapes={REGION: ShapesModel.parse(squares, transformations=systems)},
        tables={"features": TableModel.parse(table, region=REGION, region_key="region", instance_key="tile")},
    )
    write_folder(path, found.write)

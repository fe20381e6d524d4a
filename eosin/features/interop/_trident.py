"""TRIDENT: coordinates, tile features, slide features, and its layout for export.

`patch_size_level0` on the coordinates is the tile's side in level-0 pixels; µm per pixel are nowhere, only a nominal
magnification. The text ``None`` stands for nothing.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from eosin.errors import FeatureFileError
from eosin.features._bag import FeatureBag
from eosin.features._store import require_dataset, written_hdf5
from eosin.features.interop._foreign import Foreign, Places, safe_id
from eosin.wsi._coordinates import nominal_magnification
from eosin.wsi._grid import TileGrid

MARK = "patch_size_level0"
SLIDE_FOLDER = "slide_features_"
TILE_FOLDER = "features_"


def is_trident(file: h5py.File) -> bool:
    """Tell whether an open file is TRIDENT's."""
    return "coords" in file and MARK in file["coords"].attrs


def read(file: h5py.File, path: Path) -> Foreign:
    """Read coordinates, tile features or slide features."""
    coords = require_dataset(file, "coords", path)
    name = _text(coords.attrs.get("name")) or path.stem.removesuffix("_patches")
    slide_id = safe_id(name, path)
    if "features" not in file:
        return Foreign(slide_id, places=places(file, path))
    rows = require_dataset(file, "features", path)
    encoder = _text(rows.attrs.get("encoder")) or _encoder_of_folder(path.parent.name)
    whole = rows.ndim == 1 and rows.size > 0
    return Foreign(slide_id, rows[:], None if whole else places(file, path), encoder)


def places(file: h5py.File, path: Path) -> Places:
    """Return where the tiles of a file lie."""
    coords = require_dataset(file, "coords", path)
    attributes = coords.attrs
    try:
        side, patch_size = round(float(attributes[MARK])), int(attributes["patch_size"])
        size = None
        if "level0_width" in attributes and "level0_height" in attributes:
            size = int(attributes["level0_width"]), int(attributes["level0_height"])
        overlap = int(attributes.get("overlap", 0))
        return Places(coords[:].reshape(-1, 2), side, patch_size, overlap, size)
    except (KeyError, ValueError, TypeError) as error:
        raise FeatureFileError(path, f"the attributes of its coordinates are incomplete ({error})") from error


def _text(value: object) -> str | None:
    return None if value is None or str(value) in ("", "None") else str(value)


def _encoder_of_folder(name: str) -> str | None:
    for start in (SLIDE_FOLDER, TILE_FOLDER):
        if name.startswith(start):
            return name.removeprefix(start)
    return None


def export(bag: FeatureBag, out: Path) -> list[Path]:
    """Write a bag as TRIDENT does.

    Parameters
    ----------
    bag : FeatureBag
        With places.
    out : Path
        Job folder; receives ``<mag>x_<px>px_<overlap>px_overlap/patches`` and ``.../features_<encoder>``.

    Returns
    -------
    list of Path

    Raises
    ------
    FeatureFileError
        When the bag has no places.
    """
    if bag.grid is None:
        raise FeatureFileError(out, f"{bag.slide_id} has features without places, which TRIDENT's layout needs")
    grid, tiling = bag.grid, bag.grid.tiling
    folder = out / (f"{nominal_magnification(tiling.mpp)}x_{tiling.patch_size}px_{tiling.overlap}px_overlap")
    patches = folder / "patches" / f"{bag.slide_id}_patches.h5"
    features = folder / f"{TILE_FOLDER}{bag.spec.encoder}" / f"{bag.slide_id}.h5"
    _write(patches, grid, bag.slide_id, None)
    _write(features, grid, bag.slide_id, bag)
    return [patches, features]


def _write(path: Path, grid: TileGrid, slide_id: str, bag: FeatureBag | None) -> None:
    with written_hdf5(path) as file:
        if bag is not None:
            rows = file.create_dataset(
                "features",
                data=bag.features.astype(np.float32),
                chunks=(1, bag.spec.dim),
                maxshape=(None, bag.spec.dim),
            )
            rows.attrs.update({"name": slide_id, "savetodir": ".", "encoder": bag.spec.encoder})
        coords = file.create_dataset("coords", data=grid.origins_px0, chunks=(1, 2), maxshape=(None, 2))
        coords.attrs.update(_attributes(grid, slide_id))


def _attributes(grid: TileGrid, slide_id: str) -> dict[str, Any]:
    width, height = grid.slide_size_px0
    return {
        "patch_size": grid.tiling.patch_size,
        MARK: grid.tile_px0,
        "level0_magnification": nominal_magnification(grid.slide_mpp),
        "target_magnification": nominal_magnification(grid.tiling.mpp),
        "overlap": grid.tiling.overlap,
        "name": slide_id,
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
    }

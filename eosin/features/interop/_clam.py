"""CLAM: coordinates, features, and their layout for export.

A coordinates file has the tile side at one pyramid level and that level's downsample; µm per pixel are nowhere. A
feature file has no attributes at all: its tile size comes from the coordinates file beside it.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin._files import write_bytes
from eosin.errors import FeatureFileError
from eosin.features._bag import FeatureBag
from eosin.features._foreign_hdf5 import Array, Group
from eosin.features._store import written_hdf5
from eosin.features.interop._foreign import Foreign, Places, safe_id
from eosin.wsi._grid import TileGrid

ROUNDING = 0.01  # levels are rounded to whole pixels, which moves a downsample by less


def is_coordinates(file: Group) -> bool:
    """Tell whether an open file holds CLAM's coordinates."""
    return _has_level(file, "coords") and "features" not in file


def is_pixels(file: Group) -> bool:
    """Tell whether an open file is CLAM's old one, which keeps the pixels of its tiles."""
    return _has_level(file, "imgs")


def is_features(file: Group) -> bool:
    """Tell whether an open file holds CLAM's features."""
    return "features" in file and "coords" in file and not file.attributes("coords")


def _has_level(file: Group, name: str) -> bool:
    attributes = file.attributes(name)
    return "patch_level" in attributes and "patch_spacing_um_px" not in attributes


def read_coordinates(file: Group, path: Path) -> Foreign:
    """Read a coordinates file."""
    return Foreign(safe_id(file.attributes("coords").get("name", path.stem), path), places=places(file, path))


def places(file: Group, path: Path) -> Places:
    """Return where the tiles of a coordinates file lie."""
    attributes: Mapping[str, Any] = file.attributes("coords")
    try:
        downsample = np.asarray(attributes.get("downsample", 1.0), np.float64).reshape(-1)
        extra = int(attributes.get("custom_downsample", 1))
        patch_size = int(attributes["patch_size"])
        size = None
        if "level_dim" in attributes:
            width, height = (np.asarray(attributes["level_dim"]) * downsample).round().astype(int).tolist()
            size = (width, height)
        side = patch_size * _whole(downsample[0]) * extra
        doubts = _doubts(int(attributes["patch_level"]), downsample)
        # the size of level 0 is known to within one pixel of the level
        slack = float(downsample.max())
        return Places(file.array("coords", path), side, patch_size, 0, size, size_slack_px0=slack, doubts=doubts)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise FeatureFileError(path, f"the attributes of its coordinates are incomplete ({error})") from error


def _whole(downsample: float) -> int:
    """Return a level's downsample as CLAM counts it, in whole pixels; 3.9995, of a level that was rounded up, is 4."""
    return max(1, int(downsample + ROUNDING))


def _doubts(level: int, downsample: NDArray[np.float64]) -> tuple[str, ...]:
    if level == 0 and (np.abs(downsample - 1) > ROUNDING).any():
        return (f"states level 0 and a downsample of {downsample[0]:g}, which is that of another level",)
    if downsample.max() > downsample.min() * (1 + ROUNDING):
        sides = " x ".join(f"{side:g}" for side in downsample)
        return (f"states a level that is made smaller by {sides}, so that its tiles are not square",)
    return ()


def read_pixels(file: Group, path: Path) -> Foreign:
    """Refuse the old layout, or read its coordinates."""
    if "coords" not in file:
        raise FeatureFileError(path, "holds tile images without coordinates; tile the slide with `eosin tile`")
    attributes: Mapping[str, Any] = file.attributes("imgs")
    downsample = np.asarray(attributes.get("downsample", 1.0), np.float64).reshape(-1)
    pixels = file["imgs"]
    assert isinstance(pixels, Array)  # `is_pixels`
    patch_size = int(pixels.shape[1])
    name = safe_id(attributes.get("wsi_name", path.stem), path)
    return Foreign(name, places=Places(file.array("coords", path), patch_size * _whole(downsample[0]), patch_size))


def read_features(file: Group, path: Path) -> Foreign:
    """Read a feature file; how large its tiles are is said by the coordinates file that belongs to it."""
    return Foreign(path.stem, features=file.array("features", path), corners=file.array("coords", path))


def export(bag: FeatureBag, out: Path) -> list[Path]:
    """Write a bag as CLAM does.

    Parameters
    ----------
    bag : FeatureBag
        With places.
    out : Path
        Receives ``h5_files/<slide>.h5``, ``pt_files/<slide>.pt`` and, for heat maps, ``patches/<slide>.h5``.

    Returns
    -------
    list of Path

    Raises
    ------
    FeatureFileError
        When the bag has no places.
    """
    import torch

    if bag.grid is None:
        raise FeatureFileError(out, f"{bag.slide_id} has features without tile coordinates, which CLAM's layout needs")
    rows, coords = bag.features.astype(np.float32), bag.grid.origins_px0.astype(np.int32)

    tensor, h5 = out / "pt_files" / f"{bag.slide_id}.pt", out / "h5_files" / f"{bag.slide_id}.h5"
    patches, grid = out / "patches" / f"{bag.slide_id}.h5", bag.grid
    with written_hdf5(h5) as file:
        for name, values in (("features", rows), ("coords", coords)):
            file.create_dataset(name, data=values, chunks=(32, values.shape[1]), maxshape=(None, values.shape[1]))
    saved = io.BytesIO()  # torch would put the temporary name into the file
    torch.save(torch.from_numpy(rows), saved)
    write_bytes(tensor, saved.getvalue())
    _write_coordinates(patches, grid, bag.slide_id)
    return [h5, tensor, patches]


def _write_coordinates(path: Path, grid: TileGrid, slide_id: str) -> None:
    """Write tiles of level 0; a tile that was made smaller by a whole number says so as CLAM once did."""
    times, rest = divmod(grid.tile_px0, grid.tiling.patch_size)
    whole = rest == 0 and times > 1
    size = np.array(grid.slide_size_px0, np.int64)
    attributes = {
        "patch_size": grid.tiling.patch_size if whole else grid.tile_px0,
        "patch_level": 0,
        "downsample": np.ones(2),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": slide_id,
        "save_path": ".",
    }
    with written_hdf5(path) as file:
        coords = file.create_dataset("coords", data=grid.origins_px0, chunks=(1, 2), maxshape=(None, 2))
        coords.attrs.update(attributes | ({"custom_downsample": times} if whole else {}))

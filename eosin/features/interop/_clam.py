"""CLAM: coordinates, features, and their layout for export.

A coordinates file has the tile side at one pyramid level and that level's downsample; µm per pixel are nowhere. A
feature file has no attributes at all: its tile size comes from the coordinates file beside it.
"""

import io
from pathlib import Path

import h5py
import numpy as np

from eosin._files import write_bytes
from eosin.errors import FeatureFileError
from eosin.features._bag import FeatureBag
from eosin.features._store import require_dataset, written_hdf5
from eosin.features.interop._foreign import Foreign, Places, safe_id
from eosin.wsi._grid import TileGrid


def is_coordinates(file: h5py.File) -> bool:
    """Tell whether an open file holds CLAM's coordinates."""
    return _has_level(file, "coords") and "features" not in file


def is_pixels(file: h5py.File) -> bool:
    """Tell whether an open file is CLAM's old one, which keeps the pixels of its tiles."""
    return _has_level(file, "imgs")


def is_features(file: h5py.File) -> bool:
    """Tell whether an open file holds CLAM's features."""
    return "features" in file and "coords" in file and not dict(file["coords"].attrs)


def _has_level(file: h5py.File, name: str) -> bool:
    return name in file and "patch_level" in file[name].attrs and "patch_spacing_um_px" not in file[name].attrs


def read_coordinates(file: h5py.File, path: Path) -> Foreign:
    """Read a coordinates file."""
    coords = require_dataset(file, "coords", path)
    return Foreign(safe_id(coords.attrs.get("name", path.stem), path), places=places(file, path))


def places(file: h5py.File, path: Path) -> Places:
    """Return where the tiles of a coordinates file lie."""
    coords = require_dataset(file, "coords", path)
    attributes = coords.attrs
    try:
        downsample = np.asarray(attributes.get("downsample", 1.0), np.float64).reshape(-1)
        extra = int(attributes.get("custom_downsample", 1))
        patch_size = int(attributes["patch_size"])
        size = None
        if "level_dim" in attributes:
            width, height = (np.asarray(attributes["level_dim"]) * downsample).round().astype(int).tolist()
            size = (width, height)
        return Places(coords[:], patch_size * int(downsample[0]) * extra, patch_size, slide_size_px0=size)
    except (KeyError, ValueError, TypeError) as error:
        raise FeatureFileError(path, f"the attributes of its coordinates are incomplete ({error})") from error


def read_pixels(file: h5py.File, path: Path) -> Foreign:
    """Refuse the old layout, or read its coordinates."""
    if "coords" not in file:
        raise FeatureFileError(path, "holds pixels of tiles without places; tile the slide with `eosin tile`")
    attributes = file["imgs"].attrs
    downsample = np.asarray(attributes.get("downsample", 1.0), np.float64).reshape(-1)
    patch_size = int(require_dataset(file, "imgs", path).shape[1])
    coords = require_dataset(file, "coords", path)
    name = safe_id(attributes.get("wsi_name", path.stem), path)
    return Foreign(name, places=Places(coords[:], patch_size * int(downsample[0]), patch_size))


def read_features(file: h5py.File, path: Path, where: Places | None) -> Foreign:
    """Read a feature file; `where` comes from the coordinates file that belongs to it."""
    rows, coords = require_dataset(file, "features", path)[:], require_dataset(file, "coords", path)[:]
    if where is not None and not np.array_equal(np.asarray(where.origins_px0), coords):
        raise FeatureFileError(path, "has other coordinates than the file given as --coords")
    return Foreign(path.stem, features=rows, places=where)


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
        raise FeatureFileError(out, f"{bag.slide_id} has features without places, which CLAM's layout needs")
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

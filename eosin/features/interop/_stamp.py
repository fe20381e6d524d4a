"""STAMP: features with places in micrometres; the mpp that was used is not in the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eosin.errors import FeatureFileError
from eosin.features._bag import FeatureBag
from eosin.features._foreign_hdf5 import Group
from eosin.features._store import written_hdf5
from eosin.features.interop._foreign import Foreign, Places, SlideFacts

OLD_TILE_UM, OLD_TILE_PX = 256.0, 224


def is_stamp(file: Group) -> bool:
    """Tell whether an open file is STAMP's."""
    return "feats" in file or "patch_embeddings" in file


def read(file: Group, path: Path, slide: SlideFacts) -> Foreign:
    """Read tile, slide or patient features."""
    name = "feats" if "feats" in file else "patch_embeddings"
    rows = file.array(name, path)
    encoder = str(file.attrs.get("extractor") or file.attrs.get("encoder") or "") or None
    facts = {"stamp_version": str(file.attrs.get("stamp_version", ""))}
    if "coords" not in file:
        return Foreign(path.stem, rows, None, encoder, facts=facts)
    coords_um, side_um, side_px = _micrometres(file, path)
    mpp = slide.require_mpp(path)
    where = Places(np.rint(coords_um / mpp), round(side_um / mpp), side_px)  # a grid in µm lies between pixels
    return Foreign(path.stem, rows, where, encoder, facts=facts)


def _micrometres(file: Group, path: Path) -> tuple[np.ndarray, float, int]:
    """Return corners (n, 2) and tile side in µm, and the side in pixels."""
    coords = file.array("coords", path).astype(np.float64).reshape(-1, 2)
    attributes: Mapping[str, Any] = file.attrs
    if "unit" not in attributes:  # before 2.0: pixels of a tile of 256 µm in 224 px
        return coords * OLD_TILE_UM / OLD_TILE_PX, OLD_TILE_UM, OLD_TILE_PX
    side_um = attributes.get("tile_size_um", attributes.get("tile_size"))
    if attributes["unit"] != "um" or side_um is None:
        raise FeatureFileError(path, "has coordinates without a tile size in micrometres")
    return coords, float(side_um), int(attributes.get("tile_size_px", OLD_TILE_PX))


def export(bag: FeatureBag, out: Path) -> list[Path]:
    """Write a bag as STAMP does.

    Parameters
    ----------
    bag : FeatureBag
        With places.
    out : Path
        Receives ``<encoder>/<slide>.h5``; the folder of the encoder is what STAMP calls ``feature_dir``.

    Returns
    -------
    list of Path

    Raises
    ------
    FeatureFileError
        When the bag has no places.
    """
    if bag.grid is None:
        raise FeatureFileError(out, f"{bag.slide_id} has features without tile coordinates, which STAMP's layout needs")
    grid = bag.grid
    path = out / bag.spec.encoder / f"{bag.slide_id}.h5"
    with written_hdf5(path) as file:
        file["coords"] = (grid.origins_px0 * grid.slide_mpp).astype(np.float32)
        file["feats"] = bag.features
        # without a version of STAMP, which its readers compare with their own and refuse where it is newer
        file.attrs.update(
            extractor=bag.spec.encoder,
            unit="um",
            tile_size_um=grid.tile_px0 * grid.slide_mpp,
            tile_size_px=grid.tiling.patch_size,
            feat_type="tile",
        )
    return [path]

"""STAMP: features with places in micrometres; the mpp that was used is not in the file."""

from pathlib import Path

import h5py
import numpy as np

from eosin.errors import FeatureFileError
from eosin.features._store import require_dataset
from eosin.features.interop._foreign import Foreign, Places, SlideFacts

OLD_TILE_UM, OLD_TILE_PX = 256.0, 224


def is_stamp(file: h5py.File) -> bool:
    """Tell whether an open file is STAMP's."""
    return "feats" in file or "patch_embeddings" in file


def read(file: h5py.File, path: Path, slide: SlideFacts) -> Foreign:
    """Read tile, slide or patient features."""
    name = "feats" if "feats" in file else "patch_embeddings"
    rows = require_dataset(file, name, path)[:]
    encoder = str(file.attrs.get("extractor") or file.attrs.get("encoder") or "") or None
    facts = {"stamp_version": str(file.attrs.get("stamp_version", ""))}
    if "coords" not in file:
        return Foreign(path.stem, rows, None, encoder, facts=facts)
    coords_um, side_um, side_px = _micrometres(file, path)
    mpp = slide.require_mpp(path)
    origins = np.rint(coords_um / mpp)
    return Foreign(path.stem, rows, Places(origins, round(side_um / mpp), side_px), encoder, facts=facts)


def _micrometres(file: h5py.File, path: Path) -> tuple[np.ndarray, float, int]:
    """Return corners (n, 2) and tile side in µm, and the side in pixels."""
    coords = require_dataset(file, "coords", path)[:].astype(np.float64).reshape(-1, 2)
    attributes = file.attrs
    if "unit" not in attributes:  # before 2.0: pixels of a tile of 256 µm in 224 px
        return coords * OLD_TILE_UM / OLD_TILE_PX, OLD_TILE_UM, OLD_TILE_PX
    side_um = attributes.get("tile_size_um", attributes.get("tile_size"))
    if attributes["unit"] != "um" or side_um is None:
        raise FeatureFileError(path, "has coordinates without a tile size in micrometres")
    return coords, float(side_um), int(attributes.get("tile_size_px", OLD_TILE_PX))

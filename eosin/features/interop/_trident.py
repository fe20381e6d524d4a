"""TRIDENT: coordinates, tile features, slide features, and its layout for export.

`patch_size_level0` on the coordinates is the tile's side in level-0 pixels; µm per pixel are nowhere, only a nominal
magnification. The text ``None`` stands for nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eosin.errors import FeatureFileError
from eosin.features._bag import FeatureBag
from eosin.features._foreign_hdf5 import Group
from eosin.features._store import written_hdf5
from eosin.features.interop._foreign import Foreign, Places, safe_id
from eosin.wsi._coordinates import nominal_magnification
from eosin.wsi._grid import TileGrid

MARK = "patch_size_level0"
STEP = 2.0
SLIDE_FOLDER = "slide_features_"
TILE_FOLDER = "features_"


def is_trident(file: Group) -> bool:
    """Tell whether an open file is TRIDENT's."""
    return MARK in file.attributes("coords")


def read(file: Group, path: Path) -> Foreign:
    """Read coordinates, tile features or slide features."""
    name = _text(file.attributes("coords").get("name")) or path.stem.removesuffix("_patches")
    slide_id = safe_id(name, path)
    if "features" not in file:
        return Foreign(slide_id, places=places(file, path))
    rows = file.array("features", path)
    encoder = _text(file.attributes("features").get("encoder")) or _encoder_of_folder(path.parent.name)
    whole = rows.ndim == 1 and rows.size > 0
    return Foreign(slide_id, rows, None if whole else places(file, path), encoder)


def places(file: Group, path: Path) -> Places:
    """Return where the tiles of a file lie."""
    attributes: Mapping[str, Any] = file.attributes("coords")
    try:
        side, patch_size = round(float(attributes[MARK])), int(attributes["patch_size"])
        size = None
        if "level0_width" in attributes and "level0_height" in attributes:
            size = int(attributes["level0_width"]), int(attributes["level0_height"])
        overlap = int(attributes.get("overlap", 0))
        origins = file.array("coords", path).reshape(-1, 2)
        power, doubts = _magnification(attributes, side, patch_size)
        return Places(origins, side, patch_size, overlap, size, magnification=power, doubts=doubts)
    except (KeyError, ValueError, TypeError) as error:
        raise FeatureFileError(path, f"the attributes of its coordinates are incomplete ({error})") from error


def _magnification(attributes: Mapping[str, Any], side: int, patch_size: int) -> tuple[float | None, tuple[str, ...]]:
    """Return the magnification of level 0, stated or from that of the tiles, and whether these contradict the sizes."""
    stated, target = (_number(attributes.get(name)) for name in ("level0_magnification", "target_magnification"))
    if stated is None:
        return (None if target is None else target * side / patch_size), ()
    expected = None if target is None else patch_size * stated / target
    # magnifications are steps of a table, so that each of two stands for scales that differ by less than two times
    if expected is None or 1 / STEP <= side / expected <= STEP:
        return stated, ()
    return stated, (
        f"states tiles of {patch_size} px at {target:g}x on a slide of {stated:g}x, which are "
        f"{expected:g} px of level 0, and {side} px of it",
    )


def _number(value: object) -> float | None:
    text = _text(value)
    return None if text is None else float(text)


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
        raise FeatureFileError(
            out, f"{bag.slide_id} has features without tile coordinates, which TRIDENT's layout needs"
        )
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

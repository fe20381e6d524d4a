"""Tools with one small layout each: ACMIL, wsinfer, hs2p, luna, DSMIL, slideflow, bare tensors."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from eosin._seals import read_json
from eosin._tables import TextFile
from eosin.errors import FeatureFileError
from eosin.features._foreign_hdf5 import Group
from eosin.features.interop._foreign import Foreign, Numbers, Places, SlideFacts, safe_id
from eosin.features.interop._npz import read_npz

MAX_TABLE_BYTES = 2 * 2**30
LUNA_COLUMNS = ("x_coord", "y_coord", "xy_extent", "tile_size")


def is_acmil(file: Group) -> bool:
    """Tell whether an open file has one group per slide with features in it."""
    return len(file) > 0 and all(isinstance(group, Group) and "feat" in group for group in file.values())


def read_acmil(file: Group, path: Path) -> list[Foreign]:
    """Read all slides; the file knows neither tile size nor encoder."""
    return [
        Foreign(
            safe_id(name, path),
            group.array("feat", path),
            label=None if "label" not in group.attrs else str(group.attrs["label"]),
        )
        for name, group in file.items()
        if isinstance(group, Group)
    ]


def is_wsinfer(file: Group) -> bool:
    """Tell whether an open file holds wsinfer's coordinates."""
    return "patch_spacing_um_px" in file.attributes("coords")


def read_wsinfer(file: Group, path: Path, slide: SlideFacts) -> Foreign:
    """Read coordinates; the tile's side is in level-0 pixels, its spacing in µm."""
    attributes: Mapping[str, Any] = file.attributes("coords")
    try:
        side, spacing = int(attributes["patch_size"]), float(attributes["patch_spacing_um_px"])
    except (KeyError, ValueError, TypeError) as error:
        raise FeatureFileError(path, f"the attributes of its coordinates are incomplete ({error})") from error
    patch_size = round(side * slide.require_mpp(path) / spacing)
    return Foreign(path.stem, places=Places(file.array("coords", path), side, patch_size))


def read_hs2p(arrays: Mapping[str, Numbers], path: Path) -> tuple[Foreign, float | None]:
    """Read coordinates and the spacing of level 0 from the ``.meta.json`` beside them."""
    meta = path.with_name(path.name.removesuffix(".npz") + ".meta.json")
    facts = _read_json(meta, path)
    try:
        tiling, slide = facts["tiling"], facts["slide"]
        width, height = (int(side) for side in slide["dimensions"])
        spacing = float(slide["base_spacing_um"])
        patch_size = int(tiling["requested_tile_size_px"])
        where = Places(
            np.stack([arrays["x"], arrays["y"]], axis=1),
            int(tiling["tile_size_lv0"]),
            patch_size,
            round(float(tiling.get("overlap", 0)) * patch_size),
            (width, height) if width and height else None,
            mpp=spacing,
        )
        return Foreign(safe_id(facts["provenance"]["sample_id"], path), places=where), spacing
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise FeatureFileError(meta, f"does not have the fields that hs2p writes ({error})") from error


def _read_json(meta: Path, path: Path) -> dict[str, Any]:
    if not meta.is_file():
        raise FeatureFileError(
            path, f"needs {meta.name} in the same folder, which states the tile size", code="incomplete"
        )
    try:
        facts: dict[str, Any] = read_json(meta)
    except (OSError, ValueError) as error:
        raise FeatureFileError(meta, f"is not valid JSON ({error})") from error
    return facts


def read_text(path: Path) -> Foreign:
    """Read a text table: luna's tiles, or a bag of DSMIL with one row of numbers per tile."""
    text = TextFile(path, most_bytes=MAX_TABLE_BYTES, most_cells=MAX_TABLE_BYTES)
    lines = (row for _, row in text.rows() if any(row))
    header = next(lines, [])
    if all(name in header for name in LUNA_COLUMNS):
        return _luna(header, lines, path)
    if {"minx", "miny"} <= set(header):
        raise FeatureFileError(path, "holds predictions of wsinfer; import its coordinates (folder patches)")
    return Foreign(path.stem, _numbers(header, lines, path))


def _luna(header: list[str], rows: Iterable[list[str]], path: Path) -> Foreign:
    try:
        columns = np.array([[float(row[header.index(name)]) for name in LUNA_COLUMNS] for row in rows])
    except (ValueError, IndexError) as error:
        raise FeatureFileError(path, f"has tiles without numbers ({error})") from error
    sides = {tuple(pair) for pair in columns[:, 2:].astype(int).tolist()}
    if len(sides) != 1:
        raise FeatureFileError(path, f"has tiles of {len(sides)} sizes; eosin needs tiles of one size")
    extent, size = sides.pop()
    return Foreign(path.name.partition(".")[0], places=Places(columns[:, :2], extent, size))


def _numbers(header: list[str], rows: Iterable[list[str]], path: Path) -> Numbers:
    """Return the table as (n, D); a first row 0, 1, 2 ... is a header."""
    counted = header == [str(column) for column in range(len(header))]
    try:
        values = np.array([np.array(row, np.float32) for row in (rows if counted else chain([header], rows))])
    except ValueError:
        message = "is neither a table of features (one row of numbers per tile) nor a table of tiles that eosin knows"
        raise FeatureFileError(path, message) from None
    if values.ndim != 2:
        raise FeatureFileError(path, "holds no rows of features")
    return values


def read_tensor(path: Path, slide: SlideFacts) -> Foreign:
    """Read a ``.pt`` file: a bare tensor, with slideflow's index beside it where there is one."""
    from eosin.features._weights import read_tensor_file

    rows = read_tensor_file(path)
    index, config = path.with_name(f"{path.stem}.index.npz"), path.with_name("bags_config.json")
    if index.is_file() and config.is_file():
        return _slideflow(rows, index, _read_json(config, path), path, slide)
    return Foreign(path.stem, rows)


def _slideflow(rows: Numbers, index: Path, config: Mapping[str, Any], path: Path, slide: SlideFacts) -> Foreign:
    try:
        side_um, side_px = float(config["tile_um"]), int(config["tile_px"])
        encoder = str(config["extractor"]["class"])
        centres = np.asarray(read_npz(index)["arr_0"], np.int64)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise FeatureFileError(path, f"the other slideflow files in its folder cannot be used ({error})") from error
    side = round(side_um / slide.require_mpp(path))
    return Foreign(path.stem, rows, Places(np.maximum(centres - side // 2, 0), side, side_px), encoder)

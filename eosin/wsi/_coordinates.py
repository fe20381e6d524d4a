"""Coordinates files: HDF5 dataset ``coords`` with TRIDENT's attributes and ours.

One definition for the coordinates file of a slide and for the copy inside its feature file. What is ours:
``encoding-type`` and ``encoding-version``, the tiling as JSON, the true mpp and where it came from, fingerprints of
the slide and of the options, and a SHA-256 of the rows. TRIDENT's readers find what they know beside it. The optional
dataset ``quality`` has a row of scores per tile. `eosin._seals` puts every byte of the file under a checksum.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from eosin import __version__
from eosin._files import write_bytes
from eosin._processes import call_apart
from eosin._seals import USER_BLOCK_BYTES, check_image, has_preamble, seal_image
from eosin.errors import FeatureFileError, WorkerError
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._quality import SCORES, TileQuality

ENCODING_TYPE = "eosin.coords"
ENCODING_VERSION = "1"
QUALITY_TYPE = "eosin.quality"
QUALITY_VERSION = "3"
READABLE_QUALITY = ("1", "2", QUALITY_VERSION)  # 1 saw folds and ink at 8 µm/px on large slides, too; 2 missed pale ink
MAX_ROWS = 10_000_000
PROBE_S = 5.0
PROBE_BYTES = 2**31
HDF5 = b"\x89HDF\r\n\x1a\n"
LIBVER = ("v110", "v110")  # checksums the file's own structures
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))


@dataclass(frozen=True)
class CoordsFooter:
    """What a coordinates file says about its making.

    Parameters
    ----------
    slide_id : str
        The slide.
    mpp_source : str
        Where the slide's mpp came from.
    fingerprint : str
        `eosin._files.file_fingerprint` of the slide.
    options_hash : str
        Fingerprint of everything that decides the rows.
    selection : str
        JSON: by which models and which rule the tiles were chosen; empty for all tiles with tissue.
    pictures : str
        Hashes of the slide's thumbnail and contour picture: a truncated one is not taken for finished.
    """

    slide_id: str
    mpp_source: str
    fingerprint: str
    options_hash: str = ""
    selection: str = ""
    pictures: str = ""


def write_grid(
    path: Path,
    grid: TileGrid,
    *,
    slide_id: str,
    mpp_source: str,
    fingerprint: str,
    options_hash: str = "",
    selection: str = "",
    pictures: str = "",
    quality: TileQuality | None = None,
) -> None:
    """Write a coordinates file; it is whole or it is not there.

    Parameters
    ----------
    path : Path
        The file.
    grid : TileGrid
        Its tiles; none is a normal content.
    slide_id, mpp_source, fingerprint, options_hash, selection, pictures : str
        See `CoordsFooter`.
    quality : TileQuality, optional
        Scores of the tiles, written as the dataset ``quality``.
    """
    image = io.BytesIO()  # on a full disk HDF5 itself crashes the process, Python raises
    with h5py.File(image, "w", libver=LIBVER, userblock_size=USER_BLOCK_BYTES) as file:
        write_coords(file, grid, CoordsFooter(slide_id, mpp_source, fingerprint, options_hash, selection, pictures))
        if quality is not None:
            _write_quality(file, quality)
    content = bytearray(image.getvalue())
    seal_image(content, rows_at=len(content), rows_bytes=0)
    write_bytes(path, content)


def read_grid(path: Path) -> TileGrid:
    """Read a coordinates file (or the coordinates of a feature file).

    Raises
    ------
    FeatureFileError
        If it is missing, damaged or not ours.
    """
    with _open(path) as file:
        return read_coords(file, path)


def read_footer(path: Path) -> CoordsFooter:
    """Read only what a coordinates file says about its making.

    Raises
    ------
    FeatureFileError
        If it is missing, damaged or not ours.
    """
    with _open(path) as file:
        attributes = _attributes(file, path)
        names = ("name", "mpp_source", "slide_fingerprint", "options_hash", "selection", "pictures")
        return CoordsFooter(*(str(attributes.get(name, "")) for name in names))


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FeatureFileError(path, "coordinates cannot be read: no such file")
    if has_preamble(path):
        check_image(path)
    elif not _is_plain_hdf5(path):  # a damaged preamble must not pass for a file of 0.1, which had none
        raise FeatureFileError(path, "coordinates cannot be read: it is damaged or not an HDF5 file", code="damaged")
    else:
        _probe_apart(path)
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise FeatureFileError(path, "coordinates cannot be read: it is damaged or not an HDF5 file") from error


_probed: dict[tuple[int, int, int], str] = {}
"""Files of 0.1 that another process has read, with what became of it: nothing to say where it went well."""


def _probe_apart(path: Path) -> None:
    """Read a file without a checksum in another process first: HDF5 can hang or crash on a damaged one."""
    facts = path.stat()
    identity = facts.st_ino, facts.st_mtime_ns, facts.st_size
    if identity not in _probed:
        try:
            call_apart(_probe, path, timeout_s=PROBE_S, most_bytes=PROBE_BYTES)
            _probed[identity] = ""
        except WorkerError as error:
            _probed[identity] = error.message
    if _probed.get(identity):
        message = f"coordinates cannot be read: the process that tried {_probed[identity]}; tile the slide again"
        raise FeatureFileError(path, message, code="damaged")


def _probe(path: Path) -> None:
    """Read whatever the readers of this module read; that it fails is found again by them."""
    with suppress(OSError, RuntimeError, KeyError, ValueError, TypeError), h5py.File(path, "r", locking=False) as file:
        for name in ("coords", "quality"):
            dataset = file.get(name)
            if isinstance(dataset, h5py.Dataset):
                dict(dataset.attrs)
                dataset[:MAX_ROWS]


def _is_plain_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(HDF5)) == HDF5


def write_coords(group: h5py.Group, grid: TileGrid, footer: CoordsFooter) -> None:
    """Write the dataset ``coords`` with its attributes into an open HDF5 group."""
    rows = np.ascontiguousarray(grid.origins_px0, np.int64)
    dataset = group.create_dataset("coords", data=rows)
    for name, value in {**_trident_attributes(grid, footer), **_own_attributes(grid, footer, rows)}.items():
        dataset.attrs[name] = value


def _write_quality(group: h5py.Group, quality: TileQuality) -> None:
    rows = np.stack([getattr(quality, name) for name in SCORES], axis=1).astype(np.float32)
    dataset = group.create_dataset("quality", data=rows)
    dataset.attrs["encoding-type"] = QUALITY_TYPE
    dataset.attrs["encoding-version"] = QUALITY_VERSION
    dataset.attrs["columns"] = json.dumps(SCORES)
    dataset.attrs["sha256"] = hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest()


def read_quality(path: Path) -> TileQuality | None:
    """Read the scores of the tiles; None where the file has none.

    Raises
    ------
    FeatureFileError
        If the file is missing, damaged, not ours, or its scores are of a later version.
    """
    with _open(path) as file:
        n_tiles = len(read_coords(file, path).origins_px0)
        with _damage_as_error(path):
            if "quality" not in file:
                return None
            dataset = file["quality"]
            if dataset.attrs["encoding-version"] not in READABLE_QUALITY:
                raise FeatureFileError(path, "its quality scores have a later version; update eosin")
            if dataset.shape != (n_tiles, len(SCORES)) or json.loads(dataset.attrs["columns"]) != list(SCORES):
                raise FeatureFileError(path, f"quality is {dataset.shape}, expected {(n_tiles, len(SCORES))}")
            rows = dataset[()]
            if dataset.attrs["sha256"] != hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest():
                raise FeatureFileError(path, "its quality scores do not match their checksum; tile the slide again")
            return TileQuality(*np.ascontiguousarray(rows.T, np.float32))


def _trident_attributes(grid: TileGrid, footer: CoordsFooter) -> dict[str, str | int]:
    width, height = grid.slide_size_px0
    return {
        "patch_size": grid.tiling.patch_size,
        "patch_size_level0": grid.tile_px0,
        "level0_magnification": nominal_magnification(grid.slide_mpp),
        "target_magnification": nominal_magnification(grid.tiling.mpp),
        "overlap": grid.tiling.overlap,
        "name": footer.slide_id,
        "savetodir": ".",  # a real folder name may carry a patient's name
        "level0_width": width,
        "level0_height": height,
    }


def _own_attributes(grid: TileGrid, footer: CoordsFooter, rows: NDArray[np.int64]) -> dict[str, str | float]:
    attributes: dict[str, str | float] = {
        "encoding-type": ENCODING_TYPE,
        "encoding-version": ENCODING_VERSION,
        "eosin_version": __version__,
        "tiling": grid.tiling.to_json(),
        "slide_mpp": grid.slide_mpp,
        "delivered_mpp": grid.delivered_mpp,
        "mpp_source": footer.mpp_source,
        "slide_fingerprint": footer.fingerprint,
        "options_hash": footer.options_hash,
        "coords_sha256": _digest(rows),
    }
    optional = {"selection": footer.selection, "pictures": footer.pictures, "image": grid.image}
    return attributes | {name: value for name, value in optional.items() if value}


def nominal_magnification(mpp: float) -> int:
    """Return the power that TRIDENT's table gives a resolution: 0.25 µm/px is 40, 0.5 is 20."""
    for below, power in _MAGNIFICATIONS:
        if mpp < below:
            return power
    return max(1, round(10 / mpp))


def _digest(rows: NDArray[np.int64]) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def read_coords(group: h5py.Group, path: Path, *, checked: bool = False) -> TileGrid:
    """Read the dataset ``coords`` of an open HDF5 group.

    Parameters
    ----------
    group : h5py.Group
        Open.
    path : Path
        Its file, for messages.
    checked : bool
        Whether the caller has compared these bytes with a checksum of his own, which saves another.

    Raises
    ------
    FeatureFileError
        If it is absent, not ours, of a later version, too large or its rows do not match their checksum.
    """
    attributes = _attributes(group, path)
    with _damage_as_error(path):
        rows = _rows(group["coords"], path)
        if not checked and attributes.get("coords_sha256") != _digest(rows):
            raise FeatureFileError(path, "the coordinates do not match their checksum; tile the slide again")
        return TileGrid(
            rows,
            int(attributes["patch_size_level0"]),
            Tiling.parse(json.loads(attributes["tiling"]), source="tiling"),
            (int(attributes["level0_width"]), int(attributes["level0_height"])),
            float(attributes["slide_mpp"]),
            str(attributes.get("image", "")),
        )


@contextmanager
def _damage_as_error(path: Path) -> Iterator[None]:
    """Turn what h5py raises on damaged structures, and what damaged attributes lead to, into one error."""
    try:
        yield
    except FeatureFileError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FeatureFileError(path, f"the coordinates are damaged; tile the slide again ({error})") from error


def _rows(dataset: h5py.Dataset, path: Path) -> NDArray[np.int64]:
    shape = dataset.shape
    if len(shape) != 2 or shape[1] != 2 or shape[0] > MAX_ROWS or dataset.dtype.kind != "i":
        raise FeatureFileError(path, f"coords is {dataset.dtype} {shape}, expected (n, 2) with at most {MAX_ROWS} rows")
    return np.ascontiguousarray(dataset[()], np.int64)


def _attributes(group: h5py.Group, path: Path) -> Mapping[str, Any]:
    with _damage_as_error(path):
        if "coords" not in group or not isinstance(group["coords"], h5py.Dataset):
            raise FeatureFileError(path, "has no dataset named coords")
        attributes = dict(group["coords"].attrs)
    kind, version = attributes.get("encoding-type"), attributes.get("encoding-version")
    if kind != ENCODING_TYPE:
        raise FeatureFileError(path, "its coordinates were not written by eosin; convert them with `eosin import`")
    if version != ENCODING_VERSION:
        raise FeatureFileError(
            path, f"coordinates have version {version}, but this eosin reads version {ENCODING_VERSION}; update eosin"
        )
    return attributes

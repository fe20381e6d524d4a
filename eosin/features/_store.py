"""The feature file: one slide's features as a single memory map, with everything needed to trust them.

The layout is specified in `docs/feature-file.md`. Rows lie contiguously and uncompressed, so a bag opens in
milliseconds whatever its size. Every byte is under a checksum: the rows in blocks of 1 MiB, checked when asked for;
everything else under one, kept in HDF5's user block and checked before HDF5, which can hang on damage, sees the file.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from eosin import __version__
from eosin._files import write_bytes, write_file
from eosin._fingerprints import DIGITS
from eosin._seals import USER_BLOCK_BYTES, check_image, seal_image
from eosin._spread import list_files
from eosin.errors import ConfigError, EosinError, FeatureFileError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.wsi._coordinates import CoordsFooter, read_coords, write_coords

ENCODING_TYPE = "eosin-features"
ENCODING_VERSION = "1.0"
SUFFIX = ".h5"

BLOCK_BYTES = 2**20
ALIGNMENT_BYTES = 64

MAX_ROWS = 10**7
MAX_DIM = 8192
MAX_BYTES = 32 * 2**30
FREE_EXPANSION_BYTES = 16 * 2**20
MAX_EXPANSION = 200

FLOATS = (np.dtype("<f2"), np.dtype("<f4"))


@dataclass(frozen=True)
class Footer:
    """What decides whether a finished file still answers the question that is asked now.

    Parameters
    ----------
    n_rows : int
        Number of tiles that were encoded.
    input_fingerprint : str
        Fingerprint of the slide file (`eosin._files.file_fingerprint`); empty when the input was not a slide.
    options_hash : str
        Fingerprint of everything else that determines the rows.
    """

    n_rows: int
    input_fingerprint: str
    options_hash: str


def write_bag(path: Path | str, bag: FeatureBag) -> None:
    """Write a feature file, re-open it, compare it with `bag` and only then give it its name.

    Parameters
    ----------
    path : Path
        ``<slide id>.h5``.
    bag : FeatureBag
        The keys ``input_fingerprint`` and ``options_hash`` of its provenance become the file's `Footer`.

    Raises
    ------
    ValueError
        When a value is not finite; nothing is written.
    OutputError
        When the disk is full or may not be written.
    """
    path = Path(path)
    finite = np.isfinite(bag.features).all(axis=1)
    if not finite.all():
        raise ValueError(f"features of {bag.slide_id} are not finite in row {int(np.argmin(finite))}; not written")
    write_file(path, lambda file: _write(file, bag), verify=lambda temporary: _compare(temporary, bag))


def _write(file: BinaryIO, bag: FeatureBag) -> None:
    rows = np.ascontiguousarray(bag.features, bag.features.dtype.newbyteorder("<"))
    image, offset = _metadata(bag, rows)
    seal_image(image, rows_at=offset, rows_bytes=rows.nbytes)
    file.write(image)
    file.seek(offset)
    file.write(rows.data if rows.size else b"")


def _metadata(bag: FeatureBag, rows: NDArray[np.generic]) -> tuple[bytearray, int]:
    """Return the whole file but its rows, with their place in it.

    It is made in memory: on a full disk HDF5 crashes the process where Python raises.
    """
    image = io.BytesIO()
    with h5py.File(
        image,
        "w",
        libver=("v110", "v110"),
        userblock_size=USER_BLOCK_BYTES,
        alignment_threshold=1,
        alignment_interval=ALIGNMENT_BYTES,
    ) as file:
        _write_attributes(file, bag)
        if bag.grid is not None:
            write_coords(file, bag.grid, _coords_footer(bag))
        table = file.create_dataset("checksums", data=_block_sums(rows))
        table.attrs["block_bytes"] = BLOCK_BYTES
        file.flush()  # all before the rows has its place now, so that nothing comes to lie behind them
        features = _allocate(file, "features", rows)
        features.attrs["name"] = bag.slide_id
        features.attrs["encoder"] = bag.spec.encoder
        file.flush()
        offset = features.id.get_offset() or 0
    return bytearray(image.getvalue().ljust(offset, b"\0")), offset


def _allocate(file: h5py.File, name: str, rows: NDArray[np.generic]) -> h5py.Dataset:
    """Reserve contiguous space at the end of the file without writing to it."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)  # equal content is to give equal bytes
    kind, space = h5py.h5t.py_create(rows.dtype), h5py.h5s.create_simple(rows.shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, layout))


def _block_sums(rows: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Return the CRC-32 of each block of the rows' bytes."""
    data = rows.reshape(-1).view(np.uint8).data
    return np.array([zlib.crc32(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)], "<u4")


def _stored_sums(path: Path, offset: int, n_bytes: int) -> NDArray[np.uint32]:
    """Return the CRC-32 of each block of the rows in a file; read, since the pages of a map would count as memory."""
    block = memoryview(bytearray(BLOCK_BYTES))
    sums = []
    with path.open("rb") as file:
        file.seek(offset)
        for first in range(0, n_bytes, BLOCK_BYTES):
            found = file.readinto(block[: min(BLOCK_BYTES, n_bytes - first)])
            sums.append(zlib.crc32(block[:found]))
    return np.array(sums, "<u4")


def _write_attributes(file: h5py.File, bag: FeatureBag) -> None:
    spec = bag.spec.model_dump(exclude_none=True)
    provenance = dict(bag.provenance)
    footer = {key: provenance.pop(key, "") for key in ("input_fingerprint", "options_hash")}
    attributes = {
        "encoding-type": ENCODING_TYPE,
        "encoding-version": ENCODING_VERSION,
        "tool": f"eosin {__version__}",
        "slide_id": bag.slide_id,
        "n_rows": bag.n_instances,
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    for name, value in (attributes | spec | footer).items():
        file.attrs[name] = value


def _coords_footer(bag: FeatureBag) -> CoordsFooter:
    facts = bag.provenance
    return CoordsFooter(
        bag.slide_id,
        mpp_source=facts.get("mpp_source", "unknown"),
        fingerprint=facts.get("input_fingerprint", ""),
        options_hash=facts.get("options_hash", ""),
    )


def _compare(path: Path, bag: FeatureBag) -> None:
    written = read_bag(path, verify=True)
    same_rows = np.array_equal(written.features, bag.features) and written.features.dtype == bag.features.dtype
    if not same_rows or written.spec != bag.spec or written.slide_id != bag.slide_id:
        raise FeatureFileError(path, "does not hold what was written; check the disk")


_used: set[tuple[int, int, int, int]] = set()  # files whose rows were compared with their checksums in this process


def read_bag(path: Path | str, *, verify: bool | None = None) -> FeatureBag:
    """Open a feature file.

    Parameters
    ----------
    path : Path
        A file that `write_bag` made.
    verify : bool, optional
        Whether to compare the rows, too, with their checksums: about a second per 5 GB when the file is in memory.
        None does so on the first use in this process and again when the file has changed; after that opening takes
        milliseconds, whatever the size.

    Returns
    -------
    FeatureBag
        Its `features` are a read-only memory map.

    Raises
    ------
    FeatureFileError
        When the file is missing, damaged, of another kind or version, or larger than any slide's features can be.
    """
    path = Path(path)
    with _open_own(path) as (file, offset):
        spec, footer = _read_header(file, path)
        features = _map_rows(file, path, spec, footer.n_rows, offset)
        slide_id = str(file.attrs["slide_id"])
        grid = read_coords(file, path, checked=not verify) if "coords" in file else None
        provenance = _read_provenance(file, footer)
        identity = _identity(path)
        if verify or (verify is None and identity not in _used):
            _check_rows(file, path, features, offset)
            _used.add(identity)
        if grid is not None and grid.n_tiles != footer.n_rows:
            raise FeatureFileError(
                path, f"has {footer.n_rows} rows of features for {grid.n_tiles} tile coordinates; make it again"
            )
    return FeatureBag(features, spec, slide_id, grid, provenance)


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Return what changes when a file does."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size


def read_spec(path: Path) -> FeatureSpec:
    """Read how the features of a file were made, without opening its rows.

    Raises
    ------
    FeatureFileError
        As `read_bag`.
    """
    with _open_own(path) as (file, _):
        return _read_header(file, path)[0]


def read_footer(path: Path) -> Footer:
    """Read what a file was made from.

    Raises
    ------
    FeatureFileError
        As `read_bag`.
    """
    with _open_own(path) as (file, _):
        return _read_header(file, path)[1]


def read_rows_hash(path: Path) -> str:
    """Return a hash of all rows from their checksums, without reading them.

    Raises
    ------
    FeatureFileError
        As `read_bag`.
    """
    with _open_own(path) as (file, _):
        rows, table = require_dataset(file, "features", path), require_dataset(file, "checksums", path)
        digest = hashlib.sha256(f"{rows.dtype.str} {rows.shape}".encode())
        digest.update(np.asarray(table[:], "<u4").tobytes())
    return digest.hexdigest()[:DIGITS]


def verify_bag(path: Path) -> FeatureBag:
    """Read a file and check every byte and every rule of the format.

    Parameters
    ----------
    path : Path
        Feature file.

    Raises
    ------
    FeatureFileError
        Naming the damaged rows where the damage lies in the features.
    """
    bag = read_bag(path, verify=True)
    if not np.isfinite(bag.features).all():
        raise FeatureFileError(path, "holds infinite or NaN values; extract the slide again")
    return bag


def find_bags(folder: Path | str) -> dict[str, Path]:
    """Return the feature files of a folder by slide id, which is the file name without ``.h5``.

    Parameters
    ----------
    folder : Path
        Folder with files ``<slide id>.h5``, in itself or in the 256 folders of a job that is spread.

    Raises
    ------
    ConfigError
        When the folder is missing or has no feature file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of features")
    files = list_files(folder, SUFFIX)
    if not files:
        raise ConfigError(f"{folder}: has no feature files (*{SUFFIX}); run `eosin extract` or `eosin import` first")
    return files


def read_common_spec(bags: Mapping[str, Path]) -> FeatureSpec:
    """Read the one specification that all files share.

    Parameters
    ----------
    bags : mapping of str to Path
        As `find_bags` returns it.

    Raises
    ------
    FeatureMismatchError
        When two files were made differently; both are named.
    ConfigError
        When there is no file.
    """
    return read_headers(bags)[0]


def read_headers(bags: Mapping[str, Path]) -> tuple[FeatureSpec, dict[str, int]]:
    """Read the one specification of all files, and how many rows each has, opening each once.

    Raises
    ------
    FeatureMismatchError, ConfigError
        As `read_common_spec`.
    """
    if not bags:
        raise ConfigError("there are no feature files; pass a folder with at least one .h5 file")
    first, spec, n_rows = next(iter(bags.values())), None, {}
    for slide_id, path in bags.items():
        with _open_own(path) as (file, _):
            own, footer = _read_header(file, path)
        spec = spec or own
        spec.require_match(own, path, expected_by=str(first))
        n_rows[slide_id] = footer.n_rows
    assert spec is not None
    return spec, n_rows


@contextmanager
def _open_own(path: Path) -> Iterator[tuple[h5py.File, int]]:
    """Open a file of ours whose every byte outside the rows has been checked; also return the place of the rows."""
    offset = _check_metadata(path)
    with open_hdf5(path) as file:
        yield file, offset


def _check_metadata(path: Path) -> int:
    if not path.is_file():
        raise FeatureFileError(path, "no such file", code="missing")
    return check_image(path)


@contextmanager
def written_hdf5(path: Path) -> Iterator[h5py.File]:
    """Give the block an HDF5 file in memory, and write it when the block ends.

    Raises
    ------
    OutputError
        When the disk is full or may not be written; HDF5 itself would crash the process.
    """
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        yield file
    write_bytes(path, image.getbuffer())


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of unknown origin for reading; its members are plain, or it is refused.

    Raises
    ------
    FeatureFileError
        When the file is missing or damaged, or has soft or external links; also when reading in the block fails in
        one of the ways in which HDF5 reports damage.
    """
    if not path.is_file():
        raise FeatureFileError(path, "no such file", code="missing")
    try:
        with h5py.File(path, "r", locking=False) as file:
            _refuse_links(file, path)
            yield file
    except EosinError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise FeatureFileError(path, f"cannot be read ({' '.join(str(error).split())}); make it again") from error


def _refuse_links(group: h5py.Group, path: Path) -> None:
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise FeatureFileError(
                path, f"{name!r} is a link to another file, which eosin never follows", code="unsafe"
            )


def require_dataset(group: h5py.Group, name: str, path: Path) -> h5py.Dataset:
    """Return a dataset whose declared size is plausible, before anything is read from it.

    Raises
    ------
    FeatureFileError
        When it is missing, virtual or stored in other files, or declares more than 10 million rows, 8192 columns,
        32 GiB or 200 times what is stored.
    """
    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise FeatureFileError(path, f"has no dataset {name!r}")
    if dataset.is_virtual or dataset.external:
        raise FeatureFileError(
            path,
            f"{name!r} refers to data in other files, which eosin never reads; copy the data into one file",
            code="unsafe",
        )
    if dataset.shape is None or dataset.dtype.hasobject:
        raise FeatureFileError(path, f"{name!r} is not an array of numbers")
    rows, columns = (*dataset.shape, 1, 1)[:2]
    declared, stored = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    too_large = rows > MAX_ROWS or columns > MAX_DIM or declared > MAX_BYTES
    if too_large or (declared > FREE_EXPANSION_BYTES and declared > MAX_EXPANSION * stored):
        raise FeatureFileError(
            path,
            f"{name!r} declares {' x '.join(map(str, dataset.shape))} values, but {stored} "
            "bytes are stored; make the file again",
            code="unsafe",
        )
    return dataset


def _read_header(file: h5py.File, path: Path) -> tuple[FeatureSpec, Footer]:
    attributes = file.attrs
    kind, version = attributes.get("encoding-type"), attributes.get("encoding-version")
    if (kind, version) != (ENCODING_TYPE, ENCODING_VERSION):
        raise FeatureFileError(path, f"is {kind} {version}; this eosin reads {ENCODING_TYPE} {ENCODING_VERSION}")
    values = {name: _plain(attributes[name]) for name in FeatureSpec.model_fields if name in attributes}
    try:
        spec = FeatureSpec.parse(values, source="its header")
    except ConfigError as error:
        raise FeatureFileError(path, f"has a damaged header ({error})") from error
    return spec, Footer(
        n_rows=int(attributes["n_rows"]),
        input_fingerprint=str(attributes["input_fingerprint"]),
        options_hash=str(attributes["options_hash"]),
    )


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _read_provenance(file: h5py.File, footer: Footer) -> dict[str, str]:
    provenance = {str(key): str(value) for key, value in json.loads(file.attrs["provenance"]).items()}
    filled = {"input_fingerprint": footer.input_fingerprint, "options_hash": footer.options_hash}
    return provenance | {key: value for key, value in filled.items() if value}


def _map_rows(
    file: h5py.File, path: Path, spec: FeatureSpec, n_rows: int, offset: int
) -> NDArray[np.float16] | NDArray[np.float32]:
    rows = require_dataset(file, "features", path)
    if rows.dtype not in FLOATS or rows.shape != (n_rows, spec.dim) or rows.chunks is not None:
        raise FeatureFileError(
            path,
            f"'features' is {rows.shape} of {rows.dtype}; the header says ({n_rows}, {spec.dim}), "
            "contiguous, float16 or float32",
        )
    if n_rows == 0:
        return np.empty(rows.shape, rows.dtype)
    if rows.id.get_offset() != offset or offset + rows.nbytes > path.stat().st_size:
        raise FeatureFileError(path, "does not hold its features at the stated offset; make it again", code="unsafe")
    mapped = np.memmap(path, rows.dtype, mode="r", offset=offset, shape=rows.shape)
    return mapped.view(np.ndarray)


def _check_rows(file: h5py.File, path: Path, rows: NDArray[np.float16] | NDArray[np.float32], offset: int) -> None:
    table = require_dataset(file, "checksums", path)
    stated, found = table[:], _stored_sums(path, offset, rows.nbytes)
    if table.attrs["block_bytes"] != BLOCK_BYTES or stated.shape != found.shape:
        raise FeatureFileError(path, "has no table of checksums for its rows; make it again")
    bad = np.flatnonzero(stated != found)
    if len(bad):
        width = rows.shape[1] * rows.dtype.itemsize
        first, last = int(bad[0]) * BLOCK_BYTES // width, ((int(bad[-1]) + 1) * BLOCK_BYTES - 1) // width
        raise FeatureFileError(
            path, f"is damaged in rows {first} to {min(last, len(rows) - 1)}; make it again", code="damaged"
        )

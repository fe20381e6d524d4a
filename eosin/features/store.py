"""The feature file: one slide's features as a single memory map, with everything needed to trust them.

The layout is specified in `docs/feature-file.md`. Rows lie contiguously and uncompressed, so a bag opens in
milliseconds whatever its size. HDF5 checks its own metadata (``libver`` v110); the checksums of ours cover every byte
of the file, in blocks of 1 MiB, so that no flipped bit goes unseen.
"""

import io
import json
import mmap
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from eosin import __version__
from eosin.errors import ConfigError, EosinError, FeatureFileError
from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.files import write_file
from eosin.wsi.coordinates import CoordsFooter, read_coords, write_coords

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
        Fingerprint of the slide file (`eosin.batch.file_fingerprint`); empty when the input was no slide.
    options_hash : str
        Fingerprint of everything else that determines the rows.
    """

    n_rows: int
    input_fingerprint: str
    options_hash: str


def write_bag(path: Path, bag: FeatureBag) -> None:
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
    finite = np.isfinite(bag.features).all(axis=1)
    if not finite.all():
        raise ValueError(f"features of {bag.slide_id} are not finite in row {int(np.argmin(finite))}; not written")
    write_file(path, lambda temporary: _write(temporary, bag), verify=lambda temporary: _compare(temporary, bag))


def _write(path: Path, bag: FeatureBag) -> None:
    image = io.BytesIO()  # on a full disk HDF5 itself crashes the process, Python raises
    with h5py.File(
        image,
        "w",
        libver=("v110", "v110"),
        alignment_threshold=1,
        alignment_interval=ALIGNMENT_BYTES,
    ) as file:
        _write_attributes(file, bag)
        features = file.create_dataset("features", data=bag.features.astype(bag.features.dtype.newbyteorder("<")))
        features.attrs["name"] = bag.slide_id
        features.attrs["encoder"] = bag.spec.encoder
        if bag.grid is not None:
            write_coords(file, bag.grid, _coords_footer(bag))
        file.flush()
        offset = _reserve_checksums(file)
    path.write_bytes(image.getbuffer())
    _seal(path, offset)


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


def _reserve_checksums(file: h5py.File) -> int:
    """Add the zeroed table of checksums, large enough for the whole file; return its place in the file."""
    slack = 16 * 2**10
    rough = file.id.get_filesize() + slack
    n_blocks = (rough + 4 * (rough // BLOCK_BYTES + 1)) // BLOCK_BYTES + 1
    table = file.create_dataset("checksums", data=np.zeros(n_blocks, "<u4"))
    table.attrs["block_bytes"] = BLOCK_BYTES
    return int(table.id.get_offset())


def _seal(path: Path, offset: int) -> None:
    """Fill the table of checksums of a closed file."""
    sums = _block_sums(path, offset, skipped_bytes=0)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(sums.tobytes())


def _block_sums(path: Path, offset: int, *, skipped_bytes: int) -> NDArray[np.uint32]:
    """Return the CRC-32 of each block of the file, with `skipped_bytes` at `offset` taken as zeros."""
    sums = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            lo, hi = max(offset, start), min(offset + skipped_bytes, start + len(block))
            if lo < hi:
                block = block[: lo - start] + bytes(hi - lo) + block[hi - start :]
            sums.append(zlib.crc32(block))
    return np.array(sums, "<u4")


def _compare(path: Path, bag: FeatureBag) -> None:
    written = read_bag(path, verify=True)
    same_rows = np.array_equal(written.features, bag.features) and written.features.dtype == bag.features.dtype
    if not same_rows or written.spec != bag.spec or written.slide_id != bag.slide_id:
        raise FeatureFileError(path, "does not hold what was written; check the disk")


def read_bag(path: Path, *, verify: bool = False) -> FeatureBag:
    """Open a feature file without reading its rows.

    Parameters
    ----------
    path : Path
        A file that `write_bag` made.
    verify : bool
        Also compare every byte with its checksum, about a second per 5 GB when the file is in memory.

    Returns
    -------
    FeatureBag
        Its `features` are a read-only memory map.

    Raises
    ------
    FeatureFileError
        When the file is missing, damaged, of another kind or version, or larger than any slide's features can be.
    """
    with open_hdf5(path) as file:
        spec, footer = _read_header(file, path)
        features = _map_rows(file, path, spec, footer.n_rows)
        slide_id = str(file.attrs["slide_id"])
        grid = read_coords(file, path) if "coords" in file else None
        provenance = _read_provenance(file, footer)
        if verify:
            _check_sums(file, path)
        if grid is not None and grid.n_tiles != footer.n_rows:
            raise FeatureFileError(path, f"has {footer.n_rows} rows of features for {grid.n_tiles} places")
    return FeatureBag(features, spec, slide_id, grid, provenance)


def read_spec(path: Path) -> FeatureSpec:
    """Read how the features of a file were made, without opening its rows.

    Raises
    ------
    FeatureFileError
        As `read_bag`.
    """
    with open_hdf5(path) as file:
        return _read_header(file, path)[0]


def read_footer(path: Path) -> Footer:
    """Read what a file was made from.

    Raises
    ------
    FeatureFileError
        As `read_bag`.
    """
    with open_hdf5(path) as file:
        return _read_header(file, path)[1]


def verify_bag(path: Path) -> None:
    """Check every byte and every rule of the format.

    Raises
    ------
    FeatureFileError
        Naming the damaged rows where the damage lies in the features.
    """
    bag = read_bag(path, verify=True)
    if not np.isfinite(bag.features).all():
        raise FeatureFileError(path, "holds values that are not finite; extract the slide again")


def find_bags(folder: Path) -> dict[str, Path]:
    """Return the feature files of a folder by slide id, which is the file name without ``.h5``.

    Raises
    ------
    ConfigError
        When the folder is missing or has no feature file.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of features")
    files = sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    if not files:
        raise ConfigError(f"{folder}: has no feature files (*{SUFFIX}); run `eosin extract` or `eosin import` first")
    return {path.name.removesuffix(SUFFIX): path for path in files}


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
    if not bags:
        raise ConfigError("no feature files to read; pass a folder with at least one")
    first, *others = bags.values()
    spec = read_spec(first)
    for path in others:
        spec.require_match(read_spec(path), path, expected_by=str(first))
    return spec


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
            raise FeatureFileError(path, f"{name!r} is a link to elsewhere, which is never followed", code="unsafe")


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
        raise FeatureFileError(path, f"{name!r} keeps its data in other files, which are never read", code="unsafe")
    if dataset.shape is None or dataset.dtype.hasobject:
        raise FeatureFileError(path, f"{name!r} is no array of numbers")
    rows, columns = (*dataset.shape, 1, 1)[:2]
    declared, stored = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    too_large = rows > MAX_ROWS or columns > MAX_DIM or declared > MAX_BYTES
    if too_large or (declared > FREE_EXPANSION_BYTES and declared > MAX_EXPANSION * stored):
        raise FeatureFileError(
            path,
            f"{name!r} declares {' x '.join(map(str, dataset.shape))} values for {stored} stored bytes; refused",
            code="unsafe",
        )
    return dataset


def _read_header(file: h5py.File, path: Path) -> tuple[FeatureSpec, Footer]:
    kind, version = file.attrs.get("encoding-type"), file.attrs.get("encoding-version")
    if kind != ENCODING_TYPE:
        found = f"its encoding-type is {kind!r}" if kind else "it states no encoding-type"
        raise FeatureFileError(path, f"is no feature file of eosin ({found}); `eosin import` reads other tools' files")
    if version != ENCODING_VERSION:
        raise FeatureFileError(
            path, f"has format version {version}, this eosin reads {ENCODING_VERSION}; use the eosin that wrote it"
        )
    values = {name: _plain(file.attrs[name]) for name in FeatureSpec.model_fields if name in file.attrs}
    try:
        spec = FeatureSpec.parse(values, source="its header")
    except ConfigError as error:
        raise FeatureFileError(path, f"has a damaged header ({error})") from error
    return spec, Footer(
        n_rows=int(file.attrs["n_rows"]),
        input_fingerprint=str(file.attrs["input_fingerprint"]),
        options_hash=str(file.attrs["options_hash"]),
    )


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _read_provenance(file: h5py.File, footer: Footer) -> dict[str, str]:
    provenance = {str(key): str(value) for key, value in json.loads(file.attrs["provenance"]).items()}
    filled = {"input_fingerprint": footer.input_fingerprint, "options_hash": footer.options_hash}
    return provenance | {key: value for key, value in filled.items() if value}


def _map_rows(file: h5py.File, path: Path, spec: FeatureSpec, n_rows: int) -> NDArray[np.float16] | NDArray[np.float32]:
    rows = require_dataset(file, "features", path)
    if rows.dtype not in FLOATS or rows.shape != (n_rows, spec.dim) or rows.chunks is not None:
        raise FeatureFileError(
            path,
            f"'features' is {rows.shape} of {rows.dtype}; the header says ({n_rows}, {spec.dim}), "
            "contiguous, float16 or float32",
        )
    if n_rows == 0:
        return np.empty(rows.shape, rows.dtype)
    offset = rows.id.get_offset()
    if offset is None or offset + rows.nbytes > path.stat().st_size:
        raise FeatureFileError(path, "is shorter than its features; make it again", code="unsafe")
    mapped = np.memmap(path, rows.dtype, mode="r", offset=offset, shape=rows.shape)
    return mapped.view(np.ndarray)


def _check_sums(file: h5py.File, path: Path) -> None:
    table = require_dataset(file, "checksums", path)
    if table.dtype != np.dtype("<u4") or table.ndim != 1 or table.attrs["block_bytes"] != BLOCK_BYTES:
        raise FeatureFileError(path, "has no table of checksums; make it again")
    stated = table[:]
    offset = table.id.get_offset()
    found = _block_sums(path, offset, skipped_bytes=table.nbytes)
    if len(found) > len(stated):
        raise FeatureFileError(path, "is longer than what was written; make it again", code="damaged")
    bad = np.flatnonzero(stated != np.pad(found, (0, len(stated) - len(found))))
    if len(bad):
        raise FeatureFileError(
            path, f"is damaged{_place(file['features'], bad * BLOCK_BYTES)}; make it again", code="damaged"
        )


def _place(rows: h5py.Dataset, starts: NDArray[np.int64]) -> str:
    """Say which rows the damaged blocks that begin at `starts` may touch."""
    if rows.size == 0:
        return ""
    width = rows.shape[1] * rows.dtype.itemsize
    first = (int(starts.min()) - rows.id.get_offset()) // width
    last = (int(starts.max()) + BLOCK_BYTES - 1 - rows.id.get_offset()) // width
    return f" somewhere in rows {max(0, first)} to {min(len(rows) - 1, last)}, or in its header"

"""Other tools' files, recognised by their content, and ours in other tools' layouts.

Each module knows one tool's layout; this one opens a file safely and finds the module that knows it.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from eosin._files import locked, write_text
from eosin.errors import ConfigError, FeatureFileError
from eosin.features._store import FREE_EXPANSION_BYTES, MAX_BYTES, MAX_EXPANSION, open_hdf5, read_bag
from eosin.features.interop import _clam as clam
from eosin.features.interop import _npz as npz
from eosin.features.interop import _others as others
from eosin.features.interop import _stamp as stamp
from eosin.features.interop import _trident as trident
from eosin.features.interop._foreign import (
    Foreign,
    ImportOptions,
    Places,
    SlideFacts,
    merged_labels,
    safe_id,
    store,
)

__all__ = ["ImportOptions", "Imported", "export_bag", "find_files", "import_file"]

Layout = Literal["trident", "clam"]
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
SUFFIXES = (*HDF5_SUFFIXES, ".npz", ".pt", ".csv")


@dataclass(frozen=True)
class Imported:
    """What `import_file` recognised and wrote.

    Parameters
    ----------
    kind : str
        The layout in words.
    paths : tuple of Path
        Files and folders that were written.
    """

    kind: str
    paths: tuple[Path, ...]


def import_file(path: Path, out: Path, options: ImportOptions | None = None) -> Imported:
    """Turn a file of another tool into files of ours.

    Parameters
    ----------
    path : Path
        The file; what it is follows from its content.
    out : Path
        Features go to ``OUT/features``, coordinates to ``OUT/<tiling>/patches``: then `OUT` is a job folder. Labels are
        added to ``OUT/labels.csv``.
    options : ImportOptions, optional
        What the file does not say; asked for by name when it is needed.

    Returns
    -------
    Imported

    Raises
    ------
    FeatureFileError
        When the file is missing, damaged or of no known layout; with the code ``incomplete`` when it lacks something
        that only the user knows; with ``labels`` when it contradicts labels that are there.
    FeatureMismatchError
        When `OUT` has features of another encoder, mpp or width.
    """
    options = options or ImportOptions()
    if not path.is_file():
        raise FeatureFileError(path, "no such file", code="missing")
    options = options.of(path)
    if path.suffix == ".npz":
        return _import_npz(path, out, options)
    kind, slides = _read(path, options)
    labels = {safe_id(slide.slide_id, path): slide.label for slide in slides if slide.label is not None}
    table = out / "labels.csv"
    merged_labels(table, labels, path)  # a contradiction is found before anything is written
    written = [store(slide, path, out, options) for slide in slides]
    if labels:
        with locked(out / ".labels.csv.lock"):
            write_text(table, merged_labels(table, labels, path))
        written.append(table)
    return Imported(kind, tuple(written))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """List the files to import among files and folders; folders are searched with their subfolders.

    Raises
    ------
    ConfigError
        When a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.rglob("[!.]*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: has no file of a kind that eosin imports ({', '.join(SUFFIXES)})")
        files += [file for file in found if not file.name.endswith(".index.npz")]  # belongs to a bag of slideflow
    return files


def _read(path: Path, options: ImportOptions) -> tuple[str, Sequence[Foreign]]:
    facts = SlideFacts.from_options(options)
    if path.suffix in HDF5_SUFFIXES:
        with open_hdf5(path) as file:
            return _read_hdf5(file, path, options, facts)
    if path.suffix == ".pt":
        return "tensor of features", [_with_places(others.read_tensor(path, facts), options)]
    if path.suffix == ".csv":
        return "table of tiles", [others.read_text(path)]
    raise FeatureFileError(path, "is of no kind that eosin imports (.h5, .npz, .pt, .csv)")


def _read_hdf5(file: h5py.File, path: Path, options: ImportOptions, facts: SlideFacts) -> tuple[str, Sequence[Foreign]]:
    if "encoding-type" in file.attrs or ("coords" in file and "encoding-type" in file["coords"].attrs):
        raise FeatureFileError(path, "is eosin's own already; use it as it is")
    if stamp.is_stamp(file):
        return "feature file of STAMP", [stamp.read(file, path, facts)]
    if trident.is_trident(file):
        return "file of TRIDENT", [trident.read(file, path)]
    if clam.is_coordinates(file):
        return "coordinates file of CLAM", [clam.read_coordinates(file, path)]
    if others.is_wsinfer(file):
        return "coordinates file of wsinfer", [others.read_wsinfer(file, path, facts)]
    if clam.is_pixels(file):
        return "coordinates of CLAM with pixels", [clam.read_pixels(file, path)]
    if clam.is_features(file):
        return "feature file of CLAM", [clam.read_features(file, path, _read_places(options))]
    if others.is_acmil(file):
        return "feature file of ACMIL", others.read_acmil(file, path)
    if "attention_scores" in file:
        raise FeatureFileError(path, "holds attention scores of CLAM; import its features instead")
    raise FeatureFileError(path, f"has {', '.join(list(file)[:5]) or 'nothing'}; eosin does not know this layout")


def _with_places(slide: Foreign, options: ImportOptions) -> Foreign:
    return replace(slide, places=slide.places or _read_places(options))


def _read_places(options: ImportOptions) -> Places | None:
    """Read the coordinates file that the user names."""
    if options.coords is None:
        return None
    with open_hdf5(options.coords) as file:
        if trident.is_trident(file):
            return trident.places(file, options.coords)
        if clam.is_coordinates(file):
            return clam.places(file, options.coords)
    raise FeatureFileError(options.coords, "is not a coordinates file of CLAM, TRIDENT or eosin")


def _import_npz(path: Path, out: Path, options: ImportOptions) -> Imported:
    arrays = _read_npz(path)
    if npz.is_bags(arrays):
        return Imported("data set of bags", tuple(npz.import_bags(arrays, path, out)))
    if {"x", "y", "tile_index"} <= set(arrays):
        slide, spacing = others.read_hs2p(arrays, path)
        options = options.model_copy(update={"slide_mpp": options.slide_mpp or spacing})
        return Imported("coordinates file of hs2p", (store(slide, path, out, options),))
    raise FeatureFileError(
        path, f"has the arrays {', '.join(arrays)}; a data set of bags has {', '.join(npz.REQUIRED)}"
    )


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        expanded = declared > FREE_EXPANSION_BYTES and declared > MAX_EXPANSION * path.stat().st_size
        if declared > MAX_BYTES or expanded:
            raise FeatureFileError(path, f"declares {declared} bytes; refused", code="unsafe")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FeatureFileError):
            raise
        raise FeatureFileError(path, f"cannot be read as .npz ({error})") from error


def export_bag(path: Path, out: Path, layout: Layout) -> list[Path]:
    """Write a feature file of ours in the layout of another tool.

    Parameters
    ----------
    path : Path
        Feature file.
    out : Path
        Job folder of TRIDENT, or feature folder of CLAM.
    layout : "trident" or "clam"
        Whose.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    FeatureFileError
        When the file is damaged or has no places.
    ConfigError
        When there is no such layout.
    """
    writers = {"trident": trident.export, "clam": clam.export}
    if layout not in writers:
        raise ConfigError(f"no layout {layout!r} to export to; choose one of {', '.join(writers)}")
    return writers[layout](read_bag(path, verify=True), out)

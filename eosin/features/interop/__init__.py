"""Other tools' files, recognised by their content, and ours in other tools' layouts.

Each module knows one tool's layout; this one opens a file safely and finds the module that knows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eosin._files import locked, write_text
from eosin.errors import ConfigError, FeatureFileError
from eosin.features._foreign_hdf5 import Group, read_foreign
from eosin.features._store import read_bag
from eosin.features.interop import _clam as clam
from eosin.features.interop import _npz as npz
from eosin.features.interop import _others as others
from eosin.features.interop import _stamp as stamp
from eosin.features.interop import _trident as trident
from eosin.features.interop._foreign import (
    PATCHES,
    Foreign,
    ImportOptions,
    Places,
    SlideFacts,
    merged_labels,
    safe_id,
    store,
)
from eosin.features.interop._join import join, with_places

__all__ = ["ImportOptions", "Imported", "export_bag", "find_files", "group_files", "import_file", "import_slide"]

Layout = Literal["trident", "clam", "stamp"]
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
    notes : tuple of str
        What a person should know of it.
    """

    kind: str
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def import_file(path: Path | str, out: Path | str, options: ImportOptions | None = None) -> Imported:
    """Turn a file of another tool into files of ours; see `import_slide`, which takes one slide's several files."""
    path, out = Path(path), Path(out)
    return import_slide([path], out, options)


def import_slide(files: Sequence[Path], out: Path, options: ImportOptions | None = None) -> Imported:
    """Turn a file of another tool, or the several files of one slide, into files of ours.

    Parameters
    ----------
    files : sequence of Path
        What they are follows from their content.
    out : Path
        Features go to ``OUT/features``, coordinates to ``OUT/<tiling>/patches``: then `OUT` is a job folder. Labels are
        added to ``OUT/labels.csv``.
    options : ImportOptions, optional
        What the files do not say; asked for by name when it is needed.

    Returns
    -------
    Imported

    Raises
    ------
    FeatureFileError
        When a file is missing, damaged or of no known layout; with the code ``incomplete`` when it lacks something
        that only the user knows; ``contradiction`` when files, slide and options do not fit together; ``labels`` when
        it contradicts labels that are there.
    FeatureMismatchError
        When `OUT` has features of another encoder, mpp or width.
    """
    path, options = files[0], options or ImportOptions()
    for file in files:
        if not file.is_file():
            raise FeatureFileError(file, "no such file", code="missing")
    options = options.of(path)
    if path.suffix == ".npz":
        return _import_npz(path, out, options)
    given = _read_places(options)
    read = [(file, *_read(file, options)) for file in files]
    kind, slides = read[0][1], list(read[0][2])
    notes: list[str] = []
    if len(files) > 1:
        slides, notes = join([(file, slide) for file, _, found in read for slide in found])
        kind = ", ".join(dict.fromkeys(kind for _, kind, _ in read))
    if given is not None:
        slides = [with_places(slide, given, options.coords or path, path) for slide in slides]
    labels = {safe_id(slide.slide_id, path): slide.label for slide in slides if slide.label is not None}
    table = out / "labels.csv"
    merged_labels(table, labels, path)  # a contradiction is found before anything is written
    stored = [store(slide, path, out, options) for slide in slides]
    written = [one.path for one in stored]
    notes += [note for one in stored for note in one.notes]
    if labels:
        with locked(out / ".labels.csv.lock"):
            write_text(table, merged_labels(table, labels, path))
        written.append(table)
    return Imported(kind, tuple(written), tuple(notes))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """List the files to import among files and folders; folders are searched with their subfolders.

    Parameters
    ----------
    paths : sequence of Path
        Files, and folders.

    Returns
    -------
    list of Path
        Files in the order given; those of a folder sorted.

    Raises
    ------
    ConfigError
        When a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.rglob("[!.]*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: holds no file that eosin can import ({', '.join(SUFFIXES)})")
        files += [file for file in found if not file.name.endswith(".index.npz")]  # belongs to a bag of slideflow
    return files


def group_files(files: Sequence[Path]) -> list[list[Path]]:
    """Return the files slide by slide: those of one name in different folders, as CLAM and TRIDENT lay them out."""
    slides: dict[str, list[Path]] = {}
    for file in files:
        is_one_slide = file.suffix in (*HDF5_SUFFIXES, ".pt")
        name = file.stem.removesuffix(PATCHES) if is_one_slide else str(file)
        slides.setdefault(name, []).append(file)
    # what has features and places in one file comes first, because messages are about it
    return [sorted(group, key=_order) for group in slides.values()]


def _order(file: Path) -> tuple[bool, bool]:
    return file.suffix == ".pt", file.stem.endswith(PATCHES)


def _read(path: Path, options: ImportOptions) -> tuple[str, Sequence[Foreign]]:
    facts = SlideFacts.from_options(options)
    if path.suffix in HDF5_SUFFIXES:
        return _read_hdf5(read_foreign(path), path, facts)
    if path.suffix == ".pt":
        return "tensor of features", [others.read_tensor(path, facts)]
    if path.suffix == ".csv":
        return "table of tiles", [others.read_text(path)]
    raise FeatureFileError(path, "cannot be imported: the file name ends with none of .h5, .npz, .pt, .csv")


def _read_hdf5(file: Group, path: Path, facts: SlideFacts) -> tuple[str, Sequence[Foreign]]:
    if "encoding-type" in file.attrs or "encoding-type" in file.attributes("coords"):
        raise FeatureFileError(path, "is already a file of eosin; use it without importing")
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
        return "feature file of CLAM", [clam.read_features(file, path)]
    if others.is_acmil(file):
        return "feature file of ACMIL", others.read_acmil(file, path)
    if "attention_scores" in file:
        raise FeatureFileError(path, "holds attention scores of CLAM; import its features instead")
    raise FeatureFileError(
        path,
        f"has {', '.join(list(file)[:5]) or 'nothing'}; "
        "this is not a layout of CLAM, TRIDENT, STAMP or another tool that eosin reads",
    )


def _read_places(options: ImportOptions) -> Places | None:
    """Read the coordinates file that the user names."""
    if options.coords is None:
        return None
    file = read_foreign(options.coords)
    if trident.is_trident(file):
        return trident.places(file, options.coords)
    if clam.is_coordinates(file):
        return clam.places(file, options.coords)
    raise FeatureFileError(options.coords, "is not a coordinates file of CLAM, TRIDENT or eosin")


def _import_npz(path: Path, out: Path, options: ImportOptions) -> Imported:
    arrays = npz.read_npz(path)
    if npz.is_bags(arrays):
        return Imported("data set of bags", tuple(npz.import_bags(arrays, path, out)))
    if {"x", "y", "tile_index"} <= set(arrays):
        slide, spacing = others.read_hs2p(arrays, path)
        options = options.model_copy(update={"slide_mpp": options.slide_mpp or spacing})
        stored = store(slide, path, out, options)
        return Imported("coordinates file of hs2p", (stored.path,), stored.notes)
    raise FeatureFileError(
        path, f"has the arrays {', '.join(arrays)}; a data set of bags has {', '.join(npz.REQUIRED)}"
    )


def export_bag(path: Path | str, out: Path | str, layout: Layout) -> list[Path]:
    """Write a feature file of ours in the layout of another tool.

    Parameters
    ----------
    path : Path
        Feature file.
    out : Path
        Job folder of TRIDENT, or folder of features of CLAM or STAMP.
    layout : "trident", "clam" or "stamp"
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
    path, out = Path(path), Path(out)
    writers = {"trident": trident.export, "clam": clam.export, "stamp": stamp.export}
    if layout not in writers:
        raise ConfigError(f"there is no export layout {layout!r}; choose one of {', '.join(writers)}")
    return writers[layout](read_bag(path, verify=True), out)

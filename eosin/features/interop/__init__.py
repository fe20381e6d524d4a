"""Other tools' files, recognised by their content.

Each module knows one tool's layout; this one opens a file safely and finds the module that knows it.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eosin.errors import FeatureFileError
from eosin.features.interop import npz
from eosin.features.store import MAX_BYTES


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


def import_file(path: Path, out: Path) -> Imported:
    """Turn a file of another tool into files of ours.

    Parameters
    ----------
    path : Path
        The file; what it is follows from its content.
    out : Path
        Folder of the results.

    Returns
    -------
    Imported

    Raises
    ------
    FeatureFileError
        When the file is missing, damaged or of no known layout, or lacks something that only the user knows.
    """
    if not path.is_file():
        raise FeatureFileError(path, "no such file", code="missing")
    if path.suffix == ".npz":
        return _import_npz(path, out)
    raise FeatureFileError(path, "is of no layout that eosin imports; it reads .npz data sets of bags")


def _import_npz(path: Path, out: Path) -> Imported:
    arrays = _read_npz(path)
    if npz.is_bags(arrays):
        return Imported("data set of bags", tuple(npz.import_bags(arrays, path, out)))
    raise FeatureFileError(
        path, f"has the arrays {', '.join(arrays)}; a data set of bags has {', '.join(npz.REQUIRED)}"
    )


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        if declared > MAX_BYTES:
            raise FeatureFileError(path, f"declares {declared} bytes; refused", code="unsafe")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FeatureFileError):
            raise
        raise FeatureFileError(path, f"cannot be read as .npz ({error})") from error

"""Which DICOM files are one slide: the files of a series beside each other."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

SERIES_UID = 0x0020000E
PREAMBLE = 132


def is_dicom(head: bytes) -> bool:
    """Return whether a file's first bytes are those of DICOM."""
    return head[128:PREAMBLE] == b"DICM"


def group_series(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Group the instances of one series in one folder, which are one slide.

    Parameters
    ----------
    paths : iterable of Path
        Files of any kind; only those named ``.dcm`` are looked into.

    Returns
    -------
    dict
        The first file of each slide, by name, to all its files. A file that is alone, or states no series, stands for
        itself.
    """
    slides: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        uid = read_series_uid(path) if path.name.lower().endswith(".dcm") else ""
        slides.setdefault((path.parent.resolve(), uid) if uid else (path, ""), []).append(path)
    return {min(files): sorted(files) for files in slides.values()}


def read_series_uid(path: Path) -> str:
    """Return the Series Instance UID (0020,000E) of a file; empty when it is damaged, not DICOM, or states none.

    Reading stops there: the per-frame groups of a large slide, which come later, take seconds.
    """
    try:
        return _read_uid(path, path.stat().st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=2**16)  # the files of a folder are asked again for every slide in it
def _read_uid(path: Path, changed_ns: int) -> str:
    del changed_ns  # makes a file that was written again another one
    from pydicom.config import disable_value_validation
    from pydicom.filereader import read_partial

    try:
        with path.open("rb") as file:
            if not is_dicom(file.read(PREAMBLE)):
                return ""
            file.seek(0)
            with disable_value_validation():
                found = read_partial(file, stop_when=lambda tag, _vr, _length: tag > SERIES_UID)
            return str(found.get(SERIES_UID).value) if SERIES_UID in found else ""
    except Exception:  # noqa: BLE001 - a damaged file can end as any error; opening it as a slide says which
        return ""

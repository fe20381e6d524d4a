"""Where the file of a slide lies in a folder: in it, or in one of 256 folders in it, by the hash of the slide's id.

Many file systems take minutes to list, copy or delete a folder of a million files. A job that is spread has 4,000 in a
folder at that size. Readers find files in both places, so that a job may be spread when it already has files.
"""

import hashlib
import re
from pathlib import Path

FOLDERS = "[0-9a-f][0-9a-f]"
"""As a pattern of file names, and as a regular expression."""


def part_of(slide_id: str) -> str:
    """Return the name of the folder of a slide: two hexadecimal digits."""
    return hashlib.sha256(slide_id.encode()).hexdigest()[:2]


def place_file(folder: Path, slide_id: str, suffix: str, *, is_spread: bool) -> Path:
    """Return where the file of a slide is to lie; a file that lies in the folder itself stays there.

    Parameters
    ----------
    folder : Path
    slide_id : str
    suffix : str
        What follows the id in the name: ``.h5``, ``_patches.h5``.
    is_spread : bool
        Whether the folder is spread.
    """
    direct = folder / f"{slide_id}{suffix}"
    return folder / part_of(slide_id) / direct.name if is_spread and not direct.exists() else direct


def find_file(folder: Path, slide_id: str, suffix: str) -> Path:
    """Return where the file of a slide lies; its place in the folder itself when there is none."""
    found = place_file(folder, slide_id, suffix, is_spread=True)
    return found if found.exists() else folder / found.name


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the visible files of a folder that end so, by slide id, sorted by it."""
    spread = (path for path in folder.glob(f"{FOLDERS}/*{suffix}") if path.parent.name == part_of(_id(path, suffix)))
    found = {_id(path, suffix): path for path in (*spread, *folder.glob(f"*{suffix}")) if path.name[0] != "."}
    return {slide_id: found[slide_id] for slide_id in sorted(found)}


def whole_folder(file: Path) -> Path:
    """Return the folder that a file belongs to, of which the folder that it lies in may be a part."""
    return file.parent.parent if re.fullmatch(FOLDERS, file.parent.name) else file.parent


def _id(path: Path, suffix: str) -> str:
    return path.name.removesuffix(suffix)

"""Numbered files that belong together: splits, folds, candidates.

The command that writes such a set owns it. ``manifest.json`` names its files with their SHA-256; readers take what it
names and nothing else, so that ``splits_3.csv`` of an earlier set with more folds is never pooled with today's.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from eosin._files import write_json
from eosin._seals import is_intact, read_json, sealed
from eosin.errors import ConfigError

MANIFEST = "manifest.json"
SCHEMA = 1


def begin_set(folder: Path, members: Sequence[str], *, pattern: str) -> None:
    """Make a folder ready for a set: remove what the set before it has more.

    Parameters
    ----------
    folder : Path
        May be missing.
    members : sequence of str
        Paths in the folder that the set will have.
    pattern : str
        Regular expression of the names directly in the folder that such a set can have.

    Raises
    ------
    ConfigError
        If the folder holds such a name that neither this set nor the one before it has: eosin deletes only its own.
    """
    before = _named(folder)
    tops = {_top(name) for name in members}
    found = [path for path in sorted(folder.glob("*")) if re.fullmatch(pattern, path.name) and path.name not in tops]
    strange = [path.name for path in found if path.name not in {_top(name) for name in before}]
    if strange:
        raise ConfigError(
            f"{folder}: {', '.join(strange[:5])} would be read as a part of the new set of {len(tops)}; "
            "delete it or choose another folder"
        )
    if before and set(before) != set(members):
        _write(folder, dict.fromkeys(members, ""))  # nobody reads a mixture, should this run be killed
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def finish_set(folder: Path, members: Sequence[str]) -> None:
    """Write the manifest of a set whose files are there; `OutputError` where the folder cannot be written."""
    _write(folder, {name: _hash(folder / name) for name in members})


def members_of(folder: Path) -> tuple[str, ...] | None:
    """Return the files of the set in a folder; None where there is no manifest, as of other tools and eosin 0.1.

    Raises
    ------
    ConfigError
        If a file is missing or is not the one that the manifest names, or the set was not finished.
    """
    if not (folder / MANIFEST).exists():
        return None
    named = _named(folder)
    for name in named:
        require_named(folder / name, folder, named)
    return tuple(named)


def require_named(path: Path, folder: Path | None = None, named: dict[str, str] | None = None) -> None:
    """Refuse a file that is not the one which the manifest of its folder names; other files pass.

    Raises
    ------
    ConfigError
        See `members_of`.
    """
    folder = folder or path.parent
    named = _named(folder) if named is None else named
    stated = named.get(path.relative_to(folder).as_posix())
    if stated is None or (path.is_file() and stated == _hash(path)):
        return
    raise ConfigError(
        f"{path}: is not the file that {MANIFEST} beside it names: it was changed or deleted, or the run that writes "
        f"it has not finished; run that command again, or delete {MANIFEST} to take all files as they are"
    )


def _named(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        data = read_json(path)
        if data["schema"] != SCHEMA or not is_intact(data):
            raise ValueError("its checksum does not fit")
        return {str(name): str(value) for name, value in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); make the files again, or delete it") from None


def _write(folder: Path, files: dict[str, str]) -> None:
    write_json(folder / MANIFEST, sealed({"schema": SCHEMA, "files": files}))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _top(name: str) -> str:
    return name.partition("/")[0]

"""The one way a file is written: whole, or not there.

Every output of the package passes through `write_file`: temporary name in the target folder, write, fsync, verify,
rename, fsync of the folder. Nothing else in the package opens a file of the user's for writing, and no C library is
given a path to write to.
"""

import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import IO, BinaryIO

from eosin.errors import OutputError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

ORPHAN_AGE_S = 3600.0
FINGERPRINT_BYTES = 2**20
TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.tmp")
LOCK = re.compile(r"\..+\.(h5|json|csv)\.lock")
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def write_file(path: Path, write: Callable[[BinaryIO], None], *, verify: Callable[[Path], None] | None = None) -> None:
    """Write a file so that it is whole or not there, whatever kills the process or fills the disk.

    Parameters
    ----------
    path : Path
        Final name; its folder is made when it is missing.
    write : callable
        Writes into the open file that it is given, through Python: Pillow takes a short write for a success and HDF5
        crashes on a full disk, so that they encode into memory, see `write_bytes`. It should only write: what can fail
        for other reasons is computed before.
    verify : callable, optional
        Opens the temporary file again and raises when it is not what was meant.

    Raises
    ------
    OutputError
        When the file cannot be written, verified or renamed; nothing is left under either name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_orphans(path)
    except OSError as error:
        raise OutputError(path.parent, f"cannot be written to ({error.strerror or error})") from error
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with temporary.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
        if sys.platform != "win32":
            _sync_folder(path.parent)
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:
        raise OutputError(path, f"could not be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file from memory with `write_file`, and read it again to see that it is what was meant."""

    def write(file: BinaryIO) -> None:
        file.write(data)

    def verify(temporary: Path) -> None:
        if temporary.read_bytes() != data:
            raise OutputError(path, "reads back differently from what was written; check the disk")

    write_file(path, write, verify=verify)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it is whole or not there, for libraries whose files are folders (Zarr).

    Parameters
    ----------
    path : Path
        Final name; a folder of this name is replaced.
    write : callable
        Is given the name of a folder that does not exist yet, and makes it.

    Raises
    ------
    OutputError
        When the folder cannot be written or renamed.
    """
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    before = temporary.with_name(f"{temporary.name}.before")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.exists():  # a folder cannot be renamed onto one that has files
            path.replace(before)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(path, f"could not be written ({error.strerror or error})") from error
    finally:
        for leftover in (temporary, before):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep_orphans(path: Path) -> None:
    """Remove temporary files of this name that a killed process left behind."""
    pattern = f".{escape(path.name)}.*.tmp{path.suffix}"
    for orphan in _temporary_files(path.parent):
        if fnmatchcase(orphan.name, pattern) and _is_orphan(orphan):
            orphan.unlink(missing_ok=True)


def _is_orphan(temporary: Path) -> bool:
    """Return whether the writer of a temporary file is gone: its process on this host, its time on another."""
    found = re.search(rf"\.{_HOST}-(\d+)-[0-9a-f]+\.tmp", temporary.name)
    if found is not None and sys.platform != "win32":
        return not is_running(int(found[1]))
    try:
        return time.time() - temporary.stat().st_mtime > ORPHAN_AGE_S
    except OSError:  # it is gone already
        return False


def is_running(number: int) -> bool:
    """Return whether there is a process of this number on this machine; where that cannot be asked, there is."""
    if sys.platform == "win32":  # where os.kill ends the process
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


@lru_cache(maxsize=256)
def _temporary_files(folder: Path) -> tuple[Path, ...]:
    """Return the temporary files in a folder when this process first writes there.

    Looking again for each of n files of a folder would take n² steps in all.
    """
    return tuple(folder.glob(".*.tmp*"))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_file`."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: object) -> None:
    """Write indented JSON with `write_file`; NaN and infinity are refused because JSON has none."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append a line of text in one step; the file and its folder are made when they are missing.

    The file is opened and closed each time: on a network file system others see a line only after that, and a file
    that was taken away in the meantime is made again. A disk that fills up can tear the last line, so readers leave out
    a line that they do not understand. It is not synced: what a power failure takes is found again in the outputs.

    Raises
    ------
    OutputError
        When it cannot be written.
    """
    data = f"{line}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            written = file.write(data)
    except OSError as error:
        raise OutputError(path, f"could not be appended to ({error.strerror or error})") from error
    if written != len(data):
        raise OutputError(path, "could not be appended to (the disk is full)")


def open_part(path: Path) -> BinaryIO:
    """Open what is there of a copy to go on with it; nobody reads it before it is whole, checked and renamed."""
    return path.open("ab")


def paths_of(given: Path | str | Sequence[Path | str]) -> list[Path]:
    """Return one path or several, as people write them, as a list."""
    return [Path(given)] if isinstance(given, Path | str) else [Path(one) for one in given]


def file_fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits from a file's size and its first and last MiB: cheap even for a slide of 5 GB.

    Of a folder (OME-Zarr) they are made from the names, sizes and times of the files in it.
    """
    if path.is_dir():
        parts = [
            f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in path.rglob("*")
        ]
        return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive advisory lock on a file while the block runs.

    Where the platform or the file system has no locks the block runs without; a lock saves double work, no output's
    integrity rests on it.

    Raises
    ------
    OutputError
        When the lock file cannot be made.
    """
    handle = _lock(path)
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed it stays, and does no harm
            path.unlink()
        handle.close()


def _lock(path: Path) -> IO[str]:
    """Return the open lock file once this process alone has it, and it is still the one that the name leads to."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("w")
        except OSError as error:
            raise OutputError(path.parent, f"cannot be written to ({error.strerror or error})") from error
        if sys.platform == "win32":
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            logger.warning("%s cannot be locked on this file system", path)
            return handle
        with suppress(FileNotFoundError):
            if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                return handle
        handle.close()  # the process that had it has removed it


def clear_leftovers(root: Path) -> None:
    """Remove temporary files and locks that runs which were killed have left in a folder of results, and below it.

    A file whose process lives, or whose lock is held, is kept; so is whatever eosin did not name.
    """
    for folder, folders, names in os.walk(root):
        for name in [name for name in folders if TEMPORARY.search(name) and _is_orphan(Path(folder) / name)]:
            folders.remove(name)
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
        for name in names:
            path = Path(folder) / name
            with suppress(OSError):  # another run removes it, or it is of another user
                if (TEMPORARY.search(name) and _is_orphan(path)) or (LOCK.fullmatch(name) and _is_free(path)):
                    path.unlink()


def _is_free(lock: Path) -> bool:
    """Return whether nobody holds a lock; where that cannot be known, somebody does."""
    if sys.platform == "win32" or lock.stat().st_size:
        return False
    with lock.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True

"""Slides in object stores and on web servers: copied to a staging folder before they are read, and removed after.

A copy goes on where a killed run stopped, as long as the store still has the same version. Copies that are in use are
locked; when the folder is full, those that were read longest ago go first. Everything that was read goes when the
command ends.
"""

import atexit
import base64
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from eosin._files import locked, open_part, write_json
from eosin._processes import require_running
from eosin._seals import read_json
from eosin.errors import ConfigError, MissingPackageError, SlideOpenError
from eosin.wsi._slide import Slide

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER, GIGABYTES, AHEAD = "EOSIN_STAGING", "EOSIN_STAGING_GB", "EOSIN_STAGING_AHEAD"
DEFAULT_GB, DEFAULT_AHEAD = 100.0, 2
CHUNK_BYTES = 8 * 2**20
TRIES = 5
FIRST_PAUSE_S = 0.5
POLL_S = 0.2
JOIN_S = 10.0
REFUSED = (401, 403)
WITHOUT_KEY = ("NoCredentialsError", "DefaultCredentialsError")
"""How the clients of S3 and Google say that they have no key; neither is a package of ours."""

WHOLE = (".dcm", ".mrxs", ".vms", ".vmu", ".zarr")
"""Formats of several files; a copy of one of them is not a slide."""


@dataclass(frozen=True)
class Version:
    """What a store says of a file without reading it.

    Parameters
    ----------
    size : int
        Bytes; -1 where the server does not say.
    tag : str
        ETag, else the time of the last change; empty where the server says neither.
    md5 : str
        Of the content, hexadecimal, where the store states it.
    has_ranges : bool
        Whether a part of the file can be asked for.
    """

    size: int
    tag: str = ""
    md5: str = ""
    has_ranges: bool = True

    def key(self) -> str:
        """Return 16 hexadecimal digits that change when the store says that the file changed."""
        return hashlib.sha256(f"{self.size} {self.tag} {self.md5}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store.

    Parameters
    ----------
    url : str
        With its scheme; what follows ``?`` may be a signature and is never shown.
    """

    url: str

    @property
    def name(self) -> str:
        """File name."""
        path = urlsplit(self.url).path if self.url.startswith("http") else self.url
        return unquote(path.rstrip("/").rsplit("/", 1)[-1])

    @property
    def staged(self) -> Path:
        """Where its copy lies, or will."""
        folder = hashlib.sha256(self.url.split("?", 1)[0].encode()).hexdigest()[:16]
        return staging_folder() / folder / (self.name or "index")

    def version(self) -> Version:
        """Ask the store for size and version.

        Raises
        ------
        SlideOpenError
            Code ``missing``, ``forbidden`` or ``unreachable``.
        """
        info = self._ask(lambda files, path: files.info(path))
        tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
        size = -1 if info.get("size") is None else int(info["size"])
        return Version(size, tag.strip('"'), _md5(info), bool(info.get("partial", True)))

    def files(self) -> list[str]:
        """Return the addresses of the files in a folder of the store, and below it."""
        folder = RemoteFile(f"{self.url.rstrip('/')}/") if self.url.startswith("http") else self
        return sorted(folder._ask(lambda files, path: [files.unstrip_protocol(name) for name in files.find(path)]))

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        """Put a question to the store, again when the connection fails."""
        try:
            from fsspec.core import url_to_fs

            files, path = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise MissingPackageError(error) from error
        for attempt in range(TRIES):
            require_running()
            try:
                return question(files, path)
            except Exception as error:  # every store has errors of its own
                refusal = self._refusal(error)
                if refusal is not None:
                    raise refusal from error
                reason, pause = f"{type(error).__name__}: {error}", FIRST_PAUSE_S * 2**attempt
                logger.info("%s: %s; asked again after %g s", self.name, reason, pause)
                if attempt < TRIES - 1:
                    time.sleep(pause)
        why = f"the store does not answer ({_without(reason, self.url)})"
        raise SlideOpenError(Path(self.name), why, code="unreachable")

    def _refusal(self, error: BaseException) -> SlideOpenError | None:
        """Return an error that another try would not mend."""
        status = int(getattr(error, "status", getattr(error.__cause__, "status", 0)))
        if isinstance(error, PermissionError) or status in REFUSED or type(error).__name__ in WITHOUT_KEY:
            why = "the store refuses to hand it out; check the credentials"
            return SlideOpenError(Path(self.name), why, code="forbidden")
        if status == 404 or (isinstance(error, FileNotFoundError) and not _may_pass(error.__cause__)):
            return SlideOpenError(Path(self.name), "the store has no such file; check the address", code="missing")
        return None


TAGS = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "mtime")


def _may_pass(cause: BaseException | None) -> bool:
    """Return whether what made fsspec say that there is no file may be over soon: a connection that failed."""
    is_of_connection = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return is_of_connection and int(getattr(cause, "status", 500)) >= 500


def _without(text: str, url: str) -> str:
    """Return an error's text without the address, which may be signed or named after a patient."""
    return re.sub(r"\S+://\S+", "...", text.replace(url, "..."))


def _md5(info: dict[str, Any]) -> str:
    stated = info.get("md5Hash") or info.get("Content-MD5") or ""
    with suppress(ValueError):
        return base64.b64decode(stated, validate=True).hex()
    return ""


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise ConfigError(f"{name}={text}: expected a number") from None


@functools.cache
def staging_folder() -> Path:
    """Return the folder of the copies, which nobody else can read.

    Raises
    ------
    ConfigError
        If it belongs to another user.
    """
    stated = os.environ.get(FOLDER, "")
    user = getattr(os, "getuid", lambda: "")()
    folder = Path(stated) if stated else Path(tempfile.gettempdir()) / f"eosin-staging-{user}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not stated and sys.platform != "win32" and folder.stat().st_uid != user:
        raise ConfigError(f"{folder}: belongs to another user; set {FOLDER} to a folder of your own")
    return folder


@dataclass(frozen=True)
class Copy:
    """A copy in the staging folder, whole or on its way."""

    path: Path

    @property
    def part(self) -> Path:
        """What has come so far."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def note(self) -> Path:
        """Version of what is being copied, and the checksum of what was."""
        return self.path.with_name("origin.json")

    @property
    def used(self) -> Path:
        """Exists when the copy has been opened; its time says when."""
        return self.path.with_name("used")

    def origin(self) -> dict[str, Any]:
        """Return the note; empty where there is none."""
        try:
            return dict(read_json(self.note))
        except (OSError, ValueError, TypeError):
            return {}

    def is_of(self, version: Version) -> bool:
        """Return whether the copy is whole, untouched since, and of this version."""
        origin = self.origin()
        try:
            state = self.path.stat()
        except OSError:
            return False
        return origin.get("version") == version.key() and origin.get("state") == [state.st_size, state.st_mtime_ns]

    def hold(self) -> int | None:
        """Return a descriptor that keeps the copy from being removed; None when it is gone."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not self.path.exists() or os.fstat(descriptor).st_ino != self.path.stat().st_ino:
                os.close(descriptor)
                return None
        return descriptor

    def remove(self) -> bool:
        """Remove the copy; return False while somebody reads it."""
        try:
            with self.path.open("rb") as file:
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.path.parent, ignore_errors=True)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


class NoRoomError(Exception):
    """A copy that is made ahead would need the room of one that nobody has read yet."""


def fetch(remote: RemoteFile, *, is_needed: Callable[[], bool] = lambda: True, is_ahead: bool = False) -> Copy:
    """Copy a file of a store into the staging folder, unless its present version is there.

    Parameters
    ----------
    remote : RemoteFile
    is_needed : callable
        Asked between pieces; what has come so far stays when it says no.
    is_ahead : bool
        Whether nobody waits for it, so that copies which wait to be read stay.

    Raises
    ------
    SlideOpenError
        If the store does not hand it out, or the file changes meanwhile (code ``changed``).
    NoRoomError
        If there is room only for who waits.
    """
    if remote.name.lower().endswith(WHOLE):
        why = "slides of several files are not copied from a store; copy the folder to a disk first"
        raise SlideOpenError(Path(remote.name), why, code="unsupported-format")
    copy = Copy(remote.staged)
    copy.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(copy.path.parent.with_suffix(".lock")):
        version = remote.version()
        if copy.is_of(version):
            return copy
        if not make_room(max(version.size, 0), but=copy.path.parent, of_unread=not is_ahead) and is_ahead:
            raise NoRoomError
        copy.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _resume(remote, copy, version, is_needed)
        if not is_needed():
            return copy
        if remote.version().key() != version.key():
            copy.part.unlink(missing_ok=True)
            raise SlideOpenError(Path(remote.name), "changed while it was copied; run again", code="changed")
        _finish(remote, copy, version)
    return copy


def _resume(remote: RemoteFile, copy: Copy, version: Version, is_needed: Callable[[], bool]) -> None:
    """Append to the part what is missing of it; a part of another version is begun again."""
    if copy.origin().get("version") != version.key() or not version.has_ranges or version.size < 0:
        copy.part.unlink(missing_ok=True)
        copy.path.unlink(missing_ok=True)
    write_json(copy.note, {"version": version.key()})
    if not version.has_ranges or version.size < 0:
        remote._ask(lambda files, path: files.get_file(path, str(copy.part)))
        return
    with open_part(copy.part) as file:
        if file.tell():
            logger.info("%s: the copy goes on at %d of %d bytes", remote.name, file.tell(), version.size)
        while file.tell() < version.size and is_needed():
            start, end = file.tell(), min(file.tell() + CHUNK_BYTES, version.size)
            data = remote._ask(functools.partial(_piece, start=start, end=end))
            file.write(data[start:] if len(data) == version.size else data)  # a server may ignore ranges silently


def _piece(files: Any, path: str, *, start: int, end: int) -> bytes:
    data: bytes = files.cat_file(path, start=start, end=end)
    if not data:
        raise ConnectionError("an empty answer")
    return data


def _finish(remote: RemoteFile, copy: Copy, version: Version) -> None:
    with copy.part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() if version.md5 else ""
    size = copy.part.stat().st_size
    if version.size not in (-1, size) or md5 != version.md5:
        copy.part.unlink()
        why = "the copy differs from the size or checksum that the store states; run again"
        raise SlideOpenError(Path(remote.name), why, code="changed")
    copy.part.replace(copy.path)
    state = copy.path.stat()
    write_json(
        copy.note,
        {"version": version.key(), "state": [size, state.st_mtime_ns], "sha256": found, "tag": version.tag},
    )


def make_room(size: int, *, but: Path, of_unread: bool) -> bool:
    """Remove copies that nobody reads, those read longest ago first, until a file of `size` bytes fits the bound.

    Parameters
    ----------
    size : int
    but : Path
        Folder of a copy that stays.
    of_unread : bool
        Whether copies that nobody has read yet may go, too.

    Returns
    -------
    bool
        Whether it fits.
    """
    most = _number(GIGABYTES, DEFAULT_GB) * 1e9
    copies = [copy for copy in _copies() if copy.path.parent != but]
    total = sum(copy.path.stat().st_size for copy in copies if copy.path.exists())
    for copy in sorted(copies, key=_last_used):
        if total + size <= most or not (of_unread or copy.used.exists()):
            break
        taken = copy.path.stat().st_size if copy.path.exists() else 0
        if copy.remove():
            total -= taken
    return total + size <= most


def _copies() -> list[Copy]:
    notes = staging_folder().glob("*/origin.json")
    named = {"origin.json", "used"}
    return [
        Copy(path)
        for note in notes
        for path in note.parent.iterdir()
        if path.name not in named and path.suffix != ".part" and not path.name.startswith(".")
    ]


def _last_used(copy: Copy) -> float:
    """Return when a copy was read last; those that wait to be read come after all others."""
    try:
        return copy.used.stat().st_mtime
    except OSError:
        return float("inf")


def sweep() -> None:
    """Remove every copy that was read and is not being read."""
    for copy in _copies():
        if copy.used.exists():
            copy.remove()


@functools.cache
def sweep_at_end() -> None:
    """Remove copies when this process ends."""
    atexit.register(sweep)


def open_copy(remote: RemoteFile, read: Callable[[Path], Slide]) -> Slide:
    """Copy a file, open it, and keep the copy until it is closed.

    Parameters
    ----------
    remote : RemoteFile
    read : callable
        Opens the copy.

    Returns
    -------
    Slide
        With a note of what was copied.

    Raises
    ------
    SlideOpenError
        As of `fetch`.
    """
    sweep_at_end()
    copy = fetch(remote)
    while (descriptor := copy.hold()) is None:  # another process needed the room before it was locked
        copy = fetch(remote)
    copy.used.touch()
    try:
        opened = read(copy.path)
    except BaseException:
        os.close(descriptor)
        raise
    release, close = weakref.finalize(opened, os.close, descriptor), opened.close

    def close_both() -> None:
        close()
        release()  # now: an open slide refers to itself, so it may live until Python looks for such circles

    opened.close = close_both  # type: ignore[method-assign]
    origin = copy.origin()
    size, sha256, tag = origin["state"][0], str(origin["sha256"])[:16], origin["tag"] or "not stated"
    opened.notes.append(f"copied from {remote.url.split(':', 1)[0]}: {size} bytes, sha256 {sha256}, version {tag}")
    return opened


@contextmanager
def working_ahead(remotes: Sequence[RemoteFile]) -> Iterator[None]:
    """Copy the next files in a thread while the block runs; at most `EOSIN_STAGING_AHEAD` wait to be read."""
    if not remotes:
        yield
        return
    stopping = threading.Event()
    thread = threading.Thread(target=_work_ahead, args=(remotes, stopping), name="eosin-staging", daemon=True)
    sweep_at_end()
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(JOIN_S)  # a store that does not answer must not hold up the end


def _work_ahead(remotes: Sequence[RemoteFile], stopping: threading.Event) -> None:
    most = int(_number(AHEAD, DEFAULT_AHEAD))
    waiting: list[Copy] = []
    for remote in remotes:
        while len(waiting) >= most and not stopping.wait(POLL_S):
            waiting = [copy for copy in waiting if copy.path.exists() and not copy.used.exists()]
        while not stopping.is_set():
            # whatever is wrong is met again, and recorded, by who reads the slide
            with suppress(Exception):
                try:
                    waiting.append(fetch(remote, is_needed=lambda: not stopping.is_set(), is_ahead=True))
                except NoRoomError:
                    stopping.wait(POLL_S)
                    continue
            break

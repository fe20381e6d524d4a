"""Who works on what: several runs on one job, on one machine or many, share the work instead of doing it twice.

A claim is a lock of the operating system on a hidden file beside the output, so it ends with its process, however that
ends. Where the file system has no locks, or keeps them to one machine, a claim is a lease: a file whose time a thread
renews, and that others remove when it has not been renewed for `LEASE_S`. A claim saves work; no file's integrity rests
on it, because outputs are whole and equal whoever writes them.
"""

import json
import logging
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Generic, TypeVar

from eosin._processes import call_apart, require_running
from eosin._records import process_name
from eosin.errors import OutputError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE_ELSEWHERE = "another run made it in the meantime"
POLL_S = 0.5
BEAT_S = 20.0
LEASE_S = 120.0
CHECK_S = 60.0
FORCE = "EOSIN_LEASES"
"""Set to 1 in the environment, it makes every claim a lease, for sites where `eosin doctor --job` sees no need."""

LOCAL_LOCKS = {"localflock", "nolock", "local_lock=all", "local_lock=flock"}
"""Options of a mount under which a lock is seen on one machine only (Lustre, NFS)."""


class Claims:
    """The outputs that this process works on."""

    def __init__(self) -> None:
        self._held: dict[Path, IO[bytes] | Lease] = {}

    def take(self, output: Path) -> bool:
        """Claim an output; return False while another run has it.

        Raises
        ------
        OutputError
            When nothing can be written beside the output.
        """
        lock = output.with_name(f".{output.name}.lock")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            claim = Lease.take(lock.with_suffix(".lease")) if why_leases(output.parent) else _lock(lock)
        except OSError as error:
            raise OutputError(output.parent, f"cannot be written to ({error.strerror or error})") from error
        if claim is None:
            return False
        self._held[output] = claim
        return True

    def release(self, output: Path) -> None:
        """Give up a claim; nothing happens where there is none."""
        claim = self._held.pop(output, None)
        if isinstance(claim, Lease):
            claim.release()
        elif claim is not None:
            output.with_name(f".{output.name}.lock").unlink(missing_ok=True)
            claim.close()

    def release_all(self) -> None:
        """Give up every claim."""
        for output in list(self._held):
            self.release(output)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold the claim on an output while the block runs; wait for it while another run has it.

    Raises
    ------
    OutputError
        When nothing can be written beside the output.
    """
    claims = Claims()
    while not claims.take(output):
        require_running()
        time.sleep(POLL_S)
    try:
        yield
    finally:
        claims.release_all()


def check_claims(folder: Path) -> str:
    """Try in two processes whether claims in a folder exclude each other; say how they are made and what was found.

    Raises
    ------
    OutputError
        If nothing can be written there, or both processes got the same claim.
    """
    output = folder / f"claims-{secrets.token_hex(4)}"
    with claimed(output):
        if call_apart(_can_take, output, timeout_s=CHECK_S):
            raise OutputError(folder, f"two processes can claim the same slide; set {FORCE}=1 to use leases")
        why = why_leases(folder)
    if not call_apart(_can_take, output, timeout_s=CHECK_S):
        raise OutputError(folder, "a claim outlives the run that made it; set EOSIN_LEASES=1 to use leases")
    return f"leases, because {why}" if why else "locks; two processes on this machine exclude each other"


def _can_take(output: Path) -> bool:
    claims = Claims()
    taken = claims.take(output)
    claims.release_all()
    return taken


def _lock(path: Path) -> IO[bytes] | None:
    """Return a locked file, None when another process has it or has just removed it."""
    handle = path.open("wb")
    if sys.platform == "win32":
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    handle.close()
    return None


def why_leases(folder: Path) -> str:
    """Return why claims in this folder are leases; an empty text where locks do."""
    if os.environ.get(FORCE) == "1":
        return f"{FORCE}=1 is set"
    return _why_no_locks(folder.stat().st_dev, folder)


@cache
def _why_no_locks(device: int, folder: Path) -> str:  # of one folder of each file system
    local = LOCAL_LOCKS & _mount_options(device)
    if local:
        return f"it is mounted with {', '.join(sorted(local))}, so locks end at the machine"
    if sys.platform == "win32":
        return ""
    probe = folder / f".locks-{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        logger.warning("%s has no locks (%s); runs share its work by leases", folder, error.strerror or error)
        return f"it has no locks ({error.strerror or error})"
    finally:
        probe.unlink(missing_ok=True)
    return ""


def _mount_options(device: int) -> set[str]:
    """Return the options of the file system of a device number, as Linux lists them; elsewhere none."""
    wanted = f"{os.major(device)}:{os.minor(device)}" if sys.platform != "win32" else ""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if fields[2] == wanted:
                return {option for field in (fields[5], fields[-1]) for option in field.split(",")}
    return set()


@dataclass(frozen=True)
class Lease:
    """A claim that has to be renewed; its file holds a token, so that nobody renews or removes what is another's.

    Attributes
    ----------
    path : Path
    token : str
    ended : threading.Event
    """

    path: Path
    token: str
    ended: threading.Event

    @classmethod
    def take(cls, path: Path) -> "Lease | None":
        """Take a lease that nobody has, or that has not been renewed for `LEASE_S`; None otherwise."""
        _break_stale(path)
        token = secrets.token_hex(8)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump({"by": process_name(), "token": token}, file)
        except FileExistsError:
            return None
        lease = cls(path, token, threading.Event())
        threading.Thread(target=lease._beat, name="eosin-lease", daemon=True).start()
        return lease

    def release(self) -> None:
        """Remove the file, if it is still this lease's."""
        self.ended.set()
        if _token(self.path) == self.token:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S) and _token(self.path) == self.token:
            with suppress(OSError):
                os.utime(self.path)


def _token(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _break_stale(path: Path) -> None:
    """Remove a lease whose holder is gone.

    Its age is measured by the clock of the file server, which sets the times of both files. Two that find it stale at
    once must not remove the lease that one of them takes next: it is renamed, which one of them does first, and put
    back when it turns out to be another than the one that was judged.
    """
    stale = _token(path)
    probe = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    try:
        renewed = path.stat().st_mtime
        probe.touch()
        if probe.stat().st_mtime - renewed <= LEASE_S:
            return
        path.rename(probe)
        if _token(probe) != stale:
            os.link(probe, path)
    except (FileNotFoundError, FileExistsError):  # released, or taken again, in the meantime
        pass
    finally:
        probe.unlink(missing_ok=True)


class Todo(Generic[T]):
    """The items that are left, each given out once, those of other runs last.

    Parameters
    ----------
    items : iterable
        In the order in which they are begun.
    key : callable
        Gives an item's slide id.
    output : callable, optional
        What is claimed for an item; nothing is claimed without it.
    is_done : callable, optional
        Whether an item's output is there already.
    begin : callable, optional
        Told the slide id of each item that is given out to be worked on.
    fits : callable, optional
        Whether there is time for another item; once there is not, nothing is left.
    """

    def __init__(
        self,
        items: Iterable[T],
        *,
        key: Callable[[T], str],
        output: Callable[[T], Path] | None = None,
        is_done: Callable[[T], bool] | None = None,
        begin: Callable[[str], None] = lambda _: None,
        fits: Callable[[], bool] = lambda: True,
    ) -> None:
        self._waiting = deque(items)
        self.key, self._output, self._is_done = key, output, is_done
        self._begin, self._fits = begin, fits
        self._claims = Claims()
        self._lock = threading.Lock()
        self.items: Mapping[str, T] = {key(item): item for item in self._waiting}

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> tuple[T, bool] | None:
        """Return the next item and whether another run has made its file in the meantime.

        None while other runs work on all that are left, and when nothing is left.
        """
        with self._lock:
            if not self._fits():
                self._waiting.clear()
            for _ in range(len(self._waiting)):
                item = self._waiting.popleft()
                if self._output is None or self._claims.take(self._output(item)):
                    is_made = self._is_made(item)
                    if not is_made:
                        self._begin(self.key(item))
                    return item, is_made
                self._waiting.append(item)
            return None

    def _is_made(self, item: T) -> bool:
        """Tell whether another run has made the output since this one looked; nobody else can while it is claimed."""
        return self._output is not None and self._output(item).exists() and bool(self._is_done and self._is_done(item))

    def drain(self) -> None:
        """Give nothing out any more."""
        with self._lock:
            self._waiting.clear()

    def put_back(self, items: Iterable[T]) -> None:
        """Let items that were taken be taken again, before all others."""
        with self._lock:
            for item in reversed(list(items)):
                self._release(item)
                self._waiting.appendleft(item)

    def release(self, slide_id: str) -> None:
        """End the claim on an item that is finished, well or badly."""
        with self._lock:
            if slide_id in self.items:
                self._release(self.items[slide_id])

    def _release(self, item: T) -> None:
        if self._output is not None:
            self._claims.release(self._output(item))

    def close(self) -> None:
        """End all claims."""
        with self._lock:
            self._claims.release_all()

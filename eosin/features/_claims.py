"""Which slide is whose: several runs on one job share the work instead of doing it twice.

A claim is a lock of the operating system on a hidden file beside the output, so it ends with its process, however that
ends. It saves work; no file's integrity rests on it, because outputs are whole and equal whoever writes them.
"""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

from eosin.errors import OutputError
from eosin.wsi._slide_file import SlideFile

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)


DONE_ELSEWHERE = "another run extracted it in the meantime"


class Claims:
    """The outputs that this process works on."""

    def __init__(self) -> None:
        self._held: dict[Path, IO[bytes]] = {}

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
            handle = lock.open("wb")
        except OSError as error:
            raise OutputError(output.parent, f"cannot be written to ({error.strerror or error})") from error
        if not _lock(handle, lock):
            handle.close()
            return False
        self._held[output] = handle
        return True

    def release(self, output: Path) -> None:
        """Give up a claim; nothing happens where there is none."""
        handle = self._held.pop(output, None)
        if handle is not None:
            output.with_name(f".{output.name}.lock").unlink(missing_ok=True)
            handle.close()

    def release_all(self) -> None:
        """Give up every claim."""
        for output in list(self._held):
            self.release(output)


def _lock(handle: IO[bytes], path: Path) -> bool:
    """Lock an open file; return whether it is ours and still the one that the name leads to."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # without locks two runs may do the same work, no more
        logger.debug("%s cannot be locked on this file system", path)
        return True
    try:
        return os.fstat(handle.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:  # removed by the run that had it
        return False


class Todo:
    """The slides that are left, each given out once, those of other runs last.

    Parameters
    ----------
    slides : iterable of SlideFile
        In the order in which they are begun.
    output : callable
        Where a slide's features go.
    is_done : callable
        Whether they are there already.
    """

    def __init__(
        self, slides: Iterable[SlideFile], output: Callable[[SlideFile], Path], is_done: Callable[[SlideFile], bool]
    ) -> None:
        self._waiting = deque(slides)
        self._output, self._is_done = output, is_done
        self._claims = Claims()
        self._lock = threading.Lock()
        self.slides: Mapping[str, SlideFile] = {slide.slide_id: slide for slide in self._waiting}

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> tuple[SlideFile, bool] | None:
        """Return the next slide and whether another run has made its file in the meantime.

        None while other runs work on all that are left, and when nothing is left.
        """
        with self._lock:
            for _ in range(len(self._waiting)):
                slide = self._waiting.popleft()
                if self._claims.take(self._output(slide)):
                    done = self._output(slide).exists() and self._is_done(slide)
                    if done:
                        self._claims.release(self._output(slide))
                    return slide, done
                self._waiting.append(slide)
            return None

    def put_back(self, slides: Iterable[SlideFile]) -> None:
        """Let slides that were taken be taken again, before all others."""
        with self._lock:
            for slide in reversed(list(slides)):
                self._claims.release(self._output(slide))
                self._waiting.appendleft(slide)

    def release(self, slide_id: str) -> None:
        """End the claim on a slide that is finished, well or badly."""
        with self._lock:
            if slide_id in self.slides:
                self._claims.release(self._output(self.slides[slide_id]))

    def close(self) -> None:
        """End all claims."""
        with self._lock:
            self._claims.release_all()

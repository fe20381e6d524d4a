"""How far a command is: a bar on a terminal, a line a minute without one, with failures and the time that is left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

from eosin.cli._folders import Folders

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MINUTE_S = 60.0
REDRAW_S = 0.2
WATCH_S = 5.0


at_work: list[Folders] = []
"""The folders that the command at work was given."""


def say(message: str) -> None:
    """Write one line to stderr, without the folders that the command at work was given."""
    for folders in at_work:
        message = folders.left_out(message)
    typer.echo(" ".join(message.split()), err=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[object], None] | None]:
    """Show a bar on stderr while the block runs; without a terminal, write a line per minute.

    Where the block tells of tiles (`eosin._batch.tell_tiles`), they are counted, because a slide may take an hour.

    Yields
    ------
    callable or None
        To be called once per finished item.
    """
    from eosin._batch import metered

    pace = Pace(what, total)
    if not sys.stderr.isatty():
        show = LineAMinute(pace)
        with metered(show.measure), show.watching():
            yield show.note
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = Bar(pace, bars, bars.add_task(what, total=total, said=pace.words()))
        with metered(bar.measure):
            yield bar.note


@dataclass
class Pace:
    """How many items are finished, how fast, and how long the rest will take.

    Parameters
    ----------
    what : str
        Name of the stage.
    total : int or None
        Number of items.
    """

    what: str
    total: int | None
    begun: float = field(default_factory=lambda: time.monotonic())
    done: int = 0
    made: int = 0
    failed: int = 0
    tiles: int = 0
    open_slides: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, item: object) -> None:
        """Count an item; what was done before does not count for the pace."""
        self.done += 1
        status = getattr(item, "status", "ok")
        self.made += status != "skipped"
        self.failed += status == "failed"
        done, _ = self.open_slides.pop(getattr(item, "slide_id", ""), (0, 0))
        self.tiles += done

    def measure(self, slide_id: str, done: int, of: int) -> None:
        """Note how many tiles of a slide are done, and how many it has."""
        self.open_slides[slide_id] = (done, of)

    @property
    def n_tiles(self) -> int:
        """Tiles that are done."""
        return self.tiles + sum(done for done, _ in self.open_slides.values())

    def share(self) -> float:
        """Return how many items are done; one that tells of its tiles counts in part."""
        return self.done + sum(done / of for done, of in self.open_slides.values() if of)

    def left_s(self, now: float) -> float | None:
        """Return the seconds that are left if the rest goes on as what was made; None before anything was."""
        made = self.made + self.share() - self.done
        if not self.total or made <= 0:
            return None
        return max(0.0, (self.total - self.share()) * (now - self.begun) / made)

    def words(self, now: float | None = None) -> str:
        """Return how far it is, how fast, how long, and what failed."""
        now = time.monotonic() if now is None else now
        passed, left = max(now - self.begun, 1e-9), self.left_s(now)
        parts = [f"{self.done}{f' of {self.total}' if self.total else ''} done"]
        if self.n_tiles:
            parts += [f"{self.n_tiles:,} tiles", f"{self.n_tiles / passed:,.0f} tiles/s"]
        else:
            parts += [f"{3600 * self.made / passed:.0f} per hour"] if self.made else []
        if left is not None:
            parts += [f"{duration(left)} left"]
        elif self.total and self.done < self.total:
            parts += ["time left not known yet"]
        return ", ".join([*parts, *([f"{self.failed} failed"] if self.failed else [])])


class LineAMinute:
    """Says the pace once a minute, for the logs of batch systems."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.said = pace, pace.begun
        self._lock = threading.RLock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Say it in the block, too, while nothing comes: slides that other processes work on may take an hour each."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(WATCH_S):
                self._say()

        thread = threading.Thread(target=watch, name="eosin-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def note(self, item: object) -> None:
        """Count an item."""
        with self._lock:
            self.pace.note(item)
            self._say()

    def measure(self, slide_id: str, done: int, of: int) -> None:
        """Count tiles."""
        with self._lock:
            self.pace.measure(slide_id, done, of)
            self._say()

    def _say(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self.said >= MINUTE_S:
                self.said = now
                say(f"{self.pace.what}: {self.pace.words(now)}")


class Bar:
    """Draws the pace on a terminal, at most five times a second."""

    def __init__(self, pace: Pace, bars: "Progress", task: "TaskID") -> None:
        self.pace, self.bars, self.task, self.drawn = pace, bars, task, 0.0

    def note(self, item: object) -> None:
        """Count an item."""
        self.pace.note(item)
        self._draw()

    def measure(self, slide_id: str, done: int, of: int) -> None:
        """Count tiles."""
        self.pace.measure(slide_id, done, of)
        if time.monotonic() - self.drawn >= REDRAW_S:
            self._draw()

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        self.bars.update(self.task, completed=self.pace.share(), said=self.pace.words(self.drawn))


def duration(seconds: float) -> str:
    """Return a duration in words: 45 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

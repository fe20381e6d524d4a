"""One function over many slides.

`run_batch` skips what is done, isolates failures (in child processes, also a decoder that kills its process), appends
one record per slide when it is finished and stops only when the environment fails. `run_stage` does the same for a
`Stage`, an object that the workers of a cluster can rebuild; where it runs is said by `elsewhere`. `collect` is what
they share, for stages that bring results in an order of their own.
"""

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from eosin._claims import DONE_ELSEWHERE, POLL_S, Todo
from eosin._processes import Child, require_running, wait_for
from eosin._records import Log, Record, Report, Status, read_run_json
from eosin.errors import ConfigError, EosinError, MissingPackageError, MoreToDo, OutputError, WorkerError

__all__ = ["Outcome", "Record", "Report", "Stage", "Status", "read_run_json", "run_batch", "run_stage"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
ItemT = TypeVar("ItemT", contravariant=True)

ENVIRONMENT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
END_TIME = "SLURM_JOB_END_TIME"
"""Where SLURM says when it will end the job, in seconds since 1970; another batch system's script may set it, too."""


@dataclass(frozen=True)
class Outcome:
    """What a work function returns for one slide; a slide that fails raises instead."""

    status: Literal["ok", "empty", "skipped"] = "ok"
    message: str = ""
    reason: str = ""


Result = Outcome | EosinError | Record
"""What became of an item; a `Record` was made and appended by the process that did the work."""

Results = Generator[tuple[str, Result], None, None]
"""Slide ids with results, as items become complete."""


class Stage(Protocol[ItemT]):
    """What is done to every item of a stage, as a frozen dataclass that pydantic can write as JSON.

    A worker of a cluster rebuilds it once and keeps it, with whatever it has loaded.
    """

    @property
    def name(self) -> str:
        """Name of the stage in the records."""

    def key(self, item: ItemT) -> str:
        """Return the slide id of an item."""

    def output(self, item: ItemT) -> Path:
        """Return the path that is claimed while an item is worked on."""

    def is_done(self, item: ItemT) -> bool:
        """Tell whether the output is there and matches inputs and options."""

    def do(self, item: ItemT) -> Outcome:
        """Make the output, or raise."""


class Place(Protocol):
    """Where stages run instead of in this process."""

    def run(self, stage: Stage[T], todo: Todo[T], run_json: Path | None) -> Results:
        """Yield the results of all items; those that are not yielded are left for the next run."""


_places: list[Place] = []


@contextmanager
def elsewhere(place: Place) -> Iterator[None]:
    """Let every `run_stage` in the block run in a place."""
    _places.append(place)
    try:
        yield
    finally:
        _places.pop()


def is_elsewhere() -> bool:
    """Return whether stages run in another place than this process."""
    return bool(_places)


Meter = Callable[[str, int, int], None]
"""Told the id of a slide, how many of its tiles are done, and how many it has."""

_meters: list[Meter] = []


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Tell a meter of all tiles that this process finishes in the block."""
    _meters.append(meter)
    try:
        yield
    finally:
        _meters.pop()


def tell_tiles(slide_id: str, done: int, of: int) -> None:
    """Tell the meter, if there is one, how far a slide is; a stage whose slides take long calls this after a batch."""
    if _meters:
        _meters[-1](slide_id, done, of)


def run_stage(
    stage: Stage[T],
    items: Sequence[T],
    *,
    run_json: Path | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    timeout_s: float | None = None,
    progress: Callable[[Record], None] | None = None,
    ahead: Callable[[Sequence[T]], AbstractContextManager[None]] | None = None,
) -> Report:
    """Run a stage over items: here, in child processes, or where `elsewhere` says; arguments as of `run_batch`.

    Several runs at once share the items.
    """
    if _places:  # its workers look what is done, and claim
        return collect(
            items,
            lambda todo: _places[-1].run(stage, todo, run_json),
            key=stage.key,
            stage=stage.name,
            run_json=run_json,
            shard=shard,
            progress=progress,
            is_here=False,
        )
    return run_batch(
        items,
        stage.do,
        key=stage.key,
        stage=stage.name,
        is_done=stage.is_done,
        output=stage.output,
        run_json=run_json,
        workers=workers,
        shard=shard,
        timeout_s=timeout_s,
        progress=progress,
        ahead=ahead,
    )


def run_batch(
    items: Sequence[T],
    work: Callable[[T], Outcome],
    *,
    key: Callable[[T], str],
    stage: str,
    is_done: Callable[[T], bool] | None = None,
    output: Callable[[T], Path] | None = None,
    run_json: Path | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    timeout_s: float | None = None,
    progress: Callable[[Record], None] | None = None,
    ahead: Callable[[Sequence[T]], AbstractContextManager[None]] | None = None,
) -> Report:
    """Apply `work` to every item; one bad slide never stops the others.

    Parameters
    ----------
    items : sequence
        One per slide. With `workers` they are pickled.
    work : callable
        Returns an `Outcome` or raises. An `EosinError` becomes a failed record with its code; any other exception
        too, with the code ``internal``.
    key : callable
        Gives an item's slide id.
    stage : str
        Name of the stage in the records.
    is_done : callable, optional
        True when the item's output is present and matches inputs and options; such items are recorded as skipped.
    output : callable, optional
        Path that an item makes. It is claimed meanwhile, so that several runs share the items.
    run_json : Path, optional
        File that keeps the last record per stage and slide, see `eosin._records`.
    workers : int
        0 runs in this process; n >= 1 in n spawned processes, where a crash or a time-out costs one slide only.
    shard : (int, int)
        Zero-based index and number of shards: this call takes every n-th item.
    timeout_s : float, optional
        Wall-clock seconds after which a slide in a child process is given up.
    progress : callable, optional
        Called with each record as it is made.
    ahead : callable, optional
        Given the items that are left, returns what is open while they are worked on.

    Raises
    ------
    OutputError
        When the disk, a permission or the device stops the run; finished slides stay finished.
    MissingPackageError
        When the work needs a package that is not installed.
    ConfigError
        When two items share a slide id or the shard is impossible.
    MoreToDo
        When the batch system's time limit leaves no time for another slide.
    """

    def make(todo: Todo[T]) -> Results:
        return _run_here(work, todo) if workers == 0 else _run_in_processes(work, todo, key, workers, timeout_s)

    return collect(
        items,
        make,
        key=key,
        stage=stage,
        is_done=is_done,
        output=output,
        run_json=run_json,
        shard=shard,
        progress=progress,
        ahead=ahead,
    )


def collect(
    items: Sequence[T],
    make: Callable[[Todo[T]], Results],
    *,
    key: Callable[[T], str],
    stage: str,
    is_done: Callable[[T], bool] | None = None,
    output: Callable[[T], Path] | None = None,
    run_json: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[Record], None] | None = None,
    ahead: Callable[[Sequence[T]], AbstractContextManager[None]] | None = None,
    is_here: bool = True,
) -> Report:
    """Record the results of items as they come; arguments and errors as of `run_batch`.

    Parameters
    ----------
    make : callable
        Takes items from a `Todo` and yields their slide ids with an `Outcome` or an `EosinError`.
    is_here : bool
        Whether what is taken is worked on at once by this process, which is then noted.
    """
    mine = list(_shard(items, shard))
    _refuse_duplicates([key(item) for item in items])
    log, records, deadline = Log(run_json), dict[str, Record](), _Deadline()

    def note(record: Record, *, is_new: bool = True) -> None:
        records[record.slide_id] = record
        if is_new:
            log.add(record)
        if progress is not None:
            progress(record)

    def begin(slide_id: str) -> None:
        deadline.begin(slide_id)
        if is_here:
            log.begin(slide_id, stage)

    left = []
    for item in mine:
        if is_done is not None and is_done(item):
            note(Record(key(item), stage, "skipped", "done"), is_new=not log.knows(key(item), stage))
        else:
            left.append(item)
    todo = Todo(left, key=key, output=output, is_done=is_done, begin=begin, fits=deadline.allows)
    try:
        with ahead(left) if ahead else nullcontext(), closing(make(todo)) as results:
            for slide_id, result in results:
                seconds = deadline.end(slide_id)
                note(record_of(slide_id, stage, result, seconds), is_new=not _is_recorded(result))
                todo.release(slide_id)
    finally:
        todo.close()
        log.merge()
    report = Report(tuple(records[key(item)] for item in mine if key(item) in records))
    if len(report.records) < len(mine):
        raise MoreToDo(
            f"{stage}: {len(mine) - len(report.records)} of {len(mine)} slides are left, because the time was over "
            f"({report.summary()}); run the same command again"
        )
    return report


def _is_recorded(result: Result) -> bool:
    """Tell whether the process that did the work has appended its record."""
    return isinstance(result, Record) or (isinstance(result, Outcome) and result.message == DONE_ELSEWHERE)


def record_of(slide_id: str, stage: str, result: Result, seconds: float) -> Record:
    """Return the record of a result."""
    if isinstance(result, Record):
        return result
    if isinstance(result, EosinError):
        return Record(slide_id, stage, "failed", result.code, " ".join(result.message.split()), seconds)
    return Record(slide_id, stage, result.status, result.reason, result.message, seconds)


class _Deadline:
    """When the batch system will end this job, and whether another slide fits before that."""

    def __init__(self) -> None:
        stated = os.environ.get(END_TIME, "")
        self.ends_at = float(stated) if stated.isdecimal() else None
        self.begun: dict[str, float] = {}
        self.longest = 0.0

    def begin(self, slide_id: str) -> None:
        self.begun[slide_id] = time.monotonic()

    def end(self, slide_id: str) -> float:
        """Return the seconds since a slide was begun; 0 for one that never was."""
        now = time.monotonic()
        seconds = now - self.begun.pop(slide_id, now)
        self.longest = max(self.longest, seconds)
        return round(seconds, 3)

    def allows(self) -> bool:
        """Return whether a slide as long as the longest so far would be finished in time."""
        return self.ends_at is None or time.time() + self.longest < self.ends_at


def _shard(items: Sequence[T], shard: tuple[int, int]) -> Sequence[T]:
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count}: the index must be 0 to {count - 1}")
    return items[index::count]


def _refuse_duplicates(slide_ids: Sequence[str]) -> None:
    twice = [slide_id for slide_id, number in Counter(slide_ids).items() if number > 1]
    if twice:
        raise ConfigError(f"slide ids must be unique; more than one slide is called {', '.join(sorted(twice)[:5])}")


def attempt(work: Callable[[T], Outcome], slide_id: str, item: T) -> Outcome | EosinError:
    """Return what work says of one item, or what is wrong with the item.

    Raises
    ------
    OutputError, MissingPackageError
        What would fail every item alike.
    """
    try:
        return work(item)
    except (OutputError, MissingPackageError):
        raise
    except ImportError as error:  # it would fail every slide alike
        raise MissingPackageError(error) from error
    except EosinError as error:
        logger.info("%s: %s", slide_id, getattr(error, "path", ""))
        return error
    except MemoryError:
        return WorkerError("this slide needs more memory than the process may use", code="out-of-memory")
    except OSError as error:
        if error.errno in ENVIRONMENT_ERRNOS:
            raise OutputError(error.filename or slide_id, error.strerror or str(error)) from error
        where = f"{Path(str(error.filename)).name}: " if error.filename else ""
        code = "missing" if isinstance(error, FileNotFoundError) else "io-error"
        return WorkerError(f"{where}{error.strerror or error}", code=code)
    except Exception as error:  # whatever one slide provokes must not stop the cohort
        logger.debug("slide %s failed unexpectedly", slide_id, exc_info=True)
        return WorkerError(f"{type(error).__name__}: {error}", code="internal")


def _taken(todo: Todo[T]) -> Iterator[tuple[str, T, bool]]:
    """Yield what is to be done next, waiting for other runs at the end."""
    while len(todo):
        require_running()
        taken = todo.take()
        if taken is None:
            time.sleep(POLL_S)
        else:
            yield (todo.key(taken[0]), *taken)


def _run_here(work: Callable[[T], Outcome], todo: Todo[T]) -> Results:
    for slide_id, item, is_made in _taken(todo):
        yield slide_id, Outcome(message=DONE_ELSEWHERE) if is_made else attempt(work, slide_id, item)


class _Worker:
    """A child process that works on one item at a time and can be replaced when it dies."""

    def __init__(self, work: Callable[[Any], Outcome]) -> None:
        self.child = Child(_serve, work, has_children=True)  # a reader may put what can hang into a process
        self.slide_id = ""
        self.started = 0.0
        self.is_lost = False

    def give(self, slide_id: str, item: object) -> None:
        self.slide_id, self.started = slide_id, time.monotonic()
        self.child.send((slide_id, item))

    def take(self) -> Outcome | EosinError:
        """Return what became of the item given last; raise what stopped the run."""
        try:
            result: Outcome | _Failed = self.child.receive()
        except WorkerError as error:
            self.is_lost = True
            return WorkerError(f"the process that read it {error.message}", code=error.code)
        return result.error if isinstance(result, _Failed) else result

    def time_out(self, timeout_s: float) -> EosinError:
        self.child.stop()
        self.is_lost = True
        return WorkerError(f"not finished after {timeout_s:g} s", code="timeout")


@dataclass(frozen=True)
class _Failed:
    """An error that is the result of one item: a `Child` raises errors that are sent bare."""

    error: EosinError


def _serve(connection: "Connection[Any, Any]", work: Callable[[Any], Outcome]) -> None:
    while True:
        slide_id, item = connection.recv()
        try:
            result = attempt(work, slide_id, item)
            connection.send(_Failed(result) if isinstance(result, EosinError) else result)
        except (OutputError, MissingPackageError) as error:
            connection.send(error)


def _run_in_processes(
    work: Callable[[T], Outcome], todo: Todo[T], key: Callable[[T], str], workers: int, timeout_s: float | None
) -> Results:
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while len(todo) or busy:
            while len(busy) < workers and (taken := todo.take()) is not None:
                item, is_made = taken
                if is_made:
                    yield key(item), Outcome(message=DONE_ELSEWHERE)
                    continue
                busy.append(idle.pop() if idle else _Worker(work))
                busy[-1].give(key(item), item)
            if not busy:  # other runs work on all that are left
                require_running()
                time.sleep(POLL_S)
            for worker, result in _next_results(busy, timeout_s):
                yield worker.slide_id, result
                busy.remove(worker)
                if worker.is_lost:
                    worker.child.stop()
                else:
                    idle.append(worker)
    finally:
        for worker in [*busy, *idle]:
            worker.child.stop()


def _next_results(busy: Sequence[_Worker], timeout_s: float | None) -> list[tuple[_Worker, Outcome | EosinError]]:
    if not busy:
        return []
    patience = None if timeout_s is None else max(0.0, min(w.started for w in busy) + timeout_s - time.monotonic())
    ready = wait_for([worker.child for worker in busy], patience)
    if ready or timeout_s is None:
        return [(worker, worker.take()) for worker in busy if worker.child in ready]
    late = [worker for worker in busy if time.monotonic() - worker.started >= timeout_s]
    return [(worker, worker.time_out(timeout_s)) for worker in late]

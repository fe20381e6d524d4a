"""One function over many slides.

`run_batch` skips what is done, isolates failures (in child processes, also a decoder that kills its process), reports
one record per slide in `run.json` and stops only when the environment fails.
"""

import errno
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from eosin import __version__
from eosin._files import locked, write_json
from eosin._processes import Child, require_running, wait_for
from eosin._seals import is_intact, read_json, sealed
from eosin.errors import ConfigError, EosinError, MissingPackageError, OutputError, WorkerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Status = Literal["ok", "empty", "failed", "skipped"]

ENVIRONMENT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
LOG_INTERVAL_S = 2.0
SCHEMA = 2
"""Of `run.json`; 1, of eosin 0.1, has no checksum."""


@dataclass(frozen=True)
class Outcome:
    """What a work function returns for one slide; a slide that fails raises instead."""

    status: Literal["ok", "empty", "skipped"] = "ok"
    message: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """What became of one slide in one stage: a line of `run.json`."""

    slide_id: str
    stage: str
    status: Status
    reason: str = ""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The records of one `run_batch` call, in the order of its items."""

    records: tuple[Record, ...]

    def __repr__(self) -> str:
        return f"<Report: {self.summary()}>"

    def count(self, status: Status) -> int:
        """Return how many slides ended with this status."""
        return Counter(record.status for record in self.records)[status]

    @property
    def failed(self) -> list[Record]:
        """The records of the slides that failed."""
        return [record for record in self.records if record.status == "failed"]

    @property
    def exit_code(self) -> int:
        """0 when no slide failed, else 1."""
        return 1 if self.failed else 0

    def summary(self) -> str:
        """Return one line: how many slides ended how."""
        counts = Counter(record.status for record in self.records)
        parts = [f"{counts[status]} {status}" for status in ("ok", "empty", "skipped", "failed") if counts[status]]
        number = len(self.records)
        return f"{number} slide{'s' if number != 1 else ''}: {', '.join(parts) or 'nothing to do'}"

    def then(self, later: "Report") -> "Report":
        """Return one report of two stages: for each slide its first failure, else its last record."""
        records = {record.slide_id: record for record in self.records}
        for record in later.records:
            if record.slide_id not in records or records[record.slide_id].status != "failed":
                records[record.slide_id] = record
        return Report(tuple(records.values()))


def run_batch(
    items: Sequence[T],
    work: Callable[[T], Outcome],
    *,
    key: Callable[[T], str],
    stage: str,
    is_done: Callable[[T], bool] | None = None,
    run_json: Path | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    timeout_s: float | None = None,
    progress: Callable[[Record], None] | None = None,
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
    run_json : Path, optional
        File that keeps the last record per stage and slide, merged with what other processes write there.
    workers : int
        0 runs in this process; n >= 1 in n spawned processes, where a crash or a time-out costs one slide only.
    shard : (int, int)
        Zero-based index and number of shards: this call takes every n-th item.
    timeout_s : float, optional
        Wall-clock seconds after which a slide in a child process is given up.
    progress : callable, optional
        Called with each record as it is made.

    Raises
    ------
    OutputError
        When the disk, a permission or the device stops the run; finished slides stay finished.
    MissingPackageError
        When the work needs a package that is not installed.
    ConfigError
        When two items share a slide id or the shard is impossible.
    """
    mine = list(_shard(items, shard))
    _refuse_duplicates([key(item) for item in items])
    log = _RunLog(run_json)
    records: dict[str, Record] = {}

    def note(record: Record) -> None:
        records[record.slide_id] = record
        log.add(record)
        if progress is not None:
            progress(record)

    try:
        todo: list[tuple[str, T]] = []
        for item in mine:
            if is_done is not None and is_done(item):
                note(Record(key(item), stage, "skipped", "done"))
            else:
                todo.append((key(item), item))
        made = (
            _run_here(work, todo, stage) if workers == 0 else _run_in_processes(work, todo, stage, workers, timeout_s)
        )
        for record in made:
            note(record)
    finally:
        log.flush()
    return Report(tuple(records[key(item)] for item in mine))


def _shard(items: Sequence[T], shard: tuple[int, int]) -> Sequence[T]:
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count}: the index must be at least 0 and below the number of shards")
    return items[index::count]


def _refuse_duplicates(slide_ids: Sequence[str]) -> None:
    twice = [slide_id for slide_id, number in Counter(slide_ids).items() if number > 1]
    if twice:
        raise ConfigError(f"slide ids must be unique; more than one slide is called {', '.join(sorted(twice)[:5])}")


def _attempt(work: Callable[[T], Outcome], slide_id: str, item: T, stage: str) -> Record:
    started = time.monotonic()

    def failed(reason: str, message: str) -> Record:
        return Record(slide_id, stage, "failed", reason, " ".join(message.split()), _since(started))

    try:
        outcome = work(item)
    except (OutputError, MissingPackageError):
        raise
    except ImportError as error:  # it would fail every slide alike
        raise MissingPackageError(error) from error
    except EosinError as error:
        return failed(error.code, error.message)
    except MemoryError:
        return failed("out-of-memory", "this slide needs more memory than the process may use")
    except OSError as error:
        if error.errno in ENVIRONMENT_ERRNOS:
            raise OutputError(error.filename or slide_id, error.strerror or str(error)) from error
        return failed("io-error", str(error))
    except Exception as error:  # whatever one slide provokes must not stop the cohort
        logger.debug("slide %s failed unexpectedly", slide_id, exc_info=True)
        return failed("internal", f"{type(error).__name__}: {error}")
    return Record(slide_id, stage, outcome.status, outcome.reason, outcome.message, _since(started))


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _run_here(work: Callable[[T], Outcome], todo: Sequence[tuple[str, T]], stage: str) -> Iterator[Record]:
    for slide_id, item in todo:
        require_running()
        yield _attempt(work, slide_id, item, stage)


class _Worker:
    """A child process that works on one item at a time and can be replaced when it dies."""

    def __init__(self, work: Callable[[Any], Outcome], stage: str) -> None:
        self.child = Child(_serve, work, stage, has_children=True)  # a reader may put what can hang into a process
        self.stage = stage
        self.slide_id = ""
        self.started = 0.0
        self.is_lost = False

    def give(self, slide_id: str, item: object) -> None:
        self.slide_id, self.started = slide_id, time.monotonic()
        self.child.send((slide_id, item))

    def take(self) -> Record:
        """Return the record of the item given last; raise what stopped the run."""
        try:
            record: Record = self.child.receive()
        except WorkerError as error:
            return self._given_up(error.code, f"the process that read it {error.message}")
        return record

    def time_out(self, timeout_s: float) -> Record:
        self.child.stop()
        return self._given_up("timeout", f"not finished after {timeout_s:g} s")

    def _given_up(self, reason: str, message: str) -> Record:
        self.is_lost = True
        return Record(self.slide_id, self.stage, "failed", reason, message, _since(self.started))


def _serve(connection: "Connection[Any, Any]", work: Callable[[Any], Outcome], stage: str) -> None:
    while True:
        slide_id, item = connection.recv()
        try:
            connection.send(_attempt(work, slide_id, item, stage))
        except (OutputError, MissingPackageError) as error:
            connection.send(error)


def _run_in_processes(
    work: Callable[[T], Outcome], todo: Sequence[tuple[str, T]], stage: str, workers: int, timeout_s: float | None
) -> Iterator[Record]:
    waiting = deque(todo)
    busy: list[_Worker] = []
    try:
        while waiting and len(busy) < workers:
            busy.append(_Worker(work, stage))
            busy[-1].give(*waiting.popleft())
        while busy:
            for worker, record in _next_records(busy, timeout_s):
                yield record
                busy.remove(worker)
                if worker.is_lost or not waiting:
                    worker.child.stop()
                if waiting:
                    busy.append(_Worker(work, stage) if worker.is_lost else worker)
                    busy[-1].give(*waiting.popleft())
    finally:
        for worker in busy:
            worker.child.stop()


def _next_records(busy: Sequence[_Worker], timeout_s: float | None) -> list[tuple[_Worker, Record]]:
    patience = None if timeout_s is None else max(0.0, min(w.started for w in busy) + timeout_s - time.monotonic())
    ready = wait_for([worker.child for worker in busy], patience)
    if ready or timeout_s is None:
        return [(worker, worker.take()) for worker in busy if worker.child in ready]
    late = [worker for worker in busy if time.monotonic() - worker.started >= timeout_s]
    return [(worker, worker.time_out(timeout_s)) for worker in late]


class _RunLog:
    """`run.json`: the last record per stage and slide; merged under a lock, so that shards may share the file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.new: list[Record] = []
        self.flushed = time.monotonic()

    def add(self, record: Record) -> None:
        self.new.append(record)
        if time.monotonic() - self.flushed >= LOG_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        self.flushed = time.monotonic()
        if self.path is None or not self.new:
            return
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            records = {(record.stage, record.slide_id): record for record in read_run_json(self.path)}
            records |= {(record.stage, record.slide_id): record for record in self.new}
            ordered = [asdict(records[name]) for name in sorted(records)]
            write_json(self.path, sealed({"schema": SCHEMA, "eosin": __version__, "records": ordered}))
        self.new.clear()


def read_run_json(path: Path) -> list[Record]:
    """Read the records of a `run.json`; a missing file has none.

    Raises
    ------
    ConfigError
        If the file is not one of ours; it is never overwritten then.
    """
    if not path.exists():
        return []
    try:
        data = read_json(path)
        if data["schema"] not in (1, SCHEMA) or (data["schema"] == SCHEMA and not is_intact(data)):
            raise ValueError("it is damaged or was changed by hand")
        return [Record(**record) for record in data["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a run.json of eosin ({error}); move it away or choose another job") from None

"""What became of every slide: a line that is appended when the slide is finished, and `run.json`, the view of them all.

Each process appends to a file of its own in the folder ``records`` beside `run.json`, so that nobody waits for a lock
and a process that is killed loses nothing that it finished. `merge` brings the lines into `run.json`, once, when a run
ends; readers take both, so that a run can be watched while it goes on. Of more records than `MOST_IN_JSON`, `run.json`
holds the counts and names the `eosin._record_store.Store` that they lie in.
"""

import json
import os
import platform
import re
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from eosin import __version__
from eosin._files import append_line, is_running, locked, write_json
from eosin._record_store import SUFFIX as STORE_SUFFIX
from eosin._record_store import Store, write_store
from eosin._seals import KEY, LARGE_JSON_BYTES, LARGE_JSON_VALUES, is_intact, parse_json, read_json, sealed
from eosin.errors import ConfigError

T = TypeVar("T")

Status = Literal["ok", "empty", "failed", "skipped"]

Key: TypeAlias = tuple[str, str]
"""Stage and slide."""

SCHEMA, STORE_SCHEMA = 2, 3
"""Of `run.json`; 1, of eosin 0.1, has no checksum; with 3 the records lie in a store."""

MOST_IN_JSON = 50_000
"""Records that `run.json` holds itself: 15 MB, which a process reads and a person searches in about a second."""

PARTS = "records"
SUFFIX = ".jsonl"
IDLE_S = 3600.0
"""A part of another machine that nobody has appended to for so long is merged for good."""


@dataclass(frozen=True)
class Record:
    """What became of one slide in one stage: a line of `run.json`.

    Attributes
    ----------
    slide_id, stage : str
    status : "ok", "empty", "failed" or "skipped"
    reason : str
        Code of a failure.
    message : str
        One sentence for a person.
    seconds : float
        Spent on the slide.
    at : float
        When it was finished, in seconds since 1970; 0 in files of eosin 0.1.
    by : str
        The process that did it: machine-number.
    """

    slide_id: str
    stage: str
    status: Status
    reason: str = ""
    message: str = ""
    seconds: float = 0.0
    at: float = 0.0
    by: str = ""


@dataclass(frozen=True)
class Begun:
    """A slide that a process has begun and not finished.

    Attributes
    ----------
    slide_id, stage : str
    at : float
        Since when, in seconds since 1970.
    by : str
        The process: machine-number.
    """

    slide_id: str
    stage: str
    at: float
    by: str


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


class Log:
    """Where this process appends the records of a job; None appends nowhere.

    Parameters
    ----------
    run_json : Path or None
        The merged view; the parts lie in the folder ``records`` beside it.

    Raises
    ------
    ConfigError
        If the file is there and is not one of eosin's; it is never overwritten.
    """

    def __init__(self, run_json: Path | None) -> None:
        self.run_json = run_json
        self._merged = Merged() if run_json is None else Merged.read(run_json)
        self._mine: dict[Key, Record] = {}

    def knows(self, slide_id: str, stage: str) -> bool:
        """Return whether there was a record of a slide that did not fail: a skip must not take its place."""
        name = stage, slide_id
        record = self._mine.get(name) or self._appended.get(name) or self._merged.find(name)
        return record is not None and record.status != "failed"

    @cached_property
    def _appended(self) -> dict[Key, Record]:
        """What was not merged when this process first asked; a run in which nothing is skipped does not ask."""
        return {} if self.run_json is None else _latest({}, _appended(self.run_json.with_name(PARTS)))

    def begin(self, slide_id: str, stage: str) -> None:
        """Note that this process works on a slide from now on."""
        self._append({"slide_id": slide_id, "stage": stage, "begun": round(time.time(), 3), "by": process_name()})

    def add(self, record: Record) -> Record:
        """Append a record; return it with the time and this process in it."""
        stamped = replace(record, at=round(time.time(), 3), by=record.by or process_name())
        self._append(asdict(stamped))
        self._mine[record.stage, record.slide_id] = stamped
        return stamped

    def merge(self) -> None:
        """Bring all lines into `run.json`."""
        if self.run_json is not None:
            merge(self.run_json)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.run_json is not None:
            append_line(self.run_json.with_name(PARTS) / f"{_part_name(os.getpid())}{SUFFIX}", json.dumps(sealed(line)))


def process_name() -> str:
    """Return the machine and the number of this process, as records name it."""
    return f"{_host()}-{os.getpid()}"


@cache
def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", platform.node()) or "unknown"


@cache  # of the process, so that the child of a fork has a name of its own
def _part_name(number: int) -> str:
    return f"{_host()}-{number}-{secrets.token_hex(4)}"


def merge(run_json: Path) -> None:
    """Write `run.json` again from itself and all parts, and remove the parts that nobody appends to any more.

    Raises
    ------
    ConfigError
        If `run.json` is not one of eosin's.
    OutputError
        If it cannot be written.
    """
    folder = run_json.with_name(PARTS)
    with locked(run_json.with_name(f".{run_json.name}.lock")):
        parts = {part: part.stat() for part in _parts(folder)}
        if not parts:
            return
        before = Merged.read(run_json)
        if before.store is None and len(records := _latest(before.records, _appended(folder))) <= MOST_IN_JSON:
            ordered = [asdict(records[name]) for name in sorted(records)]
            write_json(run_json, sealed({"schema": SCHEMA, "eosin": __version__, "records": ordered}))
        else:
            _write_store(run_json, before)
        for part, seen in parts.items():
            if _is_closed(part, seen) and part.stat().st_size == seen.st_size:
                part.unlink(missing_ok=True)
        with suppress(OSError):  # somebody still appends
            folder.rmdir()


def _write_store(run_json: Path, before: "Merged") -> None:
    """Write a new store, let `run.json` name it, and remove the one that it named before."""
    if before.store is not None:
        with _understood(run_json):
            before.store.require_intact()
    folder = run_json.with_name(PARTS)
    rows = map(astuple, chain(before.records.values(), _appended(folder)))
    path = folder / f"all-{secrets.token_hex(4)}{STORE_SUFFIX}"
    store = write_store(path, before.store, rows, lambda row, other: _replaces(Record(*row), Record(*other)))
    head = {"schema": STORE_SCHEMA, "eosin": __version__, "store": path.name, "crc32": store.checksum}
    write_json(run_json, sealed({**head, "counts": store.counts()}))
    for other in folder.glob(f"*{STORE_SUFFIX}"):
        if other != path:
            other.unlink(missing_ok=True)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _is_closed(part: Path, seen: os.stat_result) -> bool:
    """Return whether nobody appends to a part any more; a line that still comes makes the file again."""
    host, number, _ = part.stem.rsplit("-", 2)
    if host != _host() or not number.isdecimal():
        return time.time() - seen.st_mtime > IDLE_S
    return int(number) == os.getpid() or not is_running(int(number))


def read_run_json(path: Path) -> list[Record]:
    """Read the records of a job, the last of each stage and slide: `run.json` and what was appended since.

    Raises
    ------
    ConfigError
        If the file is not one of ours; it is never overwritten then.
    """
    merged = Merged.read(path)
    return list(_latest(merged.all(), _appended(path.with_name(PARTS))).values())


def _appended(folder: Path) -> Iterator[Record]:
    """Yield what was appended and may not be merged yet, part by part."""
    for line in _lines(folder):
        record = _record(line)
        if record is not None:
            yield record


def _latest(records: Mapping[Key, Record], new: Iterable[Record]) -> dict[Key, Record]:
    """Return the record that counts of each stage and slide."""
    found = dict(records)
    for record in new:
        name = record.stage, record.slide_id
        if _replaces(record, found.get(name)):
            found[name] = record
    return found


def _replaces(record: Record, other: Record | None) -> bool:
    """Tell whether a record takes the place of another: the later one does, unless it only says "done before"."""
    if other is None or _was_done(record) == _was_done(other):
        return other is None or record.at >= other.at
    made = other if _was_done(record) else record
    return record.at >= other.at if made.status == "failed" else made is record


def _was_done(record: Record) -> bool:
    return (record.status, record.reason) == ("skipped", "done")


def read_begun(path: Path) -> list[Begun]:
    """Read which slides were begun and have no record since: processes are at work on them, or died of them."""
    begun: dict[tuple[str, str, str], Begun] = {}
    for line in _lines(path.with_name(PARTS)):
        with suppress(KeyError, TypeError, ValueError):
            name = str(line["stage"]), str(line["slide_id"]), str(line["by"])
            if "begun" in line:
                begun[name] = Begun(name[1], name[0], float(line["begun"]), name[2])
            else:
                begun.pop(name, None)
    return list(begun.values())


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of all parts; one that a full disk tore, or that is damaged, is left out."""
    for part in _parts(folder):
        try:
            text = part.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # merged in the meantime
            continue
        yield from _parsed(text.split("\n"))


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            data = parse_json(line)
            if isinstance(data, dict) and is_intact(data):
                yield {name: value for name, value in data.items() if name != KEY}


def _record(line: Mapping[str, Any]) -> Record | None:
    try:
        return Record(**line)
    except TypeError:  # begun, or a line of a later version
        return None


@dataclass(frozen=True)
class Merged:
    """What `run.json` says: the records, or where they are.

    Attributes
    ----------
    records : mapping
        By stage and slide; empty where there is a store.
    store : Store, optional
    run_json : Path, optional
    """

    records: Mapping[Key, Record] = field(default_factory=dict)
    store: Store | None = None
    run_json: Path | None = None

    @classmethod
    def read(cls, path: Path) -> "Merged":
        """Read `run.json`; nothing is in one that is missing."""
        if not path.exists():
            return cls()
        with _understood(path):
            data = read_json(path, most_bytes=LARGE_JSON_BYTES, most_values=LARGE_JSON_VALUES)
            if data["schema"] not in (1, SCHEMA, STORE_SCHEMA) or (data["schema"] != 1 and not is_intact(data)):
                raise ValueError("it is damaged or was changed by hand")
            if data["schema"] == STORE_SCHEMA:
                return cls({}, Store(path.with_name(PARTS) / Path(data["store"]).name, data["crc32"]), path)
            records = [Record(**record) for record in data["records"]]
        return cls({(record.stage, record.slide_id): record for record in records})

    def find(self, name: Key) -> Record | None:
        """Return the record of a stage and slide."""
        if self.store is None or self.run_json is None:
            return self.records.get(name)
        row = self._ask(lambda store: store.find(*name))
        return None if row is None else Record(*row)

    def all(self) -> Mapping[Key, Record]:
        """Return all records."""
        if self.store is None or self.run_json is None:
            return self.records
        rows = self._ask(lambda store: list(store.rows()))
        return {(row[1], row[0]): Record(*row) for row in rows}

    def _ask(self, ask: Callable[[Store], T]) -> T:
        """Ask the store; once more the one that is named now, when it was replaced in the meantime."""
        assert self.store is not None
        assert self.run_json is not None
        with _understood(self.run_json):
            try:
                return ask(self.store)
            except (OSError, sqlite3.Error):
                now = Merged.read(self.run_json).store
                if now is None or now == self.store:
                    raise
                return ask(now)


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Let whatever is wrong with a `run.json` be one error that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
        raise ConfigError(f"{path}: is not a run.json of eosin ({error}); move it away or choose another job") from None

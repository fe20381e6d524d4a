"""Records of large jobs: an SQLite file, so that one of a million is found without reading the others.

A store is never changed. What is new goes into a copy, `run.json` then names the copy and its checksum, and the old one
is removed: readers on any file system need no lock and see the old or the new whole. SQLite's own way to share a file,
write-ahead logging, needs memory that all readers share. It is wrong where one machine exports its disk to others, and
is not needed: processes append their records to files of their own, and only `eosin._records.merge` writes a store.
"""

import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import quote

from eosin._files import write_file

Row: TypeAlias = tuple[str, str, Any, str, str, float, float, str]
"""The fields of a `eosin._records.Record` in their order."""

TABLE = """
CREATE TABLE records (
    slide_id TEXT, stage TEXT, status TEXT, reason TEXT, message TEXT, seconds REAL, at REAL, by TEXT,
    PRIMARY KEY (stage, slide_id)
) WITHOUT ROWID
"""
FIND = "SELECT * FROM records WHERE stage = ? AND slide_id = ?"
PUT = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
CHUNK_BYTES = 2**20
SUFFIX = ".sqlite"


@dataclass(frozen=True)
class Store:
    """Records in an indexed file.

    Parameters
    ----------
    path : Path
    checksum : str
        CRC-32 of the file.
    """

    path: Path
    checksum: str

    def find(self, stage: str, slide_id: str) -> Row | None:
        """Return the record of a slide in a stage, or None; raises what `rows` does."""
        _require_intact_once(self)
        with closing(_open(self.path)) as database:
            row: Row | None = database.execute(FIND, (stage, slide_id)).fetchone()
            return row

    def rows(self) -> Iterator[Row]:
        """Yield all records by stage and slide.

        Raises
        ------
        ValueError
            If the file is damaged.
        OSError, sqlite3.Error
            If the store is missing.
        """
        self.require_intact()
        with closing(_open(self.path)) as database:
            yield from database.execute("SELECT * FROM records ORDER BY stage, slide_id")

    def require_intact(self) -> None:
        """Compare the file with its checksum, before SQLite parses it or a copy of it gets a new one.

        Raises
        ------
        ValueError
            If the file is damaged.
        OSError
            If the store is missing.
        """
        if _checksum(self.path) != self.checksum:
            raise ValueError(f"{self.path.name} is damaged or was changed by hand")

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of slides by stage and status."""
        found: dict[str, dict[str, int]] = {}
        with closing(_open(self.path)) as database:
            for stage, status, number in database.execute("SELECT stage, status, COUNT(*) FROM records GROUP BY 1, 2"):
                found.setdefault(stage, {})[status] = number
        return found


def write_store(path: Path, before: Store | None, rows: Iterable[Row], replaces: Callable[[Row, Row], bool]) -> Store:
    """Write a store with the records of another and new ones.

    Parameters
    ----------
    path : Path
        Of the new store.
    before : Store, optional
        What it begins with.
    rows : iterable of Row
        What is new.
    replaces : callable
        Whether the first of two records of one slide takes the place of the second.

    Raises
    ------
    OutputError
        When the disk is full or may not be written.
    """

    def write(file: BinaryIO) -> None:
        if before is not None:
            with before.path.open("rb") as source:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            file.flush()
        try:
            _put(Path(file.name), rows, replaces, is_new=before is None)
        except sqlite3.Error as error:
            raise OSError(str(error)) from error

    write_file(path, write)
    return Store(path, _checksum(path))


def _put(path: Path, rows: Iterable[Row], replaces: Callable[[Row, Row], bool], *, is_new: bool) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # nobody else knows the file yet, and a torn copy is thrown away
        database.execute("PRAGMA synchronous = OFF")
        if is_new:
            database.execute(TABLE)
        database.execute("BEGIN")
        for row in rows:
            other = database.execute(FIND, (row[1], row[0])).fetchone()
            if other is None or replaces(row, other):
                database.execute(PUT, row)
        database.execute("COMMIT")


@cache  # of a million lookups in a process one compares the whole file
def _require_intact_once(store: Store) -> None:
    store.require_intact()


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(os.fspath(path))}?mode=ro&immutable=1", uri=True)


def _checksum(path: Path) -> str:
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found = zlib.crc32(chunk, found)
    return f"{found:08x}"

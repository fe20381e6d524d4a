"""A table of predictions that grows while it is made: finished rows survive a kill and are kept by later runs."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from eosin._files import write_bytes, write_text
from eosin._fingerprints import fingerprint
from eosin._tables import frame_text, read_table
from eosin.errors import ConfigError, TableError
from eosin.mil.task import Task

Cell = str | int | float | None
Row = dict[str, Cell]

SUFFIXES = (".csv", ".parquet")
SAVE_INTERVAL_S = 20.0
STATUS = ("status", "reason")
KEPT = ("ok", "empty")
FINGERPRINT = "fingerprint"
COUNTS = ("n_tiles", "n_slides", "n_used")
SEEN_COLUMNS = ("seen", "seen_by", "answered_by")

logger = logging.getLogger(__name__)


def require_table_suffix(out: Path) -> None:
    """Raise `ConfigError` for a file that is neither csv nor parquet."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{out}: predictions cannot be written to this kind of file; use the suffix {' or '.join(SUFFIXES)}"
        )


@dataclass(eq=False)
class PredictionTable:
    """The rows that are finished, and where they are kept while others are not.

    Attributes
    ----------
    out : Path
        The csv or parquet file.
    key : str
        Column of the ids.
    task : Task
        Gives the columns of a prediction.
    facts : mapping of str to cell
        Columns that are the same in every row unless the row says otherwise, ``model`` among them.
    after : sequence of str
        Columns after those of the task and of how much several models differ.
    models_hash : str
        Of the weights and cards of all models. With the features and the row's own cells it makes the column
        ``fingerprint``: a row is kept only as it was written, and only for these models and features.
    rows : dict of str to Row
        By id.
    """

    out: Path
    key: str
    task: Task
    facts: Mapping[str, Cell]
    after: Sequence[str]
    models_hash: str
    rows: dict[str, Row] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # the task alone knows its columns, and which of them are numbers
        nothing = self.task.table(self.task.activate(torch.zeros(1, self.task.n_outputs)))
        self.numbers = {name for name, values in nothing.items() if values.dtype.kind == "f"}
        self.numbers |= set(self.task.spread_columns)
        self.columns = [self.key, *STATUS, *nothing, *self.task.spread_columns, *self.after, FINGERPRINT]

    @property
    def partial(self) -> Path:
        """Where rows are kept until the table is whole."""
        return self.out.with_name(f".{self.out.name}.partial.csv")

    def keep(self, ids: Collection[str], facts_of: Callable[[str], Mapping[str, Cell]]) -> None:
        """Take over the rows of an earlier run that were not failures and would come out the same.

        Parameters
        ----------
        ids : collection of str
        facts_of : callable
            Given an id, returns cells that its row would have now: the hash of its features, the models that answer.
        """
        for path in (self.out, self.partial):
            for row in _read(path, self.columns):
                name = str(row[self.key])
                if name in ids and row["status"] in KEPT and facts_of(name).items() <= row.items():
                    typed = self._typed(row)
                    if typed is not None and typed.get(FINGERPRINT) == self._fingerprint(typed):
                        self.rows[name] = typed

    def _typed(self, row: Row) -> Row | None:
        """Return the cells that are not empty with their types; None where one is not of its type."""
        try:
            return {name: self._cell(name, value) for name, value in row.items() if value not in ("", None)}
        except ValueError:
            return None

    def _cell(self, name: str, value: Cell) -> Cell:
        if name in COUNTS:
            return int(str(value))
        return float(str(value)) if name in self.numbers else str(value)

    def _fingerprint(self, row: Row) -> str:
        cells = {name: self._cell(name, value) for name, value in row.items() if value not in ("", None)}
        cells.pop(FINGERPRINT, None)
        return fingerprint("predict", models=self.models_hash, features=str(row.get("features_hash", "")), row=cells)

    def add(self, name: str, row: Row) -> None:
        """Add a finished row; now and then all of them are written, for a run that continues."""
        self.rows[name] = row
        if time.monotonic() - self.saved_at > SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write what is finished beside the table, for a run that continues."""
        if self.rows:
            frame = self._frame([self._whole(name, row) for name, row in self.rows.items()])
            write_text(self.partial, frame_text(frame))
        self.saved_at = time.monotonic()

    def finish(self, ends: Mapping[str, Mapping[str, Cell]]) -> None:
        """Write the table in the order of the ids.

        Parameters
        ----------
        ends : mapping of str to mapping of str to cell
            Every id, with what this run says of it beside its row: the status, a reason, a message.
        """
        frame = self._frame([self._whole(name, self.rows.get(name, {})) | dict(ends[name]) for name in sorted(ends)])
        if self.out.suffix.lower() == ".parquet":
            write_bytes(self.out, frame.to_parquet(index=False))
        else:
            write_text(self.out, frame_text(frame))
        self.partial.unlink(missing_ok=True)

    def _whole(self, name: str, row: Row) -> Row:
        return {self.key: name} | dict(self.facts) | row

    def _frame(self, rows: Sequence[Row]) -> pd.DataFrame:
        signed = [row | {FINGERPRINT: self._fingerprint(row) if row["status"] in KEPT else ""} for row in rows]
        frame = pd.DataFrame(signed, columns=self.columns)
        for name in self.columns:
            if name in self.numbers:
                frame[name] = frame[name].astype("float64")
            elif name in COUNTS:
                frame[name] = frame[name].astype("Int64")
            else:
                frame[name] = frame[name].astype("string").fillna("")
        return frame


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a table of ours; none when there is none, or it has other columns."""
    if not path.is_file():
        return []
    try:
        table = read_table(path)
    except (OSError, TableError) as error:
        logger.warning("%s; all slides are predicted again", error)
        return []
    if list(table) != list(columns):
        return []
    return [dict(row) for row in table.rows()]

"""Tables as files hold them: csv, tsv, xlsx and parquet, every value as text, with what the file knows of its cells."""

import codecs
import csv
import datetime
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
from openpyxl.utils.exceptions import InvalidFileException

from eosin.errors import LabelError

SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".parquet")
KINDS = {
    b"PK\x03\x04": "an Excel workbook; name it .xlsx",
    b"\xd0\xcf\x11\xe0": "a workbook of Excel before 2007; save it as .xlsx",
    b"PAR1": "a parquet file; name it .parquet",
}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
EXACT_DIGITS = 15
UNNAMED = "Unnamed: "

Table = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Sheet:
    """A table as it was read.

    Attributes
    ----------
    columns : mapping of str to tuple of str
        Every value as text.
    numbers : mapping of str to tuple of int
        Of columns whose file stores types: the rows whose cell is a number and no text.
    spoilt : mapping of str to str
        Of such columns: what makes one of their values no id (a date, a fraction, a rounded number).
    """

    columns: Table
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spoilt: Mapping[str, str] = field(default_factory=dict)


def read_table(path: Path) -> Table:
    """Read the columns of a csv, tsv, xlsx or parquet file, every value as text.

    Raises
    ------
    LabelError
        If the file is missing, empty or of another kind.
    """
    return read_sheet(path).columns


def read_sheet(path: Path) -> Sheet:
    """Read a table with what its file knows about the types of its cells.

    Raises
    ------
    LabelError
        As `read_table`.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise LabelError(f"{path}: tables are {', '.join(SUFFIXES)}; found {path.suffix or 'no suffix'}")
    try:
        if suffix == ".xlsx":
            sheet = _read_xlsx(path)
        elif suffix == ".parquet":
            sheet = _read_parquet(path)
        else:
            sheet = Sheet(_read_text(path))
    except FileNotFoundError:
        raise LabelError(f"{path}: no such file") from None
    except LabelError:
        raise
    except (OSError, ValueError, KeyError, InvalidFileException) as error:
        raise LabelError(f"{path}: cannot be read as a table ({' '.join(str(error).split())})") from None
    except Exception as error:  # openpyxl and pyarrow have no common parent for what a damaged file makes them raise
        if type(error).__module__.split(".")[0] not in ("openpyxl", "pyarrow", "zipfile", "xml"):
            raise
        raise LabelError(f"{path}: cannot be read as a table ({' '.join(str(error).split())})") from None
    if not any(sheet.columns.values()):
        raise LabelError(f"{path}: the table has no rows")
    return sheet


def _read_text(path: Path) -> Table:
    """Read the rows that are not blank; one with more cells than columns is refused, for it would shift the others."""
    rows = [(line, row) for line, row in _text_rows(path) if any(row)]
    if not rows:
        return {}
    header = [
        f"{UNNAMED}{place}" if not name or name.startswith(UNNAMED) else name for place, name in enumerate(rows[0][1])
    ]
    _require_distinct(header, path)
    for line, row in rows[1:]:
        if any(row[len(header) :]):
            raise LabelError(
                f"{path}: line {line} has {len(row)} cells, but the first line names {len(header)} columns; "
                "put cells that hold the separator in quotes"
            )
    padded = [row[: len(header)] + [""] * (len(header) - len(row)) for _, row in rows[1:]]
    columns = zip(*padded, strict=True) if padded else [()] * len(header)
    return dict(zip(header, columns, strict=True))


def _text_rows(path: Path) -> list[tuple[int, list[str]]]:
    text = _decoded(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(path, text), strict=True)
    try:
        return [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
    except csv.Error as error:
        raise LabelError(f"{path}: line {lines.line_num}: {error}; check its quotation marks") from None


def _decoded(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 when it says so, as what Excel calls Unicode text does."""
    data = path.read_bytes()
    for start, kind in KINDS.items():
        if data.startswith(start):
            raise LabelError(f"{path}: is {kind}")
    try:
        return data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabelError(f"{path}: line {line} is not in UTF-8; save the table as CSV UTF-8") from None


def _separator(path: Path, text: str) -> str:
    """Return what separates the columns: the most frequent of comma, semicolon and tab in the first line."""
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=text.lstrip().partition("\n")[0].count)


def _require_distinct(names: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise LabelError(f"{path}: two columns are called {twice[0]!r}; rename one")


def _read_parquet(path: Path) -> Sheet:
    frame = pd.read_parquet(path)
    _require_distinct([str(name) for name in frame], path)
    columns = {str(name): [None if pd.isna(value) else value for value in frame[name]] for name in frame}
    return _typed_sheet(columns)


def _read_xlsx(path: Path) -> Sheet:
    """Read the first sheet; a number that Excel shows with leading zeros keeps them."""
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        rows = [list(row) for row in book.worksheets[0].iter_rows()]
    finally:
        book.close()
    rows = [row for row in rows if any(cell.value is not None for cell in row)]
    if not rows:
        return Sheet({})
    header = ["" if cell.value is None else str(cell.value).strip() for cell in rows[0]]
    _require_distinct([name for name in header if name], path)
    return _typed_sheet(
        {
            name: [_shown_value(row[place]) if place < len(row) else None for row in rows[1:]]
            for place, name in enumerate(header)
            if name
        }
    )


def _shown_value(cell: Any) -> Any:
    zeros = str(getattr(cell, "number_format", ""))
    if isinstance(cell.value, int) and not isinstance(cell.value, bool) and zeros and not zeros.strip("0"):
        return f"{cell.value:0{len(zeros)}d}"
    return cell.value


def _typed_sheet(columns: Mapping[str, Sequence[Any]]) -> Sheet:
    table: Table = {}
    numbers: dict[str, tuple[int, ...]] = {}
    spoilt: dict[str, str] = {}
    for name, values in columns.items():
        table[name] = tuple(_as_text(value) for value in values)
        found = tuple(row for row, value in enumerate(values) if _is_number(value))
        if found:
            numbers[name] = found
        faults = [(row, fault) for row, value in enumerate(values) if (fault := _fault(value))]
        if faults:
            spoilt[name] = f"row {faults[0][0] + 2} is {faults[0][1]}"
    return Sheet(table, numbers, spoilt)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**EXACT_DIGITS:
        return str(int(value))
    return str(value).strip()


def _fault(value: object) -> str:
    """Return what makes a cell no id, or nothing."""
    if isinstance(value, datetime.date | datetime.time):
        return f"a date ({value})"
    if isinstance(value, float) and not value.is_integer():
        return f"a fraction ({value})"
    if _is_number(value) and abs(value) >= 10**EXACT_DIGITS:  # type: ignore[arg-type]
        return f"a number of more than {EXACT_DIGITS} digits, which spreadsheets round ({value:.6g})"
    return ""

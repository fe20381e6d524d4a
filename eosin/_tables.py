"""Tables of users: csv, tsv, xlsx and parquet become columns of text, in one way for every command.

A file is measured before it is parsed, so that a damaged or hostile one is refused within a second and the limit is
named. Text may be separated by comma, semicolon or tab, and be in UTF-8, UTF-16 or a Windows code page.
"""

import codecs
import csv
import datetime
import io
import itertools
import logging
import re
import zipfile
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from eosin._columns import ID_COLUMNS, SLIDE_COLUMNS, detect_column, normalised, require_unlike_columns
from eosin._names import match_slides
from eosin._processes import call_apart
from eosin.errors import EosinError, TableError, WorkerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".parquet")
KINDS = {
    b"PK\x03\x04": "an Excel workbook; name it .xlsx",
    b"\xd0\xcf\x11\xe0": "a workbook of Excel before 2007; save it as .xlsx",
    b"PAR1": "a parquet file; name it .parquet",
}
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
CODE_PAGES = {"cp1252": "Western European", "cp1250": "Central European", "cp1251": "Cyrillic"}
RUN_OF_CYRILLIC = 2.5  # mean length of runs of bytes above 127; in European languages most are single letters

MAX_ROWS = 2**20
MAX_CELLS = 10_000_000
MAX_COLUMNS = 2**14  # as in a spreadsheet
MAX_LINE_BYTES = 16 * 2**20
MAX_TEXT_BYTES = 256 * 2**20
MAX_PARQUET_BYTES = 256 * 2**20
MAX_FOOTER_BYTES = 4 * 2**20
MAX_WORKBOOK_BYTES = 64 * 2**20
MAX_WORKBOOK_PARTS = 10_000
MAX_WORKBOOK_CELLS = 4_000_000
APART_S = 120.0
APART_BYTES = 4 * 2**30
CHUNK_BYTES = 2**20

EXACT_DIGITS = 15
MERGED = re.compile(rb'<mergeCell ref="([A-Z]{1,3}\d{1,7}:[A-Z]{1,3}\d{1,7})"')
HIDDEN = re.compile(rb'<row\b[^>]*\shidden="(?:1|true)"')
UNCOMPUTED = re.compile(rb"</f>\s*(?:<v\s*/>|<v></v>|</c>)")
UNNAMED = "Unnamed: "
FORMULA = re.compile(r"'*[=+\-@\x00-\x1f＝＋－＠]")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf")
MOST_TITLE_ROWS = 20
READ_BY_NAME = ID_COLUMNS | {"label"}


@dataclass(frozen=True, eq=False)
class Table(Mapping[str, tuple[str, ...]]):
    """The columns of a table by name, every value as text without surrounding blanks.

    Attributes
    ----------
    path : Path
        Where it was read.
    columns : mapping of str to tuple of str
        In the order of the file.
    numbers : mapping of str to tuple of int
        Of columns whose file stores types: the rows whose cell is a number and not text.
    spoilt : mapping of str to str
        Of such columns: what makes one of their values unfit for an id (a date, a fraction, a rounded number).
    notes : tuple of str
        What a person should know about the reading: the sheet that was taken, the code page that was assumed.
    shown_at : tuple of int
        See `row_numbers`; empty where a file does not say.
    """

    path: Path
    columns: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spoilt: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shown_at: tuple[int, ...] = ()

    @property
    def row_numbers(self) -> Sequence[int]:
        """Where a spreadsheet shows each row; below a header in the first row where the file does not say."""
        return self.shown_at or range(2, 2 + len(next(iter(self.columns.values()), ())))

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def rows(self, **required: Sequence[str]) -> list[dict[str, str]]:
        """Return one mapping per row.

        Parameters
        ----------
        **required : sequence of str
            Columns that must be there, under any of the names given: they get the keyword as their name.

        Raises
        ------
        TableError
            If one of them is missing.
        """
        found = {key: detect_column(self, (key, *names)) for key, names in required.items()}
        missing = [key for key, column in found.items() if column is None]
        if missing:
            raise TableError(
                f"{self.path}: the table needs the columns {', '.join(required)}; it has {', '.join(self) or 'none'}"
            )
        renamed = {column: key for key, column in found.items()}
        names = [renamed.get(name, name) for name in self]
        return [dict(zip(names, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


def decimal_point(text: str) -> str:
    """Return a number that was written with a decimal comma with a point, and any other text as it is."""
    return text.replace(",", ".") if re.fullmatch(r"[-+]?\d+,\d+", text) else text


def of_slides(
    rows: Iterable[tuple[str, T]], slide_ids: Iterable[str], where: str, *, needed: bool = True
) -> Mapping[str, T]:
    """Return what a table, or a folder of files, states of these slides; unknown names are warned about.

    Parameters
    ----------
    rows : iterable of (str, value)
        Names as `eosin._names.match_slides` understands them.
    slide_ids : iterable of str
    where : str
        The table or folder, for messages.
    needed : bool
        Whether it is an error when names are given and none is that of a slide.

    Raises
    ------
    TableError
        If slides are named twice with different values, or no name is that of a slide.
    """
    known = list(slide_ids)
    matched = match_slides(rows, known, where=where)
    if needed and matched.unknown and not matched.values:
        raise TableError(
            f"{where}: none of its names is the name of a slide; the table has {first_few(matched.unknown)}, "
            f"the slides are {first_few(known)}"
        )
    for note in matched.notes:
        logger.warning("%s: %s", where, note)
    if matched.unknown:
        logger.warning("%s: names of unknown slides are not used: %s", where, first_few(matched.unknown))
    return matched.values


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV in which no spreadsheet finds a formula; `read_table` gives every text back as it was.

    The one way in which eosin writes a table as text: a slide may be called ``=cmd|...`` by whoever made the file.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(shielded, row) for row in rows)
    return text.getvalue()


def frame_text(frame: Any, *, float_format: str | None = None) -> str:
    """Return a pandas data frame as `csv_text` would write it, without its index."""
    safe = frame.rename(columns=shielded)
    for name, kind in zip(safe, safe.dtypes, strict=True):
        if kind.kind == "O":
            safe[name] = safe[name].map(shielded)
    return str(safe.to_csv(index=False, lineterminator="\n", float_format=float_format))


def shielded(cell: object) -> object:
    """Return a cell with an apostrophe before text that a spreadsheet would run; numbers stay numbers."""
    is_run = isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell)
    return f"'{cell}" if is_run else cell


def unshielded(text: str) -> str:
    """Return the text that `shielded` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def read_table(path: Path) -> Table:
    """Read a csv, tsv, xlsx or parquet file.

    Raises
    ------
    TableError
        If the file is missing, empty, larger than the limits of this module, damaged or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TableError(f"{path}: not a table by its suffix {path.suffix!r}; expected {', '.join(SUFFIXES)}")
    try:
        table = _read_apart(APART[suffix], path) if suffix in APART else _read_text(path)
    except FileNotFoundError:
        raise TableError(f"{path}: cannot be read as a table (no such file)") from None
    except OSError as error:
        if isinstance(error, EosinError):
            raise
        raise TableError(f"{path}: cannot be read as a table ({error.strerror or error})") from None
    if not any(table.values()):
        raise TableError(f"{path}: the table has no rows below its header")
    return table


def _read_apart(read: Callable[[Path], Table], path: Path) -> Table:
    """Read a table in another process: its library may hang, crash or raise anything on a damaged or hostile file."""
    path.stat()
    package = NEEDS[path.suffix.lower()]
    if find_spec(package) is None:  # said here: in the other process it would be a fault of the file
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    try:
        return call_apart(read, path, timeout_s=APART_S, most_bytes=APART_BYTES)
    except WorkerError as error:
        found = f"the process that tried {error.message}" if error.code != "internal" else error.message
        words = "".join(letter if letter.isprintable() else " " for letter in found).split()
        raise TableError(f"{path}: cannot be read as a table ({' '.join(words)})") from None


def _refuse(path: Path, found: str, limit: str) -> TableError:
    return TableError(f"{path}: {found}; tables are limited to {limit}; delete what is not needed", code="unsafe")


def _require_size(path: Path, n_rows: int, n_columns: int) -> None:
    if n_rows > MAX_ROWS:
        raise _refuse(path, f"holds more than {MAX_ROWS:,} rows", f"{MAX_ROWS:,} rows")
    if n_rows * n_columns > MAX_CELLS:
        raise _refuse(path, f"holds {n_rows:,} rows of {n_columns:,} columns", f"{MAX_CELLS:,} cells")


def _require_distinct(names: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise TableError(f"{path}: two columns are called {twice[0]!r}; rename one")


def _read_text(path: Path) -> Table:
    """Read the rows that are not blank; one with more cells than columns is refused, for it would shift the others."""
    text = TextFile(path)
    rows = ((place, line, row) for place, (line, row) in enumerate(text.rows(), 1) if any(row))
    head = list(itertools.islice(rows, MOST_TITLE_ROWS))
    titles = _header_place([row for *_, row in head]) or 0
    first = head[titles][2] if head else []
    header = [f"{UNNAMED}{place}" if not name or name.startswith(UNNAMED) else name for place, name in enumerate(first)]
    kept: list[list[str]] = []
    places: list[int] = []
    for place, line, row in itertools.chain(head[titles + 1 :], rows):
        if any(row[len(header) :]):
            raise TableError(
                f"{path}: line {line} has {len(row)} cells, but the first line names {len(header)} columns; "
                "put cells that hold the separator in quotes"
            )
        kept.append(row[: len(header)] + [""] * (len(header) - len(row)))
        places.append(place)
        _require_size(path, len(kept), len(header))
    columns = zip(*kept, strict=True) if kept else [()] * len(header)
    by_name, notes = _told_apart(path, zip(header, columns, strict=True))
    notes = (*text.notes, *_title_notes(titles, head[titles][0] if head else 1), *notes)
    return Table(path, by_name, notes=notes, shown_at=tuple(places))


def _told_apart(
    path: Path, columns: Iterable[tuple[str, tuple[T, ...]]]
) -> tuple[dict[str, tuple[T, ...]], tuple[str, ...]]:
    """Return columns by name: of two that are the same one, and two of one name that differ under a name each.

    Raises
    ------
    TableError
        If two that differ could both be the ids, or the label.
    """
    found: dict[str, tuple[T, ...]] = {}
    twice: dict[str, None] = {}
    for name, values in columns:
        if name in found and found[name] != values:
            if normalised(name) in READ_BY_NAME:
                raise TableError(f"{path}: two columns are called {name!r}; rename one")
            twice[name] = None
            number = next(n for n in itertools.count(2) if f"{name} ({n})" not in found)
            found[f"{name} ({number})"] = values
        else:
            found[name] = values
    require_unlike_columns(path, found, READ_BY_NAME)
    return found, tuple(f"columns: several are called {name!r}, the second is read as '{name} (2)'" for name in twice)


def _header_place(rows: Sequence[Sequence[str]]) -> int | None:
    """Return which of the first rows names most columns of ids, the first of several; None where none does."""
    # "Case" may be a heading over several columns, or a value: the row that names slide and patient is the header
    named = [len(ID_COLUMNS & {normalised(cell) for cell in row}) for row in rows]
    return named.index(max(named)) if any(named) else None


def _title_notes(titles: int, row: int) -> tuple[str, ...]:
    above = "the row above it is a title" if titles == 1 else f"the {titles} rows above it are titles"
    return (f"header: row {row}; {above} and not read",) if titles else ()


class TextFile:
    """A text table whose size, encoding and separator are known, and whose cells are not read yet.

    Parameters
    ----------
    path : Path
    most_bytes, most_cells : int
        A larger file is refused.

    Raises
    ------
    TableError
        If the file is too large, or not text.
    """

    def __init__(self, path: Path, *, most_bytes: int = MAX_TEXT_BYTES, most_cells: int = MAX_CELLS) -> None:
        if path.stat().st_size > most_bytes:
            raise _refuse(path, f"is larger than {most_bytes // 2**20} MiB", f"{most_bytes // 2**20} MiB of text")
        _require_few_cells(path, most_cells)
        self.path = path
        self.encoding, self.notes = _find_encoding(path)
        self.separator = "\t" if path.suffix.lower() == ".tsv" else self._find_separator()

    def _find_separator(self) -> str:
        """Return the most frequent of comma, semicolon, tab and bar in the first line, outside quotation marks."""
        with self.path.open(newline=None, encoding=self.encoding) as file:
            first = next((line for line in file if line.strip()), "")
        stated = _stated_separator(first.strip())
        return stated or max(",;\t|", key=re.sub('"[^"]*"', "", first).count)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of each line and its cells without surrounding blanks.

        Raises
        ------
        TableError
            If a quotation mark is not closed, or a cell is too long.
        """
        with self.path.open(newline="", encoding=self.encoding) as file:
            lines = csv.reader(file, delimiter=self.separator, strict=True)
            try:
                for row in lines:
                    if not _stated_separator(self.separator.join(row)):
                        yield lines.line_num, [unshielded(cell.strip()) for cell in row]
            except csv.Error as error:
                raise TableError(f"{self.path}: line {lines.line_num}: {error}; check its quotation marks") from None


def _stated_separator(line: str) -> str:
    """Return the separator that the first line states for Excel (``sep=;``), or nothing."""
    return line[4] if len(line) == 5 and line.startswith("sep=") else ""


def _find_encoding(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the encoding of a text file and what is to be said of it."""
    with path.open("rb") as file:
        head = file.read(CHUNK_BYTES)
    for start, kind in KINDS.items():
        if head.startswith(start):
            raise TableError(f"{path}: is {kind}")
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "")
    if not marked and b"\0" in head:  # every other byte of ASCII text in UTF-16
        marked = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    if marked and not _decodes(path, marked):
        raise TableError(f"{path}: is damaged or not a table: its text is not valid {marked.upper()}")
    if marked or _decodes(path, "utf-8"):
        return marked or "utf-8", ()
    page, example = _code_page(path)
    return page, (
        f"encoding: {path.name} is not in UTF-8 and was read as {page.replace('cp', 'Windows-')} "
        f"({CODE_PAGES[page]}); check {example!r}, or save it as CSV UTF-8",
    )


def _require_few_cells(path: Path, most_cells: int) -> None:
    """Count the ends of lines and the separators, which takes a tenth of a second where parsing takes a minute."""
    lines = separators = unended = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            ends = max(chunk.count(b"\n"), chunk.count(b"\r"))
            if not lines:
                head = chunk.split(b"\n", 1)[0] if ends else chunk
                _require_few_columns(path, separators + max(map(head.count, (b",", b";", b"\t", b"|"))))
            unended = len(chunk) - max(chunk.rfind(b"\n"), chunk.rfind(b"\r")) if ends else unended + len(chunk)
            if unended > MAX_LINE_BYTES:
                limit = f"{MAX_LINE_BYTES // 2**20} MiB"
                raise _refuse(path, f"has a line of more than {limit}", f"{limit} in a line")
            lines += ends
            separators += max(map(chunk.count, (b",", b";", b"\t", b"|")))
            _require_size(path, lines - 1, 1)
            if lines + separators > most_cells:
                raise _refuse(path, f"holds more than {most_cells:,} cells", f"{most_cells:,} cells")


def _require_few_columns(path: Path, n_columns: int) -> None:
    if n_columns > MAX_COLUMNS:
        raise _refuse(path, f"has more than {MAX_COLUMNS:,} columns", f"{MAX_COLUMNS:,} columns")


def _decodes(path: Path, encoding: str) -> bool:
    """Return whether a file is in an encoding; refuse UTF-8 that goes wrong after it went right."""
    decoder = codecs.getincrementaldecoder(encoding)()
    lines, is_certain = 1, False
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                if encoding == "utf-8" and (is_certain or not before.isascii()):
                    lines += before.count(b"\n")
                    raise TableError(f"{path}: line {lines} is not in UTF-8; save the table as CSV UTF-8") from None
                return False
            if not chunk:
                return True
            is_certain = is_certain or not text.isascii()
            lines += chunk.count(b"\n")


def _code_page(path: Path) -> tuple[str, str]:
    """Return the Windows code page that a text is most likely in, and a word to judge it by."""
    words: list[bytes] = []
    with path.open("rb") as file:
        while len(words) < 1000 and (chunk := file.read(CHUNK_BYTES)):
            words += re.findall(rb"[A-Za-z\x80-\xff]*[\x80-\xff][A-Za-z\x80-\xff]*", chunk)
    sample = b" ".join(words[:1000])
    runs = re.findall(rb"[\x80-\xff]+", sample)
    pages = ["cp1252", "cp1250"]
    if sum(map(len, runs)) > RUN_OF_CYRILLIC * len(runs):
        pages.insert(0, "cp1251")
    fitting = [page for page in pages if _reads_as_words(sample, page)]
    page = next(iter(fitting), "cp1252")
    return page, words[0].decode(page, "replace")


def _reads_as_words(sample: bytes, page: str) -> bool:
    """Return whether no sign stands where a language has a letter: before another letter."""
    try:
        text = sample.decode(page)
    except UnicodeDecodeError:
        return False
    return all(a.isascii() or a.isalpha() or not b.isalpha() for a, b in pairwise(text))


def _read_parquet(path: Path) -> Table:
    """Read the columns; texts that occur often stay one object each, so that the memory is that of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_small_footer(path)
    with pq.ParquetFile(path) as file:
        facts, names = file.metadata, file.schema_arrow.names
        _require_size(path, facts.num_rows, max(1, facts.num_columns))
        _require_few_columns(path, facts.num_columns)
        size = sum(facts.row_group(place).total_byte_size for place in range(facts.num_row_groups))
        if size > MAX_PARQUET_BYTES:
            limit = f"{MAX_PARQUET_BYTES // 2**20} MiB"
            raise _refuse(path, f"unpacks to more than {limit}", f"{limit} of parquet")
        text = [item.name for item in file.schema_arrow if pa.types.is_string(item.type)]
        nested = [item.name for item in file.schema_arrow if pa.types.is_nested(item.type)]  # one cell may fill a disk
    _require_distinct(names, path)
    names = [name for name in names if name not in nested]
    columns = pq.read_table(path, columns=names, read_dictionary=text, use_pandas_metadata=False)
    kept = [name for name in names if not re.fullmatch(r"__index_level_\d+__", name)]  # pandas' number of the row
    notes = (f"columns of lists are not read: {first_few(nested)}",) if nested else ()
    return _typed_table(path, {name: _values(columns[name]) for name in kept}, notes=notes)


def _require_small_footer(path: Path) -> None:
    """Refuse a description of the columns that the library would unpack to gigabytes; its size stands at the end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        size = int.from_bytes(file.read(4), "little")
    if size > MAX_FOOTER_BYTES:
        limit = f"{MAX_FOOTER_BYTES // 2**20} MiB"
        raise _refuse(
            path, f"describes its columns in more than {limit}", f"{limit} of that (about {MAX_COLUMNS:,} columns)"
        )


def _values(column: Any) -> list[Any]:
    values: list[Any] = []
    for chunk in column.chunks:
        words = chunk.dictionary.to_pylist() if hasattr(chunk, "dictionary") else None
        cells = chunk.to_pylist() if words is None else chunk.indices.to_pylist()
        values += cells if words is None else [None if cell is None else words[cell] for cell in cells]
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _read_xlsx(path: Path) -> Table:
    """Read the first sheet that names a column of ids, else the first that has rows.

    A number that Excel shows with leading zeros keeps them, and what merged cells hold counts for each of them.
    """
    import openpyxl

    facts = _checked_workbook(path)
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        visible = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"] or book.worksheets
        # openpyxl does not state what is merged and hidden when it only reads
        parts = {sheet.title: facts.get(sheet._worksheet_path, SheetFacts()) for sheet in visible}
        found = [
            (sheet.title, rows) for sheet in visible if (rows := _filled_rows(sheet, parts[sheet.title].merged, path))
        ]
    finally:
        book.close()
    if not found:
        return Table(path, {})
    heads = [_header_place([[_as_text(value) for value in row] for row in [*rows.values()][:MOST_TITLE_ROWS]])
             for _, rows in found]  # fmt: skip
    named = [place for place, head in enumerate(heads) if head is not None]
    # a sheet of slides comes before one of patients
    of_slides = [place for place in named if _names_slides([*found[place][1].values()][heads[place] or 0])]
    chosen = (*of_slides, *named, 0)[0]
    (title, by_number), head = found[chosen], heads[chosen] or 0
    numbers, lines = list(by_number), list(by_number.values())
    header = _header_names(lines[: head + 1])
    _require_size(path, len(lines), len(header))
    below = lines[head + 1 :]
    cells = [
        (unshielded(name), tuple(row[place] if place < len(row) else None for row in below))
        for place, name in enumerate(header)
        if name
    ]
    columns, said = _told_apart(path, cells)
    notes = (
        _sheet_note(title, book.sheetnames, [found[place][0] for place in of_slides if place != chosen]),
        *_title_notes(head, numbers[head]),
        *said,
        *parts[title].notes(path),
    )
    return _typed_table(path, columns, notes=notes, shown_at=tuple(numbers[head + 1 :]))


def _sheet_note(title: str, names: Sequence[str], with_slides: Sequence[str]) -> str:
    """Return which sheet was read, and which others it could have been."""
    rest = f" of {len(names)}; the others are not read" if len(names) > 1 else ""
    slides = f", although slides are named in {' and '.join(map(repr, with_slides))}, too" if with_slides else ""
    return f"sheet: {title!r}{rest}{slides}"


def _names_slides(row: Sequence[Any]) -> bool:
    return any(normalised(_as_text(value)) in SLIDE_COLUMNS for value in row)


def _filled_rows(sheet: Any, areas: Sequence[str], path: Path) -> dict[int, list[Any]]:
    """Return the rows that are not blank by their numbers.

    One cell far to the right makes every row as long as the sheet is wide.
    """
    sheet.reset_dimensions()  # what the sheet says of its size would fill up every row, and may be wrong
    rows: dict[int, list[Any]] = {}
    seen = width = 0
    for number, cells in enumerate(sheet.iter_rows(), 1):
        seen += len(cells)
        if seen > MAX_WORKBOOK_CELLS:
            limit = f"{MAX_WORKBOOK_CELLS:,} cells of workbook"
            raise _refuse(path, f"has rows that reach over more than {MAX_WORKBOOK_CELLS:,} cells", limit)
        if any(cell.value is not None for cell in cells):
            rows[number] = [_shown_value(cell) for cell in cells]
            width = max(width, len(cells))
            _require_size(path, len(rows), width)
    for row in rows.values():
        row += [None] * (width - len(row))
    _fill_merged(rows, areas, path)
    return rows


def _fill_merged(rows: Mapping[int, list[Any]], areas: Sequence[str], path: Path) -> None:
    """Put what merged cells hold into each of them, as far as their rows are there."""
    from openpyxl.utils import range_boundaries

    numbers, filled = list(rows), 0
    for area in areas:
        left, top, right, bottom = range_boundaries(area)
        corner = rows.get(top, [])[left - 1 : left]
        for number in numbers[bisect_left(numbers, top) : bisect_right(numbers, bottom)]:
            width = len(rows[number][left - 1 : right])
            rows[number][left - 1 : right] = (corner or [None]) * width
            filled += width
        if filled > MAX_CELLS:
            raise _refuse(path, f"merges more than {MAX_CELLS:,} cells", f"{MAX_CELLS:,} cells")


def _header_names(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the names of the columns; where two are alike, with the heading that the row above puts over them."""
    names = [_as_text(value) for value in rows[-1]]
    if len(rows) == 1:
        return names
    groups = [_as_text(value) for value in rows[-2]]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{group} {name}" if name in twice and group else name
        for name, group in itertools.zip_longest(names, groups[: len(names)], fillvalue="")
    ]


def _checked_workbook(path: Path) -> "dict[str, SheetFacts]":
    """Refuse a workbook that unpacks to too much, or that defines entities; return what each sheet says of itself."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        limit = f"{MAX_WORKBOOK_BYTES // 2**20} MiB"
        if len(parts) > MAX_WORKBOOK_PARTS:
            raise _refuse(
                path, f"has {len(parts):,} parts; save it as csv", f"{MAX_WORKBOOK_PARTS:,} parts of workbook"
            )
        if sum(part.file_size for part in parts) > MAX_WORKBOOK_BYTES:
            raise _refuse(path, f"unpacks to more than {limit}; save the table as csv", f"{limit} of workbook")
        for part in parts:
            with archive.open(part) as file:
                chunk, n_cells, n_rows = file.read(CHUNK_BYTES), 0, 0
                if b"<!DOCTYPE" in chunk[:4096]:
                    raise TableError(f"{path}: is not a workbook of Excel ({part.filename} defines entities)")
                while chunk and part.filename.startswith("xl/worksheets/"):
                    n_cells += chunk.count(b"<c ") + chunk.count(b"<c>") + chunk.count(b"<c/")
                    if n_cells > MAX_WORKBOOK_CELLS:
                        limit = f"{MAX_WORKBOOK_CELLS:,} cells of workbook"
                        raise _refuse(path, f"holds more than {MAX_WORKBOOK_CELLS:,} cells; save it as csv", limit)
                    n_rows += chunk.count(b"<row")
                    _require_size(path, n_rows, 1)
                    chunk = file.read(CHUNK_BYTES)
        sheets = [part for part in parts if "worksheets/" in part.filename and part.filename.endswith(".xml")]
        return {part.filename: SheetFacts.of(archive.read(part)) for part in sheets}


@dataclass(frozen=True)
class SheetFacts:
    """What a sheet says besides its cells: merged areas, rows that are hidden, and formulas without a value."""

    merged: tuple[str, ...] = ()
    hidden: int = 0
    uncomputed: int = 0

    @classmethod
    def of(cls, sheet: bytes) -> "SheetFacts":
        """Read the XML of a sheet."""
        merged = tuple(area.decode() for area in MERGED.findall(sheet))
        return cls(merged, len(HIDDEN.findall(sheet)), len(UNCOMPUTED.findall(sheet)))

    def notes(self, path: Path) -> tuple[str, ...]:
        """Return what a person should know of it; `TableError` where formulas have no values."""
        if self.uncomputed:
            raise TableError(
                f"{path}: {self.uncomputed} cells hold formulas whose values are not in the file; open it in a "
                "spreadsheet program and save it again"
            )
        return (f"hidden rows: {self.hidden} are read like the others",) if self.hidden else ()


def _shown_value(cell: Any) -> Any:
    zeros = str(getattr(cell, "number_format", ""))
    if isinstance(cell.value, int) and not isinstance(cell.value, bool) and zeros and not zeros.strip("0"):
        return f"{cell.value:0{len(zeros)}d}"
    return unshielded(cell.value) if isinstance(cell.value, str) else cell.value


def _typed_table(
    path: Path,
    columns: Mapping[str, Sequence[Any]],
    *,
    notes: tuple[str, ...] = (),
    shown_at: tuple[int, ...] = (),
) -> Table:
    texts: dict[str, tuple[str, ...]] = {}
    numbers: dict[str, tuple[int, ...]] = {}
    spoilt: dict[str, str] = {}
    for name, values in columns.items():
        texts[name] = tuple(_as_text(value) for value in values)
        found = tuple(row for row, value in enumerate(values) if _is_number(value))
        if found:
            numbers[name] = found
        fault = next(((row, fault) for row, value in enumerate(values) if (fault := _fault(value))), None)
        if fault is not None:
            spoilt[name] = f"row {(shown_at or range(2, 2 + len(values)))[fault[0]]} is {fault[1]}"
    return Table(path, texts, numbers, spoilt, notes, shown_at)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is an empty cell


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None or value != value:  # NaN, the empty cell of pandas
        return ""
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():  # how Excel stores a day
        return value.date().isoformat()
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**EXACT_DIGITS:
        return str(int(value))
    return str(value).strip()


def _fault(value: Any) -> str:
    """Return what makes a cell unfit for an id, or nothing."""
    if isinstance(value, datetime.date | datetime.time):
        return f"a date ({value})"
    if not _is_number(value):
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"a fraction ({value})"
    if abs(value) >= 10**EXACT_DIGITS:
        return f"a number of more than {EXACT_DIGITS} digits, which spreadsheets round ({value:.6g})"
    return ""


APART = {".xlsx": _read_xlsx, ".parquet": _read_parquet}
NEEDS = {".xlsx": "openpyxl", ".parquet": "pyarrow"}

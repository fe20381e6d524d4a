"""Tables of every dialect, encoding and file type are read alike; what is too large is refused before it is parsed."""

import csv
import datetime
import io
import os
import re
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eosin
from eosin import _tables as tables
from eosin._tables import TextFile, csv_text, decimal_point, frame_text, read_table, unshielded
from eosin.errors import ConfigError, LabelError, TableError
from eosin.options import read_yaml
from eosin.wsi._job import read_overrides
from eosin.wsi._slide_file import find_slides
from eosin.wsi._tissue import TissueOptions

WORDS = {"slide": ("größe", "b"), "note": ("a; b, c", "")}
QUOTED = 'slide{0}note\ngröße{0}"a; b, c"\nb{0}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_text_is_read_in_every_dialect(tmp_path: Path, encoding: str, separator: str, line_end: str) -> None:
    text = QUOTED.format(separator).replace("\n", line_end)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert read_table(tmp_path / "t.csv") == WORDS


@pytest.mark.parametrize(
    ("page", "word"), [("cp1252", "Müller"), ("cp1252", "Île 3 µm²"), ("cp1250", "Łódź"), ("cp1251", "Иванов Пётр")]
)
def test_text_in_a_code_page_is_read_and_said(tmp_path: Path, page: str, word: str) -> None:
    (tmp_path / "t.csv").write_bytes(f"slide,name\na,{word}\n".encode(page))
    table = read_table(tmp_path / "t.csv")
    assert table["name"] == (word,)
    assert page.replace("cp", "Windows-") in table.notes[0]
    assert word.split()[0] in table.notes[0]


def test_utf_8_that_breaks_off_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("slide,name\na,Müller\nb,Mül".encode() + b"\xff\n")
    with pytest.raises(TableError, match="line 3 is not in UTF-8; save the table as CSV UTF-8"):
        read_table(tmp_path / "t.csv")


def test_the_separator_that_excel_states_is_taken(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sep=;\nslide,x;mpp\na;0,5\n")
    assert read_table(tmp_path / "t.csv") == {"slide,x": ("a",), "mpp": ("0,5",)}
    assert [decimal_point(text) for text in ("0,5", "-1,25", "1,2,3", "a,b", "0.5")] == [
        "0.5", "-1.25", "1,2,3", "a,b", "0.5",
    ]  # fmt: skip


def test_the_sheet_that_is_read_is_said(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    hidden = book.active
    hidden.append(["old", "slide"])
    hidden.sheet_state = "hidden"
    book.create_sheet("empty")
    labels = book.create_sheet("labels 2024")
    labels.append(["slide", "label"])
    labels.append(["a", "x"])
    book.save(tmp_path / "t.xlsx")
    table = read_table(tmp_path / "t.xlsx")
    assert table == {"slide": ("a",), "label": ("x",)}
    assert table.notes == ("sheet: 'labels 2024' of 3; the others are not read",)


def workbook(path: Path, *sheets: tuple[str, list[list[object]], list[str]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows, merged in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
        for area in merged:
            sheet.merge_cells(area)
    book.save(path)
    return path


SLIDES = [["Slide", "Patient ID", "label"], ["a", "p", "x"], ["b", "q", "y"]]


def test_of_several_sheets_the_one_that_names_slides_is_read(tmp_path: Path) -> None:
    readme = ("Read me", [["Labels of the cohort"], ["ask Dr. X"]], [])
    patients = ("Clinical", [["Patient ID", "age"], ["p", 50]], [])
    table = read_table(workbook(tmp_path / "t.xlsx", readme, patients, ("Slides", SLIDES, [])))
    assert table["Slide"] == ("a", "b")
    assert table.notes == ("sheet: 'Slides' of 3; the others are not read",)
    assert read_table(workbook(tmp_path / "p.xlsx", readme, patients))["age"] == ("50",)
    assert read_table(workbook(tmp_path / "r.xlsx", readme))["Labels of the cohort"] == ("ask Dr. X",)


@pytest.mark.parametrize("suffix", [".xlsx", ".csv"])
def test_titles_above_the_header_are_said_and_not_read(tmp_path: Path, suffix: str) -> None:
    rows = [["Cohort 2024", "", ""], ["", "", ""], ["export of 1 May", "", ""], *SLIDES]
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        path.write_text("\n".join(";".join(map(str, row)) for row in rows))
    else:
        workbook(path, ("S", [[cell or None for cell in row] for row in rows], ["A1:C1"]))
    table = read_table(path)
    assert table == {"Slide": ("a", "b"), "Patient ID": ("p", "q"), "label": ("x", "y")}
    assert any("the 2 rows above it are titles and not read" in note for note in table.notes)


def test_merged_headings_tell_columns_of_one_name_apart(tmp_path: Path) -> None:
    rows = [
        [None, "reader 1", None, "reader 2", None],
        ["Slide", "grade", "day", "grade", "remark"],
        ["a", 1, None, 2, "x"],
    ]
    table = read_table(workbook(tmp_path / "t.xlsx", ("S", rows, ["B1:C1", "D1:E1"])))
    assert table == {
        "Slide": ("a",), "reader 1 grade": ("1",), "day": ("",), "reader 2 grade": ("2",), "remark": ("x",),
    }  # fmt: skip


def test_what_merged_cells_hold_counts_for_each_row(tmp_path: Path) -> None:
    rows = [["Patient ID", "Slide"], ["p", "a"], [None, "b"], ["q", "c"], [None, "d"]]
    table = read_table(workbook(tmp_path / "t.xlsx", ("S", rows, ["A2:A3"])))
    assert table["Patient ID"] == ("p", "p", "q", "")


def test_merged_cells_beyond_the_rows_are_nothing_and_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workbook(tmp_path / "t.xlsx", ("S", SLIDES, ["A4:B4"]))
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    huge = b"".join(b'<mergeCell ref="A4:XFD1048576"/>' for _ in range(9))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, re.sub(rb'<mergeCell ref="A4:B4" ?/>', huge, data))
    assert read_table(path)["Slide"] == ("a", "b")
    monkeypatch.setattr(tables, "_read_apart", lambda read, path: read(path))  # with the limits of this process
    monkeypatch.setattr(tables, "MAX_CELLS", 12)
    areas = ["A2:C2", "A3:C3", "A4:C4"] * 4
    refs = "".join(f'<mergeCell ref="{area}"/>' for area in areas).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, re.sub(rb'<mergeCell ref="A4:B4" ?/>', refs, data))
    with pytest.raises(TableError, match="merges more than 12 cells"):
        read_table(path)


def test_a_day_is_written_as_such(tmp_path: Path) -> None:
    rows = [["Slide", "day", "at"], ["a", datetime.date(2024, 2, 3), datetime.datetime(2024, 2, 3, 4, 5)]]
    table = read_table(workbook(tmp_path / "t.xlsx", ("S", rows, [])))
    assert table == {"Slide": ("a",), "day": ("2024-02-03",), "at": ("2024-02-03 04:05:00",)}


def test_parquet_keeps_whole_numbers_with_gaps_and_its_index(tmp_path: Path) -> None:
    frame = pd.DataFrame({"slide": ["a", "b", None], "grade": pd.array([1, None, 3], "Int64"), "size": [0.5, None, 2]})
    frame.set_index("slide").to_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert {name: table[name] for name in sorted(table)} == {
        "grade": ("1", "", "3"), "size": ("0.5", "", "2"), "slide": ("a", "b", ""),
    }  # fmt: skip
    assert table.numbers["grade"] == (0, 2)
    pq.write_table(pa.table({"slide": pa.array(["a", "b"], pa.large_string())}), tmp_path / "l.parquet")
    assert read_table(tmp_path / "l.parquet") == {"slide": ("a", "b")}


def test_rows_have_the_names_that_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Slide ID;MPP;x\na;0,5;1\n")
    assert read_table(tmp_path / "t.csv").rows(slide=("slide_id",), mpp=()) == [{"slide": "a", "mpp": "0,5", "x": "1"}]
    with pytest.raises(TableError, match="needs the columns case, mpp; it has Slide ID, MPP, x"):
        read_table(tmp_path / "t.csv").rows(case=("patient",), mpp=())


@pytest.mark.parametrize(("separator", "suffix"), [(";", ".csv"), ("\t", ".txt"), (",", ".csv"), (";", ".xlsx")])
def test_every_option_reads_the_same_tables(tmp_path: Path, separator: str, suffix: str) -> None:
    rows = [["slide", "mpp", "min_stain"], ["a", "0,5" if separator == ";" else "0.5", "0.25"]]
    path = tmp_path / f"t{suffix}"
    if suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
    else:
        path.write_text("".join(separator.join(row) + "\n" for row in rows))
    (tmp_path / "a.svs").touch()
    assert find_slides([tmp_path / "a.svs"], slide_mpp=path)[0].mpp == 0.5
    assert read_overrides(path, TissueOptions())["a"] == TissueOptions(mpp=0.5, min_stain=0.25)


def too_many_rows(path: Path) -> None:
    path.write_bytes(b"slide,label\n" + b"a,b\n" * (tables.MAX_ROWS + 1))


def too_many_cells(path: Path) -> None:
    path.write_bytes((b"," * 10_000 + b"\n") * 1200)


def too_many_columns(path: Path) -> None:
    path.write_bytes(b"slide" + b",c" * 1_000_000 + b"\n")


def one_line(path: Path) -> None:
    path.write_bytes(b"slide,label\n" + b"a" * (200 * 2**20) + b",b\n")


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(tables.MAX_TEXT_BYTES + 1)


def parquet_of_one_word(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int8()), pa.array(["x" * 1000]))
    pq.write_table(pa.table({"slide": column}), path)


def parquet_of_columns(path: Path) -> None:
    pq.write_table(pa.table({f"c{number}": [1] for number in range(25_000)}), path)


def workbook_of_rows(path: Path) -> None:
    workbook_with(path, b"<row><c><v>1</v></c></row>" * (tables.MAX_ROWS + 10_000))


def workbook_of_parts(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(tables.MAX_WORKBOOK_PARTS + 1):
            archive.writestr(f"x{number}", b"")


def workbook_of_cells(path: Path) -> None:
    workbook_with(path, b"<row>" + b"<c/>" * (tables.MAX_WORKBOOK_CELLS + 10_000) + b"</row>")


def workbook_of_wide_rows(path: Path) -> None:
    """Write rows of one cell each, in the last column that Excel has, so that each is as long as the sheet is wide."""
    workbook_with(path, b"".join(b'<row r="%d"><c r="XFD%d"><v>1</v></c></row>' % (row, row) for row in range(1, 3000)))


def workbook_with(path: Path, rows: bytes) -> None:
    book = openpyxl.Workbook()
    book.save(path.with_suffix(".small"))
    with (
        zipfile.ZipFile(path.with_suffix(".small")) as small,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for part in small.infolist():
            data = small.read(part).replace(b"<sheetData>", b"<sheetData>" + rows)
            archive.writestr(part.filename, data)


def workbook_of_zeros(path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["slide"])
    book.save(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet2.xml", b"<row/>" * (tables.MAX_WORKBOOK_BYTES // 6))


@pytest.mark.parametrize(
    ("name", "make", "limit"),
    [
        ("a.csv", too_many_rows, "1,048,576 rows"),
        ("b.csv", too_many_cells, "10,000,000 cells"),
        ("c.csv", too_large, "256 MiB of text"),
        ("h.csv", too_many_columns, "16,384 columns"),
        ("i.csv", one_line, "16 MiB in a line"),
        ("d.parquet", parquet_of_one_word, "1,048,576 rows"),
        ("j.parquet", parquet_of_columns, "4 MiB of that"),
        ("k.xlsx", workbook_of_rows, "1,048,576 rows"),
        ("l.xlsx", workbook_of_parts, "10,000 parts of workbook"),
        ("e.xlsx", workbook_of_zeros, "64 MiB of workbook"),
        ("f.xlsx", workbook_of_cells, "4,000,000 cells of workbook"),
        ("g.xlsx", workbook_of_wide_rows, "4,000,000 cells of workbook"),
    ],
)
def test_what_is_too_large_is_refused_at_once_and_the_limit_is_named(tmp_path, name, make, limit, monkeypatch) -> None:
    make(tmp_path / name)
    monkeypatch.setattr(tables, "_read_apart", lambda read, path: read(path))  # time and memory are measured here
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TableError, match=f"tables are limited to {limit}") as caught:
        read_table(tmp_path / name)
    assert caught.value.code == "unsafe"
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB


def test_a_cell_of_parquet_that_holds_a_list_is_not_unpacked(tmp_path) -> None:
    pq.write_table(pa.table({"slide": ["a", "b"], "label": [[0] * 1_000_000, [1]]}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert (list(table), table.notes) == (["slide"], ("columns of lists are not read: label",))


def test_a_script_without_a_guard_may_read_a_workbook(tmp_path) -> None:
    pq.write_table(pa.table({"slide": ["a"]}), tmp_path / "a.parquet")
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom eosin._tables import read_table\nprint(read_table(Path('a.parquet'))['slide'])"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "('a',)\n", done.stderr


def test_a_library_that_hangs_or_dies_is_a_table_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(tables.APART, ".parquet", fall_down)
    with pytest.raises(TableError, match="the process that tried died"):
        read_table(path)
    monkeypatch.setattr(tables, "APART_S", 0.2)
    monkeypatch.setitem(tables.APART, ".parquet", sleep_over)
    with pytest.raises(TableError, match=r"gave no answer for 0\.2 s"):
        read_table(path)


def sleep_over(_path: Path) -> None:
    time.sleep(60)


def fall_down(_path: Path) -> None:
    os.abort()


TEXTS = [
    "=1+1",
    "=cmd|'/C calc'!A1",
    "+49 30",
    "-x",
    "@sum",
    "'=x",
    "''-y",
    "-1.5",
    "+2",
    "-1e-5",
    "-",
    "＝1",
    "a=b",
    "'quoted'",
]


def test_cells_that_a_spreadsheet_would_run_are_shielded_and_come_back(tmp_path: Path) -> None:
    written = csv_text([["=head", "n"], *([text, number - 3.5] for number, text in enumerate(TEXTS))])
    (tmp_path / "t.csv").write_text(written, encoding="utf-8")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    for (cell, number), text in zip(rows, TEXTS, strict=True):
        assert not re.match(r"[=@+\-\t\r＝]", cell) or re.fullmatch(r"[-+]?[\d.e-]+", cell)
        assert float(number) == TEXTS.index(text) - 3.5
    table = read_table(tmp_path / "t.csv")
    assert list(table["=head"]) == TEXTS
    frame = pd.DataFrame({"=head": TEXTS, "n": [number - 3.5 for number in range(len(TEXTS))]})
    assert frame_text(frame) == written
    book = openpyxl.Workbook()
    for row in csv.reader(io.StringIO(written)):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert list(read_table(tmp_path / "t.xlsx")["=head"]) == TEXTS


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), min_size=1))
def test_every_text_comes_back(texts: list[str]) -> None:
    rows = csv.reader(io.StringIO(csv_text([[text] for text in texts]), newline=""))
    assert [unshielded("".join(row)) for row in rows] == texts


def test_nobody_else_writes_a_table_as_text() -> None:
    root = Path(eosin.__file__).parent
    writers = [path for path in root.rglob("*.py") if re.search(r"csv\.(Dict)?[wW]riter|\.to_csv\(", path.read_text())]
    assert [path.name for path in writers] == ["_tables.py"]


def test_a_word_that_parquet_stores_once_takes_memory_once(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 10_000]))
    pq.write_table(pa.table({"slide": column}), tmp_path / "t.parquet", store_schema=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = read_table(tmp_path / "t.parquet")["slide"]
    assert len(words) == 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB; 1 GB as separate words


def test_a_workbook_that_defines_entities_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')
    with pytest.raises(TableError, match="defines entities"):
        read_table(tmp_path / "t.xlsx")


def test_a_bag_as_text_is_read_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("0;1\n\n 2.5;3\n")
    assert list(TextFile(tmp_path / "t.csv").rows()) == [(1, ["0", "1"]), (2, []), (3, ["2.5", "3"])]


def test_a_table_that_cannot_be_read_is_an_error_of_labels_and_of_options() -> None:
    assert issubclass(TableError, LabelError)
    assert issubclass(TableError, ConfigError)


LAUGH = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGH, "expands to more than 20,000 values"),
        (MERGED, "expands to more than 20,000 values"),
        ("a: " + "[" * 1000 + "]" * 1000, "in 50 levels"),
        ("a: " + "{b: " * 1000 + "}" * 1000, "in 50 levels"),
        ("a: &a [*a]", r"the alias \*a has no anchor before it"),
        ("a: " + "9" * 5000, "cannot be read as YAML"),
        ("# " + "x" * 2**18, "larger than 262,144 bytes"),
    ],
)
def test_yaml_that_would_run_for_ever_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "c.yaml")
    assert time.perf_counter() - started < 1


def test_yaml_with_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: &b {lr: 1}\nrecipe: {<<: *b, epochs: 2}\n")
    assert read_yaml(tmp_path / "c.yaml")["recipe"] == {"lr": 1, "epochs": 2}

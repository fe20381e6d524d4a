"""Tables of every tool and file type, ids as text, and what is refused."""

import datetime

import openpyxl
import pandas as pd
import pytest

from eosin._names import slide_id
from eosin._tables import read_table
from eosin.errors import LabelError
from eosin.mil._study import open_labels, pose_task
from eosin.mil._tables import LabelTable, read_labels
from eosin.mil._target import target_column
from eosin.mil.task import make_task


def a_table(**columns):
    columns.setdefault("slide_ids", ("a", "b", "c"))
    columns.setdefault("patient_ids", ("1", "1", "2"))
    return LabelTable(columns.pop("slide_ids"), columns.pop("patient_ids"), columns)


def workbook(path, *rows, formats=()):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cell, shown in formats:
        book.active[cell].number_format = shown
    book.save(path)
    return path


@pytest.mark.parametrize(
    ("text", "slides", "patients", "values"),
    [
        ("case_id,slide_id,label\np0,0010.svs,x\n", ("0010",), ("p0",), {"label": ("x",)}),
        ("PATIENT,FILENAME,isMSIH\n007,a.h5,yes\n", ("a",), ("007",), {"isMSIH": ("yes",)}),
        ("patient,type,site,slide\np,x,S,T-1.A.c\n", ("T-1.A.c",), ("p",), {"type": ("x",), "site": ("S",)}),
        (",patient_id,slide_id,label\n0,1,2,NA\n", ("2",), ("1",), {"label": ("NA",)}),
    ],
)  # fmt: skip
def test_columns_are_found_and_ids_stay_text(tmp_path, text, slides, patients, values):
    (tmp_path / "labels.csv").write_text(text)
    table = read_labels(tmp_path / "labels.csv")
    assert (table.slide_ids, table.patient_ids, table.values) == (slides, patients, values)


@pytest.mark.parametrize(
    ("name", "rows", "patients", "target"),
    [
        ("acmil-camelyon16.csv", 399, 362, "label"),
        ("clam-tumor_vs_normal_dummy_clean.csv", 500, 450, "label"),
        ("slideflow-breast_er_labels.csv", 1048, 990, "ER_Status_By_IHC"),
        ("slideflow-lung_adeno_squam_labels.csv", 941, 941, "subtype"),
    ],
)
def test_real_tables_are_understood(shared, name, rows, patients, target):
    table = read_labels(shared / "data/interop/labels_csv" / name)
    assert len(table) == rows
    assert table.target_column() == target
    task = make_task("classification", table.rows(), target=target)
    assert task.encode(table.rows()).bincount().min() > 0
    assert len(set(table.patient_ids)) == patients


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient_id,label\n1,x\n", "no column of slide ids; found patient_id, label; expected slide_id"),
        ("slide_id,label\n1,x\n", r"no column of patients; .*\(--group slide; for eosin run a copy"),
        ("patient_id,slide_id,label\n1,a.svs,x\n2,a,y\n", "slides with more than one row: a;"),
        ("patient_id,slide_id,label\n1,a,x\n2,,y\n", "row 3 has no id"),
        ("patient_id,slide_id,label\n", "the table has no rows"),
        ("", "the table has no rows"),
        ("patient_id,slide_id,label,label\n1,a,x,y\n", "two columns are called 'label'; rename one"),
        ("patient_id,slide_id,label\n1,a,x\n2,b,y, z\n", "line 3 has 4 cells, but the first line names 3 columns"),
        ('patient_id,slide_id,label\n1,"a,x\n2,b,y\n', "line 3: unexpected end of data; check its quotation marks"),
    ],
)
def test_bad_tables_give_one_clear_line(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(LabelError, match=message) as caught:
        read_labels(tmp_path / "labels.csv")
    assert "\n" not in str(caught.value)


def test_columns_are_not_shifted_by_separators_at_the_end_of_lines(tmp_path):
    (tmp_path / "l.csv").write_text("patient_id,slide_id,label\n1,a,x,\n2,b,y,\n")
    table = read_labels(tmp_path / "l.csv")
    assert (table.slide_ids, table.patient_ids, table.values) == (("a", "b"), ("1", "2"), {"label": ("x", "y")})
    (tmp_path / "l.csv").write_text(",patient_id,slide_id,label,\n0,1,a,x,\n1,2,b,y,\n")
    assert read_labels(tmp_path / "l.csv").values == {"label": ("x", "y")}
    (tmp_path / "l.csv").write_text(",Unnamed: 0,patient_id,slide_id,label\n0,0,1,a,x\n1,1,2,b,y\n")
    assert read_labels(tmp_path / "l.csv").values == {"label": ("x", "y")}


def test_a_file_under_another_name_says_what_it_is(tmp_path):
    workbook(tmp_path / "l.xlsx", ["slide", "patient"], ["a", "b"]).rename(tmp_path / "l.csv")
    with pytest.raises(LabelError, match=r"l.csv: is an Excel workbook; name it .xlsx"):
        read_table(tmp_path / "l.csv")
    pd.DataFrame({"slide": ["a"]}).to_parquet(tmp_path / "l.tsv")
    with pytest.raises(LabelError, match=r"l.tsv: is a parquet file; name it .parquet"):
        read_table(tmp_path / "l.tsv")


def test_a_table_of_another_kind_or_none_is_refused(tmp_path):
    with pytest.raises(LabelError, match="no such file"):
        read_labels(tmp_path / "labels.csv")
    with pytest.raises(LabelError, match=r"expected .csv, .tsv"):
        read_labels(tmp_path / "labels.docx")


CLINIC = {
    "Age": [str(50 + n) for n in range(12)],
    "Received": [f"2024-02-{n + 1:02}" for n in range(12)],
    "Stained": [f"{n % 2 + 1}.3.2024" for n in range(12)],
    "Comment": ["ok", "again", *[""] * 10],
    "Batch": ["A"] * 12,
    "Befund": ["Tumor", "normal", "unbekannt"] * 4,
    "Ki67 %": ["12,5", "7,25", "30", "n.a."] * 3,
    "Sex": ["m", "w"] * 6,
}


@pytest.mark.parametrize(
    ("names", "kind", "found"),
    [
        ("Age Received Stained Comment Batch Sex", "classification", "Sex"),
        ("Age Received Stained Comment Batch Befund Sex", "classification", "Befund"),
        ("Received Stained Comment Batch Sex,Ki67 %", "regression", "Ki67 %"),
        ("Sex,Ki67 %", "classification", "2 columns could be it: Sex (m: 6, w: 6); Ki67 % (12,5: 3, 7,25: 3, 30: 3)"),
        ("Age Sex,Ki67 %", "regression", "2 columns could be it: Age (50: 1, 51: 1, 52: 1, 53: 1 and 8 more)"),
        ("Age Received", "classification", "2 columns could be it: Age"),
        ("Batch", "classification", "Batch"),
        ("", "classification", "and no other that could be it"),
    ],
)
def test_columns_that_are_not_the_label_are_told_by_what_they_hold(names, kind, found):
    columns = [name for part in names.split(",") for name in ([part] if "%" in part else part.split())]
    values = {name: CLINIC[name] for name in columns}
    try:
        assert target_column(values, kind) == found
    except LabelError as error:
        assert found in str(error)  # noqa: PT017 - both ends are parameters


def test_slides_may_be_their_own_patients(tmp_path):
    (tmp_path / "labels.tsv").write_text("slide\tlabel\na\tx\nb\ty\n")
    assert read_labels(tmp_path / "labels.tsv", group="slide").patient_ids == ("a", "b")


def test_the_label_column_is_found_where_one_can_pose_the_task_and_asked_for_otherwise():
    assert a_table(site=("x",) * 3, subtype=("p", "q", "q")).target_column() == "subtype"
    with pytest.raises(LabelError, match=r"2 columns could be it: grade \(2: 2, 1: 1\); .* --target grade$"):
        a_table(grade=("1", "2", "2"), subtype=("p", "q", "q")).target_column()
    with pytest.raises(LabelError, match="no column 'stage'; it has label"):
        pose_task("classification", a_table(label=("1", "2", "2")), "stage")
    with pytest.raises(LabelError, match=r"no value in column 'label' for b \(empty, nan, unknown ...\);"):
        pose_task("classification", a_table(label=("1", "NaN", "2")))


def test_known_suffixes_go_and_other_dots_stay():
    names = ["TCGA-A1-A0SH-01Z-00-DX1.90E71B08", "a.ome.tiff", "0012.SVS", "b.h5", " c ", "x.y.z", r"C:\d\e.svs"]
    assert [slide_id(name) for name in names] == [
        "TCGA-A1-A0SH-01Z-00-DX1.90E71B08",
        "a",
        "0012",
        "b",
        "c",
        "x.y.z",
        "e",
    ]


def test_the_same_table_is_the_same_in_every_file_type(tmp_path):
    rows = [("case_id", "slide_id", "label"), ("007", "0012.v1", "a"), ("P-2", "T.1.svs", "b")]
    frame = pd.DataFrame(rows[1:], columns=rows[0])
    for name, separator in (("a.csv", ","), ("b.csv", ";"), ("c.csv", "\t"), ("d.tsv", "\t"), ("e.txt", "\t")):
        frame.to_csv(tmp_path / name, sep=separator, index=False)
    frame.to_csv(tmp_path / "f.csv", index=False, encoding="utf-8-sig")
    frame.to_parquet(tmp_path / "g.parquet", index=False)
    workbook(tmp_path / "h.xlsx", *rows)
    for path in tmp_path.iterdir():
        table = read_labels(path)
        assert (table.slide_ids, table.patient_ids) == (("0012.v1", "T.1"), ("007", "P-2")), path
        assert table.values == {"label": ("a", "b")}


def test_numbers_that_excel_made_of_ids_are_stated(tmp_path):
    path = workbook(
        tmp_path / "a.xlsx", ["patient", "slide", "label"], [7, "s1", 1], ["8b", "s2", 2.0], [9.0, "s3", 0.5]
    )
    table = read_labels(path)
    assert table.patient_ids == ("7", "8b", "9")
    assert table.values == {"label": ("1", "2", "0.5")}
    assert "2 ids in 'patient' are stored as numbers: leading zeros, had there been any, are lost" in table.notes
    assert not any("stored as numbers" in note for note in read_labels(tmp_path / "a.xlsx", group="slide").notes)


def test_zeros_that_excel_shows_are_kept(tmp_path):
    rows = (["patient", "slide", "label"], [7, "s1", "a"], [12, "s2", "b"])
    path = workbook(tmp_path / "a.xlsx", *rows, formats=[("A2", "0000"), ("A3", "0000")])
    table = read_labels(path)
    assert table.patient_ids == ("0007", "0012")
    assert not any("leading zeros" in note for note in table.notes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime.datetime(2025, 3, 1), r"column 'slide' holds ids, but row 2 is a date \(2025-03-01"),
        (12.5, "row 2 is a fraction"),
        (1234567890123456789, "more than 15 digits, which spreadsheets round"),
    ],
)
def test_ids_that_excel_spoilt_are_refused(tmp_path, value, message):
    path = workbook(tmp_path / "a.xlsx", ["patient", "slide", "label"], ["p", value, "a"])
    with pytest.raises(LabelError, match=message):
        read_labels(path)


def test_damaged_workbooks_and_parquet_files_are_one_line(tmp_path):
    workbook(tmp_path / "empty.xlsx")
    workbook(tmp_path / "twice.xlsx", ["slide", "slide"], ["a", "b"])
    whole = workbook(tmp_path / "whole.xlsx", ["slide", "patient"], ["a", "b"]).read_bytes()
    (tmp_path / "cut.xlsx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.xlsx").write_text("slide,patient\n")
    (tmp_path / "text.parquet").write_text("slide,patient\n")
    for name in ("empty.xlsx", "twice.xlsx", "cut.xlsx", "text.xlsx", "text.parquet"):
        with pytest.raises(LabelError, match=name) as caught:
            read_table(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "slides", "patients", "group"),
    [
        ("Case,ID,Label,Split\np,s1,0,train\np,s2,1,test\n", ("s1", "s2"), ("p", "p"), "patient"),
        ("ID,Label\ns1,0\ns2,1\n", ("s1", "s2"), ("s1", "s2"), "slide"),
        (
            "Study,ID,Event,Status,WSI\nX,p,9,1,/d/a.pt;/d/b.1.pt\nX,q,8,0,c.pt\n",
            ("a", "b.1", "c"),
            ("p", "p", "q"),
            "patient",
        ),
    ],
)
def test_tables_of_packmil(tmp_path, text, slides, patients, group):
    (tmp_path / "l.csv").write_text(text)
    table = read_labels(tmp_path / "l.csv", group=group)
    assert (table.slide_ids, table.patient_ids) == (slides, patients)
    if "Status" in table.values:
        task = pose_task("survival", table)
        assert task.columns == ("Event", "Status")
        assert task.encode(table.rows()).tolist() == [[9, 1], [9, 1], [8, 0]]
    else:
        assert pose_task("classification", table).columns == ("Label",)


def test_two_tables_of_stamp(tmp_path):
    workbook(tmp_path / "clini.xlsx", ["PATIENT", "isMSIH", "age"], ["A-1", "MSIH", 50], ["A-2", "nonMSIH", 61])
    (tmp_path / "slide.csv").write_text("PATIENT,FILENAME\nA-1,x.1.h5\nA-2,sub/y.h5\nA-1,z.h5\n")
    table = open_labels(tmp_path / "clini.xlsx", slide_table=tmp_path / "slide.csv")
    assert (table.slide_ids, table.patient_ids) == (("x.1", "y", "z"), ("A-1", "A-2", "A-1"))
    assert pose_task("classification", table, "isMSIH").encode(table.rows()).tolist() == [1, 0, 1]


def test_ids_of_stamps_workbook_are_judged_too(tmp_path):
    (tmp_path / "slide.csv").write_text("PATIENT,FILENAME\n7,x.h5\n9,y.h5\n")
    workbook(tmp_path / "clini.xlsx", ["PATIENT", "label"], [7, "a"], [9, "b"])
    table = open_labels(tmp_path / "clini.xlsx", slide_table=tmp_path / "slide.csv")
    assert any("2 ids in 'PATIENT' are stored as numbers" in note for note in table.notes)
    workbook(tmp_path / "clini.xlsx", ["PATIENT", "label"], [7, "a"], [9, "b"], [datetime.date(2024, 1, 5), "b"])
    with pytest.raises(LabelError, match="column 'PATIENT' holds ids, but row 4 is a date"):
        open_labels(tmp_path / "clini.xlsx", slide_table=tmp_path / "slide.csv")


def test_a_fold_of_transmil_is_known_by_its_columns(shared):
    table = open_labels(shared / "data/interop/labels_csv/transmil-camelyon16-fold0.csv")
    assert len(table) == 399
    task = pose_task("classification", table)
    assert task.classes == ("0", "1")
    assert "TransMIL" in table.notes[0]


@pytest.mark.parametrize(("name", "rows"), [("histolab-GTEx_AIDP2021.csv", None)])
def test_tables_with_other_peoples_column_names(shared, name, rows):
    table = open_labels(shared / "data/interop/labels_csv" / name)
    assert table.slide_ids[0] == "GTEX-N7MT-0526"
    assert table.patient_ids[0] == "GTEX-N7MT"
    assert len(pose_task("classification", table, "Sex").classes) == 2


def test_how_columns_were_understood_is_said(tmp_path):
    (tmp_path / "l.csv").write_text("case_id,slide_id,months,censorship\np,s,3,0\nq,t,5,1\n")
    table = read_labels(tmp_path / "l.csv")
    assert table.notes == ("slides: column 'slide_id'", "patients: column 'case_id'", "values: months, censorship")
    said = pose_task("cox", table, "months,censorship").describe(table.rows())
    assert said == (
        "label: time in 'months'; 'censorship' with 0 for an event, 1 of 2 have one; "
        "turned round, because its name says that 1 is censored"
    )


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("P01,a,0\np01,b,1\n", r"'P01' = 'p01'.*--ids merge.*--ids exact"),
        ("001,a,0\n1,b,1\n1.0,c,1\n", r"'001' = '1' = '1.0'"),
        ("TCGA-01,a,0\nTCGA_01,b,1\n", r"'TCGA-01' = 'TCGA_01'"),
        ("TCGA-A1-A0SB-01Z-00-DX1,a,0\nTCGA-A1-A0SB-02A,b,1\n", r"'TCGA-A1-A0SB-01Z-00-DX1' = 'TCGA-A1-A0SB-02A'"),
        ("p1,s-1,0\np2,S_1,1\n", r"1 slides are spelled in several ways: 's-1' = 'S_1'"),
        ("nan,a,0\nunknown,b,1\nP1,c,1\n", r"rows 2, 3 have no id of a patient"),
        ("nan,a,0\nP01,b,1\np01,c,1\n", r"row 2 has no id of a patient.*'P01' = 'p01'"),
    ],
)
def test_ids_that_look_alike_or_say_unknown_stop_the_reading_with_all_of_them(tmp_path, rows, told):
    path = tmp_path / "labels.csv"
    path.write_text("patient_id,slide_id,label\n" + rows)
    with pytest.raises(LabelError, match=told):
        read_labels(path)


def test_a_person_decides_whether_ids_that_look_alike_are_the_same(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("patient_id,slide_id,label\nP01,a,0\np01,b,1\nP01,c,1\nP\u200b02,d,0\n", encoding="utf-8")
    assert read_labels(path, ids="merge").patient_ids == ("P01", "P01", "P01", "P02")
    assert read_labels(path, ids="exact").patient_ids == ("P01", "p01", "P01", "P02")


def test_patients_that_are_the_slides_are_pointed_out(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("case_id,slide_id,label\na,a,0\nb,b,1\n")
    assert any("each slide counts as a separate patient" in note for note in read_labels(path).notes)

import json

import pytest

from eosin.errors import LabelError
from eosin.mil._cohort import Cohort
from eosin.mil._interop import (
    read_fold_table,
    read_patient_splits,
    read_two_tables,
    split_by_column,
    write_patient_splits,
)
from eosin.mil._splits import Split, check_splits
from eosin.mil._tables import LabelTable
from eosin.mil.task import make_task

COHORT = Cohort(("a1", "a2", "b", "c"), ("A", "A", "B", "C"), ("0", "0", "1", "1"))


def test_a_real_fold_of_transmil(shared):
    table, split = read_fold_table(shared / "data/interop/labels_csv/transmil-camelyon16-fold0.csv")
    assert len(table) == 399
    assert [len(part) for part in split.parts().values()] == [216, 54, 129]
    task = make_task("binary", table.rows())
    assert task.classes == ("0", "1")
    check_splits([split], Cohort(table.slide_ids, table.patient_ids, table.values["label"]))
    assert dict(zip(table.slide_ids, table.values["label"], strict=True))["test_001"] == "1"


def test_a_table_that_is_no_fold_is_refused(tmp_path):
    (tmp_path / "fold.csv").write_text("train,val\na,b\n")
    with pytest.raises(LabelError, match="train_label, val_label, test, test_label are missing"):
        read_fold_table(tmp_path / "fold.csv")


def write_two(tmp_path, slides="PATIENT,FILENAME\n01,x/a.h5\n01,b.b.h5\n2,c.h5\n"):
    (tmp_path / "clini.csv").write_text("PATIENT,isMSIH,age\n01,yes,50\n2,no,60\n")
    (tmp_path / "slides.csv").write_text(slides)
    return tmp_path / "clini.csv", tmp_path / "slides.csv"


def test_two_tables_are_joined_by_patient(tmp_path):
    table = read_two_tables(*write_two(tmp_path))
    assert table.slide_ids == ("a", "b.b", "c")
    assert table.patient_ids == ("01", "01", "2")
    assert table.values["isMSIH"] == ("yes", "yes", "no")


@pytest.mark.parametrize(
    ("slides", "message"),
    [
        ("PATIENT,FILENAME\n3,a.h5\n", r"patients without a row in clini\.csv: 3"),
        ("PATIENT,what\n01,a.h5\n", "has no column for the slides; found PATIENT, what"),
        ("PATIENT,FILENAME\n01,a.h5\n2,\n", r"slides\.csv: row 3 has no id of a slide"),
        ("PATIENT,FILENAME\n,a.h5\n2,b.h5\n", r"slides\.csv: row 2 has no id of a patient"),
    ],
)
def test_two_tables_that_do_not_fit_are_refused(tmp_path, slides, message):
    with pytest.raises(LabelError, match=message):
        read_two_tables(*write_two(tmp_path, slides))


def test_who_is_lost_between_two_tables_is_told(tmp_path):
    clini, slides = write_two(tmp_path, "PATIENT,FILENAME,Site\n01,a.h5,A\n01,b.h5,A\n")
    table = read_two_tables(clini, slides)
    assert table.notes == (
        "slides: column 'FILENAME' of slides.csv",
        "patients: column 'PATIENT' of clini.csv (1 patient with 2 slides)",
        "1 of 2 patients in clini.csv have no slide and are left out",
    )
    assert table.values["Site"] == ("A", "A")
    clini.write_text("PATIENT,isMSIH,centre\n01,yes,B\n")
    assert "Site" not in read_two_tables(clini, slides).values
    clini.write_text("PATIENT,isMSIH\n01,yes\n,no\n")
    with pytest.raises(LabelError, match=r"clini\.csv: row 3 has no id"):
        read_two_tables(clini, slides)


def test_a_patient_with_two_rows_of_labels_is_refused(tmp_path):
    clini, slides = write_two(tmp_path)
    clini.write_text("PATIENT,x\n01,1\n01,2\n2,1\n")
    with pytest.raises(LabelError, match="more than one row: 01"):
        read_two_tables(clini, slides)


def test_splits_of_patients_come_back(tmp_path):
    splits = [Split(("a1", "a2"), ("b",), ("c",)), Split(("b", "c"), (), ("a1", "a2"))]
    write_patient_splits(tmp_path / "splits.json", splits, COHORT)
    assert json.loads((tmp_path / "splits.json").read_text())["splits"][0] == {
        "train_patients": ["A", "B"],
        "test_patients": ["C"],
    }
    assert read_patient_splits(tmp_path / "splits.json", COHORT) == [
        Split(("a1", "a2", "b"), (), ("c",)),
        Split(("b", "c"), (), ("a1", "a2")),
    ]


def test_bad_patient_splits_are_refused(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text('{"splits": [{"train_patients": ["Z"], "test_patients": []}]}')
    with pytest.raises(LabelError, match="not in the label table: Z"):
        read_patient_splits(path, COHORT)
    path.write_text("[]")
    with pytest.raises(LabelError, match=r"is not a splits\.json"):
        read_patient_splits(path, COHORT)


def test_a_column_may_state_the_split():
    table = LabelTable(("a", "b", "c"), ("1", "2", "3"), {"Split": ("Train", "valid", "test"), "x": ("u", "v", "w")})
    assert split_by_column(table, "Split") == Split(("a",), ("b",), ("c",))
    with pytest.raises(LabelError, match="names u, v, w"):
        split_by_column(table, "x")

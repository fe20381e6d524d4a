import numpy as np
import pytest
import torch

from eosin.errors import FeatureMismatchError, LabelError
from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.store import find_bags, write_bag
from eosin.mil.data import FeatureFolder, LabelTable, MemoryBags, make_examples, patient_examples, read_labels, slide_id
from eosin.mil.tasks import Classification, make_task

SPEC = FeatureSpec(encoder="test", dim=3)


def a_table(**columns):
    columns.setdefault("slide_ids", ("a", "b", "c"))
    columns.setdefault("patient_ids", ("1", "1", "2"))
    return LabelTable(columns.pop("slide_ids"), columns.pop("patient_ids"), columns)


def some_bags(ids="abc"):
    return MemoryBags({name: torch.randn(number + 1, 3) for number, name in enumerate(ids)}, SPEC)


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
        ("slide_id,label\n1,x\n", r"no column of patients; .*\(--group slide\)"),
        ("patient_id,slide_id,label\n1,a.svs,x\n2,a,y\n", "slides with more than one row: a;"),
        ("patient_id,slide_id,label\n1,a,x\n2,,y\n", "row 3 has no id"),
        ("patient_id,slide_id,label\n", "the table has no rows"),
        ("", "cannot be read as a table"),
    ],
)
def test_bad_tables_give_one_clear_line(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(LabelError, match=message) as caught:
        read_labels(tmp_path / "labels.csv")
    assert "\n" not in str(caught.value)


def test_a_table_of_another_kind_or_none_is_refused(tmp_path):
    with pytest.raises(LabelError, match="no such file"):
        read_labels(tmp_path / "labels.csv")
    with pytest.raises(LabelError, match=r"tables are .csv, .tsv"):
        read_labels(tmp_path / "labels.docx")


def test_slides_may_be_their_own_patients(tmp_path):
    (tmp_path / "labels.tsv").write_text("slide\tlabel\na\tx\nb\ty\n")
    assert read_labels(tmp_path / "labels.tsv", group="slide").patient_ids == ("a", "b")


def test_the_label_column_is_never_guessed():
    assert a_table(site=("x",) * 3, subtype=("p", "q", "q")).target_column() == "subtype"
    with pytest.raises(LabelError, match=r"which column is the label.*grade, subtype"):
        a_table(grade=("1", "2", "2"), subtype=("p", "q", "q")).target_column()
    with pytest.raises(LabelError, match="no column 'stage'; it has label"):
        a_table(label=("1", "2", "2")).target_column("stage")
    with pytest.raises(LabelError, match="no value in column 'label' for b;"):
        a_table(label=("1", "NaN", "2")).target_column()


def test_known_suffixes_go_and_other_dots_stay():
    names = ["TCGA-A1-A0SH-01Z-00-DX1.90E71B08", "a.ome.tiff", "0012.SVS", "b.h5", " c ", "x.y.z"]
    assert [slide_id(name) for name in names] == ["TCGA-A1-A0SH-01Z-00-DX1.90E71B08", "a", "0012", "b", "c", "x.y.z"]


def test_examples_follow_the_table_and_need_features():
    table = a_table(label=("x", "y", "y"))
    task = Classification(classes=("x", "y"))
    examples = make_examples(some_bags("cbazz"), table, task)
    assert examples.ids == ("a", "b", "c")
    assert examples.targets.tolist() == [0, 1, 1]
    assert examples.subset(["c", "a"]).targets.tolist() == [1, 0]
    with pytest.raises(LabelError, match="1 of 3 labelled slides have no features: c;"):
        make_examples(some_bags("ab"), table, task)
    assert make_examples(some_bags("ab"), table, task, missing="drop").ids == ("a", "b")
    with pytest.raises(LabelError, match="3 of 3"):
        make_examples(some_bags("q"), table, task, missing="drop")
    with pytest.raises(LabelError, match="'z' in column 'label' is none of the classes x, y"):
        make_examples(some_bags(), a_table(label=("x", "y", "z")), task)


def test_a_patient_is_the_bag_of_all_slides():
    task = Classification(classes=("x", "y"))
    bags = some_bags()
    examples = patient_examples(make_examples(bags, a_table(label=("x", "x", "y")), task))
    assert examples.ids == ("1", "2")
    assert examples.targets.tolist() == [0, 1]
    assert torch.equal(examples.bags.load("1"), torch.cat([bags.load("a"), bags.load("b")]))
    assert examples.bags.length("1") == 3
    assert examples.bags.slide_index("1").tolist() == [0, 1, 1]
    with pytest.raises(LabelError, match="patient 1 has slides with different labels"):
        patient_examples(make_examples(bags, a_table(label=("x", "y", "y")), task))


@pytest.mark.parametrize("cache_bytes", [0, 30, 10**6])
def test_feature_files_give_their_rows_whatever_the_cache(tmp_path, cache_bytes):
    rng = np.random.default_rng(0)
    bags = {name: rng.normal(size=(n, 3)).astype(np.float16) for name, n in [("a", 4), ("b", 0), ("c", 5)]}
    for name, features in bags.items():
        write_bag(tmp_path / f"{name}.h5", FeatureBag(features, SPEC, name))
    folder = FeatureFolder(find_bags(tmp_path), cache_bytes=cache_bytes)
    for _ in range(2):
        for name, features in bags.items():
            assert folder.length(name) == len(features)
            np.testing.assert_array_equal(folder.load(name).numpy(), features)
    rows = torch.tensor([3, 1])
    np.testing.assert_array_equal(folder.load("a", rows).numpy(), bags["a"][[3, 1]])


def test_features_of_two_encoders_do_not_mix(tmp_path):
    for name, encoder in [("a", "one"), ("b", "two")]:
        spec = FeatureSpec(encoder=encoder, dim=3)
        write_bag(tmp_path / f"{name}.h5", FeatureBag(np.zeros((1, 3), np.float32), spec, name))
    with pytest.raises(FeatureMismatchError, match="encoder two"):
        FeatureFolder(find_bags(tmp_path))

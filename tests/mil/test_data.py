import numpy as np
import pytest
import torch

from eosin.errors import FeatureMismatchError, LabelError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.mil._data import FeatureFolder, MemoryBags, make_examples, patient_examples
from eosin.mil._tables import LabelTable
from eosin.mil.tasks._classification import Classification

SPEC = FeatureSpec(encoder="test", dim=3)


def a_table(**columns):
    columns.setdefault("slide_ids", ("a", "b", "c"))
    columns.setdefault("patient_ids", ("1", "1", "2"))
    return LabelTable(columns.pop("slide_ids"), columns.pop("patient_ids"), columns)


def some_bags(ids="abc"):
    return MemoryBags({name: torch.randn(number + 1, 3) for number, name in enumerate(ids)}, SPEC)


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
    with pytest.raises(LabelError, match="'z' in column 'label' is not one of the classes x, y"):
        make_examples(some_bags(), a_table(label=("x", "y", "z")), task)


def test_a_patient_is_the_bag_of_all_slides():
    task = Classification(classes=("x", "y"))
    bags = some_bags()
    examples = patient_examples(make_examples(bags, a_table(label=("x", "x", "y")), task))
    assert examples.ids == ("1", "2")
    assert examples.targets.tolist() == [0, 1]
    assert torch.equal(examples.bags.load("1"), torch.cat([bags.load("a"), bags.load("b")]))
    assert examples.bags.length("1") == 3
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

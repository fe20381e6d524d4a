"""Data sets of bags."""

import contextlib
import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eosin.errors import FeatureFileError
from eosin.features._store import find_bags, read_bag, read_common_spec
from eosin.features.interop import import_file
from eosin.features.interop._npz import read_npz


def arrays() -> dict[str, np.ndarray]:
    masks = np.zeros((2, 2, 3), bool)
    masks[0, 0, :2] = masks[0, 1, 2] = masks[1, 0, 1] = masks[1, 1, [0, 2]] = True
    return {
        "instances": np.arange(12, dtype=np.float32).reshape(6, 2),
        "bag_index": np.array([0, 0, 2, 2, 2, 2], np.int32),
        "bag_label": np.array([1, 0, 1], np.int8),
        "cv_train_mask": masks,
    }


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_bags_labels_and_folds(tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", **arrays())
    done = import_file(tmp_path / "toy.npz", tmp_path / "out")
    assert done.paths == tuple(tmp_path / "out" / name for name in ("features", "labels.csv", "splits"))
    bags = find_bags(tmp_path / "out" / "features")
    assert list(bags) == ["toy-0", "toy-1", "toy-2"]
    assert [read_bag(path, verify=True).features.tolist() for path in bags.values()] == [
        [[0, 1], [2, 3]],
        [],
        [[4, 5], [6, 7], [8, 9], [10, 11]],
    ]
    assert read_common_spec(bags).encoder == "npz:toy"
    assert rows_of(tmp_path / "out" / "labels.csv") == [
        ["patient_id", "slide_id", "label"],
        ["toy-0", "toy-0", "1"],
        ["toy-1", "toy-1", "0"],
        ["toy-2", "toy-2", "1"],
    ]
    assert sorted(path.name for path in (tmp_path / "out" / "splits").iterdir()) == [
        "manifest.json",
        *(f"splits_{i}.csv" for i in range(4)),
    ]
    assert rows_of(tmp_path / "out" / "splits" / "splits_0.csv") == [
        ["", "train", "val", "test"],
        ["0", "toy-0", "", "toy-2"],
        ["1", "toy-1", "", ""],
    ]


def test_no_folds_no_splits(tmp_path: Path) -> None:
    content = arrays()
    del content["cv_train_mask"]
    np.savez_compressed(tmp_path / "toy.npz", **content)
    import_file(tmp_path / "toy.npz", tmp_path / "out")
    assert not (tmp_path / "out" / "splits").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bag_index", np.zeros(5, np.int32), "do not fit together"),
        ("bag_index", np.array([1, 0, 0, 0, 0, 0]), "must ascend"),
        ("bag_index", np.array([0, 0, 0, 0, 0, 3]), "must ascend"),
        ("instances", np.full((6, 2), np.nan, np.float32), "infinite or NaN"),
        ("cv_train_mask", np.zeros((2, 2, 4), bool), "cv_train_mask"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, name: str, value: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "toy.npz", **(arrays() | {name: value}))
    with pytest.raises(FeatureFileError, match=message):
        import_file(tmp_path / "toy.npz", tmp_path / "out")


def damaged_archives(data: bytes) -> Iterator[bytes]:
    """Yield an archive with each kind of damage that its readers call by different names."""
    yield data[: len(data) // 2]
    for place in range(0, len(data), 7):
        for bit in (1, 64):
            yield data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def test_a_damaged_archive_is_refused_or_reads_as_before(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(40), tile_index=np.arange(40))
    sound = read_npz(tmp_path / "a.npz")
    for data in damaged_archives((tmp_path / "a.npz").read_bytes()):
        (tmp_path / "b.npz").write_bytes(data)
        found = {}
        with contextlib.suppress(FeatureFileError):
            found = read_npz(tmp_path / "b.npz")
        for name in set(found) & set(sound):
            np.testing.assert_array_equal(found[name], sound[name])


def test_an_array_that_claims_more_than_the_archive_holds_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    with pytest.raises(FeatureFileError, match=r"cannot be read as \.npz"):
        read_npz(tmp_path / "a.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    np.savez(tmp_path / "b.npz", instances=np.array([{}], object))
    (tmp_path / "c.npz").write_bytes(b"PK no zip")
    (tmp_path / "d.txt").write_text("hello")
    for name, message in (
        ("a.npz", "arrays x"),
        ("b.npz", "cannot be read"),
        ("c.npz", "cannot"),
        ("d.txt", "cannot be imported"),
    ):
        with pytest.raises(FeatureFileError, match=message):
            import_file(tmp_path / name, tmp_path / "out")
    with pytest.raises(FeatureFileError, match="no such file"):
        import_file(tmp_path / "e.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.shared
def test_musk1(shared: Path, tmp_path: Path) -> None:
    import_file(shared / "data" / "mil" / "musk1.npz", tmp_path)
    bags = find_bags(tmp_path / "features")
    with np.load(shared / "data" / "mil" / "musk1.npz") as source:
        assert len(bags) == 92
        assert read_common_spec(bags).dim == 166
        np.testing.assert_array_equal(
            np.concatenate([read_bag(p).features for p in bags.values()]), source["instances"]
        )
        test_of_fold_23 = [row[3] for row in rows_of(tmp_path / "splits" / "splits_23.csv")[1:] if row[3]]
        assert test_of_fold_23 == [f"musk1-{i:02d}" for i in np.flatnonzero(~source["cv_train_mask"][2, 3])]

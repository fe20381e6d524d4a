"""All problems at once, before any work."""

import csv
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from eosin.errors import ConfigError, LabelError, OutputError, SeveralErrors
from eosin.mil._tables import LabelTable
from eosin.pipeline import _preflight as preflight
from eosin.pipeline._preflight import Problems, check_folder, check_headers, check_space, open_headers
from eosin.wsi._slide_file import find_slides
from eosin.wsi._synthetic import Cohort, make_cohort


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, Cohort(n_slides=4, size_um=(300.0, 310.0)))
    return folder / "slides"


def raising(error: Exception) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def test_one_problem_is_raised_as_it_is_and_several_together_each_once() -> None:
    problems = Problems()
    problems.require()
    assert problems.attempt(lambda: 3) == 3
    assert problems.attempt(raising(LabelError("one"))) is None
    problems.attempt(raising(LabelError("one")))
    with pytest.raises(LabelError, match=r"^one$"):
        problems.require()
    problems.attempt(raising(ImportError("no timm", name="timm")))
    with pytest.raises(SeveralErrors, match=r"2 problems.*\(1\) one; \(2\).*eosin\[encoders\]") as caught:
        problems.require()
    outer = Problems()
    outer.attempt(raising(caught.value))
    assert len(outer.errors) == 2


def test_a_few_bad_slides_are_a_warning_and_most_of_them_a_problem(slides: Path, tmp_path: Path) -> None:
    for path in slides.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "bad.svs").write_bytes(b"nothing" * 100)
    problems = Problems()
    headers = check_headers(problems, find_slides([tmp_path]))
    assert (set(headers.bad), problems.errors) == ({"bad"}, [])
    assert problems.warnings == ["1 slide cannot be used and will be left out: bad (unsupported)"]
    assert all(0.08 < area < 0.1 for area in headers.areas_mm2.values())
    for number in range(4):
        (tmp_path / f"worse{number}.svs").write_bytes(b"nothing" * 100)
    check_headers(problems, find_slides([tmp_path]))
    with pytest.raises(ConfigError, match="5 of the 9 slides that were opened cannot be used"):
        problems.require()


@pytest.mark.long
def test_headers_of_a_large_cohort_are_opened_apart_and_within_a_time(
    slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_slides([slides])
    assert open_headers(files).in_words() == "4 found, headers opened"
    monkeypatch.setattr(preflight, "FEW_SLIDES", 1)
    assert len(open_headers(files).areas_mm2) == 4
    monkeypatch.setattr(preflight, "FEW_SLIDES", 64)
    monkeypatch.setattr(preflight, "HEADERS_S", -1.0)
    assert "headers of 0 of them" in open_headers(files).in_words()


def test_a_disk_that_is_too_small_and_folders_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2**30))
    assert "1 GiB free" in check_space(tmp_path / "a/b", 1000)
    with pytest.raises(OutputError, match="1 GiB of free space, and tiles and features take about 3 GiB"):
        check_space(tmp_path / "a/b", 3 * 2**30)
    check_folder(tmp_path / "a/b")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; correct --job"):
        check_folder(tmp_path / "file/job")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"):
        check_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_labels_and_files_match_by_extension_and_else_as_a_person_says() -> None:
    table = LabelTable(("a.png", "B7", "c"), ("1", "2", "3"), {})
    files = ("a", "b7", "c")
    with pytest.raises(LabelError, match=r"1 slide is written in another way.*'B7' = 'b7'.*--ids merge.*--ids exact"):
        table.named_as(files)
    assert table.named_as(files, "merge").slide_ids == files
    assert table.named_as(files, "exact").slide_ids == ("a", "B7", "c")
    assert table.named_as(("a", "c")).slide_ids == ("a", "B7", "c")


def test_rows_of_a_refused_table_are_checked_as_far_as_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("slide_id", "patient_id", "label"),
                ("a.svs", "P1", "x"),
                ("b", "p1", "y"),
                ("c", "nan", "x"),
                ("", "9", "y"),
            ]
        )
    rough = preflight.rough_table(path)
    assert rough is not None
    assert (rough.slide_ids, rough.patient_ids) == (("a", "b"), ("P1", "p1"))
    assert preflight.rough_table(tmp_path / "none.csv") is None


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    labels = tmp_path / "t.csv"
    labels.write_text("slide_id,patient_id,label\n" + "".join(f"s{i},p{i},{'xy'[i % 2]}\n" for i in range(8)))
    problems = Problems()
    found = preflight.check_labels(problems, preflight.Question(labels, folds=2), ())
    assert found is not None
    assert (found.n_splits, problems.errors) == (2, [])
    preflight.check_labels(problems, preflight.Question(labels, splits=tmp_path / "none"), ())
    with pytest.raises(LabelError, match="no such file or folder of splits; correct --splits"):
        problems.require()

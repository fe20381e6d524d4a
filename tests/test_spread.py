"""A job whose files lie in 256 folders each is the same job; a file is found in both places."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from eosin._spread import find_file, list_files, place_file, whole_folder
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.features._verify import verify_job
from eosin.wsi import _job
from eosin.wsi._coordinates import write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder

TILING = Tiling(mpp=0.5, patch_size=256)
GRID = TileGrid(np.array([[0, 0]], np.int64), 256, TILING, (2048, 2048), 0.5)
SPEC = FeatureSpec(encoder="toy", dim=4, mpp=0.5, patch_size=256)
NAMES = ["S1", "a b; $(touch x)", "ü\nz"]


def part(slide_id: str) -> str:
    return hashlib.sha256(slide_id.encode()).hexdigest()[:2]


def fill(job: JobFolder, names: list[str]) -> None:
    for name in names:
        write_grid(job.patches(TILING.folder, name), GRID, slide_id=name, mpp_source="user", fingerprint="f")
        write_bag(job.features(TILING.folder, "toy", name), FeatureBag(np.ones((1, 4), np.float32), SPEC, name, GRID))


def test_a_spread_job_has_its_files_in_folders_by_the_hash_of_the_slide(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    job.spread()
    fill(job, NAMES)
    folder = job.features_dir(TILING.folder, "toy")
    for name in NAMES:
        assert (folder / part(name) / f"{name}.h5").is_file()
    assert list(find_bags(folder)) == sorted(NAMES)
    assert job.tilings() == [TILING.folder]
    assert verify_job(job).count("ok") == 2 * len(NAMES)


def test_files_from_before_stay_where_they_are_and_are_found(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    fill(job, ["old"])
    before = job.features(TILING.folder, "toy", "old")
    job.spread()
    fill(job, ["new"])
    assert job.features(TILING.folder, "toy", "old") == before
    folder = job.features_dir(TILING.folder, "toy")
    assert find_bags(folder) == {"new": folder / part("new") / "new.h5", "old": before}
    assert find_file(folder, "old", ".h5") == before
    assert find_file(folder, "new", ".h5") == folder / part("new") / "new.h5"
    assert find_file(folder, "none", ".h5") == folder / "none.h5"
    assert verify_job(job).count("ok") == 4


def test_a_job_is_not_spread_unless_it_is_asked_for(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    fill(job, ["S1"])
    assert job.features(TILING.folder, "toy", "S1") == tmp_path / TILING.folder / "features_toy/S1.h5"


@pytest.mark.parametrize(("slides", "spread"), [(3, False), (4, True)])
def test_a_new_job_of_very_many_slides_is_spread(
    slides: int, spread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_job, "MANY", 3)
    monkeypatch.setattr(_job, "run_stage", lambda *_, **__: _job.Report(()))
    job = JobFolder(tmp_path)
    _job.tile_slides([_job.SlideFile(tmp_path / f"S{number}.tiff", f"S{number}") for number in range(slides)], job)
    assert job.is_spread == spread


def test_a_job_that_has_tiles_is_not_spread_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_job, "MANY", 0)
    monkeypatch.setattr(_job, "run_stage", lambda *_, **__: _job.Report(()))
    fill(JobFolder(tmp_path), ["S1"])
    _job.tile_slides([_job.SlideFile(tmp_path / "S1.tiff", "S1")], JobFolder(tmp_path))
    assert not JobFolder(tmp_path).is_spread


def test_folders_of_two_letters_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    wrong = f"{(int(part('S1'), 16) + 1) % 256:02x}"
    (tmp_path / wrong).mkdir()
    (tmp_path / wrong / "S1.h5").touch()
    (tmp_path / "S2.h5").touch()
    (tmp_path / ".hidden.h5").touch()
    assert list_files(tmp_path, ".h5") == {"S2": tmp_path / "S2.h5"}
    assert whole_folder(tmp_path / "ab" / "S1.h5") == whole_folder(tmp_path / "S1.h5") == tmp_path
    assert place_file(tmp_path, "S2", ".h5", is_spread=True) == tmp_path / "S2.h5"

"""Checking a job: what is sound passes, each kind of damage is named."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from eosin._fingerprints import content_hash
from eosin.errors import ConfigError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag
from eosin.features._verify import verify_job
from eosin.wsi._coordinates import write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._quality import TileQuality

FOLDER = Tiling().folder


def make_grid(n: int) -> TileGrid:
    origins = np.stack([np.arange(n) * 256, np.zeros(n)], axis=1).astype(np.int64)
    return TileGrid(origins, 256, Tiling(), (25600, 512), 0.5)


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    job = JobFolder(tmp_path / "job")
    for slide_id, n in (("a", 5), ("b", 0), ("c.x", 7)):
        add_slide(job, slide_id, n)
    for path in (job.thumbnail("a"), job.contours("a"), job.contours_geojson("a")):
        path.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(job.thumbnail("a"))
    shutil.copy(job.thumbnail("a"), job.contours("a"))
    job.contours_geojson("a").write_text('{"type": "FeatureCollection", "features": []}')
    return job


def add_slide(job: JobFolder, slide_id: str, n: int, *, dim: int = 6) -> None:
    spec = FeatureSpec(encoder="e", dim=dim, mpp=0.5, patch_size=256)
    features = np.random.default_rng(n).normal(size=(n, dim)).astype(np.float32)
    write_grid(job.patches(FOLDER, slide_id), make_grid(n), slide_id=slide_id, mpp_source="user", fingerprint="f")
    write_bag(job.features(FOLDER, "e", slide_id), FeatureBag(features, spec, slide_id, make_grid(n)))


def reasons(job: JobFolder) -> dict[str, str]:
    return {record.slide_id: record.reason for record in verify_job(job).failed}


def test_a_sound_job(job: JobFolder) -> None:
    job.features(FOLDER, "e", ".a.h5.0123.tmp").write_bytes(b"left by a killed run")
    report = verify_job(job)
    assert report.failed == []
    assert len(report.records) == 9
    assert report.count("empty") == 2


def test_a_picture_of_another_slide_is_named(job: JobFolder) -> None:
    stated = " ".join(content_hash(path) for path in (job.thumbnail("a"), job.contours("a")))
    write_grid(
        job.patches(FOLDER, "a"), make_grid(5), slide_id="a", mpp_source="user", fingerprint="f", pictures=stated
    )
    assert verify_job(job).failed == []
    Image.new("RGB", (64, 64)).save(job.contours("a"))
    assert reasons(job) == {"contours/a.jpg": "damaged"}


def test_each_damage_is_named(job: JobFolder) -> None:
    features = job.features(FOLDER, "e", "a")
    data = bytearray(features.read_bytes())
    data[len(data) // 2] ^= 4
    features.write_bytes(data)
    patches = job.patches(FOLDER, "a")
    patches.write_bytes(patches.read_bytes()[:-900])
    job.thumbnail("a").write_bytes(job.thumbnail("a").read_bytes()[:900])
    job.contours_geojson("a").write_text("{")
    found = reasons(job)
    assert found.pop(f"{FOLDER}/features_e/a.h5") in ("damaged", "features")
    assert found.pop(f"{FOLDER}/patches/a_patches.h5") == "damaged"
    assert found == {"thumbnails/a.jpg": "damaged", "contours_geojson/a.geojson": "damaged"}


def test_damaged_quality_scores_are_told(job: JobFolder) -> None:
    scores = TileQuality(*np.zeros((4, 3), np.float32))
    path = job.patches(FOLDER, "q")
    write_grid(path, make_grid(3), slide_id="q", mpp_source="user", fingerprint="f", quality=scores)
    assert reasons(job) == {}
    with h5py.File(path, "r+") as file:
        file["quality"][1, 2] = 0.5
    assert reasons(job) == {f"{FOLDER}/patches/q_patches.h5": "damaged"}


def test_files_that_do_not_belong_together(job: JobFolder) -> None:
    add_slide(job, "d", 3, dim=9)
    shutil.copy(job.features(FOLDER, "e", "a"), job.features(FOLDER, "e", "e"))
    shutil.copy(job.patches(FOLDER, "a"), job.patches(FOLDER, "f"))
    write_grid(job.patches(FOLDER, "c.x"), make_grid(4), slide_id="c.x", mpp_source="user", fingerprint="f")
    assert reasons(job) == {
        f"{FOLDER}/features_e/d.h5": "mismatch",
        f"{FOLDER}/features_e/e.h5": "mismatch",
        f"{FOLDER}/patches/f_patches.h5": "mismatch",
        f"{FOLDER}/features_e/c.x.h5": "stale",
    }
    assert verify_job(job).exit_code == 1


def test_no_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a job folder"):
        verify_job(JobFolder(tmp_path / "none"))

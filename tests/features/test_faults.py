"""Killed at every line, killed at any time, out of disk: a feature file is whole or not there."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import tifffile

import eosin
from eosin.errors import OutputError
from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.extract import extract
from eosin.features.store import verify_bag, write_bag
from eosin.files import file_fingerprint
from eosin.wsi.coordinates import write_grid
from eosin.wsi.grid import TileGrid, Tiling
from eosin.wsi.job import JobFolder
from eosin.wsi.slide import SlideFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")

SOURCES = str(Path(eosin.__file__).parent)
KILLED = -signal.SIGKILL


def make_bag(n: int = 600, dim: int = 100) -> FeatureBag:
    origins = np.stack([np.arange(n) * 256, np.zeros(n)], axis=1).astype(np.int64)
    grid = TileGrid(origins, 256, Tiling(), (256 * n + 256, 512), 0.5)
    features = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float16)
    return FeatureBag(features, FeatureSpec(encoder="e", dim=dim, mpp=0.5, patch_size=256), "s", grid)


def in_a_child(action: Callable[[], None], *, kill_after_s: float | None = None) -> int:
    """Run `action` in a forked process; return its exit status, negative for a signal, 3 for a full disk."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            action()
            status = 0
        except OutputError:
            status = 3
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def traced(action: Callable[[], None], on_line: Callable[[str], None]) -> None:
    """Run `action` and call `on_line` with the file before each line of our package that it executes."""

    def trace(frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        if event == "line":
            on_line(Path(frame.f_code.co_filename).name)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)


def killing_at(line: int, action: Callable[[], None]) -> Callable[[], None]:
    """Return `action` with the process killed before the given one of the lines that it executes."""
    left = line

    def on_line(_: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: traced(action, on_line)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_line(tmp_path: Path, every: int) -> None:
    path, bag = tmp_path / "s.h5", make_bag(60, 20)
    write_bag(path, bag)
    whole = path.read_bytes()
    lines: list[str] = []
    traced(lambda: write_bag(path, bag), lines.append)
    whole_after_kill = 0
    for number, file in enumerate(lines):
        if file != "files.py" and number % every:
            continue
        path.unlink()
        assert in_a_child(killing_at(number, lambda: write_bag(path, bag))) == KILLED
        if path.exists():
            assert path.read_bytes() == whole
            whole_after_kill += 1
        for orphan in tmp_path.glob(".s.h5.*"):
            orphan.unlink()  # swept by age otherwise; looking at them would be more lines
        write_bag(path, bag)
        assert path.read_bytes() == whole
    assert 0 < whole_after_kill < lines.count("files.py"), "some kills must fall between the rename and the end"


def test_killed_at_random_times(tmp_path: Path) -> None:
    path, bag = tmp_path / "s.h5", make_bag(8_000, 200)
    started = time.monotonic()
    write_bag(path, bag)
    duration = time.monotonic() - started
    verify_bag(path)
    draw = random.Random(0)
    absent = 0
    for _ in range(60):
        path.unlink(missing_ok=True)
        in_a_child(lambda: write_bag(path, bag), kill_after_s=draw.uniform(0, 1.2 * duration))
        if path.exists():
            verify_bag(path)
        else:
            absent += 1
    assert absent > 0


def test_an_older_file_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_bag(path, make_bag(50))
    old = path.read_bytes()
    assert in_a_child(killing_at(120, lambda: write_bag(path, make_bag(70)))) == KILLED
    assert path.read_bytes() == old


@pytest.mark.parametrize(("n", "step"), [(20, 256), pytest.param(150, 16, marks=pytest.mark.slow)])
def test_disk_full_at_every_place(tmp_path: Path, n: int, step: int) -> None:
    path, bag = tmp_path / "s.h5", make_bag()
    write_bag(path, bag)
    size = path.stat().st_size
    path.unlink()

    def write_with(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write_bag(path, bag)

    limits = [*range(0, size, size // n), *range(size - 8192, size, step), size - 1]
    for limit in limits:
        assert in_a_child(lambda limit=limit: write_with(limit)) == 3, limit
        assert list(tmp_path.iterdir()) == [], limit
    assert in_a_child(lambda: write_with(size)) == 0
    verify_bag(path)


SCRIPT = """
import sys
from pathlib import Path
from eosin.features.extract import extract
from eosin.wsi.job import JobFolder
from eosin.wsi.slide import SlideFile
root = Path(sys.argv[1])
slides = [SlideFile(path, path.stem) for path in sorted(root.glob("*.tiff"))]
extract(slides, JobFolder(root), "he_texture", batch_size=4, workers=int(sys.argv[2]))
"""
TILING = Tiling(mpp=0.5, patch_size=64)


def make_job(root: Path, n_slides: int) -> list[SlideFile]:
    root.mkdir()
    slides = []
    for number in range(n_slides):
        path = root / f"s{number}.tiff"
        pixels = np.random.default_rng(number).integers(0, 255, (512, 512, 3)).astype(np.uint8)
        tifffile.imwrite(
            path, pixels, tile=(64, 64), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
        )
        corners = np.stack(np.meshgrid(np.arange(8) * 64, np.arange(8) * 64), axis=-1).reshape(-1, 2)
        grid = TileGrid(corners.astype(np.int64), 64, TILING, (512, 512), 0.5)
        patches = JobFolder(root).patches(TILING.folder, path.stem)
        write_grid(patches, grid, slide_id=path.stem, mpp_source="user", fingerprint=file_fingerprint(path))
        slides.append(SlideFile(path, path.stem))
    return slides


def feature_files(root: Path) -> dict[str, bytes]:
    folder = JobFolder(root).features_dir(TILING.folder, "he_texture")
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.h5")} if folder.is_dir() else {}


def test_a_killed_extraction_resumes_to_the_same_files(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, workers=1, after_files=2)


@pytest.mark.slow
@pytest.mark.parametrize("after_files", range(12))
def test_a_killed_extraction_resumes_wherever_it_stopped(tmp_path: Path, after_files: int) -> None:
    kill_and_compare(tmp_path, workers=after_files % 3, after_files=after_files)


def kill_and_compare(tmp_path: Path, *, workers: int, after_files: int) -> None:
    unbroken = make_job(tmp_path / "unbroken", 12)
    extract(unbroken, JobFolder(tmp_path / "unbroken"), "he_texture", batch_size=4, workers=0)
    slides = make_job(tmp_path / "killed", 12)
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "killed"), str(workers)])
    while run.poll() is None and len(feature_files(tmp_path / "killed")) < after_files:
        time.sleep(0.005)
    run.kill()
    assert run.wait() == KILLED
    before = feature_files(tmp_path / "killed")
    assert len(before) < 12
    report = extract(slides, JobFolder(tmp_path / "killed"), "he_texture", batch_size=4, workers=0)
    assert report.count("skipped") == len(before)
    assert report.count("ok") == 12 - len(before)
    assert feature_files(tmp_path / "killed") == feature_files(tmp_path / "unbroken")

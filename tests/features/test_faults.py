"""Killed at every line, killed at any time, out of disk: a feature file is whole or not there."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
import pytest
import tifffile
import torch
from scaling import scaled

import eosin
from eosin._files import file_fingerprint
from eosin.errors import OutputError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._extract import extract
from eosin.features._store import verify_bag, write_bag
from eosin.features.interop import ImportOptions, export_bag, import_file
from eosin.wsi._coordinates import write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

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
@pytest.mark.long
def test_killed_at_every_line(tmp_path: Path, every: int) -> None:
    path, bag = tmp_path / "s.h5", make_bag(60, 20)
    write_bag(path, bag)
    whole = path.read_bytes()
    lines: list[str] = []
    traced(lambda: write_bag(path, bag), lines.append)
    whole_after_kill = 0
    for number, file in enumerate(lines):
        if file != "_files.py" and number % every:
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
    assert 0 < whole_after_kill < lines.count("_files.py"), "some kills must fall between the rename and the end"


def plain_write(path: Path) -> Callable[[], None]:
    bag = make_bag(8_000, 200)
    return lambda: write_bag(path / "s.h5", bag)


def export_as(layout: Literal["trident", "clam"]) -> Callable[[Path], Callable[[], None]]:
    def prepare(path: Path) -> Callable[[], None]:
        write_bag(path.parent / "ours" / "s.h5", make_bag(8_000, 200))
        return lambda: void(export_bag(path.parent / "ours" / "s.h5", path, layout))

    return prepare


def import_trident(path: Path) -> Callable[[], None]:
    write_bag(path.parent / "ours" / "s.h5", make_bag(8_000, 200))
    theirs = export_bag(path.parent / "ours" / "s.h5", path.parent / "theirs", "trident")[1]
    return lambda: void(import_file(theirs, path, ImportOptions(slide_mpp=0.5)))


def convert_checkpoint_of_abmil(path: Path) -> Callable[[], None]:
    from eosin.mil._convert import convert_checkpoint

    names = {"feature.0": (256, 900), "attention_a.0": (256, 256), "attention_b.0": (256, 256),
             "attention_c": (1, 256), "classifier.0": (2, 256)}  # fmt: skip
    old = {f"{name}.weight": torch.ones(shape) for name, shape in names.items()}
    old |= {f"{name}.bias": torch.ones(shape[0]) for name, shape in names.items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(old, path.parent / "their.pt")
    spec = FeatureSpec(encoder="e", dim=900)
    said = {"classes": ["a", "b"], "outputs": "softmax", "options": {"embed_activation": "relu"}}
    return lambda: void(convert_checkpoint(path.parent / "their.pt", path, features=spec, **said))


def void(_: object) -> None:
    """Drop a result."""


WRITERS = {
    "features": plain_write,
    "trident": export_as("trident"),
    "clam": export_as("clam"),
    "import": import_trident,
    "convert": convert_checkpoint_of_abmil,
}


def finals(folder: Path) -> dict[str, bytes]:
    """Return what lies under final names."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file()] if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("times", [6, pytest.param(scaled(60, 7), marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_random_times(tmp_path: Path, writer: str, times: int) -> None:
    """Whatever lies under a final name is byte for byte what an unbroken run writes, and a second run completes it."""
    folder = tmp_path / "work" / "out"
    action = WRITERS[writer](folder)
    started = time.monotonic()
    action()
    duration = time.monotonic() - started
    whole = without_dates(finals(folder))
    draw, incomplete = random.Random(0), 0
    for _ in range(times):
        shutil.rmtree(folder)
        in_a_child(action, kill_after_s=draw.uniform(0, 1.2 * duration))
        found = without_dates(finals(folder))
        assert found.items() <= whole.items()
        incomplete += found != whole
        folder.mkdir(parents=True, exist_ok=True)
    action()
    assert without_dates(finals(folder)) == whole
    assert incomplete > 0


def without_dates(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return contents with the digits of times of HDF5 files of other tools left out: their names alone count."""
    return {name: b"" if name.startswith(("20x", "h5_files")) else data for name, data in files.items()}


def test_an_older_file_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_bag(path, make_bag(50))
    old = path.read_bytes()
    assert in_a_child(killing_at(120, lambda: write_bag(path, make_bag(70)))) == KILLED
    assert path.read_bytes() == old


@pytest.mark.parametrize(("n", "step"), [(20, 256), pytest.param(scaled(150, 21), 16, marks=pytest.mark.slow)])
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MB, or skip where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here ({error})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """Every byte of room from none to enough for the file: it is there and whole, or the run stops and nothing is."""
    bag, path, filler = make_bag(3_000, 60), small_disk / "s.h5", small_disk / "filler"
    write_bag(path, bag)
    whole = path.read_bytes()
    path.unlink()
    free = os.statvfs(small_disk)
    room = free.f_bavail * free.f_frsize
    page = free.f_frsize
    outcomes = set()
    for left in [
        *range(0, len(whole) + 8 * page, 8 * page),
        *range(len(whole) - 2 * page, len(whole) + 4 * page, page),
    ]:
        filler.write_bytes(bytes(max(0, room - left)))
        status = in_a_child(lambda: write_bag(path, bag))
        outcomes.add(status)
        assert status in (0, 3)
        assert finals(small_disk).keys() - {"filler"} == ({"s.h5"} if status == 0 else set())
        if status == 0:
            assert path.read_bytes() == whole
            path.unlink()
        assert not list(small_disk.glob(".s.h5.*"))
    assert outcomes == {0, 3}


@pytest.mark.long
def test_a_full_disk_ends_the_command_with_3(small_disk: Path, tmp_path: Path) -> None:
    slides = make_job(tmp_path / "slides", 2)
    shutil.copytree(tmp_path / "slides", small_disk / "job", ignore=shutil.ignore_patterns("*.tiff"))
    stat = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - 3 * stat.f_frsize)))
    command = [
        sys.executable,
        "-c",
        "from eosin.cli.app import main; main()",
        "extract",
        *(str(slide.path) for slide in slides),
    ]
    command += ["--job", str(small_disk / "job"), "--encoder", "he_texture", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert feature_files(small_disk / "job") == {}


SCRIPT = """
import sys
from pathlib import Path
from eosin.features._extract import extract
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile
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


@pytest.mark.long
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

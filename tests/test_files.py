"""A file is whole or not there: full disks, power loss, leftovers; and nobody writes past `eosin._files`."""

import ast
import errno
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scenes import lattice, marked_map

import eosin
from eosin._files import clear_leftovers, locked, write_bytes, write_file, write_json, write_text
from eosin.errors import OutputError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import write_bag
from eosin.features.interop import export_bag
from eosin.heatmaps.export._geojson import write_geojson
from eosin.heatmaps.export._table import write_frame
from eosin.heatmaps.export._tiff import write_tiff
from eosin.mil._checkpoint import ModelCard, save_model
from eosin.mil._recipe import Recipe
from eosin.mil._resume import State, write_state
from eosin.mil.methods.abmil import Abmil
from eosin.mil.tasks._classification import Classification
from eosin.wsi._coordinates import write_grid
from eosin.wsi._picture import write_jpeg, write_picture
from eosin.wsi._synthetic import SlidePlan, save_pyramid

STEP_BYTES = 4096


def test_write_file_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    write_text(target, "one")

    def fails_late(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuses(path: Path) -> None:
        raise RuntimeError(f"{path.suffix} does not verify")

    with pytest.raises(OutputError, match="No space left"):
        write_file(target, fails_late)
    with pytest.raises(OutputError, match="does not verify"):
        write_file(target, lambda file: file.write(b"two") and None, verify=refuses)
    assert target.read_text() == "one"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        write_json(tmp_path / "file" / "below" / "x.json", {})


def test_leftovers_of_dead_processes_and_old_ones_are_swept_and_those_of_the_living_kept(tmp_path: Path) -> None:
    write_script = "from eosin._files import write_file; import os, sys; from pathlib import Path\n"
    write_script += "write_file(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), 9))"
    subprocess.run([sys.executable, "-c", write_script, tmp_path / "x.json"], check=False)
    (dead,) = tmp_path.iterdir()
    old, fresh = tmp_path / ".x.json.aa.tmp.json", tmp_path / ".x.json.bb.tmp.json"
    living = dead.with_name(dead.name.replace(f"-{dead.name.split('-')[1]}-", f"-{os.getppid()}-"))
    for path in (old, fresh, living):
        path.write_text("")
    os.utime(old, (0, 0))
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert set(tmp_path.iterdir()) == {tmp_path / "x.json", fresh, living}


def test_what_dead_runs_left_anywhere_in_a_job_goes_and_what_lives_stays(tmp_path: Path) -> None:
    script = (
        "from eosin._files import locked, write_file; import os, sys; from pathlib import Path; p = Path(sys.argv[1])\n"
    )
    script += "with locked(p / 'a' / '.s.h5.lock'): write_file(p / 'a/b/x.json', lambda file: os.kill(os.getpid(), 9))"
    subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    kept = [tmp_path / "a" / name for name in (".notes.lock", ".x.tmp", ".s.h5.lock.txt", "x.json")]
    for path in kept:
        path.write_text("")
    with locked(tmp_path / "a" / ".held.h5.lock"):
        clear_leftovers(tmp_path)
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*kept, tmp_path / "a" / ".held.h5.lock"}


def test_a_lock_is_held_by_one_at_a_time_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = "import sys\nfrom pathlib import Path\nfrom eosin._files import locked\np = Path(sys.argv[1])\n"
    script += (
        "for _ in range(200):\n  with locked(p / '.x.lock'): (p / 'n').write_text(str(int((p / 'n').read_text()) + 1))"
    )
    (tmp_path / "n").write_text("0")
    counting = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(3)]
    assert [one.wait(timeout=120) for one in counting] == [0, 0, 0]
    assert (tmp_path / "n").read_text() == "600"
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


class Disk:
    """What is on the disk after a power loss: of files what was synced, of folders the names when they were."""

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}
        self.names: dict[Path, dict[str, int]] = {}

    def fsync(self, descriptor: int) -> None:
        facts = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if stat.S_ISDIR(facts.st_mode):
            self.names[path] = {file.name: file.stat().st_ino for file in path.iterdir()}
        else:
            self.content[facts.st_ino] = path.read_bytes()

    def read(self, path: Path) -> bytes | None:
        inode = self.names.get(path.parent, {}).get(path.name)
        return None if inode is None else self.content.get(inode, b"")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_power_lost_after_a_file_was_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    for data in (b"first", bytes(3 * 2**20), b"third"):
        write_bytes(tmp_path / "x.bin", data)
        assert disk.read(tmp_path / "x.bin") == data


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_power_lost_at_any_moment_leaves_the_old_file_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, path, moments = Disk(), tmp_path / "x.bin", []

    def renamed(self: Path, target: Path) -> Path:
        self.rename(target)
        disk.names[target.parent] = {file.name: file.stat().st_ino for file in target.parent.iterdir()}  # at the worst
        moments.append(disk.read(target))
        return target

    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    for data in (b"first", b"second"):
        write_bytes(path, data)
    assert moments == [b"first", b"second"]


GRID = lattice(size_px0=(1500, 1500), slide_mpp=0.5, patch_size=64)
BAG = FeatureBag(
    np.random.default_rng(0).random((GRID.n_tiles, 8), np.float32),
    FeatureSpec(encoder="toy", dim=8, mpp=0.5, patch_size=64),
    "s",
    GRID,
)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8))
CARD = ModelCard(recipe=Recipe(), task=Classification(classes=("a", "b")).model_dump(mode="json"), features=BAG.spec)


def export_to(layout: str) -> Callable[[Path], object]:
    def write(out: Path) -> None:
        source = out.parent / "source" / "s.h5"
        if not source.exists():
            with unlimited():
                write_bag(source, BAG)
        export_bag(source, out, layout)

    return write


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda out: write_json(out / "x.json", list(range(9000))),
    "jpeg": lambda out: write_jpeg(out / "x.jpg", NOISE),
    "png": lambda out: write_picture(out / "x.png", NOISE),
    "grid": lambda out: write_grid(out / "x.h5", GRID, slide_id="s", mpp_source="user", fingerprint="f"),
    "bag": lambda out: write_bag(out / "x.h5", BAG),
    "trident": export_to("trident"),
    "clam": export_to("clam"),
    "tiff": lambda out: write_tiff(out / "x.tiff", marked_map(GRID, 5)),
    "geojson": lambda out: write_geojson(out / "x.geojson", [marked_map(GRID, 5)], slide_id="s"),
    "csv": lambda out: write_frame(out / "x.csv", pd.DataFrame({"a": np.arange(9000)})),
    "parquet": lambda out: write_frame(out / "x.parquet", pd.DataFrame({"a": np.random.default_rng(0).random(4000)})),
    "model": lambda out: save_model(out, Abmil(8, 2, embed_dims=[64], hidden=64), CARD),
    "state": lambda out: write_state(out, State({"a": torch.arange(5000)}, {"fingerprint": "f"})),
    "pyramid": lambda out: write_file(
        out / "x.tiff", lambda file: save_pyramid(np.asarray(NOISE), SlidePlan("s"), file)
    ),
}


@contextmanager
def limited(most_bytes: int) -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def unlimited() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_on_a_full_disk_leaves_whole_files_or_none(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    WRITERS[name](tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    largest, refused = max(map(len, whole.values())), 0
    for number, most_bytes in enumerate({*range(0, largest, max(STEP_BYTES, largest // 8)), largest - 1}):
        out = tmp_path / str(number)
        torch.manual_seed(0)
        with limited(most_bytes), pytest.raises(OutputError):
            WRITERS[name](out)
        refused += 1
        assert contents(out).items() <= whole.items(), f"with at most {most_bytes} bytes"
        torch.manual_seed(0)
        WRITERS[name](out)
        assert contents(out) == whole
    assert refused >= 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "open", "replace"])
def test_an_error_of_the_disk_at_any_call_stops_the_run(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    write_text(tmp_path / "x.txt", "old")
    monkeypatch.setattr(*{"fsync": (os, "fsync"), "open": (Path, "open"), "replace": (Path, "replace")}[call], fails)
    with pytest.raises(OutputError):
        write_text(tmp_path / "x.txt", "new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"x.txt": b"old"}


def test_a_disk_that_gives_other_bytes_back_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"rotten")
    with pytest.raises(OutputError, match="check the disk"):
        write_bytes(tmp_path / "x.bin", b"sound")
    assert list(tmp_path.iterdir()) == []


MAY_WRITE = {
    "_files.py",
    "_claims.py",  # lock files
    "cli/doctor.py",  # a probe of the disk
    "kernels/_rates.py",  # imports nothing of eosin; what it keeps is measured again when it is lost
}


def test_nobody_else_opens_a_file_for_writing_or_gives_a_library_a_path_to_write_to() -> None:
    root = Path(eosin.__file__).parent
    found = {
        f"{path.relative_to(root).as_posix()}:{call.lineno}"
        for path in root.rglob("*.py")
        if path.relative_to(root).as_posix() not in MAY_WRITE
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and writes(call)
    }
    assert found == set()


def writes(call: ast.Call) -> bool:
    """Return whether a call opens a file for writing or hands a library anything but a buffer or an open file."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    values = [
        arg.value for arg in (*call.args, *(word.value for word in call.keywords)) if isinstance(arg, ast.Constant)
    ]
    first = ast.unparse(call.args[0]) if call.args else ""
    if name == "open":
        return any(
            isinstance(value, str) and set(value) <= set("wxab+t") and set(value) & set("wxa+") for value in values
        )
    if name in ("write_text", "write_bytes"):
        return isinstance(call.func, ast.Attribute)
    if name == "File":
        return "w" in values and first != "image"
    if name in ("to_csv", "to_parquet"):
        return bool(call.args)
    if name in ("savefig", "TiffWriter") or (name == "save" and isinstance(call.func, ast.Attribute) and call.args):
        return first not in ("buffer", "file", "torch.from_numpy(rows)", "folder")
    return False


@pytest.mark.parametrize(
    "source",
    ['p.open("w")', 'open(p, "ab")', "p.write_text(t)", 'h5py.File(path, "w")', "figure.savefig(path)", "i.save(path)"],
)
def test_the_check_sees_a_writer(source: str) -> None:
    assert writes(ast.parse(source, mode="eval").body)
    assert not writes(ast.parse('p.open("rb")', mode="eval").body)

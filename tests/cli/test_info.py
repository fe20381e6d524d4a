"""Facts that `eosin info` prints, and those it never prints."""

import shutil
from pathlib import Path

import pytest
import tifffile

from eosin.wsi._synthetic import make_slide

from .conftest import Run


def test_a_slide(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.b.tiff"
    make_slide(path, size_px0=(512, 256), mpp=0.5)
    lines = run("info", path).stdout.splitlines()
    assert {"kind: slide", "slide_id: a.b", "width_px0: 512", "height_px0: 256", "mpp: 0.5"} <= set(lines)


def test_the_users_mpp_is_shown_as_such(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    make_slide(path, size_px0=(512, 256), mpp=0.5)
    lines = run("info", path, "--slide-mpp", "0.25").stdout.splitlines()
    assert {"mpp: 0.25", "mpp_source: user"} <= set(lines)


@pytest.mark.shared
def test_no_raw_property_of_a_slide_is_shown(run: Run, shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.svs"  # the original's name is one of its properties
    shutil.copy(shared / "data/slides/CMU-1-Small-Region.svs", path)
    with tifffile.TiffFile(path) as tiff:
        properties = [part.partition(" = ") for part in tiff.pages.first.description.split("|")]
    private = {name: value for name, _, value in properties if len(value) > 2 and name not in ("AppMag", "MPP")}
    assert {"ScanScope ID", "Date", "Filename"} <= set(private)
    said = run("info", path).stdout
    assert [name for name, value in private.items() if value in said] == []


def test_a_missing_file_is_refused(refused: Run, tmp_path: Path) -> None:
    assert "no such file" in refused("info", tmp_path / "missing.svs")


def test_a_file_that_is_no_slide_is_refused(refused: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.svs"
    path.write_bytes(b"no slide" * 100)
    assert "eosin cannot read this format" in refused("info", path)

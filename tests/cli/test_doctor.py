"""What `eosin doctor` finds right and wrong."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eosin.wsi._tiled import TiledSlide

from .conftest import Run


def test_a_fit_machine_ends_with_0(run: Run, tmp_path: Path) -> None:
    result = run("doctor", tmp_path)
    assert result.exit_code == 0, result.output
    assert "pixels read back unchanged" in result.stdout
    assert f"write to {tmp_path}" in result.stdout
    assert "broken" not in result.stdout


def test_wrong_pixels_are_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TiledSlide.read

    def shifted(self: TiledSlide, origin: tuple[int, int], size: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        return np.roll(read(self, origin, size, mpp), 1, axis=1)

    monkeypatch.setattr(TiledSlide, "read", shifted)
    result = run("doctor")
    assert result.exit_code == 3
    assert "wrong pixels" in result.stdout
    said = "error: this machine: cannot run eosin: slide reader broken; the table above gives the cause"
    assert result.stderr.strip() == said


def test_a_folder_that_cannot_be_written_to_is_named(run: Run, tmp_path: Path) -> None:
    result = run("doctor", tmp_path / "missing")
    assert result.exit_code == 3
    assert "write to missing" in result.stderr


def test_the_claims_of_a_job_are_tried(run: Run, tmp_path: Path) -> None:
    result = run("doctor", "--job", tmp_path)
    assert result.exit_code == 0, result.output
    assert "two processes" in result.stdout

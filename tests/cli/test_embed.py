"""`eosin embed` on the cohort, and `eosin encoders` with slide encoders."""

from pathlib import Path

from eosin.features._slide_encoders import SLIDE_ENCODERS
from eosin.features._store import find_bags

from .conftest import Run


def test_vectors_of_slides_and_patients(features: Path, cohort: Path, run: Run, tmp_path: Path) -> None:
    result = run("embed", "--features", features, "--out", tmp_path / "mean")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'mean'}\n")
    assert len(find_bags(tmp_path / "mean")) == 12
    table = cohort / "labels.csv"
    result = run("embed", "--features", features, "--per", "patient", "--patients", table, "--out", tmp_path / "p")
    assert result.exit_code == 0
    assert len(find_bags(tmp_path / "p")) == 6


def test_refusals_are_one_line(features: Path, refused: Run, tmp_path: Path) -> None:
    def line(*arguments: object) -> str:
        return refused("embed", "--features", features, "--out", tmp_path / "out", *arguments)

    assert "--allow-remote-code" in line("--encoder", "titan")
    assert "encoder he_texture, not conch_v1" in line("--encoder", "madeleine?random")
    assert "did you mean" in line("--encoder", "maen") or "unknown" in line("--encoder", "maen")
    assert "--patients" in line("--per", "patient")
    assert "github.com/hms-dbmi/CHIEF" in line("--encoder", "chief")
    assert not (tmp_path / "out").exists()


def test_slide_encoders_are_listed_with_licence_and_consent(run: Run) -> None:
    text = run("encoders").stdout
    assert all(name in text for name in SLIDE_ENCODERS)
    one = run("encoders", "titan").stdout
    assert "licence: CC-BY-NC-ND-4.0" in one
    assert "gated: True" in one

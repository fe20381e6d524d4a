"""What `eosin encoders` lists and shows."""

from eosin.features.encoders import ENCODERS

from .conftest import Run


def test_every_encoder_is_listed_with_its_licence(run: Run) -> None:
    result = run("encoders")
    assert result.exit_code == 0
    for name, spec in ENCODERS.items():
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert f" {spec.dim} " in row
    assert " on request " in result.stdout


def test_one_encoder_is_shown_whole(run: Run) -> None:
    lines = run("encoders", "uni").stdout.splitlines()
    assert {"name: uni_v1", "dim: 1024", "gated: True", "source: MahmoodLab/UNI"} <= set(lines)


def test_an_unknown_encoder_suggests_the_nearest(refused: Run) -> None:
    assert "did you mean he_texture" in refused("encoders", "he_textur")

"""What `eosin encoders` lists and shows."""

from eosin.features._encoders import ENCODERS

from .conftest import Run


def test_every_encoder_is_listed_with_its_licence(run: Run) -> None:
    result = run("encoders")
    assert result.exit_code == 0
    for name, spec in ENCODERS.items():
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert f" {spec.dim} " in row
        assert f" {spec.statistics} " in row
        assert (" on request " in row) == spec.gated
    giga = next(line for line in result.stdout.splitlines() if line.startswith("│ gigapath "))
    assert "224 of 256" in giga


def test_one_encoder_is_shown_whole(run: Run) -> None:
    lines = run("encoders", "uni").stdout.splitlines()
    assert {"name: uni_v1", "dim: 1024", "gated: True", "source: MahmoodLab/UNI"} <= set(lines)
    assert {"pooling: cls", "interpolation: bilinear", "mean: (0.485, 0.456, 0.406)", "mpp: 0.5"} <= set(lines)
    assert "revision: 77ffbca1ee1cdcee6e87f6deebd2db8a5888c721" in lines
    assert {"pooling: cls", "interpolation: bilinear", "mean: (0.485, 0.456, 0.406)", "mpp: 0.5"} <= set(lines)
    assert "revision: 77ffbca1ee1cdcee6e87f6deebd2db8a5888c721" in lines


def test_an_unknown_encoder_suggests_the_nearest(refused: Run) -> None:
    assert "did you mean he_texture" in refused("encoders", "he_textur")

"""Encoders from packages that only a user can install, here with stand-ins of the same interface."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eosin.errors import CheckpointError, ConfigError
from eosin.features._encoders import ENCODERS
from eosin.features._inference import load_encoder

TILES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


class Tower(nn.Module):
    """A network that sees the mean colour."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, dim)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.linear(pictures.mean((2, 3)))


class CoCa(nn.Module):
    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.visual, self.text = Tower(width), nn.Linear(2, 2)

    def encode_image(self, pictures: Tensor, *, proj_contrast: bool, normalize: bool) -> Tensor:
        assert not normalize
        return self.visual(pictures) * (2 if proj_contrast else 1)


@pytest.fixture
def conch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_configs").mkdir()
    (tmp_path / "model_configs" / "conch_ViT-B-16.json").write_text(json.dumps({"width": 512, "custom_text": True}))
    module = ModuleType("conch.open_clip_custom")
    module.__file__, module.CoCa = str(tmp_path / "__init__.py"), CoCa  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conch", ModuleType("conch"))
    monkeypatch.setitem(sys.modules, "conch.open_clip_custom", module)


def pictures_of(name: str) -> Tensor:
    transform = ENCODERS[name].transform
    assert transform is not None
    return transform(torch.from_numpy(TILES))


@pytest.mark.usefixtures("conch")
def test_conch_with_and_without_projection(tmp_path: Path) -> None:
    coca = CoCa(width=512)
    torch.save(coca.state_dict(), tmp_path / "w.bin")
    expected = coca.visual(pictures_of("conch_v1")).detach().numpy()
    plain = load_encoder("conch_v1", weights=tmp_path / "w.bin")
    np.testing.assert_allclose(plain.encode(TILES), expected, rtol=1e-5, atol=1e-6)
    contrast = load_encoder("conch_v1_contrast", weights=tmp_path / "w.bin")
    np.testing.assert_allclose(contrast.encode(TILES), 2 * expected, rtol=1e-5, atol=1e-6)
    torch.save({**coca.state_dict(), "text.weight": torch.ones(2, 2)}, tmp_path / "w.bin")
    again = load_encoder("conch_v1", weights=tmp_path / "w.bin")
    assert again.weights_hash == plain.weights_hash, "the text side is not part of what is hashed"
    torch.save({"text.weight": torch.ones(2, 2)}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"linear\.weight is missing"):
        load_encoder("conch_v1", weights=tmp_path / "w.bin")


def test_conch_15_with_positions_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CONCHVisionTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Module()
            self.trunk.pos_embed = nn.Parameter(torch.zeros(1, 5, 2))
            self.ln = Tower(768)

        def forward(self, pictures: Tensor) -> Tensor:
            return self.ln(pictures) + self.trunk.pos_embed.sum()

    def resize_pos_embed(trunk: nn.Module, positions: Tensor, *, verbose: bool) -> Tensor:
        assert not verbose
        return positions[:, : trunk.pos_embed.shape[1]]

    name = "trident.patch_encoder_models.model_zoo.conchv1_5.conchv1_5"
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    module = SimpleNamespace(CONCHVisionTower=CONCHVisionTower, resize_pos_embed=resize_pos_embed)
    monkeypatch.setitem(sys.modules, name, module)
    tower = CONCHVisionTower()
    torch.save(tower.state_dict() | {"trunk.pos_embed": torch.zeros(1, 9, 2)}, tmp_path / "w.bin")
    rows = load_encoder("conch_v15", weights=tmp_path / "w.bin").encode(TILES)
    np.testing.assert_allclose(rows, tower(pictures_of("conch_v15")).detach().numpy(), rtol=1e-5, atol=1e-6)


class Musk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beit3 = Tower(1024)

    def forward(
        self, *, image: Tensor, with_head: bool, out_norm: bool, ms_aug: bool, return_global: bool
    ) -> tuple[Tensor, None]:
        assert (with_head, out_norm, return_global) == (False, False, True)
        rows = self.beit3(image)
        return (torch.cat([rows, rows], 1) if ms_aug else rows), None


@pytest.mark.parametrize("name", ["musk", "musk_ms", "musk_imagenet"])
def test_musk_at_one_scale_and_two(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "musk", ModuleType("musk"))
    monkeypatch.setitem(sys.modules, "musk.modeling", SimpleNamespace(musk_large_patch16_384=Musk))
    musk = Musk()
    torch.save({"model": musk.state_dict()}, tmp_path / "w.bin")
    rows = load_encoder(name, weights=tmp_path / "w.bin").encode(TILES)
    once = musk.beit3(pictures_of(name)).detach().numpy()
    expected = np.concatenate([once, once], 1) if name == "musk_ms" else once
    assert rows.shape == (3, ENCODERS[name].dim)
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("conch_v1", "https://github.com/mahmoodlab/CONCH"),
        ("conch_v15", "https://github.com/mahmoodlab/TRIDENT"),
        ("musk", "https://github.com/lilab-stanford/MUSK"),
    ],
)
def test_a_package_that_is_not_there_is_named(
    name: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("conch", "trident", "musk"):
        monkeypatch.setitem(sys.modules, module, None)
    torch.save({"a": torch.ones(1)}, tmp_path / "w.bin")
    with pytest.raises(ConfigError, match=f"encoder {name} needs a package that is not installed.*{address}") as caught:
        load_encoder(name, weights=tmp_path / "w.bin")
    assert "eosin import" in caught.value.message

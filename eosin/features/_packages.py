"""Encoders whose architecture is in a package that only the user can install: CONCH, CONCH v1.5, MUSK.

The package builds the network; weights are read here, as for every other encoder: without running anything in them.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from eosin.errors import ConfigError
from eosin.features._networks import EncoderNetwork

CONCH = ("conch.open_clip_custom", "conch_v1", "https://github.com/mahmoodlab/CONCH")
CONCH_TOWER = (
    "trident.patch_encoder_models.model_zoo.conchv1_5.conchv1_5", "conch_v15", "https://github.com/mahmoodlab/TRIDENT",
)  # fmt: skip
MUSK = ("musk.modeling", "musk", "https://github.com/lilab-stanford/MUSK")


def require_module(module: str, encoder: str, package: str) -> ModuleType:
    """Import a module of a package that only the user can install.

    Raises
    ------
    ConfigError
        When it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"encoder {encoder} needs a package that is not installed ({error}); "
            f"`pip install git+{package}`, or extract with another tool and `eosin import`",
            code="package",
        ) from error


class ConchNetwork(EncoderNetwork):
    """The image side of CONCH (Lu et al., Nature Medicine 30, 2024), projected to the space of texts or not."""

    def __init__(self, model: Any, *, contrast: bool) -> None:
        super().__init__(model.visual)
        self.model = (model,)  # in a tuple, so that the text side is not part of the weights
        self.contrast = contrast

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the image side out of the weights of the whole model."""
        return {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, 512) for (b, 3, 448, 448)."""
        rows: Tensor = self.model[0].encode_image(pictures, proj_contrast=self.contrast, normalize=False)
        return rows


class ConchTower(EncoderNetwork):
    """The image side of CONCH v1.5 as TRIDENT carries it."""

    def __init__(self, trunk: nn.Module, module: ModuleType) -> None:
        super().__init__(trunk)
        self.resample = module.resize_pos_embed

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with positions for the network's grid."""
        name = "trunk.pos_embed"
        return state | {name: self.resample(self.trunk.trunk, state[name], verbose=False)}

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, 768) for (b, 3, 448, 448)."""
        rows: Tensor = self.trunk(pictures)
        return rows


class MuskNetwork(EncoderNetwork):
    """The image side of MUSK (Xiang et al., Nature 638, 2025) at one scale or two."""

    def __init__(self, trunk: nn.Module, *, multi_scale: bool) -> None:
        super().__init__(trunk)
        self.multi_scale = multi_scale

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights as they are."""
        return state

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, 1024), or (b, 2048) for two scales, for (b, 3, 384, 384)."""
        rows: Tensor = self.trunk(
            image=pictures, with_head=False, out_norm=False, ms_aug=self.multi_scale, return_global=True
        )[0]
        return rows


def build_conch(*, contrast: bool) -> EncoderNetwork:
    """Build CONCH without weights from the authors' package.

    Raises
    ------
    ConfigError
        When it is not installed.
    """
    package = require_module(*CONCH)
    folder = Path(str(package.__file__)).parent / "model_configs"
    settings = json.loads((folder / "conch_ViT-B-16.json").read_text(encoding="utf-8"))
    settings.pop("custom_text", None)
    return ConchNetwork(package.CoCa(**settings), contrast=contrast)


def build_conch_tower() -> EncoderNetwork:
    """Build CONCH v1.5 without weights from TRIDENT's package.

    Raises
    ------
    ConfigError
        When it is not installed.
    """
    package = require_module(*CONCH_TOWER)
    return ConchTower(package.CONCHVisionTower(), package)


def build_musk(*, multi_scale: bool) -> EncoderNetwork:
    """Build MUSK without weights from the authors' package.

    Raises
    ------
    ConfigError
        When it is not installed.
    """
    package = require_module(*MUSK)
    return MuskNetwork(package.musk_large_patch16_384(), multi_scale=multi_scale)


def require_package(build: Callable[..., EncoderNetwork]) -> None:
    """Refuse a builder of this module whose package is not installed; others need none.

    Raises
    ------
    ConfigError
        As the builder.
    """
    needed = {build_conch: CONCH, build_conch_tower: CONCH_TOWER, build_musk: MUSK}.get(build)
    if needed is not None:
        require_module(*needed)

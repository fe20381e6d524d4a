"""Architectures of encoders: functions from normalised pictures to one row per tile."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eosin.errors import UnknownNameError
from eosin.features._conversions import (
    convert_clip,
    convert_dino,
    convert_keep,
    convert_lite,
    convert_vit,
    fold_class_position,
    is_transformers_clip,
    is_transformers_vit,
)

Pooling = Literal["none", "cls", "cls_mean", "map_mean", "network"]


def pool_tokens(tokens: Tensor, pooling: Pooling, n_prefix: int) -> Tensor:
    """Reduce the tokens of a vision transformer to one vector per tile.

    Parameters
    ----------
    tokens : (b, t, E)
        Class token first, then registers, then patches.
    pooling : "cls" or "cls_mean"
        The class token, or the class token followed by the mean of the patch tokens.
    n_prefix : int
        Number of tokens before the first patch: 1 plus the registers.

    Returns
    -------
    (b, E) or (b, 2 E)
    """
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "cls_mean":
        return torch.cat([tokens[:, 0], tokens[:, n_prefix:].mean(dim=1)], dim=-1)
    raise ValueError(f"{pooling!r} is not a way to pool tokens")


class EncoderNetwork(nn.Module):
    """A function from normalised pictures to one row per tile.

    Parameters
    ----------
    trunk : nn.Module
        The part that weights are loaded into.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights as read from a file under the trunk's names and in its shapes."""
        return adapt_timm_state(self.trunk, state)


class PooledTransformer(EncoderNetwork):
    """A timm vision transformer with the pooling that its row names."""

    def __init__(self, trunk: nn.Module, pooling: Pooling) -> None:
        super().__init__(trunk)
        self.pooling = pooling

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) for (b, 3, side, side)."""
        return pool_tokens(self.trunk.forward_features(pictures), self.pooling, self.trunk.num_prefix_tokens)


class MeanOfMap(EncoderNetwork):
    """A timm convolutional trunk cut after one stage, averaged over its map."""

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) for (b, 3, side, side)."""
        mean: Tensor = self.trunk(pictures)[-1].mean(dim=(-2, -1))
        return mean


class WholeNetwork(EncoderNetwork):
    """A timm network whose own head pools."""

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) for (b, 3, side, side)."""
        rows: Tensor = self.trunk(pictures)
        return rows


class ProjectedTower(EncoderNetwork):
    """KEEP's vision tower: class token, a projection of two layers, length one (Zhou et al., 2024)."""

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the vision tower out of the weights of the whole model."""
        return convert_keep(state)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) of length 1 for (b, 3, side, side)."""
        return F.normalize(self.trunk.visual_head(self.trunk.visual(pictures)), dim=-1)


class LiteNetwork(WholeNetwork):
    """EfficientNet-Lite, whose published weights have the names of another implementation."""

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights under timm's names."""
        return convert_lite(state, list(self.trunk.state_dict()))


class ConvStem(nn.Module):
    """The convolutional patch embedding of CTransPath, in the place of Swin's linear one.

    Wang et al., Medical Image Analysis 81, 2022: two 3x3 convolutions of stride 2 and a 1x1 convolution.
    """

    def __init__(self, side: int = 224, width: int = 96) -> None:
        super().__init__()
        self.grid_size = (side // 4, side // 4)
        half = width // 8
        self.proj = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, 2 * half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * half),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * half, width, 1),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, side / 4, side / 4, width)."""
        embedded: Tensor = self.norm(self.proj(pictures).permute(0, 2, 3, 1))
        return embedded


def build_keep(dim: int = 768) -> EncoderNetwork:
    """Build KEEP's vision tower without weights; with it no code from the hub has to run."""
    import timm

    visual: Any = timm.create_model(
        "vit_large_patch16_224", pretrained=False, num_classes=0, init_values=1e-5, dynamic_img_size=True
    )
    head = nn.Sequential(nn.Linear(visual.num_features, dim), nn.GELU(), nn.Linear(dim, dim))
    return ProjectedTower(nn.ModuleDict({"visual": visual, "visual_head": head}))


def build_ctranspath() -> EncoderNetwork:
    """Build CTransPath's network without weights: Swin-T with a convolutional stem."""
    from timm.models.swin_transformer import SwinTransformer

    trunk = SwinTransformer(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), embed_dim=96, num_classes=0)
    trunk.patch_embed = ConvStem()
    return WholeNetwork(trunk)


def build_lite0() -> EncoderNetwork:
    """Build EfficientNet-Lite0 without weights, padded as in TensorFlow (Liu, 2020)."""
    import timm

    return LiteNetwork(timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0))


def build_timm(
    architecture: str, pooling: Pooling, arguments: dict[str, Any], *, swiglu: bool = False, eps: float | None = None
) -> EncoderNetwork:
    """Build a timm architecture without weights.

    Parameters
    ----------
    architecture : str
        timm's name, without the tag of weights.
    pooling : Pooling
        "network" leaves it to timm's own head.
    arguments : dict
        Constructor arguments that JSON can express.
    swiglu : bool
        Also pass the two arguments that are classes: packed SwiGLU and SiLU.
    eps : float, optional
        Of the layer norms, where the authors' differs from timm's.
    """
    import timm
    from timm.layers.mlp import SwiGLUPacked

    if swiglu:
        arguments = arguments | {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if eps is not None:
        arguments = arguments | {"norm_layer": partial(nn.LayerNorm, eps=eps)}
    trunk = timm.create_model(architecture, pretrained=False, **arguments)
    if pooling in ("cls", "cls_mean"):
        return PooledTransformer(trunk, pooling)
    return MeanOfMap(trunk) if pooling == "map_mean" else WholeNetwork(trunk)


def adapt_timm_state(trunk: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and resample foreign weights: names of `transformers`, DINO and iBOT, position grids of another size.

    Parameters
    ----------
    trunk : nn.Module
        The timm network that the weights are for.
    state : dict of str to Tensor
        As read from a file.

    Returns
    -------
    dict of str to Tensor
        Under timm's names.
    """
    from timm.models import swin_transformer, vision_transformer

    adapted: dict[str, Tensor] = state
    if isinstance(trunk, vision_transformer.VisionTransformer):
        adapted = vision_transformer.checkpoint_filter_fn(_as_vit(trunk, state), trunk)
    if isinstance(trunk, swin_transformer.SwinTransformer):
        adapted = swin_transformer.checkpoint_filter_fn(state, trunk)
    return adapted


def _as_vit(trunk: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if is_transformers_vit(state):
        state = convert_vit(state, trunk.patch_embed.grid_size)
    elif is_transformers_clip(state):
        state = convert_clip(state)
    else:
        state = convert_dino(state)
    positions = state.get("pos_embed")
    with_class = positions is not None and (positions.shape[1] - 1) ** 0.5 % 1 == 0
    return fold_class_position(state) if with_class and trunk.no_embed_class and "cls_token" in state else state


def describe_timm(model: str) -> tuple[int, dict[str, Any], str]:
    """Return what timm knows about one of its models, without its weights.

    Returns
    -------
    (int, dict, str)
        Width of the features, timm's data configuration, and where the weights are.

    Raises
    ------
    UnknownNameError
        When timm has no such model.
    """
    import timm
    from timm.data.config import resolve_data_config

    architecture = model.partition(".")[0]
    if not timm.is_model(architecture):
        raise UnknownNameError("timm model", architecture, timm.list_models())
    with torch.device("meta"):
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    facts: dict[str, Any] = resolve_data_config(network.pretrained_cfg, model=network)  # type: ignore[no-untyped-call]
    return int(network.num_features), facts, network.pretrained_cfg.get("hf_hub_id") or f"timm/{model}"

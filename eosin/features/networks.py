"""Architectures of encoders: functions from normalised pictures to one row per tile."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    raise ValueError(f"{pooling!r} is no way to pool tokens")


class PooledTransformer(nn.Module):
    """A timm vision transformer with the pooling that its row names."""

    def __init__(self, trunk: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.pooling = pooling

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) for (b, 3, side, side)."""
        return pool_tokens(self.trunk.forward_features(pictures), self.pooling, self.trunk.num_prefix_tokens)


class MeanOfMap(nn.Module):
    """A timm convolutional trunk cut after one stage, averaged over its map."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) for (b, 3, side, side)."""
        mean: Tensor = self.trunk(pictures)[-1].mean(dim=(-2, -1))
        return mean


class WholeNetwork(nn.Module):
    """A timm network whose own head pools."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (b, dim) for (b, 3, side, side)."""
        rows: Tensor = self.trunk(pictures)
        return rows


def build_timm(architecture: str, pooling: Pooling, arguments: dict[str, Any], *, swiglu: bool = False) -> nn.Module:
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
    """
    import timm
    from timm.layers.mlp import SwiGLUPacked

    if swiglu:
        arguments = arguments | {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    trunk = timm.create_model(architecture, pretrained=False, **arguments)
    if pooling in ("cls", "cls_mean"):
        return PooledTransformer(trunk, pooling)
    return MeanOfMap(trunk) if pooling == "map_mean" else WholeNetwork(trunk)


def adapt_timm_state(trunk: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and resample foreign weights of a vision transformer as timm itself does (DINOv2 names, grid size)."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if isinstance(trunk, VisionTransformer):
        adapted: dict[str, Tensor] = checkpoint_filter_fn(state, trunk)
        return adapted
    return state

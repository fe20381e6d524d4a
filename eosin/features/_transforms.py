"""From uint8 tiles to what a network wants: resize, crop, normalise, on the network's own device."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Transform:
    """The steps between a decoded tile and the network.

    Parameters
    ----------
    input_px : int
        Side of the square that the network sees.
    mean, std : tuple of float
        Per channel, for values in [0, 1].
    interpolation : "bilinear" or "bicubic"
        With antialiasing, as torchvision resizes.
    resize_px : int, optional
        Side to resize to before the centre is cropped; `input_px` (nothing cropped) when None.
    """

    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bilinear"
    resize_px: int | None = None

    def __call__(self, tiles: Tensor) -> Tensor:
        """Return normalised pictures.

        Parameters
        ----------
        tiles : (b, h, w, 3) uint8
            Square tiles, on any device.

        Returns
        -------
        (b, 3, input_px, input_px) float32
            On the same device.
        """
        pictures = tiles.permute(0, 3, 1, 2).to(torch.float32)
        side = self.resize_px or self.input_px
        if pictures.shape[-2:] != (side, side):
            pictures = F.interpolate(pictures, (side, side), mode=self.interpolation, antialias=True)
            pictures = pictures.clamp_(0, 255).round_()  # uint8 between the steps, as torchvision does
        pictures = _crop_centre(pictures, self.input_px) / 255
        mean, std = (torch.tensor(v, device=tiles.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (pictures - mean) / std

    def describe(self) -> str:
        """Return one line for a file's provenance."""
        side = self.resize_px or self.input_px
        crop = f", centre crop {self.input_px}" if side != self.input_px else ""
        return f"resize {side} {self.interpolation} antialias{crop}, mean {self.mean}, std {self.std}"


def _crop_centre(pictures: Tensor, side: int) -> Tensor:
    top, left = ((extent - side + 1) // 2 for extent in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]

"""The transform against torchvision's own."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from eosin.features._encoders import ENCODERS, HALF, IMAGENET
from eosin.features._transforms import Transform

ROWS = list(dict.fromkeys((row.transform, row.tile_px) for row in ENCODERS.values() if row.transform))


def picture(side: int) -> np.ndarray:
    """Return gradients of three directions with sharp squares on them."""
    ramp = np.linspace(0, 255, side)
    pixels = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.add.outer(ramp, ramp) / 2], -1)
    pixels[side // 4 : side // 3, side // 5 : side // 2] = (255, 0, 128)
    return pixels.round().astype(np.uint8)


def torchvision_transform(transform: Transform) -> tuple[tv.Compose, tv.Compose]:
    """Return torchvision's geometry and its normalisation."""
    mode = tv.InterpolationMode(transform.interpolation)
    resize = tv.Resize(transform.resize_px or transform.input_px, interpolation=mode, antialias=True)
    normalise = tv.Normalize(transform.mean, transform.std)
    return tv.Compose([resize, tv.CenterCrop(transform.input_px)]), tv.Compose(
        [tv.ConvertImageDtype(torch.float32), normalise]
    )


@pytest.mark.parametrize("side", [224, 256, 300, 111])
@pytest.mark.parametrize("transform", [row for row, _ in ROWS], ids=lambda row: row.describe()[:40])
def test_every_row_equals_torchvision(transform: Transform, side: int) -> None:
    pixels = picture(side)
    geometry, values = torchvision_transform(transform)
    tile = torch.from_numpy(pixels)[None]
    ours = transform(tile)
    theirs = values(geometry(tile.permute(0, 3, 1, 2)))
    assert ours.shape == (1, 3, transform.input_px, transform.input_px)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    pil = values(tv.functional.pil_to_tensor(geometry(Image.fromarray(pixels))))[None]
    # Pillow rounds and clips also between its two passes, most visibly at 1.5 times the size
    level = 1 / 255 / min(transform.std)
    assert (ours - pil).abs().max() <= 16 * level
    assert (ours - pil).abs().mean() <= 0.3 * level


def test_description_names_what_was_done() -> None:
    assert (
        Transform(224, *IMAGENET, "bicubic", 256).describe().startswith("resize 256 bicubic antialias, centre crop 224")
    )
    assert "crop" not in Transform(224, *HALF).describe()

"""Pixels of one level to delivered pixels: background, resampling, bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NATIVE_SLACK_PX = 0.5
NATIVE_BLOCK_PX = 512
BLOCK_PX = 2048
WHITE = (255, 255, 255)
ReadLevel = Callable[[int, tuple[int, int], tuple[int, int]], NDArray[np.uint8]]
"""``read_level(level, (x, y), (w, h))`` in that level's pixels gives (h, w, 3) RGB, padded with the background."""


def flatten(rgba: Image.Image, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return RGB with the background where pixels are transparent or missing.

    The only place where transparency is handled: mask, thumbnail and tiles agree because all come through here.

    Parameters
    ----------
    rgba : Image
        Mode RGBA, alpha not premultiplied.
    background : tuple of int
        RGB.

    Returns
    -------
    (h, w, 3) uint8
    """
    # packing the bytes takes a third of the time of `convert` and `getextrema`, which is a tenth of reading a tile
    if np.frombuffer(rgba.tobytes("raw", "A"), np.uint8).min(initial=255) != 255:
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        rgba = Image.alpha_composite(canvas, rgba)
    return np.frombuffer(rgba.tobytes("raw", "RGB"), np.uint8).reshape(rgba.height, rgba.width, 3)


def to_8_bit(pixels: NDArray[Any], top: int) -> NDArray[np.uint8]:
    """Return pixels of more than 8 bits as 8 bits, rounded.

    Parameters
    ----------
    pixels : (h, w, c) uint8 or uint16
        As decoded; 8-bit ones stay as they are.
    top : int
        The value that is white, as the file's metadata say.
    """
    if pixels.dtype == np.uint8:
        return pixels
    # half is added before the division, so that 8 bits that were spread over 16 come back as they were
    scaled = (pixels.astype(np.uint32) * 255 + top // 2) // max(top, 1)
    return np.minimum(scaled, 255).astype(np.uint8)


def ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return RGB of YCbCr of the full range (ITU-R BT.601, as JFIF has it), (h, w, 3)."""
    luma, blue, red = (pixels[..., index].astype(np.float32) for index in range(3))
    blue, red = blue - 128, red - 128
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    return np.asarray(np.clip(np.rint(rgb), 0, 255), np.uint8)


def rgb_to_ycbcr(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return YCbCr of RGB, (h, w, 3); see `ycbcr_to_rgb`."""
    red, green, blue = (pixels[..., index].astype(np.float32) for index in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = np.stack([luma, 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402], axis=-1)
    return np.asarray(np.clip(np.rint(planes), 0, 255), np.uint8)


def is_native(ratio: float, longest_px: int) -> bool:
    """Return whether pixels `ratio` times as fine as delivered are within half a delivered pixel over the region.

    Regions longer than 512 px are put together from blocks, so for them it is half a pixel over a block.
    """
    return abs(ratio - 1) * min(longest_px, NATIVE_BLOCK_PX) <= NATIVE_SLACK_PX


def choose_level(downsamples: list[float], wanted: float, longest_px: int) -> int:
    """Return the coarsest level that is not coarser than wanted.

    A level that is coarser by so little that it is within half a delivered pixel over the region counts too.

    Parameters
    ----------
    downsamples : list of float
        Ascending, the first is 1.
    wanted : float
        Level-0 pixels per delivered pixel.
    longest_px : int
        Longer side of the delivered region.
    """
    slack = 1 + NATIVE_SLACK_PX / min(max(longest_px, 1), NATIVE_BLOCK_PX)
    fine = [level for level, downsample in enumerate(downsamples) if downsample <= wanted * slack]
    return fine[-1] if fine else 0


def read_scaled(
    read_level: ReadLevel,
    downsamples: list[float],
    origin_px0: tuple[float, float],
    size_px: tuple[int, int],
    downsample: float,
    *,
    offsets_px0: Sequence[tuple[float, float]] = (),
) -> NDArray[np.uint8]:
    """Return a region at any downsample, with anti-aliasing and bounded memory.

    Pixels of a level are delivered as they are stored when the level is within half a delivered pixel over the
    region, or over each 512 px of a larger one. Otherwise the next finer level is averaged: plain area average at
    whole ratios, Pillow's Hamming filter in between, where its box filter would shift lines by up to half a pixel.

    Parameters
    ----------
    read_level : callable
        Reads stored pixels of one level.
    downsamples : list of float
        Of the levels, ascending.
    origin_px0 : tuple of float
        Top-left corner in level-0 pixels.
    size_px : tuple of int
        Width and height of the result.
    downsample : float
        Level-0 pixels per delivered pixel.
    offsets_px0 : sequence of tuple, optional
        Where the corner of each level lies, level-0 pixels; by default all at (0, 0).

    Returns
    -------
    (h, w, 3) uint8
    """
    level = choose_level(downsamples, downsample, max(size_px))
    ratio = downsample / downsamples[level]
    offset = offsets_px0[level] if offsets_px0 else (0.0, 0.0)
    x, y = ((position - start) / downsamples[level] for position, start in zip(origin_px0, offset, strict=True))
    native = is_native(ratio, max(size_px))
    if native and abs(ratio - 1) * max(size_px) <= NATIVE_SLACK_PX:
        return read_level(level, (round(x), round(y)), size_px)
    result = np.empty((size_px[1], size_px[0], 3), np.uint8)
    for left, top, width, height in _blocks(size_px, NATIVE_BLOCK_PX if native else max(1, int(BLOCK_PX / ratio))):
        corner = (x + left * ratio, y + top * ratio)
        if native:
            block = read_level(level, (round(corner[0]), round(corner[1])), (width, height))
        else:
            block = _resample(read_level, level, corner, (width, height), ratio)
        result[top : top + height, left : left + width] = block
    return result


ReadRegion = Callable[[tuple[int, int], tuple[int, int]], NDArray[np.uint8]]
"""``read_region((x, y), (w, h))`` gives (h, w, 3) RGB of one picture."""


def turns(orientation: int) -> bool:
    """Return whether rows and columns change places in a picture of this TIFF Orientation."""
    return orientation >= 5


def flips(orientation: int) -> tuple[bool, bool]:
    """Return whether stored columns and stored rows run backwards in a picture of this TIFF Orientation."""
    return orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)


def read_oriented(
    read_stored: ReadRegion,
    stored_size: tuple[int, int],
    orientation: int,
    corner: tuple[int, int],
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """Return a region of a picture that is stored flipped or turned.

    Parameters
    ----------
    read_stored : callable
        Reads a region as it is stored.
    stored_size : tuple of int
        Width and height as stored.
    orientation : int
        Tag 274 of TIFF 6.0, 1 to 8.
    corner, size : tuple of int
        The region in the picture as it is meant.
    """
    if turns(orientation):
        corner, size = corner[::-1], size[::-1]
    backwards = flips(orientation)
    x, y = (
        stored_size[axis] - corner[axis] - size[axis] if backwards[axis] else corner[axis] for axis in (0, 1)
    )  # fmt: skip
    pixels = read_stored((x, y), size)
    pixels = pixels[:: -1 if backwards[1] else 1, :: -1 if backwards[0] else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if turns(orientation) else pixels)


def _blocks(size_px: tuple[int, int], side: int) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, size_px[1], side):
        for left in range(0, size_px[0], side):
            yield left, top, min(side, size_px[0] - left), min(side, size_px[1] - top)


def _resample(
    read_level: ReadLevel, level: int, corner: tuple[float, float], size_px: tuple[int, int], ratio: float
) -> NDArray[np.uint8]:
    whole = round(ratio)
    averages = whole >= 2 and abs(ratio - whole) * max(size_px) <= NATIVE_SLACK_PX
    if averages:  # cells of whole x whole stored pixels, no neighbours needed
        x, y = round(corner[0]), round(corner[1])
        stored = read_level(level, (x, y), (size_px[0] * whole, size_px[1] * whole))
        return np.asarray(Image.fromarray(stored).reduce(whole))
    margin = int(np.ceil(max(ratio, 1.0))) + 1  # the filter's reach: a tile's pixels do not depend on its cut
    left, top = int(np.floor(corner[0])) - margin, int(np.floor(corner[1])) - margin
    width, height = (int(np.ceil(side * ratio)) + 2 * margin + 1 for side in size_px)
    stored = read_level(level, (left, top), (width, height))
    x0, y0 = corner[0] - left, corner[1] - top
    box = (x0, y0, x0 + size_px[0] * ratio, y0 + size_px[1] * ratio)
    method = Image.Resampling.HAMMING if ratio > 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(stored).resize(size_px, method, box=box))

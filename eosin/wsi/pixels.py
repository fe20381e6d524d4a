"""Pixels of one level to delivered pixels: background, resampling, bounded memory."""

from collections.abc import Callable, Iterator

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
    low, _ = rgba.getchannel("A").getextrema()
    if low != 255:
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        rgba = Image.alpha_composite(canvas, rgba)
    return np.asarray(rgba.convert("RGB"))


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

    Returns
    -------
    (h, w, 3) uint8
    """
    level = choose_level(downsamples, downsample, max(size_px))
    ratio = downsample / downsamples[level]
    x, y = (position / downsamples[level] for position in origin_px0)
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

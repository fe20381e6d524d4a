"""Slides, grids and models whose right answer is known by construction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.heatmaps._heatmap import Heatmap
from eosin.mil._closed_forms import PooledBag
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._overview import Overview
from eosin.wsi._tissue import TissueOptions, examine

PINK = (226, 170, 200)
MARK = (60, 20, 90)


def lattice(
    *,
    size_px0: tuple[int, int],
    slide_mpp: float,
    mpp: float = 0.5,
    patch_size: int = 64,
    overlap: int = 0,
    edges: Literal["drop", "pad"] = "drop",
) -> TileGrid:
    """Return every tile of the lattice that lies inside the slide; with `edges` "pad" also those that begin in it."""
    tiling = Tiling(mpp=mpp, patch_size=patch_size, overlap=overlap, edges=edges)
    scale = tiling.delivered_mpp(slide_mpp) / slide_mpp
    tile_px0, step = round(patch_size * scale), (patch_size - overlap) * scale
    sides = [np.floor(np.arange(int(side / step) + 1) * step + 0.5).astype(np.int64) for side in size_px0]
    reach = 1 if edges == "pad" else tile_px0
    xs, ys = ([x for x in axis if x + reach <= side] for axis, side in zip(sides, size_px0, strict=True))
    origins = np.array([(x, y) for y in ys for x in xs], dtype=np.int64)
    return TileGrid(origins, tile_px0, tiling, size_px0, slide_mpp)


def marked_map(grid: TileGrid, tile: int) -> Heatmap:
    """Return a map that is 1 at one tile and 0 elsewhere."""
    values = np.zeros(grid.n_tiles)
    values[tile] = 1.0
    return Heatmap(values, grid, "attention", "attention")


def marked_pixels(grid: TileGrid, tile: int) -> NDArray[np.uint8]:
    """Return level-0 pixels: glass around, pink tissue under the tiles, one tile dark."""
    width, height = grid.slide_size_px0
    pixels = np.full((height, width, 3), 245, dtype=np.uint8)
    for x0, y0, x1, y1 in grid.boxes_px0().tolist():
        pixels[y0:y1, x0:x1] = PINK
    x0, y0, x1, y1 = grid.boxes_px0()[tile].tolist()
    pixels[y0:y1, x0:x1] = MARK
    return pixels


def write_slide(path: Path, pixels: NDArray[np.uint8], *, mpp: float, downsamples: tuple[int, ...] = (3,)) -> None:
    """Write a pyramid TIFF with the given, possibly odd, downsamples."""
    with tifffile.TiffWriter(path) as tiff:
        for level, down in enumerate((1, *downsamples)):
            resolution = (1e4 / (mpp * down), 1e4 / (mpp * down))
            tiff.write(
                pixels[::down, ::down],
                tile=(256, 256),
                photometric="rgb",
                compression="deflate",
                resolution=resolution,
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
            )


@dataclass
class PixelSlide:
    """A slide in memory, with a scanned box if one is given: stands in for formats that we cannot write."""

    pixels: NDArray[np.uint8]
    mpp: float
    bounds_px0: tuple[int, int, int, int] | None = None
    mpp_source: str = "user"
    path: Path = Path("memory")

    @property
    def size_px0(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Take the nearest level-0 pixel of each pixel's centre."""
        xs, ys = (
            (start + (np.arange(count) + 0.5) * mpp / self.mpp).astype(int)
            for start, count in zip(origin_px0, size_px, strict=True)
        )
        padded = np.full((max(ys[-1] + 1, self.size_px0[1]), max(xs[-1] + 1, self.size_px0[0]), 3), 255, np.uint8)
        padded[: self.size_px0[1], : self.size_px0[0]] = self.pixels
        return padded[ys][:, xs]

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass

    def __enter__(self) -> "PixelSlide":
        return self

    def __exit__(self, *unused: object) -> None:
        pass


def feature_bag(features: NDArray[np.floating], grid: TileGrid | None) -> FeatureBag:
    """Return features of an encoder that exists in tests only."""
    tiling = None if grid is None else grid.tiling
    mpp, patch_size = (None, None) if tiling is None else (tiling.mpp, tiling.patch_size)
    spec = FeatureSpec(encoder="test", dim=features.shape[1], mpp=mpp, patch_size=patch_size)
    return FeatureBag(features, spec, "slide-1", grid)


def random_bag(n: int, *, branches: int = 1, outputs: int = 2, spread: float = 1.0, seed: int = 0) -> PooledBag:
    """Return a bag whose attention spans many orders of magnitude when `spread` is large."""
    rng = np.random.default_rng(seed)
    return PooledBag(
        rng.normal(scale=spread, size=(n, branches)),
        rng.normal(size=(n, branches, outputs)),
        rng.normal(size=outputs),
    )


def detect_tissue(rgb, mpp: float, options: TissueOptions):
    """Return the tissue of a picture, (h, w) bool, and what a person should know about it."""
    findings = examine(Overview(rgb, mpp), options)
    return findings.mask, findings.notes

"""Time and memory of a gigapixel heat map: PNG + pyramid TIFF + GeoJSON, beside block painting.

The slide is 100,352 x 100,352 pixels at 0.25 µm/px with 200,000 tiles of 224 level-0 pixels in a disc, as a large
resection has. *Block painting* is what CLAM's heat-map script does after its scores are known: two full arrays at the
output resolution, a Python loop that adds each tile's score, a second loop that colours and blends each tile's block,
and one image written with PIL. Both write the same downsample; no slide pixels are read by either.

Run: ``python benchmarks/heatmaps.py --out benchmarks/results/heatmaps.csv``
Every measurement is a fresh process, so that the peak memory is its own; the writers take turns and the table has the
medians. "png + tiff + geojson" is the gigapixel map whole.
"""

import argparse
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from PIL import Image

from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._geojson import write_geojson
from eosin.heatmaps.export._png import View, write_png
from eosin.heatmaps.export._tiff import default_mpp, write_tiff
from eosin.wsi._grid import TileGrid, Tiling

SLIDE_MPP = 0.25
TILE_PX0 = 224


def make_map(side_px0: int, n_tiles: int) -> Heatmap:
    """Return a map of the `n_tiles` lattice tiles nearest to the slide's centre."""
    axis = np.arange(side_px0 // TILE_PX0, dtype=np.int64) * TILE_PX0
    origins = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    nearest = np.argsort(((origins - side_px0 / 2) ** 2).sum(1), kind="stable")[:n_tiles]
    tiling = Tiling(mpp=SLIDE_MPP, patch_size=TILE_PX0)
    grid = TileGrid(origins[np.sort(nearest)], TILE_PX0, tiling, (side_px0, side_px0), SLIDE_MPP)
    values = np.random.default_rng(0).gamma(0.5, size=grid.n_tiles)
    return Heatmap(values / values.sum(), grid, "attention", "attention")


def blank_view(heatmap: Heatmap, longest_px: int = 1200) -> View:
    """Return a thumbnail of glass: what is timed is the map."""
    side = heatmap.grid.slide_size_px0[0]
    image = np.full((longest_px, longest_px, 3), 244, dtype=np.uint8)
    return View(image, SLIDE_MPP * side / longest_px, SLIDE_MPP, (0, 0, side, side))


def eosin_png(heatmap: Heatmap, folder: Path) -> Path:
    """Slide and overlay with outlines, scale bar and colour bar."""
    write_png(folder / "map.png", blank_view(heatmap), heatmap.percentile())
    return folder / "map.png"


def eosin_tiff(heatmap: Heatmap, folder: Path) -> Path:
    """RGB pyramid."""
    write_tiff(folder / "map.tiff", heatmap.percentile())
    return folder / "map.tiff"


def eosin_geojson(heatmap: Heatmap, folder: Path) -> Path:
    """One QuPath tile per tile with three measurements."""
    maps = [heatmap.percentile(), heatmap.relative(), heatmap]
    write_geojson(folder / "map.geojson", maps, slide_id="slide")
    return folder / "map.geojson"


def eosin_all(heatmap: Heatmap, folder: Path) -> Path:
    """All three files of one slide, one after the other."""
    for write in (eosin_png, eosin_tiff, eosin_geojson):
        path = write(heatmap, folder)
    return path


def block_painting(heatmap: Heatmap, folder: Path) -> Path:
    """Scores into two full arrays, colours block by block, one flat image without levels or resolution."""
    down = default_mpp(heatmap) / SLIDE_MPP
    side = int(np.ceil(heatmap.grid.slide_size_px0[0] / down))
    patch = int(np.ceil(TILE_PX0 / down))
    scores = heatmap.percentile().values / 100
    corners = np.ceil(heatmap.grid.origins_px0 / down).astype(int)
    overlay, counter = np.zeros((side, side), dtype=float), np.zeros((side, side), dtype=np.uint16)
    for (x, y), score in zip(corners, scores, strict=True):
        overlay[y : y + patch, x : x + patch] += score
        counter[y : y + patch, x : x + patch] += 1
    touched = counter != 0
    overlay[touched] = overlay[touched] / counter[touched]
    canvas = np.full((side, side, 3), 244, dtype=np.uint8)
    cmap = colormaps["coolwarm"]
    for x, y in corners:
        block = overlay[y : y + patch, x : x + patch]
        colours = (cmap(block) * 255)[..., :3].astype(np.uint8)
        under = canvas[y : y + patch, x : x + patch]
        canvas[y : y + patch, x : x + patch] = (0.4 * colours + 0.6 * under).astype(np.uint8)
    Image.MAX_IMAGE_PIXELS = None
    Image.fromarray(canvas).save(folder / "map.jpg", quality=90)
    return folder / "map.jpg"


WRITERS: dict[str, Callable[[Heatmap, Path], Path]] = {
    "eosin png": eosin_png,
    "eosin tiff pyramid": eosin_tiff,
    "eosin geojson": eosin_geojson,
    "eosin png + tiff + geojson": eosin_all,
    "block painting, one flat jpg": block_painting,
}


def measure(name: str, side_px0: int, n_tiles: int) -> dict[str, object]:
    """Return seconds, peak memory and file size of one writer, in this process."""
    heatmap = make_map(side_px0, n_tiles)
    with tempfile.TemporaryDirectory() as folder:
        started, cpu_started = time.perf_counter(), time.process_time()
        path = WRITERS[name](heatmap, Path(folder))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "what": name,
        "side_px0": side_px0,
        "tiles": heatmap.grid.n_tiles,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": round(peak),
        "last_file_mb": round(size / 1e6, 1),
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores, Python {platform.python_version()}",
    }


def median_of(measured: list[dict[str, object]]) -> dict[str, object]:
    """Return one row of the medians of several runs."""
    table = pd.DataFrame(measured)
    medians = {name: table[name].median() for name in ("seconds", "cpu_seconds", "peak_mib")}
    return measured[0] | medians | {"runs": len(measured)}


def main() -> None:
    """Measure every writer in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100_352)
    parser.add_argument("--tiles", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in WRITERS}
    for name in list(WRITERS) * options.repeats:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            runs[name].append(pool.apply(measure, (name, options.side, options.tiles)))
        print(runs[name][-1], flush=True)
    rows = [median_of(measured) for measured in runs.values()]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()

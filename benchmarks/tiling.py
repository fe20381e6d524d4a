"""Tiling side by side with the usual ways, both sides interleaved in one run.

1. `native`: tiles of the stored resolution. `loop` is the per-tile ``read_region(...).convert("RGB")`` of most tools,
   `decode` the bare decoding of every stored JPEG tile once, without delivering tiles.
2. `half`: tiles of twice the mpp from a slide that has no such level. `loop` reads level 0 and resizes with Pillow.
3. `giant`: `eosin tile` on 100,000 x 100,000 px (shared JPEG tiles, so the file is small) in a child process.
4. `cohort`: tissue and tile coordinates per slide, beside CLAM's ``create_patches_fp.py`` when ``--clam`` names a
   checkout of it and ``--clam-python`` an interpreter with its requirements.

Slides are painted by eosin (H&E-like, JPEG, 0.25 µm/px) unless ``--slide`` names another; both sides see the same.
"""

import argparse
import csv
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from eosin.wsi.grid import TileGrid, Tiling
from eosin.wsi.slide import Slide, open_slide
from eosin.wsi.synthetic import make_slide
from eosin.wsi.tiles import iterate_tiles

TILE_PX = 256
BATCH = 32
Row = dict[str, str | float | int]


def paint(path: Path, side_px: int, *, mpp: float) -> Path:
    """Write a synthetic slide and strip its pyramid: one level of 256 px JPEG tiles remains."""
    pyramid = path.with_name("pyramid.tiff")
    make_slide(pyramid, size_px0=(side_px, side_px), mpp=mpp, seed=1)
    with tifffile.TiffFile(pyramid) as tiff:
        picture = tiff.pages.first.asarray()
    common = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 85}}
    tifffile.imwrite(path, picture, resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER", **common)
    return path


def whole_grid(slide: Slide, factor: int) -> TileGrid:
    """Return every tile that fits, at a multiple of the slide's mpp."""
    side = TILE_PX * factor
    xs, ys = (np.arange(0, length - side + 1, side) for length in slide.size_px0)
    origins = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int64)
    tiling = Tiling(mpp=slide.mpp * factor, patch_size=TILE_PX)
    return TileGrid(origins, side, tiling, slide.size_px0, slide.mpp)


def eosin_tiles(path: Path, factor: int, threads: int) -> None:
    """Read every tile with eosin."""
    with open_slide(path) as slide:
        for _ in iterate_tiles(
            slide, whole_grid(slide, factor), batch_size=BATCH, threads=threads if threads > 1 else 0
        ):
            pass


def openslide_tiles(path: Path, factor: int, threads: int) -> None:
    """Read every tile with the usual loop."""
    with open_slide(path) as slide:
        origins = whole_grid(slide, factor).origins_px0.tolist()
    handle = openslide.OpenSlide(path)

    def read(origin: list[int]) -> None:
        side = TILE_PX * factor
        image = handle.read_region(tuple(origin), 0, (side, side)).convert("RGB")
        np.asarray(image if factor == 1 else image.resize((TILE_PX, TILE_PX), Image.Resampling.BOX))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, origins))
    handle.close()


def bare_decode(path: Path, factor: int, threads: int) -> None:
    """Decode every stored tile once and drop it."""
    del factor
    with tifffile.TiffFile(path) as tiff, path.open("rb") as file:
        page = tiff.pages.first
        stored = []
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            stored.append(file.read(count))
        colours = "YCBCR" if page.photometric == 6 else "RGB"

        def decode(data: bytes) -> None:
            imagecodecs.jpeg8_decode(data, tables=page.jpegtables, colorspace=colours, outcolorspace="RGB")

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, stored))


def interleaved(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each side; the sides take turns, the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_reading(path: Path, repeats: int) -> list[Row]:
    """Measure figures 1 and 2."""
    rows: list[Row] = []
    for case, factor in (("native", 1), ("half", 2)):
        with open_slide(path) as slide:
            level0_mpx = whole_grid(slide, factor).n_tiles * (TILE_PX * factor) ** 2 / 1e6
        for threads in (1, 2):
            sides = {"loop": openslide_tiles, "eosin": eosin_tiles}
            if factor == 1:
                sides["decode"] = bare_decode
            found = interleaved({name: partial(run, path, factor, threads) for name, run in sides.items()}, repeats)
            for name, seconds in found.items():
                rows.append(row(case, path.name, name, threads, seconds, "level-0 Mpx/s", level0_mpx / seconds))
            rows.append(row(case, path.name, "eosin/loop", threads, 0, "times", found["loop"] / found["eosin"]))
            if "decode" in found:
                share = found["decode"] / found["eosin"]
                rows.append(row(case, path.name, "eosin/decode", threads, 0, "times", share))
    return rows


def bench_difference(path: Path) -> list[Row]:
    """Measure how far the scaled decoding is from decoding and averaging."""
    handle = openslide.OpenSlide(path)
    rows: list[Row] = []
    with open_slide(path) as slide:
        for factor in (1, 2, 4, 8):
            errors = []
            for x, y in whole_grid(slide, factor).origins_px0.tolist():
                side = TILE_PX * factor
                plain = handle.read_region((x, y), 0, (side, side)).convert("RGB").reduce(factor)
                tile = slide.read((x, y), (TILE_PX, TILE_PX), slide.mpp * factor)
                errors.append(np.abs(tile.astype(np.int16) - np.asarray(plain)).mean())
            rows.append(row("error", path.name, f"{factor}x", 1, 0, "mean grey levels", float(np.mean(errors))))
    handle.close()
    return rows


TILE_CHILD = """
import resource, sys, time
from pathlib import Path
from eosin.wsi.job import JobFolder, tile_slides
from eosin.wsi.slide import SlideFile
start = time.perf_counter()
report = tile_slides([SlideFile(Path(sys.argv[1]), "giant")], JobFolder(Path(sys.argv[2])))
assert report.records[0].status == "ok", report
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def bench_giants(folder: Path) -> list[Row]:
    """Measure figure 3."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "wsi"))
    from conftest import sparse_bigtiff

    rows: list[Row] = []
    for name, n_levels in (("pyramid", 5), ("single level", 1)):
        path = folder / f"{n_levels}.tiff"
        path.write_bytes(sparse_bigtiff(100_000, 0.25, n_levels))
        command = [sys.executable, "-c", TILE_CHILD, str(path), str(folder / f"job{n_levels}")]
        seconds, megabytes = map(float, subprocess.run(command, capture_output=True, check=True).stdout.split())
        rows.append(row("giant", f"100,000 px {name}", "eosin tile", 1, seconds, "peak MB", megabytes))
    return rows


def bench_cohort(folder: Path, n_slides: int, clam: Path | None, clam_python: str) -> list[Row]:
    """Measure figure 4."""
    slides = folder / "cohort"
    slides.mkdir()
    for number in range(n_slides):
        make_slide(slides / f"{number}.tiff", size_px0=(8000, 6000), mpp=0.25, pen=number % 2 == 0, seed=number)
    sides = {"eosin tile": [sys.executable, "-m", "eosin", "tile", str(slides), "--job", str(folder / "job")]}
    if clam is not None:
        sides["create_patches_fp"] = [
            clam_python, str(clam / "create_patches_fp.py"), "--source", str(slides),
            "--save_dir", str(folder / "clam"), "--patch_size", "512", "--step_size", "512", "--seg", "--patch",
        ]  # fmt: skip
    times = dict.fromkeys(sides, 0.0)
    for name, command in sides.items():
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=clam if name != "eosin tile" else None)
        times[name] = time.perf_counter() - start
    return [
        row("cohort", f"{n_slides} slides of 8000 x 6000", name, 1, seconds, "slides/min", 60 * n_slides / seconds)
        for name, seconds in times.items()
    ]


def row(case: str, slide: str, side: str, threads: int, seconds: float, unit: str, value: float) -> Row:
    """Return one line of the table."""
    return {
        "case": case, "slide": slide, "side": side, "threads": threads, "seconds": round(seconds, 3),
        "value": round(value, 3), "unit": unit,
    }  # fmt: skip


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["reading", "giant", "cohort"])
    parser.add_argument("--slide", type=Path, action="append", default=[], help="further JPEG slides for `reading`")
    parser.add_argument("--side", type=int, default=6144, help="level-0 pixels of the painted slide")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-slides", type=int, default=6)
    parser.add_argument("--clam", type=Path)
    parser.add_argument("--clam-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tiling.csv")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    rows: list[Row] = []
    try:
        if "reading" in options.cases:
            for path in [paint(folder / "painted.tiff", options.side, mpp=0.25), *options.slide]:
                rows += bench_reading(path, options.repeats) + bench_difference(path)
        if "giant" in options.cases:
            rows += bench_giants(folder)
        if "cohort" in options.cases:
            rows += bench_cohort(folder, options.n_slides, options.clam, options.clam_python)
    finally:
        shutil.rmtree(folder)
    where = f"{platform.machine()}, {os.cpu_count()} cores, openslide {openslide.__library_version__}"
    options.out.parent.mkdir(exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**line, "machine": where} for line in rows)
    for line in rows:
        print(*line.values(), sep="\t")


if __name__ == "__main__":
    main()

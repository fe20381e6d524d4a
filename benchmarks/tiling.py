"""Tiling side by side with the usual ways, both sides interleaved in one run.

1. `native`: tiles of the stored resolution. `loop` is the per-tile ``read_region(...).convert("RGB")`` of most tools,
   `decode` the bare decoding of every stored JPEG tile once, without delivering tiles. The packages fastslide and
   microtome-wsi take part where they are installed; microtome reads stored tiles only, here the same.
2. `half`: tiles of twice the mpp from a slide that has no such level. `loop` reads level 0 and resizes with Pillow.
3. `giant`: `eosin tile` on 100,000 x 100,000 px (shared JPEG tiles, so the file is small) in a child process.
4. `cohort`: tissue and tile coordinates per slide, beside CLAM's ``create_patches_fp.py`` when ``--clam`` names a
   checkout of it and ``--clam-python`` an interpreter with its requirements. Both from the shell, start-up included;
   ``further`` is what a slide costs once the process runs, from cohorts of two sizes.
   CLAM: tissue at 16 µm/px, coordinates, mask picture, process list. eosin: tissue at 8 µm/px (or 16), coordinates
   with quality scores, thumbnail, contour picture, GeoJSON, run.json, each file synced and read back.
5. `overlap`: IoU of the tissue found with the tissue planted, on painted slides that all have pen marks.
6. `quality`: scores of 200,000 tiles, without blur and with it.

Reading is timed without opening; each pass opens the slide anew. Slides are painted by eosin (H&E-like, JPEG,
0.25 µm/px) unless ``--slide`` names another; both sides see the same.
"""

import argparse
import csv
import importlib.util
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import tifffile
from PIL import Image

from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._histology import lay_out
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import open_slide
from eosin.wsi._synthetic import Cohort, make_cohort, make_slide, plan_cohort
from eosin.wsi._tiles import iterate_tiles
from eosin.wsi._tissue import find_tissue

TILE_PX = 256
BATCH = 32
LEAST_MPX = 60
COHORT_SIDES_PX = (40_000, 60_000, 80_000, 100_000)
COPIES = (1, 16)
TILINGS = ((64, 15), (TILE_PX, 0))  # patch and overlap; the first makes 200,000 tiles
Row = dict[str, str | float | int]
Run = Callable[[], object]


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


def eosin_tiles(path: Path, factor: int, threads: int) -> Run:
    """Open a slide with eosin; return what reads every tile."""
    slide = open_slide(path)
    grid = whole_grid(slide, factor)

    def run() -> None:
        for _ in iterate_tiles(slide, grid, batch_size=BATCH, threads=threads if threads > 1 else 0):
            pass
        slide.close()

    return run


def openslide_tiles(path: Path, factor: int, threads: int) -> Run:
    """Open a slide with OpenSlide; return the usual loop."""
    with open_slide(path) as slide:
        origins = whole_grid(slide, factor).origins_px0.tolist()
    handle = openslide.OpenSlide(path)

    def read(origin: list[int]) -> None:
        side = TILE_PX * factor
        image = handle.read_region(tuple(origin), 0, (side, side)).convert("RGB")
        np.asarray(image if factor == 1 else image.resize((TILE_PX, TILE_PX), Image.Resampling.BOX))

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, origins))
        handle.close()

    return run


def fastslide_tiles(path: Path, factor: int, threads: int) -> Run:
    """Open a slide with fastslide; return its loop, whose arrays are views."""
    import fastslide

    with open_slide(path) as slide:
        origins = whole_grid(slide, factor).origins_px0.tolist()
    handle = fastslide.FastSlide.from_file_path(path, cache=64 * 2**20)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda origin: handle.read_region(tuple(origin), 0, (TILE_PX, TILE_PX)).numpy(), origins))
        handle.close()

    return run


def microtome_tiles(path: Path, factor: int, threads: int) -> Run:
    """Open a slide with microtome-wsi; return what reads its stored tiles in batches."""
    del factor
    import microtome

    handle = microtome.open(str(path))
    width, height = (-(-side // TILE_PX) for side in handle.dimensions)
    indices = list(range(width * height))

    def run() -> None:
        for start in range(0, len(indices), BATCH):
            handle.read_batch(0, indices[start : start + BATCH], threads)

    return run


COMPETITORS = {"fastslide": fastslide_tiles, "microtome": microtome_tiles}
"""Further readers by name."""


def can_read(tiles: Callable[[Path, int, int], Run], path: Path) -> bool:
    """Return whether a reader is installed and takes a slide."""
    try:
        tiles(path, 1, 1)
    except (ImportError, ValueError, RuntimeError) as error:
        print(f"{path.name}: left out: {error}", file=sys.stderr)
        return False
    return True


def bare_decode(path: Path, factor: int, threads: int) -> Run:
    """Read every stored tile's bytes; return what decodes each once and drops it."""
    del factor
    with tifffile.TiffFile(path) as tiff, path.open("rb") as file:
        page = tiff.pages.first
        tables, colours = page.jpegtables, "YCBCR" if page.photometric == 6 else "RGB"
        stored = []
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            stored.append(file.read(count))

    def decode(data: bytes) -> None:
        imagecodecs.jpeg8_decode(data, tables=tables, colorspace=colours, outcolorspace="RGB")

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, stored))

    return run


@dataclass(frozen=True)
class Times:
    """Seconds of one side."""

    wall_s: float
    cpu_s: float


def cpu_seconds() -> float:
    """Return the CPU time of this process and the children it waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def timed(run: Run) -> Times:
    """Run and return how long it took."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return Times(time.perf_counter() - wall, cpu_seconds() - cpu)


def reading(passes: int, prepare: Callable[[Path, int, int], Run], path: Path, factor: int, threads: int) -> Times:
    """Time several passes over a slide; it is opened anew for each, so that no cache is warm, and outside the time."""
    turns = [timed(prepare(path, factor, threads)) for _ in range(passes)]
    return Times(sum(turn.wall_s for turn in turns), sum(turn.cpu_s for turn in turns))


def interleaved(sides: dict[str, Callable[[], Times]], repeats: int) -> dict[str, Times]:
    """Return the medians of each side; the sides take turns, the first turn does not count."""
    turns: dict[str, list[Times]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            found = run()
            if turn:
                turns[name].append(found)
    return {
        name: Times(statistics.median(t.wall_s for t in some), statistics.median(t.cpu_s for t in some))
        for name, some in turns.items()
    }


def bench_reading(path: Path, repeats: int) -> list[Row]:
    """Measure figures 1 and 2; the ratios are of CPU time, which other work on the machine disturbs least."""
    rows: list[Row] = []
    for case, factor in (("native", 1), ("half", 2)):
        with open_slide(path) as slide:
            one_pass_mpx = whole_grid(slide, factor).n_tiles * (TILE_PX * factor) ** 2 / 1e6
        passes = max(1, round(LEAST_MPX / one_pass_mpx))  # of small slides, or the clock's steps would be measured
        for threads in (1, 2):
            sides = {"loop": openslide_tiles, "eosin": eosin_tiles}
            if factor == 1:
                sides["decode"] = bare_decode
                sides |= {name: tiles for name, tiles in COMPETITORS.items() if can_read(tiles, path)}
            runs = {name: partial(reading, passes, side, path, factor, threads) for name, side in sides.items()}
            found = interleaved(runs, repeats)
            for name, times in found.items():
                mpx_per_s = passes * one_pass_mpx / times.wall_s
                rows.append(row(case, path.name, name, threads, times, "level-0 Mpx/s", mpx_per_s))
            eosin = found.pop("eosin")
            for name, times in found.items():
                ratio = times.cpu_s / eosin.cpu_s
                rows.append(row(case, path.name, f"eosin/{name}", threads, None, "times (CPU)", ratio))
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
            rows.append(row("error", path.name, f"{factor}x", 1, None, "mean grey levels", float(np.mean(errors))))
    handle.close()
    return rows


def giant(side_px: int, n_levels: int) -> bytes:
    """Return a BigTIFF of 0.25 µm/px whose tile tables point at two shared JPEG tiles a level."""
    source = Path(__file__).parents[1] / "tests" / "wsi" / "conftest.py"
    spec = importlib.util.spec_from_file_location("giants", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return bytes(module.sparse_bigtiff(side_px, 0.25, n_levels))


TILE_CHILD = """
import sys, time
from pathlib import Path
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
from eosin.wsi._quality import QualityLimits
from eosin.wsi._slide_file import SlideFile
path, job, patch, overlap, blur = sys.argv[1:]
start = time.perf_counter()
slides = [SlideFile(Path(path), "giant")]
limits = QualityLimits(blur=bool(int(blur)))
tiles = TissueTiles(Tiling(patch_size=int(patch), overlap=int(overlap)), quality=limits)
report = tile_slides(slides, JobFolder(Path(job)), tiles)
assert report.records[0].status == "ok", report
seconds, cpu = time.perf_counter() - start, time.process_time()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, cpu, int(peak.split()[1]) / 1024, report.records[0].message.split()[0])
"""


def tile_in_child(
    path: Path, job: Path, *, patch_px: int = TILE_PX, overlap_px: int = 0, blur: bool = False
) -> tuple[Times, float, int]:
    """Tile one slide in a process of its own; return times, peak memory in MB and the number of tiles."""
    command = [sys.executable, "-c", TILE_CHILD, str(path), str(job), str(patch_px), str(overlap_px), str(int(blur))]
    ended = subprocess.run(command, capture_output=True, check=True, text=True)
    wall, cpu, megabytes, n_tiles = map(float, ended.stdout.split())
    return Times(wall, cpu), megabytes, int(n_tiles)


def bench_giants(folder: Path) -> list[Row]:
    """Measure figure 3."""
    rows: list[Row] = []
    for name, n_levels in (("pyramid", 5), ("single level", 1)):
        path = folder / f"{n_levels}.tiff"
        path.write_bytes(giant(100_000, n_levels))
        times, megabytes, _ = tile_in_child(path, folder / f"job{n_levels}")
        rows.append(row("giant", f"100,000 px {name}", "eosin tile", 1, times, "peak MB", megabytes))
    return rows


def bench_quality(folder: Path) -> list[Row]:
    """Measure the scores of 200,000 tiles."""
    path = folder / "quality.tiff"
    path.write_bytes(giant(100_000, 5))
    rows: list[Row] = []
    for patch_px, overlap_px in TILINGS:
        for side, blur in (("without blur", False), ("with blur", True)):
            times, megabytes, n_tiles = tile_in_child(
                path, folder / f"{side} {patch_px}", patch_px=patch_px, overlap_px=overlap_px, blur=blur
            )
            rows.append(row("quality", f"{n_tiles} tiles of {patch_px} px", side, 2, times, "peak MB", megabytes))
    return rows


def bench_cohort(folder: Path, clam: Path | None, clam_python: str) -> list[Row]:
    """Measure figure 4."""
    eosin = [str(Path(sys.executable).with_name("eosin")), "tile"]
    sides = {
        "eosin tile": [*eosin, "{slides}", "--job", "{out}"],
        "eosin tile, 2 workers": [*eosin, "{slides}", "--workers", "2", "--job", "{out}"],
        "eosin tile at 16 µm/px": [*eosin, "{slides}", "--set", "tissue.mpp=16", "--job", "{out}"],
        "eosin tile at 16 µm/px, 2 workers": [
            *eosin, "{slides}", "--set", "tissue.mpp=16", "--workers", "2", "--job", "{out}",
        ],
    }  # fmt: skip
    if clam is not None:
        script = [clam_python, str(clam / "create_patches_fp.py"), "--source", "{slides}", "--save_dir", "{out}"]
        sides["create_patches_fp"] = [*script, "--patch_size", "512", "--step_size", "512", "--seg", "--patch"]
    rows: list[Row] = []
    unit = "slides per minute"
    seconds: dict[str, list[Times]] = {name: [] for name in sides}
    for copies in COPIES:
        slides = folder / f"cohort{copies}"
        slides.mkdir()
        for side in COHORT_SIDES_PX:
            for copy in range(copies):
                (slides / f"{side}-{copy}.tiff").write_bytes(giant(side, 5))
        runs = {name: partial(from_shell, command, slides, folder, clam) for name, command in sides.items()}
        for name, found in interleaved(runs, 2).items():
            seconds[name].append(found)
            n_slides = copies * len(COHORT_SIDES_PX)
            label = f"{n_slides} slides of 40,000 to 100,000 px"
            rows.append(row("cohort", label, name, 2, found, unit, 60 * n_slides / found.wall_s))
        shutil.rmtree(slides)
    more = (COPIES[1] - COPIES[0]) * len(COHORT_SIDES_PX)
    for name, (few, many) in seconds.items():
        one = Times((many.wall_s - few.wall_s) / more, (many.cpu_s - few.cpu_s) / more)
        rows.append(row("cohort", "further slide", name, 2, one, unit, 60 / one.wall_s))
    return rows


def from_shell(command: list[str], slides: Path, folder: Path, place: Path | None) -> Times:
    """Time a command line with a fresh output folder."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    filled = [part.format(slides=slides, out=out) for part in command]
    where = place if "create_patches_fp.py" in command[1] else None
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    kept["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")  # as after an installation, on both sides
    return timed(lambda: subprocess.run(filled, check=True, capture_output=True, cwd=where, env=kept))


def bench_overlap(folder: Path) -> list[Row]:
    """Measure how well planted tissue is found where somebody drew on every slide."""
    options = Cohort(n_slides=16, pen_fraction=1.0, seed=5)
    make_cohort(folder / "inked", options)
    overlaps = []
    for plan in plan_cohort(options):
        with open_slide(folder / "inked" / "slides" / f"{plan.slide_id}.tiff") as slide:
            mask = find_tissue(slide)
        layout = lay_out(plan.size_um, tumour_fraction=plan.tumour_fraction, rng=plan.rng("layout"))
        planted = layout.resized(layout.tissue, mask.px0_per_cell[0] * mask.slide_mpp) > 0
        height, width = (min(sides) for sides in zip(planted.shape, mask.mask.shape, strict=True))
        found, truth = mask.mask[:height, :width], planted[:height, :width]
        overlaps.append(float((found & truth).sum() / (found | truth).sum()))
    named = {"mean": statistics.mean(overlaps), "least": min(overlaps)}
    label = f"{len(overlaps)} painted slides with pen"
    return [row("overlap", label, name, 1, None, "IoU", value) for name, value in named.items()]


def row(case: str, slide: str, side: str, threads: int, times: Times | None, unit: str, value: float) -> Row:
    """Return one line of the table."""
    return {
        "case": case, "slide": slide, "side": side, "threads": threads,
        "wall_s": round(times.wall_s, 3) if times else "", "cpu_s": round(times.cpu_s, 3) if times else "",
        "value": round(value, 3), "unit": unit,
    }  # fmt: skip


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["reading", "giant", "cohort", "overlap", "quality"])
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases in the table")
    parser.add_argument("--slide", type=Path, action="append", default=[], help="further JPEG slides for `reading`")
    parser.add_argument("--side", type=int, default=8192, help="level-0 pixels of the painted slide")
    parser.add_argument("--repeats", type=int, default=3)
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
            rows += bench_cohort(folder, options.clam, options.clam_python)
        if "overlap" in options.cases:
            rows += bench_overlap(folder)
        if "quality" in options.cases:
            rows += bench_quality(folder)
    finally:
        shutil.rmtree(folder)
    where = f"{platform.machine()}, {os.cpu_count()} cores, openslide {openslide.__library_version__}"
    table = [{**line, "machine": where} for line in rows]
    if options.append and options.out.exists():
        measured = {(line["case"], line["slide"]) for line in table}
        with options.out.open(newline="") as file:
            table = [line for line in csv.DictReader(file) if (line["case"], line["slide"]) not in measured] + table
    options.out.parent.mkdir(exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    for line in rows:
        print(*line.values(), sep="\t")


if __name__ == "__main__":
    main()

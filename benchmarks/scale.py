"""How long commands take that go over all files of a cohort: time must grow with their number, not with its square.

Each number of slides gets a job folder with coordinates and features of 4 tiles per slide. Measured: `verify` of the
job, `export` to TRIDENT's layout, `import` of what was exported, and the list of slides of a folder of as many empty
pictures. ``per_slide_ms`` is the time divided by the number; ``growth`` compares it with that of the smallest number:
1 is linear.

Run: ``python benchmarks/scale.py --slides 100 1000 20000 --out benchmarks/results/scale.csv``
"""

import argparse
import csv
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.features._verify import verify_job
from eosin.features.interop import ImportOptions, export_bag, find_files, import_file
from eosin.wsi._coordinates import write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import find_slides

TILING = Tiling(mpp=0.5, patch_size=256)
GRID = TileGrid(np.array([[0, 0], [256, 0], [0, 256], [256, 256]], np.int64), 256, TILING, (2048, 2048), 0.5)
SPEC = FeatureSpec(encoder="he_texture", dim=8, mpp=0.5, patch_size=256)


def make_job(folder: Path, n_slides: int) -> JobFolder:
    """Write coordinates and features of so many slides, and an empty picture of each."""
    job, rows = JobFolder(folder / "job"), np.ones((4, SPEC.dim), np.float32)
    (folder / "slides").mkdir(parents=True)
    for number in range(n_slides):
        name = f"S{number:06d}"
        write_grid(job.patches(TILING.folder, name), GRID, slide_id=name, mpp_source="user", fingerprint="f")
        write_bag(job.features(TILING.folder, SPEC.encoder, name), FeatureBag(rows, SPEC, name, GRID))
        (folder / "slides" / f"{name}.tiff").touch()
    return job


def export_all(job: JobFolder, out: Path) -> None:
    """Export every feature file as TRIDENT's."""
    for path in find_bags(job.features_dir(TILING.folder, SPEC.encoder)).values():
        export_bag(path, out, "trident")


def import_all(folder: Path, out: Path) -> None:
    """Import what was exported."""
    for path in find_files([folder / "20x_256px_0px_overlap" / f"features_{SPEC.encoder}"]):
        import_file(path, out, ImportOptions(slide_mpp=0.5))


def seconds(function: Callable[..., object], *args: object) -> float:
    """Return the processor time of a call, children included."""
    before = os.times()
    function(*args)
    return sum(os.times()[:4]) - sum(before[:4])


def measure(n_slides: int) -> Iterator[tuple[str, float]]:
    """Yield each command with its seconds of processor time, which other work on the machine does not lengthen."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder, n_slides)
        yield "verify", seconds(verify_job, job)
        yield "export", seconds(export_all, job, folder / "trident")
        yield "import", seconds(import_all, folder / "trident", folder / "imported")
        yield "list slides", seconds(find_slides, [folder / "slides"])


def main() -> None:
    """Measure and print; write a table with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table: list[list[object]] = [["command", "slides", "seconds", "per_slide_ms", "growth"]]
    print(*table[0], sep=",", flush=True)
    first: dict[str, float] = {}
    for n_slides in arguments.slides:
        for command, spent in measure(n_slides):
            each = 1e3 * spent / n_slides
            first.setdefault(command, each)
            table.append([command, n_slides, f"{spent:.2f}", f"{each:.2f}", f"{each / first[command]:.2f}"])
            print(*table[-1], sep=",", flush=True)
            if arguments.out:
                with arguments.out.open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()

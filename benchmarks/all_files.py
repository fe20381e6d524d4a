"""How long commands take that go over all files of a cohort: time must grow with their number, not with its square.

Each number of slides gets a job folder with coordinates and features of 4 tiles per slide. Measured: `verify` of the
job, `export` to TRIDENT's layout, `import` of what was exported, the list of slides of a folder, and `tile` once more,
which skips every slide. All slides are one small picture under many names, tiled once; nothing is synced to the disk.
``per_slide_ms`` is the time divided by the number; ``growth`` compares it with that of the smallest number:
1 is linear.

Run: ``python benchmarks/all_files.py --slides 100 1000 20000 --out benchmarks/results/all_files.csv``
"""

import argparse
import csv
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.features._verify import verify_job
from eosin.features.interop import ImportOptions, export_bag, find_files, import_file
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides
from eosin.wsi._synthetic import Cohort, make_cohort

TILING = Tiling(mpp=0.5, patch_size=256)
GRID = TileGrid(np.array([[0, 0], [256, 0], [0, 256], [256, 256]], np.int64), 256, TILING, (2048, 2048), 0.5)
SPEC = FeatureSpec(encoder="he_texture", dim=8, mpp=0.5, patch_size=256)


def make_job(folder: Path, n_slides: int) -> JobFolder:
    """Write coordinates, pictures and features of so many slides, which are one slide under other names."""
    job, rows = JobFolder(folder / "job"), np.ones((4, SPEC.dim), np.float32)
    make_cohort(folder / "one", Cohort(n_slides=2, slides_per_patient=1, size_um=(200.0, 200.0)))
    source, _ = find_slides([folder / "one" / "slides"])
    tile_slides([source], job, TILING)
    made = sorted(job.root.rglob(f"{source.slide_id}*"))
    (folder / "slides").mkdir()
    for number in range(n_slides):
        name = f"S{number:06d}"
        os.link(source.path, folder / "slides" / f"{name}.tiff")
        for path in made:
            shutil.copy(path, path.with_name(path.name.replace(source.slide_id, name)))
        write_bag(job.features(TILING.folder, SPEC.encoder, name), FeatureBag(rows, SPEC, name, GRID))
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
    before = _spent()
    function(*args)
    return _spent() - before


def _spent() -> float:
    mine, of_children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + of_children.ru_utime + of_children.ru_stime


def tile_again(job: JobFolder, slides: Path) -> None:
    """Tile slides that are done."""
    report = tile_slides(find_slides([slides]), job, TILING)
    assert {record.status for record in report.records} == {"skipped"}


def measure(n_slides: int, commands: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield each command with its seconds of processor time, which other work on the machine does not lengthen."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder, n_slides)
        steps: dict[str, tuple[Callable[..., object], *tuple[object, ...]]] = {
            "list slides": (find_slides, [folder / "slides"]),
            "tile again": (tile_again, job, folder / "slides"),
            "verify": (verify_job, job),
            "export": (export_all, job, folder / "trident"),
            "import": (import_all, folder / "trident", folder / "imported"),
        }
        for command in commands or steps:
            yield command, seconds(*steps[command])


def main() -> None:
    """Measure and print; write a table with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--only", nargs="+", default=[], metavar="COMMAND", help="`import` needs `export` before it")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.fsync = lambda fd: None  # which is the disk's time, and most of the time that making the files takes
    table: list[list[object]] = [["command", "slides", "seconds", "per_slide_ms", "growth"]]
    print(*table[0], sep=",", flush=True)
    first: dict[str, float] = {}
    for n_slides in arguments.slides:
        for command, spent in measure(n_slides, arguments.only):
            each = 1e3 * spent / n_slides
            first.setdefault(command, each)
            table.append([command, n_slides, f"{spent:.2f}", f"{each:.2f}", f"{each / first[command]:.2f}"])
            print(*table[-1], sep=",", flush=True)
            if arguments.out:
                with arguments.out.open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()

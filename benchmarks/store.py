"""Opening and reading feature files, beside the layouts of other tools, warm cache, each in turns with ours.

Layouts, all of the same float32 values: `eosin` (ours), `trident` (HDF5, one row per chunk), `clam` (HDF5, 32 rows per
chunk), `clam-pt` (torch tensor), `stamp` (HDF5, contiguous), `gzip` (HDF5, 32 rows per chunk, gzip 4). Of ours also
float16, and with every checksum checked.

Measured: `open` until an array or handle can be indexed and its first row is there; `rows` 512 random rows; `all`
every row in memory of our own. The fastest of the repetitions, because other work on the
machine only adds; files are read once before.

Run: ``python benchmarks/store.py --out benchmarks/results/store.csv``
"""

import argparse
import csv
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import read_bag, write_bag
from eosin.wsi._grid import TileGrid, Tiling

SIZES = (1_000, 12_000, 200_000)
DIM = 1024
SAMPLE = 512
COLUMNS = ("machine", "layout", "n", "dim", "megabytes", "task", "milliseconds", "times_eosin")
Reader = Callable[[Path], np.ndarray | h5py.Dataset | torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """One way to keep a bag: how it is written, and how it is opened."""

    name: str
    write: Callable[[Path, np.ndarray], None]
    open: Reader


def write_eosin(path: Path, rows: np.ndarray) -> None:
    """Write our file, with places."""
    n = len(rows)
    origins = np.stack([np.arange(n) % 500, np.arange(n) // 500], axis=1).astype(np.int64) * 256
    grid = TileGrid(origins, 256, Tiling(), (256 * 501, 256 * (n // 500 + 2)), 0.5)
    spec = FeatureSpec(encoder="uni_v1", dim=rows.shape[1], mpp=0.5, patch_size=256)
    write_bag(path, FeatureBag(rows, spec, path.stem, grid))


def write_chunked(rows_per_chunk: int | None, compression: str | None = None) -> Callable[[Path, np.ndarray], None]:
    """Return a writer of an HDF5 layout."""

    def write(path: Path, rows: np.ndarray) -> None:
        chunks = None if rows_per_chunk is None else (rows_per_chunk, rows.shape[1])
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=rows, chunks=chunks, compression=compression)

    return write


def open_hdf5(path: Path) -> h5py.Dataset:
    """Open as the other tools do."""
    return h5py.File(path, "r")["features"]


LAYOUTS = (
    Layout("eosin", write_eosin, lambda path: read_bag(path).features),
    Layout("eosin-checked", write_eosin, lambda path: read_bag(path, verify=True).features),
    Layout("eosin-fp16", lambda path, rows: write_eosin(path, rows.astype(np.float16)), lambda p: read_bag(p).features),
    Layout("trident", write_chunked(1), open_hdf5),
    Layout("clam", write_chunked(32), open_hdf5),
    Layout(
        "clam-pt",
        lambda path, rows: torch.save(torch.from_numpy(rows), path),
        lambda path: torch.load(path, weights_only=True).numpy(),
    ),
    Layout("stamp", write_chunked(None), open_hdf5),
    Layout("gzip", write_chunked(32, "gzip"), open_hdf5),
)


def open_task(layout: Layout, path: Path, _: np.ndarray) -> None:
    """Open and look at the first row."""
    np.asarray(layout.open(path)[0])


def rows_task(layout: Layout, path: Path, sample: np.ndarray) -> None:
    """Open and take some rows."""
    np.asarray(layout.open(path)[sample])


def all_task(layout: Layout, path: Path, _: np.ndarray) -> None:
    """Open and take every row into memory of our own."""
    opened = layout.open(path)
    np.array(opened[:] if isinstance(opened, h5py.Dataset) else opened, copy=not isinstance(opened, h5py.Dataset))


TASKS = {"open": open_task, "rows": rows_task, "all": all_task}


def measure(n: int, folder: Path, repeats: int) -> list[dict[str, object]]:
    """Time every layout in turns with ours, two files at a time so that both stay in memory."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, DIM), dtype=np.float32)
    sample = np.sort(rng.choice(n, min(SAMPLE, n), replace=False))
    times: dict[tuple[str, str], list[float]] = {}
    megabytes: dict[str, float] = {}
    ours, *others = LAYOUTS
    our_path = folder / f"{ours.name}.h5"
    ours.write(our_path, rows)
    for other in others:
        path = folder / f"{other.name}.h5"
        other.write(path, rows)
        for turn in range(repeats + 1):
            for layout, file in ((ours, our_path), (other, path)):
                megabytes[layout.name] = file.stat().st_size / 1e6
                for name, task in TASKS.items():
                    started = time.perf_counter()
                    task(layout, file, sample)
                    if turn:
                        times.setdefault((layout.name, name), []).append(time.perf_counter() - started)
        path.unlink()
    our_path.unlink()
    fastest = {key: min(values) for key, values in times.items()}
    return [
        {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "layout": layout,
            "n": n,
            "dim": DIM,
            "megabytes": round(megabytes[layout], 1),
            "task": task,
            "milliseconds": round(1e3 * seconds, 3),
            "times_eosin": round(seconds / fastest["eosin", task], 2),
        }
        for (layout, task), seconds in fastest.items()
    ]


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.csv")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for n in arguments.sizes for row in measure(n, Path(folder), arguments.repeats)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(row[name] for name in COLUMNS[1:]), sep="\t")


if __name__ == "__main__":
    main()

"""How long training waits for its data: our loop beside a published-style one (a bag per step, chunked HDF5, no cache).

    python benchmarks/training.py --bags 200 --out benchmarks/results/training.csv

Makes synthetic feature files of 2,000 to 20,000 x 1024 (fp16), trains gated attention on all of them and writes slides
per second. ``ours_cached`` keeps bags in memory from the second pass on, ``ours_uncached`` reads its memory maps at
each pass, ``published_style`` reads a gzip-chunked fp32 file of the kind that other tools write, one bag per step.
``published_style_raw`` is the same on our uncompressed files. All compute the same network with the same optimizer, in
fp32, on the number of threads that torch is given; the first pass is left out.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.nn import functional

from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.store import find_bags, read_bag, write_bag
from eosin.mil.bags import PackedBags
from eosin.mil.data import Examples, FeatureFolder
from eosin.mil.methods.abmil import Abmil
from eosin.mil.recipe import Recipe, Training
from eosin.mil.tasks import Classification
from eosin.mil.train import fit

DIM = 1024


def make_files(folder: Path, n_bags: int, smallest: int, largest: int) -> tuple[dict[str, Path], int]:
    """Write feature files and their gzip-chunked twins; return ours by name, and the number of instances."""
    rng = np.random.default_rng(0)
    total = 0
    for number in range(n_bags):
        rows = int(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        features = rng.standard_normal((rows, DIM), dtype=np.float32).astype(np.float16)
        name = f"s{number:03d}"
        write_bag(folder / "ours" / f"{name}.h5", FeatureBag(features, FeatureSpec(encoder="bench", dim=DIM), name))
        (folder / "chunked").mkdir(exist_ok=True)
        with h5py.File(folder / "chunked" / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=features.astype(np.float32), chunks=(32, DIM), compression="gzip")
        total += rows
    return find_bags(folder / "ours"), total


def ours(files: dict[str, Path], device: str, passes: int, cache_bytes: int) -> float:
    """Return seconds per pass of our loop, the first pass left out."""
    bags = FeatureFolder(files, cache_bytes=cache_bytes)
    ids = tuple(files)
    examples = Examples(bags, ids, ids, torch.arange(len(ids)) % 2)
    training = Training(
        epochs=passes, select="last", standardize=False, bags_per_step=8, max_instances_per_step=65536, lr=1e-4
    )
    stamps = [time.perf_counter()]
    fit(
        Recipe(training=training),
        Classification(classes=("a", "b")),
        examples,
        device=device,
        progress=lambda _: stamps.append(time.perf_counter()),
    )
    return float(np.mean(np.diff(stamps)[1:]))


def published_style(read, names: list[str], device: str, passes: int) -> float:
    """Return seconds per pass of a loop that reads, converts and steps one bag after the other, the first left out."""
    torch.manual_seed(0)
    model = Abmil(DIM, 2).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    stamps = [time.perf_counter()]
    for _ in range(passes):
        for number, name in enumerate(names):
            values = torch.from_numpy(np.asarray(read(name), dtype=np.float32)).to(device)
            loss = functional.cross_entropy(
                model(PackedBags.pack([values])).logits, torch.tensor([number % 2], device=device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        stamps.append(time.perf_counter())
    return float(np.mean(np.diff(stamps)[1:]))


def read_chunked(folder: Path):
    """Return a reader of the gzip-chunked files."""

    def read(name: str) -> np.ndarray:
        with h5py.File(folder / "chunked" / f"{name}.h5") as file:
            return file["features"][:]

    return read


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bags", type=int, default=200)
    parser.add_argument("--smallest", type=int, default=2000)
    parser.add_argument("--largest", type=int, default=20000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-gb", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where the files are made; needs 6 GB per 100 bags")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        files, total = make_files(folder, arguments.bags, arguments.smallest, arguments.largest)
        names, device, passes = list(files), arguments.device, arguments.passes
        seconds = {
            "ours_cached": ours(files, device, passes, int(arguments.cache_gb * 2**30)),
            "ours_uncached": ours(files, device, passes, 0),
            "published_style": published_style(read_chunked(folder), names, device, passes),
            "published_style_raw": published_style(lambda n: read_bag(files[n]).features, names, device, passes),
        }
    write(arguments, seconds, total)


def write(arguments: argparse.Namespace, seconds: dict[str, float], total: int) -> None:
    """Write the table."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["loop", "device", "threads", "bags", "instances", "seconds_per_pass", "slides_per_s", "times"])
        for loop, spent in seconds.items():
            rate = arguments.bags / spent
            times = seconds["published_style"] / spent
            place = [arguments.device, torch.get_num_threads(), arguments.bags, total]
            writer.writerow([loop, *place, f"{spent:.2f}", f"{rate:.2f}", f"{times:.2f}"])
            print(loop, f"{spent:.2f} s per pass, {rate:.2f} slides/s, {times:.2f} x published style")


if __name__ == "__main__":
    main()

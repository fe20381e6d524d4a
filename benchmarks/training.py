"""Slides per second of a training pass: our loop beside a published-style one, on the same bags and the same network.

    python benchmarks/training.py make --bags 200 --folder DIR
    python benchmarks/training.py run --folder DIR --precision bf16 --out benchmarks/results/training.csv

`make` writes synthetic bags of 2,000 to 20,000 x 1024 in our layout (float16, contiguous) and as other tools keep them
(float32 in HDF5: ``rows``, a chunk per row; ``gzip``, chunks of 32 rows, compressed). `run` trains gated attention
pooling of CLAM's size (1024 -> 512, gates 256) on blocks of 25 bags and changes the loop after each block, so that all
loops share whatever else the machine does:

- ``cached``: our loop, four bags per step, bags in memory from the second pass on (the pass that is timed);
- ``mapped``: our loop without a cache, memory maps read ahead in a thread;
- ``rows``, ``gzip``: a plain PyTorch loop: open the file, read, step, one bag after the other, as CLAM's does on a CPU.

``mapped`` against ``cached`` is what waiting for data costs us. ``loading`` is the time the plain loops spend reading.
The rest is arithmetic of the network, which no feeding can shorten: with ``fp32`` on both sides little more than the
reading is won; ``bf16`` (ours under autocast, theirs in fp32 as published) shows what a user gets by changing tools.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.store import find_bags, write_bag
from eosin.mil.data import Examples, FeatureFolder
from eosin.mil.recipe import Component, Recipe, Training
from eosin.mil.tasks import Classification
from eosin.mil.train import fit

DIM = 1024
WIDTH, HIDDEN, DROPOUT = 512, 256, 0.25
BLOCK = 25
CACHE_BYTES = 8 * 2**30
FIELDS = [
    "loop", "device", "precision", "threads", "bags", "instances", "seconds_per_pass", "slides_per_s",
    "times_rows", "loading_s",
]  # fmt: skip


class PlainAbmil(nn.Module):
    """Gated attention pooling in plain PyTorch (Ilse et al., ICML 2018; the sizes of CLAM's small model)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(DIM, WIDTH), nn.ReLU(), nn.Dropout(DROPOUT))
        self.value = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Dropout(DROPOUT))
        self.gate = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Sigmoid(), nn.Dropout(DROPOUT))
        self.score = nn.Linear(HIDDEN, 1)
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, bag: Tensor) -> Tensor:
        """Return the logits of one bag, (n, D) -> (1, 2)."""
        h = self.embed(bag)
        weights = self.score(self.value(h) * self.gate(h)).T.softmax(1)
        return self.classifier(weights @ h)


def make_files(folder: Path, n_bags: int, smallest: int, largest: int) -> None:
    """Write each bag in three layouts."""
    rng = np.random.default_rng(0)
    for layout in ("rows", "gzip"):
        (folder / layout).mkdir(parents=True, exist_ok=True)
    for number in range(n_bags):
        n = int(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        features = rng.standard_normal((n, DIM), dtype=np.float32).astype(np.float16)
        name = f"s{number:03d}"
        write_bag(folder / "ours" / f"{name}.h5", FeatureBag(features, FeatureSpec(encoder="bench", dim=DIM), name))
        wide = features.astype(np.float32)
        with h5py.File(folder / "rows" / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=wide, chunks=(1, DIM), maxshape=(None, DIM))
        with h5py.File(folder / "gzip" / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=wide, chunks=(32, DIM), compression="gzip", compression_opts=1)


class Ours:
    """Our loop over one block after another."""

    def __init__(self, files: dict[str, Path], arguments: argparse.Namespace, *, cache_bytes: int) -> None:
        self.files, self.arguments, self.cache_bytes = files, arguments, cache_bytes
        self.loading = 0.0

    def block(self, names: list[str]) -> float:
        """Return the seconds of a pass over the block, the first pass left out."""
        bags = FeatureFolder({name: self.files[name] for name in names}, cache_bytes=self.cache_bytes)
        examples = Examples(bags, tuple(names), tuple(names), torch.arange(len(names)) % 2)
        options = {"embed_dims": [WIDTH], "hidden": HIDDEN, "dropout": DROPOUT, "gate_dropout": DROPOUT}
        training = Training(
            epochs=3, select="last", standardize=False, bags_per_step=4, max_instances_per_step=32768, lr=1e-4
        )
        stamps = [time.perf_counter()]
        fit(
            Recipe(aggregator=Component(name="abmil", options=options), training=training),
            Classification(classes=("a", "b")),
            examples,
            device=self.arguments.device,
            precision=self.arguments.precision,
            device_cache_bytes=self.cache_bytes,
            progress=lambda _: stamps.append(time.perf_counter()),
        )
        return float(np.median(np.diff(stamps)[1:]))


class Plain:
    """The published-style loop over one block after another."""

    def __init__(self, folder: Path, device: str) -> None:
        torch.manual_seed(0)
        self.folder, self.device = folder, device
        self.model = PlainAbmil().to(device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.loading = 0.0

    def block(self, names: list[str]) -> float:
        """Return the median seconds of two passes over the block."""
        seconds, loading = zip(*(self._pass(names) for _ in range(2)), strict=True)
        self.loading += float(np.median(loading))
        return float(np.median(seconds))

    def _pass(self, names: list[str]) -> tuple[float, float]:
        started, loading = time.perf_counter(), 0.0
        for number, name in enumerate(names):
            opened = time.perf_counter()
            with h5py.File(self.folder / f"{name}.h5") as file:
                bag = torch.from_numpy(file["features"][:])
            loading += time.perf_counter() - opened
            logits = self.model(bag.to(self.device))
            loss = functional.cross_entropy(logits, torch.tensor([number % 2], device=self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
        return time.perf_counter() - started, loading


def measure(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return seconds per pass and seconds of it spent loading, by loop."""
    files = find_bags(arguments.folder / "ours")
    makers: dict[str, Callable[[], Ours | Plain]] = {
        "cached": lambda: Ours(files, arguments, cache_bytes=CACHE_BYTES),
        "mapped": lambda: Ours(files, arguments, cache_bytes=0),
        "rows": lambda: Plain(arguments.folder / "rows", arguments.device),
        "gzip": lambda: Plain(arguments.folder / "gzip", arguments.device),
    }
    loops = {name: makers[name]() for name in arguments.loops}
    seconds = dict.fromkeys(loops, 0.0)
    names = list(files)[: arguments.bags]
    for start in range(0, len(names), BLOCK):
        for name, loop in loops.items():
            seconds[name] += loop.block(names[start : start + BLOCK])
    return {name: (seconds[name], loop.loading) for name, loop in loops.items()}


def write(arguments: argparse.Namespace, found: dict[str, tuple[float, float]]) -> None:
    """Add the lines to the table."""
    files = list(find_bags(arguments.folder / "ours").values())[: arguments.bags]
    total = sum(FeatureFolder({path.stem: path}).length(path.stem) for path in files)
    is_new = not arguments.out.exists()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for loop, (spent, loading) in found.items():
            precision = arguments.precision if loop in ("cached", "mapped") else "fp32"
            line = {
                "loop": loop, "device": arguments.device, "precision": precision, "threads": torch.get_num_threads(),
                "bags": len(files), "instances": total, "seconds_per_pass": f"{spent:.2f}",
                "slides_per_s": f"{len(files) / spent:.2f}",
                "times_rows": f"{found['rows'][0] / spent:.2f}" if "rows" in found else "",
                "loading_s": f"{loading:.2f}" if loading else "",
            }  # fmt: skip
            writer.writerow(line)
            print(*(f"{name}={value}" for name, value in line.items()))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("--folder", type=Path, required=True, help="where the bags are; 9 GB per 100")
    parser.add_argument("--bags", type=int, default=200)
    parser.add_argument("--smallest", type=int, default=2000)
    parser.add_argument("--largest", type=int, default=20000)
    parser.add_argument("--loops", nargs="+", default=["cached", "mapped", "rows", "gzip"])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.csv"))
    arguments = parser.parse_args()
    if arguments.what == "make":
        make_files(arguments.folder, arguments.bags, arguments.smallest, arguments.largest)
        return
    write(arguments, measure(arguments))


if __name__ == "__main__":
    main()

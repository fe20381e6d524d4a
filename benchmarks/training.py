"""Slides per second of a training pass: our loop beside a published-style one, on the same bags and the same network.

    python benchmarks/training.py make --bags 200 --folder DIR
    python benchmarks/training.py run --folder DIR --parts PARTS.csv --minutes 4.5   # again until all blocks are done
    python benchmarks/training.py table --parts PARTS.csv --out benchmarks/results/training.csv

`make` writes synthetic bags of 2,000 to 20,000 x 1024 in our layout (float16, contiguous) and as other tools keep
them (float32 in HDF5: ``rows``, a chunk per row; ``gzip``, chunks of 32 rows, compressed, the first 25 bags). `run`
trains gated attention pooling of CLAM's size (1024 -> 512, gates 256) on blocks of 25 bags and changes the loop
within each block, so that all loops share whatever else the machine does; a block that is in PARTS is done. All files
of a block are read once before it, so they come from the page cache: a cohort that does not fit into memory adds its
disk's time to every loop, twice as much to those that read float32.

- ``cached``: our loop, four bags per step, bags in memory after their first use (a pass after that is timed);
- ``mapped``: our loop without a cache, memory maps read ahead in a thread;
- ``rows``, ``gzip``: a plain PyTorch loop: open the file, read, step, one bag after the other, as CLAM's does on a CPU;
  fp32 as published, ``rows`` also under bf16 autocast.

``mapped`` against ``cached`` is what waiting for data costs us. ``loading_s`` is what the plain loops spend reading.
``gemm_s`` is what the matrix products of a pass take alone, at the rate of the largest of them on this machine: no
feeding can go below. ``times_rows`` divides by ``rows`` in fp32, ``times_same`` by ``rows`` in the same precision.
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

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.kernels._products import affine
from eosin.kernels._rates import processor
from eosin.mil._data import Examples, FeatureFolder
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._train import fit
from eosin.mil.tasks._classification import Classification

DIM = 1024
WIDTH, HIDDEN, DROPOUT = 512, 256, 0.25
BLOCK = 25
CACHE_BYTES = 8 * 2**30
GZIP_BAGS = 25
LOOPS = ["rows-fp32", "cached-fp32", "mapped-fp32", "gzip-fp32", "rows-bf16", "cached-bf16", "mapped-bf16"]
PARTS = [
    "block", "loop", "precision", "device", "threads", "bags", "instances", "seconds", "loading_s", "gemm_s",
    "processor",
]  # fmt: skip
FIELDS = [
    "loop", "precision", "device", "threads", "bags", "instances", "seconds_per_pass", "slides_per_s", "times_rows",
    "times_same", "loading_s", "gemm_s", "processor",
]  # fmt: skip
FLOPS_PER_INSTANCE = 2 * (2 * DIM * WIDTH + 3 * 2 * WIDTH * HIDDEN)  # two products of the embedding, three of each gate


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
    """Write each bag in our layout and in ``rows``, the first `GZIP_BAGS` in ``gzip``, too; what is there stays."""
    for layout in ("rows", "gzip"):
        (folder / layout).mkdir(parents=True, exist_ok=True)
    for number in range(n_bags):
        name = f"s{number:03d}"
        if (folder / "ours" / f"{name}.h5").exists():
            continue
        rng = np.random.default_rng(number)
        n = int(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        features = rng.standard_normal((n, DIM), dtype=np.float32).astype(np.float16)
        wide = features.astype(np.float32)
        with h5py.File(folder / "rows" / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=wide, chunks=(1, DIM), maxshape=(None, DIM))
        if number < GZIP_BAGS:
            with h5py.File(folder / "gzip" / f"{name}.h5", "w") as file:
                file.create_dataset("features", data=wide, chunks=(32, DIM), compression="gzip", compression_opts=1)
        write_bag(folder / "ours" / f"{name}.h5", FeatureBag(features, FeatureSpec(encoder="bench", dim=DIM), name))


class Ours:
    """Our loop."""

    def __init__(self, folder: Path, device: str, precision: str, *, cache_bytes: int) -> None:
        self.files = find_bags(folder / "ours")
        self.device, self.precision, self.cache_bytes = device, precision, cache_bytes

    def block(self, names: list[str]) -> tuple[float, float]:
        """Return the seconds of a pass over the block, its bags having been used before as in a second pass."""
        bags = FeatureFolder({name: self.files[name] for name in names}, cache_bytes=self.cache_bytes)
        for name in names:
            bags.load(name)
        self._pass(bags, sorted(names, key=bags.length)[:2])
        return self._pass(bags, names), 0.0

    def _pass(self, bags: FeatureFolder, names: list[str]) -> float:
        examples = Examples(bags, tuple(names), tuple(names), torch.arange(len(names)) % 2)
        options = {"embed_dims": [WIDTH], "hidden": HIDDEN, "dropout": DROPOUT, "gate_dropout": DROPOUT}
        training = Training(
            epochs=1, select="last", standardize=False, bags_per_step=4, max_instances_per_step=32768, lr=1e-4
        )
        ends: list[float] = []
        started = time.perf_counter()
        fit(
            Recipe(aggregator=Component(name="abmil", options=options), training=training),
            Classification(classes=("a", "b")),
            examples,
            device=self.device,
            precision=self.precision,
            device_cache_bytes=self.cache_bytes,
            progress=lambda _: ends.append(time.perf_counter()),
        )
        return ends[0] - started


class Plain:
    """The published-style loop."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        torch.manual_seed(0)
        self.folder, self.device = folder, device
        self.autocast = precision == "bf16"
        self.model = PlainAbmil().to(device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def block(self, names: list[str]) -> tuple[float, float]:
        """Return the seconds of a pass over the block, and those of it spent reading."""
        self._step(torch.randn(2000, DIM), 0)
        started, loading = time.perf_counter(), 0.0
        for number, name in enumerate(names):
            opened = time.perf_counter()
            with h5py.File(self.folder / f"{name}.h5") as file:
                bag = torch.from_numpy(file["features"][:])
            loading += time.perf_counter() - opened
            self._step(bag, number % 2)
        return time.perf_counter() - started, loading

    def _step(self, bag: Tensor, label: int) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            logits = self.model(bag.to(self.device))
        loss = functional.cross_entropy(logits.float(), torch.tensor([label], device=self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


def make_loop(name: str, folder: Path, device: str) -> "Ours | Plain":
    """Return a loop by its name and precision."""
    kind, precision = name.split("-")
    if kind in ("rows", "gzip"):
        return Plain(folder / kind, device, precision)
    return Ours(folder, device, precision, cache_bytes=CACHE_BYTES if kind == "cached" else 0)


def gemm_rate(device: str, precision: str) -> float:
    """Return operations per second of a pass's largest product, by the faster library, median of seven."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = (torch.randn(rows, DIM, dtype=dtype, device=device) for rows in (8192, WIDTH))
    ways = [lambda: left @ right.T, lambda: affine(left, right)]
    seconds = min(float(np.median([_seconds(way) for _ in range(8)][1:])) for way in ways)
    return 2 * 8192 * DIM * WIDTH / seconds


def _seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work().sum().item()
    return time.perf_counter() - started


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of a table; none when it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(arguments: argparse.Namespace) -> None:
    """Measure blocks that are not done until the time is over."""
    deadline = time.monotonic() + 60 * arguments.minutes
    lengths = {
        name: FeatureFolder({name: path}).length(name) for name, path in find_bags(arguments.folder / "ours").items()
    }
    names = list(lengths)[: arguments.bags]
    done = {line["block"] for line in read(arguments.parts)}
    rates = {precision: gemm_rate(arguments.device, precision) for precision in ("fp32", "bf16")}
    print({precision: f"{rate / 1e9:.0f} GFLOP/s" for precision, rate in rates.items()}, flush=True)
    longest = 0.0
    for start in range(0, len(names), BLOCK):
        if str(start) in done:
            continue
        started = time.monotonic()
        if started + longest > deadline:
            print("time is over; run again", flush=True)
            return
        block = names[start : start + BLOCK]
        for path in (p for name in block for p in arguments.folder.glob(f"*/{name}.h5")):
            path.read_bytes()
        instances = sum(lengths[name] for name in block)
        lines = []
        for name in arguments.loops:
            if name.startswith("gzip") and start >= GZIP_BAGS:
                continue
            seconds, loading = make_loop(name, arguments.folder, arguments.device).block(block)
            precision = name.split("-")[1]
            lines.append([
                start, name.split("-")[0], precision, arguments.device, torch.get_num_threads(), len(block), instances,
                f"{seconds:.3f}", f"{loading:.3f}", f"{FLOPS_PER_INSTANCE * instances / rates[precision]:.3f}",
                processor(),
            ])  # fmt: skip
            print(*lines[-1], flush=True)
        is_new = not arguments.parts.exists()
        with arguments.parts.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([PARTS] * is_new + lines)
        longest = max(longest, time.monotonic() - started)


def write_table(arguments: argparse.Namespace) -> None:
    """Sum the blocks of each loop."""
    sums: dict[tuple[str, ...], dict[str, float]] = {}
    for line in read(arguments.parts):
        key = tuple(line[name] for name in ("loop", "precision", "device", "threads"))
        found = sums.setdefault(key, dict.fromkeys(("bags", "instances", "seconds", "loading_s", "gemm_s"), 0.0))
        for name in found:
            found[name] += float(line[name])
    rows: dict[tuple[str, str], float] = {}  # seconds by block and precision
    for line in read(arguments.parts):
        if line["loop"] == "rows":
            rows[line["block"], line["precision"]] = float(line["seconds"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for key, found in sums.items():
            spent = found["seconds"]
            mine = [line["block"] for line in read(arguments.parts) if (line["loop"], line["precision"]) == key[:2]]
            published, same = (sum(rows[block, precision] for block in mine) for precision in ("fp32", key[1]))
            line = [
                *key, int(found["bags"]), int(found["instances"]), f"{spent:.1f}", f"{found['bags'] / spent:.2f}",
                f"{published / spent:.2f}", f"{same / spent:.2f}",
                f"{found['loading_s']:.1f}" if found["loading_s"] else "", f"{found['gemm_s']:.1f}",
                next((line.get("processor", "") for line in read(arguments.parts)), ""),
            ]  # fmt: skip
            writer.writerow(line)
            print(*line)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "table"])
    parser.add_argument("--folder", type=Path, help="where the bags are; 16 GB per 200")
    parser.add_argument("--bags", type=int, default=200)
    parser.add_argument("--smallest", type=int, default=2000)
    parser.add_argument("--largest", type=int, default=20000)
    parser.add_argument("--loops", nargs="+", default=LOOPS, choices=[*LOOPS, "gzip-bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=4.5, help="no block is begun that would end later")
    parser.add_argument("--parts", type=Path, default=Path("training_parts.csv"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.csv"))
    arguments = parser.parse_args()
    if arguments.what == "make":
        make_files(arguments.folder, arguments.bags, arguments.smallest, arguments.largest)
    elif arguments.what == "run":
        run(arguments)
    else:
        write_table(arguments)


if __name__ == "__main__":
    main()

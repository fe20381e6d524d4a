"""What a training step costs on packs of small bags, where overheads show: every aggregator, forward and backward.

    python benchmarks/small_bags.py [--names abmil transmil]

Milliseconds of the processor, summed over threads, the median of several steps; no optimizer. Writes
benchmarks/results/small_bags_cpu.csv; rows replace those of the same aggregator and lengths.
"""

import argparse
import csv
import datetime
import statistics
import sys
import time
from pathlib import Path

import torch
from aggregators import OUTPUTS, names

from eosin.kernels._rates import processor
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS

RESULTS = Path(__file__).parent / "results" / "small_bags_cpu.csv"
WIDTH = 166  # of MUSK
PACKS = ((5,) * 8, (4, 7, 2, 40, 12, 3, 9, 5))
WARM_UP, STEPS = 2, 9


def measure(name: str, lengths: tuple[int, ...]) -> tuple[float, float]:
    """Return the median milliseconds forward and backward."""
    torch.manual_seed(0)
    model = AGGREGATORS.build(name, WIDTH, OUTPUTS).train()
    pack = PackedBags.pack([torch.randn(n, WIDTH) for n in lengths])
    times = [_step(model, pack) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    forward, backward = (1e3 * statistics.median(part) for part in zip(*times, strict=True))
    return forward, backward


def _step(model: torch.nn.Module, pack: PackedBags) -> tuple[float, float]:
    begin = time.process_time()
    loss = model(pack).logits.square().sum()
    middle = time.process_time()
    loss.backward()
    end = time.process_time()
    model.zero_grad()
    return middle - begin, end - middle


def row(name: str, lengths: tuple[int, ...]) -> dict[str, object]:
    """Return one line of the table."""
    forward, backward = measure(name, lengths)
    return {
        "aggregator": name,
        "lengths": " ".join(map(str, lengths)),
        "forward_ms": round(forward, 1),
        "backward_ms": round(backward, 1),
        "threads": torch.get_num_threads(),
        "device": processor(),
        "torch": torch.__version__.partition("+")[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write(lines: list[dict[str, object]]) -> None:
    """Put lines into the table in place of those of the same case."""
    table = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            table = {(line["aggregator"], line["lengths"]): line for line in csv.DictReader(file)}
    table |= {(line["aggregator"], line["lengths"]): line for line in lines}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[case] for case in sorted(table))


def main() -> int:
    """Measure the chosen aggregators."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=names(), metavar="NAME")
    for name in parser.parse_args().names or names():
        lines = [row(name, lengths) for lengths in PACKS]
        for line in lines:
            print(*line.values(), flush=True)
        write(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

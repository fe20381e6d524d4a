"""What a GPU's limits allow a method on one large bag, by calculation: products, reading, exponentials and memory.

    python benchmarks/gpu_limits.py [--instances 200000] [--dim 1024]

Operations of all products are counted by torch on a small bag, by the plain definitions, forward and backward, and
scaled by the number of instances. Prints the table of docs/gpu.md.
"""

import argparse

import torch
from gpu_cases import BYTES, EXPONENTIALS, FLOPS
from torch.utils.flop_counter import FlopCounterMode

import eosin.mil.methods  # noqa: F401 (registers)
from eosin import kernels
from eosin.mil._objective import Objective
from eosin.mil._recipe import RECIPES
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Classification

METHODS = ("abmil", "clam_sb", "acmil", "transmil", "mambamil")
SAMPLES = {"mambamil": (32, 64)}  # a scan by its definition takes a step per instance
LONGER = (2048, 4096)
SCANS, CHANNELS, STATES = 4, 1024, 16  # of MambaMIL: two layers of two branches
HALF = 2  # bytes of a number


def operations(method: str, n: int, dim: int) -> float:
    """Return the operations of all products of a training step on a bag of n instances."""
    recipe, task = RECIPES[method], Classification(classes=("a", "b"))
    model = AGGREGATORS.build(recipe.aggregator.name, dim, 2, options=recipe.aggregator.options)
    objective = Objective(recipe, model, task).train()
    bags = PackedBags.pack([torch.randn(n, dim)])
    with kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        total, _, _ = objective(bags, torch.tensor([0]))
        total.backward()
    return float(counter.get_total_flops())


def main() -> None:
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=1024)
    arguments = parser.parse_args()
    n, dim = arguments.instances, arguments.dim
    reading = 2 * n * dim * HALF / BYTES
    print(
        "| method | products, MFLOP an instance | ms of products | ms of reading the bag twice | ms of exponentials |"
    )
    print("| --- | --- | --- | --- | --- |")
    for method in METHODS:
        few, many = SAMPLES.get(method, LONGER)
        each = (operations(method, many, dim) - operations(method, few, dim)) / (many - few)
        scanned = 4.0 * n * SCANS * CHANNELS * STATES / EXPONENTIALS if method == "mambamil" else 0.0
        row = (each / 1e6, 1e3 * each * n / FLOPS, 1e3 * reading, 1e3 * scanned)
        print(f"| {method} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | {row[3]:.1f} |", flush=True)


if __name__ == "__main__":
    main()

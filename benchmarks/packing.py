r"""Does packing pay? PackMIL, and packing alone, beside training on one bag at a time with the same aggregator.

    python benchmarks/packing.py --lengths panda brca --parts seconds --out benchmarks/results/packing.csv
    python benchmarks/packing.py --lengths panda brca --parts scores --out benchmarks/results/packing.csv

Bags have lengths drawn like those of prostate biopsies (``panda``: median 500, a long tail) or of breast resections
(``brca``: median 5,000, up to 20,000). All ways see the same bags for the same number of passes through eosin's own
loop, one after the other, in several rounds with other bags and seeds.

- ``one_by_one``: an optimizer step per bag, as most published code.
- ``packed``: the same network and objective, bags packed into one step. There are fewer steps in as many passes, so the
  learning rate is higher, in proportion to the bags of a step, after two passes of warm-up. ``packed_same_rate`` is
  without that, to show what it is for.
- ``packmil``: the paper's settings for such bags; ``packmil_main`` is without its residual branch.

``seconds``: the published network on 512 features; the median over passes and rounds, the first pass of each left out.
Two more columns explain them: ``products_share`` is the part of a pass that torch's profiler finds in matrix products,
which no packing can save, and ``operations_per_step`` are the calls that a GPU would have to be given for each step.

``scores``: AUC and accuracy on new bags, mean and standard deviation over the rounds, of a narrow network on 64
features, which can be trained for long enough. Positive bags hold a signal in 0.2 to 5 % of their instances, and a
tenth of all labels is wrong, as graders disagree, which keeps a perfect model at an AUC of 0.90. `SCORED` was chosen
with one-bag-at-a-time training and another seed, and once made easier after all ways had failed in one of the rounds.
``learnt`` counts the rounds with a test AUC above 0.7; between there and chance hardly any training ends.

A step packs a few bags, not the paper's 128 or 32, because these cohorts are small.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted import planted_signal
from tables import read_table, write_table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.mil._data import Examples
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._train import fit
from eosin.mil.methods.packmil import NETWORKS, PRESETS
from eosin.mil.tasks._classification import Classification

TASK = Classification(classes=("0", "1"))
PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "aten::convolution_backward",
    "aten::_slow_conv2d_backward",
)  # fmt: skip
LENGTHS = {"panda": (500, 0.7, 60, 4000), "brca": (5000, 0.7, 400, 20000)}  # median, spread of the log, ends


@dataclass(frozen=True)
class Size:
    """How many bags of which width, how they are drawn, and how long training lasts.

    Attributes
    ----------
    train, test : int
    dim, width : int
        Of the features and of the network.
    epochs, per_step : int
        Passes, and bags that are packed into a step.
    shift : float
        Strength of the signal, see `benchmarks/planted.py`.
    rate : float
        Learning rate of one bag per step.
    """

    train: int
    test: int
    dim: int
    width: int
    epochs: int
    per_step: int
    shift: float = 1.0
    rate: float = 5e-4


FRACTION, WRONG = (0.002, 0.05), 0.1
WARM_UP, LEARNT = 2.0, 0.7
TIMED = {
    "panda": Size(train=96, test=2, dim=512, width=512, epochs=4, per_step=8),
    "brca": Size(train=24, test=2, dim=512, width=512, epochs=4, per_step=4),
}
SCORED = {
    "panda": Size(train=128, test=400, dim=64, width=64, epochs=20, per_step=8, shift=1.5),
    "brca": Size(train=40, test=150, dim=64, width=64, epochs=20, per_step=4, shift=1.5),
}


@dataclass(frozen=True)
class Measured:
    """What one training leaves: seconds of each pass but the first, AUC and accuracy on the test bags."""

    seconds: list[float]
    auc: float
    accuracy: float


def draw_length(name: str) -> Callable[[torch.Generator], int]:
    """Return what draws the length of a bag."""
    median, spread, least, most = LENGTHS[name]

    def draw(generator: torch.Generator) -> int:
        length = math.exp(math.log(median) + spread * float(torch.randn((), generator=generator)))
        return round(min(max(length, least), most))

    return draw


def ways(lengths: str, size: Size) -> dict[str, Recipe]:
    """Return the recipe of each way of training."""
    network = NETWORKS["abmil"] | {"embed_dims": (size.width,)}
    plain = Component(name="abmil", options=network)
    reduced = {"host": "abmil", "host_options": network, "factor": 4}
    aggregator = plain if lengths == "panda" else Component(name="downsampled", options=reduced)
    settings = dict(PRESETS[lengths]) | {"labels": "classes"}

    def recipe(
        component: Component,
        options: dict[str, object] | None,
        bags: int = size.per_step,
        *,
        faster: int = size.per_step,
    ) -> Recipe:
        training = Training(
            optimizer="adam",
            lr=size.rate * faster,
            warmup=WARM_UP if faster > 1 else 0.0,
            weight_decay=1e-5,
            epochs=size.epochs,
            bags_per_step=bags,
            select="last",
        )
        strategy = Component(name="supervised") if options is None else Component(name="packmil", options=options)
        return Recipe(aggregator=component, strategy=strategy, training=training)

    return {
        "one_by_one": recipe(plain, None, 1, faster=1),
        "packed_same_rate": recipe(plain, None, faster=1),
        "packed": recipe(plain, None),
        "packmil": recipe(aggregator, settings),
        "packmil_main": recipe(aggregator, settings | {"residual_weight": 0.0}),
    }


def measure(recipe: Recipe, train: Examples, test: Examples, device: str) -> Measured:
    """Train once."""
    stamps = [time.perf_counter()]
    fitted = fit(recipe, TASK, train, device=device, progress=lambda _: stamps.append(time.perf_counter()))
    outputs = predict_outputs(fitted.model, TASK, test.bags, test.ids)
    metrics = TASK.metrics(outputs, test.targets.numpy())
    return Measured(list(np.diff(stamps)[1:]), float(metrics["auc"]), float(metrics["accuracy"]))


class Operations(TorchDispatchMode):
    """Counts the calls that compute something; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def products_share(recipe: Recipe, train: Examples, device: str) -> float:
    """Return the share of matrix products in a pass."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        fit(lasting(recipe, 1), TASK, train, device=device)
    events = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(events.get(name, 0.0) for name in PRODUCTS) / sum(events.values())


def operations_per_step(recipe: Recipe, train: Examples, device: str) -> float:
    """Return how many operations a step is, from what a second pass adds."""
    counts = []
    for epochs in (1, 2):
        with Operations() as operations:
            fit(lasting(recipe, epochs), TASK, train, device=device)
        counts.append(operations.count)
    return (counts[1] - counts[0]) / -(-len(train) // recipe.training.bags_per_step)


def lasting(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe with another number of passes."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": epochs})})


def draw(lengths: str, size: Size, seed: int) -> tuple[Examples, Examples]:
    """Return bags to train on and to test on."""
    train, test = (
        planted_signal(
            number,
            part=part,
            draw_length=draw_length(lengths),
            dim=size.dim,
            shift=size.shift,
            fraction=FRACTION,
            seed=seed,
        ).examples
        for part, number in (("train", size.train), ("test", size.test))
    )
    return with_wrong(train, seed), with_wrong(test, seed)


def with_wrong(examples: Examples, seed: int) -> Examples:
    """Return the same bags with wrong labels among them, as many of either class."""
    generator = torch.Generator().manual_seed(seed)
    targets = examples.targets.clone()
    for label in (0, 1):
        rows = torch.nonzero(examples.targets == label)[:, 0]
        targets[rows[torch.randperm(len(rows), generator=generator)[: round(WRONG * len(rows))]]] = 1 - label
    return replace(examples, targets=targets)


def rounds(lengths: str, size: Size, arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """Train every way once per round."""
    recipes = ways(lengths, size)
    found: dict[str, list[Measured]] = {name: [] for name in arguments.ways}
    for seed in range(arguments.rounds):
        train, test = draw(lengths, size, seed)
        for name in arguments.ways:
            seeded = recipes[name].training.model_copy(update={"seed": seed})
            last = measure(recipes[name].model_copy(update={"training": seeded}), train, test, arguments.device)
            found[name].append(last)
            print(
                lengths,
                name,
                f"{np.median(last.seconds):.2f} s, AUC {last.auc:.3f}, accuracy {last.accuracy:.3f}",
                flush=True,
            )
    return found


def seconds(lengths: str, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the columns about time, for each way."""
    size = TIMED[lengths]
    found = rounds(lengths, size, arguments)
    train, _ = draw(lengths, size, arguments.rounds - 1)
    thin_size = replace(size, dim=8, width=8)  # as many operations, in no time
    thin, thin_recipes = draw(lengths, thin_size, 0)[0], ways(lengths, thin_size)
    spent = {name: float(np.median([s for one in found[name] for s in one.seconds])) for name in found}
    columns = {}
    for name, recipe in ways(lengths, size).items():
        if name not in found:
            continue
        share = products_share(recipe, train, arguments.device)
        operations = operations_per_step(thin_recipes[name], thin, arguments.device)
        columns[name] = {
            "threads": f"{torch.get_num_threads()}",
            "timed_bags": f"{len(train)}",
            "timed_instances": f"{sum(train.bags.length(bag) for bag in train.ids)}",
            "bags_per_step": f"{recipe.training.bags_per_step}",
            "seconds_per_pass": f"{spent[name]:.3f}",
            "share_of_one_by_one": f"{spent[name] / spent['one_by_one']:.2f}",
            "products_share": f"{share:.2f}",
            "operations_per_step": f"{operations:.0f}",
        }
    return columns


def scores(lengths: str, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the columns about what was learnt, for each way."""
    size = SCORED[lengths]
    recipes, columns = ways(lengths, size), {}
    for name, measured in rounds(lengths, size, arguments).items():
        aucs, accuracies = ([getattr(one, part) for one in measured] for part in ("auc", "accuracy"))
        columns[name] = {
            "scored_bags": f"{size.train}",
            "passes": f"{size.epochs}",
            "rounds": f"{len(measured)}",
            "rate": f"{recipes[name].training.lr:g}",
            "learnt": f"{sum(auc > LEARNT for auc in aucs)}",
            "test_auc": f"{np.mean(aucs):.3f}",
            "test_auc_sd": f"{np.std(aucs, ddof=1):.3f}",
            "test_accuracy": f"{np.mean(accuracies):.3f}",
            "test_accuracy_sd": f"{np.std(accuracies, ddof=1):.3f}",
        }
    return columns


def main() -> None:
    """Run the command line; what else is in the file stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--parts", nargs="+", choices=["seconds", "scores"], default=["seconds", "scores"])
    parser.add_argument(
        "--ways", nargs="+", default=["one_by_one", "packed", "packmil", "packmil_main"], help="or packed_same_rate"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.csv"))
    arguments = parser.parse_args()
    for lengths in arguments.lengths:
        for part in arguments.parts:
            found = (seconds if part == "seconds" else scores)(lengths, arguments)
            merge(arguments.out, lengths, arguments.device, found)


def merge(path: Path, lengths: str, device: str, found: dict[str, dict[str, str]]) -> None:
    """Write columns into the rows of the table that they belong to."""
    table = {(line["lengths"], line["device"], line["way"]): line for line in read_table(path)}
    for way, columns in found.items():
        line = table.setdefault((lengths, device, way), {"lengths": lengths, "device": device, "way": way})
        line.update(columns)
    names = list(dict.fromkeys(name for line in table.values() for name in line))
    write_table(path, [dict.fromkeys(names, "") | line for line in table.values()])


if __name__ == "__main__":
    main()

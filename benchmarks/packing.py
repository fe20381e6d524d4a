r"""Does packing pay? PackMIL, and packing alone, beside training on one bag at a time with the same aggregator.

    python benchmarks/packing.py --lengths panda --out benchmarks/results/packing.csv
    python benchmarks/packing.py --lengths brca --bags 32 --epochs 5 --rounds 1 --per-step 4 --fraction 0.01 \
        --out benchmarks/results/packing.csv

Bags hold a planted signal; their lengths are drawn like those of prostate biopsies (``panda``: median 500, a long tail)
or of breast resections (``brca``: median 5,000, up to 20,000). All ways see the same bags for the same number of passes
through eosin's own loop, one after the other, in several rounds with other seeds; a way's seconds per pass are the
median over passes and rounds, the first pass of each left out, its AUC and accuracy the mean over the rounds.

- ``one_by_one``: an optimizer step per bag, as most published code.
- ``packed``: the same network and objective, bags packed into one step.
- ``packmil``: the paper's settings for such bags; ``packmil_main`` is without its residual branch.

A step packs a few bags, not the paper's 128 or 32, because these cohorts are small.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.mil.data import Examples
from eosin.mil.evaluate import predict_outputs
from eosin.mil.methods.abmil import PRESETS as ABMIL
from eosin.mil.methods.packmil import PRESETS
from eosin.mil.planted import planted_signal
from eosin.mil.recipe import Component, Recipe, Training
from eosin.mil.tasks import Classification
from eosin.mil.train import fit

TASK = Classification(classes=("0", "1"))
LENGTHS = {"panda": (500, 0.7, 60, 4000), "brca": (5000, 0.7, 400, 20000)}  # median, spread of the log, ends


def draw_length(name: str) -> Callable[[torch.Generator], int]:
    """Return what draws the length of a bag."""
    median, spread, least, most = LENGTHS[name]

    def draw(generator: torch.Generator) -> int:
        length = math.exp(math.log(median) + spread * float(torch.randn((), generator=generator)))
        return round(min(max(length, least), most))

    return draw


def ways(lengths: str, epochs: int, rates: tuple[float, float], per_step: int) -> dict[str, Recipe]:
    """Return the recipe of each way of training."""
    single, packed = rates
    plain = Component(name="abmil", options=ABMIL["packmil"])
    reduced = {"host": "abmil", "host_options": ABMIL["packmil"], "factor": 4}
    aggregator = plain if lengths == "panda" else Component(name="downsampled", options=reduced)
    settings = dict(PRESETS[lengths]) | {"labels": "classes"}

    def recipe(component: Component, rate: float, bags: int, options: dict[str, object] | None) -> Recipe:
        training = Training(
            optimizer="adam", lr=rate, weight_decay=1e-5, epochs=epochs, bags_per_step=bags, select="last"
        )
        strategy = Component(name="supervised") if options is None else Component(name="packmil", options=options)
        return Recipe(aggregator=component, strategy=strategy, training=training)

    return {
        "one_by_one": recipe(plain, single, 1, None),
        "packed": recipe(plain, packed, per_step, None),
        "packmil": recipe(aggregator, packed, per_step, settings),
        "packmil_main": recipe(aggregator, packed, per_step, settings | {"residual_weight": 0.0}),
    }


def measure(recipe: Recipe, train: Examples, test: Examples, device: str) -> tuple[list[float], float, float]:
    """Return the seconds of each pass but the first, and AUC and accuracy on the test bags."""
    stamps = [time.perf_counter()]
    fitted = fit(recipe, TASK, train, device=device, progress=lambda _: stamps.append(time.perf_counter()))
    outputs = predict_outputs(fitted.model, TASK, test.bags, test.ids)
    metrics = TASK.metrics(outputs, test.targets.numpy())
    return list(np.diff(stamps)[1:]), float(metrics["auc"]), float(metrics["accuracy"])


def main() -> None:
    """Run the command line; rows of other lengths and devices that are in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=list(LENGTHS), default="panda")
    parser.add_argument("--bags", type=int, default=128, help="to train on; as many again to test")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-step", type=int, default=8, help="bags that are packed into a step")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--shift", type=float, default=1.0)
    parser.add_argument("--fraction", type=float, default=0.02)
    parser.add_argument("--rates", type=float, nargs=2, default=(2e-4, 1e-3), help="one by one, packed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shape = {"dim": arguments.dim, "shift": arguments.shift, "fraction": arguments.fraction}
    drawn = {
        part: planted_signal(arguments.bags, part=part, draw_length=draw_length(arguments.lengths), **shape).examples
        for part in ("train", "test")
    }
    recipes = ways(arguments.lengths, arguments.epochs, tuple(arguments.rates), arguments.per_step)
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
    for seed in range(arguments.rounds):
        for name, recipe in recipes.items():
            seeded = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})
            spent, auc, accuracy = measure(seeded, drawn["train"], drawn["test"], arguments.device)
            seconds[name] += spent
            scores[name].append((auc, accuracy))
            print(name, f"{np.median(spent):.2f} s per pass, AUC {auc:.3f}, accuracy {accuracy:.3f}", flush=True)
    write(arguments, recipes, drawn["train"], seconds, scores)


def write(
    arguments: argparse.Namespace,
    recipes: dict[str, Recipe],
    train: Examples,
    seconds: dict[str, list[float]],
    scores: dict[str, list[tuple[float, float]]],
) -> None:
    """Write the table."""
    lengths = [train.bags.length(name) for name in train.ids]
    base = float(np.median(seconds["one_by_one"]))
    lines = []
    for name, recipe in recipes.items():
        spent = float(np.median(seconds[name]))
        auc, accuracy = np.mean(scores[name], 0)
        lines.append(
            {
                "lengths": arguments.lengths,
                "way": name,
                "device": arguments.device,
                "threads": torch.get_num_threads(),
                "bags": len(lengths),
                "median_length": int(np.median(lengths)),
                "instances": sum(lengths),
                "dim": arguments.dim,
                "passes": arguments.epochs,
                "rounds": arguments.rounds,
                "steps_per_pass": -(-len(lengths) // recipe.training.bags_per_step),
                "seconds_per_pass": f"{spent:.3f}",
                "share_of_one_by_one": f"{spent / base:.2f}",
                "test_auc": f"{auc:.3f}",
                "test_accuracy": f"{accuracy:.3f}",
            }
        )
    kept = []
    if arguments.out.exists():
        with arguments.out.open(newline="") as file:
            kept = [line for line in csv.DictReader(file) if line["lengths"] != arguments.lengths]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + lines, key=lambda line: str(line["lengths"])))


if __name__ == "__main__":
    main()

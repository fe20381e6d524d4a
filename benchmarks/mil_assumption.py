"""Do the methods respect the assumption of multiple-instance learning, and do they find a rare signal?

    python benchmarks/mil_assumption.py --out benchmarks/results/mil_assumption.csv
    python benchmarks/mil_assumption.py --tests planted distracted --out benchmarks/results/planted.csv

Every recipe trains through eosin's own loop on the bags of `planted.py`, with narrow layers, the same number of
passes and the same learning rate for all. A row holds means over the seeds, and the seeds one by one; rows that are in
the file already, with the same settings, are not computed again. Two references respect the assumption by construction:
``max_instance``, the maximum of one logit per instance, and ``monotone``, the maximum of each embedded feature with
non-negative weights after it, which can also ask for two concepts at once.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from planted import Planted, false_frequency, multi_concept, planted_signal, single_concept
from tables import read_table, write_table
from torch import Tensor
from torch.nn import functional

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.kernels import segment_max
from eosin.mil._data import Examples
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import RECIPES, Component, Recipe, Training
from eosin.mil._train import fit
from eosin.mil.bags import PackedBags
from eosin.mil.methods.pooling import MaxPooling
from eosin.mil.slots import AGGREGATORS, AggregatorOutput
from eosin.mil.task import Task
from eosin.mil.tasks._classification import Binary, Classification

# of every recipe, but for DSMIL's query, whose width bounds its scores
NARROW = {"embed_dims": (64,), "width": 64, "hidden": 32, "tokens": 16, "region_size": 4}
RECIPE_NAMES = (
    *("mean", "max", "lse", "abmil", "clam_sb", "clam_mb", "dsmil", "acmil", "acmil_mha", "aem", "mhim"),
    *("mhim_dsmil", "mhim_v2", "packmil", "ins", "two_stage", "transmil", "set_transformer", "mambamil", "comel"),
)
REFERENCES = ("max_instance", "monotone")
LIKE_SLIDES = {"lengths": (2000, 2000), "fraction": 0.01, "dim": 16, "shift": 1.5}
TESTS: dict[str, Callable[..., Planted]] = {
    "single_concept": single_concept,
    "multi_concept": multi_concept,
    "false_frequency": false_frequency,
    "planted": lambda n, **given: planted_signal(n, **LIKE_SLIDES, **given),
    "distracted": lambda n, **given: planted_signal(n, **LIKE_SLIDES, distractors=0.05, **given),
}


@AGGREGATORS.register("monotone")
class MonotoneMax(MaxPooling):
    """The largest value of each embedded feature, read with non-negative weights."""

    def forward(self, bags: PackedBags) -> AggregatorOutput:
        """Return logits that no further instance can lower."""
        bag: Tensor = segment_max(self.embed(bags.values), bags.cu_seqlens)
        logits = functional.linear(bag, functional.softplus(self.classifier.weight - 3), self.classifier.bias)
        return AggregatorOutput(logits, bag)


def recipe_of(name: str, training: Training) -> tuple[Recipe, Task]:
    """Return a recipe with narrow layers and the training of all, and the task that it is tried on."""
    if name in REFERENCES:
        options = {"level": "instance"} if name == "max_instance" else {}
        aggregator = Component(
            name="max" if options else name, options=options | {"embed_dims": (64, 64), "dropout": 0.0}
        )
        return Recipe(aggregator=aggregator, training=training), Binary(classes=("0", "1"))
    recipe = RECIPES[name]
    host, options = recipe.aggregator.name, dict(recipe.aggregator.options)
    has = AGGREGATORS.defaults(host) | options
    options |= {key: value for key, value in NARROW.items() if has.get(key) and (host, key) != ("dsmil", "hidden")}
    if host == "downsampled":
        options["host_options"] = options["host_options"] | {"embed_dims": (64,), "hidden": 32}
    aggregator = Component(name=host, options=options)
    update = {"aggregator": aggregator, "training": training}
    return recipe.model_copy(update=update), Classification(classes=("0", "1"))


def aucs(name: str, test: str, seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the AUC on new bags of the training's kind, and on bags of the test's."""
    training = Training(
        optimizer="adamw",
        lr=arguments.rate,
        epochs=arguments.epochs,
        bags_per_step=arguments.per_step,
        select="last",
        clip_norm=1.0,
        warmup=2.0,
        seed=seed,
    )
    recipe, task = recipe_of(name, training)
    make = TESTS[test]
    fitted = fit(recipe, task, make(arguments.bags, part="train", seed=seed).examples, device="cpu")

    def auc(examples: Examples) -> float:
        outputs = predict_outputs(fitted.model, task, examples.bags, examples.ids)
        return float(task.metrics(outputs, examples.targets.numpy())["auc"])

    # more bags continue the draw: the first ones were trained on
    alike = make(2 * arguments.bags, part="train", seed=seed).examples
    fresh = alike.subset(alike.ids[arguments.bags :])
    return auc(fresh), auc(make(arguments.bags, part="test", seed=seed).examples)


def rows(arguments: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict[str, object]]:
    """Yield one line of the table per test and recipe."""
    for test in arguments.tests:
        for name in arguments.recipes:
            if (test, name, *map(str, (arguments.bags, arguments.epochs, arguments.seeds))) in done:
                continue
            started = time.perf_counter()
            pairs = np.array([aucs(name, test, seed, arguments) for seed in range(arguments.seeds)])
            (train, unseen), spread = pairs.mean(0), pairs[:, 1].std()
            yield {
                "test": test,
                "recipe": name,
                "auc_like_training": f"{train:.3f}",
                "test_auc": f"{unseen:.3f}",
                "test_auc_sd": f"{spread:.3f}",
                "test_aucs": " ".join(f"{value:.3f}" for value in pairs[:, 1]),
                "seconds": f"{time.perf_counter() - started:.0f}",
                "bags": arguments.bags,
                "epochs": arguments.epochs,
                "seeds": arguments.seeds,
            }


def main() -> None:
    """Run the command line; rows of other tests and recipes that are in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", nargs="+", default=list(TESTS)[:3], choices=list(TESTS))
    parser.add_argument("--recipes", nargs="+", default=[*RECIPE_NAMES, *REFERENCES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bags", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--per-step", type=int, default=10, help="bags of an optimizer step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = {(line["test"], line["recipe"]): line for line in read_table(arguments.out)}
    done = {(*key, line["bags"], line["epochs"], line["seeds"]) for key, line in table.items()}
    for line in rows(arguments, done):
        print(*line.values(), flush=True)
        table[str(line["test"]), str(line["recipe"])] = line
        write_table(arguments.out, [table[key] for key in sorted(table)])


if __name__ == "__main__":
    main()

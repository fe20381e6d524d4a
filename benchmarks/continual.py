"""What is forgotten when one model learns one task after another?

    python benchmarks/continual.py --out benchmarks/results/continual.csv

Three tasks of two classes each, whose instances lie around a place of their own like organs, learnt one after the other
by the same aggregator for the same number of passes: by training all weights on (`fine-tuning`), and by OWLoRA with
several shares of the first task's weights protected. Judged with the classes of all tasks to choose from, as the paper
does, and with the task known. A row holds the measures of one seed; the last rows are mean and standard deviation.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import Row, read_table, with_summaries, write_table

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import load_card, load_model
from eosin.mil._cohort import Cohort
from eosin.mil._data import Examples, MemoryBags, make_examples
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._study import Study
from eosin.mil._tables import LabelTable
from eosin.mil._train import fit
from eosin.mil._training_run import Fitted
from eosin.mil.bags import PackedBags
from eosin.mil.continual import base_recipe, continual_metrics, continued
from eosin.mil.slots import STRATEGIES, Aggregator, Step, Strategy
from eosin.mil.task import Task, make_task

DIM, N_TASKS, N_TRAIN = 64, 3, 40
WAYS = {"fine-tuning": None, "protected all": 1.0, "protected 0.9": 0.9, "protected 0.5": 0.5, "protected 0": 0.0}
HOSTS = {
    "abmil": ({"embed_dims": [128], "hidden": 32, "dropout": 0.0}, 2e-3),
    "gdat": ({"width": 64, "hidden": 32, "layers": 1, "heads": 4, "region_size": 4}, 1e-3),
}


@STRATEGIES.register("fine_tuning")
class FineTuning(Strategy):
    """Start from an earlier model, whose classes are the first ones of this, and train everything."""

    def __init__(self, model: Aggregator, task: Task, *, continue_from: Path) -> None:
        super().__init__(model, task)
        own = model.state_dict()
        for name, value in load_model(continue_from)[0].state_dict().items():
            own[name][tuple(slice(size) for size in value.shape)] = value

    def forward(self, bags: PackedBags, target: torch.Tensor) -> Step:
        """Run the model."""
        return Step(self.model(bags), bags)


def organ(number: int, seed: int, n_bags: int = 60) -> Study:
    """Return one task."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    place, shift = torch.randn(2, DIM, generator=generator) * 2
    bags, labels = {}, []
    for bag in range(n_bags):
        rows = torch.randn(int(torch.randint(10, 30, (), generator=generator)), DIM, generator=generator) + place
        rows[:4] += shift * (bag % 2)
        bags[f"o{number}s{bag:02d}"] = rows
        labels.append(f"{('normal', 'tumour')[bag % 2]}-{number}")
    ids = tuple(bags)
    table = LabelTable(ids, ids, {"label": tuple(labels)})
    task = make_task("classification", table.rows())
    examples = make_examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=DIM)), table, task)
    return Study(task, examples, Cohort(ids, ids, tuple(labels)), table)


def next_task(way: str, before: Path, study: Study, first: Path, plain: Recipe) -> tuple[Recipe, Study]:
    """Return recipe and study of a later task; that of fine-tuning has the same targets."""
    if way == "fine-tuning":
        known = len(load_card(before).task["classes"])
        classes = (*load_card(before).task["classes"], *study.task.classes)
        _, later = continued(first, study, base_recipe(first))
        task = later.task.model_copy(update={"classes": classes, "known": known})
        examples = replace(study.examples, targets=study.examples.targets + known)
        strategy = Component(name="fine_tuning", options={"continue_from": str(before)})
        return plain.model_copy(update={"strategy": strategy}), replace(study, task=task, examples=examples)
    recipe, later = continued(before, study, base_recipe(before))
    options = recipe.strategy.options | {"protected": WAYS[way]}
    return recipe.model_copy(update={"strategy": Component(name="owlora", options=options)}), later


def learn(way: str, seed: int, host: str, epochs: int) -> dict[str, float]:
    """Learn the sequence in one way and return its measures."""
    options, rate = HOSTS[host]
    training = Training(
        epochs=epochs, lr=rate, select="last", patience=0, bags_per_step=4, optimizer="adam", weight_decay=1e-5,
        standardize=False, seed=seed,
    )  # fmt: skip
    plain = Recipe(aggregator=Component(name=host, options=options), training=training)
    organs, judged = [organ(number, seed) for number in range(N_TASKS)], np.full((2, N_TASKS, N_TASKS), np.nan)
    root = Path(tempfile.mkdtemp(prefix="continual_"))
    for number, study in enumerate(organs):
        recipe, later = plain, study
        if number:
            recipe, later = next_task(way, root / str(number - 1), study, root / "0", plain)
        fitted = fit(recipe, later.task, later.examples.subset(later.examples.ids[:N_TRAIN]), folder=root / str(number))
        for earlier in range(number + 1):
            judged[:, number, earlier] = accuracies(fitted, organs[earlier].examples, 2 * earlier)
    shutil.rmtree(root)
    found, known = (continual_metrics(table) for table in judged)
    return {
        "average": found.final_average,
        "forgetting": found.forgetting,
        "backward_transfer": found.backward_transfer,
        "average_task_known": known.final_average,
        "forgetting_task_known": known.forgetting,
        "backward_transfer_task_known": known.backward_transfer,
    }


def accuracies(fitted: Fitted, examples: Examples, first_class: int) -> tuple[float, float]:
    """Return the accuracy on held-out bags of one task among all classes, and among the task's two."""
    held_out = examples.subset(examples.ids[N_TRAIN:])
    outputs = predict_outputs(fitted.model, fitted.card.load_task(), held_out.bags, held_out.ids)
    truth = held_out.targets.numpy()
    own = outputs[:, first_class : first_class + 2]
    return float((outputs.argmax(1) == truth + first_class).mean()), float((own.argmax(1) == truth).mean())


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of all hosts, seeds and ways, then their summaries."""
    found: list[dict[str, Any]] = []
    for host in arguments.hosts:
        for seed in range(arguments.seeds):
            for way in WAYS:
                values = {key: round(value, 4) for key, value in learn(way, seed, host, arguments.epochs).items()}
                found.append({"aggregator": host, "way": way, "seed": seed, **values})
                print(*found[-1].values(), flush=True)
    return with_summaries(found, over="seed", key=("aggregator", "way"))


def main() -> None:
    """Read the arguments, measure, write the table; rows of other aggregators that are in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/continual.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = [row for row in read_table(arguments.out) if row["aggregator"] not in arguments.hosts]
    write_table(arguments.out, [*kept, *rows(arguments)])


if __name__ == "__main__":
    main()

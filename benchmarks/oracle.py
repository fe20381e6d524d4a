"""How close training comes to an oracle, for a yes or no, a grade and a number that depend on the same tiles.

    python benchmarks/oracle.py [--kinds classification ordinal regression] [--slides 300 1000] [--seeds 3]
        [--set linear_below=0 training.lr=2e-4]

Every simulated slide has 100 tiles of 32 features. A hidden number u of the slide decides how many tiles are of a
second kind (a share of 1 / (1 + exp(1.5 - u))), and the label is u plus noise: above 0 or not, its quarter, or itself.
The oracle knows u, so it shows what the noise of the labels leaves; the default recipe sees tiles and labels. 15 % of
the slides choose the pass; 400 other slides are the test. Writes benchmarks/results/oracle.csv: AUC, quadratic kappa or
R² of the recipe and of the oracle, and the pass that was chosen; rows of other calls are kept.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from tables import Row, read_table, write_table

from eosin.features._bag import FeatureSpec
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import DEFAULT, RECIPES, Recipe
from eosin.mil._train import fit
from eosin.mil.task import make_task
from eosin.options import override

RESULTS = Path(__file__).parent / "results" / "oracle.csv"
TILES, DIM, TESTED = 100, 32, 400
NOISE = 0.52  # of the label: the R² of the oracle is 0.79
MEASURES = {"classification": "auc", "ordinal": "quadratic_kappa", "regression": "r2"}


def simulate(slides: int, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
    """Return bags, what decides the label, and the label."""
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=DIM) / np.sqrt(DIM) * 2.5
    hidden, bags = rng.normal(size=slides), {}
    for number, value in enumerate(hidden):
        rows = rng.normal(size=(TILES, DIM)) + rng.normal(size=DIM) * 0.1
        rows[rng.random(TILES) < 1 / (1 + np.exp(1.5 - value))] += direction
        bags[f"s{number:04}"] = torch.from_numpy(rows.astype(np.float32))
    return bags, hidden, hidden + NOISE * rng.normal(size=slides)


def row(kind: str, slides: int, seed: int, changes: list[str]) -> Row:
    """Train once and return the line of the table."""
    bags, hidden, value = simulate(slides + TESTED, seed)
    cuts = np.quantile(value[:slides], [0.25, 0.5, 0.75]) if kind == "ordinal" else np.zeros(1)
    graded = [np.searchsorted(cuts, numbers) for numbers in (value, hidden)]
    labels, best = (value, hidden) if kind == "regression" else graded
    rows = [
        {"slide_id": name, "patient_id": name, "label": str(label)} for name, label in zip(bags, labels, strict=True)
    ]
    task = make_task(kind, rows)
    targets, names = task.encode(rows), tuple(bags)
    source = MemoryBags(bags, FeatureSpec(encoder="simulated", dim=DIM))
    whole = Examples(source, names, names, targets)
    validating = round(0.15 * slides)
    recipe = Recipe.parse(override(RECIPES[DEFAULT].model_dump(mode="json"), [*changes, f"training.seed={seed}"]))
    made = fit(recipe, task, whole.subset(names[validating:slides]), whole.subset(names[:validating]), device="cpu")
    judge, truth = made.card.load_task(), targets[slides:].numpy()
    found = judge.metrics(predict_outputs(made.model, judge, source, names[slides:]), truth)
    of_oracle = {
        "classification": lambda: roc_auc_score(truth, hidden[slides:]),
        "ordinal": lambda: cohen_kappa_score(truth, best[slides:], weights="quadratic"),
        "regression": lambda: r2_score(truth, best[slides:]),
    }[kind]()
    return {
        "kind": kind,
        "slides": slides,
        "changes": " ".join(changes),
        "seed": seed,
        "measure": MEASURES[kind],
        "eosin": f"{found[MEASURES[kind]]:.3f}",
        "oracle": f"{of_oracle:.3f}",
        "passes": made.card.training["best_epoch"],
    }


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--slides", nargs="+", type=int, default=[300, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], dest="changes", help="key=value of the recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = {tuple(str(line[name]) for name in list(line)[:4]): line for line in read_table(RESULTS)}
    for slides in arguments.slides:
        for kind in arguments.kinds:
            for seed in range(arguments.seeds):
                line = row(kind, slides, seed, arguments.changes)
                print(*line.values(), flush=True)
                table[tuple(str(line[name]) for name in list(line)[:4])] = line
                write_table(RESULTS, [table[key] for key in sorted(table)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

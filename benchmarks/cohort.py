"""From pixels to labels with every recipe: painted slides, their tiles and features, then training.

    python benchmarks/cohort.py --out benchmarks/results/cohort.csv

The synthetic cohort (`eosin.wsi.synthetic`) is painted, tiled and encoded once; half of its slides hold a little
tumour. Each recipe is then cross-validated by patient on these features, with narrow layers and the same training for
all, as in `mil_assumption.py`. A row holds the out-of-fold AUC and accuracy of one seed; the last rows are mean and
standard deviation over the seeds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from mil_assumption import RECIPE_NAMES, recipe_of
from tables import Row, with_summaries, write_table

from eosin.mil.crossval import crossval
from eosin.mil.recipe import Component, Recipe, Training
from eosin.mil.splits import Split, read_splits
from eosin.mil.study import Study, open_study
from eosin.pipeline import Pipeline, run_stages
from eosin.wsi.grid import Tiling
from eosin.wsi.job import JobFolder
from eosin.wsi.synthetic import Cohort, make_cohort


def encoded(folder: Path, arguments: argparse.Namespace) -> tuple[Study, list[Split]]:
    """Paint, tile and encode the slides; return their study and splits by patient."""
    options = Cohort(
        n_slides=arguments.slides,
        slides_per_patient=1,
        size_um=(900.0, 1100.0),
        min_tumour=0.01,
        max_tumour=arguments.most_tumour,
        seed=1,
    )
    make_cohort(folder / "cohort", options)
    recipe = Recipe(aggregator=Component(name="mean"), training=Training(epochs=1, select="last", patience=0))
    pipeline = Pipeline(tiling=Tiling(mpp=0.5, patch_size=128, min_tissue=0.5), recipe=recipe, folds=4, formats=())
    labels = folder / "cohort/labels.csv"
    result = run_stages([folder / "cohort/slides"], labels, JobFolder(folder / "job"), pipeline)
    return open_study(result.features, labels), read_splits(result.splits)


def judged(name: str, seed: int, study: Study, splits: list[Split], out: Path, arguments: argparse.Namespace) -> Row:
    """Cross-validate one recipe with one seed and return its row."""
    training = Training(
        optimizer="adamw",
        lr=arguments.rate,
        weight_decay=1e-2,
        epochs=arguments.epochs,
        bags_per_step=4,
        select="last",
        clip_norm=1.0,
        warmup=2.0,
        seed=seed,
    )
    recipe, _ = recipe_of(name, training)
    started = time.perf_counter()
    found = crossval(recipe, study.task, study.examples, splits, study.cohort, out, device="cpu", resamples=10)
    auc, accuracy = (round(found["out_of_fold"][metric]["value"], 4) for metric in ("auc", "accuracy"))
    seconds = round(time.perf_counter() - started, 1)
    return {"recipe": name, "seed": seed, "auc": auc, "accuracy": accuracy, "seconds": seconds}


def main() -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPE_NAMES))
    parser.add_argument("--slides", type=int, default=32)
    parser.add_argument("--most-tumour", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, help="where slides and features are kept for another call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cohort.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cohort_") as made:
        study, splits = encoded(arguments.folder or Path(made), arguments)
        found = []
        for name in arguments.recipes:
            for seed in range(arguments.seeds):
                found.append(judged(name, seed, study, splits, Path(made) / f"{name}_{seed}", arguments))
                print(*found[-1].values(), flush=True)
    write_table(arguments.out, with_summaries(found, over="seed", key=("recipe",)))


if __name__ == "__main__":
    main()

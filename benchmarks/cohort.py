"""From pixels to labels with every recipe: painted slides, their tiles and features, then training.

    python benchmarks/cohort.py --out benchmarks/results/cohort.csv

The synthetic cohort (`eosin.wsi._synthetic`) is painted, tiled and encoded once; half of its slides hold a little
tumour. Each recipe is then cross-validated by patient on these features, with narrow layers and the same training for
all, as in `mil_assumption.py`. A row holds the out-of-fold AUC and accuracy of one seed and, for models with attention,
how well the attention of the fold's model tells a held-out slide's tumour tiles from the others: the mean over the
slides of the area under the ROC curve. Rows that are in the file already are not computed again.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mil_assumption import RECIPE_NAMES, recipe_of
from numpy.typing import NDArray
from tables import Row, read_table, write_table

from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._maps import attention_map
from eosin.mil._checkpoint import load_model
from eosin.mil._crossval import crossval
from eosin.mil._metrics import roc_auc
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._splits import Split, read_splits
from eosin.mil._study import Study, open_study
from eosin.mil.slots import AGGREGATORS, AttentionOutput
from eosin.pipeline._demo import tumour_tiles
from eosin.pipeline._run import Pipeline, run_pipeline
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._synthetic import Cohort, make_cohort


@dataclass(frozen=True, eq=False)
class Encoded:
    """The cohort: its study, splits by patient, and the tiles of tumour slides with which of them are tumour."""

    study: Study
    splits: list[Split]
    tumours: dict[str, tuple[FeatureBag, NDArray[np.bool_]]]


def encoded(folder: Path, arguments: argparse.Namespace) -> Encoded:
    """Paint, tile and encode the slides."""
    options = Cohort(
        n_slides=arguments.slides,
        slides_per_patient=1,
        size_um=(900.0, 1100.0),
        min_tumour=arguments.least_tumour,
        max_tumour=arguments.most_tumour,
        striking=arguments.striking,
        seed=1,
    )
    make_cohort(folder / "cohort", options)
    recipe = Recipe(aggregator=Component(name="mean"), training=Training(epochs=1, select="last", patience=0))
    pipeline = Pipeline(tiling=Tiling(mpp=0.5, patch_size=128, min_tissue=0.5), recipe=recipe, folds=4, formats=())
    labels = folder / "cohort/labels.csv"
    result = run_pipeline([folder / "cohort/slides"], labels, JobFolder(folder / "job"), pipeline)
    tumours = {}
    for slide_id in result.predictions["slide_id"]:
        bag = read_bag(result.feature_file(slide_id))
        is_tumour = tumour_tiles(bag, folder / f"cohort/truth/{slide_id}.png")
        if is_tumour.any() and not is_tumour.all():
            tumours[slide_id] = bag, is_tumour
    return Encoded(open_study(result.features, labels), read_splits(result.splits), tumours)


def judged(name: str, seed: int, data: Encoded, out: Path, arguments: argparse.Namespace) -> Row:
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
    study = data.study
    found = crossval(
        recipe, study.task, study.examples, data.splits, cohort=study.cohort, out=out, device="cpu", resamples=10
    )
    seconds = time.perf_counter() - started
    located = localisation(data, out) if issubclass(output_type(recipe), AttentionOutput) else None
    return {
        "recipe": name,
        "seed": seed,
        **{metric: f"{found['out_of_fold'][metric]['value']:.3f}" for metric in ("auc", "accuracy")},
        "localisation_auc": "" if located is None else f"{located:.3f}",
        "seconds": f"{seconds:.0f}",
        "slides": len(study.examples.ids),
        "located_slides": "" if located is None else len(data.tumours),
        "epochs": arguments.epochs,
    }


def output_type(recipe: Recipe) -> type:
    """Return what a recipe's aggregator returns."""
    return AGGREGATORS.build(recipe.aggregator.name, 4, 2, options=recipe.aggregator.options).output_type


def localisation(data: Encoded, out: Path) -> float:
    """Return the mean over tumour slides of the AUC of held-out attention against the painted truth."""
    areas = []
    for number, split in enumerate(data.splits):
        model, _ = load_model(out / f"fold_{number}")
        for slide_id in set(split.test) & set(data.tumours):
            bag, is_tumour = data.tumours[slide_id]
            areas.append(roc_auc(attention_map(model, bag).values, is_tumour))
    return float(np.mean([area for area in areas if area is not None]))


def main() -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPE_NAMES))
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--least-tumour", type=float, default=0.03, help="share of the tissue of a tumour slide")
    parser.add_argument("--most-tumour", type=float, default=0.15)
    parser.add_argument("--striking", action="store_true", help="paint blood, necrosis and harmless sheets, too")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--folder", type=Path, help="where slides and features are kept for another call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cohort.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="cohort_") as made:
        data = encoded(arguments.folder or Path(made), arguments)
        table = {(line["recipe"], str(line["seed"])): line for line in read_table(arguments.out)}
        for name in arguments.recipes:
            for seed in range(arguments.seeds):
                if (name, str(seed)) in table:
                    continue
                line = judged(name, seed, data, Path(made) / f"{name}_{seed}", arguments)
                print(*line.values(), flush=True)
                table[name, str(seed)] = line
                write_table(arguments.out, [table[key] for key in sorted(table)])


if __name__ == "__main__":
    main()

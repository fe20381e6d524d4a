"""Are the maps of real tissue made by what was learnt? Randomisation, deletion and insertion on the UCSB images.

    python benchmarks/maps_tissue.py --job ucsb [--encoder effnet_lite0] [--recipes abmil transmil] [--shuffles 10]
        [--draws 5] [--seeds 2] [--epochs 20]

`maps.py` asks this of painted slides, whose truth is known. Nobody has marked the tissue of UCSB, so a map is compared
with the map of the same held-out image by another model, as in Adebayo et al. (2018,
https://arxiv.org/abs/1810.03292): ``agreement`` is the mean rank correlation over tiles, images and models, and
``agreement_sd`` its standard deviation over models. The other model is

- ``other seed``: trained on the same images with another seed; what a map that shows the learnt reaches;
- ``classifier random``, ``all random``: the model itself with those weights shuffled, --draws times per fold;
- ``labels shuffled``: trained on labels that were shuffled among the images.

``reached`` is the share of such models that agree at least as well as those of another seed do on average. Deletion and
insertion are those of `maps.py`, for the malignant images: mean log-odds of malignant of the trained model while tiles
leave, or come, in the order of the map, minus the same for a random order.

Tiles and features are those of `real_tissue.py`, in --job. Writes benchmarks/results/maps_tissue.csv; rows of
aggregators that are in it with as many shuffles are kept.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from maps import curve, maps_of, randomised
from mil_assumption import recipe_of
from numpy.typing import NDArray
from real_tissue import DATA, features
from scipy.stats import spearmanr
from sklearn.model_selection import StratifiedKFold
from tables import Row, read_table, write_table

from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._subject import look
from eosin.mil._checkpoint import load_model
from eosin.mil._crossval import crossval
from eosin.mil._recipe import Training
from eosin.mil._splits import Split
from eosin.mil._study import Study, open_study
from eosin.mil.slots import Aggregator

RESULTS = Path(__file__).parent / "results" / "maps_tissue.csv"
RECIPES = ("abmil", "clam_mb", "dsmil", "mean", "transmil")
KINDS = ("other seed", "classifier random", "all random", "labels shuffled")
FOLDS = 4
Maps = dict[str, list[NDArray[np.float64]]]


@dataclass(frozen=True, eq=False)
class Images:
    """The study, its splits, and the held-out images of each fold."""

    study: Study
    splits: list[Split]
    tests: list[list[FeatureBag]]

    @classmethod
    def read(cls, folder: Path) -> "Images":
        """Read the features of a folder, and draw the folds."""
        study = open_study(folder, DATA / "labels.csv")
        ids, targets = np.array(study.examples.ids), study.examples.targets.numpy()
        parts = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(ids, targets)
        splits = [Split(tuple(ids[train].tolist()), (), tuple(ids[test].tolist())) for train, test in parts]
        tests = [[read_bag(folder / f"{name}.h5") for name in split.test] for split in splits]
        return cls(study, splits, tests)

    def train(self, name: str, epochs: int, *, seed: int = 0, shuffle: int | None = None) -> list[Aggregator]:
        """Return the models of a cross-validation; with `shuffle`, on labels shuffled with this seed."""
        training = Training(
            lr=1e-3, weight_decay=1e-2, epochs=epochs, bags_per_step=4, select="last", clip_norm=1.0, warmup=2.0,
            seed=seed,
        )  # fmt: skip
        examples, task = self.study.examples, self.study.task
        if shuffle is not None:
            order = torch.randperm(len(examples.targets), generator=torch.Generator().manual_seed(shuffle))
            examples = replace(examples, targets=examples.targets[order])
        recipe, _ = recipe_of(name, training)
        with tempfile.TemporaryDirectory() as made:
            out = Path(made)
            crossval(recipe, task, examples, self.splits, cohort=self.study.cohort, out=out, device="cpu", resamples=2)
            return [load_model(out / f"fold_{number}")[0] for number in range(FOLDS)]


def maps(model: Aggregator, bags: list[FeatureBag]) -> Maps:
    """Return every map of every image, by the map's name."""
    found: Maps = {}
    for bag in bags:
        subsets = look(model, bag, single_logit_is_second_class=model.n_outputs < 2).subsets
        for name, scores in maps_of(model, bag, subsets):
            found.setdefault(name, []).append(scores)
    return found


def agreement(first: Maps, second: Maps, name: str) -> float:
    """Return the mean rank correlation of two models' maps of the same images; maps without differences agree by 0."""
    pairs = zip(first[name], second[name], strict=True)
    return float(
        np.mean([spearmanr(one, other).statistic if np.ptp(one) * np.ptp(other) else 0.0 for one, other in pairs])
    )


def curves(model: Aggregator, bags: list[FeatureBag], order: Maps, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return deletion and insertion of each map beyond a random order, (malignant images, 2)."""
    found: dict[str, list[list[float]]] = {name: [] for name in order}
    rng = np.random.default_rng(seed)
    for place, bag in enumerate(bags):
        if "malignant" not in str(bag.slide_id):
            continue
        subsets = look(model, bag, single_logit_is_second_class=model.n_outputs < 2).subsets
        answers = (subsets.remove, subsets.keep_only)
        chance = rng.random(bag.n_instances)
        by_chance = [curve(subsets, chance, answer) for answer in answers]
        for name in order:
            gaps = [
                curve(subsets, order[name][place], one) - base for one, base in zip(answers, by_chance, strict=True)
            ]
            found[name].append(gaps)
    return {name: np.array(rows) for name, rows in found.items()}


def compared(name: str, images: Images, given: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per map and kind of other model."""
    models = images.train(name, given.epochs)
    own = [maps(model, bags) for model, bags in zip(models, images.tests, strict=True)]
    gaps = [curves(models[fold], images.tests[fold], own[fold], fold) for fold in range(FOLDS)]
    others: dict[str, list[tuple[int, Maps]]] = {kind: [] for kind in KINDS}
    for fold, model in enumerate(models):
        for seed in range(given.draws):
            for kind in KINDS[1:3]:
                fresh = randomised(model, classifier_only=kind == KINDS[1], seed=10 * fold + seed)
                others[kind].append((fold, maps(fresh, images.tests[fold])))
    trained = {KINDS[0]: [images.train(name, given.epochs, seed=100 + 100 * seed) for seed in range(given.seeds)]}
    trained[KINDS[3]] = [images.train(name, given.epochs, shuffle=seed) for seed in range(given.shuffles)]
    for kind, runs in trained.items():
        others[kind] = [(fold, maps(run[fold], images.tests[fold])) for run in runs for fold in range(FOLDS)]
    for map_name in own[0]:
        found = {kind: [agreement(own[f], one, map_name) for f, one in others[kind]] for kind in KINDS}
        goal = np.mean(found[KINDS[0]])
        deletion, insertion = np.concatenate([gap[map_name] for gap in gaps]).mean(0)
        for kind in KINDS:
            yield {
                "recipe": name,
                "map": map_name,
                "other": kind,
                "models": len(found[kind]),
                "epochs": given.epochs,
                "agreement": f"{np.mean(found[kind]):.3f}",
                "agreement_sd": f"{np.std(found[kind]):.3f}",
                "reached": "" if kind == KINDS[0] else f"{np.mean(np.array(found[kind]) >= goal):.2f}",
                "deletion": f"{deletion:.2f}" if kind == KINDS[0] else "",
                "insertion": f"{insertion:.2f}" if kind == KINDS[0] else "",
            }


def main() -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--encoder", default="effnet_lite0")
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--job", type=Path, default=Path("ucsb"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = Images.read(features(arguments.job, arguments.encoder))
    table = {(line["recipe"], line["map"], line["other"]): line for line in read_table(arguments.out)}
    for name in arguments.recipes:
        if str(FOLDS * arguments.shuffles) in {
            line["models"] for key, line in table.items() if key[::2] == (name, KINDS[3])
        }:
            continue
        for line in compared(name, images, arguments):
            print(*line.values(), flush=True)
            table[line["recipe"], line["map"], line["other"]] = line
        write_table(arguments.out, [table[key] for key in sorted(table)])


if __name__ == "__main__":
    main()

"""How often tests of a counterfactual reject when the model has learnt nothing.

    python benchmarks/null.py [--models 100] [--folder FOLDER]

Every model is ABMIL with fresh random weights. It is asked, on slides of the painted cohort of `cohort.py`, what it
says without the tiles that it weighs most and without those that a greedy search takes out. A test that means something
should reject 5 % of such models at 5 %. Four are tried, by patient:

- ``no change``: Wilcoxon's test of the changes against zero, on the slides on which the tiles were chosen;
- ``random tiles``: the same beyond random sets of as many tiles;
- ``cross-fitted``: the direction in feature space that tells the chosen tiles from the others is learnt on one half of
  the patients, the tiles that lie farthest along it are taken out of the slides of the other half, and the other way
  round; Wilcoxon's test of the changes beyond random tiles, so no set was chosen by the outcome that it is tested on;
- ``shuffled weights``: the rank of the mean change among 19 copies of the model with shuffled weights that are asked
  the same, searches repeated; this is `p_shuffled` of `eosin counterfactual`.

Writes benchmarks/results/null.csv: the share of models with p at most 0.05. The standard error of a share of 100 models
near 5 % is 2.2 %.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from cohort import Encoded, encoded
from numpy.typing import NDArray
from scipy.stats import wilcoxon
from tables import Row, write_table

from eosin.features._bag import FeatureBag
from eosin.heatmaps._cohort import mean_change, summarise_cohort
from eosin.heatmaps._counterfactual import Effect, Origin, intervene, top_tiles
from eosin.heatmaps._examination import SHUFFLES
from eosin.heatmaps._subject import Look, look
from eosin.mil._checkpoint import build_model
from eosin.mil._recipe import Component, Recipe
from eosin.mil._shuffled import shuffle_weights
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.slots import Aggregator
from eosin.mil.subsets import Target

RESULTS = Path(__file__).parent / "results" / "null.csv"
RECIPE = Recipe(aggregator=Component(name="abmil", options={"embed_dims": [64], "hidden": 32}))
SHARE, CONTROLS, SLIDES = 0.05, 10, 12
TARGET = Target(1)
SETS = ("attended", "searched")
LEVEL = 0.05
Indices = NDArray[np.int64]


def chosen(seen: Look, which: str) -> Indices:
    """Return the tiles of a slide that a model weighs most, or that a search takes out first."""
    count = len(top_tiles(seen.attention, SHARE))
    if which == "attended":
        return top_tiles(seen.attention, SHARE)
    return seen.subsets.greedy(TARGET, "min", count).order


def removed(seen: Look, tiles: Indices, which: str, controls: int) -> Effect:
    """Return what the model says without these tiles."""
    origin = Origin.RANKING if which == "attended" else Origin.SEARCH
    return intervene(seen.subsets, TARGET, tiles, kind="remove", what=which, origin=origin, controls=controls)


def signed_rank(values: NDArray[np.float64]) -> float:
    """Return Wilcoxon's p value, 1 where nothing changes."""
    return float(wilcoxon(values).pvalue) if np.any(values) else 1.0


def over_random(effects: list[Effect]) -> NDArray[np.float64]:
    """Return the changes beyond those of random sets."""
    return np.array([effect.after - effect.control_mean for effect in effects])


def cross_fitted(looks: list[Look], bags: list[FeatureBag], tiles: list[Indices], which: str) -> float:
    """Return the p value of tiles that were chosen by what was learnt on other patients."""
    values = [np.asarray(bag.features, np.float64) for bag in bags]
    spread = np.concatenate(values).std(0) + 1e-9
    contrast = [
        (rows[index].mean(0) - np.delete(rows, index, axis=0).mean(0)) / spread
        for rows, index in zip(values, tiles, strict=True)
    ]
    effects = []
    for number, (seen, rows, index) in enumerate(zip(looks, values, tiles, strict=True)):
        direction = np.mean(contrast[1 - number % 2 :: 2], axis=0)
        effects.append(removed(seen, top_tiles(rows / spread @ direction, len(index) / len(rows)), which, CONTROLS))
    return signed_rank(over_random(effects))


def p_values(model: Aggregator, bags: list[FeatureBag]) -> Iterator[tuple[str, str, float]]:
    """Yield the set, the test and its p value for one model; every slide is its own patient."""
    patients = [bag.slide_id for bag in bags]
    looks = [look(model, bag) for bag in bags]
    others = [[look(shuffle_weights(model, seed), bag) for bag in bags] for seed in range(SHUFFLES)]
    for which in SETS:
        tiles = [chosen(seen, which) for seen in looks]
        effects = [removed(seen, index, which, CONTROLS) for seen, index in zip(looks, tiles, strict=True)]
        yield which, "no change", signed_rank(np.array([effect.change for effect in effects]))
        yield which, "random tiles", signed_rank(over_random(effects))
        yield which, "cross-fitted", cross_fitted(looks, bags, tiles, which)
        changes = [
            mean_change([removed(seen, chosen(seen, which), which, 0) for seen in other], patients) for other in others
        ]
        summary = summarise_cohort(effects, None, patients, shuffled=changes)
        yield which, "shuffled weights", float(summary.p_shuffled)


def random_model(data: Encoded, seed: int) -> Aggregator:
    """Return a model that has learnt nothing but the scale of the features."""
    torch.manual_seed(seed)
    examples = data.study.examples
    model = build_model(RECIPE, data.study.task, examples.bags.spec.dim)
    return Standardized(Standardizer.measure(examples.bags, examples.ids), model).eval()


def table(found: Mapping[tuple[str, str], list[float]]) -> list[Row]:
    """Return the share of models that each test rejects."""
    return [
        {"tiles": which, "test": test, "models": len(values), "rejected": f"{np.mean(np.array(values) <= LEVEL):.3f}"}
        for (which, test), values in found.items()
    ]


def main() -> int:
    """Ask every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where slides and features are kept for another call")
    parser.set_defaults(slides=24, least_tumour=0.03, most_tumour=0.15, striking=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="null_") as made:
        data = encoded(arguments.folder or Path(made), arguments)
    bags = [bag for bag, _ in data.tumours.values()][:SLIDES]
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(arguments.models):
        for which, test, p in p_values(random_model(data, seed), bags):
            found.setdefault((which, test), []).append(p)
        write_table(RESULTS, table(found))
    for row in table(found):
        print(*row.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())

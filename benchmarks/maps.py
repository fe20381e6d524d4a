"""Which map finds what is there, and only in a model that has learnt it: localisation, deletion and randomisation.

    python benchmarks/maps.py --out benchmarks/results/maps.csv

The painted cohort of `cohort.py`, with blood, necrosis and sheets of harmless cells on every slide, is tiled and
encoded once. Each aggregator is cross-validated by patient, on the true labels and on labels shuffled among the
patients. Every map of every held-out tumour slide is then compared with the painted truth, for the model as it was
trained and for the randomisation tests of Adebayo et al. (Sanity checks for saliency maps, 2018,
https://arxiv.org/abs/1810.03292): the weights of all layers or of the classifier alone shuffled, five times per fold,
and the labels shuffled three times. A row holds, as means over the slides,

- ``auc``: how well the map tells tumour tiles from others; 0.5 is chance, below it the order is backwards;
- ``deletion``: the mean log-odds of tumour while the tiles leave in the order of the map, least is best, minus the same
  for a random order: a map that names what the model uses is far below 0;
- ``insertion``: the same while tiles are added to nothing, most is best.

and, over the models, ``auc_sd_of_models`` and ``reached``, the share whose mean area is at least the trained models'.

A map that does as well with random weights as with trained ones shows the features, not the model.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cohort import Encoded, encoded
from mil_assumption import recipe_of
from numpy.typing import NDArray
from tables import Row, read_table, write_table

from eosin.features._bag import FeatureBag
from eosin.heatmaps._maps import attention_map, gradient_map
from eosin.heatmaps._subject import look
from eosin.mil._checkpoint import load_model
from eosin.mil._crossval import crossval
from eosin.mil._data import Examples
from eosin.mil._metrics import roc_auc
from eosin.mil._recipe import Training
from eosin.mil._shuffled import shuffle_weights
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.mil.subsets import Subsets, Target

RECIPES = ("abmil", "clam_mb", "dsmil", "transmil", "mean")
MODELS = ("trained", "classifier random", "all random", "labels shuffled")
DRAWS = 5  # of random weights, per fold
SHUFFLES = 3  # of the labels
SHARES = np.linspace(0, 0.5, 11)
TUMOUR = Target(1)
Scores = NDArray[np.float64]


def maps_of(model: Aggregator, bag: FeatureBag, subsets: Subsets) -> Iterator[tuple[str, Scores]]:
    """Yield every map of one slide that has a place for the tumour class, by name."""
    if issubclass(model.output_type, AttentionOutput):
        yield "attention", attention_map(model, bag).values
    yield "alone", TUMOUR.of(subsets.only_one())
    yield "effect", subsets.effects(TUMOUR)[0]
    wide = model.n_outputs < 2
    yield "gradient", gradient_map(model, bag, TUMOUR, of="tumour", single_logit_is_second_class=wide).values


def curve(subsets: Subsets, scores: Scores, answer: Callable[[NDArray[np.int64]], Scores]) -> float:
    """Return the mean log-odds over the shares of tiles that leave or come, highest score first."""
    order = np.argsort(-scores, kind="stable")
    counts = [max(1, round(share * subsets.n_instances)) for share in SHARES]
    return float(np.mean([TUMOUR.of(answer(order[:count])) for count in counts]))


def randomised(model: Aggregator, *, classifier_only: bool, seed: int) -> Aggregator:
    """Return the model with its weights shuffled, in all layers or only in those that give the logits."""
    shuffled = shuffle_weights(model, seed)
    if not classifier_only:
        return shuffled
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for (name, parameter), other in zip(fresh.named_parameters(), shuffled.parameters(), strict=True):
            if "classifier" in name:
                parameter.copy_(other)
    return fresh


@dataclass(frozen=True, eq=False)
class Judged:
    """What one model's maps reach on the held-out tumour slides of its fold: by map, (slides, figures)."""

    fold: int
    figures: dict[str, Scores]

    def area(self, name: str) -> float:
        """Return the mean area under the ROC curve of a map."""
        return float(np.nanmean(self.figures[name][:, 0]))


def judged(model: Aggregator, fold: int, data: Encoded, slides: set[str], *, curves: bool) -> Judged:
    """Measure each map on each of these slides: its area and, if wanted, deletion and insertion."""
    found: dict[str, list[Scores]] = {}
    rng = np.random.default_rng(fold)
    for slide_id in sorted(slides & set(data.tumours)):
        bag, is_tumour = data.tumours[slide_id]
        subsets = look(model, bag, single_logit_is_second_class=model.n_outputs < 2).subsets
        answers = (subsets.remove, subsets.keep_only) if curves else ()
        chance = rng.random(bag.n_instances)
        by_chance = [curve(subsets, chance, answer) for answer in answers]
        for name, scores in maps_of(model, bag, subsets):
            area = roc_auc(scores, is_tumour)
            gaps = [curve(subsets, scores, answer) - base for answer, base in zip(answers, by_chance, strict=True)]
            found.setdefault(name, []).append(np.array([np.nan if area is None else area, *gaps]))
    return Judged(fold, {name: np.stack(rows) for name, rows in found.items()})


def train(name: str, data: Encoded, examples: Examples, folder: Path, epochs: int) -> list[Aggregator]:
    """Return the models of a cross-validation by patient."""
    training = Training(
        optimizer="adamw",
        lr=2e-3,
        weight_decay=1e-2,
        epochs=epochs,
        bags_per_step=4,
        select="last",
        clip_norm=1.0,
        warmup=2.0,
    )
    recipe, _ = recipe_of(name, training)
    study = data.study
    crossval(recipe, study.task, examples, data.splits, cohort=study.cohort, out=folder, device="cpu", resamples=10)
    return [load_model(folder / f"fold_{number}")[0] for number in range(len(data.splits))]


def compared(name: str, data: Encoded, out: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, Judged]]:
    """Yield what every model of one aggregator reaches, trained and taken apart, with the kind of the model."""
    examples, tests = data.study.examples, [set(split.test) for split in data.splits]
    for number, model in enumerate(train(name, data, examples, out / "true", arguments.epochs)):
        yield "trained", judged(model, number, data, tests[number], curves=True)
        for seed in range(DRAWS):
            for kind in ("classifier random", "all random"):
                fresh = randomised(model, classifier_only=kind != "all random", seed=10 * number + seed)
                yield kind, judged(fresh, number, data, tests[number], curves=False)
    for seed in range(SHUFFLES):
        order = torch.randperm(len(examples.targets), generator=torch.Generator().manual_seed(seed))
        shuffled = replace(examples, targets=examples.targets[order])
        for number, model in enumerate(train(name, data, shuffled, out / f"shuffled_{seed}", arguments.epochs)):
            yield "labels shuffled", judged(model, number, data, tests[number], curves=False)


def rows(name: str, found: list[tuple[str, Judged]]) -> Iterator[Row]:
    """Yield a row per map and kind of model; ``reached`` is the share of models as good as the trained one."""
    trained = [one for kind, one in found if kind == "trained"]
    for map_name in trained[0].figures:
        goal = float(np.mean([one.area(map_name) for one in trained]))
        for kind in MODELS:
            models = [one for other, one in found if other == kind]
            areas = np.array([one.area(map_name) for one in models])
            figures = np.nanmean(np.concatenate([one.figures[map_name] for one in models]), axis=0)
            curves = [f"{value:.2f}" for value in figures[1:]] or ["", ""]
            yield {
                "recipe": name,
                "map": map_name,
                "model": kind,
                "models": len(models),
                "auc": f"{figures[0]:.3f}",
                "auc_sd_of_models": f"{areas.std():.3f}",
                "reached": "" if kind == "trained" else f"{np.mean(areas >= goal):.2f}",
                "deletion": curves[0],
                "insertion": curves[1],
            }


def main() -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--slides", type=int, default=24)
    parser.add_argument("--least-tumour", type=float, default=0.03, help="share of the tissue of a tumour slide")
    parser.add_argument("--most-tumour", type=float, default=0.15)
    parser.add_argument("--plain", dest="striking", action="store_false", help="no blood, necrosis, harmless sheets")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where slides and features are kept for another call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/maps.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="maps_") as made:
        data = encoded(arguments.folder or Path(made), arguments)
        table = {(line["recipe"], line["map"], line["model"]): line for line in read_table(arguments.out)}
        for name in arguments.recipes:
            if any(key[0] == name for key in table):
                continue
            for line in rows(name, list(compared(name, data, Path(made) / name, arguments))):
                print(*line.values(), flush=True)
                table[str(line["recipe"]), str(line["map"]), str(line["model"])] = line
            write_table(arguments.out, [table[key] for key in sorted(table)])


if __name__ == "__main__":
    main()

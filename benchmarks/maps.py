"""Which map finds what is there, and only in a model that has learnt it: localisation, deletion and randomisation.

    python benchmarks/maps.py --out benchmarks/results/maps.csv

The painted cohort of `_cohort.py` is tiled and encoded once. Each aggregator is cross-validated by patient, once on the
true labels and once on labels that were shuffled among the patients. Every map of every held-out tumour slide is then
compared with the painted truth, for the model as it was trained and for the randomisation tests of Adebayo et al.
(Sanity checks for saliency maps, 2018, https://arxiv.org/abs/1810.03292): all weights random, the classifier alone
random, labels shuffled. A row holds, as means over the slides,

- ``auc``: how well the map tells tumour tiles from others; 0.5 is chance, below it the order is backwards;
- ``deletion``: the mean log-odds of tumour while the tiles leave in the order of the map, least is best, minus the same
  for a random order: a map that names what the model uses is far below 0;
- ``insertion``: the same while tiles are added to nothing, most is best.

A map that does as well with random weights as with trained ones shows the features, not the model.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cohort import Encoded, encoded
from mil_assumption import recipe_of
from numpy.typing import NDArray
from tables import Row, read_table, write_table
from torch import nn

from eosin.features._bag import FeatureBag
from eosin.heatmaps._maps import attention_map, gradient_map
from eosin.heatmaps._subject import look
from eosin.mil._checkpoint import load_model
from eosin.mil._crossval import crossval
from eosin.mil._metrics import roc_auc
from eosin.mil._recipe import Training
from eosin.mil.slots import Aggregator, AttentionOutput, Wrapper
from eosin.mil.subsets import Subsets, Target

RECIPES = ("abmil", "clam_mb", "dsmil", "transmil", "mean", "lse")
MODELS = ("trained", "labels shuffled", "classifier random", "all random")
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
    """Return the model with fresh normal weights of the usual size, in all layers or in those that give the logits."""
    fresh = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    inner = fresh.inner if isinstance(fresh, Wrapper) else fresh
    heads = [part for name, part in inner.named_children() if "classifier" in name]
    parts: list[nn.Module] = heads if classifier_only else [inner]
    with torch.no_grad():
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return fresh


def measured(model: Aggregator, data: Encoded, slides: set[str], rng: np.random.Generator) -> dict[str, list[Scores]]:
    """Return AUC, deletion and insertion of each map on each of these slides."""
    found: dict[str, list[Scores]] = {}
    for slide_id in sorted(slides & set(data.tumours)):
        bag, is_tumour = data.tumours[slide_id]
        subsets = look(model, bag, single_logit_is_second_class=model.n_outputs < 2).subsets
        chance = rng.random(bag.n_instances)
        for name, scores in maps_of(model, bag, subsets):
            gaps = [
                curve(subsets, scores, answer) - curve(subsets, chance, answer)
                for answer in (subsets.remove, subsets.keep_only)
            ]
            area = roc_auc(scores, is_tumour)
            found.setdefault(name, []).append(np.array([np.nan if area is None else area, *gaps]))
    return found


def rows(name: str, data: Encoded, out: Path, arguments: argparse.Namespace) -> list[Row]:
    """Train one aggregator on true and on shuffled labels and return a row per map and model."""
    training = Training(
        optimizer="adamw",
        lr=2e-3,
        weight_decay=1e-2,
        epochs=arguments.epochs,
        bags_per_step=4,
        select="last",
        clip_norm=1.0,
        warmup=2.0,
    )
    recipe, _ = recipe_of(name, training)
    study = data.study
    shuffled = torch.randperm(len(study.examples.targets), generator=torch.Generator().manual_seed(1))
    examples = {
        "trained": study.examples,
        "labels shuffled": replace(study.examples, targets=study.examples.targets[shuffled]),
    }
    found: dict[tuple[str, str], list[Scores]] = {}
    rng = np.random.default_rng(0)
    for kind, given in examples.items():
        folder = out / kind.replace(" ", "_")
        crossval(recipe, study.task, given, data.splits, study.cohort, folder, device="cpu", resamples=10)
        for number, split in enumerate(data.splits):
            model, _ = load_model(folder / f"fold_{number}")
            models = {kind: model}
            if kind == "trained":
                models["classifier random"] = randomised(model, classifier_only=True, seed=number)
                models["all random"] = randomised(model, classifier_only=False, seed=number)
            for label, one in models.items():
                for map_name, values in measured(one, data, set(split.test), rng).items():
                    found.setdefault((map_name, label), []).extend(values)
    return [
        {
            "recipe": name,
            "map": map_name,
            "model": label,
            "slides": len(values),
            **{
                column: f"{value:.3f}"
                for column, value in zip(("auc", "deletion", "insertion"), np.nanmean(values, axis=0), strict=True)
            },
            "auc_sd": f"{np.nanstd(values, axis=0)[0]:.3f}",
        }
        for (map_name, label), values in found.items()
    ]


def main() -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--least-tumour", type=float, default=0.03, help="share of the tissue of a tumour slide")
    parser.add_argument("--most-tumour", type=float, default=0.15)
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
            for line in rows(name, data, Path(made) / name, arguments):
                print(*line.values(), flush=True)
                table[str(line["recipe"]), str(line["map"]), str(line["model"])] = line
            write_table(arguments.out, [table[key] for key in sorted(table)])


if __name__ == "__main__":
    main()

"""Real tissue end to end: 58 H&E images of breast TMA cores, benign and malignant (UCSB; Ilse et al. 2018 use them).

    python benchmarks/real_tissue.py [--encoders he_texture effnet_lite0] [--recipes everyday abmil] [--repeats 5]
        [--folds random tma] [--job ucsb] [--scores ucsb/scores]

Tiles of 128 px at an assumed 0.25 µm/px (the set states none) are encoded once, into --job. Then every recipe, and a
logistic regression on the mean and the standard deviation of each feature, is cross-validated twice: on random folds of
images, stratified by class, and with each TMA held out whole (``tma``): images of one TMA share staining and scanner.
A fold's recipe is trained and stopped on training images only. Writes
benchmarks/results/real_tissue.csv: accuracy, the mean and standard deviation over repeats, and the area under the ROC
curve of each repeat's pooled predictions. The columns that end in ``_gain`` are the mean difference from the logistic
regression on the same folds, those in ``_gain_se`` its standard error over images (over whole TMAs where those are held
out): a bootstrap that draws images, each with its predictions of all repeats. The spread over repeats is less than
that: it leaves out that other images would have been other ones. --scores keeps the predictions of every repeat, so
that a call that was stopped goes on; remove that folder after a change of the code.

Published (quoted from the paper, four folds, network trained end to end): attention 0.745 ± 0.018 accuracy, AUC 0.799;
gated attention 0.755 ± 0.016, AUC 0.775.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tables import read_table, write_table

from eosin.mil._crossval import crossval
from eosin.mil._metrics import roc_auc
from eosin.mil._recipe import RECIPES
from eosin.mil._splits import Split
from eosin.mil._study import Study, open_study

DATA = Path(__file__).parents[2] / "shared" / "data" / "ucsb"
RESULTS = Path(__file__).parent / "results" / "real_tissue.csv"
MPP = "0.25"
FOLDS = 10
LINEAR = "logistic regression on mean and sd"

DRAWS = 500

Rows = tuple[np.ndarray, np.ndarray]


def features(job: Path, encoder: str) -> Path:
    """Return the folder of features, made unless it is there."""
    eosin = [sys.executable, "-m", "eosin"]
    tiling = ["--mpp", MPP, "--patch-size", "128", "--slide-mpp", MPP]
    subprocess.run([*eosin, "tile", str(DATA), "--job", str(job), *tiling], check=True)
    subprocess.run(
        [*eosin, "extract", str(DATA), "--job", str(job), "--encoder", encoder, "--slide-mpp", MPP], check=True
    )
    return next(job.glob(f"*/features_{encoder}"))


def folds(study: Study, kind: str, repeat: int) -> Iterator[Rows]:
    """Yield training and test rows."""
    targets = study.examples.targets.numpy()
    if kind == "tma":
        yield from LeaveOneGroupOut().split(targets, targets, sites_of(study))
    else:
        yield from StratifiedKFold(FOLDS, shuffle=True, random_state=repeat).split(targets, targets)


def sites_of(study: Study) -> np.ndarray:
    """Return the TMA of each image."""
    return np.array([row["site"] for row in study.table.rows(study.examples.ids)])


def linear(study: Study, parts: list[Rows]) -> np.ndarray:
    """Return the test probabilities of a logistic regression."""
    bags = [study.examples.bags.load(name).numpy() for name in study.examples.ids]
    pooled = np.stack([np.concatenate([bag.mean(0), bag.std(0)]) for bag in bags])
    targets, found = study.examples.targets.numpy(), np.zeros(len(bags))
    for train, test in parts:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        found[test] = model.fit(pooled[train], targets[train]).predict_proba(pooled[test])[:, 1]
    return found


def trained(study: Study, parts: list[Rows], recipe: str, seed: int) -> np.ndarray:
    """Return the test probabilities of a recipe."""
    ids, found = np.array(study.examples.ids), {}
    splits = [Split(tuple(ids[train].tolist()), (), tuple(ids[test].tolist())) for train, test in parts]
    chosen = RECIPES[recipe]
    seeded = chosen.model_copy(update={"training": chosen.training.model_copy(update={"seed": 1000 * seed})})
    with tempfile.TemporaryDirectory() as out:
        made = []
        crossval(
            seeded,
            study.task,
            study.examples,
            splits,
            cohort=study.cohort,
            out=Path(out),
            resamples=2,
            progress=made.append,
        )
        for fold in made:
            found |= dict(zip(fold.ids, fold.outputs[:, 1], strict=True))
    return np.array([found[name] for name in ids])


def cached(folder: Path | None, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return what an earlier call kept, or make it."""
    path = None if folder is None else folder / f"{name}.npy"
    if path is not None and path.exists():
        return np.load(path)
    found = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found)
    return found


def measured(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return accuracy and area under the ROC curve."""
    return float(((scores >= 0.5) == truth).mean()), roc_auc(scores, truth) or np.nan


def gain_errors(
    truth: np.ndarray, units: np.ndarray, scores: list[np.ndarray], against: list[np.ndarray]
) -> np.ndarray:
    """Return the standard errors of the two mean gains, by a bootstrap of units (images or TMAs)."""
    rng, gains = np.random.default_rng(0), []
    members = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    for _ in range(DRAWS):
        rows = np.concatenate([members[place] for place in rng.integers(len(members), size=len(members))])
        pairs = zip(scores, against, strict=True)
        gains.append(
            np.mean([np.subtract(*(measured(one[rows], truth[rows]) for one in pair)) for pair in pairs], axis=0)
        )
    return np.nanstd(gains, axis=0)


def line(
    study: Study, key: dict[str, str], units: np.ndarray, scores: list[np.ndarray], against: list[np.ndarray]
) -> dict[str, object]:
    """Return one row of the table, with the gain over other scores on the same folds."""
    truth = study.examples.targets.numpy() == 1
    own, other = (np.array([measured(one, truth) for one in some]) for some in (scores, against))
    errors = gain_errors(truth, units, scores, against)
    figures = {}
    for place, name in enumerate(("accuracy", "auc")):
        figures |= {name: own[:, place].mean(), f"{name}_sd": own[:, place].std()}
        figures |= {f"{name}_gain": (own - other)[:, place].mean(), f"{name}_gain_se": errors[place]}
    return key | {"repeats": len(scores)} | {name: f"{value:.3f}" for name, value in figures.items()}


def main() -> int:
    """Run every combination; rows replace those of the same key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["he_texture", "effnet_lite0"])
    parser.add_argument("--recipes", nargs="*", default=["everyday", "abmil"])
    parser.add_argument("--folds", nargs="+", default=["random", "tma"], choices=["random", "tma"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--job", type=Path, default=Path("ucsb"))
    parser.add_argument("--scores", type=Path, help="folder of the predictions of each repeat")
    arguments = parser.parse_args()
    table = {(row["encoder"], row["folds"], row["method"]): row for row in read_table(RESULTS)}
    for encoder in arguments.encoders:
        study = open_study(features(arguments.job, encoder), DATA / "labels.csv")
        for kind in arguments.folds:
            for method in (LINEAR, *arguments.recipes):
                parts = [list(folds(study, kind, repeat)) for repeat in range(arguments.repeats)]
                against = [linear(study, one) for one in parts]
                scores = against
                if method != LINEAR:
                    scores = [
                        cached(
                            arguments.scores,
                            f"{encoder}_{kind}_{method}_{repeat}",
                            partial(trained, study, one, method, repeat),
                        )
                        for repeat, one in enumerate(parts)
                    ]
                key = {"encoder": encoder, "folds": kind, "method": method}
                units = np.array(study.examples.ids) if kind == "random" else sites_of(study)
                table[tuple(key.values())] = line(study, key, units, scores, against)
                print(*table[tuple(key.values())].values(), flush=True)
                write_table(RESULTS, [table[name] for name in sorted(table)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

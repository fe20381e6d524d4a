"""What does a second stage at a higher magnification see, and what does it cost?

    python benchmarks/two_stage.py --out benchmarks/results/two_stage.csv

Slides are painted whose label is in stripes of 1 and 2 µm inside lesions (`benchmarks/fine_texture.py`). For each seed,
one after the other on the same slides and folds: one stage at 2 µm/px, one stage at 1 µm/px that sees every tile, and
two stages with a budget. A row holds the out-of-fold AUC and accuracy, the tiles that had to be encoded at 1 µm/px,
and the seconds from slides to predictions and reports; the last rows are mean and standard deviation over the seeds.
Seeds that are in the file already are not computed again.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fine_texture import FineCohort, make_fine_cohort
from tables import Row, read_table, with_summaries, write_table

from eosin.features._store import find_bags, read_footer
from eosin.mil._recipe import Component, Recipe, Training
from eosin.pipeline._result import Result
from eosin.pipeline._run import Pipeline, run_pipeline
from eosin.pipeline._selection import Selection
from eosin.pipeline._two_stage import SecondStage, run_two_stage
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder

PATCH_PX = 32
COARSE, FINE = Tiling(mpp=2.0, patch_size=PATCH_PX), Tiling(mpp=1.0, patch_size=PATCH_PX)
RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"gated": False, "embed_dims": [32], "hidden": 16}),
    strategy=Component(name="instance_dropout"),
    training=Training(epochs=30, lr=2e-3, select="last", patience=0, bags_per_step=4),
)


def one_stage(cohort: Path, job: Path, tiling: Tiling) -> Result:
    """Go the plain way."""
    options = Pipeline(tiling=tiling, recipe=RECIPE, folds=4, formats=())
    return run_pipeline([cohort / "slides"], cohort / "labels.csv", JobFolder(job), options)


def two_stages(cohort: Path, job: Path, budget: int) -> Result:
    """Go the way through both stages."""
    options = Pipeline(tiling=COARSE, recipe=RECIPE, folds=4, formats=())
    second = SecondStage(tiling=FINE, selection=Selection(budget=budget))
    return run_two_stage([cohort / "slides"], cohort / "labels.csv", JobFolder(job), options, second).second


def measured(way: str, seed: int, run: Callable[[], Result]) -> dict[str, Any]:
    """Run one way and return its row."""
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    fine = 0 if way == "one stage, 2 µm/px" else sum(read_footer(p).n_rows for p in find_bags(result.features).values())
    auc, accuracy = (round(result.metrics["out_of_fold"][name]["value"], 4) for name in ("auc", "accuracy"))
    found = {"auc": auc, "accuracy": accuracy, "tiles_at_1um": fine, "seconds": round(seconds, 1)}
    return {"way": way, "seed": seed, **found}


def rows(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield after each seed the rows of all so far, then their summaries."""
    kept = [row for row in read_table(arguments.out) if row["seed"].isdigit()]
    found: list[Row] = [
        {key: value if key == "way" else float(value) for key, value in row.items()} | {"seed": int(row["seed"])}
        for row in kept
    ]
    done = {int(row["seed"]) for row in kept}
    for seed in sorted(set(range(arguments.seeds)) - done):
        folder = Path(tempfile.mkdtemp(prefix="two_stage_"))
        options = FineCohort(n_slides=arguments.slides, side_px=arguments.side, radius_px=90, seed=seed)
        make_fine_cohort(folder, options)
        ways: dict[str, Callable[[], Result]] = {
            "one stage, 2 µm/px": lambda f=folder: one_stage(f, f / "coarse", COARSE),  # type: ignore[misc]
            "one stage, 1 µm/px": lambda f=folder: one_stage(f, f / "fine", FINE),  # type: ignore[misc]
        }
        for budget in arguments.budgets:
            ways[f"two stages, {budget} tiles"] = lambda f=folder, b=budget: two_stages(f, f / f"two{b}", b)  # type: ignore[misc]
        for way, run in ways.items():
            found.append(measured(way, seed, run))
            print(*found[-1].values(), flush=True)
        shutil.rmtree(folder)
        yield with_summaries(found, over="seed", key=("way",))


def main() -> None:
    """Read the arguments, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_stage.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for lines in rows(arguments):
        write_table(arguments.out, lines)


if __name__ == "__main__":
    main()

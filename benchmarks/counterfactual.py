"""Greedy search and leave-one-out by closed form, beside one forward pass per candidate.

The model is ABMIL as HIPPO publishes it: a layer to 512, gated attention of 384, a linear classifier of two classes,
on features of width 1024. The published search evaluates every single deletion of every round: round r of a bag of n
tiles costs n - r forward passes. A few candidates are timed and the whole is extrapolated as
``seconds per candidate × Σ (n - r)``; the extrapolation is marked in the table. The closed form is timed whole,
including the one forward pass that it starts from. The order of patches is compared on a bag that brute force can
finish.

Run: ``python benchmarks/counterfactual.py --out benchmarks/results/counterfactual.csv``
"""

import argparse
import multiprocessing
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.heatmaps.counterfactual import tile_effects
from eosin.heatmaps.pooled import Target
from eosin.heatmaps.subsets import look
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil

DIM = 1024
TARGET = Target(1)


def make_model() -> Abmil:
    """Return HIPPO's network with fixed random weights."""
    torch.manual_seed(0)
    return Abmil(DIM, 2, embed_dims=(512,), hidden=384).eval()


def make_bag(n_tiles: int) -> FeatureBag:
    """Return random features."""
    features = np.random.default_rng(0).standard_normal((n_tiles, DIM), dtype=np.float32)
    return FeatureBag(features, FeatureSpec(encoder="random", dim=DIM), "slide")


def seconds_of(action: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def closed_greedy(model: Abmil, bag: FeatureBag, rounds: int) -> list[int]:
    """Return the order of removal; one forward pass, then sums."""
    return look(model, bag).subsets.greedy(TARGET, "min", rounds).order.tolist()


@torch.no_grad()
def published_greedy(model: Abmil, bag: FeatureBag, rounds: int) -> list[int]:
    """Return the order of removal by running the model on every candidate bag of every round."""
    dtype = next(model.parameters()).dtype
    values, alive, order = torch.from_numpy(np.asarray(bag.features)).to(dtype), list(range(bag.n_instances)), []
    for _ in range(rounds):
        results = [
            float(TARGET.of(model(PackedBags.pack([values[alive[:i] + alive[i + 1 :]]])).logits[0].double().numpy()))
            for i in range(len(alive))
        ]
        order.append(alive.pop(int(np.argmin(results))))
    return order


def seconds_per_candidate(model: Abmil, bag: FeatureBag, candidates: int) -> float:
    """Return the mean time of one candidate of the published search: delete a row, run the model."""
    values = torch.from_numpy(np.asarray(bag.features))

    @torch.no_grad()
    def judge(i: int) -> None:
        model(PackedBags.pack([torch.cat([values[:i], values[i + 1 :]])]))

    judge(0)
    return float(np.mean([seconds_of(lambda i=i: judge(i)) for i in range(candidates)]))


def compare_greedy(n_tiles: int, rounds: int, candidates: int) -> dict[str, object]:
    """Return one row: the search by closed form, its forward pass included, and the published one extrapolated."""
    model, bag = make_model(), make_bag(n_tiles)
    started = time.perf_counter()
    subsets = look(model, bag).subsets
    passed = time.perf_counter() - started
    search = seconds_of(lambda: subsets.greedy(TARGET, "min", rounds))
    whole = passed + search
    evaluations = rounds * n_tiles - rounds * (rounds - 1) // 2
    brute = seconds_per_candidate(model, bag, candidates) * evaluations
    return {
        "what": f"greedy, {rounds} rounds",
        "tiles": n_tiles,
        "closed_form_s": round(whole, 4),
        "of_which_after_the_forward_pass_s": round(search, 4),
        "one_pass_per_candidate_s": round(brute, 1),
        "extrapolated_from": f"{candidates} of {evaluations} candidates",
        "speedup": round(brute / whole),
        "speedup_after_the_forward_pass": round(brute / search),
    }


def compare_leave_one_out(n_tiles: int, candidates: int) -> dict[str, object]:
    """Return one row: the effects of all single tiles."""
    model, bag = make_model(), make_bag(n_tiles)
    started = time.perf_counter()
    subsets = look(model, bag).subsets
    passed = time.perf_counter() - started
    effects = min(seconds_of(lambda: tile_effects(subsets, TARGET)) for _ in range(3))
    whole = passed + effects
    brute = seconds_per_candidate(model, bag, candidates) * n_tiles
    return {
        "what": "leave one out, all tiles",
        "tiles": n_tiles,
        "closed_form_s": round(whole, 4),
        "of_which_after_the_forward_pass_s": round(effects, 4),
        "one_pass_per_candidate_s": round(brute, 1),
        "extrapolated_from": f"{candidates} of {n_tiles} candidates",
        "speedup": round(brute / whole),
        "speedup_after_the_forward_pass": round(brute / effects),
    }


def compare_order(n_tiles: int, rounds: int) -> dict[str, object]:
    """Return one row: both searches run to the end, and whether they took the same tiles."""
    model, bag = make_model(), make_bag(n_tiles)
    closed_greedy(model, bag, 1)
    started = time.perf_counter()
    ours = closed_greedy(model, bag, rounds)
    middle = time.perf_counter()
    theirs = published_greedy(model.double(), bag, rounds)  # in float32 ties of small effects fall either way
    brute = time.perf_counter() - middle
    return {
        "what": f"greedy, {rounds} rounds, both run to the end: same order {ours == theirs}",
        "tiles": n_tiles,
        "closed_form_s": round(middle - started, 4),
        "one_pass_per_candidate_s": round(brute, 1),
        "extrapolated_from": "nothing",
        "speedup": round(brute / (middle - started)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--large", type=int, default=200_000)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for compare, arguments in (
        (compare_order, (60, 5)),
        (compare_greedy, (options.tiles, options.rounds, options.candidates)),
        (compare_leave_one_out, (options.large, 1)),
    ):
        rows.append(compare(*arguments))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table["machine"] = f"{platform.machine()}, {multiprocessing.cpu_count()} cores, torch {torch.__version__}"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()

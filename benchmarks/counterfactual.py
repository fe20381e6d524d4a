"""Greedy search and leave-one-out by closed form, beside one forward pass per candidate.

The model is ABMIL as HIPPO publishes it: a layer to 512, gated attention of 384, a linear classifier of two classes,
on features of width 1024. The published search evaluates every single deletion of every round: round r of a bag of n
tiles costs n - r forward passes. A few candidates are timed, in turn with ours, and the whole is extrapolated as
``median seconds per candidate × Σ (n - r)``; the table says so. What is ours is timed whole, from the feature file in
the page cache to the last effect, and in parts: reading (memory map to float32 tensor), the forward pass that every
method needs once, and the closed form. The order of patches is compared on a bag that brute force can finish.

Run: ``python benchmarks/counterfactual.py --out benchmarks/results/counterfactual.csv``
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import read_bag, write_bag
from eosin.heatmaps._counterfactual import tile_effects
from eosin.heatmaps._subject import look, pack_bag
from eosin.mil._closed_forms import PooledBag
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.subsets import Target
from eosin.wsi._grid import TileGrid, Tiling

DIM = 1024
TARGET = Target(1)


def make_model() -> Abmil:
    """Return HIPPO's network with fixed random weights."""
    torch.manual_seed(0)
    return Abmil(DIM, 2, embed_dims=(512,), hidden=384).eval()


def make_file(folder: Path, n_tiles: int) -> Path:
    """Write a feature file of random features in half precision, as encoders deliver them."""
    features = np.random.default_rng(0).standard_normal((n_tiles, DIM), dtype=np.float32).astype(np.float16)
    side = int(np.ceil(n_tiles**0.5))
    places = np.stack([np.arange(n_tiles) % side, np.arange(n_tiles) // side], axis=1).astype(np.int64) * 224
    grid = TileGrid(places, 224, Tiling(mpp=0.25, patch_size=224), (side * 224, side * 224), 0.25)
    spec = FeatureSpec(encoder="random", dim=DIM, mpp=0.25, patch_size=224)
    write_bag(folder / "slide.h5", FeatureBag(features, spec, "slide", grid))
    return folder / "slide.h5"


def make_bag(n_tiles: int) -> FeatureBag:
    """Return random features."""
    features = np.random.default_rng(0).standard_normal((n_tiles, DIM), dtype=np.float32)
    return FeatureBag(features, FeatureSpec(encoder="random", dim=DIM), "slide")


class Clock:
    """Seconds since the last reading, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def read(self, name: str) -> None:
        """Note the time since the last reading."""
        now = time.perf_counter()
        self.parts[name], self._last = now - self._last, now


@torch.no_grad()
def see(model: Abmil, path: Path, clock: Clock) -> PooledBag:
    """Read a bag, run the model once and return what answers for it."""
    pack = pack_bag(model, read_bag(path))
    clock.read("reading_s")
    output = model(pack)
    clock.read("forward_s")
    form = model.readout(pack, output)
    assert isinstance(form, PooledBag)
    return form


def ours(model: Abmil, path: Path, action: Callable[[PooledBag], object]) -> dict[str, float]:
    """Return the seconds of each part of one question, from the file to the answer."""
    clock = Clock()
    form = see(model, path, clock)
    action(form)
    clock.read("closed_form_s")
    return clock.parts | {"total_s": sum(clock.parts.values())}


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


@torch.no_grad()
def judge(model: Abmil, values: torch.Tensor, i: int) -> float:
    """Return the seconds of one candidate of the published search: delete a row, run the model."""
    started = time.perf_counter()
    model(PackedBags.pack([torch.cat([values[:i], values[i + 1 :]])]))
    return time.perf_counter() - started


def compare(
    what: str, n_tiles: int, evaluations: int, repeats: int, action: Callable[[PooledBag], object]
) -> dict[str, object]:
    """Return one row: our question whole, and the published one extrapolated from candidates timed in turn."""
    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        path = make_file(Path(folder), n_tiles)
        values = pack_bag(model, read_bag(path)).values
        ours(model, path, action)
        judge(model, values, 0)
        measured = [(ours(model, path, action), judge(model, values, i)) for i in range(repeats)]
    parts = {name: float(np.median([row[name] for row, _ in measured])) for name in measured[0][0]}
    candidate = float(np.median([seconds for _, seconds in measured]))
    brute = candidate * evaluations
    return {
        "what": what,
        "tiles": n_tiles,
        **{name: round(seconds, 4) for name, seconds in parts.items()},
        "one_pass_per_candidate_s": round(brute, 1),
        "extrapolated_from": f"{repeats} of {evaluations} candidates, {candidate:.4f} s each",
        "speedup_of_total": round(brute / parts["total_s"]),
        "speedup_of_closed_form": round(brute / parts["closed_form_s"]),
    }


def compare_greedy(n_tiles: int, rounds: int, repeats: int) -> dict[str, object]:
    """Return the row of a greedy search."""
    evaluations = rounds * n_tiles - rounds * (rounds - 1) // 2
    return compare(
        f"greedy, {rounds} rounds", n_tiles, evaluations, repeats, lambda form: form.greedy(TARGET, "min", rounds)
    )


def compare_leave_one_out(n_tiles: int, repeats: int) -> dict[str, object]:
    """Return the row of the effects of all single tiles."""
    return compare("leave one out, all tiles", n_tiles, n_tiles, repeats, lambda form: tile_effects(form, TARGET))


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
        "total_s": round(middle - started, 4),
        "one_pass_per_candidate_s": round(brute, 1),
        "extrapolated_from": "nothing",
        "speedup_of_total": round(brute / (middle - started)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--large", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for measure, arguments in (
        (compare_order, (60, 5)),
        (compare_greedy, (options.tiles, options.rounds, options.repeats)),
        (compare_leave_one_out, (options.large, options.repeats)),
    ):
        rows.append(measure(*arguments))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    cores = f"{platform.machine()}, {torch.get_num_threads()} threads"
    table["machine"] = f"{cores}, torch {torch.__version__}"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()

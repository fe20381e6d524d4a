"""Stages b to e of `gpu_first_contact.sh`: kernels, training, extraction and two processes, a row as each is measured.

    python benchmarks/gpu_contact.py {kernels,training,extraction,parallel} --out FILE [--seconds S] [--rehearse]

Nothing new begins after S seconds. What fails gets a row with the reason, and the rest goes on. ``--rehearse`` runs the
same code on the CPU with small bags and networks: its figures mean nothing.
"""

import argparse
import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
METHODS = ("abmil", "clam_sb", "acmil", "transmil", "mambamil", "packmil")
SIZES = (5_000, 20_000, 50_000, 200_000)
NETWORKS = ("vit_small_patch16_224", "vit_large_patch16_224")


@dataclass(frozen=True)
class Place:
    """Where a stage runs, until when, and whether it is a rehearsal."""

    rehearse: bool
    deadline: float

    @property
    def device(self) -> str:
        """torch's name of the device."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def is_over(self) -> bool:
        """Whether nothing new may begin."""
        return time.monotonic() > self.deadline

    def facts(self) -> Row:
        """Return what every row says of the machine."""
        gpu = {} if self.rehearse else {"device": torch.cuda.get_device_name(), "driver": _driver()}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        versions = {"torch": torch.__version__, "triton": _version("triton"), "date": date}
        return {"device": f"{platform.machine()}, rehearsal", "driver": ""} | gpu | versions

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the time of one call, the device's work included."""
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Wait for the device."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def attempt(self, facts: Row, measure: Callable[[], Row]) -> Row:
        """Return what was measured, or why it could not be."""
        try:
            return facts | measure() | {"note": ""}
        except Exception as error:  # noqa: BLE001 (one row must not end the stage)
            return facts | {"note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def kernels(place: Place) -> Iterator[Row]:
    """Yield the table of docs/gpu.md."""
    import gpu_cases
    import kernels_gpu

    gpu_cases.DEVICE = place.device
    for case in gpu_cases.all_cases(400 if place.rehearse else 200_000):
        if place.is_over:
            return
        yield from (vars(row) for row in kernels_gpu.measure(case, seconds=0.0 if place.rehearse else 0.3))


def training(place: Place) -> Iterator[Row]:
    """Yield slides per second of a pass, with bags on the host and on the device, and one bag per step for PackMIL."""
    for n in (60,) if place.rehearse else SIZES:
        for method in METHODS:
            for cached in (False, True):
                for bags_per_step in (1, 4) if method == "packmil" else (1,):
                    if place.is_over:
                        return
                    facts = {"method": method, "n_instances": n, "cached": cached, "bags_per_step": bags_per_step}
                    yield place.attempt(facts, lambda facts=facts: _one_pass(place, **facts))


def _one_pass(place: Place, method: str, n_instances: int, *, cached: bool, bags_per_step: int, passes: int = 2) -> Row:
    import eosin.mil.methods  # noqa: F401 (registers)
    from eosin.features._bag import FeatureSpec
    from eosin.mil._data import Examples, MemoryBags
    from eosin.mil._recipe import RECIPES
    from eosin.mil._train import fit
    from eosin.mil.tasks._classification import Classification

    dim, n_bags = (16, 4) if place.rehearse else (1024, max(4, 400_000 // n_instances))
    generator = torch.Generator().manual_seed(0)  # processes that train together must hold the same bags
    made = {f"s{i}": torch.randn(n_instances, dim, generator=generator).half() for i in range(n_bags)}
    bags = MemoryBags(made, FeatureSpec(encoder="bench", dim=dim))
    examples = Examples(bags, tuple(made), tuple(made), torch.arange(n_bags) % 2)
    settings = {"epochs": passes, "select": "last", "standardize": False, "bags_per_step": bags_per_step}
    recipe = RECIPES[method]
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})
    ends: list[float] = []
    place.wait()
    if not place.rehearse:
        torch.cuda.reset_peak_memory_stats()
    fit(
        recipe,
        Classification(classes=("a", "b")),
        examples,
        device=place.device,
        precision="fp32" if place.rehearse else "bf16",
        device_cache_bytes=64 << 30 if cached else 0,
        progress=lambda _: ends.append(time.perf_counter()),
    )
    seconds = ends[-1] - ends[0]  # the first pass compiles and fills the cache
    peak = 0.0 if place.rehearse else torch.cuda.max_memory_allocated() / 2**30
    return {"slides_per_second": round(n_bags * (passes - 1) / seconds, 3), "peak_gib": round(peak, 2)}


def extraction(place: Place) -> Iterator[Row]:
    """Yield tiles per second of the network alone and of the whole way from tiles on the host to rows on the host."""
    for network in NETWORKS[:1] if place.rehearse else NETWORKS:
        for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
            if place.is_over or (place.rehearse and compiled):
                return
            facts = {"network": network, "precision": precision, "compiled": compiled}
            yield place.attempt(facts, lambda facts=facts: _encoded(place, **facts))


def _encoded(place: Place, network: str, precision: str, *, compiled: bool) -> Row:
    import numpy as np

    from eosin.features._inference import load_encoder

    batch, rounds = (2, 2) if place.rehearse else (256, 12)
    encoder = load_encoder(f"timm:{network}?random", device=place.device, precision=precision, compiled=compiled)
    tiles = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    there = encoder.spec.transform(torch.from_numpy(tiles).to(place.device))

    def alone() -> None:
        with torch.inference_mode(), encoder._autocast(precision):
            for _ in range(rounds):
                encoder._network(there)

    def whole() -> None:
        waiting = encoder.start(tiles)
        for _ in range(rounds - 1):
            started = encoder.start(tiles)
            waiting()
            waiting = started
        waiting()

    alone()
    whole()
    network_s, whole_s = place.seconds(alone), place.seconds(whole)
    tiles_per_s = batch * rounds / whole_s
    return {"batch": batch, "tiles_per_second": round(tiles_per_s, 1), "busy": round(min(1.0, network_s / whole_s), 3)}


def parallel(place: Place) -> Iterator[Row]:
    """Yield a row of the first of two processes that share a device; NCCL refuses that, gloo does not."""
    from torch import distributed

    distributed.init_process_group("gloo")
    found = place.attempt({"processes": distributed.get_world_size()}, lambda: _together(place))
    if distributed.get_rank() == 0:
        yield found
    distributed.destroy_process_group()


def _together(place: Place) -> Row:
    n = 60 if place.rehearse else 20_000
    return _one_pass(place, "abmil", n, cached=False, bags_per_step=4)


STAGES = {"kernels": kernels, "training": training, "extraction": extraction, "parallel": parallel}


def main() -> int:
    """Run one stage and write its rows as they come; 1 when every row has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse runs the same code on the CPU")
    place = Place(arguments.rehearse, time.monotonic() + arguments.seconds)
    done = failed = 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    for row in STAGES[arguments.stage](place):
        row = row | place.facts()
        if writer is None:
            file = arguments.out.open("w", newline="")
            names = ["slides_per_second", "peak_gib", "batch", "tiles_per_second", "busy"]
            writer = csv.DictWriter(file, list(dict.fromkeys([*row, *names])))
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        print(*row.values(), flush=True)
        done, failed = done + 1, failed + bool(row["note"])
    print(f"{done} rows, {failed} failed: {arguments.out}")
    return int(done == failed and done > 0)


if __name__ == "__main__":
    raise SystemExit(main())

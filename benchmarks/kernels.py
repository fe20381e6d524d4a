"""Time the kernels beside the alternatives, interleaved in one run, and write a table.

    python benchmarks/kernels.py                    CPU, benchmarks/results/kernels_cpu.csv
    python benchmarks/kernels.py --device cuda      all cases of gpu_cases.py, benchmarks/results/h200.csv

On a CPU every case runs its variants in turn, so that all meet the same machine; medians are reported. Peak memory
counts what a variant needs beyond bag and parameters. The rate of plain products of the same sizes is measured in the
same run.
"""

import argparse
import csv
import ctypes
import ctypes.util
import datetime
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu, softplus

from eosin import kernels
from eosin.kernels import _memory as memory
from eosin.kernels._products import affine, uses_onednn
from eosin.kernels._rates import processor

RESULTS = Path(__file__).parent / "results"
LONG = 30.0  # seconds of a variant that is measured only once
Variant = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One variant of one case."""

    case: str
    variant: str
    n_instances: int
    seconds: float  # median
    seconds_min: float
    gflops: float  # useful operations per second: recomputation is not counted
    percent_of_product_rate: float
    peak_extra_mb: float
    ratio_to_first: float
    repetitions: int
    note: str
    device: str
    threads: int
    clock: str
    torch: str
    date: str


@dataclass(frozen=True)
class Case:
    """Variants of the same work; the first is what the others are compared with."""

    name: str
    n_instances: int
    flop: float
    product_dtype: torch.dtype
    variants: dict[str, Variant]
    notes: dict[str, str]
    returned_bytes: int = 0  # outputs and gradients, which every variant must hold and which are not counted


class Device:
    """The machine that is measured.

    Parameters
    ----------
    name : str
        torch's name of the device.
    clock : {"wall", "cpu"}
        What is read before and after on a CPU; the processor's time of one thread does not see other programs.
    """

    def __init__(self, name: str, clock: str) -> None:
        self.device = torch.device(name)
        self.clock = clock
        self._read = time.perf_counter if clock == "wall" else time.process_time
        self.is_gpu = self.device.type == "cuda"

    def label(self) -> str:
        """Return the name of the device; of a processor with its instruction sets."""
        if self.is_gpu:
            return torch.cuda.get_device_name()
        return processor()

    def timed(self, work: Variant) -> tuple[float, int]:
        """Return seconds of one call, and its peak extra bytes on a GPU."""
        gc.collect()
        if self.is_gpu:
            return self._timed_on_gpu(work)
        begin = self._read()
        work()
        return self._read() - begin, 0

    def first_call(self, work: Variant) -> tuple[float, int]:
        """Return seconds and peak extra bytes of a call that finds no memory from calls before."""
        gc.collect()
        memory.release()
        if self.is_gpu:
            return self._timed_on_gpu(work)
        _return_freed_memory()
        with PeakMemory() as peak:
            seconds, _ = self.timed(work)
        return seconds, peak.extra

    def _timed_on_gpu(self, work: Variant) -> tuple[float, int]:
        torch.empty(64 << 20, dtype=torch.float32, device=self.device).zero_()  # leave nothing in the L2 cache
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before


class PeakMemory:
    """Samples the resident memory of this process while a block runs."""

    def __enter__(self) -> "PeakMemory":
        self.extra = 0
        self._base = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.003):
            self.extra = max(self.extra, _resident_bytes() - self._base)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_freed_memory() -> None:
    library = ctypes.util.find_library("c")
    if library:
        ctypes.CDLL(library).malloc_trim(0)


def _normal(*size: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*size, generator=generator) * scale).to(device, dtype)


def _one_bag(n: int, device: torch.device) -> Tensor:
    return torch.tensor([0, n], dtype=torch.int32, device=device)


def _step(run: Callable[[], Tensor], parameters: list[Tensor]) -> Variant:
    def step() -> object:
        loss = run().float().square().sum()
        return torch.autograd.grad(loss, parameters)

    return step


def clam_step(n: int, device: torch.device) -> Case:
    """Return CLAM's forward and backward pass: fc 1024→512, gate 256, one branch; the bag needs no gradient."""
    width, embedded, hidden = 1024, 512, 256
    bags = _one_bag(n, device)
    sizes = [(embedded, width), (embedded,)] + [(hidden, embedded), (hidden,)] * 2 + [(1, hidden), (1,)]
    variants: dict[str, Variant] = {}
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = _normal(n, width, device=device, dtype=dtype)
        weights = [
            _normal(*size, device=device, dtype=dtype, scale=size[-1] ** -0.5, seed=seed).requires_grad_()
            for seed, size in enumerate(sizes)
        ]

        def eager(x: Tensor = x, weights: list[Tensor] = weights) -> Tensor:
            w1, b1, v, bv, u, bu, w, b = weights
            h = torch.relu(linear(x, w1, b1))
            scores = linear(torch.tanh(linear(h, v, bv)) * torch.sigmoid(linear(h, u, bu)), w, b)
            return torch.softmax(scores.T, 1) @ h

        def ours(x: Tensor = x, weights: list[Tensor] = weights, budget: int | None = 0) -> Tensor:
            w1, b1, *gate = weights
            return kernels.gated_attention_pool(
                x, *gate, bags, embed_weight=w1, embed_bias=b1, memory_budget=budget
            ).pooled

        variants[f"eager {label}"] = _step(eager, weights)
        if device.type == "cuda":
            variants[f"torch.compile {label}"] = _step(torch.compile(eager), weights)
        budget = n * 2 * hidden * 4  # 0.41 GB at 200,000 instances, what the embedding takes in fp32
        variants[f"eosin {label}"] = _step(lambda run=ours, budget=budget: run(budget=budget), weights)
        variants[f"eosin {label}, all kept"] = _step(lambda run=ours: run(budget=None), weights)
        variants[f"eosin {label}, nothing kept"] = _step(ours, weights)
    flop = 2.0 * n * (2 * width * embedded + 3 * 2 * hidden * embedded)
    return Case("clam step", n, flop, torch.float32, variants, {})


def scan(n: int, device: torch.device) -> Case:
    """Return a selective scan, forward and backward, 512 channels of 16 states, beside the published loop."""
    width, states = 512, 16
    bags = _one_bag(n, device)
    sizes = {"u": (n, width), "delta": (n, width), "b": (n, states), "c": (n, states), "z": (n, width)}
    tensors = {
        name: _normal(*size, device=device, dtype=torch.float32, seed=seed).requires_grad_()
        for seed, (name, size) in enumerate(sizes.items())
    }
    a = -_normal(width, states, device=device, dtype=torch.float32).exp()
    d, bias = (_normal(width, device=device, dtype=torch.float32, seed=9 + i) for i in range(2))
    u, delta, b, c, z = tensors.values()

    def ours() -> Tensor:
        return kernels.selective_scan(u, delta, a, b, c, bags, d=d, z=z, delta_bias=bias)

    def prepared() -> tuple[Tensor, Tensor]:
        steps = softplus(delta + bias)
        return torch.exp(steps[:, :, None] * a), (steps * u)[:, :, None] * b[:, None]  # (L, D, S), all at once

    def published() -> Tensor:
        decays, drives = prepared()
        state, outputs = torch.zeros_like(a), []
        for i in range(n):
            state = decays[i] * state + drives[i]
            outputs.append(state @ c[i])
        return (torch.stack(outputs) + u * d) * silu(z)

    def unbound() -> Tensor:
        state, outputs = torch.zeros_like(a), []
        for decay, drive, read in zip(*(part.unbind() for part in (*prepared(), c)), strict=True):
            state = decay * state + drive
            outputs.append(state @ read)
        return (torch.stack(outputs) + u * d) * silu(z)

    variants: dict[str, Variant] = {}
    if n <= 2000:
        variants["published reference, step by step"] = _step(published, list(tensors.values()))
        variants["the same, rows unbound once"] = _step(unbound, list(tensors.values()))
    variants["eosin"] = _step(ours, list(tensors.values()))
    returned = 4 * n * (4 * width + 2 * states)  # y and the gradients of u, delta, z, b, c
    note = f"outputs and gradients, {returned / 1e6:.0f} MB, not counted"
    return Case("selective scan", n, 0.0, torch.float32, variants, dict.fromkeys(variants, note), returned)


def leave_one_out(n: int, device: torch.device) -> Case:
    """Return all leave-one-out effects of a gated ABMIL in float64, beside running the model without each instance."""
    width, hidden, sample = 512, 128, 20
    bags = _one_bag(n, device)
    x = _normal(n, width, device=device, dtype=torch.float64)
    gate = [
        _normal(*size, device=device, dtype=torch.float64, scale=size[-1] ** -0.5, seed=seed)
        for seed, size in enumerate([(hidden, width), (hidden,)] * 2 + [(1, hidden), (1,)])
    ]
    head = _normal(2, width, device=device, dtype=torch.float64, seed=8)

    def logits(rows: Tensor) -> Tensor:
        v, bv, u, bu, w, b = gate
        scores = linear(torch.tanh(linear(rows, v, bv)) * torch.sigmoid(linear(rows, u, bu)), w, b)
        return (torch.softmax(scores.T, 1) @ rows) @ head.T

    def brute() -> Tensor:
        return torch.cat([logits(torch.cat([x[:i], x[i + 1 :]])) for i in range(sample)])

    def closed() -> Tensor:
        scores = kernels.gated_attention_scores(x, *gate)
        return kernels.leave_one_out(scores, x, head[:, None], None, bags)

    difference = float((closed()[:sample] - brute()).abs().max())
    notes = {
        "model evaluated again": f"time of {sample} of the {n}, multiply by {n / sample:g}",
        "closed form": f"all {n}, scores included; largest difference {difference:.1e}",
    }
    return Case("leave one out", n, 0.0, torch.float64, {"model evaluated again": brute, "closed form": closed}, notes)


def few_queries(n: int, device: torch.device) -> Case:
    """Return pooling by attention, 16 seeds and 8 heads, forward and backward, beside projecting keys and values."""
    width, seeds, heads = 1024, 16, 8
    bags = _one_bag(n, device)
    x = _normal(n, width, device=device, dtype=torch.float32)
    weights = [
        _normal(*size, device=device, dtype=torch.float32, scale=width**-0.5, seed=seed).requires_grad_()
        for seed, size in enumerate([(seeds, width), (width, width), (width,), (width, width), (width,)])
    ]

    def projected() -> Tensor:
        query, *projections = weights
        keys, values = linear(x, *projections[:2]), linear(x, *projections[2:])
        sliced = [t.unflatten(1, (heads, -1)).transpose(0, 1)[None] for t in (query, keys, values)]
        return scaled_dot_product_attention(*sliced, scale=width**-0.5)

    def folded() -> Tensor:
        query, *projections = weights
        return kernels.few_query_attention(query, x, *projections, bags, heads=heads, scale=width**-0.5)

    variants = {
        "project, then scaled_dot_product_attention": _step(projected, weights),
        "eosin, folded": _step(folded, weights),
    }
    return Case("16 queries", n, 0.0, torch.float32, variants, {})


def product_rates(device: Device) -> dict[torch.dtype, float]:
    """Return the operations per second of the fastest product at the size of CLAM's first layer."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = _normal(8192, 1024, device=device.device, dtype=dtype)
        weight = _normal(512, 1024, device=device.device, dtype=dtype)
        products = [lambda a=rows, b=weight: a @ b.T]
        if uses_onednn(rows):
            products.append(lambda a=rows, b=weight: affine(a, b))
        best = min(device.timed(product)[0] for product in products for _ in range(7))
        rates[dtype] = 2 * 8192 * 1024 * 512 / best
    return rates


def measure(case: Case, device: Device, repetitions: int) -> Iterator[Row]:
    """Run the variants in turn and yield one row for each."""
    times: dict[str, list[float]] = {name: [] for name in case.variants}
    peaks = dict.fromkeys(case.variants, 0)
    for repetition in range(repetitions + 1):
        for name, work in case.variants.items():
            if times[name] and min(times[name]) > LONG:
                continue
            seconds, peak = device.timed(work) if repetition else device.first_call(work)
            peaks[name] = max(peaks[name], peak)
            if repetition or seconds > LONG:  # the first round warms up, unless one round has to be enough
                times[name].append(seconds)
    rates = product_rates(device)
    first = statistics.median(next(iter(times.values())))
    for name, measured in times.items():
        seconds = statistics.median(measured)
        rate = rates[torch.bfloat16 if "bf16" in name else torch.float32]
        yield Row(
            case=case.name,
            variant=name,
            n_instances=case.n_instances,
            seconds=round(seconds, 5),
            seconds_min=round(min(measured), 5),
            gflops=round(case.flop / seconds / 1e9, 1),
            percent_of_product_rate=round(100 * case.flop / seconds / rate, 1),
            peak_extra_mb=round(max(0, peaks[name] - case.returned_bytes) / 1e6, 1),
            ratio_to_first=round(first / seconds, 2),
            repetitions=len(measured),
            note=case.notes.get(name, ""),
            device=device.label(),
            threads=torch.get_num_threads(),
            clock=device.clock,
            torch=torch.__version__,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )


def _line(row: Row) -> str:
    measured = f"{row.seconds:10.4f} s {row.ratio_to_first:8.2f}x {row.peak_extra_mb:8.0f} MB"
    return f"{row.case:15} {row.n_instances:7} {row.variant:45} {measured} {row.note}"


CASES: dict[str, tuple[Callable[[int, torch.device], Case], tuple[int, ...]]] = {
    "clam": (clam_step, (200_000,)),
    "scan": (scan, (2_000, 20_000, 200_000)),
    "loo": (leave_one_out, (10_000,)),
    "queries": (few_queries, (50_000,)),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=int, help="instances per bag, instead of the case's own")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import kernels_gpu

        kernels_gpu.run(options.out or RESULTS / "h200.csv")
        return 0
    device = Device(options.device, options.clock)
    out = options.out or RESULTS / f"kernels_{device.device.type}.csv"
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for name in options.cases:
            make, sizes = CASES[name]
            for n in options.sizes or sizes:
                for row in measure(make(n, device.device), device, options.repetitions):
                    writer.writerow(asdict(row))
                    file.flush()
                    print(_line(row), flush=True)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time every case of `gpu_cases.py` on a CUDA device and write the table; called by `kernels.py --device cuda`.

Needs torch and triton alone and takes less than ten minutes: a variant runs until it was timed 100 times or for two
seconds, with the L2 cache emptied before every call, and once more without. One that fails gets a row that says why.
"""

import csv
import datetime
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from gpu_cases import GpuCase, Work, all_cases

WARM_UPS, MOST_REPETITIONS, SECONDS_PER_VARIANT = 20, 100, 2.0
LAST_START = 540.0  # seconds after which no further case begins


@dataclass(frozen=True)
class GpuRow:
    """One variant of one case."""

    case: str
    variant: str
    milliseconds: float | None  # median, L2 cold
    tenth: float | None
    ninetieth: float | None
    milliseconds_hot: float | None
    floor_milliseconds: float
    floor: str
    percent_of_floor: float | None
    times_eager_bf16: float | None  # how often this goes into the first variant
    peak_extra_bags: float | None
    first_call_seconds: float | None
    repetitions: int
    note: str
    device: str
    torch: str
    triton: str
    date: str


@dataclass(frozen=True)
class Timing:
    """What was measured of one variant."""

    cold: list[float]
    hot: list[float]
    peak_bytes: int
    first_call: float


def run(out: Path) -> None:
    """Measure every case, print and write a row for each variant as it comes."""
    torch.backends.cuda.matmul.allow_tf32 = False  # as the published implementations run
    begin = time.monotonic()
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(GpuRow)])
        writer.writeheader()
        for case in all_cases():
            if time.monotonic() - begin > LAST_START:
                print(f"{case.name}: left out, time is up")
                continue
            for row in measure(case):
                writer.writerow(asdict(row))
                file.flush()
                print(
                    f"{row.case:45} {row.variant:35} {row.milliseconds} ms {row.percent_of_floor} % {row.note}",
                    flush=True,
                )
    print(out)


def measure(case: GpuCase, seconds: float = SECONDS_PER_VARIANT) -> list[GpuRow]:
    """Return one row per variant, each timed for so long; the first is what the others are compared with."""
    rows, first = [], None
    for name, work in case.variants.items():
        timing, note = _attempt(work, seconds)
        if timing is not None and first is None:
            first = statistics.median(timing.cold)
        rows.append(_row(case, name, timing, first, note))
    return rows


def _attempt(work: Work, seconds: float) -> tuple[Timing | None, str]:
    try:
        return (_timed(work, seconds) if torch.cuda.is_available() else _rehearsed(work)), ""
    except Exception as error:  # noqa: BLE001 (one variant must not end the run)
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _rehearsed(work: Work) -> Timing:
    """Run once on the CPU: whether it runs is all that is asked."""
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    return Timing([seconds] * 2, [seconds], 0, seconds)


def _timed(work: Work, seconds: float) -> Timing:
    torch.cuda.synchronize()
    before = time.monotonic()
    work()
    torch.cuda.synchronize()
    first_call = time.monotonic() - before
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    once = _event_seconds(work)
    peak = torch.cuda.max_memory_allocated() - held
    repetitions = max(3, min(MOST_REPETITIONS, int(seconds / max(once, 1e-6))))
    for _ in range(min(WARM_UPS, repetitions)):
        work()
    flush = torch.empty(64 << 20, dtype=torch.float32, device="cuda")
    cold = [_event_seconds(work, flush.zero_) for _ in range(repetitions)]
    hot = [_event_seconds(work) for _ in range(max(3, repetitions // 4))]
    return Timing(cold, hot, peak, first_call)


def _event_seconds(work: Work, before: Callable[[], object] = lambda: None) -> float:
    before()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _row(case: GpuCase, name: str, timing: Timing | None, first: float | None, note: str) -> GpuRow:
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal on a CPU"
    seconds = statistics.median(timing.cold) if timing else None
    tenths = statistics.quantiles(timing.cold, n=10) if timing else None
    return GpuRow(
        case=case.name,
        variant=name,
        milliseconds=_rounded(seconds, 1000),
        tenth=_rounded(tenths[0], 1000) if tenths else None,
        ninetieth=_rounded(tenths[-1], 1000) if tenths else None,
        milliseconds_hot=_rounded(statistics.median(timing.hot), 1000) if timing else None,
        floor_milliseconds=round(case.floor_s * 1000, 4),
        floor=case.floor,
        percent_of_floor=round(100 * case.floor_s / seconds, 1) if seconds else None,
        times_eager_bf16=round(first / seconds, 2) if seconds and first else None,
        peak_extra_bags=round(timing.peak_bytes / case.bag_bytes, 2) if timing else None,
        first_call_seconds=_rounded(timing.first_call, 1) if timing else None,
        repetitions=len(timing.cold) if timing else 0,
        note=note,
        device=device,
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _rounded(seconds: float | None, factor: float) -> float | None:
    return None if seconds is None else round(seconds * factor, 4)

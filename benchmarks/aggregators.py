"""Time and memory of every aggregator, forward and backward on one bag of 200,000 instances, beside plain PyTorch.

    python benchmarks/aggregators.py [--names abmil transmil] [--variants eosin plain] [--sizes 200000] [--note WHY]

Each case runs in a process of its own, which may hold 6 GB beside bag and libraries, warms up on a small bag and says
how far the peak of its resident memory exceeds what it held before: bag, parameters and libraries are not counted.
Seconds are the processor's, summed over threads, which other programs do not lengthen. Rows replace those of the same
case in benchmarks/results/aggregators_cpu.csv, so that the table can be made in pieces.
"""

import argparse
import csv
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "aggregators_cpu.csv"
WIDTH, OUTPUTS = 1024, 2
MEMORY_LIMIT_GB = 6.0
SECONDS_LIMIT = 3600
WARM_UP = 300
# the orders of instances that MambaMIL has besides its default
ORDERS = {"mambamil_bi": {"kind": "bi"}, "mambamil_plain": {"kind": "plain"}}


@dataclass(frozen=True)
class Row:
    """One aggregator in one implementation on one bag."""

    aggregator: str
    variant: str
    n_instances: int
    cpu_seconds_forward: float | None
    cpu_seconds_backward: float | None
    peak_extra_mb: float | None
    bag_mb: float
    note: str
    threads: int
    device: str
    torch: str
    date: str

    @property
    def case(self) -> tuple[str, str, int]:
        """Return what is measured."""
        return self.aggregator, self.variant, self.n_instances


def measure(name: str, variant: str, n: int) -> dict[str, float]:
    """Run one case in this process and return seconds and peak memory."""
    import torch

    _limit_memory(n * WIDTH * 4)
    torch.manual_seed(0)
    read, step = _step(name, variant)
    step(read(torch.randn(WARM_UP, WIDTH)))
    bag = read(torch.randn(n, WIDTH))
    before = _resident_mb()
    _reset_peak()
    forward, backward = step(bag)
    return {
        "cpu_seconds_forward": forward,
        "cpu_seconds_backward": backward,
        "peak_extra_mb": _peak_mb() - before,
        "threads": torch.get_num_threads(),
    }


def _step(name, variant):
    """Return what makes a bag of a matrix, and what takes it forward and backward and returns the seconds of both."""
    if variant == "eosin":
        import eosin.mil.methods  # noqa: F401 (registers)
        from eosin.mil.bags import PackedBags
        from eosin.mil.slots import AGGREGATORS

        registered = "mambamil" if name in ORDERS else name
        model = AGGREGATORS.build(registered, WIDTH, OUTPUTS, options=ORDERS.get(name)).train()
        read = lambda rows: PackedBags.pack([rows])  # noqa: E731
        logits = lambda bag: _objective(model(bag))  # noqa: E731
    else:
        from plain_aggregators import build

        model = build(name, WIDTH, OUTPUTS).train()
        read = lambda rows: rows  # noqa: E731
        logits = lambda bag: model(bag).square().sum()  # noqa: E731

    def step(bag):
        begin = time.process_time()
        loss = logits(bag)
        middle = time.process_time()
        loss.backward()
        return middle - begin, time.process_time() - middle

    return read, step


def _objective(output):
    """Return a number that needs the logits, and those of branches or projections that the plain module has, too."""
    loss = output.logits.square().sum()
    for extra in ("branch_logits", "projections"):
        if hasattr(output, extra):
            loss = loss + getattr(output, extra).mean()
    return loss


def _limit_memory(bag_bytes: int) -> None:
    held = int(_status_mb("VmData") * 1e6)  # what the libraries hold does not count
    limit = held + bag_bytes + int(MEMORY_LIMIT_GB * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _status_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def _resident_mb() -> float:
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    return _status_mb("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def run(name: str, variant: str, n: int, note: str = "") -> Row:
    """Run one case in a process of its own; the note says what else there is to know of it."""
    command = [sys.executable, __file__, "--one", name, variant, str(n)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_LIMIT)
    except subprocess.TimeoutExpired:
        return _row(name, variant, n, {}, f"longer than {SECONDS_LIMIT} s")
    if done.returncode == 0:
        return _row(name, variant, n, json.loads(done.stdout.splitlines()[-1]), note)
    if "memory" in done.stderr or done.returncode < 0:
        return _row(name, variant, n, {}, f"out of memory above {MEMORY_LIMIT_GB:g} GB")
    raise RuntimeError(done.stderr)


def _row(name: str, variant: str, n: int, measured: dict[str, float], note: str) -> Row:
    from importlib.metadata import version

    from eosin.kernels._rates import processor

    def rounded(field: str, digits: int) -> float | None:
        return round(measured[field], digits) if field in measured else None

    return Row(
        aggregator=name,
        variant=variant,
        n_instances=n,
        cpu_seconds_forward=rounded("cpu_seconds_forward", 2),
        cpu_seconds_backward=rounded("cpu_seconds_backward", 2),
        peak_extra_mb=rounded("peak_extra_mb", 0),
        bag_mb=round(n * WIDTH * 4 / 1e6, 1),
        note=note,
        threads=int(measured.get("threads", os.cpu_count() or 1)),
        device=processor(),
        torch=version("torch"),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def names() -> list[str]:
    """Return all registered aggregators, and MambaMIL in its other orders."""
    import eosin.mil.methods  # noqa: F401 (registers)
    from eosin.mil.slots import AGGREGATORS

    return [*AGGREGATORS, *ORDERS]


def write(rows: list[Row], path: Path) -> None:
    """Put rows into the table in place of those of the same case."""
    header = [field.name for field in fields(Row)]
    table = {}
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
        table = {(row["aggregator"], row["variant"], int(row["n_instances"])): row for row in old}
    for row in rows:
        table[row.case] = {key: "" if value is None else value for key, value in asdict(row).items()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(table[case] for case in sorted(table))


def main() -> int:
    """Measure the chosen cases, one process each, and write the table after every one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--variants", nargs="+", choices=("plain", "eosin"), default=["plain", "eosin"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[200_000])
    parser.add_argument("--note", default="", help="what the rows say, for instance why a bag is smaller")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "VARIANT", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, variant, n = options.one
        print(json.dumps(measure(name, variant, int(n))))
        return 0
    known = names()  # after a case of its own process was measured, whose memory this would change
    if unknown := [name for name in options.names or () if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    for name in options.names or known:
        for n in options.sizes:
            for variant in options.variants:
                row = run(name, variant, n, options.note)
                write([row], options.out)
                print(*asdict(row).values(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

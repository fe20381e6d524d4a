"""What the record and the claim of one slide cost in a job that holds many: it must not grow with their number.

For each number of slides a job folder gets so many records. Measured, the mean of 200 where it says "each": a record
appended as a slide ends, a claim and its release, a lease and its release; and once: the merge into ``run.json``, and
the reading of all records. ``rewritten`` is what eosin did before: ``run.json`` written whole for a slide that ends.

Run: ``python benchmarks/records.py --slides 100 1000 20000 200000 --out benchmarks/results/records.csv``
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from eosin import _claims as claims
from eosin._claims import DONE_ELSEWHERE, Claims
from eosin._records import Log, Record, merge, read_run_json

REPEATS = 200


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Return the mean time of a call."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def claim_and_release(output: Path) -> None:
    """Claim one output."""
    one = Claims()
    one.take(output)
    one.release_all()


def measure(n_slides: int) -> dict[str, float]:
    """Return seconds by what was measured."""
    with tempfile.TemporaryDirectory() as name:
        run_json = Path(name) / "job" / "run.json"
        log = Log(run_json)
        appended = seconds(lambda: [log.add(record(number)) for number in range(n_slides)]) / n_slides
        merged = seconds(lambda: merge(run_json))
        log = Log(run_json)
        numbers = iter(range(n_slides, n_slides + REPEATS))
        late = seconds(lambda: log.add(record(next(numbers))), REPEATS)
        found = {
            "append, each": appended,
            "append to a full job, each": late,
            "rewritten, each": seconds(lambda: (log.add(record(0)), merge(run_json))),
            "merge, once": merged,
            "read all, once": seconds(lambda: read_run_json(run_json)),
            "claim, each": seconds(lambda: claim_and_release(run_json.with_name("S.h5")), REPEATS),
        }
        os.environ[claims.FORCE] = "1"
        found["lease, each"] = seconds(lambda: claim_and_release(run_json.with_name("S.h5")), REPEATS)
        del os.environ[claims.FORCE]
        return found


def record(number: int) -> Record:
    """Return a record as of a real slide."""
    return Record(
        f"TCGA-A1-{number:06d}-01Z-00-DX1", "extract 0.5mpp_256px_0px_overlap/uni_v2", "ok", "", DONE_ELSEWHERE
    )


def main() -> None:
    """Measure and print; write a table with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=int, nargs="+", default=[100, 1000, 20_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table: list[list[object]] = [["measured", "slides", "ms"]]
    for n_slides in arguments.slides:
        table += [[name, n_slides, f"{1e3 * spent:.3f}"] for name, spent in measure(n_slides).items()]
    csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()

"""How well workers share a machine: the same slides tiled by 1, 2 and 4 workers of `--cluster` with the local provider.

``seconds`` is from the command to its end, ``start_s`` the part of it until the first slide is finished, and
``slides_per_hour`` counts the slides after that one. ``load`` is the mean number of other processes that wanted a core
meanwhile. ``efficiency`` is the pace divided by workers times the pace of one: 1 is perfect; more workers than cores
cannot reach it.

Run: ``python benchmarks/cluster.py --slides 40 --workers 1 2 4 --out benchmarks/results/cluster.csv``
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eosin._records import read_run_json
from eosin.wsi._synthetic import Cohort, make_cohort

SITE = "provider: local\nworkers: {workers}\ncores: 1\n"


def measure(slides: Path, folder: Path, workers: int) -> list[object]:
    """Return a row of the table."""
    site, job = folder / f"site_{workers}.yaml", folder / f"job_{workers}"
    site.write_text(SITE.format(workers=workers))
    command = [sys.executable, "-m", "eosin", "tile", "--slides", slides, "--job", job, "--cluster", site]
    began, load = time.time(), []
    process = subprocess.Popen(map(str, command), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        load.append(os.getloadavg()[0])
        time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    ended = sorted(record.at for record in read_run_json(job / "run.json"))
    pace = 3600 * (len(ended) - 1) / (ended[-1] - ended[0])
    others = max(0.0, sum(load) / len(load) - workers)
    return [
        workers,
        len(ended),
        round(time.time() - began, 1),
        round(ended[0] - began, 1),
        round(pace),
        round(others, 1),
    ]


def main() -> None:
    """Measure and print; write a table with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table: list[list[object]] = [["workers", "slides", "seconds", "start_s", "slides_per_hour", "load", "efficiency"]]
    with tempfile.TemporaryDirectory() as name:
        make_cohort(Path(name), Cohort(n_slides=arguments.slides, size_um=(1400.0, 1600.0), seed=3))
        for workers in arguments.workers:
            row = measure(Path(name) / "slides", Path(name), workers)
            first = table[1] if len(table) > 1 else row
            share = float(str(row[4])) / workers / (float(str(first[4])) / float(str(first[0])))
            table.append([*row, round(share, 2)])
            print(*table[-1], sep=",", flush=True)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()

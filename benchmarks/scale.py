"""What large cohorts cost: time must grow with the number of slides, not with its square.

Each number of slides gets a job folder with coordinates and features of 4 tiles per slide, a table of labels, and a
folder of as many empty pictures. `measure` says what is timed. ``per_slide_ms`` is processor time, children included,
divided by the number; other work on the machine hardly lengthens it. ``growth`` compares it with that of the smallest
number: 1 is linear, less is a fixed cost that is shared. With ``--linked`` the files are hard links to one, so that
they are made in seconds. ``--spread`` compares one folder with the 256 folders of a job that is spread, by links, too.

Run: ``python benchmarks/scale.py --slides 100 1000 5000 --linked 20000 --spread 200000 --out scale.csv``
"""

import argparse
import csv
import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from eosin._claims import Claims
from eosin._records import Log, Record, merge, read_run_json
from eosin.features._devices import EncoderChoice
from eosin.features._encoding import Extraction
from eosin.features._store import find_bags, write_bag
from eosin.mil._crossval import PREDICTIONS, crossval
from eosin.mil._predict import predict
from eosin.mil._recipe import Recipe
from eosin.mil._splits import make_splits
from eosin.mil._study import Study, open_study
from eosin.report._evaluation import report_crossval
from eosin.wsi._coordinates import read_footer, write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile, find_slides

TILING = Tiling(mpp=0.5, patch_size=256)
GRID = TileGrid(np.array([[0, 0], [256, 0], [0, 256], [256, 256]], np.int64), 256, TILING, (2048, 2048), 0.5)
ENCODER = "he_texture"
SOME, MOST_LINKS = 5_000, 50_000
RECIPE = {"aggregator": {"name": "mean"}, "training": {"epochs": 1, "select": "last", "patience": 0, "refit": False}}


class Made:
    """A job of so many slides."""

    def __init__(self, folder: Path, n_slides: int, *, spread: bool = False) -> None:
        self.folder, self.job = folder, JobFolder(folder / "job")
        if spread:
            self.job.spread()
        self.run = Extraction(self.job, TILING.folder, EncoderChoice(ENCODER, None, "fp32", compiled=False).load("cpu"))
        (folder / "slide.tiff").touch()
        self.slides = [SlideFile(folder / "slide.tiff", f"S{number:06d}") for number in range(n_slides)]
        self.labels = folder / "labels.csv"
        lines = (f"P{i // 2:06d},S{i:06d},{'ab'[i // 2 % 2]}" for i in range(n_slides))
        self.labels.write_text("\n".join(chain(["patient_id,slide_id,label"], lines)))

    @property
    def features(self) -> Path:
        """Folder of the feature files."""
        return self.job.features_dir(TILING.folder, ENCODER)

    def write(self, slide: SlideFile) -> None:
        """Write coordinates and features of a slide."""
        path, name = self.job.patches(TILING.folder, slide.slide_id), slide.slide_id
        write_grid(path, GRID, slide_id=name, mpp_source="user", fingerprint="f")
        value = float(int(name[1:]) // 2 % 2)  # by the label, with a little noise
        rows = np.random.default_rng(int(name[1:])).normal(value, 1, (4, self.run.encoder.dim)).astype(np.float32)
        write_bag(self.run.output(slide), self.run.bag(slide, GRID, read_footer(path), rows))

    def write_all(self) -> None:
        """Write all files."""
        for slide in self.slides:
            self.write(slide)

    def link_all(self) -> None:
        """Write the files of one slide in so many as a file may have names, and links to them for the others."""
        for number, slide in enumerate(self.slides):
            if number % MOST_LINKS == 0:
                first = slide
                self.write(first)
                continue
            for find in (self.run.patches, self.run.output):
                path = find(slide)
                path.parent.mkdir(exist_ok=True)
                os.link(find(first), path)

    def claim_all(self) -> None:
        """Claim and release every slide."""
        claims = Claims()
        for slide in self.slides:
            claims.take(self.run.output(slide))
            claims.release(self.run.output(slide))

    def record_all(self) -> None:
        """Append two lines for every slide, as a worker does."""
        log = Log(self.job.run_json)
        for slide in self.slides:
            log.begin(slide.slide_id, "extract")
            log.add(Record(slide.slide_id, "extract", "ok", "", "4 tiles", 1.0))

    def skip_all(self) -> None:
        """Look whether every slide is done, as a command that is run again does."""
        assert all(map(self.run.is_done, self.slides))

    def open(self) -> Study:
        """Open the study of features and labels."""
        return open_study(self.features, self.labels)


def seconds(function: Callable[..., object], *args: object) -> float:
    """Return the processor time of a call, children included."""
    before = spent()
    function(*args)
    return spent() - before


def spent() -> float:
    """Return the processor time of this process and its children so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure_store(made: Made) -> Iterator[tuple[str, float]]:
    """Yield what a stage costs besides its work."""
    yield "list features", seconds(find_bags, made.features)
    yield "claims", seconds(made.claim_all)
    yield from measure_records(made)


def measure_records(made: Made) -> Iterator[tuple[str, float]]:
    """Yield what the records of a stage cost: one by one, and once in a run."""
    yield "append records", seconds(made.record_all)
    yield "merge records", seconds(merge, made.job.run_json)
    yield "read all records", seconds(read_run_json, made.job.run_json)
    yield "open the records", seconds(Log, made.job.run_json)


def measure_study(made: Made) -> Iterator[tuple[str, float]]:
    """Yield what a study costs: opening, splits, one epoch on one of two folds, prediction, report."""
    yield "open the study", seconds(made.open)
    study, recipe, out = made.open(), Recipe.parse(RECIPE), made.folder / "cv"
    yield "splits", seconds(lambda: make_splits(study.cohort, folds=5))
    splits, metrics = make_splits(study.cohort, folds=2), {}
    train = lambda: crossval(recipe, study.task, study.examples, splits, cohort=study.cohort, out=out, device="cpu")  # noqa: E731
    yield "2 folds of 1 epoch", seconds(lambda: metrics.update(train()))
    yield "report", seconds(report_crossval, made.folder / "report.html", metrics, out / PREDICTIONS, study)
    files = find_bags(made.features)
    yield "prediction", seconds(lambda: predict(out / "fold_0", files, made.folder / "p.csv", device="cpu"))


def measure(n_slides: int) -> Iterator[tuple[str, float]]:
    """Yield each step with its seconds."""
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name), n_slides)
        yield "write", seconds(made.write_all)
        pictures = Path(name) / "slides"
        pictures.mkdir()
        for slide in made.slides:
            (pictures / f"{slide.slide_id}.tiff").touch()
        yield "list slides", seconds(find_slides, [pictures])
        yield from measure_store(made)
        yield "skip checks", seconds(made.skip_all)
        yield from measure_study(made)


def measure_linked(n_slides: int) -> Iterator[tuple[str, float]]:
    """Yield the steps for files that are links."""
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name), n_slides)
        made.link_all()
        yield from measure_store(made)
        yield "skip checks", seconds(made.skip_all)
        yield from measure_study(made)


def measure_spread(n_slides: int) -> Iterator[tuple[str, float]]:
    """Yield the steps that look at entries, in one folder and in 256; some slides stand for all of them."""
    for spread in (False, True):
        with tempfile.TemporaryDirectory() as name:
            made = Made(Path(name), n_slides, spread=spread)
            made.link_all()
            layout = "256 folders" if spread else "one folder"
            yield f"list features ({layout})", seconds(find_bags, made.features)
            if spread:
                yield f"open the study ({layout})", seconds(made.open)
                yield from ((f"{step} ({layout})", taken) for step, taken in measure_records(made))
            made.slides = made.slides[:: max(1, n_slides // SOME)]
            share = n_slides / len(made.slides)
            yield f"claims ({layout})", share * seconds(made.claim_all)
            yield f"skip checks ({layout})", share * seconds(made.skip_all)


def main() -> None:
    """Measure and print; write a table with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=int, nargs="*", default=[100, 400, 1600])
    parser.add_argument("--linked", type=int, nargs="*", default=[])
    parser.add_argument("--spread", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table: list[list[object]] = [["step", "slides", "seconds", "per_slide_ms", "growth"]]
    print(*table[0], sep=",", flush=True)
    first: dict[str, float] = {}
    runs: Sequence[tuple[int, Iterator[tuple[str, float]]]] = [
        *((number, measure(number)) for number in arguments.slides),
        *((number, measure_linked(number)) for number in arguments.linked),
        *((number, measure_spread(number)) for number in arguments.spread),
    ]
    for n_slides, steps in runs:
        for step, taken in steps:
            each = 1e3 * taken / n_slides
            before = first.setdefault(step.partition(" (")[0], each)
            growth = f"{each / before:.2f}" if before else ""
            table.append([step, n_slides, f"{taken:.2f}", f"{each:.3f}", growth])
            print(*table[-1], sep=",", flush=True)
            if arguments.out:
                with arguments.out.open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()

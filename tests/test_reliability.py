"""Long runs: a thousand slides of which some are bad, ten thousand in one process, the same bytes again and again.

`EOSIN_CAMPAIGN` scales the counts (1 is what `docs/reliability.md` states); at 0.05 they take minutes.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from bokeh.models import Div
from numpy.typing import NDArray
from scaling import SEED, scaled
from typer.testing import CliRunner

from eosin._files import append_line
from eosin._records import read_run_json
from eosin.cli.app import app
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import read_bag, write_bag
from eosin.viewer._server import serving
from eosin.wsi import _job as wsi_job
from eosin.wsi._coordinates import read_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides, open_slide
from eosin.wsi._synthetic import Cohort, make_cohort

pytestmark = pytest.mark.slow
TILING = ("--mpp", "1.0", "--patch-size", "64")
LEAK_MIB = 50


def eosin(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output[-2000:]
    return done.output


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight slides of eight patients, 0.4 mm wide."""
    folder = tmp_path_factory.mktemp("painted")
    make_cohort(folder, Cohort(n_slides=8, slides_per_patient=1, size_um=(400.0, 420.0)))
    return folder


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with open_slide(path) as slide:
        return slide.read_level(0, (0, 0), slide.size_px0)


def aperio(path: Path, pixels: NDArray[np.uint8], *, mpp: str = "|MPP = 0.5") -> None:
    words = f"Aperio Image Library v12\n1x1 JPEG |AppMag = 20{mpp}"
    tifffile.imwrite(
        path, pixels, tile=(256, 256), compression="jpeg", photometric="rgb", description=words, metadata=None
    )


def plain(path: Path, pixels: NDArray[np.generic], *, per_cm: float = 20_000) -> None:
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit=3)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def blank(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        place, size = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    data[place : place + size] = bytes(size)
    path.write_bytes(data)


def truncated_svs(path: Path, pixels: NDArray[np.uint8]) -> None:
    aperio(path, pixels)
    cut(path, 0.5)


def truncated_tiff(path: Path, pixels: NDArray[np.uint8]) -> None:
    plain(path, pixels)
    cut(path, 0.3)


def corrupt(path: Path, pixels: NDArray[np.uint8]) -> None:
    aperio(path, pixels)
    blank(path)


Bad = Callable[[Path, NDArray[np.uint8]], object]
BAD: dict[str, tuple[Bad, str]] = {  # what is wrong: how it is made, the reason that the record gives
    "truncated.svs": (truncated_svs, "truncated"),
    "cut.tiff": (truncated_tiff, "truncated"),
    "corrupt.svs": (corrupt, "corrupt"),
    "scale.svs": (lambda path, pixels: aperio(path, pixels, mpp=""), "no-mpp"),
    "metres.tiff": (lambda path, pixels: plain(path, pixels, per_cm=1), "bad-mpp"),
    "floats.tiff": (lambda path, pixels: plain(path, pixels.astype(np.float32)), "unsupported-pixels"),
    "dark.tiff": (lambda path, pixels: plain(path, np.zeros_like(pixels)), "dark-background"),
    "empty.tiff": (lambda path, _: path.write_bytes(b""), "unsupported"),
    "text.svs": (lambda path, _: path.write_text("see the other disk\n" * 99), "unsupported"),
    "link.svs": (lambda path, _: path.symlink_to("/nowhere/link.svs"), "missing"),
}


def test_of_a_thousand_slides_every_bad_one_is_named_and_every_good_one_is_done(painted: Path, tmp_path: Path) -> None:
    n_slides = scaled(1000, 60)
    n_bad = max(len(BAD), n_slides // 20)
    sources = sorted((painted / "slides").iterdir())
    slides, expected = tmp_path / "slides", {}
    slides.mkdir()
    for number in range(n_slides - n_bad):
        os.link(sources[number % len(sources)], slides / f"good{number:04d}.tiff")
    for number in range(n_bad):
        name, (make, reason) = list(BAD.items())[number % len(BAD)]
        make(slides / f"{number:03d}{name}", pixels_of(sources[number % len(sources)]))
        expected[Path(f"{number:03d}{name}").stem] = reason
    eosin("tile", slides, "--job", tmp_path / "job", *TILING, "--workers", 2, code=1)
    records = read_run_json(tmp_path / "job/run.json")
    assert {record.slide_id: record.reason for record in records if record.status == "failed"} == expected
    assert sum(record.status == "ok" for record in records) == n_slides - n_bad
    eosin("tile", painted / "slides", "--job", tmp_path / "clean", *TILING)
    of_job, clean = (next((tmp_path / name).glob("*/patches")) for name in ("job", "clean"))
    for number in range(n_slides - n_bad):
        made, whole = of_job / f"good{number:04d}_patches.h5", clean / f"{sources[number % 8].stem}_patches.h5"
        np.testing.assert_array_equal(read_grid(made).origins_px0, read_grid(whole).origins_px0)


def tile_in_a_fork(slides: Path, job: Path, log: Path) -> int:
    """Tile in another process, which writes a line for each slide that it has finished; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        write_grid = wsi_job.write_grid

        def noted(path: Path, *arguments: Any, **options: Any) -> None:
            write_grid(path, *arguments, **options)
            append_line(log, path.name)

        wsi_job.write_grid = noted
        status = tile_slides(find_slides([slides]), JobFolder(job), Tiling(mpp=1.0, patch_size=64)).exit_code
    finally:
        os._exit(status)


def molest(start: Callable[[], int], rng: random.Random, count: int = 4) -> int:
    """Let processes work, of which one after another is stopped, continued, or killed and started again."""
    living, kills = [start() for _ in range(count)], 0
    while living:
        time.sleep(rng.uniform(0.0, 0.1))
        living = [child for child in living if os.waitpid(child, os.WNOHANG) == (0, 0)]
        if kills == 2 * count:  # from here on they are left alone, or it would never end
            for child in living:
                os.kill(child, signal.SIGCONT)
        elif living:
            victim, number = rng.choice(living), rng.choice([signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL])
            os.kill(victim, number)
            if number == signal.SIGKILL:
                os.waitpid(victim, 0)
                living[living.index(victim)] = start()
                kills += 1
    return kills


def test_four_processes_on_one_job_that_are_stopped_and_killed(painted: Path, tmp_path: Path) -> None:
    rounds, slides, rng = scaled(50, 2), tmp_path / "slides", random.Random(SEED)
    slides.mkdir()
    for number, source in enumerate(sorted((painted / "slides").iterdir()) * 3):
        os.link(source, slides / f"s{number:02d}.tiff")
    eosin("tile", slides, "--job", tmp_path / "clean", *TILING)
    whole = {path.name: path.read_bytes() for path in next((tmp_path / "clean").glob("*/patches")).glob("[!.]*")}
    twice = kills = 0
    for turn in range(rounds):
        job, log = tmp_path / f"job{turn}", tmp_path / f"log{turn}"
        kills += molest(lambda job=job, log=log: tile_in_a_fork(slides, job, log), rng)  # type: ignore[misc]
        eosin("tile", slides, "--job", job, *TILING)
        made = next(job.glob("*/patches"))
        assert {path.name: path.read_bytes() for path in made.glob("[!.]*")} == whole
        assert [record.status for record in read_run_json(job / "run.json")].count("failed") == 0
        assert not [path for path in job.rglob(".*") if path.is_file()]
        done = log.read_text().split()
        twice += len(done) - len(set(done))
        print(f"round {turn + 1}: {kills} kills, {twice} slides made twice", flush=True)  # noqa: T201
    assert kills > rounds
    assert twice < 0.01 * rounds * len(whole)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ten_thousand_slides_in_one_process_leak_nothing(painted: Path, tmp_path: Path) -> None:
    rounds, source = scaled(100, 4), next((painted / "slides").iterdir())
    job, before = JobFolder(tmp_path / "job"), (0.0, 0)
    for turn in range(rounds):
        folder = tmp_path / f"slides{turn}"
        folder.mkdir()
        for number in range(100):
            os.link(source, folder / f"s{turn:03d}-{number:03d}.tiff")
        report = tile_slides(find_slides([folder]), job, Tiling(mpp=1.0, patch_size=64))
        assert not report.failed
        if turn == 1:
            before = resident_mib(), descriptors()
        print(f"{100 * (turn + 1)} slides, {resident_mib() - before[0]:.1f} MiB more", flush=True)  # noqa: T201
    grown = resident_mib() - before[0]
    print(f"{100 * rounds} slides, {grown:.1f} MiB, {descriptors() - before[1]} descriptors")  # noqa: T201
    assert grown < LEAK_MIB
    assert descriptors() <= before[1]
    assert not [path for path in job.root.rglob(".*") if path.is_file()]


def test_the_same_inputs_give_the_same_bytes(painted: Path, tmp_path: Path) -> None:
    """In any order, with any number of workers and any size of batch, on one machine."""
    rng, made = random.Random(0), set()
    names = sorted((painted / "slides").iterdir())
    for turn in range(scaled(20, 4)):
        job = tmp_path / f"job{turn}"
        order = rng.sample(names, len(names))
        eosin("tile", *order, "--job", job, *TILING, "--workers", rng.choice([0, 1, 2]))
        extract = (
            "--encoder",
            "he_texture",
            "--workers",
            rng.choice([0, 1, 2]),
            "--batch-size",
            rng.choice([1, 7, 64]),
        )
        eosin("extract", *order, "--job", job, *extract)
        features = next(job.glob("*/features_he_texture"))
        recipe = ("--recipe", "abmil", "--set", "recipe.training.epochs=2", "--precision", "fp32")
        eosin("train", "--features", features, "--labels", painted / "labels.csv", *recipe, "--out", job / "model")
        eosin("predict", "--model", job / "model", "--features", features, "--out", job / "p.csv")
        digest = hashlib.sha256()
        for path in sorted(features.glob("*.h5")):
            digest.update(read_bag(path).features.tobytes())
            digest.update(read_grid(path.parents[1] / "patches" / f"{path.stem}_patches.h5").origins_px0.tobytes())
        digest.update((job / "model/model.safetensors").read_bytes())
        digest.update((job / "p.csv").read_bytes())
        made.add(digest.hexdigest())
        print(f"run {turn + 1}: {len(made)} digests", flush=True)  # noqa: T201
    assert len(made) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("recipe", ["everyday", "abmil"])
def test_a_bag_of_200_000_tiles_fits(recipe: str, dtype: str, tmp_path: Path) -> None:
    """Under a limit of the address space, which the libraries alone fill to some GiB."""
    spec, n_tiles = FeatureSpec(encoder="toy", dim=1024), scaled(200_000, 40_000)
    rng = np.random.default_rng(0)
    for number, n in enumerate([n_tiles, 50, 50, 50, 50, 50]):
        rows = rng.random((n, spec.dim), np.float32).astype(dtype)
        write_bag(tmp_path / f"features/s{number}.h5", FeatureBag(rows, spec, f"s{number}"))
    del rows
    labels = "".join(f"p{n},s{n},{'ab'[n % 2]}\n" for n in range(6))
    (tmp_path / "labels.csv").write_text(f"patient_id,slide_id,label\n{labels}")
    options = ("--recipe", recipe, "--set", "recipe.training.epochs=1", "--set", "recipe.training.select=last")
    features, model = ("--features", tmp_path / "features"), tmp_path / "model"
    train = limited("train", *features, "--labels", tmp_path / "labels.csv", *options, "--out", model)
    predict = limited("predict", "--model", model, *features, "--out", tmp_path / "p.csv")
    print(f"{recipe}, {dtype}: {train:.2f} GiB to train, {predict:.2f} GiB to predict")  # noqa: T201
    assert train < 4
    assert predict < 1.5


def limited(*arguments: object) -> float:
    """Run a command with 12 GiB of address space; return the GiB of memory that it took at most."""
    limit = 12 * 2**30
    script = "import resource, sys\nfrom eosin.cli.app import app\n"
    script += f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
    script += "try: app(sys.argv[1:])\n"
    script += "finally: open('peak', 'w').write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))"
    folder = Path(str(arguments[-1])).parent
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int((folder / "peak").read_text()) / 2**20


def test_a_viewer_that_is_asked_for_long_stays_flat() -> None:
    """An hour of page loads, at least a minute in the shortened campaign."""

    class Store:
        def tile(self, *_place: object) -> bytes:
            return bytes(50_000)

    seconds, before, asked = scaled(3600, 60), (0.0, 0), 0
    end = time.monotonic() + seconds
    with serving(lambda document, _template: document.add_root(Div(text="x" * 100_000)), Store()) as url:  # type: ignore[arg-type]
        while time.monotonic() < end:
            with urllib.request.urlopen(url) as answer:
                answer.read()
            with urllib.request.urlopen(f"{url}tiles/{'0' * 16}/colour/0/0/0.jpg") as answer:
                answer.read()
            asked += 1
            time.sleep(seconds / 3000)
            if asked == 300:
                before = resident_mib(), descriptors()
        time.sleep(20)  # documents of pages that nobody has opened go after 15 s
        assert asked > 300
        grown = resident_mib() - before[0]
        print(f"{asked} page loads, {grown:.1f} MiB, {descriptors() - before[1]} descriptors")  # noqa: T201
        assert grown < LEAK_MIB
        assert descriptors() <= before[1] + 5

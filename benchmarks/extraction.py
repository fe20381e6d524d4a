"""Feature extraction beside the usual loops, all run here: tiles per second, and how long the encoder computes.

`eosin` is `eosin.features._extract.extract`; `clam` and `trident` are in `plain_extraction.py`. All use the same
network with the same random weights, the same tiles and as many decoding processes, in turns, on slides that were read
once.

`busy` is the share of wall time, from the loaded encoder to the last file, that passes inside the network.

Run: ``python benchmarks/extraction.py --out benchmarks/results/extraction.csv``
"""

import argparse
import csv
import platform
import statistics
import tempfile
import time
from pathlib import Path

COLUMNS = (
    "machine", "side", "encoder", "slides", "tiles", "workers", "batch", "turns", "seconds", "tiles_per_second", "busy",
)  # fmt: skip


def main() -> None:
    """Paint slides, run all sides in turns, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "extraction.csv")
    parser.add_argument("--encoder", default="timm:vit_small_patch16_224?random")
    parser.add_argument("--slides", type=int, default=10)
    parser.add_argument("--side", type=int, nargs=2, default=(3072, 2048), help="width and height of a slide in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Return one row per side, the medians of its turns."""
    import torch  # not at the top: decoding processes import this file again
    from plain_extraction import Stopwatch, run_clam, run_trident

    from eosin.features import _inference as inference
    from eosin.features._extract import extract
    from eosin.wsi._coordinates import read_grid
    from eosin.wsi._grid import Tiling
    from eosin.wsi._job import JobFolder, tile_slides
    from eosin.wsi._slide_file import find_slides
    from eosin.wsi._synthetic import make_slide

    for number in range(arguments.slides):
        make_slide(folder / f"s{number}.tiff", size_px0=tuple(arguments.side), seed=number)
    slides = find_slides([folder])
    encoder = inference.EncoderChoice(arguments.encoder).load(arguments.device)
    network = encoder._network
    inference.load_encoder = lambda *_, **__: encoder
    options = {"batch": arguments.batch, "workers": arguments.workers}

    def run_eosin(job: JobFolder) -> None:
        report = extract(slides, job, arguments.encoder, batch_size=arguments.batch, workers=arguments.workers)
        assert report.count("ok") == len(slides), report.failed

    sides = {
        "eosin": run_eosin,
        "clam": lambda job: run_clam(slides, job, encoder, network, **options),
        "trident": lambda job: run_trident(slides, job, encoder, network, **options),
    }
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(arguments.turns):
        for side, run in sides.items():
            job = JobFolder(folder / f"{side}{turn}")
            tile_slides(slides, job, Tiling())
            watch = Stopwatch(network, encoder.device)
            started = time.perf_counter()
            run(job)
            seconds = time.perf_counter() - started
            watch.close()
            found[side].append((seconds, watch.seconds / seconds))
            print(turn, side, *(round(value, 3) for value in found[side][-1]), sep="\t", flush=True)
    tiles = sum(read_grid(job.patches(Tiling().folder, slide.slide_id)).n_tiles for slide in slides)
    machine = f"{platform.machine()}, {encoder.device}, {torch.get_num_threads()} threads"
    rows = []
    for side, turns in found.items():
        seconds, busy = (statistics.median(values) for values in zip(*turns, strict=True))
        values = (
            machine, side, arguments.encoder, len(slides), tiles, arguments.workers, arguments.batch, arguments.turns,
            round(seconds, 2), round(tiles / seconds, 2), round(busy, 3),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(*values[1:], sep="\t", flush=True)
    return rows


if __name__ == "__main__":
    main()

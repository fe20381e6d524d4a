"""Feature extraction beside the usual loop, both run here: tiles per second, and how long the encoder computes.

`eosin` is `eosin.features.extract.extract`. `loop` is what most tools do: one slide at a time, a PyTorch `DataLoader`
over single-tile ``read_region`` calls with Pillow and torchvision, then the encoder, then an appended HDF5 file. Both
use the same encoder object with the same random weights, the same tiles and as many decoding processes.

`busy` is the share of wall time, from the loaded encoder to the last file, that passes inside the encoder.

Run: ``python benchmarks/extraction.py --out benchmarks/results/extraction.csv``
"""

import argparse
import csv
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from eosin.features import extract as extraction
from eosin.features.inference import Encoder, load_encoder
from eosin.wsi.coordinates import read_grid
from eosin.wsi.grid import Tiling
from eosin.wsi.job import JobFolder, tile_slides
from eosin.wsi.slide import SlideFile, find_slides
from eosin.wsi.synthetic import make_slide

COLUMNS = ("machine", "side", "encoder", "slides", "tiles", "workers", "batch", "seconds", "tiles_per_second", "busy")


class TimedEncoder(Encoder):
    """An encoder that adds up the time it computes."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.spec, encoder.weights_hash, encoder._network, device=str(encoder.device))
        self.seconds = 0.0

    def start(self, tiles: NDArray[np.uint8], *, precision: Any = None) -> Callable[[], NDArray[np.float32]]:
        """Encode and note how long it took."""
        started = time.perf_counter()
        rows = super().start(tiles, precision=precision)()
        self.seconds += time.perf_counter() - started
        return lambda: rows

    def forward(self, pictures: torch.Tensor) -> NDArray[np.float32]:
        """Encode pictures that are transformed already."""
        started = time.perf_counter()
        with torch.inference_mode():
            rows = self._network(pictures.to(self.device)).float().cpu().numpy()
        self.seconds += time.perf_counter() - started
        return rows


class SlideTiles(Dataset):
    """The tiles of one slide, one ``read_region`` each."""

    def __init__(self, slide: SlideFile, patches: Path, transform: Callable[[Any], torch.Tensor]) -> None:
        grid = read_grid(patches)
        self.path, self.transform, self.side = slide.path, transform, grid.tile_px0
        self.origins = grid.origins_px0.tolist()
        self.handle: openslide.OpenSlide | None = None

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.handle is None:
            self.handle = openslide.OpenSlide(self.path)
        tile = self.handle.read_region(tuple(self.origins[index]), 0, (self.side, self.side))
        return self.transform(tile.convert("RGB"))


def run_loop(slides: list[SlideFile], job: JobFolder, encoder: TimedEncoder, *, batch: int, workers: int) -> None:
    """Extract as most tools do."""
    spec = encoder.spec
    transform = tv.Compose([tv.Resize(spec.input_px), tv.ToTensor(), tv.Normalize(spec.mean, spec.std)])
    tiling = job.tilings()[0]
    for slide in slides:
        data = SlideTiles(slide, job.patches(tiling, slide.slide_id), transform)
        with h5py.File(job.root / f"{slide.slide_id}.loop.h5", "w") as file:
            rows = file.create_dataset(
                "features", (0, spec.dim), "f4", maxshape=(None, spec.dim), chunks=(32, spec.dim)
            )
            for pictures in DataLoader(data, batch_size=batch, num_workers=workers):
                new = encoder.forward(pictures)
                rows.resize(len(rows) + len(new), axis=0)
                rows[-len(new) :] = new


def run_eosin(slides: list[SlideFile], job: JobFolder, encoder: TimedEncoder, *, batch: int, workers: int) -> None:
    """Extract with eosin; only the loading of the encoder is taken out."""
    plain, extraction.load_encoder = extraction.load_encoder, lambda *_, **__: encoder
    try:
        report = extraction.extract(slides, job, encoder.spec.name, batch_size=batch, workers=workers)
    finally:
        extraction.load_encoder = plain
    assert not report.failed, report.failed


SIDES = {"loop": run_loop, "eosin": run_eosin}


def main() -> None:
    """Paint slides, run both sides in turns, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "extraction.csv")
    parser.add_argument("--encoder", default="timm:vit_small_patch16_224?random")
    parser.add_argument("--slides", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    loaded = load_encoder(arguments.encoder, device=arguments.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.slides):
            make_slide(Path(folder) / f"s{number}.tiff", size_px0=(3072, 2048), seed=number)
        slides = find_slides([Path(folder)])
        for turn in range(arguments.turns):
            for side, run in SIDES.items():
                job = JobFolder(Path(folder) / f"{side}{turn}")
                tile_slides(slides, job, Tiling())
                tiles = sum(read_grid(job.patches(Tiling().folder, slide.slide_id)).n_tiles for slide in slides)
                encoder = TimedEncoder(loaded)
                started = time.perf_counter()
                run(slides, job, encoder, batch=arguments.batch, workers=arguments.workers)
                seconds = time.perf_counter() - started
                values = (
                    f"{platform.machine()}, {arguments.device}, {torch.get_num_threads()} threads",
                    side,
                    arguments.encoder,
                    len(slides),
                    tiles,
                    arguments.workers,
                    arguments.batch,
                    round(seconds, 2),
                    round(tiles / seconds, 2),
                    round(encoder.seconds / seconds, 3),
                )
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print(*values[1:], sep="\t", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

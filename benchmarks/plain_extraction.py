"""Feature extraction as most tools do it, written from their published descriptions.

One slide at a time: a PyTorch `DataLoader` over single-tile ``read_region`` calls with Pillow and torchvision in its
workers, then the encoder. CLAM appends every batch to an HDF5 file with 32 rows per chunk and writes the tensor once
more as ``.pt``; TRIDENT keeps the rows and writes them at the end of the slide with one row per chunk.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from eosin.features._inference import Encoder
from eosin.wsi._coordinates import read_grid
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile


class Stopwatch:
    """Adds up the time that passes inside a network, on whatever side calls it."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.seconds = 0.0
        self.device = device
        self.hooks = [network.register_forward_pre_hook(self._start), network.register_forward_hook(self._stop)]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _start(self, *_: object) -> None:
        self.started = self._now()

    def _stop(self, *_: object) -> None:
        self.seconds += self._now() - self.started

    def close(self) -> None:
        """Leave the network."""
        for hook in self.hooks:
            hook.remove()


class SlideTiles(Dataset[torch.Tensor]):
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


def encoded(
    slide: SlideFile, job: JobFolder, encoder: Encoder, network: nn.Module, *, batch: int, workers: int
) -> Iterator[NDArray[np.float32]]:
    """Yield the rows of one slide batch by batch."""
    spec = encoder.spec
    transform = tv.Compose([tv.Resize(spec.input_px), tv.ToTensor(), tv.Normalize(spec.mean, spec.std)])
    data = SlideTiles(slide, job.patches(job.tilings()[0], slide.slide_id), transform)
    pinned = encoder.device.type == "cuda"
    with torch.inference_mode():
        for pictures in DataLoader(data, batch_size=batch, num_workers=workers, pin_memory=pinned):
            yield network(pictures.to(encoder.device, non_blocking=True)).float().cpu().numpy()


def run_clam(slides: list[SlideFile], job: JobFolder, encoder: Encoder, network: nn.Module, **options: int) -> None:
    """Extract as CLAM: append to HDF5, then a tensor file."""
    for slide in slides:
        path, dim = job.root / f"{slide.slide_id}.clam.h5", encoder.dim
        for rows in encoded(slide, job, encoder, network, **options):
            with h5py.File(path, "a") as file:
                if "features" not in file:
                    file.create_dataset("features", (0, dim), "f4", maxshape=(None, dim), chunks=(32, dim))
                file["features"].resize(len(file["features"]) + len(rows), axis=0)
                file["features"][-len(rows) :] = rows
        with h5py.File(path, "r") as file:
            torch.save(torch.from_numpy(file["features"][:]), path.with_suffix(".pt"))


def run_trident(slides: list[SlideFile], job: JobFolder, encoder: Encoder, network: nn.Module, **options: int) -> None:
    """Extract as TRIDENT: all rows in memory, written at the end of the slide."""
    for slide in slides:
        rows = np.concatenate(list(encoded(slide, job, encoder, network, **options)))
        with h5py.File(job.root / f"{slide.slide_id}.trident.h5", "w") as file:
            file.create_dataset("features", data=rows, chunks=(1, encoder.dim), maxshape=(None, encoder.dim))

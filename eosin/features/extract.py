"""Tiles to features for many slides: the device encodes while readers decode, every file is whole or absent."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eosin.batch import Outcome, Record, Report, run_batch
from eosin.errors import ConfigError, EosinError, FeatureFileError, OutputError, SlideError
from eosin.features import he_texture
from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.encoders import Precision, folder_name
from eosin.features.inference import Encoder, PendingRows, load_encoder
from eosin.features.reading import ReadRequest, SlideEnd, SlideReaders, TileBatch
from eosin.features.store import read_footer, write_bag
from eosin.files import file_fingerprint
from eosin.wsi.coordinates import CoordsFooter, read_grid
from eosin.wsi.coordinates import read_footer as read_coords_footer
from eosin.wsi.grid import TileGrid
from eosin.wsi.job import JobFolder
from eosin.wsi.slide import SlideFile

logger = logging.getLogger(__name__)

MPP_ADVICE = 0.1
TILING_NAME = re.compile(r"(?P<mpp>[\d.]+)mpp_(?P<px>\d+)px_")
FLOAT16_MAX = float(np.finfo(np.float16).max)


def extract(
    slides: Sequence[SlideFile],
    job: JobFolder,
    encoder: str,
    *,
    weights: Path | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str = "auto",
    tiling: str | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Encode the tiles of slides into ``JOB/<tiling>/features_<encoder>/<slide>.h5``.

    Slides whose file matches slide, tiles, weights and options are skipped, so a run that was killed continues where
    it stopped.

    Parameters
    ----------
    slides : sequence of SlideFile
        Tiled before with `eosin.wsi.stage.tile_slides`.
    job : JobFolder
        Holds the tile grids and receives the features.
    encoder : str
        Name as `eosin.features.encoders.find_encoder` takes it.
    weights : Path, optional
        Local weights.
    batch_size : int
        Tiles per step; halved, with a warning, when the device runs out of memory.
    precision : "fp32", "bf16" or "fp16"
        Autocast type; features of the latter two are stored as float16.
    device : str
        ``auto`` takes the first GPU when there is one.
    tiling : str, optional
        Name of the tiling's folder in the job; needed when the job has several.
    shard : (int, int)
        Index and number of shards.
    workers : int
        Processes that decode, each one slide at a time; 0 decodes in this process.
    progress : callable, optional
        Called with each record.

    Returns
    -------
    Report
        Failed slides carry a reason: ``not-tiled``, ``changed``, ``non-finite``, ``crashed``, or the reader's.

    Raises
    ------
    ConfigError
        When the job has no tiling or several, or encoder and options do not fit.
    OutputError
        When disk or device stop the run.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: needs at least 1")
    folder = _choose_tiling(job, tiling)
    run = Extraction(job, folder, load_encoder(encoder, weights=weights, precision=precision, device=_device(device)))
    run.check_tiles()
    todo = [slide for slide in slides[shard[0] :: shard[1]] if not run.is_done(slide)]
    waiting = {slide.slide_id for slide in todo}
    requests = [run.request(slide, batch_size) for slide in todo if run.is_tiled(slide)]
    with SlideReaders(requests, workers=workers) as readers:
        encoding = _Encoding(run, readers, todo, batch_size)
        return run_batch(
            slides,
            encoding.finish,
            key=lambda slide: slide.slide_id,
            stage=f"extract {folder}/{run.encoder.spec.name}",
            is_done=lambda slide: slide.slide_id not in waiting,
            run_json=job.run_json,
            shard=shard,
            progress=progress,
        )


def _choose_tiling(job: JobFolder, tiling: str | None) -> str:
    known = job.tilings()
    if not known:
        raise ConfigError(f"{job.root}: has no tiles yet; run `eosin tile` with the same --job first")
    if tiling is None and len(known) > 1:
        raise ConfigError(f"{job.root}: has several tilings ({', '.join(known)}); name one with --tiling")
    if tiling is not None and tiling not in known:
        raise ConfigError(f"{job.root}: has no tiling {tiling}; it has {', '.join(known)}")
    return tiling or known[0]


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"device {device!r} cannot be used here ({reason}); --device auto takes what there is"
        ) from None
    return device


@dataclass(frozen=True)
class Extraction:
    """One encoder on one tiling of a job: what determines a feature file, and where it lies."""

    job: JobFolder
    tiling: str
    encoder: Encoder

    def output(self, slide: SlideFile) -> Path:
        """Return the slide's feature file."""
        return self.job.features(self.tiling, folder_name(self.encoder.spec.name), slide.slide_id)

    def patches(self, slide: SlideFile) -> Path:
        """Return the slide's coordinates file."""
        return self.job.patches(self.tiling, slide.slide_id)

    def is_tiled(self, slide: SlideFile) -> bool:
        """Tell whether the slide has a coordinates file."""
        return self.patches(slide).is_file()

    def request(self, slide: SlideFile, batch_size: int) -> ReadRequest:
        """Return what a reader needs."""
        return ReadRequest(slide, self.patches(slide), batch_size)

    def is_done(self, slide: SlideFile) -> bool:
        """Tell whether the feature file is there and was made from this slide, these tiles and these options."""
        try:
            footer = read_footer(self.output(slide))
            grid = read_grid(self.patches(slide))
            same_slide = footer.input_fingerprint == file_fingerprint(slide.path)
        except (FeatureFileError, OSError):
            return False
        return same_slide and footer.n_rows == grid.n_tiles and footer.options_hash == self.options_hash(grid)

    def options_hash(self, grid: TileGrid) -> str:
        """Return 16 hexadecimal digits over all that determines the rows besides the slide."""
        facts = self._facts | {
            "encoder": self.encoder.spec.name,
            "weights": self.encoder.weights_hash,
            "tiling": grid.tiling.to_json(),
            "slide_mpp": repr(grid.slide_mpp),
            "coords": hashlib.sha256(grid.origins_px0.tobytes()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def bag(self, slide: SlideFile, grid: TileGrid, coords: CoordsFooter, rows: NDArray[np.float32]) -> FeatureBag:
        """Put the rows of a slide together with their meaning."""
        spec = FeatureSpec(
            encoder=self.encoder.spec.name,
            weights_hash=self.encoder.weights_hash,
            dim=self.encoder.dim,
            mpp=grid.tiling.mpp,
            patch_size=grid.tiling.patch_size,
        )
        facts = self._facts | {
            "input_fingerprint": file_fingerprint(slide.path),
            "options_hash": self.options_hash(grid),
            "mpp_source": coords.mpp_source,
        }
        if self.encoder.revision:
            facts["revision"] = self.encoder.revision
        return FeatureBag(self._stored(rows), spec, slide.slide_id, grid, facts)

    def _stored(self, rows: NDArray[np.float32]) -> NDArray[np.float16] | NDArray[np.float32]:
        fits = rows.size == 0 or float(np.abs(rows).max()) <= FLOAT16_MAX
        return rows.astype(np.float16) if self.encoder.precision != "fp32" and fits else rows

    @cached_property
    def _facts(self) -> dict[str, str]:
        return self.encoder.describe()

    def check_tiles(self) -> None:
        """Warn of tiles at another resolution than the encoder was trained on, refuse tiles that it cannot take."""
        named = TILING_NAME.match(self.tiling)
        if named is None:
            return
        mpp, side, spec = float(named["mpp"]), int(named["px"]), self.encoder.spec
        if spec.build is None and side < he_texture.MIN_TILE_PX:
            raise ConfigError(f"{spec.name} needs tiles of at least {he_texture.MIN_TILE_PX} px; these have {side}")
        if spec.mpp is not None and abs(mpp / spec.mpp - 1) > MPP_ADVICE:
            logger.warning("%s was trained on tiles of about %g µm/px; these have %g", spec.name, spec.mpp, mpp)


@dataclass
class _Partial:
    """A slide of which some tiles are encoded."""

    slide: SlideFile
    grid: TileGrid
    coords: CoordsFooter
    rows: NDArray[np.float32]


class _Encoding:
    """The loop that encodes whatever the readers bring and closes slides as they become complete."""

    def __init__(self, run: Extraction, readers: SlideReaders, slides: Sequence[SlideFile], batch_size: int) -> None:
        self.run = run
        self.events = iter(readers)
        self.slides = {slide.slide_id: slide for slide in slides}
        self.encode = TolerantEncoder(run.encoder, batch_size)
        self.partial: dict[str, _Partial] = {}
        self.results: dict[str, Outcome | EosinError] = {}
        self.closed: set[str] = set()  # what was read ahead of a slide that failed is dropped
        self.pending: list[tuple[SlideFile, TileBatch, PendingRows]] = []

    def finish(self, slide: SlideFile) -> Outcome:
        """Encode until this slide is complete; batches of other slides that come in between are encoded, too."""
        if not self.run.is_tiled(slide):
            raise SlideError(slide.path, "has no tiles in this job; run `eosin tile` on it first", code="not-tiled")
        while slide.slide_id not in self.results:
            self._take(next(self.events))
        result = self.results.pop(slide.slide_id)
        if isinstance(result, EosinError):
            raise result
        return result

    def _take(self, event: TileBatch | SlideEnd) -> None:
        slide = self.slides[event.slide_id]
        if isinstance(event, TileBatch):
            begun = [] if slide.slide_id in self.closed else [(slide, event, self.encode.start(event.tiles))]
            self._settle()
            self.pending = begun
            return
        self._settle()
        if slide.slide_id not in self.closed:
            with self._at_the_cost_of(slide):
                self._close(slide, event.error or self._write(slide))

    def _settle(self) -> None:
        """Take the rows of the batch that the device was left with."""
        for slide, batch, rows in self.pending:
            if slide.slide_id not in self.closed:
                with self._at_the_cost_of(slide):
                    self._keep(slide, batch, rows())
        self.pending = []

    @contextmanager
    def _at_the_cost_of(self, slide: SlideFile) -> Iterator[None]:
        """Note what goes wrong for this slide, not for the one that is waited for."""
        try:
            yield
        except OutputError:
            raise
        except EosinError as error:
            self._close(slide, error)
        except Exception as error:  # noqa: BLE001 - whatever one slide provokes must not stop the cohort
            self._close(slide, SlideError(slide.path, f"{type(error).__name__}: {error}", code="internal"))

    def _close(self, slide: SlideFile, result: Outcome | EosinError) -> None:
        self.results[slide.slide_id] = result
        self.closed.add(slide.slide_id)
        self.partial.pop(slide.slide_id, None)

    def _begun(self, slide: SlideFile) -> _Partial:
        if slide.slide_id not in self.partial:
            grid, coords = read_grid(self.run.patches(slide)), read_coords_footer(self.run.patches(slide))
            rows = np.full((grid.n_tiles, self.run.encoder.dim), np.nan, np.float32)
            self.partial[slide.slide_id] = _Partial(slide, grid, coords, rows)
        return self.partial[slide.slide_id]

    def _keep(self, slide: SlideFile, batch: TileBatch, rows: NDArray[np.float32]) -> None:
        begun = self._begun(slide)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            x, y = begun.grid.origins_px0[batch.index[bad[0]]].tolist()
            raise SlideError(
                slide.path,
                f"{self.run.encoder.spec.name} gives features that are not finite for {len(bad)} tiles, also in fp32; "
                f"the first lies at ({x}, {y})",
                code="non-finite",
            )
        begun.rows[batch.index] = rows

    def _write(self, slide: SlideFile) -> Outcome:
        begun = self._begun(slide)
        write_bag(self.run.output(slide), self.run.bag(slide, begun.grid, begun.coords, begun.rows))
        return Outcome() if len(begun.rows) else Outcome("empty", "no tissue, no features")


class TolerantEncoder:
    """An encoder with second attempts: less at a time when memory runs out, fp32 where values overflow.

    Parameters
    ----------
    encoder : Encoder
        What computes.
    batch_size : int
        Tiles per step to begin with.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder = encoder
        self.step = batch_size

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (b, D) float32; rows may still be not finite after fp32.

        Raises
        ------
        OutputError
            When the device has no memory for a single tile.
        """
        return self.start(tiles)()

    def start(self, tiles: NDArray[np.uint8]) -> PendingRows:
        """Begin to encode; the function returned waits for the rows and makes second attempts where they are needed."""
        try:
            begun = self.encoder.start(tiles) if len(tiles) <= self.step else None
        except Exception as error:  # noqa: BLE001 - raised again when the rows are asked for
            return partial(self._finish, tiles, partial(_raise, error))
        return partial(self._finish, tiles, begun)

    def _finish(self, tiles: NDArray[np.uint8], begun: PendingRows | None) -> NDArray[np.float32]:
        rows = self._attempt(begun)
        if rows is None:
            rows = self._steps(tiles, self.encoder.precision)
        if self.encoder.precision != "fp32" and not np.isfinite(rows).all():
            logger.warning("a batch is not finite in %s; computed again in fp32", self.encoder.precision)
            rows = self._steps(tiles, "fp32")
        return rows

    def _attempt(self, begun: PendingRows | None) -> NDArray[np.float32] | None:
        """Return the rows; None when memory ran out or nothing was begun."""
        try:
            return None if begun is None else begun()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._halve(error)
            return None

    def _steps(self, tiles: NDArray[np.uint8], precision: Precision) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = []
        start = 0
        while start < len(tiles):
            try:
                rows.append(self.encoder.encode(tiles[start : start + self.step], precision=precision))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(error)
                continue
            start += self.step
        return np.concatenate(rows)

    def _halve(self, error: RuntimeError) -> None:
        if self.step == 1:
            raise OutputError(str(self.encoder.device), "has no memory for a single tile of this encoder") from error
        self.step = self.step // 2
        torch.cuda.empty_cache()
        logger.warning("out of memory on %s; going on with %d tiles at a time", self.encoder.device, self.step)


def _raise(error: Exception) -> NDArray[np.float32]:
    raise error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

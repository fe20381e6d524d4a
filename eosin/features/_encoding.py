"""What makes a feature file, and the loop that encodes whatever readers bring until slides are complete."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eosin._batch import Outcome, tell_tiles
from eosin._files import file_fingerprint
from eosin._fingerprints import fingerprint
from eosin._processes import Stopped
from eosin.errors import ConfigError, EosinError, FeatureFileError, OutputError, SlideError
from eosin.features import _he_texture as he_texture
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._encoders import folder_name
from eosin.features._inference import Encoder, PendingRows, TolerantEncoder
from eosin.features._reading import ReadRequest, SlideEnd, SlideReaders, TileBatch
from eosin.features._store import read_footer, write_bag
from eosin.wsi._coordinates import CoordsFooter, read_grid
from eosin.wsi._coordinates import read_footer as read_coords_footer
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile
from eosin.wsi.inventory import ONLY_IMAGE

logger = logging.getLogger(__name__)

MPP_ADVICE = 0.1
WRITES_AHEAD = 2
FLOAT16_MAX = float(np.finfo(np.float16).max)

_END = object()

Result = Outcome | EosinError


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

    def request(self, slide: SlideFile, batch_size: int) -> ReadRequest | SlideEnd:
        """Return what a reader needs; for a slide without a coordinates file, the end with the code ``not-tiled``."""
        if self.is_tiled(slide):
            return ReadRequest(slide, self.patches(slide), batch_size)
        message = "has no tiles in this job; run `eosin tile` on this slide first"
        return SlideEnd(slide.slide_id, SlideError(slide.path, message, code="not-tiled"))

    def is_done(self, slide: SlideFile) -> bool:
        """Tell whether the feature file is there and was made from this slide, these tiles and these options."""
        try:
            footer = read_footer(self.output(slide))
            grid = read_grid(self.patches(slide))
            return footer.n_rows == grid.n_tiles and footer.options_hash == self.options_hash(slide, grid)
        except (FeatureFileError, OSError):
            return False

    def options_hash(self, slide: SlideFile, grid: TileGrid) -> str:
        """Return 16 hexadecimal digits over all that determines the rows."""
        return fingerprint(
            "extract",
            slide=[slide.version(), slide.scene, slide.plane],
            # the image counts only where a file holds several, so that features made before it was stored stay valid
            tiles=[grid.tiling, grid.slide_mpp, grid.origins_px0.tobytes(), *{grid.image} - {"", ONLY_IMAGE}],
            encoder=[self.encoder.spec.name, self._facts],
            weights=self.encoder.weights_hash,
        )

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
            "input_fingerprint": coords.fingerprint or file_fingerprint(slide.path),
            "options_hash": self.options_hash(slide, grid),
            "mpp_source": coords.mpp_source,
        }
        if self.encoder.revision:
            facts["revision"] = self.encoder.revision
        if self.encoder.compiled:
            facts["compiled"] = f"torch {torch.__version__}"
        return FeatureBag(self._stored(rows), spec, slide.slide_id, grid, facts)

    def _stored(self, rows: NDArray[np.float32]) -> NDArray[np.float16] | NDArray[np.float32]:
        fits = rows.size == 0 or float(np.abs(rows).max()) <= FLOAT16_MAX
        return rows.astype(np.float16) if self.encoder.precision != "fp32" and fits else rows

    @cached_property
    def _facts(self) -> dict[str, str]:
        return self.encoder.describe()

    def check_tiles(self, tiling: Tiling) -> None:
        """Warn of tiles at another resolution than the encoder was trained on, refuse tiles that it cannot take."""
        mpp, side, spec = tiling.mpp, tiling.patch_size, self.encoder.spec
        if spec.build is None and side < he_texture.MIN_TILE_PX:
            raise ConfigError(
                f"{spec.name} needs tiles of at least {he_texture.MIN_TILE_PX} px, these have "
                f"{side} px; tile the slides with a larger --patch-size"
            )
        if spec.mpp is not None and abs(mpp / spec.mpp - 1) > MPP_ADVICE:
            logger.warning(
                "%s was trained on tiles of about %g µm/px; these tiles have %g µm/px", spec.name, spec.mpp, mpp
            )


@dataclass
class _Partial:
    """A slide of which some tiles are encoded."""

    slide: SlideFile
    grid: TileGrid
    coords: CoordsFooter
    rows: NDArray[np.float32]
    n_done: int = 0


class Encoding:
    """The loop that encodes whatever the readers bring, and writes slides as they become complete.

    Files are written and verified in a thread of their own, so that the device does not wait for the disk.

    Parameters
    ----------
    run : Extraction
        What is computed.
    readers : SlideReaders
        Bring batches of several slides.
    slides : mapping of str to SlideFile
        By id; may grow while the loop runs.
    batch_size : int
        Tiles per step.
    begin : callable, optional
        Told the id of the slide whose tiles are encoded next.
    """

    def __init__(
        self,
        run: Extraction,
        readers: SlideReaders,
        slides: Mapping[str, SlideFile],
        *,
        batch_size: int,
        begin: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.run = run
        self.events = iter(readers)
        self.slides = slides
        self.begin = begin
        self.encode = TolerantEncoder(run.encoder, batch_size)
        self.partial: dict[str, _Partial] = {}
        self.results: dict[str, Result] = {}
        self.closed: set[str] = set()  # what was read ahead of a slide that failed is dropped
        self.pending: list[tuple[SlideFile, TileBatch, PendingRows]] = []
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="features")
        self.writing: deque[tuple[SlideFile, Future[Outcome]]] = deque()

    def __enter__(self) -> "Encoding":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.shutdown()

    def __iter__(self) -> Iterator[tuple[str, Result]]:
        """Yield every slide with its result, as they become complete; a run that is stopped names what was written."""
        try:
            while self._advance():
                yield from self._finished()
        except Stopped:
            self._collect(0)
            yield from self._finished()
            raise

    def _finished(self) -> Iterator[tuple[str, Result]]:
        while self.results:
            name = next(iter(self.results))
            yield name, self.results.pop(name)

    def forget(self, slide: SlideFile) -> None:
        """Let a slide that has a result be encoded again."""
        self.closed.discard(slide.slide_id)

    def _advance(self) -> bool:
        """Do the next piece of work; return False when there is none left."""
        event = next(self.events, _END)
        if isinstance(event, TileBatch | SlideEnd):
            self._take(event)
        else:
            self._settle()
        self._collect(0 if event is _END else WRITES_AHEAD)
        return event is not _END or bool(self.results)

    def _take(self, event: TileBatch | SlideEnd) -> None:
        slide = self.slides[event.slide_id]
        if isinstance(event, TileBatch):
            self.begin(slide.slide_id)
            begun = [] if slide.slide_id in self.closed else [(slide, event, self.encode.start(event.tiles))]
            self._settle()
            self.pending = begun
            return
        self._settle()
        if slide.slide_id in self.closed:
            return
        with self._at_the_cost_of(slide):
            if event.error is not None or event.message:
                self._close(slide, event.error or Outcome(message=event.message))
            else:
                self.writing.append((slide, self.writer.submit(self._write, self._begun(slide))))
                self.partial.pop(slide.slide_id)

    def _settle(self) -> None:
        """Take the rows of the batch that the device was left with."""
        for slide, batch, rows in self.pending:
            if slide.slide_id not in self.closed:
                with self._at_the_cost_of(slide):
                    self._keep(slide, batch, rows())
        self.pending = []

    def _collect(self, ahead: int) -> None:
        """Note the files that are written; wait until at most `ahead` are not."""
        while self.writing and (len(self.writing) > ahead or self.writing[0][1].done()):
            slide, outcome = self.writing.popleft()
            with self._at_the_cost_of(slide):
                self._close(slide, outcome.result())

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

    def _close(self, slide: SlideFile, result: Result) -> None:
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
                f"{self.run.encoder.spec.name} computes infinite or NaN features for {len(bad)} tiles, also in "
                f"fp32; the first tile is at x={x}, y={y} (level-0 px)",
                code="non-finite",
            )
        begun.rows[batch.index] = rows
        begun.n_done += len(rows)
        tell_tiles(slide.slide_id, begun.n_done, len(begun.rows))

    def _write(self, begun: _Partial) -> Outcome:
        write_bag(self.run.output(begun.slide), self.run.bag(begun.slide, begun.grid, begun.coords, begun.rows))
        return Outcome() if len(begun.rows) else Outcome("empty", "the slide has no tissue, so it has no features")

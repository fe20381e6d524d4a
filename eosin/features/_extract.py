"""Tiles to features for many slides: the device encodes while readers decode, every file is whole or absent."""

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from eosin._batch import Outcome, Results, collect, is_elsewhere, run_stage
from eosin._claims import DONE_ELSEWHERE, Todo
from eosin._records import Record, Report
from eosin.errors import ConfigError, EosinError
from eosin.features._devices import DevicePool, DeviceWork
from eosin.features._encoders import Precision, find_encoder
from eosin.features._encoding import Encoding, Extraction
from eosin.features._inference import EncoderChoice, allocator
from eosin.features._reading import ReadRequest, SlideEnd, SlideReaders
from eosin.wsi._coordinates import read_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile, copy_ahead


def extract(
    slides: Sequence[SlideFile],
    job: JobFolder,
    encoder: str,
    *,
    weights: Path | str | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: str = "auto",
    devices: Sequence[str] = (),
    compiled: bool = False,
    tiling: str | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Encode the tiles of slides into ``JOB/<tiling>/features_<encoder>/<slide>.h5``.

    Slides whose file matches slide, tiles, weights and options are skipped, so a run that was killed continues where
    it stopped. Runs at the same time on the same job share the slides.

    Parameters
    ----------
    slides : sequence of SlideFile
        Tiled before with `eosin.wsi._job.tile_slides`.
    job : JobFolder
        Holds the tile grids and receives the features.
    encoder : str
        Name as `eosin.features._encoders.find_encoder` takes it.
    weights : Path, optional
        Local weights.
    batch_size : int
        Tiles per step; halved, with a warning, when the device runs out of memory.
    precision : "fp32", "bf16" or "fp16"
        Autocast type; features of the latter two are stored as float16.
    device : str
        ``auto`` takes the first GPU when there is one.
    devices : sequence of str
        Several devices instead, each with a process of its own that slides are given to as it has room.
    compiled : bool
        Whether `torch.compile` makes the network faster.
    tiling : str, optional
        Name of the tiling's folder in the job; needed when the job has several.
    shard : (int, int)
        Index and number of shards.
    workers : int
        Processes that decode for each device, each one slide at a time; 0 decodes in the process that encodes.
    progress : callable, optional
        Called with each record.

    Returns
    -------
    Report
        Failed slides carry a reason: ``not-tiled``, ``changed``, ``non-finite``, ``crashed``, or the reader's.
        The last is also that of a slide whose device process died.

    Raises
    ------
    ConfigError
        When the job has no tiling or several, or encoder and options do not fit.
    OutputError
        When disk or device stop the run.
    """
    weights = None if weights is None else Path(weights)
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: pass 1 or more")
    if devices and device != "auto":
        raise ConfigError(f"--device {device} and --devices {','.join(devices)} exclude each other; pass one of them")
    work = DeviceWork(
        job, _choose_tiling(job, tiling), EncoderChoice(encoder, weights, precision, compiled), batch_size, workers
    )
    if is_elsewhere():
        stage = ExtractStage(work, device)
        return run_stage(stage, slides, run_json=job.run_json, shard=shard, progress=progress)
    rest = partial(_extract, slides, work, shard=shard, progress=progress)
    if devices:
        with DevicePool(work, devices) as pool:
            return rest(Extraction(job, work.tiling, pool.encoder), lambda run, _, todo: pool.encode(run, todo))
    return rest(Extraction(job, work.tiling, work.choice.load(device)), _encode_here)


def _stated_tiling(run: Extraction, slides: Sequence[SlideFile]) -> Tiling | None:
    """Return the tiling that the first readable coordinates file states; folders may be called anything."""
    for slide in slides:
        with suppress(EosinError, OSError):
            return read_grid(run.patches(slide)).tiling
    return None


def _extract(
    slides: Sequence[SlideFile],
    work: DeviceWork,
    run: Extraction,
    encode: Callable[[Extraction, DeviceWork, Todo[SlideFile]], Results],
    *,
    shard: tuple[int, int],
    progress: Callable[[Record], None] | None,
) -> Report:
    tiling = _stated_tiling(run, slides)
    if tiling is not None:
        run.check_tiles(tiling)
    return collect(
        slides,
        partial(encode, run, work),
        key=lambda slide: slide.slide_id,
        stage=f"extract {work.tiling}/{run.encoder.spec.name}",
        is_done=run.is_done,
        output=run.output,
        run_json=work.job.run_json,
        shard=shard,
        progress=progress,
        ahead=copy_ahead,
    )


def _encode_here(run: Extraction, work: DeviceWork, todo: Todo[SlideFile]) -> Results:
    """Encode in this process."""
    with (
        SlideReaders(_requests(run, todo, work), workers=work.workers, allocate=allocator(run.encoder)) as readers,
        Encoding(run, readers, todo.items, batch_size=work.batch_size) as encoding,
    ):
        yield from encoding


def _requests(run: Extraction, todo: Todo[SlideFile], work: DeviceWork) -> Iterator[ReadRequest | SlideEnd | None]:
    while len(todo):
        taken = todo.take()
        if taken is None:
            yield None
            continue
        slide, is_made = taken
        yield SlideEnd(slide.slide_id, message=DONE_ELSEWHERE) if is_made else run.request(slide, work.batch_size)


@dataclass(frozen=True)
class ExtractStage:
    """The extraction as a `eosin._batch.Stage`: a worker process keeps the encoder and its readers.

    Attributes
    ----------
    work : DeviceWork
    device : str
        Of each worker.
    """

    work: DeviceWork
    device: str

    @property
    def name(self) -> str:
        """Name of the stage in the records."""
        return f"extract {self.work.tiling}/{find_encoder(self.work.choice.name).name}"

    @cached_property
    def _session(self) -> "_Session":
        return _Session(self.work, self.device)

    def key(self, item: SlideFile) -> str:
        """Return the id of a slide."""
        return item.slide_id

    def output(self, item: SlideFile) -> Path:
        """Return the feature file of a slide."""
        return self._session.run.output(item)

    def is_done(self, item: SlideFile) -> bool:
        """Tell whether the feature file was made from the same slide, tiles and options."""
        return self._session.run.is_done(item)

    def do(self, item: SlideFile) -> Outcome:
        """Encode one slide."""
        return self._session.encode(item)


class _Session:
    """An encoder and its readers, open for one slide after another."""

    def __init__(self, work: DeviceWork, device: str) -> None:
        self.work = work
        self.run = Extraction(work.job, work.tiling, work.choice.load(device))
        self.waiting: queue.SimpleQueue[ReadRequest | SlideEnd] = queue.SimpleQueue()
        self.slides: dict[str, SlideFile] = {}
        readers = SlideReaders(self._requests(), workers=work.workers, allocate=allocator(self.run.encoder))
        self.encoding = Encoding(self.run, readers.__enter__(), self.slides, batch_size=work.batch_size)

    def _requests(self) -> Iterator[ReadRequest | SlideEnd | None]:
        while True:
            try:
                yield self.waiting.get_nowait()
            except queue.Empty:
                yield None

    def encode(self, slide: SlideFile) -> Outcome:
        self.slides[slide.slide_id] = slide
        self.waiting.put(self.run.request(slide, self.work.batch_size))
        _, result = next(iter(self.encoding))
        self.encoding.forget(slide)
        if isinstance(result, EosinError):
            raise result
        return result


def _choose_tiling(job: JobFolder, tiling: str | None) -> str:
    known = job.tilings()
    if not known:
        raise ConfigError(f"{job.root}: has no tiles yet; run `eosin tile` with the same --job first")
    if tiling is None and len(known) > 1:
        raise ConfigError(f"{job.root}: has several tilings ({', '.join(known)}); name one with --tiling")
    if tiling is not None and tiling not in known:
        raise ConfigError(f"{job.root}: has no tiling {tiling}; it has {', '.join(known)}")
    return tiling or known[0]

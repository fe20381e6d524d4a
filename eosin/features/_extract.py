"""Tiles to features for many slides: the device encodes while readers decode, every file is whole or absent."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from eosin._batch import Outcome, Record, Report, run_batch
from eosin.errors import ConfigError, EosinError
from eosin.features._claims import DONE_ELSEWHERE, Todo
from eosin.features._devices import DevicePool, DeviceWork
from eosin.features._encoders import Precision
from eosin.features._encoding import Encoding, Extraction
from eosin.features._inference import EncoderChoice, allocator
from eosin.features._reading import ReadRequest, SlideEnd, SlideReaders
from eosin.wsi._coordinates import read_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

Finish = Callable[[SlideFile], Outcome]


def extract(
    slides: Sequence[SlideFile],
    job: JobFolder,
    encoder: str,
    *,
    weights: Path | None = None,
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
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: needs at least 1")
    if devices and device != "auto":
        raise ConfigError(f"--device {device} and --devices {','.join(devices)} were both given; give one")
    work = DeviceWork(
        job, _choose_tiling(job, tiling), EncoderChoice(encoder, weights, precision, compiled), batch_size, workers
    )
    rest = partial(_extract, slides, work, shard=shard, progress=progress)
    if devices:
        with DevicePool(work, devices) as pool:
            return rest(Extraction(job, work.tiling, pool.encoder), partial(_elsewhere, pool))
    return rest(Extraction(job, work.tiling, work.choice.load(device)), _here)


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
    place: "Place",
    *,
    shard: tuple[int, int],
    progress: Callable[[Record], None] | None,
) -> Report:
    tiling = _stated_tiling(run, slides)
    if tiling is not None:
        run.check_tiles(tiling)
    left = [slide for slide in slides[shard[0] :: shard[1]] if not run.is_done(slide)]
    todo = Todo([slide for slide in left if run.is_tiled(slide)], run.output, run.is_done)
    waiting = {slide.slide_id for slide in left}
    try:
        with place(run, todo, work) as finish:
            return run_batch(
                slides,
                finish,
                key=lambda slide: slide.slide_id,
                stage=f"extract {work.tiling}/{run.encoder.spec.name}",
                is_done=lambda slide: slide.slide_id not in waiting,
                run_json=work.job.run_json,
                shard=shard,
                progress=progress,
            )
    finally:
        todo.close()


Place = Callable[[Extraction, Todo, DeviceWork], AbstractContextManager[Finish]]


@contextmanager
def _here(run: Extraction, todo: Todo, work: DeviceWork) -> Iterator[Finish]:
    """Encode in this process."""
    with (
        SlideReaders(_requests(run, todo, work), workers=work.workers, allocate=allocator(run.encoder)) as readers,
        Encoding(run, readers, todo.slides, batch_size=work.batch_size, end=todo.release) as encoding,
    ):
        yield encoding.finish


def _requests(run: Extraction, todo: Todo, work: DeviceWork) -> Iterator[ReadRequest | SlideEnd | None]:
    while len(todo):
        taken = todo.take()
        if taken is None:
            yield None
            continue
        slide, done = taken
        yield SlideEnd(slide.slide_id, message=DONE_ELSEWHERE) if done else run.request(slide, work.batch_size)


@contextmanager
def _elsewhere(pool: DevicePool, run: Extraction, todo: Todo, _: DeviceWork) -> Iterator[Finish]:
    """Encode in the processes of a pool."""
    yield lambda slide: pool.finish(slide, run, todo)


def _choose_tiling(job: JobFolder, tiling: str | None) -> str:
    known = job.tilings()
    if not known:
        raise ConfigError(f"{job.root}: has no tiles yet; run `eosin tile` with the same --job first")
    if tiling is None and len(known) > 1:
        raise ConfigError(f"{job.root}: has several tilings ({', '.join(known)}); name one with --tiling")
    if tiling is not None and tiling not in known:
        raise ConfigError(f"{job.root}: has no tiling {tiling}; it has {', '.join(known)}")
    return tiling or known[0]

"""Several devices at once: one process per device, one report.

The parent gives slides to whichever device has room, so that a slow slide delays nobody. A process that dies costs the
slide that it was encoding; its other slides are given out again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from eosin._batch import Outcome, Results
from eosin._claims import DONE_ELSEWHERE, Todo
from eosin._devices import count_cores
from eosin._processes import Child, wait_for
from eosin.errors import EosinError, OutputError, SlideError, WorkerError
from eosin.features._encoders import find_encoder
from eosin.features._encoding import Encoding, Extraction, Result
from eosin.features._inference import Encoder, EncoderChoice, allocator
from eosin.features._reading import ReadRequest, SlideEnd, SlideReaders
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import SlideFile

POLL_S = 0.2
AHEAD = 2


@dataclass(frozen=True)
class DeviceWork:
    """What a device process needs to know.

    Parameters
    ----------
    job, tiling : JobFolder, str
        Where tiles are and features go.
    choice : EncoderChoice
        The encoder.
    batch_size, workers : int
        Tiles per step; processes that decode for this device.
    """

    job: JobFolder
    tiling: str
    choice: EncoderChoice
    batch_size: int
    workers: int


@dataclass(frozen=True)
class _Ready:
    """The encoder is loaded."""

    weights_hash: str
    revision: str


@dataclass(frozen=True)
class _Begun:
    """A slide's tiles are encoded from now on."""

    slide_id: str


@dataclass(frozen=True)
class _Ended:
    """A slide has a result."""

    slide_id: str
    result: Result


class _DeviceProcess:
    """One device with the slides that it was given."""

    def __init__(self, work: DeviceWork, device: str, threads: int) -> None:
        self.device = device
        self.slides: dict[str, SlideFile] = {}
        self.at_work_on: str | None = None
        self.child = Child(_serve, work, device, threads, has_children=True)

    def give(self, slide: SlideFile) -> None:
        self.slides[slide.slide_id] = slide
        self.child.send(slide)

    def victim(self) -> SlideFile | None:
        """Return the slide that the process died of: the one whose tiles it was encoding, else its first."""
        first = next(iter(self.slides), None)
        name = self.at_work_on if self.at_work_on in self.slides else first
        return self.slides.pop(name) if name is not None else None


class DevicePool:
    """One process per device; a context manager.

    Parameters
    ----------
    work : DeviceWork
        Shared by all.
    devices : sequence of str
        One process each; a name may occur twice.

    Raises
    ------
    ConfigError
        When a device or the encoder cannot be used.
    OutputError
        When a process dies before its encoder is loaded.
    """

    def __init__(self, work: DeviceWork, devices: Sequence[str]) -> None:
        self.work = work
        on_cpu = sum(device == "cpu" for device in devices)
        self.threads = max(1, count_cores() // max(1, on_cpu))
        self.devices = tuple(devices)
        self.processes: list[_DeviceProcess] = []

    def __enter__(self) -> "DevicePool":
        try:
            self.processes = [self._start(device) for device in self.devices]
            first, *_ = [self._await(process) for process in self.processes]
        except BaseException:
            self.__exit__()
            raise
        choice = self.work.choice
        self.encoder = Encoder(  # without a network: what identifies it is all that is needed here
            find_encoder(choice.name), first.weights_hash, None, revision=first.revision, precision=choice.precision
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.child.stop()

    def _start(self, device: str) -> _DeviceProcess:
        return _DeviceProcess(self.work, device, self.threads)

    def _await(self, process: _DeviceProcess) -> _Ready:
        try:
            ready: _Ready = process.child.receive()
        except WorkerError as error:
            raise OutputError(process.device, f"the process that loaded the encoder {error.message}") from None
        return ready

    def encode(self, run: Extraction, todo: Todo[SlideFile]) -> Results:
        """Let all devices work until nothing is left; yield slides with their results as they become complete."""
        while len(todo) or any(process.slides for process in self.processes):
            yield from self._feed(run, todo)
            for process in wait_for([process.child for process in self.processes], POLL_S):
                owner = next(one for one in self.processes if one.child is process)
                yield from self._hear(owner, todo)

    def _feed(self, run: Extraction, todo: Todo[SlideFile]) -> Results:
        room = max(1, self.work.workers) + AHEAD
        idlest = min(self.processes, key=lambda process: len(process.slides))
        while len(idlest.slides) < room and (taken := todo.take()) is not None:
            slide, is_made = taken
            request = run.request(slide, self.work.batch_size)
            if is_made:
                yield slide.slide_id, Outcome(message=DONE_ELSEWHERE)
            elif isinstance(request, SlideEnd) and request.error is not None:
                yield slide.slide_id, request.error
            else:
                idlest.give(slide)
            idlest = min(self.processes, key=lambda process: len(process.slides))

    def _hear(self, process: _DeviceProcess, todo: Todo[SlideFile]) -> Results:
        try:
            message = process.child.receive()
        except WorkerError as error:
            yield from self._bury(process, error, todo)
            return
        match message:
            case _Begun(slide_id):
                process.at_work_on = slide_id
            case _Ended(slide_id, result):
                process.slides.pop(slide_id)
                yield slide_id, result

    def _bury(self, process: _DeviceProcess, error: WorkerError, todo: Todo[SlideFile]) -> Results:
        victim = process.victim()
        process.child.stop()
        todo.put_back(process.slides.values())
        fresh = self._start(process.device)
        self.processes[self.processes.index(process)] = fresh
        if victim is not None:
            message = f"the process that encoded it on {process.device} {error.message}"
            yield victim.slide_id, SlideError(victim.path, message, code="crashed")
        self._await(fresh)


def _serve(connection: "Connection[Any, Any]", work: DeviceWork, device: str, threads: int) -> None:
    """Encode the slides that come in until the parent is gone."""
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        run = Extraction(work.job, work.tiling, work.choice.load(device))
        connection.send(_Ready(run.encoder.weights_hash, run.encoder.revision))
        _encode(connection, work, run)
    except EosinError as error:
        connection.send(error)


def _encode(connection: "Connection[Any, Any]", work: DeviceWork, run: Extraction) -> None:
    slides: dict[str, SlideFile] = {}
    begun = ""

    def begin(slide_id: str) -> None:
        nonlocal begun
        if slide_id != begun:
            begun = slide_id
            connection.send(_Begun(slide_id))

    requests = _received(connection, work, run, slides)
    with (
        SlideReaders(requests, workers=work.workers, allocate=allocator(run.encoder)) as readers,
        Encoding(run, readers, slides, batch_size=work.batch_size, begin=begin) as encoding,
    ):
        for slide_id, result in encoding:
            connection.send(_Ended(slide_id, result))


def _received(
    connection: "Connection[Any, Any]", work: DeviceWork, run: Extraction, slides: dict[str, SlideFile]
) -> Iterator[ReadRequest | SlideEnd | None]:
    while True:
        if not connection.poll():
            yield None
            continue
        try:
            slide = connection.recv()
        except (EOFError, ConnectionError):
            return
        slides[slide.slide_id] = slide
        yield run.request(slide, work.batch_size)

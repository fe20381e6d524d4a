"""Several devices at once: one process per device, one report.

The parent gives slides to whichever device has room, so that a slow slide delays nobody. A process that dies costs the
slide that it was encoding; its other slides are given out again.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from eosin.batch import Outcome
from eosin.errors import ConfigError, EosinError, OutputError, SlideError
from eosin.features.claims import DONE_ELSEWHERE, Todo
from eosin.features.encoders import find_encoder
from eosin.features.encoding import Encoding, Extraction, Result
from eosin.features.inference import Encoder, EncoderChoice, allocator
from eosin.features.reading import ReadRequest, SlideEnd, SlideReaders
from eosin.wsi.job import JobFolder
from eosin.wsi.slide import SlideFile

POLL_S = 0.2
AHEAD = 2


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the devices that a list (``cuda:0,cuda:1``), a number of GPUs or ``all`` stands for.

    Raises
    ------
    ConfigError
        When the machine has fewer GPUs.
    """
    there = torch.cuda.device_count()
    if text != "all" and not text.isdecimal():
        return tuple(name.strip() for name in text.split(",") if name.strip())
    count = there if text == "all" else int(text)
    if not 0 < count <= there:
        raise ConfigError(f"--devices {text}: this machine has {there} GPUs; name devices as in cuda:0,cuda:1")
    return tuple(f"cuda:{index}" for index in range(count))


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
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.slides: dict[str, SlideFile] = {}
        self.at_work_on: str | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, device, threads))
        self.process.start()
        theirs.close()

    def give(self, slide: SlideFile) -> None:
        self.slides[slide.slide_id] = slide
        try:
            self.connection.send(slide)
        except OSError:  # it died, which the next look at it will find
            return

    def receive(self) -> Any:
        """Return the next message; raise what stopped the process."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            return None
        if isinstance(message, EosinError):
            raise message
        return message

    def victim(self) -> SlideFile | None:
        """Return the slide that the process died of: the one whose tiles it was encoding, else its first."""
        first = next(iter(self.slides), None)
        name = self.at_work_on if self.at_work_on in self.slides else first
        return self.slides.pop(name) if name is not None else None

    def cause_of_death(self) -> str:
        self.process.join(timeout=10)
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


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
        self.threads = max(1, (os.cpu_count() or 1) // max(1, on_cpu))
        self.devices = tuple(devices)
        self.processes: list[_DeviceProcess] = []
        self.results: dict[str, Result] = {}

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
            process.stop()

    def _start(self, device: str) -> _DeviceProcess:
        return _DeviceProcess(self.work, device, self.threads)

    def _await(self, process: _DeviceProcess) -> _Ready:
        ready = process.receive()
        if not isinstance(ready, _Ready):
            raise OutputError(
                process.device, f"its process died while it loaded the encoder ({process.cause_of_death()})"
            )
        return ready

    def finish(self, slide: SlideFile, run: Extraction, todo: Todo) -> Outcome:
        """Let all devices work until this slide is complete."""
        run.require_tiles(slide)
        while slide.slide_id not in self.results:
            self._feed(todo)
            ready = wait([process.connection for process in self.processes], timeout=POLL_S)
            for process in [process for process in self.processes if process.connection in ready]:
                self._hear(process, todo)
        result = self.results.pop(slide.slide_id)
        if isinstance(result, EosinError):
            raise result
        return result

    def _feed(self, todo: Todo) -> None:
        room = max(1, self.work.workers) + AHEAD
        idlest = min(self.processes, key=lambda process: len(process.slides))
        while len(idlest.slides) < room and (taken := todo.take()) is not None:
            slide, done = taken
            if done:
                self.results[slide.slide_id] = Outcome(message=DONE_ELSEWHERE)
            else:
                idlest.give(slide)
            idlest = min(self.processes, key=lambda process: len(process.slides))

    def _hear(self, process: _DeviceProcess, todo: Todo) -> None:
        match process.receive():
            case _Begun(slide_id):
                process.at_work_on = slide_id
            case _Ended(slide_id, result):
                self._end(process.slides.pop(slide_id), result, todo)
            case None:
                self._bury(process, todo)

    def _end(self, slide: SlideFile, result: Result, todo: Todo) -> None:
        self.results[slide.slide_id] = result
        todo.release(slide.slide_id)

    def _bury(self, process: _DeviceProcess, todo: Todo) -> None:
        victim, cause = process.victim(), process.cause_of_death()
        process.stop()
        if victim is not None:
            message = f"the process that encoded it on {process.device} died ({cause})"
            self._end(victim, SlideError(victim.path, message, code="crashed"), todo)
        todo.put_back(process.slides.values())
        fresh = self._start(process.device)
        self.processes[self.processes.index(process)] = fresh
        self._await(fresh)


def _serve(connection: "Connection[Any, Any]", work: DeviceWork, device: str, threads: int) -> None:
    """Encode the slides that come in until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        run = Extraction(work.job, work.tiling, work.choice.load(device))
        connection.send(_Ready(run.encoder.weights_hash, run.encoder.revision))
        _encode(connection, work, run)
    except EosinError as error:
        connection.send(error)
    except BrokenPipeError:
        return


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

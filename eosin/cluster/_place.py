"""The driver: hands the items of a stage to Parsl's workers and takes their records."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from eosin._batch import Result, Results, Stage
from eosin._claims import Todo
from eosin._files import write_json
from eosin._processes import require_running
from eosin._records import Record, process_name
from eosin.cluster._site import Site
from eosin.cluster._worker import BUSY, item_to_json, perform, write_stage
from eosin.errors import EosinError, OutputError, WorkerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "cluster"
POLL_S = 1.0
BUSY_S = 10.0
AHEAD = 4
"""Tasks per worker that Parsl holds: enough to keep all busy, few enough to stop at once."""
LOST_COST = 0.5
"""What the loss of a whole job costs a slide that was in it, in tries: it was probably not the slide's fault."""


@dataclass
class Cluster:
    """A place for stages: the machines of a site.

    Parameters
    ----------
    site : Site
    folder : Path
        Job folder, or the folder of a cross-validation; logs and scripts go to ``cluster/`` in it.
    say : callable
        Told one line for a person when a stage begins.
    dry_run : bool
        Whether stages only say what they would submit.
    """

    site: Site
    folder: Path
    say: Callable[[str], None] = field(default=lambda _: None)
    dry_run: bool = False

    def __post_init__(self) -> None:
        stop_file(self.logs, process_name()).unlink(missing_ok=True)  # of an earlier process of this number

    @property
    def logs(self) -> Path:
        """Where scripts and logs go."""
        return (self.folder / FOLDER).absolute()

    def run(self, stage: Stage[T], todo: Todo[T], run_json: Path | None) -> Results:
        """Yield the results of all items as they come."""
        site, number = self.site.of_stage(stage.name), len(todo)
        if not number:
            return
        if self.dry_run:
            for line in site.describe(stage.name, number):
                self.say(line)
            raise DryRun
        self.say(site.describe(stage.name, number)[0])
        item_type = type(next(iter(todo.items.values())))
        folder = self._make_folder(stage.name)
        write_stage(folder / "stage.json", stage, item_type, run_json)
        with self._driver(site, stage.name, number, folder) as driver:
            yield from self._gather(site, todo, driver)

    def _gather(self, site: Site, todo: Todo[T], driver: "_Driver") -> Results:
        ends_at = None if site.limit is None else time.monotonic() + site.seconds(site.limit)
        room = AHEAD * site.workers * site.jobs
        running: dict[Future[str], T] = {}
        refused: list[tuple[float, T]] = []
        while len(todo) or running or refused:
            self._require_running()
            driver.tell()
            if ends_at is not None and time.monotonic() > ends_at:
                todo.drain()
                refused.clear()
            while len(running) < room and (item := self._next(todo, refused)) is not None:
                running[driver.submit(item_to_json(item))] = item
            done, _ = wait(running, POLL_S, FIRST_COMPLETED)
            if not running:
                time.sleep(POLL_S)
            for future in done:
                item = running.pop(future)
                result = _result(future, site.retries)
                if result is None:
                    refused.append((time.monotonic() + BUSY_S, item))
                else:
                    yield todo.key(item), result

    def _next(self, todo: Todo[T], refused: list[tuple[float, T]]) -> T | None:
        """Return what is to be handed out next: new items first, those that another run had after a while."""
        taken = todo.take()
        if taken is not None:
            return taken[0]
        if refused and refused[0][0] <= time.monotonic():
            return refused.pop(0)[1]
        return None

    def _require_running(self) -> None:
        require_running()
        if stop_file(self.logs, process_name()).exists():
            raise OutputError(self.folder, "the run was ended by `eosin jobs --stop`; what was finished is kept")

    def _make_folder(self, name: str) -> Path:
        """Make the folder of one stage, for its owner alone: the keys of the encrypted transport lie in it."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", name)
        folder = self.logs / f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.logs.chmod(0o700)
            folder.chmod(0o700)
        except OSError as error:
            raise OutputError(folder, f"cannot be written to ({error.strerror})") from error
        return folder

    @contextmanager
    def _driver(self, site: Site, name: str, number: int, folder: Path) -> Iterator["_Driver"]:
        """Start the executor of a stage, and end it with the block, well or badly."""
        executor = site.executor(_label(name), number, folder / "logs")
        import parsl
        from parsl.config import Config

        config = Config(
            executors=[executor],
            run_dir=str(folder),
            retries=site.retries,
            retry_handler=_cost,
            initialize_logging=False,
            strategy="simple",
            strategy_period=5,
        )
        kernel = parsl.DataFlowKernel(config)
        plan = str(folder / "stage.json")
        app = parsl.python_app(perform, data_flow_kernel=kernel)
        driver = _Driver(driver_file(self.logs, process_name()), name, number, executor, lambda item: app(plan, item))
        try:
            yield driver
        finally:
            kernel.cleanup()
            driver.end()
            shutil.rmtree(folder / "000" / _label(name) / "certificates", ignore_errors=True)


def driver_file(logs: Path, driver: str) -> Path:
    """Return where a driver, named as by `process_name`, says what it does: several may work on one job."""
    return logs / f"driver-{driver}.json"


def stop_file(logs: Path, driver: str) -> Path:
    """Return the file whose being there ends a driver."""
    return logs / f"stop-{driver}"


class DryRun(Exception):
    """The first stage said what it would submit."""


def _label(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name)


def _cost(error: Exception, _task: Any) -> float:
    """Return what an error costs of a task's tries: a worker that died one, a lost job less, all else everything."""
    kind = type(error).__name__
    return {"WorkerLost": 1.0, "ManagerLost": LOST_COST}.get(kind, float("inf"))


def _result(future: "Future[str]", retries: int) -> Result | None:
    """Return what became of a task; None where another run has its item."""
    try:
        text = future.result()
    except (OutputError, ImportError):
        raise
    except EosinError as error:
        raise OutputError("cluster", error.message) from None
    except Exception as error:  # noqa: BLE001 - Parsl's own errors have no common base
        if type(error).__name__ in ("WorkerLost", "ManagerLost"):
            message = f"the worker process died {retries + 1} times with this slide"
            return WorkerError(message, code="worker-lost")
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise OutputError("cluster", f"no worker could be had ({reason})") from None
    return None if text == BUSY else Record(**json.loads(text))


class _Driver:
    """Hands items to Parsl, and writes what `eosin jobs` reads of a run that goes on: which process, and its jobs."""

    EVERY_S = 5.0

    def __init__(
        self, path: Path, stage: str, total: int, executor: Any, submit: Callable[[str], "Future[str]"]
    ) -> None:
        self.path, self.stage, self.total, self.executor, self.submit = path, stage, total, executor, submit
        self.written = 0.0
        self.begun_at = round(time.time(), 3)
        self.write()

    def tell(self) -> None:
        """Write which jobs there are now: lost ones are replaced while nothing is handed out."""
        if time.monotonic() - self.written > self.EVERY_S:
            self.write()

    def write(self, *, ended: bool = False) -> None:
        self.written = time.monotonic()
        blocks: Mapping[str, str] = self.executor.blocks_to_job_id
        data = {
            "driver": process_name(),
            "stage": self.stage,
            "total": self.total,
            "begun": self.begun_at,
            "provider": self.executor.provider.label,
            "jobs": [] if ended else list(blocks.values()),
        }
        with suppress(OutputError):
            write_json(self.path, data)

    def end(self) -> None:
        self.write(ended=True)

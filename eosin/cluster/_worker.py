"""What a worker process does: it rebuilds a stage once and keeps it, then makes one item after another."""

import importlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eosin import __version__
from eosin._batch import Stage, attempt, record_of
from eosin._claims import Claims
from eosin._files import write_json
from eosin._records import Log, Record
from eosin._seals import read_json
from eosin.errors import ConfigError
from eosin.plugins import VARIABLE

BUSY = "busy"
"""What a worker answers when another run has the item."""


def write_stage(path: Path, stage: Stage[Any], item_type: type, run_json: Path | None) -> None:
    """Write what a worker needs to rebuild a stage: names of classes of eosin, and their fields as JSON."""
    write_json(
        path,
        {
            "eosin": __version__,
            "plugins": os.environ.get(VARIABLE, ""),
            "cwd": str(Path.cwd()),
            "stage": _name_of(type(stage)),
            "item": _name_of(item_type),
            "fields": TypeAdapter(type(stage)).dump_python(stage, mode="json"),
            "run_json": None if run_json is None else str(run_json.absolute()),
        },
    )


def item_to_json(item: object) -> str:
    """Return the JSON of one item."""
    return TypeAdapter(type(item)).dump_json(item).decode()


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass(frozen=True)
class Session:
    """A stage in a worker process.

    Attributes
    ----------
    stage : Stage
    item_type : TypeAdapter
    log : Log
        Of this process.
    """

    stage: Stage[Any]
    item_type: TypeAdapter[Any]
    log: Log

    def perform(self, text: str) -> str:
        """Make one item; return its record as JSON, or `BUSY`."""
        item, claims = self.item_type.validate_json(text), Claims()
        output = self.stage.output(item)
        if not claims.take(output):
            return BUSY
        try:
            return json.dumps(asdict(self._made(item, output)))
        finally:
            claims.release_all()

    def _made(self, item: Any, output: Path) -> Record:
        slide_id, name = self.stage.key(item), self.stage.name
        if output.exists() and self.stage.is_done(item):
            record = Record(slide_id, name, "skipped", "done")
            return record if self.log.knows(slide_id, name) else self.log.add(record)
        self.log.begin(slide_id, name)
        started = time.monotonic()
        result = attempt(self.stage.do, slide_id, item)
        return self.log.add(record_of(slide_id, name, result, round(time.monotonic() - started, 3)))


def perform(plan: str, item: str) -> str:
    """Make one item of a stage; what Parsl calls in a worker process.

    Parameters
    ----------
    plan : str
        Path of the file that `write_stage` wrote.
    item : str
        JSON.

    Returns
    -------
    str
        The record as JSON, or `BUSY`.

    Raises
    ------
    OutputError, MissingPackageError
        What would fail every item alike.
    """
    return _open(plan).perform(item)


@lru_cache(maxsize=1)
def _open(plan: str) -> Session:
    _choose_gpus(os.environ)
    data = read_json(Path(plan))
    if data["eosin"] != __version__:
        raise ConfigError(
            f"this worker has eosin {__version__} and the run eosin {data['eosin']}; "
            "let worker_init activate the environment of the run"
        )
    os.chdir(data["cwd"])  # paths as the user typed them
    if data["plugins"]:
        os.environ[VARIABLE] = data["plugins"]
    try:
        stage: Stage[Any] = TypeAdapter(_class_of(data["stage"])).validate_python(data["fields"])
    except ValidationError as error:
        raise ConfigError(f"{plan}: is not a stage of eosin {__version__} ({error.error_count()} faults)") from None
    run_json = data["run_json"]
    return Session(stage, TypeAdapter(_class_of(data["item"])), Log(None if run_json is None else Path(run_json)))


def _class_of(name: str) -> type:
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] != "eosin":  # a plan is a file that others may have written to
        raise ConfigError(f"{name}: is not a class of eosin")
    kind = getattr(importlib.import_module(module), qualname)
    assert isinstance(kind, type)
    return kind


def _choose_gpus(environment: Any) -> None:
    """Give each worker of a job its own share of the GPUs that the batch system gave the job."""
    chosen = gpus_of_worker(environment)
    if chosen:
        environment["CUDA_VISIBLE_DEVICES"] = chosen


def gpus_of_worker(environment: Mapping[str, str]) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES for a worker; an empty text leaves it as it is."""
    rank, count = environment.get("PARSL_WORKER_RANK", "0"), environment.get("PARSL_WORKER_COUNT", "1")
    there = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    share = len(there) // int(count)
    return ",".join(there[int(rank) * share : (int(rank) + 1) * share]) if share and int(count) > 1 else ""

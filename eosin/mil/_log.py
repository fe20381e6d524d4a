"""What training says of itself, one line per pass: ``log.csv``, the same for TensorBoard, and as it happens."""

import csv
import hashlib
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from eosin._files import append_line, write_bytes, write_text
from eosin._tables import csv_text
from eosin.errors import MissingPackageError

logger = logging.getLogger(__name__)

LOG = "log.csv"
METRICS = "metrics.jsonl"
EVENTS = "events.out.tfevents.0.eosin"
FILE_VERSION = "brain.Event:2"

Line = Mapping[str, float | int | None]


def write_log(folder: Path, history: Sequence[Line]) -> str:
    """Write one line per pass as ``log.csv``; an undefined value is an empty cell.

    Returns
    -------
    str
        Its SHA-256, for the model's card.
    """
    names = list(dict.fromkeys(name for epoch in history for name in epoch))
    text = csv_text([names, *([epoch.get(name) for name in names] for epoch in history)])
    write_text(folder / LOG, text)
    return hashlib.sha256(text.encode()).hexdigest()


def append_metrics(folder: Path, run: str, epoch: Line) -> None:
    """Append a pass to ``metrics.jsonl`` as it ends, for programs that follow a training (`docs/trackers.md`).

    Parameters
    ----------
    folder : Path
    run : str
        Fingerprint of recipe and examples: a folder can have seen several runs.
    epoch : mapping
        An undefined value is null. A run that was killed repeats the passes since its last saved state.

    Raises
    ------
    OutputError
        When it cannot be written.
    """
    append_line(folder / METRICS, json.dumps({"run": run, "time": round(time.time(), 3), **epoch}))


def read_log(folder: Path, stated: str) -> tuple[dict[str, float | int | None], ...]:
    """Read ``log.csv`` again; empty when there is none, and with a warning where it is not the one of this hash."""
    path = folder / LOG
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != stated:
        logger.warning("%s is not the file that the model's card names; the course of the training is not shown", path)
        return ()
    rows = csv.DictReader(io.StringIO(data.decode(), newline=""))
    return tuple({name: _number(text) for name, text in row.items()} for row in rows)


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def write_events(folder: Path, history: Sequence[Line], times: Sequence[float]) -> None:
    """Write the history as a TensorBoard file, whole each time, so that a killed run leaves none that is cut.

    Without the package ``tensorboard`` nothing is written; ``log.csv`` holds the same numbers.

    Parameters
    ----------
    folder : Path
        ``tensorboard --logdir`` finds the file in it and below.
    history : sequence of mappings
        One per pass; ``train_`` and ``val_`` become groups.
    times : sequence of float
        When each pass ended, seconds since 1970.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        logger.info("no TensorBoard log is written: %s", MissingPackageError(error))
        return
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    start = times[0] if times else 0.0
    records.write(Event(wall_time=start, file_version=FILE_VERSION).SerializeToString())
    for line, moment in zip(history, times, strict=True):
        step = int(line["epoch"] or 0)
        values = [
            Summary.Value(tag=_tag(name), simple_value=value)
            for name, value in line.items()
            if name != "epoch" and value is not None
        ]
        records.write(Event(wall_time=moment, step=step, summary=Summary(value=values)).SerializeToString())
    write_bytes(folder / EVENTS, buffer.getvalue())


def _tag(name: str) -> str:
    part, _, rest = name.partition("_")
    return f"{part}/{rest}" if part in ("train", "val") and rest else name

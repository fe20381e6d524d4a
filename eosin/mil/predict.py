"""Slide-level predictions of one model or an ensemble, one row per slide, whatever becomes of the slide.

A run that was killed continues: what is finished is kept beside the table until the table is whole, and a finished row
is kept by later runs as long as models and features are the same.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from eosin.batch import Outcome, Record, Report, run_batch
from eosin.errors import ConfigError, FeatureFileError, FeatureMismatchError
from eosin.features.bag import FeatureBag
from eosin.features.store import read_bag
from eosin.files import file_fingerprint, write_file
from eosin.mil.checkpoint import ModelCard, load_model
from eosin.mil.data import MemoryBags
from eosin.mil.evaluate import choose_device, predict_outputs
from eosin.mil.metrics import Floats
from eosin.mil.slots import Aggregator
from eosin.mil.task import with_mean_threshold
from eosin.mil.tasks import Task

Cell = str | int | float | None
Row = dict[str, Cell]

SUFFIXES = (".csv", ".parquet")
SAVE_INTERVAL_S = 20.0
BEFORE = ("slide_id", "status", "reason")
AFTER = ("uncertainty", "n_tiles", "model", "encoder", "encoder_hash", "features_hash", "message")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One model or several that answer the same question from the same kind of features.

    Attributes
    ----------
    models : tuple of Aggregator
    cards : tuple of ModelCard
    tasks : tuple of Task
        The same question; each with what its own training and validation parts taught.
    device : torch.device
    """

    models: tuple[Aggregator, ...]
    cards: tuple[ModelCard, ...]
    tasks: tuple[Task, ...]
    device: torch.device

    @property
    def task(self) -> Task:
        """The first model's task; a threshold is the mean of the models'."""
        return with_mean_threshold(self.tasks[0], self.tasks)

    @property
    def model_id(self) -> str:
        """Ids of the models, joined by plus signs."""
        return "+".join(card.model_id for card in self.cards)

    def outputs(self, bag: FeatureBag) -> Floats:
        """Return the activated outputs of each model, (models, outputs)."""
        features = torch.from_numpy(np.array(bag.features))
        bags = MemoryBags({bag.slide_id: features}, bag.spec)
        ids = [bag.slide_id]
        return np.concatenate(
            [
                predict_outputs(model, task, bags, ids, device=self.device)
                for model, task in zip(self.models, self.tasks, strict=True)
            ]
        )


def load_ensemble(folders: Sequence[Path], *, device: str = "auto") -> Ensemble:
    """Load model folders that belong together.

    Raises
    ------
    ConfigError
        If none is given, or their tasks differ.
    FeatureMismatchError
        If they were trained on different kinds of features.
    CheckpointError
        If one cannot be loaded.
    """
    if not folders:
        raise ConfigError("no model was given; pass at least one model folder")
    loaded = [load_model(folder) for folder in folders]
    first = loaded[0][1]
    tasks = tuple(card.load_task() for _, card in loaded)
    for folder, task, (_, card) in zip(folders, tasks, loaded, strict=True):
        if not task.same_question(tasks[0]):
            raise ConfigError(f"{folder} and {folders[0]} answer different questions; predict with each on its own")
        first.features.require_match(card.features, folder)
    place = choose_device(device)
    models = tuple(model.to(place) for model, _ in loaded)
    return Ensemble(models, tuple(card for _, card in loaded), tasks, place)


def predict(
    models: Sequence[Path],
    files: Mapping[str, Path],
    out: Path,
    *,
    failures: Sequence[Record] = (),
    device: str = "auto",
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Predict every slide of a batch and write the table.

    Parameters
    ----------
    models : sequence of Path
        Model folders; the outputs of several are averaged.
    files : mapping of str to Path
        Feature files by slide id, see `eosin.features.store.find_bags`.
    out : Path
        A csv or parquet file with one row per slide, in the order of the ids: ``slide_id``, ``status`` (ok, empty,
        failed), ``reason``, the columns of the task with the ``threshold`` that was used, ``uncertainty`` (standard
        deviation over the models, mean over the outputs; empty for one model), ``n_tiles``, ``model`` (hash of the
        weights), ``encoder``, ``encoder_hash``, ``features_hash`` and ``message``. A row of an earlier table of this
        name stays when it was no failure and is of the same models and features.
    failures : sequence of Record
        Slides that failed before they had features; each is a row with its reason.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    progress : callable, optional
        Is given each slide's record.

    Returns
    -------
    Report
        One record per slide of `files`. A slide without tiles is ``empty``, a row that was kept ``skipped``.

    Raises
    ------
    ConfigError
        If `out` is neither csv nor parquet.
    FeatureMismatchError
        If no file at all is of the kind that the models were trained on.
    OutputError
        If the table cannot be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: predictions are written as {' or '.join(SUFFIXES)}; give the file such a suffix")
    ensemble = load_ensemble(models, device=device)
    table = _Table(ensemble, out)
    table.keep(files)

    def work(slide_id: str) -> Outcome:
        row = predict_slide(ensemble, files[slide_id])
        table.rows[slide_id] = row
        table.save_sometimes()
        return Outcome() if row["n_tiles"] else Outcome("empty", "no tiles")

    try:
        report = run_batch(
            list(files), work, key=str, stage="predict", is_done=table.rows.__contains__, progress=progress
        )
    except BaseException:
        table.save()
        raise
    mismatches = [record for record in report.failed if record.reason == FeatureMismatchError.default_code]
    if report.records and len(mismatches) == len(report.records):
        predict_slide(ensemble, files[mismatches[0].slide_id])
    table.finish([*report.records, *failures])
    return report


def predict_slide(ensemble: Ensemble, path: Path) -> Row:
    """Return the cells of one slide's row.

    Raises
    ------
    FeatureFileError
        If the file cannot be used; `FeatureMismatchError` if its features are of another kind than the models'.
    """
    bag = read_bag(path)
    ensemble.cards[0].features.require_match(bag.spec, path)
    cells: Row = {"n_tiles": bag.n_instances, "features_hash": file_fingerprint(path)}
    cells["encoder_hash"] = bag.spec.weights_hash
    if not bag.n_instances:
        return cells | {"status": "empty"}
    outputs = ensemble.outputs(bag)
    if not np.isfinite(outputs).all():
        raise FeatureFileError(
            path, "gives a prediction that is not finite; extract the slide again", code="not-finite"
        )
    columns = ensemble.task.table(outputs.mean(0, keepdims=True))
    cells |= {name: values[0].item() for name, values in columns.items()} | {"status": "ok"}
    if len(outputs) > 1:
        cells["uncertainty"] = float(outputs.std(0, ddof=1).mean())
    return cells


@dataclass(eq=False)
class _Table:
    """The rows that are finished, and where they are kept while others are not."""

    ensemble: Ensemble
    out: Path
    rows: dict[str, Row] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        task = self.ensemble.task
        nothing = task.table(task.activate(torch.zeros(1, task.n_outputs)))
        self.numbers = {name for name, values in nothing.items() if values.dtype.kind == "f"} | {"uncertainty"}
        self.columns = [*BEFORE, *nothing, *AFTER]

    @property
    def partial(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial.csv")

    def keep(self, files: Mapping[str, Path]) -> None:
        """Take over the rows of an earlier run that would come out the same."""
        for path in (self.out, self.partial):
            for row in _read(path, self.columns):
                slide = str(row["slide_id"])
                if slide in files and self._is_current(row, files[slide]):
                    self.rows[slide] = {
                        name: self._typed(name, value) for name, value in row.items() if value not in ("", None)
                    }

    def _is_current(self, row: Mapping[str, Cell], path: Path) -> bool:
        if row["status"] not in ("ok", "empty") or row["model"] != self.ensemble.model_id or not path.is_file():
            return False
        return row["features_hash"] == file_fingerprint(path)

    def _typed(self, name: str, value: Cell) -> Cell:
        if name == "n_tiles":
            return int(str(value))
        return float(str(value)) if name in self.numbers else value

    def save_sometimes(self) -> None:
        if time.monotonic() - self.saved_at > SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write what is finished beside the table, for a run that continues."""
        if self.rows:
            frame = self._frame([self._whole(slide, row) for slide, row in self.rows.items()])
            write_file(self.partial, lambda path: frame.to_csv(path, index=False, lineterminator="\n"))
        self.saved_at = time.monotonic()

    def finish(self, records: Sequence[Record]) -> None:
        """Write the table: every slide has a row, those that failed with their reason."""
        rows = []
        for record in sorted(records, key=lambda record: record.slide_id):
            row = self._whole(record.slide_id, self.rows.get(record.slide_id, {}))
            if record.status != "skipped":
                row |= {"status": record.status, "reason": record.reason, "message": record.message}
            rows.append(row)
        frame = self._frame(rows)
        if self.out.suffix.lower() == ".parquet":
            write_file(self.out, lambda path: frame.to_parquet(path, index=False))
        else:
            write_file(self.out, lambda path: frame.to_csv(path, index=False, lineterminator="\n"))
        self.partial.unlink(missing_ok=True)

    def _whole(self, slide: str, row: Row) -> Row:
        features = self.ensemble.cards[0].features
        known: Row = {"model": self.ensemble.model_id, "encoder": features.encoder}
        return {"slide_id": slide, "encoder_hash": features.weights_hash} | known | row

    def _frame(self, rows: Sequence[Row]) -> pd.DataFrame:
        frame = pd.DataFrame(rows, columns=self.columns)
        for name in self.columns:
            if name in self.numbers:
                frame[name] = frame[name].astype("float64")
            elif name == "n_tiles":
                frame[name] = frame[name].astype("Int64")
            else:
                frame[name] = frame[name].astype("string").fillna("")
        return frame


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a table of ours; none when there is none, or it has other columns."""
    if not path.is_file():
        return []
    try:
        if path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path).astype("string").fillna("")
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        logger.warning("%s cannot be read (%s); every slide is predicted anew", path, error)
        return []
    if list(frame) != list(columns):
        return []
    rows: list[Row] = frame.to_dict("records")  # type: ignore[assignment]
    return rows

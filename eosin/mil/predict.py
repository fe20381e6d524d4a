"""Slide-level predictions of one model or an ensemble, one row per slide, whatever becomes of the slide."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eosin.batch import Outcome, Record, Report, run_batch
from eosin.errors import ConfigError, FeatureFileError, FeatureMismatchError
from eosin.features.bag import FeatureBag
from eosin.features.store import read_bag
from eosin.files import write_text
from eosin.mil.checkpoint import ModelCard, load_model
from eosin.mil.data import MemoryBags
from eosin.mil.evaluate import choose_device, predict_outputs
from eosin.mil.metrics import Floats
from eosin.mil.slots import Aggregator
from eosin.mil.tasks import Task

Cell = str | int | float | None


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
        thresholds = [getattr(task, "threshold", None) for task in self.tasks]
        known = [value for value in thresholds if value is not None]
        if not known or len(known) < len(thresholds):
            return self.tasks[0]
        return self.tasks[0].model_copy(update={"threshold": float(np.mean(known))})

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
        A csv with one row per slide: ``slide_id``, ``status`` (ok, empty, failed), ``reason``, the columns of the task,
        ``uncertainty`` (standard deviation over the models, mean over the outputs; empty for one model), ``n_tiles``,
        ``model``, ``encoder`` and ``message``.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    progress : callable, optional
        Is given each slide's record.

    Returns
    -------
    Report
        One record per slide. A slide without tiles is ``empty``.

    Raises
    ------
    FeatureMismatchError
        If no file at all is of the kind that the models were trained on.
    OutputError
        If the table cannot be written.
    """
    ensemble = load_ensemble(models, device=device)
    rows: dict[str, dict[str, Cell]] = {}

    def work(slide_id: str) -> Outcome:
        rows[slide_id] = predict_slide(ensemble, files[slide_id])
        return Outcome() if rows[slide_id]["n_tiles"] else Outcome("empty", "no tiles")

    report = run_batch(list(files), work, key=str, stage="predict", progress=progress)
    mismatches = [record for record in report.failed if record.reason == FeatureMismatchError.default_code]
    if report.records and len(mismatches) == len(report.records):
        predict_slide(ensemble, files[mismatches[0].slide_id])
    write_text(out, _table(ensemble, report, rows))
    return report


def predict_slide(ensemble: Ensemble, path: Path) -> dict[str, Cell]:
    """Return the cells of one slide's row.

    Raises
    ------
    FeatureFileError
        If the file cannot be used; `FeatureMismatchError` if its features are of another kind than the models'.
    """
    bag = read_bag(path)
    ensemble.cards[0].features.require_match(bag.spec, path)
    cells: dict[str, Cell] = {"n_tiles": bag.n_instances}
    if not bag.n_instances:
        return cells
    outputs = ensemble.outputs(bag)
    if not np.isfinite(outputs).all():
        raise FeatureFileError(
            path, "gives a prediction that is not finite; extract the slide again", code="not-finite"
        )
    columns = ensemble.task.table(outputs.mean(0, keepdims=True))
    cells |= {name: values[0].item() for name, values in columns.items()}
    if len(outputs) > 1:
        cells["uncertainty"] = float(outputs.std(0, ddof=1).mean())
    return cells


def _table(ensemble: Ensemble, report: Report, rows: Mapping[str, Mapping[str, Cell]]) -> str:
    task_columns = list(ensemble.task.table(ensemble.task.activate(torch.zeros(1, ensemble.task.n_outputs))))
    names = ["slide_id", "status", "reason", *task_columns, "uncertainty", "n_tiles", "model", "encoder", "message"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    for record in report.records:
        facts = {"status": record.status, "reason": record.reason, "message": record.message}
        origin = {"model": ensemble.model_id, "encoder": ensemble.cards[0].features.encoder}
        writer.writerow({"slide_id": record.slide_id} | facts | origin | dict(rows.get(record.slide_id, {})))
    return text.getvalue()

"""Slide-level predictions of one model or an ensemble, one row per slide, whatever becomes of the slide.

A run that was killed continues: what is finished is kept beside the table until the table is whole, and a finished row
is kept by later runs as long as models and features are the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eosin._batch import Outcome, run_batch
from eosin._files import file_fingerprint, paths_of, write_json
from eosin._names import Ids
from eosin._records import Record, Report
from eosin.errors import FeatureFileError, FeatureMismatchError
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.mil._data import BagSource, FeatureFolder, MemoryBags
from eosin.mil._ensemble import Ensemble
from eosin.mil._flow import Flow
from eosin.mil._jury import Jury
from eosin.mil._metrics import Floats
from eosin.mil._patients import Patients, by_known_slides, lost_slides, patients_file
from eosin.mil._prediction_table import SEEN_COLUMNS, Cell, PredictionTable, Row, require_table_suffix
from eosin.mil._seen import seen_notes
from eosin.mil._tables import LabelTable
from eosin.mil.bags import LARGE_BAG
from eosin.mil.task import Task

COLUMNS = (*SEEN_COLUMNS, "n_tiles", "model", "encoder", "encoder_hash", "features_hash", "message")

logger = logging.getLogger(__name__)


def predict(
    models: Path | str | Sequence[Path | str],
    files: Mapping[str, Path],
    out: Path | str,
    *,
    failures: Sequence[Record] = (),
    patient_of: Mapping[str, str] | None = None,
    labels: LabelTable | None = None,
    ids: Ids = "ask",
    device: str = "auto",
    progress: Callable[[Record], None] | None = None,
) -> "Predictions":
    """Predict every slide of a batch and write the table.

    Parameters
    ----------
    models : sequence of Path
        Model folders, whose outputs are averaged, and cross-validations: of these the models answer that have not seen
        the slide's patient where others have (out-of-fold), else all.
    files : mapping of str to Path
        Feature files by slide id, see `eosin.features._store.find_bags`.
    out : Path
        A csv or parquet file with one row per slide, in the order of the ids: ``slide_id``, ``status`` (ok, empty,
        failed), ``reason``, the columns of the task with the ``threshold`` that was used, ``uncertainty`` (standard
        deviation over the models, mean over the outputs; of several targets one each; empty for one model), ``seen``
        (trained, validated, no, unknown: what the models that answer have seen of the slide), ``seen_by`` (slide or
        patient), ``answered_by`` (which models), ``n_tiles``, ``model`` (hash of the weights), ``encoder``,
        ``encoder_hash``, ``features_hash``, ``message`` and ``fingerprint``. A row of an earlier table of this name
        stays when it was not a failure, is of the same models and features, and is as it was written.
        ``<table>_cohort.csv`` and ``.json`` beside it account for every slide.
    failures : sequence of Record
        Slides that failed before they had features; each is a row with its reason.
    patient_of : mapping of str to str, optional
        Patient of each slide. Writes a second table, see `eosin.mil._patients.patients_file`, with one row per patient:
        the mean over the slides, or one bag of all slides for models that were trained so; ``n_slides`` it has,
        ``n_used`` of them, and ``bad_slides`` with why. A slide that is in neither `files` nor `failures` is one that
        failed.
    labels : LabelTable, optional
        Says which patients slides have, without a table of patients: what the models have seen depends on it.
    ids : {"ask", "merge", "exact"}
        ``exact`` takes no slide or patient for another one of the training whose name looks like it.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    progress : callable, optional
        Is given each slide's record.

    Returns
    -------
    Predictions
        One record per slide of `files`, and of slides that `patient_of` alone names. A slide without tiles is
        ``empty``, a row that was kept ``skipped``.

    Raises
    ------
    ConfigError
        If `out` is neither csv nor parquet, or patients are asked of models of slides and of patients together.
    LabelError
        If none of the slides has a patient.
    FeatureMismatchError
        If no file at all is of the kind that the models were trained on.
    OutputError
        If the table cannot be written.
    """
    out = Path(out)
    require_table_suffix(out)
    jury = Jury.open(paths_of(models), device=device, ids=ids)
    known = [*files, *(record.slide_id for record in failures)]
    lost: list[Record] = []
    if patient_of is not None:
        patient_of = by_known_slides(patient_of, known)
        lost = lost_slides(jury.ensemble, patient_of, known)
        jury = replace(jury, patient_of=patient_of)
    elif labels is not None:
        jury = replace(jury, patient_of=labels.named_as(known, ids).patient_of())
    choices = {slide: jury.choose(slide) for slide in (*known, *(record.slide_id for record in lost))}
    everyone = jury.ensemble
    table = PredictionTable(out, "slide_id", everyone.task, everyone.facts, COLUMNS, everyone.content_hash)
    table.keep(files, lambda slide: jury.cells(choices[slide]) | {"features_hash": _features_hash(files[slide])})
    outputs: dict[str, Floats] = {}

    def work(slide_id: str) -> Outcome:
        row, said = predict_slide(jury.of(choices[slide_id]), files[slide_id])
        if said is not None:
            outputs[slide_id] = said
        table.add(slide_id, row | jury.cells(choices[slide_id]))
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
        predict_slide(everyone, files[mismatches[0].slide_id])
    records = {record.slide_id: record for record in (*report.records, *failures, *lost)}
    table.finish({slide: jury.cells(choices[slide]) | _end(record) for slide, record in records.items()})
    if patient_of is not None:
        patients = Patients(jury, files, table.rows, records, outputs)
        patients.write(patients_file(out))
    for note in seen_notes({slide: choices[slide].sight for slide in table.rows if table.rows[slide]["n_tiles"]}):
        logger.warning("%s", note)
    empty = {slide for slide, row in table.rows.items() if row.get("status") == "empty"}
    flow = Flow.of_predictions(records, empty, patient_of)
    write_account(out, flow)
    return Predictions((*report.records, *lost), flow, everyone.task, table.rows)


@dataclass(frozen=True, repr=False)
class Predictions(Report):
    """The records of a prediction, and the account of its slides.

    Attributes
    ----------
    flow : Flow
        Also in ``<table>_cohort.csv`` and ``<table>_cohort.json``.
    task : Task
        What all models ask in common.
    rows : mapping of str to Row
        The row of each slide that was predicted or is empty.
    """

    flow: Flow
    task: Task
    rows: Mapping[str, Row]


def write_account(out: Path, flow: Flow) -> None:
    """Write the account of the slides beside a table of predictions."""
    flow.write(out.parent, f"{out.stem}_cohort.csv")
    write_json(out.with_name(f"{out.stem}_cohort.json"), {"cohort": flow.as_json()})


def _features_hash(path: Path) -> str:
    return file_fingerprint(path) if path.is_file() else ""


def _end(record: Record) -> dict[str, Cell]:
    """Return what a slide's record says of its row; nothing of a row that was kept."""
    if record.status == "skipped":
        return {}
    return {"status": record.status, "reason": record.reason, "message": record.message}


def predict_slide(ensemble: Ensemble, path: Path) -> tuple[Row, Floats | None]:
    """Return the cells of one slide's row, and the outputs of each model, (models, outputs), unless it is empty.

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
        return cells | {"status": "empty"}, None
    outputs = ensemble.outputs(_source(path, bag), bag.slide_id)
    if not np.isfinite(outputs).all():
        raise FeatureFileError(
            path, "leads to a prediction that is infinite or NaN; extract the slide again", code="not-finite"
        )
    return cells | ensemble.answer(outputs) | {"status": "ok"}, outputs


def _source(path: Path, bag: FeatureBag) -> BagSource:
    """Return what the models read: the bag in memory, once for all of them, or a large one from its file in pieces."""
    if bag.n_instances > LARGE_BAG:
        return FeatureFolder({bag.slide_id: path}, cache_bytes=0)
    places = {} if bag.grid is None else {bag.slide_id: torch.from_numpy(bag.grid.places())}
    return MemoryBags({bag.slide_id: torch.from_numpy(np.array(bag.features))}, bag.spec, places=places)

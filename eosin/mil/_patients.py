"""Predictions of patients from those of their slides, by the rule that their model was trained by.

A model of slides answers for each slide, and a patient's answer is the mean of the outputs. A model that was trained
with all slides of a patient as one bag (``--level patient``) is given them as one bag.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from eosin._names import Ids, match_slides
from eosin._records import Record
from eosin.errors import EosinError, LabelError
from eosin.mil._data import FeatureFolder, PatientBags
from eosin.mil._ensemble import Ensemble
from eosin.mil._jury import Jury
from eosin.mil._metrics import Floats
from eosin.mil._prediction_table import SEEN_COLUMNS, PredictionTable, Row
from eosin.mil._seen import Choice
from eosin.mil._tables import read_labels, shown

COLUMNS = (
    *SEEN_COLUMNS, "n_slides", "n_used", "bad_slides", "n_tiles", "model", "encoder", "encoder_hash", "features_hash",
    "message",
)  # fmt: skip
MISSING = "missing"

logger = logging.getLogger(__name__)


def patients_file(out: Path) -> Path:
    """Return where the patients of a table of slides are written: ``p.csv`` -> ``p_patients.csv``."""
    return out.with_name(f"{out.stem}_patients{out.suffix}")


def read_patients(path: Path, ids: Ids = "ask") -> dict[str, str]:
    """Return the patient of each slide from any table that has both.

    Parameters
    ----------
    path : Path
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike, see `eosin._names.unify`.

    Raises
    ------
    LabelError
        If it lacks one of them, or a slide has two rows.
    """
    return read_labels(path, ids=ids).patient_of()


def by_known_slides(patient_of: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """Return a table of patients with its slides named as they are here; names of no slide stay.

    Raises
    ------
    TableError
        If a name could mean several slides, or two names one slide of two patients.
    """
    matched = match_slides(patient_of.items(), known, where="the table of patients")
    for note in matched.notes:
        logger.warning("the table of patients: %s", note)
    return {**matched.values, **{name: patient_of[name] for name in matched.unknown}}


def lost_slides(ensemble: Ensemble, patient_of: Mapping[str, str], known: Collection[str]) -> list[Record]:
    """Return a failed record for each slide that a table of patients names and that is not there.

    Raises
    ------
    ConfigError
        If the models cannot answer for patients together.
    LabelError
        If the table names none of the slides that are there.
    """
    _ = ensemble.reads_patients
    there = set(known)
    absent = [slide for slide in patient_of if slide not in there]
    if there and len(absent) == len(patient_of):
        raise LabelError(
            f"none of the {len(patient_of)} slides in the table of patients is among the {len(there)} that are to be "
            f"predicted; the table has {shown(absent)}, found {shown(sorted(there))}"
        )
    nobodys = sorted(there - set(patient_of))
    if nobodys:
        logger.warning(
            "the table of patients does not list the slides %s; they are predicted as slides only", shown(nobodys)
        )
    message = "the table of patients names the slide, but it is not among those that are to be predicted"
    return [Record(slide, "predict", "failed", MISSING, message) for slide in absent]


@dataclass(eq=False)
class Patients:
    """The patients of a batch: which slides they have, what became of these, and what the models said of them.

    Attributes
    ----------
    jury : Jury
        Who answers for which slide, and the patients.
    files : mapping of str to Path
        Feature files by slide.
    slides : mapping of str to Row
        Finished rows by slide.
    fates : mapping of str to Record
        Record of each slide of this run.
    outputs : mapping of str to (models, outputs) float
        What each model said of the slides that this run computed; the others are computed when they are needed.
    """

    jury: Jury
    files: Mapping[str, Path]
    slides: Mapping[str, Row]
    fates: Mapping[str, Record]
    outputs: Mapping[str, Floats]

    @cached_property
    def slides_of(self) -> dict[str, list[str]]:
        """The slides of each patient, in the order of the table."""
        members: dict[str, list[str]] = {}
        for slide, patient in self.jury.patient_of.items():
            members.setdefault(patient, []).append(slide)
        return members

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """The models that answer for each patient."""
        return {patient: self.jury.choose(*slides) for patient, slides in self.slides_of.items()}

    def write(self, out: Path) -> None:
        """Write the table of patients; rows of an earlier one stay when nothing about their slides has changed.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        everyone = self.jury.ensemble
        table = PredictionTable(out, "patient_id", everyone.task, everyone.facts, COLUMNS, everyone.content_hash)
        table.keep(self.slides_of, lambda name: self._answered_by(name) | {"features_hash": self._features_hash(name)})
        try:
            ends = {patient: self._end(table, patient) for patient in self.slides_of}
        # what is finished stays when the run is stopped, by a signal, too
        except BaseException:
            table.save()
            raise
        table.finish(ends)

    def _answered_by(self, patient: str) -> Row:
        return self.jury.cells(self.choices[patient])

    def _end(self, table: PredictionTable, patient: str) -> Row:
        if patient in table.rows:
            return {}
        row = self._counts(patient) | self._answered_by(patient)
        used = self._used(patient)
        try:
            if used:
                table.add(patient, row | self._answer(patient, used))
                return {}
        except EosinError as error:
            return row | {"status": "failed", "reason": error.code, "message": error.message}
        fates = {self._fate(slide) for slide in self.slides_of[patient]}
        # a patient all of whose slides lack tissue was read well, and is not a failure
        if fates == {"empty"}:
            return row | {"status": "empty"}
        return row | {"status": "failed", "reason": "no-slide", "message": "no slide of the patient could be used"}

    def _counts(self, patient: str) -> Row:
        members, used = self.slides_of[patient], self._used(patient)
        bad = [f"{slide} ({self._fate(slide)})" for slide in members if slide not in used]
        return {
            "n_slides": len(members),
            "n_used": len(used),
            "bad_slides": "; ".join(bad),
            "n_tiles": sum(int(self.slides[slide]["n_tiles"] or 0) for slide in used),
            "features_hash": self._features_hash(patient),
        }

    def _used(self, patient: str) -> list[str]:
        return [slide for slide in self.slides_of[patient] if self._fate(slide) == "ok"]

    def _fate(self, slide: str) -> str:
        """Return ``ok``, ``empty`` or the reason why the slide failed."""
        record = self.fates[slide]
        return record.reason if record.status == "failed" else str(self.slides[slide]["status"])

    def _features_hash(self, patient: str) -> str:
        """Return a hash over what the patient's answer is made from: slides, their features, what became of them."""
        made_from = [
            f"{slide}\t{self._fate(slide)}\t{self.slides.get(slide, {}).get('features_hash', '')}"
            for slide in self.slides_of[patient]
        ]
        return hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]

    def _answer(self, patient: str, used: Sequence[str]) -> Row:
        choice = self.choices[patient]
        ensemble = self.jury.of(choice)
        if ensemble.reads_patients:
            outputs = self._as_one_bag(ensemble, used)
        else:
            outputs = np.mean([self._of_slide(ensemble, choice, slide) for slide in used], axis=0)
        return ensemble.answer(outputs) | {"status": "ok"}

    def _of_slide(self, ensemble: Ensemble, choice: Choice, slide: str) -> Floats:
        """Return what each model says of a slide, computed again for a row of an earlier run, or of other models."""
        if slide in self.outputs and self.jury.choose(slide).folders == choice.folders:
            return self.outputs[slide]
        return ensemble.outputs(self._folder([slide]), slide)

    def _as_one_bag(self, ensemble: Ensemble, used: Sequence[str]) -> Floats:
        """Return what each model says of the slides as the bag that a patient was in training."""
        return ensemble.outputs(PatientBags(self._folder(used), {"all": used}), "all")

    def _folder(self, slides: Sequence[str]) -> FeatureFolder:
        # each slide is read once here, so that a cache would only hold memory
        return FeatureFolder({slide: self.files[slide] for slide in slides}, cache_bytes=0)

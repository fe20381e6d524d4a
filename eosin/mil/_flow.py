"""The flow of a cohort: from the files and table rows that were given to the slides that an analysis rests on.

Every slide that anybody named has exactly one end: it is used, or it is lost at one step for one reason. So the
numbers add up, and nothing is left out that is not written down. The steps are those of a STARD or CONSORT diagram.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from eosin._files import write_text
from eosin._names import is_missing
from eosin._records import Record
from eosin._tables import csv_text

COHORT = "cohort.csv"
COLUMNS = ("slide_id", "patient_id", "used", "lost_at", "reason")
STEPS = {
    "found": "found",
    "readable": "readable",
    "tissue": "with tissue",
    "features": "with features",
    "predicted": "predicted",
    "labelled": "with a label",
    "in splits": "in the splits",
    "unseen": "not seen by the model",
}
"""The steps in their order, each with what is said of slides that pass it."""


_LOST_AT = {"tile": "readable", "select": "readable", "extract": "features"}
"""The step at which a slide is lost that fails in a stage of the work on slides."""


@dataclass(frozen=True)
class Loss:
    """Where and why a slide was lost."""

    step: str
    reason: str


@dataclass(frozen=True)
class Count:
    """One step in numbers: how many slides, of how many patients, are left after it, and why others are not."""

    step: str
    slides: int
    patients: int
    lost: Mapping[str, int]


@dataclass(frozen=True)
class Flow:
    """What became of every slide of a cohort.

    Attributes
    ----------
    slide_ids : tuple of str
        Every slide that a file or a table row names.
    patient_of : mapping of str to str
        Patients, as far as they are known.
    losses : mapping of str to Loss
        The slides that are not used.
    """

    slide_ids: tuple[str, ...] = ()
    patient_of: Mapping[str, str] = field(default_factory=dict)
    losses: Mapping[str, Loss] = field(default_factory=dict)

    @classmethod
    def of(cls, *sources: Iterable[str], patient_of: Mapping[str, str] | None = None) -> Self:
        """Begin with the slides that files and table rows name."""
        return cls().joined(*sources, patient_of=patient_of)

    def joined(self, *sources: Iterable[str], patient_of: Mapping[str, str] | None = None) -> Self:
        """Return the flow with the slides of further files or tables."""
        known = dict.fromkeys((*self.slide_ids, *(one for source in sources for one in source)))
        return replace(self, slide_ids=tuple(known), patient_of={**self.patient_of, **(patient_of or {})})

    def lose(self, step: str, reasons: Mapping[str, str]) -> Self:
        """Return the flow after a step; a slide that was lost before keeps its first reason.

        Parameters
        ----------
        step : str
            Of `STEPS`.
        reasons : mapping of str to str
            Why each slide does not pass. Slides that nobody named before come into the account here.
        """
        new = {slide: Loss(step, reason) for slide, reason in reasons.items() if slide not in self.losses}
        known = tuple(dict.fromkeys((*self.slide_ids, *new)))
        return replace(self, slide_ids=known, losses={**self.losses, **new})

    def keep(self, step: str, slides: Iterable[str], reason: str) -> Self:
        """Return the flow after a step that only these slides pass."""
        passing = set(slides)
        return self.lose(step, {slide: reason for slide in self.used if slide not in passing})

    @property
    def used(self) -> tuple[str, ...]:
        """The slides that are left."""
        return tuple(slide for slide in self.slide_ids if slide not in self.losses)

    def patients(self, slides: Iterable[str]) -> int:
        """Return how many known patients slides have."""
        return len({patient for slide in slides if not is_missing(patient := self.patient_of.get(slide, ""))})

    def counts(self) -> list[Count]:
        """Return the steps at which slides were lost, in order, after the whole cohort as the step ``given``."""
        left = list(self.slide_ids)
        counts = [Count("given", len(left), self.patients(left), {})]
        # in the order of the work, not in which losses were noted
        for step in STEPS:
            lost = {one: loss for one in left if (loss := self.losses.get(one)) is not None and loss.step == step}
            if lost:
                left = [slide for slide in left if slide not in lost]
                reasons = Counter(loss.reason for loss in lost.values())
                counts.append(Count(step, len(left), self.patients(left), dict(reasons.most_common())))
        return counts

    def lines(self) -> Iterator[str]:
        """Return the account for a terminal: one line per step, slides by name where they are few."""
        for count in self.counts():
            if count.step == "given":
                yield f"cohort: {_slides(count)} given"
                continue
            for reason, number in count.lost.items():
                lost = [one for one, loss in self.losses.items() if loss == Loss(count.step, reason)]
                yield f"  {number} lost, {reason}: {_few(lost)}"
        yield f"  {len(self.used)} used"

    def as_json(self) -> list[dict[str, Any]]:
        """Return the account for ``metrics.json``."""
        return [
            {"step": one.step, "slides": one.slides, "patients": one.patients, "lost": dict(one.lost)}
            for one in self.counts()
        ]

    @classmethod
    def of_predictions(
        cls, records: Mapping[str, Record], empty: Container[str], patient_of: Mapping[str, str] | None
    ) -> Self:
        """Return the account of predictions.

        Parameters
        ----------
        records : mapping of str to Record
            How each slide ended, in the stage that it came to.
        empty : container of str
            Slides without tiles, those whose row was kept included.
        patient_of : mapping of str to str, optional
            A slide without a patient is lost where patients are asked for.
        """
        flow = cls.of(records, patient_of=patient_of)
        flow = flow.lose("tissue", {slide: "has no tissue" for slide in records if slide in empty})
        for slide, record in records.items():
            if record.status == "failed":
                named_alone = record.reason == "missing"
                flow = flow.lose(
                    "found" if named_alone else _LOST_AT.get(record.stage.split()[0], "predicted"),
                    {slide: "has no slide or feature file" if named_alone else record.reason},
                )
        return flow if patient_of is None else flow.keep("labelled", patient_of, "has no row in the table of patients")

    def write(self, folder: Path, name: str = COHORT) -> Path:
        """Write ``cohort.csv``, one row per slide; return its path.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        rows: list[tuple[object, ...]] = [COLUMNS]
        for slide in self.slide_ids:
            loss = self.losses.get(slide, Loss("", ""))
            rows.append((slide, self.patient_of.get(slide, ""), int(not loss.step), loss.step, loss.reason))
        path = folder / name
        write_text(path, csv_text(rows))
        return path


def _slides(count: Count) -> str:
    of = f" of {count.patients} patient{'s' * (count.patients != 1)}" if count.patients else ""
    return f"{count.slides} slide{'s' * (count.slides != 1)}{of}"


def _few(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

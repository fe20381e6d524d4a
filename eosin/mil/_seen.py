"""Which slides a model has seen: ``seen.csv`` beside its weights, so that it can be kept from judging them later."""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eosin._files import write_text
from eosin._filesets import members_of
from eosin._tables import csv_text, unshielded
from eosin.errors import CheckpointError
from eosin.mil._checkpoint import CARD, load_card
from eosin.mil._data import Examples, PatientBags

SEEN = "seen.csv"
COLUMNS = ("slide_id", "patient_id", "part")
INNER = ("", "crossval", "chosen")
"""Where the models of a run lie below its folder: of `crossval`, of a job, of a sweep."""


@dataclass(frozen=True)
class Seen:
    """The slides that a model was trained on or selected by.

    Attributes
    ----------
    patient_of : mapping of str to str
        Patient of each slide.
    """

    patient_of: Mapping[str, str]

    @cached_property
    def patients(self) -> frozenset[str]:
        """Their patients."""
        return frozenset(self.patient_of.values())

    def has(self, slide_id: str, patient_id: str | None = None) -> bool:
        """Return whether the model has seen the slide, or another one of its patient."""
        return slide_id in self.patient_of or patient_id in self.patients


def write_seen(folder: Path, train: Examples, val: Examples | None) -> str:
    """Write ``seen.csv``: slide, patient and part (train, val) of everything that shaped the model.

    Returns
    -------
    str
        Its SHA-256, for the model's card.
    """
    parts = {part: examples for part, examples in (("train", train), ("val", val)) if examples is not None}
    rows = [(slide, patient, part) for part, examples in parts.items() for slide, patient in slides_of(examples)]
    text = csv_text([COLUMNS, *rows])
    write_text(folder / SEEN, text)
    return hashlib.sha256(text.encode()).hexdigest()


def slides_of(examples: Examples) -> Iterator[tuple[str, str]]:
    """Return every slide of examples with its patient, also where an example is a patient."""
    for name, patient in zip(examples.ids, examples.patient_ids, strict=True):
        slides = examples.bags.slides_of(name) if isinstance(examples.bags, PatientBags) else (name,)
        yield from ((slide, patient) for slide in slides)


def read_seen(folder: Path) -> Seen | None:
    """Read ``seen.csv``; None for a model that was saved without one.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    path = folder / SEEN
    if not path.exists():
        return None
    stated = load_card(folder).files.get(SEEN) if (folder / CARD).exists() else None
    try:
        data = path.read_bytes()
        if stated is not None and stated != hashlib.sha256(data).hexdigest():
            raise ValueError(f"it is not the file that {CARD} names")
        rows = csv.DictReader(io.StringIO(data.decode(), newline=""))
        return Seen({unshielded(row["slide_id"]): unshielded(row["patient_id"]) for row in rows})
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise CheckpointError(path, f"cannot be read ({error}); train the model again") from None


@dataclass(frozen=True)
class Witness:
    """A model of a run, and what it has seen; None where nobody knows.

    Attributes
    ----------
    folder : Path
    seen : Seen or None
    """

    folder: Path
    seen: Seen | None


@dataclass(frozen=True)
class Run:
    """The models of one training or cross-validation.

    Attributes
    ----------
    root : Path
    models : tuple of Witness
    """

    root: Path
    models: tuple[Witness, ...]

    @classmethod
    def open(cls, root: Path) -> "Run":
        """Find the models below a folder: itself, its folds, or those of the job or sweep that it is.

        Raises
        ------
        CheckpointError
            If there are none.
        ConfigError
            If a model is not of the run that finished last, see `eosin._filesets.members_of`.
        """
        folders = [root] if (root / CARD).is_file() else []
        for inner in INNER:
            folders = folders or _folds(root / inner)
        if not folders:
            raise CheckpointError(
                root, f"is not a run (no {CARD}, no fold_*/{CARD}); pass what train or crossval wrote"
            )
        return cls(root, tuple(Witness(folder, read_seen(folder)) for folder in folders))

    def unbiased(self, slide_id: str) -> tuple[Path, ...]:
        """Return the models that have seen neither the slide nor, as far as the run knows, its patient."""
        patient = self._patient(slide_id)
        return tuple(m.folder for m in self.models if m.seen is not None and not m.seen.has(slide_id, patient))

    def is_unknown(self, slide_id: str) -> bool:
        """Return whether no model is known to be unbiased because some do not say what they have seen."""
        return not self.unbiased(slide_id) and any(model.seen is None for model in self.models)

    def _patient(self, slide_id: str) -> str | None:
        known = (model.seen.patient_of.get(slide_id) for model in self.models if model.seen is not None)
        return next((patient for patient in known if patient is not None), None)


def _folds(folder: Path) -> list[Path]:
    """Return the model folders of a cross-validation; those of an earlier one with more folds are none of them."""
    named = members_of(folder)
    cards = [path for path in folder.glob(f"fold_*/{CARD}") if named is None or f"{path.parent.name}/{CARD}" in named]
    return [path.parent for path in sorted(cards, key=_fold)]


def _fold(path: Path) -> int:
    number = path.parent.name.removeprefix("fold_")
    return int(number) if number.isdigit() else -1

"""Which slides a model has seen: ``seen.csv`` beside its weights, so that it can be kept from judging them later.

A model that has trained on a slide, or on another slide of its patient, says nothing about how it will do with new
patients. Everything that a model is asked about is therefore looked up here first, and of a cross-validation the models
answer that have not seen the patient.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eosin._files import write_text
from eosin._filesets import members_of
from eosin._names import Ids, clean, is_missing, look_alike, same_patient, slide_id
from eosin._tables import csv_text, unshielded
from eosin.errors import CheckpointError
from eosin.mil._checkpoint import CARD, load_card
from eosin.mil._data import Examples, PatientBags
from eosin.mil._tables import shown

SEEN = "seen.csv"
COLUMNS = ("slide_id", "patient_id", "part")
INNER = ("", "crossval", "chosen")
"""Where the models of a run lie below its folder: of `crossval`, of a job, of a sweep."""

Part = Literal["trained", "validated", "unknown", "no"]
PARTS: tuple[Part, ...] = ("trained", "validated", "unknown", "no")
"""What a model may have done with a slide, the worst first."""


@dataclass(frozen=True)
class Sight:
    """What models have seen of a slide.

    Attributes
    ----------
    part : {"trained", "validated", "unknown", "no"}
        ``validated``: the slide chose the epoch or a threshold; ``unknown``: a model does not say what it has seen.
    by : {"slide", "patient", ""}
        Whether the slide itself was seen, or another one of its patient.
    name : str
        What was seen is called so; it may be spelled differently.
    """

    part: Part = "no"
    by: Literal["slide", "patient", ""] = ""
    name: str = ""

    @property
    def is_new(self) -> bool:
        """Whether no model has seen the slide, and all say so."""
        return self.part == "no"

    @property
    def tag(self) -> str:
        """The sight in a few words, for the title of a picture; empty for a slide that is new."""
        patient = "patient " if self.by == "patient" else ""
        return {
            "trained": f"{patient}seen in training",
            "validated": f"{patient}seen in validation",
            "unknown": "may be seen in training",
            "no": "",
        }[self.part]

    @property
    def words(self) -> str:
        """The sight in a sentence about the slide; empty for a slide that is new."""
        of_patient = f"another slide of its patient ({self.name})" if self.by == "patient" else "this slide"
        return {
            "trained": f"the model was trained on {of_patient}, so what it says here flatters it",
            "validated": f"the model was chosen by {of_patient}, so what it says here flatters it",
            "unknown": f"the model does not say which slides trained it (no {SEEN}), so this one may be among them",
            "no": "",
        }[self.part]


def worst(sights: Iterable[Sight]) -> Sight:
    """Return the first of the worst sights; ``no`` of none."""
    return min(sights, key=lambda sight: PARTS.index(sight.part), default=Sight())


@dataclass(frozen=True)
class Seen:
    """The slides that a model was trained on or selected by.

    Attributes
    ----------
    patient_of : mapping of str to str
        Patient of each slide.
    validated : collection of str
        Those of the slides that did not train it, but chose its epoch or its threshold.
    """

    patient_of: Mapping[str, str]
    validated: Collection[str] = frozenset()

    @cached_property
    def patients(self) -> frozenset[str]:
        """Their patients."""
        return frozenset(self.patient_of.values())

    @cached_property
    def _known(self) -> Mapping[tuple[str, bool], Mapping[str, Sight]]:
        """What is known by slide and by patient, under exact names and under what look-alikes have in common."""
        kinds: dict[tuple[str, bool], dict[str, Sight]] = {}
        for by, key, exact in (
            ("slide", clean, True), ("slide", look_alike, False),
            ("patient", clean, True), ("patient", same_patient, False),
        ):  # fmt: skip
            found = kinds.setdefault((by, exact), {})
            for slide, patient in self.patient_of.items():
                part: Part = "validated" if slide in self.validated else "trained"
                name = slide if by == "slide" else patient
                sight = Sight(part, "slide" if by == "slide" else "patient", name)
                found[key(name)] = worst((found.get(key(name), Sight()), sight))
        return kinds

    def of(self, slide: str, patient: str | None = None, *, ids: Ids = "ask") -> Sight:
        """Return what the model has seen of a slide.

        Parameters
        ----------
        slide : str
        patient : str, optional
            Where nobody says it, the slide's name may be that of a patient, or a TCGA barcode, which begins with one.
        ids : {"ask", "merge", "exact"}
            ``exact`` takes no name for another one that looks like it.
        """
        exact = ids == "exact"
        owner = slide if patient is None or is_missing(patient) else patient
        slide_key, patient_key = (clean, clean) if exact else (look_alike, same_patient)
        by_slide = self._known[("slide", exact)].get(slide_key(slide_id(slide)), Sight())
        return worst((by_slide, self._known[("patient", exact)].get(patient_key(owner), Sight())))

    def has(self, slide_id: str, patient_id: str | None = None) -> bool:
        """Return whether the model has seen the slide, or another one of its patient."""
        return not self.of(slide_id, patient_id).is_new


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
    card = load_card(folder) if (folder / CARD).exists() else None
    stated = None if card is None else card.files.get(SEEN)
    try:
        data = path.read_bytes()
        if stated is not None and stated != hashlib.sha256(data).hexdigest():
            raise ValueError(f"it is not the file that {CARD} names")
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
        patient_of = {unshielded(row["slide_id"]): unshielded(row["patient_id"]) for row in rows}
        validated = frozenset(unshielded(row["slide_id"]) for row in rows if row["part"] == "val")
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise CheckpointError(path, f"cannot be read ({error}); train the model again") from None
    refitted = card is not None and card.recipe.training.refit  # then the validation part has trained it in the end
    return Seen(patient_of, frozenset() if refitted else validated)


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
class Choice:
    """The models that answer for a slide.

    Attributes
    ----------
    folders : tuple of Path
        Their mean is the answer.
    sight : Sight
        What these have seen of the slide.
    how : str
        Which models they are, in words for a table.
    """

    folders: tuple[Path, ...]
    sight: Sight
    how: str


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
                root,
                f"is not a model folder (no {CARD}), and not a training run (no fold_*/{CARD}); pass the --out "
                "folder of eosin train or eosin crossval",
            )
        return cls(root, tuple(Witness(folder, read_seen(folder)) for folder in folders))

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the models."""
        return tuple(model.folder for model in self.models)

    @cached_property
    def _patients(self) -> dict[str, str]:
        """Patient of each slide of the run, by exact name."""
        return {clean(s): p for model in self.models if model.seen for s, p in model.seen.patient_of.items()}

    @cached_property
    def _look_alikes(self) -> dict[str, str]:
        return {look_alike(slide): patient for slide, patient in self._patients.items()}

    def sights(self, slide: str, patient: str | None = None, *, ids: Ids = "ask") -> dict[Path, Sight]:
        """Return what each model has seen of a slide; arguments as of `Seen.of`."""
        known = slide_id(slide) in self._patients
        # the run itself tells its slides apart letter by letter, also where some look alike
        ids = "exact" if known else ids
        if patient is None or is_missing(patient):
            patient = self._patients.get(slide_id(slide))
            if patient is None and ids != "exact":
                patient = self._look_alikes.get(look_alike(slide_id(slide)))
        return {
            model.folder: Sight("unknown") if model.seen is None else model.seen.of(slide, patient, ids=ids)
            for model in self.models
        }

    def choose(self, slides: Sequence[str], patient: str | None = None, *, ids: Ids = "ask") -> Choice:
        """Return the models that answer for slides of one patient.

        Of a cross-validation those that have seen none of the patient's slides, where others have (out-of-fold): with
        repeated folds, or several models per fold, these are several. All of them otherwise.
        """
        sights = dict.fromkeys(self.folders, Sight())
        for slide in slides:
            sights = {
                folder: worst((sights[folder], one)) for folder, one in self.sights(slide, patient, ids=ids).items()
            }
        new = tuple(folder for folder, sight in sights.items() if sight.is_new)
        if new and any(sight.by for sight in sights.values()):
            names = "+".join(folder.relative_to(self.root).as_posix() for folder in new)
            return Choice(new, Sight(), f"out-of-fold: {names}")
        return Choice(self.folders, worst(sights.values()), _all(len(sights)))

    def sight(self, folders: Collection[Path], slide: str, patient: str | None = None, *, ids: Ids = "ask") -> Sight:
        """Return what those of the models that lie in some folders have seen of a slide."""
        return worst(one for folder, one in self.sights(slide, patient, ids=ids).items() if folder in folders)

    def unbiased(self, slide_id: str) -> tuple[Path, ...]:
        """Return the models that have seen neither the slide nor, as far as the run knows, its patient."""
        return tuple(folder for folder, sight in self.sights(slide_id).items() if sight.is_new)

    def is_unknown(self, slide_id: str) -> bool:
        """Return whether no model is known to be unbiased because some do not say what they have seen."""
        return not self.unbiased(slide_id) and any(model.seen is None for model in self.models)


@dataclass(frozen=True)
class Models:
    """The models that a command is given: folders of single models, and cross-validations.

    Attributes
    ----------
    runs : tuple of Run
    """

    runs: tuple[Run, ...]

    @classmethod
    def open(cls, roots: Sequence[Path]) -> "Models":
        """Find the models below some folders; errors as of `Run.open`."""
        return cls(tuple(Run.open(root) for root in roots))

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of all models."""
        return tuple(folder for run in self.runs for folder in run.folders)

    def choose(self, slides: Sequence[str], patient: str | None = None, *, ids: Ids = "ask") -> Choice:
        """Return the models that answer for slides of one patient, see `Run.choose`."""
        made = [run.choose(slides, patient, ids=ids) for run in self.runs]
        folders = tuple(folder for choice in made for folder in choice.folders)
        if all(len(run.models) == 1 for run in self.runs):
            how = _all(len(folders))
        else:
            each = [f"{run.root.name} {choice.how}" for run, choice in zip(self.runs, made, strict=True)]
            how = made[0].how if len(made) == 1 else "; ".join(each)
        return Choice(folders, worst(choice.sight for choice in made), how)


def donor_notes(sights: Mapping[str, Sight]) -> list[str]:
    """Return what a reader must know of donors whose tiles are added to other slides; nothing where all are new."""
    named = {part: [name for name, sight in sights.items() if sight.part == part] for part in PARTS}
    told: dict[Part, str] = {
        "trained": "trained the model that is asked, so the effect of their tiles flatters it",
        "validated": "chose the model that is asked, so the effect of their tiles flatters it",
        "unknown": f"may have trained the model that is asked, which does not say (no {SEEN})",
    }
    return [f"donors that, or whose patients, {words}: {shown(named[part])}"
            for part, words in told.items() if named[part]]  # fmt: skip


def donor_parts(sets: Iterable[str], sights: Mapping[str, Sight]) -> NDArray[np.object_]:
    """Return for sets of tiles, named after their slide, what was done with that slide; None for others."""
    found = [next((one.part for name, one in sights.items() if what.endswith(f" of {name}")), None) for what in sets]
    return np.array(found, object)


def _all(number: int) -> str:
    return "model" if number == 1 else f"mean of all {number} models"


def seen_notes(sights: Mapping[str, Sight]) -> list[str]:
    """Return what a reader of figures over these slides must know; nothing where all are new to the models."""
    notes = []
    for part, what in (
        ("trained", "trained the model that answers for them"),
        ("validated", "chose the model that answers for them"),
    ):
        found = [_named(slide, sight) for slide, sight in sights.items() if sight.part == part]
        if found:
            notes.append(
                f"{len(found)} of {len(sights)} slides, or their patients, {what}: {shown(found)}; figures over "
                "these flatter it and say nothing about new patients"
            )
    unknown = sum(sight.part == "unknown" for sight in sights.values())
    if unknown:
        notes.append(
            f"a model does not say which slides it has seen (no {SEEN}), so {unknown} of {len(sights)} slides may be "
            "among them"
        )
    return notes


def seen_counts(sights: Iterable[Sight]) -> dict[str, int]:
    """Return how many slides there are of each part, for ``metrics.json``."""
    parts = Counter(sight.part for sight in sights)
    return {part: parts[part] for part in PARTS}


def _named(slide: str, sight: Sight) -> str:
    """Return a slide, with what was seen where that is not its own name."""
    return slide if sight.name == slide else f"{slide} (as {sight.by} {sight.name})"


def _folds(folder: Path) -> list[Path]:
    """Return the model folders of a cross-validation; those of an earlier one with more folds are none of them."""
    named = members_of(folder)
    cards = [*folder.glob(f"fold_*/{CARD}"), *folder.glob(f"fold_*/inner_*/{CARD}")]
    kept = [path for path in cards if named is None or path.relative_to(folder).as_posix() in named]
    return [path.parent for path in sorted(kept, key=lambda path: [_number(part) for part in path.parts])]


def _number(name: str) -> int:
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1

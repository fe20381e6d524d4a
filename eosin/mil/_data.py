"""Bags of features with their labels: where instances come from, and examples that join them with targets.

Policies, the same everywhere. A label whose slide has no features is an error unless `missing` is ``drop``; features
without a label are left out. A patient may have several slides.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin._fingerprints import DIGITS
from eosin.errors import LabelError
from eosin.features._bag import FeatureSpec
from eosin.features._store import read_bag, read_headers, read_rows_hash
from eosin.mil._tables import LabelTable, shown
from eosin.mil.bags import side_by_side
from eosin.mil.task import Task


class BagSource(Protocol):
    """Where the instances of bags come from."""

    @property
    def spec(self) -> FeatureSpec:
        """What the features are, the same for all bags."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the bags."""

    def length(self, bag_id: str) -> int:
        """Return the number of instances without reading them."""

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances (n, D) in their stored dtype, or some rows of them; the caller must not change them."""

    def places(self, bag_id: str) -> Tensor | None:
        """Return where the tiles lie in steps of their grid, (n, 2) float32; None without tile coordinates."""

    def content_hash(self, bag_id: str) -> str:
        """Return a hash of all instances: a model of other instances is another model."""


class MemoryBags:
    """Bags that are in memory already.

    Parameters
    ----------
    bags : mapping of str to (n, D) tensor or array
    spec : FeatureSpec
    places : mapping of str to (n, 2) tensor, optional
        Where the tiles of a bag lie; bags that are not in it have no tile coordinates.
    """

    def __init__(
        self,
        bags: Mapping[str, Tensor | NDArray[np.floating]],
        spec: FeatureSpec,
        *,
        places: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._places = dict(places or {})
        self._bags = {name: torch.as_tensor(bag) for name, bag in bags.items()}
        self.spec = spec
        self.ids: Sequence[str] = tuple(self._bags)

    def length(self, bag_id: str) -> int:
        """Return the number of instances."""
        return len(self._bags[bag_id])

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances, or some rows of them."""
        bag = self._bags[bag_id]
        return bag if rows is None else bag[rows]

    def places(self, bag_id: str) -> Tensor | None:
        """Return where the tiles lie, or None."""
        return self._places.get(bag_id)

    def content_hash(self, bag_id: str) -> str:
        """Return a hash of all instances, their shape and type."""
        bag = self._bags[bag_id].contiguous()
        digest = hashlib.sha256(f"{bag.dtype} {tuple(bag.shape)}".encode())
        digest.update(bag.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:DIGITS]


class FeatureFolder:
    """Bags in feature files, memory-mapped, and kept in memory as long as a budget lasts.

    Parameters
    ----------
    files : mapping of str to Path
        As `eosin.features._store.find_bags` returns it; all of one specification.
    cache_bytes : int
        Bags are kept from their first use until this many bytes are used.

    Raises
    ------
    FeatureMismatchError
        If two files were made differently.
    """

    def __init__(self, files: Mapping[str, Path], *, cache_bytes: int = 2 * 2**30) -> None:
        self.spec, self._lengths = read_headers(files)
        self.ids: Sequence[str] = tuple(files)
        self._files = dict(files)
        self._cache: dict[str, Tensor] = {}
        self._free_bytes = cache_bytes

    def length(self, bag_id: str) -> int:
        """Return the number of instances."""
        return self._lengths[bag_id]

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances, or some rows of them; of a file that is not kept only these rows are read."""
        if bag_id not in self._cache:
            features = read_bag(self._files[bag_id]).features
            if features.nbytes > self._free_bytes:
                # a copy: torch warns of memory that cannot be written
                return torch.from_numpy(np.array(features if rows is None else features[rows.numpy()]))
            self._cache[bag_id] = torch.from_numpy(np.array(features))
            self._free_bytes -= features.nbytes
        bag = self._cache[bag_id]
        return bag if rows is None else bag[rows]

    def places(self, bag_id: str) -> Tensor | None:
        """Return where the tiles lie, from the coordinates in the file, or None."""
        grid = read_bag(self._files[bag_id]).grid
        return None if grid is None else torch.from_numpy(grid.places())

    def content_hash(self, bag_id: str) -> str:
        """Return a hash of all instances, from the checksums of the file and without reading its rows."""
        return read_rows_hash(self._files[bag_id])


class PatientBags:
    """A patient as one bag: the instances of all slides of the patient, slide after slide.

    Parameters
    ----------
    slides : BagSource
    slides_of : mapping of str to sequence of str
        The slides of each patient.
    """

    def __init__(self, slides: BagSource, slides_of: Mapping[str, Sequence[str]]) -> None:
        self._slides = slides
        self._slides_of = slides_of
        self.spec = slides.spec
        self.ids: Sequence[str] = tuple(slides_of)

    def length(self, bag_id: str) -> int:
        """Return the number of instances of all slides."""
        return sum(self._slides.length(slide) for slide in self._slides_of[bag_id])

    def load(self, bag_id: str, rows: Tensor | None = None) -> Tensor:
        """Return the instances of all slides, or some rows of them."""
        if rows is None:
            return torch.cat([self._slides.load(slide) for slide in self._slides_of[bag_id]])
        bag: Tensor | None = None
        first = 0
        for slide in self._slides_of[bag_id]:
            last = first + self._slides.length(slide)
            here = (rows >= first) & (rows < last)
            if here.any() or bag is None:
                part = self._slides.load(slide, rows[here] - first)
                bag = part.new_empty(len(rows), part.shape[1]) if bag is None else bag
                bag[here] = part
            first = last
        assert bag is not None  # a patient has a slide
        return bag

    def places(self, bag_id: str) -> Tensor | None:
        """Return where the tiles of all slides lie, the slides side by side, or None where one has no coordinates."""
        parts = [self._slides.places(slide) for slide in self._slides_of[bag_id]]
        known = [part for part in parts if part is not None]
        return side_by_side(known) if len(known) == len(parts) else None

    def content_hash(self, bag_id: str) -> str:
        """Return a hash of all instances of all slides, in their order."""
        hashes = [self._slides.content_hash(slide) for slide in self._slides_of[bag_id]]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:DIGITS]

    def slides_of(self, bag_id: str) -> tuple[str, ...]:
        """Return the ids of the patient's slides."""
        return tuple(self._slides_of[bag_id])


@dataclass(frozen=True, eq=False)
class Examples:
    """Bags with their targets.

    Attributes
    ----------
    bags : BagSource
    ids, patient_ids : tuple of str
        One per example.
    targets : (examples, ...) tensor
        As the task encodes them, on the host.
    """

    bags: BagSource
    ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    targets: Tensor

    def __repr__(self) -> str:
        return f"<Examples: {len(self)} bags of {len(set(self.patient_ids))} patients, {self.bags.spec.encoder}>"

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, ids: Iterable[str]) -> Self:
        """Return the examples with these ids, in the order of the ids; `LabelError` for one that is not there."""
        place = {name: number for number, name in enumerate(self.ids)}
        wanted = list(ids)
        unknown = [name for name in wanted if name not in place]
        if unknown:
            raise LabelError(
                f"the splits name slides that have no label or no features: {shown(unknown)}; "
                "use the splits of this label table"
            )
        at = [place[name] for name in wanted]
        patients = tuple(self.patient_ids[i] for i in at)
        return type(self)(self.bags, tuple(wanted), patients, self.targets[at])

    def joined(self, other: Self) -> Self:
        """Return these examples and others of the same bags."""
        targets = torch.cat([self.targets, other.targets])
        return type(self)(self.bags, self.ids + other.ids, self.patient_ids + other.patient_ids, targets)


def make_examples(
    bags: BagSource, table: LabelTable, task: Task, *, missing: Literal["error", "drop"] = "error"
) -> Examples:
    """Join features and labels by slide id.

    Parameters
    ----------
    bags : BagSource
    table : LabelTable
    task : Task
        Reads its columns of the table.
    missing : {"error", "drop"}
        What becomes of a label whose slide has no features.

    Returns
    -------
    Examples
        One per labelled slide that has features.

    Raises
    ------
    LabelError
        If slides have no features and `missing` is ``error``, if none has, or a label is empty or of no meaning.
    """
    available = set(bags.ids)
    absent = [slide for slide in table.slide_ids if slide not in available]
    if absent and (missing == "error" or len(absent) == len(table)):
        raise LabelError(
            f"{len(absent)} of {len(table)} labelled slides have no features: {shown(absent)}; extract them, delete "
            "their rows, or pass --missing drop to leave these slides out"
        )
    used = table.select(available)
    if not task.may_be_incomplete:
        used.require(task.columns)
    return Examples(bags, used.slide_ids, used.patient_ids, task.encode(used.rows()))


def patient_examples(examples: Examples) -> Examples:
    """Return one example per patient from examples of slides.

    Raises
    ------
    LabelError
        If the slides of a patient have different labels.
    """
    slides_of: dict[str, list[str]] = {}
    for slide, patient in zip(examples.ids, examples.patient_ids, strict=True):
        slides_of.setdefault(patient, []).append(slide)
    firsts = examples.subset(slides[0] for slides in slides_of.values())
    for number, (patient, slides) in enumerate(slides_of.items()):
        targets = examples.subset(slides).targets
        # a value that both lack is not a difference
        differs = (targets != firsts.targets[number]) & ~(targets.isnan() & firsts.targets[number].isnan())
        if differs.any():
            raise LabelError(
                f"patient {patient} has slides with different labels ({shown(slides)}); "
                "correct the labels, or pass --level slide"
            )
    patients = tuple(slides_of)
    return Examples(PatientBags(examples.bags, slides_of), patients, patients, firsts.targets)

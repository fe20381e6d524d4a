"""One vector per slide or per patient, from pooled tiles, a trained model or a slide encoder.

The file of a vector is a feature file with one row (`docs/feature-file.md`): every command that reads features reads
vectors, and the same checks keep them apart.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from eosin._batch import Outcome, run_stage
from eosin._files import file_fingerprint
from eosin._fingerprints import DIGITS, fingerprint
from eosin._records import Record, Report
from eosin._spread import whole_folder
from eosin.errors import ConfigError, EosinError, FeatureFileError, FeatureMismatchError, LabelError, UnknownNameError
from eosin.features._bag import FeatureBag, FeatureSpec, vector_name
from eosin.features._encoders import folder_name
from eosin.features._slide_encoders import load_slide_encoder
from eosin.features._store import SUFFIX, find_bags, read_bag, read_footer, read_spec, write_bag
from eosin.mil._bag_embedding import ModelEmbedder
from eosin.mil._patients import by_known_slides

Per = Literal["slide", "patient"]
MEAN = "mean"

logger = logging.getLogger(__name__)


class Embedder(Protocol):
    """What makes one vector of the tiles of a slide, or of all slides of a patient."""

    @property
    def name(self) -> str:
        """Stands for it in files."""

    @property
    def source(self) -> str:
        """Where it comes from."""

    @property
    def weights_hash(self) -> str:
        """Hash of all weights; empty when there are none."""

    def require(self, spec: FeatureSpec, path: Path) -> None:
        """Raise `FeatureMismatchError` for features that it does not read."""

    def vector(self, bags: Sequence[FeatureBag]) -> NDArray[np.float32]:
        """Return (E,) of at least one bag, none of them without tiles."""


@dataclass(frozen=True)
class EmbedderChoice:
    """What makes the vectors, not loaded yet.

    Attributes
    ----------
    encoder : str
        ``mean``, ``max``, ``mean_sd``, or the name of a slide encoder.
    model : Path, optional
        Model folder whose bag embedding is taken instead.
    weights : Path, optional
        Local weights of the slide encoder.
    allow_remote_code : bool
        Whether code of others may run.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    """

    encoder: str = MEAN
    model: Path | None = None
    weights: Path | None = None
    allow_remote_code: bool = False
    device: str = "auto"

    def load(self) -> Embedder:
        """Load it; errors as of `embed_slides`."""
        if self.model is not None:
            return ModelEmbedder.open(self.model, device=self.device)
        return load_slide_encoder(
            self.encoder, weights=self.weights, device=self.device, allow_remote_code=self.allow_remote_code
        )


@dataclass(frozen=True)
class Group:
    """What one vector is made of.

    Attributes
    ----------
    name : str
        Id of the slide or the patient.
    files : tuple of Path
        Feature files of its slides.
    """

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class EmbedStage:
    """The making of vectors as a `eosin._batch.Stage`.

    Attributes
    ----------
    choice : EmbedderChoice
    out : Path
    per : {"slide", "patient"}
    """

    choice: EmbedderChoice
    out: Path
    per: Per = "slide"

    @cached_property
    def embedder(self) -> Embedder:
        """What makes the vectors."""
        return self.choice.load()

    @property
    def name(self) -> str:
        """Name of the stage in the records."""
        return f"embed {self.embedder.name}"

    def key(self, item: Group) -> str:
        """Return the id of a slide or a patient."""
        return item.name

    def output(self, item: Group) -> Path:
        """Return the file of a vector."""
        return self.out / f"{item.name}{SUFFIX}"

    def is_done(self, item: Group) -> bool:
        """Tell whether the file is there and was made from these features by this embedder."""
        try:
            return read_footer(self.output(item)).options_hash == self.options_hash(item)
        except (EosinError, OSError):
            return False

    def options_hash(self, item: Group) -> str:
        """Return 16 hexadecimal digits over all that determines the vector."""
        made_by = self.embedder
        return fingerprint(
            "embed",
            features=[file_fingerprint(path) for path in item.files],
            encoder=[made_by.name, made_by.source, self.per],
            weights=made_by.weights_hash,
        )

    def do(self, item: Group) -> Outcome:
        """Make one vector."""
        bags = [read_bag(path) for path in item.files]
        for path, bag in zip(item.files, bags, strict=True):
            bags[0].spec.require_match(bag.spec, path, expected_by=str(item.files[0]))
            require_tiles(bag.spec, path)
            self.embedder.require(bag.spec, path)
        full = [bag for bag in bags if bag.n_instances]
        if not full:
            return Outcome("empty", "no tiles")
        vector = self.embedder.vector(full)
        if not np.isfinite(vector).all():
            raise FeatureFileError(
                item.files[0], "leads to a vector that is infinite or NaN; extract the slide again", code="not-finite"
            )
        write_bag(self.output(item), self._bag(item, bags[0].spec, vector))
        return Outcome()

    def _bag(self, item: Group, tiles: FeatureSpec, vector: NDArray[np.float32]) -> FeatureBag:
        made_by = self.embedder
        weights = "".join((tiles.weights_hash, made_by.weights_hash))
        joined = hashlib.sha256(weights.encode()).hexdigest()[:DIGITS]
        spec = FeatureSpec(
            encoder=vector_name(made_by.name, tiles.encoder),
            # that of the tiles alone where nothing else has weights, so that it can be looked up
            weights_hash=joined if made_by.weights_hash else tiles.weights_hash,
            dim=len(vector),
            mpp=tiles.mpp,
            patch_size=tiles.patch_size,
        )
        facts = {
            "per": self.per,
            "slides": json.dumps([path.name.removesuffix(SUFFIX) for path in item.files]),
            "slide_encoder": made_by.name,
            "slide_encoder_source": made_by.source,
            "slide_encoder_weights": made_by.weights_hash,
            "tile_encoder": tiles.encoder,
            "tile_encoder_weights": tiles.weights_hash,
            "input_fingerprint": "+".join(file_fingerprint(path) for path in item.files),
            "options_hash": self.options_hash(item),
        }
        return FeatureBag(vector[None], spec, item.name, None, {key: value for key, value in facts.items() if value})


def require_tiles(spec: FeatureSpec, path: Path) -> None:
    """Refuse features that are vectors of slides already.

    Raises
    ------
    FeatureMismatchError
    """
    if spec.is_vector:
        raise FeatureMismatchError(
            path, f"holds a vector of a slide already ({spec.encoder}); pass the folder of the tiles' features"
        )


def embed_slides(
    features: Path | str | Mapping[str, Path],
    out: Path | str | None = None,
    *,
    encoder: str = MEAN,
    model: Path | str | None = None,
    weights: Path | str | None = None,
    per: Per = "slide",
    patient_of: Mapping[str, str] | None = None,
    allow_remote_code: bool = False,
    device: str = "auto",
    progress: Callable[[Record], None] | None = None,
) -> "Embedded":
    """Make one vector per slide or per patient.

    Parameters
    ----------
    features : Path or mapping of str to Path
        Folder of feature files, or the file of each slide.
    out : Path, optional
        Folder of the vectors, ``<id>.h5``; beside the features, ``slide_features_<encoder>``, unless given. Vectors
        that were made from the same features by the same encoder are kept.
    encoder : str
        ``mean``, ``max``, ``mean_sd`` (mean and standard deviation) or a slide encoder of `eosin encoders`.
    model : Path, optional
        Model folder, from train, crossval or convert; its bag embedding is the vector.
    weights : Path, optional
        Local weights of the slide encoder.
    per : {"slide", "patient"}
        A patient's vector is made of the tiles of all slides together, or for encoders that read places is the mean of
        the slides' vectors.
    patient_of : mapping of str to str, optional
        Patient of each slide.
    allow_remote_code : bool
        Whether code that eosin does not contain may run with the rights of the user.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    progress : callable, optional
        Is given each record.

    Returns
    -------
    Embedded
        Folder of the vectors and one record per slide or patient; one without tiles is ``empty`` and has no file.

    Raises
    ------
    ConfigError
        If options contradict each other, foreign code is needed and not allowed, or weights cannot be had.
    FeatureMismatchError
        If no file is of the kind that the encoder or the model reads.
    CheckpointError
        If weights or model cannot be used.
    LabelError
        If vectors of patients are asked for, and none of the slides has a patient.
    """
    if per not in get_args(Per):
        raise UnknownNameError("value for --per", per, get_args(Per))
    if model is not None and (encoder != MEAN or weights is not None):
        raise ConfigError("--model brings its own weights; remove --encoder and --weights")
    files = dict(features) if isinstance(features, Mapping) else find_bags(Path(features))
    groups = _groups(files, per, patient_of)
    local, folder_of_model = (None if one is None else Path(one) for one in (weights, model))
    choice = EmbedderChoice(encoder, folder_of_model, local, allow_remote_code, device)
    embedder = choice.load()
    _require_some(embedder, files)
    folder = Path(out) if out is not None else _folder(next(iter(files.values())), embedder, per)
    _require_own(folder, embedder)
    stage = EmbedStage(choice, folder, per)
    vars(stage)["embedder"] = embedder  # it is loaded already; a worker of a cluster loads its own
    return Embedded(folder, run_stage(stage, groups, run_json=folder / "run.json", progress=progress))


@dataclass(frozen=True)
class Embedded:
    """What `embed_slides` made.

    Attributes
    ----------
    folder : Path
        Where the vectors are.
    report : Report
        What became of each slide or patient.
    """

    folder: Path
    report: Report


def _groups(files: Mapping[str, Path], per: Per, patient_of: Mapping[str, str] | None) -> list[Group]:
    if per == "slide":
        return [Group(name, (path,)) for name, path in files.items()]
    if patient_of is None:
        raise ConfigError("vectors of patients need to know who has which slide; pass --patients TABLE")
    known = by_known_slides(patient_of, files)
    slides_of: dict[str, list[Path]] = {}
    for slide, path in files.items():
        if slide in known:
            slides_of.setdefault(known[slide], []).append(path)
    if not slides_of:
        raise LabelError(f"none of the {len(known)} slides in the table of patients has features here")
    lost = [slide for slide in files if slide not in known]
    if lost:
        logger.warning("the table of patients does not list %d slides, which are left out: %s", len(lost), lost[0])
    unsafe = [patient for patient in slides_of if Path(patient).name != patient or patient.startswith(".")]
    if unsafe:
        raise LabelError(f"patient {unsafe[0]!r} cannot be the name of a file; rename it in the table of patients")
    return [Group(patient, tuple(paths)) for patient, paths in slides_of.items()]


def _require_some(embedder: Embedder, files: Mapping[str, Path]) -> None:
    """Refuse a folder in which no file can be used, before any work; single files are records."""
    first: EosinError | None = None
    for path in files.values():
        try:
            spec = read_spec(path)
            require_tiles(spec, path)
            embedder.require(spec, path)
        except FeatureMismatchError as error:
            first = first or error
        except EosinError:
            continue
        else:
            return
    if first is not None:
        raise first


def _folder(file: Path, embedder: Embedder, per: Per) -> Path:
    return whole_folder(file).parent / f"{per}_features_{folder_name(embedder.name)}"


def _require_own(folder: Path, embedder: Embedder) -> None:
    """Refuse a folder that holds files of another kind: all of a folder are read together."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            spec = read_spec(path)
        except EosinError:
            continue
        if spec.encoder.partition("(")[0] != embedder.name:
            raise ConfigError(f"{folder}: has files of {spec.encoder} already; pass another --out")
        return

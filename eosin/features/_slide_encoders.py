"""The registry of slide encoders: what makes one vector of a slide's tiles, and of which tiles.

A plug-in adds a row to `SLIDE_ENCODERS`. Facts of the rows come from the model cards and from the authors' code.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eosin._devices import choose_device
from eosin.errors import CheckpointError, ConfigError, FeatureFileError, FeatureMismatchError, UnknownNameError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._encoders import OWN_WEIGHTS, RANDOM
from eosin.features._hub import download_weights
from eosin.features._slide_networks import Chief, Cobra, Madeleine, SlideNetwork
from eosin.features._slide_packages import load_gigapath, load_moozy, load_prism, load_prism2, load_titan
from eosin.features._weights import find_weights, hash_state, load_strictly, read_state
from eosin.plugins import load_plugins

MPP_TOLERANCE = 0.1

Vector = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideEncoderSpec:
    """One row of the registry.

    Parameters
    ----------
    name : str
        What `eosin embed --encoder` takes and files of vectors store.
    dim : int or None
        Width E of the vector; None for that of the tiles' features.
    tile_encoders : tuple of str
        Encoders whose features it reads.
    mpp, tile_px : float, int or None
        Resolution and side of the tiles that it was trained on; None takes any.
    source : str
        Hugging Face repository, or the address to get the weights at.
    licence : str
        As stated by the authors.
    network : type, optional
        A `SlideNetwork` of eosin, or of a plug-in, whose weights are a file.
    load : callable, optional
        Loads an encoder by code that eosin does not contain, from a place (repository, folder or file) and a revision;
        only called when the user has agreed.
    revision, file : str
        Commit of the repository and name of the file there.
    gated : bool
        Whether access must be asked for.
    reads_places : bool
        Whether it needs the coordinates of the tiles. The vector of a patient is then the mean over the slides; other
        encoders read all tiles of a patient as one bag.
    note : str
        What else a user should know.
    """

    name: str
    dim: int | None
    tile_encoders: tuple[str, ...]
    source: str
    licence: str
    mpp: float | None = 0.5
    tile_px: int | None = 256
    network: type[SlideNetwork] | None = None
    load: Callable[[str, str], SlideNetwork] | None = None
    revision: str = ""
    file: str = ""
    gated: bool = False
    reads_places: bool = False
    note: str = ""

    @property
    def runs_foreign_code(self) -> bool:
        """Whether the user has to agree before it is loaded."""
        return self.load is not None

    def require(self, spec: FeatureSpec, path: Path) -> None:
        """Refuse features that this encoder does not read.

        Raises
        ------
        FeatureMismatchError
            When tile encoder, mpp (by more than 10 %) or tile size differ; what nobody knows is not compared.
        """
        found = spec.encoder.removesuffix(RANDOM) if self.name.endswith(RANDOM) else spec.encoder
        faults = (
            [] if found in self.tile_encoders else [f"encoder {spec.encoder}, not {' or '.join(self.tile_encoders)}"]
        )
        if self.mpp and spec.mpp and abs(spec.mpp / self.mpp - 1) > MPP_TOLERANCE:
            faults.append(f"mpp {spec.mpp:g}, not {self.mpp:g}")
        if self.tile_px and spec.patch_size and spec.patch_size != self.tile_px:
            faults.append(f"patch size {spec.patch_size}, not {self.tile_px}")
        if faults:
            settings = f" --mpp {self.mpp:g} --patch-size {self.tile_px}" if self.mpp and self.tile_px else ""
            raise FeatureMismatchError(
                path,
                f"the features differ from what slide encoder {self.name} reads: {'; '.join(faults)}; extract them "
                f"with --encoder {self.tile_encoders[0]}{settings}",
            )


_NC_ND = "CC-BY-NC-ND-4.0"
_ROWS: Sequence[SlideEncoderSpec] = (
    SlideEncoderSpec("titan", 768, ("conch_v15",), "MahmoodLab/TITAN", _NC_ND, tile_px=512, load=load_titan,
                     gated=True, reads_places=True),
    SlideEncoderSpec("prism", 1280, ("virchow",), "paige-ai/Prism", _NC_ND, tile_px=224, load=load_prism, gated=True),
    SlideEncoderSpec("prism2", 2560, ("virchow2_cls",), "paige-ai/Prism2", _NC_ND, tile_px=224, load=load_prism2,
                     gated=True, revision="450352d0ddc6b42b21ce20794ce0fbefe6b5a47a",
                     note="the base embedding; needs flash-attn"),
    SlideEncoderSpec("gigapath_slide", 768, ("gigapath",), "prov-gigapath/prov-gigapath", "Apache-2.0 with conditions",
                     load=load_gigapath, gated=True, reads_places=True,
                     note="the last layer; needs the authors' package, flash-attn and a GPU"),
    SlideEncoderSpec("chief", 768, ("chief-ctranspath", "ctranspath"), "https://github.com/hms-dbmi/CHIEF", "AGPL-3.0",
                     mpp=1.0, network=Chief, note="weights are a download of the authors: CHIEF_pretraining.pth"),
    SlideEncoderSpec("madeleine", 512, ("conch_v1",), "MahmoodLab/madeleine", _NC_ND, mpp=1.0, network=Madeleine,
                     file="model.pt", gated=True, note="the branch of H&E, trained on breast"),
    SlideEncoderSpec("cobra", None, ("uni_v1", "conch_v1", "virchow2_cls", "hoptimus0"), "KatherLab/COBRA", "GPL-3.0",
                     tile_px=224, network=Cobra, file="cobraII.pth.tar", gated=True,
                     note="COBRA II; the vector is as wide as the tiles' features"),
    SlideEncoderSpec("moozy", 768, ("lunit_vits8",), "AtlasAnalyticsLab/MOOZY", "CC-BY-NC-SA-4.0", tile_px=224,
                     load=load_moozy, reads_places=True,
                     note="needs the package moozy; a patient's slides are read together"),
)  # fmt: skip

SLIDE_ENCODERS: dict[str, SlideEncoderSpec] = {row.name: row for row in _ROWS}
"""Every slide encoder by name; a plug-in adds its own row."""


def find_slide_encoder(name: str) -> SlideEncoderSpec:
    """Return the row of a slide encoder; with the ending ``?random`` one of eosin's own keeps its random weights.

    Raises
    ------
    UnknownNameError
        Suggesting the nearest names.
    """
    load_plugins()
    spec = SLIDE_ENCODERS.get(name.removesuffix(RANDOM))
    if spec is None:
        raise UnknownNameError("slide encoder", name, [*POOLINGS, *SLIDE_ENCODERS])
    return replace(spec, name=name, source="random weights") if name.endswith(RANDOM) else spec


def _mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows.mean(0))


def _max(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows.max(0))


def _mean_sd(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([rows.mean(0), rows.std(0)])


POOLINGS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": _mean,
    "max": _max,
    "mean_sd": _mean_sd,
}
"""What needs no weights, by name: of all tiles in float64."""


@dataclass(frozen=True)
class Pooling:
    """A vector from the tiles' features alone.

    Attributes
    ----------
    name : str
        A key of `POOLINGS`.
    """

    name: str
    weights_hash: str = ""
    source: str = "eosin"

    def require(self, spec: FeatureSpec, path: Path) -> None:
        """Accept every kind of features."""

    def vector(self, bags: Sequence[FeatureBag]) -> Vector:
        """Return the vector of all tiles of some slides."""
        rows = np.concatenate([np.asarray(bag.features, np.float64) for bag in bags])
        return POOLINGS[self.name](rows).astype(np.float32)


@dataclass(frozen=True, eq=False)
class SlideEncoder:
    """A slide encoder that is ready: weights loaded, on its device.

    Attributes
    ----------
    spec : SlideEncoderSpec
    network : SlideNetwork
    weights_hash : str
    device : torch.device
    """

    spec: SlideEncoderSpec
    network: SlideNetwork
    weights_hash: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.spec.name

    @property
    def source(self) -> str:
        """Where the weights are from."""
        return self.spec.source

    def require(self, spec: FeatureSpec, path: Path) -> None:
        """Refuse features that this encoder does not read; errors as of `SlideEncoderSpec.require`."""
        self.spec.require(spec, path)

    @torch.inference_mode()
    def vector(self, bags: Sequence[FeatureBag]) -> Vector:
        """Return the vector of one slide, or of all slides of a patient.

        Raises
        ------
        FeatureFileError
            When it needs coordinates that the features do not have.
        """
        if not self.spec.reads_places:
            return self._ask(np.concatenate([np.asarray(bag.features, np.float32) for bag in bags]))
        case = getattr(self.network, "case", None)
        if case is not None:
            return np.asarray(case([self._placed(bag) for bag in bags]).cpu().numpy(), np.float32)
        vectors = np.stack([self.network(*self._placed(bag)).float().cpu().numpy() for bag in bags])
        return np.asarray(vectors.mean(0, dtype=np.float64), np.float32)

    def _ask(self, rows: NDArray[np.float32]) -> Vector:
        vector = self.network(torch.from_numpy(rows).to(self.device))
        return np.asarray(vector.float().cpu().numpy())

    def _placed(self, bag: FeatureBag) -> tuple[torch.Tensor, torch.Tensor, int]:
        if bag.grid is None:
            raise FeatureFileError(
                Path(bag.slide_id),
                f"has no tile coordinates, which slide encoder {self.name} reads; import it with them",
                code="no-places",
            )
        rows = torch.from_numpy(np.array(bag.features, np.float32)).to(self.device)  # a copy: a map is read-only
        return rows, torch.from_numpy(bag.grid.origins_px0), bag.grid.tile_px0


def load_slide_encoder(
    name: str, *, weights: Path | None = None, device: str = "auto", allow_remote_code: bool = False
) -> Pooling | SlideEncoder:
    """Load what makes vectors of slides.

    Parameters
    ----------
    name : str
        ``mean``, ``max``, ``mean_sd`` or a row of `SLIDE_ENCODERS`; with the ending ``?random`` an encoder of eosin's
        own keeps its random weights, the same in every run.
    weights : Path, optional
        Local file or folder of weights.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    allow_remote_code : bool
        Whether code of others may run with the rights of the user.

    Raises
    ------
    UnknownNameError
        When the encoder is unknown.
    ConfigError
        When foreign code is needed and not allowed, options contradict each other, or weights cannot be had.
    CheckpointError
        When the weights are damaged, unsafe or of another network.
    """
    if name in POOLINGS:
        if weights is not None:
            raise ConfigError(f"{name} has no weights to load; remove --weights")
        return Pooling(name)
    spec, place = find_slide_encoder(name), choose_device(device)
    network = _foreign(spec, weights, allowed=allow_remote_code) if spec.load else _own(spec, weights)
    network = network.to(place).eval().requires_grad_(False)
    return SlideEncoder(spec, network, hash_state(network.state_dict()), place)


def _foreign(spec: SlideEncoderSpec, weights: Path | None, *, allowed: bool) -> SlideNetwork:
    assert spec.load is not None
    if spec.name.endswith(RANDOM):
        raise ConfigError(f"{spec.name}: its architecture is not part of eosin; remove {RANDOM}")
    if not allowed:
        raise ConfigError(
            f"slide encoder {spec.name} runs code of {spec.source}, which eosin does not contain and has not checked; "
            "read it, then pass --allow-remote-code to run it with your rights",
            code="remote-code",
        )
    return spec.load(spec.source if weights is None else str(weights), spec.revision)


def _own(spec: SlideEncoderSpec, weights: Path | None) -> SlideNetwork:
    assert spec.network is not None
    if spec.name.endswith(RANDOM):
        if weights is not None:
            raise ConfigError(f"slide encoder {spec.name} has no weights to load; remove --weights")
        return _built(lambda: spec.network())  # type: ignore[misc]
    path = find_weights(weights or _download(spec), spec.file, source=spec.source)
    state = spec.network.adapt(read_state(path))
    try:
        network = _built(lambda: spec.network.of_state(state))  # type: ignore[union-attr]
    except (KeyError, ValueError, ZeroDivisionError, AttributeError, RuntimeError) as error:
        raise CheckpointError(path, f"does not fit slide encoder {spec.name} ({error})") from error
    load_strictly(network, state, path)
    return network


def _built(build: Callable[[], SlideNetwork]) -> SlideNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()


def _download(spec: SlideEncoderSpec) -> Path:
    if spec.source.startswith(OWN_WEIGHTS):
        raise ConfigError(
            f"the weights of slide encoder {spec.name} are not on the Hugging Face hub; download them from "
            f"{spec.source} and pass --weights FILE",
            code="weights",
        )
    return download_weights(spec.source, revision=spec.revision, file=spec.file, gated=spec.gated)

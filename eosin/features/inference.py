"""An encoder that is ready to encode: weights loaded and checked, on its device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eosin.errors import CheckpointError, ConfigError
from eosin.features import he_texture
from eosin.features.encoders import OWN_WEIGHTS, RANDOM, EncoderSpec, Precision, find_encoder
from eosin.features.hub import download_weights
from eosin.features.networks import EncoderNetwork
from eosin.features.weights import find_weights, hash_state, load_strictly, read_state, revision_of

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
        self.precision = precision
        self.device = torch.device(device)
        self._network = None if network is None else network.to(self.device).eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.spec.dim

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


def load_encoder(
    name: str,
    *,
    weights: Path | None = None,
    precision: Precision = "fp32",
    device: str = "cpu",
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

    Raises
    ------
    UnknownNameError
        When there is no such encoder.
    ConfigError
        When the options contradict each other, or the weights can be had neither locally nor from the hub.
    CheckpointError
        When a file of weights is damaged, unsafe or of another network.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r}: choose one of {', '.join(get_args(Precision))}")
    spec = find_encoder(name)
    if weights is not None and (spec.build is None or name.endswith(RANDOM)):
        raise ConfigError(f"encoder {spec.name} uses no weights from files; leave out --weights")
    if spec.build is None:
        return Encoder(spec, _descriptor_hash(), None)
    network, path = _random_network(spec), None
    if not name.endswith(RANDOM):
        path = find_weights(weights or _fetch_weights(spec), spec.file, source=spec.source)
        _load_weights(network, spec, path)
    return Encoder(
        spec,
        hash_state(network.state_dict()),
        network,
        revision=revision_of(path) if path else "",
        precision=precision,
        device=device,
    )


def _fetch_weights(spec: EncoderSpec) -> Path:
    if spec.source.startswith(OWN_WEIGHTS):
        raise ConfigError(
            f"the weights of {spec.name} are not on the hub; get them at {spec.source} and pass --weights FILE",
            code="weights",
        )
    return download_weights(spec.source, revision=spec.revision, file=spec.file, gated=spec.gated)


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

"""A slide's features with what they mean: encoder, resolution, places."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eosin.errors import FeatureMismatchError
from eosin.options import Options
from eosin.wsi._grid import TileGrid

MPP_TOLERANCE = 0.01


def vector_name(source: str, tile_encoder: str) -> str:
    """Return what stands for the encoder of vectors of slides: ``mean(uni_v1)``."""
    return f"{source}({tile_encoder})"


class FeatureSpec(Options):
    """What a model and the features it is given must agree on.

    Parameters
    ----------
    encoder : str
        Registered encoder name, ``timm:<model>``, or ``npz:<set>`` for data that never were tiles; of one vector per
        slide what made it and of which tiles, ``mean(uni_v1)``.
    weights_hash : str
        First 16 hexadecimal digits of the SHA-256 of the encoder's weights; empty when nobody knows them.
    dim : int
        Feature width D.
    mpp : float, optional
        µm per pixel of the tiles that were encoded; None when features do not come from tiles.
    patch_size : int, optional
        Side of those tiles in pixels.
    """

    encoder: str
    weights_hash: str = ""
    dim: int = Field(gt=0)
    mpp: float | None = Field(default=None, gt=0)
    patch_size: int | None = Field(default=None, gt=0)

    @property
    def is_vector(self) -> bool:
        """Whether a file holds one vector of a slide or a patient."""
        return self.encoder.endswith(")")

    def require_match(self, other: "FeatureSpec", path: Path, *, expected_by: str = "the model") -> None:
        """Refuse features that were made differently.

        Parameters
        ----------
        other : FeatureSpec
            What `path` holds.
        path : Path
            Named in the message.
        expected_by : str
            Who expects this specification, for the message.

        Raises
        ------
        FeatureMismatchError
            When encoder, weights, width, tile size or mpp (by more than 1 %) differ. An unknown weight hash on either
            side matches every hash.
        """
        faults = [
            f"{name} {_show(found)}, not {_show(wanted)}"
            for name, wanted, found, same in self._compared(other)
            if not same
        ]
        if faults:
            raise FeatureMismatchError(
                path,
                f"the features differ from what {expected_by} expects: {'; '.join(faults)}; {self._remedy()}, or use a "
                "model trained on features like these",
            )

    def _compared(self, other: "FeatureSpec") -> list[tuple[str, object, object, bool]]:
        hashes_agree = not self.weights_hash or not other.weights_hash or self.weights_hash == other.weights_hash
        return [
            ("encoder", self.encoder, other.encoder, self.encoder == other.encoder),
            ("weights", self.weights_hash, other.weights_hash, hashes_agree),
            ("width", self.dim, other.dim, self.dim == other.dim),
            ("mpp", self.mpp, other.mpp, _same_mpp(self.mpp, other.mpp)),
            ("patch size", self.patch_size, other.patch_size, self.patch_size == other.patch_size),
        ]

    def _remedy(self) -> str:
        if not self.is_vector:
            return f"extract them again with --encoder {self.encoder}{self._settings()}"
        source, _, tiles = self.encoder.removesuffix(")").partition("(")
        return f"run `eosin embed --encoder {source}` on features of {tiles}{self._settings()}"

    def _settings(self) -> str:
        mpp = "" if self.mpp is None else f" --mpp {self.mpp:g}"
        return mpp if self.patch_size is None else f"{mpp} --patch-size {self.patch_size}"


def _same_mpp(wanted: float | None, found: float | None) -> bool:
    if wanted is None or found is None:
        return wanted is found
    return abs(found - wanted) <= MPP_TOLERANCE * wanted


def _show(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class FeatureBag:
    """The features of one slide.

    Parameters
    ----------
    features : (n, D) float16 or float32
        One row per tile, in the order of `grid`; read-only and memory-mapped when it comes from a file.
    spec : FeatureSpec
        How the features were made.
    slide_id : str
        The slide's name.
    grid : TileGrid, optional
        Where the tiles lie; None for features without tile coordinates.
    provenance : mapping of str to str
        Free facts about the origin (slide fingerprint, options hash, transform, source revision, device ...).

    Raises
    ------
    ValueError
        When shapes, types and the specification contradict each other. Values are checked where bags are made and
        written (`eosin.features._store.write_bag`), not on every opening of a memory map.
    """

    features: NDArray[np.float16] | NDArray[np.float32]
    spec: FeatureSpec
    slide_id: str
    grid: TileGrid | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype not in (np.float16, np.float32):
            raise ValueError(
                f"features of {self.slide_id} must be (n, D) of float16 or float32; "
                f"found {self.features.shape} of {self.features.dtype}"
            )
        if self.features.shape[1] != self.spec.dim:
            raise ValueError(
                f"features of {self.slide_id} are {self.features.shape[1]} wide; the specification says {self.spec.dim}"
            )
        if self.grid is not None and self.grid.n_tiles != len(self.features):
            raise ValueError(f"{self.slide_id} has {len(self.features)} rows of features for {self.grid.n_tiles} tiles")

    def __repr__(self) -> str:
        rows, width = self.features.shape
        return f"<FeatureBag {self.slide_id}: {rows} x {width} {self.features.dtype}, {self.spec.encoder}>"

    @property
    def n_instances(self) -> int:
        """Number of tiles n."""
        return len(self.features)

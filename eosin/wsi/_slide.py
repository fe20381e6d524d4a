"""What a slide is to the rest of the package: pixels at any resolution, whichever reader delivers them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._pixels import WHITE, read_scaled
from eosin.wsi._resolution import Resolution, resolve_mpp
from eosin.wsi.inventory import ONLY_IMAGE, Picture

Fact = str | int | float | list[int] | list[float] | None


class Slide(ABC):
    """One open slide. Callers speak level-0 pixels and µm per pixel; levels stay hidden.

    A context manager; opened where it is used and never pickled.

    Parameters
    ----------
    path : Path
        The file.
    picture : Picture
        Which of its pictures this is; gives sizes and what the file says of the resolution.
    reader : str
        Name of the reader, shown to a person.
    mpp : float, optional
        The user's µm per level-0 pixel.

    Attributes
    ----------
    size_px0 : tuple of int
        Width and height in level-0 pixels.
    bounds_px0 : tuple of int or None
        x, y, width, height of the scanned part when the file states it; QuPath's origin is its corner.
    image : str
        Which scene and focal plane of the file this is: ``scene 1, plane 1``.
    icc_profile : bytes or None
        The colour profile that the file states for its pixels; applied only by `eosin.wsi._colour.in_srgb`.
    level_sizes, downsamples, offsets_px0 : list
        Of each stored level: width and height, level-0 pixels per pixel, and where its corner lies (level-0 pixels).
    declared : list of bool
        For each level whether the file calls it a copy of the finest one.
    residual_px0 : float or None
        How far levels are from where they were taken to be, level-0 pixels; None where nothing was compared.
    notes : list of str
        Sentences for the slide's record: what was found odd and how it was decided.
    """

    bounds_px0: tuple[int, int, int, int] | None = None
    image: str = ONLY_IMAGE
    icc_profile: bytes | None = None
    residual_px0: float | None = None
    background: tuple[int, int, int] = WHITE

    def __init__(self, path: Path, picture: Picture, *, reader: str, mpp: float | None = None) -> None:
        self.path = path
        self.picture = picture
        self.reader = reader
        self.level_sizes = list(picture.sizes_px)
        self.size_px0: tuple[int, int] = self.level_sizes[0]
        self.downsamples = list(picture.downsamples())
        self.offsets_px0 = [(0.0, 0.0)] * len(self.level_sizes)
        self.declared = [True] * len(self.level_sizes)
        # decided once, and asked for only by who needs it: a slide without mpp can still be looked at
        self.resolution: Resolution = resolve_mpp(picture.stated, power=picture.power, user_mpp=mpp)
        self.notes: list[str] = [note for note in (self.resolution.note,) if note]

    def __repr__(self) -> str:
        width, height = self.size_px0
        resolution = "no" if self.resolution.mpp is None else f"{self.resolution.mpp:.4g}"
        return f"<Slide {self.path.name}: {width} x {height} px, {resolution} µm/px, {self.reader}>"

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel.

        Raises
        ------
        MissingResolutionError
            Code ``no-mpp`` or ``bad-mpp``.
        """
        return self.resolution.require(self.path)

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from: ``user``, ``openslide.mpp-x``, ``tiff-resolution``, ... or ``none``."""
        return self.resolution.source

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return pixels at any resolution.

        Parameters
        ----------
        origin_px0 : tuple of int
            Top-left corner x, y in level-0 pixels.
        size_px : tuple of int
            Width and height of the result.
        mpp : float
            µm per pixel of the result.

        Returns
        -------
        (h, w, 3) uint8
            RGB; what is outside the slide, missing or transparent has the background's colour.

        Raises
        ------
        CorruptSlideError
            If stored pixels cannot be decoded.
        """
        return read_scaled(
            self.read_level, self.downsamples, origin_px0, size_px, mpp / self.mpp, offsets_px0=self.offsets_px0
        )

    @abstractmethod
    def read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one stored level, in that level's pixels; background outside."""

    def can_shrink(self, level: int, factor: int) -> bool:
        """Return whether the decoder delivers a level at a part of its size, which costs less than averaging."""
        del level
        return factor == 1

    def read_shrunk(self, level: int, corner: tuple[int, int], size: tuple[int, int], factor: int) -> NDArray[np.uint8]:
        """Return pixels of a stored level at a part of its size, in pixels of the result; see `can_shrink`."""
        del factor
        return self.read_level(level, corner, size)

    def keep_levels(self, levels: Sequence[int]) -> None:
        """Forget all stored levels but these, which include the finest."""
        self.level_sizes = [self.level_sizes[level] for level in levels]
        self.downsamples = [self.downsamples[level] for level in levels]
        self.offsets_px0 = [self.offsets_px0[level] for level in levels]
        self.declared = [self.declared[level] for level in levels]

    def other_image(self, image: str) -> str:
        """Return a sentence that names both images if `image`, of tiles or features, is not this one; else nothing.

        Files of eosin 0.1 and of other tools do not say which image they are of; they pass.
        """
        if not image or image == self.image:
            return ""
        options = f"--{image.replace(', ', ' --')}"
        return f"{image} of the file, but {self.image} was opened; pass {options}"

    def facts(self) -> dict[str, Fact]:
        """Return what may be shown about the file: never label, name, date or other raw properties."""
        return {
            "reader": self.reader,
            "vendor": self.picture.vendor or None,
            "width_px0": self.size_px0[0],
            "height_px0": self.size_px0[1],
            "level_downsamples": [round(value, 4) for value in self.downsamples],
            "level_residual_px0": None if self.residual_px0 is None else round(self.residual_px0, 2),
            "mpp": self.resolution.mpp,
            "mpp_source": self.resolution.source,
            "mpp_note": self.resolution.note or self.resolution.refusal,
            "objective_power": self.picture.power,
            "colours": self.picture.colour or None,
            "icc_profile": "none" if self.icc_profile is None else f"{len(self.icc_profile)} bytes",
        }

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        """Return the slide."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the slide."""
        self.close()

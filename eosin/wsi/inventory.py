"""What a file holds: its pictures, and which of them is the slide."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eosin.errors import SlideError, SlideOpenError
from eosin.wsi._resolution import StatedMpp

__all__ = ["Kind", "Picture"]

Kind = Literal["slide", "label", "macro", "thumbnail", "other"]
ONLY_IMAGE = "scene 1, plane 1"
"""`image_name` of files that hold nothing to choose from."""
MACRO_WORDS = ("macro", "overview")
ROUNDING_PX = 1.0
CONVERT = "convert it with `vips tiffsave {name} out.tif --tile --pyramid --compression jpeg --bigtiff`"
"""What to do about a slide that nothing can read piece by piece; ``{name}`` is its file name."""


@dataclass(frozen=True)
class Picture:
    """One picture of a file.

    Parameters
    ----------
    kind : str
        ``slide`` (a scene, or the only one), ``label``, ``macro``, ``thumbnail``, or ``other``.
    sizes_px : tuple
        Width and height of its levels, finest first.
    stated : tuple of StatedMpp
        What the file says of its resolution, best source first.
    power : float or None
        Objective power.
    colour : str
        How its pixels are stored, for a person: ``8-bit RGB, JPEG``.
    vendor : str
        Scanner or format.
    planes : int
        Focal planes.
    scales : tuple of float
        Level-0 pixels per pixel of each level, where the file states it; empty otherwise.
    fault : str
        Why its pixels cannot be read; empty when they can.
    code : str
        Reason code of the fault.
    """

    kind: Kind
    sizes_px: tuple[tuple[int, int], ...]
    stated: tuple[StatedMpp, ...] = ()
    power: float | None = None
    colour: str = ""
    vendor: str = ""
    planes: int = 1
    scales: tuple[float, ...] = ()
    fault: str = ""
    code: str = "unsupported-pixels"

    @property
    def area(self) -> int:
        """Pixels of the finest level."""
        return self.sizes_px[0][0] * self.sizes_px[0][1]

    def downsamples(self) -> Iterator[float]:
        """Yield level-0 pixels per pixel of each level: as stated, else from the sizes."""
        for number, size in enumerate(self.sizes_px):
            yield self.scales[number] if self.scales else size_ratio(self.sizes_px[0], size)


def size_ratio(finest: tuple[int, int], size: tuple[int, int]) -> float:
    """Return level-0 pixels per pixel of a level from its size.

    Scanners average whole blocks and cut off what is left over, so a whole ratio that explains both sides to the pixel
    is the true one, and the mean of the sides' own ratios would be off by up to a pixel at the far edge.
    """
    across, down = (above / below for above, below in zip(finest, size, strict=True))
    mean = (across + down) / 2
    for whole in (2 ** round(math.log2(mean)), round(mean)):  # of a small level several whole ratios explain the sides
        if whole and all(abs(above / whole - below) < ROUNDING_PX for above, below in zip(finest, size, strict=True)):
            return float(whole)
    return mean


def kind_of(name: str, default: Kind = "slide") -> Kind:
    """Return what the name that a writer gave a picture says of it; the name itself may be a person's."""
    words = name.lower()  # Bio-Formats, QuPath and scanners write "label image", "Macro", "overview"
    if "label" in words:
        return "label"
    if "thumbnail" in words:
        return "thumbnail"
    return "macro" if any(word in words for word in MACRO_WORDS) else default


def scenes(pictures: Sequence[Picture]) -> list[Picture]:
    """Return the pictures that are slides, in the file's order: scene 1 is the first."""
    return [picture for picture in pictures if picture.kind == "slide"]


def choose_picture(pictures: Sequence[Picture], path: Path, *, scene: int | None = None) -> Picture:
    """Return the picture that is the slide.

    Never a label, macro or thumbnail; of several scenes the one that was asked for, else the largest that can be read.

    Parameters
    ----------
    pictures : sequence of Picture
        All of the file.
    path : Path
        Named in errors.
    scene : int, optional
        Counted from 1.

    Raises
    ------
    SlideOpenError
        Code ``no-slide`` if there is none, or the first one's own code if none can be read.
    SlideError
        Code ``no-scene`` if there is no such scene.
    """
    found = scenes(pictures)
    if not found:
        held = ", ".join(sorted({picture.kind for picture in pictures})) or "nothing"
        raise SlideOpenError(path, f"the file has no slide image, only: {held}", code="no-slide")
    if scene is not None and not 1 <= scene <= len(found):
        raise SlideError(path, f"there is no scene {scene}; the file has {len(found)}", code="no-scene")
    chosen = found[scene - 1] if scene else max(found, key=lambda picture: (not picture.fault, picture.area))
    if chosen.fault:
        raise SlideOpenError(path, chosen.fault.replace("{name}", path.name), code=chosen.code)
    return chosen


def choose_plane(picture: Picture, path: Path, plane: int | None) -> int:
    """Return the number of the focal plane, counted from 0: what was asked for, else the middle one.

    Raises
    ------
    SlideError
        Code ``no-plane`` if there is no such plane.
    """
    if plane is None:
        return (picture.planes - 1) // 2
    if not 1 <= plane <= picture.planes:
        raise SlideError(path, f"there is no focal plane {plane}; the slide has {picture.planes}", code="no-plane")
    return plane - 1


def image_name(pictures: Sequence[Picture], chosen: Picture, plane: int) -> str:
    """Return which image of the file was chosen, as coordinates and features keep it: ``scene 2, plane 1``."""
    number = next(index for index, picture in enumerate(scenes(pictures), 1) if picture is chosen)
    return f"scene {number}, plane {plane + 1}"


def choices(pictures: Sequence[Picture], chosen: Picture, plane: int) -> list[str]:
    """Return sentences that name what was not taken: other scenes and planes."""
    found, notes = scenes(pictures), []
    if len(found) > 1:
        scene, _, _ = image_name(pictures, chosen, plane).partition(",")
        notes.append(f"{scene} of {len(found)} was read; --scene chooses another")
    if chosen.planes > 1:
        notes.append(f"focal plane {plane + 1} of {chosen.planes} was read; --plane chooses another")
    return notes


def listed(pictures: Sequence[Picture]) -> list[dict[str, object]]:
    """Return what may be shown of the pictures of a file, one row each: never names or dates."""
    return [_row(picture, pictures) for picture in pictures]


def _row(picture: Picture, pictures: Sequence[Picture]) -> dict[str, object]:
    row: dict[str, object] = {"kind": picture.kind}
    if picture.kind == "slide":
        row["scene"] = 1 + next(number for number, one in enumerate(scenes(pictures)) if one is picture)
    row["size_px"] = " x ".join(map(str, picture.sizes_px[0]))
    row["levels"] = [round(scale, 3) for scale in picture.downsamples()]
    if picture.planes > 1:
        row["planes"] = picture.planes
    if picture.stated:
        row["mpp"] = round((picture.stated[0].x + picture.stated[0].y) / 2, 6)
        row["mpp_source"] = picture.stated[0].source
    if picture.colour:
        row["colours"] = picture.colour
    if picture.fault:
        row["not_read"] = picture.fault
    return row

"""Synthetic H&E slides with known tumour: pyramidal TIFFs that OpenSlide opens, and the exact mask of what was planted.

The tissue comes from `histology` as amounts of haematoxylin and eosin. Here they turn into light by Beer and Lambert's
law with the stain vectors of the slide; uneven light, dust and pen are added, and the pyramid is written.

Colours, sizes, resolutions and pen marks are drawn once for each pair of a tumour and a normal slide, so they cannot
tell the label.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from scipy import ndimage
from shapely.geometry import mapping

from eosin._batch import Outcome, run_batch
from eosin._files import write_file, write_json, write_text
from eosin._records import Record, Report
from eosin._tables import csv_text
from eosin.options import Options
from eosin.wsi._histology import FULL_DENSITY, LAYOUT_MPP, Layout, lay_out, paint
from eosin.wsi._outline import trace_outline
from eosin.wsi._picture import write_picture

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Colour = tuple[float, float, float]

TRUTH_MPP = 2.0
"""µm per pixel of the truth masks."""

HAEMATOXYLIN = (0.5626, 0.7201, 0.4062)  # optical density of R, G, B per unit of stain (Macenko et al., ISBI 2009)
EOSIN = (0.2159, 0.8012, 0.5581)
PENS = ((40, 80, 190), (30, 130, 90), (45, 45, 55), (200, 50, 70))
TILE_PX = 256
STRIP_PX = 512
JPEG_QUALITY = 85


class Cohort(Options):
    """Size, content and seed of a synthetic cohort; half of the patients have tumour.

    With `striking`, every slide holds blood, necrosis and sheets of harmless cells, too, so that tumour is not what
    stands out most, and a model with random weights does not find it.
    """

    n_slides: int = Field(default=40, ge=2)
    slides_per_patient: int = Field(default=2, ge=1)
    size_um: tuple[float, float] = (1700.0, 2100.0)
    min_tumour: float = Field(default=0.005, gt=0, lt=0.5)
    max_tumour: float = Field(default=0.20, gt=0, lt=0.5)
    pen_fraction: float = Field(default=0.35, ge=0, le=1)
    fine_fraction: float = Field(default=0.25, ge=0, le=1)
    striking: bool = False
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Staining:
    """Colours of one slide: stain vectors (optical density of R, G, B), stain strengths and light (R, G, B)."""

    haematoxylin: Colour = HAEMATOXYLIN
    eosin: Colour = EOSIN
    strength: tuple[float, float] = (1.0, 1.0)
    light: Colour = (244.0, 243.0, 245.0)


@dataclass(frozen=True)
class SlidePlan:
    """Everything that decides the pixels of one slide.

    Attributes
    ----------
    slide_id, patient_id : str
    size_um : (float, float)
        Width and height in µm.
    mpp : float
        µm per pixel of level 0.
    tumour_fraction : float
        Part of the tissue area to be covered by tumour; 0 for a normal slide.
    pen : bool
        Whether somebody drew on the slide.
    staining : Staining
    seed : tuple of int
        Entropy of the slide's random numbers.
    striking : bool
        Whether there are blood, necrosis and sheets of harmless cells.
    """

    slide_id: str
    patient_id: str = "patient"
    size_um: tuple[float, float] = (1024.0, 768.0)
    mpp: float = 0.5
    tumour_fraction: float = 0.0
    pen: bool = False
    staining: Staining = Staining()
    seed: tuple[int, ...] = (0,)
    striking: bool = False

    @property
    def label(self) -> str:
        """``tumour`` or ``normal``."""
        return "tumour" if self.tumour_fraction > 0 else "normal"

    @property
    def size_px0(self) -> tuple[int, int]:
        """Width and height of level 0."""
        width, height = (round(side / self.mpp) for side in self.size_um)
        return width, height

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of one purpose; purposes do not disturb each other."""
        return np.random.default_rng([*self.seed, int.from_bytes(purpose.encode()[:8], "little")])

    @property
    def description(self) -> str:
        """Text of the TIFF's description tag: changes when any pixel would."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"eosin synthetic slide, plan {digest[:16]}"


def plan_cohort(options: Cohort) -> list[SlidePlan]:
    """Draw the plans of a cohort.

    Returns
    -------
    list of SlidePlan
        Ordered by slide id. The slides of a patient share the label. Sizes, resolutions, colours and pen marks are
        drawn once for each pair of a tumour and a normal slide.
    """
    rng = np.random.default_rng([options.seed, 1])
    labels = _patient_labels(rng, options)
    positive = [i for i, (_, label) in enumerate(labels) if label]
    negative = [i for i, (_, label) in enumerate(labels) if not label]
    pairs = max(len(positive), len(negative))
    looks = [_draw_look(rng, options) for _ in range(pairs)]
    fractions = _draw_fractions(rng, options, len(positive))
    plans = []
    for members, tumour in ((positive, fractions), (negative, np.zeros(len(negative)))):
        for i, fraction, look in zip(members, tumour, rng.permutation(pairs), strict=False):
            size_um, mpp, pen, staining = looks[look]
            seed = (options.seed, 2, i)
            patient = f"P{labels[i][0]:03d}"
            plan = SlidePlan(f"S{i:03d}", patient, size_um, mpp, float(fraction), pen, staining, seed, options.striking)
            plans.append(plan)
    return sorted(plans, key=lambda plan: plan.slide_id)


def _patient_labels(rng: np.random.Generator, options: Cohort) -> list[tuple[int, bool]]:
    patients = -(-options.n_slides // options.slides_per_patient)
    positive = set(rng.permutation(patients)[: patients // 2].tolist())
    owners = [i // options.slides_per_patient for i in range(options.n_slides)]
    return [(owner, owner in positive) for owner in owners]


def _draw_fractions(rng: np.random.Generator, options: Cohort, count: int) -> NDArray[np.float64]:
    """Spread the tumour fractions evenly on a log scale from the smallest to the largest, in random order."""
    return rng.permutation(np.geomspace(options.min_tumour, options.max_tumour, max(count, 1)))[:count]


def _draw_look(rng: np.random.Generator, options: Cohort) -> tuple[tuple[float, float], float, bool, Staining]:
    width, height = rng.uniform(*options.size_um, size=2).round()
    fine = rng.random() < options.fine_fraction
    shrink = 0.7 if fine else 1.0  # a slide scanned at 40x covers less, or it would take four times as long
    pen = bool(rng.random() < options.pen_fraction)
    return (float(width * shrink), float(height * shrink)), 0.25 if fine else 0.5, pen, _draw_staining(rng)


def _draw_staining(rng: np.random.Generator) -> Staining:
    haematoxylin, eosin = (_jitter(rng, vector, 0.05) for vector in (HAEMATOXYLIN, EOSIN))
    strength = (float(rng.uniform(0.8, 1.2)), float(rng.uniform(0.75, 1.2)))
    return Staining(haematoxylin, eosin, strength, _triple(rng.uniform(238, 248) + rng.uniform(-2.5, 2.5, 3)))


def _jitter(rng: np.random.Generator, vector: Colour, spread: float) -> Colour:
    moved = np.clip(np.array(vector) + rng.normal(0, spread, 3), 0.02, None)
    return _triple(moved / np.linalg.norm(moved))


def _triple(values: NDArray[np.float64]) -> Colour:
    first, second, third = (round(float(value), 4) for value in values)
    return first, second, third


def make_cohort(
    folder: Path,
    options: Cohort | None = None,
    *,
    workers: int = 0,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Paint a cohort: ``slides/<id>.tiff``, ``truth/<id>.png``, ``truth/<id>.geojson`` and ``labels.csv``.

    Parameters
    ----------
    folder : Path
        Made when missing; slides that are there already and come from the same plan are kept.
    options : Cohort, optional
    workers : int
        Processes; 0 paints in this one. The pixels do not depend on it.
    progress : callable, optional
        Called after each slide.

    Returns
    -------
    Report
        One record per slide, stage ``synthesise``.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    plans = plan_cohort(options or Cohort())
    for part in ("slides", "truth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    report = run_batch(
        plans,
        partial(_paint_into, folder),
        key=lambda plan: plan.slide_id,
        stage="synthesise",
        is_done=partial(_is_painted, folder),
        workers=workers,
        progress=progress,
    )
    write_text(folder / "labels.csv", _labels_csv(plans))
    return report


def make_slide(
    path: Path,
    *,
    size_px0: tuple[int, int] = (1536, 1024),
    mpp: float = 0.5,
    tumour_fraction: float = 0.0,
    pen: bool = False,
    seed: int = 0,
) -> Mask:
    """Paint one slide.

    Parameters
    ----------
    path : Path
        TIFF to write.
    size_px0 : (int, int)
        Width and height of level 0.
    mpp : float
        µm per pixel of level 0.
    tumour_fraction : float
        Part of the tissue covered by tumour.
    pen : bool
        Whether to draw on the slide.
    seed : int

    Returns
    -------
    (h, w) bool ndarray
        The tumour at `TRUTH_MPP`.
    """
    size_um = (size_px0[0] * mpp, size_px0[1] * mpp)
    plan = SlidePlan(path.stem, "patient", size_um, mpp, tumour_fraction, pen, Staining(), (seed,))
    layout = _layout(plan)
    _write_slide(path, _paint(plan, layout), plan)
    return _truth(plan, layout)


def _paint_into(folder: Path, plan: SlidePlan) -> Outcome:
    layout = _layout(plan)
    truth = _truth(plan, layout)
    _write_mask(folder / f"truth/{plan.slide_id}.png", truth)
    write_json(folder / f"truth/{plan.slide_id}.geojson", truth_geojson(truth, plan.mpp, plan.size_px0))
    _write_slide(folder / f"slides/{plan.slide_id}.tiff", _paint(plan, layout), plan)
    return Outcome()


def _is_painted(folder: Path, plan: SlidePlan) -> bool:
    slide = folder / f"slides/{plan.slide_id}.tiff"
    truth = [folder / f"truth/{plan.slide_id}{suffix}" for suffix in (".png", ".geojson")]
    if not all(path.is_file() for path in (slide, *truth)):
        return False
    try:
        with tifffile.TiffFile(slide) as tiff:
            return tiff.pages.first.description == plan.description
    except tifffile.TiffFileError:
        return False


def _labels_csv(plans: Sequence[SlidePlan]) -> str:
    rows = [(plan.patient_id, plan.slide_id, plan.label) for plan in plans]
    return csv_text([("patient_id", "slide_id", "label"), *rows])


def _paint(plan: SlidePlan, layout: Layout) -> Bytes:
    """Return level 0, (h, w, 3) RGB."""
    haematoxylin, eosin = paint(layout, plan.mpp, plan.rng("paint"))
    rng = plan.rng("scanner")
    shade = _uneven_light(rng, haematoxylin.shape)
    _drop_dust(rng, shade, plan.mpp)
    rgb = _colour(haematoxylin, eosin, shade, plan.staining, rng)
    if plan.pen:
        _draw_pen(rng, rgb, layout, plan.mpp)
    return rgb


def _colour(haematoxylin: Bytes, eosin: Bytes, shade: Bytes, staining: Staining, rng: np.random.Generator) -> Bytes:
    """Turn amounts of stain into light: one table look-up per pixel, strip by strip."""
    height, width = haematoxylin.shape
    table = _colour_table(staining)
    grain = rng.integers(0, 5, (STRIP_PX, width), dtype=np.uint8)
    fleck = ndimage.gaussian_filter(rng.normal(128, 30, (STRIP_PX, width)).astype(np.float32), 0.7).astype(np.uint16)
    rgb = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, STRIP_PX):
        rows = slice(top, min(top + STRIP_PX, height))
        index = haematoxylin[rows].astype(np.uint16) << 8 | np.minimum(eosin[rows] * fleck[: rows.stop - top] >> 7, 255)
        light = table[index].view(np.uint8).reshape(*index.shape, 4)[..., :3]
        np.subtract(light, np.minimum(light, (shade[rows] + grain[: len(index)])[..., None]), out=rgb[rows])
    return rgb


def _colour_table(staining: Staining) -> NDArray[np.uint32]:
    """Return packed RGB for every pair of stain bytes: light × 10^(-optical density)."""
    amount = np.arange(256) * FULL_DENSITY / 255
    blue = amount[:, None, None] * staining.strength[0]
    # nuclei push the cytoplasm aside: less eosin where there is much haematoxylin
    pink = amount[None, :, None] * staining.strength[1] * (1 - 0.6 * np.clip((blue - 0.3) / 0.5, 0, 1))
    density = blue * np.array(staining.haematoxylin) + pink * np.array(staining.eosin)
    rgb = (np.array(staining.light) * 10**-density).round().astype(np.uint8)
    packed = np.concatenate([rgb, np.zeros((256, 256, 1), np.uint8)], axis=2).reshape(-1, 4)
    return packed.view(np.uint32).ravel()


def _layout(plan: SlidePlan) -> Layout:
    rng = plan.rng("layout")
    return lay_out(plan.size_um, tumour_fraction=plan.tumour_fraction, rng=rng, striking=plan.striking)


def _uneven_light(rng: np.random.Generator, shape: tuple[int, int]) -> Bytes:
    """Return how much darker each pixel is than the lamp: a slight slope and a slight vignette."""
    y, x = (np.linspace(-1, 1, max(side // 8, 2), dtype=np.float32) for side in shape)
    slope = rng.uniform(-1.5, 1.5, 2)
    shade = 2.5 + slope[0] * x[None, :] + slope[1] * y[:, None] + 1.5 * (x[None, :] ** 2 + y[:, None] ** 2)
    smooth = Image.fromarray(shade.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.asarray(np.clip(np.asarray(smooth), 0, 10), dtype=np.uint8)


def _drop_dust(rng: np.random.Generator, shade: Bytes, mpp: float) -> None:
    """Drop sharp specks and a few large grains that are out of focus."""
    for _ in range(int(rng.integers(25, 60))):
        is_blurred = rng.random() < 0.25
        radius = rng.uniform(12, 28) if is_blurred else rng.uniform(0.8, 5)
        darkness, edge = (rng.uniform(6, 16), 0.7) if is_blurred else (rng.uniform(40, 150), 0.25)
        half = int(1.4 * radius / mpp) + 1
        y, x = np.mgrid[-half : half + 1, -half : half + 1] * mpp / radius
        ragged = 1 + 0.3 * np.cos(2 * np.arctan2(y, x) + rng.uniform(0, 6)) * (not is_blurred)
        speck = np.clip((ragged - np.hypot(x, y)) / edge, 0, 1) * darkness
        top, left = (int(rng.integers(0, max(side - speck.shape[0], 1))) for side in shade.shape)
        window = shade[top : top + speck.shape[0], left : left + speck.shape[1]]
        np.maximum(window, speck[: window.shape[0], : window.shape[1]].astype(np.uint8), out=window)


def _draw_pen(rng: np.random.Generator, rgb: Bytes, layout: Layout, mpp: float) -> None:
    """Draw one to three felt-pen strokes: arcs around a piece, or short dashes, mostly on the glass."""
    width, height = (round(side / TRUTH_MPP) for side in layout.size_um)
    ink = Image.new("L", (width, height))
    for _ in range(int(rng.integers(1, 4))):
        radius = rng.uniform(18, 38) / TRUTH_MPP
        stroke = min((_stroke(rng, layout.size_um) for _ in range(12)), key=partial(_share_on_tissue, layout))
        for x, y in (stroke / TRUTH_MPP).tolist():
            ImageDraw.Draw(ink).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    strength = np.asarray(ink.resize(rgb.shape[1::-1], Image.Resampling.BICUBIC))
    colour = np.array(PENS[int(rng.integers(len(PENS)))]) / 255
    opacity = np.arange(256)[:, None] / 255 * rng.uniform(0.75, 1.0)
    factor = np.round(256 * colour**opacity).astype(np.uint16)
    for top in range(0, len(rgb), STRIP_PX):
        rows, columns = np.nonzero(strength[top : top + STRIP_PX])
        inked = rgb[top + rows, columns]
        rgb[top + rows, columns] = inked.astype(np.uint16) * factor[strength[top + rows, columns]] >> 8


def _share_on_tissue(layout: Layout, points: NDArray[np.float64]) -> float:
    height, width = layout.tissue.shape
    columns, rows = (points / LAYOUT_MPP).astype(int).T
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    # a stroke that leaves the slide is no better than one across tissue
    return float(1 - (inside & (layout.tissue[rows.clip(0, height - 1), columns.clip(0, width - 1)] < 0)).mean())


def _stroke(rng: np.random.Generator, size_um: tuple[float, float]) -> NDArray[np.float64]:
    """Return the points (n, 2) of a stroke in µm."""
    size = np.array(size_um)
    centre, radius = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.12, 0.42) * size.min()
    start, sweep = rng.uniform(0, 2 * np.pi), rng.choice([0.25, 0.8, 1.7]) * np.pi
    angle = start + np.linspace(0, sweep, 400)
    wobble = 1 + 0.08 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.1 * np.linspace(0, 1, 400)
    return np.asarray(centre + (radius * wobble)[:, None] * np.stack([np.cos(angle), 0.8 * np.sin(angle)], axis=1))


def _write_slide(path: Path, rgb: Bytes, plan: SlidePlan) -> None:
    write_file(path, partial(save_pyramid, rgb, plan))


def save_pyramid(rgb: Bytes, plan: SlidePlan, file: BinaryIO) -> None:
    """Write level 0 and its halves as a chain of IFDs; OpenSlide finds the latter by bit 0 of NewSubfileType."""
    with tifffile.TiffWriter(file) as tiff:
        for level, image in enumerate(_levels(rgb)):
            tiff.write(
                image,
                photometric="rgb",
                tile=(TILE_PX, TILE_PX),
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                subfiletype=min(level, 1),
                resolution=(1e4 / plan.mpp / 2**level,) * 2,
                resolutionunit="CENTIMETER",
                description=plan.description,
                metadata=None,
                software="eosin",
                maxworkers=1,
            )


def _levels(rgb: Bytes) -> Iterator[Bytes]:
    yield rgb
    image = Image.fromarray(rgb)
    while max(image.size) > 2 * TILE_PX:
        image = image.reduce(2)
        yield np.asarray(image)


def _truth(plan: SlidePlan, layout: Layout) -> Mask:
    """Return the tumour at `TRUTH_MPP`."""
    tumour, tissue = (layout.resized(field, TRUTH_MPP) for field in (layout.tumour, layout.tissue))
    return np.asarray((tumour > 0) & (tissue > 0) & (plan.tumour_fraction > 0))


def _write_mask(path: Path, mask: Mask) -> None:
    facts = PngInfo()
    facts.add_text("mpp", f"{TRUTH_MPP:g}")
    write_picture(path, Image.fromarray(mask.astype(np.uint8) * 255), pnginfo=facts)


def read_truth(path: Path) -> tuple[Mask, float]:
    """Read a truth mask.

    Parameters
    ----------
    path : Path
        ``truth/<id>.png`` of a cohort.

    Returns
    -------
    mask : (h, w) bool ndarray
    mpp : float
        µm per pixel of the mask.
    """
    with Image.open(path) as image:
        return np.asarray(image) > 0, float(image.info["mpp"])


def truth_geojson(mask: Mask, mpp: float, size_px0: tuple[int, int]) -> dict[str, Any]:
    """Return the outline of a truth mask as a GeoJSON FeatureCollection of annotations that QuPath reads.

    Parameters
    ----------
    mask : (h, w) bool ndarray
        At `TRUTH_MPP`.
    mpp : float
        µm per pixel of level 0, whose pixels the coordinates count.
    size_px0 : (int, int)
        Width and height of level 0.
    """
    outline = trace_outline(mask, (TRUTH_MPP / mpp, TRUTH_MPP / mpp), size_px0)
    features = [
        {
            "type": "Feature",
            "geometry": mapping(polygon),
            "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
        }
        for polygon in outline.geoms
    ]
    return {"type": "FeatureCollection", "features": features}

"""Synthetic slides whose label shows only at a high magnification: lesions that differ in nothing but fine stripes.

Every slide has lesions, dark discs that any magnification shows. Inside them the light goes up and down in stripes,
whose period is 2 µm on slides of one class and 1 µm on those of the other, around the same mean. At 2 µm per pixel both
have averaged out to the last bit; at 1 µm per pixel the wider stripes are there and the others are not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from eosin._batch import Outcome, run_batch
from eosin._files import write_file, write_text
from eosin._records import Record, Report
from eosin._tables import csv_text
from eosin.options import Options
from eosin.wsi._synthetic import SlidePlan, save_pyramid

Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

MPP = 0.5
PERIODS_PX = {"wide": 4, "narrow": 2}
GLASS, TISSUE, LESION = (243.0, 242.0, 244.0), (222.0, 168.0, 196.0), (150.0, 110.0, 168.0)
SHADE = 14.0  # standard deviation of the uneven staining
STRIPE = 34.0


class FineCohort(Options):
    """Size and seed of a cohort; every second patient has wide stripes.

    Attributes
    ----------
    n_slides : int
        One per patient.
    side_px : int
        Side of a slide, pixels of 0.5 µm.
    lesions : int
        Per slide.
    radius_px : float
        Of a lesion.
    seed : int
    """

    n_slides: int = Field(default=24, ge=2)
    side_px: int = Field(default=2048, ge=256)
    lesions: int = Field(default=3, ge=1)
    radius_px: float = Field(default=180.0, gt=8)
    seed: int = Field(default=0, ge=0)


def make_fine_cohort(
    folder: Path, options: FineCohort | None = None, *, progress: Callable[[Record], None] | None = None
) -> Report:
    """Paint a cohort: ``slides/<id>.tiff`` and ``labels.csv`` with the labels wide and narrow.

    Parameters
    ----------
    folder : Path
        Made when missing.
    options : FineCohort, optional
    progress : callable, optional
        Called after each slide.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    options = options or FineCohort()
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    numbers = range(options.n_slides)
    report = run_batch(
        numbers, partial(_paint_into, folder, options), key=_slide_id, stage="synthesise", progress=progress
    )
    write_text(folder / "labels.csv", _labels_csv(numbers))
    return report


def _slide_id(number: int) -> str:
    return f"F{number:03d}"


def _label(number: int) -> str:
    return tuple(PERIODS_PX)[number % 2]


def _labels_csv(numbers: Sequence[int]) -> str:
    rows = [(f"P{number:03d}", _slide_id(number), _label(number)) for number in numbers]
    return csv_text([("patient_id", "slide_id", "label"), *rows])


def _paint_into(folder: Path, options: FineCohort, number: int) -> Outcome:
    rgb = paint_fine(options, period_px=PERIODS_PX[_label(number)], seed=(options.seed, number))
    side_um = options.side_px * MPP
    plan = SlidePlan(_slide_id(number), size_um=(side_um, side_um), mpp=MPP, seed=(options.seed, number))
    write_file(folder / f"slides/{_slide_id(number)}.tiff", partial(save_pyramid, rgb, plan))
    return Outcome()


def paint_fine(options: FineCohort, *, period_px: int, seed: tuple[int, ...]) -> Bytes:
    """Return level 0 of one slide, (h, w, 3) RGB.

    Parameters
    ----------
    options : FineCohort
    period_px : int
        Of the stripes in the lesions; changes nothing else.
    seed : tuple of int
    """
    rng = np.random.default_rng(seed)
    tissue, lesion = _shapes(rng, options)
    colour = np.where(lesion[..., None], LESION, np.where(tissue[..., None], TISSUE, GLASS))
    light: Doubles = colour + (_shade(rng, options.side_px) * tissue)[..., None]
    stripes = np.where(np.arange(options.side_px) % period_px < period_px // 2, STRIPE, -STRIPE)
    light += (stripes[None, :] * lesion)[..., None]
    return np.asarray(light.clip(0, 255).round(), np.uint8)


def _shapes(rng: np.random.Generator, options: FineCohort) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return a round piece of tissue and the lesions in it, both whole blocks of 4 × 4 pixels, (h, w) bool."""
    y, x = np.mgrid[: options.side_px // 4, : options.side_px // 4] * 4.0 - options.side_px / 2
    radius = 0.46 * options.side_px
    tissue = np.hypot(x, y) < radius
    lesion = np.zeros_like(tissue)
    for _ in range(options.lesions):
        distance, angle = (radius - options.radius_px) * rng.random() ** 0.5, 2 * np.pi * rng.random()
        lesion |= np.hypot(x - distance * np.cos(angle), y - distance * np.sin(angle)) < options.radius_px
    return _enlarged(tissue), _enlarged(lesion & tissue)


def _enlarged(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask.repeat(4, axis=0).repeat(4, axis=1)


def _shade(rng: np.random.Generator, side_px: int) -> Doubles:
    """Return how unevenly a slide is stained, constant in blocks of 4 × 4 pixels, (h, w)."""
    noise = ndimage.gaussian_filter(rng.normal(size=(side_px // 4, side_px // 4)), 2)
    return np.asarray((noise / noise.std() * SHADE).clip(-30, 30).repeat(4, axis=0).repeat(4, axis=1))

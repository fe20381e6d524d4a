"""Where a slide has tissue, at one physical resolution and with thresholds in µm."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from shapely import MultiPolygon

from eosin.errors import SlideError
from eosin.options import Options
from eosin.wsi._ink import PEN_REACH_UM, OwnGrain, find_pen
from eosin.wsi._morphology import (
    close_gaps,
    drop_small,
    fill_holes,
    grow,
    open_threads,
    pieces_touching,
    window_of,
    window_sums,
)
from eosin.wsi._outline import fill_outline, trace_outline
from eosin.wsi._overview import Overview, read_overview
from eosin.wsi._pieces import find_pieces
from eosin.wsi._refine import FACTOR, Closer, FinerGrain, enlarge, refine
from eosin.wsi._slide import Slide
from eosin.wsi._stain import (
    PALE_DENSITY,
    bends_of,
    blur_density,
    darkest_of,
    grain_limit,
    grey_limit,
    is_smooth_glass,
    is_stained,
    light_at,
    lightest_of,
    roughness,
    stain_threshold,
)

TISSUE_VERSION = "2"  # changes when the same slide and options give another mask, so that slides are tiled again
FRACTION_BLOCK = 500_000
MIN_CELLS = 128
MANY_CELLS = 1200
LATTICE_SPARE = 20
BAND_ROWS = 128  # sums of so many cells fit in a byte
COARSE_MPP = (8.0, 16.0)
BLUR_UM = 4.0
WEAK_SHARE = 0.55
INK_DENSITY = 0.3
BLACK_DENSITY = 0.5  # what is as dark may still be grey: a silver stain, pigment
FRAME_DENSITY, FRAME_SIDES, FRAME_MOST = 0.6, 3, 0.5
OPAQUE_DENSITY = 1.0  # of the brightest channel: frames, borders and labels let less through than tissue
MESH_SHARE = 0.12
MESH_STAIN = 0.35
MESH_COLOUR = 0.15
RIM_CELLS = 1.5
LEAST_UM2 = 2_500.0
DIRT_UM2 = 40_000.0
AROUND_UM, AROUND_CELLS = 500.0, 9
ODD_COVERAGE = (0.001, 0.95)


class TissueOptions(Options):
    """How tissue is separated from glass.

    Parameters
    ----------
    mpp : float
        µm per cell of the mask; finer on slides that would have fewer than 128 cells.
    min_stain : float or None
        Optical density by which the strongest and the weakest channel of stained tissue differ;
        None finds it from the slide.
    min_area_um2 : float or None
        Smaller pieces are dropped; the largest is always kept. None drops what is smaller than a quarter of the piece
        that a typical cell of tissue lies in, but at most 40,000 and at least what one tile needs.
    max_hole_um2 : float
        Smaller holes are filled.
    close_um : float
        Gaps up to this width are closed before small things are removed.
    open_um : float
        Threads up to this width are removed.
    remove_pen : bool
        Leave out marker strokes.
    """

    mpp: Annotated[float, Field(ge=0.25, le=64)] = 8.0
    min_stain: Annotated[float, Field(gt=0, lt=1)] | None = None
    min_area_um2: Annotated[float, Field(ge=0)] | None = None
    max_hole_um2: Annotated[float, Field(ge=0)] = 40_000.0
    close_um: Annotated[float, Field(ge=0, le=1000)] = 80.0
    open_um: Annotated[float, Field(ge=0, le=1000)] = 30.0
    remove_pen: bool = True


@dataclass(frozen=True)
class TissueMask:
    """Tissue on a lattice of cells that starts at the slide's corner.

    Parameters
    ----------
    mask : (h, w) bool
        True where tissue is.
    px0_per_cell : tuple of float
        Width and height of a cell in level-0 pixels.
    slide_size_px0 : tuple of int
        Width and height of the slide; the last cells may reach past it.
    slide_mpp : float
        µm per level-0 pixel.
    notes : tuple of str
        What a person should know about this mask, for example that pen was removed.
    pen : (h, w) bool or None
        Marker strokes, where they were looked for.
    small_um2, ink_um2 : float
        Area of the tissue that was left out in small pieces, and of ink with tissue around it.
    """

    mask: NDArray[np.bool_]
    px0_per_cell: tuple[float, float]
    slide_size_px0: tuple[int, int]
    slide_mpp: float
    notes: tuple[str, ...] = field(default=())
    pen: NDArray[np.bool_] | None = None
    small_um2: float = 0.0
    ink_um2: float = 0.0

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"<TissueMask: {self.area_um2 / 1e6:.3g} mm² on {width} x {height} cells>"

    def like(self, mask: NDArray[np.bool_]) -> "TissueMask":
        """Return another mask on the same lattice."""
        return TissueMask(mask, self.px0_per_cell, self.slide_size_px0, self.slide_mpp)

    @property
    def area_um2(self) -> float:
        """Area of the tissue."""
        return float(self.mask.sum()) * self.cell_um2

    @property
    def cell_um2(self) -> float:
        """Area of one cell."""
        width, height = self.px0_per_cell
        return width * height * self.slide_mpp**2

    @property
    def coverage(self) -> float:
        """Share of the slide that is tissue."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    def fraction(self, boxes_px0: ArrayLike) -> NDArray[np.float64]:
        """Return the share of each box that is tissue.

        Exact for the mask: a box that cuts cells counts the covered part of each.

        Parameters
        ----------
        boxes_px0 : (n, 4)
            x0, y0, x1, y1 in level-0 pixels; what lies outside the slide is not tissue.

        Returns
        -------
        (n,) float64
        """
        boxes = np.asarray(boxes_px0).reshape(-1, 4)
        blocks = [self._fraction(boxes[i : i + FRACTION_BLOCK]) for i in range(0, len(boxes), FRACTION_BLOCK)]
        return np.concatenate(blocks) if blocks else np.zeros(0)

    def share_of(self, origins_px0: NDArray[np.int64], side_px0: int) -> NDArray[np.float64]:
        """Return the share of squares that is tissue, as `fraction` does; faster where they share rows and columns.

        Parameters
        ----------
        origins_px0 : (n, 2) int64
            Top-left corners, x then y, level-0 pixels.
        side_px0 : int
            Their side.

        Returns
        -------
        (n,) float64
        """
        xs, column = np.unique(origins_px0[:, 0], return_inverse=True)
        ys, row = np.unique(origins_px0[:, 1], return_inverse=True)
        if len(xs) * len(ys) > LATTICE_SPARE * max(len(origins_px0), 100):
            return self.fraction(np.concatenate([origins_px0, origins_px0 + side_px0], axis=1))
        return self.lattice(xs, ys, side_px0)[row, column]

    def lattice(self, xs_px0: NDArray[np.int64], ys_px0: NDArray[np.int64], side_px0: int) -> NDArray[np.float64]:
        """Return the share that is tissue of the squares at every x and every y, (rows, columns)."""
        width, height = self.px0_per_cell
        rows, columns = self.window
        inside = self.mask[rows, columns].view(np.uint8)
        bands = _sums_between(inside, ys_px0 / height - rows.start, side_px0 / height)
        cells = _sums_between(np.ascontiguousarray(bands.T), xs_px0 / width - columns.start, side_px0 / width).T
        return np.clip(cells / (side_px0 / height * (side_px0 / width)), 0.0, 1.0)

    def _fraction(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        x0, y0, x1, y1 = (boxes / np.tile(self.px0_per_cell, 2)).T  # in cells
        inside = self._area_to(x1, y1) - self._area_to(x0, y1) - self._area_to(x1, y0) + self._area_to(x0, y0)
        share = inside / np.maximum((x1 - x0) * (y1 - y0), 1e-12)
        return np.asarray(np.clip(share, 0.0, 1.0))

    def _area_to(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tissue cells in the rectangle from the corner to (x, y): the integral image, linear within a cell."""
        table, (top, left) = self._integral
        height, width = table.shape[0] - 1, table.shape[1] - 1
        x, y = np.clip(x - left, 0, width), np.clip(y - top, 0, height)
        col, row = np.minimum(x.astype(np.int64), width - 1), np.minimum(y.astype(np.int64), height - 1)
        dx, dy = x - col, y - row
        above = table[row, col] * (1 - dx) + table[row, col + 1] * dx
        below = table[row + 1, col] * (1 - dx) + table[row + 1, col + 1] * dx
        return np.asarray(above * (1 - dy) + below * dy)

    @cached_property
    def window(self) -> tuple[slice, slice]:
        """The box that holds all tissue; of one cell when there is none."""
        rows, columns = window_of(self.mask, 0)
        return (rows, columns) if rows.stop else (slice(0, 1), slice(0, 1))

    @cached_property
    def _integral(self) -> tuple[NDArray[np.int32], tuple[int, int]]:
        """The integral image of the box that holds all tissue, and that box's first row and column."""
        rows, columns = self.window
        inside = self.mask[rows, columns]
        table = np.zeros((inside.shape[0] + 1, inside.shape[1] + 1), np.int32)
        np.cumsum(inside, axis=0, dtype=np.int32, out=table[1:, 1:])
        np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
        return table, (rows.start, columns.start)

    def contours(self) -> MultiPolygon:
        """Return the outline of the tissue in level-0 pixels, within the slide; holes are kept."""
        return trace_outline(self.mask, self.px0_per_cell, self.slide_size_px0, window=self.window)


def _sums_between(
    rows: NDArray[np.uint8] | NDArray[np.float64], starts: NDArray[np.float64], length: float
) -> NDArray[np.float64]:
    """Return the sums of the rows in stretches of one length, (h, w) to (n, w); a row that is cut counts in part."""
    ends = np.clip(np.concatenate([starts, starts + length]), 0, len(rows))
    whole = np.minimum(ends.astype(np.int64), len(rows) - 1)
    cuts = np.unique(np.concatenate([np.arange(0, len(rows), BAND_ROWS), whole]))
    before = np.zeros((len(cuts) + 1, rows.shape[1]))
    for number, (start, stop) in enumerate(pairwise([*cuts.tolist(), len(rows)])):  # faster than reduceat and cumsum
        np.add(before[number], np.add.reduce(rows[start:stop], axis=0, dtype=rows.dtype), out=before[number + 1])
    until = before[np.searchsorted(cuts, whole)]
    parts = ends - whole
    if parts.any():
        until += parts[:, None] * rows[whole]
    return np.asarray(until[len(starts) :] - until[: len(starts)])


def mask_mpp(slide: Slide, options: TissueOptions) -> float:
    """Return the µm per cell of the mask: as the options say, finer on small slides, never finer than the slide."""
    longest_um = max(slide.size_px0) * slide.mpp
    return max(slide.mpp, min(options.mpp, longest_um / MIN_CELLS))


def look_over(slide: Slide, options: TissueOptions | None = None) -> Overview:
    """Return the picture that `find_tissue` starts from: twice as coarse as the mask on large slides."""
    mpp = mask_mpp(slide, options or TissueOptions())
    many = max(slide.size_px0) * slide.mpp >= MANY_CELLS * mpp
    mpp *= FACTOR if many and COARSE_MPP[0] <= FACTOR * mpp <= COARSE_MPP[1] else 1
    return Overview(read_overview(slide, mpp), mpp)


def find_tissue(
    slide: Slide, options: TissueOptions | None = None, *, overview: Overview | None = None, tile_um2: float = LEAST_UM2
) -> TissueMask:
    """Tell tissue from glass.

    At about 8 µm per cell the colour of the glass is measured on the slide itself; tissue is what absorbs one channel
    more than another by at least the stain threshold (grey dirt, cover-slip edges and black borders absorb all alike)
    and has grain (tinted glass, glue and shadows are smooth). Marker strokes are recognised by colours that stains do
    not have, gaps and threads are closed and opened, small pieces and holes go by area. On slides of more than about a
    centimetre all this is done at 16 µm, and only the border of the tissue, and what may be ink, is read at 8 µm.

    Parameters
    ----------
    slide : Slide
        Open, with a known mpp.
    options : TissueOptions, optional
        The defaults otherwise.
    overview : Overview, optional
        From `look_over`, when it was made already.
    tile_um2 : float
        Tissue that a tile has to hold; smaller pieces make no tile, and are dropped unless the options say otherwise.

    Returns
    -------
    TissueMask
        Possibly without a single cell of tissue.

    Raises
    ------
    SlideError
        Code ``dark-background`` for fluorescence and other slides whose background is dark.
    """
    options = options or TissueOptions()
    mpp = mask_mpp(slide, options)
    overview = overview or look_over(slide, options)
    if overview.is_dark:
        raise SlideError(
            slide.path,
            "its background is dark, as in fluorescence; tissue is only found on bright-field slides",
            code="dark-background",
        )
    cell = (mpp / slide.mpp, mpp / slide.mpp)
    if overview.mpp <= mpp:
        found = examine(overview, options, tile_um2=tile_um2)
        return TissueMask(
            found.mask, cell, slide.size_px0, slide.mpp, found.notes, found.pen, found.small_um2, found.ink_um2
        )
    closer = Closer(slide, mpp, overview.glass)
    found = examine(overview, options, closer, tile_um2=tile_um2)
    mask = refine(
        found.mask,
        found.pen if options.remove_pen else np.zeros_like(found.pen),
        closer,
        min_stain=found.min_stain,
        thread_cells=options.open_um / 2 / mpp,
        min_cells=found.min_area_um2 / mpp**2,
        max_hole=options.max_hole_um2 / mpp**2,
    )
    height, width = mask.shape
    pen = enlarge(found.pen)[:height, :width] if found.pen.any() else np.zeros(mask.shape, bool)
    return TissueMask(mask, cell, slide.size_px0, slide.mpp, found.notes, pen, found.small_um2, found.ink_um2)


@dataclass(frozen=True)
class Findings:
    """What was made out on an overview.

    Parameters
    ----------
    mask, pen : (h, w) bool
        Tissue; marker strokes.
    notes : tuple of str
        What a person should know.
    min_stain : float
        Difference of optical density from which a pixel counted as stained.
    min_area_um2 : float
        Area below which pieces were dropped.
    small_um2, ink_um2 : float
        See `TissueMask`.
    """

    mask: NDArray[np.bool_]
    pen: NDArray[np.bool_]
    notes: tuple[str, ...]
    min_stain: float
    min_area_um2: float = 0.0
    small_um2: float = 0.0
    ink_um2: float = 0.0


def examine(
    overview: Overview, options: TissueOptions, closer: Closer | None = None, *, tile_um2: float = LEAST_UM2
) -> Findings:
    """Tell tissue, glass and ink on a picture of a slide; `closer` reads it in more detail where that is needed."""
    mpp = overview.mpp
    planes = overview.light
    if mpp < BLUR_UM:
        planes = blur_density(planes, BLUR_UM / mpp / 2)
    threshold = options.min_stain or stain_threshold(planes)
    darkest, lightest = darkest_of(planes), lightest_of(planes)
    weak = is_stained(darkest, lightest, WEAK_SHARE * threshold)
    reach = 2 + math.ceil(max(options.close_um, 2 * options.open_um, PEN_REACH_UM) / mpp)
    place = window_of(weak | (darkest < light_at(INK_DENSITY)), reach)
    mask, pen = np.zeros(weak.shape, bool), np.zeros(weak.shape, bool)
    small_um2 = ink_um2 = min_area_um2 = 0.0
    if mask[place].size:
        darkest, lightest = darkest[place], lightest[place]
        bends = bends_of(darkest)
        rough = roughness(bends)
        limit = grain_limit(rough, ~weak[place] & (darkest > light_at(PALE_DENSITY)))
        grained = ~is_smooth_glass(darkest, lightest, rough, limit) & (lightest >= light_at(OPAQUE_DENSITY))
        grey = grey_limit(planes, threshold)
        grained &= (darkest < light_at(BLACK_DENSITY)) | is_stained(darkest, lightest, 0.0, colour=grey)
        grained &= ~_frame(lightest)
        stained = is_stained(darkest, lightest, threshold) & grained
        rim = grow(stained, RIM_CELLS)  # cells that tissue covers in part are pale and rough, too
        meshes = is_stained(darkest, lightest, MESH_STAIN * threshold, colour=MESH_COLOUR) & (rough > 2 * limit)
        meshes &= weak[place] | ~rim
        corner = place[0].start, place[1].start
        grain = FinerGrain(closer, darkest, bends, corner) if closer else OwnGrain(darkest, bends, mpp)
        pen[place] = find_pen(planes[:, *place], darkest, stained, mpp, grain)
        left_out = pen[place] if options.remove_pen else np.zeros_like(pen[place])
        found = _clean(stained, meshes & grained, left_out, mpp, options)
        pieces = find_pieces(found)
        min_area_um2 = _min_area(pieces.sizes * mpp**2, options, tile_um2)
        keep = pieces.sizes >= min(min_area_um2 / mpp**2, pieces.sizes.max(initial=0))
        small_um2 = float(pieces.sizes[~keep].sum()) * mpp**2
        mask[place] = fill_holes(pieces.mask(keep), options.max_hole_um2 / mpp**2)
        ink_um2 = _ink_over_tissue(left_out, mask[place], mpp)
    notes = _notes(mask, pen if options.remove_pen else None)
    return Findings(mask, pen, notes, threshold, min_area_um2, small_um2, ink_um2)


def _frame(lightest: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the dark frame of a picture: what lets little light through and reaches three of its sides."""
    dark = lightest < light_at(FRAME_DENSITY)
    height, width = dark.shape
    edges = (dark[0].any(), dark[-1].any(), dark[:, 0].any(), dark[:, -1].any())
    if sum(edges) < FRAME_SIDES or dark.mean() > FRAME_MOST:
        return np.zeros_like(dark)
    pieces = find_pieces(dark)
    reached = [
        (rows.start == 0) + (rows.stop == height) + (columns.start == 0) + (columns.stop == width)
        for rows, columns in pieces.boxes()
    ]
    return grow(pieces.mask(np.array(reached) >= FRAME_SIDES), 2)


def _min_area(areas_um2: NDArray[np.floating], options: TissueOptions, tile_um2: float) -> float:
    """Return the area below which pieces are dropped.

    Dirt is small beside the tissue, but thirty fragments are the tissue. So the piece that a typical cell of tissue
    lies in is the measure: half of the tissue is in pieces at least as large.
    """
    if options.min_area_um2 is not None:
        return options.min_area_um2
    if not len(areas_um2):
        return DIRT_UM2
    ascending = np.sort(areas_um2)
    typical = ascending[np.searchsorted(ascending.cumsum(), ascending.sum() / 2)]
    return float(np.clip(typical / 4, min(tile_um2, DIRT_UM2), DIRT_UM2))


def _ink_over_tissue(ink: NDArray[np.bool_], tissue: NDArray[np.bool_], mpp: float) -> float:
    """Return the area of ink, in µm², that has tissue on most sides: half of the half millimetre around it."""
    if not ink.any():
        return 0.0
    step = max(1, round(AROUND_UM / AROUND_CELLS / mpp))
    around = window_sums(tissue[::step, ::step].view(np.uint8), AROUND_CELLS, most=1)
    over = ink[::step, ::step] & (around > AROUND_CELLS**2 / 2)
    return float(np.count_nonzero(over)) * (step * mpp) ** 2


def _notes(mask: NDArray[np.bool_], left_out: NDArray[np.bool_] | None) -> tuple[str, ...]:
    notes = ["pen marks were left out"] if left_out is not None and left_out.any() else []
    coverage = np.count_nonzero(mask) / mask.size
    if coverage and not ODD_COVERAGE[0] <= coverage <= ODD_COVERAGE[1]:
        notes.append(f"tissue covers {coverage:.2%} of the slide; look at its contour picture")
    return tuple(notes)


def tissue_from_outline(slide: Slide, outline: MultiPolygon, options: TissueOptions | None = None) -> TissueMask:
    """Return the mask of an outline that a person drew.

    Parameters
    ----------
    slide : Slide
        Open, with a known mpp.
    outline : MultiPolygon
        Level-0 pixels.
    options : TissueOptions, optional
        Gives the resolution of the mask.
    """
    cell = mask_mpp(slide, options or TissueOptions()) / slide.mpp
    width, height = (max(1, math.ceil(side / cell - 1e-6)) for side in slide.size_px0)
    mask = fill_outline(outline, (cell, cell), (height, width))
    return TissueMask(mask, (cell, cell), slide.size_px0, slide.mpp)


def _clean(
    stained: NDArray[np.bool_],
    weak: NDArray[np.bool_],
    pen: NDArray[np.bool_],
    mpp: float,
    options: TissueOptions,
) -> NDArray[np.bool_]:
    """Close gaps and remove threads.

    Weakly stained cells count where they lie close together and touch tissue, as the thin membranes of fat do.
    """
    gap, thread = options.close_um / 2 / mpp, options.open_um / 2 / mpp
    closed = close_gaps(stained & ~pen, gap)
    sure = open_threads(closed, thread)
    meshes = open_threads(close_gaps(_meshes(weak & ~pen, sure, options.close_um / mpp), gap), 2 * thread)
    found = (sure | pieces_touching(meshes, sure)) & ~pen
    if not found.any():  # a single small biopsy may be no thicker than a thread
        least = LEAST_UM2 if options.min_area_um2 is None else min(options.min_area_um2, LEAST_UM2)
        found = drop_small(closed & ~pen, least / mpp**2, keep_largest=False)
    return found


def _meshes(weak: NDArray[np.bool_], sure: NDArray[np.bool_], window: float) -> NDArray[np.bool_]:
    """Return the weak cells that are not lone specks: a share of the glass around them is weakly stained too."""
    side = max(3, round(window))
    alone = weak & ~sure
    if not alone.any():
        return sure
    glass, stained = (window_sums(cells.view(np.uint8), side, most=1) for cells in (~sure, alone))
    return np.asarray(sure | (weak & (stained > MESH_SHARE * glass.astype(np.float32))))

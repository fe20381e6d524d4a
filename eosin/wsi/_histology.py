"""Paints imaginary tissue: where each compartment lies, and how much haematoxylin and eosin every pixel holds.

`lay_out` places tissue pieces, fat, glands, vessels, lymphoid aggregates and tumour on a coarse grid.
`paint` fills two stain maps: collagen fibres, fat cells, glands, vessels and cytoplasm at 1 µm per pixel, then every
nucleus as a small sprite at the resolution that is asked for. All lengths are µm unless a name says otherwise.

Tumour differs from normal tissue by form alone: larger, irregular, crowded nuclei of uneven chromatin, and less stroma.
Where a layout has striking tissue, tumour is not what stands out most: blood, necrosis and sheets of harmless cells do.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, spatial

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

LAYOUT_MPP = 4.0
"""µm per cell of a layout."""

FULL_DENSITY = 1.6
"""Amount of stain that 255 in a stain map stands for."""

PAINT_MPP = 1.0  # of everything but the nuclei
BUNDLES = ((0.42, 1.1, 5.0), (0.55, 3.0, 9.0), (0.72, 9.0, 15.0))  # share, width and length in table cells
MARGIN_PX = 128  # around the stain maps while nuclei are stamped: more than half of the largest sprite


@dataclass(frozen=True)
class Ring:
    """A gland or a vessel in cross-section: a wall around a lumen; its outline is r(θ) = radius (1 + Σ waves)."""

    centre: tuple[float, float]
    radius: float
    wall: float
    elongation: float
    angle: float
    waves: tuple[tuple[float, float], ...]
    is_vessel: bool

    @property
    def reach(self) -> float:
        """About the longest distance from the centre to the outline."""
        return self.radius * self.elongation * 1.08


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies.

    Attributes
    ----------
    size_um : (float, float)
        Width and height.
    tissue, fat, lymphoid, tumour : (h, w) float32
        Fields at `LAYOUT_MPP`, positive inside. `tissue` is roughly the depth below the surface in µm.
    rings : tuple of Ring
        Glands and vessels.
    blood, necrosis, sheets : (h, w) float32, optional
        Like the other fields: lakes of red cells, dead tissue with debris of nuclei, and crowded even cells.
    """

    size_um: tuple[float, float]
    tissue: Floats
    fat: Floats
    lymphoid: Floats
    tumour: Floats
    rings: tuple[Ring, ...]
    blood: Floats | None = None
    necrosis: Floats | None = None
    sheets: Floats | None = None

    def resized(self, field: Floats, mpp: float) -> Floats:
        """Return a field at another resolution."""
        width, height = (round(side / mpp) for side in self.size_um)
        return _resize(field, (height, width))


def lay_out(
    size_um: tuple[float, float], *, tumour_fraction: float, rng: np.random.Generator, striking: bool = False
) -> Layout:
    """Place the compartments of one slide.

    Parameters
    ----------
    size_um : (float, float)
        Width and height of the slide.
    tumour_fraction : float
        Part of the tissue area that tumour covers, fat included; exact to one cell of the layout.
    rng : Generator
        The same generator gives the same tissue with and without tumour; tumour only displaces fat and glands.
    striking : bool
        Whether there are also blood, necrosis and sheets of even cells, with and without tumour alike.
    """
    width, height = (round(side / LAYOUT_MPP) for side in size_um)
    tissue = _pieces(rng, (height, width))
    deep = np.minimum(tissue, 60) / 60
    fat = _noise(rng, tissue.shape, 260 / LAYOUT_MPP, octaves=2) - 1.3
    lymphoid = _spots(rng, tissue, count=int(rng.integers(1, 4)), radius=(45, 110))
    tumour = _nests(rng.spawn(1)[0], tissue, tumour_fraction)
    blocked = np.maximum(tumour, lymphoid)
    others = _striking(rng.spawn(1)[0], tissue, blocked) if striking else ()
    blocked = np.maximum.reduce([blocked, *others])
    fat = np.minimum(np.minimum(fat, deep - 0.3), -blocked).astype(np.float32)
    rings = _rings(rng, tissue, np.maximum(blocked, fat))
    return Layout(size_um, tissue, fat, lymphoid, tumour, rings, *others)


def _striking(rng: np.random.Generator, tissue: Floats, blocked: Floats) -> tuple[Floats, Floats, Floats]:
    """Return fields of blood, necrosis and sheets, clear of each other and of what is blocked."""
    fields: list[Floats] = []
    for _ in range(3):
        spots = _spots(rng, tissue, count=int(rng.integers(2, 4)), radius=(70, 150))
        fields.append(np.minimum(spots, -np.maximum.reduce([blocked, *fields])))
    sheets, necrosis, blood = fields  # the first has the most room
    return blood, necrosis, sheets


def _resize(field: Floats, shape: tuple[int, int]) -> Floats:
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float, *, octaves: int = 1) -> Floats:
    """Return smooth noise of about unit variance; `cell` is its grain in array elements."""
    total = np.zeros(shape, dtype=np.float32)
    for octave in range(octaves):
        size = max(cell / 2**octave, 1.0)
        knots = tuple(int(np.ceil(side / size)) + 4 for side in shape)
        field = Image.fromarray(rng.standard_normal(knots, dtype=np.float32))
        box = (1.0, 1.0, 1.0 + shape[1] / size, 1.0 + shape[0] / size)
        total += np.asarray(field.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)) * np.float32(1.4 / 2**octave)
    return np.asarray(total / np.float32(sum(4.0**-octave for octave in range(octaves)) ** 0.5))


def _plane(shape: tuple[int, int], mpp: float) -> tuple[Floats, Floats]:
    """Return x (1, w) and y (h, 1) of the cell centres in µm."""
    y, x = (np.arange(side, dtype=np.float32) * np.float32(mpp) + np.float32(mpp / 2) for side in shape)
    return x[None, :], y[:, None]


def _pieces(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Return the depth below the surface of two to four bent, ragged pieces."""
    x, y = _plane(shape, LAYOUT_MPP)
    extent = np.array(shape[::-1]) * LAYOUT_MPP
    depth = np.full(shape, -1e3, dtype=np.float32)
    for (cx, cy), reach in _separate_places(rng, extent, int(rng.integers(2, 5))):
        long, short = reach * rng.uniform(0.92, 1.08), reach * rng.uniform(0.5, 0.85)
        angle, bend = rng.uniform(0, np.pi), rng.uniform(-0.45, 0.45)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle) + bend * u * u / long
        depth = np.maximum(depth, short * (1 - np.hypot(u / long, v / short)))
    ragged = 34 * _noise(rng, shape, 190 / LAYOUT_MPP, octaves=3) + 3 * _noise(rng, shape, 2)
    edge = np.minimum(np.minimum(x, extent[0] - x), np.minimum(y, extent[1] - y)) - 25
    return np.asarray(np.minimum(depth + ragged, edge), dtype=np.float32)


def _separate_places(rng: np.random.Generator, extent: Doubles, count: int) -> list[tuple[tuple[float, float], float]]:
    """Return centres and radii of circles that keep apart; the last ones fill what room is left."""
    reach = 0.54 * float(np.sqrt(extent.prod() / count)) * rng.uniform(0.85, 1.0)
    best: list[tuple[tuple[float, float], float]] = []
    for _ in range(60):
        places: list[tuple[tuple[float, float], float]] = []
        for centre in 0.75 * reach + rng.random((40, 2)) * (extent - 1.5 * reach):
            gaps = [float(np.hypot(*(centre - other))) for other, _ in places]
            if len(places) < count and min(gaps, default=np.inf) > 1.6 * reach:
                places.append(((float(centre[0]), float(centre[1])), reach))
        best = max(best, places, key=len)
    return best


def _spots(rng: np.random.Generator, tissue: Floats, *, count: int, radius: tuple[float, float]) -> Floats:
    """Return a field of a few ragged round spots inside the tissue."""
    x, y = _plane(tissue.shape, LAYOUT_MPP)
    field = np.full(tissue.shape, -1.0, dtype=np.float32)
    for cx, cy in _points_inside(rng, tissue > 30, count):
        size = rng.uniform(*radius)
        field = np.maximum(field, 1 - np.hypot(x - cx, (y - cy) * rng.uniform(0.8, 1.25)) / size)
    wave = 0.22 * _noise(rng, tissue.shape, 60 / LAYOUT_MPP, octaves=2)
    return np.minimum(field + wave * (field > -1), tissue).astype(np.float32)


def _points_inside(rng: np.random.Generator, mask: Mask, count: int) -> Doubles:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros((0, 2))
    chosen = rng.integers(len(rows), size=count)
    return np.asarray((np.stack([columns[chosen], rows[chosen]], axis=1) + 0.5) * LAYOUT_MPP, dtype=np.float64)


def _nests(rng: np.random.Generator, tissue: Floats, fraction: float) -> Floats:
    """Return a field that is positive on exactly `fraction` of the tissue, in one to five nests."""
    count = 1 + int(rng.integers(0, 2 + round(15 * fraction)))
    x, y = _plane(tissue.shape, LAYOUT_MPP)
    field = np.full(tissue.shape, -np.inf, dtype=np.float32)
    for cx, cy in _points_inside(rng, tissue > 50, count):
        field = np.maximum(field, -np.hypot(x - cx, y - cy) / rng.uniform(70, 130))
    field = field + 0.45 * _noise(rng, tissue.shape, 110 / LAYOUT_MPP, octaves=3)
    cells = round(fraction * np.count_nonzero(tissue > 0))
    if not cells or not np.isfinite(field).any():
        return np.full(tissue.shape, -1.0, dtype=np.float32)
    inside = np.where(tissue > 12, field, -np.inf)
    level = np.partition(inside.ravel(), -cells - 1)[-cells - 1]
    return np.asarray(np.clip(inside - level, -1, None), dtype=np.float32)


def _rings(rng: np.random.Generator, tissue: Floats, blocked: Floats) -> tuple[Ring, ...]:
    """Return glands, crowded where a field is high, and scattered vessels, all clear of what is blocked."""
    width, height = (side * LAYOUT_MPP for side in tissue.shape[::-1])
    glandular = _noise(rng, tissue.shape, 420 / LAYOUT_MPP)
    room = np.where(blocked > 0, 0, 1)
    clear = np.minimum(ndimage.distance_transform_edt(room) * LAYOUT_MPP, tissue)
    rings: list[Ring] = []
    for x, y in _lattice(rng, (width, height), spacing=96, jitter=0.22):
        row, column = int(y / LAYOUT_MPP), int(x / LAYOUT_MPP)
        is_vessel = bool(rng.random() < 0.12)
        ring = _ring(rng, (float(x), float(y)), is_vessel=is_vessel)
        apart = all(np.hypot(x - o.centre[0], y - o.centre[1]) > 1.04 * (ring.reach + o.reach) for o in rings)
        if apart and clear[row, column] > 1.1 * ring.reach and (is_vessel or glandular[row, column] > 0.15):
            rings.append(ring)
    return tuple(rings)


def _ring(rng: np.random.Generator, centre: tuple[float, float], *, is_vessel: bool) -> Ring:
    radius = float(rng.uniform(14, 30) if is_vessel else rng.uniform(24, 52))
    wall = rng.uniform(4, 8) if is_vessel else min(rng.uniform(14, 21), 0.7 * radius)
    waves = [(float(rng.normal(0, 0.11 / k)), float(rng.uniform(0, 2 * np.pi))) for k in range(2, 6)]
    elongation, angle = float(rng.uniform(1, 1.7)), float(rng.uniform(0, np.pi))
    return Ring(centre, radius, float(wall), elongation, angle, tuple(waves), is_vessel)


def _lattice(rng: np.random.Generator, size_um: tuple[float, float], *, spacing: float, jitter: float) -> Doubles:
    """Return (n, 2) points on a shaken hexagonal lattice."""
    columns, rows = int(size_um[0] / spacing) + 1, int(size_um[1] / (spacing * 0.866)) + 1
    x, y = np.meshgrid(np.arange(columns, dtype=float), np.arange(rows, dtype=float))
    points = np.stack([(x + 0.5 * (y % 2)) * spacing, y * spacing * 0.866], axis=-1).reshape(-1, 2)
    points = points + rng.normal(0, jitter * spacing, points.shape)
    inside = (points >= 0).all(axis=1) & (points < np.array(size_um) - 1e-3).all(axis=1)
    return points[inside]


def paint(layout: Layout, mpp: float, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """Return the amounts of haematoxylin and eosin, (h, w) bytes of `FULL_DENSITY` / 255, at `mpp`."""
    ground = _Ground(layout, rng)
    width, height = (round(side / mpp) for side in layout.size_um)
    haematoxylin, eosin = (_to_bytes(_resize(field, (height, width))) for field in (ground.haematoxylin, ground.eosin))
    haematoxylin = np.pad(haematoxylin, MARGIN_PX)
    for kind, points, angles in ground.nuclei(rng):
        _stamp(haematoxylin, _sprites(rng, kind, mpp), points / mpp + MARGIN_PX, angles, rng)
    return np.ascontiguousarray(haematoxylin[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]), eosin


def _to_bytes(density: Floats) -> Bytes:
    return np.asarray(np.clip(density * np.float32(255 / FULL_DENSITY), 0, 255), dtype=np.uint8)


def _ramp(values: Floats, low: float, high: float) -> Floats:
    """Rise from 0 at `low` to 1 at `high`."""
    return np.asarray(np.clip((values - np.float32(low)) * np.float32(1 / (high - low)), 0, 1))


class _Ground:
    """Stain maps at `PAINT_MPP` without nuclei, and the masks that tell where nuclei go."""

    def __init__(self, layout: Layout, rng: np.random.Generator) -> None:
        self.layout = layout
        self.tissue, self.fat, self.lymphoid, self.tumour = (
            layout.resized(field, PAINT_MPP) for field in (layout.tissue, layout.fat, layout.lymphoid, layout.tumour)
        )
        self.shape: tuple[int, int] = self.tissue.shape
        self.flow, fibres = _fibres(rng, self.shape)
        self.eosin = fibres * (1 + np.float32(0.16) * _noise(rng, self.shape, 160, octaves=2))
        self.haematoxylin = np.full(self.shape, 0.05, dtype=np.float32)
        self.taken = np.zeros(self.shape, dtype=bool)
        self.gland_nuclei: list[tuple[NucleusKind, Doubles, Doubles]] = []
        grain = _noise(rng, self.shape, 3.0)
        self._paint_lymphoid(grain)
        self.cords = self._paint_tumour(rng, grain)
        nowhere = np.full(self.shape, -1, dtype=np.float32)
        self.blood, self.necrosis, self.sheets = (
            nowhere if field is None else layout.resized(field, PAINT_MPP)
            for field in (layout.blood, layout.necrosis, layout.sheets)
        )
        if layout.blood is not None:
            self._paint_striking(rng, grain)
        self._paint_fat(rng)
        for ring in layout.rings:
            self._paint_ring(ring, rng)
        self._trim(rng)

    def _blend(self, weight: Floats, eosin: Floats | float, haematoxylin: Floats | float) -> None:
        self.eosin += weight * (eosin - self.eosin)
        self.haematoxylin += weight * (haematoxylin - self.haematoxylin)

    def _paint_lymphoid(self, grain: Floats) -> None:
        self._blend(_ramp(self.lymphoid, 0.0, 0.25) * 0.8, 0.2 + 0.04 * grain, 0.14)

    def _paint_tumour(self, rng: np.random.Generator, grain: Floats) -> Floats:
        """Paint cords of tumour cells between thin septa of the stroma that was there; return the cords."""
        if not (self.tumour > 0).any():
            return np.full(self.shape, -1, dtype=np.float32)
        septa = np.abs(_noise(rng, self.shape, 75, octaves=2))
        cords = np.minimum(_ramp(self.tumour, 0.0, 0.05), _ramp(septa, 0.10, 0.17))
        cytoplasm = 0.36 + 0.05 * grain + 0.05 * _noise(rng, self.shape, 14)
        self._blend(cords, cytoplasm, 0.17 + 0.03 * grain)
        clefts = np.exp(-(((septa - 0.11) / 0.025) ** 2)) * _ramp(_noise(rng, self.shape, 40), 0.5, 0.9)
        self._blend(0.85 * clefts * (self.tumour > 0), 0.04, 0.02)
        return cords - np.float32(0.5)

    def _paint_striking(self, rng: np.random.Generator, grain: Floats) -> None:
        red_cells = np.abs(_noise(rng, self.shape, 7))
        self._blend(_ramp(self.blood, 0.0, 0.05), 0.55 + 0.3 * _ramp(red_cells, 0.1, 0.6), 0.02)
        self._blend(0.9 * _ramp(self.necrosis, 0.0, 0.15), 0.5 + 0.12 * grain, 0.12 + 0.05 * grain)
        self._blend(_ramp(self.sheets, 0.0, 0.05), 0.3 + 0.04 * grain, 0.15 + 0.02 * grain)

    def _paint_fat(self, rng: np.random.Generator) -> None:
        """Paint fat cells: the walls of a Voronoi diagram around shaken lattice points, at half resolution."""
        if not (self.fat > 0).any():
            return
        centres = _lattice(rng, self.layout.size_um, spacing=52, jitter=0.16)
        half = self.fat[::2, ::2]
        rows, columns = np.nonzero(half > -0.1)
        points = np.stack([columns, rows], axis=1) * 2 + 1.0
        near, _ = spatial.cKDTree(centres).query(points, k=2)
        wall = np.zeros(half.shape, dtype=np.float32)
        wall[rows, columns] = np.exp(-(((near[:, 1] - near[:, 0]) / 2.4) ** 2))
        wall = _resize(wall, self.shape)
        self._blend(_ramp(self.fat, 0.0, 0.02), 0.42 * wall, 0.05 * wall)

    def _paint_ring(self, ring: Ring, rng: np.random.Generator) -> None:
        reach = int(1.4 * ring.reach) + 6
        column, row = (int(value) for value in ring.centre)
        bottom, right = min(row + reach, self.shape[0]), min(column + reach, self.shape[1])
        window = np.s_[max(row - reach, 0) : bottom, max(column - reach, 0) : right]
        y, x = np.ogrid[window]
        depth = _ring_depth(ring, x + 0.5, y + 0.5)
        inside, lumen = _ramp(depth, -0.5, 0.5), _ramp(depth, ring.wall - 1, ring.wall + 1)
        grain = _noise(rng, depth.shape, 4)
        eosin, haematoxylin = self.eosin[window], self.haematoxylin[window]
        if ring.is_vessel:
            wall_eosin, wall_haematoxylin = 0.62 + 0.05 * grain, np.full_like(depth, 0.06)
            filling = _red_cells(rng, depth.shape)
        else:
            apical = _ramp(depth, 0.45 * ring.wall, ring.wall)
            wall_eosin = 0.30 + 0.14 * apical + 0.04 * grain
            wall_haematoxylin = 0.14 - 0.06 * apical
            filling = np.full_like(depth, 0.10 if ring.radius % 1 < 0.4 else 0.0) * (1 + 0.3 * grain)
        membrane = np.exp(-((depth / 1.6) ** 2)) * 0.25
        eosin += inside * (wall_eosin + lumen * (filling - wall_eosin) - eosin) + membrane
        haematoxylin += inside * (wall_haematoxylin * (1 - lumen) - haematoxylin)
        self.taken[window] |= depth > -4
        self._line_with_nuclei(ring, rng)

    def _line_with_nuclei(self, ring: Ring, rng: np.random.Generator) -> None:
        kind = ENDOTHELIAL if ring.is_vessel else EPITHELIAL
        theta, points = _outline(ring, inset=ring.wall * (0.5 if ring.is_vessel else 0.36))
        step = np.hypot(*np.diff(points, axis=0, append=points[:1]).T)
        gaps = 15.0 if ring.is_vessel else 6.2
        count = max(int(step.sum() / gaps), 3)
        along = (np.arange(count) + rng.uniform(-0.22, 0.22, count)) * step.sum() / count
        index = np.searchsorted(np.cumsum(step), along).clip(0, len(theta) - 1)
        centre = points.mean(axis=0)
        outward = np.arctan2(*(points[index] - centre).T[::-1])
        turn = np.pi / 2 if ring.is_vessel else 0.0
        shaken = points[index] + rng.normal(0, 0.9, (count, 2))
        self.gland_nuclei.append((kind, shaken, outward + turn + rng.normal(0, 0.2, count)))

    def _trim(self, rng: np.random.Generator) -> None:
        """Leave nothing outside the tissue, and fray its surface."""
        surface = _ramp(self.tissue + 1.8 * _noise(rng, self.shape, 8), -1, 2)
        self.eosin = np.clip(self.eosin, 0, None) * surface
        self.haematoxylin = np.clip(self.haematoxylin, 0, None) * surface

    def nuclei(self, rng: np.random.Generator) -> "list[tuple[NucleusKind, Doubles, Doubles]]":
        """Return kind, centres (n, 2) x, y in µm and long-axis angles (n,) of all nuclei."""
        solid = (self.tissue > 4) & ~self.taken
        in_cords, in_lymphoid, in_fat = self.cords > 0, self.lymphoid > 0.06, self.fat > 0
        striking = np.maximum.reduce([self.blood, self.necrosis, self.sheets]) > 0
        stroma = solid & ~in_fat & ~in_cords & ~in_lymphoid & ~striking & (self.eosin > 0.22)
        cells = [
            self._scatter(rng, FIBROBLAST, stroma, spacing=30, keep=0.8),
            self._scatter(rng, LYMPHOCYTE, stroma, spacing=46, keep=0.5),
            self._scatter(rng, FIBROBLAST, solid & in_fat & (self.eosin > 0.25), spacing=16, keep=0.35),
            self._scatter(rng, LYMPHOCYTE, solid & in_lymphoid & ~in_cords, spacing=7.7, keep=0.9),
            self._scatter(rng, TUMOUR, solid & in_cords, spacing=12.5, keep=0.96),
        ]
        if striking.any():
            cells += [
                self._scatter(rng, DEBRIS, solid & (self.necrosis > 0), spacing=8.5, keep=0.55),
                self._scatter(rng, EPITHELIAL, solid & (self.sheets > 0), spacing=9.0, keep=0.95),
            ]
        return [*cells, *self._gland_nuclei_by_kind()]

    def _scatter(
        self, rng: np.random.Generator, kind: "NucleusKind", mask: Mask, *, spacing: float, keep: float
    ) -> "tuple[NucleusKind, Doubles, Doubles]":
        points = _lattice(rng, self.layout.size_um, spacing=spacing, jitter=0.28)
        columns, rows = (points / PAINT_MPP).astype(int).T.clip(0, np.array(self.shape[::-1])[:, None] - 1)
        chosen = mask[rows, columns] & (rng.random(len(points)) < keep)
        angles = self.flow[rows[chosen], columns[chosen]] + rng.normal(0, 0.18, np.count_nonzero(chosen))
        return kind, points[chosen], angles

    def _gland_nuclei_by_kind(self) -> "list[tuple[NucleusKind, Doubles, Doubles]]":
        merged = []
        for kind in (EPITHELIAL, ENDOTHELIAL):
            own = [(points, angles) for other, points, angles in self.gland_nuclei if other is kind]
            if own:
                merged.append((kind, *(np.concatenate(part) for part in zip(*own, strict=True))))
        return merged  # type: ignore[return-value]


def _fibres(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Floats, Floats]:
    """Return the direction (radians) and the eosin of wavy collagen bundles with clefts between them.

    A table of anisotropic noise is looked up along warped coordinates: its rows run across the bundles, its columns
    along them, so that bundles follow the level lines of the first coordinate.
    """
    table = np.sum([share * _stripes(rng, width, length) for share, width, length in BUNDLES], axis=0)
    x, y = _plane(shape, PAINT_MPP)
    angle = rng.uniform(0, np.pi)
    across = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    across = across + 110 * _noise(rng, shape, 420) + 13 * _noise(rng, shape, 80) + 2.0 * _noise(rng, shape, 16)
    along = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)) + 40 * _noise(rng, shape, 200)
    rows = (across * np.float32(1 / 0.8)).astype(np.int32) & 1023
    columns = (along * np.float32(1 / 3.5)).astype(np.int32) & 511
    wave = ndimage.uniform_filter(table.ravel()[rows * 512 + columns], 2)
    slope_y, slope_x = np.gradient(across[::4, ::4])
    flow = np.arctan2(slope_y, slope_x) + np.pi / 2
    flow = flow.repeat(4, axis=0).repeat(4, axis=1)[: shape[0], : shape[1]]
    return flow.astype(np.float32), (0.40 + 0.09 * wave) * (0.10 + 0.90 * _ramp(wave, -1.7, -1.0))


def _red_cells(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Return the eosin of loosely packed red blood cells, paler in their middle."""
    height, width = shape
    centres = _lattice(rng, (width * PAINT_MPP, height * PAINT_MPP), spacing=8.0, jitter=0.14)
    centres = centres[rng.random(len(centres)) < 0.7]
    y, x = np.mgrid[:height, :width] * PAINT_MPP + PAINT_MPP / 2
    distance, _ = spatial.cKDTree(centres).query(np.stack([x, y], axis=-1))
    return np.asarray(_ramp(distance, 3.9, 2.9) * (0.62 + 0.05 * distance), dtype=np.float32)


def _stripes(rng: np.random.Generator, across: float, along: float) -> Floats:
    noise = rng.standard_normal((1024, 512), dtype=np.float32)
    stripes = ndimage.gaussian_filter(noise, (across, along), mode="wrap")
    return np.asarray(stripes / stripes.std())


def _ring_depth(ring: Ring, x: Doubles, y: Doubles) -> Floats:
    """Return the depth below the outline at each point, in units of the ring's short axis."""
    dx, dy = x - ring.centre[0], y - ring.centre[1]
    u = (dx * np.cos(ring.angle) + dy * np.sin(ring.angle)) / ring.elongation
    v = dy * np.cos(ring.angle) - dx * np.sin(ring.angle)
    return np.asarray(_ring_radius(ring, np.arctan2(v, u)) - np.hypot(u, v), dtype=np.float32)


def _ring_radius(ring: Ring, theta: Doubles) -> Doubles:
    waves = sum(size * np.cos(k * theta + phase) for k, (size, phase) in enumerate(ring.waves, start=2))
    return np.asarray(ring.radius * (1 + waves))


def _outline(ring: Ring, *, inset: float) -> tuple[Doubles, Doubles]:
    """Return angles (256,) and points (256, 2) on the closed curve that lies `inset` inside the outline."""
    theta = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    radius = _ring_radius(ring, theta) - inset
    u, v = radius * np.cos(theta) * ring.elongation, radius * np.sin(theta)
    x = u * np.cos(ring.angle) - v * np.sin(ring.angle) + ring.centre[0]
    y = u * np.sin(ring.angle) + v * np.cos(ring.angle) + ring.centre[1]
    return theta, np.stack([x, y], axis=1)


@dataclass(frozen=True)
class NucleusKind:
    """Shape of one cell type's nuclei.

    Attributes
    ----------
    length, aspect : float
        Long axis in µm, short over long axis.
    size_spread, aspect_spread, roughness : float
        Relative spread of the size, spread of the aspect, amplitude of the outline's waves.
    density, chromatin, nucleoli : float
        Mean amount of stain, relative unevenness, strength of the nucleolus.
    """

    length: float
    aspect: float
    size_spread: float
    aspect_spread: float
    roughness: float
    density: float
    chromatin: float
    nucleoli: float = 0.0

    @property
    def is_round(self) -> bool:
        """Whether its direction does not matter."""
        return self.aspect > 0.7


FIBROBLAST = NucleusKind(15.0, 0.24, 0.20, 0.06, 0.05, 0.78, 0.12)
ENDOTHELIAL = NucleusKind(11.0, 0.33, 0.15, 0.06, 0.04, 0.78, 0.12)
LYMPHOCYTE = NucleusKind(6.6, 0.92, 0.09, 0.05, 0.03, 0.92, 0.20)
EPITHELIAL = NucleusKind(9.6, 0.60, 0.10, 0.06, 0.04, 0.66, 0.22)
DEBRIS = NucleusKind(3.4, 0.85, 0.40, 0.10, 0.14, 0.95, 0.10)
TUMOUR = NucleusKind(13.5, 0.76, 0.24, 0.12, 0.14, 0.72, 0.34, 0.5)


def _sprites(rng: np.random.Generator, kind: NucleusKind, mpp: float) -> Bytes:
    """Return (A, K, s, s) bytes: K individual nuclei of a kind, each turned to A angles over half a turn."""
    turns, count = (1, 96) if kind.is_round else (12, 16)
    half = int(np.ceil(kind.length * (0.5 + 1.2 * kind.size_spread) * (1 + 2 * kind.roughness) / mpp)) + 1
    axis = (np.arange(-half, half + 1) * mpp).astype(np.float32)
    angle = np.arange(turns) * np.pi / turns + (
        rng.uniform(0, np.pi, (count, 1)) if kind.is_round else np.zeros((count, 1))
    )
    angle = angle.T[..., None, None].astype(np.float32)  # (A, K, 1, 1)
    x, y = axis[None, :], axis[:, None]
    length = (kind.length / 2 * (1 + kind.size_spread * _bounded(rng, count))).astype(np.float32)[:, None, None]
    aspect = (kind.aspect + kind.aspect_spread * _bounded(rng, count)).astype(np.float32)[:, None, None]
    u = x * np.cos(angle) + y * np.sin(angle)
    v = (y * np.cos(angle) - x * np.sin(angle)) / aspect
    radius = np.hypot(u, v)
    theta = np.arctan2(v, u)
    edge = length * (1 + sum(_wave(rng, count, theta, k, kind.roughness) for k in (2, 3, 5)))
    depth = (edge - radius) * np.sqrt(aspect)
    return _to_bytes(_ramp(depth, -0.5, 0.7) * _chromatin(rng, kind, depth, edge, mpp))


def _bounded(rng: np.random.Generator, count: int) -> Doubles:
    return np.clip(rng.standard_normal(count), -1.6, 1.9)


def _wave(rng: np.random.Generator, count: int, theta: Floats, k: int, size: float) -> Floats:
    height = np.clip(size * 1.4 / k * rng.standard_normal(count), -0.3, 0.3)
    phase = rng.uniform(0, 2 * np.pi, count)
    waves = np.cos(k * theta + phase.astype(np.float32)[:, None, None])
    return np.asarray(height.astype(np.float32)[:, None, None] * waves)


def _chromatin(rng: np.random.Generator, kind: NucleusKind, depth: Floats, edge: Floats, mpp: float) -> Floats:
    """Return the amount of stain inside the nuclei: clumps, a darker membrane, a nucleolus; uneven between nuclei."""
    count = depth.shape[1]
    clumps = rng.standard_normal((count, *depth.shape[2:]), dtype=np.float32)
    clumps = ndimage.gaussian_filter(clumps, (0, 0.7 / mpp, 0.7 / mpp))
    clumps /= clumps.std() + np.float32(1e-6)
    membrane = np.exp(-(((depth - 0.6) / 0.6) ** 2))
    nucleolus = np.exp(-(((depth - 0.62 * edge) / 1.1) ** 2)) * kind.nucleoli * (clumps > -0.2)
    shade = np.clip(1 + 0.5 * kind.chromatin * rng.standard_normal(count), 0.6, 1.5).astype(np.float32)
    uneven = 1 + kind.chromatin * (0.5 * clumps + 0.42 * membrane) + nucleolus
    return np.asarray(kind.density * shade[:, None, None] * uneven)


def _stamp(canvas: Bytes, sprites: Bytes, points_px: Doubles, angles: Doubles, rng: np.random.Generator) -> None:
    """Put a random sprite of the nearest angle on each point; the darker of sprite and ground stays."""
    turns, count, side, _ = sprites.shape
    corners = (points_px - side / 2 + 0.5).astype(int).tolist()
    turn = (np.round(angles / np.pi * turns).astype(int) % turns).tolist()
    which = rng.integers(count, size=len(corners)).tolist()
    for (x, y), a, k in zip(corners, turn, which, strict=True):
        ground = canvas[y : y + side, x : x + side]
        np.maximum(ground, sprites[a, k], out=ground)

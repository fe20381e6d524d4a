"""Where the levels of a pyramid really lie: each is matched against the level above it.

Sizes and tags say how much smaller a level is, and both can be wrong: levels are padded to whole tiles, or hold another
picture. So small textured pieces of each level are looked for in the finer one. Pieces are compared by their detail (a
band of a few pixels), as any two pictures of tissue agree in what is coarser.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eosin.errors import SlideError
from eosin.wsi._slide import Slide
from eosin.wsi.inventory import CONVERT

PIECE_PX = 64
CELL_PX = 32
MARGIN_PX = 8
FRAME_PX = 8
WIDE_PX = 160
SURVEY_PX = 768
MAX_SPOTS = 36
SAMPLES = 7
STRIDE = 18  # has no factor in common with 49: every place once, neighbours far apart in time
ENOUGH_SPOTS = 2
LEAST_DETAIL = 1.0
SAME = 0.55
SAME_ALONE = 0.8
CLOSE_PX = 1.5
DOUBT_PX = 0.25
NEAR_PX = 1
NEARLY = 0.9
Point = tuple[float, float]
Grey = NDArray[np.float32]


@dataclass(frozen=True)
class Lie:
    """How a level lies in a finer one: pixels of the finer are ``scale * pixel + offset``."""

    scale: float
    offset: Point = (0.0, 0.0)


@dataclass(frozen=True)
class Match:
    """Where a piece of a level was found.

    Parameters
    ----------
    centre : tuple of float
        Of the piece, pixels of its level.
    off : tuple of float
        How far from the expected place it was found, pixels of its level.
    score : float
        Correlation of detail, at most 1.
    """

    centre: Point
    off: Point
    score: float


def check_levels(slide: Slide) -> None:
    """Measure the levels of a slide.

    A level that lies where sizes and tags say, to 1.5 of its own pixels, stays as it is. One that lies elsewhere gets
    the scale and offset that were measured. One that shows something else is left out when the file does not call it a
    copy of the slide.

    Parameters
    ----------
    slide : Slide
        Open; `downsamples`, `offsets_px0`, `residual_px0` and `notes` are set.

    Raises
    ------
    SlideError
        Code ``bad-pyramid`` if a level that the file calls a copy of the slide is not found in the finer one.
    """
    last = len(slide.level_sizes) - 1
    spots = _spots(slide, last) if last else []
    # from fine to coarse, each in the last level that was found: errors do not add up over the pyramid
    residuals, foreign, hidden, moved, finer = [], [], [], [], 0
    for level in range(1, last + 1):
        plain = _is_plain(slide, finer, level)
        # two pieces tell a scale from an offset; of codecs that take 10 ms a tile one must do where nothing is odd
        most = 2 if slide.can_shrink(level, 2) or not plain else 1
        pieces = _pieces(slide, level, spots, most)
        if not pieces and not plain:
            pieces = _pieces(slide, level, _spots(slide, level), most)  # padding moves what the coarsest level shows
        lie = _expected(slide, finer, level)
        off = _distance(list(_matches(slide, finer, pieces, lie, MARGIN_PX)))
        if not pieces and not plain:
            hidden.append(level)  # nothing to see there, so nothing is lost without it
            continue
        if off > CLOSE_PX:
            found = _search(slide, finer, level, pieces)
            if found is None:
                foreign.append(level)
                continue
            lie, off = found
            moved.append(level)
        elif off > DOUBT_PX:
            lie, off = _resized(slide, finer, level, pieces, (lie, off))
        _use(slide, finer, level, lie)
        if pieces:
            residuals.append(off * slide.downsamples[level])
        finer = level
    slide.residual_px0 = max(residuals, default=None)
    if moved:
        scales = ", ".join(f"{slide.downsamples[level]:.5g}" for level in moved)
        slide.notes.append(
            f"the scales of the levels differ from their sizes; the scales {scales} were measured and used"
        )
    _leave_out(slide, foreign, hidden)


def _leave_out(slide: Slide, foreign: Sequence[int], hidden: Sequence[int]) -> None:
    wrong = [level for level in foreign if slide.declared[level]]
    if wrong:
        raise SlideError(
            slide.path,
            f"level {wrong[0]} of its pyramid shows another picture than the finer level; "
            + CONVERT.format(name=slide.path.name),
            code="bad-pyramid",
        )
    if foreign or hidden:
        slide.keep_levels([level for level in range(len(slide.level_sizes)) if level not in {*foreign, *hidden}])
    if foreign:
        slide.notes.append("images with the slide's shape but another content were left out")


def _distance(matches: Sequence[Match]) -> float:
    """Return how far from their places pieces were found, pixels of their level; infinite when one was not found."""
    if not all(match.score >= SAME for match in matches):
        return float("inf")
    return max((max(abs(value) for value in match.off) for match in matches), default=0.0)


def _expected(slide: Slide, finer: int, level: int) -> Lie:
    unit = slide.downsamples[finer]
    x, y = (
        (below - above) / unit for below, above in zip(slide.offsets_px0[level], slide.offsets_px0[finer], strict=True)
    )
    return Lie(slide.downsamples[level] / unit, (x, y))


def _resized(
    slide: Slide, finer: int, level: int, pieces: Sequence[tuple[Point, Grey]], plain: tuple[Lie, float]
) -> tuple[Lie, float]:
    """Return the better of a whole ratio and the ratio of the sides: some writers fit a level to rounded sides."""
    sides = zip(slide.level_sizes[finer], slide.level_sizes[level], strict=True)
    lie = Lie(float(np.mean([above / below for above, below in sides])))
    off = _distance(list(_matches(slide, finer, pieces, lie, MARGIN_PX)))
    return (lie, off) if off < plain[1] / 2 else plain


def _use(slide: Slide, finer: int, level: int, lie: Lie) -> None:
    unit = slide.downsamples[finer]
    slide.downsamples[level] = unit * lie.scale
    x, y = (above + unit * value for above, value in zip(slide.offsets_px0[finer], lie.offset, strict=True))
    slide.offsets_px0[level] = (x, y)


def _is_plain(slide: Slide, finer: int, level: int) -> bool:
    """Return whether one factor explains both sides of a level to the pixel, and the file states no other."""
    stated = slide.downsamples[level] / slide.downsamples[finer]
    sides = zip(slide.level_sizes[finer], slide.level_sizes[level], strict=True)
    return all(abs(above / stated - below) <= 1 for above, below in sides)


def _spots(slide: Slide, level: int) -> list[Point]:
    """Return places with detail on a level, most first, as shares of its sides."""
    sides = slide.level_sizes[level]
    shrink = next((factor for factor in (1, 2, 4, 8) if max(sides) <= SURVEY_PX * factor), 0)
    if not shrink or not slide.can_shrink(level, shrink):
        return list(_sampled_spots(slide, level))
    size = (-(-sides[0] // shrink), -(-sides[1] // shrink))
    detail = _cells(np.asarray(slide.read_shrunk(level, (0, 0), size, shrink)[..., 1], np.float32))
    order = np.argsort(-detail, axis=None)[:MAX_SPOTS]
    rows, columns = np.unravel_index(order, detail.shape)
    seen = detail.flat[order] >= LEAST_DETAIL
    centres = (np.stack([columns, rows], axis=-1) + 0.5)[seen] * CELL_PX
    shares = np.minimum(centres / size, 1.0)
    return [(float(x), float(y)) for x, y in shares]


def _sampled_spots(slide: Slide, level: int) -> Iterator[Point]:
    """Yield places with detail on a level that would take long to read whole: the first found on a lattice."""
    found = 0
    for number in range(SAMPLES * SAMPLES):
        row, column = divmod(number * STRIDE % (SAMPLES * SAMPLES), SAMPLES)
        share = ((2 * column + 1) / (2 * SAMPLES), (2 * row + 1) / (2 * SAMPLES))
        corner = [int(part * side) - PIECE_PX // 2 for part, side in zip(share, slide.level_sizes[level], strict=True)]
        if _cells(_grey(slide, level, (corner[0], corner[1]), (PIECE_PX, PIECE_PX))).max() >= LEAST_DETAIL:
            found += 1
            yield share
        if found == ENOUGH_SPOTS:
            return


def _cells(grey: Grey) -> NDArray[np.floating]:
    """Return how fast each cell of a picture changes in the direction in which it changes least, grey levels per px.

    Along a straight edge a piece can be moved without a change, so an edge does not say where a level lies.
    """
    smooth = (grey[:-1, :-1] + grey[1:, :-1] + grey[:-1, 1:] + grey[1:, 1:]) / 4  # JPEG's noise is not detail
    across, down = np.diff(smooth, axis=1)[:-1], np.diff(smooth, axis=0)[:, :-1]
    height, width = (max(1, extent // CELL_PX) for extent in across.shape)
    rows, columns = min(CELL_PX, across.shape[0]), min(CELL_PX, across.shape[1])

    products = np.stack([across * across, down * down, across * down])[:, : height * rows, : width * columns]
    xx, yy, xy = products.reshape(3, height, rows, width, columns).mean(axis=(2, 4))
    return np.asarray(np.sqrt(((xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)).clip(0)))


def _pieces(slide: Slide, level: int, spots: Sequence[Point], most: int) -> list[tuple[Point, Grey]]:
    """Return one or two pieces of a level with their centres: the one with most detail, and one far from it."""
    sides = slide.level_sizes[level]
    size = (min(PIECE_PX, sides[0]), min(PIECE_PX, sides[1]))
    found: list[tuple[Point, Grey]] = []
    for spot in _spread(spots):
        x, y = (
            int(np.clip(share * side - extent / 2, 0, side - extent))
            for share, side, extent in zip(spot, sides, size, strict=True)
        )
        grey = _grey(slide, level, (x - FRAME_PX, y - FRAME_PX), (size[0] + 2 * FRAME_PX, size[1] + 2 * FRAME_PX))
        inside = (slice(FRAME_PX, FRAME_PX + size[1]), slice(FRAME_PX, FRAME_PX + size[0]))
        if _cells(grey[inside]).max() >= LEAST_DETAIL:
            found.append(((x + size[0] / 2, y + size[1] / 2), _detail(grey)[inside]))
        if len(found) == most:
            break
    return found


def _spread(spots: Sequence[Point]) -> Iterator[Point]:
    """Yield the first spot, then the others, those far from it first: only far pieces show a wrong scale."""
    yield from spots[:1]
    yield from sorted(spots[1:], key=lambda spot: -np.hypot(spot[0] - spots[0][0], spot[1] - spots[0][1]))[:4]


def _grey(slide: Slide, level: int, corner: tuple[int, int], size: tuple[int, int]) -> Grey:
    return np.asarray(slide.read_level(level, corner, size)[..., 1], np.float32)


def _detail(grey: Grey) -> Grey:
    """Return what is coarser than 2 px and finer than about 16."""
    smooth = _smooth(grey, 2)
    return np.asarray(smooth - _smooth(smooth, 17), np.float32)


def _matches(slide: Slide, finer: int, pieces: Sequence[tuple[Point, Grey]], lie: Lie, margin: int) -> Iterator[Match]:
    """Yield where each piece is found within a margin (pixels of its level) around where it is expected."""
    for centre, piece in pieces:
        x, y = (value * lie.scale + start for value, start in zip(centre, lie.offset, strict=True))
        sides = (piece.shape[1] + 2 * margin, piece.shape[0] + 2 * margin)
        around = _detail(_scaled(slide, finer, (x, y), sides, lie.scale))
        off, score = _find(piece, around)
        yield Match(centre, off, score)


def _scaled(slide: Slide, level: int, centre: Point, sides: tuple[int, int], scale: float) -> Grey:
    """Return a region of a level around a point that has `sides` pixels once it is made smaller by `scale`."""
    # the decoder's own reduction reads a sixteenth of the data at a ratio of four
    shrink = next((factor for factor in (8, 4, 2) if factor <= scale + 1e-9 and slide.can_shrink(level, factor)), 1)
    extent = [side * scale / shrink for side in sides]
    corner = [value / shrink - length / 2 for value, length in zip(centre, extent, strict=True)]
    x, y = (int(np.floor(value)) for value in corner)
    size = (int(np.ceil(extent[0])) + 1, int(np.ceil(extent[1])) + 1)
    pixels = slide.read_shrunk(level, (x, y), size, shrink)[..., 1]
    box = (corner[0] - x, corner[1] - y, corner[0] - x + extent[0], corner[1] - y + extent[1])
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize(sides, Image.Resampling.HAMMING, box=box), np.float32)


def _sums(picture: Grey, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the sum over every window of a shape that lies within a picture."""
    rows, columns = shape
    sums = np.pad(picture.cumsum(0, np.float64).cumsum(1), ((1, 0), (1, 0)))
    return np.asarray(sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns])


def _smooth(picture: Grey, width: int) -> Grey:
    """Return means over squares; written out, as loading scipy would take longer than a slide."""
    before = width // 2
    padded = np.pad(picture, (before, width - 1 - before), "edge")
    return np.asarray(_sums(padded, (width, width)) / width**2, np.float32)


def _find(piece: Grey, around: Grey) -> tuple[Point, float]:
    """Return how far the piece lies off the middle of `around`, and the correlation there."""
    height, width = (full - part + 1 for full, part in zip(around.shape, piece.shape, strict=True))
    product = np.fft.irfft2(np.fft.rfft2(around) * np.fft.rfft2(piece, around.shape).conj(), around.shape)[
        :height, :width
    ]
    energy = _sums(around**2, piece.shape)
    # detail has no mean, so the cosine of two pieces is their correlation
    scores = product / (np.linalg.norm(piece) * np.sqrt(energy.clip(1.0)))
    middle = scores[height // 2 - NEAR_PX : height // 2 + NEAR_PX + 1, width // 2 - NEAR_PX : width // 2 + NEAR_PX + 1]
    if middle.max() >= NEARLY * scores.max():  # what repeats itself fits in many places; the expected one counts
        row, column = (
            int(at) + extent // 2 - NEAR_PX
            for at, extent in zip(np.unravel_index(int(middle.argmax()), middle.shape), (height, width), strict=True)
        )
    else:
        row, column = (int(at) for at in np.unravel_index(int(scores.argmax()), scores.shape))
    x, y = _between(scores[row, :], int(column)), _between(scores[:, column], int(row))
    return (x - (scores.shape[1] - 1) / 2, y - (scores.shape[0] - 1) / 2), float(scores[row, column])


def _between(scores: NDArray[np.floating], peak: int) -> float:
    """Return the place of the peak between samples, from a parabola through three of them."""
    if not 0 < peak < len(scores) - 1:
        return float(peak)
    before, at, after = (float(score) for score in scores[peak - 1 : peak + 2])
    bend = before - 2 * at + after
    return peak + (0.5 * (before - after) / bend if bend < 0 else 0.0)


def _search(slide: Slide, finer: int, level: int, pieces: Sequence[tuple[Point, Grey]]) -> tuple[Lie, float] | None:
    """Look for a level at every likely scale, near first, then far; return how it lies and what is left, or None."""
    for margin in (MARGIN_PX, WIDE_PX):
        for scale in _scales(slide, finer, level):
            lie = _fit(list(_matches(slide, finer, pieces, Lie(scale), margin)), scale)
            off = _distance(list(_matches(slide, finer, pieces, lie, MARGIN_PX))) if lie else float("inf")
            if lie and off <= CLOSE_PX:
                return lie, off
    return None


def _scales(slide: Slide, finer: int, level: int) -> list[float]:
    """Return likely scales of a level: what is stated, whole numbers that padding allows, ratios of the sides."""
    stated = slide.downsamples[level] / slide.downsamples[finer]
    across, down = (
        above / below for above, below in zip(slide.level_sizes[finer], slide.level_sizes[level], strict=True)
    )
    least = max(across, down)  # padding makes a level larger, and so its own ratios smaller than the true one
    whole = [float(number) for number in range(max(1, int(least + 0.98)), int(2 * least) + 2)]
    return list(dict.fromkeys([stated, *whole, across, down, (across + down) / 2]))


def _fit(matches: Sequence[Match], scale: float) -> Lie | None:
    """Return scale and offset that explain where pieces were found; None unless every one was found for certain."""
    least = SAME if len(matches) > 1 else SAME_ALONE
    if not matches or any(match.score < least for match in matches):
        return None
    centres = np.array([match.centre for match in matches])
    found = scale * (centres + [match.off for match in matches])
    apart = np.ptp(centres, axis=0).max()
    if apart:
        spread, moved = centres - centres.mean(axis=0), found - found.mean(axis=0)
        measured = float((spread * moved).sum() / (spread**2).sum())
        if abs(measured / scale - 1) * apart > 1:  # else the likely number is the true one, to the pixel
            scale = measured
    x, y = (found - scale * centres).mean(axis=0)
    return Lie(scale) if max(abs(x), abs(y)) < scale else Lie(scale, (float(x), float(y)))

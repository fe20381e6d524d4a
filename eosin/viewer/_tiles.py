"""Deep-zoom tiles of a slide as JPEG: which piece a number names, and a bounded store of those made already."""

import io
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eosin.errors import SlideError
from eosin.heatmaps._colour import pale_grey
from eosin.wsi._cache import SegmentCache
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile

logger = logging.getLogger(__name__)

TILE_PX = 512
JPEG_QUALITY = 85
CACHE_BYTES = 128 * 2**20
MAX_OPEN = 16
LOOKS = ("colour", "grey")
NO_PIXELS = (214, 214, 214)


@dataclass(frozen=True)
class TilePyramid:
    """The square of tiles that a slide lies in, its corner at the square's upper left.

    At zoom 0 one tile holds the whole slide; each further zoom halves µm per pixel, and the last has the slide's own.

    Parameters
    ----------
    size_px0 : (w, h)
    mpp : float
        Of level 0.
    """

    size_px0: tuple[int, int]
    mpp: float

    @property
    def max_zoom(self) -> int:
        """The zoom with the slide's own resolution."""
        return max(0, (max(self.size_px0) - 1).bit_length() - (TILE_PX - 1).bit_length())

    @property
    def side_um(self) -> float:
        """Side of the square in µm."""
        return float((TILE_PX << self.max_zoom) * self.mpp)

    def is_tile(self, zoom: int, column: int, row: int) -> bool:
        """Whether such a tile exists in the square, on the slide or beside it."""
        return 0 <= zoom <= self.max_zoom and 0 <= column < 2**zoom and 0 <= row < 2**zoom

    def shows_slide(self, zoom: int, column: int, row: int) -> bool:
        """Whether any pixel of the slide lies in the tile."""
        step = TILE_PX << (self.max_zoom - zoom)
        return column * step < self.size_px0[0] and row * step < self.size_px0[1]

    def read(self, slide: Slide, zoom: int, column: int, row: int) -> NDArray[np.uint8]:
        """Return the pixels of a tile, (512, 512, 3) RGB; background beyond the slide's edge."""
        shrink = 1 << (self.max_zoom - zoom)
        step = TILE_PX * shrink
        return slide.read((column * step, row * step), (TILE_PX, TILE_PX), self.mpp * shrink)


def encode_jpeg(rgb: NDArray[np.uint8]) -> bytes:
    """Return a picture (h, w, 3) as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def to_grey(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pale grey picture that maps lie on, so that every colour over it belongs to the map."""
    return np.repeat(pale_grey(rgb).round().astype(np.uint8), 3, axis=2)


@cache
def blank_png() -> bytes:
    """Return one transparent pixel: what lies beside the slide."""
    buffer = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class _Handle:
    slide: Slide
    users: int = 0
    is_dropped: bool = False


class OpenSlides:
    """The slides that are open: opened when first asked for, the longest unused closed when there are too many.

    Parameters
    ----------
    files : mapping of str to SlideFile
        By the key that the outside knows; nothing else is ever opened.
    max_open : int
    """

    def __init__(self, files: Mapping[str, SlideFile], *, max_open: int = MAX_OPEN) -> None:
        self._files = dict(files)
        self._max_open = max_open
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, _Handle] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        """Whether a slide has this key."""
        return key in self._files

    @contextmanager
    def borrow(self, key: str) -> Iterator[Slide]:
        """Lend an open slide; it stays open at least as long as the block runs.

        Raises
        ------
        SlideError
            If it cannot be opened any more.
        """
        with self._lock:
            handle = self._handles.get(key) or self._open(key)
            self._handles.move_to_end(key)
            handle.users += 1
            self._drop_surplus()
        try:
            yield handle.slide
        finally:
            with self._lock:
                handle.users -= 1
                self._close_unused(handle)

    def _open(self, key: str) -> _Handle:
        file = self._files[key]
        self._handles[key] = _Handle(file.open())
        return self._handles[key]

    def _drop_surplus(self) -> None:
        while len(self._handles) > self._max_open:
            _, handle = self._handles.popitem(last=False)
            handle.is_dropped = True
            self._close_unused(handle)

    @staticmethod
    def _close_unused(handle: _Handle) -> None:
        if handle.is_dropped and not handle.users:
            handle.slide.close()

    def close(self) -> None:
        """Close every slide that nobody is reading."""
        with self._lock:
            for handle in self._handles.values():
                handle.is_dropped = True
                self._close_unused(handle)
            self._handles.clear()


@dataclass(frozen=True, eq=False)
class TileStore:
    """JPEG tiles of the listed slides; safe to ask from several threads.

    Parameters
    ----------
    slides : OpenSlides
    cache : SegmentCache
        Of encoded tiles.
    """

    slides: OpenSlides
    cache: SegmentCache = field(default_factory=lambda: SegmentCache(CACHE_BYTES))

    def tile(self, key: str, look: str, zoom: int, column: int, row: int) -> bytes:
        """Return a tile as JPEG, or a transparent PNG for places beside the slide.

        Browsers ask one zoom too far when they read ahead; that is answered with the transparent PNG, too.

        Parameters
        ----------
        key : str
            Of a listed slide.
        look : {"colour", "grey"}
        zoom, column, row : int

        Raises
        ------
        LookupError
            If there is no such slide, look or tile.
        """
        if look not in LOOKS or key not in self.slides:
            raise LookupError("no such slide")
        with self.slides.borrow(key) as slide:
            pyramid = TilePyramid(slide.size_px0, slide.mpp)
            if zoom == pyramid.max_zoom + 1 and 0 <= column < 2**zoom and 0 <= row < 2**zoom:
                return blank_png()
            if not pyramid.is_tile(zoom, column, row):
                raise LookupError("no such tile")
            if not pyramid.shows_slide(zoom, column, row):
                return blank_png()
            made = self.cache.get(
                (key, look, zoom, column, row), lambda: _encoded(pyramid, slide, look, (zoom, column, row))
            )
        return made.tobytes()

    def cutout(self, key: str, box_px0: tuple[int, int, int, int], size_px: int) -> bytes:
        """Return a square of a slide, x0, y0, x1, y1 in level-0 pixels, as a JPEG of `size_px` pixels."""
        x0, y0, x1, _ = box_px0
        with self.slides.borrow(key) as slide:
            mpp = slide.mpp * (x1 - x0) / size_px
            made = self.cache.get((key, *box_px0, size_px), lambda: _cut(slide, (x0, y0), size_px, mpp))
        return made.tobytes()


def _encoded(pyramid: TilePyramid, slide: Slide, look: str, place: tuple[int, int, int]) -> NDArray[np.uint8]:
    try:
        rgb = pyramid.read(slide, *place)
    except SlideError as error:
        logger.warning("%s", error)
        rgb = np.full((TILE_PX, TILE_PX, 3), NO_PIXELS, dtype=np.uint8)
    return np.frombuffer(encode_jpeg(to_grey(rgb) if look == "grey" else rgb), dtype=np.uint8)


def _cut(slide: Slide, origin_px0: tuple[int, int], size_px: int, mpp: float) -> NDArray[np.uint8]:
    try:
        rgb = slide.read(origin_px0, (size_px, size_px), mpp)
    except SlideError as error:
        logger.warning("%s", error)
        rgb = np.full((size_px, size_px, 3), NO_PIXELS, dtype=np.uint8)
    return np.frombuffer(encode_jpeg(rgb), dtype=np.uint8)

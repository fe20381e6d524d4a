"""Slides: read them by µm/px, find their tissue, tile them. No torch in this package."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.wsi._array_impl import ArraySlide
    from eosin.wsi._grid import TileGrid, Tiling, make_grid
    from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
    from eosin.wsi._preview import preview_slides
    from eosin.wsi._quality import QualityLimits
    from eosin.wsi._slide import Slide
    from eosin.wsi._slide_file import SlideFile, find_slides, open_slide
    from eosin.wsi._synthetic import Cohort, make_cohort, make_slide
    from eosin.wsi._tiles import iterate_tiles
    from eosin.wsi._tissue import TissueMask, TissueOptions, find_tissue

__all__ = [
    "ArraySlide",
    "Cohort",
    "JobFolder",
    "QualityLimits",
    "Slide",
    "SlideFile",
    "TileGrid",
    "Tiling",
    "TissueMask",
    "TissueOptions",
    "TissueTiles",
    "find_slides",
    "find_tissue",
    "iterate_tiles",
    "make_cohort",
    "make_grid",
    "make_slide",
    "open_slide",
    "preview_slides",
    "tile_slides",
]

__getattr__, __dir__ = lazy(__name__)

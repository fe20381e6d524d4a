"""From a model's numbers to pictures and files that a pathologist opens, and to answers to "what if"."""

from typing import TYPE_CHECKING

from eosin._lazy import lazy

if TYPE_CHECKING:
    from eosin.heatmaps._examination import Questions, examine
    from eosin.heatmaps._findings import Counterfactuals
    from eosin.heatmaps._heatmap import Heatmap
    from eosin.heatmaps._maps import MapSet, attention_map, attention_weights, gradient_map, map_slide
    from eosin.heatmaps.export._geojson import write_geojson
    from eosin.heatmaps.export._png import write_png
    from eosin.heatmaps.export._tiff import write_tiff

__all__ = [
    "Counterfactuals",
    "Heatmap",
    "MapSet",
    "Questions",
    "attention_map",
    "attention_weights",
    "examine",
    "gradient_map",
    "map_slide",
    "write_geojson",
    "write_png",
    "write_tiff",
]

__getattr__, __dir__ = lazy(__name__)

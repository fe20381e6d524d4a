"""The tiles that stand highest in a map, as pictures."""

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._catalogue import Study
from eosin.viewer._lattice import Indices
from eosin.viewer._panel import GALLERY_SIZE, gallery_columns
from eosin.viewer._tiles import TileStore

PICTURE_PX = 192


def highest(heatmap: Heatmap, present: NDArray[np.bool_]) -> Indices:
    """Return the tiles with the highest values among those that are present, (n,); highest first."""
    values = np.where(present, heatmap.values, -np.inf)
    count = min(GALLERY_SIZE, int(np.count_nonzero(present)))
    return np.asarray(np.argsort(-values, kind="stable")[:count], dtype=np.int64)


def make_gallery(store: TileStore, study: Study, heatmap: Heatmap, present: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the columns of the gallery: pictures of `highest`, each with its score."""
    boxes = study.grid.boxes_px0()
    urls, labels = [], []
    for tile in highest(heatmap, present).tolist():
        x0, y0, x1, y1 = boxes[tile].tolist()
        jpeg = store.cutout(study.listed.key, (x0, y0, x1, y1), PICTURE_PX)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}")
        labels.append(f"{heatmap.values[tile]:.3g}")
    return gallery_columns(urls, labels)

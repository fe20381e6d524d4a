"""Scores as a table: one row per tile, as CSV for whatever reads text, as parquet for exact numbers and types."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from eosin._files import write_bytes, write_text
from eosin._tables import frame_text
from eosin.heatmaps._heatmap import Heatmap
from eosin.wsi._grid import TileGrid


def tile_table(heatmaps: Sequence[Heatmap]) -> pd.DataFrame:
    """Return one row per tile and one column per map, which lie on one grid.

    Columns ``x_px0, y_px0`` (top-left corner), ``size_px0`` (level-0 pixels of the slide file, not of its scanned box),
    then each map by its kind; the maps' labels are metadata.
    """
    frame = pd.DataFrame(tile_columns(heatmaps[0].grid) | {heatmap.kind: heatmap.values for heatmap in heatmaps})
    frame.attrs = {"labels": {heatmap.kind: heatmap.caption for heatmap in heatmaps}}
    return frame


def tile_columns(grid: TileGrid) -> dict[str, object]:
    """Return where the tiles lie, column by column: corner and side in level-0 pixels."""
    return {"x_px0": grid.origins_px0[:, 0], "y_px0": grid.origins_px0[:, 1], "size_px0": grid.tile_px0}


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table by the suffix of its name: parquet as it is, anything else as CSV with nine digits."""
    if path.suffix == ".parquet":
        write_bytes(path, frame.to_parquet(index=False))
    else:
        write_text(path, frame_text(frame, float_format="%.9g"))

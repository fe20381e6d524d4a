"""Scores as a table: one row per tile, for whatever reads CSV."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from eosin.files import write_file
from eosin.heatmaps.heatmap import Heatmap


def write_csv(path: Path, heatmaps: Sequence[Heatmap]) -> None:
    """Write the tiles' places and one column per map.

    Parameters
    ----------
    path : Path
        Columns ``x_px0, y_px0`` (top-left corner), ``size_px0`` (level-0 pixels of the slide file, not of its scanned
        box), then each map by its kind.
    heatmaps : sequence of Heatmap
        On one grid.
    """
    grid = heatmaps[0].grid
    columns = {"x_px0": grid.origins_px0[:, 0], "y_px0": grid.origins_px0[:, 1], "size_px0": grid.tile_px0}
    write_frame(path, pd.DataFrame(columns | {heatmap.kind: heatmap.values for heatmap in heatmaps}))


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as CSV with nine digits."""
    write_file(path, lambda temporary: frame.to_csv(temporary, index=False, float_format="%.9g"))

"""The tiles of one slide as other programs take them: facts by tile, features, and where both come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eosin.features._bag import FeatureBag
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._table import tile_columns, write_frame


@dataclass(frozen=True, eq=False)
class SlideTiles:
    """The tiles of one slide, their features, and what a model says of them.

    Parameters
    ----------
    bag : FeatureBag
    maps : sequence of Heatmap
        One number per tile each, on the grid of the bag; empty without a model.
    prediction : mapping of str to str or float
        What the model says of the slide, by column.
    model : str
        Which model said it; empty without one.
    """

    bag: FeatureBag
    maps: Sequence[Heatmap] = ()
    prediction: Mapping[str, str | float] = field(default_factory=dict)
    model: str = ""

    @property
    def names(self) -> list[str]:
        """A name for each tile that is unique in a cohort: its slide, and its corner where that is known."""
        if self.bag.grid is None:
            return [f"{self.bag.slide_id}_{row}" for row in range(self.bag.n_instances)]
        return [f"{self.bag.slide_id}_{x}_{y}" for x, y in self.bag.grid.origins_px0.tolist()]

    @property
    def feature_names(self) -> list[str]:
        """A name for each feature."""
        return [f"{self.bag.spec.encoder}_{column}" for column in range(self.bag.spec.dim)]

    @property
    def features(self) -> NDArray[np.float32]:
        """The features (n, D)."""
        return np.asarray(self.bag.features, dtype=np.float32)

    def facts(self) -> pd.DataFrame:
        """Return one row per tile: slide, corner and side in level-0 pixels, each map, and the slide's prediction."""
        columns: dict[str, object] = {"slide_id": [self.bag.slide_id] * self.bag.n_instances}
        columns |= {} if self.bag.grid is None else tile_columns(self.bag.grid)
        columns |= {heatmap.kind: heatmap.values for heatmap in self.maps}
        return pd.DataFrame(columns | {f"slide_{name}": value for name, value in self.prediction.items()})

    def origin(self) -> dict[str, object]:
        """Return what the numbers are: encoder, resolution, model, and each map in words; only what is known."""
        spec, grid = self.bag.spec, self.bag.grid
        known: dict[str, object] = {
            "encoder": spec.encoder,
            "weights_hash": spec.weights_hash,
            "mpp": spec.mpp,
            "patch_size": spec.patch_size,
            "model": self.model,
            "maps": {heatmap.kind: heatmap.caption for heatmap in self.maps},
            "prediction": dict(self.prediction),
        }
        if grid is not None:
            known |= {"slide_mpp": grid.slide_mpp, "tile_px0": grid.tile_px0}
            known["slide_size_px0"] = list(grid.slide_size_px0)
        return {name: value for name, value in known.items() if value is not None and value != {}}


def write_wide(path: Path, tiles: SlideTiles) -> None:
    """Write one row per tile with its facts and one column per feature, as CSV or parquet by the name of the file."""
    features = pd.DataFrame(tiles.features, columns=tiles.feature_names)
    write_frame(path, pd.concat([tiles.facts(), features], axis=1))

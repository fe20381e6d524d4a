"""The job folder: where every result of a run lies (the layout that TRIDENT users know).

The stage that fills its first part, `tile_slides`, is in `eosin.wsi.stage`.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JobFolder:
    """Paths inside one job folder; nothing is created by asking for a path.

    Parameters
    ----------
    root : Path
        The folder that the command line calls ``--job``.
    """

    root: Path

    def thumbnail(self, slide_id: str) -> Path:
        """Picture of the whole slide, longer side at most 1000 px."""
        return self.root / "thumbnails" / f"{slide_id}.jpg"

    def contours(self, slide_id: str) -> Path:
        """Thumbnail with the outline of the tissue: the picture to check a slide by."""
        return self.root / "contours" / f"{slide_id}.jpg"

    def contours_geojson(self, slide_id: str) -> Path:
        """Tissue outline for QuPath."""
        return self.root / "contours_geojson" / f"{slide_id}.geojson"

    def tilings(self) -> list[str]:
        """Names of the tilings that have at least one coordinates file, sorted."""
        return sorted({path.parent.parent.name for path in self.root.glob("*/patches/*_patches.h5")})

    def patches(self, tiling: str, slide_id: str) -> Path:
        """Coordinates file of one slide in one tiling (`Tiling.folder`)."""
        return self.root / tiling / "patches" / f"{slide_id}_patches.h5"

    def features_dir(self, tiling: str, encoder: str) -> Path:
        """Folder of the feature files of one encoder."""
        return self.root / tiling / f"features_{encoder}"

    def features(self, tiling: str, encoder: str, slide_id: str) -> Path:
        """Feature file of one slide."""
        return self.features_dir(tiling, encoder) / f"{slide_id}.h5"

    @property
    def run_json(self) -> Path:
        """One record per slide and stage."""
        return self.root / "run.json"

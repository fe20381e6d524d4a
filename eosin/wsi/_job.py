"""The job folder (the layout that TRIDENT users know) and the stage that fills its first part."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from PIL import Image
from shapely import box

from eosin import __version__
from eosin._batch import Outcome, run_stage
from eosin._columns import SLIDE_COLUMNS
from eosin._files import file_fingerprint, write_json, write_text
from eosin._fingerprints import content_hash, fingerprint
from eosin._names import OTHER_READERS, match_slides
from eosin._records import Record, Report
from eosin._seals import sealed
from eosin._spread import FOLDERS, place_file
from eosin._tables import decimal_point, first_few, of_slides, read_table
from eosin.errors import ConfigError, EosinError, SlideError
from eosin.wsi._account import LOSSY, account_for
from eosin.wsi._colour import check_colours, in_srgb
from eosin.wsi._coordinates import QUALITY_VERSION, read_footer, write_grid
from eosin.wsi._geojson import outline_to_geojson, qupath_origin, read_outline
from eosin.wsi._grid import TileGrid, Tiling, lay_grid
from eosin.wsi._overview import Overview, make_thumbnail
from eosin.wsi._picture import draw_outline, write_jpeg
from eosin.wsi._quality import QualityLimits, TileQuality
from eosin.wsi._scoring import score_tiles
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile, copy_ahead, open_file
from eosin.wsi._tissue import TISSUE_VERSION, TissueMask, TissueOptions, find_tissue, look_over, tissue_from_outline

logger = logging.getLogger(__name__)

UNSUPPORTED = "unsupported-format"
STUDIES = "studies"
"""Folder in a job whose folders may have tiles and features of their own, see `eosin.pipeline._studies`."""

OUTLINE_SUFFIXES = (".geojson", ".json")

LAYOUT = "layout.json"
MANY = 100_000
"""Slides from which a new job is spread unasked: folders with so many files are slow on most file servers."""
PATCHES = ("*_patches.h5", f"{FOLDERS}/*_patches.h5")


@dataclass(frozen=True)
class JobFolder:
    """Paths inside one job folder; nothing is created by asking for a path.

    Parameters
    ----------
    root : Path
        The folder that the command line calls ``--job``.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))  # text, too, as people write it

    def thumbnail(self, slide_id: str) -> Path:
        """Picture of the whole slide, longer side at most 1000 px."""
        return self._place("thumbnails", slide_id, ".jpg")

    def contours(self, slide_id: str) -> Path:
        """Thumbnail with the outline of the tissue: the picture to check a slide by."""
        return self._place("contours", slide_id, ".jpg")

    def preview(self, slide_id: str) -> Path:
        """Thumbnail with tissue and tiles, drawn before anything is decided."""
        return self._place("previews", slide_id, ".jpg")

    def contours_geojson(self, slide_id: str) -> Path:
        """Tissue outline for QuPath."""
        return self._place("contours_geojson", slide_id, ".geojson")

    def tilings(self) -> list[str]:
        """Names of the tilings that have at least one coordinates file, sorted."""
        folders = [folder for folder in self.root.glob("*/patches") if any(any(folder.glob(one)) for one in PATCHES)]
        return sorted(folder.parent.name for folder in folders)

    def patches(self, tiling: str, slide_id: str) -> Path:
        """Coordinates file of one slide in one tiling (`Tiling.folder`)."""
        return self._place(f"{tiling}/patches", slide_id, "_patches.h5")

    def features_dir(self, tiling: str, encoder: str) -> Path:
        """Folder of the feature files of one encoder."""
        return self.root / tiling / f"features_{encoder}"

    def features(self, tiling: str, encoder: str, slide_id: str) -> Path:
        """Feature file of one slide."""
        return self._place(f"{tiling}/features_{encoder}", slide_id, ".h5")

    @property
    def run_json(self) -> Path:
        """One record per slide and stage."""
        return self.root / "run.json"

    @property
    def is_spread(self) -> bool:
        """Whether folders with a file for each slide are spread over 256 folders, see `eosin._spread`."""
        return (self.root / LAYOUT).is_file()

    def spread(self) -> None:
        """Put files that are made from now on into one of 256 folders; those that are there are found where they are.

        Raises
        ------
        OutputError
            If the job folder cannot be written.
        """
        if not self.is_spread:
            write_json(self.root / LAYOUT, sealed({"schema": 1, "eosin": __version__, "layout": "spread"}))

    def _place(self, folder: str, slide_id: str, suffix: str) -> Path:
        return place_file(self.root / folder, slide_id, suffix, is_spread=self.is_spread)


@dataclass(frozen=True)
class TissueTiles:
    """Which tiles of slides are taken: those that hold tissue, and everything that decides it.

    Parameters
    ----------
    tiling : Tiling
        The lattice.
    tissue : TissueOptions
        How tissue is found.
    quality : QualityLimits
        Which tiles are left out for blur, ink or folds.
    overrides : mapping
        Tissue options of single slides by id or file name, from `read_overrides`.
    contours : Path, optional
        Folder of outlines drawn or edited in QuPath, named after the slide or its file (``<slide>.geojson``,
        ``<slide>.svs.geojson``, ``.json``); the tissue of slides without a file in it is found automatically.
    """

    tiling: Tiling = Tiling()  # noqa: RUF009 - frozen
    tissue: TissueOptions = TissueOptions()  # noqa: RUF009 - frozen
    quality: QualityLimits = QualityLimits()  # noqa: RUF009 - frozen
    overrides: Mapping[str, TissueOptions] = field(default_factory=dict)
    contours: Path | None = None

    @property
    def folder(self) -> str:
        """Name of the folder of the coordinates in a job."""
        return self.tiling.folder

    def plan(self, slides: Sequence[SlideFile], job: JobFolder) -> "TilePlan":
        """Find out which slides options and outlines are for; names of no slide, and slides without one, are reported.

        Raises
        ------
        ConfigError
            If there is no such folder of outlines, or a slide has two.
        """
        ids = [slide.slide_id for slide in slides]
        changed = of_slides(self.overrides.items(), ids, "options of single slides", needed=False)
        drawn: Mapping[str, Path] = {}
        if self.contours is not None:
            drawn = of_slides(_outlines(self.contours), ids, str(self.contours), needed=False)
            without = [slide for slide in ids if slide not in drawn]
            if without:
                logger.warning(
                    "%s: has no outline for %s; their tissue is detected automatically",
                    self.contours,
                    first_few(without),
                )
        return TilePlan(job, self, changed, drawn)

    def write(
        self,
        slides: Sequence[SlideFile],
        job: JobFolder,
        *,
        workers: int = 0,
        progress: Callable[[Record], None] | None = None,
    ) -> Report:
        """Write the coordinates file of every slide; see `tile_slides`."""
        return tile_slides(slides, job, self, workers=workers, progress=progress)


def tile_slides(
    slides: Sequence[SlideFile],
    job: JobFolder,
    tiles: TissueTiles | Tiling | None = None,
    *,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    timeout_s: float | None = None,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Find the tissue of every slide and write its tile coordinates.

    Per slide: thumbnail, contour picture, contours for QuPath, coordinates file. A slide whose coordinates file
    was made from the same file with the same options is skipped. A slide without tissue ends as ``empty`` with a
    coordinates file of no rows.

    Parameters
    ----------
    slides : sequence of SlideFile
        From `eosin.wsi._slide_file.find_slides`.
    job : JobFolder
        Where results go.
    tiles : TissueTiles or Tiling, optional
        Which tiles; a `Tiling` alone has the defaults of everything else.
    workers : int
        0 works in this process; otherwise that many processes, and a decoder that crashes costs one slide.
    shard : tuple of int
        Which part of how many, for several machines.
    timeout_s : float, optional
        Wall-clock seconds after which a slide in a worker is given up.
    progress : callable, optional
        Called with every finished record.

    Returns
    -------
    Report
        Also merged into ``run.json``.

    Raises
    ------
    ConfigError
        If there is no folder of contours.
    OutputError
        If the job folder cannot be written.
    """
    if len(slides) > MANY and not job.tilings():
        job.spread()
    plan = all_of(tiles).plan(slides, job)
    report = run_stage(
        plan,
        slides,
        run_json=job.run_json,
        workers=workers,
        shard=shard,
        timeout_s=timeout_s,
        progress=progress,
        ahead=copy_ahead,
    )
    lossy = [record.slide_id for record in report.records if LOSSY in record.message]
    if lossy:
        names = ", ".join(lossy[:5]) + (" ..." if len(lossy) > 5 else "")
        logger.warning("%d of %d slides: %s; run.json says where: %s", len(lossy), len(report.records), LOSSY, names)
    return report


def all_of(tiles: TissueTiles | Tiling | None) -> TissueTiles:
    """Return the options that decide the tiles, with defaults where only a tiling or nothing is given."""
    return TissueTiles(tiles) if isinstance(tiles, Tiling) else tiles or TissueTiles()


@dataclass(frozen=True)
class TilePlan:
    """What is done to every slide: a `eosin._batch.Stage`, sent to workers.

    Parameters
    ----------
    job : JobFolder
        Where results go.
    tiles : TissueTiles
        Lattice, mask and limits.
    overrides : mapping
        Mask options of single slides, by id.
    contours : mapping
        File with the outline of single slides, by id.
    """

    job: JobFolder
    tiles: TissueTiles
    overrides: Mapping[str, TissueOptions] = field(default_factory=dict)
    contours: Mapping[str, Path] = field(default_factory=dict)
    name: ClassVar[str] = "tile"

    @property
    def tiling(self) -> Tiling:
        """Lattice."""
        return self.tiles.tiling

    def patches(self, slide_id: str) -> Path:
        """Coordinates file of a slide."""
        return self.job.patches(self.tiling.folder, slide_id)

    def key(self, item: SlideFile) -> str:
        """Return the id of a slide."""
        return item.slide_id

    def output(self, item: SlideFile) -> Path:
        """Return the coordinates file of a slide, which is written last."""
        return self.patches(item.slide_id)

    def is_done(self, slide: SlideFile) -> bool:
        """Tell whether the slide was tiled from the same file with the same options."""
        if not self.job.contours_geojson(slide.slide_id).is_file():  # people edit it: whatever is in it is kept
            return False
        try:
            footer = read_footer(self.patches(slide.slide_id))
            pictures = [content_hash(path) for path in _pictures(self.job, slide.slide_id)]
            return footer.options_hash == self.options_hash(slide) and footer.pictures == " ".join(pictures)
        except (EosinError, OSError):
            return False

    def do(self, item: SlideFile) -> Outcome:
        """Tile one slide and write what the job keeps of it."""
        if item.unread:
            return Outcome("skipped", _unread(item.path.suffix), UNSUPPORTED)
        made_from = self.options_hash(item)  # before it is read: a file that changes meanwhile is read again next time
        with self.open(item) as slide:
            tiled = self.lay_tiles(item, slide)
            _write_pictures(self.job, item.slide_id, slide, tiled.mask, make_thumbnail(slide, tiled.overview.rgb))
            write_grid(
                self.patches(item.slide_id),
                tiled.grid,
                slide_id=item.slide_id,
                mpp_source=slide.mpp_source,
                fingerprint=file_fingerprint(item.path),
                options_hash=made_from,
                quality=tiled.quality,
                pictures=" ".join(content_hash(path) for path in _pictures(self.job, item.slide_id)),
            )
            return tiled.outcome

    def open(self, item: SlideFile) -> Slide:
        """Open a slide, with the colours that the tiling asks for."""
        slide = item.open()
        try:
            return in_srgb(slide) if self.tiling.icc else slide
        except SlideError:
            slide.close()
            raise

    def tissue_of(self, item: SlideFile) -> TissueOptions:
        """Mask options of a slide."""
        return self.overrides.get(item.slide_id, self.tiles.tissue)

    def find_mask(self, item: SlideFile, slide: Slide, overview: Overview) -> TissueMask:
        """Return the tissue of an open slide: as drawn by a person, else found on the overview."""
        tissue, drawn = self.tissue_of(item), self.contours.get(item.slide_id)
        if drawn is None:
            return find_tissue(slide, tissue, overview=overview, tile_um2=self.tiling.min_tissue * self.tiling.tile_um2)
        outline = read_outline(drawn, qupath_origin_px0=qupath_origin(slide.bounds_px0))
        mask = tissue_from_outline(slide, outline, tissue)
        pen = None if overview.is_dark else find_tissue(slide, tissue, overview=overview).pen
        meets = outline.is_empty or outline.intersects(box(0, 0, *slide.size_px0))
        note = f"tissue as drawn in {drawn.name}{'' if meets else ', which lies outside the slide'}"
        return replace(mask, notes=(note,), pen=pen)

    def lay_tiles(self, item: SlideFile, slide: Slide) -> "Tiled":
        """Find the tissue of an open slide, lay the grid over it and leave out the tiles that exceed a limit."""
        overview = look_over(slide, self.tissue_of(item))
        if not overview.is_dark:  # fluorescence has colours of its own, and is refused by `find_tissue`
            check_colours(slide, overview.few)
        mask = self.find_mask(item, slide, overview)
        grid, share = lay_grid(mask, self.tiling, slide_size_px0=slide.size_px0, slide_mpp=slide.mpp, path=item.path)
        grid = replace(grid, image=slide.image)
        account = account_for(mask, grid)
        quality = score_tiles(slide, grid, mask, overview, tissue=share, with_blur=self.tiles.quality.measures_blur)
        keep, left_out = quality.within(self.tiles.quality)
        if left_out:
            grid, quality = grid.select(keep), quality.select(keep)
        notes = [note for note in (*slide.notes, *account.in_words(), left_out, *mask.notes) if note]
        if slide.residual_px0 and round(slide.residual_px0, 1):
            notes.append(f"levels agree to {slide.residual_px0:.1f} px")
        return Tiled(grid, quality, mask, overview, _outcome(grid, mask, notes))

    def options_hash(self, slide: SlideFile) -> str:
        """16 hexadecimal digits that change with anything that decides the rows."""
        drawn = self.contours.get(slide.slide_id)
        return fingerprint(
            "tile",
            slide=slide.version(),
            slide_mpp=slide.mpp,
            picture=[slide.scene, slide.plane],
            tiling=self.tiling,
            tissue=[self.tissue_of(slide), TISSUE_VERSION],
            quality=[self.tiles.quality, QUALITY_VERSION],
            outline=drawn.read_bytes() if drawn else None,
        )


@dataclass(frozen=True)
class Tiled:
    """What was found on one slide.

    Parameters
    ----------
    grid : TileGrid
        The tiles that stay.
    quality : TileQuality
        Their scores.
    mask : TissueMask
        Tissue and ink.
    overview : Overview
        What the tissue was found on.
    outcome : Outcome
        How the slide ended, in words.
    """

    grid: TileGrid
    quality: TileQuality
    mask: TissueMask
    overview: Overview
    outcome: Outcome


def _outlines(folder: Path) -> list[tuple[str, Path]]:
    """Return the outlines in a folder under the names of their files; QuPath appends its suffix to the slide's name."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of contours; check the path")
    files = sorted([*folder.iterdir(), *folder.glob(f"{FOLDERS}/*")])
    return [(path.name, path) for path in files if path.suffix.lower() in OUTLINE_SUFFIXES]


def _unread(suffix: str) -> str:
    reader = OTHER_READERS.get(suffix.lower())
    how = f", for example with {reader}" if reader else ""
    return f"eosin cannot read {suffix} files; convert the slide to OME-TIFF{how}"


def _pictures(job: JobFolder, slide_id: str) -> list[Path]:
    return [job.thumbnail(slide_id), job.contours(slide_id)]


def _write_pictures(job: JobFolder, slide_id: str, slide: Slide, mask: TissueMask, thumbnail: Image.Image) -> None:
    outline = mask.contours()
    write_jpeg(job.thumbnail(slide_id), thumbnail)
    write_jpeg(job.contours(slide_id), draw_outline(thumbnail, outline, slide.size_px0))
    origin = qupath_origin(slide.bounds_px0)
    text = outline_to_geojson(outline, slide_id=slide_id, qupath_origin_px0=origin)
    write_text(job.contours_geojson(slide_id), text)


def _outcome(grid: TileGrid, mask: TissueMask, notes: Sequence[str]) -> Outcome:
    if grid.n_tiles:
        return Outcome("ok", "; ".join([f"{grid.n_tiles} tile{'s' * (grid.n_tiles != 1)}", *notes]))
    width, height = grid.slide_size_px0
    if min(width, height) < grid.tile_px0:
        return Outcome("empty", f"the slide ({width} x {height} px) is smaller than one tile ({grid.tile_px0} px)")
    if not mask.mask.any():
        return Outcome("empty", "; ".join(["no tissue was found", *notes]))
    reason = f"no tile has {grid.tiling.min_tissue:.0%} tissue and passes every limit of quality"
    return Outcome("empty", "; ".join([reason, *notes]))


def open_header(slide: SlideFile, *, until: float = math.inf) -> Outcome:
    """Open a slide and nothing of its pixels, as long as `time.time` is not `until`.

    It is here, and not where it is asked for, so that a child process starts without torch.

    Returns
    -------
    Outcome
        With the area in mm² as its message, which is all that comes back from a child process; skipped where it is too
        late.
    """
    if time.time() > until:
        return Outcome("skipped")
    with open_file(slide.path) as reader, reader.slide(scene=slide.scene, plane=slide.plane, mpp=slide.mpp) as opened:
        width, height = opened.size_px0
        return Outcome(message=repr(width * height * opened.mpp**2 / 1e6))


def slide_key(slide: SlideFile) -> str:
    """Return the id of a slide, as the key of a batch."""
    return slide.slide_id


def read_overrides(path: Path, tissue: TissueOptions) -> dict[str, TissueOptions]:
    """Read the tissue options of single slides from a table.

    Parameters
    ----------
    path : Path
        Table (see `eosin._tables`) with the column ``slide`` (id or file name) and one column per option of
        `TissueOptions` to change; empty cells keep the value of `tissue`.
    tissue : TissueOptions
        Options of all other slides.

    Raises
    ------
    ConfigError
        If the table cannot be read, has no column ``slide``, or a name or value is not known.
    """
    rows = read_table(path).rows(slide=SLIDE_COLUMNS)
    named = [(row["slide"], _overridden(tissue, row, path)) for row in rows]
    return dict(match_slides(named, [name for name, _ in named], where=str(path)).values)


def _overridden(tissue: TissueOptions, row: Mapping[str, str], path: Path) -> TissueOptions:
    changed = {name: decimal_point(value) for name, value in row.items() if name != "slide" and value}
    return TissueOptions.parse({**tissue.model_dump(), **changed}, source=f"{path}, slide {row['slide']}")

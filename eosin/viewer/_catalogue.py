"""Which slides a viewer shows: checked against the model when it starts, named to the browser by random keys."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from shapely import MultiPolygon

from eosin.errors import ConfigError, EosinError, SlideError
from eosin.features._bag import FeatureBag
from eosin.features._store import find_bags, read_bag
from eosin.heatmaps._subject import Look, class_choices, look, require_grid, require_same_slide
from eosin.mil._checkpoint import ModelCard
from eosin.mil._jury import Asked, Jury
from eosin.viewer._lattice import Lattice, make_lattice
from eosin.viewer._layers import Layers
from eosin.viewer._tiles import OpenSlides
from eosin.wsi._grid import TileGrid
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._tissue import find_tissue

MAX_STUDIES = 4
MAX_HEAVY_STUDIES = 2  # a model that must be run again keeps the features in memory
CHECKING_THREADS = 4


@dataclass(frozen=True)
class Listed:
    """One slide of the list.

    Parameters
    ----------
    key : str
        Random; the only name of the slide that a browser can ask for.
    slide_id : str
    file : SlideFile
    features : Path or None
    refusal : str
        Why the slide cannot be shown, in one line; empty for slides that can.
    code : str
        The refusal's reason code.
    """

    key: str
    slide_id: str
    file: SlideFile
    features: Path | None
    refusal: str = ""
    code: str = ""


@dataclass(frozen=True, eq=False)
class SlideStudy:
    """A slide that is being looked at: its features as the model sees them.

    Parameters
    ----------
    listed : Listed
    bag : FeatureBag
    seen : Look
    layers : Layers
    lattice : Lattice
    slides : OpenSlides
    asked : Asked
        The model that answers for the slide.
    """

    listed: Listed
    bag: FeatureBag
    seen: Look
    layers: Layers
    lattice: Lattice
    slides: OpenSlides
    asked: Asked

    @property
    def grid(self) -> TileGrid:
        """Where the tiles lie."""
        return require_grid(self.bag)

    @property
    def n_tiles(self) -> int:
        """Number of tiles n."""
        return self.bag.n_instances

    @property
    def is_instant(self) -> bool:
        """Whether the model answers for any set of tiles without being run again."""
        return self.seen.subsets.instant

    @cached_property
    def bounds_px0(self) -> tuple[int, int, int, int] | None:
        """The scanned box where the file states one; QuPath's origin is its corner."""
        with self.slides.borrow(self.listed.key) as slide:
            return slide.bounds_px0

    @cached_property
    def is_mpp_given(self) -> bool:
        """Whether a person stated the resolution, because the file does not."""
        with self.slides.borrow(self.listed.key) as slide:
            return slide.mpp_source == "user"

    @cached_property
    def tissue(self) -> MultiPolygon:
        """The outline of the tissue, level-0 pixels; empty where none was found."""
        with self.slides.borrow(self.listed.key) as slide:
            try:
                return find_tissue(slide).contours()
            except SlideError:
                return MultiPolygon()


class Catalogue:
    """A model, or a cross-validation, and the slides that it is asked about.

    Parameters
    ----------
    ask : callable
        Given a slide's id, returns the model that answers for it.
    card : ModelCard
        Of one of the models; they ask the same question.
    listed : sequence of Listed
    """

    def __init__(self, ask: Callable[[str], Asked], card: ModelCard, listed: Sequence[Listed]) -> None:
        self.ask, self.card, self.listed = ask, card, tuple(listed)
        self.classes = class_choices(card)
        self.slides = OpenSlides({one.key: one.file for one in self.shown})
        self._studies: OrderedDict[str, SlideStudy] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Catalogue: {len(self.shown)} slides shown, {len(self.refused)} refused, {self.card!r}>"

    @property
    def shown(self) -> tuple[Listed, ...]:
        """The slides that can be looked at."""
        return tuple(one for one in self.listed if not one.refusal)

    @property
    def refused(self) -> tuple[Listed, ...]:
        """The others, each with its reason."""
        return tuple(one for one in self.listed if one.refusal)

    def by_key(self, key: str) -> Listed:
        """Return a slide that can be shown by its key, or raise `LookupError`."""
        for one in self.shown:
            if one.key == key:
                return one
        raise LookupError("no such slide")

    def study(self, key: str) -> SlideStudy:
        """Return a slide as the model sees it; runs the model when it is new or was put away.

        Raises
        ------
        LookupError
            If no slide that can be shown has this key.
        """
        listed = self.by_key(key)
        with self._lock:
            if key not in self._studies:
                self._studies[key] = self._open(listed)
            self._studies.move_to_end(key)
            study = self._studies[key]
            while len(self._studies) > (MAX_STUDIES if study.is_instant else MAX_HEAVY_STUDIES):
                self._studies.popitem(last=False)
            return study

    def _open(self, listed: Listed) -> SlideStudy:
        if listed.features is None:
            raise LookupError("a slide without features has no study")
        bag = read_bag(listed.features)
        asked = self.ask(listed.slide_id)
        second = asked.model.n_outputs < len(self.classes)
        with torch.no_grad():
            seen = look(asked.model, bag, single_logit_is_second_class=second)
        layers = Layers(asked.model, bag, seen, self.classes)
        return SlideStudy(listed, bag, seen, layers, make_lattice(require_grid(bag)), self.slides, asked)


def open_catalogue(
    model: Path,
    features: Sequence[Path],
    slides: Sequence[SlideFile],
    *,
    progress: Callable[[object], None] | None = None,
) -> Catalogue:
    """Load a model and check every slide against it.

    A slide is refused when it has no features, when these are of another kind than the model's or of another slide
    (size, fingerprint), and when it has fewer than two tiles.

    Parameters
    ----------
    model : Path
        Model folder, or a cross-validation: each slide is asked of the folds that have not seen its patient.
    features : sequence of Path
        Feature files, and folders of them.
    slides : sequence of SlideFile
    progress : callable, optional
        Called with each slide that was checked.

    Returns
    -------
    Catalogue
        Slides to show, and those that are refused with their reasons.

    Raises
    ------
    CheckpointError
        If the model cannot be loaded.
    ConfigError
        If a folder has no features or two files are of one slide.
    """
    jury = Jury.open([model], device="cpu")
    card = jury.ensemble.cards[0]
    files = _feature_files(card, features)
    check = partial(_check, card, files)
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        listed = [_noted(one, progress) for one in pool.map(check, slides)]
    return Catalogue(jury.ask, card, listed)


def _noted(listed: Listed, progress: Callable[[object], None] | None) -> Listed:
    if progress is not None:
        progress(listed)
    return listed


def _feature_files(card: ModelCard, paths: Iterable[Path]) -> dict[str, Path]:
    files: dict[str, list[Path]] = {}
    for path in paths:
        found = find_bags(path) if path.is_dir() else {path.name.removesuffix(".h5"): path}
        for slide_id, file in found.items():
            known = files.setdefault(slide_id, [])
            if file.resolve() not in [one.resolve() for one in known]:
                known.append(file)
    return {slide_id: _one_of(card, slide_id, found) for slide_id, found in files.items()}


def _one_of(card: ModelCard, slide_id: str, files: Sequence[Path]) -> Path:
    """Return the file of the model's encoder; two models side by side may need features of two."""
    fitting = [file for file in files if _fits(card, file)] if len(files) > 1 else files
    if len(fitting) > 1:
        raise ConfigError(f"slide {slide_id} has two feature files, {fitting[0]} and {fitting[1]}; pass one")
    return (fitting or files)[0]


def _fits(card: ModelCard, file: Path) -> bool:
    try:
        card.features.require_match(read_bag(file).spec, file)
    except EosinError:
        return False
    return True


def _check(card: ModelCard, files: Mapping[str, Path], slide: SlideFile) -> Listed:
    key, path = secrets.token_hex(8), files.get(slide.slide_id)
    try:
        if path is None:
            raise ConfigError(f"{slide.slide_id}: has no feature file in --features; extract the slide first")
        _require_usable(card, path, slide)
    except EosinError as error:
        return Listed(key, slide.slide_id, slide, path, " ".join(error.message.split()), error.code)
    return Listed(key, slide.slide_id, slide, path)


def _require_usable(card: ModelCard, path: Path, file: SlideFile) -> None:
    bag = read_bag(path)
    card.features.require_match(bag.spec, path)
    with file.open() as slide:
        _ = slide.mpp
        require_same_slide(slide, bag)
    if bag.n_instances < 2:
        raise ConfigError(f"{bag.slide_id}: has one tile; the effect of a tile needs at least two")

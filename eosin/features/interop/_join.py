"""One slide whose features and places lie in several files: joined where they agree, refused where they do not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from eosin.errors import FeatureFileError
from eosin.features.interop._foreign import Foreign, Numbers, Places

Read = tuple[Path, Foreign]


def join(read: Sequence[Read]) -> tuple[list[Foreign], list[str]]:
    """Return the slide that several files describe, and what is to be said of them.

    Features that two files hold, as CLAM's ``h5_files`` and ``pt_files`` do, are taken once, with the places of either;
    places of a file of coordinates go to features that have none.

    Raises
    ------
    FeatureFileError
        With the code ``contradiction`` when they differ in number or content.
    """
    with_features = [one for one in read if one[1].features is not None]
    alone = [one for one in read if one[1].features is None]
    if not with_features:
        return [slide for _, slide in alone], []
    path, slide = with_features[0]
    for other_path, other in with_features[1:]:
        _require_same_features(path, slide, other_path, other)
        slide = replace(slide, places=slide.places or other.places, encoder=slide.encoder or other.encoder)
    notes = [f"holds the same features as {other}; they were taken once" for other, _ in with_features[1:]]
    kept = []
    for place_path, places in alone:
        assert places.places is not None
        if slide.places is None:
            slide = with_places(slide, places.places, place_path, path)
            notes.append(f"gets its places from {place_path}")
        else:
            _require_as_many(path, slide, place_path, places.places.origins_px0)
            kept.append(places)
    return [slide, *kept], notes


def with_places(slide: Foreign, places: Places, places_path: Path, path: Path) -> Foreign:
    """Return features with places that another file states, unless they have their own.

    Raises
    ------
    FeatureFileError
        When they differ in number, or from the corners that the features come with.
    """
    if slide.places is not None:
        return slide
    corners = np.asarray(places.origins_px0)
    if slide.corners is not None and not np.array_equal(np.asarray(slide.corners), corners):
        message = f"has other coordinates than {places_path}, which belongs to it; import them one by one"
        raise FeatureFileError(path, message, code="contradiction")
    _require_as_many(path, slide, places_path, corners)
    return replace(slide, places=places)


def _require_as_many(path: Path, slide: Foreign, places_path: Path, corners: Numbers) -> None:
    assert slide.features is not None
    rows = len(slide.features)
    if slide.features.ndim == 2 and rows != len(corners):
        message = f"has {rows} rows of features, but {places_path} has {len(corners)} places; make one of them again"
        raise FeatureFileError(path, message, code="contradiction")


def _require_same_features(path: Path, slide: Foreign, other_path: Path, other: Foreign) -> None:
    assert slide.features is not None
    assert other.features is not None
    one, two = np.asarray(slide.features), np.asarray(other.features)
    if one.shape != two.shape:
        sizes = " and ".join(" x ".join(map(str, shape)) for shape in (one.shape, two.shape))
        message = f"holds other features of the slide than {other_path} ({sizes}); import one of them"
        raise FeatureFileError(path, message, code="contradiction")
    if slide.encoder and other.encoder and slide.encoder != other.encoder:
        message = f"holds features of {slide.encoder}, but {other_path} of {other.encoder}; import one of them"
        raise FeatureFileError(path, message, code="contradiction")
    if not np.allclose(one.astype(np.float32), two.astype(np.float32), rtol=HALF, atol=HALF, equal_nan=True):
        message = f"holds other features of the slide than {other_path}; import one of them"
        raise FeatureFileError(path, message, code="contradiction")


HALF = 2e-3  # one of them may be kept in half precision

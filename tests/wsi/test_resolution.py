from pathlib import Path

import pytest

from eosin.errors import MissingResolutionError
from eosin.wsi._resolution import StatedMpp, resolve_mpp, to_um


def stated(x: float, y: float | None = None) -> list[StatedMpp]:
    return [StatedMpp("openslide.mpp-x", x, x if y is None else y)]


def test_the_user_overrides_the_file():
    resolution = resolve_mpp(stated(352.8), power=None, user_mpp=0.25)
    assert (resolution.mpp, resolution.source) == (0.25, "user")


def test_the_best_source_counts_and_is_named():
    resolution = resolve_mpp([*stated(0.5), StatedMpp("tiff-resolution", 0.505, 0.505)], power=20)
    assert (resolution.mpp, resolution.source, resolution.note) == (0.5, "openslide.mpp-x", "")


@pytest.mark.parametrize(("other", "reported"), [(0.509, False), (0.511, True), (9.0, True), (352.8, False)])
@pytest.mark.parametrize("user", [None, 0.5])
def test_sources_that_differ_by_more_than_2_percent_are_reported_unless_no_microscope_has_them(other, reported, user):
    resolution = resolve_mpp([*stated(0.5), StatedMpp("tiff-resolution", other, other)], power=None, user_mpp=user)
    assert ("its tiff-resolution says" in resolution.note) == reported


@pytest.mark.parametrize(
    ("value", "unit", "um"),
    [
        (250, "nm", 0.25), (0.25, "\u00b5m", 0.25), (0.25, "\u03bcm", 0.25), (0.25, "um", 0.25), (2.5e-4, "mm", 0.25),
        (2500, "\u00c5", 0.25), (2500, "\u212b", 0.25), (2.5e-5, "cm", 0.25), (2.5e-7, "m", 0.25), (1e-5, "in", 0.254),
        (0.01, "thou", 0.254), (1, "pt", 25400 / 72), (0.25, "microns", 0.25), (0.25, r"\u00B5m", 0.25),
        (250000, "pm", 0.25), (1, "pixel", None), (1, "reference frame", None), (0, "um", None), (None, "um", None),
        (1, "Mm", 1e12), (float("nan"), "um", None),
    ],
)  # fmt: skip
def test_lengths_of_every_unit(value, unit, um):
    assert to_um(value, unit) == (None if um is None else pytest.approx(um))


def test_the_mean_of_both_axes_is_taken():
    assert resolve_mpp(stated(0.50, 0.51), power=None).mpp == pytest.approx(0.505)


@pytest.mark.parametrize(
    ("x", "y", "power", "words"),
    [
        (352.8, 352.8, None, "outside 0.05-20"),
        (0.01, 0.01, None, "outside"),
        (float("nan"), 0.5, None, "outside"),
        (0.0, 0.0, None, "outside"),
        (0.5, 0.53, None, "differ by more than 5%"),
        (0.5, 0.5, 4.9, "contradicts its objective power"),
        (0.25, 0.25, 10.0, "contradicts"),
    ],
)
def test_nonsense_is_refused_with_what_to_do(x, y, power, words):
    resolution = resolve_mpp(stated(x, y), power=power)
    with pytest.raises(MissingResolutionError, match=words) as caught:
        resolution.require(Path("a.svs"))
    assert caught.value.code == "bad-mpp"
    assert "--slide-mpp" in caught.value.message
    assert resolution.mpp is None


@pytest.mark.parametrize("mpp", [0.0, -1.0, 25.0, float("nan")])
def test_nonsense_from_the_user_is_refused(mpp):
    with pytest.raises(MissingResolutionError, match="--slide-mpp"):
        resolve_mpp([], power=None, user_mpp=mpp).require(Path("a.svs"))


def test_nothing_stated_is_refused():
    resolution = resolve_mpp([], power=40)
    assert resolution.source == "none"
    with pytest.raises(MissingResolutionError, match="states no µm/px; pass --slide-mpp") as caught:
        resolution.require(Path("a.svs"))
    assert caught.value.code == "no-mpp"


@pytest.mark.parametrize(("power", "warned"), [(20, False), (24, False), (25, True), (39, True), (None, False)])
def test_an_unusual_power_is_noted_and_the_mpp_used(power, warned):
    resolution = resolve_mpp(stated(0.5), power=power)
    assert resolution.mpp == 0.5
    assert bool(resolution.note) == warned

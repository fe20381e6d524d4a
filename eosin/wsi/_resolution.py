"""How many µm a level-0 pixel is, and whether to believe it.

Order: the user, the scanner's own tags, OME-XML, DICOM, the TIFF resolution; otherwise the slide is refused. Objective
power is only used as a check: slides of one nominal power differ by up to a factor of two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eosin.errors import MissingResolutionError

MPP_RANGE = (0.05, 20.0)
THUMBNAIL_MPP = 200.0
XY_TOLERANCE = 0.05
POWER_WARN = 1.2
POWER_REFUSE = 2.0
UM_PER_PX_AT_POWER_1 = 10.0
CONTRADICTION = 0.02
UNITS_UM = {
    "ym": 1e-18, "zm": 1e-15, "am": 1e-12, "fm": 1e-9, "pm": 1e-6, "nm": 1e-3, "µm": 1.0, "um": 1.0, "micron": 1.0,
    "micrometer": 1.0, "micrometre": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "dam": 1e7, "hm": 1e8, "km": 1e9,
    "Mm": 1e12, "Gm": 1e15, "Tm": 1e18, "Pm": 1e21, "Em": 1e24, "Zm": 1e27, "Ym": 1e30, "Å": 1e-4, "angstrom": 1e-4,
    "thou": 25.4, "li": 25400 / 12, "in": 25400.0, "inch": 25400.0, "ft": 304800.0, "yd": 914400.0, "mi": 1.609344e9,
    "pt": 25400 / 72, "nanometer": 1e-3, "millimeter": 1e3, "meter": 1e6,
}  # fmt: skip
_HOW_TO_STATE = "pass --slide-mpp (µm/px)"


@dataclass(frozen=True)
class StatedMpp:
    """What one source says.

    Parameters
    ----------
    source : str
        Name of the source.
    x, y : float
        µm per level-0 pixel.
    """

    source: str
    x: float
    y: float


@dataclass(frozen=True)
class Resolution:
    """The outcome of the policy.

    Parameters
    ----------
    mpp : float or None
        µm per level-0 pixel; None when refused.
    source : str
        Which source; ``none`` when nothing was stated.
    note : str
        Warning to show beside a usable mpp.
    refusal : str
        Why it is refused, when it is.
    code : str
        Reason code of the refusal.
    """

    mpp: float | None
    source: str
    note: str = ""
    refusal: str = ""
    code: str = "no-mpp"

    def require(self, path: Path) -> float:
        """Return the mpp.

        Raises
        ------
        MissingResolutionError
            If it was refused.
        """
        if self.mpp is None:
            raise MissingResolutionError(path, self.refusal, code=self.code)
        return self.mpp


def to_um(value: float | None, unit: str) -> float | None:
    """Return a length in µm; None when there is none, or its unit is not one of length, as ``pixel``.

    Parameters
    ----------
    value : float or None
        The length; not positive counts as none.
    unit : str
        As OME and ImageJ write it; the µ may be the micro sign or the Greek letter, the Å likewise, or an escape.
    """
    name = unit.strip().replace("\\u00B5", "µ").replace("\u03bc", "µ").replace("\u212b", "Å")
    # capitals matter in short names: mm and Mm differ by a factor of a billion
    scale = UNITS_UM.get(name, UNITS_UM.get(name.lower().rstrip("s") if len(name) > 2 else name))
    return None if value is None or scale is None or not value > 0 else value * scale


def resolve_mpp(stated: Sequence[StatedMpp], *, power: float | None, user_mpp: float | None = None) -> Resolution:
    """Decide the mpp of a slide.

    Parameters
    ----------
    stated : sequence of StatedMpp
        What the file says, best source first; only the first counts, others are compared with it.
    power : float or None
        Objective power, compared with 10 / mpp.
    user_mpp : float, optional
        Overrides the file; the power then only warns.

    Returns
    -------
    Resolution
        Never raises: a slide without mpp can still be looked at.
    """
    if user_mpp is not None:
        return _from_user(user_mpp, power, stated)
    if not stated:
        return Resolution(None, "none", refusal=f"the slide states no µm/px; {_HOW_TO_STATE}")
    first = stated[0]
    if _is_thumbnail(first):
        refusal = (
            f"the slide has {first.x:.4g} µm/px, which is too coarse for tissue and tiles (at most {MPP_RANGE[1]:g})"
        )
        return Resolution(None, first.source, refusal=refusal, code="too-coarse")
    fault = _implausible(first, power)
    if fault:
        refusal = f"its {first.source} {fault}; {_HOW_TO_STATE}"
        return Resolution(None, first.source, refusal=refusal, code="bad-mpp")
    mpp = (first.x + first.y) / 2
    return Resolution(mpp, first.source, note=_note(mpp, first.source, power, stated[1:]))


def _is_thumbnail(stated: StatedMpp) -> bool:
    """Return whether a scanner's own tag says a coarse resolution; the TIFF resolution can be a printer's, 72 dpi."""
    square = abs(stated.x - stated.y) <= XY_TOLERANCE * max(stated.x, stated.y)
    return stated.source != "tiff-resolution" and MPP_RANGE[1] < stated.x < THUMBNAIL_MPP and square


def _from_user(mpp: float, power: float | None, stated: Sequence[StatedMpp]) -> Resolution:
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        refusal = f"--slide-mpp {mpp:g} is outside {low}-{high} µm/px"
        return Resolution(None, "user", refusal=refusal, code="bad-mpp")
    return Resolution(mpp, "user", note=_note(mpp, "user", power, stated))


def _note(mpp: float, source: str, power: float | None, others: Sequence[StatedMpp]) -> str:
    """Return what a person should know beside a usable mpp: an unusual power, and sources that say otherwise."""
    return "; ".join(note for note in (_power_note(mpp, power), *_contradictions(mpp, source, others)) if note)


def _contradictions(mpp: float, source: str, others: Sequence[StatedMpp]) -> Iterator[str]:
    for other in others:
        found = (other.x + other.y) / 2
        # a resolution that no microscope has is a printer's
        if abs(found / mpp - 1) > CONTRADICTION and not _implausible(other, None):
            yield f"{mpp:.4g} µm/px ({source}) was taken, but its {other.source} says {found:.4g}"


def _implausible(stated: StatedMpp, power: float | None) -> str:
    low, high = MPP_RANGE
    x, y = stated.x, stated.y
    if not (low <= x <= high and low <= y <= high):
        return f"says {x:.4g} x {y:.4g} µm/px, outside {low}-{high}"
    if abs(x - y) > XY_TOLERANCE * max(x, y):
        return f"says {x:.4g} µm/px across and {y:.4g} down, which differ by more than {XY_TOLERANCE:.0%}"
    if _power_ratio((x + y) / 2, power) > POWER_REFUSE:
        return f"says {x:.4g} µm/px, which contradicts its objective power {power:g}"
    return ""


def _power_note(mpp: float, power: float | None) -> str:
    if power is None or _power_ratio(mpp, power) <= POWER_WARN:
        return ""
    return f"{mpp:.4g} µm/px is unusual for objective power {power:g}"


def _power_ratio(mpp: float, power: float | None) -> float:
    if power is None:
        return 1.0
    expected = UM_PER_PX_AT_POWER_1 / power
    return max(mpp / expected, expected / mpp)

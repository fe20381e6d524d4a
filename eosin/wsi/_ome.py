"""OME-XML: which pictures an OME-TIFF or OME-Zarr holds, what they measure, and which directories are their planes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from xml.etree import ElementTree

from eosin.wsi._resolution import StatedMpp, to_um

RGB_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
RGB_COLOURS = (0xFF0000FF, 0x00FF00FF, 0x0000FFFF)
MAX_PLANES = 100_000
Place = tuple[int, int, int]


@dataclass(frozen=True)
class OmeImage:
    """One Image of the metadata.

    Parameters
    ----------
    name : str
        As the writer has it; may be a person's and is never shown.
    size_px : tuple of int
        Width and height.
    stated : StatedMpp or None
        Its resolution.
    power : float or None
        Objective power.
    samples : int
        Values of a pixel that are stored together.
    channels : int
        Planes of different channels; three are red, green and blue when `is_rgb`.
    is_rgb : bool
        Whether nothing says that the channels are others than red, green and blue.
    planes : int
        Focal planes, times points in time.
    top : int
        Largest value of a pixel.
    directories : mapping
        Number of the TIFF directory of a plane by ``(channel, plane)``.
    elsewhere : str
        Name of another file that holds its pixels; empty when they are in this one.
    """

    name: str
    size_px: tuple[int, int]
    stated: StatedMpp | None
    power: float | None
    samples: int
    channels: int
    is_rgb: bool
    planes: int
    top: int
    directories: Mapping[tuple[int, int], int]
    elsewhere: str = ""


def is_ome(text: str) -> bool:
    """Return whether a description is OME-XML."""
    return re.search(r"<(\w+:)?OME\s", text[:4096]) is not None


def read_ome(text: str) -> list[OmeImage]:
    """Read OME-XML.

    Raises
    ------
    ValueError
        If it cannot be parsed or states nonsense.
    """
    try:
        root = ElementTree.fromstring(text.strip().encode())
    except ElementTree.ParseError as error:
        raise ValueError(f"its OME-XML is damaged ({error})") from error
    for element in root.iter():  # the namespace names the version, and every version has these names
        element.tag = element.tag.rpartition("}")[2]
    # an objective belongs to the instrument, and an image refers to it by its ID
    powers = {lens.get("ID"): lens.get("NominalMagnification") for lens in root.iter("Objective")}
    following, images = 0, []
    for image in root.iter("Image"):
        pixels = image.find("Pixels")
        if pixels is not None:
            images.append(_image(image, pixels, powers, following, root.get("UUID")))
            following += images[-1].planes * images[-1].channels
    return images


def _image(
    image: ElementTree.Element,
    pixels: ElementTree.Element,
    powers: Mapping[str | None, str | None],
    following: int,
    uuid: str | None,
) -> OmeImage:
    width, height, depth, times, values = (int(pixels.get(f"Size{axis}", 1)) for axis in "XYZTC")
    channels = pixels.findall("Channel")
    # RGB that is stored together counts as one Channel of three samples
    samples = int(channels[0].get("SamplesPerPixel", 1)) if channels else 1
    count = max(1, values // max(1, samples))
    if min(width, height, depth, times) < 1 or depth * times * count > MAX_PLANES:
        raise ValueError("its OME-XML states impossible sizes")
    settings = image.find("ObjectiveSettings")
    power = powers.get(settings.get("ID")) if settings is not None else next(iter(powers.values()), None)
    bits = int(pixels.get("SignificantBits", 0)) or {"uint16": 16}.get(pixels.get("Type", ""), 8)
    directories, elsewhere = _directories(pixels, (depth, count, times), following, uuid)
    return OmeImage(
        image.get("Name", ""), (width, height), _stated(pixels), _float(power), samples, count,
        count == 3 and _are_rgb(channels), depth * times, 2**bits - 1, directories, elsewhere,
    )  # fmt: skip


def _float(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _stated(pixels: ElementTree.Element) -> StatedMpp | None:
    found = [
        to_um(_float(pixels.get(f"PhysicalSize{axis}")), pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"
    ]
    known = [value for value in found if value is not None]
    return StatedMpp("ome", known[0], known[-1]) if known else None


def _are_rgb(channels: list[ElementTree.Element]) -> bool:
    """Return whether three channels are red, green and blue; stains of fluorescence have names or other colours."""
    # bfconvert and tifffile write no names; what has names that are not colours is fluorescence
    names = tuple((channel.get("Name") or "").strip().lower() for channel in channels)
    if any(names):
        return names in RGB_NAMES
    colours = tuple(int(channel.get("Color", -1)) & 0xFFFFFFFF for channel in channels)
    return colours == RGB_COLOURS or all(colour == 0xFFFFFFFF for colour in colours)


def _directories(
    pixels: ElementTree.Element, sizes: Place, following: int, uuid: str | None
) -> tuple[dict[tuple[int, int], int], str]:
    """Return the directory of each (channel, plane), and the file that holds those which this one does not."""
    depth, count, times = sizes
    order = pixels.get("DimensionOrder", "XYCZT")[2:]
    ranges = {"Z": range(depth), "C": range(count), "T": range(times)}
    places = [
        dict(zip(reversed(order), place, strict=True)) for place in product(*(ranges[axis] for axis in reversed(order)))
    ]  # the first axis of the order runs fastest
    numbered: dict[tuple[int, int], int] = {}
    elsewhere = ""
    for first, number, length, file in _blocks(pixels, len(places), following, uuid):
        if file:
            elsewhere = file
            continue
        start = next((index for index, place in enumerate(places) if _is_at(place, first)), 0)
        for step, place in enumerate(places[start : start + length]):
            numbered[place["C"], place["Z"] * times + place["T"]] = number + step
    return numbered, elsewhere if not numbered else ""


def _is_at(place: Mapping[str, int], first: Place) -> bool:
    return (place["Z"], place["C"], place["T"]) == first


def _blocks(
    pixels: ElementTree.Element, n_planes: int, following: int, uuid: str | None
) -> Iterator[tuple[Place, int, int, str]]:
    """Yield first place, first directory, number of planes and file of each run of planes."""
    blocks = pixels.findall("TiffData")
    if not blocks:
        yield (0, 0, 0), following, n_planes, ""
    for block in blocks:
        z, c, t = (int(block.get(f"First{axis}", 0)) for axis in "ZCT")
        length = int(block.get("PlaneCount", 1 if "IFD" in block.attrib else n_planes))
        holder = block.find("UUID")
        # a file that was renamed still has its own UUID; its name in the metadata is the old one
        own = holder is None or uuid is None or (holder.text or "").strip() == uuid.strip()
        yield (z, c, t), int(block.get("IFD", 0)), length, "" if own or holder is None else holder.get("FileName", "?")

"""Which pictures a TIFF holds: what its directories are to each other, by the rules of each vendor."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from eosin.wsi._directory import (
    EXTRA_SAMPLES,
    MAKE,
    MAX_SAMPLE,
    NDPI_VERSION,
    RESOLUTION_UNIT,
    SAMPLE_FORMAT,
    SOFTWARE,
    SUBSAMPLING,
    X_RESOLUTION,
    XMP,
    Y_RESOLUTION,
    Directory,
)  # fmt: skip
from eosin.wsi._ome import OmeImage, is_ome, read_ome
from eosin.wsi._resolution import StatedMpp, to_um
from eosin.wsi._segments import MAX_SEGMENT_PX
from eosin.wsi.inventory import CONVERT, Kind, Picture, kind_of, size_ratio

RGB, YCBCR = 2, 6
JPEG, JPEG2000, APERIO_YCBCR = 7, (33003, 33004, 33005, 34712), 33003
DECODES_TO_RGB = (JPEG, *JPEG2000, 50001, 34927, 50002, 52546, 22610, 34934)
_UNITS = {2: "in", 3: "cm"}
_QUOTE = r'\s*(?:&quot;|")?'
_PHILIPS_SPACING = re.compile(rf'DICOM_PIXEL_SPACING"[^>]*>{_QUOTE}([0-9.eE+-]+){_QUOTE}{_QUOTE}([0-9.eE+-]+)')
LEAST_SCENE = 8
Channels = tuple[Directory, ...]
"""The directories of one level of one plane: one of chunky or planar RGB, or one each for red, green and blue."""


@dataclass(frozen=True)
class Stack:
    """A picture and where its pixels are.

    Parameters
    ----------
    picture : Picture
        For the inventory.
    planes : sequence
        Per focal plane the levels, finest first, each with the directories of its channels.
    top : int
        Largest value of a pixel; 255 unless more than 8 bits are stored.
    declared : sequence of bool
        For each level whether the file calls it a copy of the finest one; others may be pictures of their own.
    sparse : bool
        Whether the vendor leaves out empty glass.
    """

    picture: Picture
    planes: Sequence[Sequence[Channels]] = field(repr=False)
    top: int = 255
    declared: Sequence[bool] = ()
    sparse: bool = False


def vendor_of(chain: Sequence[Directory]) -> str:
    """Return what wrote a TIFF, from its first directory."""
    first = chain[0]
    text, software = first.description, first.text(SOFTWARE)
    marks: list[tuple[str, bool]] = [
        ("aperio", text.startswith("Aperio")),
        ("hamamatsu", NDPI_VERSION in first.fields),
        ("leica", "leica-microsystems.com/scn" in text[:1024]),
        ("ventana", any(b"iScan" in bytes(page.fields.get(XMP, b""))[:4096] for page in chain)),
        ("trestle", software.startswith("MedScan")),
        ("philips", software.startswith("Philips")),
        ("perkinelmer", "PerkinElmer-QPI-ImageDescription" in text[:1024]),
        ("ome", is_ome(text)),
        ("olympus", first.text(MAKE).startswith("Olympus") or "Olympus" in software),
    ]
    return next((vendor for vendor, found in marks if found), "tiff")


def list_stacks(chain: Sequence[Directory]) -> list[Stack]:
    """Group the directories of a TIFF into pictures.

    Raises
    ------
    ValueError
        If they are damaged.
    """
    for page in chain:
        if 0 in page.size_px:
            raise ValueError(f"it states {page.imagewidth} x {page.imagelength} px")
    vendor = vendor_of(chain)
    make = _BY_VENDOR.get(vendor, _generic)
    return [_with_fault(stack) for stack in make(chain, vendor)]


def _stack(
    kind: Kind, levels: Sequence[Channels], vendor: str, *, declared: Sequence[bool] = (), **facts: object
) -> Stack:
    page = levels[0][0]
    sizes = tuple(channels[0].size_px for channels in levels)
    picture = Picture(kind, sizes, stated=_resolution(page), vendor=vendor, colour=describe(levels[0]))
    picture = replace(picture, **facts)  # type: ignore[arg-type]
    top = _top(page)
    return Stack(picture, [levels], top, declared or [True] * len(levels))


def _top(page: Directory) -> int:
    stated = page.number(MAX_SAMPLE, 0)
    return stated if page.bitspersample > 8 and stated > 255 else 2 ** max(page.bitspersample, 1) - 1


def _resolution(page: Directory) -> tuple[StatedMpp, ...]:
    """Return what the resolution tags say; without a unit they give an aspect ratio only, save where ImageJ has one."""
    unit = _UNITS.get(page.number(RESOLUTION_UNIT, 2), "")
    named = (
        re.search(r"^unit=(.+)$", page.description, re.MULTILINE) if page.description.startswith("ImageJ=") else None
    )
    per_unit = [page.ratio(code) for code in (X_RESOLUTION, Y_RESOLUTION)]
    sizes = [to_um(1 / value if value else None, named[1] if named else unit) for value in per_unit]
    return (StatedMpp("tiff-resolution", sizes[0], sizes[1]),) if sizes[0] and sizes[1] else ()


def describe(channels: Channels) -> str:
    """Return how pixels are stored, for a person."""
    import tifffile  # here, as in `_tiff_impl.py`: few commands that know slides open a TIFF

    page = channels[0]
    try:
        codec = tifffile.COMPRESSION(page.compression).name
    except ValueError:
        codec = f"compression {page.compression}"
    count = page.samplesperpixel * len(channels)
    colours = {3: "RGB", 4: "RGBA"}.get(count, f"{count} channel{'s' * (count != 1)}")
    apart = ", in planes" if len(channels) > 1 or page.planarconfig == 2 else ""
    return f"{page.bitspersample}-bit {colours}, {codec}{apart}"


def _with_fault(stack: Stack) -> Stack:
    """Return the stack with the reason why its pixels cannot be read; levels that are not RGB are left out."""
    channels = stack.planes[0][0]
    fault, code = pixel_fault(channels)
    if stack.picture.fault or fault:
        picture = replace(stack.picture, fault=stack.picture.fault or fault, code=code or stack.picture.code)
        return replace(stack, picture=picture)
    # a pyramid may end in a grey or palette copy
    fine = [number for number, level in enumerate(stack.planes[0]) if not pixel_fault(level)[0]]
    picture = replace(
        stack.picture,
        sizes_px=tuple(stack.picture.sizes_px[number] for number in fine),
        scales=tuple(stack.picture.scales[number] for number in fine) if stack.picture.scales else (),
    )
    return replace(
        stack, picture=picture, planes=[[plane[number] for number in fine] for plane in stack.planes],
        declared=[stack.declared[number] for number in fine],
    )  # fmt: skip


def pixel_fault(channels: Channels) -> tuple[str, str]:
    """Return why the pixels of a level cannot be read, with a reason code; both are empty when they can."""
    import tifffile

    page = channels[0]
    count = page.samplesperpixel * len(channels)
    if page.compression not in tifffile.TIFF.DECOMPRESSORS and page.compression != 1:
        return f"its pixels are stored with compression {page.compression}, which no decoder here knows", "unreadable"
    rgb = page.photometric in (RGB, YCBCR) or page.compression in JPEG2000 or (len(channels) == 3)
    # four channels of JPEG are CMYK
    alpha = count == 4 and page.number(EXTRA_SAMPLES, 0) in (0, 1, 2) and page.compression != JPEG
    plain = page.bitspersample in (8, 16) and page.number(SAMPLE_FORMAT, 1) == 1
    if not (rgb and plain and (count == 3 or alpha) and _has_full_chroma(page)):
        return f"it holds {describe(channels)}; eosin reads 8- and 16-bit RGB (bright-field)", "unsupported-pixels"
    width, height = page.segment_px
    if width * height > MAX_SEGMENT_PX:
        return f"its pixels are stored in pieces of {width} x {height} px; {CONVERT}", "untiled"
    return "", ""


def _has_full_chroma(page: Directory) -> bool:
    """Return whether every pixel has its own colour; codecs subsample by themselves, plain bytes would need more."""
    if page.photometric != YCBCR or page.compression in DECODES_TO_RGB:
        return True
    return {int(value) for value in page.fields.get(SUBSAMPLING, (2, 2))} == {1}


def _with_subs(page: Directory) -> list[Channels]:
    return [(level,) for level in sorted((page, *page.subs), key=lambda level: -level.imagewidth)]


def _aperio(chain: Sequence[Directory], vendor: str) -> list[Stack]:
    """Tiled directories are levels; of the others the second is a thumbnail, label and macro say so themselves."""
    # Aperio never tiles a thumbnail, label or macro, and states nothing else that all of its versions agree on
    levels = sorted((page for page in chain if page.is_tiled), key=lambda page: -page.imagewidth)
    facts = dict(re.findall(r"\|\s*([^=|]+?)\s*=\s*([^|]*)", chain[0].description))
    stated = to_um(_float(facts.get("MPP")), "µm")
    main = _stack("slide", [(page,) for page in levels], vendor) if levels else None
    found = []
    for page in chain:
        if main is not None and page is levels[0]:
            known = (StatedMpp("aperio.MPP", stated, stated),) if stated else ()
            picture = replace(main.picture, stated=(*known, *main.picture.stated), power=_float(facts.get("AppMag")))
            found.append(replace(main, picture=picture))
        elif not page.is_tiled:
            # labels and macros have two short lines, of which the second names them; a thumbnail repeats the slide's
            second = (page.description.splitlines() or [""])[-1] if len(page.description) < 200 else ""
            found.append(_stack(kind_of(second.split(" ")[0], "thumbnail"), [(page,)], vendor))
    return found


def _float(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _philips(chain: Sequence[Directory], vendor: str) -> list[Stack]:
    """Tiled directories are levels, padded to whole tiles; the description states the spacing of each in mm."""
    levels = [page for page in chain if page.is_tiled]
    if not levels:
        return _generic(chain, vendor)
    spacing = [(float(y), float(x)) for y, x in _PHILIPS_SPACING.findall(chain[0].description)]
    main = _stack("slide", [(page,) for page in levels], vendor)
    if spacing:  # of the picture, then of each level
        of_levels = spacing[-len(levels) :] if len(spacing) >= len(levels) else []
        # DICOM has rows first, and mm
        stated = (StatedMpp("philips.spacing", 1e3 * spacing[0][1], 1e3 * spacing[0][0]), *main.picture.stated)
        scales = tuple(round(x / of_levels[0][1], 3) for _, x in of_levels)
        main = replace(main, picture=replace(main.picture, stated=stated, scales=scales))
    others = [_stack(kind_of(page.description, "other"), [(page,)], vendor) for page in chain if not page.is_tiled]
    return [replace(main, sparse=True), *others]


def _perkinelmer(chain: Sequence[Directory], vendor: str) -> list[Stack]:
    """Each directory says what it is; several full ones are channels of fluorescence."""
    kinds = [re.search(r"<ImageType>(\w+)<", page.description) for page in chain]
    names = [kind[1] if kind else "" for kind in kinds]
    full = [page for page, name in zip(chain, names, strict=True) if name == "FullResolution"]
    reduced = [page for page, name in zip(chain, names, strict=True) if name == "ReducedResolution"]
    others = [(page, name) for page, name in zip(chain, names, strict=True) if page not in full + reduced]
    found = [_stack(kind_of(name, "other"), [(page,)], vendor) for page, name in others]
    if len(full) == 1:
        return [_stack("slide", [(page,) for page in full + reduced], vendor), *found]
    if full:
        fault = f"it holds {len(full)} channels of fluorescence; eosin reads bright-field slides"
        found.insert(0, _stack("slide", [(full[0],)], vendor, fault=fault))
    return found


def _olympus(chain: Sequence[Directory], vendor: str) -> list[Stack]:
    return [_stack(kind_of(page.description, "macro"), [(page,)], vendor) for page in chain]


def _ome(chain: Sequence[Directory], vendor: str) -> list[Stack]:
    """Each Image is a picture; its planes are directories of the chain, its levels their SubIFDs."""
    images = read_ome(chain[0].description)
    # some writers append the levels as plain pages that the XML does not name
    used = {number for image in images for number in image.directories.values()}
    extra = [page for number, page in enumerate(chain) if number not in used and page.is_reduced]
    found = [_of_image(image, chain, vendor, extra if len(images) == 1 else []) for image in images]
    return [stack for stack in found if stack is not None]


def _of_image(image: OmeImage, chain: Sequence[Directory], vendor: str, extra: Sequence[Directory]) -> Stack | None:
    if not image.directories:  # its pixels are in another file of the set
        return None
    if not all(number < len(chain) for number in image.directories.values()):
        raise ValueError("its OME-XML names pages that the file does not have")
    planes = []
    for plane in range(image.planes):
        pages = [chain[image.directories[channel, plane]] for channel in range(image.channels)
                 if (channel, plane) in image.directories]  # fmt: skip
        if len(pages) == image.channels:
            levels = zip(*(_with_subs(page) for page in pages), strict=True)
            planes.append([*(tuple(one[0] for one in level) for level in levels), *((page,) for page in extra)])
    if not planes:
        return None
    stated = (*((image.stated,) if image.stated else ()), *_resolution(planes[0][0][0]))
    fault = ""
    if image.channels != 1 and not image.is_rgb:
        fault = f"it holds {image.channels} channels of fluorescence; eosin reads bright-field slides"
    stack = _stack(
        kind_of(image.name), planes[0], vendor, stated=stated, power=image.power, planes=len(planes), fault=fault
    )
    top = image.top if planes[0][0][0].bitspersample > 8 else 255
    return replace(stack, planes=planes, top=top)


def _generic(chain: Sequence[Directory], vendor: str) -> list[Stack]:
    """The largest page is the slide; smaller copies of it are its levels, equal ones its planes; the rest likewise.

    A page is a copy when the file calls it so, or when it has the slide's shape; whether it is one is measured later.
    """
    named = {page.place: kind_of(page.description[:200]) for page in chain}
    found = {page.place: _stack(named[page.place], _with_subs(page), vendor)
             for page in chain if named[page.place] != "slide"}  # fmt: skip
    rest = [page for page in chain if page.place not in found]
    largest = max((page.imagewidth * page.imagelength for page in rest if not pixel_fault((page,))[0]), default=0)
    while rest:
        main = max(rest, key=lambda page: (not pixel_fault((page,))[0], page.imagewidth * page.imagelength))
        equal = [page for page in rest if page.size_px == main.size_px and describe((page,)) == describe((main,))]
        smaller = [page for page in rest if page not in equal and _is_copy(page, main)]
        rest = [page for page in rest if page not in equal and page not in smaller]
        # what is far smaller than the slide is its label or macro, although the file does not say so
        kind: Kind = "slide" if main.imagewidth * main.imagelength * LEAST_SCENE >= largest else "other"
        found[main.place] = _pyramid(kind, equal, smaller, vendor)
    return [found[page.place] for page in chain if page.place in found]


def _pyramid(kind: Kind, equal: Sequence[Directory], smaller: Sequence[Directory], vendor: str) -> Stack:
    """Return the picture of equal pages, its planes, with the smaller ones as levels where there is one plane."""
    main = equal[0]
    pages = [main, *main.subs, *(smaller if len(equal) == 1 else ())]
    sizes = {page.size_px: page for page in reversed(pages)}  # of two copies of a size the first
    levels = sorted(sizes.values(), key=lambda page: -page.imagewidth)
    declared = [page is main or page in main.subs or page.is_reduced for page in levels]
    stack = _stack(kind, [(page,) for page in levels], vendor, declared=declared, planes=len(equal))
    if len(equal) > 1:
        return replace(stack, planes=[_with_subs(page) for page in equal])
    return stack


def _is_copy(page: Directory, main: Directory) -> bool:
    """Return whether a page may be a smaller copy: its sides are the slide's by one factor, up to padding."""
    if page.imagewidth >= main.imagewidth or pixel_fault((page,))[0]:
        return False
    ratio = size_ratio(main.size_px, page.size_px)
    off = [abs(above / ratio - below) for above, below in zip(main.size_px, page.size_px, strict=True)]
    if max(off) <= 1:  # sides are cut off or rounded
        return True
    if not (page.is_tiled and page.is_reduced):
        return False
    # padded to whole tiles: some factor explains both sides when what is beyond is less than a tile
    least, most = zip(*(
        (above / below, above / max(1, below - tile))
        for above, below, tile in zip(main.size_px, page.size_px, page.segment_px, strict=True)
    ), strict=True)  # fmt: skip
    return bool(max(least) <= min(most) * 1.001)


_BY_VENDOR: dict[str, Callable[[Sequence[Directory], str], list[Stack]]] = {
    "aperio": _aperio, "philips": _philips, "perkinelmer": _perkinelmer, "ome": _ome, "olympus": _olympus,
}  # fmt: skip

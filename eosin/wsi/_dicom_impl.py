"""DICOM whole-slide images: levels from the files of a series, frames decoded directly."""

import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from eosin.errors import EosinError, SlideOpenError
from eosin.wsi._dicom import group_series, is_dicom, read_series_uid
from eosin.wsi._jpeg import DecodeError, decode_shrunk, decode_whole
from eosin.wsi._pixels import to_8_bit, ycbcr_to_rgb
from eosin.wsi._resolution import StatedMpp, to_um
from eosin.wsi._segments import MAX_SEGMENT_PX, Bytes, Level, Segments, without_padding
from eosin.wsi._tiled import TiledSlide
from eosin.wsi.inventory import Kind, Picture, size_ratio
from eosin.wsi.reader import Reader

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
KINDS: Mapping[str, Kind] = {"LABEL": "label", "OVERVIEW": "macro", "LOCALIZER": "macro", "THUMBNAIL": "thumbnail"}
HEADER = [
    "SOPClassUID", "ImageType", "NumberOfFrames", "Rows", "Columns", "TotalPixelMatrixColumns", "TotalPixelMatrixRows",
    "PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "DimensionOrganizationType", "SeriesInstanceUID", "FrameOfReferenceUID", "ConcatenationUID",
    "ConcatenationFrameOffsetNumber", "TotalPixelMatrixFocalPlanes", "NumberOfOpticalPaths", "ImagedVolumeWidth",
    "ImagedVolumeHeight", "ContainerIdentifier", "OpticalPathSequence", "SharedFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PARTIAL = ("YBR_PARTIAL_422", "YBR_PARTIAL_420")
"""Retired, and ambiguous but for JPEG, which says itself how it is stored."""
ITEM, SEQUENCE_END, UNDEFINED = 0xFFFEE000, 0xFFFEE0DD, 0xFFFFFFFF
STARTS = (
    b"\xff\xd8",
    b"\xff\x4f",
    b"\xff\x0a",
    b"\0\0\0\x0c",
)  # of JPEG and JPEG-LS, JPEG 2000, JPEG XL and their boxes
SPACING_TOLERANCE = 0.005
_PREFIX = "1.2.840.10008.1.2"
JPEG = {f"{_PREFIX}.4.50", f"{_PREFIX}.4.51"}
JPEG2000 = {f"{_PREFIX}.4.{number}" for number in (90, 91, 92, 93, 201, 202, 203)}
DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(JPEG2000, imagecodecs.jpeg2k_decode),
    **dict.fromkeys((f"{_PREFIX}.4.57", f"{_PREFIX}.4.70"), imagecodecs.ljpeg_decode),
    **dict.fromkeys((f"{_PREFIX}.4.80", f"{_PREFIX}.4.81"), imagecodecs.jpegls_decode),
    **dict.fromkeys((f"{_PREFIX}.4.110", f"{_PREFIX}.4.111", f"{_PREFIX}.4.112"), imagecodecs.jpegxl_decode),
}
RLE, DEFLATED, DEFLATED_FRAMES, BIG_ENDIAN = f"{_PREFIX}.5", f"{_PREFIX}.1.99", f"{_PREFIX}.8.1", f"{_PREFIX}.2"
RAW = {_PREFIX, f"{_PREFIX}.1", BIG_ENDIAN}
DAMAGE = (
    OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError, OverflowError, NotImplementedError,
    ZeroDivisionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One file of a series.

    Parameters
    ----------
    path : Path
        The file.
    header : Dataset
        Elements before the pixels.
    pixels_at : int
        Where the element of the pixels begins.
    """

    path: Path
    header: Any
    pixels_at: int

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the picture that its frames make."""
        columns, rows = self.header.get("TotalPixelMatrixColumns"), self.header.get("TotalPixelMatrixRows")
        return int(columns or self.header.Columns), int(rows or self.header.Rows)

    @property
    def frame_px(self) -> tuple[int, int]:
        """Width and height of a frame."""
        return int(self.header.Columns), int(self.header.Rows)

    @property
    def n_frames(self) -> int:
        """How many frames it says it has."""
        return int(self.header.get("NumberOfFrames") or 1)

    @property
    def syntax(self) -> str:
        """How its pixels are compressed."""
        return str(self.header.file_meta.TransferSyntaxUID)

    @property
    def kind(self) -> Kind:
        """Which picture of the slide it is."""
        words = list(self.header.get("ImageType") or [])
        return next((KINDS[word] for word in words[2:] if word in KINDS), "slide")

    @property
    def spacing_um(self) -> StatedMpp | None:
        """µm per pixel as the shared functional groups state it, rows first."""
        shared = self.header.get("SharedFunctionalGroupsSequence") or [{}]
        measures = shared[0].get("PixelMeasuresSequence") or [{}]
        spacing = measures[0].get("PixelSpacing")
        if not spacing or len(spacing) != 2:
            return None
        y, x = (to_um(float(value), "mm") for value in spacing)
        return StatedMpp("dicom.PixelSpacing", x, y) if x and y else None

    @property
    def volume_um(self) -> StatedMpp | None:
        """µm per pixel from the extent of the slide."""
        sides = [self.header.get(name) for name in ("ImagedVolumeWidth", "ImagedVolumeHeight")]
        x, y = (to_um(float(mm) / px if mm else None, "mm") for mm, px in zip(sides, self.size_px, strict=True))
        return StatedMpp("dicom.ImagedVolume", x, y) if x and y else None


class DicomReader(Reader):
    """The DICOM files of one series in one folder."""

    name = "DICOM"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from pydicom.config import disable_value_validation

        try:
            files = sorted(_series_of(path), key=lambda file: file != path)  # of two of a size the one asked for
            instances = [instance for file in files if (instance := _read_instance(file)) is not None]
            if not instances:
                raise SlideOpenError(path, "the DICOM file is not a whole-slide image", code="unsupported")
            self._instances, self._pyramids = instances, list(_pyramids(instances))
            with disable_value_validation():  # values are checked when they are first asked for
                self.pictures = [_picture(levels) for levels in self._pyramids]
        except DAMAGE as error:
            if isinstance(error, EosinError):
                raise
            raise SlideOpenError(path, f"the DICOM file is damaged: {error}") from error

    @classmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether a file is DICOM."""
        return is_dicom(head)

    def open(self, picture: Picture, plane: int, mpp: float | None) -> TiledSlide:
        """Open a pyramid; see `Reader.open`."""
        number = next(number for number, known in enumerate(self.pictures) if known is picture)
        pyramid = self._pyramids[number]
        files = {instance.path: Bytes(instance.path) for level in pyramid for instance in level}
        try:
            levels = [_level(index, level, files, plane, picture.planes) for index, level in enumerate(pyramid)]
            path = pyramid[0][0].header.get("OpticalPathSequence") or [{}]
            slide = TiledSlide(
                self.path, picture, levels, reader=self.name, files=list(files.values()),
                sparse=_is_sparse(pyramid[0][0]), icc_profile=path[0].get("ICCProfile"), mpp=mpp,
            )  # fmt: skip
        except DAMAGE as error:
            for file in files.values():
                file.close()
            if isinstance(error, EosinError):
                raise
            raise SlideOpenError(self.path, f"the DICOM file is damaged: {error}") from error
        slide.notes += _left_out(self._instances, pyramid)
        return slide


def _series_of(path: Path) -> list[Path]:
    """Return the files of a file's series in its folder; the file alone when it states no series."""
    uid = read_series_uid(path)
    if not uid:
        return [path]
    beside = [other for other in path.parent.iterdir() if other.name.lower().endswith(".dcm") and other.is_file()]
    return next((files for files in group_series({path, *beside}).values() if path in files), [path])


def _read_instance(path: Path) -> Instance | None:
    """Read what stands before the pixels; None of a file that is not a whole-slide image."""
    import pydicom  # loading it takes longer than a slide that is not DICOM

    with path.open("rb") as file, pydicom.config.disable_value_validation():
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER)
        if str(header.get("SOPClassUID")) != WHOLE_SLIDE:
            return None
        if header.get("DimensionOrganizationType") == "TILED_SPARSE" or _lacks_order(header):
            file.seek(0)  # the positions of 100,000 frames take seconds, and are read only where they matter
            tags = [*HEADER, "PerFrameFunctionalGroupsSequence"]
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        return Instance(path, header, file.tell())


def _lacks_order(header: Any) -> bool:
    return header.get("DimensionOrganizationType") is None and int(header.get("NumberOfFrames") or 1) > 1


def _left_out(instances: Sequence[Instance], pyramid: Sequence[Sequence[Instance]]) -> list[str]:
    """Return a note on the files of the slide that another file of the same size stands for."""
    used = {part.path for level in pyramid for part in level}
    slide = _slide_of(pyramid[0][0])
    left_out = [one.path.name for one in instances if one.path not in used and _slide_of(one) == slide]
    if not left_out or slide[0] != "slide":
        return []
    more = f" and {len(left_out) - 1} more" if left_out[1:] else ""
    return [f"left out: {left_out[0]}{more}, of the size of a file that is used (copies, or focal planes of their own)"]


def _slide_of(instance: Instance) -> tuple[str, str]:
    """Return what levels of one slide have in common."""
    return instance.kind, f"{instance.header.get('FrameOfReferenceUID')} {instance.header.get('ContainerIdentifier')}"


def _pyramids(instances: Sequence[Instance]) -> Iterator[list[list[Instance]]]:
    """Yield each picture as levels, finest first; the parts of a level are those of a concatenation, in order."""
    groups: dict[tuple[str, str], dict[str, list[Instance]]] = defaultdict(lambda: defaultdict(list))
    for number, instance in enumerate(instances):
        # label, macro and thumbnail are pictures of their own; what is a slide is a level of its pyramid
        group = _slide_of(instance) if instance.kind == "slide" else (instance.kind, str(number))
        part = str(instance.header.get("ConcatenationUID") or number)
        groups[group][part].append(instance)
    for parts in groups.values():
        levels = [sorted(part, key=lambda one: int(one.header.get("ConcatenationFrameOffsetNumber") or 0))
                  for part in parts.values()]  # fmt: skip
        # focal planes or copies may be files of their own
        sizes = {level[0].size_px: level for level in reversed(levels)}  # of two copies of a size the first
        yield sorted(sizes.values(), key=lambda level: -level[0].size_px[0])


def _picture(levels: Sequence[Sequence[Instance]]) -> Picture:
    first = levels[0][0]
    header = first.header
    path = (header.get("OpticalPathSequence") or [{}])[0]
    power = path.get("ObjectiveLensPower")
    stated = tuple(found for found in (first.spacing_um, first.volume_um) if found is not None)
    fault, code = _fault(first)
    photometric = header.get("PhotometricInterpretation")
    return Picture(
        first.kind, tuple(level[0].size_px for level in levels), stated=stated, power=float(power) if power else None,
        colour=f"{header.get('BitsStored')}-bit {photometric}, {header.file_meta.TransferSyntaxUID.name}",
        vendor="dicom", planes=int(header.get("TotalPixelMatrixFocalPlanes") or 1),
        scales=tuple(_scale(first, level[0]) for level in levels), fault=fault, code=code,
    )  # fmt: skip


def _scale(finest: Instance, level: Instance) -> float:
    """Return level-0 pixels per pixel: from the sizes, unless the spacing says that levels are padded."""
    by_size = size_ratio(finest.size_px, level.size_px)
    above, below = finest.spacing_um, level.spacing_um
    # spacings are written with few digits, so sizes are the better source where both agree
    if above is None or below is None or abs(below.x / above.x / by_size - 1) <= SPACING_TOLERANCE:
        return by_size
    stated = below.x / above.x
    whole = round(stated)
    return float(whole) if whole and abs(stated / whole - 1) < 2 * SPACING_TOLERANCE else stated


def _fault(instance: Instance) -> tuple[str, str]:
    header = instance.header
    if int(header.get("SamplesPerPixel", 1)) != 3 or int(header.get("BitsAllocated", 8)) not in (8, 16):
        samples, bits = header.get("SamplesPerPixel"), header.get("BitsAllocated")
        return f"it holds {samples} channel(s) of {bits} bits; eosin reads bright-field RGB", "unsupported-pixels"
    colours = str(header.get("PhotometricInterpretation", "nothing"))
    if colours not in COLOURS and not (colours in PARTIAL and instance.syntax in JPEG):
        return f"its pixels are stated to be {colours}; eosin reads RGB and YBR_FULL, ICT and RCT", "unsupported-pixels"
    if int(header.get("PixelRepresentation") or 0):
        return "its pixels are signed numbers; eosin reads unsigned ones", "unsupported-pixels"
    known = {*JPEG, *DECODERS, *RAW, RLE, DEFLATED_FRAMES}
    if instance.syntax not in known:
        name = header.file_meta.TransferSyntaxUID.name
        return f"its pixels are stored as {name}, which no decoder here knows", "unreadable"
    if instance.frame_px[0] * instance.frame_px[1] > MAX_SEGMENT_PX:
        return f"its frames are {instance.frame_px[0]} x {instance.frame_px[1]} px", "untiled"
    return "", ""


def _is_sparse(instance: Instance) -> bool:
    return bool(instance.header.get("DimensionOrganizationType") == "TILED_SPARSE")


def _level(number: int, parts: Sequence[Instance], files: Mapping[Path, Bytes], plane: int, planes: int) -> Level:
    first = parts[0]
    (width, height), frame = first.size_px, first.frame_px
    across, down = -(-width // frame[0]), -(-height // frame[1])
    tables = [(files[part.path], start, end) for part in parts for start, end in _frames(part)]
    if any("PerFrameFunctionalGroupsSequence" in part.header for part in parts):
        places = _sparse_places(parts, across, plane)
    else:
        places = {index: plane * across * down + index for index in range(across * down)}
        if len(tables) < planes * across * down:
            raise ValueError(f"it has {len(tables)} of the {planes * across * down} frames of {width} x {height} px")
    segments = DicomSegments(first, {index: tables[frame] for index, frame in places.items()}, across * down)
    return Level(segments, number, (width, height), frame)


def _sparse_places(parts: Sequence[Instance], across: int, plane: int) -> dict[int, int]:
    """Return the frame of each tile of one focal plane, from the positions that frames state."""
    found: dict[float, dict[int, int]] = defaultdict(dict)
    width, height = parts[0].frame_px
    frame = 0
    for part in parts:
        for group in part.header.PerFrameFunctionalGroupsSequence:
            at = group.PlanePositionSlideSequence[0]
            x = int(at.ColumnPositionInTotalImagePixelMatrix) - 1
            y = int(at.RowPositionInTotalImagePixelMatrix) - 1
            # frames that overlap or lie anywhere are allowed by the standard; no scanner is known to write them
            if x % width or y % height:
                raise ValueError(f"a frame lies at ({x}, {y}), which is not on the lattice of its frames")
            depth = float(at.get("ZOffsetInSlideCoordinateSystem") or 0)
            # of two optical paths at one place the first is the bright field
            found[depth].setdefault(y // height * across + x // width, frame)
            frame += 1
    depths = sorted(found)
    return found[depths[min(plane, len(depths) - 1)]]


def _frames(part: Instance) -> list[tuple[int, int]]:
    """Return where each frame of a file begins and ends: bytes of pixels, or items that hold them."""
    with part.path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(part.pixels_at)
        explicit = part.syntax != _PREFIX
        head = file.read(12 if explicit else 8)
        order = ">" if part.syntax == BIG_ENDIAN else "<"
        (length,) = struct.unpack(order + "I", head[-4:])
        begin = file.tell()
        if length != UNDEFINED:
            step = (
                part.frame_px[0]
                * part.frame_px[1]
                * int(part.header.SamplesPerPixel)
                * int(part.header.BitsAllocated)
                // 8
            )
            if part.header.PhotometricInterpretation == "YBR_FULL_422":  # two pixels share their colours
                step = step * 2 // 3
            count = min(part.n_frames, min(length, size - begin) // max(step, 1))
            return [(begin + number * step, begin + (number + 1) * step) for number in range(count)]
        return _encapsulated(file, part, begin)


def _encapsulated(file: BinaryIO, part: Instance, begin: int) -> list[tuple[int, int]]:
    _, length = struct.unpack("<II", file.read(8))
    basic = np.frombuffer(file.read(length), "<u4")
    first = begin + 8 + length
    extended = part.header.get("ExtendedOffsetTable")
    if extended:
        # offsets count from the item of the first frame; lengths leave its header out
        starts = np.frombuffer(extended, "<u8").astype(np.int64) + first
        ends = starts + 8 + np.frombuffer(part.header.ExtendedOffsetTableLengths, "<u8").astype(np.int64)
        return list(zip(starts.tolist(), ends.tolist(), strict=True))
    if len(basic) == part.n_frames:
        starts = (basic.astype(np.int64) + first).tolist()
        last = list(_items(file, starts[-1]))[-1][1]
        return list(zip(starts, [*starts[1:], last], strict=True))
    items = list(_items(file, first))
    if len(items) <= part.n_frames:
        return items
    return _joined(file, items)


def _items(file: BinaryIO, place: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each item up to the end of the sequence or of the file."""
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        group, element, length = struct.unpack("<HHI", head)
        if group << 16 | element != ITEM:
            return
        yield place, place + 8 + length
        place += 8 + length


def _joined(file: BinaryIO, items: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Put fragments together where no table says which belong together: a frame begins as its codec begins."""
    frames: list[tuple[int, int]] = []
    for begin, end in items:
        file.seek(begin + 8)
        if frames and not file.read(4).startswith(STARTS):
            frames[-1] = frames[-1][0], end
        else:
            frames.append((begin, end))
    return frames


class DicomSegments(Segments):
    """Frames of one level.

    Parameters
    ----------
    instance : Instance
        The first file of the level; says how frames are stored.
    frames : mapping
        File, begin and end of the frame of each tile.
    needed : int
        Tiles of the level.
    """

    def __init__(self, instance: Instance, frames: Mapping[int, tuple[Bytes, int, int]], needed: int) -> None:
        header = instance.header
        self._frames = frames
        self._needed = needed
        self._size, self._piece = instance.size_px, instance.frame_px
        self._across = -(-self._size[0] // self._piece[0])
        self._syntax = instance.syntax
        self._photometric = str(header.PhotometricInterpretation)
        self._planar = int(header.get("PlanarConfiguration") or 0) == 1
        self._bits = int(header.BitsAllocated)
        self._top = 2 ** int(header.get("BitsStored") or self._bits) - 1
        self.shrinks = self._syntax in JPEG and self._bits == 8

    @cached_property
    def _is_bare(self) -> bool:
        return self._syntax in RAW

    def has(self, index: int) -> bool:
        """Return whether a frame is stored; see `Segments.has`."""
        return index in self._frames

    def missing(self) -> float:
        """Return the share of tiles without a frame."""
        return 1 - len(self._frames) / max(1, self._needed)

    def decode(self, index: int, shrink: int) -> NDArray[np.uint8]:
        """Return the pixels of a frame; see `Segments.decode`."""
        file, begin, end = self._frames[index]
        try:
            data = file.read(begin, end - begin)
            return self._decode(data if self._is_bare else _unpacked(data), index, shrink)
        except (ValueError, RuntimeError, TypeError, IndexError, struct.error, zlib.error) as error:
            raise DecodeError(str(error) or type(error).__name__) from error

    def _decode(self, data: bytes, index: int, shrink: int) -> NDArray[np.uint8]:
        if self._syntax in JPEG:
            return self._decode_jpeg(data, index, shrink)
        pixels = self._plain(data) if self._syntax not in DECODERS else np.asarray(DECODERS[self._syntax](data))
        width, height = self._piece
        if pixels.shape != (height, width, 3):
            raise DecodeError(f"it is {pixels.shape}, not {height} x {width} px of RGB")
        rgb = to_8_bit(pixels, self._top)
        return ycbcr_to_rgb(rgb) if self._stores_ycbcr(data) else rgb

    def _decode_jpeg(self, data: bytes, index: int, shrink: int) -> NDArray[np.uint8]:
        # frames are filled up to an even number of bytes
        data, (width, height) = data.rstrip(b"\0"), self._piece
        stated = self._photometric.startswith("YBR")
        if shrink == 1:
            return decode_whole(data, (width, height), stated=stated)
        size = (width // shrink, height // shrink)
        row, column = divmod(index, self._across)
        whole = [self._size[axis] // shrink - (column, row)[axis] * size[axis] for axis in (0, 1)]
        return without_padding(decode_shrunk(data, size, shrink, stated=stated), (whole[0], whole[1]))

    def _plain(self, data: bytes) -> NDArray[Any]:
        width, height = self._piece
        kind = np.dtype(f"{'>' if self._syntax == BIG_ENDIAN else '<'}u{self._bits // 8}")
        if self._syntax == RLE:
            return (
                np.frombuffer(imagecodecs.dicomrle_decode(data, dtype=kind.str), kind)
                .reshape(3, height, width)
                .transpose(1, 2, 0)
            )
        if self._syntax == DEFLATED_FRAMES:
            data = zlib.decompress(data, -15)
        values = np.frombuffer(data, kind)
        if self._photometric == "YBR_FULL_422":
            return _full_chroma(values, width, height)
        if self._planar:
            return values[: 3 * height * width].reshape(3, height, width).transpose(1, 2, 0)
        return values[: 3 * height * width].reshape(height, width, 3)

    def _stores_ycbcr(self, data: bytes) -> bool:
        """Return whether decoded values are YCbCr: stated so, and not turned to RGB by the codec itself."""
        if not self._photometric.startswith("YBR_FULL"):
            return False  # the transforms YBR_ICT and YBR_RCT are the codec's own
        return not (self._syntax in JPEG2000 and _has_transform(data))


def _unpacked(data: bytes) -> bytes:
    """Return what the items of a frame hold."""
    if int.from_bytes(data[4:8], "little") + 8 == len(data):
        return data[8:]
    parts, place = [], 0
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        parts.append(data[place + 8 : place + 8 + length])
        place += 8 + length
    return b"".join(parts)


def _has_transform(data: bytes) -> bool:
    """Return whether a JPEG 2000 codestream says that its components were transformed from RGB."""
    place = data.find(b"\xff\x52", 0, 4096)
    return place < 0 or len(data) <= place + 8 or data[place + 8] != 0


def _full_chroma(values: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """Return YCbCr of every pixel from pairs that share their colours: Y, Y, Cb, Cr."""
    pairs = values[: 2 * width * height].reshape(height, width // 2, 4)
    full = np.empty((height, width, 3), values.dtype)
    full[:, 0::2, 0], full[:, 1::2, 0] = pairs[..., 0], pairs[..., 1]
    full[:, 0::2, 1:], full[:, 1::2, 1:] = pairs[..., 2:], pairs[..., 2:]
    return full

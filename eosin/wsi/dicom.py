"""Which DICOM files are one slide: the files of a series beside each other."""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

SERIES_UID = (0x0020, 0x000E)
PREAMBLE = 132
HEADER_BYTES = 2**20
UNDEFINED = 0xFFFFFFFF
LONG_FORM = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
ITEM_GROUP, SEQUENCE_END, ITEM_END = 0xFFFE, (0xFFFE, 0xE0DD), (0xFFFE, 0xE00D)


def group_series(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Group the instances of one series in one folder, which OpenSlide opens as one slide from any of them.

    Parameters
    ----------
    paths : iterable of Path
        Files of any kind; only those named ``.dcm`` are looked into.

    Returns
    -------
    dict
        The first file of each slide, by name, to all its files. A file that is alone, or states no series, stands for
        itself.
    """
    slides: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        uid = read_series_uid(path) if path.name.lower().endswith(".dcm") else ""
        slides.setdefault((path.parent.resolve(), uid) if uid else (path, ""), []).append(path)
    return {min(files): sorted(files) for files in slides.values()}


def read_series_uid(path: Path) -> str:
    """Return the Series Instance UID (0020,000E) of a file; empty when it is damaged, no DICOM, or states none.

    Only elements of the file's first level count: sequences before it may name other series.
    """
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
    except OSError:
        return ""
    if data[128:PREAMBLE] != b"DICM":
        return ""
    try:
        for tag, start, length in _elements(data, PREAMBLE):
            if tag == SERIES_UID:
                return data[start : start + length].decode("ascii").rstrip("\0 ")
            if tag > SERIES_UID:
                return ""
    except (struct.error, UnicodeDecodeError):
        pass
    return ""


def _elements(data: bytes, place: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yield tag, start and length of the elements of one level (explicit value representation, little endian)."""
    while place + 8 <= len(data):
        tag, start, length = _element(data, place)
        place = _end_of_sequence(data, start) if length == UNDEFINED else start + length
        yield tag, start, length


def _element(data: bytes, place: int) -> tuple[tuple[int, int], int, int]:
    group, number = struct.unpack_from("<HH", data, place)
    kind = data[place + 4 : place + 6]
    if group == ITEM_GROUP:
        return (group, number), place + 8, struct.unpack_from("<I", data, place + 4)[0]
    if kind in LONG_FORM:
        return (group, number), place + 12, struct.unpack_from("<I", data, place + 8)[0]
    if not (kind.isalpha() and kind.isupper()):
        raise struct.error("no value representation is stated")
    return (group, number), place + 8, struct.unpack_from("<H", data, place + 6)[0]


def _end_of_sequence(data: bytes, place: int) -> int:
    """Return where a sequence or item of undefined length ends."""
    depth = 1
    while depth:
        tag, start, length = _element(data, place)
        if tag in (SEQUENCE_END, ITEM_END):
            depth -= 1
            place = start
        elif length == UNDEFINED:
            depth += 1
            place = start
        elif tag[0] == ITEM_GROUP:
            place = start  # an item of stated length: go through its elements
        else:
            place = start + length
    return place

"""Checksums of the files that eosin reads back, compared before a parser sees a file.

JSON: a damaged number or an exchanged word is valid JSON still. The key ``checksum`` is a SHA-256 over the rest,
whatever its order and blanks.

HDF5: the library can hang or crash on damage. The user block, which it skips, begins with a preamble that holds the
CRC-32 of every byte outside the rows of features, and their place; the rows have checksums of their own.
"""

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from eosin.errors import FeatureFileError

PREAMBLE = struct.Struct("<8sIIQQQ")  # magic, version, checksum, offset of the rows, their bytes, bytes of the file
MAGIC = b"\x89EOSIN\r\n"
VERSION = 1
USER_BLOCK_BYTES = 512
MAX_METADATA_BYTES = 2**30

KEY = "checksum"
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_VALUES = 4_000_000
LARGE_JSON_BYTES, LARGE_JSON_VALUES = 256 * 2**20, 20_000_000  # of what eosin wrote, an object for each slide or tile
MAX_JSON_DEPTH = 64
CHUNK_BYTES = 2**20
NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
TOO_MANY_OPEN = re.compile(rb"[\[{]{%d}" % (MAX_JSON_DEPTH + 1))
MAYBE_HUGE = re.compile(rb"[0-9]{309}|[eE][+]?[0-9]{3}")  # perhaps a number larger than any float, which is refused
JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with its checksum."""
    return {**data, KEY: _checksum(data)}


def is_intact(data: Mapping[str, Any]) -> bool:
    """Return whether data carries a checksum, and it is that of the data."""
    return data.get(KEY) == _checksum({name: value for name, value in data.items() if name != KEY})


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES, most_values: int = MAX_JSON_VALUES) -> Any:
    """Read a JSON file that is measured before it is parsed, so that a hostile one takes neither time nor memory.

    Raises
    ------
    ValueError
        If it is not JSON, larger than `most_bytes`, or holds more values than `most_values` or too many levels.
    OSError
        If it cannot be read.
    """
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes; the limit is {most_bytes:,}")
    with path.open("rb") as file:
        _require_few_values(file, most_values)
        file.seek(0)
        return parse_json(file.read())


def _require_few_values(file: BinaryIO, most: int) -> None:
    """Count commas and brackets: there are never more values, and counting is a hundred times faster than parsing."""
    found = 0
    while chunk := file.read(CHUNK_BYTES):
        found += sum(map(chunk.count, (b",", b"[", b"{")))
        if found > most:
            raise ValueError(f"it may hold more than {most:,} values, the limit")


def parse_json(data: str | bytes) -> Any:
    """Parse JSON.

    Raises
    ------
    ValueError
        Also for NaN, infinity, numbers beyond the largest float, half a surrogate pair, and more levels than
        `MAX_JSON_DEPTH`.
    """
    data = data.encode() if isinstance(data, str) else data
    too_deep = ValueError(f"it has more than {MAX_JSON_DEPTH} levels, the limit")
    if _is_deep(data) and _is_deep(JSON_TEXT.sub(b"", data)):  # brackets inside texts do not count
        raise too_deep
    parse_int, parse_float = (_parse_int, _parse_float) if MAYBE_HUGE.search(data) else (None, None)
    try:
        text = data.decode("utf-8-sig")
        parsed = json.loads(text, parse_constant=_refuse_constant, parse_int=parse_int, parse_float=parse_float)
    except RecursionError:  # levels that are never closed are not counted above
        raise too_deep from None
    if b"\\u" in data:
        json.dumps(parsed, ensure_ascii=False).encode()  # what no file and no terminal takes is refused here
    return parsed


def _is_deep(data: bytes) -> bool:
    """Return whether something is left when the innermost level is taken away as often as is allowed."""
    brackets = data.translate(None, delete=NOT_BRACKETS)
    if TOO_MANY_OPEN.search(brackets):
        return True
    for _ in range(MAX_JSON_DEPTH):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return b"[]" in brackets or b"{}" in brackets


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse_int(digits: str) -> int:
    _parse_float(digits)
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:9]}... is too large a number")
    return value


def seal_image(image: bytearray, *, rows_at: int, rows_bytes: int) -> None:
    """Write the preamble of an HDF5 file into its user block.

    Parameters
    ----------
    image : bytearray
        The file but for its rows, of which it may hold the place or end before it.
    rows_at, rows_bytes : int
        Place and size of the rows in the file; a file without such rows has 0 bytes at its end.
    """
    size = max(len(image), rows_at + rows_bytes)
    image[: PREAMBLE.size] = PREAMBLE.pack(MAGIC, VERSION, 0, rows_at, rows_bytes, size)
    checksum = zlib.crc32(image[rows_at + rows_bytes :], zlib.crc32(image[:rows_at]))
    image[: PREAMBLE.size] = PREAMBLE.pack(MAGIC, VERSION, checksum, rows_at, rows_bytes, size)


def has_preamble(path: Path) -> bool:
    """Return whether a file begins as `seal_image` makes it begin."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_image(path: Path) -> int:
    """Compare every byte outside the rows with its checksum; return the place of the rows.

    Raises
    ------
    FeatureFileError
        If the file has no preamble, another length or another checksum.
    """
    with path.open("rb") as file:
        head = file.read(PREAMBLE.size)
        if len(head) < PREAMBLE.size or not head.startswith(MAGIC):
            raise FeatureFileError(path, "is not a feature file of eosin; `eosin import` reads other tools' files")
        _, version, stated, offset, n_bytes, size = PREAMBLE.unpack(head)
        if version != VERSION:
            raise FeatureFileError(
                path,
                f"has format version {version}, but this eosin reads version {VERSION}; "
                "use the eosin version that wrote the file",
            )
        if path.stat().st_size != size or offset + n_bytes > size or size - n_bytes > MAX_METADATA_BYTES:
            raise FeatureFileError(path, "is cut off or extended after it was written; make it again", code="damaged")
        blank = PREAMBLE.pack(MAGIC, version, 0, offset, n_bytes, size)
        checksum = zlib.crc32(file.read(offset - len(blank) if n_bytes else -1), zlib.crc32(blank))
        file.seek(offset + n_bytes)
        checksum = zlib.crc32(file.read() if n_bytes else b"", checksum)
    if checksum != stated:
        raise FeatureFileError(path, "is damaged in its header or its places; make it again", code="damaged")
    return int(offset)

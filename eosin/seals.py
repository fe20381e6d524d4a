"""JSON that eosin reads back: limits before it is parsed, and a checksum over all that it says.

A damaged number or an exchanged word in such a file is valid JSON still. The key ``checksum`` is a SHA-256 over the
rest, whatever its order and blanks, so that a file that was changed is refused instead of believed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "checksum"
MAX_JSON_BYTES = 256 * 2**20


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with its checksum."""
    return {**data, KEY: _checksum(data)}


def is_intact(data: Mapping[str, Any]) -> bool:
    """Return whether data carries a checksum, and it is that of the data."""
    return data.get(KEY) == _checksum({name: value for name, value in data.items() if name != KEY})


def _checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of limited size and depth.

    Raises
    ------
    ValueError
        If it is not JSON, larger than `most_bytes`, or nested hundreds of levels deep.
    OSError
        If it cannot be read.
    """
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"it has {size} bytes, at most {most_bytes} are read")
    return parse_json(path.read_text(encoding="utf-8-sig"))


def parse_json(text: str) -> Any:
    """Parse JSON text; `ValueError`, too, for NaN, infinity and nesting that exhausts the parser."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested deeper than any file that eosin reads") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")

"""Read GeoJSON feature by feature, so that a file of any size takes the memory of one feature.

Python's JSON decoder wants the whole text. Here the text is read in chunks, the wrapping that QuPath and others write
(FeatureCollection, list, one feature, bare geometry) is walked by hand, and the decoder is given single values only.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 2**20
MAX_VALUE = 64 * 2**20
BLANK = " \t\r\n"


def stream_features(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the features of a GeoJSON file.

    Raises
    ------
    OSError, ValueError, RecursionError
        If the file cannot be read, is not valid JSON, is not GeoJSON, or one feature is larger than 64 MiB.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file.read)
        if text.peek() == "[":
            yield from _list(text)
        elif text.peek() == "{":
            yield from _object(text)
        else:
            raise ValueError("is JSON but no GeoJSON (no FeatureCollection, Feature or geometry)")
        if text.peek():
            raise ValueError("goes on after its end")


class _Text:
    """A text that is read as far as it is needed."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self._buffer = ""
        self._place = 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not blank, or nothing at the end."""
        while True:
            while self._place < len(self._buffer):
                if self._buffer[self._place] not in BLANK:
                    return self._buffer[self._place]
                self._place += 1
            if not self._more(CHUNK):
                return ""

    def take(self, expected: str) -> None:
        """Step over a character."""
        found = self.peek()
        if found != expected:
            raise ValueError(f"expected {expected!r}, found {found or 'the end of the file'!r}")
        self._place += 1

    def value(self) -> Any:
        """Decode one whole value; the part that is read doubles until it holds the value."""
        self.peek()
        wanted = CHUNK
        while True:
            try:
                value, end = self._decode(self._buffer, self._place)
            except ValueError:
                if len(self._buffer) - self._place > MAX_VALUE:
                    raise ValueError(f"has a feature larger than {MAX_VALUE // 2**20} MiB") from None
                if not self._more(wanted):
                    raise
                wanted *= 2
                continue
            if end == len(self._buffer) and self._more(CHUNK):
                continue  # a number may go on
            self._place = end
            return value

    def _more(self, size: int) -> bool:
        part = self._read(size)
        self._buffer = self._buffer[self._place :] + part
        self._place = 0
        return bool(part)


def _list(text: _Text) -> Iterator[dict[str, Any]]:
    text.take("[")
    while text.peek() != "]":
        yield from _features_of(text.value())
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _object(text: _Text) -> Iterator[dict[str, Any]]:
    """Walk the members of the outermost object; features may come before or after the type."""
    members: dict[str, Any] = {}
    has_features = False
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if key == "features" and text.peek() == "[":
            has_features = True
            yield from _list(text)
        else:
            members[key] = text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if not has_features:
        yield from _features_of(members)


def _features_of(item: Any) -> Iterator[dict[str, Any]]:
    if isinstance(item, list):
        for part in item:
            yield from _features_of(part)
        return
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "Feature":
        yield item
    elif kind == "FeatureCollection":
        for feature in item.get("features") or []:
            yield from _features_of(feature)
    elif isinstance(item, dict) and "coordinates" in item:
        yield {"type": "Feature", "geometry": item, "properties": {}}
    else:
        raise ValueError("is JSON but no GeoJSON (no FeatureCollection, Feature or geometry)")

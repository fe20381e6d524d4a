"""Folders that messages leave out: a folder of slides may be called after a patient.

A command tells its paths here. Every line that it says afterwards names a file or a folder by its last part alone, and
a folder of slides as ``<slides>``; with ``--verbose`` nothing is left out.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SLIDES = ("slides", "slide", "donor_slides", "paths")
BEGINS, ENDS = r"(?<![\w./-])", r"(?![\w/-])"
BELOW = r"(?:(?![^/\n]*\.\w{2,8}\b)[^/\n]*/)*"
"""Folders on the way to a file: parts without a suffix, as a name may hold blanks and commas."""


class Folders:
    """What is left out of the lines of one command."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}

    def add(self, arguments: Mapping[str, Any]) -> None:
        """Learn the paths of a command from its arguments."""
        for name, value in arguments.items():
            for path in _paths(value):
                for spelled in {path, path.absolute(), path.resolve()}:
                    self._learn(spelled)
                    if name in SLIDES and (path.is_dir() or not path.suffix):
                        self._hide(spelled, f"<{name.replace('_', '-')}>")

    def _learn(self, path: Path) -> None:
        for parent in path.parents:
            if parent.name:
                self._rules.setdefault(f"{BEGINS}{re.escape(str(parent))}{os.sep}", "")
            if parent.name and parent.is_absolute():
                self._rules.setdefault(f"{BEGINS}{re.escape(str(parent))}{ENDS}", "<folder>")

    def _hide(self, path: Path, placeholder: str) -> None:
        is_word = len(path.parts) == 1  # `--slides slides`: the word has other meanings in the midst of a line
        if str(path) not in SLIDES:  # a folder called slides names nobody, and tables have slides, too
            self._rules[
                rf"(?:(?<=: )|^){re.escape(str(path))}(?=:)" if is_word else f"{BEGINS}{re.escape(str(path))}{ENDS}"
            ] = placeholder
        self._rules[f"{BEGINS}{re.escape(str(path))}{os.sep}{BELOW}"] = ""

    def left_out(self, text: str) -> str:
        """Return a text without them."""
        for pattern in sorted(self._rules, key=len, reverse=True):  # of two that begin alike the longer is meant
            text = re.sub(pattern, self._rules[pattern], text)
        return text


def _paths(value: object) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, str) and os.sep in value and Path(value).parent.is_dir():
        yield Path(value)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)

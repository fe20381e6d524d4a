"""Readers: what each must do, and where they register. None is known here; `_slide_file.py` adds those of eosin."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TypeVar

from eosin.errors import SlideOpenError
from eosin.plugins import load_plugins
from eosin.wsi._slide import Slide
from eosin.wsi.inventory import Picture, choices, choose_picture, choose_plane, image_name

__all__ = ["READERS", "Reader"]

HEAD_BYTES = 4096


class Reader(ABC):
    """An open file of one kind: lists the pictures in it, and opens one of them.

    A subclass lists in its constructor and raises `SlideOpenError` for a file of its kind that is damaged.

    Parameters
    ----------
    path : Path
        A file that `takes` said yes to.
    """

    name: ClassVar[str]
    """Shown to a person."""
    pictures: Sequence[Picture]
    """Everything that the file holds, in its order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether a file is of this kind, by what it is; never by whether a library can open it.

        Parameters
        ----------
        path : Path
            The file; a folder for formats that are folders.
        head : bytes
            Its first 4096 bytes; none for a folder.
        """

    @abstractmethod
    def open(self, picture: Picture, plane: int, mpp: float | None) -> Slide:
        """Open one of `pictures`.

        Parameters
        ----------
        picture : Picture
            Which.
        plane : int
            Focal plane, counted from 0.
        mpp : float or None
            The user's µm per level-0 pixel.
        """

    def slide(self, *, scene: int | None = None, plane: int | None = None, mpp: float | None = None) -> Slide:
        """Choose the picture that is the slide and open it; see `choose_picture` and `choose_plane`."""
        picture = choose_picture(self.pictures, self.path, scene=scene)
        number = choose_plane(picture, self.path, plane)
        slide = self.open(picture, number, mpp)
        slide.image = image_name(self.pictures, picture, number)
        slide.notes += choices(self.pictures, picture, number)
        return slide

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open between listing and opening
        """Release what a slide opened from here does not need."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


R = TypeVar("R", bound=type[Reader])


class Readers:
    """Kinds of readers; the last to register is asked first, so that a plug-in may replace one of these."""

    def __init__(self) -> None:
        self._known: list[type[Reader]] = []

    def register(self, kind: R) -> R:
        """Add a reader; a class decorator."""
        self._known = [known for known in self._known if known.__qualname__ != kind.__qualname__]
        self._known.insert(0, kind)
        self._known.sort(key=lambda known: known.__module__.startswith("eosin."))  # a plug-in may be imported before us
        return kind

    def find(self, path: Path) -> type[Reader]:
        """Return the reader for a file.

        Raises
        ------
        SlideOpenError
            Code ``unsupported`` if no reader takes it, ``unreadable`` if the system refuses it.
        ConfigError
            If a plug-in cannot be imported.
        """
        load_plugins()
        head = _head(path)
        for kind in self._known:
            if kind.takes(path, head):
                return kind
        raise SlideOpenError(path, "eosin cannot read this format", code="unsupported")


READERS = Readers()


def _head(path: Path) -> bytes:
    if path.is_dir():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise SlideOpenError(path, f"the file cannot be read: {error.strerror}") from error

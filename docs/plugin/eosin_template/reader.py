"""A slide reader: pixels in a NumPy file."""

from pathlib import Path

import numpy as np

from eosin.wsi import ArraySlide, Slide
from eosin.wsi.inventory import Picture
from eosin.wsi.reader import READERS, Reader


@READERS.register
class NumpyReader(Reader):
    """Files ``.npy`` with one picture, (height, width, 3) uint8."""

    name = "numpy"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._pixels = np.load(path)
        self.pictures = [Picture("slide", ((self._pixels.shape[1], self._pixels.shape[0]),))]

    @classmethod
    def takes(cls, path: Path, head: bytes) -> bool:
        """Return whether a file starts as NumPy's do."""
        return head.startswith(b"\x93NUMPY")

    def open(self, picture: Picture, plane: int, mpp: float | None) -> Slide:
        """Return the picture as a slide."""
        return ArraySlide(self._pixels, mpp=mpp, path=self.path)

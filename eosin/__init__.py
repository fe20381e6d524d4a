"""eosin: computational pathology from slide pixels to explained predictions."""

from eosin import _moved

__version__ = "0.1.0"

_moved.install()

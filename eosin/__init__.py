"""eosin: computational pathology from slide pixels to explained predictions."""

__version__ = "0.1.0"

"""The readers of eosin; importing this registers them, the last is asked first."""

from eosin.wsi import _array_impl, _openslide_impl, _tiff_impl, _dicom_impl, _zarr_impl  # noqa: F401, I001

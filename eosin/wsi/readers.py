"""The readers of eosin; importing this registers them, the last is asked first."""

from eosin.wsi import array_impl, openslide_impl, tiff_impl, dicom_impl, zarr_impl  # noqa: F401, I001

"""Directories of TIFF files, against what tifffile reads; damaged ones end as one kind of error."""

import io
import struct

import numpy as np
import pytest
import tifffile

from eosin.wsi._directory import read_directories

NAMES = (
    "imagewidth", "imagelength", "tilewidth", "tilelength", "is_tiled", "compression", "photometric", "samplesperpixel",
    "bitspersample", "planarconfig",
)  # fmt: skip


def written(tissue_picture, *, bigtiff=False, order="<", **options):
    buffer = io.BytesIO()
    common = {"photometric": "rgb", "metadata": None, **options}
    with tifffile.TiffWriter(buffer, bigtiff=bigtiff, byteorder=order) as tiff:
        tiff.write(tissue_picture, description="Aperio of a person", tile=(256, 256), **common)
        tiff.write(tissue_picture[::2, ::2], tile=(128, 128), subfiletype=1, **common)
        tiff.write(tissue_picture[::8, ::8], rowsperstrip=8, **common)
    buffer.seek(0)  # tifffile counts from where it finds a buffer
    return buffer


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_what_it_reads_is_what_tifffile_reads(tissue_picture, compression, bigtiff, order):
    buffer = written(tissue_picture, bigtiff=bigtiff, order=order, compression=compression)
    with tifffile.TiffFile(buffer) as tiff:
        found = read_directories(buffer)
        assert len(found) == 3
        for directory, page in zip(found, tiff.pages, strict=True):
            wanted = {name: int(getattr(page, name)) for name in NAMES}
            assert {name: int(getattr(directory, name)) for name in NAMES} == wanted
            assert directory.jpegtables == page.jpegtables
            assert directory.description == page.description
            if page.is_tiled:
                assert tuple(directory.dataoffsets) == page.dataoffsets
                assert tuple(directory.databytecounts) == page.databytecounts


def test_damage_is_a_value_error_or_a_readable_directory(tissue_picture):
    data = bytearray(written(tissue_picture[:300, :300], compression="deflate").getvalue())
    rng = np.random.default_rng(0)
    places = [struct.unpack_from("<I", data, 4)[0] + step for step in range(200)] + list(range(8))
    outcomes = set()
    for number in range(400):
        changed = bytearray(data)
        changed[places[number % len(places)]] = int(rng.integers(256))
        try:
            outcomes.add(len(read_directories(io.BytesIO(changed))))
        except ValueError:
            outcomes.add(0)
    assert {0, 3} <= outcomes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:4], "is cut off inside"),
        (lambda data: b"PK\x03\x04" + data[4:], "not a TIFF"),
        (lambda data: data[:2] + b"\x2c\x00" + data[4:], "not a TIFF"),
        (lambda data: data[: len(data) // 2], "is cut off inside"),
        (lambda data: data[:4] + struct.pack("<I", len(data)) + data[8:], "is cut off inside"),
        (lambda data: data[:4] + struct.pack("<I", 2) + data[8:], "is cut off inside|tags|form a loop"),
    ],
)
def test_what_is_no_tiff_or_cut_off_is_told(tissue_picture, change, said):
    data = written(tissue_picture[:300, :300], compression="deflate").getvalue()
    with pytest.raises(ValueError, match=said):
        read_directories(io.BytesIO(change(data)))


def test_directories_that_lead_back_end():
    directory = struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 16) + struct.pack("<I", 8)
    with pytest.raises(ValueError, match="form a loop"):
        read_directories(io.BytesIO(b"II\x2a\x00" + struct.pack("<I", 8) + directory))

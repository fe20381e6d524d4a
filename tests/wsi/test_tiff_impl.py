import io
import struct
import weakref
from collections import Counter

import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.errors import CorruptSlideError, SlideOpenError
from eosin.wsi import _tiled as tiled
from eosin.wsi._array_impl import ArraySlide
from eosin.wsi._grid import Tiling, make_grid
from eosin.wsi._jpeg import DecodeError, decode_reduced
from eosin.wsi._openslide_impl import OpenSlideSlide
from eosin.wsi._segments import Level
from eosin.wsi._slide_file import open_slide
from eosin.wsi._tiff_impl import TiffSegments
from eosin.wsi._tiled import TiledSlide
from eosin.wsi._tiles import iterate_tiles
from eosin.wsi._tissue import find_tissue

MAE_LIMIT = 0.75  # hard-edged nuclei; 0.25 on a real slide
JPEGS = {
    "4:2:0": {"subsampling": (2, 2)},
    "4:2:2": {"subsampling": (2, 1)},
    "4:4:4": {"subsampling": (1, 1)},
    "rgb": {"colors": "RGB"},
}


@pytest.fixture
def write_jpeg_slide(tmp_path, tissue_picture):
    def write(name="a.tiff", *, subsampling=None, colors=None, levels=(2, 8), tile=256, big=False):
        path = tmp_path / name
        common = {
            "tile": (tile, tile), "photometric": "rgb", "compression": "jpeg", "metadata": None,
            "compressionargs": {"level": 85} | ({"outcolorspace": colors} if colors else {}),
        }  # fmt: skip
        if subsampling:
            common["subsampling"] = subsampling
        with tifffile.TiffWriter(path, bigtiff=big) as tiff:
            tiff.write(tissue_picture, resolution=(4e4, 4e4), resolutionunit="CENTIMETER", **common)
            for factor in levels:
                tiff.write(np.asarray(Image.fromarray(tissue_picture).reduce(factor)), subfiletype=1, **common)
        return path

    return write


@pytest.mark.parametrize("kind", JPEGS)
def test_stored_pixels_equal_openslides(write_jpeg_slide, kind):
    path = write_jpeg_slide(**JPEGS[kind], big=kind == "rgb")
    rng = np.random.default_rng(3)
    with open_slide(path) as direct, OpenSlideSlide(path) as reference:
        assert isinstance(direct, TiledSlide)
        assert direct.size_px0 == reference.size_px0
        assert direct.mpp == reference.mpp
        for factor in (1, 2, 8):
            for _ in range(12):
                x, y = (int(rng.integers(-60, side)) // 8 * 8 for side in direct.size_px0)
                size = (int(rng.integers(1, 300)), int(rng.integers(1, 300)))
                mpp = factor * direct.mpp
                assert np.array_equal(direct.read((x, y), size, mpp), reference.read((x, y), size, mpp))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "small.svs"])
def test_real_slides_equal_openslides(shared, name):
    path = shared / "data" / "slides" / name
    with open_slide(path) as direct, OpenSlideSlide(path) as reference:
        assert isinstance(direct, TiledSlide)
        assert direct.facts()["reader"] == "direct TIFF"
        found, wanted = (slide.read((0, 0), slide.size_px0, slide.mpp) for slide in (direct, reference))
    assert np.array_equal(found, wanted)


def scaled_error(direct, reference, factor):
    """Grey levels by which scaled decoding differs from decoding and averaging."""
    width, height = (side // factor for side in direct.size_px0)
    found, wanted = (
        slide.read((0, 0), (width, height), slide.mpp * factor).astype(int) for slide in (direct, reference)
    )
    return np.abs(found - wanted)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "rgb"])
def test_scaled_decoding_is_close_to_averaging(write_jpeg_slide, kind, factor):
    path = write_jpeg_slide(**JPEGS[kind], levels=())
    with open_slide(path) as direct, OpenSlideSlide(path) as reference:
        error = scaled_error(direct, reference, factor)
    assert error.mean() < MAE_LIMIT
    assert np.percentile(error, 99) <= 8


@pytest.mark.shared
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_scaled_decoding_of_a_real_slide(shared, factor):
    path = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path) as direct, OpenSlideSlide(path) as reference:
        assert scaled_error(direct, reference, factor).mean() < 0.25


@pytest.mark.parametrize("factor", [4, 16, 23.7])
def test_overviews_from_scaled_decoding_are_close(write_jpeg_slide, factor):
    path = write_jpeg_slide(levels=())
    with open_slide(path) as direct, OpenSlideSlide(path) as reference:
        size = tuple(int(side / factor) for side in direct.size_px0)
        found, wanted = (slide.read((0, 0), size, slide.mpp * factor).astype(int) for slide in (direct, reference))
    assert np.abs(found - wanted).mean() < MAE_LIMIT


@pytest.mark.parametrize("origin", [(0, 0), (2, 6), (512, 254), (1100, 700)])
def test_scaled_decoding_keeps_the_place(write_jpeg_slide, tissue_picture, origin):
    with open_slide(write_jpeg_slide(levels=())) as direct, ArraySlide(tissue_picture, mpp=direct.mpp) as plain:
        found, wanted = (slide.read(origin, (200, 200), slide.mpp * 2).astype(float) for slide in (direct, plain))
        shifted = plain.read((origin[0] + 2, origin[1]), (200, 200), plain.mpp * 2)
    assert np.abs(found - wanted).mean() < 0.6 * np.abs(found - shifted).mean() + 1


def test_the_edge_of_a_scaled_picture_shows_no_padding(write_jpeg_slide, tissue_picture, tmp_path):
    dark = np.full((301, 403, 3), 90, np.uint8)
    common = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "metadata": None}
    tifffile.imwrite(tmp_path / "d.tiff", dark, resolution=(4e4, 4e4), resolutionunit="CENTIMETER", **common)
    with open_slide(tmp_path / "d.tiff") as slide:
        assert isinstance(slide, TiledSlide)
        for factor in (2, 4, 8):
            size = (-(-403 // factor), -(-301 // factor))
            assert np.abs(slide.read((0, 0), size, slide.mpp * factor).astype(int) - 90).max() <= 2


def test_missing_tiles_are_background_as_with_openslide(write_jpeg_slide):
    path = write_jpeg_slide(levels=())
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("TileByteCounts", "TileOffsets"):
            values = list(tiff.pages[0].tags[name].value)
            values[1] = 0
            tiff.pages[0].tags[name].overwrite(values)
    with open_slide(path) as direct, OpenSlideSlide(path) as reference:
        assert isinstance(direct, TiledSlide)
        found, wanted = (slide.read((200, 0), (400, 300), slide.mpp) for slide in (direct, reference))
        assert (direct.read((256, 0), (128, 128), 2 * direct.mpp) == 255).all()
    assert np.array_equal(found, wanted)
    assert (found[:256, 56:312] == 255).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_each_stored_tile_is_decoded_once(write_jpeg_slide, monkeypatch, threads):
    decoded = Counter()
    plain = Level.decode

    def counted(level, index):
        decoded[level.number, level.shrink, index] += 1
        return plain(level, index)

    with open_slide(write_jpeg_slide(tile=240)) as slide:
        mask = find_tissue(slide)
        tiling = Tiling(mpp=0.25, patch_size=128, overlap=32)
        grid = make_grid(mask, tiling, slide_size_px0=slide.size_px0, slide_mpp=slide.mpp)
        monkeypatch.setattr(Level, "decode", counted)
        for _ in iterate_tiles(slide, grid, batch_size=8, threads=threads):
            pass
    assert grid.n_tiles > 60
    assert set(decoded.values()) == {1}


def damage(path, index, change):
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[index], tiff.pages[0].databytecounts[index]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = change(bytes(data[offset : offset + count]))
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        lambda data: bytes(len(data)),
        lambda data: data.replace(b"\xff\xc0\x00\x11\x08\x01\x00\x01\x00", b"\xff\xc0\x00\x11\x08\xf0\x00\xf0\x00"),
    ],
    ids=["cut off", "zeros", "60,000 px declared"],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_damaged_tiles_are_errors_with_their_place(write_jpeg_slide, change, factor):
    path = write_jpeg_slide(levels=())
    damage(path, 8, change)  # second row, second column
    with open_slide(path) as slide:
        assert isinstance(slide, TiledSlide)
        for _ in range(2):
            with pytest.raises(CorruptSlideError, match=r"segment 8 at level-0 \(256, 256\)"):
                slide.read((256, 256), (32, 32), slide.mpp * factor)
        assert slide.read((600, 0), (64, 64), slide.mpp * factor).shape == (64, 64, 3)


def test_a_truncated_file_is_an_error_where_it_ends(write_jpeg_slide):
    path = write_jpeg_slide(levels=())
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages[0].dataoffsets[-1] + 100
    slide = open_slide(path)
    with slide:
        assert isinstance(slide, TiledSlide)
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(CorruptSlideError, match="the file ends before it"):
            slide.read((1560, 1100), (32, 32), slide.mpp)


@pytest.mark.parametrize(
    ("compression", "tile"), [("deflate", 256), (None, None), ("lzw", None), ("jpeg", 128), ("jpeg2000", 256)]
)
def test_ome_tiffs_are_read_with_their_pyramid_and_mpp(tmp_path, tissue_picture, compression, tile):
    path = tmp_path / "a.ome.tif"
    shape = {"tile": (tile, tile)} if tile else {"rowsperstrip": 32}
    common = {"photometric": "rgb", "compression": compression, **shape}
    half = np.asarray(Image.fromarray(tissue_picture).reduce(2))
    metadata = {"axes": "YXS", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(tissue_picture, subifds=1, metadata=metadata, **common)
        tiff.write(half, subfiletype=1, **common)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert slide.mpp_source == "ome"
        assert slide.facts()["level_downsamples"] == [1.0, 2.0]
        found = slide.read((500, 400), (256, 256), 0.25)
        halves = slide.read((500, 400), (128, 128), 0.5)
    lossy = 14 if compression == "jpeg" else 0.01
    assert np.abs(found.astype(int) - tissue_picture[400:656, 500:756]).mean() < lossy
    assert np.abs(halves.astype(int) - half[200:328, 250:378]).mean() < lossy


@pytest.mark.parametrize("strips", [8, 1200])
def test_strips_that_openslide_refuses_are_read(write_slide, tissue_picture, tmp_path, strips):
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, tissue_picture, rowsperstrip=strips, resolution=(50800, 50800), resolutionunit="INCH")
    with pytest.raises(SlideOpenError):
        OpenSlideSlide(path)
    with open_slide(path) as slide:
        assert isinstance(slide, TiledSlide)
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.5), "tiff-resolution")
        assert np.array_equal(slide.read((0, 0), slide.size_px0, 0.5), tissue_picture)
        assert (slide.read((1590, 1190), (20, 20), 0.5)[10:] == 255).all()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((300, 300), np.uint8), ((3, 300, 300), np.uint8), ((300, 300, 3), np.float32)]
)
def test_what_is_not_rgb_of_8_or_16_bits_is_refused(tmp_path, shape, dtype):
    path = tmp_path / "a.tif"
    photometric = "rgb" if len(shape) == 3 and shape[2] == 3 else "minisblack"
    tifffile.imwrite(path, np.zeros(shape, dtype), photometric=photometric)
    with pytest.raises(SlideOpenError, match="eosin reads 8- and 16-bit RGB") as caught:
        open_slide(path)
    assert caught.value.code == "unsupported-pixels"


def test_a_giant_stored_in_one_piece_is_refused_with_the_conversion(tmp_path):
    path = tmp_path / "giant.tif"
    tifffile.imwrite(path, np.zeros((16, 16, 3), np.uint8), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[name].overwrite(60_000)
    with pytest.raises(SlideOpenError, match=r"vips tiffsave giant\.tif out\.tif --tile --pyramid") as caught:
        open_slide(path)
    assert caught.value.code == "untiled"


def test_plain_tiffs_tell_nothing_private(tmp_path, tissue_picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue_picture, description="Jane Doe", software="Jane Doe", rowsperstrip=8)
    with open_slide(path) as slide:
        assert "Jane" not in str(slide.facts())


def test_a_garbled_directory_is_a_clear_error(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", 3) + b"\xff" * 36)
    with pytest.raises(SlideOpenError):
        open_slide(path)


def test_damage_is_told_by_errors_not_by_another_librarys_log(tmp_path, tissue_picture, caplog):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue_picture, rowsperstrip=8)
    data = path.read_bytes()
    path.write_bytes(data[:8] + bytes(60) + data[68:])
    with pytest.raises(SlideOpenError):
        open_slide(path)
    assert caplog.text == ""


def test_a_picture_without_width_is_refused(tmp_path, tissue_picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue_picture, rowsperstrip=8)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(0)
    with pytest.raises(SlideOpenError):
        open_slide(path)


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_reduced_decoding_is_pillows_draft(tissue_picture, shrink, subsampling):
    buffer = io.BytesIO()
    Image.fromarray(tissue_picture[400:656, 500:756]).save(buffer, "JPEG", quality=85, subsampling=subsampling)
    data, size = buffer.getvalue(), (256 // shrink, 256 // shrink)
    with Image.open(buffer) as image:
        image.draft("RGB", size)
        wanted = np.asarray(image)
    assert wanted.shape == (*size, 3)
    assert np.array_equal(decode_reduced(data, size, shrink), wanted)
    for bad in (data[: len(data) // 2], data[:100], b"", b"no picture" * 50):
        with pytest.raises(DecodeError):
            decode_reduced(bad, size, shrink)
    with pytest.raises(DecodeError, match="256 x 256"):
        decode_reduced(data, (64, 65), shrink)


def test_many_segments_are_decoded_in_threads_to_the_same_pixels(write_slide, tissue_picture, monkeypatch):
    path = write_slide("a.tiff", tissue_picture, compression="jpeg", tile=64)
    read = []
    for many in (1, 10_000):
        monkeypatch.setattr(tiled, "MANY_SEGMENTS", many)
        with open_slide(path) as slide:
            read.append(slide.read((-30, -20), (1700, 1300), 0.5))
    assert np.array_equal(read[0], read[1])
    assert (read[0][:20] == 255).all()


def test_a_damaged_segment_among_many_is_told(write_slide, tissue_picture, monkeypatch):
    path = write_slide("a.tiff", tissue_picture, compression="jpeg", tile=64)
    monkeypatch.setattr(tiled, "MANY_SEGMENTS", 1)
    with tifffile.TiffFile(path) as tiff:
        offset, count = (values[200] for values in (tiff.pages.first.dataoffsets, tiff.pages.first.databytecounts))
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(CorruptSlideError, match="segment 200"):
        slide.read((0, 0), (1600, 1200), 0.5)


def test_tables_of_different_lengths_are_damage(write_slide, tissue_picture):
    path = write_slide("a.ome.tif", tissue_picture, tile=None)
    with tifffile.TiffFile(path) as tiff:
        entry = tiff.pages.first.tags["StripOffsets"].offset
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, entry + 4, 0)  # the number of offsets
    path.write_bytes(data)
    with pytest.raises(SlideOpenError, match="damaged"):
        open_slide(path)


def test_a_tile_on_the_files_lattice_is_not_copied_and_cannot_be_spoilt(write_slide, tissue_picture):
    with open_slide(write_slide("a.tiff", tissue_picture, compression="jpeg")) as slide:
        first, again = (slide.read((512, 256), (256, 256), 0.5) for _ in range(2))
        assert np.shares_memory(first, again)
        assert not first.flags.writeable
        part = slide.read((520, 260), (100, 90), 0.5)
        across = slide.read((500, 250), (256, 256), 0.5)
    assert np.array_equal(part, first[4:94, 8:108])
    assert np.array_equal(across[6:, 12:], first[:250, :244])


def test_a_piece_that_is_smaller_than_stated_is_damage(write_slide, tissue_picture, monkeypatch):
    path = write_slide("a.ome.tif", tissue_picture, tile=None)
    small = np.zeros((3, 1600, 3), np.uint8)
    with open_slide(path) as slide:
        monkeypatch.setattr(TiffSegments, "decode", lambda *_: small)
        with pytest.raises(CorruptSlideError, match="only 1600 x 3 px"):
            slide.read((0, 0), (300, 300), 0.5)


def test_pieces_of_no_size_are_damage(write_slide, tissue_picture):
    path = write_slide("a.ome.tif", tissue_picture, tile=None)
    with tifffile.TiffFile(path) as tiff:
        entry = tiff.pages.first.tags["RowsPerStrip"].valueoffset
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, entry, 0)
    path.write_bytes(data)
    with pytest.raises(SlideOpenError, match="pieces of 1600 x 0 px"):
        open_slide(path)


def test_a_picture_that_is_larger_than_its_table_is_damage_and_not_a_sea_of_glass(write_slide, tissue_picture):
    path = write_slide("a.ome.tif", tissue_picture, tile=None)
    with tifffile.TiffFile(path) as tiff:
        entry = tiff.pages.first.tags["ImageLength"].valueoffset
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, entry, 60_000)
    path.write_bytes(data)
    with pytest.raises(SlideOpenError, match="lists 150 of the 7500 stored pieces"):
        open_slide(path)


def test_a_closed_slide_keeps_no_pixels(tmp_path):
    """It refers to itself, so that it may live long after it was closed."""
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, np.full((512, 512, 3), 200, np.uint8), tile=(256, 256), photometric="rgb")
    slide = open_slide(path, mpp=0.5)
    slide.read_level(0, (0, 0), (512, 512))
    kept = [weakref.ref(pixels) for pixels in slide._cache._kept.values()]
    assert kept
    slide.close()
    assert not any(pixels() is not None for pixels in kept)

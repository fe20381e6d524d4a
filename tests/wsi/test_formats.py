"""Every way of storing one picture gives that picture: against the array that was written, or the library's decoder."""

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.errors import SlideError, SlideOpenError
from eosin.wsi._slide_file import open_file, open_slide

CM = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
LOSSLESS = ["deflate", "lzw", "zstd", "lzma", "packbits", "png", None]
LOSSY = {  # compression: what writes it, and the decoder that says what is right
    "webp": ({"level": 80}, imagecodecs.webp_decode),
    "jpeg2000": ({"level": 60}, imagecodecs.jpeg2k_decode),
    "jpegxl": ({"distance": 1.0}, imagecodecs.jpegxl_decode),
    "jpegxr": ({"level": 80}, imagecodecs.jpegxr_decode),
}


@pytest.fixture(scope="module")
def picture(tissue_picture):
    return np.ascontiguousarray(tissue_picture[300:813, 400:1101])


def whole(path, **options):
    with open_slide(path, **options) as slide:
        return slide.read_level(0, (0, 0), slide.size_px0)


@pytest.mark.parametrize("layout", ["tiles", "strips", "one strip", "planar tiles", "planar strips"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", LOSSLESS)
def test_lossless_tiffs_are_bit_equal(tmp_path, picture, compression, order, layout):
    shape = {"tile": (128, 128)} if "tiles" in layout else {"rowsperstrip": 513 if layout == "one strip" else 16}
    planar = layout.startswith("planar")
    data = np.moveaxis(picture, -1, 0) if planar else picture
    if compression == "png" and planar:
        pytest.skip("tifffile writes no PNG planes")
    predictor = compression in ("deflate", "lzw", "zstd")
    tifffile.imwrite(
        tmp_path / "a.tif", data, byteorder=order, bigtiff=order == ">", compression=compression, metadata=None,
        photometric="rgb", planarconfig="separate" if planar else "contig", predictor=predictor, **shape, **CM,
    )  # fmt: skip
    assert np.array_equal(whole(tmp_path / "a.tif"), picture)


@pytest.mark.parametrize("compression", LOSSY)
def test_lossy_tiffs_are_those_of_their_decoder(tmp_path, picture, compression):
    arguments, decode = LOSSY[compression]
    options = {"compression": compression, "compressionargs": arguments, "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", picture, tile=(256, 256), **options, **CM)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        place, count = (values[1] for values in (tiff.pages.first.dataoffsets, tiff.pages.first.databytecounts))
    stored = decode((tmp_path / "a.tif").read_bytes()[place : place + count])
    with open_slide(tmp_path / "a.tif") as slide:
        found = slide.read_level(0, (256, 0), (256, 256))
    assert np.array_equal(found, stored)
    assert np.abs(found.astype(int) - picture[:256, 256:512]).mean() < 8


@pytest.mark.parametrize(("factor", "stated"), [(257, None), (16, 4095), (4, 1023)])
def test_16_bits_are_scaled_as_the_metadata_say(tmp_path, picture, factor, stated):
    tags = [] if stated is None else [(281, "H", 3, (stated,) * 3, False)]
    deep = picture.astype(np.uint16) * factor
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", tile=(128, 128), extratags=tags, metadata=None, **CM)
    assert np.abs(whole(tmp_path / "a.tif").astype(int) - picture).max() <= (0 if stated is None else 1)


def test_significant_bits_of_ome_scale_16_bits(tmp_path, picture):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "SignificantBits": 12}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        tiff.write(picture.astype(np.uint16) * 16, photometric="rgb", tile=(128, 128), metadata=metadata)
    assert np.abs(whole(tmp_path / "a.ome.tif").astype(int) - picture).max() <= 1


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha", "unspecified"])
def test_a_fourth_channel_is_alpha_only_when_it_is_said_to_be(tmp_path, picture, alpha):
    share = np.full((*picture.shape[:2], 1), 255, np.uint8)
    share[:, :100] = 0
    stored = np.concatenate([picture * (share > 0) if alpha == "assocalpha" else picture, share], axis=-1)
    options = {"photometric": "rgb", "extrasamples": [alpha], "metadata": None, "tile": (128, 128)}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options, **CM)
    wanted = picture.copy()
    if alpha != "unspecified":
        wanted[:, :100] = 255
    assert np.array_equal(whole(tmp_path / "a.tif"), wanted)


TURNS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def turned(picture, orientation):
    """Return how Pillow shows a picture that was stored with an Orientation."""
    turn = TURNS[orientation]
    return picture if turn is None else np.asarray(Image.fromarray(picture).transpose(turn))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("compression", ["lzw", "jpeg"])
def test_orientation_turns_the_picture_and_every_level(tmp_path, picture, orientation, compression):
    options = {"photometric": "rgb", "compression": compression, "tile": (128, 128), "metadata": None}
    tag = [(274, "H", 1, orientation, False)]
    half = np.asarray(Image.fromarray(picture).reduce(2))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(picture, extratags=tag, **options, **CM)
        tiff.write(half, subfiletype=1, extratags=tag, **options)
    lossy = 0 if compression == "lzw" else 60
    with open_slide(tmp_path / "a.tif") as slide:
        wanted = turned(picture, orientation)
        assert slide.size_px0 == (wanted.shape[1], wanted.shape[0])
        found = slide.read((0, 0), slide.size_px0, 0.5)
        assert np.abs(found.astype(int) - wanted).max() <= lossy
        assert np.array_equal(slide.read((77, 51), (130, 140), 0.5), found[51:191, 77:207])
        small = turned(half, orientation)
        level = slide.read_level(1, (0, 0), (small.shape[1], small.shape[0]))
        assert np.abs(level.astype(int) - small).max() <= lossy
        for factor in (2, 4, 8):  # scaled decodings keep the place, too
            size = (256 // factor, 256 // factor)
            cells = wanted[64:320, 64:320].reshape(size[1], factor, size[0], factor, 3).mean(axis=(1, 3))
            read = slide.read((64, 64), size, 0.5 * factor).astype(float)
            moved = wanted[64:320, 68:324].reshape(size[1], factor, size[0], factor, 3).mean(axis=(1, 3))
            assert np.abs(read - cells).mean() < np.abs(read - moved).mean()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("layout", [{"tile": (128, 128)}, {"rowsperstrip": 50}])
def test_levels_of_a_turned_picture_lie_where_they_were_before(tmp_path, picture, orientation, layout):
    picture = picture[:505, :697]  # the last column and row of a level are partly filled, and come first when turned
    options = {"photometric": "rgb", "compression": "deflate", "metadata": None, **layout}
    tag = [(274, "H", 1, orientation, False)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(picture, extratags=tag, **options, **CM)
        for factor in (2, 8):
            tiff.write(np.asarray(Image.fromarray(picture).reduce(factor)), subfiletype=1, extratags=tag, **options)
    wanted = turned(picture, orientation).astype(float)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.residual_px0 < 4  # half a pixel of the level
        assert set(slide.offsets_px0[2]) <= {0.0, -7.0}  # 697 = 8 * 88 - 7, 505 = 8 * 64 - 7
        found = slide.read((64, 64), (48, 48), 4.0)
    right, left, up = (
        np.abs(found - wanted[y : y + 384, x : x + 384].reshape(48, 8, 48, 8, 3).mean(axis=(1, 3))).mean()
        for x, y in ((64, 64), (60, 64), (64, 60))
    )
    assert right < min(left, up) / 1.5


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_of_a_jpeg_picture(tmp_path, picture, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(whole(tmp_path / "a.png", mpp=0.5), turned(picture, orientation))


def write_ome(path, *pictures, names=(), order="<", mpp=0.25, rgb_planes=False, subifds=0, planes=0, unit="µm"):
    """Write each picture as an Image of an OME-TIFF."""
    with tifffile.TiffWriter(path, ome=True, byteorder=order) as tiff:
        for number, picture in enumerate(pictures):
            metadata = {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": unit, "PhysicalSizeY": mpp,
                        "PhysicalSizeYUnit": unit}  # fmt: skip
            if names:
                metadata["Name"] = names[number]
            data, axes = picture, "YXS"
            if rgb_planes:
                data, axes = np.moveaxis(picture, -1, 0), "CYX"
                metadata["Channel"] = {"Name": ["Red", "Green", "Blue"]}
            if planes:
                data, axes = np.stack([np.roll(picture, 3 * plane, axis=1) for plane in range(planes)]), "ZYXS"
            options = {"photometric": "minisblack" if rgb_planes else "rgb", "tile": (128, 128), "compression": "lzw"}
            tiff.write(data, metadata={"axes": axes, **metadata}, subifds=subifds, **options)
            for level in range(1, subifds + 1):
                small = np.asarray(Image.fromarray(picture).reduce(2**level))
                tiff.write(np.moveaxis(small, -1, 0) if rgb_planes else small, subfiletype=1, **options)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("rgb_planes", [False, True])
def test_ome_tiffs_are_read_by_their_own_metadata(tmp_path, picture, order, rgb_planes):
    path = write_ome(tmp_path / "a.ome.tif", picture, order=order, rgb_planes=rgb_planes, subifds=2)
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.25), "ome")
        assert slide.downsamples == [1.0, 2.0, 4.0]
        assert np.array_equal(slide.read((0, 0), slide.size_px0, 0.25), picture)
        half = np.asarray(Image.fromarray(picture).reduce(2))
        assert np.array_equal(slide.read((0, 0), (350, 256), 0.5), half[:256, :350])
        assert slide.residual_px0 < 1


@pytest.mark.parametrize(("mpp", "unit"), [(250, "nm"), (2.5e-4, "mm"), (0.25, "\u03bcm"), (2500, "Å")])
def test_units_of_ome(tmp_path, picture, mpp, unit):
    with open_slide(write_ome(tmp_path / "a.ome.tif", picture, mpp=mpp, unit=unit)) as slide:
        assert slide.mpp == pytest.approx(0.25)


def test_labels_macros_and_thumbnails_are_listed_and_never_taken(tmp_path, picture):
    others = [np.full((200, 300, 3), value, np.uint8) for value in (90, 120, 150)]
    path = write_ome(
        tmp_path / "a.ome.tif", *others, picture[:200, :300], names=("label image", "Macro image", "thumbnail", "x")
    )
    with open_file(path) as reader:
        assert [one.kind for one in reader.pictures] == ["label", "macro", "thumbnail", "slide"]
    assert np.array_equal(whole(path), picture[:200, :300])
    with pytest.raises(SlideOpenError, match="has no slide image, only: label") as caught:
        open_slide(write_ome(tmp_path / "b.ome.tif", others[0], names=("label",)))
    assert caught.value.code == "no-slide"


def test_the_largest_scene_is_taken_reported_and_can_be_chosen(tmp_path, picture):
    path = write_ome(tmp_path / "a.ome.tif", picture[:256, :256], picture, names=("one", "two"))
    with open_slide(path) as slide:
        assert slide.size_px0 == (701, 513)
        assert "scene 2 of 2 was read; --scene chooses another" in slide.notes
    assert np.array_equal(whole(path, scene=1), picture[:256, :256])
    with pytest.raises(SlideError, match="there is no scene 3; the file has 2") as caught:
        open_slide(path, scene=3)
    assert caught.value.code == "no-scene"


@pytest.mark.parametrize("order", ["<", ">"])
def test_each_scene_has_its_own_resolution(tmp_path, picture, order):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", byteorder=order, ome=True) as tiff:
        for mpp, unit, pixels in ((0.5, "µm", picture[:300, :300]), (250, "nm", picture)):
            sizes = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
            tiff.write(pixels, photometric="rgb", tile=(128, 128), metadata={"axes": "YXS", **sizes})
    for scene, mpp in ((None, 0.25), (1, 0.5), (2, 0.25)):
        with open_slide(tmp_path / "a.ome.tif", scene=scene) as slide:
            assert slide.mpp == pytest.approx(mpp)


def test_the_middle_plane_is_taken_reported_and_can_be_chosen(tmp_path, picture):
    path = write_ome(tmp_path / "a.ome.tif", picture, planes=3)
    with open_slide(path) as slide:
        assert "focal plane 2 of 3 was read; --plane chooses another" in slide.notes
    for plane, shift in ((None, 3), (1, 0), (2, 3), (3, 6)):
        assert np.array_equal(whole(path, plane=plane), np.roll(picture, shift, axis=1))
    with pytest.raises(SlideError, match="there is no focal plane 4; the slide has 3") as caught:
        open_slide(path, plane=4)
    assert caught.value.code == "no-plane"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_unnamed_small_page_is_not_the_slide_wherever_it_stands(tmp_path, picture, order, place):
    label = np.full((120, 160, 3), 90, np.uint8)
    pages = [picture]
    pages.insert(place, label)
    with tifffile.TiffWriter(tmp_path / "a.tif", byteorder=order) as tiff:
        for page in pages:
            tiff.write(page, photometric="rgb", tile=(128, 128), metadata=None, **CM)
    with open_file(tmp_path / "a.tif") as reader:
        assert [one.kind for one in reader.pictures] == (["other", "slide"] if place == 0 else ["slide", "other"])
    assert np.array_equal(whole(tmp_path / "a.tif"), picture)


def test_fluorescence_is_refused_by_what_it_is(tmp_path, picture):
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "TRITC"]}}
    planes = np.moveaxis(picture, -1, 0)
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, photometric="minisblack", metadata=metadata, tile=(128, 128))
    with pytest.raises(SlideOpenError, match="3 channels of fluorescence") as caught:
        open_slide(tmp_path / "a.ome.tif")
    assert caught.value.code == "unsupported-pixels"


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_picture_of_which_most_is_missing_fails(tmp_path, picture, share):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, photometric="rgb", compression="deflate", tile=(64, 64), metadata=None, **CM)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("TileByteCounts", "TileOffsets"):
            values = list(tiff.pages[0].tags[name].value)
            gone = int(share * len(values))
            tiff.pages[0].tags[name].overwrite([0] * gone + values[gone:])
    if share < 0.5:
        with open_slide(path) as slide:
            assert "of its stored tiles are missing" in slide.notes[-1]
        return
    with pytest.raises(SlideError, match="70% of the stored pieces") as caught:
        open_slide(path)
    assert caught.value.code == "missing-tiles"

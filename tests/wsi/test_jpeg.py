"""Which colours a JPEG stores: one rule for all containers, and a check of the glass after it."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._jpeg import RGB_MARKER, YCBCR_MARKER, decode_shrunk, decode_whole, is_ycbcr
from eosin.wsi._slide_file import SlideFile, open_slide

CM = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}


@pytest.fixture(scope="module")
def picture(tissue_picture):
    return np.ascontiguousarray(tissue_picture[:512, 200:712])


def jfif(picture, subsampling=0):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=subsampling)
    return buffer.getvalue()


def bare(picture, *, ycbcr):
    """Return a JPEG without any marker that says its colours."""
    space = "YCBCR" if ycbcr else "RGB"
    return without_markers(
        imagecodecs.jpeg8_encode(picture, level=95, colorspace="RGB", outcolorspace=space, subsampling=(1, 1))
    )


def without_markers(data):
    for kind in (b"\xff\xe0", b"\xff\xee"):
        place = data.find(kind)
        if place >= 0:
            data = data[:place] + data[place + 2 + int.from_bytes(data[place + 2 : place + 4], "big") :]
    frame = data.index(b"\xff\xc0")
    names = bytearray(data)
    names[frame + 10 : frame + 19 : 3] = b"\0\1\2"
    scan = data.index(b"\xff\xda")
    names[scan + 5 : scan + 11 : 2] = b"\0\1\2"
    return bytes(names)


def marked(data, marker):
    return data[:2] + marker + data[2:]


@pytest.mark.parametrize("stated", [True, False, None])
def test_what_the_jpeg_says_counts_before_what_the_container_says(picture, stated):
    plain = bare(picture, ycbcr=True)
    assert is_ycbcr(jfif(picture), stated=stated)
    assert is_ycbcr(jfif(picture, 2), stated=stated)
    assert is_ycbcr(marked(plain, YCBCR_MARKER), stated=stated)
    assert not is_ycbcr(marked(plain, RGB_MARKER), stated=stated)
    assert not is_ycbcr(imagecodecs.jpeg8_encode(picture, colorspace="RGB", outcolorspace="RGB"), stated=stated)
    assert is_ycbcr(plain, stated=stated) == (stated is not False)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xee\0", b"\xff\xd8\xff\xee\0\x0eAdobe"]
)
def test_bytes_that_end_early_say_nothing(data):
    assert is_ycbcr(data, stated=True)
    assert not is_ycbcr(data, stated=False)


@pytest.mark.parametrize("ycbcr", [True, False])
def test_both_decoders_follow_the_rule(picture, ycbcr):
    data = bare(picture, ycbcr=ycbcr)
    found = decode_whole(data, (512, 512), stated=ycbcr)
    assert np.abs(found.astype(int) - picture).mean() < 3
    small = decode_shrunk(data, (256, 256), 2, stated=ycbcr)
    cells = picture.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - cells).mean() < 2


def write_tiff(path, picture, encode, photometric, description=None):
    """Write tiles that were encoded already, with any PhotometricInterpretation."""
    tiles = [encode(picture[y : y + 256, x : x + 256]) for y in (0, 256) for x in (0, 256)]
    tifffile.imwrite(
        path, iter(tiles), shape=picture.shape, dtype=np.uint8, tile=(256, 256), compression="jpeg",
        photometric="rgb", metadata=None, description=description, **CM,
    )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(photometric)
    return path


@pytest.mark.parametrize("photometric", [2, 6])
@pytest.mark.parametrize(
    "encode",
    [jfif, lambda tile: imagecodecs.jpeg8_encode(tile, level=95, colorspace="RGB", outcolorspace="RGB")],
    ids=["jfif", "adobe rgb"],
)
def test_markers_that_contradict_the_tag_win_in_tiff(tmp_path, picture, encode, photometric):
    with open_slide(write_tiff(tmp_path / "a.tif", picture, encode, photometric)) as slide:
        found = slide.read_level(0, (0, 0), (512, 512))
        half = slide.read((0, 0), (256, 256), 1.0)
    assert np.abs(found.astype(int) - picture).mean() < 3
    assert np.abs(half.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))).max() < 2


@pytest.mark.parametrize(
    ("ycbcr", "photometric", "cause"),
    [(True, 2, "YCbCr pixels are stated to be RGB"), (False, 6, "RGB pixels are stated to be YCbCr")],
)
def test_false_colours_that_no_marker_tells_fail_the_slide(tmp_path, picture, ycbcr, photometric, cause):
    path = write_tiff(tmp_path / "a.tif", picture, lambda tile: bare(tile, ycbcr=ycbcr), photometric)
    record = tile_slides([SlideFile(path, "a")], JobFolder(tmp_path / "job")).records[0]
    assert (record.status, record.reason) == ("failed", "false-colours")
    assert cause in record.message


TINTS = {
    "plain": (243, 243, 243), "pale": (252, 252, 252), "pink": (243, 212, 226), "blue": (214, 230, 243),
    "dim": (170, 170, 170), "yellow": (243, 232, 206),
}  # fmt: skip


@pytest.mark.parametrize("glass", TINTS.values(), ids=list(TINTS))
@pytest.mark.parametrize("vendor", [None, "Aperio Image Library v11|AppMag = 20|MPP = 0.5"], ids=["tiff", "svs"])
@pytest.mark.parametrize("ycbcr", [True, False])
def test_false_colours_are_found_whatever_the_tint_of_the_glass(tmp_path, picture, ycbcr, vendor, glass):
    tinted = (picture.astype(float) * glass / 243).clip(0, 255).astype(np.uint8)
    path = write_tiff(tmp_path / "a.svs", tinted, lambda tile: bare(tile, ycbcr=ycbcr), 2 if ycbcr else 6, vendor)
    record = tile_slides([SlideFile(path, "a")], JobFolder(tmp_path / "job")).records[0]
    assert (record.status, record.reason) == ("failed", "false-colours"), record


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("marker", [b"", "jfif", YCBCR_MARKER], ids=["none", "jfif", "adobe"])
@pytest.mark.parametrize("photometric", [2, 6])
def test_ycbcr_of_every_sampling_is_read_or_refused(tmp_path, picture, subsampling, marker, photometric):
    def encode(tile):
        data = imagecodecs.jpeg8_encode(
            tile, level=95, colorspace="RGB", outcolorspace="YCBCR", subsampling=subsampling
        )
        return data if marker == "jfif" else marked(without_markers(data), marker)

    path = write_tiff(tmp_path / "a.tif", picture, encode, photometric)
    with open_slide(path) as slide:
        found = slide.read_level(0, (0, 0), (512, 512))
    if photometric == 2 and not marker and subsampling == (1, 1):  # nothing in the file says so
        record = tile_slides([SlideFile(path, "a")], JobFolder(tmp_path / "job")).records[0]
        assert record.reason == "false-colours"
    else:
        assert np.abs(found.astype(int) - picture).mean() < 4


@pytest.mark.parametrize("glass", [(243, 243, 243), (250, 246, 228), (228, 235, 246), (240, 226, 238), (200, 190, 205)])
def test_glass_of_a_plausible_tint_passes(tmp_path, picture, glass):
    tinted = (picture.astype(float) * glass / 243).clip(0, 255).astype(np.uint8)
    path = write_tiff(tmp_path / "a.tif", tinted, jfif, 6)
    record = tile_slides([SlideFile(path, "a")], JobFolder(tmp_path / "job")).records[0]
    assert record.status == "ok", record


@pytest.mark.parametrize("kind", ["noise", "blocks", "gradients", "one grey"])
def test_pictures_that_say_nothing_of_their_colours_pass(tmp_path, kind):
    random, ramp = np.random.default_rng(0), np.tile(np.linspace(0, 255, 512), (512, 1))
    pictures = {
        "noise": random.integers(0, 255, (512, 512, 3)),
        "blocks": random.integers(0, 255, (8, 8, 3)).repeat(64, 0).repeat(64, 1),
        "gradients": np.stack([ramp, ramp.T, np.full_like(ramp, 128)], -1),
        "one grey": np.full((512, 512, 3), 90),
    }
    tifffile.imwrite(tmp_path / "a.tif", pictures[kind].astype(np.uint8), tile=(256, 256), photometric="rgb", **CM)
    record = tile_slides([SlideFile(tmp_path / "a.tif", "a")], JobFolder(tmp_path / "job")).records[0]
    assert record.reason != "false-colours"

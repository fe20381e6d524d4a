"""DICOM slides of every kind of frame, against the array that was written or the codec's own decoder."""

import io

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.sequence import Sequence
from pydicom.uid import UID, generate_uid

from eosin.errors import SlideError, SlideOpenError
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._pixels import rgb_to_ycbcr, ycbcr_to_rgb
from eosin.wsi._slide_file import SlideFile, find_slides, open_file, open_slide

PREFIX = "1.2.840.10008.1.2"
FRAME_PX = 128
CODECS = {  # name: transfer syntax, photometric interpretation, encoder, decoder (None: lossless)
    "raw": (f"{PREFIX}.1", "RGB", bytes, None),
    "raw implicit": (PREFIX, "RGB", bytes, None),
    "rle": (f"{PREFIX}.5", "RGB", lambda frame: rle(frame), None),
    "jpeg ls": (f"{PREFIX}.4.80", "RGB", imagecodecs.jpegls_encode, None),
    "jpeg 2000": (f"{PREFIX}.4.90", "YBR_RCT", lambda frame: j2k(frame, 0), None),
    "jpeg 2000 lossy": (
        f"{PREFIX}.4.91", "YBR_ICT", lambda frame: j2k(frame, 50),
        imagecodecs.jpeg2k_decode,
    ),
    "htj2k": (f"{PREFIX}.4.201", "YBR_RCT", lambda f: imagecodecs.htj2k_encode(f), None),
    "jpeg": (f"{PREFIX}.4.50", "YBR_FULL_422", lambda frame: jpeg(frame), lambda data: pillow(data)),
    "jpeg stated to be RGB": (f"{PREFIX}.4.50", "RGB", lambda frame: jpeg(frame), lambda data: pillow(data)),
    "jpeg of RGB": (f"{PREFIX}.4.50", "RGB", lambda frame: rgb_jpeg(frame), lambda data: pillow(data)),
}  # fmt: skip


def j2k(frame, level):
    return imagecodecs.jpeg2k_encode(frame, level=level, codecformat="j2k")


def jpeg(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def rgb_jpeg(frame):
    return imagecodecs.jpeg8_encode(frame, level=85, colorspace="RGB", outcolorspace="RGB")


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def rle(frame):
    return pydicom.pixels.encoders.RLELosslessEncoder.encode(
        np.ascontiguousarray(frame), rows=frame.shape[0], columns=frame.shape[1], samples_per_pixel=3, bits_allocated=8,
        bits_stored=8, pixel_representation=0, number_of_frames=1, photometric_interpretation="RGB",
        planar_configuration=0, encoding_plugin="pydicom",
    )  # fmt: skip


def frames_of(picture):
    """Yield the frames of a picture, row by row, those at the edge filled up with its last pixels."""
    height, width = (-(-side // FRAME_PX) * FRAME_PX for side in picture.shape[:2])
    padded = np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), "edge")
    for top in range(0, height, FRAME_PX):
        for left in range(0, width, FRAME_PX):
            yield (left, top), np.ascontiguousarray(padded[top : top + FRAME_PX, left : left + FRAME_PX])


def write_dicom(path, picture, codec="raw", *, mpp=0.5, series="1.2.3", table="basic", frames=None, sparse=None,
                size=None, kind="VOLUME", container="S1", **elements):  # fmt: skip
    syntax, photometric, encode, _ = CODECS[codec]
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.77.1.6")
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.FrameOfReferenceUID, data.ContainerIdentifier = series, "1.2.9", container
    data.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
    data.Rows = data.Columns = FRAME_PX
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = size or picture.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, photometric, 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.DimensionOrganizationType = "TILED_FULL" if sparse is None else "TILED_SPARSE"
    measures = Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    chosen = [frame for number, frame in enumerate(frames_of(picture)) if frames is None or number in frames]
    data.NumberOfFrames = len(chosen)
    if sparse is not None:
        chosen = [chosen[number] for number in sparse]
        data.NumberOfFrames = len(chosen)
        data.PerFrameFunctionalGroupsSequence = Sequence([position(place) for place, _ in chosen])
    for name, value in elements.items():
        setattr(data, name, value)
    stored = [encode(frame) for _, frame in chosen]
    compressed = codec not in ("raw", "raw implicit")
    if not compressed:
        data.PixelData = b"".join(frame.tobytes() for _, frame in chosen)
    elif table == "extended":
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(stored)
    else:
        fragments = 3 if table == "fragments" else 1
        data.PixelData = encapsulate(stored, fragments_per_frame=fragments, has_bot=table == "basic")
    if compressed:
        data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)
    return stored


def position(place):
    at = Dataset()
    at.ColumnPositionInTotalImagePixelMatrix, at.RowPositionInTotalImagePixelMatrix = place[0] + 1, place[1] + 1
    group = Dataset()
    group.PlanePositionSlideSequence = Sequence([at])
    return group


def whole(path, **options):
    with open_slide(path, **options) as slide:
        return slide.read_level(0, (0, 0), slide.size_px0)


@pytest.fixture(scope="module")
def picture(tissue_picture):
    return np.ascontiguousarray(tissue_picture[300:650, 400:900])


@pytest.mark.parametrize("codec", CODECS)
def test_frames_of_every_kind_are_those_of_their_decoder(tmp_path, picture, codec):
    stored = write_dicom(tmp_path / "a.dcm", picture, codec)
    decode = CODECS[codec][3]
    with open_slide(tmp_path / "a.dcm") as slide:
        assert (slide.mpp, slide.mpp_source, slide.reader) == (pytest.approx(0.5), "dicom.PixelSpacing", "DICOM")
        found = slide.read_level(0, (0, 0), slide.size_px0)
        if decode is None:
            assert np.array_equal(found, picture)
            return
        frame = slide.read_level(0, (128, 128), (128, 128))
        half = slide.read((0, 0), (250, 175), 1.0)
    assert np.array_equal(frame, decode(stored[5]))  # second of four in the second row
    assert np.abs(found.astype(int) - picture).mean() < 10
    cells = found[:350, :500].reshape(175, 2, 250, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - cells).mean() < 2.5  # hard-edged nuclei, chroma of half the resolution


@pytest.mark.parametrize("table", ["basic", "none", "fragments", "extended"])
def test_frames_are_found_by_every_kind_of_table_and_without_one(tmp_path, picture, table):
    write_dicom(tmp_path / "a.dcm", picture, "jpeg", table=table)
    write_dicom(tmp_path / "b.dcm", picture, "jpeg", series="1.2.4")
    assert np.array_equal(whole(tmp_path / "a.dcm"), whole(tmp_path / "b.dcm"))


def test_ycbcr_of_jpeg_2000_without_its_own_transform_is_converted(tmp_path, picture):
    plain = lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k", mct=False)  # noqa: E731
    CODECS["ybr full"] = (f"{PREFIX}.4.90", "YBR_FULL", plain, None)
    try:
        write_dicom(tmp_path / "a.dcm", picture, "ybr full")
    finally:
        del CODECS["ybr full"]
    assert np.array_equal(whole(tmp_path / "a.dcm"), ycbcr_to_rgb(picture))


def test_levels_and_beside_pictures_of_a_series_are_one_slide(tmp_path, picture):
    half = np.asarray(Image.fromarray(picture).reduce(2))
    write_dicom(tmp_path / "b.dcm", half, mpp=1.0)
    write_dicom(tmp_path / "a.dcm", picture)
    write_dicom(tmp_path / "c.dcm", half[:90, :120], kind="LABEL")
    write_dicom(tmp_path / "d.dcm", half[:90, :100], kind="OVERVIEW")
    write_dicom(tmp_path / "z.dcm", half, series="1.2.99")
    assert [slide.slide_id for slide in find_slides([tmp_path])] == ["a", "z"]
    for name in "abcd":
        with open_slide(tmp_path / f"{name}.dcm") as slide:
            assert slide.downsamples == [1.0, 2.0]
            assert np.array_equal(slide.read((0, 0), (500, 350), 0.5), picture)
            assert np.array_equal(slide.read((0, 0), (250, 175), 1.0), half)
    with open_file(tmp_path / "a.dcm") as reader:
        assert sorted(one.kind for one in reader.pictures) == ["label", "macro", "slide"]


def test_files_of_one_size_that_are_left_out_are_named(tmp_path, picture):
    for name, shown in (("a", picture), ("b", picture[::-1].copy()), ("c", picture)):
        write_dicom(tmp_path / f"{name}.dcm", shown)
    write_dicom(tmp_path / "small.dcm", np.asarray(Image.fromarray(picture).reduce(2)), mpp=1.0)
    with open_slide(tmp_path / "a.dcm") as slide:
        assert [note for note in slide.notes if note.startswith("left out: b.dcm and 1 more")]
        assert np.array_equal(slide.read((0, 0), (500, 350), 0.5), picture)
    (tmp_path / "b.dcm").unlink()
    (tmp_path / "c.dcm").unlink()
    with open_slide(tmp_path / "a.dcm") as slide:
        assert not [note for note in slide.notes if note.startswith("left out")]


def test_slides_of_two_containers_in_one_series_are_two_scenes(tmp_path, picture):
    write_dicom(tmp_path / "a.dcm", picture)
    write_dicom(tmp_path / "b.dcm", picture[::-1, :300].copy(), container="S2")
    with open_slide(tmp_path / "b.dcm") as slide:
        assert any("of 2 was read" in note for note in slide.notes)
        assert slide.size_px0 == (500, 350)


def test_padded_levels_are_read_where_their_spacing_says(tmp_path, picture):
    half = np.asarray(Image.fromarray(picture).reduce(2))
    padded = np.full((256, 256, 3), 255, np.uint8)
    padded[: half.shape[0], : half.shape[1]] = half
    write_dicom(tmp_path / "a.dcm", picture)
    write_dicom(tmp_path / "b.dcm", padded, mpp=1.0)
    with open_slide(tmp_path / "a.dcm") as slide:
        assert slide.downsamples == [1.0, 2.0]
        assert np.array_equal(slide.read((100, 50), (120, 100), 1.0), half[25:125, 50:170])


def test_the_parts_of_a_concatenation_are_one_level(tmp_path, picture):
    parts = {"b": range(5), "a": range(5, 12)}
    for name, frames in parts.items():
        write_dicom(
            tmp_path / f"{name}.dcm", picture, "jpeg", frames=frames, size=picture.shape[:2], ConcatenationUID="1.5",
            ConcatenationFrameOffsetNumber=frames[0],
        )  # fmt: skip
    write_dicom(tmp_path / "whole.dcm", picture, "jpeg", series="1.2.4")
    assert np.array_equal(whole(tmp_path / "a.dcm"), whole(tmp_path / "whole.dcm"))


@pytest.mark.parametrize("order", [[11, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10], [5, 6, 1]])
def test_sparse_frames_lie_where_they_say(tmp_path, picture, order):
    write_dicom(tmp_path / "a.dcm", picture, sparse=order)
    found = whole(tmp_path / "a.dcm")
    for number, ((x, y), _) in enumerate(frames_of(picture)):
        region = (slice(y, y + FRAME_PX), slice(x, x + FRAME_PX))
        assert np.array_equal(found[region], picture[region]) if number in order else (found[region] == 255).all()


def test_missing_frames_fail_the_slide(tmp_path, picture):
    write_dicom(tmp_path / "a.dcm", picture, "jpeg", frames=range(9), size=picture.shape[:2])
    with pytest.raises(SlideOpenError, match="it has 9 of the 12 frames of 500 x 350 px"):
        open_slide(tmp_path / "a.dcm")


def test_a_file_that_ends_early_fails_the_slide(tmp_path, picture):
    write_dicom(tmp_path / "a.dcm", picture)
    data = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideError):
        open_slide(tmp_path / "a.dcm")


def test_what_is_not_a_slide_is_said_to_be_none(tmp_path, picture):
    write_dicom(tmp_path / "a.dcm", picture, SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    with pytest.raises(SlideOpenError, match="is not a whole-slide image") as caught:
        open_slide(tmp_path / "a.dcm")
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize(
    "stated",
    [{"PhotometricInterpretation": name} for name in ("HSV", "MONOCHROME2", "PALETTE COLOR", "CMYK", "YBR_PARTIAL_420")]
    + [{"PixelRepresentation": 1}, {"PhotometricInterpretation": None}],
)
def test_pixels_that_are_not_stated_to_be_rgb_or_full_ycbcr_are_refused(tmp_path, picture, stated):
    write_dicom(tmp_path / "a.dcm", picture, **stated)
    with pytest.raises(SlideOpenError) as caught:
        open_slide(tmp_path / "a.dcm")
    assert caught.value.code == "unsupported-pixels"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["dicom-jpeg-YBR_FULL.dcm", "sm_image_jpegls.dcm"])
def test_real_files_against_pydicom(shared, name):
    path = shared / "cases" / "slides" / name
    with pydicom.config.disable_value_validation():
        data = pydicom.dcmread(path)
    decode = imagecodecs.jpegls_decode if "ls" in name else pillow
    with open_slide(path) as slide:
        found = slide.read_level(0, (0, 0), slide.size_px0)
    side, across = data.Columns, -(-found.shape[1] // data.Columns)
    for number in (0, 7, data.NumberOfFrames - 1):
        frame = decode(pydicom.encaps.get_frame(data.PixelData, number, number_of_frames=data.NumberOfFrames))
        y, x = (value * side for value in divmod(number, across))
        region = found[y : y + side, x : x + side]
        assert np.array_equal(region, frame[: region.shape[0], : region.shape[1]])


@pytest.mark.parametrize("stated", ["RGB", "YBR_FULL"])
def test_frames_whose_colours_are_not_those_that_are_stated_fail(tmp_path, tissue_picture, stated):
    pixels = rgb_to_ycbcr(tissue_picture) if stated == "RGB" else tissue_picture
    write_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation=stated)
    record = tile_slides([SlideFile(tmp_path / "a.dcm", "a")], JobFolder(tmp_path / "job")).records[0]
    assert (record.status, record.reason) == ("failed", "false-colours")

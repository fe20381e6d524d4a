import shutil
import struct

import numpy as np
import pytest

from eosin.wsi._dicom import group_series, read_series_uid
from eosin.wsi._slide_file import find_slides, open_slide


def element(group, number, kind, value, *, undefined=False):
    head = struct.pack("<HH2s", group, number, kind)
    if kind == b"SQ":
        return head + struct.pack("<HI", 0, 0xFFFFFFFF if undefined else len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def item(value, *, undefined=False):
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) if undefined else b""
    return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF if undefined else len(value)) + value + end


def dicom(*elements):
    return bytes(128) + b"DICM" + b"".join(elements)


def series(uid):
    return element(0x0020, 0x000E, b"UI", uid)


END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


@pytest.mark.parametrize("undefined", [False, True])
def test_the_series_of_the_file_counts_and_none_that_it_refers_to(tmp_path, undefined):
    inner = item(series(b"9.9.9\0"), undefined=undefined) * 2
    reference = element(0x0008, 0x1115, b"SQ", inner + (END if undefined else b""), undefined=undefined)
    (tmp_path / "a.dcm").write_bytes(dicom(element(0x0008, 0x0060, b"CS", b"SM"), reference, series(b"1.2.3\0")))
    assert read_series_uid(tmp_path / "a.dcm") == "1.2.3"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no dicom" * 100,
        dicom(),
        dicom(element(0x0020, 0x000D, b"UI", b"1.2")),
        dicom(element(0x0028, 0x0010, b"US", b"\1\0")),
        dicom(b"\x08\0\x05\0\4\0\0\0abcd"),
        dicom(struct.pack("<HH2sHI", 8, 5, b"SQ", 0, 0xFFFFFFFF), b"\xff" * 20),
        dicom(series(b"1.2.\xff3")),
    ],
)
def test_files_without_a_readable_series_have_none(tmp_path, data):
    (tmp_path / "a.dcm").write_bytes(data)
    assert read_series_uid(tmp_path / "a.dcm") == ""
    assert group_series([tmp_path / "a.dcm"]) == {tmp_path / "a.dcm": [tmp_path / "a.dcm"]}


def test_any_bytes_are_survived(tmp_path):
    rng = np.random.default_rng(0)
    sound = dicom(element(0x0008, 0x1115, b"SQ", item(series(b"9.9\0"))), series(b"1.2\0"))
    for _ in range(300):
        data = bytearray(sound)
        for place in rng.integers(128, len(data), 3):
            data[place] = rng.integers(256)
        (tmp_path / "a.dcm").write_bytes(data[: rng.integers(1, len(data) + 1)])
        assert isinstance(read_series_uid(tmp_path / "a.dcm"), str)


def test_series_are_grouped_within_a_folder(tmp_path):
    for name, uid in (("x/b", b"1.2\0"), ("x/a", b"1.2\0"), ("x/c", b"1.3\0"), ("y/d", b"1.2\0")):
        path = tmp_path / f"{name}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(dicom(series(uid)))
    (tmp_path / "y" / "s.svs").write_bytes(b"")
    slides = find_slides([tmp_path])
    assert [slide.slide_id for slide in slides] == ["a", "c", "d", "s"]
    grouped = group_series(sorted((tmp_path / "x").iterdir()))
    assert [[path.name for path in files] for files in grouped.values()] == [["a.dcm", "b.dcm"], ["c.dcm"]]


@pytest.mark.shared
def test_two_instances_of_a_real_series_are_one_slide(shared, tmp_path):
    folder = shared / "data" / "slides" / "boxes-dicom"
    uids = {read_series_uid(path) for path in folder.iterdir()}
    assert len(uids) == 1
    assert "" not in uids
    assert [slide.slide_id for slide in find_slides([folder])] == ["boxes_0"]
    alone = tmp_path / "boxes_1.dcm"
    shutil.copy(folder / alone.name, alone)
    with open_slide(folder / "boxes_0.dcm") as whole, open_slide(folder / "boxes_1.dcm") as other:
        assert np.array_equal(whole.read((0, 0), (16, 16), whole.mpp), other.read((0, 0), (16, 16), other.mpp))

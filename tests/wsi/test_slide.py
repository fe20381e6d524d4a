import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scenes import lattice, marked_map

from eosin.errors import ConfigError, SlideOpenError
from eosin.heatmaps.export._tiff import write_tiff
from eosin.wsi._array_impl import ArraySlide
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._picture import write_jpeg, write_picture
from eosin.wsi._slide_file import SlideFile, find_slides, open_slide
from eosin.wsi.inventory import Picture
from eosin.wsi.reader import READERS, Reader


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(slides):
    return [slide.slide_id for slide in slides]


def test_folders_are_searched_and_known_extensions_found(tmp_path):
    touch(tmp_path, "b.svs", "sub/a.NDPI", "sub/c.ome.tif", "notes.txt", ".hidden.svs", ".trash/d.svs", "e.dcm")
    assert ids(find_slides([tmp_path])) == ["a", "b", "c", "e"]


def test_files_are_taken_as_they_are_once(tmp_path):
    touch(tmp_path, "a.svs", "odd.dat")
    slides = find_slides([tmp_path, tmp_path / "a.svs", tmp_path / "odd.dat"])
    assert slides == [SlideFile(tmp_path / "a.svs", "a"), SlideFile(tmp_path / "odd.dat", "odd.dat")]


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("TCGA-3L-01Z-00-DX1.96FB.svs", "TCGA-3L-01Z-00-DX1.96FB"),
        ("name with (387) and µ.tiff", "name with (387) and µ"),
        ("x.ome.tif", "x"),
        ("1.10.svs", "1.10"),
        (".svs.tif", ".svs"),
    ],
)
def test_ids(tmp_path, name, slide_id):
    touch(tmp_path, name)
    assert ids(find_slides([tmp_path / name])) == [slide_id]


def test_a_picture_beside_a_slide_keeps_its_extension(tmp_path):
    touch(tmp_path, "boxes.png", "boxes.tiff", "alone.jpg")
    assert ids(find_slides([tmp_path])) == ["alone", "boxes", "boxes.png"]


def test_same_names_in_two_folders_are_refused_with_both_paths(tmp_path):
    touch(tmp_path, "a/x.svs", "b/x.svs", "b/y.svs")
    with pytest.raises(ConfigError, match=r"x \(.*a/x\.svs.*b/x\.svs\)") as caught:
        find_slides([tmp_path])
    assert "y" not in caught.value.message.split("x (")[1].split(")")[1]


def test_missing_paths_and_folders_without_slides_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_slides([tmp_path / "none"])
    with pytest.raises(ConfigError, match="no slide in this folder"):
        find_slides([tmp_path])
    with pytest.raises(ConfigError, match="no slides were given"):
        find_slides([])


def test_links_that_lead_back_end(tmp_path):
    touch(tmp_path, "a/x.svs")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert ids(find_slides([tmp_path])) == ["x"]


def test_links_that_lead_nowhere_are_a_slide_each(tmp_path):
    touch(tmp_path, "a.svs")
    for name, target in (("b", tmp_path / "a.svs"), ("c", "/nowhere/x.svs"), ("d", "/nowhere/x.svs"), ("e", "e.svs")):
        (tmp_path / f"{name}.svs").symlink_to(target)
    assert ids(find_slides([tmp_path])) == ["a", "c", "d", "e"]
    reasons = tile_slides(find_slides([tmp_path]), JobFolder(tmp_path / "job")).records
    assert {record.slide_id: record.reason for record in reasons}["c"] == "missing"
    assert {record.slide_id: record.status for record in reasons}["e"] == "failed"


def test_one_mpp_for_all_or_a_table(tmp_path):
    touch(tmp_path, "s/a.svs", "s/b.svs", "s/c.svs")
    assert {slide.mpp for slide in find_slides([tmp_path / "s"], slide_mpp=0.25)} == {0.25}
    table = tmp_path / "mpp.csv"
    table.write_text("\ufeffslide,mpp,note\na,0.25,\nb.svs, 0.5,x\nother,1,\nc,,\n")
    slides = find_slides([tmp_path / "s"], slide_mpp=table)
    assert [slide.mpp for slide in slides] == [0.25, 0.5, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [("name,mpp\na,1\n", "needs the columns"), ("slide,mpp\na,fine\n", "not a number"), ("", "has no rows")],
)
def test_bad_tables_are_refused(tmp_path, text, words):
    touch(tmp_path, "a.svs")
    table = tmp_path / "mpp.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=words):
        find_slides([tmp_path / "a.svs"], slide_mpp=table)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_slides([tmp_path / "a.svs"], slide_mpp=tmp_path / "none.csv")


def test_opening_what_is_missing_or_no_slide(tmp_path):
    with pytest.raises(SlideOpenError, match="no such file") as caught:
        open_slide(tmp_path / "none.svs")
    assert caught.value.code == "missing"
    touch(tmp_path, "a.svs")
    with pytest.raises(SlideOpenError) as caught:
        open_slide(tmp_path / "a.svs")
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("name", ["a", "a.svs", "A", "/data/x/a.tiff", "a\u200b"])
def test_a_row_of_the_table_of_mpp_finds_its_slide(tmp_path, name):
    (tmp_path / "a.tiff").write_bytes(b"")
    (tmp_path / "b.tiff").write_bytes(b"")
    table = tmp_path / "mpp.csv"
    table.write_text(f"slide;mpp\n{name};0,5\n", encoding="utf-8")
    assert [slide.mpp for slide in find_slides([tmp_path / "a.tiff", tmp_path / "b.tiff"], slide_mpp=table)] == [
        0.5,
        None,
    ]


def test_rows_of_unknown_slides_are_reported_and_two_rows_for_one_refused(tmp_path, caplog):
    (tmp_path / "a.tiff").write_bytes(b"")
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\na,0.5\nslide_a,0.25\n")
    assert find_slides([tmp_path / "a.tiff"], slide_mpp=table)[0].mpp == 0.5
    assert "names of unknown slides are not used: slide_a" in caplog.text
    table.write_text("slide,mpp\nslide_a,0.25\n")
    with pytest.raises(
        ConfigError, match="none of its names is the name of a slide; the table has slide_a, the slides are a"
    ):
        find_slides([tmp_path / "a.tiff"], slide_mpp=table)
    table.write_text("slide,mpp\na,0.5\na.svs,0.25\n")
    with pytest.raises(ConfigError, match="slide 'a' has two rows"):
        find_slides([tmp_path / "a.tiff"], slide_mpp=table)


def test_pictures_that_eosin_wrote_are_no_slides(tmp_path, caplog):
    grid = lattice(size_px0=(512, 512), slide_mpp=0.5)
    white = Image.new("RGB", (40, 30), "white")
    white.save(tmp_path / "scan.png")
    white.save(tmp_path / "old.jpg")
    write_jpeg(tmp_path / "job/contours/scan.jpg", white)
    write_picture(tmp_path / "scan_attention.png", white)
    write_tiff(tmp_path / "scan_attention.tiff", marked_map(grid, 0))
    white.save(tmp_path / "job/contours/of_0_1.jpg")
    (tmp_path / "job/run.json").write_text('{"schema": 1, "eosin": "0.1.0", "records": []}')
    assert [slide.slide_id for slide in find_slides([tmp_path])] == ["old", "scan"]
    assert "2 pictures that eosin wrote are left out" in caplog.text
    assert [slide.slide_id for slide in find_slides([tmp_path / "scan_attention.png"])] == ["scan_attention"]


def test_slides_of_formats_that_no_reader_takes_are_named(tmp_path, caplog):
    touch(tmp_path, "a.svs", "b.kfb", "sub/c.isyntax", "notes.txt")
    (tmp_path / "d.vsi").write_bytes(b"II\x2a\0" + bytes(100))  # a TIFF of macro and label; the slide lies elsewhere
    assert ids(find_slides([tmp_path])) == ["a"]
    assert "eosin cannot read these slides: b.kfb, d.vsi, c.isyntax" in caplog.text
    found = find_slides([tmp_path], unread=True)
    assert [slide.slide_id for slide in found if slide.unread] == ["b.kfb", "d.vsi", "c.isyntax"]
    report = tile_slides([slide for slide in found if slide.unread], JobFolder(tmp_path / "job"))
    assert {(record.status, record.reason) for record in report.records} == {("skipped", "unsupported-format")}
    assert report.summary() == "3 slides: 3 skipped"


def test_a_plug_in_reads_what_no_reader_takes(tmp_path):
    class KfbReader(Reader):
        name = "kfb"
        pictures = (Picture("slide", ((8, 6),)),)

        @classmethod
        def takes(cls, path, head):
            return path.suffix == ".kfb"

        def open(self, picture, plane, mpp):
            return ArraySlide(np.full((6, 8, 3), 7, np.uint8), mpp=mpp, path=self.path)

    touch(tmp_path, "b.kfb")
    before = list(READERS._known)
    READERS.register(KfbReader)
    try:
        (found,) = find_slides([tmp_path], slide_mpp=0.5)
        with found.open() as slide:
            assert (slide.read((0, 0), (8, 6), 0.5) == 7).all()
    finally:
        READERS._known = before


def test_readers_are_asked_in_one_order_whatever_is_imported_first():
    code = """
from eosin.wsi import _tiff_impl, _array_impl
from eosin.wsi.reader import READERS
assert not READERS._known  # the registry itself knows none
from eosin.wsi import _slide_file
print(*(kind.__name__ for kind in READERS._known))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ZarrReader", "DicomReader", "TiffReader", "OpenSlideReader", "PictureReader"]

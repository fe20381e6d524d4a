import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scenes import PixelSlide, lattice, marked_map, marked_pixels
from shapely import MultiPolygon, box

from eosin.errors import EosinError
from eosin.report._figures import Curve, roc_panel
from eosin.report._page import Metric, Picture, ReportData, SlideCard, slide_pictures, write_report


class Outside(HTMLParser):
    """Collects every reference that a browser would fetch, and every tag that runs something."""

    def __init__(self):
        super().__init__()
        self.references, self.tags, self.texts = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]

    def handle_data(self, data):
        self.texts.append(data)


def parse(path):
    parser = Outside()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


@pytest.fixture
def full_report():
    rng = np.random.default_rng(0)
    truth = rng.random(20) > 0.5
    picture = Picture(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8), "Slide")
    return ReportData(
        title="A title",
        summary="One paragraph.",
        metrics=(Metric("AUC", 0.912, 0.8, 0.99, "95 % bootstrap"), Metric("Accuracy", 0.75)),
        panels=(roc_panel([Curve("held-out", truth, truth + rng.random(20))]),),
        slides=(SlideCard("slide-1", {"truth": "tumour"}, (picture,), ("A sentence.",), correct=False),),
        predictions=pd.DataFrame({"slide": ["slide-1"], "prob_tumour": [0.123456], "n": [7]}),
        tables={"Folds": pd.DataFrame({"fold": [1, 2], "auc": [0.9, float("nan")], "ci": [(0.5, 0.75), None]})},
        notes=("Synthetic data.",),
        provenance={"eosin": "0.1.0"},
    )


def test_report_needs_nothing_from_outside(tmp_path, full_report):
    write_report(tmp_path / "report.html", full_report)
    page = parse(tmp_path / "report.html")
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert page.references
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    anchors = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert anchors
    assert all(f'id="{anchor}"' in text for anchor in anchors)


def test_report_shows_every_part(tmp_path, full_report):
    write_report(tmp_path / "report.html", full_report)
    shown = " ".join(" ".join(parse(tmp_path / "report.html").texts).split())
    for words in (
        "A title", "One paragraph.", "AUC 0.912 0.800 to 0.990", "95 % bootstrap.", "Accuracy 0.750 –", "slide-1",
        "prediction disagrees", "A sentence.", "truth tumour", "0.123", "Folds", "Synthetic data.", "eosin 0.1.0",
        "0.500 to 0.750",
    ):  # fmt: skip
        assert words in shown


def test_empty_report_has_no_empty_sections(tmp_path):
    write_report(tmp_path / "report.html", ReportData("Only a title"))
    page = parse(tmp_path / "report.html")
    assert "h2" not in page.tags
    assert "img" not in page.tags


def test_texts_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    card = SlideCard(evil, {evil: evil}, (Picture(np.zeros((4, 4, 3), np.uint8), '" onload="x'),), (evil,))
    frame = pd.DataFrame({evil: [evil]})
    data = ReportData(evil, evil, (Metric(evil, 1.0, note=evil),), (card,), frame, {evil: frame}, (evil,), {evil: evil})
    write_report(tmp_path / "report.html", data)
    page = parse(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "script" in page.tags
    assert text.count("<script") == 1
    assert "<script>alert" not in text
    assert '" onload="' not in text


def test_same_results_give_the_same_file(tmp_path, full_report):
    write_report(tmp_path / "a.html", full_report)
    write_report(tmp_path / "b.html", full_report)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_roc_curve_states_its_area(tmp_path):
    truth = np.array([False, False, True, True])
    perfect = ReportData("t", panels=(roc_panel([Curve("x", truth, np.array([0.1, 0.2, 0.8, 0.9]))]),))
    other = ReportData("t", panels=(roc_panel([Curve("x", truth, np.array([0.9, 0.2, 0.8, 0.1]))]),))
    for name, data in (("a", perfect), ("b", other)):
        write_report(tmp_path / f"{name}.html", data)
    figures = [
        base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", (tmp_path / f"{n}.html").read_text())[1])
        for n in "ab"
    ]
    assert b"AUC 1.000" in figures[0]
    assert b"AUC 0.250" in figures[1]


def test_card_pictures_line_up_and_show_the_truth():
    grid = lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)
    tile = 5 * 16 + 9
    slide = PixelSlide(marked_pixels(grid, tile), 0.5)
    truth = MultiPolygon([box(*grid.boxes_px0()[tile].tolist())])
    pictures = slide_pictures(slide, marked_map(grid, tile).percentile(), truth=truth, longest_px=320)
    assert [picture.image.shape for picture in pictures] == [(240, 320, 3)] * 3
    assert pictures[1].scale is not None
    x0, y0, x1, y1 = grid.boxes_px0()[tile] // 2
    inside = pictures[1].image[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4].astype(int)
    assert (inside[..., 0] - inside[..., 2] > 50).all()
    differs = (pictures[0].image != pictures[2].image).any(-1)
    ys, xs = np.nonzero(differs)
    assert np.abs(np.array([xs.min(), ys.min(), xs.max(), ys.max()]) - [x0, y0, x1, y1]).max() <= 4


def test_normal_slide_says_that_there_is_no_tumour():
    grid = lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)
    slide = PixelSlide(marked_pixels(grid, 0), 0.5)
    heatmap = marked_map(grid, 0)
    assert slide_pictures(slide, heatmap, truth=MultiPolygon())[2].caption.endswith("none on this slide")
    assert len(slide_pictures(slide, heatmap)) == 2


def test_pictures_survive_the_page(tmp_path, full_report):
    write_report(tmp_path / "report.html", full_report)
    (encoded,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", (tmp_path / "report.html").read_text())
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (60, 40)


def test_folder_that_is_missing_is_one_clear_error(tmp_path, full_report):
    (tmp_path / "file").write_text("")
    with pytest.raises((EosinError, OSError)):
        write_report(tmp_path / "file" / "report.html", full_report)

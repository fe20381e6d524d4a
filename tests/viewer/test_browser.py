"""The page in a real browser."""

import json
import math
import re

import numpy as np
import pytest
import shapely

from eosin.heatmaps.export._geojson import check_geojson

TILE_CENTRE_UM = (9.5 * 20, 5.5 * 20)  # of the marked tile


class Reader:
    """A person at the page: what they see, press and draw."""

    def __init__(self, browser, url, *, width=1400, height=900):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.faults, self.requests = [], []
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.wait("window.Bokeh && Bokeh.documents.length > 0")

    def model(self, name):
        """Return what the script calls a model; layers are looked up in the figure that is shown."""
        if name in ("map", "tissue"):
            return f"{self.model('canvas')}.children[0].renderers?.find((one) => one.name == '{name}')"
        return f"Bokeh.documents[0].get_model_by_name('{name}')"

    def wait(self, condition):
        self.page.wait_for_function(condition, timeout=15_000)

    def read(self, expression):
        return self.page.evaluate(expression)

    def text(self, name):
        return self.read(f"{self.model(name)}.text")

    def wait_for_text(self, name, words):
        self.wait(f"{self.model(name)} && {self.model(name)}.text.includes({json.dumps(words)})")

    def ready(self, slide="slide-1"):
        self.wait_for_text("verdict", f"<b>{slide}</b>")
        self.wait(f"{self.model('map')} && {self.model('gallery')}.renderers[0].data_source.data.url.length == 12")
        self.page.wait_for_timeout(400)
        return self

    def choose(self, name, label):
        self.page.evaluate(f"{self.model(name)}.value = {json.dumps(label)}")

    def press(self, words):
        self.page.get_by_role("button", name=words).click()

    def to_screen(self, x_um, y_um):
        """Return where a place of the slide is on the screen."""
        script = """([x, y]) => {
            const plot = Bokeh.documents[0].get_model_by_name('canvas').children[0]
            const found = Bokeh.index.find_one(plot)
            const frame = found.frame, box = found.canvas.el.getBoundingClientRect()
            return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(-y)]
        }"""
        return tuple(self.page.evaluate(script, [x_um, y_um]))

    def drag(self, points_um):
        places = [self.to_screen(*point) for point in points_um]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=2)
        self.page.mouse.up()

    def lasso(self, centre_um, radius_um):
        turn = [2 * math.pi * step / 16 for step in range(17)]
        self.drag([(centre_um[0] + radius_um * math.cos(a), centre_um[1] + radius_um * math.sin(a)) for a in turn])


@pytest.fixture
def reader(chromium, url):
    reader = Reader(chromium, url).ready()
    yield reader
    reader.page.close()
    assert reader.faults == []
    assert [request for request in reader.requests if not request.startswith((url, "data:", "blob:"))] == []


def tiles_asked(reader, key=r"\w+"):
    """Return look and zoom of every tile that was asked for."""
    found = [re.search(rf"/tiles/{key}/(\w+)/(\d+)/", one) for one in reader.requests]
    return [match.groups() for match in found if match]


def test_the_page_opens_without_faults_and_without_the_internet(reader):
    assert "The model says tumour" in reader.text("verdict")
    assert ("grey", "1") in tiles_asked(reader)
    assert len(reader.read(f"{reader.model('tissue')}.data_source.data.xs")) > 0


@pytest.mark.long
def test_views_of_another_width_ask_for_tiles_of_another_zoom(reader, catalogue):
    reader.choose("slide", catalogue.shown[1].key)
    reader.ready("slide-2")
    before = {zoom for look, zoom in tiles_asked(reader, catalogue.shown[1].key) if look == "grey"}
    reader.page.mouse.move(*reader.to_screen(160, 120))
    for _ in range(5):
        reader.page.mouse.wheel(0, 300)
        reader.page.wait_for_timeout(150)
    reader.page.wait_for_timeout(500)
    after = {zoom for look, zoom in tiles_asked(reader, catalogue.shown[1].key) if look == "grey"}
    assert "2" in before
    assert min(after) < min(before)


def test_the_slide_is_grey_below_the_map_and_in_colour_without_it(reader):
    visible = f"{reader.model('map')}.visible"
    assert reader.read(visible)
    before = len(reader.requests)
    reader.page.get_by_text("map", exact=True).click()
    reader.wait(f"!{visible}")
    reader.page.wait_for_timeout(800)
    assert any("/colour/1/" in one for one in reader.requests[before:])


def test_other_maps_classes_and_scales_can_be_chosen(reader):
    low = f"{reader.model('map')}.glyph.color_mapper.low"
    reader.choose("family", "attention")
    reader.wait(f"{low} == 1")
    reader.choose("family", "effect of each tile")
    reader.wait(f"{low} < 0")
    values = f"Array.from({reader.model('map')}.data_source.data.plain[0])"
    first = reader.read(values)
    reader.choose("class", "normal")
    reader.wait(f"{values}[0] == {-first[0]}")
    reader.choose("scaling", "rank among tiles (percentile)")
    reader.wait(f"{low} == 0")


@pytest.mark.long
def test_a_lasso_changes_the_prediction_and_undo_takes_it_back(reader):
    reader.press("Lasso")
    reader.lasso(TILE_CENTRE_UM, 25)
    reader.wait_for_text("result", "no longer says tumour")
    assert "Without" in reader.text("result")
    reader.wait_for_text("result", "random tiles instead")
    assert "Computed in" in reader.text("status")
    reader.press("Undo")
    reader.wait(f"{reader.model('result')}.text == ''")


def test_boxes_and_brushes_draw_too(reader):
    x, y = TILE_CENTRE_UM
    reader.press("Box")
    reader.press("Keep only")
    reader.drag([(x - 35, y - 35), (x + 35, y + 35)])
    reader.wait_for_text("result", "With only 9 tiles")
    assert "still says tumour" in reader.text("result")
    reader.press("Start over")
    reader.press("Brush")
    reader.press("Remove")
    reader.drag([(x - 50, y), (x, y), (x + 50, y)])
    reader.wait_for_text("result", "no longer says tumour")


def test_scores_are_read_under_the_pointer(reader):
    reader.page.mouse.move(*reader.to_screen(*TILE_CENTRE_UM))
    reader.page.wait_for_timeout(300)
    readout = reader.page.get_by_text(re.compile("percentile 100.0"))
    assert "tile 89" in readout.inner_text()


def test_the_gallery_shows_the_top_tiles_and_leads_to_them(reader):
    urls = reader.read(f"{reader.model('gallery')}.renderers[0].data_source.data.url")
    assert len(set(urls)) >= 1
    assert all(one.startswith("data:image/jpeg") for one in urls)
    gallery = reader.page.locator(".bk-Figure").last
    gallery.scroll_into_view_if_needed()
    gallery.click(position={"x": 40, "y": 40})
    script = (
        "const r = Bokeh.documents[0].get_model_by_name('canvas').children[0].x_range; return (r.start + r.end) / 2"
    )
    centre = f"(() => {{ {script} }})()"
    reader.wait(f"Math.abs({centre} - {TILE_CENTRE_UM[0]}) < 1")


@pytest.mark.long
def test_tiles_are_carried_to_another_slide_and_the_session_is_saved(reader, desk, catalogue):
    reader.press("Lasso")
    reader.press("Copy")
    reader.lasso(TILE_CENTRE_UM, 8)
    reader.wait_for_text("status", "Copied 1 tile;")
    reader.choose("slide", catalogue.shown[1].key)
    reader.ready("slide-2")
    assert "The model says normal" in reader.text("verdict")
    reader.press("Add 1 tile of slide-1")
    reader.wait_for_text("result", "With 1 tile of slide-1 added the model no longer says normal")
    reader.press("Save session")
    reader.wait_for_text("status", "Saved slide-2_")
    saved = sorted(path.name for path in desk.out.iterdir())
    assert any(name.endswith("_added.geojson") for name in saved)


@pytest.mark.long
def test_a_model_that_must_run_again_says_so(chromium, slow_url):
    reader = Reader(chromium, slow_url).ready()
    assert "runs again" in reader.text("verdict")
    status = f"{reader.model('status')}"
    reader.read(
        f"(window.told = [], {status}.properties.text.change.connect(() => window.told.push({status}.text)), 0)"
    )
    reader.press("Lasso")
    reader.lasso(TILE_CENTRE_UM, 25)
    reader.wait_for_text("result", "no longer says tumour")
    assert any("eosin-spinner" in words and "runs again" in words for words in reader.read("window.told"))
    reader.page.close()


def view(reader, holder="canvas"):
    """Return the middle of a view, µm, and its µm per pixel across; those down are the same."""
    plot = f"{reader.model(holder)}.children[0]"
    x0, x1, y0, y1 = reader.read(f"[{plot}.x_range, {plot}.y_range].flatMap((one) => [one.start, one.end])")
    width, height = reader.read(f"[{plot}.inner_width, {plot}.inner_height]")
    assert (x1 - x0) / width == pytest.approx((y1 - y0) / height, rel=0.01)
    return (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / width


@pytest.mark.long
def test_keys_move_zoom_change_layers_and_slides(reader, catalogue):
    x, y, mpp = view(reader)
    width = mpp * reader.read(f"{reader.model('canvas')}.children[0].inner_width")
    reader.page.keyboard.press("ArrowRight")
    reader.page.keyboard.press("ArrowUp")
    assert view(reader) == pytest.approx((x + 0.2 * width, view(reader)[1], mpp))
    assert view(reader)[1] > y
    reader.page.keyboard.press("+")
    assert view(reader)[2] == pytest.approx(mpp / 1.4)
    reader.page.keyboard.press("-")
    assert view(reader)[2] == pytest.approx(mpp)
    visible = f"{reader.model('map')}.visible"
    reader.page.keyboard.press("m")
    reader.wait(f"!{visible}")
    reader.page.keyboard.press("m")
    reader.wait(visible)
    helping = f"{reader.model('help')}.visible"
    reader.page.keyboard.press("?")
    reader.wait(helping)
    assert reader.page.get_by_text("next slide, previous slide").is_visible()
    reader.page.keyboard.press("Escape")
    reader.wait(f"!{helping}")
    reader.page.keyboard.press("p")  # nothing is before the first
    reader.page.keyboard.press("n")
    reader.ready("slide-2")


@pytest.mark.long
def test_keys_undo_and_are_letters_where_text_is_typed(reader):
    reader.page.keyboard.press("l")
    reader.lasso(TILE_CENTRE_UM, 25)
    reader.wait_for_text("result", "no longer says tumour")
    reader.press("Annotate")
    reader.page.get_by_label("Name of what you draw").fill("")
    reader.page.keyboard.type("mutn")
    assert reader.read(f"{reader.model('map')}.visible")
    assert "slide-1" in reader.text("verdict")
    reader.press("Remove")
    reader.page.keyboard.press("Control+z")
    reader.wait(f"{reader.model('result')}.text == ''")


def test_magnification_is_shown_and_says_when_pixels_are_finer_than_the_scan(reader):
    mpp = view(reader)[2]
    shown = re.search(r"<b>([\d.]+)x</b> · ([\d.]+) µm/px", reader.text("lens"))
    assert float(shown[2]) == pytest.approx(mpp, rel=0.06)
    assert float(shown[1]) == pytest.approx(10 / mpp, rel=0.06)
    for _ in range(8):
        reader.page.keyboard.press("+")
    assert "finer than the scan (0.5 µm/px, 20x)" in reader.text("lens")


@pytest.mark.long
def test_the_overview_shows_while_a_part_is_seen_and_moves_the_view(reader):
    overview = f"{reader.model('minimap')}.visible"
    assert not reader.read(overview)
    for _ in range(4):
        reader.page.keyboard.press("+")
    reader.wait(overview)
    reader.page.wait_for_timeout(500)
    box = reader.page.locator(".bk-Figure").nth(1).bounding_box()
    width, height = reader.read(f"[{reader.model('minimap')}.x_range.end, -{reader.model('minimap')}.y_range.start]")
    assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.05)
    reader.page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    reader.page.wait_for_timeout(500)
    assert view(reader)[:2] == pytest.approx((0.9 * width, -0.1 * height), abs=0.03 * width)


def annotate(reader, name):
    reader.press("Annotate")
    reader.page.get_by_label("Name of what you draw").fill(name)
    reader.page.keyboard.press("Enter")


def drawn(desk, slide_id="slide-1"):
    path = desk.out / "annotations" / f"{slide_id}.geojson"
    return json.loads(path.read_text())["features"] if path.exists() else []


@pytest.mark.long
def test_rectangles_and_polygons_are_named_saved_shown_again_and_undone(chromium, url, desk, studies):
    reader = Reader(chromium, url).ready()
    annotate(reader, "Stroma <b>")
    reader.press("Box")
    reader.drag([(20, 20), (100, 60)])
    reader.wait(f"{reader.model('notes')}.options.length == 2")
    annotate(reader, "Tumour")
    reader.press("Polygon")
    for place in [(150, 80), (230, 80), (230, 140)]:
        reader.page.mouse.click(*reader.to_screen(*place))
        reader.page.wait_for_timeout(350)  # two quick clicks are a double click
    reader.page.mouse.dblclick(*reader.to_screen(150, 140))
    reader.wait(f"{reader.model('notes')}.options.length == 3")
    path = desk.out / "annotations/slide-1.geojson"
    features = check_geojson(path, size_px=studies[0].grid.slide_size_px0)
    assert [one["properties"]["classification"]["name"] for one in features] == ["Stroma <b>", "Tumour"]
    areas = [shapely.geometry.shape(one["geometry"]) for one in features]
    mpp = studies[0].grid.slide_mpp
    assert areas[0].bounds == pytest.approx(np.array([20, 20, 100, 60]) / mpp, abs=4 / mpp)
    assert areas[1].area * mpp**2 == pytest.approx(80 * 60, rel=0.1)
    reader.page.close()
    again = Reader(chromium, url).ready()
    again.wait(f"{again.model('notes')}.options.length == 3")
    lines = f"{again.model('canvas')}.children[0].renderers.find((one) => one.name == 'annotations')"
    again.wait(f"{lines}.data_source.data.xs.length == 2")
    annotate(again, "Vessel")
    again.press("Box")
    again.drag([(20, 90), (100, 120)])
    again.wait(f"{again.model('notes')}.options.length == 4")
    again.page.keyboard.press("u")
    again.page.keyboard.press("v")
    again.wait(f"{again.model('notes')}.options.length == 3")
    assert [one["properties"]["name"] for one in drawn(desk)] == ["Stroma <b>", "Tumour"]
    again.choose("notes", drawn(desk)[0]["id"])
    again.press("Delete")
    again.wait(f"{again.model('notes')}.options.length == 2")
    assert [one["properties"]["name"] for one in drawn(desk)] == ["Tumour"]
    assert reader.faults == again.faults == []
    again.page.close()


@pytest.mark.long
def test_two_views_stand_side_by_side_and_move_together(reader, catalogue):
    reader.choose("beside", "same")
    reader.wait(f"{reader.model('second')}.children.length > 0")
    reader.page.wait_for_timeout(1000)
    reader.page.keyboard.press("+")
    reader.page.keyboard.press("ArrowLeft")
    assert view(reader, "second") == pytest.approx(view(reader))
    assert "slide-1" in reader.text("second_words")
    reader.choose("second_map", "attention")
    reader.wait(
        f"{reader.model('second')}.children[0].renderers.find((one) => one.name == 'map').glyph.color_mapper.low == 1"
    )
    reader.choose("beside", catalogue.shown[1].key)
    reader.wait_for_text("second_words", "slide-2")
    reader.page.wait_for_timeout(1000)
    before = view(reader, "second")
    reader.page.keyboard.press("ArrowLeft")
    assert view(reader, "second") == pytest.approx(before)
    reader.page.get_by_text("move both together").click()
    (x, y, _), (u, v, _) = view(reader), view(reader, "second")
    reader.page.keyboard.press("ArrowRight")
    reader.page.keyboard.press("ArrowUp")
    (x2, y2, _), (u2, v2, _) = view(reader), view(reader, "second")
    assert (u2 - u, v2 - v) == pytest.approx((x2 - x, y2 - y))
    reader.choose("beside", "")
    reader.wait(f"{reader.model('second')}.children.length == 0")


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 768, 1280, 3840])
def test_the_page_fits_every_screen(chromium, url, width):
    reader = Reader(chromium, url, width=width, height=844).ready()
    assert reader.read("document.documentElement.scrollWidth") <= width
    right = reader.page.get_by_role("button", name="Annotate").bounding_box()
    assert right["x"] + right["width"] <= width
    reader.press("Annotate")
    reader.press("Box")
    reader.page.evaluate("window.scrollTo(0, 0)")
    frame = reader.read(f"{reader.model('canvas')}.children[0].inner_width")
    assert frame >= min(240, width / 2)
    reader.page.close()
    assert reader.faults == []

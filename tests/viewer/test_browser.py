"""The page in a real browser."""

import json
import math
import re

import pytest

TILE_CENTRE_UM = (9.5 * 20, 5.5 * 20)  # of the marked tile


class Reader:
    """A person at the page: what they see, press and draw."""

    def __init__(self, browser, url):
        self.page = browser.new_page(viewport={"width": 1400, "height": 900})
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
    assert ("colour", "1") in tiles_asked(reader)
    assert len(reader.read(f"{reader.model('tissue')}.data_source.data.xs")) > 0


@pytest.mark.long
def test_views_of_another_width_ask_for_tiles_of_another_zoom(reader, catalogue):
    reader.choose("slide", catalogue.shown[1].key)
    reader.ready("slide-2")
    before = {zoom for _, zoom in tiles_asked(reader, catalogue.shown[1].key)}
    reader.page.mouse.move(*reader.to_screen(160, 120))
    for _ in range(5):
        reader.page.mouse.wheel(0, 300)
        reader.page.wait_for_timeout(150)
    reader.page.wait_for_timeout(500)
    after = {zoom for _, zoom in tiles_asked(reader, catalogue.shown[1].key)}
    assert "2" in before
    assert min(after) < min(before)


def test_the_map_can_be_hidden_and_the_slide_made_grey(reader):
    reader.page.get_by_text("slide in grey").click()
    reader.page.wait_for_timeout(800)
    assert ("grey", "1") in tiles_asked(reader)
    visible = f"{reader.model('map')}.visible"
    assert reader.read(visible)
    reader.page.get_by_text("map", exact=True).click()
    reader.wait(f"!{visible}")


def test_other_maps_classes_and_scales_can_be_chosen(reader):
    low = f"{reader.model('map')}.glyph.color_mapper.low"
    reader.choose("family", "attention")
    reader.wait(f"{low} == 0")
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

import re

import pytest

from eosin.errors import ConfigError
from eosin.heatmaps._maps import LOG_ODDS_REACH
from eosin.viewer._layers import ALONE, PERCENTILE
from eosin.viewer._static import write_static


@pytest.fixture(scope="module")
def page(catalogue, tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "page.html"
    write_static(path, catalogue)
    return path


def test_the_page_loads_nothing_from_anywhere(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(?!data:)", text)
    assert "slide-1" in text
    assert "slide-2" in text


def test_maps_change_and_fade_in_a_browser_without_a_server(chromium, page):
    tab = chromium.new_page(viewport={"width": 1300, "height": 800})
    faults, requests = [], []
    tab.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function("Bokeh.documents.length && Bokeh.documents[0].is_idle", timeout=15_000)
    select = tab.locator("select").first
    names = select.locator("option").all_inner_texts()
    assert names[:4:2] == [f"{ALONE} for tumour, {PERCENTILE}", f"{ALONE} for normal, {PERCENTILE}"]
    assert names[4:7] == [
        "attention, rank among tiles (percentile)", "attention, relative to the average tile", "attention",
    ]  # fmt: skip
    models = "[...Bokeh.documents[0]._all_models.values()]"
    shape = f"(() => {{ const p = {models}.find((m) => m.type == 'Figure'); return [p.x_range, p.y_range].map("
    spans = tab.evaluate(shape + "(r) => r.end - r.start).concat([p.inner_width, p.inner_height]) })()")
    assert spans[0] / spans[2] == pytest.approx(spans[1] / spans[3], rel=0.02)  # a circle is a circle
    low = f"{models}.find((m) => m.type == 'LinearColorMapper').low"
    assert tab.evaluate(low) == -LOG_ODDS_REACH
    select.select_option(label="attention, rank among tiles (percentile)")
    tab.wait_for_function(f"{low} == 0")
    select.select_option(label="effect of each tile for tumour")
    tab.wait_for_function(f"{low} < 0")
    glyph = f"{models}.find((m) => m.type == 'Image')"
    alpha = f"{glyph}.global_alpha.value ?? {glyph}.global_alpha"
    tab.evaluate(f"{models}.find((m) => m.type == 'Slider').value = 0.2")
    tab.wait_for_function(f"({alpha}) == 0.2")
    tab.close()
    assert faults == []
    assert all(request.startswith(("file:", "data:", "blob:")) for request in requests)


def test_a_page_of_no_slide_or_too_many_is_refused(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr("eosin.viewer._static.MAX_SLIDES", 1)
    with pytest.raises(ConfigError, match="2 can be shown"):
        write_static(tmp_path / "page.html", catalogue)
    assert not (tmp_path / "page.html").exists()

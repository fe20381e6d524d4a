"""The report of a cross-validation: every task, sites, worst cases, comparison, and how it looks in a browser."""

import base64
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from eosin.errors import LabelError
from eosin.mil._evaluate import bootstrap, summarise_folds
from eosin.mil.task import make_task
from eosin.report._evaluation import Context, confusions, evaluation_report, verdict, worst_cards
from eosin.report._figures import (
    DECISION_THRESHOLDS,
    Curve,
    calibration_panel,
    decision_panel,
    net_benefit,
    net_benefit_band,
    precision_recall_panel,
    roc_panel,
    survival_panel,
)
from eosin.report._measures import Evaluated, compare_runs, metric_name, site_table, threshold_table
from eosin.report._page import write_report

CHROMIUM = Path("/usr/bin/chromium")
TARGETS = {
    "classification": "stage",
    "binary": "er",
    "ordinal": "grade",
    "multilabel": "er,her2",
    "regression": "age",
    "survival": "months,dead",
    "cox": "months,dead",
    "multitask": "er; ordinal:grade; cox:months,dead; regression:age",
}


def table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "slide_id": f"s{i}",
            "patient_id": f"p{i // 2}",
            "fold": str(i % 3),
            "stage": "abc"[i % 3],
            "er": ["neg", "pos"][i % 2],
            "her2": ["no", "yes"][int(rng.random() < 0.3 or i == 0)],
            "grade": str(1 + i % 3),
            "age": f"{50 + 10 * rng.normal():.1f}",
            "months": f"{rng.exponential(10):.2f}",
            "dead": str(int(rng.random() < 0.6 or i == 0)),
        }
        for i in range(n)
    ]


def judged(kind, n=60, seed=0):
    """Return task, predictions as text and what crossval would have returned."""
    rows = table(n)
    task = make_task(kind, rows, target=TARGETS[kind])
    target = task.encode(rows)
    task = task.fit_to(target)
    outputs = task.activate(torch.randn(n, task.n_outputs, generator=torch.Generator().manual_seed(seed)))
    frame = pd.DataFrame(rows)[["fold", "slide_id", "patient_id"]]
    for name, values in zip(task.columns, task.decode(target.numpy()), strict=True):
        frame[name] = [str(value) for value in values]
    frame = frame.assign(**{name: [str(v) for v in values] for name, values in task.table(outputs).items()})
    metrics = task.metrics(outputs, target.numpy())
    estimates = bootstrap(task, outputs, target.numpy(), frame["patient_id"].tolist(), resamples=10)
    summary = {
        "task": task.model_dump(mode="json"),
        "n_folds": 3,
        "metrics": summarise_folds([metrics] * 3),
        "out_of_fold": {name: estimate.as_json() for name, estimate in estimates.items()},
        "folds": [{"fold": fold, "n_test": n // 3, **metrics} for fold in range(3)],
    }
    return task, frame, summary


@pytest.mark.parametrize("kind", TARGETS)
def test_every_task_has_a_report(tmp_path, kind):
    task, frame, summary = judged(kind)
    data = evaluation_report(summary, frame, task, Context(notes=("A note.",), provenance={"eosin": "1"}))
    write_report(tmp_path / "report.html", data)
    text = (tmp_path / "report.html").read_text()
    assert data.panels
    assert len(data.slides) == 12
    assert len(data.metrics) == len(summary["out_of_fold"])
    titles = [panel.title for panel in data.panels]
    if kind in ("survival", "cox"):
        assert titles == ["Survival by predicted risk"]
    if kind == "multitask":
        assert {"er: ROC", "er: Decision curve", "grade: Calibration", "months: Survival by predicted risk"} <= set(
            titles
        )
        assert [confusion.name for confusion in data.confusions] == ["er", "grade"]
    for confusion in data.confusions:
        assert confusion.counts.sum() == 60
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert text.count("<script") == 1


def test_outputs_and_targets_are_those_that_were_written():
    task, frame, _ = judged("classification")
    found = Evaluated.of(task, frame)
    metrics = task.metrics(found.outputs, found.targets)
    predicted = frame["predicted"] == frame["stage"]
    assert metrics["accuracy"] == pytest.approx(predicted.mean())


def test_an_undefined_measure_is_shown_as_undefined(tmp_path):
    task, frame, summary = judged("binary")
    for figures in (summary["out_of_fold"]["auc"], summary["folds"][0]):
        figures |= {"value": None, "lower": None, "upper": None, "auc": None}
    write_report(tmp_path / "report.html", evaluation_report(summary, frame, task, Context()))
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"Area under the ROC curve</td><td class=\"number\">undefined<", text)
    assert "0.500" not in re.findall(r"Area under the ROC curve</td>.*", text)[0]


@pytest.mark.parametrize(
    ("metric", "named"),
    [
        ("score", "Mean over the targets"),
        ("score_rmse", "Root mean squared error, score ↓"),
        ("isup_auc_3", "Area under the ROC curve, isup, 3"),
        ("auc_score", "Area under the ROC curve, score"),
        ("time_time_auc", "Time-dependent AUC, time"),
        ("her2_f1", "F1 score, mean of the classes, her2"),
        ("x", "x"),
    ],
)
def test_metrics_are_named_in_words(metric, named):
    assert metric_name(metric) == named


def test_legends_of_many_curves_lie_below_the_axes():
    truth, score = np.arange(40) % 2 == 0, np.linspace(0, 1, 40)
    heights = []
    for count in (2, 5):
        panel = precision_recall_panel([Curve(f"class {k}", truth, score) for k in range(count)])
        svg = base64.b64decode(panel.uri.split(",")[1]).decode()
        heights.append(float(re.search(r'height="([\d.]+)pt"', svg)[1]))
        names = [float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>class', svg)]
        (recall,) = (float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>Recall', svg))
        assert len(names) == count
        assert all((y > recall) == (count == 5) for y in names)
    assert heights[0] < heights[1]


def test_sites_are_judged_alone_with_intervals():
    task, frame, _ = judged("binary")
    found = Evaluated.of(task, frame)
    sites = {slide: "A" if number < 40 else "B" for number, slide in enumerate(frame["slide_id"])}
    sites["s59"] = "C"
    rows = site_table(found, sites).set_index("Site")
    assert list(rows.index) == ["A", "B", "C"]
    assert rows.loc["A", "Slides"] == "40"
    by_hand = task.metrics(found.outputs[:40], found.targets[:40])
    assert rows.loc["A", "Area under the ROC curve"] == pytest.approx(by_hand["auc"])
    assert rows.loc["C", "Area under the ROC curve"] == "undefined"
    assert site_table(found, {}) is None


def test_the_worst_predictions_come_first_with_their_thumbnails(tmp_path):
    task, frame, _ = judged("binary")
    found = Evaluated.of(task, frame)
    worst = frame["slide_id"][int(np.argmax(task.surprise(found.outputs, found.targets)))]
    Image.new("RGB", (900, 600), (200, 100, 150)).save(tmp_path / f"{worst}.jpg")
    cards = worst_cards(found, tmp_path)
    assert cards[0].slide_id == worst
    assert cards[0].correct is False
    assert cards[0].pictures[0].image.shape == (200, 300, 3)
    assert not cards[1].pictures
    assert cards[0].facts["er"] != cards[0].facts["predicted"]
    assert not worst_cards(found, None)[0].pictures


@pytest.mark.parametrize("kind", TARGETS)
def test_a_card_says_what_decides(kind):
    task, frame, _ = judged(kind)
    cells = {str(name): str(value) for name, value in frame.iloc[0].items()}
    facts, correct = verdict(task, cells)
    if kind == "binary":
        assert facts["probability of pos"] == f"{float(cells['prob_pos']):.3f}"
        assert facts["threshold"] == "0.500"
    if kind == "classification":
        assert facts[f"probability of {cells['predicted']}"] == f"{float(cells['prob_' + cells['predicted']]):.3f}"
    if kind in ("binary", "classification", "ordinal"):
        assert correct == (cells["predicted"] == cells[TARGETS[kind]])
    else:
        assert correct is None


@pytest.mark.parametrize(
    ("kind", "labels", "columns"),
    [
        ("binary", ["er: pos"], ["threshold"]),
        ("multilabel", ["er: pos", "her2: yes"], ["threshold_er", "threshold_her2"]),
        ("multitask", ["er: pos"], ["er_threshold"]),
        ("ordinal", [], []),
        ("survival", [], []),
    ],
)
def test_thresholds_of_the_folds_are_told_unless_all_are_one_half(kind, labels, columns):
    task, frame, _ = judged(kind)
    assert threshold_table(Evaluated.of(task, frame)) == {}
    for number, column in enumerate(columns):
        assert set(frame[column]) == {"0.5"}
        frame[column] = [str(0.1 * number + (0.25 if fold == "1" else 0.5)) for fold in frame["fold"]]
    tables = threshold_table(Evaluated.of(task, frame))
    assert list(tables) == ["Thresholds, chosen on validation slides"][: len(columns)]
    if not columns:
        return
    (table_,) = tables.values()
    assert list(table_) == ["Predicted", "Fold 0, from", "Fold 1, from", "Fold 2, from"]
    assert list(table_["Predicted"]) == labels
    assert list(table_["Fold 1, from"]) == pytest.approx([0.25 + 0.1 * number for number in range(len(labels))])


def test_several_targets_are_led_by_what_each_is_judged_by():
    task, frame, summary = judged("multitask")
    frame["er_threshold"] = "0.3"
    data = evaluation_report(summary, frame, task, Context())
    assert "Thresholds, chosen on validation slides" in data.tables
    main = ["Mean over the targets", "Area under the ROC curve, er", "Quadratic kappa, grade",
            "Concordance index, months", "Explained variance R², age"]  # fmt: skip
    assert [metric.name for metric in data.metrics[:5]] == main
    assert list(data.tables["Folds"])[2:] == main
    assert f"The mean over the targets uses: {'; '.join(main[1:])}." in data.metrics_note
    assert "The positive class of er is pos, the other neg." in data.metrics_note
    sites = {slide: "AB"[number % 2] for number, slide in enumerate(frame["slide_id"])}
    assert set(main[:3]) <= set(site_table(Evaluated.of(task, frame), sites))


def test_what_was_decided_by_the_folds_thresholds_fills_the_tables_of_several_targets():
    task, frame, _ = judged("multitask")
    frame["er_predicted"] = "pos"
    found = Evaluated.of(task, frame)
    assert confusions(found)[0].counts.tolist() == [[0, 30], [0, 30]]
    part = found.parts()[0][1]
    assert part.task.metrics(part.outputs, part.targets, part.decided)["sensitivity"] == 1


def test_runs_are_compared_on_the_same_slides_only(tmp_path):
    task, frame, _ = judged("binary")
    _, other, _ = judged("binary", seed=1)
    for name, table_ in (("a", frame), ("b", other), ("c", other.iloc[1:]), ("d", other.assign(er="pos"))):
        (tmp_path / name).mkdir()
        table_.to_csv(tmp_path / name / "predictions.csv", index=False)
    asked = task.model_dump(mode="json")
    files = {name: tmp_path / name / "predictions.csv" for name in "abcd"}
    ((heading, rows),) = compare_runs(asked, files["a"], files["b"]).items()
    assert heading == "Compared with b"
    auc = rows.set_index("Measure").loc["Area under the ROC curve"]
    assert auc["Difference"] == pytest.approx(auc["This"] - auc["Other"])
    assert auc["Test"] == "paired bootstrap"
    for name, message in (("c", "only one of the two runs has predictions for s0"), ("d", "differ between the two")):
        with pytest.raises(LabelError, match=message):
            compare_runs(asked, files["a"], files[name])
    for name, predictions in (("a", frame), ("b", other)):
        predictions.assign(patient_id=predictions["slide_id"]).to_csv(files[name], index=False)
    ((_, rows),) = compare_runs(asked, files["a"], files["b"]).items()
    assert rows.set_index("Measure").loc["Area under the ROC curve", "Test"] == "DeLong"


def svg(panel):
    return base64.b64decode(panel.uri.split(",", 1)[1]).decode()


def test_curves_state_their_areas_and_leave_out_what_is_not_defined():
    truth = np.array([False, False, True, True])
    perfect, one_class = Curve("tumour", truth, np.array([0.1, 0.2, 0.8, 0.9])), Curve("x", truth[2:], np.ones(2))
    assert "tumour (AUC 1.000)" in svg(roc_panel([perfect, one_class]))
    assert "tumour (AP 1.000)" in svg(precision_recall_panel([perfect, one_class]))
    assert roc_panel([one_class]) is precision_recall_panel([one_class]) is None
    assert "calibration error 0.150" in calibration_panel(perfect, error=0.15).caption
    assert svg(roc_panel([perfect])) == svg(roc_panel([perfect]))


def test_net_benefit_weighs_needless_actions_by_the_odds_of_the_threshold():
    truth = np.array([True, True, False, False, False])
    score = np.array([0.9, 0.3, 0.4, 0.2, 0.1])
    at = np.array([0.25, 0.5])
    # at 0.25 two of the positive and one of the negative are acted on, at 0.5 one of the positive
    np.testing.assert_allclose(net_benefit(truth, score, at), [2 / 5 - 1 / 5 / 3, 1 / 5])
    everyone = net_benefit(truth, np.ones(5), at)
    np.testing.assert_allclose(everyone, [2 / 5 - 3 / 5 / 3, 2 / 5 - 3 / 5])


def test_a_decision_curve_counts_patients_and_needs_both_kinds():
    truth = np.array([False, False, True, True])
    curve = Curve("tumour", truth, np.array([0.1, 0.2, 0.8, 0.9]))
    assert "3 patients" in decision_panel(curve, ["a", "a", "b", "c"]).caption
    assert "act on all" in svg(decision_panel(curve, ["a", "a", "b", "c"]))
    assert decision_panel(Curve("x", truth[2:], np.ones(2)), ["b", "c"]) is None
    assert "no band: all slides are from one patient" in decision_panel(curve, ["a"] * 4).caption


def test_the_band_of_a_decision_curve_has_the_width_that_sums_over_patients_give():
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(150), rng.integers(1, 5, 150))
    truth = (rng.random(150) < 0.4)[patient]
    score = 1 / (1 + np.exp(-(truth - 0.5 + rng.normal(size=150)[patient] + rng.normal(size=len(patient)))))
    low, high = net_benefit_band(truth, score, patient.astype(str))
    # the variance of a ratio of sums over patients, linearised
    odds = DECISION_THRESHOLDS / (1 - DECISION_THRESHOLDS)
    acted = score[:, None] >= DECISION_THRESHOLDS
    of_slide = (acted & truth[:, None]) - odds * (acted & ~truth[:, None])
    value, sizes = of_slide.mean(0), np.bincount(patient)
    sums = np.stack([np.bincount(patient, of_slide[:, k]) for k in range(len(odds))], 1)
    error = np.sqrt(((sums - sizes[:, None] * value) ** 2).sum(0)) / len(patient)
    middle = (DECISION_THRESHOLDS > 0.1) & (DECISION_THRESHOLDS < 0.6)  # beyond, few slides are acted on
    # 200 draws know their 2.5 % quantiles to about a tenth
    np.testing.assert_allclose((high - low)[middle], 2 * 1.96 * error[middle], rtol=0.2)
    assert abs((high - low)[middle].mean() / (2 * 1.96 * error[middle].mean()) - 1) < 0.08
    assert ((low <= value) & (value <= high)).all()


def test_survival_curves_name_the_test_and_the_numbers_at_risk():
    rng = np.random.default_rng(0)
    high = np.arange(80) % 2 == 0
    time = rng.exponential(np.where(high, 2.0, 20.0))
    panel = survival_panel(high, time, np.ones(80, bool))
    assert "At risk at the marked times: lower 40, " in panel.caption
    assert float(re.search(r"p = ([\d.e-]+)\.", panel.caption)[1]) < 1e-4
    assert survival_panel(np.ones(80, bool), time, np.ones(80, bool)) is None


@pytest.mark.parametrize("kind", ["classification", "multitask"])
def test_the_report_opens_in_a_browser_without_the_network(tmp_path, kind):
    sync = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("there is no chromium at /usr/bin/chromium")
    task, frame, summary = judged(kind)
    write_report(tmp_path / "report.html", evaluation_report(summary, frame, task, Context()))
    wrong, over = [], {}
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        pictures = page.evaluate("[...document.images].map(i => i.naturalWidth)")
        for width in (390, 1280, 3840):
            page.set_viewport_size({"width": width, "height": 900})
            over[width] = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            widest = page.evaluate("Math.max(...[...document.querySelectorAll('h2')].map(h => h.offsetWidth))")
            assert widest > 0.3 * width
        browser.close()
    assert all(pictures)
    assert max(over.values()) <= 0
    assert [text for text in wrong if not text.startswith(("file:", "data:"))] == []


def test_tables_sort_and_filter_and_pictures_enlarge(tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("there is no chromium at /usr/bin/chromium")
    task, frame, summary = judged("binary")
    write_report(tmp_path / "report.html", evaluation_report(summary, frame, task, Context()))
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((tmp_path / "report.html").as_uri())
        table = page.locator("#predictions + .filter + .wide table, #predictions ~ .wide table").last
        column = table.locator("th", has_text="prob_pos")
        place = column.evaluate("th => th.cellIndex")
        read = f"table => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[{place}].textContent)"
        column.click()
        rising = [float(text) for text in table.evaluate(read)]
        column.press("Enter")
        falling = [float(text) for text in table.evaluate(read)]
        page.get_by_placeholder("Filter rows").last.fill("s1 ")
        filtered = table.evaluate(read)
        page.locator("figure > img").first.click()
        large = page.locator("dialog[open] img").evaluate("i => i.naturalWidth")
        first = page.locator("dialog[open] p").inner_text()
        page.keyboard.press("ArrowRight")
        second = page.locator("dialog[open] p").inner_text()
        page.keyboard.press("Escape")
        closed = page.locator("dialog[open]").count()
        browser.close()
    assert (rising, falling) == (sorted(rising), sorted(falling, reverse=True))
    assert rising != falling
    assert 0 < len(filtered) < len(rising)
    assert large > 100
    assert first != second
    assert closed == 0

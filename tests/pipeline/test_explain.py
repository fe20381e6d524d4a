import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from scenes import feature_bag, lattice, marked_pixels, write_slide

from eosin.errors import EosinError, FeatureMismatchError, SlideError, UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.heatmaps._subject import prediction_in_words
from eosin.heatmaps.export._geojson import check_geojson
from eosin.heatmaps.export._png import COLOUR_BAR_PX, MARGIN_PX, TITLE_PX
from eosin.mil._checkpoint import ModelCard, build_model, load_model
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.task import make_task
from eosin.pipeline._explain import FORMATS, explain_slide
from eosin.wsi._slide_file import SlideFile, open_slide

TILE = 5 * 16 + 9


def test_every_format_lights_up_at_the_marked_tile(scene, model_folder, tmp_path):
    _, slide, bag = scene
    paths = explain_slide(model_folder, slide, bag, tmp_path, formats=FORMATS)
    assert [path.name for path in paths] == [f"slide-1_alone.{name}" for name in FORMATS]
    by_format = dict(zip(FORMATS, paths, strict=True))
    box = bag.grid.boxes_px0()[TILE].tolist()

    table = pd.read_csv(by_format["csv"])
    assert len(table) == bag.n_instances
    assert table.alone.idxmax() == table.attention.idxmax() == TILE
    assert table.attention.sum() == pytest.approx(1)
    assert table.effect.idxmax() == TILE
    assert table.effect[TILE] == pytest.approx(2.3, abs=0.1)
    assert table.loc[TILE, ["x_px0", "y_px0"]].tolist() == box[:2]

    features = check_geojson(by_format["geojson"], size_px=(640, 480))
    lit = max(features, key=lambda feature: feature["properties"]["measurements"]["alone"])
    assert lit["geometry"]["coordinates"][0][0] == box[:2]
    assert lit["geometry"]["coordinates"][0][2] == box[2:]

    with Image.open(by_format["png"]) as picture:
        image = np.asarray(picture).astype(int)
    left, top = image.shape[1] - COLOUR_BAR_PX - 640, MARGIN_PX + TITLE_PX
    overlay = image[top : top + 480, left : left + 640].reshape(12, 40, 16, 40, 3)
    middle = overlay[:, 12:28, :, 12:28].mean((1, 3))  # (12, 16, 3), away from outlines
    red, _, blue = np.moveaxis(middle, -1, 0)
    assert (red - blue).argmax() == TILE
    assert (red - blue > 60).sum() == 1  # dark red speaks for the class, and all others speak against it

    with open_slide(by_format["tiff"]) as drawn:
        cell = drawn.mpp / 0.5
        colours = drawn.read((0, 0), drawn.size_px0, drawn.mpp).astype(int)
    x, y = ((box[0] + 20) / cell, (box[1] + 20) / cell)
    assert np.abs(colours[int(y), int(x)] - [143, 36, 0]).max() <= 3

    exact = pd.read_parquet(by_format["parquet"])
    assert list(exact.columns) == list(table.columns)
    np.testing.assert_allclose(exact, table, rtol=1e-8, atol=1e-12)
    scores = tifffile.imread(by_format["scores.tiff"])
    assert scores[int(y), int(x)] == np.nanmax(scores) == pytest.approx(table.alone[TILE])
    assert (scores == np.nanmax(scores)).sum() <= (40 / cell + 1) ** 2

    page = by_format["html"].read_text(encoding="utf-8")
    assert "prob_tumour" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("name", ["mean", "max", "lse", "ins"])
def test_models_without_attention_show_the_evidence_of_each_tile(scene, tmp_path, name):
    _, slide, bag = scene
    options = {"ins": {"width": 4, "projection": 2}}.get(name, {"embed_dims": ()})
    recipe = Recipe(aggregator=Component(name=name, options=options), training=Training(standardize=False))
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    torch.manual_seed(0)
    model = build_model(recipe, task, bag.features.shape[1]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        model.classifier.weight[0] = -1.0
    card = ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=bag.spec)
    paths = explain_slide((model, card), slide, bag, tmp_path, formats=["csv", "png", "html"])
    assert [path.name for path in paths] == ["slide-1_alone.csv", "slide-1_alone.png", "slide-1_alone.html"]
    table = pd.read_csv(paths[0])
    assert table.alone.idxmax() == table.effect.idxmax() == TILE
    assert "attention" not in table.columns
    assert "Not shown, attention: the model does not weigh tiles" in paths[2].read_text(encoding="utf-8")


def test_chosen_map_is_the_one_that_is_shown(scene, model_folder, tmp_path):
    _, slide, bag = scene
    maps = ["gradient", "attention"]
    (path,) = explain_slide(model_folder, slide, bag, tmp_path, formats=["csv"], maps=maps)
    assert list(pd.read_csv(path).columns[3:5]) == ["gradient_tumour", "attention_percentile"]


def test_loaded_model_gives_the_same_files_as_its_folder(scene, model_folder, tmp_path):
    _, slide, bag = scene
    (first,) = explain_slide(model_folder, slide, bag, tmp_path / "a", formats=["geojson"])
    (second,) = explain_slide(load_model(model_folder), slide, bag, tmp_path / "b", formats=["geojson"])
    assert first.read_bytes() == second.read_bytes()


def other_slide(tmp_path, scene, size_px0):
    bag = scene[2]
    grid = lattice(size_px0=size_px0, slide_mpp=0.5, patch_size=40)
    write_slide(tmp_path / "other.tiff", marked_pixels(grid, 0), mpp=0.5)
    return SlideFile(tmp_path / "other.tiff", "slide-1"), bag


def other_encoder(scene):
    _, slide, bag = scene
    spec = bag.spec.model_copy(update={"encoder": "another"})
    return slide, FeatureBag(bag.features, spec, "slide-1", bag.grid)


def no_tiles(scene):
    _, slide, bag = scene
    empty = feature_bag(np.asarray(bag.features)[:0], bag.grid.select(np.zeros(0, dtype=int)))
    return slide, empty


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("size", FeatureMismatchError, "pass the slide that they came from"),
        ("content", FeatureMismatchError, "another file"),
        ("encoder", FeatureMismatchError, "encoder another"),
        ("empty", SlideError, "no tiles"),
        ("format", UnknownNameError, "heat-map format"),
        ("missing", EosinError, "no such file"),
    ],
)
def test_what_does_not_fit_is_one_clear_error_and_leaves_nothing(scene, model_folder, tmp_path, case, error, words):
    _, slide, bag = scene
    formats = ["jpg"] if case == "format" else ["png"]
    if case in ("size", "content"):
        slide, bag = other_slide(tmp_path, scene, (800, 480) if case == "size" else (640, 480))
    elif case == "encoder":
        slide, bag = other_encoder(scene)
    elif case == "empty":
        slide, bag = no_tiles(scene)
    elif case == "missing":
        slide = SlideFile(tmp_path / "gone.tiff", "slide-1")
    with pytest.raises(error, match=words):
        explain_slide(model_folder, slide, bag, tmp_path / "out", formats=formats)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ({"prob_a": "0.100", "prob_b": "0.900", "predicted": "b"}, "b, probability 0.900"),
        ({"risk": "1.250"}, "risk 1.250"),
    ],
)
def test_prediction_in_words(prediction, words):
    assert prediction_in_words(prediction) == words

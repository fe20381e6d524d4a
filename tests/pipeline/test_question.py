import json

import numpy as np
import pandas as pd
import pytest
from scenes import feature_bag, write_slide
from shapely import box, geometry

from eosin.errors import ConfigError, FeatureMismatchError, UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.heatmaps._examination import Questions, examine
from eosin.heatmaps.export._geojson import check_geojson
from eosin.mil._checkpoint import load_model
from eosin.pipeline._question import FORMATS, counterfactual_maps, draw_curves, question_slide
from eosin.wsi._slide_file import SlideFile

TILE = 5 * 16 + 9
FAST = Questions(fractions=(0.005, 0.05), rounds=10, controls=20)


@pytest.fixture(scope="module")
def found(scene, model_folder):
    model, card = load_model(model_folder)
    return examine(model, card, scene[2], questions=FAST)


def test_the_marked_tile_is_found_to_carry_the_prediction(found):
    assert found.class_name == "tumour"
    assert found.tile_effects.argmax() == TILE
    assert found.search.order[0] == TILE
    assert found.smallest is not None
    assert found.smallest.tiles.tolist() == [TILE]
    assert found.smallest.is_certain
    removed, kept = found.effects[:2]
    assert (removed.kind, removed.n_tiles, kept.kind) == ("remove", 1, "keep only")
    assert removed.before > 0 > removed.after
    assert removed.control_mean > 0
    assert kept.is_still_predicted


def test_sentences_say_it(found, scene):
    alone = int((10 * np.asarray(scene[2].features).sum(1) - 4 > 0).sum())
    text = " ".join(found.sentences())
    assert "Without the 0.5 % most attended tiles (1) the model no longer says tumour: 0.819 → 0.310; with as" in text
    assert "To change the prediction of tumour, at least 1 tile (0.52 %) must be removed." in text
    assert "All numbers are exact" in text
    assert f"Each by itself, {alone} tiles ({100 * alone / 192:.2g} %) would be called tumour." in text
    assert "no other 10 tiles would bring it below" in text


def test_curves_start_together_and_end_where_the_order_says(found):
    first = found.curves[found.curves.share == 0]
    assert np.ptp(first.probability) < 1e-12
    at_half = found.curves[found.curves.share == 0.5].set_index("order").probability
    assert at_half["most attended"] < at_half["random"]
    greedy = found.curves[found.curves.order == "greedy"]
    assert greedy.share.max() <= 10 / 192
    assert greedy.probability.is_monotonic_decreasing
    picture = draw_curves(found)
    assert picture.image.shape == (380, 540, 3)


def test_maps_carry_effect_rank_and_round(found, scene):
    effect, rank, rounds = counterfactual_maps(found, scene[2])
    assert effect.signed
    assert effect.values.argmax() == rank.values.argmax() == TILE
    assert rounds.values[TILE] == 1
    assert sorted(rounds.values[rounds.values > 0].tolist()) == list(range(1, 11))


def test_files_of_one_slide(scene, model_folder, tmp_path):
    _, slide, bag = scene
    x0, y0, x1, y1 = bag.grid.boxes_px0()[TILE].tolist()
    region = {
        "type": "Feature",
        "geometry": geometry.mapping(box(x0, y0, x1, y1)),
        "properties": {"classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }
    (tmp_path / "regions.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [region]}))
    paths = question_slide(
        model_folder, bag, tmp_path, slide_file=slide, annotation=tmp_path / "regions.geojson",
        region_classes=["Tumor"], questions=FAST, formats=FORMATS,
    )  # fmt: skip
    assert [path.name for path in paths] == [f"slide-1_counterfactual.{name}" for name in FORMATS]
    table = pd.read_csv(paths[0])
    rows = table[table.tiles == "tiles in Tumor"].set_index("kind")
    assert rows.n_tiles.tolist() == [1, 1]
    assert rows.probability_after["remove"] < 0.5 < rows.probability_after["keep only"]
    assert rows.control_rank["remove"] == pytest.approx(1 / 21)
    by_format = dict(zip(FORMATS, paths, strict=True))
    pd.testing.assert_frame_equal(pd.read_parquet(by_format["parquet"]), table, rtol=1e-8, check_dtype=False)
    features = check_geojson(by_format["geojson"], size_px=(640, 480))
    strongest = max(features, key=lambda feature: feature["properties"]["measurements"]["effect"])
    assert strongest["geometry"]["coordinates"][0][0] == [x0, y0]
    assert strongest["properties"]["measurements"]["removal_round"] == 1
    page = by_format["html"].read_text(encoding="utf-8")
    assert "Without the tiles in Tumor (1) the model no longer says tumour" in page


def test_features_alone_are_enough_for_tables(scene, model_folder, tmp_path):
    bag = scene[2]
    paths = question_slide(model_folder, feature_bag(np.asarray(bag.features), bag.grid), tmp_path, questions=FAST)
    assert [path.suffix for path in paths] == [".csv", ".geojson", ".html"]


def test_other_class_can_be_asked_about(scene, model_folder):
    model, card = load_model(model_folder)
    found = examine(model, card, scene[2], class_name="normal", questions=FAST)
    assert found.effects[0].before < 0
    assert found.smallest is None
    assert "now says normal" in " ".join(found.sentences())


@pytest.mark.parametrize("case", ["class", "one tile", "format", "no slide", "encoder", "region", "outside"])
def test_what_does_not_fit_is_one_clear_error(scene, model_folder, tmp_path, case):
    _, slide, bag = scene
    arguments = {"slide_file": slide, "questions": FAST}
    error, words = ConfigError, ""
    if case == "class":
        error, words = UnknownNameError, "no class of the model named 'tumor'"
        arguments["class_name"] = "tumor"
    elif case == "one tile":
        words, arguments["slide_file"] = "at least two tiles, the slide has 1", None
        bag = feature_bag(np.asarray(bag.features)[:1], bag.grid.select([0]))
    elif case == "format":
        error, words, arguments["formats"] = UnknownNameError, "counterfactual format", ["tiff"]
    elif case == "no slide":
        words, arguments["formats"], arguments["slide_file"] = "needs the slide", ["png"], None
    elif case == "encoder":
        error, words = FeatureMismatchError, "encoder another"
        bag = FeatureBag(bag.features, bag.spec.model_copy(update={"encoder": "another"}), "slide-1", bag.grid)
    else:
        offset = 0.0 if case == "region" else 9000.0
        words = "no annotated tiles of slide-1" if case == "region" else "outside the slide"
        shape = geometry.mapping(box(offset, offset, offset + 5, offset + 5))
        arguments["annotation"] = tmp_path / "a.geojson"
        arguments["annotation"].write_text(json.dumps(shape))
    with pytest.raises(error, match=words):
        question_slide(model_folder, bag, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_slide_of_another_size_is_refused(scene, model_folder, tmp_path):
    write_slide(tmp_path / "other.tiff", np.full((300, 300, 3), 240, np.uint8), mpp=0.5)
    with pytest.raises(FeatureMismatchError, match="pass the slide"):
        question_slide(model_folder, scene[2], tmp_path, slide_file=SlideFile(tmp_path / "other.tiff", "slide-1"))

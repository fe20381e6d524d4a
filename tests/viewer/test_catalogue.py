import dataclasses

import numpy as np
import pytest
from scenes import marked_pixels, write_slide

from eosin.errors import ConfigError
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag, write_bag
from eosin.viewer._catalogue import open_catalogue
from eosin.viewer._layers import (
    ALONE,
    EFFECT,
    GRADIENT,
    PERCENTILE,
    PLAIN,
    TIMES,
    Choice,
    default_scaling,
    scalings_of,
)
from eosin.wsi._slide_file import find_slides


def bag_like(bag, name, *, features=None, grid=None, spec=None, provenance=None):
    return FeatureBag(
        bag.features if features is None else features,
        bag.spec if spec is None else spec,
        name,
        bag.grid if grid is None else grid,
        {} if provenance is None else provenance,
    )


def test_slides_that_do_not_fit_are_listed_with_their_reason_and_the_others_shown(scene, model_folder, tmp_path):
    _, slide, bag = scene
    pixels = marked_pixels(bag.grid, 3)
    other_width = dataclasses.replace(bag.grid, slide_size_px0=(641, 480))
    bags = {
        "good": bag_like(bag, "good"),
        "bad-encoder": bag_like(bag, "bad-encoder", spec=bag.spec.model_copy(update={"encoder": "other"})),
        "bad-size": bag_like(bag, "bad-size", grid=other_width),
        "bad-content": bag_like(bag, "bad-content", provenance={"input_fingerprint": "0" * 16}),
        "empty": bag_like(bag, "empty", features=bag.features[:0], grid=bag.grid.select([])),
        "lone": bag_like(bag, "lone", features=bag.features[:1], grid=bag.grid.select([0])),
    }
    for name, one in bags.items():
        write_bag(tmp_path / "features" / f"{name}.h5", one)
    for name in (*bags, "featureless"):
        write_slide(tmp_path / f"{name}.tiff", pixels, mpp=0.5)
    (tmp_path / "torn.tiff").write_bytes(slide.path.read_bytes()[:100])
    write_bag(tmp_path / "features/torn.h5", bag_like(bag, "torn"))
    seen = []
    catalogue = open_catalogue(
        model_folder, [tmp_path / "features"], find_slides([tmp_path]), progress=seen.append
    )  # fmt: skip
    assert [one.slide_id for one in catalogue.shown] == ["good"]
    reasons = {one.slide_id: one.refusal for one in catalogue.refused}
    expected = {
        "bad-encoder": "encoder other, not test",
        "bad-size": "pass the slide that they came from",
        "bad-content": "same size, other content",
        "empty": "no tiles on tissue",
        "lone": "has one tile",
        "featureless": "has no feature file",
        "torn": "",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], reasons[name]
        assert "\n" not in reasons[name]
    assert len(seen) == 8
    with pytest.raises(LookupError):
        catalogue.study(catalogue.refused[0].key)
    assert catalogue.refused[0].key not in catalogue.slides
    catalogue.slides.close()


def test_of_two_feature_files_the_one_of_the_models_encoder_is_taken(folder, model_folder, tmp_path):
    bag = read_bag(folder / "features/slide-1.h5")
    other = dataclasses.replace(bag, spec=bag.spec.model_copy(update={"encoder": "another"}))
    write_bag(tmp_path / "slide-1.h5", other)
    for order in ([tmp_path, folder / "features"], [folder / "features", tmp_path]):
        catalogue = open_catalogue(model_folder, order, find_slides([folder / "slide-1.tiff"]))
        assert catalogue.shown[0].features == folder / "features/slide-1.h5"
        catalogue.slides.close()


def test_two_feature_files_of_one_slide_are_refused(folder, model_folder, tmp_path):
    (tmp_path / "slide-1.h5").write_bytes((folder / "features/slide-1.h5").read_bytes())
    with pytest.raises(ConfigError, match="two feature files"):
        open_catalogue(model_folder, [folder / "features", tmp_path / "slide-1.h5"], [])


def test_keys_are_random_and_say_nothing_about_the_file(catalogue, folder, model_folder):
    again = open_catalogue(model_folder, [folder / "features"], find_slides([folder / "slide-1.tiff"]))
    keys = [one.key for one in (*catalogue.shown, *again.shown)]
    assert len(set(keys)) == 3
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_few_studies_are_kept(catalogue, monkeypatch):
    monkeypatch.setattr("eosin.viewer._catalogue.MAX_STUDIES", 1)
    first, second = (one.key for one in catalogue.shown)
    study = catalogue.study(first)
    assert catalogue.study(first) is study
    catalogue.study(second)
    assert catalogue.study(first) is not study


def test_layers_are_those_of_the_other_exports(studies):
    layers = studies[0].layers
    assert layers.families()[:2] == (ALONE, "attention")
    assert layers.classes_of(ALONE) == ("tumour", "normal")  # of two classes the second is what is looked for
    alone = layers.get(layers.choices[0])
    assert default_scaling(alone) == PLAIN
    assert alone.values.argmax() == 5 * 16 + 9
    assert {EFFECT, GRADIENT} <= set(layers.families())
    assert layers.classes_of(EFFECT) == ("normal", "tumour")
    plain = layers.get(Choice("attention"))
    assert scalings_of(plain) == (PERCENTILE, TIMES, PLAIN)
    assert plain.values.sum() == pytest.approx(1)
    np.testing.assert_array_equal(layers.get(Choice("attention"), PERCENTILE).values, plain.percentile().values)
    np.testing.assert_array_equal(layers.get(Choice("attention"), TIMES).values, plain.values * 192)
    effect = layers.get(Choice(EFFECT, "tumour"))
    assert effect.signed
    assert effect.values.argmax() == 5 * 16 + 9
    assert layers.get(Choice(EFFECT, "tumour")) is effect
    np.testing.assert_allclose(layers.get(Choice(EFFECT, "normal")).values, -effect.values)
    with pytest.raises(LookupError):
        layers.get(Choice("nonsense"))

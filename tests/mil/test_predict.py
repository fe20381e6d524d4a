import csv

import numpy as np
import pytest

from eosin.errors import ConfigError, FeatureMismatchError
from eosin.features.bag import FeatureBag, FeatureSpec
from eosin.features.store import find_bags, write_bag
from eosin.mil.predict import load_ensemble, predict
from eosin.mil.recipe import Component, Recipe, Training
from eosin.mil.train import fit


def train_models(toy, folder, seeds=(0, 1)):
    train, val = toy.parts()
    for seed in seeds:
        training = Training(epochs=10, lr=1e-2, bags_per_step=8, seed=seed)
        recipe = Recipe(aggregator=Component(name="abmil", options={"embed_dims": [8], "hidden": 4}), training=training)
        fit(recipe, toy.task, train, val, folder=folder / str(seed))
    return [folder / str(seed) for seed in seeds]


@pytest.fixture
def models(toy, tmp_path):
    return train_models(toy, tmp_path / "models")


@pytest.fixture
def folder(toy, tmp_path):
    features = tmp_path / "features"
    for slide in ("s000", "s001", "s003"):
        write_bag(features / f"{slide}.h5", FeatureBag(toy.bags.load(slide).numpy(), toy.bags.spec, slide))
    write_bag(features / "empty.h5", FeatureBag(np.zeros((0, toy.bags.spec.dim), np.float32), toy.bags.spec, "empty"))
    (features / "broken.h5").write_bytes(b"not a feature file")
    other = FeatureSpec(encoder="other", dim=toy.bags.spec.dim)
    write_bag(features / "other.h5", FeatureBag(np.zeros((2, other.dim), np.float32), other, "other"))
    return features


def read(path):
    with path.open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_every_slide_is_one_row_whatever_becomes_of_it(models, folder, tmp_path):
    report = predict(models[:1], find_bags(folder), tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    assert {slide: row["status"] for slide, row in rows.items()} == {
        "s000": "ok", "s001": "ok", "s003": "ok", "empty": "empty", "broken": "failed", "other": "failed",
    }  # fmt: skip
    assert report.exit_code == 1
    assert rows["other"]["reason"] == "mismatch"
    assert "encoder other, not toy" in rows["other"]["message"]
    assert rows["empty"]["predicted"] == ""
    ok = rows["s001"]
    assert float(ok["prob_c0"]) + float(ok["prob_c1"]) == pytest.approx(1)
    assert ok["predicted"] == "c1"
    assert ok["n_tiles"] != "0"
    assert ok["encoder"] == "toy"
    assert ok["uncertainty"] == ""


def test_an_ensemble_is_the_mean_and_says_how_much_it_varies(models, folder, tmp_path):
    tables = []
    for number, chosen in enumerate([models[:1], models[1:], models]):
        predict(chosen, find_bags(folder), tmp_path / f"{number}.csv")
        tables.append(read(tmp_path / f"{number}.csv"))
    for slide in ("s000", "s003"):
        values = [float(table[slide]["prob_c1"]) for table in tables]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
        assert float(tables[2][slide]["uncertainty"]) == pytest.approx(np.std(values[:2], ddof=1))
    assert tables[2]["s000"]["model"] == f"{tables[0]['s000']['model']}+{tables[1]['s000']['model']}"


def test_features_that_fit_no_model_stop_the_run(models, folder, tmp_path):
    with pytest.raises(FeatureMismatchError, match="encoder other, not toy"):
        predict(models, {"other": folder / "other.h5"}, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_models_of_different_questions_are_no_ensemble(make_toy, models, tmp_path):
    others = train_models(make_toy(kind="binary"), tmp_path / "binary", seeds=(0,))
    with pytest.raises(ConfigError, match="answer different questions"):
        load_ensemble([*models, *others])
    with pytest.raises(ConfigError, match="no model was given"):
        load_ensemble([])

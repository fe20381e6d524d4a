"""Vectors of slides and patients: values, files, resuming, bad slides, and what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.errors import ConfigError, FeatureMismatchError, LabelError, UnknownNameError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, read_bag, verify_bag, write_bag
from eosin.mil._checkpoint import ModelCard, load_model, save_model
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.tasks._classification import Classification
from eosin.pipeline._embed import embed_slides

SPEC = FeatureSpec(encoder="toy", weights_hash="abc", dim=4, mpp=0.5, patch_size=256)
SIZES = {"s1": 3, "s2": 5, "s3": 1}
POOL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0),
    "mean_sd": lambda rows: np.concatenate([rows.mean(0), rows.std(0)]),
}


@pytest.fixture
def features(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, n in SIZES.items():
        write_bag(tmp_path / f"features/{name}.h5", FeatureBag(rng.normal(size=(n, 4)).astype(np.float32), SPEC, name))
    return tmp_path / "features"


@pytest.mark.parametrize("encoder", POOL)
def test_pooled_tiles_of_slides(features: Path, encoder: str) -> None:
    made = embed_slides(features, encoder=encoder)
    assert made.folder == features.parent / f"slide_features_{encoder}"
    assert made.report.count("ok") == 3
    for name, path in find_bags(made.folder).items():
        verify_bag(path)
        bag, tiles = read_bag(path), read_bag(features / f"{name}.h5")
        np.testing.assert_allclose(bag.features[0], POOL[encoder](tiles.features.astype(np.float64)), rtol=1e-6)
        assert bag.spec.encoder == f"{encoder}(toy)"
        assert (bag.spec.weights_hash, bag.spec.mpp, bag.slide_id) == ("abc", 0.5, name)
        assert bag.spec.is_vector


def test_a_patient_is_all_tiles_of_its_slides(features: Path, tmp_path: Path) -> None:
    of = {"s1": "p1", "s2": "p1", "s3": "p2"}
    made = embed_slides(features, tmp_path / "out", per="patient", patient_of=of)
    rows = np.concatenate([read_bag(features / f"{name}.h5").features for name in ("s1", "s2")])
    bag = read_bag(made.folder / "p1.h5")
    np.testing.assert_allclose(bag.features[0], rows.mean(0), rtol=1e-5)
    assert json.loads(bag.provenance["slides"]) == ["s1", "s2"]
    assert bag.provenance["per"] == "patient"
    assert sorted(find_bags(made.folder)) == ["p1", "p2"]


def test_the_bag_embedding_of_a_model(features: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = Recipe(
        aggregator=Component(name="abmil", options={"embed_dims": [6]}), training=Training(standardize=False)
    )
    task = Classification(classes=("a", "b"))
    card = ModelCard(recipe=recipe, task=task.model_dump(), features=SPEC)
    save_model(tmp_path / "model", Abmil(4, 2, embed_dims=(6,)), card)
    made = embed_slides(features, tmp_path / "out", model=tmp_path / "model")
    model, card = load_model(tmp_path / "model")
    for name in SIZES:
        bag = read_bag(made.folder / f"{name}.h5")
        with torch.no_grad():
            wanted = model(PackedBags.pack([torch.from_numpy(read_bag(features / f"{name}.h5").features.copy())]))
        np.testing.assert_allclose(bag.features[0], wanted.embedding[0].numpy(), rtol=1e-6)
        assert bag.spec.encoder == f"abmil@{card.model_id}(toy)"
        assert bag.spec.weights_hash != "abc"


def test_only_what_changed_is_made_again(features: Path, tmp_path: Path) -> None:
    embed_slides(features, tmp_path / "out")
    before = (tmp_path / "out/s2.h5").read_bytes()
    write_bag(features / "s1.h5", FeatureBag(np.ones((2, 4), np.float32), SPEC, "s1"))
    again = embed_slides(features, tmp_path / "out")
    assert {record.slide_id: record.status for record in again.report.records} == {
        "s1": "ok",
        "s2": "skipped",
        "s3": "skipped",
    }
    assert (tmp_path / "out/s2.h5").read_bytes() == before
    assert (read_bag(tmp_path / "out/s1.h5").features == 1).all()


def test_a_bad_slide_is_a_record_and_stops_nobody(features: Path, tmp_path: Path) -> None:
    (features / "s2.h5").write_bytes(b"no features")
    write_bag(features / "s4.h5", FeatureBag(np.zeros((0, 4), np.float32), SPEC, "s4"))
    other = SPEC.model_copy(update={"encoder": "mean(toy)"})
    write_bag(features / "s5.h5", FeatureBag(np.zeros((1, 4), np.float32), other, "s5"))
    made = embed_slides(features, tmp_path / "out")
    found = {record.slide_id: record.status for record in made.report.records}
    assert found == {"s1": "ok", "s2": "failed", "s3": "ok", "s4": "empty", "s5": "failed"}
    assert sorted(find_bags(made.folder)) == ["s1", "s3"]
    assert (made.folder / "run.json").is_file()


def test_what_no_slide_can_answer_is_refused_before_any_work(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FeatureMismatchError, match="encoder toy, not chief-ctranspath or ctranspath"):
        embed_slides(features, out, encoder="chief?random")
    with pytest.raises(ConfigError, match="--allow-remote-code"):
        embed_slides(features, out, encoder="titan")
    with pytest.raises(ConfigError, match="remove --encoder"):
        embed_slides(features, out, encoder="max", model=tmp_path)
    with pytest.raises(ConfigError, match="pass --patients TABLE"):
        embed_slides(features, out, per="patient")
    with pytest.raises(UnknownNameError, match="patient"):
        embed_slides(features, out, per="patients")  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="none of the 1 slides"):
        embed_slides(features, out, per="patient", patient_of={"x": "p"})
    with pytest.raises(LabelError, match="cannot be the name of a file"):
        embed_slides(features, out, per="patient", patient_of=dict.fromkeys(SIZES, "../p"))
    assert not out.exists()
    made = embed_slides(features, out)
    with pytest.raises(FeatureMismatchError, match="holds a vector of a slide already"):
        embed_slides(made.folder, tmp_path / "twice")
    with pytest.raises(ConfigError, match="pass another --out"):
        embed_slides(features, out, encoder="max")


def test_vectors_of_another_encoder_are_refused_by_name(features: Path, tmp_path: Path) -> None:
    mean, top = (embed_slides(features, tmp_path / name, encoder=name).folder for name in ("mean", "max"))
    wanted, found = read_bag(mean / "s1.h5").spec, read_bag(top / "s1.h5").spec
    with pytest.raises(FeatureMismatchError, match=r"run `eosin embed --encoder mean` on features of toy --mpp 0.5"):
        wanted.require_match(found, top / "s1.h5")

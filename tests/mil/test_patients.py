import csv
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from eosin.errors import ConfigError, LabelError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._store import find_bags, write_bag
from eosin.mil import _ensemble as answering
from eosin.mil._data import MemoryBags, patient_examples
from eosin.mil._ensemble import load_ensemble
from eosin.mil._evaluate import predict_outputs
from eosin.mil._patients import patients_file, read_patients
from eosin.mil._predict import predict
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._train import fit

SMALL = Component(name="abmil", options={"embed_dims": [8], "hidden": 4})
PATIENTS = {
    "s001": "three", "s002": "three", "s003": "three", "s000": "two", "broken": "two", "none": "gone",
    "empty": "nothing", "other": "worse", "broken2": "worse",
}  # fmt: skip


def train(examples, task, folder, seed=0):
    recipe = Recipe(aggregator=SMALL, training=Training(epochs=3, lr=1e-2, bags_per_step=8, select="last", seed=seed))
    fit(recipe, task, examples, folder=folder)
    return folder


@pytest.fixture
def models(toy, tmp_path):
    return [train(toy.examples, toy.task, tmp_path / "models" / str(seed), seed) for seed in (0, 1)]


@pytest.fixture
def folder(toy, tmp_path):
    features, dim = tmp_path / "features", toy.bags.spec.dim
    for slide in ("s000", "s001", "s002", "s003"):
        write_bag(features / f"{slide}.h5", FeatureBag(toy.bags.load(slide).numpy(), toy.bags.spec, slide))
    write_bag(features / "empty.h5", FeatureBag(np.zeros((0, dim), np.float32), toy.bags.spec, "empty"))
    write_bag(
        features / "other.h5", FeatureBag(np.ones((2, dim), np.float32), FeatureSpec(encoder="other", dim=dim), "other")
    )
    for name in ("broken", "broken2"):
        (features / f"{name}.h5").write_bytes(b"not a feature file")
    return features


def read(path, key="patient_id"):
    with path.open(newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def ask(models, folder, out, patient_of=PATIENTS):
    report = predict(models, find_bags(folder), out, patient_of=patient_of)
    return report, read(patients_file(out)), read(out, "slide_id")


def test_a_patient_is_the_mean_of_the_slides_and_says_which_were_bad(models, folder, tmp_path):
    report, patients, slides = ask(models, folder, tmp_path / "p.csv")
    assert list(patients) == ["gone", "nothing", "three", "two", "worse"]
    three = patients["three"]
    of_three = [slides[name] for name in ("s001", "s002", "s003")]
    assert float(three["prob_c1"]) == pytest.approx(np.mean([float(row["prob_c1"]) for row in of_three]))
    assert int(three["n_tiles"]) == sum(int(row["n_tiles"]) for row in of_three)
    assert (three["n_slides"], three["n_used"], three["bad_slides"]) == ("3", "3", "")
    two = patients["two"]
    assert (two["status"], two["n_slides"], two["n_used"]) == ("ok", "2", "1")
    assert two["bad_slides"] == "broken (features)"
    assert {name: two[name] for name in ("prob_c1", "predicted", "uncertainty")} == {
        name: slides["s000"][name] for name in ("prob_c1", "predicted", "uncertainty")
    }
    assert patients["nothing"]["status"] == "empty"
    assert patients["gone"]["status"] == patients["worse"]["status"] == "failed"
    assert patients["gone"]["bad_slides"] == "none (missing)"
    assert patients["worse"]["bad_slides"] == "other (mismatch); broken2 (features)"
    assert (slides["none"]["status"], slides["none"]["reason"]) == ("failed", "missing")
    assert {record.slide_id for record in report.failed} == {"broken", "broken2", "other", "none"}


def test_how_much_an_ensemble_varies_is_said_of_the_patients_answer(models, folder, tmp_path):
    _, patients, slides = ask(models, folder, tmp_path / "p.csv")
    each = [ask([model], folder, tmp_path / f"{model.name}.csv")[1]["three"] for model in models]
    spread = np.std([float(row["prob_c1"]) for row in each], ddof=1)
    assert float(patients["three"]["uncertainty"]) == pytest.approx(spread)
    assert each[0]["uncertainty"] == ""
    of_slides = np.mean([float(slides[name]["uncertainty"]) for name in ("s001", "s002", "s003")])
    assert float(patients["three"]["uncertainty"]) < of_slides * 1.0001  # equal up to rounding where slides agree


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
@pytest.mark.long
def test_a_later_run_changes_nothing_and_computes_what_has_changed(models, folder, tmp_path, monkeypatch, name):
    out = tmp_path / name
    predict(models, find_bags(folder), out, patient_of=PATIENTS)
    before = patients_file(out).read_bytes()
    asked = []
    plain = answering.predict_outputs
    monkeypatch.setattr(answering, "predict_outputs", lambda *a, **k: asked.append(a[3]) or plain(*a, **k))
    predict(models, find_bags(folder), out, patient_of=PATIENTS)
    assert (patients_file(out).read_bytes(), asked) == (before, [])
    write_bag(folder / "s002.h5", FeatureBag(np.ones((3, 12), np.float32), FeatureSpec(encoder="toy", dim=12), "s002"))
    predict(models, find_bags(folder), out, patient_of=PATIENTS)
    assert {slide for (slide,) in asked} == {"s001", "s002", "s003"}
    anew = tmp_path / f"anew{out.suffix}"
    predict(models, find_bags(folder), anew, patient_of=PATIENTS)
    assert patients_file(anew).read_bytes() == patients_file(out).read_bytes() != before


def test_an_interrupted_run_continues_with_the_patients_that_are_left(models, folder, tmp_path, monkeypatch):
    out, straight = tmp_path / "p.csv", tmp_path / "straight.csv"
    predict(models, find_bags(folder), straight, patient_of=PATIENTS)
    predict(models, find_bags(folder), out)
    plain, count = answering.Ensemble.answer, []

    def stop(self, outputs):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return plain(self, outputs)

    monkeypatch.setattr(answering.Ensemble, "answer", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(models, find_bags(folder), out, patient_of=PATIENTS)
    assert not patients_file(out).exists()
    assert len(read(tmp_path / ".p_patients.csv.partial.csv")) == 1
    predict(models, find_bags(folder), out, patient_of=PATIENTS)
    assert len(count) == 3
    assert patients_file(out).read_bytes() == patients_file(straight).read_bytes()


def test_parquet_holds_the_same_as_csv(models, folder, tmp_path):
    _, patients, _ = ask(models, folder, tmp_path / "p.csv")
    predict(models, find_bags(folder), tmp_path / "p.parquet", patient_of=PATIENTS)
    frame = pd.read_parquet(tmp_path / "p_patients.parquet").set_index("patient_id")
    assert frame["prob_c1"]["three"] == float(patients["three"]["prob_c1"])
    assert frame["n_slides"]["three"] == 3


def test_a_model_of_patients_reads_all_slides_as_one_bag(make_toy, models, folder, tmp_path):
    toy = make_toy(per_patient=2)
    model = train(patient_examples(toy.examples), toy.task, tmp_path / "of_patients")
    assert load_ensemble([model]).reads_patients
    _, patients, _ = ask([model], folder, tmp_path / "p.csv")
    ensemble = load_ensemble([model])
    bag = torch.cat([toy.bags.load(slide) for slide in ("s001", "s002", "s003")])
    whole = predict_outputs(ensemble.models[0], ensemble.task, MemoryBags({"x": bag}, toy.bags.spec), ["x"])
    assert float(patients["three"]["prob_c1"]) == pytest.approx(whole[0, 1], abs=1e-6)
    with pytest.raises(ConfigError, match="some models were trained on slides and some on patients"):
        predict([model, models[0]], find_bags(folder), tmp_path / "q.csv", patient_of=PATIENTS)
    assert not (tmp_path / "q.csv").exists()


def test_tables_that_do_not_fit(models, folder, tmp_path, caplog):
    with pytest.raises(LabelError, match="none of the 2 slides in the table of patients"):
        ask(models, folder, tmp_path / "p.csv", {"x": "1", "y": "2"})
    with caplog.at_level(logging.WARNING):
        ask(models, folder, tmp_path / "p.csv", {"s001": "1", "s000": "1"})
    assert "does not list the slides broken, broken2, empty, other, s002" in caplog.text
    table = tmp_path / "slides.csv"
    table.write_text("PATIENT,FILENAME\np1,s001.h5\np1,s002.h5\n")
    assert read_patients(table) == {"s001": "p1", "s002": "p1"}

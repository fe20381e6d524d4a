import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from eosin.errors import ConfigError, LabelError
from eosin.mil._checkpoint import load_card
from eosin.mil._crossval import cohort_of, crossval
from eosin.mil._data import make_examples
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import Run
from eosin.mil._splits import Split, make_splits
from eosin.mil._tables import LabelTable
from eosin.mil._train import fit
from eosin.mil.task import make_task

RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"embed_dims": [16], "hidden": 8}),
    training=Training(epochs=6, lr=1e-2, bags_per_step=8),
)


def test_every_slide_is_tested_once_and_figures_come_from_test_folds_alone(toy, tmp_path):
    splits = make_splits(toy.cohort, folds=3, val_fraction=0)
    seen = []
    summary = crossval(
        RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=50, progress=seen.append
    )
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["slide_id"] for row in rows) == sorted(toy.examples.ids)
    tested = {slide: str(number) for number, split in enumerate(splits) for slide in split.test}
    assert all(tested[row["slide_id"]] == row["fold"] for row in rows)
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    by_hand = [np.mean([row["predicted"] == row["label"] for row in rows if row["fold"] == str(n)]) for n in range(3)]
    assert summary["metrics"]["accuracy"]["mean"] == pytest.approx(np.mean(by_hand))
    per_train = np.mean([len(split.test) / len(split.train) for split in splits])
    error = np.std(by_hand, ddof=1) * np.sqrt(1 / 3 + per_train)  # folds share training slides
    assert summary["metrics"]["accuracy"]["standard_error"] == pytest.approx(error)
    assert summary["metrics"]["auc"]["n_folds"] == summary["n_folds"] == 3
    assert summary["metrics"]["auc"]["mean"] > 0.9
    assert summary["out_of_fold"]["accuracy"]["lower"] <= summary["out_of_fold"]["accuracy"]["value"]
    assert [fold.number for fold in seen] == [0, 1, 2]


def test_test_slides_never_reach_training(toy, tmp_path, monkeypatch):
    splits = make_splits(toy.cohort, folds=3, val_fraction=0)
    used = []

    def spy(recipe, task, train, val, **options):
        used.append((set(train.ids), set(val.ids)))
        return fit(recipe, task, train, val, **options)

    monkeypatch.setattr("eosin.mil._crossval.fit", spy)
    crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=2)
    for (train, val), split in zip(used, splits, strict=True):
        assert val
        assert not train & val
        assert train | val == set(split.train)


def test_finished_folds_are_not_trained_again(toy, tmp_path):
    splits = make_splits(toy.cohort, folds=3)
    first = crossval(RECIPE, toy.task, toy.examples, splits[:2], cohort=toy.cohort, out=tmp_path, resamples=2)
    stamp = (tmp_path / "fold_0" / "model.safetensors").stat().st_mtime_ns
    again = crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=2)
    assert (tmp_path / "fold_0" / "model.safetensors").stat().st_mtime_ns == stamp
    assert again["folds"][:2] == first["folds"]


def test_fewer_folds_leave_no_model_of_the_old_ones(toy, tmp_path):
    more, fewer = make_splits(toy.cohort, folds=3), make_splits(toy.cohort, folds=2, seed=1)
    crossval(RECIPE, toy.task, toy.examples, more, cohort=toy.cohort, out=tmp_path, resamples=2)
    (tmp_path / "notes.txt").write_text("of the user")
    crossval(RECIPE, toy.task, toy.examples, fewer, cohort=toy.cohort, out=tmp_path, resamples=2)
    assert {path.name for path in tmp_path.glob("fold_*")} == {"fold_0", "fold_1"}
    assert (tmp_path / "notes.txt").exists()
    assert len(Run.open(tmp_path).models) == 2


def test_folds_of_nobody_known_are_not_mixed_with_new_ones(toy, tmp_path):
    splits = make_splits(toy.cohort, folds=3)
    crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=2)
    (tmp_path / "manifest.json").unlink()
    assert len(Run.open(tmp_path).models) == 3
    with pytest.raises(ConfigError, match="fold_2 would be read as a part"):
        crossval(RECIPE, toy.task, toy.examples, splits[:2], cohort=toy.cohort, out=tmp_path, resamples=2)
    crossval(RECIPE, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=2)
    (tmp_path / "fold_1" / "model.json").write_text((tmp_path / "fold_0" / "model.json").read_text())
    with pytest.raises(ConfigError, match=r"fold_1/model\.json: is not the file"):
        Run.open(tmp_path)


def test_leaking_splits_stop_before_training(toy, tmp_path):
    ids = toy.examples.ids
    cohort = cohort_of(toy.examples, toy.task, toy.table.rows())
    assert cohort == toy.cohort
    with pytest.raises(LabelError, match="patients in both train and test"):
        crossval(RECIPE, toy.task, toy.examples, [Split(ids[:40], (), ids[39:])], cohort=cohort, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fold_without_a_test_part_is_refused(toy, tmp_path):
    ids = toy.examples.ids
    cohort = cohort_of(toy.examples, toy.task, toy.table.rows())
    with pytest.raises(LabelError, match="no slides to test in fold 0"):
        crossval(RECIPE, toy.task, toy.examples, [Split(ids, (), ())], cohort=cohort, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_patients_with_several_slides_are_judged_too(make_toy, tmp_path):
    toy = make_toy(n_bags=60, per_patient=3)
    summary = crossval(
        RECIPE, toy.task, toy.examples, make_splits(toy.cohort, folds=2), cohort=toy.cohort, out=tmp_path, resamples=20
    )
    with (tmp_path / "predictions.csv").open(newline="") as file:
        slides = list(csv.DictReader(file))
    with (tmp_path / "predictions_patients.csv").open(newline="") as file:
        patients = list(csv.DictReader(file))
    assert len(patients) == len(set(toy.cohort.patient_ids)) == 20
    for row in patients:
        assert row["slide_id"] == row["patient_id"]
        own = [float(slide["prob_c1"]) for slide in slides if slide["patient_id"] == row["patient_id"]]
        assert float(row["prob_c1"]) == pytest.approx(np.mean(own))
    right = np.mean([row["predicted"] == row["label"] for row in patients])
    assert summary["patients"]["accuracy"]["value"] == pytest.approx(right)


def test_patients_whose_slides_differ_have_no_row(make_toy, tmp_path):
    toy = make_toy(n_bags=40)
    patients = tuple(f"p{number // 2}" for number in range(40))
    examples = replace(toy.examples, patient_ids=patients)
    cohort = replace(toy.cohort, patient_ids=patients)
    summary = crossval(
        RECIPE, toy.task, examples, make_splits(cohort, folds=2), cohort=cohort, out=tmp_path, resamples=20
    )
    assert "patients" not in summary
    assert not (tmp_path / "predictions_patients.csv").exists()


def test_pooled_figures_follow_the_threshold_of_each_fold(toy, tmp_path):
    """The accuracy of all test predictions is that of the column ``predicted``, whatever each fold's threshold."""
    tuned = RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update={"threshold": True, "epochs": 2})})
    splits = make_splits(toy.cohort, folds=3)
    summary = crossval(tuned, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=5)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    thresholds = {row["fold"]: float(row["threshold"]) for row in rows}
    assert len(set(thresholds.values())) > 1
    for row in rows:
        assert row["predicted"] == ("c1" if float(row["prob_c1"]) >= thresholds[row["fold"]] else "c0")
    right = np.mean([row["predicted"] == row["label"] for row in rows])
    assert summary["out_of_fold"]["accuracy"]["value"] == pytest.approx(right)


@pytest.mark.parametrize("kind", ["survival", "cox"])
def test_survival_is_judged_over_time_and_bins_come_from_the_training_fold(make_toy, tmp_path, kind):
    toy = make_toy(n_bags=90)
    rng = np.random.default_rng(0)
    risk = np.array([label == "c1" for label in toy.table.values["label"]])
    died, lost = rng.exponential(np.where(risk, 2.0, 9.0)), rng.exponential(8.0, len(risk))
    values = {
        "time": tuple(f"{t:.4f}" for t in np.minimum(died, lost)),
        "event": tuple(str(int(seen)) for seen in died <= lost),
    }
    table = LabelTable(toy.table.slide_ids, toy.table.patient_ids, values)
    task = make_task(kind, table.rows(), target="time,event")
    examples = make_examples(toy.bags, table, task)
    cohort = cohort_of(examples, task, table.rows())
    longer = RECIPE.training.model_copy(update={"bags_per_step": 16, "epochs": 40, "select": "last"})
    recipe = RECIPE.model_copy(update={"training": longer})
    splits = make_splits(cohort, folds=2)
    summary = crossval(recipe, task, examples, splits, cohort=cohort, out=tmp_path, resamples=20)
    pooled = summary["out_of_fold"]
    names = ["cindex", "cindex_ipcw", "time_auc", *(["integrated_brier"] if kind == "survival" else [])]
    assert list(pooled) == names
    assert all(0 < pooled[name]["value"] < 1 for name in names)
    for number, split in enumerate(splits):
        train = examples.subset(split.train).targets
        fitted = load_card(tmp_path / f"fold_{number}").load_task()
        assert fitted.edges == task.fit_to(train).edges
    if kind == "cox":
        assert_folds_are_not_compared(tmp_path, task, table, pooled["cindex"]["value"])


def assert_folds_are_not_compared(folder, task, table, pooled):
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    risk, folds = np.array([float(row["risk"]) for row in rows]), np.array([int(row["fold"]) for row in rows])
    target = task.encode(table.rows([row["slide_id"] for row in rows])).numpy()
    shifted = task.metrics((risk + 50 * folds)[:, None], target, folds=folds)["cindex"]
    assert pooled == pytest.approx(shifted)

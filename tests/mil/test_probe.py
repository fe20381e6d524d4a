"""Probes: the same answers as scikit-learn and scikit-survival, the files of a cross-validation, few-shot, refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from eosin.errors import ConfigError, LabelError
from eosin.features._bag import FeatureBag, FeatureSpec, vector_name
from eosin.features._store import write_bag
from eosin.mil._checkpoint import load_model
from eosin.mil._cohort import Cohort
from eosin.mil._crossval import PREDICTIONS
from eosin.mil._linear import fit_linear
from eosin.mil._probe import (
    FEW_SHOT,
    Probe,
    Vectors,
    fit_probe,
    pool_vectors,
    probe_study,
    require_shots,
    summarise_shots,
    write_baseline,
)
from eosin.mil._seen import read_seen
from eosin.mil._splits import Split
from eosin.mil._study import open_study
from eosin.mil.bags import PackedBags
from eosin.mil.task import Task, make_task
from eosin.mil.tasks._classification import Binary, Classification
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._multilabel import MultiLabel
from eosin.mil.tasks._regression import Regression

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 6))
SIGNAL = ROWS @ RNG.normal(size=6)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_classes_are_those_of_multinomial_logistic_regression(strength: float) -> None:
    target = np.digitize(SIGNAL + RNG.normal(size=40), [-1, 1])
    weights = fit_linear(Classification(classes=("a", "b", "c")), ROWS, torch.from_numpy(target), strength)
    theirs = LogisticRegression(C=1 / (40 * strength), tol=1e-10, max_iter=10000).fit(ROWS, target)
    np.testing.assert_allclose(weights[:-1].numpy(), theirs.coef_.T, atol=1e-5)


def test_one_logit_is_that_of_logistic_regression() -> None:
    target = (SIGNAL > 0).astype(int)
    weights = fit_linear(Binary(classes=("a", "b")), ROWS, torch.from_numpy(target), 0.1)
    theirs = LogisticRegression(C=1 / (40 * 0.1), tol=1e-10, max_iter=10000).fit(ROWS, target)
    np.testing.assert_allclose(weights[:-1, 0].numpy(), theirs.coef_[0], atol=1e-5)
    np.testing.assert_allclose(weights[-1].numpy(), theirs.intercept_, atol=1e-5)


def test_numbers_are_those_of_ridge_regression() -> None:
    target = torch.from_numpy(3 * SIGNAL + 7)
    task = Regression(target="x").fit_to(target)
    weights = fit_linear(task, ROWS, target, 0.2)
    theirs = Ridge(alpha=40 * 0.2, tol=1e-12).fit(ROWS, target.numpy())
    np.testing.assert_allclose(weights[:-1, 0].numpy() * task.deviation, theirs.coef_, atol=1e-5)


def test_risks_are_those_of_ridge_cox_regression() -> None:
    survival = pytest.importorskip("sksurv.linear_model")
    time = np.exp(-SIGNAL + RNG.normal(size=40))
    event = RNG.random(40) < 0.7
    target = torch.from_numpy(np.stack([time, event], 1))
    weights = fit_linear(Cox(time="t", event="e"), ROWS, target, 0.05)
    outcome = np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])
    theirs = survival.CoxPHSurvivalAnalysis(alpha=40 * 0.05, tol=1e-12).fit(ROWS, outcome)
    np.testing.assert_allclose(weights[:-1, 0].numpy(), theirs.coef_, atol=1e-5)


def vectors(rows: np.ndarray, target: torch.Tensor, strata: list[str]) -> Vectors:
    ids = tuple(f"s{k}" for k in range(len(rows)))
    return Vectors(rows, target, Cohort(ids, ids, tuple(strata)))


def test_a_wide_vector_is_the_same_probe_after_its_rotation() -> None:
    wide = np.random.default_rng(1).normal(size=(20, 50))
    target = torch.from_numpy((wide[:, 0] > 0).astype(np.int64))
    task = Classification(classes=("a", "b"))
    fitted = fit_probe(Probe(strength=0.3), task, vectors(wide, target, ["x"] * 20))
    scaled = (wide - wide.mean(0)) / wide.std(0)
    direct = fit_linear(task, scaled, target, 0.3)
    wanted = task.activate(torch.from_numpy(scaled) @ direct[:-1] + direct[-1])
    np.testing.assert_allclose(fitted.predict(wide), wanted, atol=1e-5)


def test_the_strength_is_chosen_where_it_matters() -> None:
    noise = np.random.default_rng(2).normal(size=(60, 30))
    target = torch.from_numpy(np.arange(60) % 2)
    task = Classification(classes=("a", "b"))
    labels = [str(k % 2) for k in range(60)]
    fitted = fit_probe(Probe(), task, vectors(noise, target, labels))
    assert np.abs(fitted.predict(noise) - 0.5).max() < 0.1  # nothing to learn: the strongest penalty
    noise[:, 0] = target.numpy() * 10 + noise[:, 0]
    fitted = fit_probe(Probe(), task, vectors(noise, target, labels))
    assert fitted.predict(noise)[target == 1, 1].min() > 0.9


TASKS: dict[str, tuple[Task, torch.Tensor]] = {
    "classes": (Classification(classes=("a", "b", "c")), torch.arange(12) % 3),
    "labels": (
        MultiLabel(targets=("x", "y"), positives=("1", "1"), negatives=("0", "0")),
        torch.stack([torch.arange(12) % 3 == 0, torch.arange(12) % 3 == 1], 1).long(),
    ),
    "numbers": (Regression(target="x"), (torch.arange(12) % 3).double()),
}


@pytest.mark.parametrize("name", TASKS)
def test_nearest_neighbours_answer_by_those_that_point_alike(name: str) -> None:
    task, target = TASKS[name]
    rows = np.eye(3)[np.arange(12) % 3] + RNG.normal(size=(12, 3)) / 20
    fitted = fit_probe(Probe(method="knn", neighbours=3), task, vectors(rows, target, ["x"] * 12))
    said = fitted.predict(rows)
    wanted = np.eye(3)[np.arange(12) % 3] if name == "classes" else target.numpy().reshape(12, -1)
    np.testing.assert_allclose(said, wanted, atol=1e-12)


@pytest.fixture
def files(toy, tmp_path: Path) -> tuple[Path, Path]:
    """Return the folder of features and the table of labels of the toy cohort."""
    spec = FeatureSpec(encoder="toy", dim=12)
    for name in toy.bags.ids:
        write_bag(tmp_path / f"features/{name}.h5", FeatureBag(toy.bags.load(name).numpy(), spec, name))
    rows = zip(toy.table.slide_ids, toy.table.patient_ids, toy.table.values["label"], strict=True)
    (tmp_path / "labels.csv").write_text("slide_id,patient_id,label\n" + "".join(f"{','.join(row)}\n" for row in rows))
    return tmp_path / "features", tmp_path / "labels.csv"


def test_a_study_is_probed_with_the_files_of_a_cross_validation(files, toy, tmp_path: Path) -> None:
    study = open_study(*files)
    splits = study.splits(folds=3)
    summary = probe_study(study, tmp_path / "out", splits=splits, shots=(1, 2), repeats=3, resamples=50)
    assert json.loads((tmp_path / "out/metrics.json").read_text())["recipe"]["method"] == "logistic"
    with (tmp_path / "out" / PREDICTIONS).open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["slide_id"] for row in rows) == sorted(study.examples.ids)
    for row in rows:
        assert row["slide_id"] in splits[int(row["fold"])].test
    assert summary["out_of_fold"]["auc"]["value"] > 0.8
    with (tmp_path / "out" / FEW_SHOT).open() as file:
        few = list(csv.DictReader(file))
    assert len(few) == 2 * 3 * 3
    assert [(line["k"], line["n"]) for line in summary["few_shot"]] == [(1, 9), (2, 9)]
    again = probe_study(study, tmp_path / "again", splits=splits, shots=(1, 2), repeats=3, resamples=50)
    assert again == summary


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_the_probe_of_all_slides_is_a_model_with_exact_evidence(files, tmp_path: Path, pool) -> None:
    study = open_study(*files)
    probe_study(study, tmp_path / "out", probe=Probe(pool=pool), splits=study.splits(folds=3), resamples=50)
    model, card = load_model(tmp_path / "out/model")
    vectors = Vectors.of(study.examples, study.cohort, pool)
    wanted = fit_probe(Probe(pool=pool), study.task, vectors).predict(vectors.rows)
    packs = [PackedBags.pack([study.examples.bags.load(name).float()]) for name in study.examples.ids]
    with torch.no_grad():
        said = np.concatenate([card.load_task().activate(model(pack).logits) for pack in packs])
        form = model.readout(packs[0], model(packs[0]))
        rest = PackedBags.pack([packs[0].values[1:]])
        change = model(rest).logits - model(packs[0]).logits
    np.testing.assert_allclose(said, wanted, atol=1e-5)
    np.testing.assert_allclose(form.leave_one_out()[0], change[0], atol=1e-5)
    assert read_seen(tmp_path / "out/model").has(study.examples.ids[0])


@pytest.mark.long
def test_a_probe_that_is_no_model_removes_the_model_before_it(files, tmp_path: Path) -> None:
    study = open_study(*files)
    splits = study.splits(folds=3)
    for probe, saved in (
        (Probe(), True),
        (Probe(pool="mean_sd"), False),
        (Probe(), True),
        (Probe(method="knn"), False),
    ):
        probe_study(study, tmp_path / "out", probe=probe, splits=splits, resamples=50)
        assert (tmp_path / "out/model").exists() == saved


def test_no_test_slide_changes_what_is_fitted(files, toy, tmp_path: Path) -> None:
    study = open_study(*files)
    fold = study.splits(folds=3)[0]
    whole = Vectors.of(study.examples, study.cohort, "mean")
    train = whole.at((*fold.train, *fold.val))
    assert not set(train.cohort.patient_ids) & {study.table.patient_of()[name] for name in fold.test}
    path = write_baseline(study, [fold], tmp_path / "baseline")
    assert path is not None
    with path.open() as file:
        said = {row["slide_id"]: float(row["prob_c1"]) for row in csv.DictReader(file)}
    wanted = fit_probe(Probe(), study.task, train).predict(whole.at(fold.test).rows)[:, 1]
    np.testing.assert_allclose([said[name] for name in fold.test], wanted, atol=1e-9)


def test_pooled_tiles(toy) -> None:
    bag = toy.bags.load("s001").numpy().astype(np.float64)
    np.testing.assert_allclose(pool_vectors(toy.bags, ["s001"], "mean")[0], bag.mean(0))
    np.testing.assert_allclose(pool_vectors(toy.bags, ["s001"], "max")[0], bag.max(0))
    np.testing.assert_allclose(pool_vectors(toy.bags, ["s001"], "mean_sd")[0], [*bag.mean(0), *bag.std(0)])


def test_vectors_of_patients_are_joined_with_the_patients_of_the_table(files, toy, tmp_path: Path) -> None:
    spec = FeatureSpec(encoder=vector_name("mean", "toy"), dim=2)
    for number, patient in enumerate(dict.fromkeys(toy.table.patient_ids)):
        write_bag(tmp_path / f"p/{patient}.h5", FeatureBag(np.full((1, 2), number, np.float32), spec, patient))
    study = open_study(tmp_path / "p", files[1])
    assert study.examples.ids == tuple(dict.fromkeys(toy.table.patient_ids))
    assert "one vector per patient" in study.notes
    text = files[1].read_text().replace(",p0-c0,c0", ",p1-c1,c0")
    (tmp_path / "mixed.csv").write_text(text)
    with pytest.raises(LabelError, match="rows of a patient differ in column 'label': p1-c1"):
        open_study(tmp_path / "p", tmp_path / "mixed.csv")


def test_refusals(files) -> None:
    study = open_study(*files)
    splits = study.splits(folds=3)
    with pytest.raises(ConfigError, match="method cox does not fit task classification"):
        probe_study(study, "never", probe=Probe(method="cox"))
    with pytest.raises(ConfigError, match="nearest neighbours do not predict task cox"):
        Probe(method="knn").of_task(Cox(time="t", event="e"))
    with pytest.raises(LabelError, match=r"few-shot with 99 patients of each class: class c0 has \d+ in the training"):
        probe_study(study, "never", splits=splits, shots=(1, 99))
    with pytest.raises(ConfigError, match="task regression has none"):
        require_shots(Regression(target="x"), study.cohort, splits, (1,))
    first = splits[0]
    leaky = [Split((*first.train, first.test[0]), (), first.test)]
    with pytest.raises(LabelError):
        probe_study(study, "never", splits=leaky)
    assert not Path("never").exists()


def test_shots_are_summarised_over_folds_and_draws() -> None:
    rows = [{"k": 1, "fold": 0, "repeat": 0, "auc": 0.5}, {"k": 1, "fold": 1, "repeat": 0, "auc": 0.7}]
    rows += [{"k": 2, "fold": 0, "repeat": 0, "auc": None}]
    one, two = summarise_shots(rows)
    assert (one["n"], one["auc"], one["auc_sd"]) == (2, pytest.approx(0.6), pytest.approx(np.sqrt(0.02)))
    assert (two["auc"], two["auc_sd"]) == (None, None)


def test_every_kind_of_task_has_a_linear_probe() -> None:
    rows = [{"grade": str(k % 3 + 1), "time": str(k + 1), "event": str(k % 2), "size": str(k / 3)} for k in range(12)]
    for kind, target in (
        ("ordinal", "grade"),
        ("survival", "time,event=1"),
        ("cox", "time,event=1"),
        ("regression", "size"),
        ("multitask", "ordinal:grade; cox:time,event=1"),
    ):
        task = make_task(kind, rows, target=target)
        targets = task.encode(rows)
        fitted = fit_probe(Probe(strength=0.1), task, vectors(ROWS[:12], targets, ["x"] * 12))
        outputs = fitted.predict(ROWS[:12])
        assert np.isfinite(outputs).all()
        assert fitted.task.metrics(outputs, targets.numpy())

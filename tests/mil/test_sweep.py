import csv

import numpy as np
import pytest

import eosin.mil.methods  # noqa: F401 (registers)
from eosin.errors import ConfigError, UnknownNameError
from eosin.mil._checkpoint import load_card, load_model
from eosin.mil._crossval import crossval
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._seen import read_seen
from eosin.mil._splits import make_nested_splits, make_splits
from eosin.mil._sweep import SEED, Sweep, run_sweep


def test_candidates_are_all_combinations():
    sweep = Sweep(recipes=("abmil", "mean"), grid={"training.lr": [1e-4, 1e-3], "bag_weight": [1.0]}, seeds=(0, 1))
    found = sweep.candidates()
    assert len(found) == 8
    assert found["abmil lr=0.001 bag_weight=1.0 seed=1"].training.lr == 1e-3
    assert found["mean lr=0.0001 bag_weight=1.0 seed=0"].aggregator.name == "mean"
    with pytest.raises(UnknownNameError):
        Sweep(recipes=("abmill",)).candidates()
    with pytest.raises(ConfigError):
        Sweep(grid={"training.speed": [1]}).candidates()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {"training.lr": []}}, "grid.training.lr"),
        ({"grid": {"training.select": ["last"]}}, "a sweep cannot compare models; set it to loss or metric"),
        ({"seeds": (0, 0)}, "list each recipe, option and seed once"),
    ],
)
def test_a_sweep_that_cannot_choose_is_refused_before_it_starts(options, message):
    with pytest.raises(ConfigError, match=message):
        Sweep.parse(options).candidates()


def recipe(**changes):
    training = Training(**({"epochs": 6, "bags_per_step": 8, "lr": 1e-2} | changes))
    return Recipe(aggregator=Component(name="abmil", options={"embed_dims": [8], "hidden": 4}), training=training)


def test_the_choice_is_made_by_validation_in_each_fold(toy, tmp_path):
    candidates = {"good": recipe(), "bad": recipe(lr=1e-9, epochs=1)}
    splits = make_splits(toy.cohort, folds=3)
    summary = run_sweep(candidates, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=5)
    values = {
        name: [
            load_card(tmp_path / f"candidate_{number}" / f"fold_{fold}").training["validation"]["auc"]
            for fold in range(3)
        ]
        for number, name in enumerate(candidates)
    }
    expected = ["good" if good > bad else "bad" for good, bad in zip(values["good"], values["bad"], strict=True)]
    assert summary["choices"] == expected
    assert expected.count("good") >= 2
    with (tmp_path / "sweep.csv").open(newline="") as file:
        lines = {line["candidate"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["good", "bad", "chosen by validation"]
    if expected == ["good"] * 3:
        assert lines["good"]["auc_mean"] == lines["chosen by validation"]["auc_mean"]
    assert (tmp_path / "chosen" / "predictions.csv").exists()


def test_all_seeds_of_a_candidate_are_a_line_of_their_own(toy, tmp_path):
    candidates = {f"a{SEED}{seed}": recipe(seed=seed, epochs=1) for seed in (0, 1)}
    splits = make_splits(toy.cohort, folds=2)
    aucs = []
    run_sweep(
        candidates, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path, resamples=2,
        progress=lambda _, fold: aucs.append(fold.metrics["auc"]),
    )  # fmt: skip
    with (tmp_path / "sweep.csv").open(newline="") as file:
        lines = {line["candidate"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["a seed=0", "a seed=1", "a, 2 seeds", "chosen by validation"]
    assert float(lines["a, 2 seeds"]["auc_mean"]) == pytest.approx(np.mean(aucs))
    assert float(lines["a, 2 seeds"]["auc_sd"]) == pytest.approx(np.std(aucs, ddof=1))


def test_a_candidate_that_cannot_be_judged_is_refused(toy, tmp_path):
    splits = make_splits(toy.cohort, folds=3)
    with pytest.raises(ConfigError, match="cannot compare models"):
        run_sweep({"x": recipe(select="last")}, toy.task, toy.examples, splits, cohort=toy.cohort, out=tmp_path)


def test_nested_splits_choose_by_the_mean_over_inner_folds_and_test_once(toy, tmp_path):
    candidates = {"good": recipe(), "bad": recipe(lr=1e-9, epochs=1)}
    nested = make_nested_splits(toy.cohort, folds=2, inner_folds=2)
    seen = []
    summary = run_sweep(
        candidates, toy.task, toy.examples, nested, cohort=toy.cohort, out=tmp_path, resamples=5,
        progress=lambda name, fold: seen.append((name, fold)),
    )  # fmt: skip
    means = {(name, fold.number): sum(part["auc"] for part in fold.validation) / 2 for name, fold in seen}
    best = [max(candidates, key=lambda name, fold=fold: means[name, fold]) for fold in range(2)]
    assert summary["choices"] == best == ["good", "good"]
    with (tmp_path / "chosen" / "predictions.csv").open(newline="") as file:
        tested = [line["slide_id"] for line in csv.DictReader(file)]
    assert sorted(tested) == sorted(toy.examples.ids)
    for fold, splits in enumerate(nested):
        for place, split in enumerate(splits):
            folder = tmp_path / "candidate_0" / f"fold_{fold}" / f"inner_{place}"
            assert set(read_seen(folder).patient_of) == set(split.train) | set(split.val)
            assert not set(read_seen(folder).patient_of) & set(split.test)
    assert set(summary["recipe"]) == {"good"}


def test_models_of_nested_splits_answer_together(toy, tmp_path):
    (splits, *_) = make_nested_splits(toy.cohort, folds=2, inner_folds=2)
    crossval(recipe(), toy.task, toy.examples, [splits], cohort=toy.cohort, out=tmp_path, resamples=2)
    ids = list(splits[0].test)
    alone = []
    for place in range(2):
        model, card = load_model(tmp_path / "fold_0" / f"inner_{place}")
        alone.append(predict_outputs(model, card.load_task(), toy.bags, ids)[:, 1])
    with (tmp_path / "predictions.csv").open(newline="") as file:
        found = {line["slide_id"]: float(line["prob_c1"]) for line in csv.DictReader(file)}
    assert [found[name] for name in ids] == pytest.approx(((alone[0] + alone[1]) / 2).tolist())

import numpy as np
import pytest
import torch

from eosin.errors import ConfigError, LabelError
from eosin.mil._crossval import cohort_of, crossval
from eosin.mil._data import Examples, make_examples
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._splits import make_splits
from eosin.mil._tables import LabelTable
from eosin.mil._train import fit
from eosin.mil.task import load_task, make_task

TARGET = "er; ordinal:grade; cox:months,dead; regression:age"
TABLE = [
    {"slide_id": "a", "er": "pos", "grade": "2", "months": "3", "dead": "1", "age": "50"},
    {"slide_id": "b", "er": "neg", "grade": "", "months": "5", "dead": "0", "age": "60"},
    {"slide_id": "c", "er": "", "grade": "1", "months": "8", "dead": "1", "age": ""},
    {"slide_id": "d", "er": "pos", "grade": "3", "months": "9", "dead": "", "age": "40"},
]  # fmt: skip


@pytest.fixture
def task():
    made = make_task("multitask", TABLE, target=TARGET)
    return made.fit_to(made.encode(TABLE))


def test_targets_lie_side_by_side_with_gaps(task):
    assert task.names == ("er", "grade", "months", "age")
    assert task.columns == ("er", "grade", "months", "dead", "age")
    assert task.n_outputs == 2 + 2 + 1 + 1
    target = task.encode(TABLE)
    expected = [[1, 1, 3, 1, 50], [0, np.nan, 5, 0, 60], [np.nan, 0, 8, 1, np.nan], [1, 2, np.nan, np.nan, 40]]
    np.testing.assert_array_equal(target.numpy(), expected)
    assert [list(column) for column in task.decode(target.numpy())] == [
        ["pos", "neg", "", "pos"], ["2", "", "1", "3"], [3, 5, 8, ""], [1, 0, 1, ""], [50, 60, "", 40],
    ]  # fmt: skip
    assert load_task(task.model_dump(mode="json")) == task
    assert task.same_question(make_task("multitask", TABLE, target=TARGET))
    assert "er" in task.describe(TABLE)
    assert "1 without" in task.describe(TABLE)


def test_what_a_part_learns_comes_from_its_known_targets(task):
    assert task.parts[3].mean == 50
    assert len(task.parts[2].edges) == 3


def test_the_loss_is_the_mean_of_the_known_parts(task):
    logits = torch.randn(4, task.n_outputs, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = task.encode(TABLE)
    losses = task.bag_losses(logits, target)
    er, grade, cox, age = task.parts
    by_hand = torch.zeros(4)
    by_hand[[0, 1, 3]] += er.bag_losses(logits[[0, 1, 3], :2], torch.tensor([1, 0, 1]))
    by_hand[[0, 2, 3]] += grade.bag_losses(logits[[0, 2, 3], 2:4], torch.tensor([1, 0, 2]))
    by_hand[[0, 1, 2]] += cox.bag_losses(logits[[0, 1, 2], 4:5], target[[0, 1, 2], 2:4])
    by_hand[[0, 1, 3]] += age.bag_losses(logits[[0, 1, 3], 5:], target[[0, 1, 3], 4])
    torch.testing.assert_close(losses, by_hand / 4)
    losses.sum().backward()
    gradient = logits.grad.clone()
    assert gradient.isfinite().all()
    assert (gradient[2, :2] == 0).all()
    assert (gradient[1, 2:4] == 0).all()


def test_tables_and_metrics_carry_the_names_of_the_parts(task):
    outputs = task.activate(torch.randn(4, task.n_outputs, generator=torch.Generator().manual_seed(0)))
    columns = task.table(outputs)
    assert {"er_prob_pos", "er_predicted", "grade_prob_3", "months_risk", "age_predicted"} <= set(columns)
    np.testing.assert_allclose(task.read_outputs(columns), outputs)
    metrics = task.metrics(outputs, task.encode(TABLE).numpy())
    assert metrics["er_auc"] in (0, 0.5, 1)
    assert metrics["age_r2"] is not None
    assert metrics["months_cindex"] is not None
    known = [metrics[name] for name in ("er_auc", "grade_quadratic_kappa", "months_cindex", "age_r2")]
    assert metrics["score"] == pytest.approx(np.mean(known))
    assert np.isfinite(task.surprise(outputs, task.encode(TABLE).numpy())).all()


def test_each_target_has_its_threshold_and_temperature_from_known_validation_targets():
    rows = [
        {
            "er": ("neg", "pos")[n % 2],
            "grade": str(n % 3 + 1),
            "pr": "" if n % 4 == 0 else str(n % 2),
            "ki": str(n // 2 % 2),
            "age": str(n),
        }
        for n in range(120)
    ]
    task = make_task("multitask", rows, target="er; ordinal:grade; binary:pr; multilabel:ki; regression:age")
    target = task.encode(rows)
    noise = torch.randn(120, task.n_outputs, generator=torch.Generator().manual_seed(0))
    er, pr, ki = target[:, 0], target[:, 2].nan_to_num(0), target[:, 3]
    logits = noise + torch.stack([0 * er, 6 * er - 1, 0 * er, 0 * er, 6 * pr - 5, 6 * ki - 4, er], 1)
    tuned = task.tuned(logits, target, threshold=True, temperature=True)
    known = ~target[:, 2].isnan()
    alone = task.parts[2].tuned(logits[known, 4:5], target[known, 2].long(), threshold=True, temperature=True)
    assert tuned.parts[2] == alone
    assert tuned.parts[0].threshold not in (None, 0.5)
    assert tuned.parts[1].temperature != 1
    assert len(tuned.parts[3].thresholds) == 1
    assert tuned.parts[4] == task.parts[4]
    assert tuned.same_question(task)

    outputs = tuned.activate(logits)
    columns = {name: [str(value) for value in values] for name, values in tuned.table(outputs).items()}
    assert columns["pr_threshold"][0] == str(alone.threshold)
    np.testing.assert_array_equal(task.read_decided(columns), tuned.decide(outputs))
    assert tuned.decide(outputs).shape == (120, 4)
    truth = target.numpy()
    at_half, at_theirs = task.metrics(outputs, truth), tuned.metrics(outputs, truth)
    assert task.metrics(outputs, truth, tuned.decide(outputs)) == at_theirs
    assert at_theirs["pr_balanced_accuracy"] > at_half["pr_balanced_accuracy"]
    assert at_theirs["pr_auc"] == at_half["pr_auc"]
    mean = task.with_mean_threshold([tuned, task]).parts
    assert mean[2].threshold == pytest.approx((alone.threshold + 0.5) / 2)
    assert mean[3].thresholds[0] == pytest.approx((tuned.parts[3].thresholds[0] + 0.5) / 2)


def test_a_threshold_that_no_target_has_is_refused_before_training(make_toy):
    toy = make_toy(n_bags=12)
    rows = [{"a": str(n % 3), "b": str(n)} for n in range(12)]
    task = make_task("multitask", rows, target="a; regression:b")
    examples = Examples(toy.bags, toy.examples.ids, toy.examples.patient_ids, task.encode(rows))
    recipe = Recipe(training=Training(threshold=True))
    with pytest.raises(ConfigError, match="none of the targets a, b has a threshold; set"):
        fit(recipe, task, examples, examples, progress=lambda _: pytest.fail("was trained"))


def test_models_differ_in_each_target_by_its_own_unit(task):
    outputs = np.zeros((2, len(task.activate(torch.zeros(1, task.n_outputs))[0])))
    outputs[:, -1] = 40, 60
    outputs[:, 0] = 0.2, 0.4
    spread = task.spread(outputs)
    assert tuple(spread) == task.spread_columns == tuple(f"{name}_uncertainty" for name in task.names)
    assert spread["age_uncertainty"] == pytest.approx(200**0.5)
    assert spread["er_uncertainty"] == pytest.approx(0.02**0.5 / 2)
    assert spread["months_uncertainty"] == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("er", "needs at least two targets"),
        ("er,grade", "needs at least two targets, separated by semicolons; found 'er,grade'"),
        ("er; er", "names a column twice"),
        ("er; her2", "no column 'her2'"),
        ("er; ordinl:grade", "no task named 'ordinl'; did you mean ordinal"),
    ],
)
def test_targets_that_make_no_sense(target, message):
    with pytest.raises(LabelError if "named" not in message else ValueError, match=message):
        make_task("multitask", [TABLE[0], TABLE[1]], target=target)


def test_a_row_without_any_value_is_refused():
    with pytest.raises(LabelError, match="no value in column any of er, grade for x"):
        make_task("multitask", [*TABLE, {"slide_id": "x", "er": "", "grade": "nan"}], target="er; ordinal:grade")


def test_two_targets_are_learnt_by_one_model_and_judged_out_of_fold(make_toy, tmp_path):
    toy = make_toy(n_bags=80, n_classes=4, shift=6.0)
    labels = toy.table.values["label"]
    first = ["" if number % 5 == 0 else str(int(label in ("c1", "c3"))) for number, label in enumerate(labels)]
    second = ["" if number % 5 == 2 else str(int(label in ("c2", "c3"))) for number, label in enumerate(labels)]
    columns = {"first": tuple(first), "second": tuple(second)}
    table = LabelTable(toy.table.slide_ids, toy.table.patient_ids, columns)
    task = make_task("multitask", table.rows(), target="first; binary:second")
    examples = make_examples(toy.bags, table, task)
    cohort = cohort_of(examples, task, table.rows())
    recipe = Recipe(
        aggregator=Component(name="abmil", options={"embed_dims": [16], "hidden": 8}),
        training=Training(epochs=15, lr=1e-2, bags_per_step=8, select="metric", refit=False),
    )
    summary = crossval(recipe, task, examples, make_splits(cohort, folds=2), cohort=cohort, out=tmp_path, resamples=20)
    assert summary["out_of_fold"]["first_auc"]["value"] > 0.75
    assert summary["out_of_fold"]["second_auc"]["value"] > 0.75
    without = examples.subset(name for name, value in zip(table.slide_ids, first, strict=True) if not value)
    with pytest.raises(LabelError, match="no training slide has a value of 'first'"):
        fit(recipe, task, without, examples)

import numpy as np
import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError, LabelError, UnknownNameError
from eosin.mil._metrics import expected_calibration_error
from eosin.mil.task import load_task, make_task
from eosin.mil.tasks._classification import Binary, Classification, sorted_labels


def rows(*labels):
    return [{"label": label} for label in labels]


def test_classes_come_from_the_table_in_order():
    assert make_task("classification", rows("b", "a", "c", "a")).classes == ("a", "b", "c")
    assert sorted_labels({"10", "9", "1"}) == ("1", "9", "10")
    assert make_task("binary", rows("1", "0")).classes == ("0", "1")


@pytest.mark.parametrize(
    ("negative", "positive"),
    [
        ("NEGATIV", "Positiv"), ("nein", "JA"), ("Non", "Oui"), ("gutartig", "bösartig"), ("sano", "Tumor"),
        ("negative", "positive"), ("0", "1"), ("normal", "tumor"), ("Her2Neg", "Her2Pos"), ("normal", "cancer"),
        ("MSS", "MSI-H"), ("WT", "MUT"), ("wild type", "mutant"), ("ER-", "ER+"), ("ERneg", "ERpos"),
        ("control", "case"),
        ("Non-responder", "Responder"), ("normal", "abnormal"), ("False", "True"), ("low", "high"), ("alive", "dead"),
        ("pMMR", "dMMR"), ("tumor free", "tumor"), ("9", "10"), ("LumA", "LumB"), ("adeno", "squamous"),
    ],
)  # fmt: skip
def test_the_positive_class_is_what_the_words_say_else_the_last(negative, positive):
    table = rows(positive, negative, positive)
    for kind in ("classification", "binary"):
        task = make_task(kind, table)
        assert task.classes == (negative, positive)
        assert f"positive: {positive} (--target 'label={negative}' for the other)" in task.describe(table)
        assert make_task(kind, table, target=f"label={negative}").classes == (positive, negative)
        assert make_task(kind, table, target=f"label = {positive}").classes == (negative, positive)
    several = make_task("multilabel", table, target="label")
    assert (several.negatives, several.positives) == ((negative,), (positive,))
    assert make_task("multilabel", table, target=f"label={negative}").positives == (negative,)


@pytest.mark.parametrize(("labels", "target"), [("ab", "label=c"), ("abc", "label=a")])
def test_a_positive_class_must_be_one_of_two(labels, target):
    with pytest.raises(LabelError, match=f"{target} names a positive class, which takes two classes"):
        make_task("classification", rows(*labels), target=target)


def test_the_positive_class_decides_sensitivity_and_threshold():
    table = rows("tumor", "tumor", "normal", "normal", "normal")
    logits = torch.tensor([[2.0], [-1.0], [-2.0], [-2.0], [1.0]])
    for target, expected in [("label", (1 / 2, 2 / 3)), ("label=normal", (2 / 3, 1 / 2))]:
        task = make_task("binary", table, target=target)
        outputs = task.activate(logits if task.classes[1] == "tumor" else -logits)
        found = task.metrics(outputs, task.encode(table).numpy())
        assert (found["sensitivity"], found["specificity"]) == pytest.approx(expected)
    assert task.metrics(outputs[:2], task.encode(table[:2]).numpy())["sensitivity"] is None


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("classification", "aaa", "only the label 'a'; at least two"),
        ("binary", "abc", "has 3 classes; use --task classification"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(kind, labels, message):
    with pytest.raises(LabelError, match=message):
        make_task(kind, rows(*labels))


def test_unknown_tasks_and_damaged_descriptions_are_refused():
    with pytest.raises(UnknownNameError, match="no task named 'clasification'; did you mean classification"):
        make_task("clasification", rows("a", "b"))
    with pytest.raises(ConfigError, match="description of the task"):
        load_task({"kind": "classification"})


@pytest.mark.parametrize("task", [Classification(classes=("x", "y")), Binary(classes=("x", "y"))])
def test_a_task_survives_json_and_says_what_it_means(task):
    assert load_task(task.model_dump(mode="json")) == task
    target = task.encode(rows("y", "x", "y"))
    assert target.tolist() == [1, 0, 1]
    assert task.decode(target.numpy())[0].tolist() == ["y", "x", "y"]
    logits = torch.tensor([[2.0], [-1.0], [0.5]]).double()
    if task.n_outputs == 2:
        logits = torch.cat([-logits / 2, logits / 2], 1)
    losses = task.bag_losses(logits, target)
    expected = functional.binary_cross_entropy(
        torch.sigmoid(torch.tensor([2.0, -1.0, 0.5])), torch.tensor([1.0, 0, 1]), reduction="none"
    )
    torch.testing.assert_close(losses.float(), expected)
    torch.testing.assert_close(task.loss(logits, target), losses.mean())
    outputs = task.activate(logits)
    np.testing.assert_allclose(outputs.sum(1), 1)
    table = task.table(outputs)
    assert list(table) == ["prob_x", "prob_y", "predicted", "threshold"]
    assert table["predicted"].tolist() == ["y", "x", "y"]
    assert task.metrics(outputs, target.numpy())["accuracy"] == 1.0
    assert task.memberships(target).shape == (3, task.n_outputs)
    assert task.memberships(target)[:, -1].tolist() == [1, 0, 1]


def test_losses_are_computed_in_float32_at_least():
    task = Classification(classes=("x", "y"))
    logits = torch.tensor([[30.0, 0.1]], dtype=torch.bfloat16)
    assert task.bag_losses(logits, torch.tensor([1])).dtype == torch.float32


def test_balance_gives_each_class_the_same_sum():
    task = Classification(classes=("x", "y", "z"))
    target = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    weights = task.balance(target)
    sums = [weights[target == k].sum().item() for k in range(3)]
    assert sums == pytest.approx([7 / 3] * 3)


def test_ordered_classes_are_predicted_by_their_median():
    task = make_task("ordinal", rows("2", "0", "1", "10"))
    assert task.classes == ("0", "1", "2", "10")
    assert task.n_outputs == 3
    outputs = task.activate(torch.tensor([[5.0, 5.0, -5.0], [-5.0, 9.0, 9.0], [0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(outputs.sum(1), 1)
    assert (outputs >= 0).all()
    assert task.table(outputs)["predicted"].tolist() == ["2", "0", "1"]
    target = torch.tensor([2, 0, 3])
    assert task.metrics(outputs, target.numpy())["mean_absolute_error"] == pytest.approx(2 / 3)
    assert task.memberships(target).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_the_ordinal_loss_is_the_likelihood_of_the_steps():
    task = make_task("ordinal", rows("1", "2", "3"))
    logits = torch.randn(5, 2, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 1, 0])
    likelihood = torch.from_numpy(task.activate(logits))[range(5), target]
    torch.testing.assert_close(task.bag_losses(logits, target), -likelihood.log() / 2)


def table_of(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_several_labels_at_once():
    data = table_of(er=["neg", "pos", "pos", "neg"], pr=["0", "0", "1", "0"])
    task = make_task("multilabel", data, target="er, pr")
    assert task.columns == ("er", "pr")
    target = task.encode(data)
    assert target.tolist() == [[0, 0], [1, 0], [1, 1], [0, 0]]
    assert [column.tolist() for column in task.decode(target.numpy())] == [
        ["neg", "pos", "pos", "neg"],
        ["0", "0", "1", "0"],
    ]
    logits = torch.where(target == 1, 3.0, -3.0)
    outputs = task.activate(logits)
    assert task.table(outputs)["predicted_er"].tolist() == ["neg", "pos", "pos", "neg"]
    assert task.metrics(outputs, target.numpy())["auc"] == 1.0
    assert task.metrics(outputs[:2], target.numpy()[:2])["auc_pr"] is None
    assert task.metrics(outputs[:2], target.numpy()[:2])["auc"] is None
    assert task.strata(data) == ["none", "er", "pr", "none"]
    with pytest.raises(LabelError, match="same 'pr'"):
        task.require_trainable(target[:2])
    with pytest.raises(LabelError, match="'er,er' names a column twice"):
        make_task("multilabel", data, target="er,er")
    with pytest.raises(LabelError, match="column 'x' has 3 values"):
        make_task("multilabel", table_of(x=list("abc")), target="x")


def test_numbers_are_learnt_in_units_of_the_training_part():
    data = table_of(label=["10", "20", "30", "40"])
    task = make_task("regression", data)
    target = task.encode(data)
    fitted = task.fit_to(target[:3])
    assert fitted.mean == 20
    assert load_task(fitted.model_dump(mode="json")) == fitted
    perfect = ((target - 20) / fitted.deviation)[:, None]
    assert fitted.bag_losses(perfect, target).max() < 1e-12
    outputs = fitted.activate(perfect)
    np.testing.assert_allclose(outputs[:, 0], [10, 20, 30, 40])
    found = fitted.metrics(outputs + 1, target.numpy())
    assert found["mean_absolute_error"] == pytest.approx(1)
    assert found["pearson"] == found["spearman"] == pytest.approx(1)
    assert found["r2"] == pytest.approx(1 - 4 / 500)
    assert fitted.metrics(outputs[:1], target.numpy()[:1])["r2"] is None
    assert task.strata(data) == ["0", "1", "2", "3"]
    with pytest.raises(LabelError, match="'many' in column 'label' is not a number"):
        make_task("regression", table_of(label=["1", "many"]))
    with pytest.raises(ConfigError, match="no classes to balance"):
        task.balance(target)
    with pytest.raises(ConfigError, match="use --task classification"):
        task.memberships(target)


def test_threshold_and_temperature_come_from_validation():
    task = Binary(classes=("x", "y"))
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(400) % 2
    logits = 2.0 * (2 * target[:, None] - 1) + 2.0 * torch.randn(400, 1, generator=generator) + 3.0
    tuned = task.tuned(logits, target, threshold=True)
    assert tuned.threshold == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item(), abs=0.05)
    before, after = (t.metrics(t.activate(logits), target.numpy()) for t in (task, tuned))
    assert after["balanced_accuracy"] > before["balanced_accuracy"] + 0.1
    assert after["auc"] == before["auc"]
    assert list(tuned.table(tuned.activate(logits)))[-1] == "threshold"
    assert tuned.same_question(task)
    assert not tuned.same_question(Binary(classes=("x", "z")))

    loud = 5 * (logits - 3.0)
    warm = task.tuned(loud, target, temperature=True)
    assert warm.temperature > 3
    cold, warmed = (t.metrics(t.activate(loud), target.numpy()) for t in (task, warm))
    assert warmed["log_loss"] < cold["log_loss"]
    assert warmed["ece"] < cold["ece"]
    assert task.tuned(logits[::2], target[::2], threshold=True, temperature=True) == task


@pytest.mark.parametrize("kind", ["classification", "binary", "ordinal"])
def test_a_small_part_that_is_separated_does_not_sharpen_a_model_without_end(kind):
    task = make_task(kind, rows("0", "1"))
    target = torch.arange(12) % 2
    logits = 3.0 * (2 * target[:, None] - 1)
    if task.n_outputs == 2:
        logits = torch.cat([-logits / 2, logits / 2], 1)
    assert 0.4 < task.tuned(logits, target, temperature=True).temperature < 0.9


@pytest.mark.parametrize("labels", [("Tumour", "tumour", "x"), ("1", "1.0", "0"), ("MSI high", "MSI  High", "MSS")])
def test_one_class_that_is_written_in_two_ways_is_refused(labels):
    with pytest.raises(LabelError, match="which look like one class; use one spelling"):
        make_task("classification", rows(*labels))


def test_all_classes_that_are_written_in_several_ways_are_named_at_once():
    with pytest.raises(LabelError, match="'GROSS' and 'Groß'; 'KLEIN' and 'Klein' and 'klein', which look like one"):
        make_task("classification", rows("Klein", "KLEIN", "klein", "Groß", "GROSS"))


def test_each_of_several_labels_has_its_own_threshold():
    data = table_of(er=["neg", "pos"] * 200, pr=(["0"] * 300 + ["1"] * 100))
    task = make_task("multilabel", data, target="er,pr")
    target = task.encode(data)
    shift = torch.tensor([2.0, -2.0])
    logits = 6.0 * target - 3.0 + shift + torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    tuned = task.tuned(logits, target, threshold=True)
    np.testing.assert_allclose(tuned.thresholds, torch.sigmoid(shift), atol=0.1)
    outputs = tuned.activate(logits)
    before, after = (t.metrics(outputs, target.numpy()) for t in (task, tuned))
    assert after["balanced_accuracy"] > before["balanced_accuracy"] + 0.05
    assert after["kappa"] > before["kappa"]
    assert after["auc"] == before["auc"]
    expected = [expected_calibration_error(outputs[:, k], target[:, k].numpy() == 1) for k in range(2)]
    assert after["ece"] == pytest.approx(np.mean(expected))
    columns = {name: [str(value) for value in values] for name, values in tuned.table(outputs).items()}
    assert columns["threshold_pr"][0] == str(tuned.thresholds[1])
    np.testing.assert_array_equal(task.read_decided(columns), tuned.decide(outputs))  # by the thresholds of then
    assert tuned.same_question(task)
    mean = task.with_mean_threshold([tuned, task]).thresholds
    np.testing.assert_allclose(mean, (np.asarray(tuned.thresholds) + 0.5) / 2)
    assert task.tuned(logits[::2], target[::2] * 0, threshold=True).thresholds == (0.5, 0.5)


def test_models_without_a_threshold_count_as_one_half_beside_others():
    plain = Binary(classes=("x", "y"))
    tuned = plain.model_copy(update={"threshold": 0.9})
    assert tuned.with_mean_threshold([tuned, plain]).threshold == pytest.approx(0.7)
    assert plain.with_mean_threshold([plain, plain]).threshold is None


def test_tasks_without_a_threshold_say_so():
    for task in (Classification(classes=("a", "b", "c")), make_task("ordinal", rows("1", "2"))):
        with pytest.raises(ConfigError, match="threshold"):
            task.tuned(torch.zeros(3, 2), torch.arange(3), threshold=True)
    with pytest.raises(ConfigError, match="task regression has no temperature; set training"):
        make_task("regression", rows("1", "2")).tuned(torch.zeros(1, 1), torch.zeros(1), temperature=True)


def test_the_order_of_grades_is_known_or_said():
    assert make_task("ordinal", rows("10", "2", "1")).classes == ("1", "2", "10")
    assert make_task("ordinal", rows("G10", "G2", "G1")).classes == ("G1", "G2", "G10")
    table = rows("high", "low", "medium", "low")
    with pytest.raises(LabelError, match="order of high, low, medium in column 'label' is not known; state it"):
        make_task("ordinal", table)
    task = make_task("ordinal", table, target="label=low<medium<high")
    assert task.classes == ("low", "medium", "high")
    assert task.encode(table).tolist() == [2, 0, 1, 0]
    assert task.describe(table) == "label: column 'label', grades from lowest to highest low (2), medium (1), high (1)"
    with pytest.raises(LabelError, match="list every value once"):
        make_task("ordinal", table, target="label=low<high")


@pytest.mark.parametrize("kind", ["classification", "binary", "ordinal", "multilabel", "regression"])
def test_outputs_are_read_again_from_their_columns(kind):
    values = ("0", "1", "2") if kind in ("classification", "ordinal") else ("0", "1", "1")
    task = make_task(kind, rows(*values))
    outputs = task.activate(torch.randn(5, task.n_outputs, generator=torch.Generator().manual_seed(0)))
    text = {name: [str(value) for value in column] for name, column in task.table(outputs).items()}
    np.testing.assert_array_equal(task.read_outputs(text), outputs)


@pytest.mark.parametrize("kind", ["classification", "ordinal", "multilabel", "regression"])
def test_the_worst_prediction_surprises_most(kind):
    values = ("0", "1", "0", "1")
    task = make_task(kind, rows(*values))
    good = 4.0 * (torch.tensor([0.0, 1, 0, 1])[:, None] - 0.5)
    good[2] *= -1
    logits = torch.cat([-good, good], 1) if task.n_outputs == 2 else good / 4 + 0.5
    surprise = task.surprise(task.activate(logits), task.encode(rows(*values)).numpy())
    assert surprise.argmax() == 2


MEANS = {
    "classification": ({"classes": ("a", "b", "c")}, [{"temperature": 0.5}, {"temperature": 2.0}, {}]),
    "binary": ({"classes": ("a", "b")}, [{"temperature": 0.5, "threshold": 0.4}, {}, {}]),
    "ordinal": ({"classes": ("1", "2", "3", "4")}, [{"temperature": 0.5}, {}, {}]),
    "multilabel": ({"targets": ("x", "y"), "positives": ("1", "1"), "negatives": ("0", "0")}, [{}, {}, {}]),
    "regression": ({}, [{"mean": 5.0, "deviation": 2.0}, {"mean": 4.0, "deviation": 3.0}, {}]),
    "survival": (
        {"bins": 4},
        [
            {"edges": (1.0, 2.0, 4.0), "base": (0.1, 0.2, 0.3, 0.4)},
            {"edges": (2.0, 3.0, 7.0)},
            {"edges": (0.5, 1.0, 9.0)},
        ],
    ),
    "cox": ({}, [{"edges": (1.0, 2.0)}, {"edges": (2.0, 3.0)}, {"edges": (2.0, 2.5)}]),
}


@pytest.mark.parametrize("kind", [*MEANS, "multitask"])
def test_the_logits_of_several_models_mean_what_their_answers_do(kind):
    def tasks(kind):
        plain, learnt = MEANS[kind]
        return [load_task({"kind": kind, **plain, **own}) for own in learnt]

    if kind == "multitask":
        parts = ["regression", "ordinal", "survival"]
        built = zip(*(tasks(part) for part in parts), strict=True)
        several = [load_task({"kind": kind, "names": parts, "parts": own}) for own in built]
    else:
        several = tasks(kind)
    torch.manual_seed(0)
    logits = [3 * torch.randn(6, several[0].n_outputs, dtype=torch.float64) for _ in several]
    answers = [task.activate(own) for task, own in zip(several, logits, strict=True)]
    common, pooled = several[0].pooled(several, answers)
    common = common.with_mean_threshold(several).without_scale()
    together = common.mean_logits(several, logits)
    np.testing.assert_allclose(common.activate(together), np.mean(np.split(pooled, 3), axis=0), atol=1e-9)

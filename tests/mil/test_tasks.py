import numpy as np
import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError, LabelError, UnknownNameError
from eosin.mil.tasks import Binary, Classification, load_task, make_task, sorted_labels


def rows(*labels):
    return [{"label": label} for label in labels]


def test_classes_come_from_the_table_in_order():
    assert make_task("classification", rows("b", "a", "c", "a")).classes == ("a", "b", "c")
    assert sorted_labels({"10", "9", "1"}) == ("1", "9", "10")
    assert make_task("binary", rows("1", "0")).classes == ("0", "1")


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
    assert task.loss(logits, target) == losses.mean()
    outputs = task.activate(logits)
    np.testing.assert_allclose(outputs.sum(1), 1)
    table = task.table(outputs)
    assert list(table) == ["prob_x", "prob_y", "predicted"]
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

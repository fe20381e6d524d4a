import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil._recipe import RECIPES
from eosin.mil.bags import PackedBags
from eosin.mil.methods.mi_max import MiMax, MiMaxStrategy
from eosin.mil.tasks._classification import Binary, Classification, Ordinal
from eosin.mil.tasks._multilabel import MultiLabel
from eosin.mil.tasks._regression import Regression

BOTH = MultiLabel(targets=("a", "b"), positives=("1", "1"), negatives=("0", "0"))
ALL_OF_A_STEP = 1e-9  # momentum with which a moving average is the last value


def theirs(wanted, kind, when):
    """The authors' weights as (R, K, D) and biases (R, K): starts within classes, or the other way around."""
    weight, bias = wanted[f"{kind}/W{when}"], wanted[f"{kind}/b{when}"]
    if kind == "polyhedral":
        return weight.view(2, 3, -1).transpose(0, 1).contiguous(), bias.view(2, 3).T.contiguous()
    return weight.view(3, 2, -1), bias.view(3, 2)


def loaded(wanted, kind, when):
    model = MiMax(6, 2, classifier=kind, restarts=2).double()
    model.weight.data, model.bias.data = theirs(wanted, kind, when)
    return model


@pytest.mark.parametrize("kind", ["linear", "polyhedral"])
def test_losses_steps_and_scores_are_the_authors(authors, same, kind):
    """The class computes in float32."""
    wanted = authors("mi_max")
    bags, labels = PackedBags.pack(list(wanted["x"])), wanted["y"]
    model = loaded(wanted, kind, 0)
    strategy = MiMaxStrategy(model, BOTH, penalty=0.3, momentum=ALL_OF_A_STEP).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(4):
        step = strategy(bags, labels)
        if not number:
            losses = (strategy._new + 0.3 * model.penalty()).flatten()
            same({f"{kind}/loss0": losses}, wanted, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        step.extra["mi_max"].backward()
        optimizer.step()
    weight, bias = theirs(wanted, kind, 4)
    torch.testing.assert_close(model.weight.data, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias.data, bias, rtol=1e-5, atol=1e-6)

    model = loaded(wanted, kind, 4)
    output = model(bags)
    positive = labels.mean(0)
    ratio = (1 - labels) / (1 - positive) - labels / positive
    raw = (ratio[:, None] * output.starts).mean(0)  # the code judges starts without tanh
    same({f"{kind}/bestloss": raw.amin(0)}, wanted, rtol=1e-5, atol=1e-6)
    model.best = raw.argmin(0)
    scores = model(bags).instance_logits.view(12, 5, 2).permute(2, 0, 1)
    same({f"{kind}/scores": scores}, wanted, rtol=1e-5, atol=1e-6)


def test_the_start_with_the_smallest_training_loss_answers():
    torch.manual_seed(0)
    model = MiMax(4, 1, restarts=3)
    strategy = MiMaxStrategy(model, Binary(classes=("a", "b")), momentum=ALL_OF_A_STEP)
    bags, target = PackedBags.pack(list(torch.randn(20, 6, 4))), torch.arange(20) % 2
    step = strategy(bags, target)
    strategy.after_step(step)
    signs = torch.where(target > 0, -2.0, 2.0)  # half of the bags are positive
    losses = [(signs * step.output.starts[:, start, 0].tanh()).mean() for start in range(4)]
    assert model.best.item() == torch.stack(losses).argmin().item() != 0
    torch.testing.assert_close(model(bags).logits, step.output.starts[:, model.best.item()])


def test_a_polyhedron_is_the_largest_of_its_planes_and_a_hidden_layer_is_that_of_its_start():
    torch.manual_seed(0)
    rows = torch.randn(7, 4)
    planes = MiMax(4, 2, classifier="polyhedral", restarts=2)
    wanted = torch.einsum("nd,rkd->nrk", rows, planes.weight) + planes.bias
    torch.testing.assert_close(planes(PackedBags.pack([rows])).instance_logits, wanted.amax(1))
    deep = MiMax(4, 2, classifier="hidden", hidden=5, restarts=2)
    deep.best = torch.tensor([2, 1])
    inner = deep.hidden(rows).relu().split(5, 1)
    wanted = [inner[start] @ deep.weight[start, k] + deep.bias[start, k] for k, start in enumerate((2, 1))]
    torch.testing.assert_close(deep(PackedBags.pack([rows])).instance_logits, torch.stack(wanted, 1))


def test_an_instance_can_only_ever_add_with_one_output_or_a_background():
    torch.manual_seed(0)
    for model in (
        MiMax(4, 1, restarts=2),
        MiMax(4, 2, background=True),
        MiMax(4, 2, background=True, classifier="hidden"),
    ):
        bag, poison = torch.randn(9, 4), 100 * torch.randn(50, 4)
        odds = [model(PackedBags.pack([rows])).logits[0] for rows in (bag, torch.cat([bag, poison]))]
        before, after = (one[-1] - (one[0] if len(one) > 1 else 0) for one in odds)
        assert after >= before
    assert not model(PackedBags.pack([bag])).logits[0, 0]


def test_tasks_that_cannot_have_it_are_refused():
    for task in (BOTH, Ordinal(classes=("a", "b", "c"))):
        with pytest.raises(ConfigError, match="background=false"):
            MiMaxStrategy(MiMax(4, 2, background=True), task)
    with pytest.raises(ConfigError, match="regression has none"):
        MiMaxStrategy(MiMax(4, 1), Regression(target="age"))
    strategy = MiMaxStrategy(MiMax(4, 1, restarts=2), Regression(target="age"), loss="task")
    step = strategy(PackedBags.pack([torch.randn(3, 4), torch.randn(2, 4)]), torch.tensor([[0.0], [1.0]]))
    strategy.after_step(step)
    assert strategy.losses.shape == (3, 1)


def test_recipes_train_several_starts():
    for name in ("mi_max", "mi_max_hidden", "mi_max_polyhedral"):
        assert RECIPES[name].aggregator.options["restarts"] == 11
        assert RECIPES[name].strategy.name == "mi_max"
    assert MiMaxStrategy(MiMax(4, 3, background=True), Classification(classes=("a", "b", "c"))).losses.shape == (1, 3)

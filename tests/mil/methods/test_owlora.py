import pytest
import torch
from torch import nn

from eosin.errors import CheckpointError, ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._checkpoint import ModelCard, save_model
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.gdat import Gdat
from eosin.mil.methods.owlora import (
    GrowingHead,
    OrthogonalLora,
    TrainNewestUpdate,
    UpdatedInSequence,
)
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Classification

GDAT = {"width": 16, "hidden": 8, "layers": 1, "heads": 2, "region_size": 2, "dropout": 0.0, "block_dropout": 0.0}
TASK = Classification(classes=("a", "b", "c", "d", "e"))


def bags(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return PackedBags.pack([torch.randn(n, 6, generator=generator) for n in (5, 12, 1)])


def first_model():
    torch.manual_seed(0)
    return AGGREGATORS.build("gdat", 6, 2, options=GDAT).eval()


def later_model(*classes, rank=3):
    torch.manual_seed(1)
    return UpdatedInSequence(6, sum(classes), host="gdat", host_options=GDAT, classes=classes, rank=rank).eval()


def trained(model, target, steps=5):
    """Train the newest update for a few steps as the loop would."""
    strategy = TrainNewestUpdate.__new__(TrainNewestUpdate)
    nn.Module.__init__(strategy)
    strategy.model, strategy.penalty, strategy.updates = model, 1.0, model.updated()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for seed in range(steps):
        step = strategy(bags(seed), target)
        loss = nn.functional.cross_entropy(step.output.logits, target) + step.extra["orthogonality"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        strategy.after_step(step)
    return model


def test_a_second_task_begins_as_the_first_ended():
    first, second = first_model(), later_model(2, 3)
    second.take_over(first, energy=1.0)
    old, new = first(bags()), second(bags())
    torch.testing.assert_close(new.logits[:, :2], old.logits)
    torch.testing.assert_close(new.scores, old.scores)
    assert new.logits.shape == (3, 5)


def test_the_statistics_of_the_first_task_stay():
    standardizer = Standardizer(6)
    standardizer.mean.fill_(0.5)
    standardizer.scale.fill_(2.0)
    first, second = Standardized(standardizer, first_model()).eval(), later_model(2, 3)
    second.take_over(first, energy=1.0)
    torch.testing.assert_close(second(bags()).logits[:, :2], first(bags()).logits)
    ready = later_model(2)
    again = later_model(2, 3)
    again.take_over(Standardized(standardizer, ready))
    assert torch.equal(again.standardizer.scale, standardizer.scale)
    third = later_model(2, 3, 1)
    third.take_over(second)
    assert torch.equal(third.standardizer.mean, standardizer.mean)


def test_a_task_trains_its_own_update_and_head_alone():
    model = later_model(2, 3)
    model.take_over(first_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, torch.tensor([2, 4, 3]))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        name
        for name in before
        if name.endswith((".down.0", ".up.0", ".scales.0")) or name.startswith("host.classifier.heads.1.")
    }


def test_updates_stay_out_of_older_spans_whatever_the_optimizer_does():
    second = later_model(2, 3)
    second.take_over(first_model(), energy=0.5, protected=1.0)
    third = later_model(2, 3, 1)
    third.take_over(trained(second, torch.tensor([2, 4, 3])))
    trained(third, torch.tensor([5, 5, 5]))
    for layer in third.updated():
        assert len(layer.down) == 2
        for older in (layer.basis_down, layer.down[0]):
            torch.testing.assert_close(
                layer.down[1] @ older.mT, torch.zeros(len(layer.down[1]), len(older)), atol=1e-5, rtol=0
            )
        for older in (layer.basis_up, layer.up[0]):
            torch.testing.assert_close(
                older.mT @ layer.up[1], torch.zeros(older.shape[1], layer.up[1].shape[1]), atol=1e-5, rtol=0
            )
    assert any(layer.up[1].abs().sum() > 0 for layer in third.updated())


def test_the_end_of_a_task_changes_nothing_but_makes_its_update_orthonormal():
    second = later_model(2, 3)
    second.take_over(first_model(), energy=0.5, protected=1.0)
    trained(second, torch.tensor([2, 4, 3]))
    third = later_model(2, 3, 1)
    third.take_over(second)
    torch.testing.assert_close(third(bags()).logits[:, :5], second(bags()).logits, rtol=1e-4, atol=1e-5)
    for layer in third.updated():
        used = layer.scales[0] > 0
        eye = torch.diag(used.float())
        torch.testing.assert_close(layer.down[0] @ layer.down[0].mT, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.up[0].mT @ layer.up[0], eye, atol=1e-5, rtol=0)


def test_an_update_that_was_not_used_takes_no_room():
    lora = OrthogonalLora(nn.Linear(8, 6), energy=None)
    lora.add_task(3)
    lora.close_task()
    assert not lora.down[0].any()
    assert not lora.up[0].any()


def test_a_map_without_room_gets_no_further_update():
    lora = OrthogonalLora(nn.Linear(4, 4), energy=1.0)
    lora.add_task(3)
    lora.keep_out()
    assert lora.down[0].abs().max() < 1e-5
    assert lora.penalty().isfinite()


def test_an_update_starts_as_wide_as_the_authors():
    torch.manual_seed(0)
    lora = OrthogonalLora(nn.Linear(4000, 20), energy=None)
    lora.add_task(16)
    assert float(lora.down[0].detach().std()) == pytest.approx(1 / 16, rel=0.02)
    assert not lora.up[0].any()
    assert (lora.scales[0] == 1).all()


def test_code_that_reads_the_weight_sees_the_updates():
    torch.manual_seed(0)
    lora = OrthogonalLora(nn.Linear(7, 5), energy=0.9)
    lora.add_task(2)
    nn.init.normal_(lora.up[0])
    x = torch.randn(3, 7)
    torch.testing.assert_close(nn.functional.linear(x, lora.weight, lora.bias), lora(x))
    assert (lora.in_features, lora.out_features) == (7, 5)


def test_every_map_but_heads_and_single_outputs_is_updated_and_queries_thrice_as_wide():
    layers = dict(zip((model := later_model(2, 3)).layers, model.updated(), strict=True))
    assert sorted(layers) == sorted(
        ["embed.0", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.ff1", "blocks.0.ff2", "attention.V"]
    )
    assert len(layers["blocks.0.attn.qkv"].down[0]) == 9
    assert len(layers["embed.0"].down[0]) == 3


def test_heads_add_their_classes():
    head = GrowingHead(4, (2, 3))
    x = torch.randn(3, 4)
    torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight, head.bias))


def saved(folder, model):
    card = ModelCard(
        recipe=Recipe(aggregator=Component(name="gdat", options=GDAT), training=Training(standardize=False)),
        task=Classification(classes=("a", "b")).model_dump(mode="json"),
        features=FeatureSpec(encoder="toy", dim=6),
    )
    return save_model(folder, model, card)


def test_the_strategy_starts_from_the_saved_model(tmp_path):
    first = first_model()
    card = saved(tmp_path, first)
    strategy = TrainNewestUpdate(later_model(2, 3), TASK, continue_from=tmp_path, model_id=card.model_id, energy=1.0)
    torch.testing.assert_close(strategy.model(bags()).logits[:, :2], first(bags()).logits)
    assert strategy(bags(), torch.tensor([2, 3, 4])).extra["orthogonality"] > 0
    with pytest.raises(CheckpointError, match="holds model"):
        TrainNewestUpdate(later_model(2, 3), TASK, continue_from=tmp_path, model_id="0123")


def test_gradients_are_projected_before_the_optimizer_sees_them(tmp_path):
    saved(tmp_path, first_model())
    strategy = TrainNewestUpdate(later_model(2, 3), TASK, continue_from=tmp_path, energy=0.5)
    for layer in strategy.updates:
        nn.init.normal_(layer.up[0])
    strategy.model(bags()).logits.square().sum().backward()
    for layer in strategy.updates:
        products = layer.down[0].grad @ layer.basis_down.mT
        torch.testing.assert_close(
            products, torch.zeros_like(products), atol=1e-4 * float(layer.down[0].grad.abs().max() + 1), rtol=0
        )


def test_a_single_task_is_trained_whole():
    model = later_model(4)
    strategy = TrainNewestUpdate(model, TASK)
    step = strategy(bags(), torch.tensor([0, 1, 2]))
    assert not step.extra
    step.output.logits.sum().backward()
    assert model.host.embed[0].base.weight.grad is not None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: later_model(2, 0), r"classes\.1: .* must be at least 1"),
        (lambda: UpdatedInSequence(6, 5, classes=(2, 2)), "do not add up"),
        (lambda: UpdatedInSequence(6, 4, classes=(2, 2), rank=0), "rank: .* must be at least 1"),
        (lambda: UpdatedInSequence(6, 4, host="downsampled"), "does not end in one linear classifier"),
        (lambda: UpdatedInSequence(6, 4, host="clam_mb", classes=(2, 2)), "depends on the classes"),
        (lambda: TrainNewestUpdate(Abmil(6, 2), TASK), "needs the aggregator owlora"),
        (lambda: TrainNewestUpdate(later_model(2, 3), TASK), "continue_from names the model"),
        (lambda: TrainNewestUpdate(later_model(2), TASK, energy=1.5), "energy: .* must be at most 1"),
        (lambda: later_model(2, 3).take_over(Abmil(6, 2)), "is not the model of 1 tasks"),
        (lambda: later_model(2, 3, 1).take_over(Gdat(6, 2, **GDAT)), "is not the model of 2 tasks"),
    ],
)
def test_what_does_not_fit_together_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()

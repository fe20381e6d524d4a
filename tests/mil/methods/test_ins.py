import pytest
import torch
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import RECIPES
from eosin.mil._train import fit
from eosin.mil.bags import PackedBags
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.ins import (
    Ins,
    InsStrategy,
    momentum_contrast,
    moved_prototypes,
    moved_targets,
    soft_cross_entropy,
    supervised_contrast,
)
from eosin.mil.tasks._classification import Binary, Classification

TASK = Classification(classes=("a", "b", "c"))


def draw(*lengths, ids=()):
    generator = torch.Generator().manual_seed(0)
    return PackedBags.pack([torch.randn(n, 4, generator=generator) for n in lengths], ids=ids)


def model(n_outputs=3, **options):
    torch.manual_seed(0)
    return Ins(4, n_outputs, width=6, projection=5, **options)


def test_targets_and_their_loss_are_the_authors(golden, same):
    golden = golden("ins_losses")
    index, logits = golden["index"], golden["outputs"].requires_grad_()
    before = soft_cross_entropy(logits, golden["conf_before"][index])
    before.backward()
    candidates = torch.where(golden["point"][:, None] == 0, torch.tensor([1.0, 0.0]), golden["batchY"]).double()
    phi = float(golden["conf_ema_m"])
    after = golden["conf_before"].clone()
    after[index] = moved_targets(after[index], golden["score_prot"], candidates, phi=phi)
    same({"cls_loss_before": before, "g_outputs": logits.grad}, golden)
    same({"conf_after": after, "cls_loss_after": soft_cross_entropy(logits, after[index])}, golden, rtol=1e-7)


def test_contrasts_are_the_authors(golden, same):
    golden = golden("ins_losses")
    keys, queue, temperature = golden["k"], golden["queue"], float(golden["temperature"])
    q = golden["q"].requires_grad_()
    supervised = supervised_contrast(q, torch.cat([q, keys, queue]), golden["labels"], temperature)
    (g_supervised,) = torch.autograd.grad(supervised, q)
    plain = momentum_contrast(q, keys, queue, temperature)
    (g_plain,) = torch.autograd.grad(plain, q)
    found = {"supcon": supervised, "g_q_supcon": g_supervised, "moco": plain, "g_q_moco": g_plain}
    same(found, golden)


def test_places_that_were_never_filled_take_no_part(golden, same):
    golden = golden("ins_losses")
    keys, temperature, q = golden["k"], float(golden["temperature"]), golden["q"]
    queue = torch.cat([golden["queue"], torch.full((3, 8), 0.3).double()])
    labels = torch.cat([golden["labels"], torch.full((3,), -1)])
    filled = torch.arange(15) < 12
    found = {"moco": momentum_contrast(q, keys, queue, temperature, filled=filled)}
    found["supcon"] = supervised_contrast(q, torch.cat([q, keys, queue]), labels, temperature)
    same(found, golden)


def test_phi_is_the_authors(golden):
    golden = golden("ins_losses")
    strategy = InsStrategy(model(), TASK)
    begin, end = strategy.phi
    for epoch, wanted in zip(golden["phi_epochs"], golden["phi"], strict=True):
        assert begin + (end - begin) * float(epoch) / 40 == pytest.approx(float(wanted), rel=1e-12)


def test_prototypes_move_instance_by_instance():
    torch.manual_seed(0)
    prototypes, query = torch.randn(3, 4), torch.randn(9, 4)
    label = torch.tensor([0, 2, 0, 0, 2, 0, 2, 2, 2])
    wanted = prototypes.clone()
    for q, c in zip(query, label, strict=True):
        wanted[c] = 0.9 * wanted[c] + 0.1 * q
    torch.testing.assert_close(moved_prototypes(prototypes, query, label, 0.9), functional.normalize(wanted))


def test_a_bag_is_the_mean_of_its_instances():
    net = model()
    bags = draw(5, 0, 2)
    output = net(bags)
    shares = [part.softmax(1).mean(0) for part in output.instance_logits.split(bags.lengths)]
    torch.testing.assert_close(output.logits.softmax(1)[[0, 2]], torch.stack([shares[0], shares[2]]))
    assert not output.logits[1].any()
    one = model(1)
    output = one(bags)
    share = output.instance_logits[:5].softmax(1)[:, 1].mean()
    torch.testing.assert_close(output.logits[0, 0].sigmoid(), share)


def test_a_bag_is_as_positive_as_its_most_positive_instance():
    bags = draw(5, 0, 2)
    output = model(1, pooling="max")(bags)
    torch.testing.assert_close(output.logits[0, 0].sigmoid(), output.instance_logits[:5].softmax(1)[:, 1].amax())
    output = model(pooling="max")(bags)
    best = (output.instance_logits[:5] - output.instance_logits[:5, :1]).amax(0)
    torch.testing.assert_close(output.logits[0], best)
    assert not output.logits[1].any()


def test_a_bag_has_a_class_when_some_instance_has():
    bags = draw(5, 0, 2)
    output = model(1, pooling="noisy_or")(bags)
    chance = output.instance_logits.softmax(1)[:, 1]
    torch.testing.assert_close(output.logits[0, 0].sigmoid(), 1 - (1 - chance[:5]).prod())
    output = model(pooling="noisy_or")(bags)
    chance = output.instance_logits[5:].softmax(1)
    torch.testing.assert_close(output.logits[2, 1:].sigmoid(), 1 - (1 - chance[:, 1:]).prod(0))
    assert not output.logits[1].any()
    many = PackedBags.pack([torch.randn(5000, 4)])
    assert model(1, pooling="noisy_or")(many).logits.isfinite().all()


@pytest.mark.parametrize("task", [TASK, Binary(classes=("a", "b"))])
def test_every_part_learns_and_the_rest_follows(task):
    strategy = InsStrategy(model(task.n_outputs), task, sample=8, queue_size=10).train()
    bags, target = draw(6, 1, 0, 5), torch.tensor([0, 1, 1, 1])
    for progress in (0.0, 0.5, 1.0):
        strategy.start_step(progress)
        step = strategy(bags, target)
        loss = task.loss(step.output.logits, target) + sum(step.extra.values())
        loss.backward()
        assert loss.isfinite()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in strategy.model.parameters()
    )
    assert all(parameter.grad is None for parameter in strategy.key_model.parameters())
    assert (strategy.queue_labels >= 0).all()
    torch.testing.assert_close(strategy.queue.norm(dim=1), torch.ones(10))
    assert strategy.inference_model() is strategy.model


def test_negative_bags_hold_class_0_only():
    strategy = InsStrategy(model(), TASK)
    candidates = strategy._candidates(draw(2, 1, 1), torch.tensor([0, 2, 1]))
    assert candidates.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]]


def test_certain_negatives_join_when_targets_begin_to_move():
    bags, target = draw(3, 4, ids=("x", "y")), torch.tensor([0, 1])
    strategy = InsStrategy(model(), TASK, start=0.5, sample=100)
    logits = strategy.model(bags).instance_logits
    open_ = torch.tensor([[0.5, 0.5, 0.0]]).expand(4, 3)
    found = strategy(bags, target).extra["instance"]
    torch.testing.assert_close(found, soft_cross_entropy(logits[3:], open_))
    assert not strategy(bags, torch.zeros(2, dtype=torch.int64)).extra["instance"]
    strategy.start_step(0.5)
    assert strategy(bags, torch.zeros(2, dtype=torch.int64)).extra["instance"] > 0


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_steps_are_the_equations_in_float64(start):
    """Three steps on the same bags, instance by instance; the queue is smaller than the pack."""
    torch.manual_seed(0)
    net = Ins(4, 2, width=6, projection=5).double()
    bags = PackedBags.pack([torch.randn(n, 4, dtype=torch.float64) for n in (4, 3, 2)], ids=("a", "b", "c"))
    strategy = InsStrategy(net, Binary(classes=("n", "t")), start=start, queue_size=6, key_momentum=0.5).double()
    logits, query = net(bags).instance_logits, net(bags).projections  # the network stays: keys are queries
    positive = torch.tensor([1, 0, 1]).repeat_interleave(torch.tensor(bags.lengths)) == 1
    targets = torch.where(positive[:, None], torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).double()
    prototypes, queue, pseudo_queue = torch.zeros(2, 5).double(), [], []
    for number, progress in enumerate((0.0, 0.5, 1.0)):
        torch.manual_seed(number)
        order = torch.randperm(9)
        torch.manual_seed(number)
        strategy.start_step(progress)
        found = strategy(bags, torch.tensor([1, 0, 1])).extra
        pseudo = torch.where(positive, logits.argmax(1), 0)
        nearest = torch.where(positive, (query @ prototypes.mT).argmax(1), 0)
        for row in order:
            prototypes[pseudo[row]] = 0.9 * prototypes[pseudo[row]] + 0.1 * query[row].detach()
        prototypes = functional.normalize(prototypes)
        phi, moves = 0.95 - 0.15 * progress, progress >= start
        for row in range(9) if moves else ():
            moved = phi * targets[row] + (1 - phi) * functional.one_hot(nearest[row], 2).double()
            targets[row] = moved if positive[row] else torch.tensor([1.0, 0.0])
        entropy = -(targets * logits.log_softmax(1)).sum(1)
        wanted = entropy.mean() if moves else entropy[positive].mean()
        torch.testing.assert_close(found["instance"], wanted, rtol=1e-12, atol=0)
        keys = torch.cat([query.detach(), *queue])
        labels, every = torch.cat([pseudo, *pseudo_queue]), torch.cat([query, keys])
        terms = []
        for row in range(9):
            others = torch.arange(len(every)) != row
            same = others & (torch.cat([pseudo, labels]) == pseudo[row])
            if not moves:
                others = (torch.arange(len(every)) == 9 + row) | (torch.arange(len(every)) >= 18)
                same = torch.arange(len(every)) == 9 + row
            scores = query[row] @ every.mT / 0.07
            terms.append(scores[others].logsumexp(0) - scores[same].mean())
        torch.testing.assert_close(found["contrast"], 0.5 * torch.stack(terms).mean(), rtol=1e-10, atol=1e-12)
        queue = [torch.cat([*queue, query.detach()[order]])[-6:]]
        pseudo_queue = [torch.cat([*pseudo_queue, pseudo[order]])[-6:]]
    torch.testing.assert_close(strategy.prototypes, prototypes, rtol=1e-12, atol=1e-14)


def test_targets_are_remembered_by_bag():
    strategy = InsStrategy(model(), TASK, start=0.0, sample=100)
    bags, target = draw(3, 4, ids=("x", "y")), torch.tensor([0, 1])
    strategy(bags, target)
    first = strategy._targets["y"].clone()
    torch.testing.assert_close(first.amax(1), torch.full((4,), 0.95 * 0.5 + 0.05))
    torch.testing.assert_close(strategy._targets["x"], torch.tensor([[1.0, 0, 0]]).expand(3, 3))
    strategy(bags, target)
    again = strategy._targets["y"]
    assert ((again - first).abs() > 1e-4).any()


def test_a_killed_training_takes_its_targets_up_again():
    strategy, bags, target = InsStrategy(model(), TASK, start=0.0, sample=100), draw(3, 4, ids=("x", "y")), [0, 1]
    strategy(bags, torch.tensor(target))
    resumed = InsStrategy(model(), TASK, start=0.0, sample=100)
    resumed.load_state_dict(strategy.state_dict())
    assert resumed._next == strategy._next == 7
    for name, kept in strategy._targets.items():
        assert torch.equal(resumed._targets[name], kept)


def planted(n_bags, seed):
    """Bags of 40 instances around a place of their own; in every second one 10 % are shifted, the mean hardly more."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(24, generator=torch.Generator().manual_seed(7))
    bags = {}
    for number in range(n_bags):
        bag = torch.randn(40, 24, generator=generator) + 0.3 * torch.randn(1, 24, generator=generator)
        bag[:4] += 4 * shift / shift.norm() * (number % 2)
        bags[str(number)] = bag
    ids = tuple(bags)
    return Examples(MemoryBags(bags, FeatureSpec(encoder="toy", dim=24)), ids, ids, torch.arange(n_bags) % 2)


@pytest.mark.long
def test_planted_signal_is_found_where_mean_pooling_fails():
    task, train, test = Classification(classes=("a", "b")), planted(60, 0), planted(100, 1)
    areas = {}
    for name, options in (("ins", {"width": 64, "projection": 16}), ("mean", {})):
        recipe = RECIPES[name]
        quick = {"epochs": 20, "lr": 1e-3, "optimizer": "adamw", "bags_per_step": 4, "select": "last", "refit": False}
        part = recipe.aggregator.model_copy(update={"options": recipe.aggregator.options | options})
        training = recipe.training.model_copy(update=quick | {"patience": 0, "weight_decay": 1e-3})
        fitted = fit(recipe.model_copy(update={"aggregator": part, "training": training}), task, train)
        outputs = predict_outputs(fitted.model, task, test.bags, test.ids)
        areas[name] = task.metrics(outputs, test.targets.numpy())["auc"]
    assert areas["ins"] > areas["mean"] + 0.1


def test_it_needs_an_instance_network():
    with pytest.raises(ConfigError, match="InsStrategy needs an aggregator that returns InsOutput"):
        InsStrategy(Abmil(4, 3), TASK)
    with pytest.raises(ConfigError, match=r"queue_size: .* must be at least 1"):
        InsStrategy(model(), TASK, queue_size=0)

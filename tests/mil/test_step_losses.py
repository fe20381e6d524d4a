"""Losses that compare bags are those of the whole step, however it is cut into packs."""

import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil._data import Examples
from eosin.mil._recipe import Component, Recipe, Term, Training
from eosin.mil._step_losses import StepLosses
from eosin.mil._train import fit
from eosin.mil.slots import STRATEGIES, Step, Strategy
from eosin.mil.task import make_task
from eosin.mil.tasks._classification import Classification
from eosin.mil.tasks._cox import Cox

OPTIONS = {"embed_dims": [16], "hidden": 8, "dropout": 0.0}


def a_cohort(toy, kind):
    """Return the task and the examples of survival, or of a label and survival with gaps, on the toy's bags."""
    generator = torch.Generator().manual_seed(0)
    times = (10 * torch.rand(len(toy.examples.ids), generator=generator)).tolist()
    rows = [
        {
            "slide_id": name,
            "label": toy.table.values["label"][n],
            "time": "" if kind == "multitask" and n % 5 == 0 else f"{times[n]:.1f}",
            "event": str(int(n % 3 != 0)),
        }
        for n, name in enumerate(toy.examples.ids)
    ]
    task = make_task(kind, rows, target="label; cox:time,event" if kind == "multitask" else "time,event")
    return task, Examples(toy.bags, toy.examples.ids, toy.examples.patient_ids, task.encode(rows))


def train(toy, kind, *, most, recipe=None, **changes):
    task, examples = a_cohort(toy, kind)
    training = Training(
        epochs=3, lr=1e-1, bags_per_step=12, optimizer="sgd", select="last", max_instances_per_step=most
    )
    base = recipe or Recipe(aggregator=Component(name="abmil", options=OPTIONS))
    return fit(base.model_copy(update={"training": training.model_copy(update=changes)}), task, examples)


def weights(fitted):
    return torch.cat([value.flatten() for value in fitted.model.state_dict().values()])


@pytest.mark.parametrize("kind", ["cox", "multitask"])
def test_accumulated_packs_train_the_model_of_one_pack(toy, kind):
    whole, parts, single = (weights(train(toy, kind, most=most)) for most in (0, 20, 1))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(single, whole, atol=1e-6, rtol=1e-5)


def test_loss_terms_that_ask_the_task_compare_all_bags_too(toy):
    recipe = Recipe(aggregator=Component(name="dsmil", options={"dropout": 0.0}), terms=(Term(name="dsmil_max"),))
    whole, parts = (train(toy, "cox", most=most, recipe=recipe, lr=1e-3) for most in (0, 20))
    torch.testing.assert_close(weights(parts), weights(whole), atol=1e-6, rtol=1e-5)


def test_a_last_step_of_one_pack_does_not_hear_of_the_step_before(toy):
    whole, parts = (weights(train(toy, "cox", most=most, bags_per_step=59)) for most in (0, 280))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_packs", [1, 2, 5, 12])
def test_the_gradients_of_packs_add_up_to_that_of_the_step(n_packs):
    generator = torch.Generator().manual_seed(n_packs)
    target = torch.stack([torch.randint(1, 6, (12,), generator=generator), torch.arange(12) % 2], 1).double()
    logits = torch.randn(12, 1, generator=generator, dtype=torch.float64).requires_grad_()
    plain = Cox().bag_losses(logits, target)
    (expected,) = torch.autograd.grad(plain.sum(), logits)
    step = StepLosses()
    task = Cox().across_packs(step)
    packs = torch.arange(12).tensor_split(n_packs)
    for rows in packs:
        step.hear()
        task.bag_losses(logits[rows], target[rows])
    for number, rows in enumerate(packs):
        step.answer(number)
        own = logits.detach()[rows].requires_grad_()
        losses = task.bag_losses(own, target[rows])
        torch.testing.assert_close(losses, plain[rows])
        (gradient,) = torch.autograd.grad(losses.sum(), own)
        torch.testing.assert_close(gradient, expected[rows])
    step.forget()
    assert torch.equal(task.bag_losses(logits[:3], target[:3]), Cox().bag_losses(logits[:3], target[:3]))


def test_both_turns_draw_the_same_numbers_and_buffers_move_once(toy, monkeypatch):
    class Counting(Strategy):
        def __init__(self, model, task):
            super().__init__(model, task)
            self.register_buffer("packs", torch.zeros(()))

        def forward(self, bags, target):
            self.packs = self.packs + 1
            counts.append(int(self.packs))
            return Step(self.model(bags), bags)

    counts, turns = [], []
    plain = StepLosses.losses

    def noted(self, name, logits, target, compare):
        turns.append((self._hears, logits.detach().clone()))
        return plain(self, name, logits, target, compare)

    monkeypatch.setattr(StepLosses, "losses", noted)
    monkeypatch.setattr(STRATEGIES, "_items", {"counting": Counting})
    recipe = Recipe(
        aggregator=Component(name="abmil", options={**OPTIONS, "dropout": 0.5}), strategy=Component(name="counting")
    )
    train(toy, "cox", most=20, recipe=recipe)
    heard, answered = ([logits for hears, logits in turns if hears is turn] for turn in (True, False))
    assert len(heard) == len(answered) > 10
    assert all(torch.equal(first, second) for first, second in zip(heard, answered, strict=True))
    assert counts[-1] == len(answered)


@pytest.mark.parametrize("kind", ["cox", "multitask"])
def test_steps_of_one_bag_are_refused_where_bags_are_compared(toy, kind):
    with pytest.raises(ConfigError, match=f"task {kind} compares the bags of a step with each other"):
        train(toy, kind, most=0, bags_per_step=1)


def test_a_killed_run_continues_to_the_same_weights_where_bags_are_compared(toy, tmp_path):
    task, examples = a_cohort(toy, "multitask")
    recipe = Recipe(
        aggregator=Component(name="abmil", options={**OPTIONS, "dropout": 0.5}),
        training=Training(epochs=4, lr=1e-2, bags_per_step=12, select="last", max_instances_per_step=20),
    )
    straight = fit(recipe, task, examples, folder=tmp_path / "straight")

    def kill(epoch):
        if epoch["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, task, examples, folder=tmp_path / "run", progress=kill, state_interval_s=0)
    assert torch.equal(weights(straight), weights(fit(recipe, task, examples, folder=tmp_path / "run")))


def test_tasks_whose_bags_are_alone_are_computed_once(toy, monkeypatch):
    monkeypatch.setattr(StepLosses, "hear", lambda _: pytest.fail("was computed twice"))
    train(toy, "cox", most=0)
    task = Classification(classes=("a", "b"))
    assert task.across_packs(StepLosses()) is task
    several = make_task("multitask", [{"a": "0", "b": "1"}, {"a": "1", "b": "2"}], target="a; regression:b")
    assert several.across_packs(StepLosses()) is several

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from eosin.errors import ConfigError, EosinError, LabelError, UnknownNameError
from eosin.mil import _training_run as loop
from eosin.mil._checkpoint import load_model
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._evaluate import predict_outputs
from eosin.mil._feed import draw_order
from eosin.mil._log import EVENTS, LOG, read_log
from eosin.mil._optimizer import make_optimizer, move_average, rate_factor
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._resume import STATE
from eosin.mil._train import fit
from eosin.mil.slots import LOSS_TERMS, STRATEGIES, LossTerm, Step, Strategy
from eosin.mil.task import make_task
from eosin.mil.tasks._classification import Classification

QUICK = Training(epochs=4, lr=1e-3, bags_per_step=8)
SMALL = Component(name="abmil", options={"embed_dims": [16], "hidden": 8})


def quick(**changes):
    return Recipe(aggregator=SMALL, training=QUICK.model_copy(update=changes))


def weights(fitted):
    return torch.cat([value.flatten() for value in fitted.model.state_dict().values()])


def auc(fitted, toy, examples):
    outputs = predict_outputs(fitted.model, toy.task, toy.bags, examples.ids)
    return toy.task.metrics(outputs, examples.targets.numpy())["auc"]


@pytest.mark.parametrize("kind", ["classification", "binary"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"balance": "weights"}, {"balance": "sampling"}, {"ema": 0.8}, {"optimizer": "sgd", "lr": 0.1}],
)
def test_a_separable_cohort_is_learnt(make_toy, kind, changes):
    toy = make_toy(kind=kind)
    train, val = toy.parts()
    fitted = fit(quick(**({"epochs": 12, "lr": 1e-2} | changes)), toy.task, train, val)
    assert auc(fitted, toy, val) > 0.95


def test_the_same_seed_gives_the_same_weights_and_leaves_torch_alone(toy):
    train, val = toy.parts()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(fit(quick(), toy.task, train, val))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, weights(fit(quick(), toy.task, train, val)))
    assert not torch.equal(first, weights(fit(quick(seed=1), toy.task, train, val)))


def test_accumulating_packs_is_the_same_as_one_pack(toy):
    train, val = toy.parts()
    options = {"embed_dims": [16], "hidden": 8, "dropout": 0.0}
    whole, parts = (
        fit(
            Recipe(
                aggregator=Component(name="abmil", options=options),
                training=QUICK.model_copy(update={"max_instances_per_step": most, "optimizer": "sgd"}),
            ),
            toy.task,
            train,
            val,
        )
        for most in (0, 12)
    )
    torch.testing.assert_close(weights(whole), weights(parts), atol=1e-6, rtol=1e-5)


def test_reading_ahead_changes_nothing(toy, monkeypatch):
    train, val = toy.parts()
    recipe = quick(max_instances_per_step=12, max_instances_per_bag=5)
    plain = weights(fit(recipe, toy.task, train, val))
    monkeypatch.setattr(loop, "KEPT_BYTES", 0)
    assert torch.equal(plain, weights(fit(recipe, toy.task, train, val)))


@pytest.mark.parametrize("killed_after", [1, 3])
@pytest.mark.parametrize("recipe", [quick(ema=0.9), quick(optimizer="radam", balance="sampling", select="metric")])
def test_a_killed_run_continues_to_the_same_weights(toy, tmp_path, killed_after, recipe):
    train, val = toy.parts()
    straight = fit(recipe, toy.task, train, val, folder=tmp_path / "straight", state_interval_s=0)

    def kill(epoch):
        if epoch["epoch"] == killed_after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, toy.task, train, val, folder=tmp_path / "run", progress=kill, state_interval_s=0)
    assert (tmp_path / "run" / STATE).exists()
    seen = []
    resumed = fit(recipe, toy.task, train, val, folder=tmp_path / "run", progress=seen.append)
    assert [epoch["epoch"] for epoch in seen] == list(range(killed_after + 1, 5))
    assert torch.equal(weights(straight), weights(resumed))
    assert straight.history == resumed.history
    assert read_log(tmp_path / "run", resumed.card.files[LOG]) == resumed.history
    assert not (tmp_path / "run" / STATE).exists()


def test_a_finished_run_is_not_trained_again_and_another_is(toy, tmp_path):
    train, val = toy.parts()
    first = fit(quick(), toy.task, train, val, folder=tmp_path)
    seen = []
    again = fit(quick(), toy.task, train, val, folder=tmp_path, progress=seen.append)
    assert not seen
    assert torch.equal(weights(first), weights(again))
    assert first.history == again.history
    fit(quick(seed=3), toy.task, train, val, folder=tmp_path, progress=seen.append)
    assert len(seen) == 4


def test_the_state_of_another_training_is_not_used(toy, tmp_path, caplog):
    train, val = toy.parts()

    def kill(epoch):
        if epoch["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(quick(), toy.task, train, val, folder=tmp_path, progress=kill, state_interval_s=0)
    seen = []
    with caplog.at_level(logging.WARNING):
        fit(quick(lr=2e-3), toy.task, train, val, folder=tmp_path, progress=seen.append)
    assert len(seen) == 4
    assert "another training" in caplog.text


def test_the_best_epoch_is_kept_and_training_stops_early(toy, monkeypatch):
    train, val = toy.parts()
    losses = iter([0.5, 0.3, 0.4, 0.6, 0.1])
    snapshots = []

    def validate(run):
        snapshots.append({name: value.clone() for name, value in run.deployed().state_dict().items()})
        return {"val_loss": next(losses), "val_auc": None}

    monkeypatch.setattr(loop.TrainingRun, "_validate", validate)
    fitted = fit(quick(epochs=5, patience=2), toy.task, train, val)
    assert len(fitted.history) == 4
    assert fitted.card.training["best_epoch"] == 2
    assert all(torch.equal(value, snapshots[1][name]) for name, value in fitted.model.state_dict().items())


def test_the_last_epoch_needs_no_validation(toy):
    train, _ = toy.parts()
    fitted = fit(quick(select="last"), toy.task, train)
    assert fitted.card.training["best_epoch"] == 4
    with pytest.raises(LabelError, match="no validation slides"):
        fit(quick(), toy.task, train)


def test_a_class_missing_from_training_is_an_error(toy):
    negatives = [name for name, target in zip(toy.examples.ids, toy.examples.targets, strict=True) if not target]
    with pytest.raises(LabelError, match="no training slide of class c1"):
        fit(quick(), toy.task, toy.examples.subset(negatives), toy.parts()[1])


def test_a_loss_that_is_not_finite_names_the_bags(toy):
    train, val = toy.parts()
    with pytest.raises(EosinError, match=r"the loss is infinite or NaN at s\d+.*lower learning rate") as caught:
        fit(quick(optimizer="sgd", lr=1e30), toy.task, train, val)
    assert caught.value.code == "diverged"


def test_features_that_are_not_finite_name_their_slide(toy):
    bags = {name: toy.bags.load(name).clone() for name in toy.examples.ids}
    bags["s004"][1, 2] = float("nan")
    examples = type(toy.examples)(
        MemoryBags(bags, toy.bags.spec), *(getattr(toy.examples, name) for name in ("ids", "patient_ids", "targets"))
    )
    with pytest.raises(EosinError, match="features of s004 are infinite or NaN"):
        fit(quick(standardize=False), toy.task, examples, toy.parts()[1])


@pytest.mark.parametrize("standardize", [True, False])
def test_a_slide_that_spoils_the_loss_of_others_is_named(toy, standardize):
    bags = {name: toy.bags.load(name).clone() for name in toy.examples.ids}
    bags["s031"][0, 1] = float("inf")
    rows = [{"time": str(n), "event": str(int(n != 31))} for n in range(60)]
    task = make_task("cox", rows, target="time,event")
    examples = Examples(MemoryBags(bags, toy.bags.spec), toy.examples.ids, toy.examples.patient_ids, task.encode(rows))
    recipe = quick(standardize=standardize, select="last", max_instances_per_step=12)
    with pytest.raises(EosinError, match="features of s031 are infinite or NaN; extract them again"):
        fit(recipe, task, examples)


def test_terms_and_extras_are_added_with_their_weights_and_logged(toy, monkeypatch):
    class Constant(LossTerm):
        def __init__(self, model, task, *, value: float = 1.0):
            super().__init__(model, task)
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, output, bags, target):
            return self.value * 1.0

    class WithExtra(Strategy):
        def forward(self, bags, target):
            return Step(self.model(bags), bags, {"two": torch.tensor(2.0)})

    monkeypatch.setattr(LOSS_TERMS, "_items", {"constant": Constant})
    monkeypatch.setattr(STRATEGIES, "_items", {"with_extra": WithExtra})
    recipe = Recipe.parse(
        {
            "aggregator": SMALL.model_dump(),
            "terms": [{"name": "constant", "weight": 0.5, "options": {"value": 3.0}}],
            "strategy": {"name": "with_extra"},
            "bag_weight": 0.7,
            "training": {"epochs": 1, "bags_per_step": 40, "optimizer": "sgd"},
        }
    )
    train, val = toy.parts()
    epoch = fit(recipe, toy.task, train, val).history[0]
    assert epoch["train_two"] == 2.0
    assert epoch["train_constant"] == 3.0
    assert epoch["train_objective"] == pytest.approx(0.7 * epoch["train_bag"] + 2.0 + 0.5 * 3.0, rel=1e-6)


def test_unknown_parts_of_a_recipe_are_named(toy):
    train, val = toy.parts()
    for data, message in [
        ({"aggregator": {"name": "abmill"}}, "no aggregator named 'abmill'; did you mean abmil"),
        ({"terms": [{"name": "entropy!"}]}, "no loss term named"),
        ({"strategy": {"name": "super"}}, "no strategy named"),
        ({"aggregator": {"name": "abmil", "options": {"hiden": 3}}}, "did you mean hidden"),
    ]:
        with pytest.raises(UnknownNameError, match=message):
            fit(Recipe.parse(data), toy.task, train, val)
    with pytest.raises(ConfigError, match="precision 'fp8'"):
        fit(quick(), toy.task, train, val, precision="fp8")


def test_bf16_trains_and_a_saved_model_says_the_same(toy, tmp_path):
    train, val = toy.parts()
    fitted = fit(quick(epochs=12, lr=1e-2), toy.task, train, val, precision="bf16", folder=tmp_path)
    assert auc(fitted, toy, val) > 0.9
    model, card = load_model(tmp_path)
    assert card.training["best_epoch"] == fitted.card.training["best_epoch"]
    bags = [fitted.model, model]
    first, second = (predict_outputs(m, toy.task, toy.bags, val.ids) for m in bags)
    assert (first == second).all()


def test_the_learning_rate_warms_up_and_falls_to_zero():
    options = Training(epochs=10, warmup=2, schedule="cosine")
    rates = [rate_factor(options, step / 4, step=0.25) for step in range(40)]
    assert rates[0] == pytest.approx(1 / 8)
    assert rates[7] == rates[8] == 1.0
    assert all(a > b for a, b in pairwise(rates[8:]))
    assert rate_factor(options, 10.0, step=0.25) == pytest.approx(0)
    assert rate_factor(Training(schedule="constant"), 7.0, step=0.1) == 1.0


def test_balanced_sampling_draws_classes_equally(toy):
    targets = torch.tensor([0] * 36 + [1] * 4)
    train = toy.examples.subset(toy.examples.ids[:40])
    weighed = toy.task.balance(targets)
    assert weighed.mean() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    drawn = [row for _ in range(50) for step in draw_order(train, weighed, generator, bags_per_step=7) for row in step]
    assert targets[drawn].float().mean() == pytest.approx(0.5, abs=0.05)
    plain = draw_order(train, None, generator, bags_per_step=7)
    assert sorted(row for step in plain for row in step) == list(range(40))


def test_the_moving_average_moves_floats_and_copies_the_rest():
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(model.weight, 3.0)
    model.num_batches_tracked += 5
    move_average(average, model, 0.9)

    assert average.weight.tolist() == pytest.approx([1.2, 1.2])
    assert average.num_batches_tracked == 5


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "sgd"])
def test_optimizers_take_the_recipes_settings(name):
    optimizer = make_optimizer(Training(optimizer=name, lr=0.3, weight_decay=0.2), [nn.Parameter(torch.zeros(1))])
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


def test_threshold_and_temperature_are_chosen_on_validation_bags(toy):
    train, val = toy.parts()
    fitted = fit(quick(epochs=6, lr=1e-2, threshold=True, temperature=True), toy.task, train, val)
    task = fitted.card.load_task()
    assert task.threshold is not None
    assert task.temperature != 1.0
    assert task.same_question(toy.task)
    with pytest.raises(LabelError, match="chosen on validation slides"):
        fit(quick(select="last", threshold=True), toy.task, train)


def test_a_refit_trains_on_both_parts_for_the_chosen_number_of_passes(toy, monkeypatch):
    monkeypatch.setattr(loop.TrainingRun, "_value", lambda _, epoch: (-abs(epoch["epoch"] - 2),))  # the second is best
    train, val = toy.parts()
    recipe = quick(refit=True)
    plain, refitted = (fit(r, toy.task, train, val) for r in (quick(), recipe))
    for fitted in (plain, refitted):
        assert [fitted.card.training[name] for name in ("best_epoch", "epochs")] == [2, QUICK.epochs]
    assert refitted.history == plain.history
    torch.manual_seed(QUICK.seed)
    both = loop.TrainingRun(quick(select="last"), toy.task, train.joined(val), None, loop.Place("cpu", "fp32", 0))
    for _ in range(2):
        both.one_pass()
    assert torch.equal(weights(both.result()), weights(refitted))
    assert not torch.equal(weights(plain), weights(refitted))
    both.one_pass()
    assert not torch.equal(weights(both.result()), weights(refitted))
    assert torch.equal(weights(refitted), weights(fit(recipe, toy.task, train, val)))


def test_a_cluster_around_the_training_changes_nothing(toy, monkeypatch, tmp_path):
    train, val = toy.parts()
    alone = weights(fit(quick(), toy.task, train, val))
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\ntouch called\nexit 1\n")
    srun.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = {
        "JOB_ID": 7,
        "NTASKS": 2,
        "PROCID": 1,
        "LOCALID": 1,
        "NODEID": 0,
        "NNODES": 1,
        "JOB_NAME": "eosin",
        "NPROCS": 2,
    }
    for name, value in facts.items():  # as of `sbatch -n 2`
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert torch.equal(alone, weights(fit(quick(), toy.task, train, val)))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "radam", "sgd"])
def test_parameters_that_ask_for_it_learn_but_are_not_decayed(optimizer):
    kept, decayed, plain = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    kept.no_weight_decay = True
    options = Training(optimizer=optimizer, lr=0.1, weight_decay=0.5)
    steppers = [
        make_optimizer(options, [kept, decayed]),
        make_optimizer(options.model_copy(update={"weight_decay": 0.0}), [plain]),
    ]
    for _ in range(3):
        (kept * 3 + decayed * 3 + plain * 3).sum().backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    torch.testing.assert_close(kept, plain)  # as a parameter of an optimizer without decay
    assert (kept < 1).all()
    assert not torch.equal(kept, decayed)


def test_every_pass_is_a_line_for_tensorboard(toy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, val = toy.parts()
    fitted = fit(quick(epochs=3), toy.task, train, val, folder=tmp_path)
    seen = EventAccumulator(str(tmp_path)).Reload()
    losses = seen.Scalars("val/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([epoch["val_loss"] for epoch in fitted.history])
    assert {"lr", "train/objective", "train/bag", "val/auc"} <= set(seen.Tags()["scalars"])
    times = [event.wall_time for event in losses]
    assert times == sorted(times)
    assert times[0] > 1e9


def test_logs_of_a_killed_run_are_whole_and_go_on(toy, tmp_path):
    train, val = toy.parts()

    def kill(epoch):
        if epoch["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(quick(), toy.task, train, val, folder=tmp_path, progress=kill, state_interval_s=0)
    before = (tmp_path / EVENTS).read_bytes()
    assert len((tmp_path / LOG).read_text().splitlines()) == 1 + 2
    fitted = fit(quick(), toy.task, train, val, folder=tmp_path)
    assert len(read_log(tmp_path, fitted.card.files[LOG])) == 4
    assert (tmp_path / EVENTS).read_bytes().startswith(before)


class OneBroken(Classification):
    """A task whose loss is infinite for class 2."""

    def bag_losses(self, logits, target):
        return super().bag_losses(logits, target).masked_fill(target == 2, torch.inf)


def test_the_bag_of_a_pack_whose_loss_is_not_finite_is_named_alone(toy):
    train, val = toy.parts()
    targets = train.targets.clone()
    targets[5] = 2
    examples = type(train)(train.bags, train.ids, train.patient_ids, targets)
    with pytest.raises(EosinError, match=rf"the loss is infinite or NaN at {train.ids[5]};") as caught:
        fit(quick(), OneBroken(classes=("c0", "c1", "c2")), examples, val)
    assert caught.value.code == "diverged"


def test_validation_features_that_are_not_finite_name_their_slide(toy):
    bags = {name: toy.bags.load(name).clone() for name in toy.examples.ids}
    train, val = toy.parts()
    bags[val.ids[3]][0, 0] = float("inf")
    examples = type(val)(MemoryBags(bags, toy.bags.spec), val.ids, val.patient_ids, val.targets)
    with pytest.raises(EosinError, match=f"features of {val.ids[3]} are infinite or NaN"):
        fit(quick(), toy.task, train, examples)


def test_every_pass_is_appended_as_it_ends_and_the_documented_script_reads_it(toy, tmp_path):
    train, val = toy.parts()
    seen = []
    lines = tmp_path / "runs" / "a" / "metrics.jsonl"
    fitted = fit(quick(), toy.task, train, val, folder=lines.parent, progress=lambda _: seen.append(lines.exists()))
    assert seen == [False, True, True, True], "not only when all is done"
    said = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert len({line.pop("run") for line in said}) == 1
    assert all(line.pop("time") > 0 for line in said)
    assert tuple(said) == fitted.history

    page = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text(encoding="utf-8")
    script = page.partition("```python\n")[2].partition("```")[0]
    with lines.open("a", encoding="utf-8") as file:
        file.write('{"run": "half a li')
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "runs", "once"], capture_output=True, text=True, check=True
    )
    printed = done.stdout.splitlines()
    assert len(printed) == 4
    assert printed[0].startswith(f"a {said[0]['epoch']} {{'")
    assert f"{list(fitted.history[3])[-1]!r}: " in printed[3]

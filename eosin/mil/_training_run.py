"""The training loop; it exists once and names no method.

A step: the strategy's forward on each pack of the step, backward, clipping, the optimizer, `after_step`. A pass ends
with the validation of `inference_model`. Every random draw of a pass comes from the seed and the number of the pass, so
a run that was killed continues from its last state to the same weights.
"""

import copy
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eosin._devices import choose_device
from eosin._processes import require_running
from eosin.errors import EosinError
from eosin.mil._checkpoint import ModelCard, build_model, save_model
from eosin.mil._data import BagSource, Examples, PatientBags
from eosin.mil._evaluate import compute_logits
from eosin.mil._feed import (
    EVALUATION_INSTANCES,
    KEPT_BYTES,
    DeviceBags,
    EvaluationPacks,
    ahead,
    draw_order,
    group_by_budget,
    on_device,
    pack_bags,
    require_places,
)
from eosin.mil._linear import LinearPart, WithLinear, share_of
from eosin.mil._log import write_events, write_log
from eosin.mil._objective import Objective
from eosin.mil._optimizer import make_optimizer, move_average, rate_factor
from eosin.mil._parallel import join, mean_over_processes, own_device, sum_gradients
from eosin.mil._recipe import Recipe
from eosin.mil._resume import State
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil._step_losses import StepLosses
from eosin.mil._tables import shown
from eosin.mil.bags import PackedBags
from eosin.mil.slots import Aggregator
from eosin.mil.task import Task

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

Epoch = dict[str, float | int | None]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained model and how it came about.

    Attributes
    ----------
    model : Aggregator
        The chosen model in evaluation mode; takes features as they come from their files.
    card : ModelCard
    history : tuple of dict
        One per pass: learning rate, each part of the objective by name, validation loss and metrics.
    """

    model: Aggregator
    card: ModelCard
    history: tuple[Epoch, ...]

    def __repr__(self) -> str:
        recipe = self.card.recipe.aggregator.name
        return f"<Fitted {recipe}: {len(self.history)} passes, {self.card.load_task()!r}>"

    def save(self, folder: Path) -> ModelCard:
        """Write the model folder; see `eosin.mil._checkpoint.save_model`."""
        return save_model(folder, self.model, self.card)


@dataclass(frozen=True)
class Place:
    """Where and how a training computes."""

    device: str
    precision: str
    cache_bytes: int


@dataclass(frozen=True, eq=False)
class _Part:
    """What is computed at once: a pack, which is a step or a part of one.

    Attributes
    ----------
    step : int
        Number of the step in its pass.
    place : int
        Number of the pack in its step.
    closes_step : bool
    share : float
        Bags of the pack in those of the step.
    rows : list of int
        The bags' places in the training examples.
    bags : PackedBags
        On the host.
    """

    step: int
    place: int
    closes_step: bool
    share: float
    rows: list[int]
    bags: PackedBags


class TrainingRun:
    """One training: its parts, and how far it has come."""

    def __init__(self, recipe: Recipe, task: Task, train: Examples, val: Examples | None, place: Place) -> None:
        self.device = own_device(choose_device(place.device))
        self.precision, self.dtype = place.precision, PRECISIONS[place.precision]
        self.rank, self.world = join(self.device, recipe.training.processes)
        self.recipe, self.task, self.train, self.val = recipe, task, train, val
        self.options = recipe.training
        self.step_losses = StepLosses()
        model = build_model(recipe, task, train.bags.spec.dim)
        self.reads_places = model.reads_places
        if self.reads_places:
            require_places(train.bags, (*train.ids, *(() if val is None else val.ids)))
        self.objective = Objective(recipe, model, task.across_packs(self.step_losses)).to(self.device)
        self.standardizer: Standardizer | None = None
        if self.options.standardize:
            self.standardizer = Standardizer.measure(train.bags, train.ids).to(self.device)
        self.linear: LinearPart | None = None
        # the refit, which has no validation part, trains on as many
        self.share = 0.0
        slides = len(train) + len(val or ())
        if slides < recipe.linear_below:
            self.linear = LinearPart.solve(task, train)
        if self.linear is not None:
            self.linear = self.linear.to(self.device)
            self.share = share_of(slides, recipe.linear_below)
        self.average = copy.deepcopy(self.objective.strategy.inference_model()) if self.options.ema else None
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.options, self.parameters)
        balance = task.balance(train.targets) if self.options.balance != "none" else None
        self.draw_weights = balance if self.options.balance == "sampling" else None
        self.loss_weights = balance.to(self.device) if balance is not None and self.draw_weights is None else None
        self.targets = train.targets.to(self.device)
        # on a CPU the source of the bags has a cache of its own
        self.bags: BagSource = train.bags
        if place.cache_bytes and self.device.type != "cpu":
            self.bags = DeviceBags(train.bags, self.device, place.cache_bytes)
        self.val_packs = None if val is None or not len(val) else self._evaluation_packs(val)
        self.read_ahead = 4 * train.bags.spec.dim * sum(map(train.bags.length, train.ids)) > KEPT_BYTES
        self.history: list[Epoch] = []
        self.times: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.fingerprint = ""
        self.best_value: tuple[float, ...] = ()

    def _evaluation_packs(self, val: Examples) -> EvaluationPacks:
        most = self.options.max_instances_per_step or EVALUATION_INSTANCES
        places = self.reads_places
        return EvaluationPacks(val.bags, val.ids, self.device, most_instances=most, places=places)

    def passes(self) -> Iterator[Epoch]:
        """Train and validate until the recipe's last pass or the early stop."""
        while not self.finished():
            yield self.one_pass()

    def one_pass(self) -> Epoch:
        """Train and validate once."""
        epoch = self._train_pass(len(self.history)) | self._validate()
        self.history.append(epoch)
        self.times.append(time.time())
        self._keep_best(epoch)
        return epoch

    def write_logs(self, folder: Path) -> str:
        """Write what is known of the passes so far, as CSV and for TensorBoard; return the hash of the former."""
        write_events(folder, self.history, self.times)
        return write_log(folder, self.history)

    def finished(self) -> bool:
        """Return whether the last pass is done or the model has not become better for long enough."""
        done = len(self.history)
        if done >= self.options.epochs:
            return True
        patient = not self.options.patience or self.options.select == "last" or done < self.options.min_epochs
        return not patient and done - self.best_epoch >= self.options.patience

    def deployed(self) -> Aggregator:
        """Return the model that is validated and saved, reading features as they come."""
        model = self.average or self.objective.strategy.inference_model()
        if self.standardizer is not None:
            model = Standardized(self.standardizer, model)
        return model if self.linear is None else WithLinear(model, self.linear, self.share)

    def _train_pass(self, number: int) -> Epoch:
        # a sum would give pass 1 of seed 0 the draws of pass 0 of seed 1
        seed = int.from_bytes(hashlib.sha256(f"{self.options.seed} {number}".encode()).digest()[:7], "big")
        # dropout differs between processes; the order of the bags, which all must know, does not
        torch.manual_seed(seed + self.rank)
        generator = torch.Generator().manual_seed(seed)
        self.objective.train()
        steps = draw_order(self.train, self.draw_weights, generator, bags_per_step=self.options.bags_per_step)
        logged: list[dict[str, Tensor]] = []
        losses: list[Tensor] = []
        packs: list[tuple[str, ...]] = []
        feed = self._feed(steps, generator)
        for part in self._in_turn(ahead(feed) if self.read_ahead else feed, number, len(steps)):
            require_running()
            logged.append(self._backward(part))
            losses.append(self.objective.bag_losses)
            packs.append(part.bags.ids)
            if part.closes_step:
                self._update()
        rates: Epoch = {"epoch": number + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        return rates | self._averages(logged, losses, packs)

    def _feed(self, steps: Sequence[Sequence[int]], generator: torch.Generator) -> Iterator["_Part"]:
        """Yield the packs of a pass, on the host."""
        bags, most = self.bags, self.options.max_instances_per_bag
        for number, members in enumerate(steps):
            mine = members[self.rank :: self.world]
            share = 1 / len(members) if mine else 0.0  # a process without a bag takes part with weight 0
            mine = mine or members[:1]
            lengths = [bags.length(self.train.ids[row]) for row in mine]
            capped = [min(length, most) if most else length for length in lengths]
            groups = group_by_budget(capped, self.options.max_instances_per_step)
            for place, group in enumerate(groups):
                rows = [mine[place] for place in group]
                ids, places = [self.train.ids[row] for row in rows], self.reads_places
                pack = pack_bags(bags, ids, most_per_bag=most, generator=generator, places=places)
                yield _Part(number, place, place == len(groups) - 1, len(rows) * share, rows, pack)

    def _in_turn(self, feed: Iterable["_Part"], number: int, n_steps: int) -> Iterator["_Part"]:
        """Yield the packs to learn from; where bags are compared, after all packs of their step have been heard."""
        waiting: list[_Part] = []
        for part in feed:
            if not part.place:
                self._schedule(number + part.step / n_steps, n_steps)
            waiting.append(part)
            # the loss of a step that compares bags is known only when all of them are
            if self.task.compares_bags and not part.closes_step:
                continue
            if self.task.compares_bags:
                self._hear(waiting)
            yield from waiting
            waiting = []

    def _hear(self, step: Sequence["_Part"]) -> None:
        """Run the packs of a step without gradients, and leave random numbers and buffers as they were."""
        self.step_losses.forget()
        if len(step) == 1 and self.world == 1:
            return
        buffers = {name: buffer.clone() for name, buffer in self.objective.named_buffers()}
        index = self.device.index
        with torch.no_grad(), torch.random.fork_rng(devices=[] if index is None else [index]):
            for part in step:
                self.step_losses.hear()
                self._forward(part)
            for name, before in buffers.items():
                self.objective.get_buffer(name).copy_(before)
        if self.world > 1:
            self.step_losses.exchange(self.device, counts=step[0].share > 0)

    def _forward(self, part: "_Part") -> tuple[Tensor, dict[str, Tensor]]:
        bags = on_device(part.bags, self.device)
        weights = None if self.loss_weights is None else self.loss_weights[part.rows]
        with self._autocast():
            bags = bags if self.standardizer is None else self.standardizer(bags)
            total, self.step, parts = self.objective(bags, self.targets[part.rows], weights)
        return total, parts

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def _backward(self, part: "_Part") -> dict[str, Tensor]:
        self.step_losses.answer(part.place)
        total, parts = self._forward(part)
        (total * part.share).backward()  # type: ignore[no-untyped-call]
        logged: dict[str, Tensor] = {"objective": total.detach(), **parts}
        return logged

    def _update(self) -> None:
        if self.world > 1:
            sum_gradients(self.parameters)
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.strategy.after_step(self.step)
        if self.average is not None:
            move_average(self.average, self.objective.strategy.inference_model(), self.options.ema)

    def _schedule(self, done: float, steps_per_pass: int) -> None:
        """Set the learning rate and the strategy's progress from the number of passes that are done."""
        rate = self.options.lr * rate_factor(self.options, done, step=1 / steps_per_pass)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.start_step(done / self.options.epochs)

    def _averages(self, logged: list[dict[str, Tensor]], losses: list[Tensor], packs: list[tuple[str, ...]]) -> Epoch:
        """Return the mean of each part over the packs of a pass; the first wait for the device, and the check of it."""
        columns = {name: torch.stack([parts[name].float() for parts in logged]).cpu() for name in logged[0]}
        finite = columns["objective"].isfinite()
        if not finite.all():
            first = int(finite.int().argmin())
            bad = [n for n, fine in zip(packs[first], losses[first].isfinite().tolist(), strict=False) if not fine]
            self._refuse(bad or packs[first])
        means = {f"train_{name}": float(values.mean()) for name, values in columns.items()}
        if self.world == 1:
            return dict(means)
        return {name: mean_over_processes(mean, len(logged), self.device) for name, mean in means.items()}

    def _refuse(self, ids: Sequence[str]) -> None:
        """Stop with the slides whose loss was the first that is not finite, and the reason if the features show it.

        A slide whose features are not finite may spoil the loss of others: by the measured mean and deviation of the
        features, and where bags are compared.
        """
        self._refuse_features(self.train, ids)
        self._refuse_features(self.train, self.train.ids)
        raise EosinError(
            f"the loss is infinite or NaN at {shown(ids)}; use a lower learning rate or clip_norm", code="diverged"
        )

    def _refuse_features(self, examples: Examples, ids: Sequence[str]) -> None:
        bad = [name for name in ids if not examples.bags.load(name).isfinite().all()]
        if bad:
            raise EosinError(f"features of {shown(bad)} are infinite or NaN; extract them again", code="not-finite")

    def _validate(self) -> Epoch:
        if self.val_packs is None or self.val is None:
            return {}
        with self._autocast():
            logits = compute_logits(self.deployed(), self.val_packs)
        finite = logits.isfinite().all(1).tolist()
        self._refuse_features(self.val, [name for name, fine in zip(self.val.ids, finite, strict=True) if not fine])
        metrics = self.task.metrics(self.task.activate(logits), self.val.targets.numpy())
        loss = float(self.task.loss(logits, self.val.targets))
        return {"val_loss": loss} | {f"val_{name}": value for name, value in metrics.items()}

    def _keep_best(self, epoch: Epoch) -> None:
        if self.options.select == "last":
            self.best_epoch = len(self.history)
            return
        value = self._value(epoch)
        if value > self.best_value:
            self.best_value, self.best_epoch = value, len(self.history)
            self.best = {name: tensor.detach().clone() for name, tensor in self.deployed().state_dict().items()}

    def _value(self, epoch: Epoch) -> tuple[float, ...]:
        """Return what is higher for a better model; an undefined metric counts as worst, the loss breaks ties."""
        loss = epoch["val_loss"]
        lower_is_better = -math.inf if loss is None or math.isnan(loss) else -loss
        if self.options.select == "loss":
            return (lower_is_better,)
        metric = epoch[f"val_{self.task.selection_metric}"]
        return (-math.inf if metric is None else metric, lower_is_better)

    def result(self) -> Fitted:
        """Return the chosen model."""
        model = copy.deepcopy(self.deployed())
        if self.best:
            model.load_state_dict(self.best)
        chosen = self.history[self.best_epoch - 1]
        task = self._tuned_task(model)
        facts = {
            "level": "patient" if isinstance(self.train.bags, PatientBags) else "slide",
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "validation": {name[4:]: value for name, value in chosen.items() if name.startswith("val_")},
            "n_train": len(self.train),
            "n_train_patients": len(set(self.train.patient_ids)),
            "n_val": len(self.val) if self.val is not None else 0,
            "linear_share": self.share,
            "precision": self.precision,
            "fingerprint": self.fingerprint,
        }
        card = ModelCard(
            recipe=self.recipe, task=task.model_dump(mode="json"), features=self.train.bags.spec, training=facts
        )
        return Fitted(model.eval().cpu(), card, tuple(self.history))

    def _tuned_task(self, model: Aggregator) -> Task:
        options = self.options
        if self.val_packs is None or self.val is None or not (options.threshold or options.temperature):
            return self.task
        logits = compute_logits(model, self.val_packs)
        return self.task.tuned(logits, self.val.targets, threshold=options.threshold, temperature=options.temperature)

    def state(self) -> State:
        """Return what `resume` needs; only between two passes."""
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        facts = {
            "fingerprint": self.fingerprint,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_value": list(self.best_value),
            "times": self.times,
        }
        return State(tensors, facts)

    def resume(self, state: State | None) -> None:
        """Continue where a state was left; nothing happens without one."""
        if state is None:
            return
        self.objective.load_state_dict(_under("objective.", state.tensors))
        if self.average is not None:
            self.average.load_state_dict(_under("average.", state.tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _under("optimizer.", state.tensors).items():
            number, name = key.split(".", 1)
            moments.setdefault(int(number), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.best = {name: tensor.to(self.device) for name, tensor in _under("best.", state.tensors).items()}
        self.history = list(state.facts["history"])
        self.best_epoch = state.facts["best_epoch"]
        self.best_value = tuple(state.facts["best_value"])
        self.times = list(state.facts["times"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

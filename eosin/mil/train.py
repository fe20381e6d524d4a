"""The training loop; it exists once and names no method.

A step: the strategy's forward on each pack of the step, backward, clipping, the optimizer, `after_step`. A pass ends
with the validation of `inference_model`. Every random draw of a pass comes from the seed and the number of the pass, so
a run that was killed continues from its last state to the same weights.
"""

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from eosin.errors import CheckpointError, ConfigError, EosinError, LabelError
from eosin.mil.bags import PackedBags
from eosin.mil.checkpoint import CARD, ModelCard, build_model, load_model, save_model
from eosin.mil.data import BagSource, Examples, PatientBags, shown
from eosin.mil.evaluate import choose_device, compute_logits
from eosin.mil.feed import (
    EVALUATION_INSTANCES,
    KEPT_BYTES,
    DeviceBags,
    EvaluationPacks,
    ahead,
    draw_order,
    group_by_budget,
    on_device,
    pack_bags,
)
from eosin.mil.log import read_log, write_events, write_log
from eosin.mil.objective import Objective as Objective
from eosin.mil.optimizer import make_optimizer, move_average, rate_factor
from eosin.mil.parallel import join, mean_over_processes, sum_gradients
from eosin.mil.recipe import Recipe, Training
from eosin.mil.resume import State, forget_state, read_state, write_state
from eosin.mil.seen import SEEN, write_seen
from eosin.mil.slots import Aggregator
from eosin.mil.standardize import Standardized, Standardizer
from eosin.mil.tasks import Task

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
STATE_INTERVAL_S = 60.0

Epoch = dict[str, float | int | None]

logger = logging.getLogger(__name__)


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

    def save(self, folder: Path) -> ModelCard:
        """Write the model folder; see `eosin.mil.checkpoint.save_model`."""
        return save_model(folder, self.model, self.card)


def fit(
    recipe: Recipe,
    task: Task,
    train: Examples,
    val: Examples | None = None,
    *,
    folder: Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    device_cache_bytes: int = 0,
    progress: Callable[[Epoch], None] | None = None,
    state_interval_s: float = STATE_INTERVAL_S,
) -> Fitted:
    """Train a model.

    Parameters
    ----------
    recipe : Recipe
    task : Task
    train, val : Examples
        Bags to learn from, and bags by which the epoch is chosen and training is stopped early; without `val`, the
        recipe must select the last epoch.
    folder : Path, optional
        Receives ``model.safetensors``, ``model.json``, ``log.csv``, the same log for TensorBoard, ``seen.csv`` (the
        slides that shaped the model), and while training lasts the state to resume from: the last weights, the best,
        the optimizer's. A run with the same recipe and examples that was killed continues there.
    device : str
        ``auto``, ``cpu``, ``cuda``.
    precision : {"fp32", "bf16"}
        bf16 is autocast; losses stay in float32.
    device_cache_bytes : int
        Training bags stay on a GPU from their first use, up to so many bytes.
    progress : callable, optional
        Is given each pass's line of the history.
    state_interval_s : float
        Seconds between two saved states.

    Raises
    ------
    ConfigError
        If a name or option of the recipe does not exist, or parts of it do not fit together.
    LabelError
        If training bags lack a class, or there are no bags to select by.
    EosinError
        With code ``diverged``: a loss is not finite; the message names the bags.
    """
    require_machine(device, precision)
    _require_examples(recipe.training, task, train, val)
    fingerprint = _fingerprint(recipe, task, train, val, f"{precision} {choose_device(device).type}")
    done = None if folder is None else _finished(folder, fingerprint)
    if done is not None:
        if folder is not None and not (folder / SEEN).exists():  # of a version that did not write it
            write_seen(folder, train, val)
        return done
    task = task.fit_to(train.targets)
    with _own_randomness(recipe.training.seed, device):
        place = _Place(device, precision, device_cache_bytes)
        run = _Run(recipe, task, train, val, place)
        run.fingerprint = fingerprint
        if folder is not None:
            run.resume(read_state(folder, fingerprint))
        saved = time.monotonic()
        for epoch in run.passes():
            if progress is not None:
                progress(epoch)
            if folder is not None and not run.rank and time.monotonic() - saved > state_interval_s:
                write_state(folder, run.state())
                run.write_logs(folder)
                saved = time.monotonic()
        fitted = run.result()
        if recipe.training.refit:
            fitted = _refit(fitted, recipe, task, train, val, place)
    if folder is not None and not run.rank:
        run.write_logs(folder)
        write_seen(folder, train, val)
        fitted = Fitted(fitted.model, fitted.save(folder), fitted.history)
        forget_state(folder)
    return fitted


def require_machine(device: str, precision: str) -> None:
    """Raise `ConfigError` when there is no such device here or no such precision."""
    choose_device(device)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not known; use {' or '.join(PRECISIONS)}")


@dataclass(frozen=True)
class _Place:
    """Where and how a training computes."""

    device: str
    precision: str
    cache_bytes: int


def _refit(fitted: Fitted, recipe: Recipe, task: Task, train: Examples, val: Examples | None, place: _Place) -> Fitted:
    """Train from the start on training and validation bags for as many passes as the validation chose.

    The learning rate follows the same course as before, so that the chosen number of passes means the same.
    """
    if val is None:
        return fitted
    torch.manual_seed(recipe.training.seed)
    whole = recipe.model_copy(update={"training": recipe.training.model_copy(update={"select": "last"})})
    run = _Run(whole, task, train.joined(val), None, place)
    for _ in range(fitted.card.training["best_epoch"]):
        run.one_pass()
    return Fitted(run.result().model, fitted.card, fitted.history)


def _finished(folder: Path, fingerprint: str) -> Fitted | None:
    """Return the model that an earlier call with the same arguments left in the folder, if any."""
    if not (folder / CARD).exists():
        return None
    try:
        model, card = load_model(folder)
    except CheckpointError as error:
        logger.warning("%s; training starts anew", error)
        return None
    return Fitted(model, card, read_log(folder)) if card.training.get("fingerprint") == fingerprint else None


def _fingerprint(recipe: Recipe, task: Task, train: Examples, val: Examples | None, machine: str) -> str:
    """Return a hash of everything that determines the result."""
    digest = hashlib.sha256(machine.encode())
    for part in (recipe, task, train.bags.spec):
        digest.update(part.to_json().encode())
    for examples in (train, val):
        if examples is not None:
            digest.update(repr((examples.ids, examples.targets.tolist())).encode())
    return digest.hexdigest()[:16]


def _require_examples(training: Training, task: Task, train: Examples, val: Examples | None) -> None:
    if not len(train):
        raise LabelError("there are no slides to train on")
    if training.select != "last" and (val is None or not len(val)):
        raise LabelError(
            f"training.select is {training.select!r}, but there are no validation slides; give some, or select 'last'"
        )
    if (training.threshold or training.temperature) and (val is None or not len(val)):
        raise LabelError("a threshold or temperature is chosen on validation slides, but there are none; give some")
    task.require_trainable(train.targets)


@contextmanager
def _own_randomness(seed: int, device: str) -> Iterator[None]:
    """Seed torch for the block and leave the caller's generators as they were."""
    gpus = [torch.cuda.current_device()] if choose_device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class _Part:
    """What is computed at once: a pack, which is a step or a part of one.

    Attributes
    ----------
    step : int
        Number of the step in its pass.
    opens_step, closes_step : bool
    share : float
        Bags of the pack in those of the step.
    rows : list of int
        The bags' places in the training examples.
    bags : PackedBags
        On the host.
    """

    step: int
    opens_step: bool
    closes_step: bool
    share: float
    rows: list[int]
    bags: PackedBags


class _Run:
    """One training: its parts, and how far it has come."""

    def __init__(self, recipe: Recipe, task: Task, train: Examples, val: Examples | None, place: _Place) -> None:
        chosen = choose_device(place.device)
        index = [chosen.index or 0] if chosen.type == "cuda" else 1
        self.fabric = Fabric(accelerator=chosen.type, devices=index, precision=PRECISIONS[place.precision])  # type: ignore[arg-type]
        self.rank, self.world = join(self.fabric.device)
        self.recipe, self.task, self.train, self.val = recipe, task, train, val
        self.options = recipe.training
        device_ = self.fabric.device
        self.objective = Objective(recipe, build_model(recipe, task, train.bags.spec.dim), task).to(device_)
        self.standardizer: Standardizer | None = None
        if self.options.standardize:
            self.standardizer = Standardizer.measure(train.bags, train.ids).to(device_)
        self.average = copy.deepcopy(self.objective.strategy.inference_model()) if self.options.ema else None
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.options, self.parameters)
        balance = task.balance(train.targets) if self.options.balance != "none" else None
        self.draw_weights = balance if self.options.balance == "sampling" else None
        self.loss_weights = balance.to(device_) if balance is not None and self.draw_weights is None else None
        self.targets = train.targets.to(device_)
        self.bags: BagSource = train.bags
        if place.cache_bytes and device_.type != "cpu":
            self.bags = DeviceBags(train.bags, device_, place.cache_bytes)
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
        return EvaluationPacks(val.bags, val.ids, self.fabric.device, most_instances=most)

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

    def write_logs(self, folder: Path) -> None:
        """Write what is known of the passes so far, as CSV and for TensorBoard."""
        write_log(folder, self.history)
        write_events(folder, self.history, self.times)

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
        return model if self.standardizer is None else Standardized(self.standardizer, model)

    def _train_pass(self, number: int) -> Epoch:
        seed = int.from_bytes(hashlib.sha256(f"{self.options.seed} {number}".encode()).digest()[:7], "big")
        torch.manual_seed(seed + self.rank)
        generator = torch.Generator().manual_seed(seed)
        self.objective.train()
        steps = draw_order(self.train, self.draw_weights, generator, bags_per_step=self.options.bags_per_step)
        logged: list[dict[str, Tensor]] = []
        losses: list[Tensor] = []
        packs: list[tuple[str, ...]] = []
        feed = self._feed(steps, generator)
        for part in ahead(feed) if self.read_ahead else feed:
            if part.opens_step:
                self._schedule(number + part.step / len(steps), len(steps))
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
                pack = pack_bags(bags, [self.train.ids[row] for row in rows], most_per_bag=most, generator=generator)
                yield _Part(number, place == 0, place == len(groups) - 1, len(rows) * share, rows, pack)

    def _backward(self, part: "_Part") -> dict[str, Tensor]:
        bags = on_device(part.bags, self.fabric.device)
        weights = None if self.loss_weights is None else self.loss_weights[part.rows]
        with self.fabric.autocast():
            bags = bags if self.standardizer is None else self.standardizer(bags)
            total, self.step, parts = self.objective(bags, self.targets[part.rows], weights)
        self.fabric.backward(total * part.share)
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
        return {name: mean_over_processes(mean, len(logged), self.fabric.device) for name, mean in means.items()}

    def _refuse(self, ids: Sequence[str]) -> None:
        """Stop with the slides whose loss was the first that is not finite, and the reason if the features show it."""
        self._refuse_features(self.train, ids)
        raise EosinError(
            f"the loss is not finite at {shown(ids)}; use a lower learning rate or clip_norm", code="diverged"
        )

    def _refuse_features(self, examples: Examples, ids: Sequence[str]) -> None:
        bad = [name for name in ids if not examples.bags.load(name).isfinite().all()]
        if bad:
            raise EosinError(f"features of {shown(bad)} are not finite; extract them again", code="not-finite")

    def _validate(self) -> Epoch:
        if self.val_packs is None or self.val is None:
            return {}
        with self.fabric.autocast():
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
        self.best = {name: tensor.to(self.fabric.device) for name, tensor in _under("best.", state.tensors).items()}
        self.history = list(state.facts["history"])
        self.best_epoch = state.facts["best_epoch"]
        self.best_value = tuple(state.facts["best_value"])
        self.times = list(state.facts["times"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

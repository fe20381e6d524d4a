"""Training a model: checks before, the loop of `eosin.mil._training_run`, the refit, and the folder that remains."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eosin._devices import choose_device
from eosin._files import write_json
from eosin._fingerprints import content_hash, fingerprint, source_hash
from eosin._seals import is_intact, read_json, sealed
from eosin.errors import CheckpointError, ConfigError, LabelError
from eosin.kernels._rates import faster_precision, processor
from eosin.mil._checkpoint import CARD, WEIGHTS, load_model, save_model
from eosin.mil._data import Examples
from eosin.mil._log import LOG, append_metrics, read_log
from eosin.mil._parallel import require_same
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil._registry import ModuleRegistry
from eosin.mil._resume import forget_state, read_state, write_state
from eosin.mil._seen import SEEN, slides_of, write_seen
from eosin.mil._training_run import PRECISIONS, Epoch, Fitted, Place, TrainingRun
from eosin.mil.slots import AGGREGATORS, LOSS_TERMS, STRATEGIES
from eosin.mil.task import Task

STATE_INTERVAL_S = 60.0
PRECISION = "precision.json"
BAGS_TO_COMPARE = 16
"""Fewer bags in a step than this make poor risk sets."""

logger = logging.getLogger(__name__)


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
        Receives ``model.safetensors``, ``model.json``, ``log.csv``, the same log for TensorBoard and, pass by pass, as
        ``metrics.jsonl``, ``seen.csv`` (the slides that shaped the model), and while training lasts the state to resume
        from: the last weights, the best, the optimizer's. A run with the same recipe and examples that was killed
        continues there.
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
    made_from = _fingerprint(recipe, task, train, val, f"{precision} {choose_device(device).type}")
    done = None if folder is None else _finished(folder, made_from)
    if done is not None:
        if folder is not None and not (folder / SEEN).exists():  # of a version that did not write it
            write_seen(folder, train, val)
        return done
    task = task.fit_to(train.targets)
    with _own_randomness(recipe.training.seed, device):
        place = Place(device, precision, device_cache_bytes)
        run = TrainingRun(recipe, task, train, val, place)
        run.fingerprint = made_from
        require_same(made_from, run.device)
        if folder is not None:
            run.resume(read_state(folder, made_from))
        saved = time.monotonic()
        for epoch in run.passes():
            if progress is not None:
                progress(epoch)
            if folder is None or run.rank:  # one process writes for all, whose weights are equal
                continue
            append_metrics(folder, made_from, epoch)
            if time.monotonic() - saved > state_interval_s:
                write_state(folder, run.state())
                run.write_logs(folder)
                saved = time.monotonic()
        fitted = run.result()
        if recipe.training.refit:
            fitted = _refit(fitted, recipe, task, train, val, place=place)
    if folder is not None and not run.rank:
        files = {LOG: run.write_logs(folder), SEEN: write_seen(folder, train, val)}
        card = fitted.card.model_copy(update={"files": files})
        fitted = Fitted(fitted.model, save_model(folder, fitted.model, card), fitted.history)
        forget_state(folder)
    return fitted


def require_fitting(training: Training, task: Task) -> None:
    """Refuse settings that a task cannot have, before anything is trained.

    Raises
    ------
    ConfigError
        For a threshold or temperature of a task that has none, and for steps of one bag when bags are compared.
    """
    task.require_tunable(threshold=training.threshold, temperature=training.temperature)
    if task.compares_bags and training.bags_per_step < 2:
        raise ConfigError(
            f"task {task.kind} compares the bags of a step with each other, and one bag cannot be compared; "
            f"set training.bags_per_step to {BAGS_TO_COMPARE} or more"
        )


def settled_precision(name: str, device: str, folder: Path) -> str:
    """Return fp32 or bf16 for a name; ``auto`` is the faster here, chosen once for a folder and kept in it.

    A run that is continued, on another machine too, computes as it began. The variable ``EOSIN_PRECISION`` decides
    before any measurement, for runs that must agree to the last digit.

    Parameters
    ----------
    name : {"auto", "fp32", "bf16"}
    device : str
    folder : Path
        Results of the run.
    """
    if name != "auto":
        return name
    if os.environ.get("EOSIN_PRECISION"):
        return os.environ["EOSIN_PRECISION"]
    kept = folder / PRECISION
    if kept.exists() and (known := _kept_precision(kept)):
        return known
    found = faster_precision(choose_device(device))
    write_json(kept, sealed({"precision": found, "device": choose_device(device).type, "processor": processor()}))
    return found


def _kept_precision(path: Path) -> str | None:
    """Return what an earlier run measured; None where the file is not as that run wrote it."""
    try:
        data = read_json(path)
        if not is_intact(data):
            raise ValueError("it is damaged or was changed by hand")
        return str(data["precision"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s); the precision is measured again", path, error)
        return None


def require_machine(device: str, precision: str) -> None:
    """Raise `ConfigError` when there is no such device here or no such precision."""
    choose_device(device)
    if precision not in PRECISIONS:
        raise ConfigError(f"there is no precision {precision!r}; use {' or '.join(PRECISIONS)}")


def _refit(
    fitted: Fitted, recipe: Recipe, task: Task, train: Examples, val: Examples | None, *, place: Place
) -> Fitted:
    """Train from the start on training and validation bags for as many passes as the validation chose.

    The learning rate follows the same course as before, so that the chosen number of passes means the same.
    """
    if val is None:
        return fitted
    # the first weights are those of the run whose passes were counted
    torch.manual_seed(recipe.training.seed)
    whole = recipe.model_copy(update={"training": recipe.training.model_copy(update={"select": "last"})})
    run = TrainingRun(whole, task, train.joined(val), None, place)
    for _ in range(fitted.card.training["best_epoch"]):
        run.one_pass()
    facts = fitted.card.training | {"linear_share": run.share}
    card = fitted.card.model_copy(update={"training": facts})
    return Fitted(run.result().model, card, fitted.history)


def _finished(folder: Path, made_from: str) -> Fitted | None:
    """Return the model that an earlier call with the same arguments left in the folder, if any."""
    if not (folder / CARD).exists():
        return None
    try:
        model, card = load_model(folder)
    except CheckpointError as error:
        logger.warning("%s; training starts from the beginning", error)
        return None
    if card.training.get("fingerprint") != made_from:
        return None
    return Fitted(model, card, read_log(folder, card.files[LOG]) if LOG in card.files else ())


def _fingerprint(recipe: Recipe, task: Task, train: Examples, val: Examples | None, machine: str) -> str:
    """Return a hash of everything that determines the model and what lies beside it."""
    parts: list[tuple[ModuleRegistry[Any], Component]] = [
        (AGGREGATORS, recipe.aggregator),
        (STRATEGIES, recipe.strategy),
        *((LOSS_TERMS, term) for term in recipe.terms),
    ]
    return fingerprint(
        "train",
        recipe=recipe.model_dump(mode="json") | {"resolved": [_resolved(slot, c) for slot, c in parts]},
        task=task,
        features={
            "spec": train.bags.spec,
            "rows": _rows(train) + _rows(val),
            "places": _places(train) + _places(val) if _reads_places(recipe, task, train) else [],
        },
        train=_described(train),
        validation=_described(val),
        machine=machine,
        plugins=[source_hash(kind) for kind in (type(task), *(slot[c.name] for slot, c in parts))],
    )


def _resolved(slot: ModuleRegistry[Any], part: Component) -> dict[str, Any]:
    """Return all options; a model folder stands for its weights, which may change while its name stays."""
    return {name: _content(value) for name, value in slot.resolve(part.name, part.options).items()}


def _content(option: Any) -> Any:
    if not isinstance(option, Path):
        return option
    weights = option / WEIGHTS
    return content_hash(weights) if weights.is_file() else str(option)


def _rows(examples: Examples | None) -> list[str]:
    return [] if examples is None else [examples.bags.content_hash(name) for name in examples.ids]


def _reads_places(recipe: Recipe, task: Task, train: Examples) -> bool:
    """Return whether the aggregator reads where tiles lie, which its options may decide."""
    part = recipe.aggregator
    with torch.random.fork_rng(devices=[]):
        made = AGGREGATORS.build(part.name, train.bags.spec.dim, task.n_outputs, options=part.options)
    return made.reads_places


def _places(examples: Examples | None) -> list[bytes]:
    """Return where the tiles of each bag lie; nothing for a bag without coordinates, which training refuses."""
    if examples is None:
        return []
    found = [examples.bags.places(name) for name in examples.ids]
    return [b"" if places is None else hashlib.sha256(places.numpy().tobytes()).digest() for places in found]


def _described(examples: Examples | None) -> list[object]:
    """Return whose the bags are and what they are to teach."""
    if examples is None:
        return []
    targets = examples.targets
    slides = [(slide, patient) for slide, patient in slides_of(examples)]
    return [examples.ids, slides, str(targets.dtype), list(targets.shape), targets.numpy().tobytes()]


def _require_examples(training: Training, task: Task, train: Examples, val: Examples | None) -> None:
    if not len(train):
        raise LabelError("there are no slides to train on")
    if training.select != "last" and (val is None or not len(val)):
        raise LabelError(
            f"training.select is {training.select!r}, but there are no validation slides; "
            "pass splits with a validation part, or set it to 'last'"
        )
    if (training.threshold or training.temperature) and (val is None or not len(val)):
        raise LabelError(
            "the threshold or temperature must be chosen on validation slides, but there are "
            "none; pass splits with a validation part"
        )
    require_fitting(training, task)
    task.require_trainable(train.targets)


@contextmanager
def _own_randomness(seed: int, device: str) -> Iterator[None]:
    """Seed torch for the block and leave the caller's generators as they were."""
    gpus = [torch.cuda.current_device()] if choose_device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield

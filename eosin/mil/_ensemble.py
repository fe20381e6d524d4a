"""One model or several that answer together."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from eosin._devices import choose_device
from eosin._fingerprints import DIGITS
from eosin.errors import ConfigError
from eosin.mil._checkpoint import ModelCard, load_model
from eosin.mil._data import BagSource
from eosin.mil._evaluate import predict_outputs
from eosin.mil._metrics import Floats
from eosin.mil._prediction_table import Cell, Row
from eosin.mil.slots import Aggregator
from eosin.mil.task import Task


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One model or several that answer the same question from the same kind of features.

    Attributes
    ----------
    models : tuple of Aggregator
    cards : tuple of ModelCard
    tasks : tuple of Task
        The same question; each with what its own training and validation parts taught.
    device : torch.device
    everyone : tuple of Task
        The tasks of all models of a table, where this ensemble answers for some of its rows alone: columns mean the
        same in all rows. Empty for `tasks`.
    places : tuple of int
        Which of them are `tasks`.
    """

    models: tuple[Aggregator, ...]
    cards: tuple[ModelCard, ...]
    tasks: tuple[Task, ...]
    device: torch.device
    everyone: tuple[Task, ...] = ()
    places: tuple[int, ...] = ()

    def only(self, places: Sequence[int]) -> "Ensemble":
        """Return the ensemble of some of the models, whose answers have the columns of all."""
        models, cards, tasks = zip(*((self.models[k], self.cards[k], self.tasks[k]) for k in places), strict=True)
        return replace(self, models=models, cards=cards, tasks=tasks, everyone=self.tasks, places=tuple(places))

    @cached_property
    def task(self) -> Task:
        """The question with what the models learnt: a threshold is their mean, times of survival are common to all."""
        return self._pooled([])[0].with_mean_threshold(self.tasks)

    def _pooled(self, outputs: Sequence[Floats]) -> tuple[Task, Floats]:
        """Return what all models ask in common, and outputs of the models, one row each, in its form."""
        common = self.everyone or self.tasks
        rows = [task.activate(torch.zeros(1, task.n_outputs)) for task in common]
        places = self.places or range(len(common))
        for place, row in zip(places, outputs, strict=False):
            rows[place] = row
        task, pooled = common[0].pooled(common, rows)
        return task, pooled[list(places)]

    @property
    def model_id(self) -> str:
        """Ids of the models, joined by plus signs."""
        return "+".join(card.model_id for card in self.cards)

    @property
    def content_hash(self) -> str:
        """Hash of weights and cards: with another threshold or other classes the same weights say something else."""
        cards = "\n".join(card.to_json() for card in self.cards)
        return hashlib.sha256(cards.encode()).hexdigest()[:DIGITS]

    @property
    def reads_patients(self) -> bool:
        """Whether a bag was all slides of a patient when the models were trained.

        Raises
        ------
        ConfigError
            If it was for some of them only.
        """
        levels = {card.training.get("level", "slide") for card in self.cards}
        if len(levels) > 1:
            raise ConfigError(
                "some models were trained on slides and some on patients; predict with each kind separately"
            )
        return levels == {"patient"}

    @property
    def facts(self) -> dict[str, Cell]:
        """What every row of a table says of the models."""
        features = self.cards[0].features
        return {"model": self.model_id, "encoder": features.encoder, "encoder_hash": features.weights_hash}

    def outputs(self, bags: BagSource, bag_id: str) -> Floats:
        """Return the activated outputs of each model for one bag in the form of `task`, (models, outputs)."""
        said = [
            predict_outputs(model, task, bags, [bag_id], device=self.device)
            for model, task in zip(self.models, self.tasks, strict=True)
        ]
        return self._pooled(said)[1]

    def answer(self, outputs: Floats) -> Row:
        """Return the columns of the task and the uncertainty from the outputs of each model, (models, outputs)."""
        columns = self.task.table(outputs.mean(0, keepdims=True))
        cells: Row = {name: values[0].item() for name, values in columns.items()}
        return cells | (self.task.spread(outputs) if len(outputs) > 1 else {})


def load_ensemble(folders: Sequence[Path], *, device: str = "auto") -> Ensemble:
    """Load model folders that belong together.

    Raises
    ------
    ConfigError
        If none is given, or their tasks differ.
    FeatureMismatchError
        If they were trained on different kinds of features.
    CheckpointError
        If one cannot be loaded.
    """
    if not folders:
        raise ConfigError("there is no model; pass at least one model folder")
    loaded = [load_model(folder) for folder in folders]
    first = loaded[0][1]
    tasks = tuple(card.load_task() for _, card in loaded)
    for folder, task, (_, card) in zip(folders, tasks, loaded, strict=True):
        if not task.same_question(tasks[0]):
            raise ConfigError(
                f"{folder} and {folders[0]} have different classes or tasks and cannot be "
                "averaged; predict with each one separately"
            )
        first.features.require_match(card.features, folder)
    place = choose_device(device)
    models = tuple(model.to(place) for model, _ in loaded)
    return Ensemble(models, tuple(card for _, card in loaded), tasks, place)

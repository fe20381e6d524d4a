"""Who answers for a slide: one model, the fold of a cross-validation that has not seen its patient, or all folds."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from typing_extensions import override

from eosin._names import Ids
from eosin.kernels import segment_softmax
from eosin.mil._checkpoint import ModelCard
from eosin.mil._ensemble import Ensemble, load_ensemble
from eosin.mil._prediction_table import Row
from eosin.mil._seen import Choice, Models, Sight, donor_notes, worst
from eosin.mil.bags import PackedBags
from eosin.mil.slots import Aggregator, AggregatorOutput, AttentionOutput
from eosin.mil.task import Task


@dataclass(frozen=True, eq=False)
class Asked:
    """The model that is asked about a slide.

    Attributes
    ----------
    model : Aggregator
    card : ModelCard
    choice : Choice, optional
        Which models it stands for, and what they have seen of the slide; None where a caller made the model itself.
    jury : Jury, optional
        Who chose them.
    donors : mapping of str to Sight
        What they have seen of other slides whose tiles are added to this one, see `with_donors`.
    """

    model: Aggregator
    card: ModelCard
    choice: Choice | None = None
    jury: "Jury | None" = None
    donors: Mapping[str, Sight] = field(default_factory=dict)

    def with_donors(self, slides: Iterable[str]) -> "Asked":
        """Return who is asked when tiles of other slides are added to this one."""
        return replace(self, donors={slide: self._sight_of(slide) for slide in slides})

    def _sight_of(self, slide: str) -> Sight:
        if self.choice is None or self.jury is None:
            return Sight()
        folders, jury = self.choice.folders, self.jury
        patient = jury.patient_of.get(slide)
        return worst(run.sight(folders, slide, patient, ids=jury.ids) for run in jury.models.runs)

    @property
    def sight(self) -> Sight:
        """What the model has seen of the slide."""
        return Sight() if self.choice is None else self.choice.sight

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the answer: that it flatters the model, and whose it is."""
        seen = self.sight.words
        words = [*([seen] if seen else []), *donor_notes(self.donors)]
        caution = tuple(f"Caution: {one}." for one in words)
        several = self.choice is not None and self.choice.how != "model"
        return (*caution, f"Answered by: {self.choice.how}.") if several and self.choice else caution


Model = Path | str | tuple[Aggregator, ModelCard] | Asked
"""What may be asked: a folder of a model or of a cross-validation, a loaded model, or the one chosen for a slide."""


def ask(model: Model, slide: str) -> Asked:
    """Return the model that answers for a slide, loaded where it is a folder; errors as of `Jury.ask`."""
    if isinstance(model, Path | str):
        return Jury.open([Path(model)], device="cpu").ask(slide)
    return model if isinstance(model, Asked) else Asked(*model)


class Committee(Aggregator):
    """Several models that answer as one, with the mean of their answers and of their attention.

    Parameters
    ----------
    models : sequence of Aggregator
        Of one question.
    tasks : sequence of Task
        With what each model was taught.
    task : Task
        Puts their logits together, see `eosin.mil.task.Task.mean_logits`.
    """

    def __init__(self, models: Sequence[Aggregator], tasks: Sequence[Task], task: Task) -> None:
        first = models[0]
        super().__init__(first.in_dim, first.n_outputs, embed_dim=sum(model.embed_dim for model in models))
        self.models = nn.ModuleList(models)
        self.tasks, self.task = tuple(tasks), task
        weighs = all(issubclass(model.output_type, AttentionOutput) for model in models)
        self.output_type = AttentionOutput if weighs else AggregatorOutput  # type: ignore[misc]  # of this instance
        self.order_dependent = any(model.order_dependent for model in models)  # type: ignore[misc]
        self.reads_places = any(model.reads_places for model in models)  # type: ignore[misc]

    @override
    def forward(self, bags: PackedBags) -> AggregatorOutput:
        outputs: list[AggregatorOutput] = [model(bags) for model in self.models]
        said = [output.logits for output in outputs]
        logits = self.task.mean_logits(self.tasks, said).to(said[0].dtype)
        embedding = torch.cat([output.embedding for output in outputs], 1)
        weighing = [output for output in outputs if isinstance(output, AttentionOutput)]
        if len(weighing) < len(outputs):
            return AggregatorOutput(logits, embedding)
        weights = [segment_softmax(output.scores, bags.cu_seqlens).mean(1, keepdim=True) for output in weighing]
        instances = torch.cat([output.instances for output in weighing], 1)
        return AttentionOutput(logits, embedding, torch.stack(weights).mean(0).log(), instances)

    @override
    def readout(self, bags: PackedBags, output: AggregatorOutput) -> None:
        """There is no closed form for the mean of several models, so they are run again for every question."""


def _committee(ensemble: Ensemble) -> tuple[Aggregator, ModelCard]:
    task, card = ensemble.task.without_scale(), ensemble.cards[0]
    model = Committee(ensemble.models, ensemble.tasks, task)
    digest = hashlib.sha256(ensemble.model_id.encode()).hexdigest()
    together = card.model_copy(update={"task": task.model_dump(mode="json"), "weights_hash": digest})
    return model.eval(), together


@dataclass(frozen=True, eq=False)
class Jury:
    """Who answers for which slide: of a cross-validation, the models that have not seen its patient.

    Attributes
    ----------
    models : Models
        What each model has seen.
    ensemble : Ensemble
        All of them, in the order of ``models.folders``.
    patient_of : mapping of str to str
        Patients of slides, as far as they are known.
    ids : {"ask", "merge", "exact"}
        Whether a name is treated as another one that looks like it, see `eosin.mil._seen.Seen.of`.
    """

    models: Models
    ensemble: Ensemble
    patient_of: Mapping[str, str] = field(default_factory=dict)
    ids: Ids = "ask"
    _chosen: dict[tuple[Path, ...], Ensemble] = field(default_factory=dict)
    _asked: dict[tuple[Path, ...], tuple[Aggregator, ModelCard]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        roots: Sequence[Path],
        *,
        patient_of: Mapping[str, str] | None = None,
        ids: Ids = "ask",
        device: str = "auto",
    ) -> "Jury":
        """Load the models below some folders: model folders and cross-validations.

        Raises
        ------
        ConfigError, FeatureMismatchError, CheckpointError
            As `load_ensemble` and `eosin.mil._seen.Run.open`.
        """
        models = Models.open(roots)
        return cls(models, load_ensemble(models.folders, device=device), patient_of or {}, ids)

    def choose(self, *slides: str) -> Choice:
        """Return the models that answer for slides of one patient."""
        return self.models.choose(slides, self.patient_of.get(slides[0]), ids=self.ids)

    def of(self, choice: Choice) -> Ensemble:
        """Return the chosen models."""
        everyone = self.models.folders
        if choice.folders == everyone:
            return self.ensemble
        if choice.folders not in self._chosen:
            self._chosen[choice.folders] = self.ensemble.only([everyone.index(folder) for folder in choice.folders])
        return self._chosen[choice.folders]

    def ask(self, slide: str) -> Asked:
        """Return the model that answers for a slide: one, or the chosen ones as a committee.

        Raises
        ------
        ConfigError
            If several answer, and the task is one of a plug-in that does not say how.
        """
        choice = self.choose(slide)
        if choice.folders not in self._asked:
            chosen = self.of(choice)
            single = len(chosen.models) == 1
            self._asked[choice.folders] = (chosen.models[0], chosen.cards[0]) if single else _committee(chosen)
        return Asked(*self._asked[choice.folders], choice, self)

    def cells(self, choice: Choice) -> Row:
        """Return what a row of a table says of the models that answer: which they are, and what they have seen."""
        sight = choice.sight
        named = {"answered_by": choice.how, "model": self.of(choice).model_id}
        return {"seen": sight.part, "seen_by": sight.by, **named}

"""What each slide of a cohort answers: a stage of its own, so that a killed run goes on and a cluster can share it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from pydantic import TypeAdapter, ValidationError
from typing_extensions import override

from eosin._batch import Outcome
from eosin._files import file_fingerprint, write_json
from eosin._fingerprints import content_hash, fingerprint
from eosin._seals import is_intact, read_json, sealed
from eosin.errors import EosinError
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._counterfactual import Effect
from eosin.heatmaps._examination import SHUFFLES, Donor, Questions, examine, see_donor
from eosin.heatmaps._findings import Counterfactuals, effects_table
from eosin.heatmaps._subject import look, predict_bag, require_same_slide
from eosin.mil._checkpoint import ModelCard
from eosin.mil._jury import Asked, Jury
from eosin.mil._seen import Sight, donor_parts
from eosin.mil._shuffled import shuffle_weights
from eosin.mil.slots import Aggregator
from eosin.pipeline._question import DonorFile, open_donor, open_optional, read_sets, tissue_shares, write_findings
from eosin.wsi._slide_file import SlideFile


@dataclass(frozen=True)
class Answers:
    """What a slide leaves behind: its prediction and effects, without the arrays of its tiles.

    Attributes
    ----------
    prediction : mapping of str to str
        As printed.
    effects : list of Effect
    sentences : list of str
    shuffled : list of list of Effect
        Of each model with shuffled weights.
    sight : Sight
        What the models that answered have seen of the slide.
    answered_by : str
        Which models; empty for a model that does not say what it has seen.
    donors : mapping of str to Sight
        What they have seen of the slides whose tiles were added.
    """

    prediction: Mapping[str, str]
    effects: list[Effect]
    sentences: list[str]
    shuffled: list[list[Effect]]
    sight: Sight
    answered_by: str
    donors: Mapping[str, Sight] = field(default_factory=dict)

    def table(self, slide_id: str, class_name: str) -> pd.DataFrame:
        """Return one row per intervention, with what the model has seen of the slide where that is known."""
        table = effects_table(self.effects, {"slide": slide_id, "class": class_name})
        if self.donors:
            table = table.assign(donor_seen=donor_parts(table["tiles"], self.donors))
        return table.assign(seen=self.sight.part, answered_by=self.answered_by) if self.answered_by else table


ANSWERS = TypeAdapter(Answers)


@dataclass(frozen=True)
class Question:
    """One slide that is asked.

    Attributes
    ----------
    slide_id : str
    features : Path
    folder : Path
        Receives ``<slide id>_counterfactual.<format>`` and ``<slide id>_answers.json``, which is written last.
    slide : SlideFile, optional
    annotation : Path, optional
    """

    slide_id: str
    features: Path
    folder: Path
    slide: SlideFile | None = None
    annotation: Path | None = None

    @property
    def note(self) -> Path:
        """The file that holds the answers."""
        return self.folder / f"{self.slide_id}_answers.json"

    def read(self) -> Answers | None:
        """Return the answers; None where there are none, or their file is damaged."""
        return _read(self.note)[1]


def _read(note: Path) -> tuple[str, Answers | None]:
    try:
        data = read_json(note)
        if is_intact(data):
            return data["fingerprint"], ANSWERS.validate_python(data["answers"])
    except (OSError, ValueError, LookupError, TypeError, ValidationError):
        pass
    return "", None


@dataclass(frozen=True)
class AskStage:
    """The same questions to every slide, as a `eosin._batch.Stage`; fields as of `question_cohort`."""

    name: ClassVar[str] = "counterfactual"

    model: Path
    class_name: str
    patient_of: Mapping[str, str]
    region_classes: tuple[str, ...]
    donors: tuple[DonorFile, ...]
    questions: Questions
    formats: tuple[str, ...]

    @cached_property
    def _jury(self) -> Jury:
        return Jury.open([self.model], patient_of=self.patient_of, device="cpu")

    @cached_property
    def _seen_donors(self) -> dict[Aggregator, list[Donor]]:
        """The donors as each model sees them, which takes one look for each model."""
        return {}

    def who(self, slide_id: str) -> Asked:
        """Return the model that answers for a slide."""
        return self._jury.ask(slide_id)

    def first_card(self) -> ModelCard:
        """Return a card for what all models have in common."""
        return self._jury.ensemble.cards[0]

    def _answers_for(self, slide_id: str) -> list[object]:
        """Return which models answer, and what they have seen: a patient who is known changes that, and no model."""
        choice = self._jury.choose(slide_id)
        sight = choice.sight
        return [list(self._jury.of(choice).cards), choice.how, sight.part, sight.by, sight.name]

    def key(self, item: Question) -> str:
        """Return the id of a slide."""
        return item.slide_id

    def output(self, item: Question) -> Path:
        """Return the file that is written last."""
        return item.note

    def is_done(self, item: Question) -> bool:
        """Tell whether the answers are those of the same model, features, slide and questions."""
        made_from, answers = _read(item.note)
        try:
            return answers is not None and made_from == self._fingerprint(item)
        except (OSError, EosinError):
            return False

    def _fingerprint(self, item: Question) -> str:
        slide = item.slide
        return fingerprint(
            "counterfactual",
            model=self._answers_for(item.slide_id),
            features=file_fingerprint(item.features),
            slide=None if slide is None else file_fingerprint(slide.path),
            slide_mpp=None if slide is None else slide.reading,
            regions=None if item.annotation is None else content_hash(item.annotation),
            donors=[_donor_fingerprint(donor) for donor in self.donors],
            questions=[self.questions, self.class_name, self.region_classes],
            formats=self.formats,
        )

    def do(self, item: Question) -> Outcome:
        """Ask one slide and write what it answers."""
        asked = self.who(item.slide_id)
        bag = read_bag(item.features)
        asked.card.features.require_match(bag.spec, item.features)
        if bag.n_instances < 2:
            return Outcome("empty", f"{bag.n_instances} tiles, too few to remove some")
        self.write(item, self._answers(item, asked, bag))
        return Outcome()

    def write(self, item: Question, answers: Answers) -> None:
        """Keep the answers, with a checksum over all of them."""
        data = {"fingerprint": self._fingerprint(item), "answers": ANSWERS.dump_python(answers, mode="json")}
        write_json(item.note, sealed(data))

    def _answers(self, item: Question, asked: Asked, bag: FeatureBag) -> Answers:
        donors = [donor for donor in self._donors_of(asked) if donor.bag.slide_id != item.slide_id]
        asked = asked.with_donors(donor.bag.slide_id for donor in donors)
        with open_optional(item.slide) as slide:
            if slide is not None:
                require_same_slide(slide, bag)
            bounds = None if slide is None else slide.bounds_px0
            regions = {} if item.annotation is None else read_sets(item.annotation, bag, bounds, self.region_classes)

            def ask(model: Aggregator, donors: list[Donor], questions: Questions) -> Counterfactuals:
                return examine(
                    model,
                    asked.card,
                    bag,
                    class_name=self.class_name,
                    regions=regions,
                    donors=donors,
                    questions=questions,
                    tissue=tissue_shares(slide, bag, questions),
                )

            found = ask(asked.model, donors, self.questions)
            formats = [name for name in self.formats if name != "png" or slide is not None]
            write_findings(found, bag, slide, asked, item.folder, formats=formats)
            quick = self.questions.model_copy(update={"controls": 0, "matched": "number"})
            unseen = [Donor(donor.bag, donor.regions) for donor in donors]
            shuffled = [ask(model, unseen, quick).effects for model in self._shuffled(asked.model, bag)]
        return Answers(
            predict_bag(asked.model, asked.card, bag),
            found.effects,
            [*asked.notes, *found.sentences()],
            shuffled,
            asked.sight,
            "" if asked.choice is None else asked.choice.how,
            asked.donors,
        )

    def _donors_of(self, asked: Asked) -> list[Donor]:
        if asked.model not in self._seen_donors:
            opened = [open_donor(donor, asked.card, self.region_classes) for donor in self.donors]
            self._seen_donors[asked.model] = [see_donor(asked.model, asked.card, donor) for donor in opened]
        return self._seen_donors[asked.model]

    def _shuffled(self, model: Aggregator, bag: FeatureBag) -> Iterator[Aggregator]:
        """Yield models with shuffled weights."""
        wanted = self.questions.shuffles
        if wanted is None:
            # every copy that must be run again costs as much as the model itself
            wanted = 0 if look(model, bag).subsets.price else SHUFFLES
        for seed in range(wanted):
            yield shuffle_weights(model, seed)


@dataclass(frozen=True)
class AskInMemory(AskStage):
    """The questions to a model that was never saved, which no other process can load."""

    pair: Any = None

    @override
    def who(self, slide_id: str) -> Asked:
        return Asked(*self.pair)

    @override
    def first_card(self) -> ModelCard:
        card: ModelCard = self.pair[1]
        return card

    @override
    def _answers_for(self, slide_id: str) -> list[object]:
        return [self.first_card()]

    @override
    def is_done(self, item: Question) -> bool:
        """Tell nothing is done: weights that were never saved have no hash."""
        return False


def _donor_fingerprint(donor: DonorFile) -> list[str]:
    slide = None if donor.slide_file is None else donor.slide_file.path
    return [file_fingerprint(path) for path in (donor.features, slide, donor.annotation) if path is not None]

"""What is asked about: one slide, its features and the model, checked to belong together, and who answers for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from eosin._files import file_fingerprint
from eosin.errors import ConfigError, FeatureMismatchError, SlideError
from eosin.features._bag import FeatureBag
from eosin.mil._checkpoint import ModelCard
from eosin.mil._evaluate import compute_logits
from eosin.mil._reevaluation import BUDGET, ForwardBag
from eosin.mil.bags import PackedBags
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.mil.subsets import Floats, Subsets, as_array
from eosin.mil.tasks._classification import Binary, Classification
from eosin.wsi._grid import TileGrid
from eosin.wsi._slide import Slide

CLOSE = 1e-4
COMPARED_INSTANCES = 4096
Method = Literal["closed form", "closed form but for critical tiles", "re-evaluation"]


@dataclass(frozen=True, eq=False)
class Look:
    """What answers for a bag, and what a reader must know about it.

    Parameters
    ----------
    subsets : Subsets
    attention : (n,) float64 or None
        Mean weight of each tile over the branches, None for models without attention.
    """

    subsets: Subsets
    attention: Floats | None

    @property
    def method(self) -> Method:
        """How answers are made, in the words of saved sessions; `Subsets.how` says it in a sentence."""
        if self.subsets.price:
            return "re-evaluation"
        return "closed form" if self.subsets.instant else "closed form but for critical tiles"


def look(
    model: Aggregator,
    bag: FeatureBag | PackedBags,
    *,
    single_logit_is_second_class: bool = False,
    budget: int = BUDGET,
) -> Look:
    """Choose how to ask a model about a bag.

    The form that the method itself gives is taken after its prediction has been compared with the model's.

    Parameters
    ----------
    model : Aggregator
    bag : FeatureBag or PackedBags
        A pack holds one bag.
    single_logit_is_second_class : bool
        Give a model of two classes and one logit two logits, the first of them 0, so that classes have an index each.
    budget : int
        Instances that a search may run a model on that has no closed form.
    """
    pack = bag if isinstance(bag, PackedBags) else pack_bag(model, bag)
    again = ForwardBag(model.eval(), pack, wide=single_logit_is_second_class, budget=budget)
    with torch.no_grad():
        output = model(pack)
        form = model.readout(pack, output)
    attention = as_array(output.scores.double().softmax(0).mean(1)) if isinstance(output, AttentionOutput) else None
    if form is not None and single_logit_is_second_class:
        form = form.with_zero_logit()
    # hooks, a user's subclass or an unusual option may make the model something else than its method's form
    if form is None or not _agree(form, again, as_array(output.logits)[0]):
        return Look(again, attention)
    return Look(form, attention)


def _agree(form: Subsets, again: ForwardBag, whole: Floats) -> bool:
    """Compare a form with the model, on the whole bag and on a part of it spread over all."""
    predicted = np.concatenate([np.zeros(int(again.wide)), whole])
    # a form may agree on the whole bag by chance, for example when one tile has all the weight
    part = np.arange(0, form.n_instances, max(2, form.n_instances // COMPARED_INSTANCES))
    pairs = ((form.logits(), predicted), (form.keep_only(part), again.keep_only(part)))
    return all(np.allclose(ours, theirs, rtol=CLOSE, atol=CLOSE) for ours, theirs in pairs)


def pack_bag(model: torch.nn.Module, bag: FeatureBag) -> PackedBags:
    """Return the slide's features as a pack of one bag, on the model's device and in its precision."""
    parameter = next(model.parameters(), torch.empty(0))
    # float16 features and 64-bit models both occur; a copy also frees the tensor from the file's memory map, and torch
    # widens it several times faster than numpy
    values = torch.from_numpy(np.array(bag.features)).to(parameter.device, parameter.dtype)
    coords = None if bag.grid is None else [torch.from_numpy(bag.grid.origins_px0)]
    places = None if bag.grid is None else [torch.from_numpy(bag.grid.places()).to(values.device)]
    return PackedBags.pack([values], coords_px0=coords, ids=(bag.slide_id,), places=places)


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch a model to evaluation for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def require_grid(bag: FeatureBag) -> TileGrid:
    """Return the bag's grid, or raise `ConfigError` when its features have no places on a slide."""
    if bag.grid is None:
        raise ConfigError(
            f"{bag.slide_id}: no map can be drawn, because the features have no tile "
            "coordinates; extract the slide again"
        )
    return bag.grid


def require_same_slide(slide: Slide, bag: FeatureBag) -> None:
    """Refuse features that were made from another slide.

    Raises
    ------
    FeatureMismatchError
        If the size differs, or the file's fingerprint where the features carry one.
    SlideError
        Code ``empty`` if there are no tiles.
    """
    grid = require_grid(bag)
    if grid.slide_size_px0 != slide.size_px0:
        raise FeatureMismatchError(
            bag.slide_id,
            f"the features were made from a slide of {grid.slide_size_px0} pixels, {slide.path} has {slide.size_px0}; "
            "pass the slide that they came from",
        )
    if other := slide.other_image(grid.image):
        raise FeatureMismatchError(bag.slide_id, f"the features were made from {other}")
    # features of 0.1 and of other tools carry none; their size is all that can be compared
    fingerprint = bag.provenance.get("input_fingerprint", "")
    if fingerprint and fingerprint != file_fingerprint(slide.path):
        raise FeatureMismatchError(
            bag.slide_id,
            f"the features were made from another file than {slide.path} (same size, other content); "
            "extract them again or pass the slide that they came from",
        )
    if not bag.n_instances:
        raise SlideError(slide.path, "has no tiles on tissue, so no map can be drawn", code="empty")


def predict_bag(model: Aggregator, card: ModelCard, bag: FeatureBag) -> dict[str, str]:
    """Return the prediction for one slide, column by column, as it is printed."""
    cells = predict_cells(model, card, bag)
    return {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in cells.items()}


def predict_cells(model: Aggregator, card: ModelCard, bag: FeatureBag) -> dict[str, str | float]:
    """Return the prediction for one slide, column by column: numbers as numbers, everything else as text."""
    task = card.load_task()
    columns = task.table(task.activate(compute_logits(model, [pack_bag(model, bag)])))
    first = {name: values[0] for name, values in columns.items()}
    return {name: float(value) if isinstance(value, float) else str(value) for name, value in first.items()}


def prediction_in_words(prediction: Mapping[str, str]) -> str:
    """Return a printed prediction in one line: the class with its probability, or every column of another task."""
    chosen = prediction.get("predicted")
    probability = prediction.get(f"prob_{chosen}")
    if chosen is None or probability is None:
        return ", ".join(f"{name} {value}" for name, value in prediction.items())
    return f"{chosen}, probability {probability}"


def class_choices(card: ModelCard) -> tuple[str, ...]:
    """Return the classes of a model that chooses one of them, or nothing for other tasks."""
    task = card.load_task()
    return task.classes if isinstance(task, Classification | Binary) else ()


def require_classes(card: ModelCard) -> tuple[str, ...]:
    """Return the classes of a model; `ConfigError` for one of another task, which no counterfactual is about."""
    classes = class_choices(card)
    if not classes:
        raise ConfigError(f"counterfactuals need a model of classes; this model has the task {card.load_task().kind}")
    return classes

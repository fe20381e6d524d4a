"""What is asked about: one slide, its features and the model, checked to belong together, and what the model says."""

from collections.abc import Mapping

from eosin.errors import FeatureMismatchError, SlideError
from eosin.features.bag import FeatureBag
from eosin.files import file_fingerprint
from eosin.heatmaps.attribution import pack_bag, require_grid
from eosin.mil.checkpoint import ModelCard
from eosin.mil.evaluate import compute_logits
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.mil.tasks import Binary, Classification
from eosin.wsi.slide import Slide


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
    fingerprint = bag.provenance.get("input_fingerprint", "")
    if fingerprint and fingerprint != file_fingerprint(slide.path):
        raise FeatureMismatchError(
            bag.slide_id,
            f"the features were made from another file than {slide.path} (same size, other content); "
            "extract them again or pass the slide that they came from",
        )
    if not bag.n_instances:
        raise SlideError(slide.path, "has no tiles on tissue, so there is no map to draw", code="empty")


def predict_bag(model: Aggregator, card: ModelCard, bag: FeatureBag) -> dict[str, str]:
    """Return the prediction for one slide, column by column, as it is printed."""
    task = card.load_task()
    columns = task.table(task.activate(compute_logits(model, [pack_bag(model, bag)])))
    return {name: _printed(values[0]) for name, values in columns.items()}


def prediction_in_words(prediction: Mapping[str, str]) -> str:
    """Return a printed prediction in one line: the class with its probability, or every column of another task."""
    chosen = prediction.get("predicted")
    probability = prediction.get(f"prob_{chosen}")
    if chosen is None or probability is None:
        return ", ".join(f"{name} {value}" for name, value in prediction.items())
    return f"{chosen}, probability {probability}"


def _printed(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def class_choices(card: ModelCard) -> tuple[str, ...]:
    """Return the classes of a model that chooses one of them, or nothing for other tasks."""
    task = card.load_task()
    return task.classes if isinstance(task, Classification | Binary) else ()


def map_name(model: Aggregator) -> str:
    """Return what files of heat maps are called after: ``attention``, or ``effect`` for a model without attention."""
    return "attention" if issubclass(model.output_type, AttentionOutput) else "effect"

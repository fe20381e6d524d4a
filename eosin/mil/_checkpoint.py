"""Model folders: ``model.safetensors`` and ``model.json``, never a pickle.

The JSON holds everything that is needed to build the model again and to refuse features that it was not trained on: the
resolved recipe, the task with its classes, the `FeatureSpec`, and the hash of the weights, which names the model.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from eosin import __version__
from eosin._files import write_bytes, write_json
from eosin._seals import KEY, is_intact, read_json, sealed
from eosin.errors import CheckpointError, ConfigError
from eosin.features._bag import FeatureSpec
from eosin.mil._linear import LinearPart, WithLinear
from eosin.mil._recipe import Recipe
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.slots import AGGREGATORS, Aggregator
from eosin.mil.task import Task, load_task
from eosin.options import Options
from eosin.plugins import has_plugin, plugin_of

SCHEMA = 2
READABLE = (1, SCHEMA)  # 1, of eosin 0.1, has no checksum
MAX_CARD_BYTES = 16 * 2**20
WEIGHTS = "model.safetensors"
CARD = "model.json"


class ModelCard(Options):
    """What a model is.

    Attributes
    ----------
    schema_version : int
        Version of this description.
    eosin : str
        Version of the package that trained it.
    recipe : Recipe
        With every option of the aggregator, defaults included.
    task : dict
        As `eosin.mil.task.load_task` reads it.
    features : FeatureSpec
        Features of another kind are refused.
    weights_hash : str
        SHA-256 of ``model.safetensors``; its first 16 digits name the model.
    training : dict
        Facts of the training: epochs, the chosen epoch, validation metrics, numbers of slides and patients.
    files : mapping of str to str
        SHA-256 of other files in the folder that are read back: ``seen.csv``.
    plugins : tuple of str
        Plug-ins that the aggregator or the task comes from, see `eosin.plugins`.
    """

    schema_version: Literal[1, 2] = 2
    eosin: str = __version__
    recipe: Recipe
    task: dict[str, Any]
    features: FeatureSpec
    weights_hash: str = ""
    training: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        recipe, encoder = self.recipe.aggregator.name, self.features.encoder
        return f"<ModelCard {self.model_id or 'unsaved'}: {recipe} on {encoder}, {self.load_task()!r}>"

    @property
    def model_id(self) -> str:
        """First 16 digits of the hash of the weights."""
        return self.weights_hash[:16]

    def load_task(self) -> Task:
        """Return the task."""
        return load_task(self.task)


def build_model(recipe: Recipe, task: Task, dim: int) -> Aggregator:
    """Build the aggregator of a recipe with fresh weights from torch's global generator.

    Raises
    ------
    UnknownNameError, ConfigError
        If the aggregator or one of its options does not exist or does not fit.
    """
    return AGGREGATORS.build(recipe.aggregator.name, dim, task.n_outputs, options=recipe.aggregator.options)


def resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with every option of its aggregator, so that later defaults do not change a saved model."""
    component = recipe.aggregator
    options = AGGREGATORS.resolve(component.name, component.options)
    return recipe.model_copy(update={"aggregator": component.model_copy(update={"options": options})})


def save_model(folder: Path, model: Aggregator, card: ModelCard) -> ModelCard:
    """Write a model folder, weights first, so that a card never names weights that are not there.

    Parameters
    ----------
    folder : Path
        Is made if it does not exist.
    model : Aggregator
    card : ModelCard
        Its hash of the weights is computed here.

    Returns
    -------
    ModelCard
        The card with its options resolved and the hash of the weights.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    data = save(weights)
    write_bytes(folder / WEIGHTS, data)
    digest = hashlib.sha256(data).hexdigest()
    parts = (AGGREGATORS[card.recipe.aggregator.name], type(card.load_task()))
    plugins = tuple(sorted({plugin_of(part.__module__) for part in parts} - {""}))
    full = card.model_copy(update={"weights_hash": digest, "recipe": resolved(card.recipe), "plugins": plugins})
    write_json(folder / CARD, dict(sorted(sealed(full.model_dump(mode="json")).items())))
    return full


def load_card(folder: Path) -> ModelCard:
    """Read the description of a model.

    Parameters
    ----------
    folder : Path
        Model folder.

    Returns
    -------
    ModelCard

    Raises
    ------
    CheckpointError
        If the folder is not a model folder of eosin, or is of an unknown version.
    """
    path = folder / CARD
    try:
        data = read_json(path, most_bytes=MAX_CARD_BYTES)
    except FileNotFoundError:
        folds = any(folder.glob(f"fold_*/{CARD}"))
        advice = "its folds, fold_<i>, are model folders" if folds else "pass the folder that training wrote"
        raise CheckpointError(folder, f"is not a model folder (no {CARD}); {advice}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be read ({error})") from None
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if version not in READABLE:
        raise CheckpointError(
            path, f"has schema version {version!r}, this eosin {__version__} reads {SCHEMA}; update it"
        )
    if version == SCHEMA and not is_intact(data):
        raise CheckpointError(path, "is damaged or was changed by hand; copy the model again, or train it again")
    if version == SCHEMA:
        data.pop(KEY)
    try:
        return ModelCard.parse(data, source=str(path))
    except ConfigError as error:
        raise CheckpointError(path, f"is damaged: {error}") from None


def load_model(folder: Path | str) -> tuple[Aggregator, ModelCard]:
    """Build a saved model.

    Parameters
    ----------
    folder : Path
        Model folder, with ``model.json`` and ``model.safetensors``.

    Returns
    -------
    model : Aggregator
        In evaluation mode, on the CPU; takes features as they come from their files.
    card : ModelCard

    Raises
    ------
    CheckpointError
        If files are missing or damaged, do not belong together, or name a method that is not registered here; the
        message names the plug-in that has it.
    """
    folder = Path(folder)
    card = load_card(folder)
    _require_plugins(folder, card)
    path = folder / WEIGHTS
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None
    if digest != card.weights_hash:
        raise CheckpointError(path, f"is not the file that {CARD} describes; the folder was damaged or mixed up")
    try:
        model = _empty(card)
        model.load_state_dict(load_file(path))
    except (ConfigError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(folder, f"cannot be built: {' '.join(str(error).split())}") from None
    return model.eval(), card


def _require_plugins(folder: Path, card: ModelCard) -> None:
    """Refuse a model whose plug-ins are not loaded, before its method is looked for."""
    missing = [name for name in card.plugins if not has_plugin(name)]
    if missing:
        known = " ".join(f"--plugin {name}" for name in missing)
        raise CheckpointError(
            folder, f"needs the plug-in {', '.join(missing)}, which is not loaded; install it, or pass {known}"
        )


def _empty(card: ModelCard) -> Aggregator:
    with torch.random.fork_rng(devices=[]):
        model, dim = build_model(card.recipe, card.load_task(), card.features.dim), card.features.dim
        share = card.training.get("linear_share", 0.0)
        linear = LinearPart(dim, model.n_outputs) if share else None
    if card.recipe.training.standardize:
        model = Standardized(Standardizer(dim), model)
    return model if linear is None else WithLinear(model, linear, share)

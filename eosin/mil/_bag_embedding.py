"""The bag embedding of a trained model as the vector of a slide: what its classifier reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eosin._devices import choose_device
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.mil._checkpoint import ModelCard, load_model
from eosin.mil.bags import PackedBags, side_by_side
from eosin.mil.slots import Aggregator


@dataclass(frozen=True, eq=False)
class ModelEmbedder:
    """A trained model that makes vectors of slides.

    Attributes
    ----------
    model : Aggregator
    card : ModelCard
    device : torch.device
    """

    model: Aggregator
    card: ModelCard
    device: torch.device

    @classmethod
    def open(cls, folder: Path, *, device: str = "auto") -> "ModelEmbedder":
        """Load a model folder.

        Raises
        ------
        CheckpointError
            If it cannot be loaded.
        """
        model, card = load_model(folder)
        place = choose_device(device)
        return cls(model.to(place), card, place)

    @property
    def name(self) -> str:
        """The method, and the model by the hash of its weights."""
        return f"{self.card.recipe.aggregator.name}@{self.card.model_id}"

    @property
    def weights_hash(self) -> str:
        """Hash of the weights."""
        return self.card.model_id

    @property
    def source(self) -> str:
        """What the model was trained for."""
        return f"model of task {self.card.load_task().kind}"

    def require(self, spec: FeatureSpec, path: Path) -> None:
        """Refuse features that the model was not trained on.

        Raises
        ------
        FeatureMismatchError
        """
        self.card.features.require_match(spec, path)

    @torch.inference_mode()
    def vector(self, bags: Sequence[FeatureBag]) -> NDArray[np.float32]:
        """Return the embedding of all tiles as one bag."""
        rows = np.concatenate([np.asarray(bag.features, np.float32) for bag in bags])
        known = [torch.from_numpy(bag.grid.places()).to(self.device) for bag in bags if bag.grid is not None]
        places = [side_by_side(known)] if len(known) == len(bags) else None
        output = self.model(PackedBags.pack([torch.from_numpy(rows).to(self.device)], places=places))
        vector: NDArray[np.float32] = output.embedding[0].reshape(-1).float().cpu().numpy()
        return vector

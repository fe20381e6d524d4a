"""Text towers: sentences into the space of the tiles' features, for encoders that were trained on pairs of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from eosin.errors import ConfigError, MissingPackageError, UnknownNameError
from eosin.features._encoders import find_encoder
from eosin.features._packages import CONCH, require_module
from eosin.features._slide_packages import load_foreign, load_from_hub
from eosin.features._weights import find_weights

KEEP_TOKENS = 256


class TextTower(Protocol):
    """What embeds sentences.

    Attributes
    ----------
    scale : float
        Factor of the cosine in the softmax that the model was trained with.
    """

    scale: float

    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Return (sentences, D), of any length."""


class TransformersTower:
    """The text side of a CLIP of the package transformers: PLIP (Huang et al., Nature Medicine 29, 2023)."""

    def __init__(self, place: str) -> None:
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise MissingPackageError(error) from error
        self.model: Any = load_foreign(place, lambda: CLIPModel.from_pretrained(place)).eval()
        self.tokenizer: Any = load_foreign(place, lambda: AutoTokenizer.from_pretrained(place))
        self.scale = float(self.model.logit_scale.detach().exp())

    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Return (sentences, D)."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        rows = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return rows if isinstance(rows, Tensor) else rows.pooler_output  # the latter since transformers 5


class ConchTower:
    """The text side of CONCH (Lu et al., Nature Medicine 30, 2024) by the authors' package."""

    def __init__(self, place: str) -> None:
        package: Any = require_module(*CONCH)
        path = str(find_weights(Path(place))) if Path(place).exists() else f"hf_hub:{place}"
        self.model: Any = load_foreign(place, lambda: package.create_model_from_pretrained("conch_ViT-B-16", path)[0])
        self.tokenize: Callable[[list[str]], Tensor] = lambda texts: package.tokenize(
            texts=texts, tokenizer=package.get_tokenizer()
        )
        self.scale = float(self.model.logit_scale.detach().exp())

    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Return (sentences, 512)."""
        rows: Tensor = self.model.encode_text(self.tokenize(list(sentences)))
        return rows


class KeepTower:
    """The text side of KEEP (Zhou et al., 2024) by the code in its repository."""

    def __init__(self, place: str) -> None:
        self.model: Any = load_from_hub(place, "")
        self.tokenizer: Any = load_from_hub(place, "", "AutoTokenizer")
        self.scale = float(self.model.logit_scale.detach().exp())

    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Return (sentences, 768)."""
        tokens = self.tokenizer(
            list(sentences), max_length=KEEP_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        )
        rows: Tensor = self.model.encode_text(tokens)
        return rows


@dataclass(frozen=True)
class TextTowerSpec:
    """The text tower of a tile encoder.

    Attributes
    ----------
    encoder : str
        The tile encoder.
    load : callable
        Given a repository of the hub or a local folder.
    runs_foreign_code : bool
        Whether code of the repository runs, to which the user must agree. A package is installed by the user.
    """

    encoder: str
    load: Callable[[str], TextTower]
    runs_foreign_code: bool = False

    @property
    def source(self) -> str:
        """The repository of the tile encoder."""
        return find_encoder(self.encoder).source


TEXT_TOWERS: dict[str, TextTowerSpec] = {
    row.encoder: row
    for row in (
        TextTowerSpec("plip", TransformersTower),
        TextTowerSpec("conch_v1_contrast", ConchTower),
        TextTowerSpec("keep", KeepTower, runs_foreign_code=True),
    )
}
"""Every text tower by the name of its tile encoder; a plug-in adds its own row."""


def find_text_tower(encoder: str) -> TextTowerSpec:
    """Return the text tower of a tile encoder.

    Raises
    ------
    UnknownNameError
        Naming those that have one.
    """
    if encoder not in TEXT_TOWERS:
        raise UnknownNameError("tile encoder with a text tower", encoder, TEXT_TOWERS)
    return TEXT_TOWERS[encoder]


def load_text_tower(encoder: str, *, weights: Path | None = None, allow_remote_code: bool = False) -> TextTower:
    """Load the text tower of a tile encoder.

    Parameters
    ----------
    encoder : str
    weights : Path, optional
        Local folder of the model; the hub, or its cache, without it.
    allow_remote_code : bool
        Whether code of the repository may run with the rights of the user.

    Raises
    ------
    UnknownNameError
        If the encoder has none.
    ConfigError
        If a package is missing, code is not allowed, or the weights cannot be had.
    """
    spec = find_text_tower(encoder)
    if spec.runs_foreign_code and not allow_remote_code:
        raise ConfigError(
            f"the text tower of {encoder} runs code of {spec.source}, which eosin does not contain and has not "
            "checked; read it, then pass --allow-remote-code to run it with your rights",
            code="remote-code",
        )
    return spec.load(spec.source if weights is None else str(weights))


@torch.inference_mode()
def embed_classes(tower: TextTower, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Return one vector of length 1 per class, (classes, D): the mean of those of its prompts, each of length 1."""
    rows = [functional.normalize(tower.embed(texts).float(), dim=1).mean(0) for texts in prompts]
    return functional.normalize(torch.stack(rows), dim=1).cpu()

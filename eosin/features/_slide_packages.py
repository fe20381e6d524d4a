"""Slide encoders whose code only the user can bring: TITAN, PRISM, PRISM2, GigaPath, MOOZY.

The code comes from the Hugging Face hub, from a folder, or from a package that the user has installed. It runs with the
rights of the user, so every builder here is called only after the user has agreed.
"""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from eosin.errors import ConfigError, MissingPackageError
from eosin.features._slide_networks import SlideNetwork
from eosin.features._store import written_hdf5

Case = Sequence[tuple[Tensor, Tensor, int]]


class HubEncoder(SlideNetwork):
    """A model of the hub with code of its own.

    Parameters
    ----------
    model : nn.Module
    ask : callable
        Gives the vector from the model, (1, n, D) features, (1, n, 2) corners in level-0 pixels and the side of a tile.
    """

    def __init__(self, model: nn.Module, ask: Callable[[Any, Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.ask = ask

    def forward(self, features: Tensor, origins_px0: Tensor | None = None, tile_px0: int = 0) -> Tensor:
        """Return the vector of the authors' own function."""
        places = torch.zeros(len(features), 2, dtype=torch.int64) if origins_px0 is None else origins_px0
        return self.ask(self.model, features[None], places[None].to(features.device), tile_px0).reshape(-1).float()


def ask_titan(model: Any, features: Tensor, places: Tensor, tile_px0: int) -> Tensor:
    """Return (1, 768) of TITAN (Ding et al., Nature Medicine 31, 2025)."""
    vector: Tensor = model.encode_slide_from_patch_features(features, places, tile_px0)
    return vector


def ask_prism(model: Any, features: Tensor, _places: Tensor, _tile_px0: int) -> Tensor:
    """Return (1, 1280) of PRISM (Shaikovski et al., https://arxiv.org/abs/2405.10254)."""
    vector: Tensor = model.slide_representations(features)["image_embedding"]
    return vector


def ask_prism2(model: Any, features: Tensor, _places: Tensor, _tile_px0: int) -> Tensor:
    """Return (1, 2560), the base embedding of PRISM2 (Vorontsov et al., https://arxiv.org/abs/2506.13063)."""
    batch = model.processor(tile_embeddings=[features[0]]).to(features.device)
    vector: Tensor = model.get_base_embedding(**batch)
    return vector


def ask_gigapath(model: Any, features: Tensor, places: Tensor, _tile_px0: int) -> Tensor:
    """Return (1, 768), the last layer of GigaPath's slide encoder (Xu et al., Nature 630, 2024)."""
    with torch.autocast(features.device.type, torch.float16):  # flash-attn computes in half precision only
        layers = model(features, places.to(features.dtype), all_layer_embed=True)
    vector: Tensor = layers[-1]
    return vector


def load_titan(place: str, revision: str) -> SlideNetwork:
    """Load TITAN from the hub or a folder."""
    return HubEncoder(load_from_hub(place, revision), ask_titan)


def load_prism(place: str, revision: str) -> SlideNetwork:
    """Load PRISM without its decoder of reports."""
    model = load_from_hub(place, revision)
    model.text_decoder = None
    return HubEncoder(model, ask_prism)


def load_prism2(place: str, revision: str) -> SlideNetwork:
    """Load PRISM2 with its processor, which is what makes a batch of tiles."""
    model = load_from_hub(place, revision)
    object.__setattr__(model, "processor", load_from_hub(place, revision, "AutoProcessor"))
    return HubEncoder(model, ask_prism2)


def load_gigapath(place: str, _revision: str) -> SlideNetwork:
    """Load GigaPath's slide encoder by the authors' package; it needs a GPU and flash-attn."""
    package = _package("gigapath.slide_encoder", "git+https://github.com/prov-gigapath/prov-gigapath fairscale")
    name = place if Path(place).exists() else f"hf_hub:{place}"
    model = load_foreign(place, lambda: package.create_model(name, "gigapath_slide_enc12l768d", 1536, global_pool=True))
    return HubEncoder(model, ask_gigapath)


class Moozy(SlideNetwork):
    """MOOZY (Kotp et al., https://arxiv.org/abs/2603.27048) by the authors' package, a patient's slides at a time.

    The package reads files, so every slide is handed over in TRIDENT's layout.
    """

    def __init__(self, place: str, patch_px: int = 224) -> None:
        super().__init__()
        self.package = _package("moozy.encoding", "moozy")
        self.patch_px = patch_px
        path = place if Path(place).is_file() else str(self.package.ensure_checkpoint())
        self.model = load_foreign(
            place, lambda: self.package.load_stage2_inference_model(path, device=torch.device("cpu"))
        )

    def forward(self, features: Tensor, origins_px0: Tensor | None = None, tile_px0: int = 0) -> Tensor:
        """Return (768,) of one slide."""
        assert origins_px0 is not None
        return self.case([(features, origins_px0, tile_px0)])

    def case(self, slides: Case) -> Tensor:
        """Return (768,) of a patient from features, corners and tile sides of all slides."""
        device = slides[0][0].device
        with tempfile.TemporaryDirectory() as folder:
            samples = [self._sample(Path(folder) / f"{k}.h5", *slide) for k, slide in enumerate(slides)]
        outputs = self.package.run_case_encoding(self.model, samples, device=device, mixed_precision=False)
        vector: Tensor = outputs["cls"].float().reshape(-1)
        return vector

    def _sample(self, path: Path, features: Tensor, origins_px0: Tensor, tile_px0: int) -> Any:
        with written_hdf5(path) as file:
            file["features"] = features.cpu().numpy()
            file["coords"] = origins_px0.cpu().numpy()
            file["coords"].attrs.update(patch_size_level0=tile_px0, patch_size=self.patch_px)
        return self.package.load_stage2_slide_sample(
            path.name,
            str(path),
            include_geometry_meta=True,
            max_valid_tokens_per_slide=0,
            feature_h5_format="auto",
            feature_h5_key="features",
        )


def load_moozy(place: str, _revision: str) -> SlideNetwork:
    """Load MOOZY."""
    return Moozy(place)


def load_from_hub(place: str, revision: str, kind: str = "AutoModel") -> Any:
    """Load a model, tokenizer or processor of the hub, or of a folder, whose code comes with it.

    Raises
    ------
    ConfigError
        When it cannot be loaded, in one line.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(error) from error
    options = {} if Path(place).exists() or not revision else {"revision": revision}
    loader = getattr(transformers, kind)
    return load_foreign(place, lambda: loader.from_pretrained(place, trust_remote_code=True, **options))


def load_foreign(place: str, load: Callable[[], Any]) -> Any:
    """Return what foreign code loads; whatever it raises becomes one `ConfigError`."""
    try:
        return load()
    except Exception as error:  # whatever foreign code raises becomes one line
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ConfigError(
            f"{place} cannot be loaded ({reason}); download it where that is possible and pass --weights FOLDER",
            code="weights",
        ) from error


def _package(module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"this slide encoder needs a package that is not installed ({error}); `pip install {install}`",
            code="package",
        ) from error

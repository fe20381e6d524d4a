"""Slide encoders: the authors' vectors, the rows of the registry, and what is refused.

`authors/` holds small networks with random weights that the authors' own classes of CHIEF, MADELEINE and COBRA made,
with the vectors that these classes gave; in COBRA the Mamba-2 layer was that of the package transformers, whose sums
are float32 in parts.
"""

import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eosin.errors import CheckpointError, ConfigError, EosinError, FeatureFileError, FeatureMismatchError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._encoders import ENCODERS
from eosin.features._slide_encoders import (
    SLIDE_ENCODERS,
    SlideEncoder,
    SlideEncoderSpec,
    find_slide_encoder,
    load_slide_encoder,
)
from eosin.features._slide_networks import Chief, Cobra, Madeleine, SlideNetwork
from eosin.wsi._grid import TileGrid, Tiling

AUTHORS = Path(__file__).with_name("authors")
PLACE = Path("s1.h5")


def bag_of(spec: SlideEncoderSpec, n: int = 5, *, dim: int, seed: int = 0, name: str = "") -> FeatureBag:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    tiling = Tiling(mpp=spec.mpp or 0.5, patch_size=spec.tile_px or 256)
    corners = np.arange(2 * n, dtype=np.int64).reshape(n, 2) * tiling.patch_size
    grid = TileGrid(corners, tiling.patch_size, tiling, (10**5, 10**5), tiling.mpp)
    encoder = name or spec.tile_encoders[0]
    features = FeatureSpec(encoder=encoder, dim=dim, mpp=tiling.mpp, patch_size=tiling.patch_size)
    return FeatureBag(rows, features, "s1", grid)


@pytest.mark.parametrize(
    ("name", "network", "error"), [("chief", Chief, 1e-12), ("madeleine", Madeleine, 1e-12), ("cobra", Cobra, 1e-7)]
)
def test_vectors_are_those_of_the_authors(name: str, network: type[SlideNetwork], error: float, tmp_path: Path) -> None:
    known = np.load(AUTHORS / f"{name}.npz")
    weights = {key[2:]: torch.from_numpy(known[key]) for key in known if key.startswith("w:")}
    state = network.adapt(weights)
    built = network.of_state(state).double()
    built.load_state_dict({key: value.double() for key, value in state.items()})
    vector = built(torch.from_numpy(known["features"]).double()).detach().numpy()
    np.testing.assert_allclose(vector, known["vector"], rtol=0, atol=error)

    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "theirs.pt")
    encoder = load_slide_encoder(name, weights=tmp_path / "theirs.pt", device="cpu")
    spec = SLIDE_ENCODERS[name]
    bag = replace(bag_of(spec, len(known["features"]), dim=known["features"].shape[1]), features=known["features"])
    np.testing.assert_allclose(encoder.vector([bag]), known["vector"], atol=1e-5)


@pytest.mark.parametrize("name", [name for name, row in SLIDE_ENCODERS.items() if not row.runs_foreign_code])
def test_full_size_with_random_weights(name: str) -> None:
    spec = SLIDE_ENCODERS[name]
    encoder, again = (load_slide_encoder(f"{name}?random", device="cpu") for _ in range(2))
    assert encoder.weights_hash == again.weights_hash
    for tile_encoder in spec.tile_encoders:
        bag = bag_of(spec, 70, dim=ENCODERS[tile_encoder].dim, name=f"{tile_encoder}?random")
        encoder.require(bag.spec, PLACE)
        vector = encoder.vector([bag])
        assert vector.shape == (spec.dim or bag.spec.dim,)
        assert np.isfinite(vector).all()
        halves = [replace(bag, features=part, grid=None) for part in (bag.features[:30], bag.features[30:])]
        np.testing.assert_allclose(encoder.vector(halves), vector, atol=1e-6)


@pytest.mark.parametrize("name", SLIDE_ENCODERS)
def test_rows_name_tile_encoders_that_exist_and_how_to_load(name: str) -> None:
    row = SLIDE_ENCODERS[name]
    assert set(row.tile_encoders) <= set(ENCODERS)
    assert (row.network is None) == row.runs_foreign_code
    assert row.licence
    for tile_encoder in row.tile_encoders:
        row.require(FeatureSpec(encoder=tile_encoder, dim=ENCODERS[tile_encoder].dim), PLACE)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"encoder": "uni_v1"}, "encoder uni_v1, not conch_v15"),
        ({"mpp": 1.0}, "mpp 1, not 0.5"),
        ({"patch_size": 256}, "patch size 256, not 512"),
    ],
)
def test_features_of_another_kind_are_refused(changed: dict[str, object], told: str) -> None:
    row = SLIDE_ENCODERS["titan"]
    good = FeatureSpec(encoder="conch_v15", dim=768, mpp=0.5, patch_size=512)
    row.require(good, PLACE)
    with pytest.raises(FeatureMismatchError, match=told) as caught:
        row.require(good.model_copy(update=changed), PLACE)
    assert "--encoder conch_v15 --mpp 0.5 --patch-size 512" in str(caught.value)


@pytest.mark.parametrize("name", [name for name, row in SLIDE_ENCODERS.items() if row.runs_foreign_code])
def test_code_of_others_runs_only_when_the_user_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    row = replace(SLIDE_ENCODERS[name], load=lambda place, revision: called.append((place, revision)) or Sum())
    monkeypatch.setitem(SLIDE_ENCODERS, name, row)
    with pytest.raises(ConfigError, match="--allow-remote-code") as caught:
        load_slide_encoder(name)
    assert (caught.value.code, called) == ("remote-code", [])
    load_slide_encoder(name, allow_remote_code=True, device="cpu")
    load_slide_encoder(name, allow_remote_code=True, weights=Path("here"), device="cpu")
    assert called == [(row.source, row.revision), ("here", row.revision)]


class Sum(SlideNetwork):
    """Adds the corners to the tiles, so that places count."""

    def forward(
        self, features: torch.Tensor, origins_px0: torch.Tensor | None = None, tile_px0: int = 0
    ) -> torch.Tensor:
        assert origins_px0 is not None
        return features.sum(0) + origins_px0.sum() + tile_px0


def test_a_patient_is_the_mean_of_slides_where_places_count() -> None:
    spec = replace(SLIDE_ENCODERS["titan"], network=Sum)
    encoder = SlideEncoder(spec, Sum(), "")
    bags = [bag_of(spec, n, dim=3, seed=n) for n in (2, 5)]
    one, other = (encoder.vector([bag]) for bag in bags)
    np.testing.assert_allclose(encoder.vector(bags), (one + other) / 2, rtol=1e-6)
    with pytest.raises(FeatureFileError, match="no tile coordinates"):
        encoder.vector([replace(bags[0], grid=None)])


def test_refusals(tmp_path: Path) -> None:
    cases = {
        "titans": ({}, "titan"),
        "titan?random": ({"allow_remote_code": True}, "not part of eosin"),
        "chief": ({}, "github.com/hms-dbmi/CHIEF"),
        "chief?random": ({"weights": tmp_path}, "remove --weights"),
        "mean": ({"weights": tmp_path}, "remove --weights"),
    }
    for name, (options, told) in cases.items():
        with pytest.raises(EosinError, match=told):
            load_slide_encoder(name, **options)
    torch.save({"attention_net.0.weight": torch.zeros(3, 4)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not fit slide encoder chief"):
        load_slide_encoder("chief", weights=tmp_path / "other.pt")
    assert find_slide_encoder("chief?random").name == "chief?random"


class Remote(nn.Module):
    """Stands in for a model of the hub: the calls of TITAN, PRISM and PRISM2 in one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.text_decoder = nn.Linear(1, 1)

    def encode_slide_from_patch_features(self, features, coords, tile_px0):
        assert (features.shape[0], coords.shape, tile_px0) == (1, (1, 5, 2), 512)
        return self.scale * features.mean(1)

    def slide_representations(self, features):
        assert self.text_decoder is None
        return {"image_embedding": self.scale * features.mean(1)}

    def get_base_embedding(self, tiles):
        return self.scale * tiles.mean(1)


class Batch(dict):
    def to(self, _device):
        return self


@pytest.mark.parametrize("name", ["titan", "prism", "prism2"])
def test_models_of_the_hub_are_asked_as_their_cards_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def from_pretrained(place, **options):
        loaded.append((place, options))
        return Remote()

    def processor(place, **options):
        return lambda tile_embeddings: Batch(tiles=torch.stack(tile_embeddings))

    fake = types.SimpleNamespace(
        AutoModel=types.SimpleNamespace(from_pretrained=from_pretrained),
        AutoProcessor=types.SimpleNamespace(from_pretrained=processor),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    encoder = load_slide_encoder(name, allow_remote_code=True, device="cpu")
    row = SLIDE_ENCODERS[name]
    assert [(place, options["trust_remote_code"], options.get("revision", "")) for place, options in loaded] == [
        (row.source, True, row.revision)
    ]
    bag = bag_of(row, dim=4)
    np.testing.assert_allclose(encoder.vector([bag]), 2 * bag.features.mean(0), rtol=1e-5)

    def refuse(place, **options):
        raise OSError("no access\nand more")

    monkeypatch.setattr(fake.AutoModel, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(no access\)"):
        load_slide_encoder(name, allow_remote_code=True)


def test_moozy_is_given_files_of_all_slides_of_a_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("moozy.encoding")

    def load_sample(name, path, **_):
        import h5py

        with h5py.File(path) as file:
            assert dict(file["coords"].attrs) == {"patch_size_level0": 224, "patch_size": 224}
            return file["features"][:]

    package.ensure_checkpoint = lambda: "weights"
    package.load_stage2_inference_model = lambda path, device: nn.Linear(1, 1)
    package.load_stage2_slide_sample = load_sample
    package.run_case_encoding = lambda model, slides, **_: {
        "cls": torch.from_numpy(np.concatenate(slides)).sum(0)[None]
    }
    monkeypatch.setitem(sys.modules, "moozy", types.ModuleType("moozy"))
    monkeypatch.setitem(sys.modules, "moozy.encoding", package)
    encoder = load_slide_encoder("moozy", allow_remote_code=True, device="cpu")
    bags = [bag_of(SLIDE_ENCODERS["moozy"], n, dim=3, seed=n) for n in (2, 5)]
    np.testing.assert_allclose(encoder.vector(bags), np.concatenate([bag.features for bag in bags]).sum(0), rtol=1e-5)


@pytest.mark.parametrize("name", ["gigapath_slide", "moozy"])
def test_a_package_that_is_missing_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gigapath", "moozy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install"):
        load_slide_encoder(name, allow_remote_code=True)

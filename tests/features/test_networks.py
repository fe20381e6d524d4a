"""Pooling on known tokens, CTransPath's stem, names of other libraries."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eosin.features._encoders import ENCODERS
from eosin.features._networks import (
    EncoderNetwork,
    PooledTransformer,
    adapt_timm_state,
    build_ctranspath,
    build_keep,
    build_lite0,
    build_timm,
    pool_tokens,
)
from eosin.features._weights import find_weights, load_strictly, read_state

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 0}


def test_pooling_on_known_tokens() -> None:
    tokens = torch.tensor([[[1.0, 10.0], [100.0, 100.0], [2.0, 3.0], [4.0, 5.0]]])
    assert pool_tokens(tokens, "cls", 2).tolist() == [[1, 10]]
    assert pool_tokens(tokens, "cls_mean", 2).tolist() == [[1, 10, 3, 4]]
    assert pool_tokens(tokens, "cls_mean", 1)[0, 2].item() == pytest.approx(106 / 3)
    with pytest.raises(ValueError, match="network"):
        pool_tokens(tokens, "network", 1)


def test_registers_are_left_out_of_the_mean() -> None:
    network = build_timm("vit_base_patch14_reg4_dinov2", "cls_mean", TINY | {"mlp_ratio": 2})
    assert isinstance(network, PooledTransformer)
    network.eval()
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = network.trunk.forward_features(pictures)
        expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
        assert tokens.shape == (2, 1 + 4 + 16, 32)
        torch.testing.assert_close(network(pictures), expected)


def randomise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.2 if value.is_floating_point() else value
        for name, value in state.items()
    }


def split_qkv(state: dict[str, Tensor], names: tuple[str, str, str]) -> dict[str, Tensor]:
    split = {}
    for name, value in state.items():
        stem, found, end = name.partition("attn.qkv.")
        if found:
            split |= {f"{stem}{part}.{end}": chunk for part, chunk in zip(names, value.chunk(3), strict=True)}
        else:
            split[name] = value
    return split


def renamed(state: dict[str, Tensor], pairs: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        for ours, theirs in pairs.items():
            name = name.replace(ours, theirs)
        result[name] = value
    return result


HF_COMMON = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.output.dense",
    "blocks.": "encoder.layer.",
}
HF_VIT = HF_COMMON | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_DINO = HF_COMMON | {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
HF_SWIGLU = HF_DINO | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")


@pytest.mark.parametrize(
    ("architecture", "pairs"),
    [("vit_base_patch16_224", HF_VIT), ("vit_base_patch14_dinov2", HF_DINO), ("vit_giant_patch14_dinov2", HF_SWIGLU)],
)
def test_names_of_transformers(architecture: str, pairs: dict[str, str]) -> None:
    network = build_timm(architecture, "cls", TINY)
    state = randomise(network.trunk.state_dict())
    theirs = split_qkv(state, ATTENTION)
    theirs = renamed(theirs, pairs)
    final = {name: name.replace("norm.", "layernorm.") for name in theirs if name.startswith("norm.")}
    theirs = {final.get(name, name): value for name, value in theirs.items()}
    theirs["embeddings.mask_token"] = torch.zeros(1, 32)
    adapted = adapt_timm_state(network.trunk, theirs)
    load_strictly(network.trunk, adapted, Path("x"))
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
LIKE = {  # what the rows are built from, and the class of `transformers` that the authors name
    "phikon": ("ViTModel", "ViTConfig", {"intermediate_size": 64, "layer_norm_eps": 1e-12}),
    "phikon_v2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}),
    "midnight12k": ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
}


def small_of(name: str) -> EncoderNetwork:
    """Build the network of a row at toy size, with everything else as the row says."""
    build = ENCODERS[name].build
    assert isinstance(build, partial)
    arguments = {key: value for key, value in build.args[2].items() if key not in TINY} | TINY
    if name == "midnight12k":
        arguments |= {"mlp_ratio": 2 * 88 / 32}
    return build_timm(build.args[0], build.args[1], arguments, **build.keywords).eval()


def transformers_model(name: str, image_px: int) -> Any:
    transformers = pytest.importorskip("transformers")
    model, config, options = LIKE[name]
    network = getattr(transformers, model)(getattr(transformers, config)(**SMALL, **options, image_size=image_px))
    network.load_state_dict(randomise(network.state_dict()))
    return network.eval()


def saved(network: Any, folder: Path) -> dict[str, Tensor]:
    """Return the weights as the library writes them, which is how they are on the hub."""
    network.save_pretrained(folder)
    return read_state(find_weights(folder))


@pytest.mark.parametrize("layout", ["file", "memory"])
@pytest.mark.parametrize(
    ("name", "image_px"),
    [("phikon", 32), ("phikon_v2", 32), ("phikon_v2", 40), ("midnight12k", 32), ("midnight12k", 40)],
)
def test_equal_to_transformers(name: str, layout: str, image_px: int, tmp_path: Path) -> None:
    theirs = transformers_model(name, image_px)
    network = small_of(name)
    state = saved(theirs, tmp_path) if layout == "file" else theirs.state_dict()
    load_strictly(network.trunk, network.adapt(state), Path("x"))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(pictures), theirs(pictures).last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("image_px", [32, 40])
def test_registers_equal_to_transformers(image_px: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, image_size=image_px, num_register_tokens=4)
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    theirs.load_state_dict(randomise(theirs.state_dict()))
    network = build_timm("vit_base_patch14_reg4_dinov2", "cls_mean", TINY).eval()
    load_strictly(network.trunk, network.adapt(saved(theirs, tmp_path)), Path("x"))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = theirs(pictures).last_hidden_state
        expected = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1)
        torch.testing.assert_close(network(pictures), expected, rtol=1e-4, atol=1e-5)


def test_plip_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vision = SMALL | {"intermediate_size": 64, "image_size": 32}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "pad_token_id": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=6)
    theirs = transformers.CLIPModel(config).eval()
    theirs.load_state_dict(randomise(theirs.state_dict()))
    build = ENCODERS["plip"].build
    assert isinstance(build, partial)
    network = build_timm(build.args[0], build.args[1], build.args[2] | TINY | {"num_classes": 6}).eval()
    load_strictly(network.trunk, network.adapt(saved(theirs, tmp_path)), Path("x"))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tower = theirs.vision_model(pixel_values=pictures).pooler_output
        torch.testing.assert_close(network(pictures), theirs.visual_projection(tower), rtol=1e-4, atol=1e-5)


FULL = {  # the settings in the repositories' config.json, as far as they differ from the library's
    "phikon": ("ViTModel", "ViTConfig", {}),
    "phikon_v2": (
        "Dinov2Model",
        "Dinov2Config",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16},
    ),
    "midnight12k": (
        "Dinov2Model",
        "Dinov2Config",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_weights_of_transformers_fit(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model, config, options = FULL[name]
    with torch.device("meta"):  # shapes without memory
        state = getattr(transformers, model)(getattr(transformers, config)(**options, image_size=224)).state_dict()
        network = ENCODERS[name].build()
        adapted = network.adapt(state)
    assert {key: value.shape for key, value in adapted.items() if not key.startswith("pooler")} == {
        key: value.shape for key, value in network.trunk.state_dict().items()
    }


def test_clip_names_of_transformers() -> None:
    network = build_timm("vit_base_patch32_clip_quickgelu_224", "network", TINY | {"num_classes": 6})
    state = randomise(network.trunk.state_dict())
    state["head.bias"] = torch.zeros(6)
    theirs = split_qkv(state, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    pairs = {
        "norm_pre.": "vision_model.pre_layrnorm.",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "blocks.": "vision_model.encoder.layers.",
    }
    theirs = renamed(theirs, pairs)
    theirs["vision_model.embeddings.class_embedding"] = theirs.pop("cls_token").flatten()
    theirs["vision_model.embeddings.position_embedding.weight"] = theirs.pop("pos_embed")[0]
    theirs["visual_projection.weight"] = theirs.pop("head.weight")
    theirs |= {f"vision_model.post_layernorm.{end}": theirs.pop(f"norm.{end}") for end in ("weight", "bias")}
    theirs |= {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(())}
    del theirs["head.bias"]
    load_strictly(network.trunk, adapt_timm_state(network.trunk, theirs), Path("x"))
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_ctranspath_takes_its_published_names() -> None:
    network = build_ctranspath()
    state = randomise(network.trunk.state_dict())
    published = {
        name.replace(f"layers.{stage + 1}.downsample", f"layers.{stage}.downsample"): value
        for name, value in state.items()
        for stage in [next((i for i in range(3) if f"layers.{i + 1}.downsample" in name), 0)]
    }
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    published["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    assert "patch_embed.proj.6.weight" in published
    load_strictly(network.trunk, adapt_timm_state(network.trunk, published), Path("x"))
    loaded = network.trunk.state_dict()
    assert torch.equal(loaded["layers.3.downsample.reduction.weight"], state["layers.3.downsample.reduction.weight"])
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 768)


@pytest.mark.parametrize("renamed_scales", [False, True])
def test_keep_takes_the_names_of_the_hub(renamed_scales: bool) -> None:
    with torch.device("meta"):
        network = build_keep()
        published = {f"text.{n}": torch.empty(1) for n in range(3)} | {"logit_scale": torch.empty(())}
        for name, value in network.trunk.state_dict().items():
            published[name.replace(".gamma", ".weight") if renamed_scales else name] = value
        load_strictly(network.trunk, network.adapt(published), Path("x"))
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 768)


def test_keep_gives_rows_of_length_one() -> None:
    with torch.device("meta"):
        network = build_keep()
    network.trunk.visual = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(32), torch.nn.Flatten())
    network.trunk.visual_head = torch.nn.Linear(3 * 32 * 32, 7)
    rows = network(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def dino_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's names as sharded DINOv2 training saves them: blocks in chunks, packed SwiGLU as w12 and w3."""
    named = {name.replace("blocks.", "blocks.0.").replace("mlp.fc1", "mlp.w12"): v for name, v in state.items()}
    return {name.replace("mlp.fc2", "mlp.w3"): value for name, value in named.items()}


@pytest.mark.parametrize("registers", [False, True])
def test_names_of_dinov2_training(registers: bool) -> None:
    suffix = "reg4_dinov2" if registers else "dinov2"
    network = build_timm(f"vit_giant_patch14_{suffix}", "cls", TINY)
    state = randomise(network.trunk.state_dict())
    theirs = dino_names(state) | {"mask_token": torch.zeros(1, 32)}
    if registers:  # the published networks also have a position for the class token
        offset = torch.full((1, 1, 32), 0.5)
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.cat([offset, theirs["pos_embed"]], 1)
        theirs["cls_token"] = theirs["cls_token"] - offset
    load_strictly(network.trunk, network.adapt(theirs), Path("x"))
    for name, value in network.trunk.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_ibot_leaves_its_mask_behind() -> None:
    network = build_timm("vit_base_patch16_224", "cls", TINY)
    state = randomise(network.trunk.state_dict())
    load_strictly(network.trunk, network.adapt(state | {"masked_embed": torch.zeros(1, 32)}), Path("x"))
    assert torch.equal(network.trunk.pos_embed, state["pos_embed"])


def published_lite(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights under the names that EfficientNet-Lite0 is published with, one block of the two kinds by hand."""
    depth = (1, 2, 2, 3, 3, 4, 1)
    flat = {(stage, block): sum(depth[:stage]) + block for stage in range(7) for block in range(depth[stage])}
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    expanded = {
        "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
        "conv_pwl": "_project_conv", "bn3": "_bn2",
    }  # fmt: skip
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    theirs = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            layers = plain if parts[1] == "0" else expanded
            number = flat[int(parts[1]), int(parts[2])]
            theirs[f"_blocks.{number}.{layers[parts[3]]}.{parts[4]}"] = value
        else:
            theirs[f"{outside[parts[0]]}.{parts[1]}"] = value
    return theirs | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_efficientnet_lite_takes_its_published_names() -> None:
    network = build_lite0()
    state = randomise(network.trunk.state_dict())
    published = published_lite(state)
    assert "_blocks.15._project_conv.weight" in published
    load_strictly(network.trunk, network.adapt(published), Path("x"))
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert set(network.adapt(dict(state))) == set(state)
    with pytest.raises(ValueError, match="293 tensors, where the network has 294"):
        network.adapt({name: value for name, value in published.items() if name != "_bn0.bias"})


def test_hibou_is_a_transformer_with_registers_and_gates() -> None:
    """Two blocks of the size that the model's config.json states, from the package transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=768, num_hidden_layers=2, num_attention_heads=12, image_size=224, patch_size=14,
        num_register_tokens=4, use_swiglu_ffn=True, mlp_ratio=4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    build = ENCODERS["hibou_b"].build
    architecture, pooling, arguments = build.args
    network = build.func(architecture, pooling, {**arguments, "depth": 2}, **build.keywords)
    network.trunk.load_state_dict(network.adapt(dict(theirs.state_dict())))
    pictures = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(pictures), theirs(pixel_values=pictures).pooler_output)
